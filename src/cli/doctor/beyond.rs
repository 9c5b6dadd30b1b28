//! What the gate cannot guard on this host, and what it holds up though it is for others. `serve`, `check` and `doctor` say it;
//! what it is, is known here alone.

use std::io;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};

use super::listing::{self, Rule, Table};
use super::translation::{self, Translation};
use super::{Finding, State};
use crate::config::ServerConfig;
use crate::nft::{NftError, list_rules, list_ruleset};
use crate::service::Port;

const CHECK: &str = "beyond";

/// Without one of these in any table, sets and maps need not be looked at.
const SIGNS: [&str; 4] = ["dnat", "redirect", "flow ", "tproxy"];

/// What of a host is looked at.
pub(in crate::cli) struct Host {
    tables: Vec<Table>,
    /// Its VRFs, by the names of their devices.
    vrfs: Vec<String>,
}

impl Host {
    /// Looks at this one. It needs a privilege.
    ///
    /// # Errors
    /// What nft said.
    pub(in crate::cli) fn look() -> Result<Self, NftError> {
        let rules = list_rules()?;
        let is_signed = SIGNS.iter().any(|sign| rules.to_lowercase().contains(sign));
        let listing = if is_signed { list_ruleset()? } else { rules };
        Ok(Self { tables: listing::read(&listing), vrfs: vrfs() })
    }

    /// What an administrator should know before he trusts the gate, with what he can do about it.
    pub(in crate::cli) fn warnings(&self, config: &ServerConfig) -> Vec<(String, String)> {
        let findings = of(config, &self.tables, &self.vrfs).into_iter();
        let grave = findings.filter(|finding| matches!(finding.state, State::Problem | State::Unknown));
        grave.map(|finding| (finding.message, finding.hint.unwrap_or_default())).collect()
    }
}

/// All that is known of it, or that there is nothing.
pub(super) fn all(config: &ServerConfig, tables: &[Table]) -> Vec<Finding> {
    let findings = of(config, tables, &vrfs());
    let nothing = || Finding::ok(CHECK, "no flowtable, transparent proxy or VRF takes a guarded port past the gate");
    if findings.is_empty() { vec![nothing()] } else { findings }
}

fn of(config: &ServerConfig, tables: &[Table], vrfs: &[String]) -> Vec<Finding> {
    let guarded = config.ruleset().guarded;
    let kills = |port: &Port| config.services.iter().any(|service| service.kill && service.ports.contains(port));
    let killed: Vec<Port> = guarded.iter().copied().filter(kills).collect();
    let translations = translation::of(tables);
    let mut findings: Vec<Finding> = guarded.iter().filter_map(|port| passed_on(*port, &translations, vrfs)).collect();
    for (table, rule) in tables.iter().flat_map(|table| table.rules().map(move |rule| (table, rule))) {
        findings.extend(offloaded(table, rule, &killed));
        findings.extend(proxied(table, rule, &guarded));
    }
    findings
}

/// Before destinations are translated, an address of a VRF is known as this host's only at the interface that has it.
fn passed_on(port: Port, translations: &[Translation], vrfs: &[String]) -> Option<Finding> {
    let all = translations.iter().filter(|translation| translation.covers(port) && !translation.is_at_its_interface);
    let target = &all.into_iter().next().filter(|_| !vrfs.is_empty())?.target;
    let message = format!(
        "{port}: is passed on ({target}), and there is a VRF ({}): what comes there for an address of another interface may be \
         passed on without a knock",
        vrfs.join(", ")
    );
    let hint = "let the rule that passes it on ask for `fib daddr . iif type local`, and try it from inside of the VRF";
    Some(Finding::unknown(CHECK, message).hint(hint))
}

/// `flow add @f`: packets of what is forwarded come through no chain any more.
fn offloaded(table: &Table, rule: &Rule, killed: &[Port]) -> Option<Finding> {
    let Rule(words) = rule;
    let is_so = words
        .windows(2)
        .any(|pair| matches!(pair, [flow, does] if flow == "flow" && matches!(does.as_str(), "add" | "offload")));
    let message = format!(
        "table {} {} offloads what it forwards, by {}: the gate sees connections begin, and nothing of them after that",
        table.family,
        table.name,
        rule.text()
    );
    let hint = "have that rule leave out what goes to and from guarded ports, if they are passed on";
    let finding = if killed.is_empty() {
        Finding::note(CHECK, message)
    } else {
        let ports: Vec<String> = killed.iter().map(ToString::to_string).collect();
        let message = format!("{message}, so that `on_close = \"kill\"` does not end it ({})", ports.join(", "));
        Finding::unknown(CHECK, message)
    };
    is_so.then(|| finding.hint(hint))
}

/// `tproxy to :8080`: a program of this host takes what goes to others, in their name.
fn proxied(table: &Table, rule: &Rule, guarded: &[Port]) -> Option<Finding> {
    let is_so = rule.0.iter().any(|word| word.to_lowercase().trim_matches('"') == "tproxy");
    let port = guarded.iter().find(|port| is_so && translation::may_be_for(table, rule, **port))?;
    let message = format!(
        "{port}: table {} {} has a transparent proxy take it from those who connect to others, by {}: here it meets the gate, \
         and silence without a knock",
        table.family,
        table.name,
        rule.text()
    );
    let hint = "take a guarded port out of that rule, or guard another number; who is in `trusted` passes";
    Some(Finding::problem(CHECK, message).hint(hint))
}

/// The devices of all VRFs; none where the kernel does not say.
fn vrfs() -> Vec<String> {
    let links = links().unwrap_or_default();
    let is_vrf = |attribute: &LinkAttribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Vrf)),
        _ => false,
    };
    let name = |attribute: LinkAttribute| match attribute {
        LinkAttribute::IfName(name) => Some(name),
        _ => None,
    };
    let vrfs = links.into_iter().filter(|link| link.attributes.iter().any(is_vrf));
    vrfs.filter_map(|link| link.attributes.into_iter().find_map(name)).collect()
}

/// `ip link`
fn links() -> io::Result<Vec<LinkMessage>> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let question = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(question));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    let socket = Socket::new(NETLINK_ROUTE)?;
    socket.send_to(&bytes, &netlink_sys::SocketAddr::new(0, 0), 0)?;
    let mut links = Vec::new();
    loop {
        let (answer, _) = socket.recv_from_full()?;
        let mut rest = answer.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::deserialize(rest).map_err(io::Error::other)?;
            let length = usize::try_from(message.header.length).map_err(io::Error::other)?.next_multiple_of(4);
            match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => links.push(link),
                NetlinkPayload::Done(_) => return Ok(links),
                _ => return Err(io::ErrorKind::InvalidData.into()),
            }
            rest = rest.get(length..).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::listing::{self, Table};
    use super::{State, offloaded, passed_on, proxied, translation, vrfs};
    use crate::service::Port;

    /// As nft 1.0.6 shows them.
    const LISTING: &str = "\
table inet fast {
	flowtable f {
		hook ingress priority filter
		devices = { eth1, eth2 }
	}
	chain forward {
		type filter hook forward priority filter; policy accept;
		ip protocol tcp flow add @f counter
	}
}
table inet proxies {
	chain pre {
		type filter hook prerouting priority mangle; policy accept;
		tcp dport { 80, 443 } tproxy to :8080 meta mark set 0x00000001
		udp dport 53 tproxy to :5353
	}
}
table ip nat {
	chain pre {
		type nat hook prerouting priority dstnat; policy accept;
		ip daddr 10.0.0.1 tcp dport 22 dnat to 172.17.0.2:22
		fib daddr . iif type local tcp dport 25 dnat to 172.17.0.2:25
	}
}
";

    fn port(text: &str) -> Port {
        text.parse().unwrap()
    }

    fn of_rules<T>(tables: &[Table], of: impl Fn(&Table, &super::Rule) -> Option<T>) -> Vec<T> {
        tables.iter().flat_map(|table| table.rules().filter_map(|rule| of(table, rule)).collect::<Vec<_>>()).collect()
    }

    #[test]
    fn offloading_is_worth_knowing_and_keeps_connections_that_are_to_be_ended() {
        let tables = listing::read(LISTING);
        for (killed, state) in [(vec![], State::Note), (vec![port("tcp/22")], State::Unknown)] {
            let found = of_rules(&tables, |table, rule| offloaded(table, rule, &killed));
            let [found] = found.as_slice() else { panic!("{found:?}") };
            assert_eq!(found.state, state);
            assert!(found.message.contains("table inet fast offloads what it forwards"), "{found}");
            assert_eq!(found.message.contains("does not end it (tcp/22)"), !killed.is_empty(), "{found}");
        }
    }

    #[test]
    fn a_transparent_proxy_is_named_for_the_guarded_ports_that_it_takes_and_no_others() {
        let tables = listing::read(LISTING);
        for (guarded, is_named) in
            [("tcp/443", true), ("udp/53", true), ("tcp/22", false), ("udp/443", false), ("tcp/53", false)]
        {
            let found = of_rules(&tables, |table, rule| proxied(table, rule, &[port(guarded)]));
            assert_eq!(!found.is_empty(), is_named, "{guarded}: {found:?}");
        }
        let all = listing::read(
            "table ip all {\nchain pre {\ntype filter hook prerouting priority mangle;\ntproxy to 127.0.0.1:8080\n}\n}\n",
        );
        assert_eq!(of_rules(&all, |table, rule| proxied(table, rule, &[port("tcp/22")])).len(), 1);
    }

    #[test]
    fn what_is_passed_on_at_all_addresses_is_named_where_there_is_a_vrf() {
        let translations = translation::of(&listing::read(LISTING));
        let there_is = ["red".to_owned()];
        let found = passed_on(port("tcp/22"), &translations, &there_is).unwrap();
        assert!(found.message.contains("dnat to 172.17.0.2:22") && found.message.contains("VRF (red)"), "{found}");
        assert!(passed_on(port("tcp/22"), &translations, &[]).is_none(), "there is no VRF");
        assert!(passed_on(port("tcp/25"), &translations, &there_is).is_none(), "only at the interface's own addresses");
        assert!(passed_on(port("tcp/80"), &translations, &there_is).is_none(), "it is not passed on");
    }

    #[test]
    fn the_kernels_links_can_be_read() {
        assert!(!super::links().unwrap().is_empty());
        assert!(vrfs().iter().all(|name| !name.is_empty()));
    }
}
