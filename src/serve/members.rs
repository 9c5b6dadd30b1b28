//! Who is in sets of the administrator's: the sources of doors, as long as these are open.

use std::collections::{BTreeSet, HashSet};
use std::time::{Duration, Instant};

use tracing::warn;

use super::book::{Book, Grant};
use super::policy::Policy;
use super::repeats::Tally;
use crate::nft::{Boot, Comment, Door, Doors, ElementError, Member, Open, SetName};
use crate::service::{Name, Port};

/// What makes a set that sources can be added to.
const HINT: &str = "nft add set FAMILY TABLE SET '{ type ipv4_addr; flags timeout; }', or ipv6_addr";

/// The elements in all of them.
pub struct Members {
    boot: Boot,
    book: Book<Seat>,
    /// The ports of all doors that had part in one, each once and for all connections.
    ports: BTreeSet<(Port, bool)>,
    not_added: Tally,
}

/// An element, for one of the doors that its source is in it for: where the set has no ports, there may be several.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Seat {
    member: Member,
    door: Door,
}

impl Members {
    /// Nobody, yet.
    pub fn new(boot: Boot) -> Self {
        Self { boot, book: Book::default(), ports: BTreeSet::new(), not_added: Tally::default() }
    }

    /// What a door's source is in these sets. One that is missing, or cannot take a source, is told of.
    pub fn of(&mut self, sets: &[SetName], user: &Name, door: &Door, doors: &mut Doors) -> Vec<Member> {
        let mut members = Vec::new();
        for set in sets {
            match doors.member(set, door) {
                Ok(member) => members.extend(member),
                Err(error) if self.not_added.is_first() => {
                    warn!(%user, source = %door.source, hint = HINT, "not added: {error}");
                }
                Err(_) => {}
            }
        }
        members
    }

    /// Adds a door's source to the sets that its grant has part in.
    pub fn join(&mut self, door: &Door, grant: &Grant, now: Instant, doors: &mut Doors) {
        for member in &grant.members {
            let note = Grant { members: Vec::new(), ..grant.clone() };
            self.ports.insert((door.port, door.once));
            if self.book.note(Seat { member: member.clone(), door: *door }, note, false, now).is_some() {
                self.put(member, now, doors);
            } else {
                self.not_added.is_first(); // told together
            }
        }
    }

    /// Takes it out of them again, unless another grant or door keeps it in.
    pub fn leave(&mut self, door: &Door, grant: &Grant, now: Instant, doors: &mut Doors) {
        for member in &grant.members {
            self.book.strike_grant(&Seat { member: member.clone(), door: *door }, grant);
            self.put(member, now, doors);
        }
    }

    /// Takes sources out, whichever door they are in for.
    pub fn strike(&mut self, is_meant: impl Fn(&Member, &Grant) -> bool, now: Instant, doors: &mut Doors) {
        for (seat, _) in self.book.strike_all(|seat, grant| is_meant(&seat.member, grant)) {
            self.put(&seat.member, now, doors);
        }
    }

    /// The administrator has made sets anew: who is let in belongs there.
    pub fn restore(&mut self, made: &HashSet<SetName>, now: Instant, doors: &mut Doors) {
        let standing = self.book.standing(now).map(|seat| &seat.member).filter(|member| made.contains(&member.set));
        let standing: HashSet<Member> = standing.cloned().collect();
        standing.iter().for_each(|member| self.put(member, now, doors));
    }

    /// Makes elements what the book says that others have added in the daemon's name, to sets that it knows.
    pub fn settle(&mut self, loaded: &HashSet<Member>, policy: &Policy, doors: &mut Doors) {
        let known = policy.sets();
        let of_known = loaded.iter().filter(|member| known.contains(&member.set));
        of_known.for_each(|member| self.put(member, Instant::now(), doors));
    }

    /// The same for what is in the sets, but for those whose grant lives as far as their comments tell: the daemon of before
    /// may have added them.
    pub fn compare(&mut self, policy: &Policy, old_count: bool, doors: &mut Doors) {
        for set in policy.sets() {
            let now = Instant::now();
            match doors.members(set) {
                Ok(listed) => {
                    for Open { what: member, comment, left } in listed {
                        let counts =
                            |comment: Comment| comment.counts_until(left, old_count, &self.boot, now).is_some();
                        if !comment.is_none_or(counts) {
                            self.put(&member, Instant::now(), doors);
                        }
                    }
                }
                Err(ElementError::NoSet) => {}
                Err(error) if self.not_added.is_first() => {
                    warn!(%set, "who is in a set of yours is not known: {error}");
                }
                Err(_) => {}
            }
        }
    }

    /// Forgets what has run out, as the kernel has.
    pub fn forget(&mut self, now: Instant) {
        self.book.forget(now);
    }

    /// What could not be made as it should be, besides what was told.
    pub const fn not_added(&mut self) -> &mut Tally {
        &mut self.not_added
    }

    /// The grant that keeps a source in for longest, whichever door it is for.
    fn longest(&self, member: &Member, now: Instant) -> Option<(&Grant, Duration)> {
        let ports = self.ports.iter().filter(|(port, _)| member.port.is_none_or(|of_set| of_set == *port));
        let seats = ports
            .map(|&(port, once)| Seat { member: member.clone(), door: Door { source: member.source, port, once } });
        seats.filter_map(|seat| self.book.longest(&seat, now)).max_by_key(|(_, left)| *left)
    }

    /// Makes an element what the book says. The set may be gone, which is the administrator's to see to.
    fn put(&mut self, member: &Member, now: Instant, doors: &mut Doors) {
        let put = match self.longest(member, now) {
            Some((grant, left)) => doors.add_member(member, left, &grant.comment(&self.boot)),
            None => doors.delete_member(member),
        };
        if let Err(error) = put
            && self.not_added.is_first()
        {
            warn!(source = %member.source, set = %member.set, "not as it should be in a set of yours: {error}");
        }
    }
}

/// Says which sets are missing or cannot be used, before somebody knocks.
pub fn check(policy: &Policy, doors: &mut Doors) {
    for set in policy.sets() {
        if let Err(error) = doors.check_set(set) {
            warn!(hint = HINT, "who knocks is not added: {error}");
        }
    }
}
