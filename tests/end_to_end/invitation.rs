//! A user whose key the server made.

use std::fs;

use super::lab::{FAMILIES, Lab, succeeds};

#[test]
fn an_invited_user_knocks_at_once_and_a_second_device_under_a_name_of_its_own() {
    let lab = Lab::new();
    let mut daemon = lab.start();
    let config = lab.config().display().to_string();
    for name in ["bob", "bob-laptop"] {
        let invited = lab.knockq(&lab.server, &["user", "invite", name, "--allow", "ssh", "--config", &config]);
        let invitation = succeeds(&invited);
        let said = String::from_utf8_lossy(&invited.stderr).into_owned();
        assert!(said.ends_with("The daemon has taken it over.\n"), "{said}");
        let path = lab.directory.path.join("invitation");
        fs::write(&path, invitation).unwrap();
        succeeds(&lab.knockq_as(name, &lab.alice, &["host", "add", "server", path.to_str().unwrap()]));
        for family in FAMILIES {
            succeeds(&lab.knockq_as(name, &lab.alice, &["send", "server", family.flag(), "--wait"]));
            daemon.wait_for(&format!("granted user={name} service=ssh source={}", family.alice()));
        }
    }
}
