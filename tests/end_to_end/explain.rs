//! `knockq explain`: real packets that opened nothing, and what it says of each.

use std::fs;
use std::net::IpAddr;

use knockq::crypto::{Binding, KnockKey, KnockPorts};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::lab::{FAMILIES, Family, Host, Lab, eventually, hex};
use crate::recorded::persona;
use crate::status::{count, stranger, unhex};
use crate::{flow, raw_socket, send_raw, tcp_offset, unix_now};

/// Where a knock comes from, and what happens to it on the way.
struct Way<'a> {
    host: &'a Host,
    source: IpAddr,
    family: Family,
    change: fn(&mut [u8]),
}

impl Way<'_> {
    /// A knock leaves with this counter for this selector, from the right knock port on.
    fn goes(&self, key: &KnockKey, n: u64, selector: u16, binding: Binding) -> Vec<u8> {
        let token = key.seal(n, selector, binding);
        let ports = KnockPorts::new([20_000..=21_023]).unwrap();
        let flow = flow(self.source, self.family.server(), key.pad(n).knock_port(&ports));
        let mut packet = persona(self.family == Family::V4).syn(&flow, token.sequence, token.tsval).unwrap();
        (self.change)(&mut packet);
        self.host.enter(|| send_raw(&raw_socket(self.family), self.family, &packet));
        packet
    }
}

/// The place of the timestamp option.
fn timestamp(packet: &[u8]) -> usize {
    let options = tcp_offset(packet) + 20;
    options + packet[options..].windows(2).position(|kind| kind == [8, 10]).unwrap()
}

fn as_it_is(_: &mut [u8]) {}

fn to_another_port(packet: &mut [u8]) {
    let place = tcp_offset(packet) + 3;
    packet[place] ^= 1;
}

fn with_another_timestamp(packet: &mut [u8]) {
    let place = timestamp(packet) + 5;
    packet[place] ^= 0x55;
}

fn without_a_timestamp(packet: &mut [u8]) {
    let place = timestamp(packet);
    packet[place..place + 10].fill(1);
}

impl Lab {
    /// `knockq explain --json`, which shows no token.
    fn explain(&self, packets: &[Vec<u8>]) -> Vec<Value> {
        let config = self.config().display().to_string();
        let found = self.control(&["explain", "--json", "--config", &config]);
        for packet in packets {
            let tcp = tcp_offset(packet);
            let words = [tcp + 4, timestamp_or(packet) + 2].map(|place| packet[place..place + 4].to_vec());
            for word in words {
                let number = u32::from_be_bytes(word.clone().try_into().unwrap());
                assert!(!found.contains(&number.to_string()) && !found.contains(&hex(&word)), "{found}");
            }
        }
        serde_json::from_str(&found).unwrap()
    }
}

fn timestamp_or(packet: &[u8]) -> usize {
    let options = tcp_offset(packet) + 20;
    packet[options..]
        .windows(2)
        .position(|kind| kind == [8, 10])
        .map_or(tcp_offset(packet) + 2, |place| options + place)
}

/// What was found of a user's key, and of no key.
fn causes(found: &[Value], user: &str) -> Vec<Value> {
    let theirs = found.iter().filter(|finding| finding["user"] == user);
    theirs.flat_map(|finding| finding["causes"].as_array().unwrap().clone()).collect()
}

#[test]
fn explain_knows_by_the_key_what_was_wrong_with_each_packet() {
    let lab = Lab::with("open_for = \"1h\"");
    lab.set("window = \"2m\""); // a slow machine takes its time
    lab.add_user("bob", &["ssh"]);
    let daemon = lab.start();
    let (alice, bob) = (lab.key_of("alice"), lab.key_of("bob"));
    for (round, family) in (1_u64..).zip(FAMILIES) {
        let source = family.alice();
        let way = |change| Way { host: &lab.alice, source, family, change };
        let unbound = Binding::Unbound;
        let mut packets = Vec::new();
        let first = unix_now() - 40 + 20 * (round - 1);

        // Bob has never knocked before.
        packets.push(way(as_it_is).goes(&bob, unix_now() - 252, 22, unbound));
        packets.push(way(as_it_is).goes(&bob, unix_now() + 7200, 22, unbound));
        stranger(&lab.alice, source, family, 7);

        packets.push(way(as_it_is).goes(&alice, first, 22, unbound));
        eventually("the grant", || count(&lab.status(), "granted") == round);
        packets.push(way(as_it_is).goes(&alice, first, 22, unbound));
        packets.push(way(as_it_is).goes(&alice, first - 1, 22, unbound));
        packets.push(way(as_it_is).goes(&alice, first - 3600, 22, unbound));
        packets.push(way(to_another_port).goes(&alice, first + 1, 22, unbound));
        packets.push(way(as_it_is).goes(&alice, first + 2, 25, unbound));
        packets.push(way(as_it_is).goes(&alice, first + 3, 4444, unbound));
        packets.push(way(with_another_timestamp).goes(&alice, first + 4, 22, unbound));
        packets.push(way(without_a_timestamp).goes(&alice, first + 5, 22, unbound));
        let at_home = "192.168.178.20".parse().unwrap();
        packets.push(way(as_it_is).goes(&alice, first + 6, 22, Binding::Bound(at_home)));
        let thief = Way { host: &lab.mallory, source: family.mallory(), family, change: as_it_is };
        packets.push(thief.goes(&alice, first + 7, 22, Binding::Bound(source)));
        eventually("all of them", || {
            let status = lab.status();
            let seen = status["syns"]["seen"].as_u64().unwrap();
            let packets = status["packets"].as_object().unwrap();
            let ended: u64 = packets.values().map(|count| count.as_u64().unwrap()).sum();
            (seen, ended) == (14 * round, 14 * round)
        });

        let all = lab.explain(&packets);
        let from = |source: IpAddr| {
            let is_from = |finding: &&Value| finding["source"] == source.to_string();
            all.iter().filter(is_from).cloned().collect::<Vec<Value>>()
        };
        let found = from(source);
        let bobs = causes(&found, "bob");
        for (cause, seconds) in [("clock_behind", 252), ("clock_ahead", 7200 - 60)] {
            let cause =
                bobs.iter().find(|found| found["cause"] == cause).unwrap_or_else(|| panic!("{cause}: {bobs:?}"));
            assert!((seconds..seconds + 62).contains(&cause["seconds"].as_u64().unwrap()), "{cause}");
        }
        let alices = causes(&found, "alice");
        for cause in [
            json!({ "cause": "state", "reason": "replayed" }),
            json!({ "cause": "state", "reason": "superseded" }),
            json!({ "cause": "port_not_allowed", "service": "mail" }),
            json!({ "cause": "no_such_service", "selector": 4444 }),
            json!({ "cause": "timestamp_rewritten" }),
            json!({ "cause": "timestamp_stripped" }),
            json!({ "cause": "wrong_source", "bound": "192.168.178.20", "source": source.to_string() }),
        ] {
            assert_eq!(alices.iter().filter(|found| **found == cause).count(), 1, "{cause}: {alices:#?}");
        }
        for cause in ["old", "wrong_knock_port"] {
            assert_eq!(alices.iter().filter(|found| found["cause"] == cause).count(), 1, "{cause}: {alices:#?}");
        }
        assert_eq!(alices.len(), 9, "{alices:#?}");
        let strangers: Vec<&Value> = found.iter().filter(|finding| finding["user"].is_null()).collect();
        assert!(strangers.len() == 1 && strangers[0]["explanation"] == "no key fits", "{strangers:?}");

        let elsewhere = from(family.mallory());
        let bound =
            json!({ "cause": "wrong_source", "bound": source.to_string(), "source": family.mallory().to_string() });
        assert_eq!(causes(&elsewhere, "alice"), [bound]);
        let said = elsewhere[0]["explanation"].as_str().unwrap();
        assert!(
            said.contains(&format!("is alice's key for ssh, bound to {source}, but it came from {}", family.mallory()))
        );
    }
    let config = lab.config().display().to_string();
    let text = lab.control(&["explain", "--config", &config, &Family::V4.alice().to_string()]);
    let is_line =
        |line: &str| line.starts_with("10.77.1.2 2") && line.contains("Z is bob's key for ssh, with a clock 4 min 1");
    assert!(text.lines().any(is_line), "{text}");
    daemon.stop();
}

#[test]
fn explain_tells_what_of_the_users_entry_forbids_a_knock() {
    let lab = Lab::new();
    let user = lab.config().with_file_name("users.d").join("alice.toml");
    let entry = fs::read_to_string(&user).unwrap();
    let daemon = lab.start();
    for (line, cause, reason) in [
        ("from = [\"192.0.2.0/24\"]", "from_mismatch", "source_not_allowed"),
        ("source = \"bound\"", "not_bound", "wrong_tag"),
        ("expires = \"2020-01-01\"", "expired", "expired"),
    ] {
        fs::write(&user, format!("{line}\n{entry}")).unwrap();
        let reloads = daemon.log().matches("engine: reloaded").count();
        daemon.signal(Signal::SIGHUP);
        eventually("the reload", || daemon.log().matches("engine: reloaded").count() > reloads);
        let knocks = FAMILIES.map(|family| {
            let before = count(&lab.status(), reason);
            let knock = unhex(&lab.print_knock(family, &["--source", "none"]));
            lab.alice.enter(|| send_raw(&raw_socket(family), family, &knock));
            eventually(reason, || count(&lab.status(), reason) > before);
            knock
        });
        let found = lab.explain(&knocks);
        for source in FAMILIES.map(Family::alice) {
            let is_it = |finding: &&Value| finding["reason"] == reason && finding["source"] == source.to_string();
            let causes = found.iter().rfind(is_it).unwrap()["causes"].as_array().unwrap();
            assert!(causes.iter().any(|found| found["cause"] == cause), "{found:#?}");
        }
    }
    daemon.stop();
}

#[test]
fn explain_is_for_root_alone() {
    let lab = Lab::new();
    lab.set("user = \"nobody\"");
    let daemon = lab.start();
    let config = lab.config().display().to_string();
    let refused = lab.as_member(65_534, &["explain", "--config", &config]);
    assert!(!refused.status.success() && refused.stdout.is_empty());
    assert_eq!(lab.control(&["explain", "--json", "--config", &config]).trim(), "[]");
    daemon.stop();
}
