//! Wrong tags: three a counter, and a narrower window for a key while it has many (docs/protocol.md section 3).

use std::collections::{HashMap, VecDeque};

use crate::crypto::PublicKey;

/// Wrong tags after which a counter is withdrawn: `m` of the protocol's bound.
const TRIES: u8 = 3;

/// More wrong tags than this within [`PERIOD`] narrow the window of their key.
const CALM: usize = 20;

/// Seconds.
const PERIOD: u64 = 60;

/// Bounded by the index: only a counter that is live can get a wrong tag, and three of them.
#[derive(Default)]
pub(super) struct Tries {
    wrong: HashMap<(PublicKey, u64), u8>,
    /// Times of the last `CALM + 1` wrong tags of each key that had some lately.
    recent: HashMap<PublicKey, VecDeque<u64>>,
}

impl Tries {
    /// Counts a wrong tag for this counter.
    pub(super) fn count(&mut self, client: &PublicKey, n: u64, now: u64) {
        let tries = self.wrong.entry((*client, n)).or_default();
        *tries = tries.saturating_add(1);
        let recent = self.recent.entry(*client).or_default();
        recent.push_back(now);
        if recent.len() > CALM + 1 {
            recent.pop_front();
        }
    }

    pub(super) fn are_exhausted(&self, client: &PublicKey, n: u64) -> bool {
        self.wrong.get(&(*client, n)).is_some_and(|&tries| tries >= TRIES)
    }

    /// Whether this key had so many wrong tags that only clocks within a few seconds count.
    pub(super) fn narrow_the_window(&self, client: &PublicKey, now: u64) -> bool {
        self.recent.get(client).is_some_and(|recent| is_many(recent, now))
    }

    /// The keys of which that holds.
    pub(super) fn narrowed(&self, now: u64) -> impl Iterator<Item = &PublicKey> {
        self.recent.iter().filter(move |(_, recent)| is_many(recent, now)).map(|(client, _)| client)
    }

    /// Forgets tries of counters before this one, and what is too long ago to narrow anything.
    pub(super) fn forget_before(&mut self, n: u64, now: u64) {
        self.wrong.retain(|(_, counter), _| *counter >= n);
        self.recent.retain(|_, recent| recent.back().is_some_and(|&last| now.abs_diff(last) < PERIOD));
    }
}

fn is_many(recent: &VecDeque<u64>, now: u64) -> bool {
    recent.len() > CALM && recent.front().is_some_and(|&first| now.abs_diff(first) < PERIOD)
}
