//! The processes: how they start, what they may, how they end.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually, knockq};

#[test]
fn stopping_leaves_open_doors_to_their_timeouts_and_the_gate_shut() {
    let lab = Lab::with("open_for = \"30s\"");
    let daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    let log = daemon.stop();
    assert!(log.contains("stopped; doors that are open keep the time that they have left"), "{log}");
    for family in FAMILIES {
        assert!(lab.alice.reaches(family.server(), 22), "still open");
        assert!(!lab.mallory.reaches(family.server(), 22), "shut to others");
    }
    eventually("closing", || FAMILIES.iter().all(|family| !lab.alice.reaches(family.server(), 22)));
    lab.knock(Family::V4, &[]);
    lab.stays_shut(Family::V4);
    let log = lab.start().stop();
    assert!(!log.contains("somebody else"), "its own loading is no change by others: {log}");
}

#[test]
fn the_death_of_any_process_stops_all_with_one_line_and_opens_nothing() {
    let lab = Lab::new();
    for (role, line) in [
        ("gate", "gate was killed by signal 9; stopping all"),
        ("engine", "engine was killed by signal 9; stopping all"),
        ("root", "gate: error: root is gone; stopping all"),
    ] {
        let mut daemon = lab.start();
        let processes = daemon.processes();
        let (_, pid) = processes.into_iter().find(|(name, _)| *name == role).unwrap();
        kill(pid, Signal::SIGKILL).unwrap();
        let code = daemon.end();
        assert_eq!(code, if role == "root" { None } else { Some(1) }, "{}", daemon.log());
        eventually("the others' end", || processes.iter().all(|(_, pid)| kill(*pid, None).is_err()));
        let log = daemon.log();
        let after: Vec<&str> = log.lines().skip_while(|line| !line.contains("ready")).skip(1).collect();
        assert!(after.len() == 1 && after[0].contains(line), "{after:?}");
        for family in FAMILIES {
            lab.knock(family, &[]);
            lab.stays_shut(family);
        }
    }
}

#[test]
fn a_full_disk_opens_nothing_and_service_resumes_by_itself() {
    let lab = Lab::new();
    let state = lab.directory.path.join("state");
    let small = lab.directory.path.join("small");
    fs::create_dir(&small).unwrap();
    lab.server.sh(&format!("mount -t tmpfs -o size=2m,mode=700 none {}", small.display()));
    lab.make_store(&small.join("counters.redb"));
    let text = fs::read_to_string(lab.config()).unwrap();
    fs::write(lab.config(), text.replace(state.to_str().unwrap(), small.to_str().unwrap())).unwrap();
    let daemon = lab.start();
    let filler = small.join("filler");
    let failures = || daemon.log().matches("the counters cannot be written, so nothing is opened").count();
    let grants = || daemon.log().matches("engine: granted").count();
    for family in FAMILIES {
        lab.server.sh(&format!("dd if=/dev/zero of={} bs=4k 2>/dev/null || true", filler.display()));
        // The store has a few pages to spare, so the first knocks may still be written, and open what they should.
        let (failed, mut granted) = (failures(), grants());
        loop {
            lab.knock(family, &[]);
            eventually("an outcome", || failures() > failed || grants() > granted);
            if failures() > failed {
                break;
            }
            granted = grants();
            lab.wait_for_door(family.alice(), 22);
            eventually("closing", || lab.door(family.alice(), 22).is_none());
        }
        lab.stays_shut(family);
        fs::remove_file(&filler).unwrap();
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    drop(daemon);
    lab.server.sh(&format!("umount {}", small.display()));
}

#[test]
fn no_socket_of_any_network_family_is_bound() {
    let lab = Lab::new();
    let daemon = lab.start();
    for (role, pid) in daemon.processes() {
        let own: BTreeSet<String> = fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .filter_map(|entry| {
                fs::read_link(entry.unwrap().path())
                    .ok()?
                    .to_str()?
                    .strip_prefix("socket:[")?
                    .strip_suffix(']')
                    .map(str::to_owned)
            })
            .collect();
        for table in ["tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6", "icmp", "icmp6", "packet"] {
            let Ok(text) = fs::read_to_string(format!("/proc/{pid}/net/{table}")) else { continue };
            let bound = text.lines().skip(1).find(|line| line.split_whitespace().any(|field| own.contains(field)));
            assert_eq!(bound, None, "{role} has a socket in /proc/net/{table}");
        }
    }
    let listening = lab.server.sh("cat /proc/net/tcp /proc/net/tcp6 | awk '$4 == \"0A\"' | wc -l");
    assert_eq!(listening.trim(), "3", "only the three services of this test listen");
}

#[test]
fn the_service_manager_is_told_when_the_gate_stands() {
    let lab = Lab::new();
    let path = lab.directory.path.join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let daemon = Daemon::spawn(&lab, &[("NOTIFY_SOCKET", path.to_str().unwrap()), ("JOURNAL_STREAM", "8:1")]);
    let mut buffer = [0; 256];
    let length = socket.recv(&mut buffer).unwrap();
    let ready = "READY=1\nSTATUS=ready: users 1, services 2, knock ports 20000-21023\n";
    assert_eq!(std::str::from_utf8(&buffer[..length]).unwrap(), ready);
    assert!(!lab.alice.reaches(Family::V4.server(), 22), "the gate stands");
    let log = daemon.stop();
    assert!(log.lines().all(|line| line.starts_with('<')), "priorities for the journal: {log}");
}

#[test]
fn a_broken_configuration_starts_nothing_and_leaves_the_last_gate() {
    let lab = Lab::new();
    lab.start().stop();
    lab.set("no_such_key = 1");
    let mut daemon = Daemon::spawn(&lab, &[]);
    assert_eq!(daemon.end(), Some(78));
    assert!(daemon.log().contains("knockq.toml:4:1: unknown field `no_such_key`"), "{}", daemon.log());
    assert!(!lab.alice.reaches(Family::V4.server(), 22));
}

#[test]
fn a_store_of_another_server_is_refused() {
    let lab = Lab::new();
    let other = Lab::new();
    let store = |lab: &Lab| lab.directory.path.join("state/counters.redb");
    fs::copy(store(&other), store(&lab)).unwrap();
    let mut daemon = Daemon::spawn(&lab, &[]);
    assert_eq!(daemon.end(), Some(78));
    assert!(daemon.log().contains("counters.redb: belongs to the server key"), "{}", daemon.log());
    fs::write(store(&lab), "").unwrap();
    let mut daemon = Daemon::spawn(&lab, &[]);
    assert_eq!(daemon.end(), Some(78));
    assert!(daemon.log().contains("counters.redb: is not a counter store"), "{}", daemon.log());
    assert_eq!(lab.server.nft(&["list", "ruleset"]), "", "no table without a engine");
}

#[test]
fn a_log_and_a_service_manager_that_have_gone_end_nothing() {
    for (arguments, stays) in [(&[][..], true), (&["--try", "8s"], false)] {
        let lab = Lab::new();
        let notify = lab.directory.path.join("notify");
        let manager = UnixDatagram::bind(&notify).unwrap();
        let mut child = lab.server.enter(|| {
            let mut command = Command::new(knockq());
            command.args(["serve", "--config"]).arg(lab.config()).args(arguments).env("NOTIFY_SOCKET", &notify);
            command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
        });
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("knockq: ready") {
            line.clear();
            log.read_line(&mut line).unwrap();
        }
        drop((log, manager));
        fs::remove_file(&notify).unwrap();
        let root = Pid::from_raw(child.id().cast_signed());
        kill(root, Signal::SIGHUP).unwrap();
        lab.knock(Family::V4, &[]);
        if stays {
            lab.wait_for_door(Family::V4.alice(), 22);
            assert!(child.try_wait().unwrap().is_none());
            kill(root, Signal::SIGTERM).unwrap();
        }
        assert_eq!(child.wait().unwrap().code(), Some(i32::from(!stays)));
        assert_eq!(lab.alice.reaches(Family::V6.server(), 22), !stays, "a trial ends all the same");
    }
}
