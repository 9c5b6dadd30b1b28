//! What a rule may ask of a packet, and what is known of it beforehand.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::client::address::own_addresses;
use crate::service::{Port, Transport};

/// The first packet of a connection from elsewhere, from an address that is routed back to where it came from.
#[derive(Clone, Copy)]
pub(super) struct Packet {
    pub(super) is_ipv6: bool,
    pub(super) port: Port,
    /// Its destination was translated: it is for another host, or for a container.
    pub(super) is_translated: bool,
}

/// Whether a condition is met.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Is {
    So,
    Not,
    Possible,
}

impl Is {
    const fn of(is: bool) -> Self {
        if is { Self::So } else { Self::Not }
    }

    const fn negated(self) -> Self {
        match self {
            Self::So => Self::Not,
            Self::Not => Self::So,
            Self::Possible => Self::Possible,
        }
    }
}

/// Something that a packet has.
pub(super) enum Field {
    /// This number.
    Number(u16),
    /// The value that has these names, and no other.
    Word(&'static [&'static str]),
    /// Any interface but that to itself.
    Interface,
    /// Any that is one host's.
    Address,
    /// One of these, which are this host's.
    Own(Vec<IpAddr>),
    /// SYN, and no other flag of TCP.
    Flags,
    /// Where answers go: there is such a way.
    Route,
    /// It has none of that.
    Absent,
    /// What is not known, or not understood.
    Unknown,
}

/// Headers that such a packet does not have: protocols that are neither TCP nor UDP, extensions of IPv6.
const OTHERS: [&str; 14] =
    ["icmp", "icmpv6", "igmp", "esp", "ah", "comp", "sctp", "dccp", "udplite", "frag", "hbh", "dst", "mh", "srh"];

/// The field that these words begin with, and the words after it.
pub(super) fn field(words: &[String], packet: Packet) -> (Field, &[String]) {
    let word = |place: usize| words.get(place).map_or("", String::as_str);
    let (tcp, udp): (&'static [&'static str], &'static [&'static str]) = (&["tcp", "6"], &["udp", "17"]);
    let is_tcp = packet.port.transport == Transport::Tcp;
    let transport = if is_tcp { tcp } else { udp };
    let (field, length) = match (word(0), word(1)) {
        ("tcp", _) if !is_tcp => (Field::Absent, 2),
        ("udp", _) if is_tcp => (Field::Absent, 2),
        ("ip", _) if packet.is_ipv6 => (Field::Absent, 2),
        ("ip6", _) if !packet.is_ipv6 => (Field::Absent, 2),
        (header, _) if OTHERS.contains(&header) => (Field::Absent, 2),
        ("rt", "type" | "hdrlength" | "seg-left") => (Field::Absent, 2),
        ("tcp" | "udp" | "th", "dport") => (Field::Number(packet.port.number), 2),
        ("tcp", "flags") => (Field::Flags, 2),
        ("ip", "protocol") | ("ip6", "nexthdr") | ("meta", "l4proto") => (Field::Word(transport), 2),
        ("ip" | "ip6", "daddr") if !packet.is_translated => (Field::Own(own(packet.is_ipv6)), 2),
        ("ip" | "ip6", "saddr" | "daddr") => (Field::Address, 2),
        ("meta", "nfproto") => (Field::Word(if packet.is_ipv6 { &["ipv6"] } else { &["ipv4"] }), 2),
        ("meta", "protocol") => (Field::Word(if packet.is_ipv6 { &["ip6"] } else { &["ip"] }), 2),
        ("meta", "pkttype") => (Field::Word(&["host", "unicast"]), 2),
        ("ct", "state") => (Field::Word(&["new"]), 2),
        ("ct", "direction") => (Field::Word(&["original"]), 2),
        ("ct", "status") if !packet.is_translated => (Field::Word(&[]), 2),
        ("meta", "iif" | "iifname") => (Field::Interface, 2),
        ("iif" | "iifname", _) => (Field::Interface, 1),
        ("fib", _) => fib(words, packet),
        _ => (Field::Unknown, 1),
    };
    (field, words.get(length..).unwrap_or_default())
}

/// `fib daddr . iif type`, `fib saddr . iif oif`: the kernel's own view of an address.
fn fib(words: &[String], packet: Packet) -> (Field, usize) {
    let is_result = |word: &String| matches!(word.as_str(), "type" | "oif" | "oifname" | "check");
    let Some(place) = words.iter().position(is_result) else { return (Field::Unknown, 1) };
    let result = words.get(place).map(String::as_str);
    let field = match (words.get(1).map(String::as_str), result) {
        (Some("daddr"), Some("type")) if !packet.is_translated => Field::Word(&["local"]),
        (Some("saddr"), Some("type")) => Field::Word(&["unicast"]),
        (Some("saddr"), Some(_)) => Field::Route,
        _ => Field::Unknown,
    };
    (field, place.saturating_add(1))
}

impl Field {
    /// Whether the comparison with which these words begin holds, and the words after it. Sets are looked up by `elements`.
    pub(super) fn compare<'a>(
        &self,
        words: &'a [String],
        elements: impl Fn(&str) -> Option<Vec<String>>,
    ) -> (Is, &'a [String]) {
        match self {
            Self::Absent => return (Is::Not, words),
            Self::Unknown => return (Is::Possible, words),
            Self::Flags => return flags(words),
            _ => {}
        }
        let (operator, words) = operator(words);
        let Some((value, rest)) = words.split_first() else { return (Is::Possible, words) };
        // With others, as in `ip saddr . tcp dport`; or of another kind, as in `ip saddr & 255.0.0.0 == 10.0.0.0`.
        if matches!(value.as_str(), "." | "&" | "|" | "^" | "<<" | ">>" | "and" | "or" | "set") {
            return (Is::Possible, rest);
        }
        let is = match operator {
            "==" => self.is_in(value, elements),
            "!=" | "!" => self.is_in(value, elements).negated(),
            comparison => self.is_beside(comparison, value),
        };
        (is, rest)
    }

    fn is_in(&self, value: &str, elements: impl Fn(&str) -> Option<Vec<String>>) -> Is {
        let values = if value.starts_with(['@', '{']) {
            elements(value)
        } else {
            Some(value.split(',').map(str::to_owned).collect())
        };
        let Some(values) = values else { return Is::Possible };
        let found: Vec<Is> = values.iter().map(|value| self.is(value)).collect();
        [Is::So, Is::Possible].into_iter().find(|is| found.contains(is)).unwrap_or(Is::Not)
    }

    /// Whether it has this value, which may be a range, or have a timeout of its own.
    pub(super) fn is(&self, value: &str) -> Is {
        let mut words = value.split_whitespace();
        let value = words.next().unwrap_or_default().trim_matches('"');
        if words.next() == Some(".") {
            return Is::Possible;
        }
        match self {
            _ if value == "*" => Is::So,
            Self::Absent => Is::Not,
            Self::Number(number) => {
                let (first, last) = value.split_once('-').unwrap_or((value, value));
                let bounds = first.parse().ok().zip(last.parse().ok());
                bounds.map_or(Is::Possible, |(first, last): (u16, u16)| Is::of((first..=last).contains(number)))
            }
            Self::Word(names) if names.contains(&value) => Is::So,
            Self::Word(_) if value.starts_with("0x") => Is::Possible,
            Self::Word(_) => Is::Not,
            Self::Interface => {
                if value == "lo" {
                    Is::Not
                } else {
                    Is::Possible
                }
            }
            Self::Address => address(value),
            Self::Own(own) => one_of(own, value),
            Self::Route => match value {
                "missing" | "0" => Is::Not,
                "exists" | "1" => Is::So,
                _ => Is::Possible,
            },
            Self::Flags | Self::Unknown => Is::Possible,
        }
    }

    fn is_beside(&self, comparison: &str, value: &str) -> Is {
        let (Self::Number(number), Ok(value)) = (self, value.parse::<u16>()) else { return Is::Possible };
        Is::of(match comparison {
            "<" => *number < value,
            "<=" => *number <= value,
            ">" => *number > value,
            _ => *number >= value,
        })
    }
}

/// `==` where there is none.
fn operator(words: &[String]) -> (&str, &[String]) {
    match words {
        [operator, rest @ ..] if matches!(operator.as_str(), "==" | "!=" | "!" | "<" | "<=" | ">" | ">=") => {
            (operator, rest)
        }
        _ => ("==", words),
    }
}

/// What others reach this host by: the addresses of its interfaces.
fn own(is_ipv6: bool) -> Vec<IpAddr> {
    own_addresses().into_iter().filter(|address| address.is_ipv6() == is_ipv6 && !address.is_loopback()).collect()
}

/// An address, or a network.
fn network(value: &str) -> Option<IpNet> {
    value.parse().ok().or_else(|| value.parse::<IpAddr>().ok().map(IpNet::from))
}

fn one_of(own: &[IpAddr], value: &str) -> Is {
    let Some(network) = network(value) else { return Is::Possible };
    let within = own.iter().filter(|address| network.contains(*address)).count();
    match within {
        _ if network.prefix_len() == 0 => Is::So,
        0 if !own.is_empty() => Is::Not,
        all if all == own.len() && all != 0 => Is::So,
        _ => Is::Possible,
    }
}

/// Whether an address of one host elsewhere is this one, or in this network.
fn address(value: &str) -> Is {
    let Some(network) = network(value) else { return Is::Possible };
    let (first, last) = (network.network(), network.broadcast());
    let is_no_hosts = |address: IpAddr| match address {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_multicast() || v4.is_broadcast() || v4.is_unspecified(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_multicast() || v6.is_unspecified(),
    };
    match network.prefix_len() {
        0 => Is::So,
        _ if is_no_hosts(first) && is_no_hosts(last) => Is::Not,
        _ => Is::Possible,
    }
}

/// `tcp flags syn / fin,syn,rst,ack`, `tcp flags & (fin | syn | rst | ack) == syn`, `tcp flags syn`: of a packet that has SYN.
fn flags(words: &[String]) -> (Is, &[String]) {
    let is_masked = words.first().is_some_and(|word| word == "&");
    let start = if is_masked { words.get(1..).unwrap_or_default() } else { words };
    let (before, rest) = operator(start);
    let has_operator = rest.len() < start.len();
    let Some((first, rest)) = set_of_flags(rest) else { return (Is::Possible, words) };
    let syn_alone = |of: &[String], mask: &[String]| {
        let has_syn = mask.iter().any(|flag| flag == "syn");
        if has_syn { of == ["syn"] } else { of.is_empty() }
    };
    if is_masked {
        let (operator, rest) = operator(rest);
        let Some((value, rest)) = set_of_flags(rest) else { return (Is::Possible, rest) };
        return (Is::of(syn_alone(&value, &first) != (operator == "!=")), rest);
    }
    let is_not = matches!(before, "!=" | "!");
    match rest {
        [slash, mask, rest @ ..] if slash == "/" => {
            let Some((mask, _)) = set_of_flags(std::slice::from_ref(mask)) else { return (Is::Possible, rest) };
            (Is::of(syn_alone(&first, &mask) != is_not), rest)
        }
        _ if has_operator && before != "!" => (Is::of((first == ["syn"]) != is_not), rest),
        _ => (Is::of(first.iter().any(|flag| flag == "syn") != is_not), rest),
    }
}

/// `fin,syn` or `(fin | syn)`, and the words after it; `None` of anything else.
fn set_of_flags(words: &[String]) -> Option<(Vec<String>, &[String])> {
    let first = words.first()?;
    let length =
        if first.starts_with('(') { words.iter().position(|word| word.ends_with(')'))?.saturating_add(1) } else { 1 };
    let (set, rest) = words.split_at_checked(length)?;
    let joined = set.concat();
    let names: Vec<String> = joined.trim_matches(['(', ')']).split(['|', ',']).map(str::to_owned).collect();
    let is_flag =
        |name: &String| matches!(name.as_str(), "fin" | "syn" | "rst" | "psh" | "ack" | "urg" | "ecn" | "cwr");
    names.iter().all(is_flag).then_some((names, rest))
}
