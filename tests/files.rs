//! Every file that decides over access, times everything that can be wrong with one: the command that reads it names the
//! very path and the remedy, waits for nothing, and changes nothing.

#[path = "support/tree.rs"]
mod tree;
#[path = "support/world.rs"]
mod world;

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use world::{KNOCKQ, Ran, World};

/// Seconds after which a command counts as hung.
const LIMIT: &str = "20";

/// Neither root nor who runs the test.
const STRANGER: u32 = 65_534;

const MIB: usize = 1 << 20;

/// What is in a file, and so what is said of contents that cannot be.
#[derive(Clone, Copy, PartialEq)]
enum Contents {
    Text,
    /// Damage is no reason to make it anew: counters would repeat.
    Issued,
    /// The same, of a knockknock profile.
    Counted,
    Store,
    /// Only locked.
    Nothing,
}

/// A file, and the commands that read it.
struct Subject {
    path: &'static str,
    is_secret: bool,
    contents: Contents,
    readers: &'static [&'static [&'static str]],
}

const CHECK: &[&str] = &["check", "--config", CONFIG];
const SERVE: &[&str] = &["serve", "--config", CONFIG];
const LOAD: &[&str] = &["ruleset", "--load", "--config", CONFIG];
const SEND: &[&str] = &["send", "home", "--print", "hex"];
const SEND_OLD: &[&str] = &["send", "old", "--print", "hex"];

/// Stands for its path in the world.
const CONFIG: &str = "etc/knockq.toml";

/// Stands for the file of issued counters, whose name is made of two keys: [`place`] finds it.
const ISSUED: &str = "issued";
const ISSUED_LOCK: &str = "issued.lock";

/// The same for the count of a knockknock profile.
const COUNT: &str = "count";
const COUNT_LOCK: &str = "count.lock";

const SUBJECTS: [Subject; 15] = [
    Subject { path: "etc/knockq.toml", is_secret: false, contents: Contents::Text, readers: &[CHECK, SERVE] },
    Subject { path: "etc/server.key", is_secret: true, contents: Contents::Text, readers: &[CHECK, SERVE] },
    Subject { path: "etc/users.d/alice.toml", is_secret: false, contents: Contents::Text, readers: &[CHECK, SERVE] },
    Subject { path: "etc/users.d/alice.psk", is_secret: true, contents: Contents::Text, readers: &[CHECK, SERVE] },
    Subject { path: "etc/users.d/old.knockknock", is_secret: true, contents: Contents::Text, readers: &[CHECK, SERVE] },
    Subject { path: "etc/knockq.nft", is_secret: false, contents: Contents::Text, readers: &[LOAD] },
    Subject { path: "state/counters.redb", is_secret: true, contents: Contents::Store, readers: &[CHECK, SERVE] },
    Subject {
        path: ".config/knockq/key",
        is_secret: true,
        contents: Contents::Text,
        readers: &[&["keygen", "--show"], SEND],
    },
    Subject {
        path: ".config/knockq/hosts/home.toml",
        is_secret: true,
        contents: Contents::Text,
        readers: &[&["host", "show", "home"], SEND],
    },
    Subject { path: ".config/knockq/home.psk", is_secret: true, contents: Contents::Text, readers: &[SEND] },
    Subject { path: ISSUED, is_secret: true, contents: Contents::Issued, readers: &[SEND] },
    Subject { path: ISSUED_LOCK, is_secret: true, contents: Contents::Nothing, readers: &[SEND] },
    Subject {
        path: ".config/knockq/hosts/old.knockknock",
        is_secret: true,
        contents: Contents::Text,
        readers: &[SEND_OLD],
    },
    Subject { path: COUNT, is_secret: true, contents: Contents::Counted, readers: &[SEND_OLD] },
    Subject { path: COUNT_LOCK, is_secret: true, contents: Contents::Nothing, readers: &[SEND_OLD] },
];

/// A world in which every subject is there and right.
fn world() -> World {
    let world = World::new();
    world.edit(".config/knockq/hosts/home.toml", "192.0.2.1", "127.0.0.1");
    for (psk, user, named) in [
        ("etc/users.d/alice.psk", "etc/users.d/alice.toml", "alice.psk"),
        (".config/knockq/home.psk", ".config/knockq/hosts/home.toml", "home.psk"),
    ] {
        fs::write(world.path(psk), "q83vASNFZ4mrze8BI0VniavN7wEjRWeJq83vASNFZ4k=\n").unwrap();
        world.mode(psk, 0o600);
        let text = fs::read_to_string(world.path(user)).unwrap();
        fs::write(world.path(user), format!("psk_file = \"{named}\"\n{text}")).unwrap();
    }
    import(&world);
    run(&world, SEND).succeeds();
    run(&world, SEND_OLD).succeeds();
    fs::create_dir(world.path("run")).unwrap(); // what `serve` listens in is no file that decides
    world
}

/// A profile of knockknock's, for both sides.
fn import(world: &World) {
    let original = world.path("profiles/old");
    fs::create_dir_all(&original).unwrap();
    let key = "q83vASNFZ4mrze8BI0VniQ==\n";
    for (file, text) in
        [("cipher.key", key), ("mac.key", key), ("counter", "7\n"), ("config", "[main]\nknock_port = 9\n")]
    {
        fs::write(original.join(file), text).unwrap();
        fs::set_permissions(original.join(file), fs::Permissions::from_mode(0o600)).unwrap();
    }
    world.run(&["import", "knockknock", &world.text("profiles"), "--config", &world.text(CONFIG)]).succeeds();
    world.run(&["import", "knockknock", &world.text("profiles/old"), "--address", "127.0.0.1"]).succeeds();
}

/// Runs in a network of its own should it get further than it may, and not for ever.
fn run(world: &World, arguments: &[&str]) -> Ran {
    let mut command = Command::new("timeout");
    command.args(["-k", "1", LIMIT, "unshare", "-n", "sh", "-c", "ip link set lo up; exec \"$0\" \"$@\"", KNOCKQ]);
    let config = world.text(CONFIG);
    command.args(arguments.iter().map(|&argument| if argument == CONFIG { &config } else { argument }));
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).env("HOME", &world.path);
    Ran(command.output().unwrap())
}

/// Where a subject is.
fn place(world: &World, subject: &Subject) -> PathBuf {
    let counters = world.path(".local/state/knockq/counters");
    let of = |first: &str| {
        let begins = |path: &PathBuf| fs::read_to_string(path).unwrap().contains(&format!("\n{first} "));
        tree::files(&counters).into_iter().find(begins).unwrap()
    };
    match subject.path {
        ISSUED => of("floor"),
        ISSUED_LOCK => of("floor").with_extension("lock"),
        COUNT => of("next"),
        COUNT_LOCK => of("next").with_extension("lock"),
        path => world.path(path),
    }
}

/// What a file or directory is, and when it was changed last.
type Look = (PathBuf, u32, u32, u64, i64, i64, Option<Vec<u8>>);

/// All that is there, but for the daemon's runtime directory.
fn look(directory: &Path) -> Vec<Look> {
    let metadata = fs::symlink_metadata(directory).unwrap();
    let contents = (metadata.is_file() && metadata.len() < 4 << 20).then(|| fs::read(directory).unwrap());
    let times = (metadata.mtime(), metadata.mtime_nsec());
    let own = (directory.to_owned(), metadata.mode(), metadata.uid(), metadata.len(), times.0, times.1, contents);
    let mut all = vec![own];
    if metadata.is_dir() {
        let mut below: Vec<PathBuf> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
        below.retain(|path| !path.ends_with("run"));
        below.sort();
        all.extend(below.iter().flat_map(|path| look(path)));
    }
    all
}

/// Every reader of the subject says all of this of `named`, and changes nothing.
#[track_caller]
fn refused(world: &World, subject: &Subject, fault: &str, named: &Path, said: &[&str]) {
    let before = look(&world.path);
    for &reader in subject.readers {
        let ran = run(world, reader);
        let errors = ran.errors();
        let case = format!("{}, {fault}, {reader:?}: {:?}\n{errors}", subject.path, ran.0.status.code());
        assert!(matches!(ran.0.status.code(), Some(77 | 78)), "{case}");
        let is_named = |line: &str| line.contains(&format!("{}: {}", named.display(), said[0]));
        assert!(errors.lines().any(is_named), "{case}");
        let hint = errors.lines().find_map(|line| line.split_once("Hint: ")).map(|(_, hint)| hint.to_owned());
        let hint = hint.unwrap_or_else(|| panic!("no hint: {case}"));
        assert!(said[1..].iter().all(|text| hint.contains(text)), "{case}");
        assert!(!errors.contains("panicked"), "{case}");
        assert!(look(&world.path) == before, "something changed: {case}");
    }
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn tool(name: &str, arguments: &[&str], path: &Path) {
    assert!(Command::new(name).args(arguments).arg(path).status().unwrap().success(), "{name}");
}

#[test]
fn files_that_are_no_plain_files_are_refused_by_name() {
    type Make = fn(&Path);
    let kinds: [(&str, Make); 9] = [
        ("a link to the file", |path| {
            let elsewhere = path.with_extension("elsewhere");
            fs::rename(path, &elsewhere).unwrap();
            symlink(elsewhere, path).unwrap();
        }),
        ("a link that leads nowhere", |path| symlink("nowhere", path).unwrap()),
        ("a link to itself", |path| symlink(path, path).unwrap()),
        ("a pipe", |path| tool("mkfifo", &["-m", "600"], path)),
        ("a device", |path| {
            let node = ["-c", "mknod -m 600 \"$0\" c 1 3"];
            assert!(Command::new("sh").args(node).arg(path).status().unwrap().success());
        }),
        ("a device without end", |path| {
            let node = ["-c", "mknod -m 600 \"$0\" c 1 5"];
            assert!(Command::new("sh").args(node).arg(path).status().unwrap().success());
        }),
        ("a directory", |path| fs::create_dir(path).unwrap()),
        ("a directory with files", |path| {
            fs::create_dir(path).unwrap();
            fs::write(path.join("file"), "x").unwrap();
        }),
        ("a socket", |path| drop(UnixListener::bind(path).unwrap())),
    ];
    let world = world();
    for subject in &SUBJECTS {
        let path = place(&world, subject);
        let whole = fs::read(&path).unwrap();
        for (fault, make) in kinds {
            let elsewhere = path.with_extension("elsewhere");
            if fault != "a link to the file" {
                fs::remove_file(&path).unwrap();
            }
            make(&path);
            refused(&world, subject, fault, &path, &["is not a regular file", "put a file in its place"]);
            let _ = fs::remove_file(elsewhere);
            fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path)).unwrap();
            fs::write(&path, &whole).unwrap();
            mode(&path, 0o600);
        }
        for &reader in subject.readers.iter().filter(|reader| **reader != SERVE && **reader != LOAD) {
            run(&world, reader).succeeds();
        }
    }
}

#[test]
fn files_that_hold_what_they_cannot_are_refused_by_name() {
    type Spoil = fn(&Path);
    let faults: [(&str, &str, Spoil); 6] = [
        ("nothing", "is empty", |path| fs::write(path, "").unwrap()),
        ("no text", "is not UTF-8 text", |path| fs::write(path, [0xff; 9]).unwrap()),
        ("text, then none", "is not UTF-8 text", |path| {
            fs::write(path, [&fs::read(path).unwrap()[..], b"\n#\xc3\n"].concat()).unwrap();
        }),
        ("a byte too much", "is larger than 1 MiB", |path| {
            let mut text = fs::read(path).unwrap();
            text.resize(MIB + 1, b'\n');
            fs::write(path, text).unwrap();
        }),
        ("a character across the limit", "is larger than 1 MiB", |path| {
            fs::write(path, format!("{}é", " ".repeat(MIB))).unwrap();
        }),
        ("more than any disk", "is larger than 1 MiB", |path| File::create(path).unwrap().set_len(1 << 40).unwrap()),
    ];
    let world = world();
    for subject in &SUBJECTS {
        let path = place(&world, subject);
        let whole = fs::read(&path).unwrap();
        for (fault, said, spoil) in faults {
            spoil(&path);
            match subject.contents {
                Contents::Text => refused(&world, subject, fault, &path, &[said, "restore it from a backup"]),
                Contents::Issued => refused(&world, subject, fault, &path, &["is damaged", "make a new key"]),
                Contents::Counted => refused(&world, subject, fault, &path, &["is damaged", "agree on a count"]),
                // A store has no limit, and is no text.
                Contents::Store if fault.starts_with("text") || fault.starts_with("a byte") => {}
                Contents::Store => refused(&world, subject, fault, &path, &["is not a counter store", "recover"]),
                Contents::Nothing => drop(run(&world, subject.readers[0]).succeeds()),
            }
            fs::write(&path, &whole).unwrap();
        }
    }
}

#[test]
fn files_that_others_could_read_or_change_are_refused_by_name() {
    let world = world();
    for subject in &SUBJECTS {
        let path = place(&world, subject);
        let own = fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
        for loose in [0o620, 0o602, 0o666, 0o640, 0o604, 0o610, 0o601, 0o664, 0o4602] {
            let is_writable = loose & 0o022 != 0;
            if !is_writable && !subject.is_secret {
                continue;
            }
            let said =
                if subject.is_secret { "must not be readable by others" } else { "must not be writable by others" };
            let shown = format!("{said} (mode {loose:04o})");
            let remedy = format!("chmod {} {}", if subject.is_secret { "600" } else { "go-w" }, path.display());
            mode(&path, loose);
            refused(&world, subject, &format!("mode {loose:o}"), &path, &[&shown, &remedy]);
        }
        mode(&path, own);
        // The directory that it is in, the one above that, and the one that all are in.
        for directory in [path.parent().unwrap(), path.ancestors().nth(2).unwrap(), &world.path] {
            let own = fs::metadata(directory).unwrap().permissions().mode() & 0o7777;
            for loose in [0o770, 0o707, 0o777, 0o2775] {
                let shown = format!("must not be writable by others (mode {loose:04o})");
                let remedy = format!("chmod go-w {}", directory.display());
                mode(directory, loose);
                refused(&world, subject, &format!("directory {loose:o}"), directory, &[&shown, &remedy]);
            }
            mode(directory, own);
            chown(directory, Some(STRANGER), None).unwrap();
            let said = [format!("belongs to uid {STRANGER}"), format!("chown 0 {}", directory.display())];
            refused(&world, subject, "a stranger's directory", directory, &said.each_ref().map(String::as_str));
            chown(directory, Some(0), None).unwrap();
        }
        chown(&path, Some(STRANGER), None).unwrap();
        let said = [format!("belongs to uid {STRANGER}, not to root or to you"), "chown 0 ".to_owned()];
        refused(&world, subject, "a stranger's file", &path, &said.each_ref().map(String::as_str));
        chown(&path, Some(0), None).unwrap();
        for &reader in subject.readers.iter().filter(|reader| **reader != SERVE && **reader != LOAD) {
            run(&world, reader).succeeds();
        }
    }
}

#[test]
fn a_directory_of_users_that_is_none_or_that_others_could_fill_is_refused_by_name() {
    type Make = fn(&Path);
    let none: [(&str, Make); 6] = [
        ("a file", |path| fs::write(path, "").unwrap()),
        ("a pipe", |path| tool("mkfifo", &["-m", "600"], path)),
        ("a socket", |path| drop(UnixListener::bind(path).unwrap())),
        ("a link that leads nowhere", |path| symlink("nowhere", path).unwrap()),
        ("a link to itself", |path| symlink(path, path).unwrap()),
        ("a link to a file", |path| symlink(path.with_file_name("knockq.nft"), path).unwrap()),
    ];
    let world = world();
    let users = world.path("etc/users.d");
    let subject =
        Subject { path: "etc/users.d", is_secret: false, contents: Contents::Nothing, readers: &[CHECK, SERVE] };
    fs::rename(&users, world.path("etc/kept")).unwrap();
    for (fault, make) in none {
        make(&users);
        refused(&world, &subject, fault, &users, &["is not a directory", "put a directory in its place"]);
        fs::remove_file(&users).unwrap();
    }
    // Also while no user is in it.
    fs::create_dir(&users).unwrap();
    for loose in [0o770, 0o702] {
        mode(&users, loose);
        refused(&world, &subject, "loose", &users, &["must not be writable by others", "chmod go-w "]);
    }
    mode(&users, 0o700);
    chown(&users, Some(STRANGER), None).unwrap();
    refused(&world, &subject, "a stranger's", &users, &["belongs to uid 65534", "chown 0 "]);
}

#[test]
fn a_link_on_the_way_to_a_file_is_followed_only_where_no_stranger_could_have_put_it() {
    let world = world();
    let check = |config: &str| run(&world, &["check", "--config", &world.text(config)]);
    let link = |target: &str, name: &str| symlink(target, world.path(name)).unwrap();
    let named = |name: &str, said: &str| format!("{}: {said}", world.text(name));

    link("etc", "via");
    link("via", "via-two");
    for config in ["via/knockq.toml", "via-two/knockq.toml", "via/../etc/knockq.toml", "via/users.d/../knockq.toml"] {
        check(config).succeeds();
    }
    lchown(world.path("via"), Some(STRANGER), None).unwrap();
    for config in ["via/knockq.toml", "via-two/knockq.toml"] {
        check(config).fails(78, &[&named("via", "belongs to uid 65534"), "Hint: chown 0 "]);
    }

    fs::create_dir(world.path("open")).unwrap();
    link("../etc", "open/link");
    mode(&world.path("open"), 0o1777);
    check("open/link/knockq.toml").succeeds();
    mode(&world.path("open"), 0o777);
    check("open/link/knockq.toml").fails(78, &[&named("open", "must not be writable by others (mode 0777)")]);
    link("open/link", "to-open");
    check("to-open/knockq.toml").fails(78, &[&named("open", "must not be writable by others (mode 0777)")]);

    link("round", "round");
    link("nowhere", "lost");
    for name in ["round", "lost", "etc/knockq.nft"] {
        check(&format!("{name}/knockq.toml")).fails(78, &[&named(name, "is not a directory"), "Hint: put a directory"]);
    }
}

#[test]
fn in_a_sticky_directory_only_files_of_ones_own_are_read() {
    let world = world();
    for subject in &SUBJECTS {
        let path = place(&world, subject);
        let parent = path.parent().unwrap();
        let own = fs::metadata(parent).unwrap().permissions().mode() & 0o7777;
        mode(parent, 0o1777);
        for &reader in subject.readers.iter().filter(|reader| **reader != SERVE && **reader != LOAD) {
            run(&world, reader).succeeds();
        }
        chown(&path, Some(STRANGER), None).unwrap();
        refused(&world, subject, "a stranger's file", &path, &["belongs to uid 65534", "chown 0 "]);
        chown(&path, Some(0), None).unwrap();
        mode(parent, own);
    }
}

#[test]
fn nothing_is_written_below_a_directory_that_others_could_change() {
    let world = World::new();
    fs::create_dir(world.path("loose")).unwrap();
    mode(&world.path("loose"), 0o770);
    let before = look(&world.path);
    let (loose, fresh) = (world.text("loose"), world.text("fresh"));
    let new_home = |name: &str, arguments: &[&str]| {
        let mut command = world.command(arguments);
        Ran(command.env("XDG_CONFIG_HOME", world.path(name)).output().unwrap())
    };
    let at = |directory: &str| format!("{directory}/a/b");
    let commands = [
        new_home("loose", &["keygen"]),
        new_home("loose/a", &["keygen"]),
        world.run(&["init", "--protect", "tcp/22", "--dir", &loose, "--state", &fresh, "--runtime", &fresh]),
        world.run(&["init", "--protect", "tcp/22", "--dir", &at(&loose), "--state", &fresh, "--runtime", &fresh]),
        world.run(&["ruleset", "--config", &world.text(CONFIG), "--output", &format!("{loose}/out.nft")]),
    ];
    for ran in commands {
        ran.fails(78, &[&format!("{loose}: must not be writable by others (mode 0770)"), "Hint: chmod go-w "]);
        assert!(look(&world.path) == before);
    }
    let mut send = world.command(SEND);
    Ran(send.env("XDG_STATE_HOME", &loose).output().unwrap()).fails(78, &["loose: must not be writable by others"]);
    assert!(look(&world.path) == before, "no counter is issued where others could take it back");
}

#[test]
fn a_file_of_flows_that_is_a_pipe_makes_nobody_wait() {
    let world = world();
    for name in ["flows", "flows.lock"] {
        let path = world.path(".local/state/knockq/counters").join(name);
        let _ = fs::remove_file(&path);
        tool("mkfifo", &["-m", "600"], &path);
        run(&world, SEND).fails(78, &[&format!("{name}: is not a regular file"), "Hint: "]);
        fs::remove_file(&path).unwrap();
    }
    run(&world, SEND).succeeds();
}

#[test]
fn files_of_another_user_are_refused_by_name_to_one_who_is_not_root() {
    let world = world();
    tool("chown", &["-R", "65534:65534"], &world.path);
    let as_stranger = |arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all", KNOCKQ]);
        Ran(command.args(arguments).env_clear().env("HOME", &world.path).output().unwrap())
    };
    let key = world.path(".config/knockq/key");
    let show = ["keygen", "--show"];
    as_stranger(&show).succeeds();
    for (uid, permissions, code, said) in [
        (0, 0o600, 77, "ermission denied"),
        (65_533, 0o600, 78, "belongs to uid 65533"),
        (65_533, 0o604, 78, "belongs to uid 65533"),
    ] {
        chown(&key, Some(uid), Some(uid)).unwrap();
        mode(&key, permissions);
        as_stranger(&show).fails(code, &[&format!("{}: ", key.display()), said, "Hint: "]);
    }
    chown(&key, Some(STRANGER), Some(STRANGER)).unwrap();
    mode(&key, 0o600);
    mode(&world.path(".config"), 0o000);
    as_stranger(&show).fails(77, &[&format!("{}: Permission denied", key.display()), "Hint: "]);
}

#[test]
fn line_ends_and_a_byte_order_mark_of_other_systems_change_no_meaning() {
    let world = world();
    // What a knock prints is another packet each time.
    let says_the_same = |subject: &&Subject| ![LOAD, SEND, SEND_OLD].contains(&subject.readers[0]);
    for subject in SUBJECTS.iter().filter(|subject| subject.contents == Contents::Text).filter(says_the_same) {
        let path = place(&world, subject);
        let text = fs::read_to_string(&path).unwrap();
        let said = run(&world, subject.readers[0]).succeeds();
        fs::write(&path, text.replace('\n', "\r\n")).unwrap();
        assert_eq!(run(&world, subject.readers[0]).succeeds(), said, "{}", subject.path);
        fs::write(&path, format!("\u{feff}{text}")).unwrap();
        if path.extension().is_some_and(|extension| extension == "toml") {
            assert_eq!(run(&world, subject.readers[0]).succeeds(), said, "{}", subject.path);
        } else {
            let is_profile = path.extension().is_some_and(|extension| extension == "knockknock");
            let said = if is_profile {
                ["the cipher key is not standard base64", "original"]
            } else {
                ["not a key", "restore it"]
            };
            refused(&world, subject, "a byte order mark", &path, &said);
        }
        fs::write(&path, &text).unwrap();
    }
    let issued = SUBJECTS.iter().find(|subject| subject.path == ISSUED).unwrap();
    let path = place(&world, issued);
    let text = fs::read_to_string(&path).unwrap();
    for (fault, spoilt) in [
        ("a byte order mark", format!("\u{feff}{text}")),
        ("cut within its last number", text[..text.len() - 2].to_owned()),
        ("cut before its floor", text[..text.find("floor").unwrap()].to_owned()),
        ("a blank line", format!("{text}\n")),
    ] {
        fs::write(&path, spoilt).unwrap();
        refused(&world, issued, fault, &path, &["is damaged", "make a new key"]);
    }
}

#[test]
fn the_root_directory_is_one_of_those_above() {
    let world = World::new();
    fs::copy(KNOCKQ, world.path("knockq")).unwrap();
    let show = || {
        let mut command = Command::new("chroot");
        command.arg(&world.path).args(["/knockq", "keygen", "--show"]).env_clear().env("HOME", "/");
        Ran(command.env("PATH", std::env::var_os("PATH").unwrap()).output().unwrap())
    };
    show().succeeds();
    mode(&world.path, 0o777);
    show().fails(78, &["/: must not be writable by others (mode 0777)", "Hint: chmod go-w /"]);
}
