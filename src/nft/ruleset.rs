//! From configuration to the nft include file.
//!
//! The file is idempotent: applied again it duplicates no rule and keeps live elements. It only ever drops, or passes on
//! to the host's own rules. It is written as flat `add` lines because nft 1.0.6 takes nothing else for a table that
//! persists without an owner.

use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::service::{Answer, Port};

/// Elements that each set of doors holds at most.
const SET_SIZE: u32 = 65_535;

/// What the table is made of. [`fmt::Display`] writes the include file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ruleset {
    /// Ports that are shut to all but those who knocked.
    pub guarded: Vec<Port>,
    /// Ports whose SYNs go to the queue.
    pub knock_ports: Vec<RangeInclusive<u16>>,
    /// Networks that are never gated.
    pub trusted: Vec<IpNet>,
    /// What is shut gives this answer.
    pub answer: Answer,
    /// The queue's number.
    pub queue: u16,
}

/// Sets, chains and what they are for; `TABLE` is replaced by the table's name.
const FRAME: &str = "\
# knockq: shuts the guarded ports, hands SYNs to the knock ports to the daemon.
# Made by `knockq ruleset`; applying it again changes nothing and keeps open doors.
add table inet TABLE

# What is shut, and who may come in all the same.
add set inet TABLE guarded { type inet_proto . inet_service; }
add set inet TABLE trusted4 { type ipv4_addr; flags interval; }
add set inet TABLE trusted6 { type ipv6_addr; flags interval; }

# The doors: who may connect where. Elements vanish by themselves.
add set inet TABLE open4 { type ipv4_addr . inet_proto . inet_service; size SIZE; flags timeout; }
add set inet TABLE open6 { type ipv6_addr . inet_proto . inet_service; size SIZE; flags timeout; }
# For one connection: the limit lets only one of two racing SYNs find the element before it is deleted.
add set inet TABLE once4 { type ipv4_addr . inet_proto . inet_service; size SIZE; flags dynamic,timeout; \
limit rate 1/week burst 1 packets; }
add set inet TABLE once6 { type ipv6_addr . inet_proto . inet_service; size SIZE; flags dynamic,timeout; \
limit rate 1/week burst 1 packets; }

# Whose connections were ended: for hours the server cannot go on with them.
add set inet TABLE ended4 { type ipv4_addr . inet_proto . inet_service; size SIZE; flags timeout; }
add set inet TABLE ended6 { type ipv6_addr . inet_proto . inet_service; size SIZE; flags timeout; }

add chain inet TABLE knock { type filter hook prerouting priority raw; policy accept; }
add chain inet TABLE gate { type filter hook prerouting priority dstnat - 10; policy accept; }
add chain inet TABLE door
add chain inet TABLE ended { type filter hook postrouting priority srcnat - 10; policy accept; }
flush chain inet TABLE knock
flush chain inet TABLE gate
flush chain inet TABLE door
flush chain inet TABLE ended
flush set inet TABLE guarded
flush set inet TABLE trusted4
flush set inet TABLE trusted6

";

const RULES: &str = "
# Before conntrack. Nothing but SYNs: a reply to this host's own connection may carry a knock port. No `bypass`: without
# the daemon the kernel drops them.
add rule inet TABLE knock tcp flags & (fin | syn | rst | ack) == syn tcp dport KNOCK_PORTS \
iif != lo fib daddr type local queue num QUEUE

# After conntrack, before DNAT, so that ports published by containers are guarded too.
add rule inet TABLE gate iif lo accept
# What is forwarded passes; broadcasts, multicasts and anycasts reach this host's sockets and do not.
add rule inet TABLE gate fib daddr type unicast accept
add rule inet TABLE gate ct state established accept
add rule inet TABLE gate tcp dport KNOCK_PORTS KNOCK_VERDICT
add rule inet TABLE gate meta l4proto . th dport @guarded goto door

# Of a connection that conntrack was made to forget, a packet of the server's would begin another, and what answers that is
# established.
add rule inet TABLE ended ct state new ip daddr . meta l4proto . th sport @ended4 drop
add rule inet TABLE ended ct state new ip6 daddr . meta l4proto . th sport @ended6 drop

add rule inet TABLE door ip saddr @trusted4 accept
add rule inet TABLE door ip6 saddr @trusted6 accept
add rule inet TABLE door ip saddr . meta l4proto . th dport @open4 accept
add rule inet TABLE door ip6 saddr . meta l4proto . th dport @open6 accept
# The same SYN once more, because its answer was lost or late: it was let in before, or conntrack had not kept it.
add rule inet TABLE door tcp flags & (fin | syn | rst | ack) == syn ct state new ct status confirmed accept
add rule inet TABLE door ip saddr . meta l4proto . th dport @once4 \
delete @once4 { ip saddr . meta l4proto . th dport } accept
add rule inet TABLE door ip6 saddr . meta l4proto . th dport @once6 \
delete @once6 { ip6 saddr . meta l4proto . th dport } accept
";

/// The end of chain `door`: what is refused is answered like a closed port, or not at all.
const DROP: &str = "add rule inet TABLE door drop\n";
const RESET: &str = "\
add rule inet TABLE door meta l4proto tcp reject with tcp reset
add rule inet TABLE door reject with icmpx type port-unreachable
";

/// Whether an include file goes to its end. A part of it, or an empty file, would load too, and let all in.
pub fn is_whole(include_file: &str) -> bool {
    let refuses = |refusal: &str| include_file.contains(&refusal.replace("TABLE", super::TABLE));
    [DROP, RESET].into_iter().any(refuses)
}

impl Ruleset {
    /// The include file under another table's name, for a check that the live table has no say in.
    pub fn for_check(&self) -> String {
        self.render("knockq_check")
    }

    pub(super) fn render(&self, table: &str) -> String {
        // Nobody listens at a knock port, so what passes there meets the kernel's own reset.
        let (knock_verdict, refusal) = match self.answer {
            Answer::Drop => ("drop", DROP),
            Answer::Reset => ("accept", RESET),
        };
        // Each rule has its own set: packets miss elements of a set of intervals that is filled anew at that moment.
        let ranges: Vec<String> = self.knock_ports.iter().map(show_range).collect();
        let knock_ports = format!("{{ {} }}", ranges.join(", "));
        let fill = |text: &str| {
            text.replace("TABLE", table)
                .replace("SIZE", &SET_SIZE.to_string())
                .replace("QUEUE", &self.queue.to_string())
                .replace("KNOCK_VERDICT", knock_verdict)
                .replace("KNOCK_PORTS", &knock_ports)
        };
        let elements = self.elements().into_iter().filter(|(_, elements)| !elements.is_empty());
        let elements: String = elements
            .map(|(set, elements)| format!("add element inet {table} {set} {{ {} }}\n", elements.join(", ")))
            .collect();
        format!("#!/usr/sbin/nft -f\n{}{elements}{}{}", fill(FRAME), fill(RULES), fill(refusal))
    }

    fn elements(&self) -> [(&'static str, Vec<String>); 3] {
        let trusted = IpNet::aggregate(&self.trusted);
        let (v4, v6): (Vec<&IpNet>, Vec<&IpNet>) = trusted.iter().partition(|net| matches!(net.addr(), IpAddr::V4(_)));
        [
            ("guarded", self.guarded.iter().map(|port| format!("{} . {}", port.transport, port.number)).collect()),
            ("trusted4", v4.iter().map(ToString::to_string).collect()),
            ("trusted6", v6.iter().map(ToString::to_string).collect()),
        ]
    }
}

impl fmt::Display for Ruleset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(super::TABLE))
    }
}

fn show_range(range: &RangeInclusive<u16>) -> String {
    if range.start() == range.end() { range.start().to_string() } else { format!("{}-{}", range.start(), range.end()) }
}
