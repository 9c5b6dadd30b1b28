//! A process stands still for a time, and then goes on.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{count, send};
use crate::debugger::{FDATASYNC, PWRITE64, SENDMSG, SENDTO, Traced, other_thread};
use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually, resident};
use crate::recorded::persona;
use crate::{UntilDropped, flow, raw_socket, seconds_left};

const STOPPED: Duration = Duration::from_secs(10);

/// KiB that a process may have grown by, in buffers that fill once: the relay's mebibyte, read at one go into one that
/// doubles as it grows, and what is decided on it.
const GROWTH: u64 = 6_144;

#[test]
fn what_was_sent_to_a_process_that_stands_still_opens_when_it_goes_on() {
    let lab = Lab::with("open_for = \"10s\"");
    let daemon = lab.start();
    for (role, process) in &daemon.processes()[1..] {
        for family in FAMILIES {
            kill(*process, Signal::SIGSTOP).unwrap();
            lab.knock(family, &[]);
            lab.stays_shut(family);
            kill(*process, Signal::SIGCONT).unwrap();
            lab.wait_for_door(family.alice(), 22);
            eventually(role, || lab.door(family.alice(), 22).is_none());
        }
    }
    daemon.stop();
}

/// The kernel counts a door's time from when it is told of it. A door that is open for longer than its grant would be taken for one
/// that others have loaded.
#[test]
fn a_gate_that_is_held_up_while_it_opens_a_door_leaves_it_open_for_no_longer_and_a_restart_finds_it() {
    const HELD: Duration = Duration::from_secs(4);
    let lab = Lab::with("open_for = \"1h\"");
    let mut daemon = lab.start();
    for family in FAMILIES {
        let door = || lab.door(family.alice(), 22);
        let held = Traced::attach(daemon.processes()[1].1);
        lab.knock(family, &[]);
        let mut since = Instant::now();
        while door().is_none() {
            held.run_to(&[SENDTO, SENDMSG]); // the verdict, what the kernel is to open, the answer
            since = Instant::now();
            thread::sleep(HELD);
            held.finish();
        }
        held.release();
        eventually("its own time", || {
            let time = since.elapsed();
            door().is_some_and(|door| seconds_left(&door) + time.as_secs_f64() < 3602.0)
        });
        daemon.stop();
        daemon = lab.start();
        assert!(door().is_some(), "{}", daemon.log());
    }
    daemon.stop();
}

#[test]
fn an_engine_that_stands_still_under_a_flood_costs_no_memory_and_goes_on_at_once() {
    stands_still(2, |daemon, _| {
        let told = "the engine is slower than the SYNs come: some were dropped unseen";
        eventually("the count of what it did not see", || count(daemon, told) > 0);
    });
}

#[test]
fn a_gate_that_stands_still_under_a_flood_costs_no_memory_and_goes_on_at_once() {
    stands_still(1, |_, dropped| assert!(dropped > 0, "the kernel dropped nothing"));
}

/// Stops a process by its place, for ten seconds, while mallory sends SYNs as fast as she can.
fn stands_still(place: usize, is_counted: impl Fn(&Daemon, u64)) {
    let lab = Lab::with("open_for = \"8s\"");
    let daemon = lab.start();
    let processes = daemon.processes();
    let (role, process) = processes[place];
    for family in FAMILIES {
        lab.knock(family, &[]); // what the first commit allocates is there
        lab.wait_for_door(family.alice(), 22);
    }
    flood(&lab, || thread::sleep(Duration::from_secs(1)));
    let (before, dropped) = (memory(&processes), dropped_by_the_kernel(&lab));
    flood(&lab, || {
        kill(process, Signal::SIGSTOP).unwrap();
        thread::sleep(STOPPED / 2);
        for family in FAMILIES {
            lab.knock(family, &[]); // which is lost among the others, most likely
        }
        thread::sleep(STOPPED / 2);
        for family in FAMILIES {
            assert_eq!(lab.door(family.alice(), 22), None);
            assert!(!lab.mallory.reaches(family.server(), 22));
        }
        has_not_grown(&before, &memory(&processes));
        kill(process, Signal::SIGCONT).unwrap();
    });
    for family in FAMILIES {
        eventually("closing", || lab.door(family.alice(), 22).is_none());
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
        assert_eq!(lab.door(family.mallory(), 22), None, "{role}");
    }
    has_not_grown(&before, &memory(&processes));
    is_counted(&daemon, dropped_by_the_kernel(&lab) - dropped);
    daemon.stop();
}

#[test]
fn while_root_stands_still_knocks_go_on_and_a_reload_waits() {
    let lab = Lab::with("open_for = \"10s\"");
    let daemon = lab.start();
    kill(daemon.pid(), Signal::SIGSTOP).unwrap();
    kill(daemon.pid(), Signal::SIGHUP).unwrap();
    thread::sleep(STOPPED);
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
        eventually("closing", || lab.door(family.alice(), 22).is_none());
    }
    assert_eq!(count(&daemon, "engine: reloaded"), 0);
    kill(daemon.pid(), Signal::SIGCONT).unwrap();
    eventually("the reload", || count(&daemon, "engine: reloaded") == 1);
    daemon.stop();
}

/// As one whose disk hangs, a thread that a debugger holds cannot be killed for good: its process is not gone before both let go.
#[test]
fn an_engine_that_cannot_be_killed_because_its_disk_hangs_keeps_nobody_from_stopping() {
    for (trial, call) in [(&[][..], PWRITE64), (&["--try", "1h"], FDATASYNC)] {
        let lab = Lab::with("open_for = \"1h\"");
        let mut daemon = Daemon::spawn_with(&lab, trial, &[]);
        daemon.wait_for("knockq: ready");
        let writer = hold_writer(&lab, &daemon, call);
        daemon.signal(Signal::SIGTERM);
        let is_on_trial = !trial.is_empty();
        assert_eq!(daemon.end(), Some(i32::from(is_on_trial)), "{}", daemon.log());
        for family in FAMILIES {
            assert_eq!(lab.alice.reaches(family.server(), 22), is_on_trial, "{}", daemon.log());
        }
        writer.bury();
        let daemon = lab.start();
        lab.knock(Family::V4, &[]);
        lab.wait_for_door(Family::V4.alice(), 22);
        daemon.stop();
    }
}

#[test]
fn a_gate_that_nobody_confirms_goes_although_the_disk_hangs() {
    let lab = Lab::with("open_for = \"1h\"");
    let mut daemon = Daemon::spawn_with(&lab, &["--try", "30s"], &[]);
    daemon.wait_for("knockq: ready");
    let writer = hold_writer(&lab, &daemon, FDATASYNC);
    assert_eq!(daemon.end(), Some(1), "{}", daemon.log());
    assert!(daemon.log().contains("not confirmed: the gate is taken away"), "{}", daemon.log());
    for family in FAMILIES {
        assert!(lab.alice.reaches(family.server(), 22));
    }
    writer.bury();
}

/// The engine's thread that writes counters, held when it is about to make this call for a knock.
fn hold_writer(lab: &Lab, daemon: &Daemon, call: u64) -> Traced {
    let (_, engine) = daemon.processes()[2];
    let writer = Traced::attach(other_thread(engine));
    lab.knock(Family::V4, &[]);
    writer.run_to(&[call]);
    writer
}

fn memory(processes: &[(&str, Pid)]) -> Vec<u64> {
    processes.iter().map(|(_, process)| resident(*process)).collect()
}

#[track_caller]
fn has_not_grown(before: &[u64], now: &[u64]) {
    assert!(before.iter().zip(now).all(|(before, now)| *now <= before + GROWTH), "from {before:?} to {now:?} KiB");
}

/// Does something while mallory sends SYNs to knock ports, as fast as she can.
fn flood(lab: &Lab, work: impl FnOnce()) {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let _until_dropped = UntilDropped(&is_over);
        scope.spawn(|| {
            lab.mallory.enter(|| {
                let sockets = FAMILIES.map(|family| (family, raw_socket(family), syns(family)));
                for number in (0..).take_while(|_| !is_over.load(Ordering::Relaxed)) {
                    for (family, socket, syns) in &sockets {
                        send(socket, *family, &syns[number % syns.len()]);
                    }
                }
            });
        });
        work();
    });
}

fn syns(family: Family) -> Vec<Vec<u8>> {
    let syn = |number: u16| {
        let flow = flow(family.mallory(), family.server(), 20_000 + number);
        persona(family == Family::V4).syn(&flow, u32::from(number).wrapping_mul(0x9e37_79b9), 7).unwrap()
    };
    (0..1_024).map(syn).collect()
}

/// Packets that found the queue or its socket full (net/netfilter/nfnetlink_queue.c, `seq_show`).
fn dropped_by_the_kernel(lab: &Lab) -> u64 {
    let text = lab.server.enter(|| fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue")).unwrap();
    text.split_whitespace().skip(5).take(2).map(|field| field.parse::<u64>().unwrap()).sum()
}
