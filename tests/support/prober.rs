//! A stranger who tries the guarded port again and again.

#![allow(dead_code, reason = "tests and benchmarks look at different parts of what came of it")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{fs, thread};

use knockq::packet::Flow;
use nix::sched::{CloneFlags, setns};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recv, sendto, socket_with};

use crate::lab::{Family, Lab};
use crate::recorded::persona;

/// The port that is tried.
const GUARDED: u16 = 22;

/// Bytes of an IPv4 header without options. A raw socket shows it, that of IPv6 not.
const IPV4_HEADER: usize = 20;

/// Mallory, who sends SYN after SYN until he is asked what came of it.
pub struct Prober {
    is_over: Arc<AtomicBool>,
    probing: JoinHandle<Probed>,
}

/// What came of it.
pub struct Probed {
    /// How many SYNs he sent.
    pub sent: usize,
    /// When each SYN was sent for which a segment of any kind came back, be it again.
    pub answered: Vec<Instant>,
}

impl Prober {
    /// With a pause after each SYN, so that others have the processor too, or with none.
    pub fn start(lab: &Lab, family: Family, pause: Duration) -> Self {
        let namespace = fs::File::open(format!("/run/netns/{}", lab.mallory.name)).unwrap();
        let is_over = Arc::new(AtomicBool::new(false));
        let is_told = Arc::clone(&is_over);
        let probing = thread::spawn(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).unwrap();
            probe(family, pause, &is_told)
        });
        Self { is_over, probing }
    }

    /// Ends it, once what is on the way has come.
    pub fn stop(self) -> Probed {
        self.is_over.store(true, Ordering::Relaxed);
        self.probing.join().unwrap()
    }
}

impl Probed {
    /// From the first SYN of this time that was answered to the last.
    pub fn window(&self, from: Instant, to: Instant) -> Option<Duration> {
        let answered = || self.answered.iter().filter(|sent| (from..to).contains(sent));
        Some(answered().max()?.duration_since(*answered().min()?))
    }
}

fn probe(family: Family, pause: Duration, is_over: &AtomicBool) -> Probed {
    let domain = if family == Family::V4 { AddressFamily::INET } else { AddressFamily::INET6 };
    let raw = |protocol| socket_with(domain, SocketType::RAW, SocketFlags::CLOEXEC, Some(protocol)).unwrap();
    let (sender, receiver) = (raw(ipproto::RAW), raw(ipproto::TCP));
    let (persona, server) = (persona(family == Family::V4), SocketAddr::new(family.server(), 0));
    let tcp = if family == Family::V4 { IPV4_HEADER } else { 0 };
    let (mut sent, mut answered) = (Vec::new(), Vec::new());
    let mut hear = |sent: &[Instant]| {
        let mut bytes = [0; 128];
        while let Ok((_, length)) = recv(&receiver, &mut bytes, RecvFlags::DONTWAIT) {
            let Some(segment) =
                bytes[..length].get(tcp..).filter(|segment| segment.starts_with(&GUARDED.to_be_bytes()))
            else {
                continue;
            };
            let acknowledged = u32::from_be_bytes(segment[8..12].try_into().unwrap());
            // A SYN's sequence number is its place, and counts as one byte.
            answered.push(sent[usize::try_from(acknowledged.wrapping_sub(1)).unwrap()]);
        }
    };
    for source_port in (1024..=u16::MAX).cycle().take_while(|_| !is_over.load(Ordering::Relaxed)) {
        let flow =
            Flow { source: family.mallory(), source_port, destination: family.server(), destination_port: GUARDED };
        let place = u32::try_from(sent.len()).unwrap();
        let syn = persona.syn(&flow, place, place).unwrap();
        sent.push(Instant::now());
        sendto(&sender, &syn, SendFlags::empty(), &server).unwrap();
        hear(&sent);
        if !pause.is_zero() {
            thread::sleep(pause);
        }
    }
    thread::sleep(Duration::from_millis(300));
    hear(&sent);
    Probed { sent: sent.len(), answered }
}
