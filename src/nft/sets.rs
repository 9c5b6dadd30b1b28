//! Sets that the administrator owns, in tables of any name: who is let in is added to them, so that rules of one's own match
//! a user.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use netlink_packet_netfilter::NetfilterProtoFamily;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::attributes::number;
use super::{Door, ElementError, TABLE};
use crate::service::Port;

/// Bytes of the longest name (`NFT_NAME_MAXLEN` counts the terminator).
const NAME_MAX: usize = 255;

/// Attributes of a set (`enum nft_set_attributes` of linux/netfilter/nf_tables.h).
const SET_FLAGS: u16 = 3;
const SET_KEY_TYPE: u16 = 4;

/// Flags of a set (`enum nft_set_flags`).
const CONSTANT: u32 = 0x2;
const INTERVAL: u32 = 0x4;
const MAP: u32 = 0x8;
const TIMEOUT: u32 = 0x10;

/// What nft calls the types of keys (`enum datatypes` of its datatype.h); a concatenation has six bits for each.
const IPV4_ADDR: u32 = 7;
const IPV6_ADDR: u32 = 8;
const PROTO_AND_PORT: u32 = (12 << 6) | 13;

/// Families of tables, as nft writes them.
const FAMILIES: [(&str, NetfilterProtoFamily); 6] = [
    ("ip", NetfilterProtoFamily::IPv4),
    ("ip6", NetfilterProtoFamily::IPv6),
    ("inet", NetfilterProtoFamily::Inet),
    ("arp", NetfilterProtoFamily::ARP),
    ("bridge", NetfilterProtoFamily::Bridge),
    ("netdev", NetfilterProtoFamily::NetDev),
];

/// A set, written as nft does: `inet filter alice`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SetName {
    family: String,
    pub(super) table: String,
    pub(super) set: String,
}

/// One element of such a set: a source, with the port that is open to it where the set has ports.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Member {
    /// Where.
    pub set: SetName,
    /// Who.
    pub source: IpAddr,
    /// The port, where the set's keys are `address . inet_proto . inet_service`.
    pub port: Option<Port>,
}

/// Why a set cannot take anybody.
#[derive(Debug, Error)]
pub enum SetError {
    /// It is not there.
    #[error("there is no set {0}")]
    Missing(SetName),
    /// Its keys are none that a source fits.
    #[error("set {0} is not of type ipv4_addr or ipv6_addr, alone or followed by inet_proto . inet_service")]
    Type(SetName),
    /// It lacks `timeout`, or has a flag that it must not have.
    #[error("set {0} must have the flag timeout, and not constant or interval")]
    Flags(SetName),
    /// The kernel did not do it.
    #[error("set {0}: {1}")]
    Kernel(SetName, ElementError),
}

/// What a set's keys are made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    is_ipv4: bool,
    has_port: bool,
}

impl SetName {
    /// As the kernel tells of it.
    pub(super) fn of_kernel(family: u8, table: &[u8], set: &[u8]) -> Option<Self> {
        let (family, _) = FAMILIES.iter().find(|(_, known)| u8::from(*known) == family)?;
        let [table, set] = [table, set].map(std::str::from_utf8);
        format!("{family} {} {}", table.ok()?, set.ok()?).parse().ok()
    }

    pub(super) fn family(&self) -> NetfilterProtoFamily {
        let known = FAMILIES.iter().find(|(name, _)| *name == self.family);
        known.map_or(NetfilterProtoFamily::Unspec, |(_, family)| *family)
    }

    /// What the kernel says of the set.
    pub(super) fn layout(&self, attributes: &[u8]) -> Result<Layout, SetError> {
        let flags = number(attributes, SET_FLAGS).unwrap_or_default();
        let key = number(attributes, SET_KEY_TYPE).unwrap_or_default();
        if flags & MAP != 0 {
            return Err(SetError::Type(self.clone()));
        }
        if flags & TIMEOUT == 0 || flags & (CONSTANT | INTERVAL) != 0 {
            return Err(SetError::Flags(self.clone()));
        }
        let has_port = key & 0xfff == PROTO_AND_PORT;
        match if has_port { key >> 12 } else { key } {
            IPV4_ADDR => Ok(Layout { is_ipv4: true, has_port }),
            IPV6_ADDR => Ok(Layout { is_ipv4: false, has_port }),
            _ => Err(SetError::Type(self.clone())),
        }
    }

    /// The element for a door, unless its source is of the other family.
    pub fn member(&self, layout: Layout, door: &Door) -> Option<Member> {
        let port = layout.has_port.then_some(door.port);
        (layout.is_ipv4 == door.source.is_ipv4()).then(|| Member { set: self.clone(), source: door.source, port })
    }
}

impl FromStr for SetName {
    type Err = SetNameError;

    fn from_str(text: &str) -> Result<Self, SetNameError> {
        let wrong = || SetNameError::Form(text.escape_default().to_string());
        let words: Vec<&str> = text.split(' ').collect();
        let [family, table, set] = *words.as_slice() else { return Err(wrong()) };
        let is_name = |name: &str| {
            let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '/' | '\\');
            !name.is_empty() && name.len() <= NAME_MAX && name.chars().all(is_allowed)
        };
        if !FAMILIES.iter().any(|(known, _)| *known == family) || !is_name(table) || !is_name(set) {
            return Err(wrong());
        }
        if (family, table) == ("inet", TABLE) {
            return Err(SetNameError::Ours);
        }
        Ok(Self { family: family.to_owned(), table: table.to_owned(), set: set.to_owned() })
    }
}

crate::service::serde_as_text!(SetName);

impl fmt::Display for SetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.family, self.table, self.set)
    }
}

/// Not a set of the administrator's.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SetNameError {
    /// Not three words that nft knows.
    #[error("`{0}` is no set: write family, table and set as nft does, `inet filter alice`")]
    Form(String),
    /// Of our table.
    #[error("table inet {TABLE} is knockq's own: make the set in a table of yours")]
    Ours,
}

#[cfg(test)]
mod tests {
    use super::{Layout, SetError, SetName, SetNameError};

    #[test]
    fn a_set_has_a_family_a_table_and_a_name_and_is_none_of_ours() {
        for text in ["inet filter alice", "ip nat group-1", "ip6 a/b c.d"] {
            assert_eq!(text.parse::<SetName>().unwrap().to_string(), text);
        }
        for text in ["", "filter alice", "inet filter", "inet  alice", "inet filter alice x", "ipx a b", "inet a;b c"] {
            assert!(matches!(text.parse::<SetName>(), Err(SetNameError::Form(_))), "{text}");
        }
        assert_eq!("inet knockq open4".parse::<SetName>(), Err(SetNameError::Ours));
        assert!("ip knockq mine".parse::<SetName>().is_ok(), "another table");
    }

    /// Attributes as the kernel sends them.
    fn attributes(flags: u32, key: u32) -> Vec<u8> {
        let attribute = |kind: u16, value: u32| [&[8, 0], &kind.to_ne_bytes()[..], &value.to_be_bytes()].concat();
        [attribute(3, flags), attribute(4, key)].concat()
    }

    #[test]
    fn only_sets_of_sources_that_forget_take_anybody() {
        let set: SetName = "inet filter alice".parse().unwrap();
        for (key, is_ipv4, has_port) in [
            (7, true, false),
            (8, false, false),
            (7 << 12 | 12 << 6 | 13, true, true),
            (8 << 12 | 12 << 6 | 13, false, true),
        ] {
            assert_eq!(set.layout(&attributes(0x10, key)).unwrap(), Layout { is_ipv4, has_port });
            assert!(matches!(set.layout(&attributes(0x18, key)), Err(SetError::Type(_))), "a map");
            for flags in [0, 0x12, 0x14] {
                assert!(matches!(set.layout(&attributes(flags, key)), Err(SetError::Flags(_))), "{flags:#x}");
            }
        }
        for key in [0, 9, 13, 7 << 6 | 8, 7 << 6 | 13, 12 << 6 | 13, 13 << 12 | 12 << 6 | 13] {
            assert!(matches!(set.layout(&attributes(0x10, key)), Err(SetError::Type(_))), "{key:#x}");
        }
    }
}
