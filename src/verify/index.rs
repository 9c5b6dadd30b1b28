//! From sequence numbers to the knocks that could bear them.
//!
//! For a given (key, n, port) the sequence number is fixed, so it is computed ahead, and a SYN of a stranger costs one
//! hash lookup however many keys there are. The index moves with the clock: one second in at the front and one out at the
//! back, one AES block a key. For knockknock profiles it moves with their counts: from an accepted knock to those after it.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::ops::Range;

use super::{Key, Registry};
use crate::crypto::{KnockKey, knockknock};

/// Seconds computed beyond the window, so that moving on is never late.
const LEAD: u64 = 2;

/// A knock that a sequence number could be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// Place in [`Registry::users`].
    pub user: usize,
    /// Counter.
    pub n: u64,
    /// Selector.
    pub port: u16,
}

/// All sequence numbers that are live around one moment.
pub struct Index {
    window: u64,
    keys: Vec<IndexedKey>,
    rows: VecDeque<Row>,
    /// By their places in [`Registry::users`].
    profiles: HashMap<usize, IndexedProfile>,
    live: Live,
}

/// What the index needs of a user with tokens.
struct IndexedKey {
    user: usize,
    key: KnockKey,
    ports: Vec<u16>,
}

/// What it needs of a user with a knockknock profile.
struct IndexedProfile {
    key: knockknock::Key,
    ports: Vec<u16>,
    /// The counters that are live.
    counters: Range<u64>,
}

/// One counter: the sequence number of selector 0 for each key so far, from which the others differ by the port.
struct Row {
    n: u64,
    sequences: Vec<u32>,
}

impl Index {
    /// Computes the index around `now`. Counters that were accepted are in it too, so that their replays are known for
    /// what they are.
    ///
    /// Knockknock profiles have no knocks in it until [`Index::count`] says where they are.
    pub fn new(registry: &Registry, keys: &[Key], now: u64) -> Self {
        let (mut tokens, mut profiles) = (Vec::new(), HashMap::new());
        for (place, (user, key)) in registry.users.iter().zip(keys).enumerate() {
            let ports = registry.selectors(user).collect();
            match key.clone() {
                Key::Token(key) => tokens.push(IndexedKey { user: place, key, ports }),
                Key::Knockknock { key, .. } => {
                    profiles.insert(place, IndexedProfile { key, ports, counters: 0..0 });
                }
            }
        }
        let (window, live) = (registry.window, Live::default());
        let mut index = Self { window, keys: tokens, rows: VecDeque::new(), profiles, live };
        while index.advance(now, usize::MAX) {}
        index
    }

    /// Moves a knockknock profile, by its user's place, on to the knocks from `next` on, as many as the ancestor's server looks
    /// at. As many before them are in it too, so that replays are known for what they are.
    pub fn count(&mut self, user: usize, next: u64) {
        let Some(profile) = self.profiles.get_mut(&user) else { return };
        let end = next.saturating_add(knockknock::WINDOW).min(knockknock::LAST + 1);
        let counters = next.saturating_sub(knockknock::WINDOW)..end;
        let before = std::mem::replace(&mut profile.counters, counters.clone());
        for n in before.clone().filter(|n| !counters.contains(n)) {
            profile.knocks(user, n).for_each(|(sequence, knock)| self.live.remove(sequence, knock));
        }
        for n in counters.filter(|n| !before.contains(n)) {
            profile.knocks(user, n).for_each(|(sequence, knock)| self.live.insert(sequence, knock));
        }
    }

    /// Whether the index can follow the clock to `now` by moving on; if not, the clock has jumped.
    pub fn covers(&self, now: u64) -> bool {
        // The oldest may have lost keys already: a clock that goes back to it must find them all.
        let oldest = self.rows.iter().find(|row| row.sequences.len() == self.keys.len());
        match (oldest, self.rows.back()) {
            (Some(oldest), Some(back)) => {
                oldest.n <= now.saturating_sub(self.window) && now.saturating_add(self.window) <= back.n
            }
            _ => false,
        }
    }

    /// Moves on to `now` by at most `budget` keys; `true` if there may be more to do.
    pub fn advance(&mut self, now: u64, budget: usize) -> bool {
        let (oldest, newest) = (now.saturating_sub(self.window), now.saturating_add(self.window + LEAD));
        let mut left = budget;
        while left > 0 {
            let next = match (self.rows.front(), self.rows.back()) {
                (_, None) => oldest,
                (_, Some(back)) if back.sequences.len() < self.keys.len() => {
                    left = left.saturating_sub(self.fill(left));
                    continue;
                }
                (_, Some(back)) if back.n < newest => back.n.saturating_add(1),
                (Some(front), _) if front.n < oldest => {
                    left = left.saturating_sub(self.drain(left));
                    continue;
                }
                _ => return false,
            };
            self.rows.push_back(Row { n: next, sequences: Vec::with_capacity(self.keys.len()) });
        }
        true
    }

    /// The knocks that could bear this sequence number.
    pub fn candidates(&self, sequence: u32) -> impl Iterator<Item = Candidate> {
        self.live.candidates(sequence)
    }

    /// How many knocks are live.
    pub fn len(&self) -> usize {
        self.live.len()
    }

    /// Whether no knock is live.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds up to `most` keys to the newest row; returns how many.
    fn fill(&mut self, most: usize) -> usize {
        let Some(row) = self.rows.back_mut() else {
            return 0;
        };
        let before = row.sequences.len();
        for IndexedKey { user, key, ports } in self.keys.iter().skip(before).take(most) {
            let pad = key.pad(row.n);
            row.sequences.push(pad.sequence_for(0));
            for &port in ports {
                self.live.insert(pad.sequence_for(port), Candidate { user: *user, n: row.n, port });
            }
        }
        row.sequences.len() - before
    }

    /// Takes up to `most` keys out of the oldest row, and the row with the last of them; returns how many.
    fn drain(&mut self, most: usize) -> usize {
        let Some(row) = self.rows.front_mut() else {
            return 0;
        };
        let before = row.sequences.len();
        let keep = before.saturating_sub(most);
        for (IndexedKey { user, ports, .. }, sequence) in self.keys.iter().zip(&row.sequences).skip(keep) {
            for &port in ports {
                self.live.remove(sequence ^ (u32::from(port) << 16), Candidate { user: *user, n: row.n, port });
            }
        }
        row.sequences.truncate(keep);
        if keep == 0 {
            self.rows.pop_front();
        }
        before - keep
    }
}

impl IndexedProfile {
    /// The knocks of a counter, with their sequence numbers.
    fn knocks(&self, user: usize, n: u64) -> impl Iterator<Item = (u32, Candidate)> {
        let counter = u32::try_from(n).unwrap_or(u32::MAX);
        self.ports.iter().map(move |&port| (self.key.seal(counter, port).sequence, Candidate { user, n, port }))
    }
}

/// Parts of [`Live`]. A hash map that entries come into and go from is at times put in order as a whole: 65 ms for a
/// million entries. Parts are so one by one.
const PARTS: u16 = 1024;

/// The knock behind each sequence number, in parts by the number's low bits. With a million knocks about a hundred share
/// theirs with another: those that came later are in `more`.
struct Live {
    first: Vec<HashMap<u32, Candidate>>,
    more: HashMap<u32, Vec<Candidate>>,
}

impl Default for Live {
    fn default() -> Self {
        Self { first: (0..PARTS).map(|_| HashMap::new()).collect(), more: HashMap::new() }
    }
}

impl Live {
    fn candidates(&self, sequence: u32) -> impl Iterator<Item = Candidate> {
        let first = self.first.get(part(sequence)).and_then(|part| part.get(&sequence));
        let more = first.and_then(|_| self.more.get(&sequence));
        first.into_iter().chain(more.into_iter().flatten()).copied()
    }

    fn len(&self) -> usize {
        self.first.iter().map(HashMap::len).sum::<usize>() + self.more.values().map(Vec::len).sum::<usize>()
    }

    fn insert(&mut self, sequence: u32, candidate: Candidate) {
        let Some(first) = self.first.get_mut(part(sequence)) else { return };
        match first.entry(sequence) {
            Entry::Vacant(vacant) => {
                vacant.insert(candidate);
            }
            Entry::Occupied(_) => self.more.entry(sequence).or_default().push(candidate),
        }
    }

    fn remove(&mut self, sequence: u32, candidate: Candidate) {
        let Some(first) = self.first.get_mut(part(sequence)) else { return };
        let is_first = first.get(&sequence) == Some(&candidate);
        let Some(others) = self.more.get_mut(&sequence) else {
            if is_first {
                first.remove(&sequence);
            }
            return;
        };
        if is_first {
            if let Some(next) = others.pop() {
                first.insert(sequence, next);
            }
        } else {
            others.retain(|other| *other != candidate);
        }
        if others.is_empty() {
            self.more.remove(&sequence);
        }
    }
}

/// Which part a sequence number is in.
fn part(sequence: u32) -> usize {
    let [low, high, ..] = sequence.to_le_bytes();
    usize::from(u16::from_le_bytes([low, high]) % PARTS)
}

#[cfg(test)]
mod tests {
    use super::{Candidate, Live};

    #[test]
    fn knocks_that_share_a_sequence_number_come_and_go_one_by_one() {
        let knock = |n| Candidate { user: 0, n, port: 22 };
        let mut live = Live::default();
        for n in 1..=3 {
            live.insert(7, knock(n));
        }
        let all = |live: &Live| {
            let mut all: Vec<u64> = live.candidates(7).map(|knock| knock.n).collect();
            all.sort_unstable();
            all
        };
        live.remove(7, knock(1));
        assert_eq!(all(&live), [2, 3]);
        live.remove(7, knock(1));
        assert_eq!(all(&live), [2, 3], "what is gone is not removed twice");
        live.remove(7, knock(2));
        assert_eq!(all(&live), [3]);
        live.remove(7, knock(3));
        assert_eq!((live.len(), live.more.len()), (0, 0));
    }
}
