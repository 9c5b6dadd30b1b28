//! The decision and the index, without a kernel.

use std::collections::HashMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

use knockq::crypto::{KnockPorts, KnockSecrets, PrivateKey, Side};
use knockq::packet::Flow;
use knockq::serve::engine::SLICE;
use knockq::service::{Port, Transport};
use knockq::verify::{Registry, Secrets, Service, SourcePolicy, User, Verifier};

use crate::lab::{FAMILIES, Family};
use crate::recorded::persona;
use crate::{Row, Scale, machine, millis, percentile};

const NOW: u64 = 1_790_000_000;

/// SYNs in a batch, of which the median is told; few enough to stay in the cache, as a record that was just read does.
const BATCH: usize = 1000;

pub fn decisions(scale: &Scale) -> Vec<Row> {
    let row = |&(users, window): &(usize, u64)| {
        let mut verifier = verifier(users, window);
        let live = verifier.live();
        let times = FAMILIES.map(|family| format!("{:?} {} ns", family, miss(&mut verifier, family)));
        Row(format!("handle() on a miss, {live} candidates"), "60 to 150 ns", times.join(", "))
    };
    scale.indexes.iter().map(row).collect()
}

/// Nanoseconds for a SYN of a stranger: the median of batches, each of other SYNs.
fn miss(verifier: &mut Verifier, family: Family) -> u128 {
    let batch = |_| {
        let packets: Vec<Vec<u8>> = (0..BATCH).map(|_| stranger(family)).collect();
        let start = Instant::now();
        for packet in &packets {
            black_box(verifier.handle(black_box(packet), NOW));
        }
        start.elapsed() / u32::try_from(BATCH).unwrap()
    };
    let mut sorted: Vec<Duration> = (0..200).map(batch).collect();
    sorted.sort_unstable();
    percentile(&sorted, 50).as_nanos()
}

fn stranger(family: Family) -> Vec<u8> {
    let flow =
        Flow { source: family.mallory(), source_port: 40_000, destination: family.server(), destination_port: 20_000 };
    let random = || getrandom::u32().unwrap();
    persona(family == Family::V4).syn(&flow, random(), random()).unwrap()
}

pub fn slices(scale: &Scale) -> Vec<Row> {
    let (users, seconds) = scale.advance;
    let mut verifier = verifier(users, 60);
    let mut sorted = Vec::new();
    for now in NOW..NOW + seconds {
        loop {
            let start = machine::cpu_of_thread();
            let has_more = verifier.advance(now, SLICE);
            sorted.push(machine::cpu_of_thread() - start);
            if !has_more {
                break;
            }
        }
    }
    sorted.sort_unstable();
    let [p50, p99, most] = [50, 99, 100].map(|percent| millis(percentile(&sorted, percent)));
    let figure = format!("CPU time of a slice of the index's advance, {users} users, {seconds} s: p50, p99, longest");
    vec![Row(figure, "< 1 ms", format!("{p50}, {p99}, {most}"))]
}

/// Users of one service each; `2 * window + 3` counters of each are live.
fn verifier(users: usize, window: u64) -> Verifier {
    let server = PrivateKey::generate().unwrap();
    let user = |number: usize| {
        let public_key = *PrivateKey::generate().unwrap().public();
        User {
            name: format!("user{number}").parse().unwrap(),
            public_key,
            secrets: Secrets::Token(KnockSecrets::derive(Side::Server, &server, &public_key, None).unwrap()),
            services: vec![0],
            source: SourcePolicy::Any,
            from: Vec::new(),
            open_for: None,
            expires: None,
        }
    };
    let ssh = Port { transport: Transport::Tcp, number: 22 };
    let registry = Registry {
        window,
        knock_ports: KnockPorts::new([20_000..=21_023]).unwrap(),
        grants_per_minute: 600,
        services: vec![Service {
            name: "ssh".parse().unwrap(),
            selector: 22,
            ports: vec![ssh],
            open_for: 30,
            once: false,
            kill: false,
        }],
        users: (0..users).map(user).collect(),
    };
    Verifier::new(registry, &HashMap::new(), NOW)
}
