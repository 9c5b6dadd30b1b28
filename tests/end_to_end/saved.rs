//! Doors that others save and load again, as `nft list ruleset >/etc/nftables.conf` does while they are open.

use std::fs;
use std::time::Duration;

use crate::lab::{FAMILIES, Family, Lab, echoes, eventually, succeeds};
use crate::seconds_left;

/// Long enough to be saved, on a slow machine too.
const SHORT: &str = "40s";

/// A table that nobody owns, as before Linux 6.9; doors of both kinds; sets of the administrator's.
fn lab(open_for: &str) -> Lab {
    let lab = Lab::network();
    lab.server.nft(&[
        "add table inet knockq; add table inet mine; add set inet mine v4 { type ipv4_addr; flags timeout; }; \
                      add set inet mine v6 { type ipv6_addr; flags timeout; }",
    ]);
    lab.configure(&format!(
        "[services.ssh]\nports = [\"tcp/22\"]\nopen_for = \"{open_for}\"\n\
         [services.mail]\nports = [\"tcp/25\"]\nopen_for = \"{open_for}\"\nonce = true\n"
    ));
    lab.add_user("alice", &["ssh", "mail"]);
    lab.edit("users.d/alice.toml", "services", "add_to = [\"inet mine v4\", \"inet mine v6\"]\nservices");
    [22, 25].into_iter().for_each(|port| lab.server.serve(port));
    lab
}

impl Lab {
    /// Alice opens all that she can, and somebody saves it.
    fn save_doors(&self) -> String {
        for family in FAMILIES {
            for service in ["ssh", "mail"] {
                succeeds(&self.knockq(&self.alice, &["send", "server", service, family.flag()]));
            }
        }
        eventually("two doors and an element of a set, over each family", || self.daemons().len() == 6);
        format!("flush ruleset\n{}", self.server.nft(&["list", "ruleset"]))
    }

    fn load_saved(&self, saved: &str) {
        let file = self.directory.path.join("saved.nft");
        fs::write(&file, saved).unwrap();
        self.server.nft(&["-f", file.to_str().unwrap()]);
    }

    fn load_the_gate(&self) {
        self.control(&["ruleset", "--load", "--config", self.config().to_str().unwrap()]);
    }

    /// The elements that say that they are the daemon's, wherever they are.
    fn daemons(&self) -> Vec<String> {
        let listing = self.server.sh("nft list ruleset 2>/dev/null || true");
        let elements = listing.split(['{', ',', '}']).map(str::trim);
        elements.filter(|element| element.contains("comment \"alice ")).map(str::to_owned).collect()
    }

    #[track_caller]
    fn is_all_shut(&self) {
        eventually("the end of all that was loaded", || self.daemons().is_empty());
        for family in FAMILIES {
            assert!(!self.alice.reaches(family.server(), 22) && !self.alice.reaches(family.server(), 25));
        }
    }
}

#[test]
fn what_was_saved_while_doors_were_open_opens_none_when_their_time_is_over() {
    let lab = lab(SHORT);
    let daemon = lab.start();
    let saved = lab.save_doors();
    eventually("the end of their time", || lab.daemons().is_empty());
    lab.load_saved(&saved);
    lab.is_all_shut();
    eventually("the line", || {
        daemon.log().contains("shut: somebody else has loaded doors whose grants are over doors=")
    });
    daemon.stop();

    lab.load_saved(&saved);
    assert_eq!(lab.daemons().len(), 6);
    let daemon = lab.start();
    assert!(lab.daemons().is_empty(), "before it is ready");
    lab.is_all_shut();
    daemon.stop();

    lab.load_saved(&saved);
    lab.load_the_gate();
    assert!(lab.daemons().is_empty());
    lab.is_all_shut();
}

#[test]
fn doors_of_another_boot_or_without_an_end_or_for_ever_are_shut() {
    let lab = lab("1h");
    let daemon = lab.start();
    let saved = lab.save_doors();
    let comment = |element: &String| element.split('"').nth(1).unwrap().to_owned();
    let boot = comment(&lab.daemons()[0]).split(' ').nth(3).unwrap().to_owned();
    let words = |from: &str, to: &str| {
        assert!(saved.contains(from), "{saved}");
        saved.replace(from, to)
    };
    let mut cases = vec![words(&boot, "00c0ffee")];
    let (mut old, mut for_ever) = (saved.clone(), saved.clone());
    for element in lab.daemons() {
        let said = comment(&element);
        old = old.replace(&said, &said.split(' ').take(2).collect::<Vec<_>>().join(" "));
        let (key, _) = element.split_once(" timeout ").unwrap();
        for_ever = for_ever.replace(&element, &format!("{key} comment \"{said}\""));
    }
    // The limit of a set for one connection is in its elements.
    assert!(!old.contains(&boot), "{old}");
    cases.push(old);
    cases.push(for_ever);
    lab.revoke(&["--all"]);
    lab.is_all_shut();
    for saved in &cases {
        lab.load_saved(saved);
        lab.is_all_shut();
    }
    daemon.stop();
    for saved in &cases {
        lab.load_saved(saved);
        assert_eq!(lab.daemons().len(), 6);
        let daemon = lab.start();
        assert!(lab.daemons().is_empty(), "{saved}");
        daemon.stop();
        lab.load_saved(saved);
        lab.load_the_gate();
        assert!(lab.daemons().is_empty(), "{saved}");
    }
}

#[test]
fn a_revoked_door_that_was_saved_stays_shut_with_the_daemon_and_without() {
    let lab = lab("1h");
    let daemon = lab.start();
    let saved = lab.save_doors();
    std::thread::sleep(Duration::from_secs(3)); // so that what is loaded outlasts its grant
    lab.revoke(&["--user", "alice"]);
    lab.load_saved(&saved);
    lab.is_all_shut();
    daemon.stop();
    lab.load_saved(&saved);
    let daemon = lab.start();
    assert!(lab.daemons().is_empty());
    lab.is_all_shut();
    daemon.stop();
    lab.load_saved(&saved);
    lab.load_the_gate();
    assert!(lab.daemons().is_empty());
}

#[test]
fn a_door_whose_grant_lives_has_the_time_of_its_grant_after_a_load_and_one_for_one_connection_is_shut() {
    let lab = lab("1h");
    let daemon = lab.start();
    let saved = lab.save_doors();
    for family in FAMILIES {
        drop(lab.alice.gets_in(family.server(), 25)); // spent
    }
    std::thread::sleep(Duration::from_secs(5));
    let left = |family: Family| lab.door(family.alice(), 22).map(|door| seconds_left(&door));
    let before = FAMILIES.map(|family| left(family).unwrap());
    lab.load_saved(&saved);
    eventually("the end of doors that may be spent", || {
        FAMILIES.iter().all(|family| lab.door(family.alice(), 25).is_none())
    });
    for (family, before) in FAMILIES.into_iter().zip(before) {
        eventually("the time of the grant", || left(family).is_some_and(|left| left <= before + 0.5));
        assert!(left(family).unwrap() > 3000.0);
        assert!(lab.alice.reaches(family.server(), 22) && !lab.alice.reaches(family.server(), 25));
    }
    // What the daemon itself adds is told too, and no change by others.
    let told = || daemon.log().matches("somebody else").count();
    let before = told();
    for family in FAMILIES {
        succeeds(&lab.knockq(&lab.alice, &["send", "server", "mail", family.flag()]));
        lab.wait_for_door(family.alice(), 25);
    }
    std::thread::sleep(Duration::from_secs(2));
    assert!(FAMILIES.iter().all(|family| lab.door(family.alice(), 25).is_some()));
    assert_eq!(told(), before, "{}", daemon.log());
    // And the next daemon has them as they are.
    let doors = lab.daemons().len();
    daemon.stop();
    let _daemon = lab.start();
    assert_eq!(lab.daemons().len(), doors);
    assert!(FAMILIES.iter().all(|family| lab.alice.reaches(family.server(), 25)));
}

/// What the kernel notes of a SYN that passed lets the same one pass for a minute: of another minute it is worth nothing.
#[test]
fn what_was_saved_of_syns_that_were_let_in_lets_none_in() {
    let lab = lab("1h");
    let daemon = lab.start();
    for family in FAMILIES {
        succeeds(&lab.knockq(&lab.alice, &["send", "server", "ssh", family.flag()]));
        lab.wait_for_door(family.alice(), 22);
    }
    // Noted by hand: what the kernel notes itself goes with the handshake.
    let begun = "add element inet knockq sequences { 7 }; \
                 add element inet knockq begun4 { 10.77.1.2 . 10.77.1.1 . tcp . 40000 . 22 }; \
                 add element inet knockq begun6 { fd77:1::2 . fd77:1::1 . tcp . 40000 . 22 }";
    let noted = || {
        let sets = ["sequences", "begun4", "begun6"];
        sets.map(|set| lab.server.sh(&format!("nft list set inet knockq {set}")).matches("expires").count())
    };
    lab.server.nft(&[begun]);
    eventually("the end of what others have noted", || noted() == [0; 3]);
    let saved = lab.server.nft(&["list", "ruleset"]);
    lab.load_saved(&format!("flush ruleset\n{saved}\n{begun}"));
    eventually("the end of what was loaded", || noted() == [0; 3]);
    daemon.stop();
    lab.server.nft(&[begun]);
    assert_eq!(noted(), [1; 3]);
    lab.load_the_gate();
    assert_eq!(noted(), [0; 3]);
}

/// Such a door has two elements.
#[test]
fn a_connection_that_ends_with_its_door_for_one_lives_on_after_a_load_and_none_begins() {
    let lab = lab("1h");
    lab.edit("knockq.toml", "once = true", "once = true\non_close = \"kill\"");
    let _daemon = lab.start();
    for family in FAMILIES {
        succeeds(&lab.knockq(&lab.alice, &["send", "server", "mail", family.flag()]));
        lab.wait_for_door(family.alice(), 25);
    }
    let saved = format!("flush ruleset\n{}", lab.server.nft(&["list", "ruleset"]));
    let mut connections = FAMILIES.map(|family| lab.alice.gets_in(family.server(), 25));
    std::thread::sleep(Duration::from_secs(2));
    let listed = |set: &str| lab.server.sh(&format!("nft list set inet knockq {set} 2>/dev/null || true"));
    lab.load_saved(&saved);
    eventually("the end of doors that may be spent", || {
        ["once4", "once6"].iter().all(|set| listed(set).contains(set) && !listed(set).contains("expires"))
    });
    for (family, connection) in FAMILIES.into_iter().zip(&mut connections) {
        eventually("its time", || listed(if family == Family::V4 { "live4" } else { "live6" }).contains("expires"));
        assert!(echoes(connection), "{}", listed("live4"));
        assert!(!lab.alice.reaches(family.server(), 25));
    }
    lab.revoke(&["--all"]);
    lab.load_saved(&saved);
    eventually("the end of all that was loaded", || lab.daemons().is_empty());
    for connection in &mut connections {
        connection.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        assert!(!echoes(connection));
    }
}

#[test]
fn elements_of_the_administrators_own_stay_whoever_loads_them_and_when() {
    let lab = lab("1h");
    let daemon = lab.start();
    let own = "add element inet knockq open4 { 10.77.1.2 . tcp . 22 timeout 1h }; \
               add element inet knockq open6 { fd77:1::2 . tcp . 22 timeout 1h comment \"my own laptop\" }; \
               add element inet mine v4 { 10.77.1.2 timeout 1h comment \"laptop\" }; \
               add element inet mine v6 { fd77:1::2 timeout 1h }";
    let are_there = || {
        for (family, set) in [(Family::V4, "v4"), (Family::V6, "v6")] {
            assert!(lab.door(family.alice(), 22).is_some() && lab.alice.reaches(family.server(), 22));
            assert!(lab.server.nft(&["list", "set", "inet", "mine", set]).contains(&family.alice().to_string()));
        }
    };
    lab.server.nft(&[own]);
    lab.revoke(&["192.0.2.1"]); // what was heard before is done
    are_there();
    daemon.stop();
    lab.load_the_gate();
    are_there();
    let _daemon = lab.start();
    are_there();
}

#[test]
fn doors_that_do_not_say_when_they_end_are_adopted_by_the_first_daemon_that_says_so_and_by_no_later_one() {
    let lab = lab("1h");
    lab.start().stop();
    let old = "add element inet knockq open4 { 10.77.1.2 . tcp . 22 timeout 10m comment \"alice ssh\" }; \
               add element inet knockq open6 { fd77:1::2 . tcp . 22 timeout 10m comment \"alice ssh bound\" }; \
               add element inet knockq once4 { 10.77.1.2 . tcp . 25 timeout 10m comment \"alice mail\" }; \
               add element inet knockq once6 { fd77:1::2 . tcp . 25 timeout 10m comment \"alice mail\" }";
    let file = lab.config().with_file_name("knockq.nft");
    let of_now = fs::read_to_string(&file).unwrap();
    let of_before: Vec<&str> = of_now.lines().filter(|line| !line.contains("say when their grants end")).collect();
    fs::write(&file, of_before.join("\n") + "\n").unwrap();
    lab.server.nft(&[old]);
    lab.load_the_gate(); // as its unit does, before the daemon
    assert_eq!(lab.daemons().len(), 4);
    let daemon = lab.start();
    for family in FAMILIES {
        let door = lab.door(family.alice(), 22).unwrap();
        assert!(seconds_left(&door) <= 600.0 && !door.contains("ssh\"") && !door.contains("ssh bound\""), "{door}");
        assert!(lab.alice.reaches(family.server(), 22) && lab.alice.reaches(family.server(), 25));
    }
    assert!(lab.door(Family::V6.alice(), 22).unwrap().contains(" bound\""));
    daemon.stop();
    let daemon = lab.start();
    assert!(FAMILIES.iter().all(|family| lab.door(family.alice(), 22).is_some()), "they say it by now");
    lab.revoke(&["--all"]);
    daemon.stop();
    lab.server.nft(&[old]);
    let daemon = lab.start();
    lab.is_all_shut();
    daemon.stop();
    lab.server.nft(&[old]);
    lab.load_the_gate();
    lab.is_all_shut();
}

/// The command that docs/guide-server.md gives.
#[test]
fn what_the_guide_says_saves_all_tables_but_knockqs_and_is_loaded_while_doors_are_open() {
    let guide = include_str!("../../docs/guide-server.md");
    let (_, guide) = guide.split_once("## Saving the firewall").unwrap();
    let (command, _) = guide.split_once("\n## ").unwrap();
    let command: String = command.lines().filter_map(|line| line.strip_prefix("    ")).collect::<Vec<_>>().join("\n");
    let lab = Lab::with("open_for = \"1h\"");
    lab.server.nft(&["add table ip6 mine; add table inet knockq_mine; add table inet mine; add chain inet mine c; \
                      add rule inet mine c tcp dport 80 counter accept; add set inet mine s { type inet_service; }; \
                      add element inet mine s { 7 }"]);
    let daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    let file = lab.directory.path.join("nftables.conf");
    lab.server.sh(&command.replace("/etc/nftables.conf", file.to_str().unwrap()));
    let saved = fs::read_to_string(&file).unwrap();
    assert!(!saved.contains("table inet knockq ") && saved.contains("table inet knockq_mine {"), "{saved}");
    let others = || {
        let listing = lab.server.nft(&["list", "ruleset"]);
        let tables = listing.split("table ").filter(|table| !table.starts_with("inet knockq "));
        tables.map(|table| table.trim().to_owned()).filter(|table| !table.is_empty()).collect::<Vec<_>>()
    };
    let before = others();
    lab.server.nft(&["delete table inet mine"]);
    for _ in 0..2 {
        lab.server.nft(&["-f", file.to_str().unwrap()]);
        eventually("all tables", || others() == before);
        for family in FAMILIES {
            eventually("the gate", || !lab.mallory.reaches(family.server(), 22));
            lab.wait_for_door(family.alice(), 22);
            assert!(lab.alice.reaches(family.server(), 22));
        }
    }
    drop(daemon);
}
