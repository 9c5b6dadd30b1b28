//! Doors that have shut, and who had opened them: what `revoke --kill` is to end may have begun there.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::control::Selection;
use super::ledger::Hold;
use crate::nft::Door;
use crate::service::Name;

/// Doors that are remembered at most.
const REMEMBERED: usize = 16_384;

/// And how many of them are left when they were more.
const KEPT: usize = REMEMBERED * 3 / 4;

/// How long: conntrack forgets a connection that is silent for five days, and addresses come to belong to others.
const AGE: Duration = Duration::from_hours(7 * 24);

/// When each shut last. A door for one connection is remembered as one for all.
#[derive(Default)]
pub struct Past(HashMap<(Door, Name), Instant>);

impl Past {
    /// Doors have shut, or some who held them open have gone.
    pub fn add<'a>(&mut self, closed: impl IntoIterator<Item = &'a (Door, Hold)>, now: Instant) {
        let closed = closed.into_iter();
        self.0.extend(closed.map(|(door, hold)| ((Door { once: false, ..*door }, hold.user.clone()), now)));
        if self.0.len() > REMEMBERED {
            self.forget(now);
        }
    }

    /// Forgets doors that shut long ago, and the oldest of too many.
    fn forget(&mut self, now: Instant) {
        self.0.retain(|_, shut| now.duration_since(*shut) < AGE);
        if self.0.len() > REMEMBERED {
            let mut times: Vec<Instant> = self.0.values().copied().collect();
            // More than there need be, so that this is not done for each.
            let surplus = self.0.len().saturating_sub(KEPT);
            let (before, &mut first_kept, _) = times.select_nth_unstable(surplus);
            // Many may have shut at one time: some of these go.
            let mut surplus = before.iter().filter(|shut| **shut == first_kept).count();
            self.0.retain(|_, shut| {
                let goes = *shut < first_kept || (*shut == first_kept && surplus > 0);
                surplus = surplus.saturating_sub((goes && *shut == first_kept).into());
                !goes
            });
        }
    }

    /// Those of the users who are meant.
    pub fn of(&mut self, selection: &Selection, now: Instant) -> impl Iterator<Item = Door> {
        self.forget(now);
        self.0.keys().filter(|(_, user)| selection.is_of(user)).map(|(door, _)| *door)
    }
}

#[cfg(test)]
mod tests {
    use super::{AGE, Door, Duration, Hold, Instant, KEPT, Past, REMEMBERED};

    fn closed(number: usize, user: &str, until: Instant) -> (Door, Hold) {
        let source = std::net::Ipv6Addr::from_bits(number as u128).into();
        let door = Door { source, port: "tcp/22".parse().unwrap(), once: true };
        let [user, service] = [user, "ssh"].map(|name| name.parse().unwrap());
        (
            door,
            Hold {
                user,
                service,
                until,
                bound: false,
                token: None,
                kill: false,
                spent: false,
                members: Vec::new(),
                asked: None,
                waits: false,
            },
        )
    }

    #[test]
    fn a_door_that_shuts_again_and_again_is_remembered_once_for_each_user_and_for_a_week() {
        let (mut past, start) = (Past::default(), Instant::now());
        for (user, day) in [("alice", 0), ("bob", 0), ("alice", 1), ("alice", 2)] {
            let now = start + Duration::from_hours(24 * day);
            past.add(&[closed(1, user, now)], now);
        }
        assert_eq!(past.0.len(), 2);
        past.forget(start + AGE);
        let left: Vec<&str> = past.0.keys().map(|(_, user)| user.as_str()).collect();
        assert_eq!(left, ["alice"]);
    }

    #[test]
    fn of_too_many_doors_the_oldest_are_forgotten_() {
        let (mut past, start) = (Past::default(), Instant::now());
        for first in (0..=REMEMBERED).step_by(1024) {
            let now = start + Duration::from_millis(first as u64);
            let closed: Vec<_> =
                (first..REMEMBERED + 1).take(1024).map(|number| closed(number, "alice", now)).collect();
            past.add(&closed, now);
        }
        let is_known = |number| {
            let (door, _) = closed(number, "alice", start);
            past.0.keys().any(|(past, _)| *past == Door { once: false, ..door })
        };
        assert!(is_known(REMEMBERED) && !is_known(0));
        assert_eq!(past.0.len(), KEPT);
        let at_once: Vec<_> = (0..=REMEMBERED).map(|number| closed(number, "bob", start)).collect();
        past.add(&at_once, start + AGE);
        assert_eq!(past.0.len(), KEPT, "also if all of them shut at one time");
    }
}
