//! The counter store is lost, or comes back from a backup.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use crate::lab::{FAMILIES, Lab, succeeds};
use crate::unix_now;

/// Seconds of the default window. A shorter one would let the clock refuse a replay before the new store can.
const WINDOW: u64 = 60;

impl Lab {
    pub(crate) fn store(&self) -> PathBuf {
        self.directory.path.join("state/counters.redb")
    }
}

/// Knocks, loses the store in some way, and recovers; what was spent stays spent, and what comes later is taken.
fn recovers(lab: &Lab, lose: impl Fn()) -> String {
    let daemon = lab.start();
    let mut spent = Vec::new();
    for family in FAMILIES {
        let packet = lab.print_knock(family, &["--source", &family.alice().to_string()]);
        lab.alice.oracle_says(&["replay", &packet]);
        lab.wait_for_door(family.alice(), 22);
        spent.push((family, packet));
    }
    daemon.stop();
    lose();
    let config = lab.config().display().to_string();
    let said = succeeds(&lab.knockq(&lab.server, &["recover", "--config", &config]));
    let open_again = unix_now() + WINDOW + 1;

    let mut daemon = lab.start();
    lab.control(&["revoke", "--all", "--config", &config]);
    for (family, packet) in &spent {
        lab.alice.oracle_says(&["replay", packet]);
        lab.stays_shut(*family);
    }
    daemon.wait_for("refused reason=in_doubt user=alice"); // not by its counter
    thread::sleep(Duration::from_secs(open_again.saturating_sub(unix_now())));
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    said
}

#[test]
fn a_knock_that_a_lost_store_knew_stays_spent_after_recover() {
    let lab = Lab::new();
    let said = recovers(&lab, || fs::remove_file(lab.store()).unwrap());
    assert!(said.contains("There was no old one"), "{said}");
    assert!(said.contains(&format!("Users can knock again in {} s", WINDOW + 1)), "{said}");
}

#[test]
fn a_knock_that_a_restored_store_has_forgotten_stays_spent_after_recover() {
    let lab = Lab::new();
    let backup = lab.directory.path.join("backup");
    fs::copy(lab.store(), &backup).unwrap();
    recovers(&lab, || {
        fs::copy(&backup, lab.store()).unwrap();
    });
    // What the store knows is taken over: this one knows alice's counter.
    let config = lab.config().display().to_string();
    let said = succeeds(&lab.knockq(&lab.mallory, &["recover", "--config", &config]));
    assert!(said.contains("the counters of its 1 keys are taken over"), "{said}");
}

#[test]
fn recover_is_refused_while_the_daemon_runs_even_if_its_store_is_deleted() {
    let lab = Lab::new();
    let daemon = lab.start();
    let config = lab.config().display().to_string();
    for host in [&lab.server, &lab.mallory] {
        let ran = lab.knockq(host, &["recover", "--config", &config]);
        let errors = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert_eq!(ran.status.code(), Some(1), "{errors}");
        assert!(errors.contains("recover: the daemon runs: ") && errors.contains("Hint: stop it first"), "{errors}");
    }
    fs::remove_file(lab.store()).unwrap();
    let ran = lab.knockq(&lab.server, &["recover", "--config", &config]);
    let errors = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert_eq!(ran.status.code(), Some(1), "{errors}");
    assert!(errors.contains("recover: the daemon runs: queue 4097: already bound by "), "{errors}");
    assert!(!lab.store().exists());
    daemon.stop();
    succeeds(&lab.knockq(&lab.server, &["recover", "--config", &config]));
}
