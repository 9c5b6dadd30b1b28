//! Sequences of segments on the real kernel against one rule: accept() happens only for addresses and ports that had a door when
//! that SYN first came, and a door for one connection lets in one.
//!
//! `KNOCKQ_SEQUENCES` says how many sequences are searched, `KNOCKQ_SEED` with which random numbers. A sequence that breaks the
//! rule is told in its shortest form, and `KNOCKQ_SEQUENCE` runs it alone.

use std::collections::HashMap;
use std::fmt;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TcpHeader, TransportSlice};
use knockq::crypto::Binding;
use knockq::nft::{Comment, Door, Doors, Element};
use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::conntrack::{ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Protocol, Tuple};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily};
use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use rustix::net::sockopt::{set_socket_linger, set_socket_recv_buffer_size_force};
use rustix::net::{RecvFlags, listen, recv};

use crate::faults::Knocks;
use crate::hostile::Random;
use crate::lab::{Daemon, FAMILIES, Family, Lab, PATIENCE, eventually};
use crate::{number, raw_socket, send_raw};

/// The guarded port.
const GUARDED: u16 = 22;

/// From where each sequence comes; its neighbour behind the same NAT comes from the next port.
const SOURCE_PORT: u16 = 40_000;

/// Time in which a segment has come, been answered, and the answer heard.
const SETTLED: Duration = Duration::from_millis(100);

/// Longer than the server's FIN_WAIT2 lasts, or what is half open there, or a door that is `brief`.
const DOZE: Duration = Duration::from_millis(1_700);
const BRIEF: Duration = Duration::from_secs(1);
const LONG: Duration = Duration::from_secs(3_600);

/// Longer than conntrack remembers a connection that is not established.
const SLEEP: Duration = Duration::from_millis(4_300);
const SHORT_MEMORY: &[&str] = &[
    "syn_sent",
    "syn_recv",
    "fin_wait",
    "close_wait",
    "last_ack",
    "time_wait",
    "close",
    "max_retrans",
    "unacknowledged",
];

/// Sequences that run at the same time, in a lab of their own.
const AT_ONCE: usize = 1_000;

/// Sequences that are made shorter, of those that break the rule.
const TOLD: usize = 16;

/// Such as must let in no SYN that has no door. Each was found by the search, in a table that let one in: what conntrack knew came
/// before the doors.
const FOUND: [&str; 15] = [
    "once syn ack rst ack syn ack",
    "once syn rst data syn ack",
    "once syn rst ^ack syn ack",
    "once syn synack syn ack",
    "once syn finack close finack syn ack",
    "once syn syn ack",
    "brief syn doze rst ack syn ack",
    "open syn shut ~rst ack syn ack",
    "open syn shut +again syn ack",
    "open syn shut ~ack doze syn ack",
    "open syn ack shut reset syn ack",
    "open syn ack shut close ack doze syn ack",
    "open n:syn n:ack shut n:rst n:ack n:syn n:ack",
    "syn gate rst ack syn ack",
    "syn ack gate reset syn ack",
];

/// Such as must let in their last SYN.
const LET_IN: [&str; 5] =
    ["open syn ack", "once syn ack", "open syn shut again ack", "once syn again ack", "open syn ack rst syn ack"];

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const PSH: u8 = 8;
const ACK: u8 = 16;
const URG: u8 = 32;

/// What a segment is.
#[derive(PartialEq, Eq, Debug)]
struct Kind {
    word: &'static str,
    flags: u8,
    /// How often it is drawn.
    weight: usize,
}

const KINDS: [Kind; 17] = [
    Kind { word: "syn", flags: SYN, weight: 8 },
    // With the sequence number of the SYN before.
    Kind { word: "again", flags: SYN, weight: 4 },
    // With that of the neighbour's.
    Kind { word: "copy", flags: SYN, weight: 2 },
    Kind { word: "synack", flags: SYN | ACK, weight: 2 },
    Kind { word: "ack", flags: ACK, weight: 10 },
    Kind { word: "rst", flags: RST, weight: 8 },
    Kind { word: "rstack", flags: RST | ACK, weight: 4 },
    Kind { word: "fin", flags: FIN, weight: 2 },
    Kind { word: "finack", flags: FIN | ACK, weight: 5 },
    Kind { word: "data", flags: PSH | ACK, weight: 4 },
    Kind { word: "synfin", flags: SYN | FIN, weight: 1 },
    Kind { word: "synurg", flags: SYN | URG, weight: 2 },
    Kind { word: "synpsh", flags: SYN | PSH, weight: 1 },
    Kind { word: "synrst", flags: SYN | RST, weight: 1 },
    Kind { word: "urg", flags: URG, weight: 1 },
    Kind { word: "none", flags: 0, weight: 1 },
    Kind { word: "all", flags: FIN | SYN | RST | PSH | ACK | URG, weight: 1 },
];

/// Which number of a segment is wrong, and how it is marked.
const FAULTS: [(char, Fault); 3] = [('~', Fault::Acknowledged), ('+', Fault::Ahead), ('^', Fault::Elsewhere)];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    None,
    /// It acknowledges what was not sent.
    Acknowledged,
    /// Its sequence number is within the window, but not the next.
    Ahead,
    /// Its sequence number is outside of the window.
    Elsewhere,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Segment {
    kind: &'static Kind,
    fault: Fault,
    /// From the neighbour's port.
    by_neighbour: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Send(Segment),
    Do(Act),
}

/// What happens besides segments.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Act {
    /// The table is loaded. What comes before that comes before the table; without it, it is there from the beginning.
    Gate,
    /// A door, for long.
    Open,
    /// One that runs out.
    Brief,
    /// One for one connection.
    Once,
    /// All doors of this address are shut.
    Shut,
    /// Time passes.
    Doze,
    Sleep,
    /// The service closes its connections.
    Close,
    /// In its own direction alone.
    Half,
    /// By a reset.
    Reset,
    /// It speaks.
    Speak,
    /// Conntrack forgets the connections.
    Flush,
}

const ACTS: [(&str, Act); 12] = [
    ("gate", Act::Gate),
    ("open", Act::Open),
    ("brief", Act::Brief),
    ("once", Act::Once),
    ("shut", Act::Shut),
    ("doze", Act::Doze),
    ("sleep", Act::Sleep),
    ("close", Act::Close),
    ("half", Act::Half),
    ("reset", Act::Reset),
    ("speak", Act::Speak),
    ("flush", Act::Flush),
];

/// How sequences begin, and how often.
const BEGINNINGS: [(&str, usize); 14] = [
    ("", 2),
    ("once syn ack", 5),
    ("once syn", 4),
    ("once", 1),
    ("open syn ack shut", 5),
    ("open syn shut", 4),
    ("open shut", 1),
    ("open", 1),
    ("open syn ack n:syn n:ack shut", 2),
    ("open n:syn n:ack shut", 1),
    ("brief syn ack doze", 2),
    ("brief syn doze", 2),
    ("syn ack gate", 2),
    ("syn gate", 2),
];

/// What may happen between segments, and how often.
const BETWEEN: [(Act, usize); 10] = [
    (Act::Doze, 6),
    (Act::Sleep, 4),
    (Act::Close, 6),
    (Act::Half, 2),
    (Act::Reset, 2),
    (Act::Speak, 2),
    (Act::Flush, 4),
    (Act::Shut, 1),
    (Act::Once, 1),
    (Act::Open, 1),
];

/// How they end.
const ENDING: &str = "syn ack";

/// One sequence, from one address.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Sequence {
    family: Family,
    /// The client's kernel answers too: with resets, for it knows of no connection.
    resets: bool,
    /// The server keeps nothing of a SYN: who acknowledges its answer has a connection.
    cookies: bool,
    steps: Vec<Step>,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Do(act) => f.write_str(ACTS.iter().find(|(_, other)| other == act).unwrap().0),
            Self::Send(Segment { kind, fault, by_neighbour }) => {
                let mark = FAULTS.iter().find(|(_, other)| other == fault).map(|(mark, _)| mark.to_string());
                let who = if *by_neighbour { "n:" } else { "" };
                write!(f, "{who}{}{}", mark.unwrap_or_default(), kind.word)
            }
        }
    }
}

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let client = if self.resets { "resets" } else { "silent" };
        let server = if self.cookies { " cookies" } else { "" };
        write!(f, "{:?} {client}{server}:", self.family)?;
        self.steps.iter().try_for_each(|step| write!(f, " {step}"))
    }
}

fn step(word: &str) -> Step {
    if let Some((_, act)) = ACTS.iter().find(|(other, _)| *other == word) {
        return Step::Do(*act);
    }
    let (by_neighbour, rest) = word.strip_prefix("n:").map_or((false, word), |rest| (true, rest));
    let marked = FAULTS.iter().find_map(|(mark, fault)| Some((*fault, rest.strip_prefix(*mark)?)));
    let (fault, rest) = marked.unwrap_or((Fault::None, rest));
    let kind = KINDS.iter().find(|kind| kind.word == rest).unwrap_or_else(|| panic!("`{word}` is no step"));
    Step::Send(Segment { kind, fault, by_neighbour })
}

fn steps(words: &str) -> Vec<Step> {
    words.split_whitespace().map(step).collect()
}

/// Of each family, with each kind of client and server.
fn each_way(words: &str) -> impl Iterator<Item = Sequence> {
    let steps = steps(words);
    (0..8).map(move |way| {
        let [family, resets, cookies] = [1, 2, 4].map(|bit| way & bit != 0);
        Sequence { family: FAMILIES[usize::from(family)], resets, cookies, steps: steps.clone() }
    })
}

impl Sequence {
    /// As [`fmt::Display`] shows it.
    fn parse(text: &str) -> Self {
        let (client, words) = text.split_once(':').expect("V4 silent: once syn ack ...");
        let family = if client.starts_with("V4") { Family::V4 } else { Family::V6 };
        Self { family, resets: client.contains("resets"), cookies: client.contains("cookies"), steps: steps(words) }
    }

    /// Some beginning, up to six segments, and a SYN.
    fn draw(random: &mut Random) -> Self {
        let mut sequence = Self {
            family: FAMILIES[random.below(2)],
            resets: random.below(4) == 0,
            cookies: random.below(4) == 0,
            steps: steps(pick(random, &BEGINNINGS)),
        };
        let mut waits = 0;
        for _ in 0..random.below(7) {
            if random.below(3) == 0 {
                let act = pick(random, &BETWEEN);
                waits += usize::from(matches!(act, Act::Doze | Act::Sleep));
                if waits <= 2 {
                    sequence.steps.push(Step::Do(act));
                }
            }
            sequence.steps.push(Step::Send(Segment::draw(random)));
        }
        if random.below(4) == 0 {
            sequence.steps.push(Step::Do(pick(random, &BETWEEN)));
        }
        sequence.steps.extend(steps(ENDING));
        sequence
    }

    /// The same, each time without one of its steps.
    fn shorter(&self) -> impl Iterator<Item = Self> {
        (0..self.steps.len()).map(|without| {
            let mut shorter = self.clone();
            shorter.steps.remove(without);
            shorter
        })
    }

    fn has(&self, act: Act) -> bool {
        self.steps.contains(&Step::Do(act))
    }
}

impl Segment {
    fn draw(random: &mut Random) -> Self {
        let kind = pick(random, &KINDS.each_ref().map(|kind| (kind, kind.weight)));
        let fault = if random.below(4) == 0 { FAULTS[random.below(FAULTS.len())].1 } else { Fault::None };
        Self { kind, fault, by_neighbour: random.below(12) == 0 }
    }

    fn has(self, flag: u8) -> bool {
        self.kind.flags & flag != 0
    }

    /// For the table, a SYN that may begin a connection.
    fn is_syn(self) -> bool {
        self.kind.flags & (FIN | SYN | RST | ACK) == SYN
    }
}

fn pick<T: Copy>(random: &mut Random, weighed: &[(T, usize)]) -> T {
    let mut place = random.below(weighed.iter().map(|(_, weight)| weight).sum());
    let drawn = weighed.iter().find(|(_, weight)| {
        let is_it = place < *weight;
        place = place.saturating_sub(*weight);
        is_it
    });
    drawn.unwrap().0
}

/// One address and port of a client, and what it knows of its connection.
struct End {
    address: SocketAddr,
    /// The next sequence number, and the next of the server's.
    next: u32,
    expected: u32,
    /// No SYN had a higher one.
    highest: u32,
    /// Sequence numbers: of all SYNs, of the last one that was answered, and of those that may become a connection.
    sent: Vec<u32>,
    answered: Option<u32>,
    earned: Vec<u32>,
    /// How many may.
    left: usize,
    accepted: Option<TcpStream>,
}

impl End {
    /// A segment; a SYN has a number of its own, or an earlier one.
    fn segment(&mut self, segment: Segment, earlier: Option<u32>) -> TcpHeader {
        let (flags, fault) = (segment.kind.flags, segment.fault);
        let sequence = match fault {
            Fault::Ahead => self.next.wrapping_add(1_000),
            Fault::Elsewhere => self.next.wrapping_sub(100_000),
            _ if flags & (SYN | ACK) == SYN => earlier.unwrap_or_else(|| {
                self.highest = self.highest.wrapping_add(100_000);
                self.highest
            }),
            _ => self.next,
        };
        let acknowledged = self.expected.wrapping_add(if fault == Fault::Acknowledged { 1_000_000 } else { 0 });
        if segment.is_syn() {
            self.sent.push(sequence);
        } else if fault == Fault::None && !segment.has(SYN) {
            let data = if segment.has(PSH) { u32::try_from(DATA.len()).unwrap() } else { 0 };
            self.next = self.next.wrapping_add(data + u32::from(segment.has(FIN)));
        }
        let mut header = TcpHeader::new(self.address.port(), GUARDED, sequence, 64_000);
        header.acknowledgment_number = if segment.has(ACK) { acknowledged } else { 0 };
        (header.fin, header.syn, header.rst) = (segment.has(FIN), segment.has(SYN), segment.has(RST));
        (header.psh, header.ack, header.urg) = (segment.has(PSH), segment.has(ACK), segment.has(URG));
        header
    }

    /// What the server sends tells the right numbers.
    fn hear(&mut self, tcp: &TcpHeader, payload: usize) {
        if tcp.rst || !tcp.ack {
            return;
        }
        let sequence = tcp.acknowledgment_number.wrapping_sub(1);
        if self.sent.contains(&sequence) {
            self.answered = Some(sequence);
        }
        self.next = tcp.acknowledgment_number;
        let length = u32::try_from(payload).unwrap() + u32::from(tcp.fin) + u32::from(tcp.syn);
        self.expected = tcp.sequence_number.wrapping_add(length);
    }
}

/// What segments carry that carry anything.
const DATA: &[u8] = b"hello";

/// How far a sequence has come.
struct Play<'a> {
    sequence: &'a Sequence,
    done: usize,
    due: Instant,
    ends: [End; 2],
    /// Until when its address has a door, and whether it has one for one connection.
    open: Option<Instant>,
    once: bool,
    /// Sequence numbers of SYNs that had one.
    let_in: Vec<u32>,
    outcome: Outcome,
}

#[derive(Clone, Default, Debug)]
struct Outcome {
    /// How many connections were accepted, and after how many steps one that nobody had earned.
    accepted: usize,
    broken: Option<usize>,
}

/// What opens doors.
enum Opener<'a> {
    /// The test itself, in the sets of the table as `knockq ruleset` renders it.
    Sets,
    /// A daemon, for knocks.
    Daemon(Option<Daemon>, &'a mut Knocks),
}

/// Where sequences run.
struct Stage<'a> {
    lab: &'a Lab,
    opener: Opener<'a>,
    is_gated: bool,
    plays: Vec<Play<'a>>,
    /// Which sequence has an address.
    places: HashMap<IpAddr, usize>,
    listener: TcpListener,
    senders: [OwnedFd; 2],
    /// Sees all packets that come to alice.
    ear: OwnedFd,
    doors: Doors,
    conntrack: Socket,
}

/// Addresses that are routed to alice: her kernel drops what comes to those that are silent, and resets it at the others.
fn address(family: Family, resets: bool, number: usize) -> IpAddr {
    let number = u16::try_from(number + 1).unwrap();
    match family {
        Family::V4 => {
            let [high, low] = number.to_be_bytes();
            Ipv4Addr::new(10, 90 + u8::from(resets), high, low).into()
        }
        Family::V6 => Ipv6Addr::new(0xfd77, 0x90 + u16::from(resets), 0, 0, 0, 0, 0, number).into(),
    }
}

/// A network whose server forgets soon: conntrack after so many seconds.
fn network(cookies: bool, memory: u64) -> Lab {
    let lab = Lab::network();
    lab.alice.sh("ip route add local 10.91.0.0/16 dev lo
         ip route add local fd77:91::/64 dev lo");
    lab.server.sh("ip route add 10.90.0.0/15 via 10.77.1.2
         ip route add fd77:90::/31 via fd77:1::2
         nft add table inet tracked
         nft 'add chain inet tracked seen { type filter hook prerouting priority 0; }'
         nft add rule inet tracked seen ct state new counter");
    for state in SHORT_MEMORY {
        lab.server.sysctl(&format!("net/netfilter/nf_conntrack_tcp_timeout_{state}"), &memory.to_string());
    }
    lab.server.sysctl("net/ipv4/tcp_fin_timeout", "1");
    lab.server.sysctl("net/ipv4/tcp_synack_retries", "0");
    lab.server.sysctl("net/ipv4/tcp_syncookies", if cookies { "2" } else { "0" });
    lab.server.sh("ping -c 1 -w 60 10.77.1.2 && ping -c 1 -w 60 fd77:1::2"); // whose neighbour is sought loses packets
    lab
}

/// Runs them all at the same time; what came of each.
fn run<'a>(lab: &'a Lab, opener: Opener<'a>, sequences: &'a [Sequence]) -> Vec<Outcome> {
    let mut random = Random(0x6b6e_6f63_6b71);
    let mut any = || u32::try_from(random.below(1 << 32)).unwrap();
    let plays = (0..).zip(sequences).map(|(number, sequence)| {
        let ends = [0, 1].map(|neighbour| End {
            address: SocketAddr::new(address(sequence.family, sequence.resets, number), SOURCE_PORT + neighbour),
            next: any(),
            expected: any(),
            highest: any(),
            sent: Vec::new(),
            answered: None,
            earned: Vec::new(),
            left: 0,
            accepted: None,
        });
        Play {
            sequence,
            done: 0,
            due: Instant::now(),
            ends,
            open: None,
            once: false,
            let_in: Vec::new(),
            outcome: Outcome::default(),
        }
    });
    let plays: Vec<Play> = plays.collect();
    let ear = lab.alice.enter(|| {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        socket(AddressFamily::Packet, SockType::Datagram, flags, SockProtocol::EthAll).unwrap()
    });
    set_socket_recv_buffer_size_force(&ear, 32 << 20).unwrap();
    let listener = lab.server.enter(|| TcpListener::bind(("::", GUARDED)).unwrap());
    listener.set_nonblocking(true).unwrap();
    listen(&listener, i32::try_from(2 * AT_ONCE).unwrap()).unwrap(); // or what is half open has no place in its queue
    let mut stage = Stage {
        lab,
        opener,
        is_gated: false,
        places: plays.iter().enumerate().map(|(place, play)| (play.ends[0].address.ip(), place)).collect(),
        plays,
        listener,
        senders: lab.alice.enter(|| FAMILIES.map(raw_socket)),
        ear,
        doors: lab.server.enter(|| Doors::new().unwrap()),
        conntrack: conntrack(lab),
    };
    while stage.goes_on() {
        thread::sleep(Duration::from_millis(1));
    }
    stage.plays.into_iter().map(|play| play.outcome).collect()
}

impl Stage<'_> {
    /// The steps that are due; whether there are more.
    fn goes_on(&mut self) -> bool {
        let (mut is_more, mut is_before_the_gate) = (false, false);
        for place in 0..self.plays.len() {
            self.hear();
            let is_gated = self.is_gated;
            let play = &mut self.plays[place];
            let next = play.sequence.steps.get(play.done).copied();
            is_more |= next.is_some() || play.due > Instant::now();
            if !is_gated && (!play.sequence.has(Act::Gate) || next == Some(Step::Do(Act::Gate))) {
                continue;
            }
            is_before_the_gate |= !is_gated;
            if let Some(step) = next.filter(|_| play.due <= Instant::now()) {
                play.done += 1;
                let rest = self.take(place, step);
                self.plays[place].due = Instant::now() + rest;
            }
        }
        if !self.is_gated && !is_before_the_gate {
            self.load();
        }
        is_more
    }

    fn load(&mut self) {
        match &mut self.opener {
            Opener::Sets => self.lab.load_include_file(),
            Opener::Daemon(daemon, _) => *daemon = Some(self.lab.start()),
        }
        self.is_gated = true;
    }

    /// Does it; how long to wait then.
    fn take(&mut self, place: usize, step: Step) -> Duration {
        let play = &mut self.plays[place];
        let act = match step {
            Step::Send(segment) => {
                self.send(place, segment);
                return SETTLED;
            }
            Step::Do(act) => act,
        };
        let accepted = play.ends.iter_mut().filter_map(|end| end.accepted.take());
        match act {
            Act::Gate => return Duration::ZERO,
            Act::Doze => return DOZE,
            Act::Sleep => return SLEEP,
            Act::Open | Act::Brief | Act::Once => self.open(place, act),
            Act::Shut => self.shut(place),
            // What is closed may live on in children that other tests start.
            Act::Close => accepted.for_each(|stream| stream.shutdown(std::net::Shutdown::Both).unwrap_or_default()),
            Act::Reset => accepted.for_each(|stream| set_socket_linger(&stream, Some(Duration::ZERO)).unwrap()),
            Act::Half | Act::Speak => {
                for stream in play.ends.iter_mut().filter_map(|end| end.accepted.as_mut()) {
                    let _ = match act {
                        Act::Half => stream.shutdown(std::net::Shutdown::Write),
                        _ => stream.write_all(DATA),
                    };
                }
            }
            Act::Flush => play.ends.iter().for_each(|end| {
                let server = SocketAddr::new(play.sequence.family.server(), GUARDED);
                forget(&self.conntrack, Protocol::Tcp, end.address, server);
            }),
        }
        SETTLED
    }

    fn open(&mut self, place: usize, act: Act) {
        let play = &mut self.plays[place];
        let (source, once) = (play.ends[0].address.ip(), act == Act::Once);
        let time = if act == Act::Brief { BRIEF } else { LONG };
        match &mut self.opener {
            Opener::Sets => open(&mut self.doors, &door(source, once), time),
            Opener::Daemon(daemon, knocks) => {
                let log = daemon.as_ref().expect("doors are behind a gate");
                let granted = || log.log().matches(&format!("source={source} ")).count();
                let before = granted();
                let knock = knocks.next(play.sequence.family, Binding::Bound(source), &[source]).remove(0);
                send_raw(&self.senders[usize::from(source.is_ipv6())], play.sequence.family, &knock);
                eventually("a grant", || granted() > before);
            }
        }
        if once {
            play.once = true;
        } else {
            play.open = Some(Instant::now() + time + SETTLED);
        }
    }

    fn shut(&mut self, place: usize) {
        let play = &mut self.plays[place];
        let source = play.ends[0].address.ip();
        match &self.opener {
            Opener::Sets => [false, true].iter().for_each(|once| self.doors.close_all([&door(source, *once)]).unwrap()),
            Opener::Daemon(..) => drop(self.lab.revoke(&[&source.to_string()])),
        }
        (play.open, play.once) = (None, false);
    }

    fn send(&mut self, place: usize, segment: Segment) {
        let play = &mut self.plays[place];
        let earlier = |by_neighbour: bool| play.ends[usize::from(by_neighbour)].sent.last().copied();
        let earlier = match segment.kind.word {
            "again" => earlier(segment.by_neighbour),
            "copy" => earlier(!segment.by_neighbour),
            _ => None,
        };
        let end = &mut play.ends[usize::from(segment.by_neighbour)];
        let tcp = end.segment(segment, earlier);
        if segment.is_syn() {
            let sequence = tcp.sequence_number;
            let has_door = !self.is_gated || play.open.is_some_and(|end| Instant::now() < end);
            if end.earned.contains(&sequence) {
                // It comes again.
            } else if !has_door && end.left > 0 && play.let_in.contains(&sequence) {
                // The table knows sequence numbers and, apart from them, addresses and ports: it may take the other's place.
                end.earned.push(sequence);
            } else if has_door || std::mem::take(&mut play.once) {
                end.earned.push(sequence);
                end.left += 1;
                play.let_in.push(sequence);
            }
        }
        let family = play.sequence.family;
        let payload = if segment.kind.word == "data" { DATA } else { b"" };
        let mut packet = Vec::new();
        match (end.address.ip(), family.server()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let builder = PacketBuilder::ipv4(from.octets(), to.octets(), 64);
                builder.tcp_header(tcp).write(&mut packet, payload).unwrap();
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let builder = PacketBuilder::ipv6(from.octets(), to.octets(), 64);
                builder.tcp_header(tcp).write(&mut packet, payload).unwrap();
            }
            other => panic!("{other:?}"),
        }
        send_raw(&self.senders[usize::from(family == Family::V6)], family, &packet);
    }

    /// What was accepted, then what was answered: an answer that comes later belongs to another connection.
    fn hear(&mut self) {
        while let Ok((stream, peer)) = self.listener.accept() {
            let play = &mut self.plays[self.places[&peer.ip().to_canonical()]];
            let end = &mut play.ends[usize::from(peer.port() - SOURCE_PORT)];
            play.outcome.accepted += 1;
            match end.earned.iter().position(|earned| Some(*earned) == end.answered) {
                // Who acknowledges a cookie again has its connection again: of the SYN, the kernel has kept nothing.
                Some(_) if play.sequence.cookies => {}
                Some(earned) if end.left > 0 => {
                    end.earned.swap_remove(earned);
                    end.left -= 1;
                }
                _ => drop(play.outcome.broken.get_or_insert(play.done)),
            }
            end.accepted = Some(stream);
        }
        let mut bytes = [0; 2048];
        while let Ok((_, length)) = recv(&self.ear, &mut bytes, RecvFlags::DONTWAIT) {
            let Ok(packet) = SlicedPacket::from_ip(&bytes[..length]) else { continue };
            let Some(TransportSlice::Tcp(tcp)) = packet.transport else { continue };
            let to: IpAddr = match packet.net {
                Some(NetSlice::Ipv4(ip)) => ip.header().destination_addr().into(),
                Some(NetSlice::Ipv6(ip)) => ip.header().destination_addr().into(),
                _ => continue,
            };
            if let Some(place) = self.places.get(&to).filter(|_| tcp.source_port() == GUARDED) {
                let end = &mut self.plays[*place].ends[usize::from(tcp.destination_port() - SOURCE_PORT)];
                end.hear(&tcp.to_header(), tcp.payload().len());
            }
        }
    }
}

fn door(source: IpAddr, once: bool) -> Door {
    Door { source, port: format!("tcp/{GUARDED}").parse().unwrap(), once }
}

fn open(doors: &mut Doors, door: &Door, time: Duration) {
    doors.change([&(Element::Opens(*door), Some((time, Comment::read("alice ssh").unwrap())))]).unwrap();
}

/// A socket that changes what the server's conntrack knows.
fn conntrack(lab: &Lab) -> Socket {
    lab.server.enter(|| {
        let mut socket = Socket::new(NETLINK_NETFILTER).unwrap();
        socket.bind_auto().unwrap();
        socket.connect(&netlink_sys::SocketAddr::new(0, 0)).unwrap();
        socket
    })
}

/// Conntrack forgets a connection, whichever end it takes to have begun it.
fn forget(conntrack: &Socket, protocol: Protocol, one: SocketAddr, other: SocketAddr) {
    let family = if one.is_ipv4() { NetfilterProtoFamily::IPv4 } else { NetfilterProtoFamily::IPv6 };
    for (from, to) in [(one, other), (other, one)] {
        let addresses = vec![IPTuple::SourceAddress(from.ip()), IPTuple::DestinationAddress(to.ip())];
        let ports = vec![
            ProtoTuple::Protocol(protocol),
            ProtoTuple::SourcePort(from.port()),
            ProtoTuple::DestinationPort(to.port()),
        ];
        let tuple = ConntrackAttribute::CtaTupleOrig(vec![Tuple::Ip(addresses), Tuple::Proto(ports)]);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST;
        let delete = ConntrackMessage::Delete(vec![tuple]);
        let message = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), delete);
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        conntrack.send(&bytes, 0).unwrap();
    }
}

/// Runs them with doors in the sets.
fn run_with_sets(sequences: &[Sequence]) -> Vec<(Sequence, Outcome)> {
    let (with_cookies, without): (Vec<_>, Vec<_>) = sequences.iter().cloned().partition(|sequence| sequence.cookies);
    thread::scope(|scope| {
        let kinds = [(true, with_cookies), (false, without)].map(|(cookies, sequences)| {
            scope.spawn(move || {
                let lab = network(cookies, 3);
                lab.configure("[services.ssh]\nports = [\"tcp/22\"]\n");
                let outcomes = run(&lab, Opener::Sets, &sequences);
                sequences.into_iter().zip(outcomes).collect::<Vec<_>>()
            })
        });
        kinds.into_iter().flat_map(|kind| kind.join().unwrap()).collect()
    })
}

/// Those that break the rule.
fn broken(sequences: &[Sequence]) -> Vec<Sequence> {
    let outcomes = sequences.chunks(AT_ONCE).flat_map(run_with_sets);
    outcomes.filter(|(_, outcome)| outcome.broken.is_some()).map(|(sequence, _)| sequence).collect()
}

/// The shortest that still break the rule, of a few of these.
fn shrink(mut sequences: Vec<Sequence>) -> Vec<Sequence> {
    sequences.sort_by_key(|sequence| sequence.steps.len());
    sequences.truncate(TOLD);
    loop {
        let shorter: Vec<Vec<Sequence>> = sequences.iter().map(|sequence| sequence.shorter().collect()).collect();
        let broken = broken(&shorter.concat());
        let (before, mut shrunk) = (sequences.clone(), Vec::new());
        for (sequence, shorter) in sequences.into_iter().zip(shorter) {
            let sequence = shorter.into_iter().find(|shorter| broken.contains(shorter)).unwrap_or(sequence);
            if !shrunk.contains(&sequence) {
                shrunk.push(sequence);
            }
        }
        if shrunk == before {
            return shrunk;
        }
        sequences = shrunk;
    }
}

#[track_caller]
fn breaks_nothing(sequences: &[Sequence]) {
    let broken = broken(sequences);
    if !broken.is_empty() {
        let (count, all) = (broken.len(), sequences.len());
        let shortest = shrink(broken).iter().map(|one| format!("KNOCKQ_SEQUENCE='{one}'\n")).collect::<String>();
        panic!("{count} of {all} sequences let in a connection that nobody had earned, such as these:\n{shortest}");
    }
}

/// Those that were found once, then as many others as are wanted.
#[test]
fn no_sequence_of_segments_gets_a_connection_without_a_door() {
    if let Ok(sequence) = std::env::var("KNOCKQ_SEQUENCE") {
        return breaks_nothing(&[Sequence::parse(&sequence)]);
    }
    breaks_nothing(&FOUND.into_iter().flat_map(each_way).collect::<Vec<_>>());
    let seed = number("KNOCKQ_SEED", 0x6b6e_6f63_6b71);
    println!("KNOCKQ_SEED={seed}");
    let mut random = Random(seed);
    let sequences: Vec<_> = (0..number("KNOCKQ_SEQUENCES", 1_000)).map(|_| Sequence::draw(&mut random)).collect();
    sequences.chunks(AT_ONCE).for_each(breaks_nothing);
}

#[test]
fn a_syn_that_had_a_door_gets_its_connection_also_when_it_comes_again_or_the_door_is_shut() {
    let sequences: Vec<Sequence> = LET_IN.into_iter().flat_map(each_way).filter(|sequence| !sequence.resets).collect();
    for (sequence, outcome) in run_with_sets(&sequences) {
        assert!(outcome.accepted > 0 && outcome.broken.is_none(), "{sequence}: {outcome:?}");
    }
}

/// The same through the daemon, with knocks, and with doors that `revoke` shuts.
#[test]
fn no_sequence_of_segments_gets_a_connection_from_a_daemon_without_a_knock() {
    let sequences = FOUND.into_iter().chain(LET_IN).flat_map(each_way);
    let (once, open): (Vec<_>, Vec<_>) = sequences
        .filter(|sequence| !sequence.cookies && !sequence.has(Act::Brief))
        .partition(|sequence| sequence.has(Act::Once));
    for (setting, sequences) in [("", open), ("once = true", once)] {
        let lab = network(false, 60); // knocks and revocations take their time
        lab.configure(&format!("[services.ssh]\nports = [\"tcp/22\"]\nopen_for = \"1h\"\n{setting}\n"));
        lab.add_user("alice", &["ssh"]);
        lab.set("window = \"10m\"");
        let mut knocks = Knocks::new(&lab);
        let outcomes = run(&lab, Opener::Daemon(None, &mut knocks), &sequences);
        assert!(outcomes.iter().any(|outcome| outcome.accepted > 0), "no knock opened anything");
        let broken = sequences.iter().zip(outcomes).filter(|(_, outcome)| outcome.broken.is_some());
        let broken = broken.map(|(sequence, _)| format!("{sequence}\n")).collect::<String>();
        assert!(broken.is_empty(), "connections that nobody had earned:\n{broken}");
    }
}

#[test]
fn a_query_sent_out_from_a_guarded_udp_port_is_no_door_for_its_answer() {
    let lab = Lab::network();
    lab.configure("[services.dns]\nports = [\"udp/53\"]\n");
    lab.load_include_file();
    let server = lab.server.enter(|| UdpSocket::bind(("::", 53)).unwrap());
    server.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let asked = lab.mallory.enter(|| UdpSocket::bind(("::", 53)).unwrap());
    asked.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut doors = lab.server.enter(|| Doors::new().unwrap());
    let mut buffer = [0; 16];
    for family in FAMILIES {
        let to = |address: IpAddr| match address {
            IpAddr::V4(address) => SocketAddr::new(address.to_ipv6_mapped().into(), 53),
            address => SocketAddr::new(address, 53),
        };
        for has_door in [false, true] {
            let door = Door { source: family.mallory(), port: "udp/53".parse().unwrap(), once: false };
            if has_door {
                open(&mut doors, &door, LONG);
            }
            server.send_to(b"query", to(family.mallory())).unwrap();
            let (_, from) = asked.recv_from(&mut buffer).unwrap();
            asked.send_to(b"answer", from).unwrap();
            assert_eq!(server.recv(&mut buffer).is_ok(), has_door, "{family:?}");
        }
    }
}

#[test]
fn a_server_that_speaks_first_after_conntrack_was_flushed_revives_no_connection_without_a_door() {
    let lab = Lab::network();
    lab.configure("[services.ssh]\nports = [\"tcp/22\"]\n");
    lab.load_include_file();
    let listener = lab.server.enter(|| TcpListener::bind(("::", GUARDED)).unwrap());
    let (mut doors, conntrack) = (lab.server.enter(|| Doors::new().unwrap()), conntrack(&lab));
    for family in FAMILIES {
        let server = SocketAddr::new(family.server(), GUARDED);
        for has_door in [false, true] {
            let door = door(family.alice(), false);
            open(&mut doors, &door, LONG);
            let mut client = lab.alice.enter(|| TcpStream::connect_timeout(&server, PATIENCE).unwrap());
            let (mut service, peer) = listener.accept().unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            service.set_read_timeout(Some(PATIENCE)).unwrap();
            doors.close_all([&door]).unwrap();
            assert!(says(&mut client, &mut service), "{family:?}: it lives on, whether its door is shut or not");
            if has_door {
                open(&mut doors, &door, LONG);
            }
            forget(&conntrack, Protocol::Tcp, SocketAddr::new(family.alice(), peer.port()), server);
            service.write_all(DATA).unwrap();
            thread::sleep(SETTLED);
            service.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            assert_eq!(says(&mut client, &mut service), has_door, "{family:?}");
            doors.close_all([&door]).unwrap();
        }
    }
}

/// What one end says arrives at the other.
fn says(from: &mut TcpStream, to: &mut TcpStream) -> bool {
    let mut heard = [0; DATA.len()];
    from.write_all(DATA).is_ok() && to.read_exact(&mut heard).is_ok() && heard == DATA
}
