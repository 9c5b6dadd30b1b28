//! Ports that are passed on: to containers, to other hosts, to other ports.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use super::Finding;
use super::listing::{Rule, Table, items};
use crate::config::ServerConfig;
use crate::service::{Port, Transport};

/// What a rule does with the destination of packets to some ports.
pub(super) struct Translation {
    /// `None` if it does it for both, as below.
    is_ipv6: Option<bool>,
    transport: Option<Transport>,
    numbers: RangeInclusive<u16>,
    /// `dnat to 172.17.0.2:80`, `redirect to :8080`
    pub(super) target: String,
    /// Only for addresses of the interface that a packet comes by: `fib daddr . iif type local`.
    pub(super) is_at_its_interface: bool,
}

/// All that the tables say of it with ports. A rule for all ports of an address is none.
pub(super) fn of(tables: &[Table]) -> Vec<Translation> {
    let of_table = |table| {
        let rules = Table::reached_from(table, "prerouting").into_iter().flat_map(|chain| &chain.rules);
        rules.flat_map(move |rule| of_rule(table, rule))
    };
    tables.iter().flat_map(of_table).collect()
}

fn of_rule(table: &Table, Rule(words): &Rule) -> Vec<Translation> {
    let Some(place) = words.iter().position(|word| word == "dnat" || word == "redirect") else { return Vec::new() };
    let Some(dport) = words.iter().position(|word| word == "dport") else { return Vec::new() };
    if words.windows(2).any(|pair| matches!(pair, [daddr, to] if daddr == "daddr" && is_loopback(to))) {
        return Vec::new(); // only this host gets there
    }
    let target = words.get(place..).unwrap_or_default().join(" ");
    let transport = match dport.checked_sub(1).and_then(|before| words.get(before)).map(String::as_str) {
        Some("tcp") => Some(Transport::Tcp),
        Some("udp") => Some(Transport::Udp),
        _ => None,
    };
    let is_ipv6 = match (table.family.as_str(), words.get(place.saturating_add(1)).map(String::as_str)) {
        ("ip", _) | (_, Some("ip")) => Some(false),
        ("ip6", _) | (_, Some("ip6")) => Some(true),
        _ => None,
    };
    let is_map = words.get(dport.saturating_add(1)).is_some_and(|word| word == "map");
    let is_at_its_interface = words.join(" ").contains("fib daddr . iif type local");
    let values = values(table, words, dport.saturating_add(if is_map { 2 } else { 1 }));
    let one = |value: String| {
        let (key, to) = value.split_once(" : ").unwrap_or((&value, ""));
        let target = if is_map { format!("dnat to {to}") } else { target.clone() };
        Some(Translation { is_ipv6, transport, numbers: range(key)?, target, is_at_its_interface })
    };
    values.into_iter().filter_map(one).collect()
}

/// The values that stand at this place, in braces, in a set, or alone.
fn values(table: &Table, words: &[String], place: usize) -> Vec<String> {
    let values = words.get(place).map_or("", String::as_str);
    match values.strip_prefix('@') {
        Some(set) => table.sets.get(set).cloned().unwrap_or_default(),
        None => items(values),
    }
}

fn range(value: &str) -> Option<RangeInclusive<u16>> {
    let value = value.split_whitespace().next()?;
    let (first, last) = value.split_once('-').unwrap_or((value, value));
    Some(first.parse().ok()?..=last.parse().ok()?)
}

/// Whether a rule may be about this port: all that it says of ports and transports is that it is not about others.
pub(super) fn may_be_for(table: &Table, Rule(words): &Rule, port: Port) -> bool {
    let others = if port.transport == Transport::Tcp { ["udp", "17"] } else { ["tcp", "6"] };
    let is_others = |pair: &[String]| match pair {
        [transport, dport] if dport == "dport" => others.contains(&transport.as_str()),
        [l4proto, transport] if l4proto == "l4proto" || l4proto == "protocol" => others.contains(&transport.as_str()),
        _ => false,
    };
    let Some(dport) = words.iter().position(|word| word == "dport") else { return !words.windows(2).any(is_others) };
    let values = values(table, words, dport.saturating_add(1));
    let is_it = |value: &String| range(value).is_none_or(|numbers| numbers.contains(&port.number));
    !words.windows(2).any(is_others) && (values.is_empty() || values.iter().any(is_it))
}

fn is_loopback(address: &str) -> bool {
    address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

impl Translation {
    /// Whether it is about this port.
    pub(super) fn covers(&self, port: Port) -> bool {
        self.transport.is_none_or(|transport| transport == port.transport) && self.numbers.contains(&port.number)
    }

    /// Whether it is about packets of this family.
    pub(super) fn is_for(&self, is_ipv6: bool) -> bool {
        self.is_ipv6.is_none_or(|only| only == is_ipv6)
    }

    /// The port that it leads to; `None` if to the same.
    pub(super) fn target_port(&self) -> Option<u16> {
        let last = self.target.split_whitespace().find(|word| word.contains(':'))?;
        let (address, port) = last.rsplit_once(':')?;
        // Without brackets it is the end of an IPv6 address.
        if address.contains(':') && !address.ends_with(']') { None } else { port.parse().ok() }
    }

    pub(super) fn is_to_this_host(&self) -> bool {
        self.target.starts_with("redirect")
    }

    /// Which port, in words.
    fn ports(&self) -> String {
        let transport = self.transport.map_or_else(|| "tcp and udp".to_owned(), |transport| transport.to_string());
        let (first, last) = (self.numbers.start(), self.numbers.end());
        if first == last { format!("{transport}/{first}") } else { format!("{transport}/{first}-{last}") }
    }

    fn guards(&self, guarded: &[Port]) -> bool {
        let transports = match self.transport {
            Some(transport) => vec![transport],
            None => vec![Transport::Tcp, Transport::Udp],
        };
        self.numbers
            .clone()
            .all(|number| transports.iter().all(|transport| guarded.contains(&Port { transport: *transport, number })))
    }

    /// Whether it leads past the gate to what is behind it: the gate looks at the port before it is translated.
    fn leads_around(&self, guarded: &[Port], others: &[Self]) -> bool {
        let is_twin = |other: &Self| other.target == self.target && other.guards(guarded);
        let leads_to = |port: &Port| self.is_to_this_host() && self.target_port() == Some(port.number);
        others.iter().any(is_twin) || guarded.iter().any(leads_to)
    }
}

/// Ports that are passed on and not guarded, each once.
pub(super) fn published(config: &ServerConfig, tables: &[Table]) -> Vec<Finding> {
    const CHECK: &str = "published";
    let guarded = config.ruleset().guarded;
    let all = of(tables);
    let mut seen = BTreeSet::new();
    let mut findings = Vec::new();
    for translation in all.iter().filter(|translation| !translation.guards(&guarded)) {
        let (ports, target) = (translation.ports(), &translation.target);
        if !seen.insert((ports.clone(), target.clone())) {
            continue;
        }
        let hint = format!("add \"{ports}\" to the ports of a service");
        findings.push(if translation.leads_around(&guarded, &all) {
            let message = format!("{ports}: is not guarded, and leads to what a guarded port leads to: {target}");
            Finding::problem(CHECK, message).hint(hint)
        } else {
            Finding::note(CHECK, format!("{ports}: is not guarded, and passed on: {target}"))
                .hint(format!("if it is to be hidden, {hint}"))
        });
    }
    if findings.is_empty() {
        findings.push(Finding::ok(CHECK, "no port is passed on, to a container or another host, that is not guarded"));
    }
    findings
}
