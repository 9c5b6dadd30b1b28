//! A connection that is begun as soon as `knockq send` has ended.

use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::lab::{Family, Lab, knockq};
use crate::{Row, Scale, millis, percentile};

/// The kernel sends a SYN again after a second.
const RETRANSMISSION: Duration = Duration::from_millis(900);

/// Knocks of one user in a row: a client waits once its counters are 30 s ahead.
const KNOCKS: usize = 25;

pub fn rows(scale: &Scale) -> Vec<Row> {
    let lab = Lab::network();
    // for one connection, so that each meets a door that is shut until its own knock
    lab.configure("[services.ssh]\nports = [\"tcp/22\"]\nonce = true\n");
    let users: Vec<String> = (0..scale.connects.div_ceil(KNOCKS)).map(|number| format!("user{number}")).collect();
    for user in &users {
        lab.add_user(user, &["ssh"]);
    }
    lab.server.serve(22);
    let daemon = lab.start();
    let server = SocketAddr::new(Family::V4.server(), 22);
    let connect = |number: usize| {
        let mut send = Command::new(knockq());
        send.env_clear().env("HOME", lab.home(&users[number % users.len()]));
        send.args(["send", "server", "-4"]).stdin(Stdio::null()).stderr(Stdio::null());
        assert!(send.status().unwrap().success());
        let start = Instant::now();
        TcpStream::connect(server).unwrap();
        start.elapsed()
    };
    let mut sorted: Vec<Duration> = lab.alice.enter(|| (0..scale.connects).map(connect).collect());
    daemon.stop();
    sorted.sort_unstable();
    let at_once = sorted.iter().filter(|time| **time < RETRANSMISSION).count();
    let shown = format!(
        "{:.1} % ({at_once} of {}); connect() itself p50 {}",
        100.0 * at_once as f64 / sorted.len() as f64,
        sorted.len(),
        millis(percentile(&sorted, 50))
    );
    vec![Row("connect() right after `send` ended: no retransmission".to_owned(), "99 %", shown)]
}
