//! What root asks of the running daemon: which doors are open, shutting them, a gate on trial.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use nftables::expr::{Elem, Expression, NamedExpression};
use nftables::schema::{NfListObject, NfObject, Nftables};
use nix::sys::signal::{Signal, kill};

use crate::debugger::Traced;
use crate::lab::{self, Daemon, FAMILIES, Family, Lab, eventually, succeeds};

impl Lab {
    /// A server command of knockq; what it printed.
    #[track_caller]
    pub(crate) fn control(&self, arguments: &[&str]) -> String {
        succeeds(&self.knockq(&self.server, arguments))
    }

    fn control_socket(&self) -> PathBuf {
        self.directory.path.join("run/control.sock")
    }

    /// Shuts doors by command; what it printed.
    #[track_caller]
    pub(crate) fn revoke(&self, what: &[&str]) -> String {
        let config = self.config().display().to_string();
        self.control(&[&["revoke", "--config", &config], what].concat())
    }
}

fn of_json(grant: &serde_json::Value) -> String {
    let words = ["source", "port", "user", "service"].map(|key| grant[key].as_str().unwrap().to_owned());
    words.join(" ")
}

/// The doors of a set, as nft lists them: source, port, user and service.
fn by_nft(lab: &Lab, set: &str) -> Vec<String> {
    let listing = lab.server.nft(&["-j", "list", "set", "inet", "knockq", set]);
    let listing: Nftables<'_> = serde_json::from_str(&listing).unwrap();
    let mut doors = Vec::new();
    for object in listing.objects.iter() {
        let NfObject::ListObject(NfListObject::Set(set)) = object else { continue };
        for element in set.elem.iter().flat_map(|elements| elements.iter()) {
            let Expression::Named(NamedExpression::Elem(Elem { val, comment, .. })) = element else {
                panic!("{element:?}")
            };
            let Expression::Named(NamedExpression::Concat(key)) = &**val else { panic!("{val:?}") };
            let [Expression::String(source), Expression::String(transport), Expression::Number(port)] = &key[..] else {
                panic!("{key:?}")
            };
            let comment: Vec<&str> = comment.as_deref().unwrap().split(' ').take(2).collect();
            doors.push(format!("{source} {transport}/{port} {}", comment.join(" ")));
        }
    }
    doors
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
    let mut shown: Vec<String> = grants.as_array().unwrap().iter().map(of_json).collect();
    let mut listed: Vec<String> =
        ["open4", "open6", "once4", "once6"].iter().flat_map(|set| by_nft(&lab, set)).collect();
    [&mut shown, &mut listed].iter_mut().for_each(|doors| doors.sort());
    assert_eq!(shown, listed, "nft reads the same in the sets");
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
    fs::write(lab.config(), text.replace("open_for = \"6s\"", "open_for = \"1h\"")).unwrap();
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
        assert!(lab::echoes(&mut connection));
        lab.revoke(&["--user", "alice"]);
        assert_eq!(ports(family), [false, false]);
        assert!(!lab.alice.reaches(family.server(), 22));
        assert!(lab::echoes(&mut connection), "established connections live on");
    }

    FAMILIES.into_iter().for_each(|family| knock("bob", "ssh", family));
    lab.revoke(&[&Family::V4.alice().to_string()]);
    assert_eq!(all(), [[false, false], [true, false]]);
    lab.revoke(&["fd77:1::/64"]);
    assert_eq!(all(), [[false, false]; 2]);

    FAMILIES.into_iter().for_each(|family| knock("bob", "ssh", family));
    lab.revoke(&["--all"]);
    assert_eq!(all(), [[false, false]; 2]);
    let config = lab.config().display().to_string();
    let unknown = lab.knockq(&lab.server, &["revoke", "--user", "bbo", "--config", &config]);
    let said = String::from_utf8_lossy(&unknown.stderr).into_owned();
    assert!(unknown.status.code() == Some(78) && said.contains("user bbo: is not configured"), "{said}");
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
    let socket = lab.control_socket();
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    // Whoever connects and says nothing, or nonsense, holds nothing up for long.
    let silent = UnixStream::connect(&socket).unwrap();
    let mut babbling = UnixStream::connect(&socket).unwrap();
    babbling.write_all(&[0xff; 64]).unwrap();
    drop(babbling);
    lab.revoke(&["--all"]);
    drop(silent);
}

#[test]
fn a_gate_on_trial_goes_also_if_the_daemon_ends_while_it_starts() {
    for pause in [0, 50] {
        let lab = Lab::new();
        let mut daemon = Daemon::spawn_with(&lab, &["--try", "1h"], &[]);
        eventually("the gate", || lab.server.sh("nft list ruleset").contains("@guarded"));
        thread::sleep(Duration::from_millis(pause));
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.end(), Some(1), "{}", daemon.log());
        assert_eq!(lab.server.nft(&["list", "tables"]), "", "{}", daemon.log());
    }
}

#[test]
fn a_gate_on_trial_goes_unless_it_is_confirmed() {
    for (confirms, ends) in [(false, "in time"), (false, "early"), (true, "early")] {
        let lab = Lab::new();
        let config = lab.config().display().to_string();
        let mut daemon = Daemon::spawn_with(&lab, &["--try", if ends == "in time" { "20s" } else { "1h" }], &[]);
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
            daemon.signal(Signal::SIGTERM);
        }
        assert_eq!(daemon.end(), Some(i32::from(!confirms)), "{}", daemon.log());
        assert!(start.elapsed() < Duration::from_secs(120));
        assert_eq!(daemon.log().contains("not confirmed: the gate is taken away"), !confirms, "{}", daemon.log());
        for family in FAMILIES {
            assert_eq!(lab.alice.reaches(family.server(), 22), !confirms);
        }
    }
}

#[test]
fn a_revocation_while_the_configuration_is_read_ends_nothing() {
    let lab = Lab::new();
    let daemon = lab.start();
    for _ in 0..20 {
        daemon.signal(Signal::SIGHUP);
        lab.revoke(&["--all"]);
    }
    eventually("a reload", || daemon.log().contains("engine: reloaded"));
    lab.knock(Family::V6, &[]);
    lab.wait_for_door(Family::V6.alice(), 22);
    daemon.stop();
}

#[test]
fn a_command_that_waits_for_a_daemon_that_dies_says_so() {
    for kills_root in [false, true] {
        let lab = Lab::new();
        let mut daemon = lab.start();
        let [(_, root), (_, gate), (_, engine)] = daemon.processes();
        let config = lab.config().display().to_string();
        let descriptors = || fs::read_dir(format!("/proc/{engine}/fd")).unwrap().count();
        let before = descriptors();
        kill(gate, Signal::SIGSTOP).unwrap(); // it gives no answer
        thread::scope(|scope| {
            let asked = scope.spawn(|| lab.knockq(&lab.server, &["revoke", "--all", "--config", &config]));
            eventually("the question", || descriptors() > before);
            kill(if kills_root { root } else { gate }, Signal::SIGKILL).unwrap();
            let asked = asked.join().unwrap();
            let said = String::from_utf8_lossy(&asked.stderr).into_owned();
            assert_eq!(asked.status.code(), Some(1), "{said}");
            let told = "control.sock: the daemon hung up before it answered";
            assert!(said.contains(told) && said.contains("Hint: journalctl -u knockq"), "{said}");
        });
        let _ = kill(gate, Signal::SIGCONT); // it may be dead
        daemon.end();
        eventually("a gate that nobody has", || {
            lab.knockq(&lab.server, &["revoke", "--all", "--config", &config]).status.success()
        });
    }
}

#[test]
fn whoever_waits_for_a_reload_that_hangs_holds_nothing_up() {
    let lab = Lab::new();
    let daemon = lab.start();
    let reader = hold_reader(&daemon);
    let reloads = || daemon.log().matches("engine: reloaded").count();
    let before = reloads();
    // A request to reload is one byte (postcard, of src/serve/control.rs).
    let wait = |_| {
        let mut stream = UnixStream::connect(lab.control_socket()).unwrap();
        stream.write_all(&[0]).unwrap();
        stream
    };
    let mut waiting: Vec<UnixStream> = (0..100).map(wait).collect();
    let turned_away = |stream: &mut UnixStream| {
        stream.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
        stream.read(&mut [0; 256]).is_ok_and(|length| length > 1)
    };
    eventually("turning many away", || waiting.iter_mut().any(turned_away));
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    lab.revoke(&["--all"]);
    reader.release();
    eventually("this reload, and one for those who waited", || reloads() == before + 2);
    daemon.stop();
}

/// Has a reload begin, and holds the child that reads the configuration.
pub(crate) fn hold_reader(daemon: &Daemon) -> Traced {
    let root = Traced::attach(daemon.pid());
    daemon.signal(Signal::SIGHUP);
    let reader = root.run_to_child();
    root.release();
    reader
}

#[test]
fn no_command_goes_past_a_daemon_that_does_not_hear_it() {
    let lab = Lab::with("open_for = \"1h\"");
    let _daemon = lab.start();
    let config = lab.config().display().to_string();
    lab.knock(Family::V4, &[]);
    lab.wait_for_door(Family::V4.alice(), 22);
    // The socket is gone; or the configuration was forgotten, and another place looked at.
    fs::remove_file(lab.control_socket()).unwrap();
    for arguments in [&["revoke", "--all", "--config", &config][..], &["revoke", "--all"]] {
        let ran = lab.knockq(&lab.server, arguments);
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert_eq!(ran.status.code(), Some(1), "{said}");
        assert!(said.contains("the daemon runs, but does not listen in ") && said.contains("Hint: "), "{said}");
    }
    assert!(lab.door(Family::V4.alice(), 22).is_some());
}

/// Whatever stands in a set that somebody has filled by hand, the daemon starts, and leaves alone what is not its own.
#[test]
fn doors_that_were_opened_by_hand_are_listed_and_left_alone() {
    let lab = Lab::new();
    lab.start().stop();
    for (element, line) in [
        ("{ 1.2.3.4 . tcp . 22 }", "1.2.3.4  tcp/22  -     -        for ever"),
        ("{ 1.2.3.4 . tcp . 22 timeout 2h comment \"word\" }", "1.2.3.4  tcp/22  -     -        "),
        ("{ 1.2.3.4 . tcp . 22 timeout 2h comment \"a  b c -/\" }", "1.2.3.4  tcp/22  -     -        "),
        ("{ 1.2.3.4 . sctp . 22 timeout 2h }", ""),
    ] {
        lab.server.sh(&format!("echo 'add element inet knockq open4 {element}' | nft -f -"));
        let listed = lab.control(&["grants"]);
        assert!(line.is_empty() || listed.lines().any(|shown| shown.starts_with(line)), "{element}: {listed}");
        lab.start().stop();
        let left = lab.server.nft(&["list", "set", "inet", "knockq", "open4"]);
        assert!(left.contains("1.2.3.4"), "{element}: {left}");
        lab.server.nft(&["flush", "set", "inet", "knockq", "open4"]);
    }
}

#[test]
fn a_door_that_was_opened_by_hand_is_shut_by_a_revoke_without_the_daemon_and_never_said_to_be_shut_before() {
    let lab = Lab::new();
    lab.start().stop();
    for (set, source) in [("open4", "192.0.2.4"), ("open6", "2001:db8::4")] {
        lab.server.sh(&format!("nft 'add element inet knockq {set} {{ {source} . tcp . 22 timeout 2h }}'"));
    }
    let daemon = lab.start();
    let config = lab.config().display().to_string();
    let ran = lab.knockq(&lab.server, &["revoke", "--all", "--config", &config]);
    let said = format!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert_eq!(ran.status.code(), Some(1), "{said}");
    for source in ["192.0.2.4", "2001:db8::4"] {
        assert!(
            said.contains(&format!("{source} tcp/22: still open, by hand")) && said.contains("Hint: stop it"),
            "{said}"
        );
    }
    daemon.stop();
    assert_eq!(lab.revoke(&["--all"]), "192.0.2.4 tcp/22: shut\n2001:db8::4 tcp/22: shut\n");
}
