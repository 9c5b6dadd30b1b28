//! On a real kernel: real daemons, real clients, real packets, over IPv4 and IPv6.

mod ancestor;
mod answer;
mod client;
mod confinement;
mod control;
mod daemon;
mod debugger;
mod doctor;
mod doors;
mod explain;
mod faults;
mod guides;
mod hostile;
mod hosts;
mod invitation;
mod kill;
mod knockknock;
#[path = "../support/lab.rs"]
mod lab;
mod observers;
mod once;
mod owned;
mod paths;
mod persona;
#[path = "../support/prober.rs"]
mod prober;
mod proxy;
#[path = "../support/persona.rs"]
mod recorded;
mod reload;
mod saved;
mod segments;
mod sets;
mod status;
mod store;
mod table;
mod users;
mod watch;
mod wire;

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{fs, thread};

use knockq::crypto::{KnockKey, KnockSecrets, PrivateKey, Side};
use knockq::packet::Flow;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with};

use lab::{Family, Lab, PATIENCE};

pub(crate) fn raw_socket(family: Family) -> OwnedFd {
    let domain = if family == Family::V4 { AddressFamily::INET } else { AddressFamily::INET6 };
    socket_with(domain, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW)).unwrap()
}

pub(crate) fn send_raw(socket: &OwnedFd, family: Family, packet: &[u8]) {
    sendto(socket, packet, SendFlags::empty(), &SocketAddr::new(family.server(), 0)).unwrap();
}

/// Whether this kernel lets the daemon own its table, as its log says.
pub(crate) fn daemon_owned_the_table(lab: &Lab) -> bool {
    let logs = fs::read_dir(&lab.directory.path).unwrap().map(|entry| entry.unwrap().path());
    let logs = logs.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    logs.into_iter().any(|log| fs::read_to_string(log).unwrap().contains("the table is owned"))
}

impl Lab {
    /// Waits for a door and tells its element.
    #[track_caller]
    pub(crate) fn wait_for_door(&self, source: IpAddr, port: u16) -> String {
        let start = Instant::now();
        loop {
            if let Some(element) = self.door(source, port) {
                return element;
            }
            assert!(start.elapsed() < PATIENCE, "no door for {source} to {port}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// What an administrator does where `ruleset = "external"`: writes the include file, and loads it.
    pub(crate) fn load_include_file(&self) {
        let config = self.config();
        let include_file = config.with_file_name("knockq.nft");
        fs::write(&include_file, self.control(&["ruleset", "--config", config.to_str().unwrap()])).unwrap();
        self.server.nft(&["-f", include_file.to_str().unwrap()]);
    }

    /// No door opens, to anyone, in the time that one would take.
    #[track_caller]
    pub(crate) fn stays_shut(&self, family: Family) {
        thread::sleep(Duration::from_millis(300));
        for source in [family.alice(), family.mallory()] {
            assert_eq!(self.door(source, 22), None);
            assert_eq!(self.door(source, 25), None);
        }
        assert!(!self.alice.reaches(family.server(), 22));
        assert!(!self.mallory.reaches(family.server(), 22));
    }

    /// What alice's key and the server's agree on.
    pub(crate) fn alice_key(&self) -> KnockKey {
        self.key_of("alice")
    }

    /// What a user's key and the server's agree on.
    pub(crate) fn key_of(&self, user: &str) -> KnockKey {
        let own: PrivateKey = fs::read_to_string(self.home(user).join(".config/knockq/key")).unwrap().parse().unwrap();
        let server = self.server_key().parse().unwrap();
        KnockKey::new(&KnockSecrets::derive(Side::Client, &own, &server, None).unwrap())
    }

    /// A counter above those that alice has used so far.
    pub(crate) fn next_counter(&self) -> u64 {
        let directory = self.home("alice").join(".local/state/knockq/counters");
        let files = fs::read_dir(directory)
            .into_iter()
            .flatten()
            .map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap());
        let used =
            files.flat_map(|text| text.lines().filter_map(|line| line.parse::<u64>().ok()).collect::<Vec<_>>()).max();
        unix_now().max(used.unwrap_or(0) + 1)
    }
}

/// A number from the environment.
pub(crate) fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |number| number.parse().unwrap())
}

/// Until this is dropped, also because something failed, other threads of a test go on.
pub(crate) struct UntilDropped<'a>(pub(crate) &'a AtomicBool);

impl Drop for UntilDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// From a port that no kernel chose.
pub(crate) fn flow(source: IpAddr, destination: IpAddr, destination_port: u16) -> Flow {
    Flow { source, source_port: 40_000, destination, destination_port }
}

pub(crate) fn unix_now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

pub(crate) fn seconds_left(element: &str) -> f64 {
    let text = element.split("expires ").nth(1).unwrap().split(' ').next().unwrap();
    let (mut seconds, mut number) = (0.0, String::new());
    for c in text.replace("ms", "%").chars() {
        if c.is_ascii_digit() {
            number.push(c);
            continue;
        }
        let factor = match c {
            'd' => 86_400.0,
            'h' => 3600.0,
            'm' => 60.0,
            's' => 1.0,
            _ => 0.001,
        };
        seconds += factor * number.parse::<f64>().unwrap();
        number.clear();
    }
    seconds
}

pub(crate) fn tcp_offset(packet: &[u8]) -> usize {
    if packet[0] >> 4 == 4 { 20 } else { 40 }
}

pub(crate) fn source(packet: &[u8]) -> IpAddr {
    if packet[0] >> 4 == 4 {
        IpAddr::from(<[u8; 4]>::try_from(&packet[12..16]).unwrap())
    } else {
        IpAddr::from(<[u8; 16]>::try_from(&packet[8..24]).unwrap())
    }
}
