//! The figures of docs/performance.md, as its table: `make bench`, or `make bench QUICK=1` to see that it works.
//!
//! Real daemons on this kernel, in network namespaces joined by veth; nothing is left behind.

mod connect;
mod cpu;
mod flood;
mod index;
#[path = "../../tests/support/lab.rs"]
mod lab;
mod latency;
mod machine;
mod passing;
mod peer;
#[path = "../../tests/support/prober.rs"]
mod prober;
mod queue_rule;
#[path = "../../tests/support/persona.rs"]
mod recorded;
mod restore;
mod stopped;
mod users;

use std::time::Duration;

/// How much is measured.
struct Scale {
    /// Knocks for each latency.
    knocks: u32,
    /// Knocks for each latency of a peer.
    peer_knocks: u32,
    /// How long CPU is measured.
    flood: Duration,
    /// How long a process stands still.
    stopped: Duration,
    /// Runs of `send` and connect().
    connects: usize,
    /// Runs of `connect`, over each family.
    attempts: usize,
    /// Tables that are deleted, over each family.
    restorations: usize,
    /// Users of the daemons that are started.
    users: &'static [usize],
    /// Users and window of an index in which strangers are looked up: 3, 1,000 and 1,000,000 candidates.
    indexes: &'static [(usize, u64)],
    /// Users, and seconds of the clock, while the index moves on.
    advance: (usize, u64),
}

const FULL: Scale = Scale {
    knocks: 500,
    peer_knocks: 100,
    flood: Duration::from_secs(20),
    stopped: Duration::from_secs(10),
    connects: 500,
    attempts: 500,
    restorations: 20,
    users: &[1, 100, 10_000],
    indexes: &[(1, 0), (8, 61), (8_000, 61)],
    advance: (10_000, 600),
};

const QUICK: Scale = Scale {
    knocks: 20,
    peer_knocks: 5,
    flood: Duration::from_secs(1),
    stopped: Duration::from_secs(1),
    connects: 10,
    attempts: 10,
    restorations: 2,
    users: &[1, 100],
    indexes: &[(1, 0), (8, 61)],
    advance: (1_000, 60),
};

/// Load of the latencies, in SYNs a second.
const FLOODS: [u32; 3] = [0, 50_000, 100_000];

/// A line of the table: figure, aim, measured.
pub struct Row(pub String, pub &'static str, pub String);

type Measure = fn(&Scale) -> Vec<Row>;

/// What is measured, by name, in the order of the table.
const FIGURES: [(&str, Measure); 10] = [
    ("latency", latency::rows),
    ("cpu", cpu::rows),
    ("stopped", stopped::rows),
    ("connect", connect::rows),
    ("restore", restore::rows),
    ("passing", passing::rows),
    ("decision", index::decisions),
    ("advance", index::slices),
    ("users", users::rows),
    ("peers", peer::rows),
];

/// All, or those that the arguments name.
fn main() {
    let names: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let unknown = names.iter().find(|name| FIGURES.iter().all(|(known, _)| known != name));
    assert!(unknown.is_none(), "{unknown:?} is none of {:?}", FIGURES.map(|(name, _)| name));
    let scale = if std::env::var_os("QUICK").is_some() { QUICK } else { FULL };
    queue_rule::provide();
    let mut rows = Vec::new();
    for (name, measure) in FIGURES {
        if names.is_empty() || names.iter().any(|chosen| chosen == name) {
            eprintln!("measuring: {name}");
            rows.extend(measure(&scale).into_iter().map(|row| (name, row)));
        }
    }
    println!("{}\n", machine::description());
    println!("| figure | aim | measured | `make bench ONLY=` |\n|---|---|---|---|");
    for (name, Row(figure, aim, measured)) in rows {
        println!("| {figure} | {aim} | {measured} | `{name}` |");
    }
}

/// The value below which this share of the sorted ones lies.
pub fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
}

/// Milliseconds, as they are shown.
pub fn millis(duration: Duration) -> String {
    format!("{:.2} ms", duration.as_secs_f64() * 1e3)
}
