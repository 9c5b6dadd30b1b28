//! Whether an element counts: others can save elements and load them again, when their grants are over.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::comment::{Comment, End};

/// Where the kernel names this boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// An element may end so much after its grant before somebody else must have loaded it.
const TOLERANCE: Duration = Duration::from_secs(1);

/// This boot, and the clock that began with it.
#[derive(Clone, Copy, Debug)]
pub struct Boot {
    id: u32,
    /// When the clock began.
    start: Instant,
}

impl Boot {
    /// That of this machine.
    ///
    /// # Errors
    /// When /proc does not tell.
    pub fn this() -> io::Result<Self> {
        let now = Duration::try_from(clock_gettime(ClockId::Monotonic)).map_err(|_| io::ErrorKind::InvalidData)?;
        let start = Instant::now().checked_sub(now).ok_or(io::ErrorKind::InvalidData)?;
        let id = fs::read_to_string(BOOT_ID)?;
        Ok(Self {
            id: id.get(..8).and_then(|id| u32::from_str_radix(id, 16).ok()).ok_or(io::ErrorKind::InvalidData)?,
            start,
        })
    }

    /// How a comment says it: by the whole second in which it ends.
    pub fn end(&self, until: Instant) -> End {
        let until = until.saturating_duration_since(self.start);
        End { seconds: until.as_secs() + u64::from(until.subsec_nanos() > 0), boot: self.id }
    }

    /// `None` in another boot.
    fn until(&self, end: End) -> Option<Instant> {
        self.start.checked_add(Duration::from_secs(end.seconds)).filter(|_| end.boot == self.id)
    }
}

impl Comment {
    /// Until when an element counts that ends in `left` by itself, or never, if it does: its grant lives, and was not outlasted
    /// by it. Else others have loaded it, who do not know of revocations and of the one connection that it may have been for.
    /// Those that do not say when they end count if `old`.
    pub fn counts_until(&self, left: Option<Duration>, old: bool, boot: &Boot, now: Instant) -> Option<Instant> {
        let ends = now.checked_add(left?)?;
        let until = match self.end {
            Some(end) => boot.until(end)?,
            None => Some(ends).filter(|_| old)?,
        };
        (until > now && ends.saturating_duration_since(until) <= TOLERANCE).then(|| ends.min(until))
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::{Boot, Comment, End, TOLERANCE};

    #[test]
    fn a_comment_is_read_as_it_is_written_and_in_no_other_way() {
        for text in [
            "alice ssh",
            "alice ssh bound",
            "alice bound",
            "alice bound bound",
            "alice ssh 0 00000000",
            "alice ssh 18446744073709551615 ffffffff bound",
        ] {
            assert_eq!(Comment::read(text).unwrap().to_string(), text);
        }
        assert_eq!(Comment::read("alice bound").unwrap().service.as_str(), "bound");
        for text in [
            "",
            "alice",
            "bound",
            "my own laptop",
            "a  b c -/",
            "alice ssh 9",
            "alice ssh 09 0000000a",
            "alice ssh +9 0000000a",
            "alice ssh 9 0000000A",
            "alice ssh 9 a",
            "alice ssh 9 +000000a",
            "alice ssh 9 0000000a unbound",
            "alice ssh 9 0000000a bound ",
            "alice -ssh",
        ] {
            assert_eq!(Comment::read(text), None, "{text}");
        }
    }

    #[test]
    fn this_boot_has_a_name_and_a_clock() {
        let (boot, now) = (Boot::this().unwrap(), Instant::now());
        let end = boot.end(now + Duration::from_secs(9));
        let until = boot.until(end).unwrap();
        assert!(until >= now + Duration::from_secs(9) && until < now + Duration::from_secs(10));
        assert_eq!(boot.until(End { boot: !end.boot, ..end }), None);
    }

    fn comment(end: Option<End>) -> Comment {
        Comment { user: "alice".parse().unwrap(), service: "ssh".parse().unwrap(), end, bound: false }
    }

    #[test]
    fn what_does_not_say_when_it_ends_counts_for_the_time_that_it_has_left_if_a_daemon_of_before_may_have_added_it() {
        let (boot, now, left) = (Boot::this().unwrap(), Instant::now(), Duration::from_secs(9));
        for (left, old, until) in
            [(Some(left), true, Some(now + left)), (Some(left), false, None), (None, true, None), (None, false, None)]
        {
            assert_eq!(comment(None).counts_until(left, old, &boot, now), until);
        }
    }

    proptest! {
        /// A grant, whose element others have saved and loaded again, or not: by an nft that knows what was left of it, or gives
        /// it its whole time.
        #[test]
        fn an_element_counts_if_the_daemon_added_it_in_this_boot_and_never_longer_than_its_grant(
            granted_ms in 0..3_600_000_u64,
            time in 1..3600_u64,
            saved in 0.0..1.0,
            pause_ms in prop_oneof![0..3000_u64, 0..7_200_000_u64],
            looked in 0.0..1.0,
            [is_loaded, is_whole, is_other_boot, old] in any::<[bool; 4]>(),
        ) {
            let (boot, time) = (Boot { id: 10, start: Instant::now() }, Duration::from_secs(time));
            let end = boot.start + Duration::from_millis(granted_ms) + time;
            let saved_at = end - time.mul_f64(1.0 - saved);
            let (added_at, ends) = if is_loaded {
                let added_at = saved_at + Duration::from_millis(pause_ms);
                (added_at, added_at + if is_whole { time } else { end - saved_at })
            } else {
                (saved_at, end)
            };
            let now = added_at + (ends - added_at).mul_f64(looked);
            let comment = comment(Some(boot.end(end)));
            let boot = Boot { id: if is_other_boot { 11 } else { 10 }, ..boot };
            let counts = comment.counts_until(Some(ends - now), old, &boot, now);
            if is_other_boot || now >= end + Duration::from_secs(1) {
                prop_assert_eq!(counts, None);
            } else if !is_loaded && now < end {
                prop_assert_eq!(counts, Some(end));
            }
            if let Some(until) = counts {
                // A comment has whole seconds.
                prop_assert!(until <= ends && until < end + Duration::from_secs(1));
                prop_assert!(ends < end + TOLERANCE + Duration::from_secs(1), "and so the kernel's element");
            }
            prop_assert_eq!(comment.counts_until(None, old, &boot, now), None, "one without an end");
        }
    }
}
