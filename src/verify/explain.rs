//! What a refused packet was: its sequence number against every key over a day either way.
//!
//! For whoever has the keys and the time, not for the daemon: one AES block for each key and second, 172,800 a key.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::{Key, Reason, Registry, Secrets, Service, SourcePolicy, User};
use crate::crypto::{Binding, KnockKey, Pad};
use crate::packet::Syn;
use crate::service::Name;

mod cause;
mod knockknock;

pub use cause::Cause;
use knockknock::{Counted, Profile};

/// Seconds that a clock may be off, either way.
const DAY: u64 = 86_400;

/// Addresses that most who sit behind a NAT have: the first 16 bits, and how many networks of that size from there.
const BEHIND_NAT: [([u8; 2], u8); 3] = [([192, 168], 1), ([10, 0], 2), ([172, 16], 2)];

/// A packet that opened nothing. Its bytes are for [`explain`] alone: they may hold a token that can still be spent.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// When it came, in Unix seconds.
    pub at: u64,
    /// Why it was refused.
    pub reason: Reason,
    /// Whose key it had to do with, as far as the daemon knew.
    pub user: Option<Name>,
    /// Its first bytes, from the IP header on.
    pub packet: Vec<u8>,
}

/// What else is known of a user.
#[derive(Clone, Default)]
pub struct Past {
    /// The last counter that was accepted. Of a knockknock profile whose count the daemon waits for there is none.
    pub accepted: Option<u64>,
    /// Addresses that their knocks came from.
    pub addresses: Vec<IpAddr>,
}

/// What a packet was.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    /// When it came, in Unix seconds.
    pub at: u64,
    /// Who sent it.
    pub source: IpAddr,
    /// The reason that the daemon gave.
    pub reason: Reason,
    /// Whose key fits.
    pub user: Option<Name>,
    /// The service that was asked for, if there is such a one.
    pub service: Option<Name>,
    /// What is wrong with it, in the order of the protocol's checks.
    pub causes: Vec<Cause>,
}

/// A knock that a packet could be.
#[derive(Clone, Copy)]
struct Candidate {
    user: usize,
    n: u64,
    selector: u16,
    knock_port: u16,
    /// For whom the tag holds, if for anybody.
    binding: Option<Binding>,
}

/// A record whose packet could be a knock.
struct Suspect<'a> {
    record: &'a Record,
    syn: Syn,
    best: Option<Candidate>,
    /// The knockknock profile's knock that it is.
    counted: Option<Counted>,
}

/// Explains these packets, as far as they are SYNs. `past` knows the users' by name; `tell` is called before each user with
/// their place in the registry, for there may be many.
pub fn explain(
    registry: &Registry,
    past: &HashMap<Name, Past>,
    records: &[Record],
    mut tell: impl FnMut(usize),
) -> Vec<Finding> {
    let parsed = records.iter().filter_map(|record| Some((record, Syn::parse(&record.packet).ok()?)));
    let mut suspects: Vec<Suspect<'_>> =
        parsed.map(|(record, syn)| Suspect { record, syn, best: None, counted: None }).collect();
    let seconds = seconds_around(&suspects);
    let places = by_low_half(&suspects);
    let by_sequence = knockknock::by_sequence(&suspects);
    for (place, user) in registry.users.iter().enumerate() {
        tell(place);
        let key = match user.secrets.key() {
            Key::Token(key) => key,
            Key::Knockknock { key, knock_port } => {
                let accepted = past.get(&user.name).and_then(|past| past.accepted);
                let next = user.last(accepted).map_or(0, |last| last.saturating_add(1));
                Profile { user: place, key: &key, knock_port, next, is_known: accepted.is_some() }.search(
                    registry,
                    &by_sequence,
                    &mut suspects,
                );
                continue;
            }
        };
        for n in seconds.iter().cloned().flatten() {
            let pad = key.pad(n);
            // Within the low half there is no selector.
            for &suspect in places.get(low_half(pad.sequence_for(0))).into_iter().flatten() {
                if let Some(suspect) = suspects.get_mut(suspect) {
                    suspect.try_key(registry, place, user, &key, n, &pad);
                }
            }
        }
    }
    suspects.iter_mut().for_each(|suspect| suspect.guess_address(registry, past));
    suspects.iter().map(|suspect| suspect.finding(registry, past)).collect()
}

/// The seconds within a day of any of these, each once.
fn seconds_around(suspects: &[Suspect<'_>]) -> Vec<RangeInclusive<u64>> {
    let mut times: Vec<u64> = suspects.iter().map(|suspect| suspect.record.at).collect();
    times.sort_unstable();
    let mut ranges: Vec<RangeInclusive<u64>> = Vec::new();
    for at in times {
        let (start, end) = (at.saturating_sub(DAY), at.saturating_add(DAY));
        match ranges.last_mut() {
            Some(last) if *last.end() >= start => *last = *last.start()..=end,
            _ => ranges.push(start..=end),
        }
    }
    ranges
}

/// The places of those whose sequence number has this low half.
fn by_low_half(suspects: &[Suspect<'_>]) -> Vec<Vec<usize>> {
    let mut places = vec![Vec::new(); 1 << 16];
    for (place, suspect) in suspects.iter().enumerate() {
        if let Some(those) = places.get_mut(low_half(suspect.syn.sequence)) {
            those.push(place);
        }
    }
    places
}

fn low_half(sequence: u32) -> usize {
    let [_, _, high, low] = sequence.to_be_bytes();
    usize::from(u16::from_be_bytes([high, low]))
}

impl Suspect<'_> {
    /// Whether it is this user's knock with this counter. The half of the sequence number that fits is 16 bits: a tag that
    /// holds proves it, and so do a selector and a knock port that are the server's.
    fn try_key(&mut self, registry: &Registry, place: usize, user: &User, key: &KnockKey, n: u64, pad: &Pad) {
        if n.abs_diff(self.record.at) > DAY || self.best.is_some_and(|best| best.binding.is_some()) {
            return;
        }
        let [high, low, ..] = (pad.sequence_for(0) ^ self.syn.sequence).to_be_bytes();
        let selector = u16::from_be_bytes([high, low]);
        let knock_port = pad.knock_port(&registry.knock_ports);
        let bindings = [Binding::Bound(self.syn.source), Binding::Unbound].into_iter();
        let binding = self.syn.tsval.and_then(|tsval| {
            let mut bindings = bindings;
            bindings.find(|binding| key.open(n, selector, tsval, *binding).is_some())
        });
        let is_service = registry.services.iter().any(|service| service.selector == selector);
        let is_theirs = self.record.user.as_ref() == Some(&user.name);
        if binding.is_some() || is_service && (is_theirs || knock_port == self.syn.destination_port) {
            self.best = Some(Candidate { user: place, n, selector, knock_port, binding });
        }
    }

    /// Tries the addresses that the user's knocks, or anybody's, came from, and those that are usual behind a NAT.
    fn guess_address(&mut self, registry: &Registry, past: &HashMap<Name, Past>) {
        let (Some(best), Some(tsval)) = (&mut self.best, self.syn.tsval) else { return };
        let Some(user) = registry.users.get(best.user).filter(|_| best.binding.is_none()) else { return };
        let Secrets::Token(secrets) = &user.secrets else { return };
        let key = KnockKey::new(secrets);
        let own = past.get(&user.name).into_iter().flat_map(|past| &past.addresses);
        let all = past.values().flat_map(|past| &past.addresses);
        let private = BEHIND_NAT.into_iter().flat_map(|([a, b], networks)| {
            let seconds = b..b.saturating_add(networks);
            seconds.flat_map(move |b| (0..=u16::MAX).map(move |rest| (a, b, rest.to_be_bytes())))
        });
        let private = private.map(|(a, b, [c, d])| IpAddr::from(Ipv4Addr::new(a, b, c, d)));
        let bindings = own.chain(all).copied().chain(private).map(Binding::Bound);
        best.binding = bindings.into_iter().find(|binding| key.open(best.n, best.selector, tsval, *binding).is_some());
    }

    fn finding(&self, registry: &Registry, past: &HashMap<Name, Past>) -> Finding {
        let Record { at, reason, .. } = *self.record;
        let known = self.best.and_then(|best| Some((best, registry.users.get(best.user)?)));
        let counted = self.counted.and_then(|counted| Some((counted, registry.users.get(counted.user)?)));
        let (mut user, mut service, mut causes) = (self.record.user.clone(), None, Vec::new());
        if let Some((counted, owner)) = counted {
            let asked = registry.services.iter().find(|service| service.selector == counted.selector);
            causes = self.causes_of_count(registry, counted, owner, asked);
            (user, service) = (Some(owner.name.clone()), asked.map(|service| service.name.clone()));
        } else if reason == Reason::WrongTag && self.is_of_profile(registry) {
            causes.push(Cause::Rewritten);
        } else if let Some((best, owner)) = known {
            let asked = registry.services.iter().find(|service| service.selector == best.selector);
            causes = self.causes(registry, past.get(&owner.name), &best, owner, asked);
            (user, service) = (Some(owner.name.clone()), asked.map(|service| service.name.clone()));
        } else if user.is_some() || reason != Reason::Unknown {
            causes.push(Cause::State { reason });
        } else {
            causes.push(Cause::NoKey);
        }
        Finding { at, source: self.syn.source, reason, user, service, causes }
    }

    /// What is wrong with a knock whose key is known.
    fn causes(
        &self,
        registry: &Registry,
        past: Option<&Past>,
        best: &Candidate,
        user: &User,
        service: Option<&Service>,
    ) -> Vec<Cause> {
        let Syn { source, destination_port: port, .. } = self.syn;
        let mut causes = Vec::new();
        causes.extend(self.time(registry.window, past, best.n));
        causes.extend((best.knock_port != port).then_some(Cause::WrongKnockPort { port }));
        causes.extend(of_source(user, source));
        causes.extend(match (self.syn.tsval, best.binding) {
            (None, _) => Some(Cause::TimestampStripped),
            (_, None) => Some(Cause::TimestampRewritten),
            (_, Some(Binding::Bound(bound))) if bound != source => Some(Cause::WrongSource { bound, source }),
            (_, Some(Binding::Unbound)) if user.source == SourcePolicy::Bound => Some(Cause::NotBound),
            _ => None,
        });
        causes.extend(self.of_rights(registry, user, best.selector, service));
        if causes.is_empty() {
            causes.push(Cause::Nothing);
        }
        causes
    }

    /// What is wrong with a knock of a knockknock profile.
    fn causes_of_count(
        &self,
        registry: &Registry,
        counted: Counted,
        user: &User,
        service: Option<&Service>,
    ) -> Vec<Cause> {
        let Syn { source, destination_port: port, .. } = self.syn;
        let mut causes = Vec::new();
        causes.extend((counted.knock_port != port).then_some(Cause::WrongKnockPort { port }));
        causes.extend(of_source(user, source));
        causes.extend(self.of_rights(registry, user, counted.selector, service));
        // The daemon knows no knock for what the user may not open.
        if registry.permitted(user, counted.selector).is_some() {
            causes.extend(counted.cause(&user.name, self.record.reason));
        }
        if causes.is_empty() {
            causes.push(Cause::Nothing);
        }
        causes
    }

    /// What the daemon knew, and what the user may.
    fn of_rights(
        &self,
        registry: &Registry,
        user: &User,
        selector: u16,
        service: Option<&Service>,
    ) -> impl Iterator<Item = Cause> {
        let Record { at, reason, .. } = *self.record;
        let state = is_of_state(reason).then_some(Cause::State { reason });
        let right = match service {
            None => Some(Cause::NoSuchService { selector }),
            Some(service) if registry.permitted(user, selector).is_none() => {
                Some(Cause::PortNotAllowed { service: service.name.clone() })
            }
            Some(_) => None,
        };
        let expired = user.expires.is_some_and(|expiry| at >= expiry).then_some(Cause::Expired);
        [state, right, expired].into_iter().flatten()
    }

    /// Whether the daemon took it for a knock of a knockknock profile.
    fn is_of_profile(&self, registry: &Registry) -> bool {
        let mut users = registry.users.iter();
        let user = users.find(|user| self.record.user.as_ref() == Some(&user.name));
        user.is_some_and(|user| matches!(user.secrets, Secrets::Knockknock(_)))
    }

    fn time(&self, window: u64, past: Option<&Past>, n: u64) -> Option<Cause> {
        let at = self.record.at;
        let seconds = n.abs_diff(at);
        // What was accepted long after this came tells nothing of it.
        let accepted = past.and_then(|past| past.accepted).filter(|accepted| *accepted <= at.saturating_add(window));
        let is_spent = accepted >= Some(n);
        match (seconds > window, n > at) {
            (false, _) => None,
            (true, true) => Some(Cause::ClockAhead { seconds }),
            (true, false) if is_spent => Some(Cause::Old { seconds }),
            (true, false) => Some(Cause::ClockBehind { seconds }),
        }
    }
}

/// What forbids a door for this source.
fn of_source(user: &User, source: IpAddr) -> impl Iterator<Item = Cause> {
    let is_link_local = matches!(source, IpAddr::V6(source) if source.is_unicast_link_local());
    let is_outside = !user.may_come_from(source);
    [is_link_local.then_some(Cause::LinkLocal), is_outside.then_some(Cause::FromMismatch { source })]
        .into_iter()
        .flatten()
}

/// Reasons that the packet alone does not tell.
const fn is_of_state(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::Narrowed
            | Reason::Exhausted
            | Reason::TooFast
            | Reason::Replayed
            | Reason::Superseded
            | Reason::InDoubt
            | Reason::SpentTwice
            | Reason::NotDurable
            | Reason::OverRate
    )
}

#[cfg(test)]
mod tests {
    use etherparse::{PacketBuilder, TcpOptionElement};

    use super::{
        Cause, Finding, HashMap, IpAddr, Past, Reason, Record, Registry, Secrets, Service, SourcePolicy, User, explain,
    };
    use crate::crypto::{Binding, KnockKey, KnockPorts, KnockSecrets, PrivateKey, Side};

    const NOW: u64 = 1_790_000_000;
    const SOURCE: [u8; 4] = [203, 0, 113, 9];

    /// A server with ssh and mail, and alice, who may open ssh.
    fn server() -> (Registry, KnockKey) {
        let [alice, server] = [(); 2].map(|()| PrivateKey::generate().unwrap());
        let secrets = KnockSecrets::derive(Side::Server, &server, alice.public(), None).unwrap();
        let key = KnockKey::new(&secrets);
        let service = |name: &str, selector| Service {
            name: name.parse().unwrap(),
            selector,
            ports: vec![format!("tcp/{selector}").parse().unwrap()],
            open_for: 30,
            once: false,
            kill: false,
        };
        let alice = User {
            name: "alice".parse().unwrap(),
            public_key: *alice.public(),
            secrets: Secrets::Token(secrets),
            services: vec![0],
            source: SourcePolicy::Any,
            from: Vec::new(),
            open_for: None,
            expires: None,
        };
        let registry = Registry {
            window: 60,
            knock_ports: KnockPorts::new([20_000..=21_023]).unwrap(),
            grants_per_minute: 600,
            services: vec![service("ssh", 22), service("mail", 25)],
            users: vec![alice],
        };
        (registry, key)
    }

    fn packet(port: u16, sequence: u32, tsval: Option<u32>) -> Vec<u8> {
        let options: Vec<TcpOptionElement> =
            tsval.map(|tsval| TcpOptionElement::Timestamp(tsval, 0)).into_iter().collect();
        let builder = PacketBuilder::ipv4(SOURCE, [192, 0, 2, 1], 64).tcp(40_000, port, sequence, 64_240).syn();
        let mut bytes = Vec::new();
        builder.options(&options).unwrap().write(&mut bytes, &[]).unwrap();
        bytes
    }

    /// A knock with this counter, which comes now and is refused for this reason.
    fn knock(key: &KnockKey, registry: &Registry, n: u64, selector: u16, binding: Binding, reason: Reason) -> Record {
        let token = key.seal(n, selector, binding);
        let packet = packet(key.pad(n).knock_port(&registry.knock_ports), token.sequence, Some(token.tsval));
        Record { at: NOW, reason, user: None, packet }
    }

    fn explained(registry: &Registry, past: Past, records: &[Record]) -> Vec<Finding> {
        explain(registry, &HashMap::from([("alice".parse().unwrap(), past)]), records, |_| {})
    }

    #[test]
    fn clocks_that_are_up_to_a_day_off_are_told_with_size_and_direction() {
        let (registry, key) = server();
        let offsets = [-86_401_i64, -86_400, -252, -61, -60, 61, 7200, 86_400, 86_401];
        let unknown =
            |offset| knock(&key, &registry, NOW.saturating_add_signed(offset), 22, Binding::Unbound, Reason::Unknown);
        let found = explained(&registry, Past::default(), &offsets.map(unknown));
        let causes: Vec<String> = found.iter().map(|finding| finding.causes[0].to_string()).collect();
        assert_eq!(
            causes,
            [
                "no key fits",
                "with a clock 24 h 0 min behind",
                "with a clock 4 min 12 s behind",
                "with a clock 1 min 1 s behind",
                "and nothing is wrong with it by the configuration of now",
                "with a clock 1 min 1 s ahead",
                "with a clock 2 h 0 min ahead",
                "with a clock 24 h 0 min ahead",
                "no key fits",
            ]
        );
        assert_eq!(found[2].user.as_ref().unwrap().as_str(), "alice");
        assert_eq!(found[2].service.as_ref().unwrap().as_str(), "ssh");
    }

    #[test]
    fn what_is_older_than_a_knock_that_was_accepted_before_is_a_replay_or_of_a_clock_that_was_set_back() {
        let (registry, key) = server();
        let record = [knock(&key, &registry, NOW - 3600, 22, Binding::Unbound, Reason::Unknown)];
        for (accepted, cause) in [
            (Some(NOW - 7200), Cause::ClockBehind { seconds: 3600 }),
            (Some(NOW - 3600), Cause::Old { seconds: 3600 }),
            (Some(NOW - 10), Cause::Old { seconds: 3600 }),
            (Some(NOW + 7200), Cause::ClockBehind { seconds: 3600 }),
            (None, Cause::ClockBehind { seconds: 3600 }),
        ] {
            let past = Past { accepted, ..Past::default() };
            assert_eq!(explained(&registry, past, &record)[0].causes, [cause], "{accepted:?}");
        }
    }

    #[test]
    fn several_faults_are_told_in_the_order_of_the_checks() {
        let (mut registry, key) = server();
        registry.users[0].expires = Some(NOW);
        registry.users[0].from = vec!["10.0.0.0/8".parse().unwrap()];
        registry.users[0].source = SourcePolicy::Bound;
        let n = NOW - 90;
        let token = key.seal(n, 25, Binding::Unbound);
        let port = if key.pad(n).knock_port(&registry.knock_ports) == 20_000 { 20_001 } else { 20_000 };
        let packet = packet(port, token.sequence, Some(token.tsval));
        let record = Record { at: NOW, reason: Reason::Unknown, user: None, packet };
        let found = explained(&registry, Past::default(), &[record]);
        assert_eq!(
            found[0].causes,
            [
                Cause::ClockBehind { seconds: 90 },
                Cause::WrongKnockPort { port },
                Cause::FromMismatch { source: SOURCE.into() },
                Cause::NotBound,
                Cause::PortNotAllowed { service: "mail".parse().unwrap() },
                Cause::Expired,
            ]
        );
    }

    #[test]
    fn an_address_that_a_token_is_bound_to_is_guessed_where_it_is_known_or_usual_behind_a_nat() {
        let (registry, key) = server();
        let bound = |address: &str| {
            let binding = Binding::Bound(address.parse().unwrap());
            Record {
                user: Some("alice".parse().unwrap()),
                ..knock(&key, &registry, NOW, 22, binding, Reason::WrongTag)
            }
        };
        let addresses = ["198.51.100.7", "2001:db8::7", "192.168.178.20", "10.1.2.3", "172.17.0.2", "198.51.100.8"];
        let past = ["198.51.100.7", "2001:db8::7"].map(|address| address.parse().unwrap());
        let past = Past { addresses: past.to_vec(), ..Past::default() };
        let found = explained(&registry, past, &addresses.map(bound));
        let source = IpAddr::from(SOURCE);
        for (finding, address) in found.iter().zip(addresses).take(5) {
            assert_eq!(finding.causes, [Cause::WrongSource { bound: address.parse().unwrap(), source }]);
        }
        assert_eq!(found[5].causes, [Cause::TimestampRewritten]);
    }

    #[test]
    fn no_bytes_are_taken_for_a_knock_that_they_are_not_and_none_make_it_fail() {
        let (registry, key) = server();
        let n = NOW - 500;
        let token = key.seal(n, 22, Binding::Unbound);
        let elsewhere = if key.pad(n).knock_port(&registry.knock_ports) == 20_000 { 20_001 } else { 20_000 };
        // The sequence number alone is no proof: of a server with many keys some fit by chance.
        let chance = packet(elsewhere, token.sequence, Some(token.tsval ^ 1));
        let record = |packet| Record { at: NOW, reason: Reason::Unknown, user: None, packet };
        let found =
            explained(&registry, Past::default(), &[record(chance), record(Vec::new()), record(vec![0x45; 126])]);
        assert_eq!(found.len(), 1);
        assert_eq!((&found[0].user, &found[0].causes[..]), (&None, &[Cause::NoKey][..]));
        for at in [0, u64::MAX] {
            let record = Record { at, ..record(packet(elsewhere, 1, None)) };
            assert_eq!(explained(&registry, Past::default(), &[record])[0].causes, [Cause::NoKey]);
        }
    }
}
