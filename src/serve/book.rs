//! Who opened which door until when.
//!
//! One element may stand for the knocks of several users behind one address: it has the longest time left, and taking one
//! user's grant back leaves the others'. A user's later knock for the same service renews their grant, and taking one of the
//! two back leaves what the other gave.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

use crate::nft::{Boot, Comment, Door, Member};
use crate::service::Name;

/// Doors at most: what the kernel's four sets hold.
pub const MAX_DOORS: usize = 4 * 65_535;

/// Users who hold one door open at most.
const MAX_GRANTS: usize = 1024;

/// Knocks before the last that a grant rests on at most, or a door for one connection has had.
const MAX_EARLIER: usize = 16;

/// The live grants of every door, or of whatever else the kernel has an element for as long as they last.
pub struct Book<K = Door> {
    doors: HashMap<K, Vec<Grant>>,
    /// No grant ends before.
    first_end: Option<Instant>,
}

/// What a grant has taken the place of, see [`Book::take_back`].
pub struct Replaced {
    /// The first grants of the door, which are as they were.
    untouched: usize,
    grants: Vec<Grant>,
}

/// One user's time at a door.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Grant {
    /// Who knocked.
    pub user: Name,
    /// For what.
    pub service: Name,
    /// When it ends.
    pub until: Instant,
    /// By a token that was bound to the source, so that it is never taken back.
    pub bound: bool,
    /// The number of that token; `None` for a grant that was found.
    pub token: Option<u32>,
    /// What is left of the grant if that token is taken back: until when, bound or not, by which. The latest comes first.
    pub earlier: Vec<(Instant, bool, Option<u32>)>,
    /// Connections end with it.
    pub kill: bool,
    /// Of a door for one connection: it may have let that in, and lets in no other.
    pub spent: bool,
    /// Elements of the administrator's sets that it has part in.
    pub members: Vec<Member>,
}

impl Grant {
    /// What the kernel's element says of it.
    pub fn comment(&self, boot: &Boot) -> Comment {
        let Self { user, service, until, bound, .. } = self;
        Comment { user: user.clone(), service: service.clone(), end: Some(boot.end(*until)), bound: *bound }
    }

    /// Another service of the same user's may have the same port, and time of its own.
    fn is_renewed_by(&self, other: &Self) -> bool {
        self.user == other.user && self.service == other.service
    }
}

impl<K> Default for Book<K> {
    fn default() -> Self {
        Self { doors: HashMap::new(), first_end: None }
    }
}

impl<K: Clone + Eq + Hash> Book<K> {
    /// Notes a grant, or renews it; tells which it takes the place of, or `None` if the book is full. At a door for one
    /// connection, `once`, those before it may be spent: they do not let in another, and what they let in lasts as long as they do.
    pub fn note(&mut self, door: K, mut grant: Grant, once: bool, now: Instant) -> Option<Replaced> {
        if self.doors.len() >= MAX_DOORS && !self.doors.contains_key(&door) {
            return None;
        }
        let grants = self.doors.entry(door).or_default();
        let is_replaced = |other: &mut Grant| {
            other.until <= now || if once { !other.spent && !grant.spent } else { other.is_renewed_by(&grant) }
        };
        let mut replaced: Vec<Grant> = grants.extract_if(.., is_replaced).collect();
        let lasting = replaced.iter().filter(|other| other.until > now);
        let mut spent = Vec::new();
        if once {
            spent.extend(lasting.map(|other| Grant { spent: true, ..other.clone() }));
            if grants.len() >= MAX_EARLIER {
                let first = (0..grants.len()).min_by_key(|place| grants.get(*place).map(|grant| grant.until));
                replaced.extend(first.map(|place| grants.remove(place)));
            }
        } else if let Some(renewed) = lasting.last().filter(|_| !grant.bound) {
            let last = [(renewed.until, renewed.bound, renewed.token)];
            grant.earlier = last.into_iter().chain(renewed.earlier.iter().copied()).take(MAX_EARLIER).collect();
        }
        let untouched = grants.len();
        if untouched >= MAX_GRANTS {
            return None;
        }
        self.first_end = Some(self.first_end.map_or(grant.until, |first| first.min(grant.until)));
        grants.extend(spent);
        grants.push(grant);
        Some(Replaced { untouched, grants: replaced })
    }

    /// Takes the last note back: what it took the place of stands.
    pub fn take_back(&mut self, door: &K, replaced: Replaced) {
        if let Some(grants) = self.doors.get_mut(door) {
            grants.truncate(replaced.untouched);
            grants.extend(replaced.grants);
        }
    }

    /// What a door for one connection was opened for may have come.
    pub fn spend(&mut self, door: &K) {
        self.doors.get_mut(door).into_iter().flatten().for_each(|grant| grant.spent = true);
    }

    /// Strikes out what a token of a user's opened: tells the grant as it was, and what is left of it.
    pub fn strike(&mut self, door: &K, user: &Name, token: u32, now: Instant) -> Option<(Grant, Option<Grant>)> {
        let grants = self.doors.get_mut(door)?;
        let has =
            |grant: &Grant| grant.token == Some(token) || grant.earlier.iter().any(|earlier| earlier.2 == Some(token));
        let was = grants.remove(grants.iter().position(|grant| grant.user == *user && has(grant))?);
        let all = [(was.until, was.bound, was.token)].into_iter().chain(was.earlier.iter().copied());
        let mut all = all.filter(|(until, _, other)| *until > now && *other != Some(token));
        let Some((until, bound, token)) = all.next() else {
            let others = grants.iter().filter(|grant| grant.until > now && grant.is_renewed_by(&was));
            let left = others.max_by_key(|grant| grant.until).cloned();
            return Some((was, left));
        };
        // No later than before: more may not be permitted any more.
        let left = Grant { until: until.min(was.until), bound, token, earlier: all.collect(), ..was.clone() };
        grants.push(left.clone());
        self.first_end = self.first_end.map(|first| first.min(left.until));
        Some((was, Some(left)))
    }

    /// Strikes out what a user was granted for one service.
    pub fn strike_grant(&mut self, door: &K, struck: &Grant) {
        if let Some(grants) = self.doors.get_mut(door) {
            grants.retain(|grant| !grant.is_renewed_by(struck));
        }
    }

    /// Strikes all grants of a door out, and tells them.
    pub fn strike_door(&mut self, door: &K) -> Vec<Grant> {
        self.doors.remove(door).unwrap_or_default()
    }

    /// Strikes every such grant out; tells the doors that may change by it.
    pub fn strike_all(&mut self, is_meant: impl Fn(&K, &Grant) -> bool) -> Vec<(K, Grant)> {
        let struck = self.doors.iter_mut().flat_map(|(door, grants)| {
            let struck: Vec<Grant> = grants.extract_if(.., |grant| is_meant(door, grant)).collect();
            struck.into_iter().map(|grant| (door.clone(), grant))
        });
        struck.collect()
    }

    /// The grant that keeps a door open for longest, and for how long, or what it has let in.
    pub fn longest(&self, door: &K, now: Instant) -> Option<(&Grant, Duration)> {
        self.longest_of(door, now, |_| true)
    }

    /// The same of those by which a connection may begin.
    pub fn longest_fresh(&self, door: &K, now: Instant) -> Option<(&Grant, Duration)> {
        self.longest_of(door, now, |grant| !grant.spent)
    }

    /// The same of those with which connections end.
    pub fn longest_of_kill(&self, door: &K, now: Instant) -> Option<(&Grant, Duration)> {
        self.longest_of(door, now, |grant| grant.kill)
    }

    fn longest_of(&self, door: &K, now: Instant, is_meant: impl Fn(&Grant) -> bool) -> Option<(&Grant, Duration)> {
        let grants = self.doors.get(door)?.iter().filter(|grant| grant.until > now && is_meant(grant));
        grants.max_by_key(|grant| grant.until).map(|grant| (grant, grant.until.saturating_duration_since(now)))
    }

    /// What has time left.
    pub fn standing(&self, now: Instant) -> impl Iterator<Item = &K> {
        self.doors.keys().filter(move |door| self.longest(door, now).is_some())
    }

    /// The doors that are open, or were and may have been spent, each with the grant that keeps it open for longest.
    pub fn live(&self, now: Instant) -> impl Iterator<Item = (&K, &Grant, Duration)> {
        let grant = move |door| self.longest_fresh(door, now).or_else(|| self.longest(door, now));
        self.doors.keys().filter_map(move |door| grant(door).map(|(grant, left)| (door, grant, left)))
    }

    /// Forgets what has run out, and tells of which nothing is left. Call it now and then: it looks at all only if something may have.
    pub fn forget(&mut self, now: Instant) -> Vec<(K, Grant)> {
        if self.first_end.is_none_or(|first| first > now) {
            return Vec::new();
        }
        let mut over = self.strike_all(|_, grant| grant.until <= now);
        over.retain(|(door, over)| {
            !self.doors.get(door).is_some_and(|left| left.iter().any(|it| it.is_renewed_by(over)))
        });
        self.doors.retain(|_, grants| !grants.is_empty());
        self.first_end = self.doors.values().flatten().map(|grant| grant.until).min();
        over
    }
}

impl Book {
    /// The doors whose elements are to be made again. Those for one connection may be spent by now.
    pub fn to_restore(&mut self, now: Instant) -> Vec<Door> {
        let standing: Vec<Door> = self.standing(now).copied().collect();
        standing.iter().filter(|door| door.once).for_each(|door| self.spend(door));
        standing
    }
}

#[cfg(test)]
mod tests {
    use super::{Book, Door, Duration, Grant, Instant, Name};

    fn door(once: bool) -> Door {
        Door { source: "192.0.2.1".parse().unwrap(), port: "tcp/22".parse().unwrap(), once }
    }

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn grant(user: &str, now: Instant, seconds: u64) -> Grant {
        Grant {
            user: name(user),
            service: name("ssh"),
            until: now + Duration::from_secs(seconds),
            bound: false,
            token: None,
            earlier: Vec::new(),
            kill: false,
            spent: false,
            members: Vec::new(),
        }
    }

    fn left(book: &Book, once: bool, now: Instant) -> Option<u64> {
        book.longest_fresh(&door(once), now).map(|(_, left)| left.as_secs())
    }

    #[test]
    fn a_door_stays_open_for_the_longest_of_its_grants() {
        let (mut book, now) = (Book::<Door>::default(), Instant::now());
        assert!(book.note(door(false), grant("alice", now, 60), false, now).is_some());
        assert!(book.note(door(false), grant("bob", now, 30), false, now).is_some());
        assert_eq!(left(&book, false, now), Some(60));
        let later = now + Duration::from_secs(50);
        assert!(book.note(door(false), grant("bob", later, 30), false, later).is_some());
        assert_eq!(left(&book, false, later), Some(30));
        assert_eq!(book.to_restore(later), [door(false)]);
    }

    #[test]
    fn a_users_grant_for_one_service_takes_no_time_from_that_for_another_with_the_same_port() {
        let (mut book, now) = (Book::<Door>::default(), Instant::now());
        assert!(book.note(door(false), grant("alice", now, 60), false, now).is_some());
        let shorter = Grant { service: name("rescue"), ..grant("alice", now, 30) };
        let replaced = book.note(door(false), shorter, false, now).unwrap();
        assert_eq!(left(&book, false, now), Some(60));
        book.take_back(&door(false), replaced);
        assert_eq!(left(&book, false, now), Some(60));
    }

    /// Strikes out what a token opened; tells for how long the door is open then.
    fn strike(book: &mut Book, once: bool, user: &str, token: u32, now: Instant) -> Option<Option<u64>> {
        book.strike(&door(once), &name(user), token, now)?;
        Some(left(book, once, now))
    }

    #[test]
    fn what_a_token_opened_is_taken_back_and_no_other_grant() {
        let (mut book, now) = (Book::<Door>::default(), Instant::now());
        let of = |user, token, seconds| Grant { token: Some(token), ..grant(user, now, seconds) };
        assert!(book.note(door(false), of("alice", 1, 60), false, now).is_some());
        assert!(book.note(door(false), of("bob", 1, 30), false, now).is_some());
        assert_eq!(strike(&mut book, false, "alice", 2, now), None, "no token of hers");
        assert_eq!(strike(&mut book, true, "alice", 1, now), None, "another door");
        assert_eq!(strike(&mut book, false, "alice", 1, now), Some(Some(30)));
        assert_eq!(strike(&mut book, false, "alice", 1, now), None, "twice");
        assert_eq!(strike(&mut book, false, "bob", 1, now), Some(None));
    }

    #[test]
    fn taking_a_token_back_leaves_what_others_of_the_same_user_and_service_opened_in_any_order() {
        let now = Instant::now();
        let orders = [[1, 2, 3], [1, 3, 2], [2, 1, 3], [2, 3, 1], [3, 1, 2], [3, 2, 1]];
        for order in orders {
            let mut book = Book::<Door>::default();
            for token in 1..=3 {
                let knock = Grant { token: Some(token), ..grant("alice", now, 10 * u64::from(token)) };
                assert!(book.note(door(false), knock, false, now).is_some());
            }
            for (struck, token) in order.into_iter().enumerate() {
                let longest = order[struck + 1..].iter().max().map(|token| 10 * u64::from(*token));
                assert_eq!(strike(&mut book, false, "alice", token, now), Some(longest), "{token} of {order:?}");
            }
        }
    }

    #[test]
    fn what_is_left_of_a_grant_ends_when_its_own_token_said_and_never_comes_back_for_one_connection() {
        let (mut book, now) = (Book::<Door>::default(), Instant::now());
        let of = |token, seconds| Grant { token: Some(token), ..grant("alice", now, seconds) };
        for once in [false, true] {
            assert!(book.note(door(once), of(1, 10), once, now).is_some());
            assert!(book.note(door(once), of(2, 60), once, now).is_some());
        }
        assert_eq!(book.forget(now + Duration::from_secs(10)), [], "the later knock holds both open");
        let mut shortened = Book::<Door>::default();
        for knock in [of(1, 60), of(2, 10)] {
            assert!(shortened.note(door(false), knock, false, now).is_some());
        }
        assert_eq!(strike(&mut shortened, false, "alice", 2, now), Some(Some(10)), "60 may be permitted no more");
        assert_eq!(strike(&mut book, true, "alice", 2, now), Some(None), "the first may be spent");
        assert_eq!(strike(&mut book, false, "alice", 2, now), Some(Some(10)));
        let over = book.forget(now + Duration::from_secs(10));
        assert_eq!(over.len(), 1, "{over:?}");
    }

    #[test]
    fn of_many_knocks_in_a_row_a_few_are_remembered_and_a_bound_one_makes_those_before_it_needless() {
        let (mut book, now) = (Book::<Door>::default(), Instant::now());
        for token in 0..100 {
            let knock = Grant { token: Some(token), ..grant("alice", now, 60) };
            assert!(book.note(door(false), knock, false, now).is_some());
        }
        assert_eq!(book.doors[&door(false)][0].earlier.len(), super::MAX_EARLIER);
        let bound = Grant { token: Some(100), bound: true, ..grant("alice", now, 60) };
        assert!(book.note(door(false), bound, false, now).is_some());
        assert_eq!(book.doors[&door(false)][0].earlier, []);
    }

    #[test]
    fn a_door_for_one_connection_is_never_prolonged_by_a_grant_that_may_be_spent_nor_restored() {
        let (mut book, now) = (Book::<Door>::default(), Instant::now());
        assert!(book.note(door(true), grant("alice", now, 60), true, now).is_some());
        assert!(book.note(door(true), grant("bob", now, 30), true, now).is_some());
        assert_eq!(left(&book, true, now), Some(30));
        assert_eq!(book.to_restore(now), [door(true)], "what it let in may be to last");
        assert_eq!(left(&book, true, now), None);
    }

    #[test]
    fn what_a_door_for_one_connection_let_in_lasts_as_its_own_grant_did_whoever_knocks_after() {
        let (mut book, now) = (Book::<Door>::default(), Instant::now());
        let of = |user, token, seconds, kill| Grant { token: Some(token), kill, ..grant(user, now, seconds) };
        let lasts = |book: &Book| book.longest_of_kill(&door(true), now).map(|(_, left)| left.as_secs());
        for (user, token, seconds, kill, expected) in [
            ("alice", 1, 60, true, Some(60)),
            ("bob", 1, 90, false, Some(60)), // whose service lets connections live
            ("bob", 2, 30, true, Some(60)),
            ("alice", 2, 10, true, Some(60)),
        ] {
            assert!(book.note(door(true), of(user, token, seconds, kill), true, now).is_some());
            assert_eq!((left(&book, true, now), lasts(&book)), (Some(seconds), expected), "{user} {token}");
        }
        let replaced = book.note(door(true), of("carol", 1, 100, true), true, now).unwrap();
        book.take_back(&door(true), replaced);
        assert_eq!((left(&book, true, now), lasts(&book)), (Some(10), Some(60)), "as if nothing had been");
        let (_, hers) = book.strike(&door(true), &name("alice"), 2, now).unwrap();
        assert_eq!(hers.map(|grant| grant.token), Some(Some(1)), "she is there still");
        assert_eq!((left(&book, true, now), lasts(&book)), (None, Some(60)));
        assert!(book.strike(&door(true), &name("alice"), 1, now).unwrap().1.is_none());
        assert_eq!(lasts(&book), Some(30));
    }

    #[test]
    fn a_door_for_one_connection_remembers_the_knocks_before_whose_time_is_longest_and_refuses_none() {
        let (mut book, now) = (Book::<Door>::default(), Instant::now());
        for token in 0..100 {
            let knock = Grant { token: Some(token), kill: true, ..grant("alice", now, 200 - u64::from(token)) };
            assert!(book.note(door(true), knock, true, now).is_some());
        }
        assert_eq!(book.doors[&door(true)].len(), super::MAX_EARLIER + 1);
        assert_eq!(book.longest_of_kill(&door(true), now).map(|(_, left)| left.as_secs()), Some(200));
    }

    #[test]
    fn a_note_that_is_taken_back_leaves_what_was_there() {
        for once in [false, true] {
            let (mut book, now) = (Book::<Door>::default(), Instant::now());
            assert!(book.note(door(once), grant("alice", now, 30), once, now).is_some());
            let replaced = book.note(door(once), grant("alice", now, 60), once, now).unwrap();
            assert_eq!(left(&book, once, now), Some(60));
            book.take_back(&door(once), replaced);
            assert_eq!(left(&book, once, now), Some(30));
            let replaced = book.note(door(once), grant("bob", now, 60), once, now).unwrap();
            book.take_back(&door(once), replaced);
            assert_eq!(left(&book, once, now), Some(30), "another's");
        }
    }

    #[test]
    fn what_has_run_out_is_forgotten() {
        let (mut book, now) = (Book::<Door>::default(), Instant::now());
        assert!(book.note(door(false), grant("alice", now, 60), false, now).is_some());
        let again = grant("bob", now, 90);
        assert!(book.note(door(false), again.clone(), false, now).is_some());
        assert_eq!(book.forget(now + Duration::from_secs(59)), []);
        assert_eq!(book.forget(now + Duration::from_secs(60)), [(door(false), grant("alice", now, 60))]);
        assert_eq!(book.doors.len(), 1);
        assert_eq!(book.forget(now + Duration::from_secs(90)), [(door(false), again)]);
        assert!(book.doors.is_empty());
    }
}
