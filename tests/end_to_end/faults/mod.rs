//! Nothing is lost: each fault of docs/faults.md, done to real processes, files and tables.

mod counters;
mod crash;
mod disk;
mod doubt;
mod ends;
mod knock;
mod log;
mod power;
mod reload;
mod restart;
mod start;
mod stopped;
mod table;

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use knockq::crypto::{Binding, KnockKey, KnockPorts};
use rustix::net::{SendFlags, sendto};

use crate::lab::{Daemon, Family, Lab};
use crate::recorded::persona;
use crate::{flow, unix_now};

/// Seconds of the longest window: so many knocks either way of now are there to be sent at once.
const WINDOW: u64 = 600;

/// Knocks of alice's, made as fast as she likes: each has the counter after the one before.
pub(crate) struct Knocks {
    key: KnockKey,
    ports: KnockPorts,
    next: u64,
}

impl Knocks {
    /// With the lowest counter that the server takes for some time to come.
    pub(crate) fn new(lab: &Lab) -> Self {
        let ports = KnockPorts::new([20_000..=21_023]).unwrap();
        Self { key: lab.alice_key(), ports, next: unix_now() - WINDOW + 120 }
    }

    /// The same SYN from each of these sources.
    pub(crate) fn next(&mut self, family: Family, binding: Binding, sources: &[IpAddr]) -> Vec<Vec<u8>> {
        let (n, token) = (self.next, self.key.seal(self.next, 22, binding));
        self.next += 1;
        let port = self.key.pad(n).knock_port(&self.ports);
        let syn = |source: &IpAddr| {
            let flow = flow(*source, family.server(), port);
            persona(family == Family::V4).syn(&flow, token.sequence, token.tsval).unwrap()
        };
        sources.iter().map(syn).collect()
    }

    /// One from alice's own address, bound to it.
    fn bound(&mut self, family: Family) -> Vec<u8> {
        self.next(family, Binding::Bound(family.alice()), &[family.alice()]).remove(0)
    }
}

/// Sends it, or loses it where the interface's queue is full.
fn send(socket: &OwnedFd, family: Family, packet: &[u8]) {
    match sendto(socket, packet, SendFlags::empty(), &SocketAddr::new(family.server(), 0)) {
        Ok(_) | Err(rustix::io::Errno::NOBUFS) => {}
        Err(error) => panic!("{error}: {packet:02x?}"),
    }
}

/// A file system of two megabytes, with the counter store on it.
struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    fn with_the_store_of(lab: &Lab) -> Self {
        let state = lab.directory.path.join("state");
        let path = lab.directory.path.join("small");
        fs::create_dir(&path).unwrap();
        lab.server.sh(&format!("mount -t tmpfs -o size=2m,mode=700 none {}", path.display()));
        lab.make_store(&path.join("counters.redb"));
        let text = fs::read_to_string(lab.config()).unwrap();
        fs::write(lab.config(), text.replace(state.to_str().unwrap(), path.to_str().unwrap())).unwrap();
        Self { path }
    }

    fn fill(&self, lab: &Lab) {
        lab.server.sh(&format!("dd if=/dev/zero of={}/filler bs=4k 2>/dev/null || true", self.path.display()));
    }

    fn make_room(&self) {
        fs::remove_file(self.path.join("filler")).unwrap();
    }

    fn remount(&self, lab: &Lab, how: &str) {
        lab.server.sh(&format!("mount -o remount,{how} {}", self.path.display()));
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

fn count(daemon: &Daemon, text: &str) -> usize {
    daemon.log().matches(text).count()
}
