//! The table in the kernel: loaded, deleted, loaded again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{fs, thread};

use knockq::crypto::{Binding, KnockPorts};
use knockq::packet::Flow;
use nix::sys::signal::Signal;

use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually, succeeds};
use crate::recorded::persona;
use crate::{UntilDropped, daemon_owned_the_table, raw_socket, seconds_left, send_raw, unix_now};

#[test]
fn the_include_file_applied_again_doubles_no_rule_and_keeps_open_doors() {
    let lab = Lab::with("open_for = \"1h\"");
    let daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    daemon.stop();
    let shape = || {
        let listing = lab.server.nft(&["list", "table", "inet", "knockq"]);
        listing.lines().filter(|line| !line.contains("expires")).map(str::to_owned).collect::<Vec<_>>()
    };
    let before = shape();
    let config = lab.config().display().to_string();
    let file = lab.directory.path.join("again.nft");
    let printed = succeeds(&lab.knockq(&lab.server, &["ruleset", "--config", &config]));
    // nft cannot name the flags of a table that persists, so there (Linux 6.9) the line that adds it must go
    let persists = daemon_owned_the_table(&lab);
    fs::write(&file, if persists { printed.replace("add table inet knockq\n", "") } else { printed }).unwrap();
    for _ in 0..2 {
        lab.server.nft(&["-f", file.to_str().unwrap()]);
    }
    assert_eq!(shape(), before);
    for family in FAMILIES {
        assert!(lab.door(family.alice(), 22).is_some());
        assert!(lab.alice.reaches(family.server(), 22));
    }
    let _daemon = lab.start();
    assert!(FAMILIES.iter().all(|family| lab.door(family.alice(), 22).is_some()), "a start keeps them too");
}

#[test]
fn a_table_that_somebody_deletes_is_back_at_once_with_its_open_doors() {
    let lab = Lab::with("open_for = \"1h\"");
    let daemon = lab.start();
    for (number, family) in FAMILIES.into_iter().enumerate() {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
        lab.server.sh("nft flush ruleset");
        // Linux 6.9 and newer leave the table alone; elsewhere it is loaded again
        eventually("the gate", || !lab.mallory.reaches(family.server(), 22));
        if !daemon.log().contains("the table is owned") {
            eventually("the restoration", || daemon.log().matches("it is loaded again").count() == number + 1);
        }
        let element = lab.wait_for_door(family.alice(), 22);
        assert!(element.contains("comment \"alice ssh "), "{element}");
        assert!(lab.alice.reaches(family.server(), 22), "open doors are open again");
        assert!(!lab.mallory.reaches(family.server(), 22));
    }
}

#[test]
fn a_table_that_is_deleted_under_a_flood_with_many_doors_open_is_back_with_all_of_them() {
    let lab = Lab::with("open_for = \"1h\"");
    lab.set("window = \"10m\"");
    let daemon = lab.start();
    let key = lab.alice_key();
    let ports = KnockPorts::new([20_000..=21_023]).unwrap();
    let persona = persona(true);
    let syn = |source: [u8; 4], port, sequence, tsval| {
        let flow = Flow {
            source: source.into(),
            source_port: 40_000,
            destination: Family::V4.server(),
            destination_port: port,
        };
        persona.syn(&flow, sequence, tsval).unwrap()
    };
    // Each from an address of its own. Telling of 128 would overflow a socket's usual buffer.
    let doors = 110_u8;
    let first = unix_now() - 300;
    lab.alice.enter(|| {
        let socket = raw_socket(Family::V4);
        for place in 0..doors {
            let n = first + u64::from(place);
            let token = key.seal(n, 22, Binding::Unbound);
            let source = [10, 99, 0, place];
            send_raw(&socket, Family::V4, &syn(source, key.pad(n).knock_port(&ports), token.sequence, token.tsval));
            thread::sleep(Duration::from_millis(10));
        }
    });
    let open = || lab.server.nft(&["list", "set", "inet", "knockq", "open4"]).matches("expires").count();
    eventually("all doors", || open() == usize::from(doors));
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let until_dropped = UntilDropped(&is_over);
        // bounded: 50,000 SYNs at most, so that some are queued whenever the table goes
        scope.spawn(|| {
            lab.mallory.enter(|| {
                let socket = raw_socket(Family::V4);
                for number in (0..50_000_u32).take_while(|_| !is_over.load(Ordering::Relaxed)) {
                    let packet = syn([10, 77, 2, 2], 20_000, number, number);
                    send_raw(&socket, Family::V4, &packet);
                }
            });
        });
        for _ in 0..5 {
            lab.server.sh("nft flush ruleset");
            eventually("all doors again", || {
                let listing = lab.server.sh("nft list set inet knockq open4 2>/dev/null || true");
                listing.matches("expires").count() == usize::from(doors)
            });
        }
        drop(until_dropped);
    });
    thread::sleep(Duration::from_secs(1));
    assert!(!lab.mallory.reaches(Family::V4.server(), 22), "the gate stands");
    let restored = daemon.log().matches("it is loaded again").count();
    assert!(restored <= 10, "it was loaded {restored} times for 5 deletions");
}

#[test]
fn a_queue_or_table_that_is_taken_is_named_and_nothing_changes() {
    let lab = Lab::new();
    let _daemon = lab.start();
    let before = lab.server.nft(&["list", "ruleset"]);
    let mut second = Daemon::spawn(&lab, &[]);
    assert_eq!(second.end(), Some(1));
    assert!(second.log().contains("queue 4097: already bound by process"), "{}", second.log());
    assert!(second.log().contains("Hint: "), "{}", second.log());
    assert_eq!(lab.server.nft(&["list", "ruleset"]), before);
    lab.knock(Family::V4, &[]);
    lab.wait_for_door(Family::V4.alice(), 22);
}

#[test]
fn a_table_that_nft_cannot_fill_stops_the_start_and_changes_nothing() {
    let lab = Lab::new();
    lab.server.sh("nft 'add table inet knockq; add set inet knockq open4 { type ipv4_addr; }'");
    let before = lab.server.nft(&["list", "ruleset"]);
    let mut daemon = Daemon::spawn(&lab, &[]);
    assert_eq!(daemon.end(), Some(1));
    let log = daemon.log();
    assert!(log.contains("knockq: nft: ") && log.contains("open4") && log.contains("Hint: "), "{log}");
    assert!(!log.contains("CONFIG_NFT_QUEUE"), "another cause: {log}");
    assert_eq!(lab.server.nft(&["list", "ruleset"]), before);
}

#[test]
fn an_external_table_is_checked_and_never_touched() {
    let lab = Lab::with("open_for = \"1h\"");
    lab.set("ruleset = \"external\"");
    let include_file = lab.config().with_file_name("knockq.nft");

    let mut daemon = Daemon::spawn(&lab, &[]);
    assert_eq!(daemon.end(), Some(1));
    assert!(
        daemon.log().contains("table inet knockq is not there") && daemon.log().contains("Hint: "),
        "{}",
        daemon.log()
    );
    assert_eq!(lab.server.nft(&["list", "ruleset"]), "", "it is for others to load");

    lab.load_include_file();
    let mut daemon = lab.start();
    for family in FAMILIES {
        assert!(!lab.alice.reaches(family.server(), 22));
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }

    // As `systemctl reload nftables` does it: all is gone and back in one transaction.
    let reloaded = format!("flush ruleset\ninclude \"{}\"\n", include_file.display());
    let nftables_conf = lab.directory.path.join("nftables.conf");
    fs::write(&nftables_conf, reloaded).unwrap();
    lab.server.nft(&["-f", nftables_conf.to_str().unwrap()]);
    for family in FAMILIES {
        let element = lab.wait_for_door(family.alice(), 22);
        assert!(seconds_left(&element) > 3000.0, "with the time that was left: {element}");
    }

    // Somebody's mistake is told once, and what they do about it too.
    lab.server.nft(&["flush", "chain", "inet", "knockq", "gate"]);
    daemon.wait_for("until it is loaded, guarded ports may be open");
    thread::sleep(Duration::from_secs(3));
    assert_eq!(daemon.log().matches("guarded ports may be open").count(), 1, "{}", daemon.log());
    lab.load_include_file();
    daemon.wait_for("table inet knockq is as it should be again");

    // A changed configuration waits for its table.
    lab.set("trusted = [\"192.0.2.0/24\"]");
    daemon.signal(Signal::SIGHUP);
    daemon.wait_for("not reloaded: table inet knockq is not there, or not that of this configuration");
    daemon.wait_for("stays in force hint=\"knockq ruleset --output ");
    lab.load_include_file();
    daemon.signal(Signal::SIGHUP);
    daemon.wait_for("engine: reloaded");
    for family in FAMILIES {
        assert!(lab.door(family.alice(), 22).is_some());
        assert!(lab.alice.reaches(family.server(), 22) && !lab.mallory.reaches(family.server(), 22));
    }
}

#[test]
fn the_boot_loads_the_last_gate_whatever_the_configuration_is_like() {
    let lab = Lab::with("open_for = \"1h\"");
    let config = lab.config().display().to_string();
    lab.start().stop();
    lab.server.sh("nft delete table inet knockq"); // as a boot does
    lab.set("no_such_key = 1");
    let load = ["ruleset", "--load", "--config", &config];
    lab.control(&load);
    for family in FAMILIES {
        assert!(!lab.alice.reaches(family.server(), 22) && !lab.alice.reaches(family.server(), 25));
    }
    lab.control(&load); // once more does no harm
    let text = fs::read_to_string(lab.config()).unwrap();
    fs::write(lab.config(), text.replace("no_such_key = 1\n", "")).unwrap();
    let daemon = lab.start();
    assert_eq!(daemon.log().contains("the table is owned"), !daemon.log().contains("others can flush the gate"));
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    daemon.stop();
    fs::remove_file(lab.config().with_file_name("knockq.nft")).unwrap();
    let missing = lab.knockq(&lab.server, &load);
    let said = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert!(!missing.status.success() && said.contains("knockq.nft: ") && said.contains("Hint: "), "{said}");
}

#[test]
fn a_table_that_was_edited_is_not_taken_for_that_of_the_configuration() {
    let lab = Lab::new();
    lab.set("ruleset = \"external\"");
    lab.set("trusted = [\"192.0.2.0/24\"]");
    let config = lab.config().display().to_string();
    let text = lab.control(&["ruleset", "--config", &config]);
    let edited = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        text.replace(from, to)
    };
    for edit in [
        edited("queue num 4097", "queue num 4097 bypass"),
        edited("1/week burst 1 packets", "1/second burst 100 packets"),
        edited("priority dstnat - 10", "priority dstnat + 10"),
        edited("add rule inet knockq refuse drop\n", ""),
        edited("gate iif lo accept", "gate iif != lo accept"),
        edited("tcp sequence @sequences ", ""),
        format!("{text}insert rule inet knockq gate accept\n"),
        format!("{text}add element inet knockq trusted6 {{ ::/0 }}\n"),
        format!("{text}delete element inet knockq guarded {{ tcp . 25 }}\n"),
        format!("{text}# and then\nadd table inet knockq {{ flags dormant; }}\n"),
    ] {
        lab.server.sh("nft delete table inet knockq 2>/dev/null || true");
        let path = lab.directory.path.join("edited.nft");
        for transaction in edit.split("# and then\n") {
            fs::write(&path, transaction).unwrap();
            lab.server.nft(&["-f", path.to_str().unwrap()]);
        }
        let mut daemon = Daemon::spawn(&lab, &[]);
        assert_eq!(daemon.end(), Some(1), "{edit}");
        assert!(daemon.log().contains("not that of this configuration"), "{}", daemon.log());
    }
}

#[test]
fn each_edit_of_a_table_that_nobody_owns_is_undone_once() {
    let lab = Lab::new();
    lab.set("trusted = [\"192.0.2.0/24\"]");
    let daemon = lab.start();
    let listing = || lab.server.nft(&["list", "table", "inet", "knockq"]);
    let right = listing();
    for edit in [
        "insert rule inet knockq gate accept",
        "add element inet knockq trusted4 { 203.0.113.0/24 }",
        "delete element inet knockq guarded { tcp . 22 }",
        "add table inet knockq { flags dormant; }",
        "flush chain inet knockq door",
    ] {
        let told = || daemon.log().matches("it is loaded again").count();
        let before = told();
        lab.server.sh(&format!("nft '{edit}' 2>/dev/null || true"));
        eventually(edit, || listing() == right);
        let times = if daemon_owned_the_table(&lab) { 0 } else { 1 }; // an owned one cannot be edited
        eventually("the line", || told() - before >= times);
        thread::sleep(Duration::from_millis(500));
        assert_eq!(told() - before, times, "{edit}");
        assert!(!lab.mallory.reaches(Family::V4.server(), 22));
    }
}

#[test]
fn a_table_that_is_deleted_again_while_it_is_loaded_comes_back() {
    let lab = Lab::new();
    let _daemon = lab.start();
    for round in 0..30 {
        let pause = f64::from(round) * 0.002;
        let delete = "nft delete table inet knockq 2>/dev/null || true";
        lab.server.sh(&format!("{delete}; sleep {pause}; {delete}"));
        eventually("the table", || lab.server.sh("nft list tables").contains("inet knockq"));
    }
    eventually("the gate", || FAMILIES.iter().all(|family| !lab.mallory.reaches(family.server(), 22)));
}

/// The boot has loaded it as a table that a daemon may own. But then nftables.conf could not load it again.
#[test]
fn an_external_table_is_never_owned() {
    let lab = Lab::with("open_for = \"1h\"");
    lab.set("ruleset = \"external\"");
    let config = lab.config().display().to_string();
    let file = lab.config().with_file_name("knockq.nft");
    fs::write(&file, lab.control(&["ruleset", "--config", &config])).unwrap();
    lab.control(&["ruleset", "--load", "--config", &config]);
    let daemon = lab.start();
    assert!(!daemon.log().contains("table is owned"), "{}", daemon.log());
    lab.knock(Family::V4, &[]);
    lab.wait_for_door(Family::V4.alice(), 22);
    let nftables_conf = lab.directory.path.join("nftables.conf");
    fs::write(&nftables_conf, format!("flush ruleset\ninclude \"{}\"\n", file.display())).unwrap();
    lab.server.nft(&["-f", nftables_conf.to_str().unwrap()]);
    lab.wait_for_door(Family::V4.alice(), 22);
}

#[test]
fn a_part_of_an_include_file_is_not_loaded_at_the_boot() {
    let lab = Lab::new();
    let config = lab.config().display().to_string();
    lab.start().stop();
    lab.server.sh("nft delete table inet knockq");
    let file = lab.config().with_file_name("knockq.nft");
    let whole = fs::read_to_string(&file).unwrap();
    let (half, _) = whole.split_once("add rule inet knockq door").unwrap();
    let without_last = whole.replace("add rule inet knockq refuse drop\n", "");
    let not_whole = ["# nothing\n", half, &without_last].map(|part| (part, "knockq.nft: is not whole"));
    for (part, line) in [("", "knockq.nft: is empty")].into_iter().chain(not_whole) {
        fs::write(&file, part).unwrap();
        let ran = lab.knockq(&lab.server, &["ruleset", "--load", "--config", &config]);
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert!(ran.status.code() == Some(78) && said.contains(line), "{said}");
        assert_eq!(lab.server.nft(&["list", "tables"]), "");
    }
}
