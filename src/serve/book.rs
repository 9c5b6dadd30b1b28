//! Who opened which door until when.
//!
//! One element may stand for the knocks of several users behind one address: it has the longest time left, and taking one
//! user's grant back leaves the others'.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::nft::Door;
use crate::service::Name;

/// Doors at most: what the kernel's sets hold.
const MAX_DOORS: usize = 4 * 65_535;

/// The live grants of every door.
#[derive(Default)]
pub struct Book {
    doors: HashMap<Door, Vec<Grant>>,
}

struct Grant {
    user: Name,
    until: Instant,
}

impl Book {
    /// Notes a grant, or renews it; tells for how long the door is to stay open.
    pub fn open(&mut self, door: Door, user: &Name, seconds: u32, now: Instant) -> Duration {
        if self.doors.len() >= MAX_DOORS {
            self.forget(now);
        }
        let until = now + Duration::from_secs(seconds.into());
        let grants = self.doors.entry(door).or_default();
        grants.retain(|grant| grant.until > now && grant.user != *user);
        grants.push(Grant { user: user.clone(), until });
        time_left(grants, now).unwrap_or_default()
    }

    /// Strikes a user's grant; tells for how long the door is to stay open for others, `None` if it is to be closed.
    pub fn close(&mut self, door: &Door, user: &Name, now: Instant) -> Option<Duration> {
        let grants = self.doors.get_mut(door)?;
        grants.retain(|grant| grant.until > now && grant.user != *user);
        let left = time_left(grants, now);
        if left.is_none() {
            self.doors.remove(door);
        }
        left
    }

    /// Forgets what has run out. Call it now and then.
    pub fn forget(&mut self, now: Instant) {
        self.doors.retain(|_, grants| {
            grants.retain(|grant| grant.until > now);
            !grants.is_empty()
        });
    }
}

fn time_left(grants: &[Grant], now: Instant) -> Option<Duration> {
    grants.iter().map(|grant| grant.until.saturating_duration_since(now)).max()
}

#[cfg(test)]
mod tests {
    use super::{Book, Door, Duration, Instant, Name};

    fn door() -> Door {
        Door { source: "192.0.2.1".parse().unwrap(), port: "tcp/22".parse().unwrap(), once: false }
    }

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_door_stays_open_for_the_longest_of_its_grants() {
        let (mut book, now) = (Book::default(), Instant::now());
        assert_eq!(book.open(door(), &name("alice"), 60, now), seconds(60));
        assert_eq!(book.open(door(), &name("bob"), 30, now), seconds(60));
        assert_eq!(book.open(door(), &name("bob"), 30, now + seconds(50)), seconds(30));
    }

    #[test]
    fn taking_one_users_grant_back_leaves_the_others() {
        let (mut book, now) = (Book::default(), Instant::now());
        book.open(door(), &name("alice"), 60, now);
        book.open(door(), &name("bob"), 30, now);
        assert_eq!(book.close(&door(), &name("alice"), now + seconds(10)), Some(seconds(20)));
        assert_eq!(book.close(&door(), &name("bob"), now + seconds(10)), None);
        assert!(book.doors.is_empty());
    }

    #[test]
    fn what_has_run_out_is_forgotten() {
        let (mut book, now) = (Book::default(), Instant::now());
        book.open(door(), &name("alice"), 60, now);
        book.forget(now + seconds(59));
        assert_eq!(book.doors.len(), 1);
        book.forget(now + seconds(60));
        assert!(book.doors.is_empty());
    }
}
