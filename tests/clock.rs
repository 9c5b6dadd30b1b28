//! The clock jumps, of the server, of a client, of both. It is everybody's on a machine, so this runs in the virtual machine
//! only, one test at a time.

#[path = "support/lab.rs"]
mod lab;

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{Signal, kill};
use rtime_clock::adjtime::{Timex, adjtimex};

use lab::{Daemon, FAMILIES, Family, Lab, eventually, succeeds};

const HOUR: i64 = 3600;

/// Seconds of the default window.
const WINDOW: i64 = 60;

/// Seconds that a door is open: longer than a busy emulator needs from a knock, by a step of the clock, to a connection.
const OPEN_FOR: u64 = 45;

/// The machine's clock, for one test, which leaves it right.
struct Clock {
    offset: i64,
    start: (Duration, Instant),
    _one_at_a_time: MutexGuard<'static, ()>,
}

impl Clock {
    fn take() -> Self {
        static CLOCK: Mutex<()> = Mutex::new(());
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        assert_eq!(name.trim(), "knockq-vm", "this test sets the clock");
        let guard = CLOCK.lock().unwrap_or_else(PoisonError::into_inner);
        let start = (SystemTime::now().duration_since(UNIX_EPOCH).unwrap(), Instant::now());
        Self { offset: 0, start, _one_at_a_time: guard }
    }

    /// Sets it so many seconds ahead of the right time, or behind.
    fn set(&mut self, offset: i64) {
        self.offset = offset;
        let right = (self.start.0 + self.start.1.elapsed()).as_secs_f64();
        let date = format!("@{:.3}", right + offset as f64);
        assert!(Command::new("date").args(["-u", "-s", &date]).output().unwrap().status.success(), "{date}");
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.set(0);
    }
}

fn lab() -> Lab {
    Lab::with(&format!("open_for = \"{OPEN_FOR}s\""))
}

/// A knock of alice's that is sent, and can be sent again.
fn knock(lab: &Lab, family: Family) -> String {
    let packet = lab.print_knock(family, &["--source", &family.alice().to_string()]);
    lab.alice.oracle_says(&["replay", &packet]);
    packet
}

#[track_caller]
fn opens(lab: &Lab, family: Family) {
    eventually("a door", || lab.door(family.alice(), 22).is_some());
    assert!(lab.alice.reaches(family.server(), 22));
    assert!(!lab.mallory.reaches(family.server(), 22));
}

#[track_caller]
fn stays_shut(lab: &Lab, family: Family) {
    thread::sleep(Duration::from_millis(500));
    assert_eq!(lab.door(family.alice(), 22), None);
    assert!(!lab.alice.reaches(family.server(), 22));
}

#[track_caller]
fn shuts(lab: &Lab) {
    eventually("closing", || FAMILIES.iter().all(|family| lab.door(family.alice(), 22).is_none()));
}

/// The lines about the clock.
fn told(daemon: &Daemon) -> Vec<String> {
    daemon.log().lines().filter(|line| line.contains("the clock")).map(str::to_owned).collect()
}

/// Waits for one line that says this, and so many seconds.
#[track_caller]
fn tells(daemon: &Daemon, text: &str, seconds: i64) {
    let near: Vec<String> = (-5..=5).map(|off| format!("seconds={}", seconds + off)).collect();
    let is_it =
        |line: &&String| line.contains(text) && near.iter().any(|seconds| line.split(' ').any(|word| word == seconds));
    eventually("a line about the clock", || told(daemon).iter().any(|line| is_it(&line)));
    assert_eq!(told(daemon).iter().filter(is_it).count(), 1, "{:?}", told(daemon));
}

#[test]
fn doctor_tells_whether_the_clock_is_synchronised() {
    let mut clock = Clock::take();
    let lab = lab();
    let _daemon = lab.start();
    let config = lab.config().display().to_string();
    let doctor = || {
        let output = lab.knockq(&lab.server, &["doctor", "--config", &config]);
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    clock.set(0); // whoever sets it leaves it to others to keep it right
    let (code, said) = doctor();
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("problem  the clock is not synchronised") && said.contains("\n         Hint: apt-get"),
        "{said}"
    );
    let mut right = Timex::new();
    right.0.modes = libc::ADJ_STATUS | libc::ADJ_MAXERROR;
    adjtimex(&mut right).unwrap();
    let (code, said) = doctor();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("ok       the clock is synchronised\n") && !said.contains("problem"), "{said}");
}

#[test]
fn an_hour_forward_is_told_once_shuts_no_door_early_and_makes_no_spent_knock_fresh() {
    let mut clock = Clock::take();
    let lab = lab();
    let daemon = lab.start();
    let spent = FAMILIES.map(|family| {
        let packet = knock(&lab, family);
        opens(&lab, family);
        (family, packet)
    });
    let opened = Instant::now();
    clock.set(HOUR);
    tells(&daemon, "the clock went forward", HOUR);
    FAMILIES.iter().for_each(|family| opens(&lab, *family));
    shuts(&lab);
    assert!(opened.elapsed() < Duration::from_secs(2 * OPEN_FOR), "an hour's jump keeps no door open");
    for (family, packet) in &spent {
        lab.alice.oracle_says(&["replay", packet]);
        stays_shut(&lab, *family);
        knock(&lab, *family);
        opens(&lab, *family);
    }
    assert_eq!(told(&daemon).len(), 1, "{:?}", told(&daemon));
}

#[test]
fn back_past_accepted_counters_what_was_spent_stays_spent_and_only_its_own_key_waits() {
    let mut clock = Clock::take();
    let lab = lab();
    lab.add_user("bob", &["ssh"]);
    clock.set(HOUR); // it was wrong, and nobody had noticed
    let daemon = lab.start();
    let spent = FAMILIES.map(|family| (family, knock(&lab, family)));
    FAMILIES.iter().for_each(|family| opens(&lab, *family));
    clock.set(0);
    tells(&daemon, "the clock was set back", HOUR);
    shuts(&lab);
    for family in FAMILIES {
        let said = lab.knockq(&lab.alice, &["send", "server", family.flag()]);
        succeeds(&said);
        let said = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(said.contains("was ahead once"), "the client knows that it was ahead: {said}");
        stays_shut(&lab, family);
        succeeds(&lab.knockq_as("bob", &lab.alice, &["send", "server", family.flag()]));
        opens(&lab, family);
    }
    assert!(daemon.log().contains("refused reason=superseded user=alice"), "{}", daemon.log());
    shuts(&lab);
    daemon.signal(Signal::SIGKILL);
    drop(daemon);
    let daemon = lab.start();
    for offset in [0, HOUR] {
        clock.set(offset);
        for (family, packet) in &spent {
            lab.alice.oracle_says(&["replay", packet]);
            stays_shut(&lab, *family);
        }
    }
    clock.set(HOUR + 2 * WINDOW);
    tells(&daemon, "the clock went forward", 2 * WINDOW);
    for family in FAMILIES {
        knock(&lab, family);
        opens(&lab, family);
    }
}

#[test]
fn a_client_that_was_two_hours_ahead_is_told_so_and_let_in_when_it_is_right() {
    let mut clock = Clock::take();
    let lab = lab();
    let daemon = lab.start();
    let (_, engine) = daemon.processes()[2];
    for family in FAMILIES {
        // The server's clock stays right: it does not look while its machine's is wrong.
        kill(engine, Signal::SIGSTOP).unwrap();
        clock.set(2 * HOUR);
        let ahead = lab.knockq(&lab.alice, &["send", "server", family.flag()]);
        succeeds(&ahead);
        let said = String::from_utf8_lossy(&ahead.stderr).into_owned();
        assert!(said.contains("synchronised"), "{said}");
        clock.set(0);
        kill(engine, Signal::SIGCONT).unwrap();
        stays_shut(&lab, family);
        let right = lab.knockq(&lab.alice, &["send", "server", family.flag()]);
        succeeds(&right);
        let said = String::from_utf8_lossy(&right.stderr).into_owned();
        assert!(said.contains("was ahead once"), "a knock of then could be spent then: {said}");
        opens(&lab, family);
    }
    assert_eq!(told(&daemon), [""; 0], "the server's never jumped");
}

#[test]
fn no_counter_is_issued_twice_however_the_clock_of_a_client_is_set() {
    let mut clock = Clock::take();
    let lab = lab();
    let mut sequences = BTreeSet::new();
    for (round, offset) in [0, 2, 0, -HOUR, 2 * HOUR, -HOUR, 0, 2 * HOUR, -1, 0].into_iter().enumerate() {
        clock.set(offset);
        for family in FAMILIES {
            // One key and service, so a counter used twice shows as a sequence number sent twice.
            let packet = lab.print_knock(family, &[]);
            let sequence = if family == Family::V4 { &packet[48..56] } else { &packet[88..96] };
            assert!(sequences.insert(sequence.to_owned()), "round {round}, {offset} s off");
        }
    }
}

#[test]
fn a_server_that_starts_decades_behind_serves_as_soon_as_its_clock_is_right() {
    let mut clock = Clock::take();
    let lab = lab();
    let early = 1_000_000_000 - i64::try_from(clock.start.0.as_secs()).unwrap();
    clock.set(early);
    let daemon = lab.start();
    clock.set(0);
    tells(&daemon, "the clock went forward", -early);
    for family in FAMILIES {
        knock(&lab, family);
        opens(&lab, family);
    }
}

#[test]
fn a_machine_that_sleeps_serves_as_soon_as_it_wakes_up_and_its_doors_keep_the_time_they_had() {
    const ASLEEP: i64 = 20;
    let _clock = Clock::take();
    let lab = lab();
    let daemon = lab.start();
    let spent = FAMILIES.map(|family| (family, knock(&lab, family)));
    FAMILIES.iter().for_each(|family| opens(&lab, *family));
    lab.server.sh(&format!("rtcwake -u -m mem -s {ASLEEP}"));
    let awake = Instant::now();
    FAMILIES.iter().for_each(|family| opens(&lab, *family));
    eventually("a line about the clock", || !told(&daemon).is_empty());
    assert!(told(&daemon)[0].contains("the clock went forward"), "{:?}", told(&daemon));
    assert_eq!(told(&daemon).len(), 1, "{:?}", told(&daemon));
    shuts(&lab);
    assert!(awake.elapsed() < Duration::from_secs(OPEN_FOR + 15), "no door is open longer for it");
    for (family, packet) in &spent {
        lab.alice.oracle_says(&["replay", packet]);
        stays_shut(&lab, *family);
        knock(&lab, *family);
        opens(&lab, *family);
    }
}
