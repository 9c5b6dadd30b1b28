//! Processes are killed at an exact instant between a knock and its door.

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};

use super::knock::{self, Knock};
use crate::debugger::{FDATASYNC, PWRITE64, SENDTO, Traced, other_thread};
use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually};
use crate::seconds_left;

/// Who is killed, in this order.
const VICTIMS: [&[&str]; 4] = [&["engine"], &["gate"], &["root"], &["root", "gate", "engine"]];

/// Seconds that a door stays open.
const OPEN_FOR: f64 = 3600.0;

/// A thread that is held where the test wants it, and the process that it is of.
struct Held {
    role: &'static str,
    thread: Traced,
}

/// Kills them while a thread is held. All must end, and one line says why: that of whoever lives on.
fn kill_and_bury(daemon: &mut Daemon, victims: &[&str], held: Held) {
    let told = daemon.log().lines().count();
    let processes = daemon.processes();
    let pids = victims.iter().map(|victim| processes.iter().find(|(name, _)| name == victim).unwrap().1);
    for pid in pids {
        // The death of one may have ended the next.
        assert!(matches!(kill(pid, Signal::SIGKILL), Ok(()) | Err(Errno::ESRCH)));
    }
    // The engine ends although its writer is held; the gate does only when it looks.
    if held.role == "engine" || victims.contains(&held.role) {
        held.thread.bury();
    } else {
        held.thread.release();
    }
    let code = daemon.end();
    assert_eq!(code, if victims.contains(&"root") { None } else { Some(1) }, "{}", daemon.log());
    eventually("the end of all", || processes.iter().all(|(_, pid)| kill(*pid, None::<Signal>).is_err()));
    let log = daemon.log();
    let lines: Vec<&str> = log
        .lines()
        .skip(told)
        .filter(|line| {
            !["granted user=alice", "gate: opened", "debug: ", "refused reason="]
                .iter()
                .any(|other| line.contains(other))
        })
        .collect();
    match victims {
        [_, _, _] => assert!(lines.len() <= 1, "nobody is left but who sees the first die: {lines:?}"),
        [victim] => {
            let died = format!("{victim} was killed by signal 9; stopping all");
            let line = if *victim == "root" { "root is gone; stopping all" } else { &died };
            assert!(matches!(lines[..], [only] if only.contains(line)), "{lines:?}");
        }
        _ => unreachable!(),
    }
}

/// The thread that writes counters, held when it is about to make this call for knocks.
fn hold_writer(lab: &Lab, daemon: &Daemon, knocks: &[Knock], call: u64) -> Held {
    let (_, engine) = daemon.processes()[2];
    let writer = Traced::attach(other_thread(engine));
    knocks.iter().for_each(|knock| knock.send(lab));
    writer.run_to(&[call]);
    Held { role: "engine", thread: writer }
}

/// The gate, held when the kernel has the elements that it sent, and it does not know of the last one yet.
fn hold_gate(lab: &Lab, daemon: &Daemon, knocks: &[Knock]) -> Held {
    let (_, gate) = daemon.processes()[1];
    let gate = Traced::attach(gate);
    knocks.iter().for_each(|knock| knock.send(lab));
    while knocks.iter().any(|knock| lab.door(knock.family.alice(), 22).is_none()) {
        gate.run_to(&[SENDTO]); // verdicts, then the elements
        assert!(gate.finish() > 0);
    }
    Held { role: "gate", thread: gate }
}

/// The next knock opens, as if nothing had been; then all is shut again.
fn serves(lab: &Lab, family: Family) {
    lab.knock(family, &[]);
    lab.wait_for_door(family.alice(), 22);
    lab.revoke(&["--all"]);
}

#[test]
fn killed_before_the_durable_write_a_knock_opens_nothing_and_may_be_sent_again() {
    let lab = knock::lab();
    let mut daemon = knock::start(&lab);
    for victims in VICTIMS {
        let knocks = Knock::both(&lab);
        let held = hold_writer(&lab, &daemon, &knocks, PWRITE64);
        kill_and_bury(&mut daemon, victims, held);
        knocks.iter().for_each(|knock| knock.has_opened_nothing(&lab));

        daemon = knock::start(&lab);
        for knock in &knocks {
            assert_eq!(lab.door(knock.family.alice(), 22), None);
            knock.send(&lab);
            knock.has_opened(&lab);
        }
        lab.revoke(&["--all"]);
        knocks.iter().for_each(|knock| knock.is_spent(&lab, &daemon));
        serves(&lab, Family::V6);
    }
}

/// What the dead process wrote, the kernel may write on, or not.
#[test]
fn a_knock_whose_verifier_is_killed_before_the_durable_write_opens_nothing() {
    let lab = knock::lab();
    let mut daemon = knock::start(&lab);
    for family in FAMILIES {
        let knock = Knock::new(&lab, family);
        let held = hold_writer(&lab, &daemon, std::slice::from_ref(&knock), FDATASYNC);
        kill_and_bury(&mut daemon, &["engine"], held);
        knock.has_opened_nothing(&lab);
        daemon = knock::start(&lab);
        assert_eq!(lab.door(family.alice(), 22), None);
        serves(&lab, family);
    }
}

#[test]
fn killed_between_the_durable_write_and_the_element_a_knock_opens_nothing_and_is_spent() {
    let lab = knock::lab();
    let mut daemon = knock::start(&lab);
    for victims in VICTIMS {
        for family in FAMILIES {
            let knock = Knock::new(&lab, family);
            let held = hold_writer(&lab, &daemon, std::slice::from_ref(&knock), FDATASYNC);
            assert_eq!(held.thread.finish(), 0);
            kill_and_bury(&mut daemon, victims, held);
            knock.has_opened_nothing(&lab);

            daemon = knock::start(&lab);
            knock.is_spent(&lab, &daemon);
            serves(&lab, family);
        }
    }
}

#[test]
fn killed_after_the_element_a_knock_is_spent_and_its_grant_stays_with_its_time() {
    let lab = knock::lab();
    let mut daemon = knock::start(&lab);
    for victims in VICTIMS {
        let knocks = Knock::both(&lab);
        let held = hold_gate(&lab, &daemon, &knocks);
        kill_and_bury(&mut daemon, victims, held);
        let left = |knock: &Knock| {
            let element = lab.door(knock.family.alice(), 22).expect("it was earned");
            assert!(element.contains("comment \"alice ssh"), "{element}");
            seconds_left(&element)
        };
        let before = knocks.each_ref().map(|knock| {
            knock.has_opened(&lab);
            left(knock)
        });
        daemon = knock::start(&lab);
        for (knock, before) in knocks.iter().zip(before) {
            assert!((OPEN_FOR - 600.0..before).contains(&left(knock)), "{before}");
        }
        lab.revoke(&["--user", "alice"]);
        knocks.iter().for_each(|knock| knock.is_spent(&lab, &daemon));
        serves(&lab, Family::V4);
    }
}
