//! Many users: what they cost at the start, and in memory.

use std::fs;
use std::time::{Duration, Instant};

use knockq::crypto::{KnockKey, KnockSecrets, PrivateKey, Side};

use crate::lab::{Daemon, Lab};
use crate::{Row, Scale, machine};

/// A user's side.
pub struct User {
    pub key: KnockKey,
}

/// Writes their entries, as `user add` does.
pub fn add(lab: &Lab, count: usize) -> Vec<User> {
    let directory = lab.config().with_file_name("users.d");
    fs::create_dir_all(&directory).unwrap();
    let server: PrivateKey = fs::read_to_string(lab.config().with_file_name("server.key")).unwrap().parse().unwrap();
    let add = |number: usize| {
        let own = PrivateKey::generate().unwrap();
        let entry = format!("public_key = \"{}\"\nservices = [\"ssh\"]\n", own.public());
        fs::write(directory.join(format!("user{number}.toml")), entry).unwrap();
        User { key: KnockKey::new(&KnockSecrets::derive(Side::Client, &own, server.public(), None).unwrap()) }
    };
    (0..count).map(add).collect()
}

pub fn rows(scale: &Scale) -> Vec<Row> {
    scale.users.iter().flat_map(|&count| with(count)).collect()
}

fn with(count: usize) -> [Row; 2] {
    let lab = Lab::network();
    lab.configure("[services.ssh]\nports = [\"tcp/22\"]\n");
    add(&lab, count);
    let start = Instant::now();
    let mut daemon = Daemon::spawn(&lab, &[]);
    daemon.wait_for("knockq: ready");
    let load = start.elapsed();
    std::thread::sleep(Duration::from_secs(1));
    let parts = daemon.processes().map(|(name, pid)| (name, machine::memory(pid)));
    let sum: f64 = parts.iter().map(|(_, memory)| memory.proportional).sum();
    let parts = parts.map(|(name, memory)| format!("{name} {:.1}", memory.resident)).join(", ");
    daemon.stop();
    let (load_aim, memory_aim) = match count {
        10_000 => ("< 2 s", ""),
        100 => ("", "< 20 MB"),
        _ => ("", ""),
    };
    let users = if count == 1 { "1 user".to_owned() } else { format!("{count} users") };
    [
        Row(format!("memory of the daemon, {users}"), memory_aim, format!("{sum:.1} MB (resident: {parts})")),
        Row(format!("start to ready, {users}"), load_aim, format!("{:.2} s", load.as_secs_f64())),
    ]
}
