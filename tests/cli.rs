//! The commands as people type them: what they print, how they end, and what they leave behind.

#[path = "support/tree.rs"]
mod tree;
#[path = "support/world.rs"]
mod world;

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use knockq::crypto::PrivateKey;
use knockq::serve::store::{Store, StoreFloor};
use world::{KNOCKQ, Ran, World, json};

#[test]
fn init_makes_all_files_with_safe_modes_and_says_what_comes_next() {
    let world = World::empty();
    let said = world.init(&["--protect", "tcp/22", "--protect", "udp/51820"]).succeeds();
    for step in ["knockq keygen", "knockq user add", "knockq host add", "knockq serve", "knockq send"] {
        assert!(said.contains(step), "{said}");
    }
    for (file, mode) in [
        ("etc", 0o700),
        ("etc/server.key", 0o600),
        ("etc/knockq.toml", 0o644),
        ("etc/knockq.nft", 0o644),
        ("etc/users.d", 0o700),
        ("state", 0o700),
        ("state/counters.redb", 0o600),
    ] {
        let permissions = fs::metadata(world.path(file)).unwrap().permissions();
        assert_eq!(permissions.mode() & 0o7777, mode, "{file}");
    }
    let ruleset = fs::read_to_string(world.path("etc/knockq.nft")).unwrap();
    assert!(ruleset.contains("guarded { tcp . 22, udp . 51820 }"), "{ruleset}");
    assert!(world.check().succeeds().contains("ok (services 2, users 0, knock ports 1024)"));
    let key = fs::read_to_string(world.path("etc/server.key")).unwrap();
    assert!(!said.contains(key.trim_end()), "the private key is never printed");
}

#[test]
fn init_names_common_services_as_usual_where_the_system_knows_no_names_and_as_the_system_does_where_it_does() {
    for (etc, name) in [(&[][..], "ssh"), (&[("services", "shell-of-mine\t22/tcp\nssh 2222/tcp\n")], "shell-of-mine")] {
        let world = World::empty();
        let directories =
            ["--dir", &world.text("etc"), "--state", &world.text("state"), "--runtime", &world.text("run")];
        let ports = ["--protect", "tcp/22", "--protect", "tcp/587", "--protect", "udp/51820", "--address", "192.0.2.1"];
        world.on_host(etc, &world.path, &[&["init"], &directories[..], &ports].concat()).succeeds();
        let config = fs::read_to_string(world.config()).unwrap();
        for name in [name, "submission", "udp-51820"] {
            assert!(config.contains(&format!("[services.{name}]\n")), "no {name}: {config}");
        }
    }
}

#[test]
fn init_overwrites_nothing_and_leaves_nothing_behind_when_it_fails() {
    let world = World::new();
    let before: Vec<Vec<u8>> = world.files().iter().map(|file| fs::read(file).unwrap()).collect();
    world.init(&["--protect", "tcp/22"]).fails(78, &["server.key: exists already", "Hint: "]);
    let after: Vec<Vec<u8>> = world.files().iter().map(|file| fs::read(file).unwrap()).collect();
    assert_eq!(before, after);

    let world = World::empty();
    world
        .init(&["--protect", "tcp/22", "--knock-ports", "20-30"])
        .fails(64, &["--knock-ports: tcp/22 is to be guarded", "Hint: "]);
    assert_eq!(world.files(), Vec::<PathBuf>::new(), "nothing half-written");
}

#[test]
fn words_that_are_wrong_are_usage_errors() {
    let world = World::empty();
    world.run(&[]).fails(64, &["Usage"]);
    world.run(&["knock"]).fails(64, &["knock"]);
    world.run(&["send"]).fails(64, &["HOST"]);
    world.run(&["send", "home", "--stealthy"]).fails(64, &["--stealthy"]);
    world.run(&["send", "home", "-4", "-6"]).fails(64, &["cannot be used with"]);
    world.run(&["send", "home", "--source", "here"]).fails(64, &["not an IP address, nor `none`"]);
    world.run(&["revoke", "alice"]).fails(64, &["`alice` is no network", "; for a user: --user alice"]);
    let said = world.run(&["revoke", "192.0.2"]);
    assert!(!said.errors().contains("--user 192.0.2"), "{}", said.errors());
    said.fails(64, &["`192.0.2` is no network: write 192.0.2.0/24"]);
    world.init(&["--protect", "22"]).fails(64, &["`22` is not a port"]);
    world.init(&["--protect", "tcp/22", "--knock-ports", "9-1"]).fails(64, &["`9-1` is no range of ports"]);
    world.run(&["keygen", "../x"]).fails(64, &["../x"]);
    world.run(&["host", "add", "../x", "-"]).fails(64, &["is not a name"]);
    assert!(world.run(&["--help"]).succeeds().contains("Exit codes"));
    for command in ["init", "check", "doctor", "ruleset", "serve", "recover", "keygen", "send", "proxy"] {
        assert!(world.run(&[command, "--help"]).succeeds().contains("Example"), "{command} --help has no example");
    }
    for (command, words) in [
        ("user", &["add", "invite", "list", "show", "remove", "rename"][..]),
        ("host", &["add", "list", "show", "remove"]),
    ] {
        for word in words {
            let help = world.run(&[command, word, "--help"]).succeeds();
            assert!(help.contains("Example"), "{command} {word} --help has no example");
        }
    }
    for arguments in [["user", "show"], ["user", "remove"], ["host", "show"], ["host", "remove"]] {
        world.run(&arguments).fails(64, &["NAME"]);
        for name in ["../x", ".x", "", "a b", "x\u{1b}"] {
            world.run(&[&arguments[..], &[name]].concat()).fails(64, &["a name"]);
        }
    }
    world.run(&["user", "rename", "alice"]).fails(64, &["NEW"]);
    world.run(&["user", "rename", "alice", "b/b"]).fails(64, &["is not a name"]);
    world.run(&["recover", "--ahead", "1w"]).fails(64, &["`1w` is no duration"]);
    world.run(&["recover", "now"]).fails(64, &["unexpected argument"]);
    world.run(&["user", "show", "alice", "--profile", "--json"]).fails(64, &["cannot be used with"]);
}

#[test]
fn what_is_missing_comes_with_the_remedy_for_it_whatever_its_name() {
    let world = World::new();
    for name in ["etc/knockq.toml.old", "etc/other.toml"] {
        let missing = world.text(name);
        world
            .run(&["check", "--config", &missing])
            .fails(78, &["No such file", "Hint: make a configuration with `knockq init"]);
    }
    let key = world.path("etc/server.key");
    for damage in [Some("AAAA\n"), None] {
        damage.map_or_else(|| fs::remove_file(&key), |text| fs::write(&key, text)).unwrap();
        world.check().fails(78, &["server.key: ", "Hint: restore it from a backup; with another key every user needs"]);
    }
}

#[test]
fn a_setting_that_no_table_knows_belongs_nowhere() {
    let world = World::new();
    for field in ["trustd", "\"a b\"", "\"\\u001b\"", "\"`trusted`\""] {
        world.edit("etc/knockq.toml", "open_for = \"30s\"", &format!("open_for = \"30s\"\n{field} = 1\n#"));
        let ran = world.check();
        assert!(!ran.errors().contains("belongs"), "{}", ran.errors());
        ran.fails(78, &["unknown field"]);
        world.edit("etc/knockq.toml", &format!("{field} = 1\n#"), "#");
    }
}

#[test]
fn several_services_in_one_option_are_refused_with_what_to_write() {
    let world = World::new();
    for command in [["user", "add", "bob", "--key", OTHER_KEY].as_slice(), &["user", "invite", "bob"]] {
        let said = world.run(&[command, &["--allow", "ssh, mail"]].concat());
        said.fails(64, &["once for each service: --allow ssh --allow mail"]);
    }
    world
        .run(&["import", "knockknock", "profiles", "--allow", "ssh=22,web=443"])
        .fails(64, &["once for each service: --allow ssh=22 --allow web=443"]);
}

#[test]
fn check_warns_of_an_account_that_is_missing() {
    let world = World::new();
    let config = fs::read_to_string(world.path("etc/knockq.toml")).unwrap();
    fs::write(world.path("etc/knockq.toml"), config.replace("[server]", "[server]\nuser = \"nobody-of-this-name\""))
        .unwrap();
    let ran = world.check();
    ran.succeeds();
    for account in ["nobody-of-this-name", "nobody-of-this-name-gate"] {
        assert!(ran.errors().contains(&format!("warning: there is no user `{account}`")), "{}", ran.errors());
    }
}

#[test]
fn a_configuration_that_is_wrong_is_shown_with_its_place() {
    let cases: &[(&str, &str, &[&str])] = &[
        ("private_key", "private_kee", &["knockq.toml:4:1: unknown field `private_kee`", "^"]),
        ("[\"20000-21023\"]", "[\"20000-\"]", &["knockq.toml:5:15: `20000-` is no range of ports"]),
        ("[\"20000-21023\"]", "[\"1-16385\"]", &["a server has 1 to 16384 knock ports, not more"]),
        ("[\"20000-21023\"]", "[\"22\"]", &["knockq.toml:5:15: knock port 22 is guarded by service", "Hint: "]),
        ("[\"20000-21023\"]", "[\"20000-20001\", \"20001\"]", &["knock port 20001 is listed twice"]),
        ("open_for = \"30s\"", "open_for = \"30\"", &["`30` is no duration"]),
        ("open_for = \"30s\"", "open_for = \"0s\"", &["open_for must be from 1s to 365d, not 0s"]),
        ("ports    = [\"tcp/22\"]", "ports = []", &["has no port", "Hint: "]),
        ("ports    = [\"tcp/22\"]", "ports = [\"sctp/22\"]", &["`sctp/22` is not a port"]),
        ("[server]", "[server]\nwindow = \"1d\"", &["knockq.toml:4:10: window must be from 5s to 10m, not 1d"]),
        (
            "[server]",
            "[server]\ngrants_per_minute = 0",
            &["knockq.toml:4:21: grants_per_minute must be from 1 to 60000, not 0"],
        ),
        ("[server]", "[server]\ngrants_per_minute = 60001", &["grants_per_minute must be from 1 to 60000, not 60001"]),
        ("[server]", "[server]\ngrants_per_minute = \"600\"", &["knockq.toml:4:21: invalid type"]),
        ("[server]", "[server]\nanswer = \"rst\"", &["unknown variant `rst`", "`drop` or `reset`"]),
        ("[server]", "[server]\nruleset = \"mine\"", &["unknown variant `mine`", "`managed` or `external`"]),
        ("[server]", "[server]\ntrusted = [\"10.0.0.0/33\"]", &["knockq.toml:4:"]),
        ("[server]", "[server\n", &["knockq.toml:3:"]),
        ("[services.ssh]", "[services.\"a b\"]", &["`a b` is not a name"]),
        ("open_for = \"30s\"", "on_close = \"stop\"", &["unknown variant `stop`", "`keep` or `kill`"]),
        ("open_for = \"30s\"", "\n[services.two]\nports = [\"tcp/22\"]", &["have the same selector 22", "Hint: "]),
        (
            "open_for = \"30s\"",
            "trusted = [\"192.0.2.0/24\"]",
            &["unknown field `trusted`", "Hint: `trusted` belongs to [server]"],
        ),
        ("[server]", "log_closings = true\n[server]", &["unknown field `log_closings`", "belongs to [server]"]),
    ];
    for (from, to, said) in cases {
        let world = World::new();
        world.edit("etc/knockq.toml", from, to);
        world.check().fails(78, said);
        world.serve().fails(78, said);
    }
}

#[test]
fn a_service_with_more_ports_than_open_in_a_minute_is_refused_by_name() {
    let world = World::new();
    world.edit("etc/knockq.toml", "[\"tcp/22\"]", "[\"tcp/22\", \"tcp/23\", \"udp/22\"]");
    world.edit("etc/knockq.toml", "[server]\n", "[server]\ngrants_per_minute = 3\n");
    world.check().succeeds();
    world.edit("etc/knockq.toml", "grants_per_minute = 3", "grants_per_minute = 2");
    let said =
        ["has 3 ports, which open together or not at all", "grants_per_minute is 2", "Hint: grants_per_minute = 6"];
    world.check().fails(78, &said);
}

#[test]
fn a_user_that_is_wrong_is_shown_with_its_place() {
    let key = |world: &World| world.run(&["keygen", "--show"]).succeeds().trim_end().to_owned();
    let cases: &[(&str, &str, &[&str])] = &[
        ("[\"ssh\"]", "[\"mail\"]", &["alice.toml:2:15: there is no service `mail`", "Hint: services are: ssh"]),
        ("services", "servces", &["alice.toml:2:1: unknown field `servces`"]),
        ("services", "expires = 18:00:00\nservices", &["alice.toml:2:11: `18:00:00` is no date: write 2027-01-31"]),
        ("services", "expires = 5\nservices", &["alice.toml:2:11: ", "write 2027-01-31"]),
        ("services", "open_for = \"0s\"\nservices", &["alice.toml:2:12: open_for must be from 1s to 365d, not 0s"]),
        (
            "services",
            "add_to = [\"filter a\"]\nservices",
            &["alice.toml:2:", "`filter a` is no set", "`inet filter alice`"],
        ),
        ("services", "add_to = [\"inet knockq a\"]\nservices", &["table inet knockq is knockq's own"]),
        (
            "services",
            "psk_file = \"alice.psk\"\nservices",
            &["alice.toml:2:12: ", "users.d/alice.psk: there is no such file"],
        ),
        ("services", "source = \"some\"\nservices", &["alice.toml:2:10: unknown variant `some`"]),
        ("services", "from = [\"10.0.0\"]\nservices", &["alice.toml:2:", "`10.0.0` is no network"]),
    ];
    for (from, to, said) in cases {
        let world = World::new();
        world.edit("etc/users.d/alice.toml", from, to);
        world.check().fails(78, said);
    }
    let world = World::new();
    let own = key(&world);
    for (wrong, said) in [
        ("AAAA", "not a key: 3 bytes instead of 32"),
        ("%%%%", "one line of standard base64"),
        ("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", "public key is of low order"),
        ("7v///////////////////////////////////////38=", "public key is not canonical"),
    ] {
        world.edit("etc/users.d/alice.toml", &own, wrong);
        world.check().fails(78, &["alice.toml:1:14: ", said]);
        world.edit("etc/users.d/alice.toml", wrong, &own);
    }
    fs::copy(world.path("etc/users.d/alice.toml"), world.path("etc/users.d/bob.toml")).unwrap();
    world.check().fails(78, &["bob.toml:1:14: user alice has this public key already", "Hint: "]);
    fs::rename(world.path("etc/users.d/bob.toml"), world.path("etc/users.d/-rf.toml")).unwrap();
    world.check().fails(78, &["-rf.toml:1:1: `-rf` is not a name", "Hint: rename the file"]);
}

#[test]
fn a_missing_store_stops_the_server() {
    let world = World::new();
    fs::remove_file(world.path("state/counters.redb")).unwrap();
    for ran in [world.check(), world.serve()] {
        ran.fails(78, &["counters.redb: the counter store is missing", "Hint: "]);
    }
}

#[test]
fn recover_makes_a_store_that_is_lost_with_all_above_it() {
    let world = World::new();
    fs::remove_dir_all(world.path("state")).unwrap();
    world.check().fails(78, &["the counter store is missing", "Hint: ", "knockq recover"]);
    let said = world.recover(&[]).succeeds();
    assert!(said.contains("There was no old one") && said.contains("Users can knock again in 61 s"), "{said}");
    assert_eq!(world.stores(), [world.path("state/counters.redb")]);
    for (file, mode) in [("state", 0o700), ("state/counters.redb", 0o600)] {
        assert_eq!(fs::metadata(world.path(file)).unwrap().permissions().mode() & 0o7777, mode, "{file}");
    }
    world.check().succeeds();
}

#[test]
fn recover_keeps_the_old_store_and_never_lowers_its_floor() {
    let world = World::new();
    world.edit("etc/knockq.toml", "[server]\n", "[server]\nwindow = \"5m\"\n");
    let said = world.recover(&["--ahead", "2h"]).succeeds();
    assert!(said.contains("Users can knock again in 7501 s"), "{said}");
    let said = world.recover(&[]).succeeds();
    let seconds: u64 = said.split("again in ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!((7400..=7501).contains(&seconds), "{said}");
    assert_eq!(world.stores().len(), 3, "{:?}", world.stores());
    for kept in world.stores() {
        assert_eq!(fs::metadata(&kept).unwrap().permissions().mode() & 0o7777, 0o600);
        // Each is whole. In its place again, it is known to be none that knows all.
        let is_kept = kept != world.path("state/counters.redb");
        fs::rename(&kept, world.path("state/counters.redb")).unwrap();
        let checked = world.check();
        assert_eq!(checked.errors().contains("is a copy of a counter store"), is_kept, "{}", checked.errors());
        checked.succeeds();
    }
}

#[test]
fn recover_refuses_a_floor_that_no_clock_comes_to_and_names_the_way_out() {
    let world = World::new();
    let store = world.path("state/counters.redb");
    let key: PrivateKey = fs::read_to_string(world.path("etc/server.key")).unwrap().trim().parse().unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let century = now + 100 * 365 * 86_400;
    for (floor, is_refused) in
        [(u64::MAX, true), (u64::MAX - 1, true), (now + 2 * u64::from(u32::MAX), true), (century, false)]
    {
        let file = fs::File::options().read(true).write(true).create(true).truncate(true).open(&store).unwrap();
        Store::create(file, key.public(), StoreFloor { floor, since: now }).unwrap();
        let before = fs::read(&store).unwrap();
        let ran = world.recover(&[]);
        if is_refused {
            let said = format!("takes no knock up to counter {floor}, and a counter is a Unix time");
            ran.fails(78, &["counters.redb: ", &said, "Hint: ", "knockq init", "new profiles"]);
            assert_eq!(fs::read(&store).unwrap(), before);
        } else {
            ran.succeeds();
        }
    }
    assert_eq!(world.stores().len(), 2, "only the last was replaced: {:?}", world.stores());
}

#[test]
fn recover_replaces_a_store_that_is_broken_or_of_another_server() {
    let (world, other) = (World::new(), World::new());
    let store = world.path("state/counters.redb");
    let whole = fs::read(&store).unwrap();
    for contents in [&b""[..], b"garbage", &whole[..5000]] {
        fs::write(&store, contents).unwrap();
        let said = world.recover(&[]).succeeds();
        assert!(said.contains("nothing is taken over, it is kept as "), "{said}");
        world.check().succeeds();
    }
    fs::copy(other.path("state/counters.redb"), &store).unwrap();
    world.check().fails(78, &["belongs to the server key", "Hint: ", "knockq recover"]);
    world.recover(&[]).succeeds();
    world.check().succeeds();
    assert_eq!(world.stores().len(), 5);
    for page in 0..16 {
        let mut damaged = whole.clone();
        damaged[page * 4096..][..4096].fill(0x5a);
        fs::write(&store, damaged).unwrap();
        world.recover(&[]).succeeds();
        world.check().succeeds();
    }
}

#[test]
fn recover_changes_nothing_while_it_may_not() {
    let world = World::new();
    let store = world.path("state/counters.redb");
    let before = fs::read(&store).unwrap();
    let opened = fs::File::open(&store).unwrap();
    opened.try_lock().unwrap();
    world.recover(&[]).fails(1, &["recover: the daemon runs: ", "is in use", "Hint: stop it first"]);
    drop(opened);
    world.mode("state/counters.redb", 0o644);
    world.recover(&[]).fails(78, &["must not be readable by others", "Hint: chmod 600 "]);
    world.mode("state/counters.redb", 0o600);
    world.edit("etc/users.d/alice.toml", "services", "servces");
    world.recover(&[]).fails(78, &["alice.toml:2:1: unknown field"]);
    world.edit("etc/users.d/alice.toml", "servces", "services");
    let ran = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all", KNOCKQ, "recover"])
        .arg("--config")
        .arg(world.config())
        .output()
        .unwrap();
    Ran(ran).fails(77, &["ermission denied", "Hint: "]);
    assert_eq!(world.stores(), std::slice::from_ref(&store));
    assert_eq!(fs::read(&store).unwrap(), before);
}

#[test]
fn doctor_needs_root_and_a_configuration_and_says_at_once_which_is_missing() {
    let world = World::new();
    let doctor =
        |more: &[&str]| world.run(&[&["doctor", "--config", &world.config().display().to_string()], more].concat());
    let stranger = ["--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all", KNOCKQ, "doctor"];
    Ran(Command::new("setpriv").args(stranger).output().unwrap())
        .fails(77, &["doctor: needs root", "Hint: sudo knockq"]);

    world.mode("etc/server.key", 0o644);
    let ran = doctor(&[]);
    ran.fails(78, &[]);
    let said = String::from_utf8(ran.0.stdout).unwrap();
    let lines: Vec<&str> = said.lines().collect();
    assert!(
        lines[0].starts_with("problem  ") && lines[0].ends_with("must not be readable by others (mode 0644)"),
        "{said}"
    );
    assert!(lines[1].starts_with("         Hint: chmod 600 ") && said.contains("the clock is"), "{said}");
    world.mode("etc/server.key", 0o600);

    world.edit("etc/knockq.toml", "private_key", "private_kee");
    let ran = doctor(&["--json"]);
    ran.fails(78, &[]);
    let found: serde_json::Value = serde_json::from_slice(&ran.0.stdout).unwrap();
    assert!(found[0]["state"] == "problem" && found[0]["check"] == "configuration", "{found}");
    assert!(found[0]["message"].as_str().unwrap().contains("knockq.toml:4:1: unknown field `private_kee`"), "{found}");
    world.edit("etc/knockq.toml", "private_kee", "private_key");
    let said = String::from_utf8(doctor(&[]).0.stdout).unwrap();
    assert!(
        said.starts_with(&format!("ok       {}: it, its key and its users (1) can be read", world.config().display())),
        "{said}"
    );
}

#[test]
fn what_doctor_may_not_see_is_unknown_and_neither_right_nor_wrong() {
    let world = World::new();
    let config = world.config().display().to_string();
    let without = ["-n", "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", KNOCKQ, "doctor", "--json"];
    let ran = Command::new("unshare").args(without).args(["--config", &config]).output().unwrap();
    let found: Vec<serde_json::Value> = serde_json::from_slice(&ran.stdout).unwrap();
    for check in ["kernel", "table", "firewall"] {
        let of: Vec<_> = found.iter().filter(|finding| finding["check"] == check).collect();
        assert!(of.len() == 1 && of[0]["state"] == "unknown", "{found:#?}");
        assert!(of[0]["message"].as_str().unwrap().contains("Operation not permitted"), "{of:?}");
        assert_eq!(of[0]["hint"], "run this as root");
    }
}

#[test]
fn one_port_of_both_transports_is_one_service_and_one_address_is_a_network() {
    let world = World::empty();
    world.init(&["--protect", "tcp/64443", "--protect", "udp/64443"]).succeeds();
    let text = fs::read_to_string(world.config()).unwrap();
    assert!(text.contains("[services.tcp-64443]\nports    = [\"tcp/64443\", \"udp/64443\"]"), "{text}");
    world.edit("etc/knockq.toml", "[server]\n", "[server]\ntrusted = [\"203.0.113.9\", \"2001:db8::/32\"]\n");
    world.check().succeeds();
}

#[test]
fn a_state_directory_is_found_from_anywhere() {
    let world = World::empty();
    let made = world
        .command(&["init", "--protect", "tcp/22", "--dir", "etc", "--state", "state"])
        .current_dir(&world.path)
        .output()
        .unwrap();
    Ran(made).succeeds();
    world.check().succeeds();
}

#[test]
fn a_store_or_an_account_that_serve_would_refuse_is_refused_by_check() {
    let (world, other) = (World::new(), World::new());
    fs::copy(other.path("state/counters.redb"), world.path("state/counters.redb")).unwrap();
    world.check().fails(78, &["counters.redb: belongs to the server key", "Hint: "]);
    other.edit("etc/knockq.toml", "[server]\n", "[server]\nuser = \"root\"\n");
    other.check().fails(78, &["user `root` is root"]);
}

#[test]
fn a_profile_can_neither_forge_a_line_nor_crash_nor_be_cut() {
    let world = World::new();
    let add = |text: &str| {
        fs::write(world.path("evil.profile"), text).unwrap();
        world.run(&["host", "add", "evil", &world.text("evil.profile")])
    };
    let profile = fs::read_to_string(world.path("alice.profile")).unwrap();
    let forged = add(&profile.replace("192.0.2.1", "h\\u001b[31mRED\\nAdded host good"));
    forged.fails(78, &["is neither a host name nor an IP address"]);
    assert!(!forged.errors().contains('\u{1b}'), "{:?}", forged.errors());
    let raw = add(&format!("x = \u{1b}[31m{}", "y".repeat(70_000)));
    raw.fails(78, &["evil.profile:1:"]);
    assert!(!raw.errors().contains('\u{1b}') && raw.errors().len() < 3000, "{:?}", raw.errors());
    add(&format!("{profile}#{}", "z".repeat(1 << 20))).fails(78, &["is larger than 1 MiB"]);
    let many = "\"1-65535\",".repeat(6000);
    add(&profile.replace("\"20000-21023\"", &many)).fails(78, &["not more"]);
    add(&profile.replace("window =", "default = \"mail\"\nwindow ="))
        .fails(78, &["no service by the name of its default"]);
}

#[test]
fn a_source_decides_over_the_family_and_never_against_it() {
    let world = World::new();
    let send = |more: &[&str]| world.run(&[&["send", "home", "--print", "hex"], more].concat());
    send(&["-4", "--source", "2001:db8::1"]).fails(64, &["source 2001:db8::1: is not of the family", "Hint: "]);
    send(&["--source", "2001:db8::1"]).fails(1, &["host home: has no IPv6 address"]);
    let hosts = ".config/knockq/hosts/home.toml";
    world.edit(hosts, "window =", "source = \"2001:db8::1\"\nwindow =");
    send(&["-4"]).fails(64, &["source 2001:db8::1: is not of the family", "Hint: "]);
}

#[test]
fn user_add_refuses_what_exists_and_writes_nothing_then() {
    let world = World::new();
    let own = world.run(&["keygen", "--show"]).succeeds();
    let server = fs::read_to_string(world.path("alice.profile")).unwrap();
    let server = server.split('"').nth(1).unwrap();
    let other = "y4p1aUaYDQ5GXyhXHs0XxBvXjsH7bfmeStQcm0hFJks=";
    let before = world.files();
    world.user_add("alice", other, &[]).fails(78, &["user alice: exists already", "Hint: "]);
    world
        .user_add("bob", own.trim_end(), &[])
        .fails(78, &["user bob: user alice has this public key already", "Hint: "]);
    world.user_add("bob", server, &[]).fails(78, &["this is the server's own key", "Hint: "]);
    world.user_add("bob", "AAAA", &[]).fails(64, &["--key: not a key: 3 bytes instead of 32", "Hint: "]);
    world
        .user_add("bob", other, &["--allow", "mail"])
        .fails(64, &["there is no service `mail`", "Hint: services are: ssh"]);
    world.user_add("b/b", other, &[]).fails(64, &["is not a name"]);
    world.user_add("bob", other, &["--from", "10.0.0.0/40"]).fails(64, &["--from"]);
    assert_eq!(world.files(), before);
    let said = world.user_add("bob", other, &["--allow", "ssh", "--from", "10.0.0.0/8", "--source", "bound"]);
    assert!(said.errors().contains("It applies when the daemon starts: none runs now."), "{}", said.errors());
    assert!(!said.errors().contains("warning"), "{}", said.errors());
    said.succeeds();
    assert!(world.check().succeeds().contains("users 2"));
}

#[test]
fn a_user_whose_end_has_come_already_is_added_with_a_warning() {
    let world = World::new();
    let said = world.user_add("bob", OTHER_KEY, &["--expires", "2020-01-31"]);
    let warning = "warning: bob opens nothing, for 2020-01-31T00:00:00Z is over";
    assert!(said.errors().contains(warning), "{}", said.errors());
    said.succeeds();
    let said = world.user(&["invite", "carl", "--expires", "2020-01-31"]);
    assert!(said.errors().contains("warning: carl opens nothing"), "{}", said.errors());
    said.succeeds();
    world.user_add("dora", OTHER_KEY, &["--expires", "tomorrow"]).fails(64, &["`tomorrow` is no date"]);
}

const OTHER_KEY: &str = "y4p1aUaYDQ5GXyhXHs0XxBvXjsH7bfmeStQcm0hFJks=";

#[test]
fn users_are_listed_and_shown_and_their_profiles_printed_again() {
    let world = World::new();
    let own = world.run(&["keygen", "--show"]).succeeds();
    let networks = ["--from", "10.0.0.0/8", "--from", "2001:db8::7", "--source", "bound"];
    let limits =
        ["--open-for", "15s", "--expires", "2027-01-31", "--add-to", "inet filter bob", "--add-to", "ip nat bob"];
    let printed = world.user_add("bob", OTHER_KEY, &[&networks[..], &limits].concat()).succeeds();
    assert!(printed.contains("open_for = \"15s\""), "for how long the client's door is open: {printed}");
    let listed = world.user(&["list"]).succeeds();
    let lines: Vec<Vec<&str>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        lines,
        [
            vec!["NAME", "SERVICES", "SOURCE", "FROM", "EXPIRES", "KEY"],
            vec!["alice", "ssh", "any", "-", "-", own.trim_end()],
            vec!["bob", "ssh", "bound", "10.0.0.0/8,2001:db8::7/128", "2027-01-31T00:00:00Z", OTHER_KEY],
        ]
    );
    let shown = world.user(&["show", "bob"]).succeeds();
    for text in [
        OTHER_KEY,
        "ssh",
        "bound",
        "10.0.0.0/8,2001:db8::7/128",
        "15s",
        "inet filter bob,ip nat bob",
        &world.text("etc/users.d/bob.toml"),
    ] {
        assert!(shown.contains(text), "`{text}` is not in:\n{shown}");
    }
    assert_eq!(world.user(&["show", "bob", "--profile"]).succeeds(), printed, "what `user add` printed");

    let listed = json(&world.user(&["list", "--json"]));
    assert_eq!(listed[1], json(&world.user(&["show", "bob", "--json"])));
    assert_eq!(listed[0]["name"], "alice");
    assert_eq!(listed[0]["from"], serde_json::json!([]));
    assert_eq!(listed[1]["public_key"], OTHER_KEY);
    assert_eq!(listed[1]["services"], serde_json::json!(["ssh"]));
    assert_eq!(listed[1]["source"], "bound");
    assert_eq!(listed[1]["from"], serde_json::json!(["10.0.0.0/8", "2001:db8::7/128"]));
    assert_eq!(listed[1]["open_for"], "15s");
    assert_eq!(listed[1]["expires"], "2027-01-31T00:00:00Z");
    assert_eq!(listed[1]["add_to"], serde_json::json!(["inet filter bob", "ip nat bob"]));

    world.user(&["show", "carol"]).fails(78, &["user carol: there is no ", "users.d/carol.toml", "Hint: "]);
    world.edit("etc/users.d/bob.toml", "[\"ssh\"]", "[]");
    world.user(&["show", "bob", "--profile"]).fails(78, &["user bob: may open no service", "Hint: "]);
    world.edit("etc/users.d/bob.toml", "services", "servces");
    for arguments in [&["list"][..], &["show", "alice"]] {
        world.user(arguments).fails(78, &["bob.toml:2:1: unknown field `servces`", "^"]);
    }
}

#[test]
fn a_profile_printed_again_keeps_the_default_service() {
    let world = World::empty();
    world.init(&["--protect", "tcp/22", "--protect", "tcp/25", "--address", "192.0.2.1"]).succeeds();
    let printed = world.user_add("bob", OTHER_KEY, &["--allow", "smtp", "--allow", "ssh"]).succeeds();
    assert!(printed.contains("default = \"smtp\""), "{printed}");
    assert_eq!(world.user(&["show", "bob", "--profile"]).succeeds(), printed);
}

#[test]
fn a_server_without_users_lists_none() {
    let world = World::empty();
    world.init(&["--protect", "tcp/22"]).succeeds();
    fs::remove_dir(world.path("etc/users.d")).unwrap();
    let listed = world.user(&["list"]);
    assert!(listed.errors().contains("There is no user yet"), "{}", listed.errors());
    assert_eq!(listed.succeeds(), "");
    assert_eq!(json(&world.user(&["list", "--json"])), serde_json::json!([]));
    world.user(&["remove", "alice"]).fails(78, &["user alice: there is no "]);
}

#[test]
fn a_user_is_removed_even_if_their_file_is_broken() {
    let world = World::new();
    world.user_add("bob", OTHER_KEY, &[]).succeeds();
    world.user(&["remove", "carol"]).fails(78, &["user carol: there is no ", "Hint: "]);
    let removed = world.user(&["remove", "bob"]);
    assert!(removed.errors().contains("It applies when the daemon starts: none runs now."), "{}", removed.errors());
    assert!(removed.succeeds().starts_with("Removed user bob: deleted "));
    assert!(world.check().succeeds().contains("users 1"));
    world.user(&["remove", "bob"]).fails(78, &["user bob: there is no "]);

    for (broken, mode) in [("public_key = \n", 0o644), ("\u{0}", 0o644), ("", 0o666), ("", 0o000)] {
        fs::write(world.path("etc/users.d/bob.toml"), broken).unwrap();
        world.mode("etc/users.d/bob.toml", mode);
        world.check().fails(78, &["bob.toml"]);
        world.user(&["remove", "bob"]).succeeds();
        world.check().succeeds();
    }
    symlink("/nowhere", world.path("etc/users.d/bob.toml")).unwrap();
    world.check().fails(78, &["bob.toml: is not a regular file"]);
    world.user(&["remove", "bob"]).succeeds();

    // Another file is broken as well: this one goes all the same, and that the daemon cannot know yet is said.
    world.user_add("bob", OTHER_KEY, &[]).succeeds();
    world.edit("etc/users.d/alice.toml", "services", "servces");
    world.user(&["remove", "bob"]).fails(78, &["The daemon cannot take this over", "alice.toml:2:1: unknown field"]);
    assert!(!world.path("etc/users.d/bob.toml").exists());
}

#[test]
fn a_user_is_renamed_in_one_step_and_never_onto_another() {
    let world = World::new();
    world.user_add("bob", OTHER_KEY, &[]).succeeds();
    let entry = fs::read(world.path("etc/users.d/alice.toml")).unwrap();
    for (old, new, said) in [
        ("alice", "bob", "user bob: exists already"),
        ("carol", "dave", "user carol: there is no "),
        ("carol", "bob", "user carol: there is no "),
    ] {
        world.user(&["rename", old, new]).fails(78, &[said, "Hint: "]);
    }
    world.user(&["rename", "alice", "alice"]).fails(64, &["user alice: has this name already"]);
    assert_eq!(fs::read(world.path("etc/users.d/alice.toml")).unwrap(), entry);
    world.user(&["rename", "alice", "alice-laptop"]).succeeds();
    assert_eq!(fs::read(world.path("etc/users.d/alice-laptop.toml")).unwrap(), entry);
    assert!(!world.path("etc/users.d/alice.toml").exists());
    assert!(world.check().succeeds().contains("users 2"));
    // The file's name itself may be what is wrong.
    fs::rename(world.path("etc/users.d/bob.toml"), world.path("etc/users.d/bob.toml.off")).unwrap();
    world.edit("etc/users.d/alice-laptop.toml", "services", "servces");
    world.user(&["rename", "alice-laptop", "alice"]).fails(78, &["The daemon cannot take this over", "alice.toml:2:1"]);
    assert!(world.path("etc/users.d/alice.toml").exists());
}

#[test]
fn users_that_one_may_not_change_are_a_matter_of_permission() {
    let world = World::new();
    let ran = |arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all"]);
        let config = world.config().display().to_string();
        Ran(command.arg(KNOCKQ).args(arguments).args(["--config", &config]).output().unwrap())
    };
    for arguments in [&["user", "list"][..], &["user", "remove", "alice"], &["user", "rename", "alice", "bob"]] {
        ran(arguments).fails(77, &["ermission denied", "Hint: "]);
    }
    assert!(world.path("etc/users.d/alice.toml").exists());
}

#[test]
fn hosts_are_listed_and_shown_and_a_broken_one_hides_no_other() {
    let world = World::empty();
    world.run(&["keygen"]).succeeds();
    let listed = world.run(&["host", "list"]);
    assert!(listed.errors().contains("There is no host yet"), "{}", listed.errors());
    assert_eq!(listed.succeeds(), "");
    assert_eq!(json(&world.run(&["host", "list", "--json"])), serde_json::json!([]));

    let world = World::new();
    world.edit("alice.profile", "[\"192.0.2.1\"]", "[\"192.0.2.1\", \"2001:db8::1\"]");
    world.run(&["host", "add", "away", &world.text("alice.profile")]).succeeds();
    let listed = world.run(&["host", "list"]).succeeds();
    let lines: Vec<Vec<&str>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        lines,
        [["NAME", "ADDRESSES", "SERVICES"], ["away", "192.0.2.1,2001:db8::1", "ssh"], ["home", "192.0.2.1", "ssh"]]
    );
    let server_key = fs::read_to_string(world.path("alice.profile")).unwrap().split('"').nth(1).unwrap().to_owned();
    let shown = world.run(&["host", "show", "home"]).succeeds();
    assert!(shown.starts_with(&format!("server_key = \"{server_key}\"")), "{shown}");
    assert!(shown.starts_with(&fs::read_to_string(world.path(".config/knockq/hosts/home.toml")).unwrap()), "{shown}");
    let shown = json(&world.run(&["host", "show", "home", "--json"]));
    assert_eq!(shown["name"], "home");
    assert_eq!(shown["server_key"], *server_key);
    assert_eq!(shown["services"]["ssh"], serde_json::json!({"selector": 22, "ports": ["tcp/22"], "open_for": "30s"}));
    assert_eq!(json(&world.run(&["host", "list", "--json"]))[1], shown);

    for (broken, mode) in [("garbage\n", 0o600), ("", 0o644)] {
        fs::write(world.path(".config/knockq/hosts/bad.toml"), broken).unwrap();
        world.mode(".config/knockq/hosts/bad.toml", mode);
        let listed = world.run(&["host", "list"]);
        listed.fails(1, &["host bad: ", "bad.toml", "Hint: ", "knockq host remove bad"]);
        assert_eq!(String::from_utf8_lossy(&listed.0.stdout).lines().count(), 3);
        world.run(&["host", "list", "--json"]).fails(1, &["host bad: "]);
        world.run(&["host", "show", "bad"]).fails(78, &["bad.toml"]);
        world.run(&["host", "remove", "bad"]).succeeds();
        world.run(&["host", "list"]).succeeds();
    }
    world.run(&["host", "show", "nowhere"]).fails(78, &["host nowhere: there is no profile by this name", "Hint: "]);
    world.run(&["host", "remove", "nowhere"]).fails(78, &["host nowhere: there is no profile by this name", "Hint: "]);
}

#[test]
fn a_host_that_is_removed_and_added_again_uses_no_counter_twice() {
    let world = World::new();
    world.edit("alice.profile", "192.0.2.1", "127.0.0.1");
    let mut sequences = Vec::new();
    for _ in 0..3 {
        world.run(&["host", "remove", "home"]).succeeds();
        world.run(&["host", "add", "home", &world.text("alice.profile")]).succeeds();
        let printed = world.run(&["send", "home", "--print", "hex"]).succeeds();
        sequences.push(printed[48..56].to_owned());
    }
    let removed = world.run(&["host", "remove", "home"]).succeeds();
    assert!(removed.contains(&world.text(".local/state/knockq/counters")), "{removed}");
    sequences.sort_unstable();
    sequences.dedup();
    assert_eq!(sequences.len(), 3, "one key and port, so a counter used twice shows as a sequence number sent twice");
}

#[test]
fn a_profile_is_refused_if_its_key_address_or_name_is_not_what_it_should_be() {
    let world = World::new();
    let add =
        |name: &str, more: &[&str]| world.run(&[&["host", "add", name, &world.text("alice.profile")], more].concat());
    add("same", &[]).succeeds();
    world.edit("alice.profile", "192.0.2.1", "192.0.2.99");
    add("home", &[]).fails(78, &["host home: there is a profile by this name", "Hint: "]);
    add("other", &[]).fails(78, &["host other: its server key is that of host", "Hint: "]);
    add("other", &["--same-server"]).succeeds();

    let own = world.run(&["keygen", "--show"]).succeeds();
    world.edit("alice.profile", own.trim_end(), "y4p1aUaYDQ5GXyhXHs0XxBvXjsH7bfmeStQcm0hFJks=");
    add("third", &[]).fails(78, &["host third: this profile was made for the key", "Hint: "]);
    fs::write(world.path("alice.profile"), "hello\n").unwrap();
    add("third", &[]).fails(78, &["alice.profile:1:"]);
    let mut paste =
        world.command(&["host", "add", "pasted", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    paste.stdin.take().unwrap().write_all(b"[services]\n").unwrap();
    Ran(paste.wait_with_output().unwrap()).fails(78, &["missing field `server_key`"]);
}

/// Its knocks would be refused, in silence.
#[test]
fn a_profile_for_another_key_than_that_of_this_machine_knocks_nowhere() {
    let world = World::new();
    world.run(&["send", "home", "--print", "hex"]).succeeds();
    fs::rename(world.path(".config/knockq/key"), world.path("key.of.before")).unwrap();
    world.run(&["keygen"]).succeeds();
    let said = ["host home: this profile was made for the key", "Hint: ", "knockq host remove"];
    world.run(&["send", "home", "--print", "hex"]).fails(78, &said);
    world.run(&["host", "remove", "home"]).succeeds();
}

#[test]
fn the_client_says_what_it_lacks() {
    let world = World::empty();
    world.run(&["keygen", "--show"]).fails(78, &["key: there is no key yet", "Hint: make one with `knockq keygen`"]);
    world.run(&["keygen"]).succeeds();
    world.run(&["keygen"]).fails(1, &["there is a key already", "Hint: "]);
    world
        .run(&["send", "home", "--print", "hex"])
        .fails(78, &["host home: there is no profile by this name", "Hint: "]);
    Ran(world.command(&["keygen"]).env_remove("HOME").output().unwrap()).fails(78, &["HOME is not set", "Hint: "]);

    let world = World::new();
    world.run(&["send", "home", "mail", "--print", "hex"]).fails(64, &["no service `mail`", "Hint: name one of: ssh"]);
    world.run(&["send", "home", "-6", "--print", "hex"]).fails(1, &["host home: has no IPv6 address", "Hint: "]);
    world.edit(".config/knockq/hosts/home.toml", "192.0.2.1", "no-such-host.invalid");
    world.run(&["send", "home", "--print", "hex"]).fails(1, &["no-such-host.invalid: cannot be resolved", "Hint: "]);
    world.edit(".config/knockq/hosts/home.toml", "no-such-host.invalid", "127.0.0.1");
    world.run(&["send", "home", "--print", "hex"]).succeeds();
    let files = fs::read_dir(world.path(".local/state/knockq/counters")).unwrap().map(|entry| entry.unwrap().path());
    let is_counters = |path: &PathBuf| path.extension().is_none() && path.file_name().unwrap() != "flows";
    fs::write(files.into_iter().find(is_counters).unwrap(), "garbage\n").unwrap();
    world
        .run(&["send", "home", "--print", "hex"])
        .fails(78, &["is damaged, so counters could be used twice", "Hint: "]);
}

#[test]
fn no_counter_is_used_twice_even_by_many_processes_at_once() {
    let world = World::new();
    world.edit(".config/knockq/hosts/home.toml", "192.0.2.1", "127.0.0.1");
    let printed = std::thread::scope(|scope| {
        let knocks: Vec<_> =
            (0..20).map(|_| scope.spawn(|| world.run(&["send", "home", "--print", "hex"]).succeeds())).collect();
        knocks.into_iter().map(|knock| knock.join().unwrap()).collect::<Vec<_>>()
    });
    let mut sequences: Vec<&str> = printed.iter().map(|packet| &packet[48..56]).collect();
    sequences.sort_unstable();
    sequences.dedup();
    assert_eq!(sequences.len(), 20);
}

#[test]
fn a_key_whose_counters_are_used_up_is_told_so() {
    let world = World::new();
    world.edit(".config/knockq/hosts/home.toml", "192.0.2.1", "127.0.0.1");
    let send = ["send", "home", "--print", "hex"];
    world.run(&send).succeeds();
    let counters = tree::files(&world.path(".local/state/knockq/counters"));
    let issued = counters.iter().find(|path| path.file_name().unwrap().len() == 32).unwrap();
    fs::write(issued, "floor 99999999999\n").unwrap();
    let said = "every counter up to 99999999999 is used up, and that is in the future";
    // It could wait for that time to come.
    let mut limited = Command::new("timeout");
    let ran = Ran(limited.args(["20", KNOCKQ]).args(send).env("HOME", &world.path).output().unwrap());
    ran.fails(78, &[&format!("{}: {said}", issued.display()), "Hint: make a new key"]);
    assert_eq!(fs::read_to_string(issued).unwrap(), "floor 99999999999\n");
}

#[test]
fn no_counter_is_used_twice_by_processes_that_are_killed() {
    let world = World::new();
    world.edit(".config/knockq/hosts/home.toml", "192.0.2.1", "127.0.0.1");
    let send = ["send", "home", "--print", "hex"];
    let start = std::time::Instant::now();
    let mut printed = vec![world.run(&send).succeeds().into_bytes()];
    let time = start.elapsed();
    for round in 0..60 {
        let mut child = world.command(&send).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(time * round / 20);
        child.kill().unwrap();
        printed.push(child.wait_with_output().unwrap().stdout);
    }
    printed.retain(|packet| packet.len() > 56);
    printed.push(world.run(&send).succeeds().into_bytes());
    let count = printed.len();
    let mut sequences: Vec<&[u8]> = printed.iter().map(|packet| &packet[48..56]).collect();
    sequences.sort_unstable();
    sequences.dedup();
    assert_eq!(sequences.len(), count);
}

#[test]
fn without_its_capability_send_names_the_remedy() {
    let world = World::new();
    let binary = world.path("knockq");
    fs::copy(KNOCKQ, &binary).unwrap();
    for path in [world.path.clone(), binary.clone()] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let ran = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all"])
        .arg(&binary)
        .args(["send", "home"])
        .env("HOME", &world.path)
        .output()
        .unwrap();
    Ran(ran).fails(77, &["cannot open a raw socket: operation not permitted", "Hint: sudo setcap cap_net_raw+ep"]);
    let ran = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(&binary)
        .args(["serve", "--config"])
        .arg(world.config())
        .output()
        .unwrap();
    Ran(ran).fails(77, &["serve: needs root with CAP_NET_ADMIN", "Hint: run it as root"]);
    let ran = Command::new("setpriv")
        .args(["--bounding-set=-net_admin", "--inh-caps=-all"])
        .arg(&binary)
        .args(["serve", "--config"])
        .arg(world.config())
        .output()
        .unwrap();
    Ran(ran).fails(77, &["serve: needs root with CAP_NET_ADMIN"]);
}

/// Of the child that reads the configuration, and of root.
#[test]
fn the_last_words_of_the_daemon_carry_priorities_for_the_journal_and_for_nobody_else() {
    let world = World::new();
    let serve = |environment: &[(&str, &str)]| {
        let config = world.text("etc/knockq.toml");
        Ran(world.command(&["serve", "--config", &config]).envs(environment.iter().copied()).output().unwrap())
    };
    fs::remove_file(world.path("state/counters.redb")).unwrap();
    for said in ["counters.redb: the counter store is missing", "unknown field `no_such_key`"] {
        serve(&[]).fails(78, &[&format!("knockq: {}", world.path.display()), said]);
        assert!(!serve(&[]).errors().contains('<'));
        let ran = serve(&[("JOURNAL_STREAM", "8:1")]);
        ran.fails(78, &[&format!("<3>knockq: {}", world.path.display()), said]);
        assert!(ran.errors().lines().all(|line| line.starts_with('<')), "{}", ran.errors());
        world.edit("etc/knockq.toml", "[server]\n", "[server]\nno_such_key = 1\n");
    }
}

#[test]
fn send_needs_one_capability_and_gives_it_up() {
    let world = World::new();
    let binary = world.path("knockq");
    fs::copy(KNOCKQ, &binary).unwrap();
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
    assert!(Command::new("chown").args(["-R", "65534:65534"]).arg(&world.path).status().unwrap().success());
    // a host of its own, where 192.0.2.1 is local and nothing listens, so that --wait goes on for a while
    let script = "ip link set lo up; ip route add local 192.0.2.1 dev lo; exec setpriv --reuid 65534 --regid 65534 \
                  --clear-groups --inh-caps=-all,+net_raw --ambient-caps=+net_raw \"$0\" send home --wait";
    let errors = fs::File::create(world.path("errors")).unwrap();
    let mut child = Command::new("unshare")
        .args(["-n", "sh", "-c", script])
        .arg(&binary)
        .env("HOME", &world.path)
        .stderr(errors)
        .spawn()
        .unwrap();
    let said = || fs::read_to_string(world.path("errors")).unwrap();
    let start = std::time::Instant::now();
    while !said().contains("Knocked at home") {
        assert!(start.elapsed().as_secs() < 30 && child.try_wait().unwrap().is_none(), "{}", said());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        let line = status.lines().find(|line| line.starts_with(set)).unwrap();
        assert_eq!(u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap(), 0, "{line}");
    }
}

#[test]
fn a_proxy_listens_on_loopback_alone_and_on_a_port_that_is_free() {
    let world = World::new();
    for address in ["0.0.0.0:1080", "192.0.2.1:1080", "[::]:1080", "[::ffff:127.0.0.1]:1080"] {
        world.run(&["proxy", "--listen", address]).fails(64, &["not an address of loopback", "ssh -L"]);
    }
    for address in ["1080", "127.0.0.1", "localhost:1080", "::1:1080", "127.0.0.1:65536"] {
        world.run(&["proxy", "--listen", address]).fails(64, &["not an address with a port"]);
    }
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let taken = TcpListener::bind(address).unwrap().local_addr().unwrap();
        let _taken = TcpListener::bind(taken).unwrap();
        let ran = world.run(&["proxy", "--listen", address, "--listen", &taken.to_string()]);
        let expected = format!("--listen {taken}: Address already in use");
        ran.fails(1, &[&expected, "Hint: does a proxy run already?", &format!("sport = :{}`", taken.port())]);
        assert!(!ran.errors().contains("Listening"), "all or none");
    }
}

#[test]
fn a_proxy_takes_a_password_from_a_file_that_nobody_else_reads_and_from_nowhere_else() {
    let world = World::new();
    let auth = world.text("auth");
    let proxy = || world.run(&["proxy", "--listen", "127.0.0.1:0", "--auth", &auth]);
    proxy().fails(78, &[&format!("{auth}: No such file")]);
    fs::write(&auth, "alice:secret\n").unwrap();
    for mode in [0o644, 0o640, 0o604] {
        fs::set_permissions(&auth, fs::Permissions::from_mode(mode)).unwrap();
        let expected = format!("{auth}: must not be readable by others (mode {mode:04o})");
        proxy().fails(78, &[&expected, "Hint: chmod 600 "]);
    }
    fs::set_permissions(&auth, fs::Permissions::from_mode(0o600)).unwrap();
    for text in ["alice\n", "alice:\n", ":secret\n", "alice:secret\nbob:secret\n"] {
        fs::write(&auth, text).unwrap();
        let ran = proxy();
        ran.fails(78, &[&format!("{auth}: is not one line `user:password`"), "Hint: "]);
        assert!(!ran.errors().contains("secret"), "{}", ran.errors());
    }
    world.run(&["proxy", "--password", "secret"]).fails(64, &["unexpected argument '--password'"]);
}

#[test]
fn without_a_route_timestamps_or_loopback_send_says_so() {
    let world = World::new();
    let isolated = |script: &str| {
        let script = format!("{script}; exec \"$0\" send home");
        let ran = Command::new("unshare").args(["-n", "sh", "-c", &script, KNOCKQ]).env("HOME", &world.path).output();
        Ran(ran.unwrap())
    };
    isolated(":").fails(1, &["192.0.2.1: ", "unreachable", "Hint: "]);
    let lan =
        "ip link add one type veth peer two; ip link set one up; ip link set two up; ip addr add 192.0.2.2/24 dev one";
    isolated(lan).fails(1, &["this kernel's own SYN over loopback: ", "Hint: ", "ip link set lo up"]);
    isolated(&format!("{lan}; ip link set lo up; echo 2 > /proc/sys/net/ipv4/tcp_syncookies"))
        .fails(1, &["this kernel's own SYN: it was not kept", "Hint: sysctl net.ipv4.tcp_syncookies=1"]);
    isolated("ip link set lo up; ip route add local 192.0.2.1 dev lo; echo 0 > /proc/sys/net/ipv4/tcp_timestamps")
        .fails(1, &["TCP timestamps are switched off", "Hint: sysctl net.ipv4.tcp_timestamps=1"]);
    isolated("ip link set lo up; ip route add local 192.0.2.1 dev lo; echo 0 > /proc/sys/net/ipv4/tcp_fastopen")
        .succeeds();
}

#[test]
fn a_host_without_nft_is_told_to_install_it() {
    let world = World::new();
    let config = world.config().display().to_string();
    let hidden = "mount -t tmpfs none /usr/sbin && exec \"$0\" \"$@\"";
    for arguments in [["ruleset", "--check", "--config", &config].as_slice(), &["serve", "--config", &config]] {
        let ran = Command::new("unshare").args(["-mn", "sh", "-c", hidden, KNOCKQ]).args(arguments).output().unwrap();
        Ran(ran).fails(1, &["/usr/sbin/nft: not found", "Hint: apt-get install nftables"]);
    }
}

#[test]
fn the_daemons_processes_cannot_be_started_by_hand() {
    let world = World::new();
    world.run(&["engine"]).fails(1, &["engine"]);
    for (arguments, code, said) in [
        ([].as_slice(), 1, "gate: error: only `knockq serve` of the same version can start it"),
        (&["0.0.0"], 1, "gate: error: only"),
        (&[env!("CARGO_PKG_VERSION")], 1, "gate: "),
    ] {
        let mut gate = Command::new(env!("CARGO_BIN_EXE_knockq-gate"));
        Ran(gate.args(arguments).stdin(Stdio::null()).output().unwrap()).fails(code, &[said]);
    }
    let config = world.config().display().to_string();
    for arguments in [&[][..], &["0.0.0", "-", "3", "4", &config]] {
        let mut root = Command::new(env!("CARGO_BIN_EXE_knockq-root"));
        Ran(root.args(arguments).output().unwrap())
            .fails(1, &["knockq: error: only `knockq serve` of the same version can start it"]);
    }
    world.run(&["configuration", "--config", &config]).fails(1, &["serve: "]);
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let world = World::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let config = world.config().display().to_string();
    let ran = |arguments: &[&str]| {
        let writer = writer.try_clone().unwrap();
        let mut command = world.command(&[arguments, &["--config", &config]].concat());
        Ran(command.stdout(writer).stderr(Stdio::piped()).output().unwrap())
    };
    // What has to arrive as a whole.
    for arguments in [["ruleset"].as_slice(), &["user", "show", "alice", "--profile"]] {
        ran(arguments).fails(1, &["stdout: Broken pipe"]);
    }
    // What is looked at, with `head` for example.
    for arguments in [["user", "list"].as_slice(), &["user", "show", "alice"], &["user", "list", "--json"]] {
        let ran = ran(arguments);
        ran.succeeds();
        assert_eq!(ran.errors(), "", "{arguments:?}");
    }
}

/// Nobody means the usual daemon then, least of all to shut its doors.
#[test]
fn a_configuration_that_is_named_and_not_there_is_never_taken_for_the_usual_one() {
    let world = World::new();
    let missing = world.text("etc/missing.toml");
    for command in [["status"].as_slice(), &["watch"], &["explain"], &["confirm"], &["revoke", "--all"]] {
        world
            .run(&[command, &["--config", &missing]].concat())
            .fails(78, &["missing.toml: No such file", "or name one with --config"]);
    }
}

/// Makes a server of an example: its files, with a key and a store of its own.
fn check_example(knockq_toml: &str, users: &[(String, String)]) -> Ran {
    let world = World::empty();
    world.init(&["--protect", "tcp/22"]).succeeds();
    let places = format!("[server]\nstate = {:?}\nruntime = {:?}", world.text("state"), world.text("run"));
    let own: Vec<&str> = knockq_toml.lines().filter(|line| !line.starts_with("state ")).collect();
    let own: Vec<&str> = own.into_iter().filter(|line| !line.starts_with("runtime ")).collect();
    fs::write(world.config(), own.join("\n").replacen("[server]", &places, 1)).unwrap();
    for (name, text) in users {
        fs::write(world.path("etc/users.d").join(name), text).unwrap();
    }
    world.check()
}

#[test]
fn every_example_passes_the_check() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut checked = 0;
    for directory in fs::read_dir(examples).unwrap().map(|entry| entry.unwrap().path()) {
        let Ok(config) = fs::read_to_string(directory.join("knockq.toml")) else { continue };
        let users = fs::read_dir(directory.join("users.d")).into_iter().flatten().map(|entry| entry.unwrap().path());
        let users: Vec<(String, String)> = users
            .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read_to_string(path).unwrap()))
            .collect();
        let said = check_example(&config, &users).succeeds();
        assert!(said.contains(&format!("users {}", users.len())), "{}: {said}", directory.display());
        checked += 1;
    }
    assert_eq!(checked, 6, "examples/*/knockq.toml");
}

#[test]
fn the_blocks_of_the_configuration_reference_pass_the_check() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    let text = fs::read_to_string(path).unwrap();
    let block = |first: &str| {
        let lines = text.lines().skip_while(|line| *line != format!("    {first}"));
        let lines = lines.take_while(|line| line.is_empty() || line.starts_with("    "));
        lines.map(|line| line.trim_start_matches("    ")).collect::<Vec<_>>().join("\n")
    };
    let users = [("alice.toml".to_owned(), block("# users.d/alice.toml"))];
    let said = check_example(&block("[server]"), &users).succeeds();
    assert!(said.contains("services 4, users 1"), "{said}");
}

#[test]
fn a_private_key_is_shown_to_nobody_even_where_another_file_was_meant() {
    let world = World::new();
    for (arguments, file) in [
        (vec!["host", "add", "other"], "etc/server.key"),
        (vec!["host", "add", "other"], ".config/knockq/key"),
        (vec!["check", "--config"], "etc/server.key"),
    ] {
        let path = world.text(file);
        let secret = fs::read_to_string(&path).unwrap();
        let ran = world.run(&[arguments.as_slice(), &[&path]].concat());
        assert!(!ran.errors().contains(secret.trim()), "{}", ran.errors());
        ran.fails(78, &["is a key file"]);
    }
}

#[test]
fn a_ruleset_that_cannot_be_made_leaves_the_file_of_before() {
    let world = World::new();
    let config = world.config().display().to_string();
    let file = world.text("out.nft");
    let output = ["ruleset", "--config", &config, "--output", &file];
    assert_eq!(world.run(&output).succeeds(), "");
    let before = fs::read_to_string(&file).unwrap();
    assert_eq!(before, fs::read_to_string(world.path("etc/knockq.nft")).unwrap());
    world.edit("etc/knockq.toml", "private_key", "private_kee");
    world.run(&output).fails(78, &["unknown field"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), before);
}
