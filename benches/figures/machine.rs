//! What the kernel tells of this machine and of its processes.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::unistd::Pid;
use rustix::time::{ClockId, clock_gettime};

use crate::percentile;

pub fn description() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap();
    let cpus = read("/proc/cpuinfo");
    let models: Vec<&str> = cpus.lines().filter(|line| line.starts_with("model name")).collect();
    let model = models.first().and_then(|line| line.split(": ").nth(1)).unwrap_or("unknown");
    let is_virtual = if cpus.contains("hypervisor") { ", virtual" } else { "" };
    let release = read("/proc/sys/kernel/osrelease");
    let load = read("/proc/loadavg");
    let load = load.split(' ').next().unwrap();
    format!("{} x {model}{is_virtual}; Linux {}; load at the end {load}", models.len(), release.trim())
}

/// Name of the file system that a directory is on.
pub fn filesystem(directory: &Path) -> String {
    let output = Command::new("stat").args(["-f", "-c", "%T"]).arg(directory).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// How long it takes to write a page to a directory's disk: the median of two hundred.
pub fn sync(directory: &Path) -> Duration {
    let path = directory.join("sync");
    let mut file = File::create(&path).unwrap();
    let sync = |_| {
        file.write_all(&[0; 4096]).unwrap();
        let start = Instant::now();
        file.sync_data().unwrap();
        start.elapsed()
    };
    let mut sorted: Vec<Duration> = (0..200).map(sync).collect();
    sorted.sort_unstable();
    fs::remove_file(path).unwrap();
    percentile(&sorted, 50)
}

/// Megabytes.
pub struct Memory {
    pub resident: f64,
    /// Pages that are shared count in parts.
    pub proportional: f64,
}

pub fn memory(pid: Pid) -> Memory {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let megabytes = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
    };
    Memory { resident: megabytes("Rss:"), proportional: megabytes("Pss:") }
}

/// Time on a processor in user mode and in the kernel.
#[derive(Clone, Copy)]
pub struct Times {
    pub user: Duration,
    pub system: Duration,
}

/// proc_pid_stat(5), fields 14 and 15.
pub fn times(pid: Pid) -> Times {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = text.rsplit_once(") ").unwrap().1.split(' ').collect();
    Times { user: ticks(fields[11]), system: ticks(fields[12]) }
}

/// Time that all processors spent in software interrupts (proc_stat(5)).
pub fn software_interrupts() -> Duration {
    let text = fs::read_to_string("/proc/stat").unwrap();
    ticks(text.split_whitespace().nth(7).unwrap())
}

pub fn cpu_of_thread() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap()
}

/// A hundred a second, on every architecture that this runs on (`USER_HZ`).
fn ticks(field: &str) -> Duration {
    Duration::from_millis(10 * field.parse::<u64>().unwrap())
}

pub fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}
