//! What the engine counts and remembers of what came: for `status` and `explain`, and for nothing that
//! it decides.

use std::collections::{HashMap, HashSet, VecDeque};

use super::clock::Jump;
use super::report::{Knocks, LastGrant, LastJump, LastRefusal, RefusedPart, StoreHealth};
use crate::service::Name;
use crate::verify::explain::Record;
use crate::verify::{Floor, Grant, Reason, Refusal, Withdrawal};

/// Refused packets that are remembered: of those that had to do with a key, and of strangers' SYNs.
const REMEMBERED: usize = 256;
const STRANGERS: usize = 1024;

/// Seconds that a counter may wait for the disk before that is a trouble.
const SLOW: u64 = 10;

/// All of it, since the start. Times are Unix seconds.
#[derive(Default)]
pub struct Figures {
    packets: [u64; Reason::ALL.len()],
    /// Bounded by the registry: no other names come here, and those who left it are forgotten.
    users: HashMap<Name, Knocks>,
    store: StoreHealth,
    jumps: u64,
    last_jump: Option<LastJump>,
    refused: VecDeque<Record>,
    strangers: VecDeque<Record>,
}

impl Figures {
    /// A packet that opened nothing, with its bytes.
    pub fn refused(&mut self, refusal: &Refusal, packet: &[u8], now: u64) {
        self.count(refusal.reason);
        self.remember(refusal, packet, now);
        if let Some(user) = &refusal.user {
            self.of(user).refused = Some(LastRefusal::new(now, refusal.source, refusal.reason));
        }
    }

    /// A packet that came from elsewhere than the grant that it takes back.
    pub fn withdrawn(&mut self, withdrawal: &Withdrawal, packet: &[u8], now: u64) {
        self.count(Reason::SpentTwice);
        let (user, source) = (Some(withdrawal.user.clone()), Some(withdrawal.elsewhere));
        self.remember(&Refusal { reason: Reason::SpentTwice, user, source }, packet, now);
        self.of(&withdrawal.user).refused = Some(LastRefusal::new(now, source, Reason::SpentTwice));
    }

    /// A packet that opened a service.
    pub fn granted(&mut self, grant: &Grant, now: u64) {
        self.count(Reason::Granted);
        let (source, service) = (grant.source, grant.service.clone());
        self.of(&grant.user).granted = Some(LastGrant { at: now, source, service });
    }

    /// So many claims wait for the disk now.
    pub const fn waiting(&mut self, claims: usize, now: u64) {
        self.store.waiting = claims;
        self.store.waiting_since = match (claims, self.store.waiting_since) {
            (0, _) => None,
            (_, None) => Some(now),
            (_, since) => since,
        };
    }

    /// The disk took counters, or did not.
    pub const fn recorded(&mut self, is_durable: bool, now: u64) {
        if is_durable {
            (self.store.written, self.store.failing_since) = (Some(now), None);
        } else if self.store.failing_since.is_none() {
            self.store.failing_since = Some(now);
        }
    }

    /// The clock has jumped.
    pub(super) fn jumped(&mut self, jump: Jump, now: u64) {
        self.jumps = self.jumps.saturating_add(1);
        let seconds = |by: std::time::Duration| i64::try_from(by.as_secs()).unwrap_or(i64::MAX);
        let by = match jump {
            Jump::Forward(by) => seconds(by),
            Jump::Back(by) => -seconds(by),
        };
        self.last_jump = Some(LastJump { at: now, seconds: by });
    }

    /// Forgets all users but these.
    pub fn keep<'a>(&mut self, users: impl Iterator<Item = &'a Name>) {
        let kept: HashSet<&Name> = users.collect();
        self.users.retain(|user, _| kept.contains(user));
    }

    /// Packets by their end.
    pub fn packets(&self) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL.into_iter().zip(self.packets)
    }

    /// How counters get to the disk, which may be known not to answer, where no token up to this floor is taken.
    pub fn store(&self, floor: Floor, answers: bool, now: u64) -> StoreHealth {
        let is_slow = self.store.waiting_since.is_some_and(|since| now.saturating_sub(since) > SLOW);
        let (answers, in_doubt_until) = (answers && !is_slow, floor.shut(now).map(|shut| shut.until));
        let ok = self.store.failing_since.is_none() && answers && in_doubt_until.is_none();
        StoreHealth { ok, answers, in_doubt_until, ..self.store }
    }

    /// How often the clock has jumped, and the last jump.
    pub const fn jumps(&self) -> (u64, Option<LastJump>) {
        (self.jumps, self.last_jump)
    }

    /// What came of users' knocks, of those first who knocked last.
    pub fn knocks(&self) -> Vec<Knocks> {
        let mut knocks: Vec<Knocks> = self.users.values().cloned().collect();
        let last = |knocks: &Knocks| {
            let granted = knocks.granted.as_ref().map(|last| last.at);
            granted.max(knocks.refused.as_ref().map(|last| last.at))
        };
        knocks.sort_by(|one, other| last(other).cmp(&last(one)).then_with(|| one.user.cmp(&other.user)));
        knocks
    }

    /// The packets that were refused last, where no token up to this floor is taken.
    pub fn refused_part<'a>(&self, accepted: impl Iterator<Item = (&'a Name, u64)>, floor: Floor) -> RefusedPart {
        let mut records: Vec<Record> = self.refused.iter().chain(&self.strangers).cloned().collect();
        records.sort_by_key(|record| record.at);
        let accepted = accepted.map(|(user, n)| (user.clone(), n)).collect();
        RefusedPart { records, accepted, floor, knocks: self.knocks(), is_cut: false }
    }

    /// Nothing is allocated for a stranger's once there are as many as may be.
    fn remember(&mut self, refusal: &Refusal, packet: &[u8], now: u64) {
        let (records, most) = match refusal.reason {
            Reason::Unknown => (&mut self.strangers, STRANGERS),
            reason if reason.explanation().is_some() => (&mut self.refused, REMEMBERED),
            _ => return, // no SYN
        };
        let oldest = if records.len() < most { None } else { records.pop_front() };
        let mut bytes = oldest.map(|record| record.packet).unwrap_or_default();
        bytes.clear();
        bytes.extend(packet);
        records.push_back(Record { at: now, reason: refusal.reason, user: refusal.user.clone(), packet: bytes });
    }

    fn count(&mut self, reason: Reason) {
        if let Some(count) = self.packets.get_mut(reason as usize) {
            *count = count.saturating_add(1);
        }
    }

    fn of(&mut self, user: &Name) -> &mut Knocks {
        let none = || Knocks { user: user.clone(), granted: None, refused: None };
        self.users.entry(user.clone()).or_insert_with(none)
    }
}

#[cfg(test)]
mod tests {
    use super::{Figures, Floor, Name, Reason, Refusal};

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    #[test]
    fn each_reason_has_a_count_of_its_own() {
        let mut figures = Figures::default();
        for (place, reason) in Reason::ALL.into_iter().enumerate() {
            (0..=place).for_each(|_| figures.refused(&Refusal { reason, user: None, source: None }, &[], 1));
        }
        assert!(figures.packets().map(|(_, count)| count).eq(1..=24));
    }

    #[test]
    fn users_are_told_by_their_last_knock_and_forgotten_when_they_are_gone() {
        let mut figures = Figures::default();
        for (when, user) in [(1, "alice"), (3, "carol"), (2, "bob")] {
            figures.refused(&Refusal { reason: Reason::Replayed, user: Some(name(user)), source: None }, &[], when);
        }
        let order = |figures: &Figures| -> Vec<String> {
            figures.knocks().into_iter().map(|knocks| knocks.user.to_string()).collect()
        };
        assert_eq!(order(&figures), ["carol", "bob", "alice"]);
        figures.keep([name("bob")].iter());
        assert_eq!(order(&figures), ["bob"]);
    }

    #[test]
    fn a_flood_of_strangers_pushes_out_no_knock_and_fills_no_memory() {
        let mut figures = Figures::default();
        let refuse = |figures: &mut Figures, reason, at| {
            figures.refused(&Refusal { reason, user: None, source: None }, &[1; 126], at);
        };
        refuse(&mut figures, Reason::WrongTag, 1);
        (0..5000).for_each(|at| refuse(&mut figures, Reason::Unknown, at));
        refuse(&mut figures, Reason::NotSyn, 5000);
        let records = figures.refused_part(std::iter::empty(), Floor::default()).records;
        assert_eq!((records.len(), records[0].reason), (1 + 1024, Reason::WrongTag));
        (0..5000).for_each(|at| refuse(&mut figures, Reason::Replayed, at));
        assert_eq!(figures.refused_part(std::iter::empty(), Floor::default()).records.len(), 256 + 1024);
    }

    #[test]
    fn the_disk_fails_since_the_first_failure_until_it_takes_something() {
        let mut figures = Figures::default();
        let store = |figures: &Figures, now| figures.store(Floor::default(), true, now);
        figures.recorded(true, 1);
        figures.recorded(false, 2);
        figures.recorded(false, 3);
        let failing = store(&figures, 3);
        assert_eq!((failing.written, failing.failing_since, failing.ok), (Some(1), Some(2), false));
        figures.recorded(true, 4);
        let mended = store(&figures, 4);
        assert_eq!((mended.written, mended.failing_since, mended.ok), (Some(4), None, true));
        figures.waiting(3, 5);
        figures.waiting(4, 6);
        assert_eq!(store(&figures, 6).waiting_since, Some(5));
        assert_eq!([15, 16].map(|now| store(&figures, now).answers), [true, false], "longer than a disk may take");
        figures.waiting(0, 7);
        assert_eq!(store(&figures, 7).waiting_since, None);
        assert!(!figures.store(Floor::new(7), true, 7).ok && !figures.store(Floor::new(7), false, 8).ok);
    }
}
