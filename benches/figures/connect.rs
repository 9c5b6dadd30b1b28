//! Connections: begun as soon as `knockq send` has ended, and made by `knockq connect`.

use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::lab::{FAMILIES, Family, Lab, knockq};
use crate::{Row, Scale, millis, percentile};

/// The kernel sends a SYN again after a second.
const RETRANSMISSION: Duration = Duration::from_millis(900);

/// Knocks of one user in a row: a client waits once its counters are 30 s ahead.
const KNOCKS: usize = 25;

/// What makes a wire a long way, for what the client sends.
const FAR: &str = "netem delay 20ms loss 1%";

/// Counts the SYNs to the service that leave a host.
const COUNT: &str = "add table inet count; add chain inet count out { type filter hook output priority 0; }; \
                     add rule inet count out tcp dport 22 tcp flags & (syn | ack) == syn counter";

pub fn rows(scale: &Scale) -> Vec<Row> {
    let lab = Lab::network();
    // for one connection, so that each meets a door that is shut until its own knock
    lab.configure("[services.ssh]\nports = [\"tcp/22\"]\nonce = true\n");
    lab.set("grants_per_minute = 60000"); // these clients knock in turn, without a pause
    let knocks = scale.connects + 4 * scale.attempts;
    let users: Vec<String> = (0..knocks.div_ceil(KNOCKS)).map(|number| format!("user{number}")).collect();
    for user in &users {
        lab.add_user(user, &["ssh"]);
    }
    lab.server.serve(22);
    lab.alice.nft(&[COUNT]);
    let daemon = lab.start();
    let command = |number: usize, arguments: &[&str]| {
        let mut command = Command::new(knockq());
        command.env_clear().env("HOME", lab.home(&users[number % users.len()])).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
    };
    let mut rows = vec![after_send(&lab, scale, &command)];
    rows.extend(FAMILIES.map(|family| by_connect(&lab, family, scale, "plain veth", &command)));
    let far = format!("-n {} qdisc add dev eth0 root {FAR}", lab.alice.name);
    let far = Command::new("tc").args(far.split_whitespace()).output();
    if far.is_ok_and(|tc| tc.status.success()) {
        rows.extend(FAMILIES.map(|family| by_connect(&lab, family, scale, "20 ms of delay, 1 % lost", &command)));
    } else {
        eprintln!("this kernel has no netem, so nothing is measured over a long way: VM=1 has it");
    }
    daemon.stop();
    rows
}

type Run<'a> = &'a (dyn Fn(usize, &[&str]) -> bool + Sync);

fn after_send(lab: &Lab, scale: &Scale, command: Run<'_>) -> Row {
    let server = SocketAddr::new(Family::V4.server(), 22);
    let connect = |number: usize| {
        assert!(command(number, &["send", "server", "-4"]));
        let start = Instant::now();
        TcpStream::connect(server).unwrap();
        start.elapsed()
    };
    let mut sorted: Vec<Duration> = lab.alice.enter(|| (0..scale.connects).map(connect).collect());
    sorted.sort_unstable();
    let at_once = sorted.iter().filter(|time| **time < RETRANSMISSION).count();
    let shown = format!(
        "{:.1} % ({at_once} of {}); connect() itself p50 {}",
        100.0 * at_once as f64 / sorted.len() as f64,
        sorted.len(),
        millis(percentile(&sorted, 50))
    );
    Row("connect() right after `send` ended: no retransmission".to_owned(), "99 %", shown)
}

/// From the start of the process to its end: the service greets, standard input has ended.
fn by_connect(lab: &Lab, family: Family, scale: &Scale, way: &str, command: Run<'_>) -> Row {
    let counted = || {
        let listing = lab.alice.nft(&["list", "chain", "inet", "count", "out"]);
        let packets = listing.split("packets ").nth(1).unwrap().split(' ').next().unwrap();
        packets.parse::<u64>().unwrap()
    };
    let connect = |number: usize| {
        let (before, start) = (counted(), Instant::now());
        let connected = command(number, &["connect", "server", "22", family.flag(), "--timeout", "30s"]);
        (connected, start.elapsed(), counted() - before)
    };
    let runs: Vec<(bool, Duration, u64)> = lab.alice.enter(|| (0..scale.attempts).map(connect).collect());
    let mut sorted: Vec<Duration> = runs.iter().map(|(_, time, _)| *time).collect();
    sorted.sort_unstable();
    let connected = runs.iter().filter(|(connected, ..)| *connected).count();
    let at_once = runs.iter().filter(|(connected, _, syns)| *connected && *syns == 1).count();
    let shown = format!(
        "{:.1} % with the first SYN, {connected} of {} connected; p50 {}, p99 {}",
        100.0 * at_once as f64 / runs.len() as f64,
        runs.len(),
        millis(percentile(&sorted, 50)),
        millis(percentile(&sorted, 99))
    );
    Row(format!("`knockq connect`, {way}, {family:?}: first attempts; connected; time"), "", shown)
}
