//! Knockknock profiles in memory: every rule of docs/protocol.md section 6.

#[path = "support/pair.rs"]
mod pair;
#[path = "support/persona.rs"]
mod recorded;

use etherparse::{IpNumber, Ipv4Header, TcpHeader};
use knockq::crypto::knockknock::{Key, Secrets, Token};
use knockq::verify::explain::{Cause, Past, Record, explain};
use knockq::verify::{self, KnockknockProfile, Reason};
use pair::{End, Knock, NOW, Server, WINDOW, address, name, world};
use proptest::prelude::{Just, ProptestConfig, Strategy, prop_assert, prop_oneof, proptest};
use std::collections::HashMap;

const REFUSED: fn(Reason) -> End = End::Refused;
const PORT: u16 = 2222;

fn secrets(place: usize) -> Secrets {
    let keys = [
        ["sjiTG60X1BTdJ1FAi3J1pg==", "1hPsDZAaENI/HY8wSE5vCw=="],
        ["vSGvaAusPZf0NKaOuJLfAQ==", "YuVEgQd9MFdmxYJaeVX6QA=="],
    ];
    keys[place].join("\n").parse().unwrap()
}

fn profile(place: usize, counter: u32) -> verify::Secrets {
    verify::Secrets::Knockknock(KnockknockProfile { secrets: secrets(place), knock_port: PORT, counter, as_of: 0 })
}

/// Two users with profiles, whose counts begin at 0 and at 100.
fn server() -> Server {
    let (server, _) = world(2, |place, user| {
        user.secrets = profile(place, if place == 0 { 0 } else { 100 });
        user.public_key = secrets(place).stand_in().unwrap();
    });
    server
}

/// A knock of the first user's for ssh.
fn knock(counter: u32) -> Vec<u8> {
    syn(Key::new(&secrets(0)).seal(counter, 22), PORT, [203, 0, 113, 9])
}

/// Of nothing but headers, as the ancestor sends it.
fn syn(token: Token, port: u16, source: [u8; 4]) -> Vec<u8> {
    let mut ip = Ipv4Header::new(20, 64, IpNumber::TCP, source, [192, 0, 2, 1]).unwrap();
    ip.identification = token.ip_id;
    ip.header_checksum = ip.calc_header_checksum();
    let mut tcp = TcpHeader::new(40_000, port, token.sequence, token.window);
    (tcp.syn, tcp.acknowledgment_number) = (true, token.acknowledgment);
    tcp.checksum = tcp.calc_checksum_ipv4(&ip, &[]).unwrap();
    [ip.to_bytes().as_slice(), tcp.to_bytes().as_slice()].concat()
}

#[test]
fn a_knock_opens_the_service_whose_port_it_names_for_its_source() {
    let mut server = server();
    let grant = server.receive(&knock(0), NOW).grant();
    assert_eq!((grant.user.as_str(), grant.service.as_str(), grant.source), ("u0", "ssh", address("203.0.113.9")));
    assert!(!grant.bound, "anybody could have sent it on");
    let other = Key::new(&secrets(1)).seal(100, 51820);
    let grant = server.receive(&syn(other, PORT, [203, 0, 113, 10]), NOW).grant();
    assert_eq!((grant.user.as_str(), grant.service.as_str()), ("u1", "wg"));
    let mail = Key::new(&secrets(0)).seal(1, 25);
    assert_eq!(
        server.receive(&syn(mail, PORT, [203, 0, 113, 9]), NOW),
        REFUSED(Reason::Unknown),
        "not a service of theirs"
    );
}

#[test]
fn a_replay_is_refused_from_anywhere_and_after_a_restart_and_a_reload() {
    let mut server = server();
    server.receive(&knock(0), NOW).grant();
    assert_eq!(server.receive(&knock(0), NOW), REFUSED(Reason::Replayed));
    server.reload(NOW, |_| {});
    assert_eq!(server.receive(&knock(0), NOW), REFUSED(Reason::Replayed));
    server.restart(NOW + 1);
    assert_eq!(server.receive(&knock(0), NOW + 1), REFUSED(Reason::Replayed));
    server.receive(&knock(1), NOW + 1).grant();
}

#[test]
fn nineteen_lost_knocks_cost_nothing_and_twenty_are_too_many_until_the_count_is_set() {
    for lost in [2, 19] {
        let mut server = server();
        server.receive(&knock(0), NOW).grant();
        server.receive(&knock(1 + lost), NOW).grant();
        let late = server.receive(&knock(lost), NOW);
        assert_eq!(late, REFUSED(Reason::Superseded), "and the lost ones are spent");
    }
    let mut server = server();
    server.receive(&knock(0), NOW).grant();
    assert_eq!(server.receive(&knock(21), NOW), REFUSED(Reason::Unknown));
    server.reload(NOW, |registry| registry.users[0].secrets = profile(0, 22));
    assert_eq!(server.receive(&knock(21), NOW), REFUSED(Reason::Replayed), "who recorded it, gets nothing for it");
    server.receive(&knock(22), NOW).grant();
}

#[test]
fn a_count_that_is_set_back_has_no_effect() {
    let mut server = server();
    server.receive(&knock(15), NOW).grant();
    server.reload(NOW, |registry| registry.users[0].secrets = profile(0, 3));
    for counter in 0..=15 {
        assert!(matches!(server.receive(&knock(counter), NOW), End::Refused(Reason::Replayed | Reason::Superseded)));
    }
    server.restart(NOW);
    for counter in 0..=15 {
        assert!(matches!(server.receive(&knock(counter), NOW), End::Refused(Reason::Replayed | Reason::Superseded)));
    }
    server.receive(&knock(16), NOW).grant();
}

#[test]
fn the_clock_has_no_say() {
    let mut server = server();
    for (counter, now) in [NOW, NOW - 1_000_000, NOW + 1_000_000, 0].into_iter().enumerate() {
        server.receive(&knock(u32::try_from(counter).unwrap()), now).grant();
    }
}

#[test]
fn the_last_count_is_the_last() {
    let mut server = server();
    server.reload(NOW, |registry| registry.users[0].secrets = profile(0, u32::MAX - 1));
    server.receive(&knock(u32::MAX - 1), NOW).grant();
    server.receive(&knock(u32::MAX), NOW).grant();
    for counter in [u32::MAX, u32::MAX - 1, 0, 1] {
        assert!(matches!(server.receive(&knock(counter), NOW), End::Refused(_)), "{counter}");
    }
}

/// No more than of tokens: else a single profile could take all that the disk and `grants_per_minute` leave to others.
#[test]
fn a_profile_that_knocks_faster_than_once_a_second_leaves_the_others_their_share_and_is_back_at_once_when_it_waits() {
    let mut server = server();
    let burst = |server: &mut Server, from: u32, now| {
        let ends = (from..from + 1000).map(|counter| server.receive(&knock(counter), now));
        let granted = ends.filter(|end| matches!(end, End::Granted(_))).count();
        u64::try_from(granted).unwrap()
    };
    assert_eq!(burst(&mut server, 0, NOW), WINDOW + 1);
    assert_eq!(server.receive(&knock(999), NOW), REFUSED(Reason::Replayed), "what came too fast is spent as well");
    assert_eq!(server.receive(&knock(998), NOW), REFUSED(Reason::Superseded));
    let other = Key::new(&secrets(1)).seal(100, 22);
    server.receive(&syn(other, PORT, [203, 0, 113, 10]), NOW).grant();

    server.verifier.forget(NOW + 7);
    server.reload(NOW + 7, |_| {});
    assert_eq!(burst(&mut server, 1000, NOW + 7), 7);
    server.verifier.forget(NOW + 1000);
    assert_eq!(burst(&mut server, 2000, NOW + 1000), WINDOW + 1);
    // A clock that is set back locks nobody out.
    assert_eq!(burst(&mut server, 3000, NOW - 1000), WINDOW + 1);
}

#[test]
fn every_bit_that_carries_it_must_be_right_and_a_wrong_one_costs_the_user_nothing() {
    let mut server = server();
    let token = Key::new(&secrets(0)).seal(0, 22);
    for bit in 0..64 {
        let changed = match bit {
            0..16 => Token { ip_id: token.ip_id ^ 1 << bit, ..token },
            16..48 => Token { acknowledgment: token.acknowledgment ^ 1 << (bit - 16), ..token },
            _ => Token { window: token.window ^ 1 << (bit - 48), ..token },
        };
        assert_eq!(server.receive(&syn(changed, PORT, [203, 0, 113, 9]), NOW), REFUSED(Reason::WrongTag), "bit {bit}");
    }
    assert_eq!(server.verifier.narrowed(NOW).next(), None);
    server.receive(&knock(0), NOW).grant();
}

#[test]
fn it_comes_to_its_own_port_from_its_networks_and_over_ipv4_alone() {
    let mut server = server();
    let key = Key::new(&secrets(0));
    let token = key.seal(0, 22);
    assert_eq!(server.receive(&syn(token, PORT + 1, [203, 0, 113, 9]), NOW), REFUSED(Reason::WrongKnockPort));
    server.reload(NOW, |registry| registry.users[0].from = vec!["198.51.100.0/24".parse().unwrap()]);
    assert_eq!(server.receive(&knock(1), NOW), REFUSED(Reason::SourceNotAllowed));
    for count in [0, 1] {
        let copy = syn(key.seal(count, 22), PORT, [198, 51, 100, 1]);
        assert!(matches!(server.receive(&copy, NOW), End::Refused(Reason::Replayed)), "{count} is spent");
    }
    let token = key.seal(2, 22);
    let mut ip6 = etherparse::Ipv6Header { payload_length: 20, next_header: IpNumber::TCP, ..Default::default() };
    ip6.hop_limit = 64;
    let tcp = syn(token, PORT, [203, 0, 113, 9])[20..].to_vec();
    let packet = [ip6.to_bytes().as_slice(), &tcp].concat();
    assert_eq!(server.receive(&packet, NOW), REFUSED(Reason::WrongTag), "there is no place for two of its bytes");
    server.receive(&syn(token, PORT, [198, 51, 100, 1]), NOW).grant();
}

#[test]
fn what_could_not_be_made_durable_stays_taken() {
    let mut server = server();
    server.log.is_full = true;
    assert_eq!(server.receive(&knock(0), NOW), REFUSED(Reason::NotDurable));
    server.log.is_full = false;
    assert_eq!(server.receive(&knock(0), NOW), REFUSED(Reason::Replayed));
    server.receive(&knock(1), NOW).grant();
}

#[test]
fn a_copy_from_elsewhere_withdraws_the_grant_as_long_as_one_can_tell() {
    let mut server = server();
    server.receive(&knock(0), NOW).grant();
    let copy = |last| syn(Key::new(&secrets(0)).seal(0, 22), PORT, [198, 51, 100, last]);
    let withdrawn = End::Withdrawn { source: address("203.0.113.9"), elsewhere: address("198.51.100.1") };
    assert_eq!(server.receive(&copy(1), NOW), withdrawn);
    assert_eq!(server.receive(&copy(2), NOW), REFUSED(Reason::Replayed));
    server.receive(&knock(1), NOW).grant();
    server.verifier.forget(NOW + WINDOW + 2);
    let late = syn(Key::new(&secrets(0)).seal(1, 22), PORT, [198, 51, 100, 3]);
    assert_eq!(server.receive(&late, NOW + WINDOW + 2), REFUSED(Reason::Replayed));
}

#[test]
fn tokens_and_profiles_live_in_one_index() {
    let (mut server, clients) = world(200, |place, user| {
        if place % 2 == 1 {
            let mut keys = [[0; 16]; 2];
            keys.iter_mut().for_each(|key| key[0] = u8::try_from(place).unwrap());
            let secrets = of_bytes(keys);
            user.public_key = secrets.stand_in().unwrap();
            user.secrets =
                verify::Secrets::Knockknock(KnockknockProfile { secrets, knock_port: PORT, counter: 7, as_of: 0 });
        }
    });
    for (place, client) in clients.iter().enumerate() {
        let packet = if place % 2 == 1 {
            let mut keys = [[0; 16]; 2];
            keys.iter_mut().for_each(|key| key[0] = u8::try_from(place).unwrap());
            syn(Key::new(&of_bytes(keys)).seal(7, 22), PORT, [203, 0, 113, 9])
        } else {
            Knock::new(client, NOW).packet()
        };
        assert_eq!(server.receive(&packet, NOW).grant().user.as_str(), format!("u{place}"));
    }
}

fn of_bytes(keys: [[u8; 16]; 2]) -> Secrets {
    use base64::Engine as _;
    let [cipher, mac] = keys.map(|key| base64::engine::general_purpose::STANDARD.encode(key));
    format!("{cipher}\n{mac}").parse().unwrap()
}

/// What explain says of a packet that the first user's server, which has accepted their knock 50, refused for this reason.
fn causes(packet: Vec<u8>, reason: Reason) -> Vec<Cause> {
    causes_after(Some(50), packet, reason)
}

fn causes_after(accepted: Option<u64>, packet: Vec<u8>, reason: Reason) -> Vec<Cause> {
    let mut registry = server().registry;
    registry.users[0].from = vec!["203.0.113.0/24".parse().unwrap()];
    let past = HashMap::from([(name("u0"), Past { accepted, addresses: Vec::new() })]);
    let user = (reason != Reason::Unknown).then(|| name("u0"));
    let [finding] = explain(&registry, &past, &[Record { at: NOW, reason, user, packet }], |_| ()).try_into().unwrap();
    assert_eq!(finding.user, (finding.causes != [Cause::NoKey]).then(|| name("u0")));
    finding.causes
}

#[test]
fn what_is_wrong_with_a_refused_knock_is_told_from_its_packet() {
    let user = || name("u0");
    let key = Key::new(&secrets(0));
    let home = [203, 0, 113, 9];
    let elsewhere = [198, 51, 100, 1];
    for (packet, reason, expected) in [
        (knock(71), Reason::Unknown, vec![Cause::CountAhead { user: user(), knocks: 20, next: 72 }]),
        (knock(10_050), Reason::Unknown, vec![Cause::CountAhead { user: user(), knocks: 9_999, next: 10_051 }]),
        (knock(10_051), Reason::Unknown, vec![Cause::NoKey]),
        (knock(30), Reason::Unknown, vec![Cause::CountBehind { knocks: 21, next: 51 }]),
        (knock(0), Reason::Unknown, vec![Cause::CountBehind { knocks: 51, next: 51 }]),
        (knock(51), Reason::Unknown, vec![Cause::Nothing]),
        (
            knock(50),
            Reason::Replayed,
            vec![Cause::State { reason: Reason::Replayed }, Cause::CountBehind { knocks: 1, next: 51 }],
        ),
        (
            knock(45),
            Reason::Superseded,
            vec![Cause::State { reason: Reason::Superseded }, Cause::CountBehind { knocks: 6, next: 51 }],
        ),
        (syn(key.seal(51, 22), 23, home), Reason::WrongKnockPort, vec![Cause::WrongKnockPort { port: 23 }]),
        (
            syn(key.seal(51, 22), PORT, elsewhere),
            Reason::SourceNotAllowed,
            vec![Cause::FromMismatch { source: address("198.51.100.1") }],
        ),
        (syn(key.seal(51, 25), PORT, home), Reason::Unknown, vec![Cause::PortNotAllowed { service: name("mail") }]),
        (syn(key.seal(51, 4443), PORT, home), Reason::Unknown, vec![Cause::NoSuchService { selector: 4443 }]),
        (syn(Token { window: 1, ..key.seal(51, 22) }, PORT, home), Reason::WrongTag, vec![Cause::Rewritten]),
        (syn(key.seal(51, 22), PORT, home), Reason::NotDurable, vec![Cause::State { reason: Reason::NotDurable }]),
    ] {
        assert_eq!(causes(packet, reason), expected);
    }
    let ahead = Cause::CountAhead { user: user(), knocks: 20, next: 72 }.to_string();
    assert!(ahead.ends_with("knockq user counter u0 72"), "{ahead}");
}

/// A lost store has forgotten knocks. Who has recorded them could send one, for its successor to be named as the count.
#[test]
fn of_a_count_that_the_daemon_does_not_know_no_number_is_named_whatever_knock_comes() {
    for counter in [0, 5, 30, 9_000] {
        let causes = causes_after(None, knock(counter), Reason::Unknown);
        assert_eq!(causes, [Cause::NotCounted { user: name("u0") }], "{counter}");
        assert!(causes[0].to_string().ends_with("knockq user counter u0 NUMBER"));
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// A knock that is so many after the next one, or before it.
    Knock(i64),
    SetCount(i64),
    DiskFull(bool),
    Restart,
    Reload,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (-30..30_i64).prop_map(Step::Knock),
        2 => (-40..40_i64).prop_map(Step::SetCount),
        1 => proptest::bool::ANY.prop_map(Step::DiskFull),
        1 => Just(Step::Restart),
        1 => Just(Step::Reload),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    /// The model is a number: the next that counts.
    #[test]
    fn a_knock_is_taken_if_it_is_one_of_the_next_twenty_and_never_again(steps in proptest::collection::vec(step(), 1..60)) {
        let mut server = server();
        // What is set, what is durable, and what this process has taken besides.
        let (mut set, mut durable, mut taken) = (0, 0, 0);
        for step in steps {
            let next = [set, durable, taken].into_iter().max().unwrap_or(0);
            let near = |by: i64| u32::try_from(i64::from(next) + by).unwrap_or(0);
            match step {
                Step::Knock(by) => {
                    let counter = near(by);
                    let is_taken = (next..next + 20).contains(&counter);
                    match server.receive(&knock(counter), NOW) {
                        End::Granted(_) => prop_assert!(is_taken && !server.log.is_full, "{counter} of {next}"),
                        End::Refused(Reason::NotDurable) => prop_assert!(is_taken && server.log.is_full),
                        other => prop_assert!(!is_taken, "{other:?}: {counter} of {next}"),
                    }
                    if is_taken {
                        taken = counter + 1;
                        durable = if server.log.is_full { durable } else { taken };
                    }
                }
                Step::SetCount(by) => {
                    set = near(by);
                    server.reload(NOW, |registry| registry.users[0].secrets = profile(0, set));
                    taken = taken.max(next);
                }
                Step::DiskFull(is_full) => server.log.is_full = is_full,
                Step::Restart => {
                    server.restart(NOW);
                    taken = 0;
                }
                Step::Reload => server.reload(NOW, |_| {}),
            }
        }
    }
}
