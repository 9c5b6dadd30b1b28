//! From configuration to the nft include file.
//!
//! The file is idempotent: applied again it duplicates no rule and keeps live elements. It lets nothing in that the
//! host's own rules keep out: it drops, resets, queues, or passes on. It is written as flat `add` lines because nft 1.0.6 takes
//! nothing else for a table that persists without an owner.

use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::table::SHADOW;
use crate::service::{Answer, Port};

/// Elements that each set of doors holds at most.
const SET_SIZE: u32 = 65_535;

/// What the table is made of. [`fmt::Display`] writes the include file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ruleset {
    /// Ports that are shut to all but those who knocked.
    pub guarded: Vec<Port>,
    /// Of these: where connections end with their door.
    pub kill: Vec<Port>,
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
# Of the guarded ports: where a connection ends when its door shuts.
add set inet TABLE kill { type inet_proto . inet_service; }

# The doors: who may connect where. Elements vanish by themselves.
# Their comments say when their grants end.
add set inet TABLE open4 { type ipv4_addr . inet_proto . inet_service; size SIZE; flags timeout; }
add set inet TABLE open6 { type ipv6_addr . inet_proto . inet_service; size SIZE; flags timeout; }
# For one connection: the limit lets only one of two racing SYNs find the element before it is deleted.
add set inet TABLE once4 { type ipv4_addr . inet_proto . inet_service; size SIZE; flags dynamic,timeout; \
limit rate 1/week burst 1 packets; }
add set inet TABLE once6 { type ipv6_addr . inet_proto . inet_service; size SIZE; flags dynamic,timeout; \
limit rate 1/week burst 1 packets; }
# How long that one connection may last, where connections end with their door.
add set inet TABLE live4 { type ipv4_addr . inet_proto . inet_service; size SIZE; flags timeout; }
add set inet TABLE live6 { type ipv6_addr . inet_proto . inet_service; size SIZE; flags timeout; }

# What has passed by a door and is not yet answered for: the SYN's sequence number, and addresses and ports, which are not
# paired: a stranger has no such addresses and ports. A kernel sends its SYN once more for 63 s.
add set inet TABLE sequences { typeof tcp sequence; size SIZE; flags dynamic,timeout; timeout 64s; }
add set inet TABLE begun4 { type ipv4_addr . ipv4_addr . inet_proto . inet_service . inet_service; size SIZE; \
flags dynamic,timeout; timeout 64s; }
add set inet TABLE begun6 { type ipv6_addr . ipv6_addr . inet_proto . inet_service . inet_service; size SIZE; \
flags dynamic,timeout; timeout 64s; }

add chain inet TABLE knock { type filter hook prerouting priority raw; policy accept; }
add chain inet TABLE gate { type filter hook prerouting priority dstnat - 10; policy accept; }
add chain inet TABLE host { type filter hook input priority filter - 10; policy accept; }
add chain inet TABLE leave { type filter hook output priority filter - 10; policy accept; }
add chain inet TABLE leave_published { type filter hook postrouting priority srcnat + 10; policy accept; }
add chain inet TABLE guard
add chain inet TABLE door
add chain inet TABLE opened
add chain inet TABLE let_in
add chain inet TABLE lasts
add chain inet TABLE refuse
flush chain inet TABLE knock
flush chain inet TABLE gate
flush chain inet TABLE host
flush chain inet TABLE leave
flush chain inet TABLE leave_published
flush chain inet TABLE guard
flush chain inet TABLE door
flush chain inet TABLE opened
flush chain inet TABLE let_in
flush chain inet TABLE lasts
flush chain inet TABLE refuse
flush set inet TABLE guarded
flush set inet TABLE trusted4
flush set inet TABLE trusted6
flush set inet TABLE kill
flush set inet TABLE sequences
flush set inet TABLE begun4
flush set inet TABLE begun6
";

const RULES: &str = "
# Before conntrack. Nothing but SYNs: a reply to this host's own connection may carry a knock port. No `bypass`: without
# the daemon the kernel drops them.
add rule inet TABLE knock tcp flags & (fin | syn | rst | ack) == syn tcp dport KNOCK_PORTS \
iif != lo fib daddr type local queue num QUEUE

# After conntrack, before DNAT: ports that containers publish are guarded as they are addressed.
add rule inet TABLE gate iif lo accept
add rule inet TABLE gate meta l4proto != { tcp, udp } accept
add rule inet TABLE gate meta l4proto . th dport != @guarded accept
add rule inet TABLE gate tcp flags & (syn | ack) == syn fib daddr type local goto guard
add rule inet TABLE gate tcp flags & (syn | ack) == syn fib daddr . iif type local goto guard
# What answers a host behind this one, whose source was translated, goes to that host; what does not is judged below.
add rule inet TABLE gate ct direction reply ct status snat accept
add rule inet TABLE gate fib daddr type local goto guard
add rule inet TABLE gate fib daddr . iif type local goto guard

# All that has come to this host, by whichever route, VRF or device. A packet may pass `guard` twice and more: it is judged alike.
add rule inet TABLE host iif lo accept
# Addressed to a guarded port, it was judged in `gate`, before DNAT; to another, a rule of the administrator's sent it here.
add rule inet TABLE host ct status dnat accept
add rule inet TABLE host meta l4proto . th dport @guarded goto guard
# What is this host's in a VRF alone, be it another interface's, is not known to be before it has come here.
add rule inet TABLE host tcp flags & (fin | syn | rst | ack) == syn tcp dport KNOCK_PORTS \
fib daddr type != local queue num QUEUE
add rule inet TABLE host tcp dport KNOCK_PORTS ct state != established KNOCK_VERDICT

# A connection begins by a door, whatever conntrack holds. What it holds counts in the direction in which it began: an entry
# that a packet of ours made, be it a query or the next of a connection that conntrack had forgotten, lets nobody in.
add rule inet TABLE guard tcp flags & (syn | ack) == syn goto door
add rule inet TABLE guard tcp flags ack delete @begun4 { ip saddr . ip daddr . meta l4proto . th sport . th dport }
add rule inet TABLE guard tcp flags ack delete @begun6 { ip6 saddr . ip6 daddr . meta l4proto . th sport . th dport }
add rule inet TABLE guard meta l4proto . th dport != @kill ct direction original ct state established accept
add rule inet TABLE guard ip saddr . meta l4proto . th dport @live4 ct direction original ct state established accept
add rule inet TABLE guard ip6 saddr . meta l4proto . th dport @live6 ct direction original ct state established accept
add rule inet TABLE guard goto door

add rule inet TABLE door ip saddr @trusted4 accept
add rule inet TABLE door ip6 saddr @trusted6 accept
add rule inet TABLE door ip saddr . meta l4proto . th dport @open4 goto opened
add rule inet TABLE door ip6 saddr . meta l4proto . th dport @open6 goto opened
add rule inet TABLE door meta l4proto . th dport @kill ip saddr . meta l4proto . th dport != @live4 goto refuse
add rule inet TABLE door meta l4proto . th dport @kill ip6 saddr . meta l4proto . th dport != @live6 goto refuse
# The same SYN once more, because its answer was lost or late, and what follows a first packet of UDP.
add rule inet TABLE door tcp flags & (syn | ack) == syn tcp sequence @sequences \
ip saddr . ip daddr . meta l4proto . th sport . th dport @begun4 accept
add rule inet TABLE door tcp flags & (syn | ack) == syn tcp sequence @sequences \
ip6 saddr . ip6 daddr . meta l4proto . th sport . th dport @begun6 accept
add rule inet TABLE door meta l4proto udp ip saddr . ip daddr . meta l4proto . th sport . th dport @begun4 accept
add rule inet TABLE door meta l4proto udp ip6 saddr . ip6 daddr . meta l4proto . th sport . th dport @begun6 accept
# Only what begins a connection spends such a door.
add rule inet TABLE door meta l4proto tcp tcp flags & (syn | ack) != syn goto refuse
add rule inet TABLE door ip saddr . meta l4proto . th dport @once4 \
delete @once4 { ip saddr . meta l4proto . th dport } goto let_in
add rule inet TABLE door ip6 saddr . meta l4proto . th dport @once6 \
delete @once6 { ip6 saddr . meta l4proto . th dport } goto let_in
add rule inet TABLE door goto refuse

# Of a connection that conntrack was made to forget, the server's next packet begins another entry: it needs a door too.
add rule inet TABLE leave oif lo accept
add rule inet TABLE leave tcp flags & syn != syn meta l4proto . th sport @guarded ct direction original goto lasts
add rule inet TABLE leave_published tcp flags & syn != syn ct state new ct status snat meta l4proto . th sport @guarded goto lasts

add rule inet TABLE lasts ip daddr @trusted4 accept
add rule inet TABLE lasts ip6 daddr @trusted6 accept
add rule inet TABLE lasts ip daddr . meta l4proto . th sport @open4 accept
add rule inet TABLE lasts ip6 daddr . meta l4proto . th sport @open6 accept
add rule inet TABLE lasts ip daddr . meta l4proto . th sport @live4 accept
add rule inet TABLE lasts ip6 daddr . meta l4proto . th sport @live6 accept
add rule inet TABLE lasts drop

# A flood through one's own door leaves room in the sets for what others begin.
add rule inet TABLE opened tcp flags & (syn | ack) == syn limit rate 500/second burst 500 packets goto let_in
add rule inet TABLE opened accept

add rule inet TABLE let_in tcp flags & (syn | ack) == syn add @sequences { tcp sequence }
add rule inet TABLE let_in add @begun4 { ip saddr . ip daddr . meta l4proto . th sport . th dport }
add rule inet TABLE let_in add @begun6 { ip6 saddr . ip6 daddr . meta l4proto . th sport . th dport }
add rule inet TABLE let_in accept
";

/// Where connections end with their door, what goes out needs it too: a server that only sends would go on.
const KILL: &str = "\
add rule inet TABLE leave meta l4proto . th sport @kill goto lasts
add rule inet TABLE leave_published ct status dnat ct direction reply meta l4proto . th sport @kill fib saddr type local goto lasts
add rule inet TABLE leave_published ct status dnat ct direction reply meta l4proto . th sport @kill fib saddr . oif type local goto lasts
";

/// Chain `refuse`: what is refused is answered like a closed port, or not at all.
const DROP: &str = "
add rule inet TABLE refuse drop
";
const RESET: &str = "
# A live connection is not reset when its door is gone for a moment; and what resets others must get out.
insert rule inet TABLE leave tcp flags rst accept
add rule inet TABLE refuse meta l4proto . th dport @kill ct direction original ct state established drop
add rule inet TABLE refuse meta l4proto tcp reject with tcp reset
add rule inet TABLE refuse reject with icmpx type port-unreachable
";

/// Whether an include file goes to its end. A part of it, or an empty file, would load too, and let all in.
pub fn is_whole(include_file: &str) -> bool {
    // The last two are those of files that were made before there was a chain `refuse`.
    let refusals = ["refuse drop", "refuse reject", "door drop", "door reject"];
    refusals.into_iter().any(|refusal| include_file.contains(&format!("add rule inet {} {refusal}", super::TABLE)))
}

/// Whether an include file is that of a daemon whose doors did not say when their grants end.
pub fn is_of_before(include_file: &str) -> bool {
    !include_file.contains("# Their comments say when their grants end.\n")
}

impl Ruleset {
    /// The include file under another table's name, for a check that the live table has no say in.
    pub fn for_check(&self) -> String {
        self.render(SHADOW)
    }

    /// The same, to be loaded and compared with the live one: dormant, so that it touches no packet.
    pub fn for_comparison(&self) -> String {
        let add = format!("add table inet {SHADOW}");
        self.render(SHADOW).replace(&format!("{add}\n"), &format!("{add} {{ flags dormant; }}\n"))
    }

    fn render(&self, table: &str) -> String {
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
        let kill = if self.kill.is_empty() { String::new() } else { fill(KILL) };
        format!("#!/usr/sbin/nft -f\n{}{elements}{}{kill}{}", fill(FRAME), fill(RULES), fill(refusal))
    }

    fn elements(&self) -> [(&'static str, Vec<String>); 4] {
        let trusted = IpNet::aggregate(&self.trusted);
        let (v4, v6): (Vec<&IpNet>, Vec<&IpNet>) = trusted.iter().partition(|net| matches!(net.addr(), IpAddr::V4(_)));
        let ports = |ports: &[Port]| ports.iter().map(|port| format!("{} . {}", port.transport, port.number)).collect();
        [
            ("guarded", ports(&self.guarded)),
            ("kill", ports(&self.kill)),
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
