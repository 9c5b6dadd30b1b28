//! What would fill the log if each time had its line.

use std::time::{Duration, Instant};

/// Time between two lines of a trouble that comes and goes.
const PAUSE: Duration = Duration::from_secs(1);

/// A trouble that lasts: told when it begins and when it is over, and not more often than each second.
#[derive(Default)]
pub struct Trouble {
    told_at: Option<Instant>,
    is_told: bool,
}

impl Trouble {
    /// It is there; `true` if that is to be told.
    pub fn is_news(&mut self, now: Instant) -> bool {
        let is_news = !self.is_told && self.told_at.is_none_or(|told| now.duration_since(told) >= PAUSE);
        if is_news {
            (self.told_at, self.is_told) = (Some(now), true);
        }
        is_news
    }

    /// It is not, or no more; `true` if that is to be told.
    pub const fn is_over(&mut self) -> bool {
        std::mem::replace(&mut self.is_told, false)
    }
}

/// What goes wrong for many doors at once: the first is told, the others are counted and told together.
#[derive(Default)]
pub struct Tally {
    count: u64,
}

impl Tally {
    /// Counts one; `true` if it is the first since the last telling.
    pub const fn is_first(&mut self) -> bool {
        self.count = self.count.saturating_add(1);
        self.count == 1
    }

    /// How many came after the first, since the last call.
    pub const fn take_untold(&mut self) -> u64 {
        std::mem::replace(&mut self.count, 0).saturating_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::{Instant, PAUSE, Tally, Trouble};

    #[test]
    fn a_trouble_is_told_when_it_begins_and_when_it_is_over() {
        let (mut trouble, now) = (Trouble::default(), Instant::now());
        assert!(!trouble.is_over());
        assert!(trouble.is_news(now));
        assert!(!trouble.is_news(now + PAUSE));
        assert!(trouble.is_over());
        assert!(!trouble.is_over());
        assert!(trouble.is_news(now + PAUSE));
    }

    #[test]
    fn a_trouble_that_comes_and_goes_is_told_once_a_second() {
        let (mut trouble, start) = (Trouble::default(), Instant::now());
        let told = (0..5000).filter(|time| {
            let is_news = trouble.is_news(start + PAUSE * *time / 1000);
            trouble.is_over();
            is_news
        });
        assert_eq!(told.count(), 5);
    }

    #[test]
    fn what_comes_after_the_first_is_counted() {
        let mut tally = Tally::default();
        assert_eq!(tally.take_untold(), 0);
        let first = (0..10).filter(|_| tally.is_first()).count();
        assert_eq!((first, tally.take_untold()), (1, 9));
        assert!(tally.is_first());
        assert_eq!(tally.take_untold(), 0);
    }
}
