//! A server with registered keys, whose every decision is checked against the tokens that were really sealed.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::LazyLock;

use knockq::crypto::{Binding, KnockKey, KnockPorts, KnockSecrets, PrivateKey, PublicKey, Side};
use knockq::packet::{Flow, Persona, Syn};
use knockq::service::Port;
use knockq::verify::{
    Claim, CounterLog, Decision, Grant, Recorded, Registry, Reservation, Secrets, Service, SourcePolicy, User,
    Verifier, Withdrawal,
};

use crate::Input;
use crate::recorded::persona;

/// When it begins, in Unix seconds.
const NOW: u64 = 1_790_000_000;

/// Seconds either way that a counter may be off: short, so that the index is made quickly.
const WINDOW: u64 = 8;

/// Users: anybody's tokens count; those from one network; bound ones alone. The key after theirs is not registered.
const USERS: usize = 3;

/// Where packets come from.
const SOURCES: [&str; 5] = ["203.0.113.9", "203.0.113.10", "198.51.100.1", "2001:db8::9", "2001:db8::a"];

/// Selectors that are asked for: of the three services, the last of which nobody may open, and of none.
const SELECTORS: [u16; 4] = [22, 51_820, 25, 4_444];

/// The keys, which are the same in every run, so that an input does the same again.
static KEYS: LazyLock<(Registry, Vec<KnockKey>)> = LazyLock::new(keys);

static PERSONAS: LazyLock<[Persona; 2]> = LazyLock::new(|| [persona(true), persona(false)]);

/// A token that was sealed with a registered key.
#[derive(Clone)]
struct Sealed {
    user: PublicKey,
    n: u64,
    selector: u16,
    binding: Binding,
    sequence: u32,
    tsval: u32,
    knock_port: u16,
}

/// A token that was claimed, and where it came from.
#[derive(Clone)]
struct Spent {
    token: Sealed,
    source: IpAddr,
    /// It came to its own port, within the window.
    may_open: bool,
}

#[derive(Default)]
struct Memory {
    last: HashMap<PublicKey, u64>,
    is_full: bool,
}

impl CounterLog for Memory {
    type Error = ();

    fn record<'a>(&mut self, batch: impl Iterator<Item = &'a Reservation>) -> Result<(), ()> {
        if self.is_full {
            return Err(());
        }
        for reservation in batch {
            let last = self.last.entry(*reservation.client()).or_default();
            *last = (*last).max(reservation.n());
        }
        Ok(())
    }
}

/// The server, and what is known about it from outside.
pub struct World {
    registry: Registry,
    verifier: Verifier,
    log: Memory,
    now: u64,
    latest: u64,
    /// Keys that are advanced at one go.
    budget: usize,
    sealed: Vec<Sealed>,
    packets: Vec<Vec<u8>>,
    waiting: Vec<(Claim, Spent)>,
    granted: HashSet<(PublicKey, u64)>,
    /// Counters that were claimed: never again, unless a restart has forgotten what was not durable.
    claimed: HashMap<(PublicKey, u64), Spent>,
    /// The last of each key, below which nothing may be claimed.
    last: HashMap<PublicKey, u64>,
    withdrawn: HashSet<(PublicKey, u64)>,
    /// A configuration that is prepared and not in force yet.
    next: Option<(Registry, Verifier)>,
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    pub fn new() -> Self {
        let registry = KEYS.0.clone();
        let verifier = Verifier::new(registry.clone(), &HashMap::new(), NOW);
        Self {
            registry,
            verifier,
            log: Memory::default(),
            now: NOW,
            latest: NOW,
            budget: usize::MAX,
            sealed: Vec::new(),
            packets: Vec::new(),
            waiting: Vec::new(),
            granted: HashSet::new(),
            claimed: HashMap::new(),
            last: HashMap::new(),
            withdrawn: HashSet::new(),
            next: None,
        }
    }

    /// Does what the input chooses.
    pub fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 16 {
            0..=2 => self.receive(input.bytes()),
            3..=6 => {
                let packet = self.knock(input);
                self.receive(&packet);
            }
            7..=8 => {
                let mut packet = self.knock(input);
                mutate(&mut packet, input);
                self.receive(&packet);
            }
            9..=10 => {
                let mut packet = if self.packets.is_empty() { Vec::new() } else { input.pick(&self.packets).clone() };
                mutate(&mut packet, input);
                self.receive(&packet);
            }
            11 => self.commit(),
            12 => self.set_clock(self.now.saturating_add(input.byte().into())),
            13 => {
                let time = match input.byte() % 8 {
                    0 => 0,
                    1 => u64::MAX,
                    2 => self.now.saturating_add_signed(input.offset()),
                    _ => input.u32().into(),
                };
                self.set_clock(time);
            }
            14 => match self.next.take() {
                None => self.prepare(input.byte()),
                Some(next) => self.enforce(next),
            },
            _ => match input.byte() % 4 {
                0 => self.restart(),
                1 => self.log.is_full ^= true,
                2 => self.budget = input.byte().into(),
                _ => self.verifier.forget(self.now),
            },
        }
    }

    /// When the window and the time for wrong tags have passed, each user's own knock opens.
    pub fn everyone_can_still_knock(&mut self) {
        let Some(later) = self.latest.checked_add(1_000).filter(|later| *later < u64::MAX - 1_000) else { return };
        self.commit();
        self.log.is_full = false;
        self.budget = usize::MAX;
        self.set_clock(later);
        for (place, user) in self.registry.users.clone().iter().enumerate() {
            let selector = self.registry.selectors(user).next();
            let Some(selector) = selector else { continue };
            let source: IpAddr = SOURCES[0].parse().unwrap();
            let packet = self.seal(&user.public_key, later, selector, Binding::Bound(source), source);
            self.receive(&packet);
            assert!(!self.waiting.is_empty(), "user {place}'s knock is refused");
            self.commit();
            assert!(self.granted.contains(&(user.public_key, later)), "user {place}'s knock opens nothing");
        }
    }

    fn set_clock(&mut self, time: u64) {
        self.now = time;
        self.latest = self.latest.max(time);
        self.verifier.advance(time, self.budget);
    }

    /// A knock, as a client would send it or not quite; with a key that is not registered, a stranger's.
    fn knock(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        let place = usize::from(input.byte()) % (USERS + 1);
        let n = self.now.saturating_add_signed(input.offset() / 8);
        let selector = *input.pick(&SELECTORS);
        let source: IpAddr = input.pick(&SOURCES).parse().unwrap();
        let binding = match input.byte() % 4 {
            0 => Binding::Unbound,
            1 => Binding::Bound(input.pick(&SOURCES).parse().unwrap()),
            _ => Binding::Bound(source),
        };
        match KEYS.0.users.get(place) {
            Some(user) => self.seal(&user.public_key, n, selector, binding, source),
            None => syn(&KEYS.1[place], n, selector, binding, source).0,
        }
    }

    fn seal(&mut self, user: &PublicKey, n: u64, selector: u16, binding: Binding, source: IpAddr) -> Vec<u8> {
        let place = KEYS.0.users.iter().position(|known| known.public_key == *user).unwrap();
        let (packet, [sequence, tsval], knock_port) = syn(&KEYS.1[place], n, selector, binding, source);
        self.sealed.push(Sealed { user: *user, n, selector, binding, sequence, tsval, knock_port });
        self.packets.push(packet.clone());
        packet
    }

    fn receive(&mut self, packet: &[u8]) {
        self.verifier.advance(self.now, self.budget);
        match self.verifier.handle(packet, self.now) {
            Decision::Refused(_) => {}
            Decision::Claimed(claim) => self.claimed(claim, &Syn::parse(packet).unwrap()),
            Decision::Withdrawn(withdrawal) => self.withdrawn(&withdrawal, &Syn::parse(packet).unwrap()),
        }
    }

    fn claimed(&mut self, claim: Claim, syn: &Syn) {
        let token = self.token_in(syn).expect("a claim without a token that was sealed with a registered key");
        let may_open = token.knock_port == syn.destination_port && token.n.abs_diff(self.now) <= WINDOW;
        let spent = Spent { token: token.clone(), source: syn.source, may_open };
        assert!(self.claimed.insert((token.user, token.n), spent.clone()).is_none(), "a counter was claimed twice");
        let before = self.last.insert(token.user, token.n);
        assert!(before < Some(token.n), "counter {} after {before:?}", token.n);
        self.waiting.push((claim, spent));
    }

    fn withdrawn(&mut self, withdrawal: &Withdrawal, syn: &Syn) {
        let token = self.token_in(syn).expect("a withdrawal by a token that nobody sealed");
        let first = &self.claimed[&(token.user, token.n)];
        assert!(first.token.binding == Binding::Unbound && first.source == withdrawal.source);
        assert!(first.may_open && token.knock_port == syn.destination_port);
        assert!(withdrawal.elsewhere == syn.source && withdrawal.source != syn.source);
        assert!(self.withdrawn.insert((token.user, token.n)), "withdrawn twice");
    }

    /// The token of this SYN, if it was sealed with a registered key, for this source.
    fn token_in(&self, syn: &Syn) -> Option<Sealed> {
        let is_it = |token: &&Sealed| {
            (token.sequence, Some(token.tsval)) == (syn.sequence, syn.tsval)
                && (token.binding == Binding::Unbound || token.binding == Binding::Bound(syn.source))
        };
        self.sealed.iter().find(is_it).cloned()
    }

    /// Makes durable what waits, and settles it.
    fn commit(&mut self) {
        let (claims, spent): (Vec<Claim>, Vec<Spent>) = self.waiting.drain(..).unzip();
        match Claim::record(claims, &mut self.log) {
            Ok(recorded) => recorded.iter().zip(&spent).for_each(|(recorded, spent)| self.settle(recorded, spent)),
            Err((refusals, ())) => assert_eq!(refusals.len(), spent.len()),
        }
    }

    fn settle(&mut self, recorded: &Recorded, spent: &Spent) {
        let Ok(grant) = self.verifier.settle(recorded, self.now) else { return };
        let Spent { token, source, may_open } = spent;
        assert!(*may_open, "granted though it came to another port or outside of the window");
        self.check(&grant, token, *source);
        assert!(self.log.last.get(&token.user) >= Some(&token.n), "granted before it was durable");
        assert!(!self.withdrawn.contains(&(token.user, token.n)), "granted though it came from two addresses");
        assert!(self.granted.insert((token.user, token.n)), "one counter, two grants");
    }

    fn check(&self, grant: &Grant, token: &Sealed, source: IpAddr) {
        let user = self.registry.users.iter().find(|user| user.public_key == token.user).expect("a registered user");
        let service = self.registry.services.iter().position(|service| service.selector == token.selector).unwrap();
        assert!(user.services.contains(&service), "not a service of this user");
        let service = &self.registry.services[service];
        assert_eq!((&grant.user, &grant.service, grant.source), (&user.name, &service.name, source));
        assert_eq!((&grant.ports, grant.open_for, grant.once), (&service.ports, service.open_for, service.once));
        assert!(user.from.is_empty() || user.from.iter().any(|network| network.contains(&source)));
        assert!(user.source == SourcePolicy::Any || token.binding == Binding::Bound(source));
    }

    /// The configuration is read again: users come and go, and may do this or that. The thread that writes counters does
    /// it, after all that waited for it.
    fn prepare(&mut self, choice: u8) {
        self.commit();
        let mut registry = KEYS.0.clone();
        let has = |bit: u8| choice & 1 << bit != 0;
        if has(0) {
            registry.users.swap(0, 2);
        }
        if has(1) {
            registry.users.remove(usize::from(choice >> 6) % USERS);
        }
        if has(2) {
            registry.users[0].services = vec![2];
        }
        if has(3) {
            registry.services.swap(0, 1);
        }
        let verifier = Verifier::new(registry.clone(), &self.log.last, self.now);
        self.next = Some((registry, verifier));
    }

    fn enforce(&mut self, (registry, verifier): (Registry, Verifier)) {
        self.verifier.replace_with(verifier);
        self.last.retain(|key, _| registry.users.iter().any(|user| user.public_key == *key));
        self.registry = registry;
    }

    /// A new process, which knows what the log kept. What waited is lost.
    fn restart(&mut self) {
        self.waiting.clear();
        self.withdrawn.clear();
        self.next = None;
        self.last = self.log.last.clone();
        self.claimed.retain(|(user, n), _| self.log.last.get(user) >= Some(n));
        self.verifier = Verifier::new(self.registry.clone(), &self.log.last, self.now);
    }
}

/// A token and its packet.
fn syn(key: &KnockKey, n: u64, selector: u16, binding: Binding, source: IpAddr) -> (Vec<u8>, [u32; 2], u16) {
    let token = key.seal(n, selector, binding);
    let knock_port = key.pad(n).knock_port(&KEYS.0.knock_ports);
    let destination: IpAddr = if source.is_ipv4() { "192.0.2.1" } else { "2001:db8::1" }.parse().unwrap();
    let flow = Flow { source, source_port: 40_000, destination, destination_port: knock_port };
    let persona = &PERSONAS[usize::from(source.is_ipv6())];
    (persona.syn(&flow, token.sequence, token.tsval).unwrap(), [token.sequence, token.tsval], knock_port)
}

/// Changes, cuts or leaves some bytes.
fn mutate(packet: &mut Vec<u8>, input: &mut Input<'_>) {
    for _ in 0..input.byte() % 4 {
        let (place, change) = (usize::from(input.byte()), input.byte());
        if let Some(byte) = packet.get_mut(place) {
            *byte ^= change;
        } else {
            packet.truncate(usize::from(change));
        }
    }
}

fn keys() -> (Registry, Vec<KnockKey>) {
    let key = |number: usize| -> PrivateKey {
        let letter = char::from(b"BCDEFG"[number]);
        format!("{}=", letter.to_string().repeat(42) + "A").parse().unwrap()
    };
    let server = key(USERS + 1);
    let own: Vec<PrivateKey> = (0..=USERS).map(key).collect();
    let secrets =
        |side, own: &PrivateKey, peer: &PrivateKey| KnockSecrets::derive(side, own, peer.public(), None).unwrap();
    let user = |place: usize| User {
        name: format!("u{place}").parse().unwrap(),
        public_key: *own[place].public(),
        secrets: Secrets::Token(secrets(Side::Server, &server, &own[place])),
        services: vec![0, 1],
        source: if place == 2 { SourcePolicy::Bound } else { SourcePolicy::Any },
        from: if place == 1 { vec!["203.0.113.0/24".parse().unwrap()] } else { Vec::new() },
        open_for: None,
        expires: None,
    };
    let service = |name: &str, ports: &[&str], once| {
        let ports: Vec<Port> = ports.iter().map(|port| port.parse().unwrap()).collect();
        Service { name: name.parse().unwrap(), selector: ports[0].number, ports, open_for: 30, once, kill: false }
    };
    let registry = Registry {
        window: WINDOW,
        knock_ports: KnockPorts::new([20_000..=20_063]).unwrap(),
        grants_per_minute: 60_000,
        services: vec![
            service("ssh", &["tcp/22"], false),
            service("vpn", &["udp/51820", "tcp/51820"], true),
            service("mail", &["tcp/25"], false),
        ],
        users: (0..USERS).map(user).collect(),
    };
    let clients = own.iter().map(|own| KnockKey::new(&secrets(Side::Client, own, &server))).collect();
    (registry, clients)
}
