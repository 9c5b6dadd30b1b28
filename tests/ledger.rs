//! The ledger against a model of the kernel: whatever happens, in any order, the kernel's sets hold what the holds say, no
//! more, and no less. And the gate never takes what the ledger has it asked for the work of an intruder.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use knockq::nft::{Boot, Comment, Door, Element, Member, SetName, Time};
use knockq::serve::admission::Admission;
use knockq::serve::commands::Command;
use knockq::serve::ledger::{Hold, Ledger};
use knockq::serve::limits::Limits;
use proptest::prelude::*;

const USERS: [&str; 3] = ["alice", "bob", "carol"];

/// Services: their ports, whether their doors are for one connection, and whether connections end with these. Two have one port.
const SERVICES: [(&str, &str, bool, bool); 5] = [
    ("ssh", "tcp/22", false, false),
    ("rescue", "tcp/22", false, true),
    ("mail", "tcp/25", true, false),
    ("talk", "tcp/7000", true, true),
    ("vpn", "udp/51820", false, true),
];

const SOURCES: [&str; 3] = ["192.0.2.1", "192.0.2.2", "2001:db8::1"];

const SETS: [&str; 2] = ["inet mine one", "ip mine two"];

#[derive(Clone, Debug)]
enum Event {
    /// A user's knock for a service from a source, for so many seconds, with a place in these sets; the sets of doors may be full.
    Knock {
        user: usize,
        service: usize,
        source: usize,
        seconds: u32,
        sets: [bool; 2],
        is_full: bool,
    },
    /// One of the last knocks is taken back.
    Withdraw(usize),
    Revoke(usize),
    /// A reload in which a user lost a set.
    LeaveSet {
        user: usize,
        set: usize,
    },
    DeleteByHand(usize),
    Save,
    /// What was saved is loaded beside what is there.
    LoadSaved,
    TableGone,
    TableLoaded,
    /// It was not there, and is again, before the daemon hears so.
    TableBack,
    /// So much was told that some was missed, although the table is there.
    Overflow,
    /// A connection begins by a door for one.
    Use(usize),
    SetGone(usize),
    SetMade(usize),
    Pass(u32),
    /// A reload after which doors are open for so many seconds at most.
    Shorten(u32),
    Restart,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let knock = (0..USERS.len(), 0..SERVICES.len(), 0..SOURCES.len(), 1..40_u32, any::<[bool; 2]>());
    let knock = (knock, proptest::bool::weighted(0.1)).prop_map(|((user, service, source, seconds, sets), is_full)| {
        Event::Knock { user, service, source, seconds, sets, is_full }
    });
    let event = prop_oneof![
        8 => knock,
        3 => (0..6_usize).prop_map(Event::Withdraw),
        1 => (0..USERS.len()).prop_map(Event::Revoke),
        1 => (0..USERS.len(), 0..SETS.len()).prop_map(|(user, set)| Event::LeaveSet { user, set }),
        1 => (0..9_usize).prop_map(Event::DeleteByHand),
        1 => Just(Event::Save),
        1 => Just(Event::LoadSaved),
        1 => Just(Event::TableGone),
        2 => Just(Event::TableLoaded),
        1 => Just(Event::TableBack),
        1 => Just(Event::Overflow),
        3 => (0..4_usize).prop_map(Event::Use),
        1 => (0..SETS.len()).prop_map(Event::SetGone),
        2 => (0..SETS.len()).prop_map(Event::SetMade),
        3 => (1..15_u32).prop_map(Event::Pass),
        1 => (1..40_u32).prop_map(Event::Shorten),
        1 => Just(Event::Restart),
    ];
    proptest::collection::vec(event, 1..60)
}

/// The kernel's sets.
struct Kernel {
    has_table: bool,
    sets: HashSet<SetName>,
    elements: BTreeMap<Element, (Instant, Comment)>,
    /// There is no room for another door.
    is_full: bool,
}

impl Kernel {
    /// A transaction: all of it, or nothing.
    fn change(&mut self, changes: &[(Element, Option<Time>)], now: Instant) -> Result<(), ()> {
        let mut changed = self.elements.clone();
        for (element, time) in changes {
            let is_there = match element {
                Element::Opens(_) | Element::Lasts(_) => self.has_table,
                Element::Member(member) => self.sets.contains(&member.set),
            };
            // What is to be deleted is added before.
            let has_room = !self.is_full || matches!(element, Element::Member(_)) || changed.contains_key(element);
            if !is_there || !has_room {
                return Err(());
            }
            match time {
                Some((left, comment)) => drop(changed.insert(element.clone(), (now + *left, comment.clone()))),
                None => drop(changed.remove(element)),
            }
        }
        self.elements = changed;
        Ok(())
    }

    fn forget(&mut self, now: Instant) {
        self.elements.retain(|_, (until, _)| *until > now);
    }
}

/// What ought to be, told as simply as can be.
#[derive(Clone, PartialEq, Debug)]
struct Held {
    user: usize,
    service: usize,
    door: Door,
    until: Instant,
    /// Found at a start: no token is known.
    token: Option<u32>,
    is_spent: bool,
    /// Granted while there was no table.
    waits: bool,
    members: BTreeSet<Member>,
}

struct World {
    now: Instant,
    boot: Boot,
    ledger: Ledger,
    kernel: Kernel,
    gate: Admission,
    /// Seconds that a door is open at most.
    most: u32,
    held: Vec<Held>,
    /// The table is loaded, as far as the daemon knows.
    is_loaded: bool,
    saved: BTreeMap<Element, (Duration, Comment)>,
    tokens: u32,
    last: Vec<(Door, usize, u32)>,
}

fn door(service: usize, source: usize) -> Door {
    let (_, port, once, _) = SERVICES[service];
    Door { source: SOURCES[source].parse().unwrap(), port: port.parse().unwrap(), once }
}

fn set(place: usize) -> SetName {
    SETS[place].parse().unwrap()
}

/// One set has ports, the other only takes IPv4.
fn member(place: usize, door: &Door) -> Option<Member> {
    let port = (place == 0).then_some(door.port);
    let fits = place == 0 || matches!(door.source, IpAddr::V4(_));
    fits.then(|| Member { set: set(place), source: door.source, port })
}

/// All services for so many seconds, both sets, and no end of doors.
fn limits(most: u32) -> Limits {
    let port = |(_, port, once, _): (&str, &str, bool, bool)| {
        format!("{} {port} {most}\n", if once { "once" } else { "port" })
    };
    let sets = SETS.map(|set| format!("set {set}\n")).concat();
    format!("rate 1000000\nfrom any\n{sets}{}", SERVICES.map(port).concat()).parse().unwrap()
}

impl World {
    fn new() -> Self {
        let boot = Boot::this().unwrap();
        let kernel = Kernel {
            has_table: true,
            sets: SETS.iter().map(|set| set.parse().unwrap()).collect(),
            elements: BTreeMap::new(),
            is_full: false,
        };
        let (now, ledger) = (Instant::now(), Ledger::new(boot));
        let (held, saved, last) = (Vec::new(), BTreeMap::new(), Vec::new());
        let mut gate = Admission::new(limits(40), now);
        gate.enforce();
        Self { now, boot, ledger, kernel, gate, most: 40, held, is_loaded: true, saved, tokens: 0, last }
    }

    /// The gate lets it through, and the kernel takes it.
    fn change(&mut self, changes: &[(Element, Option<Time>)]) -> Result<(), ()> {
        for (element, time) in changes {
            let command = match time {
                Some((left, comment)) => Command::Put(element.clone(), *left, comment.clone()),
                None => Command::Delete(element.clone()),
            };
            let time = time.as_ref().map_or(Duration::MAX, |(time, _)| *time);
            assert_eq!(self.gate.admits(&command, self.now), Ok(Some(time)), "{command:?}");
        }
        self.kernel.change(changes, self.now)?;
        for (element, time) in changes {
            if let (Element::Opens(door), Some(_)) = (element, time) {
                self.gate.opens(door);
            }
        }
        Ok(())
    }

    /// As the reconciler does it. Tells which tokens were granted.
    fn settle(&mut self) -> Vec<u32> {
        let (now, mut granted) = (self.now, Vec::new());
        loop {
            let changes = self.ledger.take(3, now);
            if changes.is_empty() {
                let elements = &self.kernel.elements;
                let there = self.held.iter_mut().filter(|held| elements.contains_key(&Element::Opens(held.door)));
                there.for_each(|held| held.waits = false);
                return granted;
            }
            let (waiting, changes): (Vec<_>, Vec<_>) = changes
                .into_iter()
                .partition(|change| !self.is_loaded && matches!(change, (Element::Member(_), Some(_))));
            waiting.into_iter().for_each(|(element, _)| drop(self.ledger.defer(element)));
            let changed = self.change(&changes);
            for (element, _) in changes {
                let told = if changed.is_ok() {
                    self.ledger.settled(&element)
                } else {
                    let time = self.ledger.desired(&element, now);
                    let change = (element, time);
                    match self.change(std::slice::from_ref(&change)) {
                        Ok(()) => self.ledger.settled(&change.0),
                        Err(()) if !self.is_loaded => self.ledger.defer(change.0),
                        Err(()) => {
                            self.ledger.refused(&change.0);
                            Vec::new()
                        }
                    }
                };
                granted.extend(told.iter().filter_map(|(_, hold)| hold.token));
            }
        }
    }

    fn play(&mut self, event: &Event) {
        match event {
            Event::Knock { user, service, source, seconds, sets, is_full } => {
                self.kernel.is_full = *is_full;
                self.knock(*user, *service, *source, *seconds, *sets);
                self.kernel.is_full = false;
            }
            Event::Withdraw(back) => {
                let Some((door, user, token)) = self.last.iter().rev().nth(*back).copied() else { return };
                self.ledger.withdraw(&door, &USERS[user].parse().unwrap(), token, self.now);
                self.held.retain(|held| held.token != Some(token));
            }
            Event::Revoke(user) => {
                self.ledger.remove(|_, hold| hold.user.as_str() == USERS[*user]);
                self.held.retain(|held| held.user != *user);
            }
            Event::LeaveSet { user, set: place } => {
                let left = set(*place);
                self.ledger.remove_members(|hold, member| hold.user.as_str() != USERS[*user] || member.set != left);
                let of_user = self.held.iter_mut().filter(|held| held.user == *user);
                of_user.for_each(|held| held.members.retain(|member| member.set != left));
            }
            Event::DeleteByHand(nth) => {
                let mut doors = self.kernel.elements.keys().filter(|element| !matches!(element, Element::Member(_)));
                let Some(element) = doors.nth(*nth).cloned() else { return };
                self.kernel.elements.remove(&element);
                let (Element::Opens(door) | Element::Lasts(door)) = element else { unreachable!() };
                self.ledger.remove_door(&door);
                self.held.retain(|held| held.door != door);
            }
            Event::Save => {
                let left = |(element, (until, comment)): (&Element, &(Instant, Comment))| {
                    (element.clone(), (*until - self.now, comment.clone()))
                };
                self.saved = self.kernel.elements.iter().map(left).collect();
            }
            Event::LoadSaved => self.load_saved(),
            Event::TableGone => self.lose_table(),
            Event::TableLoaded => self.load_table(),
            Event::TableBack => self.kernel.has_table = true,
            Event::Overflow => self.lose_doors(),
            Event::Use(nth) => {
                let of_one = |element: &&Element| matches!(element, Element::Opens(door) if door.once);
                let Some(element) = self.kernel.elements.keys().filter(of_one).nth(*nth).cloned() else { return };
                self.kernel.elements.remove(&element);
                let of_door = self.held.iter_mut().filter(|held| element == Element::Opens(held.door));
                of_door.for_each(|held| held.is_spent = true);
            }
            Event::SetGone(place) => {
                self.kernel.sets.remove(&set(*place));
                self.kernel
                    .elements
                    .retain(|element, _| !matches!(element, Element::Member(it) if it.set == set(*place)));
            }
            Event::SetMade(place) => {
                if self.kernel.sets.insert(set(*place)) {
                    self.ledger.mark_sets(&HashSet::from([set(*place)]));
                }
            }
            Event::Pass(seconds) => {
                self.now += Duration::from_secs((*seconds).into());
                self.kernel.forget(self.now);
                self.gate.forget(self.now);
                let over = self.ledger.forget(self.now);
                assert!(over.iter().all(|(_, hold)| hold.until <= self.now));
            }
            Event::Shorten(most) => {
                self.most = *most;
                self.gate.prepare(limits(*most));
                self.gate.enforce();
            }
            Event::Restart => self.restart(),
        }
        self.settle();
    }

    fn knock(&mut self, user: usize, service: usize, source: usize, seconds: u32, sets: [bool; 2]) {
        let (door, (name, _, once, kill)) = (door(service, source), SERVICES[service]);
        self.tokens += 1;
        let token = Some(self.tokens);
        let seconds = seconds.min(self.most);
        let until = self.now + Duration::from_secs(seconds.into());
        let members = (0..SETS.len()).filter(|place| sets[*place]).filter_map(|place| member(place, &door));
        let members: Vec<Member> = members.collect();
        let [user_name, service_name] = [USERS[user], name].map(|name| name.parse().unwrap());
        let hold = Hold {
            user: user_name,
            service: service_name,
            until,
            bound: false,
            token,
            kill,
            spent: false,
            members: members.clone(),
            asked: Some(seconds),
            waits: true,
        };
        let waiting: Vec<Option<u32>> =
            self.held.iter().filter(|held| held.door == door && held.waits).map(|held| held.token).collect();
        assert!(self.ledger.insert(door, hold));
        if self.settle() != [self.tokens] {
            return; // refused, as in a set that is full
        }
        for held in self.held.iter_mut().filter(|held| held.door == door) {
            if once && waiting.contains(&held.token) {
                held.members.clear(); // it has let nobody in
            }
            held.is_spent |= once;
            if !once && (held.user, held.service) == (user, service) {
                held.until = held.until.min(until);
            }
        }
        self.last.push((door, user, self.tokens));
        self.held.push(Held {
            user,
            service,
            door,
            until,
            token,
            is_spent: false,
            waits: !self.kernel.elements.contains_key(&Element::Opens(door)),
            members: members.into_iter().collect(),
        });
    }

    /// What others add counts only as far as it is what the holds say. A door for one connection may be spent.
    fn load_saved(&mut self) {
        for (element, (left, comment)) in self.saved.clone() {
            let is_there = match &element {
                Element::Opens(_) | Element::Lasts(_) => self.kernel.has_table,
                Element::Member(member) => self.kernel.sets.contains(&member.set),
            };
            if !is_there || self.kernel.elements.contains_key(&element) {
                continue; // nft keeps what is there
            }
            self.kernel.elements.insert(element.clone(), (self.now + left, comment));
            match element {
                Element::Opens(door) | Element::Lasts(door) => {
                    if door.once {
                        self.ledger.spend(&door);
                        for held in self.held.iter_mut().filter(|held| held.door == door) {
                            held.is_spent = true;
                            if held.waits {
                                held.members.clear(); // it has let nobody in
                            }
                        }
                    }
                    self.ledger.mark(&door);
                }
                Element::Member(member) => self.ledger.mark_member(member),
            }
        }
    }

    fn lose_table(&mut self) {
        self.kernel.has_table = false;
        self.kernel.elements.retain(|element, _| matches!(element, Element::Member(_)));
        self.lose_doors();
    }

    /// What was opened before may be spent; what waits for the table cannot be.
    fn lose_doors(&mut self) {
        self.is_loaded = false;
        self.ledger.lose_doors();
        let taken = self.held.iter_mut().filter(|held| held.door.once && !held.waits);
        taken.for_each(|held| held.is_spent = true);
    }

    fn load_table(&mut self) {
        if !self.is_loaded {
            (self.kernel.has_table, self.is_loaded) = (true, true);
            self.held.iter_mut().for_each(|held| held.waits = false);
            self.ledger.mark_all();
            self.ledger.resume();
        }
    }

    /// The next daemon knows what the elements say.
    fn restart(&mut self) {
        self.load_table();
        self.settle();
        self.ledger = Ledger::new(self.boot);
        self.held.clear();
        for (element, (until, comment)) in self.kernel.elements.clone() {
            let left = Some(until - self.now);
            let until = comment.counts_until(left, false, &self.boot, self.now).expect("it is of this boot, and lives");
            let (door, spent) = match &element {
                Element::Opens(door) => (*door, false),
                Element::Lasts(door) => (*door, true),
                Element::Member(member) => {
                    // Whoever is let in by a door that is found has a place there still.
                    self.ledger.mark_member(member.clone());
                    continue;
                }
            };
            let Comment { user, service, bound, .. } = comment;
            let at = |names: &[&str], name: &str| names.iter().position(|known| *known == name).unwrap();
            let services = SERVICES.map(|(name, ..)| name);
            let place = at(&services, service.as_str());
            self.held.push(Held {
                user: at(&USERS, user.as_str()),
                service: place,
                door,
                until,
                token: None,
                is_spent: spent,
                waits: false,
                members: BTreeSet::new(),
            });
            let (token, asked, waits, members, kill) = (None, None, false, Vec::new(), SERVICES[place].3);
            self.ledger.adopt(door, Hold { user, service, until, bound, token, kill, spent, members, asked, waits });
        }
        self.gate = Admission::new(limits(self.most), self.now);
        for (door, left) in self.ledger.ends(self.now) {
            assert_eq!(
                self.gate.admits(&Command::Known(Element::Opens(*door), left), self.now),
                Ok(Some(Duration::MAX))
            );
        }
        self.gate.enforce();
    }

    /// What the kernel should hold.
    fn expected(&self) -> BTreeMap<Element, Instant> {
        let mut expected = BTreeMap::new();
        let mut hold = |element: Element, until: Instant| {
            let at = expected.entry(element).or_insert(until);
            *at = until.max(*at);
        };
        let living: Vec<&Held> = self.held.iter().filter(|held| held.until > self.now).collect();
        for held in &living {
            for member in held.members.iter().filter(|member| self.kernel.sets.contains(&member.set)) {
                hold(Element::Member(member.clone()), held.until);
            }
            if !held.door.once {
                hold(Element::Opens(held.door), held.until);
            } else if SERVICES[held.service].3 {
                hold(Element::Lasts(held.door), held.until);
            }
        }
        for held in living.iter().filter(|held| held.door.once && !held.is_spent) {
            expected.insert(Element::Opens(held.door), held.until); // the last that was granted
        }
        expected
    }

    #[track_caller]
    fn check(&self, event: &Event) {
        if !self.is_loaded {
            return;
        }
        let there: BTreeMap<Element, Instant> =
            self.kernel.elements.iter().map(|(element, (until, _))| (element.clone(), *until)).collect();
        assert_eq!(there, self.expected(), "after {event:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_kernels_sets_hold_what_the_grants_say(events in events()) {
        let mut world = World::new();
        for event in &events {
            world.play(event);
            world.check(event);
        }
    }
}
