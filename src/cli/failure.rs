//! From the modules' errors to message, hint and exit code.

use std::fmt;
use std::io;

use crate::config::{ConfigError, Diagnostic, FileError};

mod client;
mod server;

/// Something did not work.
pub(super) const FAILED: u8 = 1;
/// The command line is wrong (sysexits.h: EX_USAGE).
pub(super) const USAGE: u8 = 64;
/// A command that was to be run cannot be, as shells and env(1) have it.
pub(super) const NOT_RUN: u8 = 126;
/// There is no such command.
pub(super) const NOT_FOUND: u8 = 127;
/// A privilege is missing (EX_NOPERM).
pub(super) const PERMISSION: u8 = 77;
/// A configuration, key or profile is wrong (EX_CONFIG).
pub(super) const CONFIGURATION: u8 = 78;

/// What to do with a knockknock profile that is to be added.
pub(super) const IMPORT: &str =
    "take it from where knockknock has it, keys and all: knockq import knockknock ~/.knockknock/HOST";

/// How a command ends when it does not succeed.
pub(super) struct Failure {
    message: String,
    hint: Option<String>,
    pub(super) code: u8,
}

impl Failure {
    pub(super) const fn new(message: String) -> Self {
        Self { message, hint: None, code: FAILED }
    }

    pub(super) fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    pub(super) fn code(self, code: u8) -> Self {
        Self { code, ..self }
    }

    /// A hint where there is none yet.
    pub(super) fn or_hint(self, hint: &str) -> Self {
        Self { hint: self.hint.or_else(|| Some(hint.to_owned())), ..self }
    }

    /// What is wrong, and what to do about it.
    pub(super) fn into_parts(self) -> (String, Option<String>) {
        (self.message, self.hint)
    }

    /// In one line, for a log.
    pub(super) fn line(&self) -> String {
        let hint = self.hint.as_ref().map(|hint| format!(". Hint: {hint}")).unwrap_or_default();
        format!("{}{hint}", self.message).split_whitespace().collect::<Vec<_>>().join(" ")
    }

    fn maybe_hint(self, hint: Option<String>) -> Self {
        Self { hint, ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.message.is_empty() {
            writeln!(f, "knockq: {}", self.message)?;
        }
        match &self.hint {
            Some(hint) => writeln!(f, "Hint: {hint}"),
            None => Ok(()),
        }
    }
}

impl From<FileError> for Failure {
    fn from(error: FileError) -> Self {
        let code = if error.is_permission() {
            PERMISSION
        } else if error.is_of_disk() {
            FAILED
        } else {
            CONFIGURATION
        };
        Self::new(error.to_string()).maybe_hint(error.hint()).code(code)
    }
}

impl From<Diagnostic> for Failure {
    fn from(error: Diagnostic) -> Self {
        ConfigError::Content(error).into()
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        match error {
            ConfigError::File(FileError::Io { path, cause }) if cause.kind() == io::ErrorKind::NotFound => {
                Self::new(format!("{}: {cause}", path.display()))
                    .hint("make a configuration with `knockq init --protect tcp/22`, or name one with --config")
                    .code(CONFIGURATION)
            }
            ConfigError::ServerKeyFile(error) if error.kind() != Some(io::ErrorKind::NotFound) => error.into(),
            ConfigError::File(error) => error.into(),
            other => Self::new(other.to_string()).maybe_hint(other.hint()).code(CONFIGURATION),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::path::Path;

    use super::{CONFIGURATION, FAILED, Failure, PERMISSION};
    use crate::config::FileError;

    #[test]
    fn a_disk_that_takes_no_writes_is_no_wrong_configuration() {
        for (kind, code) in [
            (ErrorKind::StorageFull, FAILED),
            (ErrorKind::QuotaExceeded, FAILED),
            (ErrorKind::ReadOnlyFilesystem, FAILED),
            (ErrorKind::PermissionDenied, PERMISSION),
            (ErrorKind::NotFound, CONFIGURATION),
        ] {
            let failure = Failure::from(FileError::io(Path::new("f"), kind));
            assert_eq!(failure.code, code, "{kind}");
            assert_eq!(failure.to_string().contains("df"), code == FAILED, "{failure}");
        }
    }
}
