//! What the engine counts and remembers of what came: for `status` and `explain`, and for nothing that
//! it decides.

use std::collections::{HashMap, HashSet, VecDeque};

use super::clock::Jump;
use super::report::{KnocksPart, RefusedPart, Seen, StoreHealth};
use crate::service::Name;
use crate::verify::explain::Record;
use crate::verify::{Floor, Grant, Reason, Refusal, Withdrawal};

/// Refused packets that are remembered: of those that had to do with a key, and of strangers' SYNs.
const REMEMBERED: usize = 256;
const STRANGERS: usize = 1024;

/// All of it, since the start. Times are Unix seconds.
#[derive(Default)]
pub struct Figures {
    packets: [u64; Reason::ALL.len()],
    /// Bounded by the registry: no other names come here, and those who left it are forgotten.
    users: HashMap<Name, Seen>,
    store: StoreHealth,
    jumps: u64,
    last_jump: Option<(u64, i64)>,
    refused: VecDeque<Record>,
    strangers: VecDeque<Record>,
}

impl Figures {
    /// A packet that opened nothing, with its bytes.
    pub fn refused(&mut self, refusal: &Refusal, packet: &[u8], now: u64) {
        self.count(refusal.reason);
        self.remember(refusal, packet, now);
        if let Some(user) = &refusal.user {
            self.seen(user).refused = Some((now, refusal.source, refusal.reason));
        }
    }

    /// A packet that came from elsewhere than the grant that it takes back.
    pub fn withdrawn(&mut self, withdrawal: &Withdrawal, packet: &[u8], now: u64) {
        self.count(Reason::SpentTwice);
        let (user, source) = (Some(withdrawal.user.clone()), Some(withdrawal.elsewhere));
        self.remember(&Refusal { reason: Reason::SpentTwice, user, source }, packet, now);
        self.seen(&withdrawal.user).refused = Some((now, Some(withdrawal.elsewhere), Reason::SpentTwice));
    }

    /// A packet that opened a service.
    pub fn granted(&mut self, grant: &Grant, now: u64) {
        self.count(Reason::Granted);
        self.seen(&grant.user).granted = Some((now, grant.source, grant.service.clone()));
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
            (self.store.written, self.store.failing) = (Some(now), None);
        } else if self.store.failing.is_none() {
            self.store.failing = Some(now);
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
        self.last_jump = Some((now, by));
    }

    /// Forgets all users but these.
    pub fn keep<'a>(&mut self, users: impl Iterator<Item = &'a Name>) {
        let kept: HashSet<&Name> = users.collect();
        self.users.retain(|user, _| kept.contains(user));
    }

    /// What there is to tell, where no token up to this floor is taken.
    pub fn part(&self, expected: usize, narrowed: Vec<Name>, floor: Floor) -> KnocksPart {
        KnocksPart {
            packets: self.packets.to_vec(),
            users: self.seen_users(),
            expected,
            narrowed,
            store: self.store,
            floor,
            jumps: self.jumps,
            last_jump: self.last_jump,
            is_cut: false,
        }
    }

    /// Those first who knocked last.
    fn seen_users(&self) -> Vec<(Name, Seen)> {
        let mut users: Vec<(Name, Seen)> = self.users.iter().map(|(user, seen)| (user.clone(), seen.clone())).collect();
        let last = |seen: &Seen| {
            let granted = seen.granted.as_ref().map(|(when, ..)| *when);
            granted.max(seen.refused.map(|(when, ..)| when))
        };
        users.sort_by(|(a, one), (b, other)| last(other).cmp(&last(one)).then_with(|| a.cmp(b)));
        users
    }

    /// The packets that were refused last, where no token up to this floor is taken.
    pub fn refused_part<'a>(&self, accepted: impl Iterator<Item = (&'a Name, u64)>, floor: Floor) -> RefusedPart {
        let mut records: Vec<Record> = self.refused.iter().chain(&self.strangers).cloned().collect();
        records.sort_by_key(|record| record.at);
        let accepted = accepted.map(|(user, n)| (user.clone(), n)).collect();
        RefusedPart { records, accepted, floor, users: self.seen_users(), is_cut: false }
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

    fn seen(&mut self, user: &Name) -> &mut Seen {
        self.users.entry(user.clone()).or_default()
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
        let expected: Vec<u64> = (1..=24).collect();
        assert_eq!(figures.part(0, Vec::new(), Floor::default()).packets, expected);
    }

    #[test]
    fn users_are_told_by_their_last_knock_and_forgotten_when_they_are_gone() {
        let mut figures = Figures::default();
        for (when, user) in [(1, "alice"), (3, "carol"), (2, "bob")] {
            figures.refused(&Refusal { reason: Reason::Replayed, user: Some(name(user)), source: None }, &[], when);
        }
        let order = |figures: &Figures| {
            figures
                .part(0, Vec::new(), Floor::default())
                .users
                .into_iter()
                .map(|(user, _)| user.to_string())
                .collect::<Vec<_>>()
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
        figures.recorded(true, 1);
        figures.recorded(false, 2);
        figures.recorded(false, 3);
        assert_eq!((figures.store.written, figures.store.failing), (Some(1), Some(2)));
        figures.recorded(true, 4);
        assert_eq!((figures.store.written, figures.store.failing), (Some(4), None));
        figures.waiting(3, 5);
        figures.waiting(4, 6);
        assert_eq!(figures.store.waiting_since, Some(5));
        figures.waiting(0, 7);
        assert_eq!(figures.store.waiting_since, None);
    }
}
