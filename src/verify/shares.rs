//! A share for each user of the doors that may open in a minute (docs/configuration.md).

use std::collections::HashMap;

use crate::crypto::PublicKey;

/// Seconds.
const MINUTE: u64 = 60;

/// The doors that were opened in this minute and in the one before, which count for less with every second. There is an entry
/// for each user who opened one, so never more than doors.
#[derive(Default)]
pub(super) struct Shares {
    minute: u64,
    this: Opened,
    before: Opened,
}

#[derive(Default)]
struct Opened {
    all: u32,
    by: HashMap<PublicKey, u32>,
}

impl Shares {
    /// Takes so many of the `most` doors of a minute for a user, all or none: they may have no more than is left for all others
    /// then. Who had none lately may have what there is.
    pub(super) fn take(&mut self, user: &PublicKey, doors: usize, most: u32, now: u64) -> bool {
        self.turn_to(now / MINUTE);
        let Ok(doors) = u32::try_from(doors) else { return false };
        let of = |opened: &Opened| opened.by.get(user).copied().unwrap_or(0);
        let lasting =
            |this: u32, before: u32| u64::from(this) + (u64::from(before) * (MINUTE - now % MINUTE)).div_ceil(MINUTE);
        let all = lasting(self.this.all, self.before.all) + u64::from(doors);
        let own = lasting(of(&self.this), of(&self.before));
        let Some(left) = u64::from(most).checked_sub(all) else { return false };
        if own > 0 && own + u64::from(doors) > left {
            return false;
        }
        self.this.all = self.this.all.saturating_add(doors);
        let own = self.this.by.entry(*user).or_default();
        *own = own.saturating_add(doors);
        true
    }

    /// A clock that is set back takes nobody's doors off.
    fn turn_to(&mut self, minute: u64) {
        match minute.checked_sub(self.minute) {
            Some(0) | None => {}
            Some(1) => self.before = std::mem::take(&mut self.this),
            Some(_) => (self.this, self.before) = Default::default(),
        }
        self.minute = minute;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop_assert, proptest};

    use super::{MINUTE, PublicKey, Shares};
    use crate::crypto::PrivateKey;

    const NOW: u64 = 1_790_000_000 / MINUTE * MINUTE;

    fn keys<const N: usize>() -> [PublicKey; N] {
        [(); N].map(|()| *PrivateKey::generate().unwrap().public())
    }

    /// How often one service of so many ports opens for a user who asks without end.
    fn taken(shares: &mut Shares, user: &PublicKey, doors: usize, now: u64) -> usize {
        (0..10_000).take_while(|_| shares.take(user, doors, 600, now)).count()
    }

    #[test]
    fn one_user_gets_half_and_leaves_the_others_theirs_however_many_ports_a_service_has() {
        for doors in [1, 20, 300] {
            let (mut shares, [mallory, trudy, alice]) = (Shares::default(), keys());
            assert_eq!(taken(&mut shares, &mallory, doors, NOW) * doors, 300);
            assert!(taken(&mut shares, &trudy, 1, NOW) >= 150);
            assert!(taken(&mut shares, &alice, 1, NOW) >= 50, "beside two who take all that they can");
            assert!(!shares.take(&mallory, doors, 600, NOW), "nor more while others have theirs");
        }
    }

    #[test]
    fn a_service_opens_whole_or_not_at_all_and_the_first_may_have_all_that_there_is() {
        let (mut shares, [alice, bob]) = (Shares::default(), keys());
        assert!(!shares.take(&alice, 601, 600, NOW));
        assert!(shares.take(&alice, 600, 600, NOW), "what was refused has taken nothing");
        assert!(!shares.take(&bob, 1, 600, NOW));
        assert!(!shares.take(&bob, 1, 600, NOW + MINUTE));
        assert!(shares.take(&bob, 10, 600, NOW + MINUTE + 1));
        assert!(!shares.take(&bob, 1, 600, NOW + MINUTE + 1));
    }

    #[test]
    fn what_was_taken_is_forgotten_after_two_minutes_and_not_when_the_clock_is_set_back() {
        for (later, is_there) in [(2 * MINUTE, true), (MINUTE, false), (0, false)] {
            let (mut shares, [alice, bob]) = (Shares::default(), keys());
            assert!(shares.take(&alice, 600, 600, NOW + 30));
            assert_eq!(shares.take(&bob, 600, 600, NOW + later), is_there, "{later} s later");
        }
        let (mut shares, [alice, bob]) = (Shares::default(), keys());
        assert!(shares.take(&alice, 600, 600, NOW));
        assert!(!shares.take(&bob, 1, 600, NOW - 3600));
    }

    proptest! {
        /// The gate's bucket holds as many as may open in a minute, and fills in one.
        #[test]
        fn what_is_taken_is_never_more_than_a_bucket_of_a_minutes_worth_gives(
            asked in proptest::collection::vec((0..4_usize, 1..30_u64, 0..9_u64), 1..300),
        ) {
            let (mut shares, users, mut now, mut spent) = (Shares::default(), keys::<4>(), NOW, 0);
            for (user, doors, pause) in asked {
                now += pause;
                spent = u64::saturating_sub(spent, pause);
                if shares.take(&users[user], usize::try_from(doors).unwrap(), 60, now) {
                    spent += doors;
                    prop_assert!(spent <= 60, "{spent} at {now}");
                }
            }
        }
    }
}
