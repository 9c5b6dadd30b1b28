//! A network that comes late, changes or lacks a family, and files that are missing.

use std::fs::{self, File};

use super::reload::start_and_hold_after_reading;
use crate::lab::{Daemon, FAMILIES, Family, Lab, succeeds};

impl Lab {
    /// Alice's profile has this address of the server instead of that.
    fn readdress(&self, old: &str, new: &str) {
        let profile = self.home("alice").join(".config/knockq/hosts/server.toml");
        let text = fs::read_to_string(&profile).unwrap();
        assert!(text.contains(old), "{text}");
        fs::write(profile, text.replace(old, new)).unwrap();
    }

    /// One knock opens the door, to alice alone.
    #[track_caller]
    fn serves(&self, family: Family) {
        assert!(!self.alice.reaches(family.server(), 22));
        self.knock(family, &[]);
        self.wait_for_door(family.alice(), 22);
        assert!(self.alice.reaches(family.server(), 22) && !self.mallory.reaches(family.server(), 22));
    }

    /// What joins the server with alice, under this name.
    fn plug_in(&self, name: &str) {
        self.alice.join("eth0", &self.server, name);
        self.alice.address("eth0", "10.77.1.2/24", "fd77:1::2/64");
        self.server.address(name, "10.77.1.1/24", "fd77:1::1/64");
    }
}

#[test]
fn a_daemon_that_starts_before_the_network_serves_when_it_comes() {
    let lab = Lab::new();
    for interface in ["eth1", "eth2", "lo"] {
        lab.server.ip(&format!("addr flush dev {interface}"));
        lab.server.ip(&format!("link set {interface} down"));
    }
    let daemon = lab.start();
    lab.server.ip("link set lo up");
    for number in [1, 2] {
        lab.server.ip(&format!("link set eth{number} up"));
        lab.server.address(&format!("eth{number}"), &format!("10.77.{number}.1/24"), &format!("fd77:{number}::1/64"));
    }
    FAMILIES.iter().for_each(|family| lab.serves(*family));
    daemon.stop();
}

#[test]
fn an_interface_that_goes_comes_back_and_is_renamed_needs_no_restart() {
    let lab = Lab::new();
    let daemon = lab.start();
    lab.server.ip("link del eth1");
    lab.plug_in("eth1");
    lab.serves(Family::V4);
    lab.server.ip("link del eth1");
    lab.plug_in("wan0");
    lab.serves(Family::V6);
    lab.server.ip("link set wan0 down");
    lab.server.ip("link set wan0 name uplink");
    lab.server.ip("link set uplink up");
    lab.server.ip("addr replace fd77:1::1/64 dev uplink nodad"); // it went when the interface did
    lab.add_user("bob", &["mail"]);
    for family in FAMILIES {
        succeeds(&lab.knockq_as("bob", &lab.alice, &["send", "server", family.flag()]));
        lab.wait_for_door(family.alice(), 25);
    }
    daemon.stop();
}

#[test]
fn a_server_whose_addresses_change_needs_no_restart() {
    let lab = Lab::new();
    let daemon = lab.start();
    for family in FAMILIES {
        let (old, new) = match family {
            Family::V4 => ("10.77.1.1", "10.77.1.77"),
            Family::V6 => ("fd77:1::1", "fd77:1::77"),
        };
        let (length, more) = if family == Family::V4 { (24, "") } else { (64, "nodad") };
        lab.server.ip(&format!("addr del {old}/{length} dev eth1"));
        lab.server.ip(&format!("addr add {new}/{length} dev eth1 {more}"));
        let server = new.parse().unwrap();
        assert!(!lab.alice.reaches(server, 22) && lab.alice.reaches(server, 80));
        lab.readdress(&format!("\"{old}\""), &format!("\"{new}\""));
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
        assert!(lab.alice.reaches(server, 22));
    }
    daemon.stop();
}

/// In each namespace, and so for loopback, over which the client has its kernel make a SYN.
#[test]
fn without_ipv6_all_works_over_ipv4() {
    let lab = Lab::new();
    for host in [&lab.alice, &lab.mallory, &lab.server] {
        for key in ["all", "default", "lo"] {
            host.sysctl(&format!("net/ipv6/conf/{key}/disable_ipv6"), "1");
        }
    }
    let daemon = lab.start();
    lab.serves(Family::V4);
    let refused = lab.knockq(&lab.alice, &["send", "server", "-6"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.starts_with("knockq: ") && !said.contains("panicked"), "{said}");
    daemon.stop();
}

#[test]
fn a_server_without_its_key_or_its_store_starts_nothing_and_leaves_the_last_gate() {
    let lab = Lab::with("open_for = \"1h\"");
    let config = lab.config().display().to_string();
    let daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    daemon.stop();
    for file in [lab.config().with_file_name("server.key"), lab.directory.path.join("state/counters.redb")] {
        let away = file.with_extension("away");
        fs::rename(&file, &away).unwrap();
        let mut daemon = Daemon::spawn(&lab, &[]);
        assert_eq!(daemon.end(), Some(78), "starting again mends it not: {}", daemon.log());
        let (name, log) = (file.file_name().unwrap().to_str().unwrap(), daemon.log());
        assert!(log.contains(name) && log.contains("Hint: "), "{log}");
        lab.control(&["ruleset", "--load", "--config", &config]); // as the boot does
        for family in FAMILIES {
            assert!(!lab.mallory.reaches(family.server(), 22));
            assert!(lab.alice.reaches(family.server(), 22), "a door that is open stays open");
        }
        fs::rename(&away, &file).unwrap();
    }
    lab.server.sh("nft delete table inet knockq");
    lab.control(&["ruleset", "--load", "--config", &config]);
    assert!(FAMILIES.iter().all(|family| !lab.alice.reaches(family.server(), 22)));
    let _daemon = lab.start();
    FAMILIES.iter().for_each(|family| lab.serves(*family));
}

/// Another process may have it only for a moment: a engine of before that waits for the disk, or `knockq check`.
#[test]
fn a_store_that_another_process_still_has_open_is_named_and_the_next_start_has_it() {
    let lab = Lab::new();
    let other = File::open(lab.store()).unwrap();
    other.try_lock().unwrap();
    let mut daemon = Daemon::spawn(&lab, &[]);
    assert_eq!(daemon.end(), Some(1), "which the service manager tries again: {}", daemon.log());
    let log = daemon.log();
    assert!(log.contains("counters.redb: is in use by another process") && !log.contains("recover"), "{log}");
    drop(other);
    let _daemon = lab.start();
    FAMILIES.iter().for_each(|family| lab.serves(*family));
}

/// The child that reads the configuration has locked it: what would replace it is told that the daemon runs.
#[test]
fn a_store_is_not_replaced_while_the_daemon_starts() {
    let lab = Lab::new();
    let (mut daemon, root) = start_and_hold_after_reading(&lab);
    let config = lab.config().display().to_string();
    let refused = lab.knockq(&lab.server, &["recover", "--config", &config]);
    root.release();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("recover: the daemon runs: "), "{said}");
    daemon.wait_for("knockq: ready");
    FAMILIES.iter().for_each(|family| lab.serves(*family));
}
