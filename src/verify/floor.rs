//! What may have been accepted, although nobody knows it any more.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Seconds that a moment is ahead at most to be told by its time alone, without the day.
const SOON: u64 = 43_200;

/// The highest counter of a token that a store may have forgotten: none up to it is taken. It is ahead of the clock for a window
/// after the store was made anew or found in doubt. By default there is none.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Floor(Option<u64>);

impl Floor {
    /// Of this counter.
    pub const fn new(n: u64) -> Self {
        Self(Some(n))
    }

    /// Whether this counter is not taken.
    pub fn covers(self, n: u64) -> bool {
        Some(n) <= self.0
    }

    /// That no knocks are accepted at this time, if so: a token's counter is its client's clock.
    pub fn shut(self, now: u64) -> Option<Shut> {
        let until = self.0?.saturating_add(1);
        self.covers(now).then_some(Shut::new(until, now))
    }
}

/// No knocks are accepted, as it is displayed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Shut {
    /// The Unix second from which on those are whose clients' clocks are right.
    pub until: u64,
    /// The day need not be told.
    #[serde(skip)]
    is_soon: bool,
}

impl Shut {
    /// Told at this time.
    pub const fn new(until: u64, now: u64) -> Self {
        Self { until, is_soon: until.saturating_sub(now) <= SOON }
    }
}

impl fmt::Display for Shut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let format = if self.is_soon { "%TZ" } else { "%F %TZ" };
        let until = i64::try_from(self.until).ok().and_then(|until| Timestamp::from_second(until).ok());
        let until = until.map_or_else(|| self.until.to_string(), |until| until.strftime(format).to_string());
        write!(f, "no knocks are accepted until {until} (counter store in doubt)")
    }
}

#[cfg(test)]
mod tests {
    use super::Floor;

    #[test]
    fn knocks_are_accepted_from_the_second_after_the_floor_and_that_is_told_until_then() {
        let floor = Floor::new(1_795_356_130);
        let said = |now| floor.shut(now).map(|shut| shut.to_string());
        let until = |time: &str| Some(format!("no knocks are accepted until {time} (counter store in doubt)"));
        assert_eq!(said(1_795_356_070), until("14:02:11Z"));
        assert_eq!(said(1_795_356_130), until("14:02:11Z"));
        assert_eq!(said(1_795_356_131), None);
        assert_eq!(said(1_795_256_131), until("2026-11-22 14:02:11Z"), "not today");
        assert_eq!(Floor::new(u64::MAX).shut(7).map(|shut| shut.to_string()), until(&u64::MAX.to_string()));
        assert_eq!([Floor::default().shut(0), Floor::new(0).shut(1)], [None, None]);
    }
}
