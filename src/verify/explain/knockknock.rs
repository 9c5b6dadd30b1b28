//! Which knock of a knockknock profile a refused packet was: by its count, for there is no time in it.

use std::collections::HashMap;

use super::{Cause, Suspect};
use crate::crypto::knockknock::{Key, LAST, WINDOW};
use crate::service::Name;
use crate::verify::knockknock::token;
use crate::verify::{Reason, Registry};

/// Knocks before and after the server's count that are looked at.
const AROUND: u64 = 10_000;

/// A knock that a packet is: all of its bits are right.
#[derive(Clone, Copy)]
pub(super) struct Counted {
    /// Place of whose it is.
    pub(super) user: usize,
    /// The port that it asks for.
    pub(super) selector: u16,
    /// The only one that it may come to.
    pub(super) knock_port: u16,
    n: u64,
    /// The next that the server takes.
    next: u64,
    /// The daemon says so, and not the user's entry alone.
    is_known: bool,
}

/// A user's profile, as it is searched with.
pub(super) struct Profile<'a> {
    /// Their place.
    pub(super) user: usize,
    /// Keyed.
    pub(super) key: &'a Key,
    /// Where it knocks.
    pub(super) knock_port: u16,
    /// The next knock that the server takes.
    pub(super) next: u64,
    /// The daemon says so, and not the user's entry alone.
    pub(super) is_known: bool,
}

/// The places of those with this sequence number.
pub(super) fn by_sequence(suspects: &[Suspect<'_>]) -> HashMap<u32, Vec<usize>> {
    let mut places: HashMap<u32, Vec<usize>> = HashMap::new();
    for (place, suspect) in suspects.iter().enumerate() {
        places.entry(suspect.syn.sequence).or_default().push(place);
    }
    places
}

impl Profile<'_> {
    /// Looks for this profile's knocks: for a service that there is, anywhere around the count, and for any port, among those
    /// that the server looks at.
    pub(super) fn search(&self, registry: &Registry, places: &HashMap<u32, Vec<usize>>, suspects: &mut [Suspect<'_>]) {
        let Self { key, next, .. } = *self;
        for counter in counters(next.saturating_sub(AROUND), next.saturating_add(AROUND)) {
            for service in &registry.services {
                let sequence = key.seal(counter, service.selector).sequence;
                for &place in places.get(&sequence).into_iter().flatten() {
                    suspects.get_mut(place).into_iter().for_each(|suspect| self.try_on(suspect, counter));
                }
            }
        }
        for suspect in suspects.iter_mut().filter(|suspect| suspect.syn.destination_port == self.knock_port) {
            counters(next, next.saturating_add(WINDOW)).for_each(|counter| self.try_on(suspect, counter));
        }
    }

    fn try_on(&self, suspect: &mut Suspect<'_>, counter: u32) {
        let Self { user, key, knock_port, next, is_known } = *self;
        if let Some(selector) = token(&suspect.syn).and_then(|token| key.port(counter, &token)) {
            suspect.counted = Some(Counted { user, selector, knock_port, n: counter.into(), next, is_known });
        }
    }
}

/// Counters from one up to another.
fn counters(from: u64, to: u64) -> impl Iterator<Item = u32> {
    (from..to.min(LAST + 1)).filter_map(|n| u32::try_from(n).ok())
}

impl Counted {
    /// What is wrong with its count, if something is.
    pub(super) fn cause(&self, user: &Name, reason: Reason) -> Option<Cause> {
        let Self { n, next, is_known, .. } = *self;
        let user = user.clone();
        // Nobody can tell then whether the knock is new, so its number must not become the count.
        if !is_known && reason == Reason::Unknown {
            return Some(Cause::NotCounted { user });
        }
        if n >= next.saturating_add(WINDOW) {
            return Some(Cause::CountAhead { user, knocks: n - next, next: n.saturating_add(1) });
        }
        let is_behind = matches!(reason, Reason::Unknown | Reason::Replayed | Reason::Superseded) && n < next;
        is_behind.then(|| Cause::CountBehind { knocks: next - n, next })
    }
}
