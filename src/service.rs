//! What a knock opens: names, transports and ports, in the words that every layer shares.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What serde's `try_from = "String", into = "String"` needs of a type that has a text, by which it is read and shown.
macro_rules! serde_as_text {
    ($type:ty) => {
        impl TryFrom<String> for $type {
            type Error = <Self as std::str::FromStr>::Err;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }
    };
}
pub(crate) use serde_as_text;

/// The name of a user, a service or a host profile: `[A-Za-z0-9._-]{1,64}`, not starting with a dot or a dash,
/// so that it is safe in a file name, an nft comment and a log line.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(Box<str>);

impl Name {
    /// Bytes in the longest name.
    pub const MAX_LEN: usize = 64;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if text.is_empty() || text.len() > Self::MAX_LEN {
            Err(NameError::Length(text.len()))
        } else if text.starts_with(['.', '-']) || !text.chars().all(is_allowed) {
            Err(NameError::Character(text.escape_default().to_string()))
        } else {
            Ok(Self(text.into()))
        }
    }
}

serde_as_text!(Name);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a text is not a [`Name`].
#[derive(Debug, Error, PartialEq, Eq)]
pub enum NameError {
    /// Empty, or longer than [`Name::MAX_LEN`] bytes.
    #[error("a name has 1 to 64 characters, not {0}")]
    Length(usize),
    /// Another character than those allowed, or a dot or dash at the start.
    #[error("`{0}` is not a name: use letters, digits, `.`, `_` and `-`, and start with a letter or digit")]
    Character(String),
    /// Not a host name or an IP address.
    #[error("`{0}` is neither a host name nor an IP address")]
    Address(String),
}

/// A host name or an IP address, as it goes into a profile: nothing in it could be taken for anything else in a file, a
/// message or a terminal.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostAddress(Box<str>);

impl HostAddress {
    /// The address as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for HostAddress {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | ':' | '%' | '_' | '-');
        if text.is_empty() || text.len() > 253 || !text.chars().all(is_allowed) {
            return Err(NameError::Address(text.chars().take(80).collect::<String>().escape_default().to_string()));
        }
        Ok(Self(text.into()))
    }
}

serde_as_text!(HostAddress);

impl From<std::net::IpAddr> for HostAddress {
    fn from(address: std::net::IpAddr) -> Self {
        Self(address.to_string().into())
    }
}

impl fmt::Display for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A transport protocol whose ports can be guarded.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Transport {
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
}

impl Transport {
    /// The protocol number of the IANA registry, as in the IPv4 header.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    /// The transport with this protocol number.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            _ => None,
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A port of one transport, written `tcp/22`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Port {
    /// Whose port it is.
    pub transport: Transport,
    /// 1 to 65535.
    pub number: u16,
}

impl FromStr for Port {
    type Err = PortError;

    fn from_str(text: &str) -> Result<Self, PortError> {
        let wrong = || PortError(text.escape_default().to_string());
        let (transport, number) = text.split_once('/').ok_or_else(wrong)?;
        let transport = match transport {
            "tcp" => Transport::Tcp,
            "udp" => Transport::Udp,
            _ => return Err(wrong()),
        };
        match number.parse() {
            Ok(number) if number > 0 => Ok(Self { transport, number }),
            _ => Err(wrong()),
        }
    }
}

serde_as_text!(Port);

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.transport, self.number)
    }
}

/// What every SYN to a knock port or a guarded port gets, whether it bears a knock or not.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// Silence, as behind most firewalls.
    #[default]
    Drop,
    /// The reset that a closed port gives (RFC 9293 section 3.5.2).
    Reset,
}

/// Not a port.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("`{0}` is not a port: write tcp/22 or udp/51820")]
pub struct PortError(String);

#[cfg(test)]
mod tests {
    use super::{Name, Port, Transport};

    #[test]
    fn names_that_could_leave_a_directory_or_a_line_are_refused() {
        for bad in ["", ".", "..", ".hidden", "-rf", "a/b", "a b", "a\n", "\u{e9}", &"x".repeat(65)] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
        }
        for good in ["alice", "a", "alice@".trim_end_matches('@'), "0.laptop_x-1", &"x".repeat(64)] {
            assert_eq!(good.parse::<Name>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn ports_are_parsed_once_and_print_as_written() {
        let port: Port = "udp/51820".parse().unwrap();
        assert_eq!((port.transport, port.number), (Transport::Udp, 51820));
        assert_eq!(port.to_string(), "udp/51820");
        for bad in ["22", "tcp/0", "tcp/65536", "sctp/9", "tcp/", "tcp/ 22", "/22"] {
            assert!(bad.parse::<Port>().is_err(), "{bad:?}");
        }
    }
}
