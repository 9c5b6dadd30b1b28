//! `knockq status`: what the daemon tells root and its group, and nobody else.

use std::fs;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::thread;

use rustix::net::{AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, shutdown, socket_with};
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_res_gid, set_thread_res_uid};
use serde_json::Value;

use crate::lab::{FAMILIES, Family, Host, Lab, eventually, knockq, succeeds};
use crate::recorded::persona;
use crate::{flow, raw_socket, send_raw};

/// The group of `nobody`, an account that every machine has.
const NOGROUP: u32 = 65_534;

impl Lab {
    pub(crate) fn runtime(&self) -> PathBuf {
        self.directory.path.join("run")
    }

    /// `knockq status --json`.
    pub(crate) fn status(&self) -> Value {
        let runtime = self.runtime().display().to_string();
        serde_json::from_str(&self.control(&["status", "--json", "--runtime", &runtime])).unwrap()
    }

    /// A command of somebody who is not root and in this group alone.
    pub(crate) fn as_member(&self, group: u32, arguments: &[&str]) -> Output {
        self.server.enter(|| Command::new(knockq()).args(arguments).uid(1234).gid(group).env_clear().output().unwrap())
    }

    /// Connected to one of the daemon's sockets.
    pub(crate) fn observer(&self, socket: &str) -> OwnedFd {
        let kind = if socket == "watch.sock" { SocketType::SEQPACKET } else { SocketType::STREAM };
        let client = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        connect(&client, &SocketAddrUnix::new(self.runtime().join(socket)).unwrap()).unwrap();
        client
    }
}

/// As many connections of each of these users, who are of this group, as nobody may have.
pub(crate) fn greedy_observers(lab: &Lab, users: std::ops::Range<u32>, group: u32, socket: &str) -> Vec<OwnedFd> {
    let connect_as = |user| {
        // Of this thread alone, which ends.
        let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
        set_thread_res_gid(group, group, group).unwrap();
        set_thread_res_uid(user, user, user).unwrap();
        (0..7).map(|_| lab.observer(socket)).collect::<Vec<_>>()
    };
    users.flat_map(|user| thread::scope(|scope| scope.spawn(|| connect_as(user)).join().unwrap())).collect()
}

/// Ends connections. Closing them would not always: children of other tests have copies until their programs begin.
pub(crate) fn hang_up(observers: Vec<OwnedFd>) {
    observers.iter().for_each(|observer| shutdown(observer, Shutdown::Both).unwrap());
}

/// How many packets ended so.
pub(crate) fn count(status: &Value, reason: &str) -> u64 {
    status["packets"][reason].as_u64().unwrap()
}

/// A stranger's SYN to a knock port.
pub(crate) fn stranger(host: &Host, source: IpAddr, family: Family, sequence: u32) {
    let packet = persona(family == Family::V4).syn(&flow(source, family.server(), 20_007), sequence, 1).unwrap();
    host.enter(|| send_raw(&raw_socket(family), family, &packet));
}

pub(crate) fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

#[test]
fn status_tells_what_came_what_became_of_it_and_who_knocked_last() {
    let lab = Lab::with("open_for = \"1h\"");
    let daemon = lab.start();
    let status = lab.status();
    assert_eq!((&status["users"], &status["services"]), (&1.into(), &2.into()));
    assert_eq!((&status["table"]["right"], &status["table"]["mode"]), (&true.into(), &"managed".into()));
    assert_eq!((&status["syns"]["seen"], &status["syns"]["queue"]), (&0.into(), &4097.into()));
    assert_eq!((&status["store"]["ok"], &status["store"]["written"]), (&true.into(), &Value::Null));
    assert_eq!((status["knocks"].as_array().unwrap().len(), count(&status, "granted")), (0, 0));

    for (round, family) in (1_u64..).zip(FAMILIES) {
        let counts = |reasons: [&str; 3]| {
            let status = lab.status();
            reasons.map(|reason| count(&status, reason))
        };
        stranger(&lab.mallory, family.mallory(), family, 1);
        let knock = unhex(&lab.print_knock(family, &[]));
        for (times, replays) in [(1, round - 1), (2, round)] {
            lab.alice.enter(|| send_raw(&raw_socket(family), family, &knock));
            let reasons = ["unknown", "granted", "replayed"];
            eventually(&format!("{times}"), || counts(reasons) == [round, round, replays]);
        }
        let status = lab.status();
        let syns = &status["syns"];
        assert_eq!(
            (&syns["seen"], &syns["waiting"], &syns["dropped_by_relay"]),
            (&(3 * round).into(), &0.into(), &0.into())
        );
        assert_eq!((&syns["dropped_by_kernel"], &status["doors"]["opened"]), (&0.into(), &round.into()));
        let doors = status["doors"]["open"].as_array().unwrap();
        assert_eq!(doors.len() as u64, round);
        let door = doors.iter().find(|door| door["source"] == family.alice().to_string()).unwrap();
        assert_eq!(
            (&door["user"], &door["service"], &door["port"]),
            (&"alice".into(), &"ssh".into(), &"tcp/22".into())
        );
        let knocks = &status["knocks"][0];
        assert_eq!((&knocks["user"], &knocks["refused"]["reason"]), (&"alice".into(), &"replayed".into()));
        for last in ["granted", "refused"] {
            assert_eq!(knocks[last]["source"], family.alice().to_string());
        }
        assert!(status["store"]["written"].as_u64().is_some());
    }

    let runtime = lab.runtime().display().to_string();
    let text = lab.control(&["status", "--runtime", &runtime]);
    for line in [
        "up     ",
        "table  loaded; ",
        "SYNs   6 seen, ",
        "doors  2 open; 2 opened",
        "store  last written ",
        "clock  ",
        "alice ",
    ] {
        assert!(text.lines().any(|shown| shown.starts_with(line)), "{line}: {text}");
    }
    let metrics = lab.control(&["status", "--prometheus", "--runtime", &runtime]);
    for line in ["knockq_up 1", "knockq_table_ok 1", "knockq_doors 2", "knockq_packets_total{reason=\"replayed\"} 2"] {
        assert!(metrics.lines().any(|shown| shown == line), "{line}: {metrics}");
    }
    daemon.stop();
    let gone = lab.knockq(&lab.server, &["status", "--prometheus", "--runtime", &runtime]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&gone.stdout).contains("\nknockq_up 0\n"));
    let said = String::from_utf8_lossy(&gone.stderr).into_owned();
    assert!(said.contains("status.sock: the daemon is not running") && said.contains("Hint: "), "{said}");
}

#[test]
fn status_tells_of_reloads_of_users_who_went_and_of_a_table_that_is_not_right() {
    let lab = Lab::new();
    lab.set("ruleset = \"external\"");
    lab.load_include_file();
    let daemon = lab.start();
    lab.knock(Family::V4, &[]);
    eventually("the knock", || count(&lab.status(), "granted") == 1);
    let user = lab.config().with_file_name("users.d").join("alice.toml");
    let entry = fs::read_to_string(&user).unwrap();
    for (text, taken) in [("nonsense", false), (entry.as_str(), true)] {
        fs::write(&user, text).unwrap();
        daemon.signal(nix::sys::signal::Signal::SIGHUP);
        eventually("the reload", || lab.status()["reloaded"]["taken"] == taken);
        assert_eq!(lab.status()["knocks"].as_array().unwrap().len(), 1);
    }
    lab.server.nft(&["delete", "table", "inet", "knockq"]);
    eventually("the loss", || lab.status()["table"]["right"] == false);
    lab.load_include_file();
    eventually("the table", || lab.status()["table"]["right"] == true);
    fs::remove_file(&user).unwrap();
    daemon.signal(nix::sys::signal::Signal::SIGHUP);
    eventually("no user", || lab.status()["users"] == 0);
    assert!(lab.status()["knocks"].as_array().unwrap().is_empty());
    daemon.stop();
}

#[test]
fn status_is_for_root_and_the_group_of_the_daemons_account_who_can_do_nothing_else() {
    let lab = Lab::new();
    lab.set("user = \"nobody\"");
    let daemon = lab.start();
    let runtime = lab.runtime().display().to_string();
    let metadata = fs::metadata(lab.runtime().join("status.sock")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o777), (0, NOGROUP, 0o660));
    let told = succeeds(&lab.as_member(NOGROUP, &["status", "--json", "--runtime", &runtime]));
    assert_eq!(serde_json::from_str::<Value>(&told).unwrap()["users"], 1);
    let refused = lab.as_member(4242, &["status", "--runtime", &runtime]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(77) && said.contains("Hint: run this as root, or as a member"), "{said}");
    let config = lab.config().display().to_string();
    let refused = lab.as_member(NOGROUP, &["confirm", "--config", &config]);
    assert!(!refused.status.success(), "{}", String::from_utf8_lossy(&refused.stderr));
    daemon.stop();
    let gone = lab.knockq(&lab.server, &["status", "--runtime", &runtime]);
    assert!(String::from_utf8_lossy(&gone.stderr).contains("status.sock: the daemon is not running"));
}

/// Where the account is missing, another stands in for it, whose group is not the daemon's.
#[test]
fn without_the_daemons_account_status_is_for_root_alone() {
    let lab = Lab::new();
    lab.set("user = \"nobody-here\"");
    let _daemon = lab.start();
    let metadata = fs::metadata(lab.runtime().join("status.sock")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (0, 0));
    assert_eq!(
        lab.as_member(NOGROUP, &["status", "--runtime", lab.runtime().to_str().unwrap()]).status.code(),
        Some(77)
    );
}

#[test]
fn who_asks_for_the_status_and_never_takes_it_holds_nothing_up() {
    let lab = Lab::new();
    let daemon = lab.start();
    let [_, _, (_, engine)] = daemon.processes();
    let descriptors = || fs::read_dir(format!("/proc/{engine}/fd")).unwrap().count();
    let before = descriptors();
    let clients: Vec<OwnedFd> = (0..40).map(|_| lab.observer("status.sock")).collect();
    lab.status();
    eventually("no descriptor for those who do not take it", || descriptors() <= before + 1);
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    lab.revoke(&["--all"]);
    drop(clients);
    lab.status();
    daemon.stop();
}

#[test]
fn members_of_the_group_who_take_no_status_keep_root_from_none() {
    let lab = Lab::new();
    lab.set("user = \"nobody\"");
    let daemon = lab.start();
    let runtime = lab.runtime().display().to_string();
    let ask = ["status", "--json", "--runtime", &runtime];
    let one = greedy_observers(&lab, 1000..1001, NOGROUP, "status.sock");
    succeeds(&lab.as_member(NOGROUP, &ask));
    let others = greedy_observers(&lab, 1001..1003, NOGROUP, "status.sock");
    succeeds(&lab.knockq(&lab.server, &ask));
    [one, others].into_iter().for_each(hang_up);
    succeeds(&lab.as_member(NOGROUP, &ask));
    daemon.stop();
}
