//! Bytes that no kernel sends, as fast as they come, at the ports that are read.

use std::fs;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use etherparse::{Ipv4HeaderSlice, Ipv6HeaderSlice};
use knockq::crypto::{Binding, KnockPorts};
use nix::unistd::Pid;
use rustix::net::{SendFlags, sendto};

use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually, resident};
use crate::recorded::persona;
use crate::{UntilDropped, flow, raw_socket, tcp_offset};

/// No flood lasts longer, however slow the machine is: other tests run beside.
const LIMIT: Duration = Duration::from_secs(40);

/// Different packets of each family, sent again and again.
const PACKETS: u64 = 4_096;

/// Addresses that mallory copies alice's knock to.
const THIEVES: u8 = 200;

/// KiB that a process may have grown by, in tables and buffers that fill once: a copy kept of each packet would be more.
const GROWTH: u64 = 3_072;

/// Lines that the log may have grown by in a minute: refusals of one kind and source are told once in that, of 64 at most.
const LINES: usize = 64 + 20;

#[test]
fn a_flood_of_hostile_bytes_opens_nothing_fills_no_memory_and_no_log_and_hinders_no_knock() {
    let lab = Lab::with("open_for = \"10s\"");
    let (daemon, start) = (lab.start(), Instant::now());
    let packets = FAMILIES.map(|family| packets(&lab, family));
    flood(&lab, &packets, || thread::sleep(Duration::from_millis(500))); // what is allocated once is there
    let (memory, lines, before) = (memory(&daemon), daemon.log().lines().count(), queued(&lab));
    flood(&lab, &packets, || {
        eventually("as many packets in the queue as there are", || queued(&lab) > before + 2 * PACKETS);
        for family in FAMILIES {
            // The queue holds so much and no more: a knock may be among what is lost.
            eventually("a knock in the flood", || {
                lab.knock(family, &[]);
                (0..10).any(|_| {
                    thread::sleep(Duration::from_millis(100));
                    lab.door(family.alice(), 22).is_some()
                })
            });
        }
    });
    for family in FAMILIES {
        assert_eq!(lab.door(family.mallory(), 22), None);
        assert!(!lab.mallory.reaches(family.server(), 22));
        eventually("closing", || lab.door(family.alice(), 22).is_none());
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    for (role, before) in memory {
        let now = resident(role.1);
        assert!(now <= before + GROWTH, "{} grew from {before} to {now} KiB", role.0);
    }
    let log = daemon.log();
    let minutes = 1 + usize::try_from(start.elapsed().as_secs() / 60).unwrap();
    assert!(log.lines().count() <= lines + minutes * LINES, "{log}");
    let is_for_mallory = |line: &str| line.contains("source=10.77.2.") || line.contains("source=fd77:2:");
    assert!(!log.lines().any(|line| line.contains("granted") && is_for_mallory(line)), "{log}");
    daemon.stop();
}

#[test]
fn what_no_kernel_sends_is_read_and_refused_for_what_it_is() {
    let lab = Lab::new();
    let daemon = Daemon::spawn_with(&lab, &["--debug"], &[]);
    eventually("readiness", || daemon.log().contains("knockq: ready"));
    for family in FAMILIES {
        for (shape, reason) in [
            (Shape::Plain, "unknown"),
            (Shape::CutHeader, "truncated"),
            (Shape::ShortOffset, "malformed"),
            (Shape::LongOffset, "truncated"),
            (Shape::Extended, "unknown"),
            (Shape::Payload, "unknown"),
        ] {
            let told = format!("packet reason={reason}");
            let before = daemon.log().matches(&told).count();
            let packet = Random(7).packet(family, shape);
            lab.mallory.enter(|| send(&raw_socket(family), family, &packet));
            eventually("a refusal", || daemon.log().matches(&told).count() > before);
        }
    }
    daemon.stop();
}

/// How a packet differs from a SYN of the kernel's.
#[derive(Clone, Copy)]
enum Shape {
    /// In nothing but its numbers.
    Plain,
    /// It ends within the TCP header, behind the flags.
    CutHeader,
    /// The TCP header is shorter than any.
    ShortOffset,
    /// The TCP header is longer than the packet.
    LongOffset,
    /// Any data offset.
    AnyOffset,
    /// Forty bytes of options, at random.
    Options,
    /// Data behind the header.
    Payload,
    /// A wrong checksum.
    Checksum,
    /// Options of IPv4, or extension headers of IPv6.
    Extended,
    /// Whatever is not needed to reach the queue, at random.
    Garbage,
}

const SHAPES: [Shape; 10] = [
    Shape::Plain,
    Shape::CutHeader,
    Shape::ShortOffset,
    Shape::LongOffset,
    Shape::AnyOffset,
    Shape::Options,
    Shape::Payload,
    Shape::Checksum,
    Shape::Extended,
    Shape::Garbage,
];

/// Numbers that are the same in each run (George Marsaglia's xorshift64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(end).unwrap()).unwrap()
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next().to_be_bytes()[3]).collect()
    }

    /// A packet of mallory's to a knock port, from the IP header on, which the queue rule takes.
    fn packet(&mut self, family: Family, shape: Shape) -> Vec<u8> {
        let port = 20_000 + u16::try_from(self.below(1_024)).unwrap();
        let [sequence, tsval] = [(); 2].map(|()| u32::try_from(self.next() >> 32).unwrap());
        let flow = flow(family.mallory(), family.server(), port);
        let syn = persona(family == Family::V4).syn(&flow, sequence, tsval).unwrap();
        let (ip, tcp) = syn.split_at(tcp_offset(&syn));
        let (mut ip, mut tcp) = (ip.to_vec(), tcp.to_vec());
        match shape {
            Shape::Plain => {}
            Shape::CutHeader => tcp.truncate(14 + self.below(6)),
            Shape::ShortOffset => tcp[12] = u8::try_from(self.below(5)).unwrap() << 4,
            Shape::LongOffset => {
                tcp.truncate(20);
                tcp[12] = 0xf0;
            }
            Shape::AnyOffset => tcp[12] = self.bytes(1)[0],
            Shape::Options => {
                tcp.truncate(20);
                tcp[12] = 0xf0;
                tcp.extend(self.bytes(40));
            }
            Shape::Payload => {
                let length = 1 + self.below(1_300);
                tcp.extend(self.bytes(length));
            }
            Shape::Checksum => tcp[16] ^= 1,
            Shape::Extended => self.extend(&mut ip),
            Shape::Garbage => {
                let (length, to) = (14 + self.below(100), [tcp[2], tcp[3]]);
                tcp = self.bytes(length);
                tcp[2..4].copy_from_slice(&to);
                tcp[13] = 0x02 | tcp[13] & 0xe8;
            }
        }
        whole(ip, &tcp)
    }

    /// No-operations for IPv4; for IPv6 a hop-by-hop and a destination header, the second with a padding of any length.
    fn extend(&mut self, ip: &mut Vec<u8>) {
        if ip[0] >> 4 == 4 {
            let words = 1 + self.below(10);
            ip[0] = 0x45 + u8::try_from(words).unwrap();
            ip.extend([1].repeat(4 * words));
            return;
        }
        let eights = self.below(4);
        ip[6] = 0;
        ip.extend([60, 0, 1, 4, 0, 0, 0, 0]);
        ip.extend([6, u8::try_from(eights).unwrap(), 1, u8::try_from(4 + 8 * eights).unwrap()]);
        ip.extend([0].repeat(4 + 8 * eights));
    }
}

/// The packet with its right length. The kernel makes IPv4's checksum.
fn whole(mut ip: Vec<u8>, tcp: &[u8]) -> Vec<u8> {
    if ip[0] >> 4 == 6 {
        let payload = u16::try_from(ip.len() - 40 + tcp.len()).unwrap();
        ip[4..6].copy_from_slice(&payload.to_be_bytes());
    }
    [ip.as_slice(), tcp].concat()
}

/// Packets of every shape; and a knock that alice has spent, from many addresses of mallory's.
fn packets(lab: &Lab, family: Family) -> Vec<Vec<u8>> {
    let mut random = Random(0x006b_6e6f_636b);
    let mut packets = Vec::new();
    for _ in 0..PACKETS {
        let shape = SHAPES[random.below(SHAPES.len())];
        packets.push(random.packet(family, shape));
    }
    let (key, n) = (lab.alice_key(), lab.next_counter());
    let token = key.seal(n, 22, Binding::Unbound);
    let port = key.pad(n).knock_port(&KnockPorts::new([20_000..=21_023]).unwrap());
    let knock = |source| {
        let flow = flow(source, family.server(), port);
        persona(family == Family::V4).syn(&flow, token.sequence, token.tsval).unwrap()
    };
    lab.alice.enter(|| send(&raw_socket(family), family, &knock(family.alice())));
    lab.wait_for_door(family.alice(), 22);
    eventually("closing", || lab.door(family.alice(), 22).is_none());
    for thief in 0..THIEVES {
        packets.push(knock(family.pick(&format!("10.77.2.{}", 20 + thief), &format!("fd77:2::{:x}", 0x20 + thief))));
    }
    for packet in &packets {
        let is_whole = match packet[0] >> 4 {
            4 => Ipv4HeaderSlice::from_slice(packet).is_ok(),
            _ => Ipv6HeaderSlice::from_slice(packet).is_ok(),
        };
        assert!(is_whole, "the server's kernel would drop it itself");
    }
    packets
}

/// Does something while mallory sends these, as fast as she can.
fn flood(lab: &Lab, packets: &[Vec<Vec<u8>>; 2], work: impl FnOnce()) {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let until_dropped = UntilDropped(&is_over);
        scope.spawn(|| lab.mallory.enter(|| send_all(packets, &is_over)));
        work();
        drop(until_dropped);
    });
}

fn send_all(packets: &[Vec<Vec<u8>>; 2], is_over: &AtomicBool) {
    let (sockets, start) = (FAMILIES.map(raw_socket), Instant::now());
    for number in 0.. {
        if is_over.load(Ordering::Relaxed) || start.elapsed() > LIMIT {
            return;
        }
        for ((family, socket), packets) in FAMILIES.into_iter().zip(&sockets).zip(packets) {
            send(socket, family, &packets[number % packets.len()]);
        }
    }
}

/// Sends it, or loses it where the interface's queue is full.
fn send(socket: &OwnedFd, family: Family, packet: &[u8]) {
    let server = std::net::SocketAddr::new(family.server(), 0);
    match sendto(socket, packet, SendFlags::empty(), &server) {
        Ok(_) | Err(rustix::io::Errno::NOBUFS) => {}
        Err(error) => panic!("{error}: {packet:02x?}"),
    }
}

type Role = (&'static str, Pid);

/// KiB that gate and engine have in memory.
fn memory(daemon: &Daemon) -> Vec<(Role, u64)> {
    let children = daemon.processes().into_iter().filter(|(name, _)| *name != "root");
    children.map(|role| (role, resident(role.1))).collect()
}

/// Packets that the kernel has queued so far (net/netfilter/nfnetlink_queue.c, `seq_show`).
fn queued(lab: &Lab) -> u64 {
    let text = lab.server.enter(|| fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue")).unwrap();
    text.split_whitespace().nth(7).unwrap().parse().unwrap()
}
