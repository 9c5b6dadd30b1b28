//! Others flush, delete and edit tables, ours among them.

use std::fs;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use knockq::nft::{Boot, Comment};
use nix::sys::signal::{Signal, kill};

use crate::debugger::{SENDMSG, Traced};
use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually};
use crate::prober::{Probed, Prober};
use crate::{UntilDropped, daemon_owned_the_table, seconds_left};

/// What somebody with the privilege may do to the table, each in one transaction.
const FAULTS: [(&str, &str); 7] = [
    ("all tables", "flush ruleset"),
    ("the table", "delete table inet knockq"),
    ("a chain's rules", "flush chain inet knockq gate"),
    ("two chains", "flush chain inet knockq gate; delete chain inet knockq gate; flush chain inet knockq knock"),
    (
        "a set of doors",
        "flush chain inet knockq door; flush chain inet knockq lasts; \
         delete set inet knockq open4; delete set inet knockq open6",
    ),
    ("an element of the configuration", "delete element inet knockq guarded { tcp . 22 }"),
    ("a chain that lets all in", "add chain inet knockq door { }; insert rule inet knockq door accept"),
];

/// How often the daemon says that it has loaded the table again.
fn restorations(daemon: &Daemon) -> usize {
    daemon.log().matches("it is loaded again").count()
}

fn is_without_answer(probed: &Probed) {
    assert!(probed.sent > 100, "only {} SYNs were sent", probed.sent);
    assert_eq!(probed.answered.len(), 0, "of {} SYNs", probed.sent);
}

/// Where the kernel lets a table have an owner, nothing of this has any effect. Elsewhere the gate is open until the table
/// is loaded again, and `--nocapture` shows how long that took: in the emulator far longer than on a machine of its own.
#[test]
fn whatever_is_taken_from_the_table_an_owned_one_answers_no_stranger_and_another_is_whole_again() {
    let lab = Lab::with("open_for = \"1h\"");
    let daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    let is_owned = daemon_owned_the_table(&lab);
    let listing = || lab.server.sh("nft list table inet knockq 2>/dev/null || true");
    // What is made anew is listed last, so only each line counts.
    let rules = || {
        let listing = listing();
        let mut lines: Vec<_> = listing.lines().filter(|line| !line.contains("expires")).map(str::to_owned).collect();
        lines.sort_unstable();
        lines
    };
    let right = rules();
    let probers = FAMILIES.map(|family| Prober::start(&lab, family, Duration::ZERO));
    let mut windows = Vec::new();
    for (number, (what, edit)) in (1..).zip(FAULTS) {
        let start = Instant::now();
        lab.server.sh(&format!("nft '{edit}' 2>/dev/null || true"));
        if !is_owned {
            eventually(what, || restorations(&daemon) == number);
        }
        windows.push((what, start, Instant::now()));
        eventually(what, || rules() == right);
        for family in FAMILIES {
            assert!(seconds_left(&lab.wait_for_door(family.alice(), 22)) > 3000.0, "{what}: the time that was left");
        }
    }
    for (family, probed) in FAMILIES.into_iter().zip(probers.map(Prober::stop)) {
        if is_owned {
            is_without_answer(&probed);
        }
        // A prober notes the time, and may be held up before it sends.
        let early = |from: &Instant| *from - Duration::from_secs(2);
        let is_within = |sent: &&Instant| windows.iter().any(|(_, from, to)| (early(from)..*to).contains(sent));
        let others = probed.answered.iter().filter(|sent| !is_within(sent)).count();
        assert_eq!(others, 0, "answered although the table was there");
        for (what, from, to) in &windows {
            let window = probed.window(*from, *to);
            println!(
                "{family:?}: without {what}: {window:?} from the first SYN answered to the last, of {}",
                probed.sent
            );
        }
    }
    assert_eq!(restorations(&daemon), if is_owned { 0 } else { FAULTS.len() });
    assert!(FAMILIES.iter().all(|family| lab.alice.reaches(family.server(), 22)));
}

/// Nobody else is at the table here: then there is no such moment on older kernels either.
#[test]
fn no_stranger_is_answered_while_the_daemon_is_killed_started_and_reloaded() {
    let lab = Lab::with("open_for = \"1h\"");
    let mut daemon = lab.start();
    let probers = FAMILIES.map(|family| Prober::start(&lab, family, Duration::ZERO));
    for place in [0, 1, 2] {
        kill(daemon.processes()[place].1, Signal::SIGKILL).unwrap();
        daemon.end();
        daemon = lab.start();
    }
    for network in 1..=3 {
        lab.trust(&format!("192.0.2.{network}"));
        let before = daemon.log().matches("engine: reloaded").count();
        daemon.signal(Signal::SIGHUP);
        eventually("reloading", || daemon.log().matches("engine: reloaded").count() > before);
    }
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    probers.map(Prober::stop).iter().for_each(is_without_answer);
    assert_eq!(restorations(&daemon), 0, "its own changes are none by others");
}

#[test]
fn a_door_that_is_deleted_by_hand_is_revoked_and_no_restoration_opens_it_again() {
    let lab = Lab::with("open_for = \"1h\"");
    let daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    let delete = |family: Family| {
        let set = if family == Family::V4 { "open4" } else { "open6" };
        lab.server
            .sh(&format!("nft delete element inet knockq {set} '{{ {} . tcp . 22 }}' 2>&1 || true", family.alice()))
    };
    if daemon_owned_the_table(&lab) {
        for family in FAMILIES {
            assert!(delete(family).contains("Operation not permitted"));
            assert!(lab.alice.reaches(family.server(), 22), "it is for `knockq revoke`");
        }
        return;
    }
    assert_eq!(delete(Family::V4), "");
    let line = format!("shut by somebody else user=alice service=ssh source={} port=tcp/22", Family::V4.alice());
    eventually("the line", || daemon.log().contains(&line));
    lab.server.sh("nft flush ruleset");
    eventually("the restoration", || restorations(&daemon) == 1);
    lab.wait_for_door(Family::V6.alice(), 22);
    assert_eq!(lab.door(Family::V4.alice(), 22), None, "it was taken back");
    assert!(lab.alice.reaches(Family::V6.server(), 22) && !lab.alice.reaches(Family::V4.server(), 22));
    assert_eq!(delete(Family::V6), "");
    lab.knock(Family::V4, &[]);
    lab.wait_for_door(Family::V4.alice(), 22);
    assert_eq!(daemon.log().matches("shut by somebody else").count(), 2, "a knock opens it again: {}", daemon.log());
}

/// As a firewall's front end does it: away and back, in one file or in several steps.
#[test]
fn tables_of_others_come_and_go_and_ours_is_not_touched() {
    let lab = Lab::with("open_for = \"1h\"");
    let daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    let before = lab.server.sh("nft -a list table inet knockq | sed 's/ expires [^ ]*//'");
    let rules = lab.directory.path.join("others.nft");
    let ours = "{ type filter hook input priority filter; ct state established accept; tcp dport 8080 drop; }";
    let tables = ["ip filter", "ip6 filter", "inet firewall", "inet knockq_of_others"];
    let text = tables.map(|table| {
        format!(
            "add table {table}\nflush table {table}\ndelete table {table}\ntable {table} {{ chain input {ours}; }}\n"
        )
    });
    fs::write(&rules, text.concat()).unwrap();
    let probers = FAMILIES.map(|family| Prober::start(&lab, family, Duration::ZERO));
    for _ in 0..8 {
        lab.server.nft(&["-f", rules.to_str().unwrap()]);
        lab.server.nft(&["flush table ip filter; delete table inet firewall; delete table inet knockq_of_others"]);
    }
    probers.map(Prober::stop).iter().for_each(is_without_answer);
    assert_eq!(lab.server.sh("nft -a list table inet knockq | sed 's/ expires [^ ]*//'"), before);
    assert_eq!(restorations(&daemon), 0);
    assert!(FAMILIES.iter().all(|family| lab.alice.reaches(family.server(), 22)));
}

#[test]
fn the_service_manager_shows_what_is_wrong_with_an_external_table_until_it_is_right() {
    let lab = Lab::with("open_for = \"1h\"");
    lab.set("ruleset = \"external\"");
    lab.load_include_file();
    let path = lab.directory.path.join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let daemon = Daemon::spawn(&lab, &[("NOTIFY_SOCKET", path.to_str().unwrap())]);
    let told = || {
        let mut buffer = [0; 512];
        let length = loop {
            match socket.recv(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                received => break received.unwrap(),
            }
        };
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    };
    let ready = "STATUS=ready: users 1, services 2, knock ports 20000-21023\n";
    assert_eq!(told(), format!("READY=1\n{ready}"));
    for edit in ["delete table inet knockq", "insert rule inet knockq gate accept", "delete table inet knockq"] {
        lab.server.nft(&[edit]);
        assert_eq!(
            told(),
            "STATUS=table inet knockq is not what it should be, so guarded ports may be open: see the log\n"
        );
        lab.server.sh("nft delete table inet knockq 2>/dev/null || true");
        lab.load_include_file();
        assert_eq!(told(), ready);
    }
    let log = daemon.stop();
    let errors: Vec<&str> = log.lines().filter(|line| line.contains("error")).collect();
    assert_eq!(errors.len(), 3, "one for each: {log}");
    assert!(errors.iter().all(|line| line.contains("guarded ports may be open") && line.contains("hint=\"nft -f ")));
    assert_eq!(log.matches("is as it should be again").count(), 3, "{log}");
}

/// Root, which would load the table again, stands still meanwhile.
#[test]
fn a_knock_that_is_decided_while_the_table_is_gone_opens_when_it_is_back() {
    let lab = Lab::with("open_for = \"10m\"\nonce = true");
    let daemon = lab.start();
    if daemon_owned_the_table(&lab) {
        let deleted = lab.server.sh("nft delete table inet knockq 2>&1 || true");
        assert!(deleted.contains("Operation not permitted"), "then none is: {deleted}");
        return;
    }
    lab.knock(Family::V4, &[]);
    lab.wait_for_door(Family::V4.alice(), 22);
    daemon.signal(Signal::SIGSTOP);
    lab.server.nft(&["delete", "table", "inet", "knockq"]);
    // What brings knocks to the queue, and nothing else of it.
    lab.server.nft(&["add", "table", "inet", "knockq"]);
    lab.server.nft(&["add", "chain", "inet", "knockq", "knock", "{ type filter hook prerouting priority raw; }"]);
    lab.server.nft(&["add", "rule", "inet", "knockq", "knock", "tcp", "dport", "20000-21023", "queue", "num", "4097"]);
    lab.knock(Family::V6, &[]);
    eventually("a grant", || {
        daemon.log().contains("granted, once the table is loaded user=alice service=ssh source=fd77")
    });
    daemon.signal(Signal::SIGCONT);
    lab.wait_for_door(Family::V6.alice(), 22);
    assert!(lab.alice.reaches(Family::V6.server(), 22) && !lab.mallory.reaches(Family::V6.server(), 22));
    assert_eq!(lab.door(Family::V4.alice(), 22), None, "one connection may have been made through it");
    assert!(!daemon.log().contains("not granted"), "{}", daemon.log());
    daemon.stop();
}

/// Both are there when root goes on, and it hears its end first.
#[test]
fn a_daemon_that_is_stopped_just_after_a_flush_leaves_the_gate_shut() {
    let lab = Lab::new();
    let mut daemon = lab.start();
    daemon.signal(Signal::SIGSTOP);
    lab.server.sh("nft flush ruleset 2>/dev/null || true");
    thread::sleep(Duration::from_millis(300));
    daemon.signal(Signal::SIGTERM);
    daemon.signal(Signal::SIGCONT);
    assert_eq!(daemon.end(), Some(0), "{}", daemon.log());
    assert!(FAMILIES.iter().all(|family| !lab.mallory.reaches(family.server(), 22)), "{}", daemon.log());
}

/// Whoever flushes without end is worse than one who flushes once: the log must not be his.
#[test]
fn a_table_that_is_flushed_without_end_is_back_when_that_ends() {
    let lab = Lab::with("open_for = \"1h\"");
    let daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    let is_over = AtomicBool::new(false);
    let flushes = thread::scope(|scope| {
        let until_dropped = UntilDropped(&is_over);
        let flushing = scope.spawn(|| {
            let mut flushes = 0;
            while flushes < 4 || !is_over.load(Ordering::Relaxed) {
                lab.server.sh("nft flush ruleset 2>/dev/null || true");
                flushes += 1;
            }
            flushes
        });
        thread::sleep(Duration::from_secs(3));
        drop(until_dropped);
        flushing.join().unwrap()
    });
    eventually("the table", || lab.server.sh("nft list tables").contains("table inet knockq"));
    for family in FAMILIES {
        let element = lab.wait_for_door(family.alice(), 22);
        assert!(seconds_left(&element) > 3000.0, "{element}");
        eventually("the gate", || !lab.mallory.reaches(family.server(), 22));
        assert!(lab.alice.reaches(family.server(), 22));
    }
    assert!(restorations(&daemon) <= flushes, "{} lines for {flushes} flushes", restorations(&daemon));
}

/// The instant between root's loading and the gate's owning of it, or the engine's look at what was changed meanwhile.
#[test]
fn a_rule_that_somebody_adds_just_after_a_load_is_undone_as_well() {
    const LETS_ALL_IN: &str = "insert rule inet knockq gate accept";
    let lab = Lab::with("open_for = \"1h\"");
    let daemon = lab.start();
    let is_owned = daemon_owned_the_table(&lab);
    let [_, (_, gate), (_, engine)] = daemon.processes();
    let is_shut_again = |times| {
        eventually("another load", || restorations(&daemon) == times);
        for family in FAMILIES {
            eventually("the gate", || !lab.mallory.reaches(family.server(), 22));
        }
    };

    let held = Traced::attach(gate);
    lab.trust("192.0.2.1");
    daemon.signal(Signal::SIGHUP);
    let is_loaded = || lab.server.sh("nft list set inet knockq trusted4").contains("192.0.2.1");
    // It has the limits, has enforced them, has let go of the table; and may have answered the engine in between.
    let soon = || {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(10) && !is_loaded() {}
        is_loaded()
    };
    while !soon() {
        held.run_to(&[SENDMSG]);
        held.finish();
    }
    lab.server.nft(&[LETS_ALL_IN]);
    held.release();
    is_shut_again(1);
    if is_owned {
        return;
    }

    let held = Traced::attach(engine);
    lab.server.nft(&["flush chain inet knockq gate"]);
    held.run_to(&[SENDMSG]); // that it is lost
    held.finish();
    eventually("the load", || lab.server.nft(&["list", "chain", "inet", "knockq", "gate"]).contains("@guarded"));
    lab.server.nft(&[LETS_ALL_IN]);
    held.release();
    is_shut_again(3);
}

/// Has so many doors opened for an hour by a daemon of before, as it were; tells when the last of them was.
fn open_thousands(lab: &Lab, doors: u32) -> Instant {
    lab.start().stop();
    // Adding them takes a while, and they must not outlast their grants.
    let end = Boot::this().unwrap().end(Instant::now() + Duration::from_mins(70));
    let [user, service] = ["alice", "ssh"].map(|name| name.parse().unwrap());
    let comment = Comment { user, service, end: Some(end), bound: false };
    let door = |number: u32| {
        let [_, high, low, last] = number.to_be_bytes();
        format!("10.{high}.{low}.{last} . tcp . 22 timeout 1h comment \"{comment}\"")
    };
    let doors: Vec<String> = (0..doors).map(door).collect();
    let file = lab.directory.path.join("doors.nft");
    fs::write(&file, format!("add element inet knockq open4 {{ {} }}\n", doors.join(", "))).unwrap();
    lab.server.nft(&["-f", file.to_str().unwrap()]);
    Instant::now()
}

/// The kernel tells of each door that the daemon itself shuts.
#[test]
fn thousands_of_doors_that_are_shut_at_once_are_no_change_by_others() {
    const DOORS: u32 = 12_000;
    let lab = Lab::with("open_for = \"1h\"");
    open_thousands(&lab, DOORS);
    let daemon = lab.start();
    lab.revoke(&["--all"]);
    assert_eq!(daemon.log().matches("engine: revoked user=alice").count(), usize::try_from(DOORS).unwrap());
    for times in 1..=2 {
        daemon.signal(Signal::SIGHUP);
        eventually("a reload", || daemon.log().matches("engine: reloaded").count() == times);
    }
    assert_eq!(restorations(&daemon), 0, "its own changes are none by others");
}

#[test]
fn thousands_of_doors_that_are_put_back_have_the_time_that_they_had_left() {
    const DOORS: u32 = 10_000;
    let lab = Lab::with("open_for = \"1h\"");
    let opened = open_thousands(&lab, DOORS);
    let daemon = lab.start();
    if daemon_owned_the_table(&lab) {
        return;
    }
    thread::sleep(Duration::from_secs(2)); // so that doors that began anew would have more left than the second granted below
    lab.server.sh("nft flush ruleset");
    let doors = || lab.server.sh("nft list set inet knockq open4 2>/dev/null || true");
    eventually("all doors", || doors().matches("expires").count() == usize::try_from(DOORS).unwrap());
    // What the gate and the kernel wait for a processor between them is not counted.
    let most = 3600.0 - opened.elapsed().as_secs_f64() + 1.0;
    let doors = doors();
    let left = doors.split(',').filter(|door| door.contains("expires")).map(seconds_left);
    let longest = left.fold(0.0, f64::max);
    assert!(longest <= most, "{longest} s of {most} s");
    assert_eq!(restorations(&daemon), 1);
}

#[test]
fn an_edit_while_many_doors_are_put_back_costs_none_of_them() {
    const DOORS: u32 = 1_000;
    let lab = Lab::with("open_for = \"1h\"");
    open_thousands(&lab, DOORS);
    let daemon = lab.start();
    if daemon_owned_the_table(&lab) {
        return;
    }
    lab.server.sh("nft flush ruleset");
    eventually("the first door", || lab.server.sh("nft list ruleset").contains("expires"));
    lab.server.nft(&["flush chain inet knockq gate"]);
    eventually("another load", || restorations(&daemon) >= 2);
    let doors = || lab.server.nft(&["list set inet knockq open4"]).matches("expires").count();
    eventually("all doors", || doors() == usize::try_from(DOORS).unwrap());
}
