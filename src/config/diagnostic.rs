//! Where in a file something is wrong.

use std::fmt;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::FileError;
use crate::crypto::knockknock::{Secrets, SecretsError};
use crate::crypto::{KeyError, PrivateKey};

/// Why a configuration is refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// A file cannot be used at all.
    #[error(transparent)]
    File(#[from] FileError),
    /// Something in a file is wrong.
    #[error(transparent)]
    Content(#[from] Diagnostic),
    /// The server's private key cannot be read.
    #[error(transparent)]
    ServerKeyFile(FileError),
    /// The file of the server's private key holds none.
    #[error("{}: {cause}", path.display())]
    ServerKey {
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: KeyError,
    },
    /// The file of a user's pre-shared key holds none.
    #[error("{}: {cause}", path.display())]
    PresharedKey {
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: KeyError,
    },
    /// The file of a knockknock profile's keys holds none.
    #[error("{}: {cause}", path.display())]
    ProfileKeys {
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: SecretsError,
    },
    /// A user's key is none.
    #[error("{}: {cause}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: KeyError,
    },
}

impl ConfigError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::ServerKeyFile(error) if error.kind() == Some(ErrorKind::NotFound) => Some(SERVER_KEY.to_owned()),
            Self::File(error) | Self::ServerKeyFile(error) => error.hint(),
            Self::Content(diagnostic) => diagnostic.hint.clone(),
            Self::ServerKey { .. } => Some(SERVER_KEY.to_owned()),
            Self::PresharedKey { .. } => {
                Some("restore it; or make another, for the user too: head -c 32 /dev/urandom | base64".to_owned())
            }
            Self::ProfileKeys { .. } => {
                Some("take it from the original profile: its cipher.key, then its mac.key, a line each".to_owned())
            }
            Self::Key { .. } => Some("the user makes one with `knockq keygen` on their machine".to_owned()),
        }
    }
}

/// Another key is no remedy: no user could knock any more.
const SERVER_KEY: &str = "restore it from a backup; with another key every user needs a new profile";

/// The field of a profile that holds a private key.
const BROUGHT_KEY: &str = "client_private_key";

/// Characters of a line or a message that are shown: a file from elsewhere may hold anything.
const SHOWN: usize = 400;

/// `file:line:col: message`, the line and a caret.
#[derive(Debug, Error)]
pub struct Diagnostic {
    path: PathBuf,
    line: usize,
    column: usize,
    /// `None` if it is not to be shown.
    source_line: Option<String>,
    message: String,
    hint: Option<String>,
}

impl Diagnostic {
    /// Points at a span of bytes in a file's text.
    pub fn new(path: &Path, text: &str, span: Range<usize>, message: impl Into<String>) -> Self {
        let before = text.get(..span.start).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let line = text.get(line_start..).unwrap_or_default().lines().next().unwrap_or_default();
        Self {
            path: path.to_owned(),
            line: before.matches('\n').count() + 1,
            column: before.get(line_start..).unwrap_or_default().chars().count() + 1,
            // A tab, say, takes one column: the caret stands below the character that it means.
            source_line: Some(line.chars().map(|c| if c.is_control() { ' ' } else { c }).take(SHOWN).collect()),
            message: message.into().chars().filter(|c| !c.is_control()).take(SHOWN).collect(),
            hint: None,
        }
    }

    /// What TOML or a type of ours did not take. Of a file that holds a key, nothing is shown: it may be a private one. Of a
    /// profile that brings a private key, no line is.
    pub fn of_toml(path: &Path, text: &str, error: &toml::de::Error) -> Self {
        if text.parse::<PrivateKey>().is_ok() || text.parse::<Secrets>().is_ok() {
            return Self::new(path, "", 0..0, "is a key file, which is shown to nobody");
        }
        let message = error.message().replace('\n', ", ");
        let diagnostic = Self::new(path, text, error.span().unwrap_or(0..0), message);
        let source_line = diagnostic.source_line.filter(|_| !text.contains(BROUGHT_KEY));
        Self { source_line, ..diagnostic }
    }

    /// With a remedy.
    #[must_use]
    pub fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { line, column, source_line, message, .. } = self;
        write!(f, "{}:{line}:{column}: {message}", self.path.display())?;
        let Some(source_line) = source_line else { return Ok(()) };
        let column = (*column).min(SHOWN);
        write!(f, "\n  {source_line}\n  {:>column$}", '^')
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::Diagnostic;

    #[test]
    fn the_caret_stands_below_what_is_wrong_whatever_stands_before_it() {
        for before in ["", "    ", "\t", "\u{1b}[2J\u{7}", "\u{e9}\u{4e16}"] {
            let text = format!("first = 1\n{before}wrong = 2\n");
            let start = text.find("wrong").unwrap();
            let shown = Diagnostic::new(Path::new("f"), &text, start..start + 5, "no").to_string();
            let [head, line, caret] = shown.lines().collect::<Vec<_>>()[..] else { panic!("{shown}") };
            assert_eq!(head, format!("f:2:{}: no", before.chars().count() + 1));
            let below: String = line.chars().skip(caret.chars().count() - 1).collect();
            assert_eq!(below, "wrong = 2", "{shown}");
            assert!(!line.contains(char::is_control), "{shown:?}");
        }
    }
}
