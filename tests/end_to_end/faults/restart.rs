//! Grants outlive what happens to the daemon: a stop, a kill, a new version, an element that the kernel refuses.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::Signal;

use super::knock;
use crate::debugger::{SENDTO, Traced};
use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually, knockq, succeeds};
use crate::seconds_left;

/// The one grant that is listed for alice's address and ssh: whose, and how many seconds are left of it.
#[track_caller]
fn listed(lab: &Lab, family: Family) -> (String, u64) {
    let listed: serde_json::Value = serde_json::from_str(&lab.control(&["grants", "--json"])).unwrap();
    let source = family.alice().to_string();
    let grants = listed.as_array().unwrap().iter();
    let grants: Vec<_> = grants.filter(|grant| grant["source"] == source && grant["port"] == "tcp/22").collect();
    let [grant] = grants[..] else { panic!("{listed}") };
    (grant["user"].as_str().unwrap().to_owned(), grant["seconds_left"].as_u64().unwrap())
}

/// Knocks for ssh from alice's address, whoever it is; the door has more time then.
fn renew(lab: &Lab, user: &str, family: Family) {
    let left = || lab.door(family.alice(), 22).map_or(0.0, |door| seconds_left(&door));
    let before = left();
    // On a machine that is held up, one may come when the door is as old as before.
    eventually("more time", || {
        succeeds(&lab.knockq_as(user, &lab.alice, &["send", "server", "ssh", family.flag()]));
        left() > before
    });
}

fn stop(daemon: Daemon) {
    daemon.stop();
}

fn kill(mut daemon: Daemon) {
    daemon.kill();
}

#[test]
fn grants_outlive_a_stop_and_a_kill_with_owner_and_time_and_are_renewed_and_revoked_as_before() {
    let lab = knock::lab();
    lab.add_user("bob", &["ssh"]);
    let mut daemon = lab.start();
    for end in [stop, kill] {
        FAMILIES.into_iter().for_each(|family| renew(&lab, "alice", family));
        let before = FAMILIES.map(|family| listed(&lab, family));
        end(daemon);
        thread::sleep(Duration::from_secs(2));
        assert!(
            FAMILIES.into_iter().all(|family| lab.alice.reaches(family.server(), 22)),
            "nobody serves, and all is open"
        );
        daemon = lab.start();
        for (family, (_, before)) in FAMILIES.into_iter().zip(before) {
            let (user, left) = listed(&lab, family);
            assert!(user == "alice" && left < before, "{user} {left} {before}");
            renew(&lab, "bob", family);
            assert_eq!(listed(&lab, family).0, "bob");
            lab.revoke(&["--user", "bob"]);
            let (user, hers) = listed(&lab, family);
            assert!(user == "alice" && hers <= left + 1, "her own time: {hers} {left}");
            renew(&lab, "alice", family);
            assert!(listed(&lab, family).1 > hers);
        }
        lab.revoke(&["--user", "alice"]);
        assert!(FAMILIES.into_iter().all(|family| !lab.alice.reaches(family.server(), 22)));
    }
}

/// Puts another file in the place of this one, which lives on without a name.
fn replace(lab: &Lab, program: &Path, by: &str) {
    lab.server.sh(&format!("{by} >{0}.new && chmod 755 {0}.new && mv {0}.new {0}", program.display()));
}

#[test]
fn a_daemon_whose_binary_is_replaced_goes_on_and_reloads_and_the_next_one_takes_its_doors_over() {
    let lab = knock::lab();
    let program = lab.directory.path.join("knockq");
    let this_version = format!("cat {}", knockq().display());
    let install = |by: &dyn Fn(&str) -> String| {
        ["", "-gate", "-root"].iter().for_each(|which| {
            replace(&lab, &program.with_file_name(format!("knockq{which}")), &by(which));
        });
    };
    install(&|which| format!("{this_version}{which}"));
    let start = || {
        let mut daemon = Daemon::spawn_program(&program, &lab, &[], &[]);
        daemon.wait_for("knockq: ready");
        daemon
    };
    let mut daemon = start();
    FAMILIES.into_iter().for_each(|family| renew(&lab, "alice", family));

    install(&|_| "printf '#!/bin/sh\\nexit 1\\n'".to_owned());
    let running = fs::read_link(format!("/proc/{}/exe", daemon.pid())).unwrap();
    assert!(running.to_str().unwrap().ends_with(" (deleted)"), "{running:?}");
    daemon.signal(Signal::SIGHUP);
    daemon.wait_for("engine: reloaded");
    lab.add_user("bob", &["mail"]);
    for family in FAMILIES {
        succeeds(&lab.knockq_as("bob", &lab.alice, &["send", "server", "mail", family.flag()]));
        lab.wait_for_door(family.alice(), 25);
    }

    install(&|which| format!("{this_version}{which}"));
    daemon.stop();
    let _daemon = start();
    for family in FAMILIES {
        assert_eq!(listed(&lab, family).0, "alice");
        assert!(lab.alice.reaches(family.server(), 22) && !lab.mallory.reaches(family.server(), 22));
    }
    lab.revoke(&["--user", "alice"]);
    assert!(FAMILIES.into_iter().all(|family| lab.door(family.alice(), 22).is_none()));
}

#[test]
fn a_renewal_that_the_kernel_refuses_leaves_the_grant_of_before() {
    let lab = knock::lab();
    let daemon = lab.start();
    let (_, gate) = daemon.processes()[1];
    // The second comes soon after the first, and may only be counted.
    let lines = [
        "not granted: netlink: the kernel refused the change: Bad file descriptor",
        "more could not be opened, like the one before doors=1",
    ];
    let told = || lines.map(|line| daemon.log().matches(line).count()).iter().sum::<usize>();
    for (family, refused) in FAMILIES.into_iter().zip(1..) {
        renew(&lab, "alice", family);
        let before = lab.door(family.alice(), 22).map(|door| seconds_left(&door)).unwrap();
        let gate = Traced::attach(gate);
        lab.knock(family, &[]);
        gate.run_to(&[SENDTO]); // the verdict
        gate.finish();
        gate.run_to(&[SENDTO]); // the element
        gate.refuse(Errno::EBADF);
        gate.release();
        eventually("a refusal", || told() == refused);
        let (user, left) = listed(&lab, family);
        assert!(user == "alice" && left as f64 <= before, "{user} {left} {before}");
        lab.revoke(&["--user", "alice"]);
        assert_eq!(lab.door(family.alice(), 22), None, "hers is known, and shut");
    }
}
