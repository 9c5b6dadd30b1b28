//! Counters of tokens (docs/protocol.md section 2).

use std::collections::BTreeSet;

use super::{Issued, IssuedError, IssuedFile, What};

/// Counters that are kept one by one; beyond, the smallest goes into the floor. Only so many knocks sent while the clock
/// was wrong could lock a key out.
const KEPT: usize = 4096;

/// The counters that this key has issued for one server: the rule, without files.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// All counters up to here count as issued.
    floor: u64,
    issued: BTreeSet<u64>,
}

impl Counters {
    /// The least counter that is not before `now`, above all that were issued up to `now + window`, and not issued.
    pub fn next(&self, now: u64, window: u64) -> Option<u64> {
        let end = now.checked_add(window)?;
        let last = self.issued.range(..=end).next_back().copied();
        let mut n = now.max(self.floor.checked_add(1)?).max(last.map_or(Some(0), |last| last.checked_add(1))?);
        while self.issued.contains(&n) {
            n = n.checked_add(1)?;
        }
        Some(n)
    }

    /// Notes that a counter is used.
    pub fn record(&mut self, n: u64) {
        self.issued.insert(n);
        while self.issued.len() > KEPT {
            if let Some(smallest) = self.issued.pop_first() {
                self.floor = self.floor.max(smallest);
            }
        }
    }

    /// Whether a counter was issued that a server would take only later than `end`.
    pub fn has_beyond(&self, end: u64) -> bool {
        self.issued.last().is_some_and(|&last| last > end)
    }
}

impl Issued for Counters {
    const WHAT: What = What::Counters;
    const TITLE: &'static str = "counters that were used with one server";

    fn parse(first: &str, rest: &[&str]) -> Option<Self> {
        let floor = first.strip_prefix("floor ")?.parse().ok()?;
        Some(Self { floor, issued: rest.iter().map(|line| line.parse().ok()).collect::<Option<_>>()? })
    }

    fn lines(&self) -> (String, impl Iterator<Item = u64>) {
        (format!("floor {}", self.floor), self.issued.iter().copied())
    }
}

impl IssuedFile<Counters> {
    /// Issues a counter; it is on disk when this returns.
    ///
    /// # Errors
    /// [`IssuedError`]; then no counter may be used.
    pub fn issue(&mut self, now: u64, window: u64) -> Result<u64, IssuedError> {
        let issued = &mut self.contents.issued;
        let floor = issued.floor;
        let n = issued.next(now, window).filter(|_| floor <= now.saturating_add(window));
        let n = n.ok_or_else(|| IssuedError::NoCounter { path: self.path.clone(), floor })?;
        issued.record(n);
        self.write()?;
        Ok(n)
    }

    /// See [`Counters::has_beyond`].
    pub fn has_beyond(&self, end: u64) -> bool {
        self.contents.issued.has_beyond(end)
    }
}

#[cfg(test)]
mod tests {
    use super::Counters;
    use crate::client::issued::Contents;
    use proptest::prelude::{any, proptest};
    use std::collections::BTreeSet;

    const NOW: u64 = 1_790_000_000;

    #[test]
    fn counters_start_at_the_clock_and_never_fall_behind_an_issued_one() {
        let mut issued = Counters::default();
        for (now, expected) in
            [(NOW, NOW), (NOW, NOW + 1), (NOW + 1, NOW + 2), (NOW + 10, NOW + 10), (NOW + 5, NOW + 11)]
        {
            let n = issued.next(now, 60).unwrap();
            assert_eq!(n, expected);
            issued.record(n);
        }
    }

    #[test]
    fn a_clock_that_was_two_hours_ahead_locks_nobody_out() {
        let mut issued = Counters::default();
        issued.record(issued.next(NOW + 7200, 60).unwrap());
        assert_eq!(issued.next(NOW, 60), Some(NOW));
        assert!(issued.has_beyond(NOW + 60), "and it is known that one lies ahead");
        assert_eq!(issued.next(NOW + 7200, 60), Some(NOW + 7201));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut issued = Counters::default();
        for n in [NOW, NOW + 1, u64::MAX] {
            issued.record(n);
        }
        for machine in [None, Some("ab12".to_owned())] {
            let contents = Contents { issued: issued.clone(), machine };
            assert_eq!(Contents::parse(&contents.to_text()), Some(contents));
        }
        for damaged in [
            "",
            "\n",
            "floor x\n",
            "12\n",
            "floor 1\n1x\n",
            "floor 1\n-1\n",
            "floor 1\n12",
            "12\nfloor 1\n",
            "machine a\nfloor 1\n",
            "floor 1\nmachine a",
            "floor 1\nmachine a\nmachine a\n",
            "floor 1\n12\nmachine a\n",
        ] {
            assert_eq!(Contents::<Counters>::parse(damaged), None, "{damaged:?}");
        }
    }

    proptest! {
        #[test]
        fn no_clock_makes_a_counter_repeat_or_locks_a_key_out(clocks in proptest::collection::vec(any::<u64>(), 1..400)) {
            let mut issued = Counters::default();
            let mut seen = BTreeSet::new();
            for now in clocks {
                if let Some(n) = issued.next(now, 60) {
                    assert!(n >= now && seen.insert(n));
                    issued.record(n);
                }
            }
            let n = issued.next(NOW, 60).unwrap();
            assert!((NOW..=NOW + 61).contains(&n), "{n}");
        }
    }
}
