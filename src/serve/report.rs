//! What the daemon tells of itself, in postcard's encoding.

use std::fs::File;
use std::net::IpAddr;
use std::os::unix::fs::FileExt;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::nft::Door;
use crate::service::{Name, Port};
use crate::verify::explain::Record;
use crate::verify::{Floor, Reason};

/// Bytes that are told at most.
pub const ROOM: usize = 4 << 20;

/// How the daemon is. Times are seconds.
#[derive(Serialize, Deserialize)]
pub struct DaemonPart {
    /// Since the daemon was ready.
    pub uptime: u64,
    /// How many may knock.
    pub users: usize,
    /// For how many services.
    pub services: usize,
    /// The table.
    pub table: Table,
    /// The queue, as the kernel has it; `None` if the kernel does not tell.
    pub queue: Option<Queue>,
    /// Unix time of the last reload, and whether the configuration was taken.
    pub reloaded: Option<(u64, bool)>,
    /// A configuration was refused because the disk does not answer.
    pub waits_for_disk: bool,
}

/// The state of the table.
#[derive(Serialize, Deserialize)]
pub struct Table {
    /// The daemon loads it, not the host's nftables.conf.
    pub is_managed: bool,
    /// It is what it should be, as far as the daemon has heard.
    pub is_right: bool,
    /// The kernel lets nobody else change or flush it.
    pub is_owned: bool,
    /// Seconds until it is taken away unless somebody confirms it.
    pub trial: Option<u64>,
}

/// A line of `/proc/net/netfilter/nfnetlink_queue`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Queue {
    /// Its number.
    pub number: u16,
    /// Packets that wait for the gate.
    pub waiting: u64,
    /// Packets that the kernel dropped because too many waited.
    pub dropped_full: u64,
    /// Packets that the kernel dropped because the gate's socket had no room.
    pub dropped_unsent: u64,
}

/// What there is to tell of knocks. Times are Unix seconds.
#[derive(Default, Serialize, Deserialize)]
pub struct KnocksPart {
    /// Packets by their end, in the order of [`Reason::ALL`].
    pub packets: Vec<u64>,
    /// Who has knocked.
    pub users: Vec<(Name, Seen)>,
    /// How many knocks the index expects.
    pub expected: usize,
    /// Those who have so many wrong tags that only clocks within a few seconds count.
    pub narrowed: Vec<Name>,
    /// The counters' way to the disk.
    pub store: StoreHealth,
    /// The floor that no token up to is taken.
    pub floor: Floor,
    /// Times that the clock has jumped.
    pub jumps: u64,
    /// When it did last, and by how many seconds: forward, or back where it is less than none.
    pub last_jump: Option<(u64, i64)>,
    /// More was to be told than there is room for.
    pub is_cut: bool,
}

impl KnocksPart {
    /// How many packets ended how.
    pub fn counts(&self) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL.into_iter().zip(self.packets.iter().copied().chain(std::iter::repeat(0)))
    }
}

/// The last that came of a user's knocks.
#[derive(Clone, Default, Serialize, Deserialize)]
pub struct Seen {
    /// The last knock that opened something: when, from where, for which service.
    pub granted: Option<(u64, IpAddr, Name)>,
    /// The last that did not: when, from where, why.
    pub refused: Option<(u64, Option<IpAddr>, Reason)>,
}

/// How counters get to the disk. Times are Unix seconds.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
pub struct StoreHealth {
    /// When some were last written.
    pub written: Option<u64>,
    /// Since when they cannot be.
    pub failing: Option<u64>,
    /// Claims that wait for the disk.
    pub waiting: usize,
    /// Since when there are any.
    pub waiting_since: Option<u64>,
}

/// What there is to tell of doors.
#[derive(Serialize, Deserialize)]
pub struct DoorsPart {
    /// Packets taken from the queue.
    pub seen: u64,
    /// Those that the engine never saw, for it is slower than they come.
    pub lost: u64,
    /// Doors opened or renewed.
    pub opened: u64,
    /// Doors that could not be opened.
    pub not_opened: u64,
    /// Doors that are open by now.
    pub doors: Vec<LiveDoor>,
    /// More are open than there is room for.
    pub is_cut: bool,
}

/// All of it.
#[derive(Serialize, Deserialize)]
pub struct Status {
    /// Of itself.
    pub daemon: DaemonPart,
    /// Of knocks.
    pub knocks: KnocksPart,
    /// Of doors.
    pub doors: DoorsPart,
}

/// A door that is open.
#[derive(Serialize, Deserialize)]
pub struct LiveDoor {
    /// Who may come in.
    pub source: IpAddr,
    /// Where.
    pub port: Port,
    /// For one connection, which may have been made.
    pub once: bool,
    /// Who holds it open for longest.
    pub user: Name,
    /// For what.
    pub service: Name,
    /// Seconds that are left.
    pub seconds_left: u64,
}

/// What the engine knows of the packets that were refused last.
#[derive(Serialize, Deserialize)]
pub struct RefusedPart {
    /// The packets, the oldest first. Their bytes may hold tokens that can still be spent.
    pub records: Vec<Record>,
    /// The last accepted counters.
    pub accepted: Vec<(Name, u64)>,
    /// The floor that no token up to was taken.
    pub floor: Floor,
    /// Who has knocked.
    pub users: Vec<(Name, Seen)>,
    /// There was no room for all of it.
    pub is_cut: bool,
}

/// What the engine knows of those who were revoked.
#[derive(Default, Serialize, Deserialize)]
pub struct RevokedPart {
    /// Doors that they held, now or in the last week, and that nobody else holds open.
    pub doors: Vec<Door>,
    /// The guarded ports.
    pub guarded: Vec<Port>,
    /// Networks that the gate lets in, door or not.
    pub trusted: Vec<IpNet>,
    /// There was no room for all of it.
    pub is_cut: bool,
}

/// A part that can be made shorter.
pub trait Part: Serialize {
    /// Leaves half of it out, and says so.
    fn halve(&mut self);
}

impl Part for KnocksPart {
    fn halve(&mut self) {
        self.users.truncate(self.users.len() / 2);
        self.narrowed.truncate(self.narrowed.len() / 2);
        self.is_cut = true;
    }
}

impl Part for RefusedPart {
    fn halve(&mut self) {
        self.accepted.truncate(self.accepted.len() / 2);
        self.users.truncate(self.users.len() / 2);
        self.is_cut = true;
    }
}

impl Part for Status {
    fn halve(&mut self) {
        if self.doors.doors.len() > 1024 {
            self.doors.doors.truncate(self.doors.doors.len() / 2);
            self.doors.is_cut = true;
        } else {
            self.knocks.halve();
        }
    }
}

impl Part for RevokedPart {
    fn halve(&mut self) {
        self.doors.truncate(self.doors.len() / 2);
        self.is_cut = true;
    }
}

/// A part, or what fits of it.
pub fn encode(mut part: impl Part) -> Vec<u8> {
    loop {
        let bytes = postcard::to_stdvec(&part).unwrap_or_default();
        if bytes.len() <= ROOM {
            return bytes;
        }
        part.halve();
    }
}

impl Queue {
    /// What the kernel lists now of the queue with this number.
    pub fn read(listing: &File, number: u16) -> Option<Self> {
        let mut bytes = [0; 16 << 10];
        let length = listing.read_at(&mut bytes, 0).ok()?;
        Self::of_listing(&String::from_utf8_lossy(bytes.get(..length)?), number)
    }

    /// The line of the queue with this number.
    pub fn of_listing(listing: &str, number: u16) -> Option<Self> {
        let lines = listing.lines().map(|line| line.split_whitespace().map_while(|field| field.parse().ok()));
        lines.map(Iterator::collect::<Vec<u64>>).find_map(|fields| match *fields.as_slice() {
            [queue, _, waiting, _, _, dropped_full, dropped_unsent, ..] if queue == u64::from(number) => {
                Some(Self { number, waiting, dropped_full, dropped_unsent })
            }
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{KnocksPart, Queue, Seen, encode};

    #[test]
    fn what_does_not_fit_is_cut_and_said_to_be() {
        let name = |user: usize| format!("{user}{}", "x".repeat(58)).parse().unwrap();
        for (users, is_cut) in [(3, false), (100_000, true)] {
            let users = (0..users).map(|user| (name(user), Seen::default())).collect::<Vec<_>>();
            let count = users.len();
            let bytes = encode(KnocksPart { users, ..KnocksPart::default() });
            let read: KnocksPart = postcard::from_bytes(&bytes).unwrap();
            assert_eq!(read.is_cut, is_cut);
            assert!(if is_cut { (10_000..count).contains(&read.users.len()) } else { read.users.len() == count });
        }
    }

    #[test]
    fn the_kernels_line_of_a_queue_is_understood() {
        let listing =
            " 4096    999     1 2   126     8     9       21  1\n 4097  16170     5 2   126     6     7       21  1\n";
        let queue = Queue { number: 4097, waiting: 5, dropped_full: 6, dropped_unsent: 7 };
        assert_eq!(Queue::of_listing(listing, 4097), Some(queue));
        assert_eq!(Queue::of_listing(listing, 1), None);
        assert_eq!(Queue::of_listing("4097 x\n", 4097), None);
    }
}
