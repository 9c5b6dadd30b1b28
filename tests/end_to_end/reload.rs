//! A configuration that changes while the daemon runs.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use knockq::crypto::{Binding, KnockPorts, PrivateKey};
use nix::sys::signal::Signal;

use crate::control::hold_reader;
use crate::debugger::{OPEN, OPENAT, Traced};
use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually, refused, succeeds};
use crate::recorded::persona;
use crate::{UntilDropped, daemon_owned_the_table, flow, raw_socket, send_raw, unix_now};

impl Lab {
    pub(crate) fn edit(&self, file: &str, from: &str, to: &str) {
        let path = self.config().with_file_name(file);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{file} has no {from}");
        fs::write(path, text.replace(from, to)).unwrap();
    }
}

impl Lab {
    /// Replaces the trusted networks by one, which changes the table.
    pub(crate) fn trust(&self, network: &str) {
        let text = fs::read_to_string(self.config()).unwrap();
        let rest: Vec<&str> = text.lines().filter(|line| !line.starts_with("trusted")).collect();
        let trusted = format!("[server]\ntrusted = [\"{network}\"]");
        fs::write(self.config(), rest.join("\n").replace("[server]", &trusted)).unwrap();
    }
}

fn reload(daemon: &mut Daemon) {
    let before = daemon.log().matches("engine: reloaded").count();
    daemon.signal(Signal::SIGHUP);
    eventually("reloading", || daemon.log().matches("engine: reloaded").count() > before);
}

#[test]
fn users_and_services_come_change_and_go_without_a_restart() {
    let lab = Lab::with("open_for = \"1h\"");
    let mut daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &["ssh"]);
        lab.wait_for_door(family.alice(), 22);
    }
    let doors = || FAMILIES.map(|family| lab.door(family.alice(), 22).is_some());

    // A user more, who may knock when the command is done; alice's doors are untouched.
    lab.add_user("bob", &["mail"]);
    assert_eq!(doors(), [true; 2]);
    for family in FAMILIES {
        succeeds(&lab.knockq_as("bob", &lab.alice, &["send", "server", family.flag()]));
        lab.wait_for_door(family.alice(), 25);
    }

    // A service more, with a port that was open to all until now.
    assert!(lab.mallory.reaches(Family::V4.server(), 80));
    lab.edit(
        "knockq.toml",
        "[services.mail]",
        "[services.web]\nports = [\"tcp/80\"]\nopen_for = \"1h\"\n[services.mail]",
    );
    lab.edit("users.d/alice.toml", "[\"ssh\"]", "[\"ssh\", \"web\"]");
    reload(&mut daemon);
    assert_eq!(doors(), [true; 2]);
    for family in FAMILIES {
        assert!(!lab.mallory.reaches(family.server(), 80), "guarded now");
        assert!(lab.alice.reaches(family.server(), 22));
    }

    // A service less for one user ends what it opened, and nothing else.
    lab.edit("users.d/alice.toml", "[\"ssh\", \"web\"]", "[\"web\"]");
    reload(&mut daemon);
    assert_eq!(doors(), [false; 2]);
    assert!(daemon.log().contains("shut user=alice service=ssh"), "{}", daemon.log());

    // The service goes, and its port is open to all again.
    lab.edit("users.d/alice.toml", "[\"web\"]", "[\"ssh\"]");
    lab.edit("knockq.toml", "[services.web]\nports = [\"tcp/80\"]\nopen_for = \"1h\"\n", "");
    reload(&mut daemon);
    for family in FAMILIES {
        assert!(lab.mallory.reaches(family.server(), 80));
        lab.knock(family, &["ssh"]);
        lab.wait_for_door(family.alice(), 22);
    }

    // The user goes, and with her what she opened, before the command is done.
    let config = lab.config().display().to_string();
    lab.control(&["user", "remove", "alice", "--config", &config]);
    assert_eq!(doors(), [false; 2]);
    lab.knock(Family::V4, &["ssh"]);
    thread::sleep(Duration::from_millis(500));
    assert_eq!(doors(), [false; 2], "nobody's knock");
    assert!(daemon.log().contains("shut user=alice service=ssh"), "{}", daemon.log());
}

#[test]
fn a_broken_file_keeps_the_old_configuration_and_says_where() {
    let lab = Lab::new();
    let daemon = lab.start();
    lab.edit("knockq.toml", "open_for = \"6s\"", "open_for = 3");
    daemon.signal(Signal::SIGHUP);
    eventually("the refusal", || daemon.log().contains("not reloaded: "));
    let log = daemon.log();
    assert!(log.contains("knockq.toml:") && log.contains("open_for = 3") && log.contains("^"), "{log}");
    lab.edit("knockq.toml", "open_for = 3", "open_for = \"6s\"");
    lab.set("queue = 4098");
    daemon.signal(Signal::SIGHUP);
    eventually("the refusal", || daemon.log().contains("not reloaded: only a restart changes `queue`"));
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
}

#[test]
fn the_knock_ports_may_change_and_the_include_file_follows() {
    let lab = Lab::new();
    let mut daemon = lab.start();
    lab.edit("knockq.toml", "20000-21023", "30000-30255");
    reload(&mut daemon);
    let include_file = fs::read_to_string(lab.config().with_file_name("knockq.nft")).unwrap();
    assert!(include_file.contains("{ 30000-30255 }"), "{include_file}");
    for family in FAMILIES {
        assert!(refused(&lab.alice, family.server(), 20_000), "a closed port like any other");
        assert!(!lab.alice.reaches(family.server(), 30_000));
        assert!(!refused(&lab.alice, family.server(), 30_000));
        lab.knock(family, &[]);
        eventually("the hint", || {
            daemon.log().contains(&format!("reason=wrong_knock_port user=alice source={}", family.alice()))
                || lab.door(family.alice(), 22).is_none()
        });
        assert_eq!(lab.door(family.alice(), 22), None, "her profile has the old ones");
    }
    thread::sleep(Duration::from_secs(1));
    assert!(!daemon.log().contains("somebody else"), "its own change is none by others: {}", daemon.log());
    if daemon_owned_the_table(&lab) {
        let flushed = lab.server.sh("nft flush ruleset 2>&1 || true; nft list tables");
        assert!(flushed.contains("table inet knockq"), "owned again after the reload: {flushed}");
    }
}

/// Knock after knock, while the configuration is read again and again and the table changes each time; one at least at each
/// step, however quick the machine.
#[test]
fn no_knock_is_lost_while_the_configuration_is_read_again() {
    let lab = Lab::with("open_for = \"1h\"");
    lab.set("window = \"10m\"");
    let daemon = lab.start();
    let ports = KnockPorts::new([20_000..=21_023]).unwrap();
    let key = lab.alice_key();
    let mut next = unix_now() - 300;
    for family in FAMILIES {
        let persona = persona(family == Family::V4);
        let is_over = AtomicBool::new(false);
        let sent = AtomicUsize::new(0);
        thread::scope(|scope| {
            let next = &mut next;
            let (is_over, sent) = (&is_over, &sent);
            let until_dropped = UntilDropped(is_over);
            let (lab, key, ports) = (&lab, &key, &ports);
            scope.spawn(move || {
                lab.alice.enter(|| {
                    let socket = raw_socket(family);
                    while !is_over.load(Ordering::Relaxed) {
                        thread::sleep(Duration::from_millis(150));
                        if *next >= unix_now() + 50 {
                            continue; // the window's end: from here on one a second
                        }
                        *next = (*next + 1).max(unix_now() - 40);
                        let token = key.seal(*next, 22, Binding::Unbound);
                        let flow = flow(family.alice(), family.server(), key.pad(*next).knock_port(ports));
                        send_raw(&socket, family, &persona.syn(&flow, token.sequence, token.tsval).unwrap());
                        sent.fetch_add(1, Ordering::Relaxed);
                    }
                });
            });
            for network in 0..5 {
                lab.trust(&format!("192.0.2.{network}"));
                let before = daemon.log().matches("engine: reloaded").count();
                let root = Traced::attach(daemon.pid());
                daemon.signal(Signal::SIGHUP);
                // One reads the configuration, one has the kernel check the new table, one loads it.
                for _ in 0..3 {
                    let child = root.run_to_child();
                    let knocked = sent.load(Ordering::Relaxed);
                    eventually("a knock meanwhile", || sent.load(Ordering::Relaxed) > knocked);
                    child.release();
                }
                root.release();
                eventually("reloading", || daemon.log().matches("engine: reloaded").count() > before);
            }
            drop(until_dropped);
        });
        let sent = sent.into_inner();
        let grants = || daemon.log().matches(&format!("source={} ", family.alice())).count();
        eventually("a grant for each knock", || grants() == sent);
        assert!(lab.door(family.alice(), 22).is_some());
    }
    assert!(!daemon.log().contains("somebody else changed"), "{}", daemon.log());
}

#[test]
fn doors_that_outlived_the_daemon_are_known_to_the_next_one() {
    let lab = Lab::with("open_for = \"1h\"");
    let daemon = lab.start();
    lab.add_user("bob", &["mail"]);
    lab.edit(
        "knockq.toml",
        "[services.mail]\nports = [\"tcp/25\"]\nopen_for = \"6s\"",
        "[services.mail]\nports = [\"tcp/25\"]\nopen_for = \"1h\"",
    );
    daemon.stop();
    let daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
        succeeds(&lab.knockq_as("bob", &lab.alice, &["send", "server", family.flag()]));
        lab.wait_for_door(family.alice(), 25);
    }
    daemon.stop();
    fs::remove_file(lab.config().with_file_name("users.d/alice.toml")).unwrap();
    let _daemon = lab.start();
    let config = lab.config().display().to_string();
    for family in FAMILIES {
        assert_eq!(lab.door(family.alice(), 22), None, "she was removed meanwhile");
        assert!(lab.door(family.alice(), 25).is_some());
    }
    succeeds(&lab.knockq(&lab.server, &["revoke", "--user", "bob", "--config", &config]));
    for family in FAMILIES {
        assert_eq!(lab.door(family.alice(), 25), None);
    }
}

#[test]
fn no_end_of_the_child_that_reads_and_no_number_of_hangups_ends_the_daemon() {
    let lab = Lab::new();
    let daemon = lab.start();
    // Before it reads anything, and before it opens the next file and the next.
    for opened in 0..5 {
        let reader = hold_reader(&daemon);
        for _ in 0..opened {
            reader.run_to(&[OPEN, OPENAT]); // musl makes the former
        }
        reader.kill();
        let refusals = || daemon.log().matches("not reloaded: the configuration is refused").count();
        eventually("a refusal", || refusals() == opened + 1);
    }
    for _ in 0..500 {
        daemon.signal(Signal::SIGHUP);
    }
    let pipe = lab.config().with_file_name("users.d/pipe.toml");
    lab.server.sh(&format!("mkfifo {}", pipe.display()));
    daemon.signal(Signal::SIGHUP);
    eventually("its name", || daemon.log().contains("users.d/pipe.toml: is not a regular file"));
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    daemon.stop();
}

#[test]
fn the_gate_stands_after_reloads_during_which_others_flush_it() {
    let lab = Lab::new();
    let mut daemon = lab.start();
    for network in 0..5 {
        thread::scope(|scope| {
            // bounded: nft begins again whenever a flush comes before its end, so on a slow machine it might never end
            scope.spawn(|| {
                for _ in 0..20 {
                    lab.server.sh("nft flush ruleset 2>/dev/null || true");
                    thread::sleep(Duration::from_millis(3));
                }
            });
            lab.trust(&format!("192.0.2.{network}"));
            reload(&mut daemon);
        });
    }
    eventually("the gate", || lab.server.sh("nft list tables").contains("inet knockq"));
    for family in FAMILIES {
        eventually("the gate", || !lab.mallory.reaches(family.server(), 22));
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    daemon.stop();
}

/// The C library gives memory back to the kernel then, which begins with a file that it opens.
#[test]
fn hundreds_of_users_come_and_go_without_a_restart() {
    let lab = Lab::new();
    let mut daemon = lab.start();
    let before = daemon.processes();
    let path = |number: u32| lab.config().with_file_name(format!("users.d/user{number}.toml"));
    for _ in 0..2 {
        for number in 0..400 {
            let key = PrivateKey::generate().unwrap();
            fs::write(path(number), format!("public_key = \"{}\"\nservices = [\"ssh\"]\n", key.public())).unwrap();
        }
        reload(&mut daemon);
        (0..400).for_each(|number| fs::remove_file(path(number)).unwrap());
        reload(&mut daemon);
    }
    assert_eq!(daemon.processes(), before);
    lab.knock(Family::V4, &[]);
    lab.wait_for_door(Family::V4.alice(), 22);
    daemon.stop();
}
