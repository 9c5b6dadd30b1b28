//! `handle(bytes, now) -> Decision`.

use std::collections::HashMap;
use std::net::IpAddr;

use super::tries::Tries;
use super::{
    Candidate, Counters, Floor, Fresh, Index, Key, Ledger, Reason, Registry, Reservation, Secrets, Service,
    SourcePolicy, User, knockknock,
};
use crate::crypto::{Binding, KnockKey, Opened, PublicKey};
use crate::packet::Syn;
use crate::service::{Name, Port};

/// Seconds either way that are looked up while wrong tags abound.
const NARROW: u64 = 5;

/// What became of one packet.
#[derive(Debug)]
pub enum Decision {
    /// Nothing happens.
    Refused(Refusal),
    /// A knock: make its counter durable with [`Claim::record`], then [`Verifier::settle`] it.
    Claimed(Claim),
    /// An accepted unbound token came from a second address: close what it opened.
    Withdrawn(Withdrawal),
}

/// A packet that opened nothing.
#[derive(PartialEq, Eq, Debug)]
pub struct Refusal {
    /// Why.
    pub reason: Reason,
    /// Whose key it had to do with, where that is known.
    pub user: Option<Name>,
    /// Who sent it, where that could be read.
    pub source: Option<IpAddr>,
}

/// A token that opened, with its counter reserved in memory.
#[derive(PartialEq, Eq, Debug)]
pub struct Claim {
    opened: Opened,
    reservation: Reservation,
    source: IpAddr,
}

/// A claim whose counter is durable.
#[derive(PartialEq, Eq, Debug)]
pub struct Recorded {
    opened: Opened,
    fresh: Fresh,
    source: IpAddr,
}

/// What is opened, for whom: made only of a token that opened and a counter that is durable.
#[derive(PartialEq, Eq, Debug)]
#[expect(clippy::manual_non_exhaustive, reason = "sealed against this crate too, which the attribute is not")]
pub struct Grant {
    /// Who knocked.
    pub user: Name,
    /// What for.
    pub service: Name,
    /// From where: the only address that may come in.
    pub source: IpAddr,
    /// Which ports it may reach.
    pub ports: Vec<Port>,
    /// For how many seconds it may make new connections.
    pub open_for: u32,
    /// Only one connection.
    pub once: bool,
    /// The token was bound to the source, so nobody else can have sent it.
    pub bound: bool,
    /// Nothing but [`Grant::new`], which wants both proofs, can fill this in.
    _earned: (),
}

/// A grant to take back.
#[derive(PartialEq, Eq, Debug)]
pub struct Withdrawal {
    /// Whose token was spent twice.
    pub user: Name,
    /// The address that it was granted to.
    pub source: IpAddr,
    /// The other address that it came from.
    pub elsewhere: IpAddr,
    /// The ports that were opened.
    pub ports: Vec<Port>,
}

/// A packet that bears nobody's token, and the counters that it bore a wrong tag for.
struct Miss {
    refusal: Refusal,
    wrong_tags: Vec<(PublicKey, u64)>,
}

impl Claim {
    /// Gives it up; its counter stays taken.
    pub const fn refuse(&self, reason: Reason) -> Refusal {
        Refusal::of(reason, None, Some(self.source))
    }

    /// Makes the counters of a batch durable.
    ///
    /// # Errors
    /// The refusals of the whole batch, and the ledger's error: none of it may have any effect, now or later.
    pub fn record<L: Ledger>(batch: Vec<Self>, ledger: &mut L) -> Result<Vec<Recorded>, (Vec<Refusal>, L::Error)> {
        let refuse = |claim: &(Opened, IpAddr)| Refusal::of(Reason::NotDurable, None, Some(claim.1));
        let (claims, reservations): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|claim| ((claim.opened, claim.source), claim.reservation)).unzip();
        match Fresh::record(reservations, ledger) {
            Ok(fresh) => Ok(claims
                .into_iter()
                .zip(fresh)
                .map(|((opened, source), fresh)| Recorded { opened, fresh, source })
                .collect()),
            Err(error) => Err((claims.iter().map(refuse).collect(), error)),
        }
    }
}

impl Refusal {
    const fn of(reason: Reason, user: Option<Name>, source: Option<IpAddr>) -> Self {
        Self { reason, user, source }
    }
}

impl Grant {
    fn new(recorded: &Recorded, user: &User, service: &Service, now: u64) -> Option<Self> {
        let Recorded { opened, fresh, source } = recorded;
        let is_of_one_knock = opened.n() == fresh.n() && *fresh.client() == user.public_key;
        (is_of_one_knock && opened.port() == service.selector).then(|| Self {
            user: user.name.clone(),
            service: service.name.clone(),
            source: *source,
            ports: service.ports.clone(),
            open_for: user.time_for(service, now),
            once: service.once,
            bound: opened.binding() != Binding::Unbound,
            _earned: (),
        })
    }
}

/// The state of the decision: who may, what was spent, what the index expects next.
pub struct Verifier {
    registry: Registry,
    keys: Vec<Key>,
    /// Places of the users in the registry, by key.
    places: HashMap<PublicKey, usize>,
    index: Index,
    counters: Counters,
    tries: Tries,
}

impl Verifier {
    /// Starts from the configuration and from the last accepted counters.
    pub fn new(registry: Registry, last: &HashMap<PublicKey, u64>, now: u64) -> Self {
        let keys: Vec<Key> = registry.users.iter().map(|user| user.secrets.key()).collect();
        let places = registry.users.iter().enumerate().map(|(place, user)| (user.public_key, place)).collect();
        let last = |user: &User| Some((user.public_key, user.last(last.get(&user.public_key).copied())?));
        let counters = Counters::new(registry.users.iter().filter_map(last).collect());
        let index = Index::new(&registry, &keys, now);
        let mut verifier = Self { registry, keys, places, index, counters, tries: Tries::default() };
        verifier.count();
        verifier
    }

    /// Takes no token up to this floor.
    #[must_use]
    pub fn above(mut self, floor: Floor) -> Self {
        self.counters.set_floor(floor);
        self
    }

    /// The floor that no token up to is taken.
    pub const fn floor(&self) -> Floor {
        self.counters.floor()
    }

    /// That floor where it keeps anybody out: knockknock profiles go by their count.
    pub fn effective_floor(&self) -> Floor {
        if self.registry.has_tokens() { self.floor() } else { Floor::default() }
    }

    /// Brings every knockknock profile's knocks into the index, from the one after the last accepted on.
    fn count(&mut self) {
        for (place, user) in self.registry.users.iter().enumerate() {
            if matches!(user.secrets, Secrets::Knockknock(_)) {
                let last = self.counters.last(&user.public_key);
                self.index.count(place, last.map_or(0, |last| last.saturating_add(1)));
            }
        }
    }

    /// Goes on as another verifier, by its registry, but with all that was learnt until now: what was spent, where tokens
    /// came from, wrong tags.
    pub fn succeed(&mut self, mut next: Self) {
        std::mem::swap(self, &mut next);
        self.counters.inherit(next.counters, |client| self.places.contains_key(client));
        self.tries = next.tries;
        self.count();
    }

    /// Moves the index on by at most `budget` keys; `true` if there may be more to do.
    ///
    /// If the clock has jumped, the index is made anew at once.
    pub fn advance(&mut self, now: u64, budget: usize) -> bool {
        if self.index.covers(now) {
            return self.index.advance(now, budget);
        }
        self.index = Index::new(&self.registry, &self.keys, now);
        self.count();
        false
    }

    /// Forgets what has left the window: sightings and tries. Call it about once a second.
    pub fn forget(&mut self, now: u64) {
        let oldest = now.saturating_sub(self.registry.window);
        self.counters.forget_before(oldest);
        self.tries.forget_before(oldest);
    }

    /// Whether so many wrong tags came that only clocks within a few seconds are looked up.
    pub fn is_narrowed(&self, now: u64) -> bool {
        self.tries.narrow_the_window(now)
    }

    /// The names of all users.
    pub fn users(&self) -> impl Iterator<Item = &Name> {
        self.registry.users.iter().map(|user| &user.name)
    }

    /// The last accepted counter of each user who has one.
    pub fn accepted(&self) -> impl Iterator<Item = (&Name, u64)> {
        self.registry.users.iter().filter_map(|user| Some((&user.name, self.counters.last(&user.public_key)?)))
    }

    /// How many knocks the index expects.
    pub fn live(&self) -> usize {
        self.index.len()
    }

    /// Decides on one packet, which starts at the IP header.
    pub fn handle(&mut self, packet: &[u8], now: u64) -> Decision {
        let syn = match Syn::parse(packet) {
            Ok(syn) => syn,
            Err(shape) => return Decision::Refused(Refusal::of(shape.into(), None, None)),
        };
        match self.find(&syn, now) {
            Ok((user, opened)) => self.accept(user, &opened, syn.source, now),
            Err(Miss { refusal, wrong_tags }) => {
                if !wrong_tags.is_empty() {
                    self.tries.count(&wrong_tags, now);
                }
                Decision::Refused(refusal)
            }
        }
    }

    /// Turns a durable claim into a grant, if policy still allows it.
    ///
    /// # Errors
    /// [`Reason::SpentTwice`], [`Reason::NotDurable`], [`Reason::NotPermitted`] or [`Reason::Expired`]; the counter stays spent.
    pub fn settle(&self, recorded: &Recorded, now: u64) -> Result<Grant, Refusal> {
        let Recorded { opened, fresh, source } = recorded;
        let refuse = |reason, user: Option<&User>| Refusal::of(reason, user.map(|u| u.name.clone()), Some(*source));
        let Some(user) = self.places.get(fresh.client()).and_then(|&place| self.registry.users.get(place)) else {
            return Err(refuse(Reason::NotPermitted, None));
        };
        self.counters.stands(fresh.client(), fresh.n()).map_err(|reason| refuse(reason, Some(user)))?;
        if user.expires.is_some_and(|expiry| now >= expiry) {
            return Err(refuse(Reason::Expired, Some(user)));
        }
        self.registry
            .permitted(user, opened.port())
            .and_then(|service| Grant::new(recorded, user, service, now))
            .ok_or_else(|| refuse(Reason::NotPermitted, Some(user)))
    }

    /// The user, by place, whose token this SYN bears.
    fn find(&self, syn: &Syn, now: u64) -> Result<(usize, Opened), Miss> {
        let mut refusal = Refusal::of(Reason::Unknown, None, Some(syn.source));
        let mut wrong_tags = Vec::new();
        for candidate in self.index.candidates(syn.sequence) {
            let place = candidate.user;
            let (Some(user), Some(key)) = (self.registry.users.get(place), self.keys.get(place)) else {
                continue;
            };
            let opened = match key {
                Key::Token(key) => self.open(syn, candidate, user, key, now),
                Key::Knockknock { key, knock_port } => knockknock::open(syn, candidate, user, key, *knock_port),
            };
            match opened {
                Ok(opened) => return Ok((place, opened)),
                Err(reason) => {
                    // Of an ancestor's knock 64 more bits must be right, which nobody tries out.
                    let is_try = reason == Reason::WrongTag && matches!(key, Key::Token(_));
                    let is_spent =
                        self.floor().covers(candidate.n) || self.counters.last(&user.public_key) >= Some(candidate.n);
                    if is_try && !is_spent {
                        wrong_tags.push((user.public_key, candidate.n));
                    }
                    refusal = Refusal::of(reason, Some(user.name.clone()), Some(syn.source));
                }
            }
        }
        Err(Miss { refusal, wrong_tags })
    }

    /// The checks between an index hit and an opened token, in the protocol's order.
    fn open(&self, syn: &Syn, candidate: Candidate, user: &User, key: &KnockKey, now: u64) -> Result<Opened, Reason> {
        let Candidate { n, port, .. } = candidate;
        if self.tries.narrow_the_window(now) && n.abs_diff(now) > NARROW {
            return Err(Reason::Narrowed);
        }
        if self.tries.are_exhausted(&user.public_key, n) {
            return Err(Reason::Exhausted);
        }
        if key.pad(n).knock_port(&self.registry.knock_ports) != syn.destination_port {
            return Err(Reason::WrongKnockPort);
        }
        if !user.may_come_from(syn.source) {
            return Err(Reason::SourceNotAllowed);
        }
        let tsval = syn.tsval.ok_or(Reason::NoTimestamp)?;
        let bound = key.open(n, port, tsval, Binding::Bound(syn.source));
        let unbound = || key.open(n, port, tsval, Binding::Unbound);
        match user.source {
            SourcePolicy::Any => bound.or_else(unbound),
            SourcePolicy::Bound => bound,
        }
        .ok_or(Reason::WrongTag)
    }

    /// The counter rule, on a token whose tag held.
    fn accept(&mut self, place: usize, opened: &Opened, source: IpAddr, now: u64) -> Decision {
        let Some(user) = self.registry.users.get(place) else {
            return Decision::Refused(Refusal::of(Reason::NotPermitted, None, Some(source)));
        };
        let refuse = |reason| Decision::Refused(Refusal::of(reason, Some(user.name.clone()), Some(source)));
        let (key, n, window) = (user.public_key, opened.n(), self.registry.window);
        let is_token = matches!(user.secrets, Secrets::Token(_));
        let at = if is_token { n } else { self.counters.second(&key, now, window) };
        if is_token && at.abs_diff(now) > window {
            return refuse(Reason::OutsideWindow);
        }
        if is_token && self.counters.is_in_doubt(&key, n) {
            return refuse(Reason::InDoubt);
        }
        if at.saturating_sub(now) > window && self.counters.last(&key) < Some(n) {
            // It is spent, or the counts would part.
            self.counters.skip(&key, n);
            self.index.count(place, n.saturating_add(1));
            return refuse(Reason::TooFast);
        }
        let reason = match self.counters.reserve(&key, opened, source, at) {
            Ok(reservation) => {
                if !is_token {
                    self.counters.stand_for(&key, at);
                    self.index.count(place, n.saturating_add(1));
                }
                return Decision::Claimed(Claim { opened: *opened, reservation, source });
            }
            Err(reason) => reason,
        };
        let Some(first) = self.counters.withdraw(&key, n, source) else {
            return refuse(reason);
        };
        let service = self.registry.permitted(user, opened.port());
        Decision::Withdrawn(Withdrawal {
            user: user.name.clone(),
            source: first,
            elsewhere: source,
            ports: service.map(|service| service.ports.clone()).unwrap_or_default(),
        })
    }
}
