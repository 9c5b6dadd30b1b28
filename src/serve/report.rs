//! What the daemon tells of itself, in postcard's encoding.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::net::IpAddr;
use std::os::unix::fs::FileExt;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::nft::Door;
use crate::service::{Name, Port};
pub use crate::verify::Shut;
use crate::verify::explain::Record;
use crate::verify::{Floor, Reason};

/// Bytes that are told at most.
pub const ROOM: usize = 4 << 20;

/// How the daemon is, as `knockq status --json` prints it. Times are Unix seconds, numbers since the daemon's start.
#[derive(Serialize, Deserialize)]
pub struct Status {
    /// The daemon's. The first field, so that a client of another version can read it, and nothing else.
    pub version: String,
    /// Since the daemon was ready.
    pub uptime_seconds: u64,
    /// How many may knock.
    pub users: usize,
    /// For how many services.
    pub services: usize,
    /// The last reload.
    pub reloaded: Option<Reloaded>,
    /// The table.
    pub table: Table,
    /// What came.
    pub syns: Syns,
    /// What became of it.
    pub packets: BTreeMap<Reason, u64>,
    /// What was opened.
    pub doors: Doors,
    /// Who has knocked, those first who did last.
    pub knocks: Vec<Knocks>,
    /// The counters' way to the disk.
    pub store: StoreHealth,
    /// The server's clock, and what is told of clients'.
    pub clock: ClockHealth,
    /// More was to be told than there is room for.
    pub is_cut: bool,
}

/// A reload of the configuration.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct Reloaded {
    /// When.
    pub at: u64,
    /// Whether it was put in force.
    pub taken: bool,
}

/// The state of the table.
#[derive(Serialize, Deserialize)]
pub struct Table {
    /// Who loads it.
    pub mode: TableMode,
    /// It is what it should be, as far as the daemon has heard.
    pub right: bool,
    /// The kernel lets nobody else change or flush it.
    pub owned: bool,
    /// Until it is taken away unless somebody confirms it.
    pub trial_seconds_left: Option<u64>,
}

/// Who loads the table.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TableMode {
    /// The daemon.
    Managed,
    /// The host's nftables.conf.
    External,
}

/// SYNs to the ports that are watched.
#[derive(Serialize, Deserialize)]
pub struct Syns {
    /// Taken from the queue.
    pub seen: u64,
    /// The queue's number, and what the kernel tells of it, if it does.
    pub queue: Option<u16>,
    /// Those that wait there for the gate.
    pub waiting: Option<u64>,
    /// Those that the kernel dropped: too many waited, or the gate's socket had no room.
    pub dropped_by_kernel: Option<u64>,
    /// Those that the engine never saw, for it is slower than they come.
    pub dropped_by_relay: u64,
}

/// A line of `/proc/net/netfilter/nfnetlink_queue`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Queue {
    /// Packets that wait for the gate.
    pub waiting: u64,
    /// Packets that the kernel dropped because too many waited, or because the gate's socket had no room.
    pub dropped: u64,
}

/// What was opened.
#[derive(Serialize, Deserialize)]
pub struct Doors {
    /// Doors opened or renewed.
    pub opened: u64,
    /// Doors that could not be opened.
    pub not_opened: u64,
    /// Knocks beyond their user's share of `grants_per_minute`.
    pub over_rate: u64,
    /// Doors that are open by now.
    pub open: Vec<LiveDoor>,
}

/// The last that came of a user's knocks.
#[derive(Clone, Serialize, Deserialize)]
pub struct Knocks {
    /// Whose.
    pub user: Name,
    /// The last knock that opened something.
    pub granted: Option<LastGrant>,
    /// The last that did not.
    pub refused: Option<LastRefusal>,
}

/// The last knock of a user's that opened something.
#[derive(Clone, Serialize, Deserialize)]
pub struct LastGrant {
    /// When.
    pub at: u64,
    /// From where.
    pub source: IpAddr,
    /// What for.
    pub service: Name,
}

/// The last knock of a user's that opened nothing.
#[derive(Clone, Serialize, Deserialize)]
pub struct LastRefusal {
    /// When.
    pub at: u64,
    /// From where, if that could be read.
    pub source: Option<IpAddr>,
    /// Why.
    pub reason: Reason,
    /// What can be done about it.
    pub hint: Option<Cow<'static, str>>,
}

impl LastRefusal {
    /// Of a packet that ended so.
    pub fn new(at: u64, source: Option<IpAddr>, reason: Reason) -> Self {
        Self { at, source, reason, hint: reason.explanation().map(Cow::Borrowed) }
    }
}

/// How counters get to the disk.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
pub struct StoreHealth {
    /// Counters can be written, and knocks are accepted.
    pub ok: bool,
    /// The disk answers.
    pub answers: bool,
    /// No knocks are accepted until then: the store is in doubt.
    pub in_doubt_until: Option<u64>,
    /// When some were last written.
    pub written: Option<u64>,
    /// Since when they cannot be.
    pub failing_since: Option<u64>,
    /// Claims that wait for the disk.
    pub waiting: usize,
    /// Since when there are any.
    pub waiting_since: Option<u64>,
}

/// What clocks do.
#[derive(Serialize, Deserialize)]
pub struct ClockHealth {
    /// The kernel calls this machine's clock synchronized.
    pub synchronized: bool,
    /// Times that it has jumped.
    pub jumps: u64,
    /// When it did last.
    pub last_jump: Option<LastJump>,
    /// Those who have so many wrong tags that only clocks within a few seconds count.
    pub narrowed: Vec<Name>,
}

/// A jump of the clock.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct LastJump {
    /// When.
    pub at: u64,
    /// Forward, or back where it is less than none.
    pub seconds: i64,
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
    pub knocks: Vec<Knocks>,
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

impl Part for RefusedPart {
    fn halve(&mut self) {
        self.accepted.truncate(self.accepted.len() / 2);
        self.knocks.truncate(self.knocks.len() / 2);
        self.is_cut = true;
    }
}

impl Part for Status {
    fn halve(&mut self) {
        if self.doors.open.len() > 1024 {
            self.doors.open.truncate(self.doors.open.len() / 2);
        } else {
            self.knocks.truncate(self.knocks.len() / 2);
            self.clock.narrowed.truncate(self.clock.narrowed.len() / 2);
        }
        self.is_cut = true;
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
                Some(Self { waiting, dropped: dropped_full.saturating_add(dropped_unsent) })
            }
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Floor, Knocks, Queue, RefusedPart, encode};

    #[test]
    fn what_does_not_fit_is_cut_and_said_to_be() {
        let user = |user: usize| format!("{user}{}", "x".repeat(58)).parse().unwrap();
        for (users, is_cut) in [(3, false), (100_000, true)] {
            let knocks = (0..users).map(|number| Knocks { user: user(number), granted: None, refused: None });
            let (records, accepted, floor) = (Vec::new(), Vec::new(), Floor::default());
            let part = RefusedPart { records, accepted, floor, knocks: knocks.collect(), is_cut: false };
            let read: RefusedPart = postcard::from_bytes(&encode(part)).unwrap();
            assert_eq!(read.is_cut, is_cut);
            assert!(if is_cut { (10_000..users).contains(&read.knocks.len()) } else { read.knocks.len() == users });
        }
    }

    #[test]
    fn the_kernels_line_of_a_queue_is_understood() {
        let listing =
            " 4096    999     1 2   126     8     9       21  1\n 4097  16170     5 2   126     6     7       21  1\n";
        let queue = Queue { waiting: 5, dropped: 13 };
        assert_eq!(Queue::of_listing(listing, 4097), Some(queue));
        assert_eq!(Queue::of_listing(listing, 1), None);
        assert_eq!(Queue::of_listing("4097 x\n", 4097), None);
    }
}
