//! What knockknock keeps of a profile: four files in a directory, which are read and never changed.

use std::fs;
use std::num::NonZeroU16;
use std::path::{self, Path, PathBuf};
use std::str::FromStr;

use thiserror::Error;
use zeroize::Zeroizing;

use crate::cli::failure::{CONFIGURATION, Failure, USAGE};
use crate::config::FileError;
use crate::config::secure_file::{self, Privacy};
use crate::crypto::PublicKey;
use crate::crypto::knockknock::{Secrets, SecretsError};
use crate::service::{Name, NameError};

const CIPHER_KEY: &str = "cipher.key";
const MAC_KEY: &str = "mac.key";
const COUNTER: &str = "counter";
const CONFIG: &str = "config";

/// A profile as knockknock left it.
pub(super) struct Original {
    /// The profile's name: its directory's, unless another was asked for.
    pub(super) name: Name,
    /// Where it is.
    pub(super) directory: PathBuf,
    /// Both keys in the text of a key file: two lines of base64.
    pub(super) keys: Zeroizing<String>,
    /// What stands for these keys where one names a user.
    pub(super) stand_in: PublicKey,
    /// The number of the next knock.
    pub(super) counter: u32,
    /// Where one knocks.
    pub(super) knock_port: NonZeroU16,
}

/// What a directory is to knockknock.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// The profile of one host, as a client has it.
    Profile,
    /// The directories of a server's profiles, in order.
    Profiles(Vec<PathBuf>),
}

/// Why a file of a profile says nothing.
#[derive(Debug, Error, PartialEq, Eq)]
enum Malformed {
    #[error("is not one line of base64")]
    NotOneLine,
    #[error("`{0}` is no counter: 0 to 4294967295, in decimal")]
    Counter(String),
    #[error("has no knock_port in [main]")]
    NoKnockPort,
    #[error("has knock_port in [main] twice")]
    TwoKnockPorts,
    #[error("knock_port = {0} is no port: 1 to 65535")]
    KnockPort(String),
    #[error("line {0} is neither a section, nor a setting, nor a comment")]
    Line(usize),
}

/// Looks at what a directory holds.
///
/// # Errors
/// When it cannot be read, is not safe, or holds no profile.
pub(super) fn look(directory: &Path) -> Result<Found, Failure> {
    fs::symlink_metadata(directory).map_err(|cause| {
        Failure::from(FileError::io(directory, cause)).or_hint("name the directory that knockknock keeps profiles in")
    })?;
    let mut inside = secure_file::entries(directory)?;
    if is_profile(&inside) {
        return Ok(Found::Profile);
    }
    inside.sort();
    let mut profiles = Vec::new();
    for path in inside.into_iter().filter(|path| path.is_dir()) {
        if is_profile(&secure_file::entries(&path)?) {
            profiles.push(path);
        }
    }
    if profiles.is_empty() {
        let message = format!("{}: holds no profile of knockknock, nor directories that do", directory.display());
        return Err(Failure::new(message)
            .hint("a server's are in a directory `profiles`; a client's is a host's own, such as ~/.knockknock/HOST")
            .code(USAGE));
    }
    Ok(Found::Profiles(profiles))
}

/// Half a profile counts: what it lacks is then said by name.
fn is_profile(inside: &[PathBuf]) -> bool {
    let is_one = |path: &PathBuf| [CIPHER_KEY, MAC_KEY].iter().any(|name| path.ends_with(name));
    inside.iter().any(is_one)
}

/// A profile's name or its host's address: the last word of its directory's path.
///
/// # Errors
/// When it is none that knockq could use.
pub(super) fn last_word<T: FromStr<Err = NameError>>(directory: &Path, remedy: &str) -> Result<T, Failure> {
    let absolute = path::absolute(directory).map_err(|cause| FileError::io(directory, cause))?;
    let last = absolute.file_name().unwrap_or_default().to_string_lossy();
    last.parse().map_err(|error| {
        Failure::new(format!("{}: {error}", directory.display())).hint(remedy.to_owned()).code(CONFIGURATION)
    })
}

impl Original {
    /// Reads all four files, after all checks on them and on every directory above them.
    ///
    /// # Errors
    /// The first file that is missing, is not safe, or is not what it should be.
    pub(super) fn read(directory: &Path, name: Name) -> Result<Self, Failure> {
        let text = |file: &str, privacy| {
            let text = secure_file::read(&directory.join(file), privacy).map_err(Failure::from);
            text.map_err(|failure| failure.or_hint("a profile has four files: cipher.key, mac.key, counter and config"))
        };
        let at = |file: &str, malformed: Malformed| {
            Failure::new(format!("{}: {malformed}", directory.join(file).display()))
                .hint("put back what knockknock wrote there, from a backup or from the other side's profile")
                .code(CONFIGURATION)
        };
        let cipher = text(CIPHER_KEY, Privacy::Secret)?;
        let mac = text(MAC_KEY, Privacy::Secret)?;
        let cipher = one_line(&cipher).ok_or_else(|| at(CIPHER_KEY, Malformed::NotOneLine))?;
        let mac = one_line(&mac).ok_or_else(|| at(MAC_KEY, Malformed::NotOneLine))?;
        let keys = Zeroizing::new([cipher, "\n", mac, "\n"].concat());
        let stand_in = stand_in(&keys).map_err(|error| {
            Failure::new(format!("{}: {error}", directory.display()))
                .hint("put back the keys from a backup or from the other side's profile")
                .code(CONFIGURATION)
        })?;
        let counter = counter(&text(COUNTER, Privacy::Public)?).map_err(|malformed| at(COUNTER, malformed))?;
        let knock_port = knock_port(&text(CONFIG, Privacy::Public)?).map_err(|malformed| at(CONFIG, malformed))?;
        Ok(Self { name, directory: directory.to_owned(), keys, stand_in, counter, knock_port })
    }
}

fn stand_in(keys: &str) -> Result<PublicKey, String> {
    let secrets: Secrets = keys.parse().map_err(|error: SecretsError| error.to_string())?;
    secrets.stand_in().map_err(|error| error.to_string())
}

fn one_line(text: &str) -> Option<&str> {
    let line = text.trim_ascii();
    (!line.is_empty() && !line.contains(['\n', '\r'])).then_some(line)
}

/// The number of the next knock. Python's `int` takes blanks around it too.
fn counter(text: &str) -> Result<u32, Malformed> {
    let text = text.trim_ascii();
    text.parse().map_err(|_| Malformed::Counter(shown(text)))
}

/// `knock_port` of `[main]`, from what Python's `ConfigParser` reads: names of settings in any case, `=` or `:` after them,
/// comments after `#` or `;`, and lines that go on where the next one is indented.
fn knock_port(text: &str) -> Result<NonZeroU16, Malformed> {
    let (mut section, mut found) = ("", None::<String>);
    // Of the setting before, in this section: whether it is the one that is looked for.
    let mut before = None;
    for (number, line) in (1..).zip(text.lines()) {
        let content = line.trim();
        if content.is_empty() || content.starts_with(['#', ';']) {
            continue;
        }
        if let Some(is_it) = before.filter(|_| line.starts_with(char::is_whitespace)) {
            if let Some(value) = found.as_mut().filter(|_| is_it) {
                value.push('\n');
                value.push_str(content);
            }
        } else if let Some((name, _)) = content.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            (section, before) = (name, None);
        } else {
            let (name, value) = content.split_once(['=', ':']).ok_or(Malformed::Line(number))?;
            let is_it = section == "main" && name.trim().eq_ignore_ascii_case("knock_port");
            before = Some(is_it);
            if is_it && found.replace(without_comment(value)).is_some() {
                return Err(Malformed::TwoKnockPorts);
            }
        }
    }
    let value = found.ok_or(Malformed::NoKnockPort)?;
    value.parse().map_err(|_| Malformed::KnockPort(shown(&value)))
}

/// A value to the comment that follows it after a blank.
fn without_comment(value: &str) -> String {
    let comment = [" ;", "\t;", " #", "\t#"].iter().filter_map(|mark| value.find(mark)).min();
    value.get(..comment.unwrap_or(value.len())).unwrap_or(value).trim().to_owned()
}

/// As much of a file as fits into a message.
fn shown(text: &str) -> String {
    text.chars().take(40).collect::<String>().escape_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::{Malformed, counter, knock_port, one_line};

    #[test]
    fn a_counter_is_a_number_of_32_bits() {
        for (text, value) in [("0\n", 0), ("17\n", 17), ("17", 17), (" 17 \r\n", 17), ("4294967295\n", u32::MAX)] {
            assert_eq!(counter(text), Ok(value), "{text:?}");
        }
        for text in ["", "\n", "4294967296\n", "99999999999999999999", "-1\n", "0x11", "17L", "seventeen", "17\n18\n"] {
            let shown = text.trim().escape_default().to_string();
            assert_eq!(counter(text), Err(Malformed::Counter(shown)), "{text:?}");
        }
    }

    #[test]
    fn the_knock_port_is_read_as_pythons_config_parser_reads_it() {
        for text in [
            "[main]\nknock_port = 2222\n\n",
            "[main]\nknock_port=2222",
            "[main]\r\nKnock_Port : 2222\r\n",
            "# made by hand\n; twice\n\n[main]\n# 1\nknock_port=\t2222  ; of old\n",
            "[main]\nknock_port = 2222 # of old\nother = 1\n  and more of it\n[else]\nknock_port = 1\n",
            "[else]\nknock_port = 1\n[main]\nlater: x = y\nknock_port:2222\n",
            "[main]\nother = 1\n\nknock_port = 2222\n",
        ] {
            assert_eq!(knock_port(text).map(u16::from), Ok(2222), "{text:?}");
        }
    }

    #[test]
    fn a_knock_port_that_is_missing_or_none_is_named() {
        let port = |text: &str| Malformed::KnockPort(text.to_owned());
        for (text, error) in [
            ("", Malformed::NoKnockPort),
            ("[main]\n", Malformed::NoKnockPort),
            ("[Main]\nknock_port = 1\n", Malformed::NoKnockPort),
            ("knock_port = 1\n", Malformed::NoKnockPort),
            ("[main]\nknock_ports = 1\n", Malformed::NoKnockPort),
            ("[main]\nknock_port = 1\nKNOCK_PORT = 1\n", Malformed::TwoKnockPorts),
            ("[main]\nknock_port = 0\n", port("0")),
            ("[main]\nknock_port = 65536\n", port("65536")),
            ("[main]\nknock_port = -1\n", port("-1")),
            ("[main]\nknock_port =\n", port("")),
            ("[main]\nknock_port = 22\n  22\n", port("22\\n22")),
            ("[main]\nknock_port = ssh;\n", port("ssh;")),
            ("[main]\n\nknock_port\n", Malformed::Line(3)),
            ("\u{1b}[31m\n", Malformed::Line(1)),
        ] {
            assert_eq!(knock_port(text), Err(error), "{text:?}");
        }
    }

    #[test]
    fn a_key_is_one_line() {
        assert_eq!(one_line("abc=\r\n"), Some("abc="));
        for text in ["", "\n", "abc=\nabc=\n"] {
            assert_eq!(one_line(text), None, "{text:?}");
        }
    }
}
