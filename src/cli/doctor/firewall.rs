//! What the host's other tables do with what knockq lets through, and with ports that nobody uses.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::Finding;
use super::field::Packet;
use super::follow::{End, Ends, ends};
use super::listing::Table;
use super::translation::{Translation, of};
use crate::cli::sockets::listeners;
use crate::config::ServerConfig;
use crate::nft::TABLE;
use crate::service::{Answer, Port, Transport};

/// Where the kernel tells of iptables that does not go through nft, which nft does not show.
const LEGACY: [&str; 2] = ["/proc/net/ip_tables_names", "/proc/net/ip6_tables_names"];

/// Where to look for ports that nobody uses, from each upwards: a scan would see some of them.
const CLOSED: [u16; 4] = [23, 1024, 8000, 40_000];

/// Below this directory, a kernel with IPv6 has the file.
const IPV6: &str = "/proc/net/if_inet6";

/// Of each guarded port, whether it is let in; and what a closed port answers.
pub(super) fn all(config: &ServerConfig, tables: &[Table]) -> Vec<Finding> {
    let mut findings: Vec<Finding> = legacy().into_iter().collect();
    let translations = of(tables);
    findings.extend(config.ruleset().guarded.iter().flat_map(|port| allowed(*port, tables, &translations)));
    findings.push(answer(config, tables, &translations));
    findings
}

/// What is not seen.
fn legacy() -> Option<Finding> {
    let names = LEGACY.map(|path| fs::read_to_string(path).unwrap_or_default());
    let names: BTreeSet<&str> = names.iter().flat_map(|names| names.lines()).collect();
    let names: Vec<&str> = names.into_iter().collect();
    let message =
        format!("iptables-legacy has tables that nft does not show, and that are not looked at: {}", names.join(", "));
    let hint = "see them with `iptables-legacy-save` and `ip6tables-legacy-save`";
    (!names.is_empty()).then(|| Finding::unknown("firewall", message).hint(hint))
}

/// Families that this host speaks: whether it is IPv6, and its name.
fn families() -> Vec<(bool, &'static str)> {
    let all = [(false, "IPv4"), (true, "IPv6")];
    all.into_iter().filter(|(is_ipv6, _)| !is_ipv6 || Path::new(IPV6).exists()).collect()
}

/// One line if both families pass, else one for each that does not.
fn allowed(port: Port, tables: &[Table], translations: &[Translation]) -> Vec<Finding> {
    let refused = families().into_iter().filter_map(|(is_ipv6, family)| {
        let translation = translations.iter().find(|one| one.covers(port) && one.is_for(is_ipv6));
        let packet = Packet { is_ipv6, port, is_translated: false };
        refusal(&format!("{port} over {family}"), packet, translation, tables)
    });
    let refused: Vec<Finding> = refused.collect();
    if refused.is_empty() {
        vec![Finding::ok("firewall", format!("{port}: no chain of another table refuses it"))]
    } else {
        refused
    }
}

/// The chain that refuses the packet, or else one that may.
fn refusal(what: &str, packet: Packet, translation: Option<&Translation>, tables: &[Table]) -> Option<Finding> {
    let mut doubt = None;
    for (hook, packet) in way(packet, translation) {
        for (table, chain, ends) in chains(tables, hook, packet) {
            let place = format!("chain {} {} {chain}", table.family, table.name);
            let Some((_, refuses)) = ends.iter().find(|(end, _)| **end != End::Passed) else { continue };
            // What comes over another interface does not meet it.
            let is_of_some = (hook == "ingress").then(|| format!("coming over another interface than {place} is for"));
            let passes = ends.get(&End::Passed).or_else(|| ends.get(&End::Elsewhere)).or(is_of_some.as_ref());
            if let Some(passes) = passes {
                let message = format!(
                    "{what}: {place} lets it pass by {passes}, or not, by {refuses}: it depends on what is not known here"
                );
                doubt.get_or_insert_with(|| Finding::unknown("firewall", message).hint("try it: knock, and connect"));
            } else {
                let message = format!("{what}: {place} refuses it, by {refuses}, so a knock opens nothing");
                return Some(Finding::problem("firewall", message).hint(remedy(table, chain, packet.port)));
            }
        }
    }
    doubt
}

/// The hooks that the packet comes through, and what it is like there.
fn way(packet: Packet, translation: Option<&Translation>) -> [(&'static str, Packet); 3] {
    let Some(translation) = translation else {
        return [("ingress", packet), ("prerouting", packet), ("input", packet)];
    };
    let number = translation.target_port().unwrap_or(packet.port.number);
    let inside = Packet { port: Port { number, ..packet.port }, is_translated: true, ..packet };
    let inside = if translation.is_to_this_host() { ("input", inside) } else { ("forward", inside) };
    [("ingress", packet), ("prerouting", Packet { is_translated: true, ..packet }), inside]
}

/// Others' chains at a hook, and what may become of the packet in each.
fn chains<'a>(tables: &'a [Table], hook: &str, packet: Packet) -> impl Iterator<Item = (&'a Table, &'a str, Ends)> {
    let family = if packet.is_ipv6 { "ip6" } else { "ip" };
    let is_others =
        |table: &&Table| !(table.family == "inet" && [TABLE, "knockq_check"].contains(&table.name.as_str()));
    let is_asked = move |table: &&Table| ["inet", "netdev", family].contains(&table.family.as_str());
    tables.iter().filter(is_others).filter(is_asked).flat_map(move |table| {
        let hooked = table.chains.iter().filter(|(_, chain)| chain.hook.as_deref() == Some(hook));
        let comes = |early: bool| Packet { is_translated: packet.is_translated && !early, ..packet };
        hooked
            .map(|(name, chain)| (table, name.as_str(), ends(table, name, chain, comes(chain.is_early))))
            .collect::<Vec<_>>()
    })
}

/// In the words of whoever made the chain.
fn remedy(table: &Table, chain: &str, port: Port) -> String {
    let Port { transport, number } = port;
    if table.chains.contains_key("ufw-user-input") || table.chains.contains_key("ufw6-user-input") {
        format!("ufw allow {number}/{transport}: knockq only shuts ports, and does not open the firewall behind it")
    } else if table.name == "firewalld" {
        format!(
            "firewall-cmd --permanent --add-port={number}/{transport} && firewall-cmd --reload: knockq only shuts ports"
        )
    } else {
        let (family, name) = (&table.family, &table.name);
        format!(
            "allow it there too, for knockq only shuts ports: nft insert rule {family} {name} {chain} {transport} dport {number} accept"
        )
    }
}

/// Whether guarded ports are told from closed ones by their answer.
fn answer(config: &ServerConfig, tables: &[Table], translations: &[Translation]) -> Finding {
    const CHECK: &str = "answer";
    let (set, alike) = match config.answer {
        Answer::Drop => ("are silent", End::Dropped),
        Answer::Reset => ("answer with resets", End::Reset),
    };
    let Some(end) = closed(config, tables, translations).filter(|_| legacy().is_none()) else {
        return Finding::unknown(CHECK, "what closed ports of this host answer depends on what is not known here")
            .hint("compare, from elsewhere: nc -vzw3 SERVER 22; nc -vzw3 SERVER 23");
    };
    if end == alike {
        return Finding::ok(CHECK, format!("guarded ports {set}, like this host's closed ports"));
    }
    let (closed, hint) = match end {
        End::Dropped => ("are silent", "set answer = \"drop\" in [server]"),
        End::Reset => (
            "answer with resets",
            "set answer = \"reset\" in [server], or have this host's firewall drop what it does not allow",
        ),
        _ => ("are rejected in another way", "have this host's firewall drop what it does not allow, or reset it"),
    };
    let message = format!("guarded ports {set}, but this host's closed ports {closed}: a scan tells them apart");
    Finding::note(CHECK, message).hint(hint)
}

/// What becomes of a SYN to a port that nobody uses; `None` if that depends on more than that.
fn closed(config: &ServerConfig, tables: &[Table], translations: &[Translation]) -> Option<End> {
    let (listeners, knock_ports) = (listeners(), config.all_knock_ports());
    let is_free = |port: &Port| {
        !knock_ports.contains(port.number)
            && !config.ruleset().guarded.contains(port)
            && listeners.iter().all(|listener| listener.port != *port)
            && !translations.iter().any(|translation| translation.covers(*port))
    };
    let port = |number| Port { transport: Transport::Tcp, number };
    let samples = CLOSED.iter().filter_map(|first| (*first..=u16::MAX).map(port).find(is_free));
    let mut all = BTreeSet::new();
    for port in samples {
        for (is_ipv6, _) in families() {
            all.insert(fate(Packet { is_ipv6, port, is_translated: false }, tables)?);
        }
    }
    all.first().copied().filter(|_| all.len() == 1)
}

/// `None` if it has several possible ones.
fn fate(packet: Packet, tables: &[Table]) -> Option<End> {
    let mut fates = BTreeSet::new();
    for (hook, packet) in way(packet, None) {
        for (_, _, ends) in chains(tables, hook, packet) {
            let is_certain = |end: &End| match end {
                End::Passed => ends.len() == 1,
                End::Elsewhere => false,
                _ => ends.len() == 1 && hook != "ingress", // which is for some interfaces
            };
            let end = ends.keys().next().copied().filter(is_certain)?;
            fates.insert(end);
        }
    }
    fates.remove(&End::Passed);
    match fates.first() {
        None => Some(End::Reset), // by the kernel itself
        Some(end) => Some(*end).filter(|_| fates.len() == 1),
    }
}
