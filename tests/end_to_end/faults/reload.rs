//! Reloads at the worst of times.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};
use std::{fs, thread};

use knockq::crypto::{Binding, KnockPorts};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::debugger::{FDATASYNC, PPOLL, Traced, other_thread};
use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually, succeeds};
use crate::recorded::persona;
use crate::{UntilDropped, daemon_owned_the_table, flow, raw_socket, send_raw, unix_now};

fn reloads(daemon: &Daemon) -> usize {
    daemon.log().matches("engine: reloaded").count()
}

/// Root's child in this role, if there is one now.
pub(super) fn child(root: Pid, role: &str) -> Option<Pid> {
    let children = fs::read_to_string(format!("/proc/{root}/task/{root}/children")).unwrap_or_default();
    let is_it = |pid: &&str| {
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline"));
        command.is_ok_and(|command| command.starts_with(&format!("knockq: {role}")))
    };
    children.split_whitespace().find(is_it).map(|pid| Pid::from_raw(pid.parse().unwrap()))
}

/// Alice's knocks, one after the other, and how many there were. While the lock is held, none is on its way.
struct Knocks<'a> {
    lab: &'a Lab,
    sent: AtomicUsize,
    sending: Mutex<()>,
    is_over: AtomicBool,
}

impl Knocks<'_> {
    fn send_until_over(&self, first: u64) -> u64 {
        let ports = KnockPorts::new([20_000..=21_023]).unwrap();
        let key = self.lab.alice_key();
        let mut next = first;
        let sockets = FAMILIES.map(raw_socket);
        for family in FAMILIES.into_iter().cycle().take_while(|_| !self.is_over.load(Ordering::Relaxed)) {
            thread::sleep(Duration::from_millis(150));
            if next >= unix_now() + 50 {
                continue; // the window's end: from here on one a second
            }
            let _sending = self.sending.lock().unwrap();
            next += 1;
            let token = key.seal(next, 22, Binding::Unbound);
            let flow = flow(family.alice(), family.server(), key.pad(next).knock_port(&ports));
            let syn = persona(family == Family::V4).syn(&flow, token.sequence, token.tsval).unwrap();
            send_raw(&sockets[usize::from(family == Family::V6)], family, &syn);
            self.sent.fetch_add(1, Ordering::Relaxed);
        }
        next
    }

    /// Waits until each knock so far has opened its door.
    #[track_caller]
    fn all_granted(&self, daemon: &Daemon) -> MutexGuard<'_, ()> {
        let none_on_its_way = self.sending.lock().unwrap();
        let grants = || daemon.log().matches("engine: granted").count();
        eventually("a grant for each knock", || grants() == self.sent.load(Ordering::Relaxed));
        none_on_its_way
    }
}

/// Some SYNs of a stranger to the knock ports, without end but with pauses.
fn flood(family: Family, is_over: &AtomicBool) {
    let socket = raw_socket(family);
    let persona = persona(family == Family::V4);
    for number in (0..).take_while(|_| !is_over.load(Ordering::Relaxed)) {
        let port = 20_000 + u16::try_from(number % 1024_u32).unwrap();
        let syn = persona.syn(&flow(family.mallory(), family.server(), port), number, number).unwrap();
        send_raw(&socket, family, &syn);
        if number % 8 == 0 {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn a_hundred_hangups_while_all_else_goes_wrong_too_lose_no_knock_and_no_grant() {
    let lab = Lab::with("open_for = \"1h\"");
    lab.set("window = \"10m\""); // a slow machine writes some counters seconds later
    lab.add_user("bob", &["ssh"]);
    let daemon = lab.start();
    let knocks =
        Knocks { lab: &lab, sent: AtomicUsize::new(0), sending: Mutex::new(()), is_over: AtomicBool::new(false) };
    let mut flushes = 0;
    let config = fs::read_to_string(lab.config()).unwrap();
    thread::scope(|scope| {
        let is_over = &knocks.is_over;
        let until_dropped = UntilDropped(is_over);
        scope.spawn(|| lab.alice.enter(|| knocks.send_until_over(unix_now() - 40)));
        for family in FAMILIES {
            let lab = &lab;
            scope.spawn(move || lab.mallory.enter(|| flood(family, is_over)));
        }
        for round in 0..100 {
            daemon.signal(Signal::SIGHUP);
            thread::sleep(Duration::from_millis(40));
            match round {
                // What is in the queue then goes with the table, so no knock is.
                20 | 60 => {
                    eventually("a knock of each family", || knocks.sent.load(Ordering::Relaxed) >= 2);
                    let _none_on_its_way = knocks.all_granted(&daemon);
                    lab.server.sh("nft flush ruleset");
                    flushes += 1;
                    let is_owned = daemon_owned_the_table(&lab);
                    eventually("the table", || {
                        is_owned || daemon.log().matches("it is loaded again").count() == flushes
                    });
                    FAMILIES.iter().for_each(|family| drop(lab.wait_for_door(family.alice(), 22)));
                }
                10 | 30 | 50 => {
                    let (_, process) = daemon.processes()[round / 20];
                    kill(process, Signal::SIGSTOP).unwrap();
                    thread::sleep(Duration::from_millis(200));
                    kill(process, Signal::SIGCONT).unwrap();
                }
                70 => fs::write(lab.config(), config.replace("[server]", "[server]\nno_such_key = 1")).unwrap(),
                90 => fs::write(lab.config(), &config).unwrap(),
                _ => {}
            }
        }
        eventually("enough knocks", || knocks.sent.load(Ordering::Relaxed) > 20);
        drop(knocks.all_granted(&daemon));
        drop(until_dropped);
    });
    let before = reloads(&daemon);
    daemon.signal(Signal::SIGHUP);
    eventually("one more reload", || reloads(&daemon) > before);
    let log = daemon.log();
    let told = log.matches("engine: reloaded").count() + log.matches("the configuration of before stays").count();
    assert!((2..=101).contains(&told), "{told} lines for 101 hangups");
    let is_expected = |line: &&str| {
        let known = [
            "granted",
            "gate: opened",
            "reloaded",
            "it is loaded again",
            "not reloaded",
            "unknown field",
            "no_such_key",
            "^",
        ];
        known.iter().any(|known| line.contains(known))
    };
    let more: Vec<&str> = log.lines().skip_while(|line| !line.contains("ready")).skip(1).collect();
    let more: Vec<&&str> = more.iter().filter(|line| !is_expected(line)).collect();
    assert!(more.len() <= 3, "{more:#?}");
    for family in FAMILIES {
        assert!(lab.alice.reaches(family.server(), 22) && !lab.mallory.reaches(family.server(), 22));
    }
    daemon.stop();
}

/// A disk that does not answer holds the thread that writes counters, so this holds it.
#[test]
fn a_reload_that_waits_for_the_disk_for_too_long_is_refused_and_done_when_the_disk_answers() {
    let lab = Lab::with("open_for = \"1h\"");
    let mut daemon = lab.start();
    let before = daemon.processes();
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    lab.add_user("bob", &["mail"]);
    let writer = Traced::attach(other_thread(before[2].1));
    succeeds(&lab.knockq_as("bob", &lab.alice, &["send", "server", "-4"]));
    let knocked = Instant::now();
    writer.run_to(&[FDATASYNC]);
    fs::remove_file(lab.config().with_file_name("users.d/alice.toml")).unwrap();
    let reloaded = reloads(&daemon);
    for told in 1..=2 {
        daemon.signal(Signal::SIGHUP);
        let start = Instant::now();
        let refused = || daemon.log().matches("not reloaded: the counters of its users cannot be read").count();
        while refused() < told {
            assert!(start.elapsed() < Duration::from_secs(120), "{}", daemon.log());
            thread::sleep(Duration::from_millis(200));
        }
        for family in FAMILIES {
            assert!(lab.alice.reaches(family.server(), 22), "the configuration of before stays in force");
        }
    }
    assert_eq!(reloads(&daemon), reloaded);
    thread::sleep(Duration::from_secs(62).saturating_sub(knocked.elapsed())); // the window is 60 s
    writer.release();
    daemon.wait_for("shut user=alice service=ssh");
    eventually("the reload", || reloads(&daemon) == reloaded + 1);
    assert!(daemon.log().contains("refused reason=not_durable user=bob"), "his knock had waited for too long");
    for family in FAMILIES {
        succeeds(&lab.knockq_as("bob", &lab.alice, &["send", "server", family.flag()]));
        lab.wait_for_door(family.alice(), 25);
    }
    assert_eq!(daemon.processes(), before, "{}", daemon.log());
    assert!(FAMILIES.iter().all(|family| lab.door(family.alice(), 22).is_none()));
    daemon.stop();
}

#[test]
fn a_hangup_that_comes_while_the_daemon_starts_is_done_when_it_is_ready() {
    let lab = Lab::new();
    let mut daemon = Daemon::spawn(&lab, &[]);
    let root = Traced::attach(daemon.pid());
    // It waits for each of its children in turn.
    for _ in 0..4 {
        root.run_to(&[PPOLL]);
        daemon.signal(Signal::SIGHUP);
    }
    assert!(!daemon.log().contains("ready"), "it was to be hung up on before: {}", daemon.log());
    root.release();
    daemon.wait_for("knockq: ready");
    daemon.wait_for("engine: reloaded");
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    let log = daemon.stop();
    assert!(log.matches("reloaded").count() <= 4, "{log}");
}

/// Its files are read, and nobody can tell it of a change yet: it is about to wait for the child that has read them.
pub(super) fn start_and_hold_after_reading(lab: &Lab) -> (Daemon, Traced) {
    let daemon = Daemon::spawn(lab, &[]);
    let root = Traced::attach(daemon.pid());
    root.run_to(&[PPOLL]);
    eventually("reading", || child(daemon.pid(), "configuration").is_none()); // it has ended, and waits to be buried
    (daemon, root)
}

#[test]
fn a_user_who_is_removed_while_the_daemon_starts_is_not_in_it() {
    let lab = Lab::with("open_for = \"1h\"");
    let (mut daemon, root) = start_and_hold_after_reading(&lab);
    let config = lab.config().display().to_string();
    thread::scope(|scope| {
        let remove = || lab.knockq(&lab.server, &["user", "remove", "alice", "--config", &config]);
        let removed = scope.spawn(remove); // it waits for the daemon that starts
        eventually("the removal", || !lab.config().with_file_name("users.d").join("alice.toml").exists());
        root.release();
        succeeds(&removed.join().unwrap());
    });
    daemon.wait_for("knockq: ready");
    daemon.wait_for("engine: reloaded users=0");
    let doors: Vec<IpAddr> = FAMILIES.map(Family::alice).to_vec();
    for family in FAMILIES {
        lab.knock(family, &["ssh"]);
    }
    thread::sleep(Duration::from_millis(500));
    assert!(doors.iter().all(|source| lab.door(*source, 22).is_none()));
    daemon.stop();
}
