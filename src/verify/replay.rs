//! A counter is accepted once: the rule, and the proof that it was kept (docs/protocol.md section 2).

use std::collections::HashMap;
use std::net::IpAddr;

use super::{Floor, Reason};
use crate::crypto::{Binding, Opened, PublicKey};

/// A counter that was taken in memory and is not durable yet. Only [`Counters::reserve`] makes one.
#[derive(PartialEq, Eq, Debug)]
pub struct Reservation {
    client: PublicKey,
    n: u64,
}

impl Reservation {
    /// Whose counter it is.
    pub const fn client(&self) -> &PublicKey {
        &self.client
    }

    /// The counter.
    pub const fn n(&self) -> u64 {
        self.n
    }
}

/// Where last counters are kept for ever.
pub trait CounterLog {
    /// Why a write failed.
    type Error;

    /// Makes these counters the last of their keys, durably and all or none; never lowers one.
    ///
    /// # Errors
    /// When it cannot be sure that they would survive a loss of power.
    fn record<'a>(&mut self, batch: impl Iterator<Item = &'a Reservation>) -> Result<(), Self::Error>;
}

/// Proof that a counter was accepted and is durable. Only a [`CounterLog`]'s success makes one.
#[derive(PartialEq, Eq, Debug)]
pub struct Fresh(Reservation);

impl Fresh {
    /// Records a batch in the log.
    ///
    /// # Errors
    /// The log's: then none of the counters has any effect as long as this process lives.
    pub fn record<L: CounterLog>(batch: Vec<Reservation>, log: &mut L) -> Result<Vec<Self>, L::Error> {
        log.record(batch.iter())?;
        Ok(batch.into_iter().map(Self).collect())
    }

    /// Whose counter it is.
    pub const fn client(&self) -> &PublicKey {
        &self.0.client
    }

    /// The counter.
    pub const fn n(&self) -> u64 {
        self.0.n
    }
}

/// What is known of the counters of every key: the last accepted, and the sightings of those within the window.
#[derive(Default)]
pub struct Counters {
    last: HashMap<PublicKey, u64>,
    floor: Floor,
    recent: HashMap<(PublicKey, u64), Sighting>,
    /// The last second that a knock of the ancestor's stands for.
    seconds: HashMap<PublicKey, u64>,
}

/// Where a token came from that was spent.
struct Sighting {
    /// The Unix second that it stands for: the counter of a token; a knock of the ancestor's is given one ([`Counters::next_slot`]).
    at: u64,
    source: IpAddr,
    unbound: bool,
    /// It opens something, or did: it was neither refused nor withdrawn.
    opens: bool,
}

impl Counters {
    /// Starts from what the log holds.
    pub fn new(last: HashMap<PublicKey, u64>) -> Self {
        Self { last, ..Self::default() }
    }

    /// The same, where the log may have forgotten counters of tokens.
    pub const fn set_floor(&mut self, floor: Floor) {
        self.floor = floor;
    }

    /// Up to where the log may have forgotten counters of tokens.
    pub const fn floor(&self) -> Floor {
        self.floor
    }

    /// Whether a token's counter may have been accepted, and is not known to be.
    pub fn is_in_doubt(&self, client: &PublicKey, n: u64) -> bool {
        self.floor.covers(n) && self.last(client) < Some(n) && !self.recent.contains_key(&(*client, n))
    }

    /// Takes over every sighting, and what is known of the keys that still count: more than the log may know, for what
    /// could not be made durable is taken all the same.
    pub fn inherit(&mut self, before: Self, counts: impl Fn(&PublicKey) -> bool) {
        for (client, n) in before.last.into_iter().filter(|(client, _)| counts(client)) {
            let last = self.last.entry(client).or_default();
            *last = n.max(*last);
        }
        self.recent = before.recent;
        self.seconds = before.seconds;
    }

    /// The last accepted counter of a key.
    pub fn last(&self, client: &PublicKey) -> Option<u64> {
        self.last.get(client).copied()
    }

    /// Takes the counter of an opened token, if it is above the key's last: of one that `opens` what it is for, or of one that
    /// is only spent. `at` is the Unix second that it stands for.
    ///
    /// # Errors
    /// [`Reason::Replayed`] or [`Reason::Superseded`].
    pub fn reserve(
        &mut self,
        client: &PublicKey,
        opened: &Opened,
        source: IpAddr,
        at: u64,
        opens: bool,
    ) -> Result<Reservation, Reason> {
        let n = opened.n();
        // What was seen counts also where the last is not known any more: of a user who was removed and is back.
        if self.last(client) == Some(n) || self.recent.contains_key(&(*client, n)) {
            return Err(Reason::Replayed);
        }
        if self.last(client) > Some(n) {
            return Err(Reason::Superseded);
        }
        self.last.insert(*client, n);
        let unbound = opened.binding() == Binding::Unbound;
        self.recent.insert((*client, n), Sighting { at, source, unbound, opens });
        Ok(Reservation { client: *client, n })
    }

    /// The Unix second that the next knock of the ancestor's is to stand for: its own, as a token's, so that no more of them
    /// count than of tokens. It is never before `now`; if it is beyond the window, there were too many.
    pub fn next_slot(&self, client: &PublicKey, now: u64, window: u64) -> u64 {
        let last = self.seconds.get(client).filter(|&&last| (now..=now.saturating_add(window)).contains(&last));
        last.map_or(now, |last| last.saturating_add(1))
    }

    /// Notes that a second has its knock.
    pub fn occupy(&mut self, client: &PublicKey, second: u64) {
        self.seconds.insert(*client, second);
    }

    /// Spends a counter that was not accepted, if it is above the key's last.
    pub fn burn(&mut self, client: &PublicKey, n: u64) {
        let last = self.last.entry(*client).or_default();
        *last = n.max(*last);
    }

    /// If this token, unbound and accepted before, now comes from another address than then: it opens nothing any more. Tells
    /// the first address, once.
    pub fn withdraw(&mut self, client: &PublicKey, n: u64, source: IpAddr) -> Option<IpAddr> {
        let sighting = self.recent.get_mut(&(*client, n))?;
        let is_news = sighting.unbound && sighting.opens && sighting.source != source;
        is_news.then(|| {
            sighting.opens = false;
            sighting.source
        })
    }

    /// Notes that an accepted token opened nothing after all, so that there is nothing to withdraw.
    pub fn refuse(&mut self, client: &PublicKey, n: u64) {
        if let Some(sighting) = self.recent.get_mut(&(*client, n)) {
            sighting.opens = false;
        }
    }

    /// The same, of all tokens of a client that were accepted so far.
    pub fn refuse_all(&mut self, client: &PublicKey) {
        self.recent.iter_mut().filter(|((of, _), _)| of == client).for_each(|(_, sighting)| sighting.opens = false);
    }

    /// Whether an accepted token still stands.
    ///
    /// # Errors
    /// [`Reason::SpentTwice`] if it was withdrawn since. [`Reason::NotDurable`] if its counter was written so late that
    /// nobody would know.
    pub fn is_live(&self, client: &PublicKey, n: u64) -> Result<(), Reason> {
        match self.recent.get(&(*client, n)) {
            None => Err(Reason::NotDurable),
            Some(sighting) if !sighting.opens => Err(Reason::SpentTwice),
            Some(_) => Ok(()),
        }
    }

    /// Forgets sightings that stand for a Unix second before this one; what was accepted stays accepted.
    pub fn forget_before(&mut self, oldest: u64) {
        self.recent.retain(|_, sighting| sighting.at >= oldest);
        self.seconds.retain(|_, second| *second >= oldest);
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::{Counters, Floor, Reason};
    use crate::crypto::{Binding, KnockKey, KnockSecrets, Opened, PrivateKey, Side};

    const SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    const ELSEWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));

    /// A user's key, and their unbound token of counter 7.
    fn opened() -> (PrivateKey, Opened) {
        let [own, server] = [(); 2].map(|()| PrivateKey::generate().unwrap());
        let key = KnockKey::new(&KnockSecrets::derive(Side::Client, &own, server.public(), None).unwrap());
        let token = key.seal(7, 22, Binding::Unbound);
        let opened = key.open(7, 22, token.tsval, Binding::Unbound).unwrap();
        (own, opened)
    }

    #[test]
    fn a_token_that_was_withdrawn_never_stands_again_also_when_it_is_forgotten() {
        let (own, opened) = opened();
        let mut counters = Counters::default();
        counters.reserve(own.public(), &opened, SOURCE, 7, true).unwrap();
        assert_eq!(counters.is_live(own.public(), 7), Ok(()));
        assert_eq!(counters.withdraw(own.public(), 7, ELSEWHERE), Some(SOURCE));
        assert_eq!(counters.is_live(own.public(), 7), Err(Reason::SpentTwice));
        counters.forget_before(8);
        assert_eq!(counters.is_live(own.public(), 7), Err(Reason::NotDurable));
    }

    #[test]
    fn a_token_that_was_refused_is_spent_and_leaves_nothing_to_withdraw() {
        let (own, opened) = opened();
        for is_refused_later in [false, true] {
            let mut counters = Counters::default();
            counters.reserve(own.public(), &opened, SOURCE, 7, is_refused_later).unwrap();
            counters.refuse(own.public(), 7);
            assert_eq!(counters.withdraw(own.public(), 7, ELSEWHERE), None);
            let again = counters.reserve(own.public(), &opened, ELSEWHERE, 7, true);
            assert_eq!(again.unwrap_err(), Reason::Replayed);
        }
    }

    #[test]
    fn a_counter_up_to_the_floor_is_in_doubt_unless_it_is_known_to_be_spent() {
        let (own, opened) = opened();
        let mut counters = Counters::default();
        counters.set_floor(Floor::new(7));
        assert!(counters.is_in_doubt(own.public(), 7) && !counters.is_in_doubt(own.public(), 8));
        counters.reserve(own.public(), &opened, SOURCE, 7, true).unwrap();
        assert!((0..=8).all(|n| !counters.is_in_doubt(own.public(), n)));
    }

    #[test]
    fn a_counter_that_was_seen_stays_taken_when_its_user_is_removed_and_comes_back() {
        let (own, opened) = opened();
        // The disk was full: no log knows the counter.
        let mut counters = Counters::default();
        counters.reserve(own.public(), &opened, SOURCE, 7, true).unwrap();
        let mut removed = Counters::default();
        removed.inherit(counters, |_| false);
        let mut back = Counters::default();
        back.inherit(removed, |_| true);
        assert_eq!(back.reserve(own.public(), &opened, SOURCE, 7, true).unwrap_err(), Reason::Replayed);
    }
}
