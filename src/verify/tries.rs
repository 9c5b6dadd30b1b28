//! Wrong tags: three a counter, and a narrower window while there are many (docs/protocol.md section 3).

use std::collections::{HashMap, VecDeque};

use crate::crypto::PublicKey;

/// Wrong tags after which a counter is withdrawn: `m` of the protocol's bound.
const TRIES: u8 = 3;

/// More wrong tags than this within [`PERIOD`] narrow the window.
const CALM: usize = 20;

/// Seconds.
const PERIOD: u64 = 60;

/// Bounded by the index: only a counter that is live can get a wrong tag.
#[derive(Default)]
pub(super) struct Tries {
    wrong: HashMap<(PublicKey, u64), u8>,
    /// Times of the last `CALM + 1` wrong tags.
    recent: VecDeque<u64>,
}

impl Tries {
    /// Counts one SYN that bore wrong tags for these counters.
    pub(super) fn count(&mut self, counters: &[(PublicKey, u64)], now: u64) {
        for counter in counters {
            let tries = self.wrong.entry(*counter).or_default();
            *tries = tries.saturating_add(1);
        }
        self.recent.push_back(now);
        if self.recent.len() > CALM + 1 {
            self.recent.pop_front();
        }
    }

    pub(super) fn are_exhausted(&self, client: &PublicKey, n: u64) -> bool {
        self.wrong.get(&(*client, n)).is_some_and(|&tries| tries >= TRIES)
    }

    pub(super) fn narrow_the_window(&self, now: u64) -> bool {
        self.recent.len() > CALM && self.recent.front().is_some_and(|&first| now.abs_diff(first) < PERIOD)
    }

    pub(super) fn forget_before(&mut self, n: u64) {
        self.wrong.retain(|(_, counter), _| *counter >= n);
    }
}
