//! The daemon is stopped right after knocks, and killed at random moments, many times.
//!
//! `KNOCKQ_STOPS` says how many times, `KNOCKQ_SEED` with which random numbers.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};

use super::count;
use super::knock::{self, Knock};
use crate::hostile::Random;
use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually};
use crate::number;

/// A lab for each twenty times, so that none lasts too long.
fn labs() -> impl Iterator<Item = (Lab, u64)> {
    const TIMES: u64 = 20;
    let all = number("KNOCKQ_STOPS", TIMES);
    (0..all.div_ceil(TIMES)).map(move |lab| (knock::lab(), TIMES.min(all - lab * TIMES)))
}

/// Where redb's header says how the last process left the store, and with which bit that it did not close it.
const STATE: usize = 9;
const IS_OPEN: u8 = 2;

fn granted(daemon: &Daemon, family: Family) -> usize {
    count(daemon, &format!("granted user=alice service=ssh source={} ", family.alice()))
}

/// Refused for what they are.
fn spent(daemon: &Daemon, family: Family) -> usize {
    let refused = |reason| count(daemon, &format!("packet reason={reason} user=alice source={}", family.alice()));
    refused("replayed") + refused("superseded")
}

/// No line says that the store may have forgotten anything, or could not be used.
#[track_caller]
fn trusts_its_store(log: &str) {
    for words in ["not whole", "in doubt", "in_doubt", "no knock of before", "counters.redb"] {
        assert!(!log.contains(words), "{words}: {log}");
    }
}

/// It comes again, opens nothing, and the log says why.
#[track_caller]
fn is_spent(lab: &Lab, daemon: &Daemon, knock: &Knock) {
    let (grants, refusals) = (granted(daemon, knock.family), spent(daemon, knock.family));
    knock.send(lab);
    eventually("a refusal", || spent(daemon, knock.family) > refusals);
    assert_eq!(granted(daemon, knock.family), grants, "honoured twice");
}

/// It comes, and has its door in this moment.
#[track_caller]
fn opens(lab: &Lab, daemon: &Daemon, knock: &Knock) {
    let grants = granted(daemon, knock.family);
    knock.send(lab);
    eventually("a grant", || granted(daemon, knock.family) > grants);
}

#[test]
fn a_clean_stop_right_after_knocks_closes_the_store_so_that_the_next_knock_opens_at_once() {
    for (lab, times) in labs() {
        let (mut before, mut open) = (Vec::<Knock>::new(), 0);
        for _ in 0..times {
            let daemon = knock::start(&lab);
            before.iter().for_each(|knock| is_spent(&lab, &daemon, knock));
            before = Knock::both(&lab).into();
            before.iter().for_each(|knock| opens(&lab, &daemon, knock));
            trusts_its_store(&daemon.stop());
            open += usize::from(fs::read(lab.store()).unwrap()[STATE] & IS_OPEN != 0);
        }
        assert!(open < 3, "{open} of {times} were not closed, for which a disk has two seconds");
    }
}

/// What was under way opens its door after all, or is spent: how far it came, nobody can tell.
#[test]
fn after_a_kill_at_a_random_moment_what_has_opened_is_spent_and_a_fresh_knock_opens_at_once() {
    let seed = number("KNOCKQ_SEED", 0x6b6e_6f63_6b71);
    println!("KNOCKQ_SEED={seed}");
    let mut random = Random(seed);
    for (lab, times) in labs() {
        let mut before = Vec::new();
        for _ in 0..times {
            let mut daemon = knock::start(&lab);
            ends_once(&lab, &daemon, &before);
            let start = Instant::now();
            let fresh = Knock::new(&lab, FAMILIES[random.below(2)]);
            opens(&lab, &daemon, &fresh);
            let usual = start.elapsed();
            lab.revoke(&["--all"]);

            let knocks = Knock::both(&lab);
            knocks.iter().for_each(|knock| knock.send(&lab));
            thread::sleep(usual.mul_f64(random.below(1000) as f64 / 1000.0));
            kill_all(&mut daemon, &mut random);
            before = vec![(fresh, true)];
            before.extend(knocks.map(|knock| {
                let has_opened = lab.door(knock.family.alice(), 22).is_some();
                (knock, has_opened)
            }));
            lab.server.nft(&["delete", "table", "inet", "knockq"]); // with its doors, so that the next are seen
            trusts_its_store(&daemon.log());
        }
        let daemon = knock::start(&lab);
        ends_once(&lab, &daemon, &before);
        Knock::both(&lab).iter().for_each(|knock| opens(&lab, &daemon, knock));
        trusts_its_store(&daemon.stop());
    }
}

/// What has opened a door before is spent. Of what has not, nobody knows how far it came: now it opens one, or is spent.
#[track_caller]
fn ends_once(lab: &Lab, daemon: &Daemon, before: &[(Knock, bool)]) {
    for (knock, _) in before.iter().filter(|(_, has_opened)| !has_opened) {
        let ended = || granted(daemon, knock.family) + spent(daemon, knock.family);
        let ends = ended();
        knock.send(lab);
        eventually("an end", || ended() > ends);
    }
    before.iter().for_each(|(knock, _)| is_spent(lab, daemon, knock));
    lab.revoke(&["--all"]);
}

/// One after the other, whichever is first, with some time between.
fn kill_all(daemon: &mut Daemon, random: &mut Random) {
    let mut processes = daemon.processes();
    processes.rotate_left(random.below(3));
    for (_, pid) in processes {
        let _ = kill(pid, Signal::SIGKILL); // the death of one may have ended the next
        thread::sleep(Duration::from_micros(random.below(2000) as u64));
    }
    daemon.end();
    eventually("the end of all", || processes.iter().all(|(_, pid)| kill(*pid, None::<Signal>).is_err()));
}
