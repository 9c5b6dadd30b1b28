//! Counters that could have gone backwards: other users, other stores, two copies at once.

use std::fs::{self, File};
use std::thread;
use std::time::Duration;

use knockq::crypto::PrivateKey;
use knockq::serve::store::{Store, StoreFloor};

use super::knock::{self, Knock};
use crate::debugger::{FDATASYNC, Traced, other_thread};
use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually, succeeds};
use crate::unix_now;

/// Both knocks have opened, and their doors are shut again.
fn spend(lab: &Lab) -> [Knock; 2] {
    let knocks = Knock::both(lab);
    knocks.iter().for_each(|knock| knock.send(lab));
    knocks.iter().for_each(|knock| knock.has_opened(lab));
    lab.revoke(&["--all"]);
    knocks
}

#[test]
fn a_user_who_is_removed_and_comes_back_or_is_renamed_finds_every_knock_spent() {
    let lab = knock::lab();
    let daemon = knock::start(&lab);
    let knocks = spend(&lab);
    let config = lab.config().display().to_string();
    let user = |what: &[&str]| lab.control(&[&["user"], what, &["--config", &config]].concat());
    let key = succeeds(&lab.knockq(&lab.alice, &["keygen", "--show"]));

    user(&["remove", "alice"]);
    knocks.iter().for_each(|knock| knock.send(&lab));
    user(&["add", "alice", "--key", key.trim_end(), "--allow", "ssh"]);
    knocks.iter().for_each(|knock| knock.is_spent(&lab, &daemon));
    user(&["rename", "alice", "carol"]);
    knocks.iter().for_each(|knock| knock.is_spent_for("carol", &lab, &daemon));

    daemon.stop();
    let daemon = knock::start(&lab);
    knocks.iter().for_each(|knock| knock.is_spent_for("carol", &lab, &daemon));
    for family in FAMILIES {
        lab.knock(family, &[]);
        assert!(lab.wait_for_door(family.alice(), 22).contains("comment \"carol ssh "));
    }
}

/// A copy that lay aside takes the place of the store: while the daemon runs, and while it does not.
#[test]
fn a_store_that_is_restored_from_a_copy_makes_no_knock_of_before_fresh_and_the_log_says_so() {
    const WINDOW: u64 = 60;
    for runs in [true, false] {
        let lab = Lab::with("open_for = \"1h\"");
        lab.set(&format!("window = \"{WINDOW}s\""));
        let backup = lab.directory.path.join("state/backup");
        fs::copy(lab.store(), &backup).unwrap();
        let daemon = knock::start(&lab);
        let knocks = spend(&lab);
        if runs {
            fs::rename(&backup, lab.store()).unwrap();
            knocks.iter().for_each(|knock| knock.is_spent(&lab, &daemon));
        }
        daemon.stop();
        if !runs {
            fs::remove_file(lab.store()).unwrap();
            fs::copy(&backup, lab.store()).unwrap();
        }
        let daemon = knock::start(&lab);
        let fresh_again = unix_now() + WINDOW + 1;
        knocks.iter().for_each(|knock| knock.is_in_doubt(&lab, &daemon));
        let log = daemon.stop();
        assert_eq!(log.matches("counters.redb: is a copy of a counter store, restored or moved; to be safe, no knock of before is taken hint=\"no knocks are accepted until ").count(), 1, "{log}");

        let daemon = knock::start(&lab);
        thread::sleep(Duration::from_secs(fresh_again.saturating_sub(unix_now())));
        for family in FAMILIES {
            lab.knock(family, &[]);
            lab.wait_for_door(family.alice(), 22);
        }
        assert!(!daemon.log().contains("is a copy"), "once: {}", daemon.log());
    }
}

#[test]
fn a_store_that_is_deleted_or_anothers_forgets_nothing_and_the_next_start_asks_for_recover() {
    let lab = knock::lab();
    let daemon = knock::start(&lab);
    let knocks = spend(&lab);
    fs::remove_file(lab.store()).unwrap();
    knocks.iter().for_each(|knock| knock.is_spent(&lab, &daemon));
    lab.knock(Family::V4, &[]);
    lab.wait_for_door(Family::V4.alice(), 22);
    lab.revoke(&["--all"]);
    daemon.stop();

    let refuses = |why: &str| {
        let mut daemon = Daemon::spawn(&lab, &[]);
        assert_eq!(daemon.end(), Some(78));
        let log = daemon.log();
        assert!(log.contains(why) && log.contains("knockq recover"), "{log}");
        knocks.iter().for_each(|knock| knock.send(&lab));
        FAMILIES.into_iter().for_each(|family| lab.stays_shut(family));
    };
    refuses("counters.redb: ");
    let file = File::options().read(true).write(true).create_new(true).open(lab.store()).unwrap();
    lab.server.sh(&format!("chmod 600 {}", lab.store().display()));
    Store::create(file, PrivateKey::generate().unwrap().public(), StoreFloor::default()).unwrap();
    refuses("counters.redb: belongs to the server key");
}

#[test]
fn a_copy_that_comes_during_the_write_of_the_first_opens_no_second_door() {
    let lab = knock::lab();
    for family in FAMILIES {
        a_copy_comes(&lab, family);
    }
}

fn a_copy_comes(lab: &Lab, family: Family) {
    let daemon = knock::start(lab);
    let (_, engine) = daemon.processes()[2];
    let granted =
        || daemon.log().matches(&format!("granted user=alice service=ssh source={} ", family.alice())).count();
    let says = |line: &str| eventually(line, || daemon.log().contains(line));
    let source = format!("user=alice source={}", family.alice());
    let writer = Traced::attach(other_thread(engine));
    let knock = Knock::new(lab, family);
    knock.send(lab);
    writer.run_to(&[FDATASYNC]);
    knock.send(lab);
    says(&format!("refused reason=replayed {source}"));
    assert_eq!(lab.door(family.alice(), 22), None, "its counter is not on the disk");
    writer.release();
    knock.has_opened(lab);
    eventually("the line", || granted() == 1);
    lab.revoke(&["--all"]);

    let writer = Traced::attach(other_thread(engine));
    let knock = Knock::with_source(lab, family, "none");
    knock.send(lab);
    writer.run_to(&[FDATASYNC]);
    knock.send_as_mallory(lab);
    let sources = format!("source={} elsewhere={}", family.alice(), family.mallory());
    says(&format!("withdrawn reason=spent_twice user=alice service=ssh {sources}"));
    writer.release();
    lab.stays_shut(family);
    assert_eq!(granted(), 1);
    daemon.stop();
}
