//! How fast doors may open, whoever asks: a bucket of one minute's worth, which fills again in a minute.

use std::time::{Duration, Instant};

const MINUTE: Duration = Duration::from_secs(60);

/// The doors that may be opened now.
///
/// What is in the bucket is kept as the moment at which it will be full: each door moves that moment on by the time that
/// one door takes to fill in, and it never lies more than a minute ahead.
pub struct Rate {
    /// Time for one door.
    each: Duration,
    full_at: Instant,
    refused: u64,
}

impl Rate {
    /// A full bucket of so many doors a minute, at least one.
    pub fn new(per_minute: u32, now: Instant) -> Self {
        Self { each: MINUTE / per_minute.max(1), full_at: now, refused: 0 }
    }

    /// Another number of doors a minute, from now on: what is spent stays spent.
    pub fn change(&mut self, per_minute: u32) {
        self.each = MINUTE / per_minute.max(1);
    }

    /// Takes a door out; `false` if there is none, which is counted.
    pub fn take(&mut self, now: Instant) -> bool {
        let full_at = self.full_at.max(now) + self.each;
        let is_there = full_at.saturating_duration_since(now) <= MINUTE;
        if is_there {
            self.full_at = full_at;
        } else {
            self.refused = self.refused.saturating_add(1);
        }
        is_there
    }

    /// How many were refused since the last call.
    pub const fn take_refused(&mut self) -> u64 {
        std::mem::replace(&mut self.refused, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::{Duration, Instant, MINUTE, Rate};

    fn taken(rate: &mut Rate, now: Instant) -> u32 {
        (0..100_000).take_while(|_| rate.take(now)).count().try_into().unwrap()
    }

    #[test]
    fn one_minutes_worth_goes_at_once_and_no_more() {
        for per_minute in [1, 7, 600, 60_000] {
            let now = Instant::now();
            let mut rate = Rate::new(per_minute, now);
            assert_eq!(taken(&mut rate, now), per_minute);
            assert!(!rate.take(now));
        }
    }

    #[test]
    fn it_fills_in_a_minute_and_not_beyond() {
        let now = Instant::now();
        let mut rate = Rate::new(600, now);
        taken(&mut rate, now);
        assert!(!rate.take(now + Duration::from_millis(99)));
        assert!(rate.take(now + Duration::from_millis(100)));
        assert_eq!(taken(&mut rate, now + MINUTE / 2), 299, "half of it, but for the one above");
        let next_year = now + 365 * 24 * 60 * MINUTE;
        assert_eq!(taken(&mut rate, next_year), 600);
    }

    #[test]
    fn asking_all_the_time_gets_no_more_than_the_rate() {
        let start = Instant::now();
        let mut rate = Rate::new(60, start);
        let asked = 600_000;
        let got = (0..asked).filter(|millis| rate.take(start + Duration::from_millis(*millis))).count();
        assert_eq!(got, 60 + 599, "the first minute's worth, and one a second for ten minutes");
        assert_eq!(rate.take_refused(), asked - 659);
        assert_eq!(rate.take_refused(), 0);
    }

    #[test]
    fn a_clock_that_goes_back_gives_nothing_twice() {
        let now = Instant::now() + MINUTE;
        let mut rate = Rate::new(10, now);
        assert_eq!(taken(&mut rate, now), 10);
        assert_eq!(taken(&mut rate, now - MINUTE), 0);
        assert_eq!(taken(&mut rate, now), 0);
    }

    #[test]
    fn another_rate_forgets_nothing_that_was_spent() {
        let now = Instant::now();
        let mut rate = Rate::new(10, now);
        taken(&mut rate, now);
        rate.change(60_000);
        assert_eq!(taken(&mut rate, now), 0);
        assert_eq!(taken(&mut rate, now + Duration::from_secs(1)), 1000);
        rate.change(1);
        assert_eq!(taken(&mut rate, now + Duration::from_secs(2)), 0);
        assert_eq!(taken(&mut rate, now + 2 * MINUTE), 1);
    }
}
