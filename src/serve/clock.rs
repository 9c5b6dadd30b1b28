//! The clock that counters are compared with, and whether it goes on as time does.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Less than this is what keeps a clock right, and harms nobody.
const NOTABLE: Duration = Duration::from_secs(5);

/// Unix seconds; a clock before 1970 is 1970.
pub(super) fn unix_now() -> u64 {
    since_1970(SystemTime::now()).as_secs()
}

/// A way that a clock has jumped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Jump {
    /// It was set forward, or the machine slept: `Instant` does not go on while it does.
    Forward(Duration),
    /// It was set back.
    Back(Duration),
}

/// Compares the clock with the time that has passed.
pub(super) struct Clock {
    shown: Duration,
    at: Instant,
}

impl Clock {
    /// Starts comparing.
    pub(super) fn new(shown: SystemTime, at: Instant) -> Self {
        Self { shown: since_1970(shown), at }
    }

    /// Looks at the clock again: how it has jumped since the last look, if by more than a few seconds.
    pub(super) fn jump(&mut self, shown: SystemTime, at: Instant) -> Option<Jump> {
        let expected = self.shown.saturating_add(at.saturating_duration_since(self.at));
        *self = Self::new(shown, at);
        let forward = self.shown.saturating_sub(expected);
        let back = expected.saturating_sub(self.shown);
        match (forward > NOTABLE, back > NOTABLE) {
            (true, _) => Some(Jump::Forward(forward)),
            (_, true) => Some(Jump::Back(back)),
            _ => None,
        }
    }
}

fn since_1970(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant, UNIX_EPOCH};

    use super::{Clock, Jump};

    #[test]
    fn only_what_time_does_not_explain_is_a_jump() {
        let seconds = Duration::from_secs;
        let (start, shown) = (Instant::now(), UNIX_EPOCH + seconds(1_790_000_000));
        let mut clock = Clock::new(shown, start);
        for (after, offset, jump) in [
            (1, 0, None),
            (500, 5, None),
            (501, 3605, Some(Jump::Forward(seconds(3600)))),
            (502, 3605, None),
            (503, 3598, Some(Jump::Back(seconds(7)))),
        ] {
            assert_eq!(clock.jump(shown + seconds(after + offset), start + seconds(after)), jump, "{after}");
        }
        let jump = clock.jump(UNIX_EPOCH - seconds(9), start + seconds(504));
        assert_eq!(jump, Some(Jump::Back(seconds(1_790_000_000 + 504 + 3598))), "before 1970 is 1970");
    }
}
