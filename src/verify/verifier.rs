//! `handle(bytes, now) -> Decision`.

use std::collections::HashMap;
use std::net::IpAddr;

use super::shares::Shares;
use super::tries::Tries;
use super::{
    Candidate, CounterLog, Counters, Floor, Fresh, Index, Key, Reason, Registry, Reservation, Secrets, Service,
    SourcePolicy, User, knockknock, open_for,
};
use crate::crypto::{Binding, KnockKey, Opened, PublicKey};
use crate::packet::Syn;
use crate::service::{Name, Port};

/// Seconds either way that count for a key while it has many wrong tags.
const NARROW: u64 = 5;

/// What became of one packet.
#[derive(Debug)]
pub enum Decision {
    /// Nothing happens.
    Refused(Refusal),
    /// A knock, or one that is only spent: make its counter durable with [`Claim::record`], then [`Verifier::settle`] it.
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

/// A token whose tag holds, with its counter reserved in memory.
#[derive(PartialEq, Eq, Debug)]
pub struct Claim {
    knock: Knock,
    reservation: Reservation,
    /// What bore it.
    packet: Vec<u8>,
}

/// A claim whose counter is durable.
#[derive(PartialEq, Eq, Debug)]
pub struct Recorded {
    knock: Knock,
    fresh: Fresh,
    /// What bore it.
    pub packet: Vec<u8>,
}

/// What is known of a knock when its counter is taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Knock {
    opened: Opened,
    source: IpAddr,
    /// Why it opens nothing, if so: [`Grant::new`] makes none. Its tag is checked and its counter taken all the same, or a copy
    /// could open it elsewhere, or later.
    refused: Option<Reason>,
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
    /// The token's number, by which a [`Withdrawal`] means it.
    pub token: u32,
    /// Nothing but [`Grant::new`], which wants both proofs, can fill this in.
    _earned: (),
}

/// A grant to take back.
#[derive(PartialEq, Eq, Debug)]
pub struct Withdrawal {
    /// Whose token was spent twice.
    pub user: Name,
    /// What it was for, if the user may still open that.
    pub service: Option<Name>,
    /// The address that it was granted to.
    pub source: IpAddr,
    /// The other address that it came from.
    pub elsewhere: IpAddr,
    /// The ports that were opened.
    pub ports: Vec<Port>,
    /// The number of that token.
    pub token: u32,
}

/// A packet that bears nobody's token, and the counters that it bore a wrong tag for.
struct Miss {
    refusal: Refusal,
    wrong_tags: Vec<(PublicKey, u64)>,
}

impl Knock {
    /// Its counter could not be made durable, and stays taken.
    fn not_durable(&self) -> Refusal {
        Refusal::of(self.refused.unwrap_or(Reason::NotDurable), None, Some(self.source))
    }
}

impl Claim {
    /// Gives it up, for its counter cannot be made durable; it stays taken. Also what bore it.
    pub fn give_up(self) -> (Refusal, Vec<u8>) {
        (self.knock.not_durable(), self.packet)
    }

    /// Makes the counters of a batch durable.
    ///
    /// # Errors
    /// The refusals of the whole batch with their packets, and the log's error: none of it has any effect as long as this process
    /// lives.
    pub fn record<L: CounterLog>(batch: Vec<Self>, log: &mut L) -> Result<Vec<Recorded>, NotRecorded<L::Error>> {
        let batch = batch.into_iter().map(|claim| (claim.reservation, (claim.knock, claim.packet)));
        let (reservations, knocks): (Vec<_>, Vec<_>) = batch.unzip();
        match Fresh::record(reservations, log) {
            Ok(fresh) => {
                let recorded = |((knock, packet), fresh)| Recorded { knock, fresh, packet };
                Ok(knocks.into_iter().zip(fresh).map(recorded).collect())
            }
            Err(error) => {
                Err((knocks.into_iter().map(|(knock, packet)| (knock.not_durable(), packet)).collect(), error))
            }
        }
    }
}

/// What became of a batch that is not durable, packet by packet, and why it is not.
type NotRecorded<E> = (Vec<(Refusal, Vec<u8>)>, E);

impl Refusal {
    const fn of(reason: Reason, user: Option<Name>, source: Option<IpAddr>) -> Self {
        Self { reason, user, source }
    }
}

impl Grant {
    fn new(recorded: &Recorded, user: &User, service: &Service, now: u64) -> Option<Self> {
        let Recorded { knock: Knock { opened, source, refused }, fresh, .. } = recorded;
        let is_of_one_knock = opened.n() == fresh.n() && *fresh.client() == user.public_key;
        (is_of_one_knock && refused.is_none() && opened.port() == service.selector).then(|| Self {
            user: user.name.clone(),
            service: service.name.clone(),
            source: *source,
            ports: service.ports.clone(),
            open_for: open_for(service.open_for, user.open_for, user.expires, now),
            once: service.once,
            bound: opened.binding() != Binding::Unbound,
            token: number(opened.n()),
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
    shares: Shares,
}

/// A token's number: no other that its user has within any window has the same.
const fn number(n: u64) -> u32 {
    let [_, _, _, _, a, b, c, d] = n.to_be_bytes();
    u32::from_be_bytes([a, b, c, d])
}

impl Verifier {
    /// Starts from the configuration and from the last accepted counters.
    pub fn new(registry: Registry, last: &HashMap<PublicKey, u64>, now: u64) -> Self {
        let keys: Vec<Key> = registry.users.iter().map(|user| user.secrets.key()).collect();
        let places = registry.users.iter().enumerate().map(|(place, user)| (user.public_key, place)).collect();
        let last = |user: &User| Some((user.public_key, user.last(last.get(&user.public_key).copied())?));
        let counters = Counters::new(registry.users.iter().filter_map(last).collect());
        let index = Index::new(&registry, &keys, now);
        let mut verifier =
            Self { registry, keys, places, index, counters, tries: Tries::default(), shares: Shares::default() };
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
    /// came from, wrong tags, who had which share.
    pub fn replace_with(&mut self, mut next: Self) {
        std::mem::swap(self, &mut next);
        self.counters.inherit(next.counters, |client| self.places.contains_key(client));
        (self.tries, self.shares) = (next.tries, next.shares);
        // What was made with keys that are no more opens nothing, though it be on its way to the disk.
        for before in &next.registry.users {
            if self.user(&before.public_key).is_some_and(|user| !user.secrets.is_same(&before.secrets)) {
                self.counters.refuse_all(&before.public_key);
            }
        }
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
        self.tries.forget_before(oldest, now);
    }

    /// Those for whom so many wrong tags came that only clocks within a few seconds count.
    pub fn narrowed(&self, now: u64) -> impl Iterator<Item = &Name> {
        self.tries.narrowed(now).filter_map(|client| Some(&self.user(client)?.name))
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
            Ok((user, knock)) => self.accept(user, knock, packet, now),
            Err(Miss { refusal, wrong_tags }) => {
                wrong_tags.iter().for_each(|(client, n)| self.tries.count(client, *n, now));
                Decision::Refused(refusal)
            }
        }
    }

    /// Turns a durable claim into a grant, if policy still allows it.
    ///
    /// # Errors
    /// What it was refused for before, [`Reason::SpentTwice`], [`Reason::NotDurable`], [`Reason::NotPermitted`],
    /// [`Reason::Expired`] or [`Reason::OverRate`]; the counter stays spent.
    pub fn settle(&mut self, recorded: &Recorded, now: u64) -> Result<Grant, Refusal> {
        let (client, n) = (*recorded.fresh.client(), recorded.fresh.n());
        self.grant(recorded, now).map_err(|reason| {
            self.counters.refuse(&client, n);
            Refusal::of(reason, self.user(&client).map(|user| user.name.clone()), Some(recorded.knock.source))
        })
    }

    fn grant(&mut self, recorded: &Recorded, now: u64) -> Result<Grant, Reason> {
        let Recorded { knock: Knock { opened, source, refused }, fresh, .. } = recorded;
        let user = self.places.get(fresh.client()).and_then(|&place| self.registry.users.get(place));
        let user = user.ok_or(Reason::NotPermitted)?;
        refused.map_or(Ok(()), Err)?;
        self.counters.is_live(fresh.client(), fresh.n())?;
        // The registry may have changed since.
        if !user.may_come_from(*source) {
            return Err(Reason::SourceNotAllowed);
        }
        if user.source == SourcePolicy::Bound && opened.binding() == Binding::Unbound {
            return Err(Reason::NotPermitted);
        }
        if user.expires.is_some_and(|expiry| now >= expiry) {
            return Err(Reason::Expired);
        }
        let service = self.registry.permitted(user, opened.port()).ok_or(Reason::NotPermitted)?;
        let grant = Grant::new(recorded, user, service, now).ok_or(Reason::NotPermitted)?;
        let may_have = self.shares.take(fresh.client(), grant.ports.len(), self.registry.grants_per_minute, now);
        may_have.then_some(grant).ok_or(Reason::OverRate)
    }

    fn user(&self, client: &PublicKey) -> Option<&User> {
        self.places.get(client).and_then(|&place| self.registry.users.get(place))
    }

    /// The user, by place, whose token this SYN bears.
    fn find(&self, syn: &Syn, now: u64) -> Result<(usize, Knock), Miss> {
        let mut refusal = Refusal::of(Reason::Unknown, None, Some(syn.source));
        let mut wrong_tags = Vec::new();
        for candidate in self.index.candidates(syn.sequence) {
            let place = candidate.user;
            let (Some(user), Some(key)) = (self.registry.users.get(place), self.keys.get(place)) else {
                continue;
            };
            // Accepted before, or it may have been: `accept` refuses it. It is looked at to tell why, and is no try.
            let is_spent =
                self.floor().covers(candidate.n) || self.counters.last(&user.public_key) >= Some(candidate.n);
            let knock = match key {
                Key::Token(key) => self.open(syn, candidate, user, key, is_spent, now),
                // Always unbound: the configuration refuses `source = "bound"` beside it.
                Key::Knockknock { key, knock_port } => {
                    let refused = refused_for_its_way(syn, user, *knock_port);
                    knockknock::open(syn, candidate, key).map(|opened| Knock { opened, source: syn.source, refused })
                }
            };
            match knock {
                Ok(knock) => return Ok((place, knock)),
                Err(reason) => {
                    // Of an ancestor's knock 64 more bits must be right, which nobody tries out.
                    if reason == Reason::WrongTag && matches!(key, Key::Token(_)) && !is_spent {
                        wrong_tags.push((user.public_key, candidate.n));
                    }
                    refusal = Refusal::of(reason, Some(user.name.clone()), Some(syn.source));
                }
            }
        }
        Err(Miss { refusal, wrong_tags })
    }

    /// The checks between an index hit and a token whose tag holds, in the protocol's order. Those before the tag say why it
    /// opens nothing; it is looked at all the same as long as it could be spent.
    fn open(
        &self,
        syn: &Syn,
        candidate: Candidate,
        user: &User,
        key: &KnockKey,
        is_spent: bool,
        now: u64,
    ) -> Result<Knock, Reason> {
        let Candidate { n, port, .. } = candidate;
        let of_tries = || {
            let is_off = n.abs_diff(now) > NARROW && self.tries.narrow_the_window(&user.public_key, now);
            let is_exhausted = || self.tries.are_exhausted(&user.public_key, n).then_some(Reason::Exhausted);
            is_off.then_some(Reason::Narrowed).or_else(is_exhausted)
        };
        let knock_port = key.pad(n).knock_port(&self.registry.knock_ports);
        let refused = if is_spent { None } else { of_tries() };
        let refused = refused.or_else(|| refused_for_its_way(syn, user, knock_port));
        if let Some(reason) = refused.filter(|_| is_spent) {
            return Err(reason);
        }
        let tsval = syn.tsval.ok_or(refused.unwrap_or(Reason::NoTimestamp))?;
        let bound = key.open(n, port, tsval, Binding::Bound(syn.source));
        let unbound = || key.open(n, port, tsval, Binding::Unbound);
        let opened = match user.source {
            SourcePolicy::Any => bound.or_else(unbound),
            SourcePolicy::Bound => bound,
        };
        let opened = opened.ok_or(refused.unwrap_or(Reason::WrongTag))?;
        Ok(Knock { opened, source: syn.source, refused })
    }

    /// The counter rule, on a token whose tag held: it is spent, whatever it is refused for.
    fn accept(&mut self, place: usize, knock: Knock, packet: &[u8], now: u64) -> Decision {
        let Knock { opened, source, refused } = knock;
        let Some(user) = self.registry.users.get(place) else {
            return Decision::Refused(Refusal::of(Reason::NotPermitted, None, Some(source)));
        };
        let refuse = |reason| Decision::Refused(Refusal::of(reason, Some(user.name.clone()), Some(source)));
        let (key, n, window) = (user.public_key, opened.n(), self.registry.window);
        let is_token = matches!(user.secrets, Secrets::Token(_));
        let at = if is_token { n } else { self.counters.next_slot(&key, now, window) };
        if is_token && self.counters.is_in_doubt(&key, n) {
            return refuse(Reason::InDoubt);
        }
        if !is_token && at.saturating_sub(now) > window && self.counters.last(&key) < Some(n) {
            // It is spent, in memory alone, or the counts would part.
            self.counters.burn(&key, n);
            self.index.count(place, n.saturating_add(1));
            return refuse(Reason::TooFast);
        }
        let is_outside = is_token && at.abs_diff(now) > window;
        let refused = refused.or(is_outside.then_some(Reason::OutsideWindow));
        let reason = match self.counters.reserve(&key, &opened, source, at, refused.is_none()) {
            Ok(reservation) => {
                if !is_token {
                    self.counters.occupy(&key, at);
                    self.index.count(place, n.saturating_add(1));
                }
                let packet = packet.to_vec();
                return Decision::Claimed(Claim { knock: Knock { refused, ..knock }, reservation, packet });
            }
            Err(reason) => refused.unwrap_or(reason),
        };
        let first = if refused.is_none() { self.counters.withdraw(&key, n, source) } else { None };
        let Some(first) = first else {
            return refuse(reason);
        };
        let service = self.registry.permitted(user, opened.port());
        Decision::Withdrawn(Withdrawal {
            user: user.name.clone(),
            service: service.map(|service| service.name.clone()),
            source: first,
            elsewhere: source,
            ports: service.map(|service| service.ports.clone()).unwrap_or_default(),
            token: number(n),
        })
    }
}

/// Why a knock that came this way opens nothing, if so: to another port than its own, or from where none may come.
fn refused_for_its_way(syn: &Syn, user: &User, knock_port: u16) -> Option<Reason> {
    if knock_port != syn.destination_port {
        Some(Reason::WrongKnockPort)
    } else if matches!(syn.source, IpAddr::V6(source) if source.is_unicast_link_local()) {
        Some(Reason::LinkLocal)
    } else if !user.may_come_from(syn.source) {
        Some(Reason::SourceNotAllowed)
    } else {
        None
    }
}
