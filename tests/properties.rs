//! What must hold for every input there is, tried on all of them where they can be counted, else on many from a fixed seed.

#[path = "support/numbers.rs"]
mod numbers;
#[path = "support/pair.rs"]
mod pair;
#[path = "support/persona.rs"]
mod recorded;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use knockq::client::issued::{Counters, IssuedFile};
use knockq::crypto::{Binding, KnockKey, KnockPorts, KnockSecrets, Side, knockknock};
use knockq::verify::{Candidate, Index, Key, KnockknockProfile, Reason, Registry, Secrets, SourcePolicy, User};
use numbers::Numbers;
use pair::{End, Knock, Memory, NOW, Server, WINDOW, name, private_key, service, world};
use proptest::prelude::{ProptestConfig, Strategy, any, prop, prop_assert, prop_assert_eq, prop_oneof, proptest};
use proptest::test_runner::RngSeed;

const SEED: u64 = 20_261_122;

fn fixed(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, rng_seed: RngSeed::Fixed(SEED), ..ProptestConfig::default() }
}

/// What a bit of a knock's packet is (docs/protocol.md sections 3 and 4).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Part {
    /// Sequence number, TSval, destination port: the token, and what picks one out of it. A flip grants nothing.
    Token,
    /// The source address. A bound token is then worth nothing; one that is not bound opens for the address that it has.
    Source,
    /// What says where the parts are and that this is a SYN: version, length of the IP header, fragment fields, protocol,
    /// data offset, FIN, SYN, RST, ACK, kinds and lengths of the options that lead to the timestamp.
    Shape,
    /// Not part of the knock, and not looked at: TOS, lengths and checksums, IP identification, DF, TTL, flow label,
    /// destination address, source port, acknowledgement, other flags, window, urgent pointer, values of other options,
    /// TSecr. A flip changes nothing of what is granted, nor for whom.
    Free,
}

/// Which part a bit is of; bit 0 is the first on the wire. The packet is as in docs/protocol.md section 4.
fn part(bit: usize, is_v4: bool) -> Part {
    let (byte, mask) = (bit / 8, 0x80_u8 >> (bit % 8));
    let (header, source) = if is_v4 { (20, 12..16) } else { (40, 8..24) };
    match byte.checked_sub(header) {
        Some(2..8 | 28..32) => Part::Token,
        Some(12) if mask >= 0x10 => Part::Shape,     // data offset
        Some(13) if mask & 0x17 != 0 => Part::Shape, // FIN, SYN, RST, ACK
        Some(20 | 21 | 24..28) => Part::Shape,
        Some(_) => Part::Free,
        None if source.contains(&byte) => Part::Source,
        None if is_v4 => match byte {
            0 | 7 | 9 => Part::Shape,
            6 if mask & 0x3f != 0 => Part::Shape, // more fragments, offset
            _ => Part::Free,
        },
        None if byte == 6 || byte == 0 && mask >= 0x10 => Part::Shape,
        None => Part::Free,
    }
}

fn flip(packet: &[u8], bits: &[usize]) -> Vec<u8> {
    let mut flipped = packet.to_vec();
    for bit in bits {
        flipped[bit / 8] ^= 0x80 >> (bit % 8);
    }
    flipped
}

fn source_of(packet: &[u8], is_v4: bool) -> IpAddr {
    if is_v4 {
        <[u8; 4]>::try_from(&packet[12..16]).unwrap().into()
    } else {
        <[u8; 16]>::try_from(&packet[8..24]).unwrap().into()
    }
}

/// A server to which one knock was sent, whose user may open services with selectors that differ in one and two bits.
struct Target {
    server: Server,
    knock: Vec<u8>,
    is_v4: bool,
    is_bound: bool,
}

impl Target {
    fn each() -> impl Iterator<Item = Self> {
        [(true, true), (true, false), (false, true), (false, false)].into_iter().map(|(is_v4, is_bound)| {
            let (mut server, clients) = world(1, |_, user| user.services = vec![0, 1, 2, 3]);
            server.registry.window = 5;
            let names = ["ssh", "one-bit", "another-bit", "both-bits"];
            let services =
                names.iter().zip([22, 23, 20, 21]).map(|(name, port)| service(name, &[&format!("tcp/{port}")], false));
            server.registry.services = services.collect();
            server.restart(NOW);
            let source = if is_v4 { "203.0.113.9" } else { "2001:db8::9" };
            let knock = Knock::new(&clients[0], NOW).from(source);
            let knock = if is_bound { knock.bound_to(source) } else { knock }.packet();
            Self { server, knock, is_v4, is_bound }
        })
    }

    /// What this packet opens, and for whom, at a server that has seen no other; why nothing, else.
    fn opens(&mut self, packet: &[u8]) -> Result<(String, IpAddr), Reason> {
        let end = self.server.receive(packet, NOW);
        // These two leave nothing behind, where nothing was spent.
        let leaves_nothing = matches!(end, End::Refused(Reason::Unknown | Reason::WrongKnockPort));
        if !leaves_nothing || !self.server.log.last.is_empty() {
            self.server.log = Memory::default();
            self.server.restart(NOW);
        }
        match end {
            End::Granted(grant) => Ok((grant.service.to_string(), grant.source)),
            End::Refused(reason) => Err(reason),
            End::Withdrawn { .. } => panic!("withdrawn, though nothing was granted before"),
        }
    }

    /// What must come of a packet with these bits flipped, as far as the parts that they are in say.
    #[track_caller]
    fn check(&mut self, bits: &[usize]) {
        let packet = flip(&self.knock, bits);
        let parts: BTreeSet<Part> = bits.iter().map(|&bit| part(bit, self.is_v4)).collect();
        let opened = self.opens(&packet);
        let intact = Ok(("ssh".to_owned(), source_of(&packet, self.is_v4)));
        let (is_v4, is_bound) = (self.is_v4, self.is_bound);
        let context = || format!("bits {bits:?} {parts:?}, v4 {is_v4}, bound {is_bound}: {opened:?}");
        if parts.contains(&Part::Token) || is_bound && parts.contains(&Part::Source) {
            assert!(opened.is_err(), "{}", context());
        } else if parts.contains(&Part::Shape) {
            assert!(opened.is_err() || opened == intact, "{}", context());
        } else {
            assert_eq!(opened, intact, "{}", context());
        }
    }
}

#[test]
fn a_flipped_bit_of_the_token_opens_nothing_and_one_outside_the_knock_changes_nothing() {
    for mut target in Target::each() {
        let packet = target.knock.clone();
        assert_eq!(target.opens(&packet).unwrap().0, "ssh", "the knock as it is opens");
        let mut counts = BTreeMap::new();
        for bit in 0..packet.len() * 8 {
            *counts.entry(part(bit, target.is_v4)).or_insert(0) += 1;
            target.check(&[bit]);
        }
        assert_eq!(counts[&Part::Token], 80, "16 of the port, 32 of the sequence number, 32 of the TSval");
        assert_eq!(counts[&Part::Source], if target.is_v4 { 32 } else { 128 });
    }
}

#[test]
fn why_a_flipped_bit_opens_nothing_is_said_by_the_check_that_it_fails() {
    for mut target in Target::each() {
        let packet = target.knock.clone();
        let (tcp, protocol) = if target.is_v4 { (20, 9) } else { (40, 6) };
        let mut each = |bits: Vec<usize>, allowed: &[Reason]| {
            let reasons: Vec<Reason> =
                bits.iter().map(|&bit| target.opens(&flip(&packet, &[bit])).unwrap_err()).collect();
            assert!(reasons.iter().all(|reason| allowed.contains(reason)), "{allowed:?}: {reasons:?}");
            reasons
        };
        let bytes = |first: usize, count: usize| (first * 8..(first + count) * 8).collect();
        each(bytes(tcp + 2, 2), &[Reason::WrongKnockPort]);
        // Two bits make it the sequence number of another service that this user may open, but the tag is not for that.
        let reasons = each(bytes(tcp + 4, 4), &[Reason::Unknown, Reason::WrongTag]);
        assert_eq!(reasons.iter().filter(|reason| **reason == Reason::WrongTag).count(), 2);
        each(bytes(tcp + 28, 4), &[Reason::WrongTag]);
        each(bytes(protocol, 1), &[Reason::NotTcp]);
        let flags = (tcp + 13) * 8;
        each(vec![flags + 3, flags + 5, flags + 6, flags + 7], &[Reason::NotSyn]);
        if tcp == 20 {
            each((6 * 8 + 2..8 * 8).collect(), &[Reason::Fragment]);
        }
    }
}

#[test]
fn two_flipped_bits_of_token_or_source_open_nothing() {
    for mut target in Target::each() {
        let bits: Vec<usize> = (0..target.knock.len() * 8)
            .filter(|&bit| matches!(part(bit, target.is_v4), Part::Token | Part::Source))
            .collect();
        for (place, &first) in bits.iter().enumerate() {
            for &second in &bits[place + 1..] {
                target.check(&[first, second]);
            }
        }
    }
}

#[test]
fn any_number_of_flipped_bits_anywhere_opens_what_the_untouched_parts_say() {
    let mut numbers = Numbers(SEED);
    for mut target in Target::each() {
        for _ in 0..5000 {
            let count = 1 + numbers.below(24);
            let end = u64::try_from(target.knock.len() * 8).unwrap();
            let bits: BTreeSet<usize> = (0..count).map(|_| usize::try_from(numbers.below(end)).unwrap()).collect();
            target.check(&bits.into_iter().collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_knock_that_is_cut_anywhere_opens_nothing_and_what_follows_it_changes_nothing() {
    for mut target in Target::each() {
        let packet = target.knock.clone();
        for length in 0..packet.len() {
            assert_eq!(target.opens(&packet[..length]), Err(Reason::Truncated), "{length} bytes");
        }
        let whole = target.opens(&packet);
        for more in [1, 66, 1400] {
            assert_eq!(target.opens(&[&packet[..], &vec![0xa5; more]].concat()), whole);
        }
    }
}

#[test]
fn a_timestamp_is_found_past_options_of_any_kind() {
    for mut target in Target::each() {
        let knock = target.knock.clone();
        let tcp = if target.is_v4 { 20 } else { 40 };
        let timestamp = &knock[tcp + 26..tcp + 36];
        // What comes before it: an unknown kind, a Fast Open cookie, padding, one that lies about its length, an end.
        let before: [(&[u8], bool); 6] = [
            (&[253, 4, 0xab, 0xcd, 1, 1], true),
            (&[34, 6, 1, 2, 3, 4], true),
            (&[1, 1, 1, 1, 1, 1], true),
            (&[8, 6, 1, 2, 3, 4], true),
            (&[2, 1, 1, 1, 1, 1], false),
            (&[0, 6, 1, 1, 1, 1], false),
        ];
        for (options, is_found) in before {
            let mut packet = [&knock[..tcp + 20], options, timestamp].concat();
            packet[tcp + 12] = 9 << 4;
            let opened = target.opens(&packet);
            assert_eq!(opened.is_ok(), is_found, "{options:?}: {opened:?}");
            assert!(is_found || opened == Err(Reason::NoTimestamp), "{options:?}: {opened:?}");
        }
    }
}

#[test]
fn the_window_and_the_last_counter_are_exact_from_the_first_second_to_the_last() {
    let (mut server, clients) = world(1, |_, _| {});
    let client = server.registry.users[0].public_key;
    for window in [0, 1, 5, WINDOW] {
        server.registry.window = window;
        for now in [
            0,
            1,
            5,
            WINDOW - 1,
            WINDOW,
            WINDOW + 1,
            NOW,
            u64::MAX - WINDOW - 3,
            u64::MAX - WINDOW,
            u64::MAX - 2,
            u64::MAX,
        ] {
            let near = |edge: u64| (0..=6).map(move |off: u64| edge.wrapping_add(off).wrapping_sub(3));
            let counters = near(now).chain(near(now.wrapping_sub(window))).chain(near(now.wrapping_add(window)));
            for n in counters.collect::<BTreeSet<_>>() {
                let packet = Knock::new(&clients[0], n).packet();
                for last in [None, Some(0), n.checked_sub(1), Some(n), n.checked_add(1), Some(u64::MAX)] {
                    server.log.last = last.map(|last| (client, last)).into_iter().collect();
                    server.restart(now);
                    let is_due = n.abs_diff(now) <= window && last.is_none_or(|last| last < n);
                    let end = server.receive(&packet, now);
                    assert_eq!(
                        matches!(end, End::Granted(_)),
                        is_due,
                        "window {window}, {n} at {now} after {last:?}: {end:?}"
                    );
                }
            }
        }
    }
}

/// What happens to a server while somebody knocks.
#[derive(Clone, Debug)]
enum Event {
    Knock { user: usize, off: i64 },
    Pass(u64),
    Restart,
    Disk { is_full: bool },
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        8 => (0..3_usize, -70..=70_i64).prop_map(|(user, off)| Event::Knock { user, off }),
        3 => (0..40_u64).prop_map(Event::Pass),
        1 => proptest::strategy::Just(Event::Restart),
        1 => any::<bool>().prop_map(|is_full| Event::Disk { is_full }),
    ]
}

proptest! {
    #![proptest_config(fixed(256))]

    /// Section 2, the server's rule: whatever comes in whichever order, and whatever fails.
    #[test]
    fn each_counter_is_accepted_at_most_once_and_only_in_order(events in prop::collection::vec(event(), 1..80)) {
        let (mut server, clients) = world(3, |_, _| {});
        let mut now = NOW;
        let (mut taken, mut durable) = ([None; 3], [None; 3]);
        for event in events {
            match event {
                Event::Pass(seconds) => now += seconds,
                Event::Restart => {
                    server.restart(now);
                    taken = durable;
                }
                Event::Disk { is_full } => server.log.is_full = is_full,
                Event::Knock { user, off } => {
                    let n = now.checked_add_signed(off).unwrap();
                    let end = server.receive(&Knock::new(&clients[user], n).bound_to("203.0.113.9").packet(), now);
                    let is_due = off.unsigned_abs() <= WINDOW;
                    // What the index holds beyond the window is spent, too.
                    let is_fresh = (is_due || off > 0 && off.unsigned_abs() <= WINDOW + 2)
                        && taken[user] < Some(n);
                    let is_written = is_fresh && !server.log.is_full;
                    if is_fresh {
                        taken[user] = Some(n);
                    }
                    if is_written {
                        durable[user] = Some(n);
                    }
                    if is_written && is_due {
                        end.grant();
                    } else {
                        prop_assert!(matches!(end, End::Refused(_)), "{end:?}");
                        prop_assert_eq!(end == End::Refused(Reason::NotDurable), is_fresh && is_due);
                    }
                }
            }
        }
    }
}

/// A user with the keys of a number, who may open these services.
fn user(place: usize, services: Vec<usize>) -> (User, KnockKey) {
    let (server, own) = (private_key(0), private_key(1 + u64::try_from(place).unwrap()));
    let derive = |side, own, peer| KnockSecrets::derive(side, own, peer, None).unwrap();
    let entry = User {
        name: name(&format!("u{place}")),
        public_key: *own.public(),
        secrets: Secrets::Token(derive(Side::Server, &server, own.public())),
        services,
        source: SourcePolicy::Any,
        from: Vec::new(),
        open_for: None,
        expires: None,
    };
    (entry, KnockKey::new(&derive(Side::Client, &own, server.public())))
}

/// A registry of these services (by selector) and users (by the services that they may open).
fn registry(window: u64, selectors: &BTreeSet<u16>, users: &[u8]) -> (Registry, Vec<KnockKey>) {
    let services = selectors.iter().map(|selector| knockq::verify::Service {
        selector: *selector,
        ..service(&format!("s{selector}"), &["tcp/22"], false)
    });
    let services: Vec<_> = services.collect();
    let permitted = |mask: u8| (0..services.len()).filter(|place| mask >> place & 1 == 1).collect();
    let (entries, keys) = users.iter().enumerate().map(|(place, &mask)| user(place, permitted(mask))).unzip();
    (
        Registry {
            window,
            grants_per_minute: 60_000,
            knock_ports: KnockPorts::new([20000..=20007]).unwrap(),
            services,
            users: entries,
        },
        keys,
    )
}

/// Section 3, "Lookup", in its own words and without an index: every knock that is live, by its sequence number.
struct Oracle<'a> {
    registry: &'a Registry,
    keys: &'a [KnockKey],
    /// The first half of the token for selector 0, as a client makes it.
    sequences: HashMap<(usize, u64), u32>,
}

type Knocks = BTreeSet<(usize, u64, u16)>;

impl Oracle<'_> {
    fn sequence(&mut self, user: usize, n: u64, port: u16) -> u32 {
        let key = &self.keys[user];
        let first = *self.sequences.entry((user, n)).or_insert_with(|| key.seal(n, 0, Binding::Unbound).sequence);
        first ^ u32::from(port) << 16
    }

    fn live(&mut self, first: u64, last: u64) -> BTreeMap<u32, Knocks> {
        let mut live: BTreeMap<u32, Knocks> = BTreeMap::new();
        let selectors: Vec<Vec<u16>> =
            self.registry.users.iter().map(|user| self.registry.selectors(user).collect()).collect();
        for (user, ports) in selectors.iter().enumerate() {
            for (n, &port) in (first..=last).flat_map(|n| ports.iter().map(move |port| (n, port))) {
                live.entry(self.sequence(user, n, port)).or_default().insert((user, n, port));
            }
        }
        live
    }
}

/// How the clock goes on, and how much the index may do about it.
#[derive(Clone, Debug)]
struct Step {
    clock: Clock,
    budget: usize,
}

#[derive(Clone, Debug)]
enum Clock {
    On(u64),
    Jump(i64),
    To(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let clock = prop_oneof![
        12 => (0..4_u64).prop_map(Clock::On),
        4 => (-8..8_i64).prop_map(Clock::Jump),
        2 => (-400..400_i64).prop_map(Clock::Jump),
        1 => edge().prop_map(Clock::To),
    ];
    let budget = prop_oneof![3 => 0..120_usize, 2 => proptest::strategy::Just(usize::MAX)];
    (clock, budget).prop_map(|(clock, budget)| Step { clock, budget })
}

/// Times among which are the first and the last seconds that there are.
fn edge() -> impl Strategy<Value = u64> {
    prop_oneof![3 => NOW - 500..NOW + 500, 1 => 0..200_u64, 1 => u64::MAX - 200..=u64::MAX, 1 => any::<u64>()]
}

proptest! {
    #![proptest_config(fixed(48))]

    #[test]
    fn the_index_is_what_the_document_says_however_the_clock_walks(
        window in 0..=90_u64,
        selectors in prop::collection::btree_set(any::<u16>(), 1..=4),
        users in prop::collection::vec(0..16_u8, 0..40),
        start in edge(),
        steps in prop::collection::vec(step(), 1..14),
        strangers in prop::collection::vec(any::<u32>(), 50),
    ) {
        let (registry, keys) = registry(window, &selectors, &users);
        let mut oracle = Oracle { registry: &registry, keys: &keys, sequences: HashMap::new() };
        let mut now = start;
        let indexed: Vec<Key> = keys.iter().cloned().map(Key::Token).collect();
        let mut index = Index::new(&registry, &indexed, now);
        let whole = |now: u64| (now.saturating_sub(window), now.saturating_add(window + 2));
        // Seconds whose knocks are all in the index, and those of which there may be some, for want of time since.
        let (mut sure, mut span) = (whole(now), whole(now));
        for step in steps {
            now = match step.clock {
                Clock::On(seconds) => now.saturating_add(seconds),
                Clock::Jump(seconds) => now.saturating_add_signed(seconds),
                Clock::To(time) => time,
            };
            let whole = whole(now);
            // As Verifier::advance does. A clock that goes back takes nothing out that is yet to come.
            let is_behind = if index.covers(now) {
                let is_behind = index.advance(now, step.budget);
                // Of the last second alone some users may be missing while it is worked on.
                let last = if is_behind { now.saturating_add(window).saturating_sub(1) } else { whole.1 };
                sure = (whole.0, sure.1.max(last));
                span = (if is_behind { span.0 } else { whole.0 }, span.1.max(whole.1));
                is_behind
            } else {
                index = Index::new(&registry, &indexed, now);
                (sure, span) = (whole, whole);
                false
            };
            let (must, may) = (oracle.live(sure.0, sure.1), oracle.live(span.0, span.1));
            let mut count = 0;
            for (sequence, knocks) in &may {
                let found: Vec<Candidate> = index.candidates(*sequence).collect();
                let once: Knocks = found.iter().map(|found| (found.user, found.n, found.port)).collect();
                prop_assert_eq!(found.len(), once.len(), "a knock is in it twice");
                prop_assert!(once.is_subset(knocks), "at {}: {:?}, of {:?}", now, once, knocks);
                let is_there = must.get(sequence).is_none_or(|knocks| knocks.is_subset(&once));
                prop_assert!(is_there, "at {}, behind {}: {:?} lacks of {:?}", now, is_behind, once, must.get(sequence));
                count += found.len();
            }
            prop_assert_eq!(index.len(), count, "at {}, knocks of other seconds or users are in it", now);
            for (stranger, found) in strangers.iter().flat_map(|s| index.candidates(*s).map(move |found| (*s, found))) {
                prop_assert_eq!(oracle.sequence(found.user, found.n, found.port), stranger);
            }
        }
    }
}

/// A client whose clock is at somebody's mercy, and a server whose clock is right; who sits between them keeps knocks back.
struct Ordeal {
    numbers: Numbers,
    window: u64,
    /// The right time.
    now: u64,
    issued: Counters,
    used: BTreeSet<u64>,
    last: Option<u64>,
    kept_back: Vec<u64>,
}

impl Ordeal {
    fn new(seed: u64) -> Self {
        let mut numbers = Numbers(seed);
        let window = [5, 60, 600][usize::try_from(numbers.below(3)).unwrap()];
        Self {
            numbers,
            window,
            now: NOW,
            issued: Counters::default(),
            used: BTreeSet::new(),
            last: None,
            kept_back: Vec::new(),
        }
    }

    /// Years off, at either end of time, a window or two off, or right.
    fn hostile_clock(&mut self) -> u64 {
        const YEARS: u64 = 30 * 365 * 86_400;
        match self.numbers.below(8) {
            0 => self.numbers.below(3),
            1 => u64::MAX - self.numbers.below(3 * self.window),
            2 => self.now + self.numbers.below(YEARS),
            3 => self.now - self.numbers.below(YEARS),
            4 | 5 => self.now + self.numbers.below(4 * self.window) - 2 * self.window,
            6 => self.used.last().map_or(self.now, |n| n.saturating_sub(self.numbers.below(2 * self.window))),
            _ => self.now,
        }
    }

    /// A counter, durable, as [`Counters`] has it; there may be none at the end of time.
    fn issue(&mut self, clock: u64) -> Option<u64> {
        let n = self.issued.next(clock, self.window)?;
        self.issued.record(n);
        assert!(n >= clock, "{n} at {clock}");
        assert!(self.used.insert(n), "{n} was used before");
        Some(n)
    }

    /// Docs section 2, the server's rule.
    fn arrive(&mut self, n: u64) -> bool {
        let is_fresh = n.abs_diff(self.now) <= self.window && self.last < Some(n);
        if is_fresh {
            self.last = Some(n);
        }
        is_fresh
    }

    fn let_some_through(&mut self) {
        for _ in 0..self.numbers.below(3) {
            if !self.kept_back.is_empty() {
                let place = self.numbers.below(u64::try_from(self.kept_back.len()).unwrap());
                let n = self.kept_back.swap_remove(usize::try_from(place).unwrap());
                self.arrive(n);
            }
        }
    }

    /// Knocks under any clock. The process may die once the counter is on disk; the knock may be lost, or kept back.
    fn suffer(&mut self) {
        self.now += self.numbers.below(100);
        let clock = self.hostile_clock();
        if let Some(n) = self.issue(clock) {
            match self.numbers.below(4) {
                0 => drop(self.arrive(n)),
                1 => {}
                _ => self.kept_back.push(n),
            }
        }
        self.let_some_through();
    }

    /// The clock is right: a knock is sent after a wait that the issued counters bound, and is accepted.
    fn recover(&mut self) {
        self.now += self.numbers.below(3);
        let (now, issued) = (self.now, u64::try_from(self.used.len()).unwrap());
        let n = self.issue(now).expect("a right clock is far from the end of time");
        assert!(n - now <= self.window + 1 + issued, "{} s to wait for", n - now);
        self.now = now.max(n - 30.min(self.window / 2));
        let before = self.last;
        self.let_some_through();
        // A knock of the future that was kept back is spent when its time comes: that costs the one on its way.
        let is_overtaken = self.last != before && self.last > Some(n);
        assert!(self.arrive(n) || is_overtaken, "{n} refused at {}, last {:?}", self.now, self.last);
    }
}

#[test]
fn no_hostile_clock_makes_a_client_use_a_counter_twice_or_locks_it_out_once_it_is_right() {
    for round in 0..3000 {
        let seed = SEED + round;
        let mut ordeal = Ordeal::new(seed);
        let survived = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..3 {
                for _ in 0..ordeal.numbers.below(40) {
                    ordeal.suffer();
                }
                for _ in 0..5 {
                    ordeal.recover();
                }
            }
        }));
        assert!(survived.is_ok(), "with seed {seed}");
    }
}

#[test]
fn counters_that_were_folded_into_the_floor_are_never_issued_again() {
    for seed in 0..4 {
        let mut ordeal = Ordeal::new(seed);
        for _ in 0..9000 {
            ordeal.now += ordeal.numbers.below(2);
            let clock = ordeal.hostile_clock();
            ordeal.issue(clock);
        }
        assert!(ordeal.used.len() > 6000, "{} counters, of which 4096 are kept one by one", ordeal.used.len());
    }
}

#[test]
fn processes_with_clocks_of_their_own_never_issue_one_counter() {
    let directory = std::env::temp_dir().join(format!("knockq-counters-{}", std::process::id()));
    let (client, server) = (*private_key(1).public(), *private_key(0).public());
    let process = |seed| {
        let mut ordeal = Ordeal::new(seed);
        let mut issued = Vec::new();
        for _ in 0..100 {
            ordeal.now += ordeal.numbers.below(3);
            let clock = ordeal.hostile_clock();
            // Each knock locks and reads anew, as `knockq send` does.
            let mut counters = IssuedFile::<Counters>::open(&directory, &[&client, &server], |_| {}).unwrap();
            issued.extend(counters.issue(clock, 60).ok());
        }
        issued
    };
    let mut issued = std::thread::scope(|scope| {
        let processes: Vec<_> = (0..4).map(|seed| scope.spawn(move || process(seed))).collect();
        processes.into_iter().flat_map(|process| process.join().unwrap()).collect::<Vec<u64>>()
    });
    std::fs::remove_dir_all(&directory).unwrap();
    let count = issued.len();
    issued.sort_unstable();
    issued.dedup();
    assert!(issued.len() == count && count > 300, "{} of {count} are different", issued.len());
}

proptest! {
    #![proptest_config(fixed(48))]

    #[test]
    fn a_profiles_knocks_around_its_count_are_in_the_index_and_no_other_however_it_moves(
        selectors in prop::collection::btree_set(any::<u16>(), 1..=3),
        counts in prop::collection::vec(count(), 1..12),
    ) {
        let (mut registry, _) = registry(1, &selectors, &[u8::MAX]);
        let secrets: knockknock::Secrets = format!("{0}==\n{0}==", "A".repeat(22)).parse().unwrap();
        let profile = KnockknockProfile { secrets: secrets.clone(), knock_port: 2222, counter: 0, as_of: 0 };
        registry.users[0].secrets = Secrets::Knockknock(profile);
        let ports: Vec<u16> = registry.selectors(&registry.users[0]).collect();
        let key = knockknock::Key::new(&secrets);
        let mut index = Index::new(&registry, &[registry.users[0].secrets.key()], NOW);
        prop_assert_eq!(index.len(), 0);
        for next in counts {
            index.count(0, next);
            let live = next.saturating_sub(20)..(next + 20).min(1 << 32);
            let around = live.start.saturating_sub(30)..(live.end + 30).min(1 << 32);
            for (n, &port) in around.flat_map(|n| ports.iter().map(move |port| (n, port))) {
                let sequence = key.seal(u32::try_from(n).unwrap(), port).sequence;
                let is_in = index.candidates(sequence).any(|found| found == Candidate { user: 0, n, port });
                prop_assert_eq!(is_in, live.contains(&n), "{} of {:?}", n, live);
            }
            prop_assert_eq!(u64::try_from(index.len()).unwrap(), (live.end - live.start) * ports.len() as u64);
        }
    }
}

/// Counts, near each other and at both ends.
fn count() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0..100_u64, 1 => 0..(1_u64 << 32), 2 => (1_u64 << 32) - 60..=1 << 32]
}
