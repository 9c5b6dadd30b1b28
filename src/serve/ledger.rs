//! Who holds which door until when, and in which of the administrator's sets: what the kernel's elements are to be.
//!
//! It asks nobody and does nothing: what happens is told to it, with the time; it says which elements are to change; whoever
//! changes them says whether the kernel took that. One element may stand for the holds of several users behind one address: it
//! has the longest time left, and taking one hold back leaves the others'.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::{Duration, Instant};

use crate::nft::{Boot, Comment, Door, Element, Member, SetName, Time};
use crate::service::Name;

/// Doors at most: what open4, open6, once4 and once6 hold.
pub const MAX_DOORS: usize = 4 * 65_535;

/// Holds of one door at most.
const MAX_GRANTS: usize = 1024;

/// Holds of one user for one service at one door at most: more knocks in a row push out those that end first.
const MAX_IN_A_ROW: usize = 16;

/// What one knock opened: one user's time at a door.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hold {
    /// Who knocked.
    pub user: Name,
    /// For what.
    pub service: Name,
    /// When it ends.
    pub until: Instant,
    /// By a token that was bound to the source, so that it is never taken back.
    pub bound: bool,
    /// The number of that token; `None` for a hold that was found.
    pub token: Option<u32>,
    /// Connections end with it.
    pub kill: bool,
    /// Of a door for one connection: it may have let that in, and lets in no other.
    pub spent: bool,
    /// Elements of the administrator's sets that it has part in.
    pub members: Vec<Member>,
    /// Nobody was told of it yet: so many seconds were asked for.
    pub asked: Option<u32>,
    /// The kernel has not taken it yet. Of a door for one connection, what it has taken may be gone since, and is never given again.
    pub waits: bool,
}

impl Hold {
    /// What the kernel's element says of it.
    fn comment(&self, boot: &Boot) -> Comment {
        let Self { user, service, until, bound, .. } = self;
        Comment { user: user.clone(), service: service.clone(), end: Some(boot.end(*until)), bound: *bound }
    }

    /// Its door lets nobody in any more; the elements that it leaves, if it never did.
    fn spend(&mut self) -> Vec<Member> {
        self.spent = true;
        if self.waits { std::mem::take(&mut self.members) } else { Vec::new() }
    }

    /// Another service of the same user's may have the same port, and time of its own.
    fn is_renewed_by(&self, other: &Self) -> bool {
        self.user == other.user && self.service == other.service
    }
}

/// All holds that live.
pub struct Ledger {
    boot: Boot,
    doors: BTreeMap<Door, Vec<Hold>>,
    /// Elements that are to be made what the holds say.
    unsettled: BTreeSet<Element>,
    /// The same, when the table is loaded.
    deferred: BTreeSet<Element>,
    /// No hold ends before.
    first_end: Option<Instant>,
}

impl Ledger {
    /// Nobody holds anything.
    pub const fn new(boot: Boot) -> Self {
        let doors = BTreeMap::new();
        Self { boot, doors, unsettled: BTreeSet::new(), deferred: BTreeSet::new(), first_end: None }
    }

    /// By whose clock elements say when they end.
    pub const fn boot(&self) -> &Boot {
        &self.boot
    }

    /// A hold is to open a door, or to renew it; `false` if there are too many.
    pub fn insert(&mut self, door: Door, hold: Hold) -> bool {
        let has_room = self.doors.len() < MAX_DOORS || self.doors.contains_key(&door);
        let is_in = has_room && self.push(door, hold);
        if is_in {
            self.mark(&door);
        }
        is_in
    }

    /// A hold was found that lives already.
    pub fn adopt(&mut self, door: Door, hold: Hold) -> bool {
        self.push(door, hold)
    }

    fn push(&mut self, door: Door, hold: Hold) -> bool {
        let holds = self.doors.entry(door).or_default();
        let has_room = holds.len() < MAX_GRANTS;
        if has_room {
            self.first_end = Some(self.first_end.map_or(hold.until, |first| first.min(hold.until)));
            holds.push(hold);
        }
        has_room
    }

    /// What a door's elements are may have changed, and those of the sets that its holds have part in.
    pub fn mark(&mut self, door: &Door) {
        let members = self.doors.get(door).into_iter().flatten().flat_map(|hold| &hold.members);
        self.unsettled.extend(Element::of(door).chain(members.cloned().map(Element::Member)));
    }

    fn mark_gone(&mut self, gone: &[(Door, Hold)]) {
        for (door, hold) in gone {
            self.unsettled.extend(Element::of(door).chain(hold.members.iter().cloned().map(Element::Member)));
        }
    }

    /// An element of the administrator's sets may be another than it should be.
    pub fn mark_member(&mut self, member: Member) {
        self.unsettled.insert(Element::Member(member));
    }

    /// The administrator has made sets anew: who is let in belongs there.
    pub fn mark_sets(&mut self, made: &HashSet<SetName>) {
        let members = self.doors.values().flatten().flat_map(|hold| &hold.members);
        let members = members.filter(|member| made.contains(&member.set)).cloned();
        self.unsettled.extend(members.map(Element::Member));
    }

    /// The table's doors are gone. Those for one connection may have let it in, unless the kernel had not taken them yet.
    pub fn lose_doors(&mut self) {
        let of_one = self.doors.iter_mut().filter(|(door, _)| door.once);
        of_one.flat_map(|(_, holds)| holds).filter(|hold| !hold.waits).for_each(|hold| hold.spent = true);
    }

    /// The table is there again, without its doors.
    pub fn mark_all(&mut self) {
        self.unsettled.extend(self.doors.keys().flat_map(Element::of));
    }

    /// What a door for one connection was opened for may have come.
    pub fn spend(&mut self, door: &Door) {
        for hold in self.doors.get_mut(door).into_iter().flatten() {
            self.unsettled.extend(hold.spend().into_iter().map(Element::Member));
        }
    }

    /// What is to be changed next, at most so many elements: how long each is to have, or that it is to go. Doors come first.
    pub fn take(&mut self, most: usize, now: Instant) -> Vec<(Element, Option<Time>)> {
        let is_member = |element: &Element| matches!(element, Element::Member(_));
        let mut taken = Vec::new();
        while let Some(first) = self.unsettled.first()
            && taken.len() < most
            && taken.first().is_none_or(|(of_all, _)| is_member(of_all) == is_member(first))
            && let Some(element) = self.unsettled.pop_first()
        {
            let time = self.desired(&element, now);
            // What the kernel has of it is as it should be, or it was used.
            let is_taken = matches!(&element, Element::Opens(door) if door.once && !self.waits(door));
            if time.is_none() || !is_taken {
                taken.push((element, time));
            }
        }
        taken
    }

    /// For how long the holds want an element to be there.
    pub fn desired(&self, element: &Element, now: Instant) -> Option<Time> {
        let hold = match element {
            // A later one says how long the door stands that it opened, whatever those before it said.
            Element::Opens(door) if door.once => self.standing(door, now).rfind(|hold| !hold.spent),
            Element::Opens(door) => self.longest(door, now),
            Element::Lasts(door) => self.standing(door, now).filter(|hold| hold.kill).max_by_key(|hold| hold.until),
            Element::Member(member) => {
                let doors = self.doors.range(Door::first_of(member.source)..);
                let doors = doors.map(|(door, _)| door).take_while(|door| door.source == member.source);
                let holds = doors.flat_map(|door| self.standing(door, now));
                holds.filter(|hold| hold.members.contains(member)).max_by_key(|hold| hold.until)
            }
        };
        hold.map(|hold| {
            let left = hold.until.saturating_duration_since(now);
            // To the second that was asked for, which began a moment ago.
            let rest = if hold.asked.is_some() { left.as_millis().div_ceil(1000) } else { 0 };
            let asked = u64::try_from(rest).map_or(left, Duration::from_secs);
            (left.max(asked), hold.comment(&self.boot))
        })
    }

    /// The kernel has taken an element's change: the holds that waited for it.
    pub fn settled(&mut self, element: &Element) -> Vec<(Door, Hold)> {
        let Element::Opens(door) = element else { return Vec::new() };
        let told = self.tell(door);
        self.doors.get_mut(door).into_iter().flatten().for_each(|hold| hold.waits = false);
        told
    }

    /// The holds that nobody was told of, and that take the place of those before them.
    fn tell(&mut self, door: &Door) -> Vec<(Door, Hold)> {
        let Some(holds) = self.doors.get_mut(door) else { return Vec::new() };
        let (mut told, mut is_shorter, mut left) = (Vec::new(), false, Vec::new());
        for place in 0..holds.len() {
            let Some(hold) = holds.get_mut(place).filter(|hold| hold.asked.is_some()) else { continue };
            told.push((*door, hold.clone()));
            hold.asked = None;
            let hold = hold.clone();
            let earlier = holds.iter_mut().take(place);
            if door.once {
                earlier.for_each(|other| left.append(&mut other.spend()));
            } else {
                // What an earlier knock said holds no longer than what this one says: more may not be permitted any more.
                for other in earlier.filter(|other| other.is_renewed_by(&hold) && other.until > hold.until) {
                    other.until = hold.until;
                    is_shorter = true;
                }
            }
        }
        told.iter().for_each(|(_, hold)| forget_first(holds, hold));
        self.unsettled.extend(left.into_iter().map(Element::Member));
        if is_shorter {
            self.mark(door);
        }
        told
    }

    /// The kernel has refused an element's change: the holds that waited for it are none.
    pub fn refused(&mut self, element: &Element) -> Vec<(Door, Hold)> {
        let (Element::Opens(door) | Element::Lasts(door)) = element else { return Vec::new() };
        self.take_from(door, |hold| hold.asked.is_some())
    }

    fn take_from(&mut self, door: &Door, is_meant: impl Fn(&Hold) -> bool) -> Vec<(Door, Hold)> {
        let Some(holds) = self.doors.get_mut(door) else { return Vec::new() };
        let gone: Vec<_> = holds.extract_if(.., |hold| is_meant(hold)).map(|hold| (*door, hold)).collect();
        if holds.is_empty() {
            self.doors.remove(door);
        }
        self.mark_gone(&gone);
        gone
    }

    /// An element is to be changed when the table is loaded: the holds that waited for it wait on, and are told.
    pub fn defer(&mut self, element: Element) -> Vec<(Door, Hold)> {
        let told = if let Element::Opens(door) = &element { self.tell(door) } else { Vec::new() };
        self.deferred.insert(element);
        told
    }

    /// Whether there is room for one more of these.
    pub fn may_defer(&self) -> bool {
        self.deferred.len() < 2 * MAX_DOORS
    }

    /// The table is loaded.
    pub fn resume(&mut self) {
        self.unsettled.append(&mut self.deferred);
    }

    /// Takes back what a token of a user's opened; tells it, and whether the user holds the door no more.
    pub fn withdraw(&mut self, door: &Door, user: &Name, token: u32, now: Instant) -> Option<(Hold, bool)> {
        let gone = self.take_from(door, |hold| hold.user == *user && hold.token == Some(token));
        let (_, gone) = gone.into_iter().next_back()?;
        let is_last = !self.standing(door, now).any(|hold| hold.is_renewed_by(&gone));
        Some((gone, is_last))
    }

    /// Takes every such hold back, and tells them.
    pub fn remove(&mut self, is_meant: impl Fn(&Door, &Hold) -> bool) -> Vec<(Door, Hold)> {
        let gone = self.extract(is_meant);
        self.mark_gone(&gone);
        gone
    }

    fn extract(&mut self, is_meant: impl Fn(&Door, &Hold) -> bool) -> Vec<(Door, Hold)> {
        let gone = self.doors.iter_mut().flat_map(|(door, holds)| {
            let gone: Vec<Hold> = holds.extract_if(.., |hold| is_meant(door, hold)).collect();
            gone.into_iter().map(|hold| (*door, hold))
        });
        let gone: Vec<_> = gone.collect();
        if !gone.is_empty() {
            self.doors.retain(|_, holds| !holds.is_empty());
        }
        gone
    }

    /// Somebody has deleted a door: nobody holds it any more.
    pub fn remove_door(&mut self, door: &Door) -> Vec<(Door, Hold)> {
        let gone = self.doors.remove(door).unwrap_or_default().into_iter().map(|hold| (*door, hold));
        let gone: Vec<_> = gone.collect();
        self.mark_gone(&gone);
        gone
    }

    /// Takes sources out of sets that these users' holds may have no part in any more.
    pub fn remove_members(&mut self, may_be_in: impl Fn(&Hold, &Member) -> bool) {
        for hold in self.doors.values_mut().flatten() {
            let (kept, gone) =
                std::mem::take(&mut hold.members).into_iter().partition(|member| may_be_in(hold, member));
            hold.members = kept;
            self.unsettled.extend(Vec::into_iter(gone).map(Element::Member));
        }
    }

    /// Forgets what has run out, as the kernel has, and tells that of which nothing is left. Call it now and then: it looks at all
    /// only if something may have.
    pub fn forget(&mut self, now: Instant) -> Vec<(Door, Hold)> {
        if self.first_end.is_none_or(|first| first > now) {
            return Vec::new();
        }
        let mut over = self.extract(|_, hold| hold.until <= now);
        over.retain(|(door, over)| !self.standing(door, now).any(|left| left.is_renewed_by(over)));
        self.first_end = self.doors.values().flatten().map(|hold| hold.until).min();
        over
    }

    /// The holds of a door that have time left.
    fn standing(&self, door: &Door, now: Instant) -> impl DoubleEndedIterator<Item = &Hold> {
        self.doors.get(door).into_iter().flatten().filter(move |hold| hold.until > now)
    }

    /// Whether the hold by which a connection may begin is one that the kernel has not taken yet.
    fn waits(&self, door: &Door) -> bool {
        let holds = self.doors.get(door).into_iter().flatten();
        holds.rev().find(|hold| !hold.spent).is_some_and(|hold| hold.waits)
    }

    /// The hold that keeps a door open for longest, or what it has let in.
    fn longest(&self, door: &Door, now: Instant) -> Option<&Hold> {
        self.standing(door, now).max_by_key(|hold| hold.until)
    }

    /// Whether there is something to [`Ledger::take`].
    pub fn is_unsettled(&self) -> bool {
        !self.unsettled.is_empty()
    }

    /// The doors that somebody holds, or has used, and the time that each has left.
    pub fn ends(&self, now: Instant) -> impl Iterator<Item = (&Door, Duration)> {
        self.doors.keys().filter_map(move |door| {
            let hold = self.longest(door, now)?;
            Some((door, hold.until.saturating_duration_since(now)))
        })
    }

    /// Whether anybody holds a door.
    pub fn is_held(&self, door: &Door, now: Instant) -> bool {
        self.longest(door, now).is_some()
    }

    /// The doors that are open, or were and may have been spent, each with the hold that keeps it open for longest.
    pub fn live(&self, now: Instant) -> impl Iterator<Item = (&Door, &Hold, Duration)> {
        self.doors.keys().filter_map(move |door| {
            let fresh = self.standing(door, now).filter(|hold| !hold.spent).max_by_key(|hold| hold.until);
            let hold = fresh.or_else(|| self.longest(door, now))?;
            Some((door, hold, hold.until.saturating_duration_since(now)))
        })
    }
}

/// Of a user's holds for one service at one door, those that end first make room, but not the last one.
fn forget_first(holds: &mut Vec<Hold>, last: &Hold) {
    let count = |holds: &[Hold]| holds.iter().filter(|hold| hold.is_renewed_by(last)).count();
    while count(holds) > MAX_IN_A_ROW {
        let earlier = holds.iter().enumerate().filter(|(_, hold)| hold.is_renewed_by(last)).rev().skip(1);
        let Some((first, _)) = earlier.min_by_key(|(_, hold)| hold.until) else { return };
        holds.remove(first);
    }
}

#[cfg(test)]
mod tests {
    use super::{Boot, Door, Duration, Element, Hold, Instant, Ledger, MAX_IN_A_ROW, Name};

    fn ledger() -> Ledger {
        Ledger::new(Boot::this().unwrap())
    }

    fn door(once: bool) -> Door {
        Door { source: "192.0.2.1".parse().unwrap(), port: "tcp/22".parse().unwrap(), once }
    }

    fn hold(user: &str, token: u32, now: Instant, seconds: u32) -> Hold {
        let [user, service]: [Name; 2] = [user, "ssh"].map(|name| name.parse().unwrap());
        let until = now + Duration::from_secs(seconds.into());
        let (token, asked, members) = (Some(token), Some(seconds), Vec::new());
        Hold { user, service, until, bound: false, token, kill: false, spent: false, members, asked, waits: true }
    }

    /// The kernel takes it.
    fn open(ledger: &mut Ledger, once: bool, hold: Hold, now: Instant) {
        assert!(ledger.insert(door(once), hold));
        let told: Vec<_> = ledger.take(64, now).iter().flat_map(|(element, _)| ledger.settled(element)).collect();
        assert_eq!(told.len(), 1, "{told:?}");
    }

    fn opens(ledger: &Ledger, once: bool, now: Instant) -> Option<u64> {
        ledger.desired(&Element::Opens(door(once)), now).map(|(left, _)| left.as_secs())
    }

    fn lasts(ledger: &Ledger, now: Instant) -> Option<u64> {
        ledger.desired(&Element::Lasts(door(true)), now).map(|(left, _)| left.as_secs())
    }

    #[test]
    fn taking_a_token_back_leaves_what_others_of_the_same_user_and_service_opened_in_any_order() {
        let now = Instant::now();
        for order in [[1, 2, 3], [1, 3, 2], [2, 1, 3], [2, 3, 1], [3, 1, 2], [3, 2, 1]] {
            let mut ledger = ledger();
            (1..=3).for_each(|token| open(&mut ledger, false, hold("alice", token, now, 10 * token), now));
            for (gone, token) in order.into_iter().enumerate() {
                let longest = order[gone + 1..].iter().max().map(|token| 10 * u64::from(*token));
                let (_, is_last) = ledger.withdraw(&door(false), &"alice".parse().unwrap(), token, now).unwrap();
                assert_eq!((opens(&ledger, false, now), is_last), (longest, longest.is_none()), "{token} of {order:?}");
                assert!(ledger.withdraw(&door(false), &"alice".parse().unwrap(), token, now).is_none(), "twice");
            }
        }
    }

    #[test]
    fn a_later_knock_says_how_long_the_earlier_ones_of_its_user_and_service_hold_and_no_others() {
        let (mut ledger, now) = (ledger(), Instant::now());
        open(&mut ledger, false, hold("alice", 1, now, 60), now);
        open(&mut ledger, false, Hold { service: "rescue".parse().unwrap(), ..hold("alice", 2, now, 50) }, now);
        open(&mut ledger, false, hold("bob", 1, now, 40), now);
        assert_eq!(opens(&ledger, false, now), Some(60));
        open(&mut ledger, false, hold("alice", 3, now, 10), now);
        assert_eq!(opens(&ledger, false, now), Some(50));
        ledger.withdraw(&door(false), &"alice".parse().unwrap(), 3, now).unwrap();
        ledger.remove(|_, hold| hold.service.as_str() == "rescue" || hold.user.as_str() == "bob");
        assert_eq!(opens(&ledger, false, now), Some(10), "60 may be permitted no more");
    }

    #[test]
    fn what_a_door_for_one_connection_let_in_lasts_as_its_own_grant_does_whoever_knocks_after() {
        let (mut ledger, now) = (ledger(), Instant::now());
        for (user, token, seconds, kill, expected) in [
            ("alice", 1, 60, true, Some(60)),
            ("bob", 1, 90, false, Some(60)), // whose service lets connections live
            ("bob", 2, 30, true, Some(60)),
            ("alice", 2, 10, true, Some(60)),
        ] {
            open(&mut ledger, true, Hold { kill, ..hold(user, token, now, seconds) }, now);
            assert_eq!(
                (opens(&ledger, true, now), lasts(&ledger, now)),
                (Some(seconds.into()), expected),
                "{user} {token}"
            );
        }
        assert!(ledger.insert(door(true), Hold { kill: true, ..hold("carol", 1, now, 100) }));
        assert_eq!(ledger.refused(&Element::Lasts(door(true))).len(), 1);
        assert_eq!((opens(&ledger, true, now), lasts(&ledger, now)), (Some(10), Some(60)), "as if nothing had been");
        let (_, is_last) = ledger.withdraw(&door(true), &"alice".parse().unwrap(), 2, now).unwrap();
        assert!(!is_last, "she is there still");
        assert_eq!((opens(&ledger, true, now), lasts(&ledger, now)), (None, Some(60)));
        assert!(ledger.withdraw(&door(true), &"alice".parse().unwrap(), 1, now).unwrap().1);
        assert_eq!(lasts(&ledger, now), Some(30));
        ledger.lose_doors();
        assert_eq!((opens(&ledger, true, now), lasts(&ledger, now)), (None, Some(30)), "what it let in is to last");
    }

    #[test]
    fn of_many_knocks_in_a_row_those_are_remembered_that_end_last_and_none_is_refused() {
        for once in [false, true] {
            let (mut ledger, now) = (ledger(), Instant::now());
            for token in 0..100 {
                open(&mut ledger, once, Hold { kill: true, ..hold("alice", token, now, 200 - token) }, now);
            }
            assert_eq!(ledger.doors[&door(once)].len(), MAX_IN_A_ROW);
            assert_eq!(opens(&ledger, once, now), Some(101), "as the last one says");
            assert_eq!(lasts(&ledger, now), once.then_some(200));
        }
    }

    #[test]
    fn what_has_run_out_is_told_once_when_nothing_of_it_is_left() {
        let (mut ledger, now) = (ledger(), Instant::now());
        for once in [false, true] {
            open(&mut ledger, once, hold("alice", 1, now, 10), now);
            open(&mut ledger, once, hold("bob", 1, now, 20), now);
            open(&mut ledger, once, hold("alice", 2, now, 60), now);
        }
        let mut over = |seconds| {
            let over = ledger.forget(now + Duration::from_secs(seconds));
            over.iter().map(|(_, hold)| hold.user.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(over(10), [""; 0], "her later knock holds both open");
        assert_eq!(over(20), ["bob"; 2]);
        assert_eq!(over(60), ["alice"; 2]);
        assert!(over(61).is_empty() && ledger.doors.is_empty());
    }
}
