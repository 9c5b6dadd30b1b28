//! `knockq watch`: what happens, for root and the daemon's group, who hold nothing up.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use knockq::crypto::{Binding, KnockPorts};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::net::{RecvFlags, recv};
use serde_json::Value;

use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually, knockq};
use crate::recorded::persona;
use crate::status::{greedy_observers, hang_up, unhex};
use crate::{flow, raw_socket, send_raw, unix_now};

/// `knockq watch`, until this is dropped.
struct Watch {
    child: Child,
    output: PathBuf,
}

impl Watch {
    /// Watches, so that nothing that happens from here on is missed.
    fn start(lab: &Lab, daemon: &Daemon, arguments: &[&str]) -> Self {
        let output = lab.directory.path.join(format!("watch{}", arguments.len()));
        let stdout = File::create(&output).unwrap();
        let child = lab.server.enter(|| {
            let mut command = Command::new(knockq());
            command.arg("watch").args(arguments).arg("--runtime").arg(lab.runtime());
            command.stdin(Stdio::null()).stdout(stdout).spawn().unwrap()
        });
        let watch = Self { child, output };
        // A reload asks all three, and each hears of a watcher before it hears of a later reload.
        eventually("a reload that is told", || {
            daemon.signal(Signal::SIGHUP);
            watch.said().contains("reloaded")
        });
        watch
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.output).unwrap()
    }

    #[track_caller]
    fn says(&self, words: &[&str]) {
        let is_so = || self.said().lines().any(|line| words.iter().all(|word| line.contains(word)));
        eventually(&format!("{words:?}"), is_so);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

/// As `head -1` is one.
#[test]
fn a_reader_that_has_seen_enough_ends_what_shows_something_and_that_is_no_failure() {
    let lab = Lab::with("open_for = \"1h\"");
    let daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    let config = lab.config().display().to_string();
    eventually("a stranger's SYN", || {
        lab.mallory.reaches(Family::V4.server(), 20_000);
        !lab.control(&["explain", "--config", &config]).is_empty()
    });
    let start = |arguments: &[&str]| {
        lab.server.enter(|| {
            let mut command = Command::new(knockq());
            let (_gone, stdout) = std::io::pipe().unwrap();
            command.args(arguments).stdin(Stdio::null()).stdout(stdout).stderr(Stdio::piped()).spawn().unwrap()
        })
    };
    let ends_well = |child: Child| {
        let ended = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success() && said.is_empty(), "{:?}: {said}", ended.status);
    };
    for format in [&[][..], &["--json"]] {
        let mut watch = start(&[&["watch", "--config", &config], format].concat());
        eventually("the end of watch", || {
            daemon.signal(Signal::SIGHUP);
            watch.try_wait().unwrap().is_some()
        });
        ends_well(watch);
        for command in [&["status", "--config", &config][..], &["explain", "--config", &config], &["grants"]] {
            ends_well(start(&[command, format].concat()));
        }
    }
    daemon.stop();
}

/// What waits for a watcher; at the daemon's end, that it ended.
fn waiting(watcher: &OwnedFd) -> Vec<Value> {
    let mut bytes = [0; 4096];
    let mut events = Vec::new();
    while let Ok((length @ 1.., _)) = recv(watcher, &mut bytes, RecvFlags::DONTWAIT) {
        events.push(serde_json::from_slice(&bytes[..length]).unwrap());
    }
    events
}

#[test]
fn a_watcher_sees_grants_refusals_revocations_and_reloads_as_they_happen() {
    let lab = Lab::with("open_for = \"1h\"");
    let daemon = lab.start();
    let json = Watch::start(&lab, &daemon, &["--json"]);
    let mut text = Watch::start(&lab, &daemon, &[]);
    for family in FAMILIES {
        let source = family.alice().to_string();
        let knock = unhex(&lab.print_knock(family, &[]));
        let send = || lab.alice.enter(|| send_raw(&raw_socket(family), family, &knock));
        send();
        json.says(&[
            "\"message\":\"granted\",\"user\":\"alice\",\"service\":\"ssh\"",
            &format!("\"source\":\"{source}\""),
        ]);
        text.says(&["Z engine: granted user=alice service=ssh", &format!("source={source} port=tcp/22 seconds=3600")]);
        send();
        json.says(&[
            "\"process\":\"engine\",\"level\":\"warning\",\"message\":\"refused\",\"reason\":\"replayed\"",
            &source,
        ]);
        text.says(&[
            "Z engine: warning: refused reason=replayed user=alice",
            &source,
            "hint=\"this knock was spent before\"",
        ]);
        lab.revoke(&[&source]);
        json.says(&["\"message\":\"revoked\"", &source]);
    }
    for line in json.said().lines() {
        let event: Value = serde_json::from_str(line).unwrap();
        assert!(event["time"].as_u64().unwrap().abs_diff(unix_now()) < 600, "{line}");
    }
    fs::write(lab.config(), "nonsense").unwrap();
    daemon.signal(Signal::SIGHUP);
    text.says(&["engine: error: not reloaded: the configuration is refused"]);
    daemon.stop();
    eventually("its end", || text.child.try_wait().unwrap().is_some_and(|status| status.code() == Some(1)));
}

#[test]
fn a_watcher_is_told_that_a_door_has_closed_also_where_the_log_is_not() {
    let lab = Lab::with("open_for = \"1s\"");
    let daemon = lab.start();
    let watch = Watch::start(&lab, &daemon, &["--json"]);
    for family in FAMILIES {
        lab.knock(family, &[]);
        watch.says(&["\"level\":\"debug\",\"message\":\"closed\"", &family.alice().to_string()]);
    }
    assert!(!daemon.log().contains("closed"), "{}", daemon.log());
    daemon.stop();
}

#[test]
fn a_watcher_that_stops_reading_loses_events_is_told_how_many_and_holds_nobody_up() {
    const KNOCKS: u64 = 600;
    let lab = Lab::with("open_for = \"1h\"");
    lab.set("window = \"10m\"\ngrants_per_minute = 60000");
    let daemon = lab.start();
    let (deaf, other) = (lab.observer("watch.sock"), Watch::start(&lab, &daemon, &[]));
    let granted = || daemon.log().matches("granted").count() as u64;
    let (key, ports) = (lab.alice_key(), KnockPorts::new([20_000..=21_023]).unwrap());
    let family = Family::V4;
    let first = unix_now() - 300;
    let send = |n| {
        let token = key.seal(n, 22, Binding::Unbound);
        let flow = flow(family.alice(), family.server(), key.pad(n).knock_port(&ports));
        let packet = persona(true).syn(&flow, token.sequence, token.tsval).unwrap();
        lab.alice.enter(|| send_raw(&raw_socket(family), family, &packet));
    };
    for n in first..first + KNOCKS {
        send(n);
        let sent = n - first + 1;
        if sent.is_multiple_of(100) {
            eventually("these grants", || other.said().matches("granted").count() as u64 == sent); // who reads loses none
        }
    }
    eventually("all grants", || granted() == KNOCKS);

    let taken = waiting(&deaf).iter().filter(|event| event["message"] == "granted").count() as u64;
    assert!(taken < KNOCKS, "its socket holds them all: {taken}");
    send(first + KNOCKS);
    eventually("one more grant", || granted() == KNOCKS + 1);
    let mut events = Vec::new();
    eventually("what comes then", || {
        events.extend(waiting(&deaf).into_iter().filter(|event| event["message"] != "reloaded")); // late, from the start
        events.len() == 2
    });
    assert_eq!(events[0]["message"], "events were lost, for this watcher is too slow");
    assert_eq!(events[1]["message"], "granted");
    let lost = KNOCKS - taken; // and what else is told of, such as a reload
    assert!((lost..lost + 5).contains(&events[0]["count"].as_u64().unwrap()), "{events:?}, and {lost}");
    daemon.stop();
}

#[test]
fn watching_is_for_root_and_the_group_of_the_daemons_account_and_for_so_many() {
    let lab = Lab::new();
    lab.set("user = \"nobody\"");
    let daemon = lab.start();
    let runtime = lab.runtime().display().to_string();
    let metadata = fs::metadata(lab.runtime().join("watch.sock")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o777), (0, 65_534, 0o660));
    assert_eq!(lab.as_member(4242, &["watch", "--runtime", &runtime]).status.code(), Some(77));

    let [_, _, (_, engine)] = daemon.processes();
    let descriptors = || fs::read_dir(format!("/proc/{engine}/fd")).unwrap().count();
    let before = descriptors();
    let watchers: Vec<OwnedFd> = (0..16).map(|_| lab.observer("watch.sock")).collect();
    eventually("all of them", || descriptors() == before + 16);
    let turned_away = lab.as_member(65_534, &["watch", "--runtime", &runtime]);
    let said = String::from_utf8_lossy(&turned_away.stdout).into_owned();
    assert!(turned_away.status.code() == Some(1) && said.contains("error: too many watch already"), "{said}");
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    hang_up(watchers);
    let watcher = Watch::start(&lab, &daemon, &[]);
    eventually("forgetting those who went", || descriptors() == before + 1);
    drop(watcher);
    daemon.stop();
}

#[test]
fn what_a_watcher_says_reaches_nobody() {
    let lab = Lab::new();
    let daemon = lab.start();
    for socket in ["watch.sock", "status.sock"] {
        let client = lab.observer(socket);
        let say = || {
            rustix::net::send(&client, &[0xff; 64], rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT)
        };
        eventually("the end of what can be said", || say().is_err());
    }
    lab.knock(Family::V6, &[]);
    lab.wait_for_door(Family::V6.alice(), 22);
    daemon.stop();
}

#[test]
fn members_of_the_group_who_watch_keep_root_from_no_place() {
    let lab = Lab::new();
    lab.set("user = \"nobody\"");
    let daemon = lab.start();
    let runtime = lab.runtime().display().to_string();
    let members = greedy_observers(&lab, 1000..1003, 65_534, "watch.sock");
    let turned_away = lab.as_member(65_534, &["watch", "--runtime", &runtime]);
    let said = String::from_utf8_lossy(&turned_away.stdout).into_owned();
    assert!(turned_away.status.code() == Some(1) && said.contains("error: too many watch already"), "{said}");
    let watch = Watch::start(&lab, &daemon, &[]);
    for family in FAMILIES {
        lab.knock(family, &[]);
        watch.says(&["granted", &family.alice().to_string()]);
    }
    drop(members);
    daemon.stop();
}
