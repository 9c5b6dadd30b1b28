//! `knockq import knockknock`: profiles as knockknock's own tools leave them, taken over by a server and by a client.

#[path = "support/killer.rs"]
mod killer;
#[path = "support/tree.rs"]
mod tree;
#[path = "support/world.rs"]
mod world;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use killer::run_until_call;
use knockq::crypto::PrivateKey;
use knockq::serve::store::{Origin, Store, StoreFloor};
use world::{KNOCKQ, Ran, World, json};

const PROFILES: &str = "profiles";

/// A server that guards ssh, and has no user.
fn server() -> World {
    let world = World::empty();
    world.init(&["--protect", "tcp/22", "--knock-ports", "20000-21023", "--address", "192.0.2.1"]).succeeds();
    world
}

/// Two keys of 16 bytes, of a profile's number.
fn keys(number: u128) -> [String; 2] {
    [number, number << 64].map(|key| BASE64.encode(key.to_be_bytes()))
}

/// Makes a profile as knockknock does, with keys of this number.
fn profile(world: &World, directory: &str, number: u128, knock_port: u16, counter: u64) {
    let path = world.path(directory);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).unwrap();
    let [cipher, mac] = keys(number);
    for (file, contents) in [
        ("cipher.key", format!("{cipher}\n")),
        ("mac.key", format!("{mac}\n")),
        ("counter", format!("{counter}\n")),
        ("config", format!("[main]\nknock_port = {knock_port}\n\n")),
    ] {
        fs::write(path.join(file), contents).unwrap();
        fs::set_permissions(path.join(file), fs::Permissions::from_mode(0o600)).unwrap();
    }
}

/// A server, and profiles of alice and bob.
fn server_with_profiles() -> World {
    let world = server();
    profile(&world, "profiles/alice", 1, 2222, 17);
    profile(&world, "profiles/bob", 2, 3333, 0);
    world
}

fn import(world: &World, more: &[&str]) -> Ran {
    let (directory, config) = (world.text(PROFILES), world.text("etc/knockq.toml"));
    world.run(&[&["import", "knockknock", &directory, "--config", &config], more].concat())
}

/// On a client.
fn import_host(world: &World, directory: &str, more: &[&str]) -> Ran {
    world.run(&[&["import", "knockknock", &world.text(directory)], more].concat())
}

/// Everything below a directory: what, whose, which permissions, when it was changed, and what is in it.
fn state(directory: &Path) -> Vec<(PathBuf, u32, u32, i64, i64, Vec<u8>)> {
    let facts = |path: PathBuf| {
        let of = fs::symlink_metadata(&path).unwrap();
        let contents = if of.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
        (path, of.uid(), of.mode(), of.mtime(), of.mtime_nsec(), contents)
    };
    let mut all: Vec<PathBuf> = tree::files(directory);
    let directories: BTreeSet<PathBuf> = all.iter().filter_map(|file| Some(file.parent()?.to_owned())).collect();
    all.extend(directories);
    all.into_iter().map(facts).collect()
}

fn users(world: &World) -> Vec<PathBuf> {
    let users = world.path("etc/users.d");
    tree::files(&users).iter().map(|path| path.strip_prefix(&users).unwrap().to_owned()).collect()
}

#[test]
fn a_servers_profiles_become_users_and_stay_as_they_are() {
    let world = server_with_profiles();
    fs::write(world.path("profiles/README"), "not a profile\n").unwrap();
    fs::create_dir(world.path("profiles/lost+found")).unwrap();
    let before = state(&world.path(PROFILES));
    let ran = import(&world, &["--allow", "ssh"]);
    assert_eq!(
        ran.succeeds(),
        "user alice: ssh, knock port 2222, next counter 17\nuser bob: ssh, knock port 3333, next counter 0\n"
    );
    let errors = ran.errors();
    assert_eq!(errors.matches("warning: ").count(), 1, "{errors}");
    for said in ["knockq user invite", "docs/knockknock.md", "applies when the daemon starts"] {
        assert!(errors.contains(said), "{said}: {errors}");
    }
    for (file, mode) in
        [("alice.toml", 0o644), ("alice.knockknock", 0o600), ("bob.toml", 0o644), ("bob.knockknock", 0o600)]
    {
        let permissions = fs::metadata(world.path("etc/users.d").join(file)).unwrap().permissions();
        assert_eq!(permissions.mode() & 0o7777, mode, "{file}");
    }
    let read = |file: &str| fs::read_to_string(world.path("etc/users.d").join(file)).unwrap();
    assert_eq!(read("alice.knockknock"), keys(1).map(|key| key + "\n").concat());
    let entry = read("alice.toml");
    let (entry, as_of) = entry.split_once("as_of      = \"").unwrap();
    assert_eq!(
        entry,
        "services = [\"ssh\"]\n\n[knockknock]\nkey_file   = \"alice.knockknock\"\nknock_port = 2222\ncounter    = 17\n"
    );
    let as_of: jiff::Timestamp = as_of.trim_end().trim_end_matches('"').parse().unwrap();
    let age = jiff::Timestamp::now().as_second() - as_of.as_second();
    assert!((-1..600).contains(&age) && as_of.subsec_nanosecond() == 0, "{as_of}");
    assert!(world.check().succeeds().contains("users 2"));
    assert_eq!(state(&world.path(PROFILES)), before);
    assert_eq!(users(&world).len(), 4, "nothing else is left behind");
}

#[test]
fn a_knockknock_profile_that_is_wrong_is_shown_with_its_place() {
    let world = server_with_profiles();
    import(&world, &[]).succeeds();
    let entry = fs::read_to_string(world.path("etc/users.d/alice.toml")).unwrap();
    let cases: &[(&str, &str, &[&str])] = &[
        ("[\"ssh\"]", "[\"ssh\"]\npsk_file = \"alice.psk\"", &["alice.toml:2:12: psk_file stands beside [knockknock]"]),
        ("[\"ssh\"]", "[\"ssh\"]\npublic_key = \"AAAA\"", &["alice.toml:2:14: public_key stands beside [knockknock]"]),
        (
            "[\"ssh\"]",
            "[\"ssh\"]\nsource = \"bound\"",
            &[
                "alice.toml:2:10: source = \"bound\" stands beside [knockknock]",
                "Hint: its knocks hold for no source",
                "`from`",
            ],
        ),
        ("2222", "22", &["alice.toml:5:14: knock port 22 is guarded by service ssh"]),
        ("2222", "0", &["alice.toml:5:14: "]),
        ("17", "4294967296", &["alice.toml:6:14: invalid value"]),
        ("17", "-1", &["alice.toml:6:14: invalid value"]),
        ("counter", "count", &["alice.toml:6:1: unknown field `count`"]),
        (
            "alice.knockknock",
            "carol.knockknock",
            &["alice.toml:4:14: ", "users.d/carol.knockknock: there is no such file", "mode 0600"],
        ),
        ("alice.knockknock", "bob.knockknock", &["bob.toml:1:1: user alice has the keys of this profile already"]),
        ("as_of ", "since ", &["alice.toml:7:1: unknown field `since`"]),
    ];
    for (from, to, said) in cases {
        world.edit("etc/users.d/alice.toml", from, to);
        world.check().fails(78, said);
        fs::write(world.path("etc/users.d/alice.toml"), &entry).unwrap();
    }
    world.edit("etc/users.d/alice.knockknock", "==\n", "\n");
    world.check().fails(78, &["users.d/alice.knockknock: the cipher key is not standard base64", "Hint: "]);
    world.mode("etc/users.d/alice.knockknock", 0o640);
    world.check().fails(78, &["alice.knockknock: must not be readable by others (mode 0640)", "Hint: chmod 600"]);
}

#[test]
fn a_count_is_set_in_the_users_file_where_all_else_stays_and_is_shown() {
    let world = server_with_profiles();
    import(&world, &[]).succeeds();
    let path = world.path("etc/users.d/alice.toml");
    let by_hand = "# hers\nfrom = [\"192.0.2.0/24\"]\nservices = [\"ssh\"]\n[knockknock]\nas_of = 2026-01-31 # then\n\
                   knock_port=2222\ncounter=17# so many\nkey_file=\"alice.knockknock\"\n";
    fs::write(&path, by_hand).unwrap();
    let ran = world.user(&["counter", "alice", "42"]);
    assert_eq!(ran.succeeds(), "User alice: the next knock is number 42, unless a later one was taken already\n");
    let text = fs::read_to_string(&path).unwrap();
    let shown: serde_json::Value = json(&world.user(&["show", "alice", "--json"]));
    let profile = &shown["knockknock"];
    let as_of = profile["as_of"].as_str().unwrap();
    assert_eq!(text, by_hand.replace("2026-01-31", &format!("\"{as_of}\"")).replace("counter=17", "counter=42"));
    assert_eq!(
        (&profile["counter"], &profile["knock_port"], &shown["public_key"]),
        (&42.into(), &2222.into(), &serde_json::Value::Null)
    );
    let shown = world.user(&["show", "alice"]).succeeds();
    assert!(shown.contains(&format!("alice.knockknock, to port 2222, from knock 42 on as of {as_of}")), "{shown}");
    assert!(
        world
            .user(&["list"])
            .succeeds()
            .lines()
            .any(|line| line.starts_with("alice ") && line.ends_with("(knockknock)"))
    );
    world.user(&["show", "alice", "--profile"]).fails(1, &["user alice: has a knockknock profile", "alice.knockknock"]);

    world.user(&["counter", "carol", "1"]).fails(78, &["user carol: there is no ", "Hint: see who there is"]);
    world.user(&["counter", "alice", "4294967296"]).fails(64, &["4294967296"]);
    let key = world.run(&["keygen"]).succeeds();
    world.user_add("dora", key.trim_end(), &[]).succeeds();
    world.user(&["counter", "dora", "1"]).fails(64, &["user dora: has no knockknock profile"]);
}

#[test]
fn recover_names_the_profiles_whose_count_must_be_set() {
    let world = server_with_profiles();
    import(&world, &[]).succeeds();
    let said = world.recover(&[]).succeeds();
    for name in ["alice", "bob"] {
        assert!(said.contains(&format!("{name} has a knockknock profile")), "{said}");
        assert!(said.contains(&format!("knockq user counter {name} NUMBER")), "{said}");
    }
}

/// Also within the second in which the store was made, and where the clock was ahead when the counts were set, or is behind.
#[test]
fn a_store_that_is_made_anew_waits_for_every_count_until_it_is_set_once_whatever_the_clock_was() {
    let world = server_with_profiles();
    import(&world, &[]).succeeds();
    let as_of = |user: &str| -> u64 {
        let entry: toml::Table =
            toml::from_str(&fs::read_to_string(world.path("etc/users.d").join(user)).unwrap()).unwrap();
        entry["knockknock"]["as_of"]
            .as_str()
            .unwrap()
            .parse::<jiff::Timestamp>()
            .unwrap()
            .as_second()
            .try_into()
            .unwrap()
    };
    let server: PrivateKey = fs::read_to_string(world.path("etc/server.key")).unwrap().trim().parse().unwrap();
    let forgot = || {
        let path = world.stores().into_iter().find(|path| path.ends_with("counters.redb")).unwrap();
        let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        let origin = Origin::of(&file).unwrap();
        Store::open(file, *server.public(), origin, StoreFloor::default()).unwrap().forgot().unwrap()
    };
    assert!(as_of("bob.toml") >= forgot());
    let alice = world.path("etc/users.d/alice.toml");
    let (entry, set) =
        (fs::read_to_string(&alice).unwrap(), jiff::Timestamp::from_second(as_of("alice.toml").try_into().unwrap()));
    fs::write(&alice, entry.replace(&set.unwrap().to_string(), "2999-01-01T00:00:00Z")).unwrap();

    for _ in 0..2 {
        world.recover(&[]).succeeds();
        assert!(as_of("alice.toml").max(as_of("bob.toml")) < forgot());
        for user in ["bob", "alice"] {
            world.user(&["counter", user, "42"]).succeeds();
            assert!(as_of(&format!("{user}.toml")) >= forgot());
        }
    }
}

#[test]
fn a_second_run_leaves_what_is_there_and_takes_what_is_new() {
    let world = server_with_profiles();
    import(&world, &[]).succeeds();
    world.user(&["rename", "bob", "robert"]).succeeds();
    let before = state(&world.path("etc"));
    let again = import(&world, &[]);
    assert_eq!(
        again.succeeds(),
        "user alice: has the keys of alice already: left as it is\n\
         user robert: has the keys of bob already: left as it is\n"
    );
    assert!(!again.errors().contains("warning"), "{}", again.errors());
    assert_eq!(state(&world.path("etc")), before);

    profile(&world, "profiles/carol", 3, 4444, 5);
    let said = import(&world, &[]).succeeds();
    assert!(said.ends_with("user carol: ssh, knock port 4444, next counter 5\n"), "{said}");
    assert!(world.check().succeeds().contains("users 3"));
}

#[test]
fn keys_that_were_imported_go_with_their_user_and_come_back_with_another_import() {
    let world = server_with_profiles();
    import(&world, &[]).succeeds();
    world.user(&["rename", "bob", "robert"]).succeeds();
    let said = world.user(&["remove", "robert"]).succeeds();
    assert!(said.contains("robert.toml\n") && said.contains("bob.knockknock\n"), "{said}");
    assert_eq!(users(&world), ["alice.knockknock", "alice.toml"].map(PathBuf::from));
    // Of one that is broken nothing is known.
    fs::write(world.path("etc/users.d/alice.toml"), "?").unwrap();
    world.user(&["remove", "alice"]).succeeds();
    assert_eq!(users(&world), [PathBuf::from("alice.knockknock")]);
    assert_eq!(import(&world, &[]).succeeds().lines().count(), 2);
    assert!(world.check().succeeds().contains("users 2"));
}

#[test]
fn a_name_that_is_taken_by_other_keys_is_named_before_anything_is_written() {
    let world = server_with_profiles();
    let key = world.run(&["keygen"]).succeeds();
    world.user_add("bob", key.trim_end(), &[]).succeeds();
    let before = state(&world.path("etc"));
    import(&world, &[]).fails(78, &["user bob: exists already, with other keys than ", "profiles/bob", "Hint: "]);
    assert_eq!(state(&world.path("etc")), before);

    world.user(&["rename", "bob", "robert"]).succeeds();
    fs::write(world.path("etc/users.d/bob.knockknock"), "of another\n").unwrap();
    world.mode("etc/users.d/bob.knockknock", 0o600);
    let before = users(&world);
    import(&world, &[]).fails(78, &["bob.knockknock: holds other keys, and is no user's", "Hint: move it away"]);
    assert_eq!(users(&world), before, "alice, who was written first, is gone again");

    fs::remove_file(world.path("etc/users.d/bob.knockknock")).unwrap();
    import(&world, &[]).succeeds();
    world.user(&["rename", "bob", "bobby"]).succeeds();
    profile(&world, "elsewhere/bob", 4, 5555, 0);
    let (elsewhere, config) = (world.text("elsewhere"), world.text("etc/knockq.toml"));
    world
        .run(&["import", "knockknock", &elsewhere, "--config", &config])
        .fails(78, &["user bob: bob.knockknock holds the keys of user bobby", "Hint: copy the profile"]);
    world.check().succeeds();
    profile(&world, "profiles/carol", 1, 4444, 5);
    import(&world, &[]).fails(78, &["profiles/carol: has the same keys as ", "profiles/alice", "Hint: "]);
}

/// What makes a profile one that nobody should trust, and what is said then.
type Suspicion = (&'static str, fn(&Path), &'static [&'static str]);

const DOUBTS: [Suspicion; 21] = [
    ("cipher.key", |path| mode(path, 0o640), &["cipher.key: must not be readable by others", "Hint: chmod 600"]),
    ("mac.key", |path| mode(path, 0o604), &["mac.key: must not be readable by others", "Hint: chmod 600"]),
    ("counter", |path| mode(path, 0o666), &["counter: must not be writable by others", "Hint: chmod go-w"]),
    ("config", |path| mode(path, 0o620), &["config: must not be writable by others", "Hint: chmod go-w"]),
    ("", |path| mode(path, 0o777), &["bob: must not be writable by others", "Hint: chmod go-w"]),
    ("..", |path| mode(path, 0o770), &["profiles: must not be writable by others", "Hint: chmod go-w"]),
    (
        "cipher.key",
        |path| chown(path, Some(65_534), None).unwrap(),
        &["cipher.key: belongs to uid 65534", "Hint: chown"],
    ),
    ("counter", |path| chown(path, Some(65_534), None).unwrap(), &["counter: belongs to uid 65534", "Hint: chown"]),
    ("", |path| chown(path, Some(65_534), None).unwrap(), &["bob: belongs to uid 65534", "Hint: chown"]),
    ("mac.key", link, &["mac.key: is not a regular file", "Hint: "]),
    ("config", link, &["config: is not a regular file", "Hint: "]),
    (
        "cipher.key",
        |path| fs::remove_file(path).unwrap(),
        &["cipher.key: No such file", "Hint: a profile has four files"],
    ),
    ("counter", |path| fs::remove_file(path).unwrap(), &["counter: No such file", "Hint: a profile has four files"]),
    ("counter", |path| fs::write(path, "").unwrap(), &["counter: is empty", "Hint: "]),
    ("counter", |path| fs::write(path, "4294967296\n").unwrap(), &["counter: `4294967296` is no counter", "Hint: "]),
    ("counter", |path| fs::write(path, "-1\n").unwrap(), &["counter: `-1` is no counter", "Hint: "]),
    ("config", |path| fs::write(path, "[main]\n").unwrap(), &["config: has no knock_port in [main]", "Hint: "]),
    (
        "config",
        |path| fs::write(path, "[main]\nknock_port = 70000\n").unwrap(),
        &["config: knock_port = 70000 is no port", "Hint: "],
    ),
    ("cipher.key", |path| fs::write(path, "AAAA\n").unwrap(), &["bob: the cipher key has 3 bytes, not 16", "Hint: "]),
    ("mac.key", |path| fs::write(path, "!\n").unwrap(), &["bob: the MAC key is not standard base64", "Hint: "]),
    ("mac.key", |path| fs::write(path, "A\nA\n").unwrap(), &["mac.key: is not one line of base64", "Hint: "]),
];

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn link(path: &Path) {
    let elsewhere = path.with_extension("elsewhere");
    fs::rename(path, &elsewhere).unwrap();
    symlink(&elsewhere, path).unwrap();
}

#[test]
fn a_profile_that_others_could_read_or_change_or_that_is_broken_is_refused_with_the_remedy_and_none_is_taken() {
    for (file, doubt, said) in DOUBTS {
        let world = server_with_profiles();
        doubt(&world.path("profiles/bob").join(file));
        let before = state(&world.path);
        import(&world, &[]).fails(78, said);
        import_host(&world, "profiles/bob", &[]).fails(78, said);
        assert!(state(&world.path) == before, "{said:?}");
    }
}

#[test]
fn a_directory_whose_name_is_none_is_named_with_the_remedy() {
    for name in ["a b", ".hidden", "alice\u{e9}", &"x".repeat(65)] {
        let world = server_with_profiles();
        profile(&world, &format!("profiles/{name}"), 3, 4444, 5);
        import(&world, &[]).fails(78, &[&format!("profiles/{name}: "), "a name", "Hint: copy the profile"]);
        assert_eq!(users(&world), Vec::<PathBuf>::new());
    }
}

#[test]
fn a_knock_port_that_a_service_guards_is_refused_and_the_configuration_works_as_before() {
    let world = server_with_profiles();
    profile(&world, "profiles/carol", 3, 22, 5);
    import(&world, &[]).fails(78, &["carol.toml", "22", "guarded by service", "Hint: "]);
    assert_eq!(users(&world), Vec::<PathBuf>::new());
    assert!(world.check().succeeds().contains("users 0"));
}

#[test]
fn words_that_do_not_fit_a_servers_profiles_are_usage_errors() {
    let world = server_with_profiles();
    let nowhere = world.text("nowhere");
    world.run(&["import"]).fails(64, &["Usage"]);
    world.run(&["import", "knockknock"]).fails(64, &["DIR"]);
    world.run(&["import", "knockknock", &nowhere]).fails(78, &["nowhere: No such file", "Hint: "]);
    world.run(&["import", "knockknock", &world.text("state")]).fails(64, &["holds no profile", "Hint: "]);
    let file = world.text("etc/knockq.toml");
    world.run(&["import", "knockknock", &file]).fails(78, &["is not a directory", "Hint: "]);
    import(&world, &["--allow", "ssh=22"]).fails(64, &["--allow: ", "Hint: say --allow ssh"]);
    import(&world, &["--allow", "mail"]).fails(64, &["there is no service `mail`", "Hint: services are: ssh"]);
    import(&world, &["--allow", "ssh=0"]).fails(64, &["`0` is not a port: write ssh=22"]);
    import(&world, &["--address", "home"]).fails(64, &["--name and --address are for one host", "Hint: "]);
    import(&world, &["--name", "home"]).fails(64, &["--name and --address are for one host", "Hint: "]);
    fs::remove_file(world.config()).unwrap();
    import(&world, &[])
        .fails(78, &["knockq.toml: No such file", "make a configuration with `knockq init`", "~/.knockknock/HOST"]);

    let world = World::empty();
    world.init(&["--protect", "tcp/22", "--protect", "tcp/25", "--knock-ports", "20000-21023"]).succeeds();
    profile(&world, "profiles/alice", 1, 2222, 17);
    import(&world, &[]).fails(64, &["--allow: there are several services", "Hint: name what"]);
    import(&world, &["--allow", "tcp-22", "--allow", "tcp-25"]).fails(64, &["there is no service `tcp-22`"]);
    let entry = world.path("etc/users.d/alice.toml");
    assert!(!entry.exists());
    import(&world, &["--allow", "ssh", "--allow", "smtp"]).succeeds();
    assert!(fs::read_to_string(entry).unwrap().starts_with("services = [\"ssh\", \"smtp\"]\n"));
}

#[test]
fn an_import_that_is_killed_at_any_call_leaves_no_half_user_and_is_ended_by_a_second_one() {
    let world = server_with_profiles();
    let (directory, config) = (world.text(PROFILES), world.text("etc/knockq.toml"));
    let before = state(&world.path(PROFILES));
    let mut states = BTreeSet::new();
    for call in 0.. {
        let _ = fs::remove_dir_all(world.path("etc/users.d"));
        let whole = run_until_call(world.command(&["import", "knockknock", &directory, "--config", &config]), call);
        let has = |name: &str| world.path("etc/users.d").join(name).exists();
        let reached = ["alice.knockknock", "alice.toml", "bob.knockknock", "bob.toml"].map(has);
        states.insert(reached);
        if whole.is_some() {
            break;
        }
        if world.path("etc/users.d").exists() {
            let users = usize::from(reached[1]) + usize::from(reached[3]);
            let alone = world.check().succeeds();
            assert!(alone.contains(&format!("users {users}")), "call {call}: {alone}");
        }
        if reached[0] && !reached[3] {
            import(&world, &[]).succeeds();
            assert!(world.check().succeeds().contains("users 2"), "call {call}");
        }
    }
    let in_order: BTreeSet<_> = (0..=4).map(|made| [0, 1, 2, 3].map(|place| place < made)).collect();
    assert_eq!(states, in_order, "each was met, and no other");
    assert_eq!(state(&world.path(PROFILES)), before);
}

#[test]
fn an_import_that_the_disk_cuts_short_takes_back_what_it_has_made() {
    let world = server_with_profiles();
    // Room for three files of four, and what is left is looked at before it goes away with its mount.
    let script =
        "mount -t tmpfs -o size=12k,mode=700 none \"$1\"; left=$1; shift; \"$@\"; code=$?; ls -A \"$left\"; exit $code";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(world.path("etc/users.d")).arg(KNOCKQ);
    command.args(["import", "knockknock", &world.text(PROFILES), "--config", &world.text("etc/knockq.toml")]);
    let ran = Ran(command.output().unwrap());
    ran.fails(1, &["bob.toml: No space left on device", "Hint: look at the disk"]);
    assert_eq!(String::from_utf8_lossy(&ran.0.stdout), "");
}

#[test]
fn a_hundred_profiles_are_taken_at_once() {
    let world = server();
    for number in 1..=100 {
        profile(&world, &format!("profiles/user-{number:03}"), number.into(), 2000 + number, number.into());
    }
    let ran = import(&world, &[]);
    assert_eq!(ran.succeeds().lines().count(), 100);
    assert_eq!(ran.errors().matches("warning: ").count(), 1, "{}", ran.errors());
    assert!(world.check().succeeds().contains("users 100"));
    let listed = json(&world.user(&["list", "--json"]));
    assert_eq!(listed.as_array().unwrap().len(), 100);
}

/// Where knockknock's client has the profile of a host.
const HOST: &str = ".knockknock/host.example.org";

fn client() -> World {
    let world = World::empty();
    profile(&world, HOST, 1, 2222, 17);
    world
}

fn read(world: &World, file: &str) -> String {
    fs::read_to_string(world.path(file)).unwrap()
}

#[test]
fn a_clients_profile_becomes_a_host_and_stays_as_it_is() {
    let world = client();
    let before = state(&world.path(HOST));
    let ran = import_host(&world, HOST, &[]);
    assert_eq!(
        ran.succeeds(),
        "host host.example.org: host.example.org, for ssh (tcp/22), knock port 2222, next counter 17\n"
    );
    let errors = ran.errors();
    assert_eq!(errors.matches("warning: ").count(), 1, "{errors}");
    for said in ["it is for ssh, on port 22", "knockq send host.example.org", "docs/knockknock.md"] {
        assert!(errors.contains(said), "{said}: {errors}");
    }
    let hosts = ".config/knockq/hosts";
    assert_eq!(read(&world, &format!("{hosts}/host.example.org.knockknock")), keys(1).map(|key| key + "\n").concat());
    let profile: toml::Table = read(&world, &format!("{hosts}/host.example.org.toml")).parse().unwrap();
    let wanted: toml::Table = "address = [\"host.example.org\"]\ndefault = \"ssh\"\n\
         [knockknock]\nkey_file = \"hosts/host.example.org.knockknock\"\nknock_port = 2222\ncounter = 17\n\
         [services.ssh]\nselector = 22\nports = [\"tcp/22\"]\n"
        .parse()
        .unwrap();
    assert_eq!(profile, wanted);
    for file in tree::files(&world.path(hosts)) {
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o600, "{}", file.display());
    }
    assert_eq!(tree::files(&world.path(hosts)).len(), 2);
    assert_eq!(state(&world.path(HOST)), before);
    let listed = world.run(&["host", "list"]).succeeds();
    assert!(listed.contains("host.example.org"), "{listed}");
}

#[test]
fn a_clients_profile_takes_another_name_address_and_services() {
    let world = client();
    let more = ["--name", "home", "--address", "192.0.2.1", "--allow", "web=443", "--allow", "ssh=2022"];
    let ran = import_host(&world, HOST, &more);
    assert_eq!(
        ran.succeeds(),
        "host home: 192.0.2.1, for web (tcp/443), ssh (tcp/2022), knock port 2222, next counter 17\n"
    );
    assert!(!ran.errors().contains("--allow"), "{}", ran.errors());
    let profile = read(&world, ".config/knockq/hosts/home.toml");
    assert!(profile.contains("default = \"web\"") && profile.contains("selector = 2022"), "{profile}");
    // Its name alone: where it is, its directory says.
    import_host(&world, HOST, &["--name", "away"]).succeeds();
    assert!(read(&world, ".config/knockq/hosts/away.toml").contains("address = [\"host.example.org\"]"));

    import_host(&world, HOST, &["--allow", "ssh"]).fails(
        64,
        &["--allow: a client's profile does not say which port ssh has", "Hint: say it, as in --allow ssh=22"],
    );
    import_host(&world, HOST, &["--name", "twice", "--allow", "ssh=22", "--allow", "ssh=2022"])
        .fails(64, &["--allow: ssh is named twice", "Hint: give it another name, as in --allow ssh-2022=2022"]);
    import_host(&world, HOST, &["--allow", "ssh=tcp/22"]).fails(64, &["`tcp/22` is not a port: write ssh=22"]);
    profile_of(&world, ".knockknock/2001:db8::1");
    import_host(&world, ".knockknock/2001:db8::1", &[]).fails(78, &["is not a name", "Hint: say --name NAME"]);
    import_host(&world, ".knockknock/2001:db8::1", &["--name", "six"]).fails(78, &["has no IPv4 address"]);
    profile_of(&world, ".knockknock/a b");
    import_host(&world, ".knockknock/a b", &["--name", "ab"]).fails(78, &["a b: ", "Hint: say --address HOST"]);
}

fn profile_of(world: &World, directory: &str) {
    profile(world, directory, 9, 2222, 0);
}

#[test]
fn a_host_that_is_there_stays_as_it_is_whatever_has_its_name() {
    let world = client();
    import_host(&world, HOST, &[]).succeeds();
    let before = state(&world.path(".config"));
    // The original went on counting meanwhile.
    fs::write(world.path(HOST).join("counter"), "18\n").unwrap();
    let again = import_host(&world, HOST, &[]);
    assert_eq!(again.succeeds(), "host host.example.org: has these keys already: left as it is\n");
    assert!(!again.errors().contains("warning"), "{}", again.errors());
    profile_of(&world, "other/host.example.org");
    import_host(&world, "other/host.example.org", &[])
        .fails(78, &["host host.example.org: there is a profile by this name", "Hint: choose another name"]);
    assert_eq!(state(&world.path(".config")), before);
    import_host(&world, "other/host.example.org", &["--name", "other"]).succeeds();
}

#[test]
fn an_import_of_a_host_that_is_killed_at_any_call_is_ended_by_a_second_one() {
    let world = client();
    let (directory, config) = (world.text(HOST), world.path(".config"));
    let before = state(&world.path(HOST));
    let mut states = BTreeSet::new();
    for call in 0.. {
        let _ = fs::remove_dir_all(&config);
        let whole = run_until_call(world.command(&["import", "knockknock", &directory, "--name", "home"]), call);
        let has = |name: &str| config.join("knockq/hosts").join(name).exists();
        states.insert((has("home.knockknock"), has("home.toml")));
        if whole.is_some() {
            break;
        }
        import_host(&world, HOST, &["--name", "home"]).succeeds();
        world.run(&["host", "show", "home"]).succeeds();
        assert_eq!(read(&world, ".config/knockq/hosts/home.knockknock"), keys(1).map(|key| key + "\n").concat());
    }
    assert_eq!(states, BTreeSet::from([(false, false), (true, false), (true, true)]), "each was met, and no other");
    assert_eq!(state(&world.path(HOST)), before);
}
