//! Rules of the administrator's own, about who has knocked: the files of examples/rules, loaded, with traffic.

use std::fs::{self, File};
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::lab::{self, FAMILIES, Family, Host, Lab, eventually, succeeds};
use crate::{daemon_owned_the_table, seconds_left};

impl Lab {
    /// Adds a user to sets, who may open ssh.
    fn add_to(&self, user: &str, sets: &[&str]) {
        self.add_user(user, &["ssh"]);
        let sets: Vec<String> = sets.iter().map(|set| format!("\"{set}\"")).collect();
        let line = format!("add_to = [{}]\nservices", sets.join(", "));
        self.edit(&format!("users.d/{user}.toml"), "services", &line);
    }

    /// Twice, as after a change: nothing must be there twice then.
    fn load_rules(&self, example: &str) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/rules").join(example);
        for _ in 0..2 {
            self.server.nft(&["-f", path.to_str().unwrap()]);
        }
    }

    /// A user knocks for ssh, and it is open.
    fn let_in(&self, user: &str, family: Family) {
        self.let_in_to("ssh", 22, user, family);
    }

    /// The same for any service. Others may hold the door open, so its element tells whose it is by now; and that the source is
    /// in its sets too, the next command, which the monitor hears when it has done all of the knock.
    fn let_in_to(&self, service: &str, port: u16, user: &str, family: Family) {
        succeeds(&self.knockq_as(user, &self.alice, &["send", "server", service, family.flag()]));
        let opener = format!("{user} {service}");
        eventually("the door", || self.door(family.alice(), port).is_some_and(|door| door.contains(&opener)));
        self.revoke(&["192.0.2.1"]);
    }

    /// The element of a set that has alice's address, as nft lists it.
    fn element(&self, set: &str, family: Family) -> Option<String> {
        let listing = self.server.nft(&[&["list", "set"], set.split(' ').collect::<Vec<_>>().as_slice()].concat());
        let address = format!("{} ", family.alice());
        let elements = listing.split(['{', ',', '}']).map(str::trim);
        elements.filter(|element| element.starts_with(&address)).map(str::to_owned).next()
    }
}

#[test]
fn one_user_alone_reaches_every_port_for_as_long_as_the_knock_opens() {
    let lab = Lab::with("open_for = \"20s\"");
    lab.add_to("john", &["inet filter john4", "inet filter john6"]);
    lab.load_rules("everything.nft");
    let _daemon = lab.start();
    for family in FAMILIES {
        lab.let_in("alice", family);
        assert!(!lab.alice.reaches(family.server(), 80), "another user's knock opens ssh and nothing else");
        lab.let_in("john", family);
        let mut web = lab.alice.gets_in(family.server(), 80);
        assert!(!lab.mallory.reaches(family.server(), 80), "from John's address alone");
        eventually("the end of his time", || {
            lab.element(&format!("inet filter john{}", digit(family)), family).is_none()
        });
        assert!(!lab.alice.reaches(family.server(), 80));
        assert!(lab::echoes(&mut web), "what was made in that time lives on");
    }
}

fn digit(family: Family) -> u8 {
    if family == Family::V4 { 4 } else { 6 }
}

#[test]
fn one_users_packets_are_counted_and_limited_apart() {
    let lab = Lab::with("open_for = \"1h\"");
    lab.add_to("john", &["inet account john4", "inet account john6"]);
    lab.load_rules("account.nft");
    let _daemon = lab.start();
    let counted = |name: &str| {
        let listing = lab.server.nft(&["list", "counter", "inet", "account", name]);
        listing.split("packets ").nth(1).unwrap().split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    let send = |host: &Host, family: Family| {
        let socket = host.enter(|| UdpSocket::bind(SocketAddr::new(family.pick("0.0.0.0", "::"), 0)).unwrap());
        for _ in 0..500 {
            let _ = socket.send_to(b"hello", SocketAddr::new(family.server(), 9999)); // the last answer may be an error
        }
    };
    for family in FAMILIES {
        let before = counted("john");
        send(&lab.alice, family);
        assert_eq!(counted("john"), before, "not John's yet");
        lab.let_in("john", family);
        send(&lab.mallory, family);
        let (before, over) = (counted("john"), counted("too_many"));
        send(&lab.alice, family);
        eventually("counting", || counted("john") >= before + 500);
        assert!(counted("too_many") > over, "500 at once are more than twenty a second");
        assert!(counted("john") - before < 520, "and nobody else's");
    }
}

#[test]
fn a_host_inside_is_reached_by_a_group_alone() {
    let lab = Lab::network();
    lab.configure(
        "[services.portal]\nports = [\"tcp/8080\"]\nopen_for = \"1h\"\n[services.ssh]\nports = [\"tcp/22\"]\nopen_for = \"1h\"\n",
    );
    let inside = lab.host("inside");
    lab.server.uplink("eth9", &inside, "10.77.9", "fd77:9:");
    inside.settle(1);
    lab.server.settle(3);
    lab.server.forward();
    inside.serve(80);
    lab.server.serve(22);
    for (user, is_of_group) in [("anna", true), ("ben", true), ("carl", false)] {
        lab.add_user(user, &["portal", "ssh"]);
        if is_of_group {
            let line = "add_to = [\"inet portal staff4\", \"inet portal staff6\"]\nservices";
            lab.edit(&format!("users.d/{user}.toml"), "services", line);
        }
    }
    lab.load_rules("group.nft");
    let _daemon = lab.start();
    for family in FAMILIES {
        lab.let_in_to("portal", 8080, "carl", family);
        assert!(!lab.alice.reaches(family.server(), 8080), "his door leads to a port where nobody listens");
        lab.let_in("anna", family);
        assert!(!lab.alice.reaches(family.server(), 8080), "hers to ssh");
        lab.let_in_to("portal", 8080, "ben", family);
        let mut connection = lab.alice.gets_in(family.server(), 8080);
        assert!(!lab.mallory.reaches(family.server(), 8080));
        lab.let_in_to("portal", 8080, "anna", family);
        lab.revoke(&["--user", "ben"]);
        let mut other = lab.alice.gets_in(family.server(), 8080);
        lab.revoke(&["--user", "anna"]);
        assert!(!lab.alice.reaches(family.server(), 8080), "the last one has gone");
        assert!(lab::echoes(&mut connection) && lab::echoes(&mut other));
    }
}

#[test]
fn a_source_is_in_a_set_for_the_longest_of_its_grants_and_leaves_with_the_last() {
    let lab = Lab::with("open_for = \"1h\"");
    let sets = ["ip mine v4", "ip6 mine v6", "ip mine v4-too"];
    let make = "add table ip mine; add table ip6 mine; add set ip mine v4 { type ipv4_addr; flags timeout; }; \
                add set ip6 mine v6 { typeof ip6 saddr; flags timeout; }; \
                add set ip mine v4-too { type ipv4_addr . inet_proto . inet_service; flags timeout; };";
    lab.server.nft(&[make]);
    lab.add_to("john", &sets);
    lab.add_to("jane", &sets[..2]);
    lab.edit("users.d/jane.toml", "services", "open_for = \"10m\"\nservices");
    let daemon = lab.start();
    let set = |family| if family == Family::V4 { sets[0] } else { sets[1] };
    let left = |family| lab.element(set(family), family).map(|element| seconds_left(&element));
    for family in FAMILIES {
        lab.let_in("jane", family);
        eventually("jane's time", || left(family).is_some_and(|left| (500.0..=600.0).contains(&left)));
        lab.let_in("john", family);
        eventually("john's time", || left(family).is_some_and(|left| left > 3000.0));
        assert_eq!(lab.element(sets[2], family).is_some(), family == Family::V4);
        lab.revoke(&["--user", "john"]);
        assert!(left(family).is_some_and(|left| left <= 600.0), "jane's again");
        assert_eq!(lab.element(sets[2], family), None);
        // The administrator's own reload makes the sets anew.
        lab.server.nft(&["delete table ip mine; delete table ip6 mine"]);
        lab.server.nft(&[make]);
        eventually("being back", || left(family).is_some());
        // Nobody else can delete an element of a table that is owned.
        let door = format!("open{} {{ {} . tcp . 22 }}", digit(family), family.alice());
        if daemon_owned_the_table(&lab) {
            lab.revoke(&["--user", "jane"]);
        } else {
            lab.server.nft(&["delete", "element", "inet", "knockq", &door]);
        }
        eventually("leaving with the door", || left(family).is_none());
    }
    // A set that is no longer hers.
    FAMILIES.into_iter().for_each(|family| lab.let_in("john", family));
    eventually("john's time", || FAMILIES.iter().all(|&family| left(family).is_some()));
    lab.edit("users.d/john.toml", "\"ip mine v4\", \"ip6 mine v6\", ", "");
    daemon.signal(Signal::SIGHUP);
    eventually("leaving", || FAMILIES.iter().all(|&family| left(family).is_none()));
    assert!(lab.element(sets[2], Family::V4).is_some(), "the other is still");
    assert!(FAMILIES.iter().all(|family| lab.door(family.alice(), 22).is_some()), "and so are the doors");
    // Another daemon takes over who is in.
    daemon.stop();
    let _daemon = lab.start();
    lab.revoke(&["--user", "john"]);
    assert_eq!(lab.element(sets[2], Family::V4), None);
}

#[test]
fn a_set_that_is_missing_or_of_another_type_is_shown_by_the_check_and_keeps_nobody_out() {
    let lab = Lab::with("open_for = \"1h\"");
    lab.server.nft(&["add table inet mine; add set inet mine ports { type inet_service; flags timeout; }; \
                      add set inet mine for_ever { type ipv4_addr; }; add set inet mine nets { type ipv4_addr; flags interval,timeout; };"]);
    lab.add_to("john", &["inet mine nobody"]);
    let config = lab.config().display().to_string();
    let mut last = "inet mine nobody";
    for (set, wrong) in [
        ("inet mine nobody", "there is no set inet mine nobody"),
        ("inet gone nobody", "there is no set inet gone nobody"),
        ("inet mine ports", "set inet mine ports is not of type ipv4_addr or ipv6_addr"),
        ("inet mine for_ever", "set inet mine for_ever must have the flag timeout"),
        ("inet mine nets", "set inet mine nets must have the flag timeout, and not constant or interval"),
    ] {
        lab.edit("users.d/john.toml", last, set);
        last = set;
        let checked = lab.knockq(&lab.server, &["check", "--config", &config]);
        let said = String::from_utf8_lossy(&checked.stderr).into_owned();
        assert!(
            said.contains(wrong) && said.contains("john.toml: add_to: ") && said.contains(&format!("add set {set} ")),
            "{said}"
        );
        assert_eq!(checked.status.code(), Some(78));
        if let Some((_, hint)) = said.split_once("Hint: nft ") {
            assert!(wrong.starts_with("there is no set"), "another set is in the way: {said}");
            lab.server.sh(&format!("nft {}", hint.trim_end().strip_suffix(", or ipv6_addr").unwrap()));
            succeeds(&lab.knockq(&lab.server, &["check", "--config", &config]));
        }
    }
    let mut daemon = lab.start();
    daemon.wait_for("engine: warning: who knocks is not added: set inet mine nets must have the flag timeout");
    for family in FAMILIES {
        lab.let_in("john", family);
        lab.alice.gets_in(family.server(), 22);
    }
    daemon.wait_for("not added: set inet mine nets must have the flag timeout");
    // As soon as it is there, the next knock does it all.
    lab.server.nft(&["delete set inet mine nets; add set inet mine nets { type ipv4_addr; flags timeout; }"]);
    std::thread::sleep(Duration::from_secs(2)); // a counter of the next second
    lab.let_in("john", Family::V4);
    eventually("being added", || lab.element("inet mine nets", Family::V4).is_some());
}

#[test]
fn a_source_stays_in_a_set_without_ports_while_any_of_its_doors_is_open() {
    let lab = Lab::network();
    lab.configure("[services.ssh]\nports = [\"tcp/22\", \"tcp/7000\"]\nopen_for = \"1h\"\n");
    lab.load_include_file(); // a plain table, which others may change
    lab.server.nft(&["add table inet mine; add set inet mine v4 { type ipv4_addr; flags timeout; }; \
                      add set inet mine v6 { type ipv6_addr; flags timeout; }; add set inet mine v4-ports \
                      { type ipv4_addr . inet_proto . inet_service; flags timeout; }"]);
    lab.add_to("john", &["inet mine v4", "inet mine v6", "inet mine v4-ports"]);
    let mut daemon = lab.start();
    for family in FAMILIES {
        let set = format!("inet mine v{}", digit(family));
        lab.let_in("john", family);
        lab.wait_for_door(family.alice(), 7000);
        eventually("being added", || lab.element(&set, family).is_some());
        let shut = |port: u16| {
            let door = format!("open{} {{ {} . tcp . {port} }}", digit(family), family.alice());
            lab.server.nft(&["delete", "element", "inet", "knockq", &door]);
        };
        shut(22);
        daemon.wait_for(&format!("shut by somebody else user=john service=ssh source={} port=tcp/22", family.alice()));
        if family == Family::V4 {
            eventually("one port", || lab.element("inet mine v4-ports", family).is_some_and(|it| it.contains("7000")));
        }
        // What is done for the next command is done after that.
        lab.revoke(&["192.0.2.1"]);
        assert!(lab.element(&set, family).is_some_and(|element| seconds_left(&element) > 3000.0));
        shut(7000);
        eventually("leaving with the last door", || lab.element(&set, family).is_none());
    }
}

/// A service or a user that went while no daemon ran.
#[test]
fn a_door_that_nobody_may_open_any_more_puts_nobody_into_a_set_when_the_daemon_starts() {
    let lab = Lab::with("open_for = \"1h\"");
    lab.server.nft(&["add table inet mine; add set inet mine v4 { type ipv4_addr; flags timeout; }; \
                      add set inet mine v6 { type ipv6_addr; flags timeout; }"]);
    lab.add_to("john", &["inet mine v4", "inet mine v6"]);
    let daemon = lab.start();
    let sets = || FAMILIES.map(|family| lab.element(&format!("inet mine v{}", digit(family)), family));
    FAMILIES.into_iter().for_each(|family| lab.let_in("john", family));
    eventually("being added", || sets().iter().all(Option::is_some));
    daemon.stop();
    lab.edit("users.d/john.toml", "\"ssh\"", "\"mail\"");
    let told = lab.directory.path.join("told");
    let mut monitor = lab.server.enter(|| {
        let stdout = File::create(&told).unwrap();
        Command::new("nft").args(["monitor", "elements"]).stdin(Stdio::null()).stdout(stdout).spawn().unwrap()
    });
    let tells = |word: &str| fs::read_to_string(&told).unwrap().contains(word);
    eventually("listening", || {
        lab.server
            .nft(&["add element inet mine v4 { 192.0.2.9 timeout 1h }; delete element inet mine v4 { 192.0.2.9 }"]);
        tells("192.0.2.9")
    });
    let _daemon = lab.start();
    eventually("leaving", || sets().iter().all(Option::is_none));
    lab.server.nft(&["add element inet mine v4 { 192.0.2.8 timeout 1h }"]);
    eventually("the last word", || tells("192.0.2.8"));
    monitor.kill().unwrap();
    monitor.wait().unwrap();
    let told = fs::read_to_string(&told).unwrap();
    // What is to be deleted is added first, for a second: then it is there.
    let mut added = told.lines().filter(|line| line.starts_with("add element inet mine") && line.contains("john"));
    assert!(added.all(|line| line.contains(" timeout 1s ")), "{told}");
    assert!(told.lines().any(|line| line.starts_with("delete element inet mine") && line.contains("john")), "{told}");
}
