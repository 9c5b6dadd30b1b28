//! The disk is full, slow or read-only, or has lost or changed what was written to it.

use std::fs::{self, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use redb::{Database, ReadableDatabase, TableDefinition};

use super::{Knocks, SmallDisk, count, send};
use crate::debugger::{Traced, other_thread};
use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually, succeeds};
use crate::{raw_socket, unix_now};

const PWRITE64: u64 = 18;
const FDATASYNC: u64 = 75;
const FTRUNCATE: u64 = 77;

/// Claims that wait for the disk at most.
const WAITING: usize = 1024;

fn store(lab: &Lab) -> PathBuf {
    lab.directory.path.join("state/counters.redb")
}

fn recover(lab: &Lab) {
    succeeds(&lab.knockq(&lab.server, &["recover", "--config", lab.config().to_str().unwrap()]));
}

/// A knock that has opened a door which is shut again.
fn spent_knock(lab: &Lab, family: Family) -> String {
    let packet = lab.print_knock(family, &[]);
    lab.alice.oracle_says(&["replay", &packet]);
    lab.wait_for_door(family.alice(), 22);
    lab.control(&["revoke", "--all", "--config", lab.config().to_str().unwrap()]);
    packet
}

#[track_caller]
fn stays_spent(lab: &Lab, spent: &[(Family, String)]) {
    for (family, packet) in spent {
        lab.alice.oracle_says(&["replay", packet]);
        lab.stays_shut(*family);
    }
}

#[test]
fn a_full_disk_is_told_once_when_it_is_full_and_once_when_it_is_not() {
    let lab = Lab::new();
    let disk = SmallDisk::with_the_store_of(&lab);
    let daemon = lab.start();
    for (times, family) in (1..).zip(FAMILIES) {
        disk.fill(&lab);
        let refused = "the counters cannot be written, so nothing is opened until they can: No space left on device";
        eventually("a full disk", || {
            lab.knock(family, &[]);
            count(&daemon, refused) == times
        });
        for _ in 0..5 {
            lab.knock(family, &[]);
        }
        eventually("closing", || lab.door(family.alice(), 22).is_none());
        lab.stays_shut(family);
        disk.make_room();
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
        assert_eq!(count(&daemon, refused), times, "{}", daemon.log());
        assert_eq!(count(&daemon, "the counters can be written again"), times, "{}", daemon.log());
    }
    daemon.stop();
}

/// A file system with an open file is remounted by the kernel alone, after an error, and then for good. So what it says is
/// put into its mouth here.
#[test]
fn a_disk_that_takes_no_writes_for_a_time_opens_nothing_and_service_resumes_by_itself() {
    let lab = Lab::new();
    let daemon = lab.start();
    let (_, engine) = daemon.processes()[2];
    for (times, family) in (1..).zip(FAMILIES) {
        let writer = Traced::attach(other_thread(engine));
        for _ in 0..3 {
            lab.knock(family, &[]);
            writer.run_to(&[PWRITE64, FDATASYNC, FTRUNCATE]);
            writer.refuse(Errno::EROFS);
        }
        writer.release();
        eventually("a refusal", || count(&daemon, "nothing is opened until they can: Read-only file system") == times);
        lab.stays_shut(family);
        let store = &lab.status()["store"];
        assert!(store["ok"] == false && store["failing_since"].is_u64(), "{store}");
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
        assert_eq!(lab.status()["store"]["ok"], true);
        assert_eq!(count(&daemon, "the counters cannot be written"), times, "{}", daemon.log());
        assert_eq!(count(&daemon, "the counters can be written again"), times, "{}", daemon.log());
    }
    daemon.stop();
}

#[test]
fn a_disk_that_is_read_only_at_the_start_is_named_and_the_next_start_finds_it_writable() {
    let lab = Lab::new();
    let disk = SmallDisk::with_the_store_of(&lab);
    disk.remount(&lab, "ro");
    let mut daemon = Daemon::spawn(&lab, &[]);
    assert_eq!(daemon.end(), Some(1), "which the service manager tries again");
    let log = daemon.log();
    assert!(log.contains("counters.redb: Read-only file system") && log.contains("look at the disk"), "{log}");
    disk.remount(&lab, "rw");
    let daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    daemon.stop();
}

#[test]
fn knocks_wait_for_a_slow_disk_up_to_a_bound_and_others_are_decided_meanwhile() {
    let lab = Lab::with("open_for = \"10m\"");
    lab.set("window = \"10m\"\ngrants_per_minute = 60000");
    let daemon = lab.start();
    let (_, engine) = daemon.processes()[2];
    let granted = || count(&daemon, "engine: granted");
    let mut knocks = Knocks::new(&lab);
    let sockets = FAMILIES.map(|family| (family, lab.alice.enter(|| raw_socket(family))));
    let spent = sockets.each_ref().map(|(family, socket)| {
        let packet = knocks.bound(*family);
        send(socket, *family, &packet);
        packet
    });
    eventually("doors", || granted() == 2);
    lab.control(&["revoke", "--all", "--config", lab.config().to_str().unwrap()]);

    let writer = Traced::attach(other_thread(engine));
    send(&sockets[0].1, Family::V4, &knocks.bound(Family::V4));
    writer.run_to(&[FDATASYNC]);
    for number in 0..WAITING + 50 {
        let (family, socket) = &sockets[number % 2];
        send(socket, *family, &knocks.bound(*family));
    }
    eventually("too many", || count(&daemon, "the counters are written more slowly than knocks come") == 1);
    for ((family, socket), packet) in sockets.iter().zip(&spent) {
        send(socket, *family, packet);
    }
    eventually("lookups", || count(&daemon, "refused reason=replayed user=alice") > 0);
    eventually("the refusal", || count(&daemon, "refused reason=not_durable") > 0);
    for family in FAMILIES {
        assert_eq!(lab.door(family.alice(), 22), None, "not durable yet");
    }
    assert_eq!(lab.status()["store"]["waiting"], 1 + WAITING, "the status needs no disk");
    for _ in 0..3 {
        thread::sleep(Duration::from_secs(1));
        assert_eq!(writer.finish(), 0);
        writer.run_to(&[FDATASYNC]);
    }
    writer.release();
    eventually("all that waited", || granted() == 2 + 1 + WAITING);
    for family in FAMILIES {
        lab.wait_for_door(family.alice(), 22);
    }
    eventually("the end of it", || count(&daemon, "the counters of all knocks that waited are written") == 1);
    thread::sleep(Duration::from_millis(300));
    assert_eq!(granted(), 2 + 1 + WAITING, "what was beyond is refused for good");
    assert_eq!(count(&daemon, "the counters are written more slowly"), 1);
    daemon.stop();
}

#[test]
fn an_engine_that_is_killed_between_two_writes_of_a_commit_leaves_the_one_before_and_knocks_open_at_once() {
    let lab = Lab::new();
    for (writes, family) in (2..).zip(FAMILIES) {
        let mut daemon = lab.start();
        let (_, engine) = daemon.processes()[2];
        let writer = Traced::attach(other_thread(engine));
        lab.knock(family, &[]);
        for _ in 0..writes {
            assert_eq!(writer.run_to(&[PWRITE64, FDATASYNC]), PWRITE64);
        }
        kill(engine, Signal::SIGKILL).unwrap();
        writer.bury();
        assert_eq!(daemon.end(), Some(1));
        let daemon = lab.start();
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
        assert_eq!(count(&daemon, "its last write was not whole"), 0, "{}", daemon.log());
        daemon.stop();
    }
}

#[test]
fn a_store_that_was_damaged_is_refused_at_the_start_and_recover_keeps_spent_what_was_spent() {
    let lab = Lab::new();
    let daemon = lab.start();
    let spent = FAMILIES.map(|family| (family, spent_knock(&lab, family)));
    daemon.stop();
    let whole = fs::read(store(&lab)).unwrap();
    let mut without_names = whole.clone();
    while let Some(name) = without_names.windows(8).position(|name| name == b"counters") {
        without_names[name..name + 8].fill(0xff);
    }
    for damaged in [
        without_names,
        whole.iter().map(|byte| byte ^ 0x10).collect(),
        [&whole[..4096], &vec![0; whole.len() - 4096][..]].concat(),
        whole[..5000].to_vec(),
    ] {
        fs::write(store(&lab), damaged).unwrap();
        let mut daemon = Daemon::spawn(&lab, &[]);
        assert_eq!(daemon.end(), Some(78), "{}", daemon.log());
        let log = daemon.log();
        let is_named =
            log.contains("counters.redb: is damaged: ") || log.contains("counters.redb: is not a counter store");
        assert!(is_named && log.contains("knockq recover") && !log.contains("a fault in knockq"), "{log}");
    }
    recover(&lab);
    let daemon = lab.start();
    stays_spent(&lab, &spent);
    daemon.stop();
}

#[test]
fn a_store_that_is_overwritten_while_it_is_in_use_opens_nothing_that_the_next_start_would_forget() {
    let lab = Lab::new();
    for family in FAMILIES {
        let mut daemon = lab.start();
        let spent = spent_knock(&lab, family);
        let mut file = OpenOptions::new().write(true).open(store(&lab)).unwrap();
        let length = file.seek(SeekFrom::End(0)).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(&vec![0x5a; usize::try_from(length).unwrap()]).unwrap();
        let last = lab.print_knock(family, &[]);
        lab.alice.oracle_says(&["replay", &last]);
        // What it has in memory may do for this knock; or it reads what is there now.
        let has_ended = || fs::read_dir(format!("/proc/{}/fd", daemon.pid())).is_err();
        eventually("an outcome", || {
            lab.door(family.alice(), 22).is_some() || has_ended() || !failures(&daemon).is_empty()
        });
        assert!(failures(&daemon).len() <= 1, "{}", daemon.log());
        daemon.signal(Signal::SIGTERM);
        daemon.end();
        lab.server.nft(&["delete", "table", "inet", "knockq"]); // with the door, if there is one
        let mut daemon = Daemon::spawn(&lab, &[]);
        assert_eq!(daemon.end(), Some(78), "{}", daemon.log());
        recover(&lab);
        let daemon = lab.start();
        stays_spent(&lab, &[(family, spent), (family, last)]);
        daemon.stop();
        forget_floor(&lab);
    }
}

/// What the log says of a store that is not what was written.
fn failures(daemon: &Daemon) -> Vec<String> {
    let told = ["the counter store does not hold what was written to it: ", "the counters cannot be written"];
    daemon.log().lines().filter(|line| told.iter().any(|told| line.contains(told))).map(str::to_owned).collect()
}

/// A new store, for nobody wants to wait until `recover` lets knocks in.
fn forget_floor(lab: &Lab) {
    const FACTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("facts");
    let database = Database::open(store(lab)).unwrap();
    let transaction = database.begin_write().unwrap();
    transaction.open_table(FACTS).unwrap().insert("floor", &(unix_now() - 1).to_be_bytes()[..]).unwrap();
    transaction.commit().unwrap();
}

#[test]
fn a_store_that_is_deleted_while_it_is_in_use_is_told_at_the_next_knock_and_missed_at_the_next_start() {
    let lab = Lab::new();
    let daemon = lab.start();
    fs::remove_file(store(&lab)).unwrap();
    let spent = FAMILIES.map(|family| (family, spent_knock(&lab, family)));
    assert_eq!(count(&daemon, "the counter store was deleted"), 1, "{}", daemon.log());
    daemon.stop();
    let mut daemon = Daemon::spawn(&lab, &[]);
    assert_eq!(daemon.end(), Some(78));
    let log = daemon.log();
    assert!(log.contains("counters.redb: the counter store is missing") && log.contains("knockq recover"), "{log}");
    recover(&lab);
    let daemon = lab.start();
    stays_spent(&lab, &spent);
    daemon.stop();
}

#[test]
fn a_store_of_a_newer_version_is_refused_by_its_number_and_one_without_is_the_first() {
    const FACTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("facts");
    let lab = Lab::new();
    let version = |version: Option<u32>| {
        let database = Database::open(store(&lab)).unwrap();
        let transaction = database.begin_write().unwrap();
        {
            let mut facts = transaction.open_table(FACTS).unwrap();
            match version {
                Some(version) => drop(facts.insert("version", &version.to_be_bytes()[..]).unwrap()),
                None => drop(facts.remove("version").unwrap().unwrap()),
            }
        }
        transaction.commit().unwrap();
    };
    {
        let database = Database::open(store(&lab)).unwrap();
        let facts = database.begin_read().unwrap().open_table(FACTS).unwrap();
        assert_eq!(facts.get("version").unwrap().unwrap().value(), 1_u32.to_be_bytes());
    }
    version(Some(2));
    let mut daemon = Daemon::spawn(&lab, &[]);
    assert_eq!(daemon.end(), Some(78));
    let log = daemon.log();
    assert!(log.contains("counters.redb: is of version 2, and this knockq knows none above 1"), "{log}");
    assert!(log.contains("install the knockq that made it"), "{log}");
    let refused = lab.knockq(&lab.server, &["recover", "--config", lab.config().to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(78), "{}", String::from_utf8_lossy(&refused.stderr));
    version(None);
    let daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    daemon.stop();
}

#[test]
fn a_user_who_is_removed_while_the_disk_is_full_is_gone() {
    let lab = Lab::with("open_for = \"1h\"");
    let disk = SmallDisk::with_the_store_of(&lab);
    let daemon = lab.start();
    let config = lab.config().display().to_string();
    lab.knock(Family::V6, &[]);
    lab.wait_for_door(Family::V6.alice(), 22);
    disk.fill(&lab);
    eventually("a full disk", || {
        lab.knock(Family::V4, &[]);
        count(&daemon, "the counters cannot be written") == 1
    });
    lab.control(&["user", "remove", "alice", "--config", &config]);
    disk.make_room();
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.stays_shut(family);
    }
    daemon.stop();
}
