//! What root asks of the running daemon: which doors are open, shutting them, a gate on trial.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually, succeeds};

impl Lab {
    /// A server command of knockq; what it printed.
    #[track_caller]
    pub(crate) fn control(&self, arguments: &[&str]) -> String {
        succeeds(&self.knockq(&self.server, arguments))
    }

    #[track_caller]
    fn revoke(&self, what: &[&str]) -> String {
        let config = self.config().display().to_string();
        self.control(&[&["revoke", "--config", &config], what].concat())
    }
}

#[test]
fn grants_are_listed_as_the_kernel_has_them() {
    let lab = Lab::network();
    lab.configure(
        "[services.ssh]\nports = [\"tcp/22\"]\nopen_for = \"1h\"\n\
         [services.mail]\nports = [\"tcp/25\", \"udp/25\"]\nonce = true\nopen_for = \"2d\"\n",
    );
    lab.add_user("carol", &["ssh", "mail"]);
    let daemon = lab.start();
    assert_eq!(lab.control(&["grants", "--json"]).trim(), "[]");
    for family in FAMILIES {
        for service in ["ssh", "mail"] {
            succeeds(&lab.knockq_as("carol", &lab.alice, &["send", "server", service, family.flag()]));
        }
    }
    eventually("six doors", || lab.control(&["grants"]).lines().count() == 7);
    daemon.stop(); // the kernel is asked, not the daemon
    let text = lab.control(&["grants"]);
    let grants: serde_json::Value = serde_json::from_str(&lab.control(&["grants", "--json"])).unwrap();
    for family in FAMILIES {
        for (port, service, once, seconds) in
            [("tcp/22", "ssh", false, 3600), ("tcp/25", "mail", true, 172_800), ("udp/25", "mail", true, 172_800)]
        {
            let source = family.alice().to_string();
            let is_it = |grant: &&serde_json::Value| grant["source"] == source && grant["port"] == port;
            let grant = grants.as_array().unwrap().iter().find(is_it).unwrap();
            assert_eq!(
                (&grant["user"], &grant["service"], &grant["once"]),
                (&"carol".into(), &service.into(), &once.into())
            );
            let left = grant["seconds_left"].as_u64().unwrap();
            assert!((seconds - 100..=seconds).contains(&left), "{grant}");
            let line = text.lines().find(|line| line.starts_with(&source) && line.contains(port)).unwrap();
            let cells: Vec<&str> = line.split_whitespace().collect();
            assert_eq!(cells[1..4], [port, "carol", service], "{text}");
        }
    }
    lab.server.sh("nft delete table inet knockq");
    let listed = lab.knockq(&lab.server, &["grants"]);
    let said = String::from_utf8_lossy(&listed.stderr).into_owned();
    assert!(
        listed.status.code() == Some(1) && said.contains("no table inet knockq") && said.contains("Hint: "),
        "{said}"
    );
}

/// Two users behind one address, one of them with two services.
#[test]
fn revoking_shuts_what_is_meant_and_leaves_what_others_hold() {
    let lab = Lab::with("open_for = \"1h\"");
    let text = fs::read_to_string(lab.config()).unwrap();
    fs::write(lab.config(), text.replace("open_for = \"3s\"", "open_for = \"1h\"")).unwrap();
    lab.add_user("bob", &["ssh", "mail"]);
    let daemon = lab.start();
    let knock = |user, service, family: Family| {
        succeeds(&lab.knockq_as(user, &lab.alice, &["send", "server", service, family.flag()]));
        let port = if service == "ssh" { 22 } else { 25 };
        eventually("the door", || {
            lab.door(family.alice(), port).is_some_and(|door| door.contains(&format!("{user} {service}")))
        });
    };
    let ports = |family: Family| [22, 25].map(|port| lab.door(family.alice(), port).is_some());
    let all = || FAMILIES.map(ports);
    for family in FAMILIES {
        knock("alice", "ssh", family);
        knock("bob", "ssh", family);
        knock("bob", "mail", family);
        let mut connection = lab.alice.connect(family.server(), 22).unwrap();
        let said = lab.revoke(&["--user", "bob"]);
        assert!(said.contains(&format!("{} tcp/25: shut", family.alice())), "{said}");
        assert!(said.contains(&format!("{} tcp/22: still open for alice", family.alice())), "{said}");
        assert_eq!(ports(family), [true, false], "alice's is left");
        assert!(crate::lab::echoes(&mut connection));
        lab.revoke(&["--user", "alice"]);
        assert_eq!(ports(family), [false, false]);
        assert!(!lab.alice.reaches(family.server(), 22));
        assert!(crate::lab::echoes(&mut connection), "established connections live on");
    }

    FAMILIES.into_iter().for_each(|family| knock("bob", "ssh", family));
    lab.revoke(&[&Family::V4.alice().to_string()]);
    assert_eq!(all(), [[false, false], [true, false]]);
    lab.revoke(&["fd77:1::/64"]);
    assert_eq!(all(), [[false, false]; 2]);

    FAMILIES.into_iter().for_each(|family| knock("bob", "ssh", family));
    lab.revoke(&["--all"]);
    assert_eq!(all(), [[false, false]; 2]);
    assert!(daemon.log().contains("revoked user=bob service=ssh"), "{}", daemon.log());

    // At 3 a.m., with the daemon dead and a broken configuration.
    FAMILIES.into_iter().for_each(|family| knock("bob", "mail", family));
    daemon.stop();
    let said = lab.revoke(&["--all"]);
    assert!(said.contains("10.77.1.2 tcp/25: shut") && said.contains("fd77:1::2 tcp/25: shut"), "{said}");
    assert_eq!(all(), [[false, false]; 2]);
    assert_eq!(lab.revoke(&["--all"]), "");
}

#[test]
fn only_root_can_ask_the_daemon() {
    let lab = Lab::new();
    let _daemon = lab.start();
    let socket = lab.directory.path.join("run/control.sock");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    // Whoever connects and says nothing, or nonsense, holds nothing up for long.
    let silent = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    let mut babbling = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    std::io::Write::write_all(&mut babbling, &[0xff; 64]).unwrap();
    drop(babbling);
    lab.revoke(&["--all"]);
    drop(silent);
}

#[test]
fn a_gate_on_trial_goes_unless_it_is_confirmed() {
    for (confirms, ends) in [(false, "in time"), (false, "early"), (true, "early")] {
        let lab = Lab::new();
        let config = lab.config().display().to_string();
        let mut daemon = Daemon::spawn_with(&lab, &["--try", if ends == "in time" { "4s" } else { "1h" }], &[]);
        daemon.wait_for("knockq: ready");
        daemon.wait_for("hint=\"knockq confirm\"");
        for family in FAMILIES {
            assert!(!lab.alice.reaches(family.server(), 22), "the gate stands");
        }
        if confirms {
            assert_eq!(lab.control(&["confirm", "--config", &config]), "Confirmed: the gate stays.\n");
            let again = lab.knockq(&lab.server, &["confirm", "--config", &config]);
            assert_eq!(again.status.code(), Some(1), "there is nothing to confirm twice");
        }
        let start = Instant::now();
        if ends == "early" {
            daemon.signal(nix::sys::signal::Signal::SIGTERM);
        }
        assert_eq!(daemon.end(), Some(i32::from(!confirms)), "{}", daemon.log());
        assert!(start.elapsed() < Duration::from_secs(40));
        assert_eq!(daemon.log().contains("not confirmed: the gate is taken away"), !confirms, "{}", daemon.log());
        for family in FAMILIES {
            assert_eq!(lab.alice.reaches(family.server(), 22), !confirms);
        }
    }
}
