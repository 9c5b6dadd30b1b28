//! SYNs of strangers, at a rate.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use knockq::packet::Flow;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with};

use crate::lab::{Family, Host, Lab};
use crate::machine;
use crate::recorded::persona;

/// Different SYNs, sent again and again.
const PACKETS: u32 = 1 << 16;

/// Time between two handfuls: at 100,000 a second, one of them is of 20 SYNs.
const PAUSE: Duration = Duration::from_micros(200);

/// When the sender did not run for longer than this, it does not make up for it: a burst would be another flood.
const BEHIND: Duration = Duration::from_millis(5);

/// No flood lasts longer, whatever happens to those who measure.
const LIMIT: Duration = Duration::from_secs(120);

/// What was sent and seen.
pub struct Flooded {
    /// SYNs a second that were sent.
    pub rate: f64,
    /// SYNs that reached the queue, the knocks among them.
    pub queued: u64,
    /// SYNs that the queue dropped unread.
    pub dropped: u64,
    /// Share of a core that sending took, with the kernel's work up to the queue.
    pub generator: f64,
}

/// Does something while so many SYNs a second come to the server's knock ports.
pub fn during<T: Send>(lab: &Lab, rate: u32, work: impl FnOnce() -> T + Send) -> (T, Flooded) {
    let (packets, before) = (packets(), queue(&lab.server));
    let is_over = AtomicBool::new(false);
    let (result, (sent, elapsed, cpu)) = thread::scope(|scope| {
        let flood = scope.spawn(|| lab.mallory.enter(|| send(rate, &packets, &is_over)));
        thread::sleep(Duration::from_millis(500));
        let result = thread::Builder::new().spawn_scoped(scope, work).unwrap().join();
        is_over.store(true, Ordering::Relaxed);
        (result, flood.join().unwrap())
    });
    thread::sleep(Duration::from_millis(100));
    let after = queue(&lab.server);
    let flooded = Flooded {
        rate: f64::from(sent) / elapsed.as_secs_f64(),
        queued: after.queued - before.queued,
        dropped: after.dropped - before.dropped,
        generator: cpu.as_secs_f64() / elapsed.as_secs_f64(),
    };
    (result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)), flooded)
}

fn send(rate: u32, packets: &[Vec<u8>], is_over: &AtomicBool) -> (u32, Duration, Duration) {
    let (socket, start) = (RawSocket::new(), Instant::now());
    let (mut sent, mut next) = (0, start);
    while !is_over.load(Ordering::Relaxed) && start.elapsed() < LIMIT {
        let now = Instant::now();
        next = next.max(now - BEHIND);
        while next <= now {
            socket.send(&packets[usize::try_from(sent % PACKETS).unwrap()]);
            sent += 1;
            next += Duration::from_secs(1) / rate;
        }
        thread::sleep(PAUSE);
    }
    (sent, start.elapsed(), machine::cpu_of_thread())
}

/// Random where a genuine SYN is; from 65,536 addresses.
fn packets() -> Vec<Vec<u8>> {
    let server = Family::V4.server();
    let persona = persona(true);
    let packet = |number: u32| {
        let flow = Flow {
            source: IpAddr::V4(Ipv4Addr::from(0x0a4f_0000 + number)),
            source_port: 1024 + u16::try_from(number % 50_000).unwrap(),
            destination: server,
            destination_port: 20_000 + u16::try_from(number % 1024).unwrap(),
        };
        persona.syn(&flow, getrandom::u32().unwrap(), getrandom::u32().unwrap()).unwrap()
    };
    (0..PACKETS).map(packet).collect()
}

/// What the kernel counts of the queue (net/netfilter/nfnetlink_queue.c, `seq_show`).
struct Counts {
    queued: u64,
    dropped: u64,
}

fn queue(server: &Host) -> Counts {
    let text = server.enter(|| std::fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue")).unwrap();
    let fields: Vec<u64> = text.split_whitespace().map(|field| field.parse().unwrap()).collect();
    Counts { queued: fields[7], dropped: fields[5] + fields[6] }
}

/// Sends packets to the server as they are.
pub struct RawSocket(OwnedFd);

impl RawSocket {
    /// In the namespace of this thread.
    pub fn new() -> Self {
        Self(socket_with(AddressFamily::INET, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW)).unwrap())
    }

    pub fn send(&self, packet: &[u8]) {
        let server: IpAddr = Family::V4.server();
        sendto(&self.0, packet, SendFlags::empty(), &SocketAddr::new(server, 0)).unwrap();
    }
}
