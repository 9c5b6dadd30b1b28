//! A process that stands still under a flood, and goes on.

use std::thread;
use std::time::Instant;

use nix::sys::signal::{Signal, kill};

use crate::lab::Lab;
use crate::latency::{self, PACE};
use crate::users;
use crate::{Row, Scale, flood, machine};

/// SYNs a second.
const RATE: u32 = 50_000;

pub fn rows(scale: &Scale) -> Vec<Row> {
    ["gate", "engine"].into_iter().flat_map(|role| of(scale, role)).collect()
}

fn of(scale: &Scale, role: &str) -> Vec<Row> {
    let lab = Lab::network();
    lab.configure("[services.ssh]\nports = [\"tcp/22\"]\nopen_for = \"30s\"\n");
    let users = users::add(&lab, latency::USERS);
    let daemon = lab.start();
    let processes = daemon.processes();
    let (_, process) = processes.into_iter().find(|(name, _)| *name == role).unwrap();
    let memory = || processes.iter().map(|(_, pid)| machine::memory(*pid).proportional).sum::<f64>();
    let ((before, most, latencies), flooded) = flood::during(&lab, RATE, || {
        let before = memory();
        kill(process, Signal::SIGSTOP).unwrap();
        let (start, mut most) = (Instant::now(), before);
        while start.elapsed() < scale.stopped {
            most = most.max(memory());
            thread::sleep(scale.stopped / 20);
        }
        kill(process, Signal::SIGCONT).unwrap();
        let latencies = latency::of_knocks(&lab, &users, scale.knocks / 5 * 2, PACE);
        (before, most.max(memory()), latencies)
    });
    daemon.stop();
    let figure = format!("{role} stopped for {} s under {RATE} SYN/s", scale.stopped.as_secs());
    vec![
        Row(format!("{figure}: memory of the daemon before, most"), "", format!("{before:.1} MB, {most:.1} MB")),
        Row("knock to element, right after it: p50, p99; lost".to_owned(), "p50 < 1 ms, none lost", latencies.show()),
        Row("the flood meanwhile".to_owned(), "", flooded.show()),
    ]
}
