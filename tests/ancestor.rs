//! Profiles of knockknock's servers on a client: what its commands say of them, and their counts.

#[path = "support/killer.rs"]
mod killer;
#[path = "support/tree.rs"]
mod tree;
#[path = "support/world.rs"]
mod world;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::thread;

use knockq::client::issued::{Counts, IssuedError, IssuedFile};
use knockq::crypto::knockknock::{Key, Secrets, Token};
use proptest::prelude::{any, proptest};
use rustix::fs::{FlockOperation, flock};

use killer::run_until_call;
use world::{Ran, World, json};

const KEYS: &str = "sjiTG60X1BTdJ1FAi3J1pg==\n1hPsDZAaENI/HY8wSE5vCw==\n";

const PROFILE: &str = "address = [\"127.0.0.1\", \"::1\"]\ndefault = \"ssh\"\n\n\
                       [knockknock]\nkey_file = \"hosts/old.knockknock\"\nknock_port = 2222\ncounter = 17\n\n\
                       [services.mail]\nselector = 25\nports = [\"tcp/25\"]\n\n\
                       [services.ssh]\nselector = 22\nports = [\"tcp/22\"]\n";

const SEND: &[&str] = &["send", "old", "--print", "hex"];

/// A client without a key of its own, and with one profile.
fn world() -> World {
    let world = World::empty();
    fs::create_dir_all(world.path(".config/knockq/hosts")).unwrap();
    for (file, text) in [("old.toml", PROFILE), ("old.knockknock", KEYS)] {
        fs::write(world.path(".config/knockq/hosts").join(file), text).unwrap();
        world.mode(&format!(".config/knockq/hosts/{file}"), 0o600);
    }
    world
}

/// The token of a printed packet, and its port.
fn token(packet: &str) -> (Token, u16) {
    let bytes: Vec<u8> =
        (0..packet.trim().len()).step_by(2).map(|at| u8::from_str_radix(&packet[at..at + 2], 16).unwrap()).collect();
    assert_eq!(bytes.len(), 40);
    let short = |at: usize| u16::from_be_bytes(bytes[at..at + 2].try_into().unwrap());
    let long = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    (Token { ip_id: short(4), sequence: long(24), acknowledgment: long(28), window: short(34) }, short(22))
}

/// The count and the port of a packet that `send --print hex` printed, as a server finds it.
fn opened(packet: &str) -> (u32, u16) {
    let key = Key::new(&KEYS.parse().unwrap());
    let (token, knock_port) = token(packet);
    assert_eq!(knock_port, 2222);
    (0..1000).find_map(|count| Some((count, key.port(count, &token)?))).expect("a token of these keys")
}

fn count_file(world: &World) -> PathBuf {
    let files = tree::files(&world.path(".local/state/knockq/counters"));
    files.into_iter().find(|path| path.extension().is_none()).unwrap()
}

#[test]
fn each_knock_has_the_next_count_from_what_the_profile_says_and_the_port_that_was_asked_for() {
    let world = world();
    let send = |more: &[&str]| opened(&world.run(&[SEND, more].concat()).succeeds());
    assert_eq!(send(&[]), (17, 22));
    assert_eq!(send(&["mail"]), (18, 25));
    assert_eq!(send(&["25", "-4"]), (19, 25));
    assert_eq!(send(&["--source", "none"]), (20, 22));
    assert_eq!(send(&["--source", "127.0.0.1"]), (21, 22));
    let toml = ".config/knockq/hosts/old.toml";
    world.edit(toml, "counter = 17", "counter = 5");
    assert_eq!(send(&[]), (22, 22), "what was used counts");
    world.edit(toml, "counter = 5", "counter = 100");
    assert_eq!(send(&[]), (100, 22), "the way out of a count that is behind");
    world.edit(toml, "\n\n[knock", "\nsource = \"127.0.0.1\"\n\n[knock");
    assert_eq!(send(&[]), (101, 22));
    assert!(!world.path(".config/knockq/key").exists(), "no key of this machine is needed");
}

/// The kernel would put another identification in the place of 0.
#[test]
fn a_count_whose_token_cannot_be_sent_is_passed_over() {
    let world = world();
    let key = Key::new(&KEYS.parse().unwrap());
    let unfit = (0..1_000_000).find(|&count| key.seal(count, 22).ip_id == 0).unwrap();
    world.edit(".config/knockq/hosts/old.toml", "counter = 17", &format!("counter = {unfit}"));
    let (token, _) = token(&world.run(SEND).succeeds());
    assert_eq!(key.port(unfit + 1, &token), Some(22));
    assert!(fs::read_to_string(count_file(&world)).unwrap().contains(&format!("\nnext {}\n", unfit + 2)));
}

#[test]
fn what_the_format_cannot_do_is_refused_by_name_before_a_count_is_used() {
    let world = world();
    let v4 = "a knockknock token goes over IPv4 alone, for IPv6 has no place for it";
    let no_v4 = "has no IPv4 address there, and a knockknock token goes over no other";
    let bound = "a knockknock token is bound to no address, and 192.0.2.7 is not this machine's own";
    for (arguments, code, said) in [
        (&["old", "-6"][..], 64, v4),
        (&["::1"], 1, no_v4),
        (&["old", "--source", "::1"], 64, v4),
        (&["old", "--source", "192.0.2.7"], 64, bound),
        (&["old", "--strict"], 64, "comes in a SYN that no kernel sends"),
    ] {
        let ran = world.run(&[&["send", "--print", "hex"], arguments].concat());
        ran.fails(code, &["host old: ", said, "Hint: "]);
    }
    let toml = ".config/knockq/hosts/old.toml";
    world.edit(toml, "\n\n[knock", "\nsource = \"192.0.2.7\"\n\n[knock");
    world.run(SEND).fails(64, &[bound, "`source` in the profile"]);
    world.edit(toml, "\"127.0.0.1\", ", "");
    world.run(&[SEND, &["--source", "none"]].concat()).fails(1, &[no_v4, "Hint: "]);
    assert!(!world.path(".local/state/knockq/counters").exists());
}

#[test]
fn hosts_of_both_kinds_are_listed_and_shown_without_a_secret_and_taken_away_with_their_keys() {
    let world = World::new();
    for (file, text) in [("old.toml", PROFILE), ("old.knockknock", KEYS)] {
        fs::write(world.path(".config/knockq/hosts").join(file), text).unwrap();
        world.mode(&format!(".config/knockq/hosts/{file}"), 0o600);
    }
    let listed = world.run(&["host", "list"]).succeeds();
    assert!(listed.lines().any(|line| line.split_whitespace().eq(["home", "192.0.2.1", "ssh"])), "{listed}");
    assert!(listed.lines().any(|line| line.split_whitespace().eq(["old", "127.0.0.1,::1", "mail,ssh"])), "{listed}");
    assert_eq!(world.run(&["host", "show", "old"]).succeeds(), format!("{PROFILE}# next counter: 17\n"));
    let shown = json(&world.run(&["host", "show", "old", "--json"]));
    assert_eq!((&shown["name"], &shown["knockknock"]["knock_port"]), (&"old".into(), &2222.into()));
    assert!(shown.get("server_key_fingerprint").is_none() && !shown.to_string().contains("sji"), "{shown}");
    let listed = json(&world.run(&["host", "list", "--json"]));
    assert!(listed[0]["server_key_fingerprint"].is_string(), "{listed}");
    assert_eq!((&listed[1]["knockknock"]["counter"], &listed[1]["next_counter"]), (&17.into(), &17.into()));

    world.run(SEND).succeeds();
    assert_eq!(json(&world.run(&["host", "show", "old", "--json"]))["next_counter"], 18, "what was used counts");
    fs::write(count_file(&world), "damaged").unwrap();
    assert_eq!(world.run(&["host", "show", "old"]).succeeds(), PROFILE, "what is not known is not said");
    let removed = world.run(&["host", "remove", "old"]).succeeds();
    assert!(removed.starts_with("Removed host old and its knockknock keys. Counters"), "{removed}");
    let left: Vec<String> =
        tree::files(&world.path(".config/knockq/hosts")).iter().map(|path| path.display().to_string()).collect();
    assert_eq!(left, [world.text(".config/knockq/hosts/home.toml")]);
    assert!(fs::read_to_string(count_file(&world)).is_ok(), "a profile that comes back goes on where it was");
    let removed = world.run(&["host", "remove", "home"]).succeeds();
    assert!(removed.starts_with("Removed host home. Counters"), "{removed}");
}

#[test]
fn a_host_remove_that_is_killed_at_any_call_leaves_no_keys_alone_and_is_ended_by_a_second_one() {
    let world = world();
    let remove = ["host", "remove", "old"];
    let [profile, keys] = ["toml", "knockknock"].map(|end| world.path(&format!(".config/knockq/hosts/old.{end}")));
    for call in 0.. {
        for (path, text) in [(&profile, PROFILE), (&keys, KEYS)] {
            fs::write(path, text).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
        }
        let is_whole = run_until_call(world.command(&remove), call).is_some();
        assert!(profile.exists() || !keys.exists(), "call {call}");
        if profile.exists() {
            world.run(&remove).succeeds();
        }
        assert!(!profile.exists() && !keys.exists(), "call {call}");
        if is_whole {
            break;
        }
    }
}

#[test]
fn host_add_sends_those_who_have_such_a_profile_to_the_import() {
    let world = World::new();
    fs::write(world.path("old.toml"), PROFILE).unwrap();
    let said = [
        "host old: this is a knockknock profile,",
        "whose keys are in a file of their own",
        "Hint: ",
        "knockq import knockknock",
    ];
    world.run(&["host", "add", "old", &world.text("old.toml")]).fails(78, &said);
    fs::write(world.path("broken.toml"), PROFILE.replace("counter", "count")).unwrap();
    world
        .run(&["host", "add", "old", &world.text("broken.toml")])
        .fails(78, &["unknown field `count`", said[2], said[3]]);
    // And shows nobody the keys.
    fs::write(world.path("keys"), KEYS).unwrap();
    let shown = world.run(&["host", "add", "old", &world.text("keys")]);
    shown.fails(78, &["is a key file, which is shown to nobody"]);
    assert!(!shown.errors().contains("sji"));
}

#[test]
fn keys_that_are_missing_open_to_others_or_none_are_told_with_the_remedy_and_never_shown() {
    let world = world();
    let keys = ".config/knockq/hosts/old.knockknock";
    let refused = |code, said: &[&str]| {
        let ran = world.run(SEND);
        ran.fails(code, said);
        assert!(!ran.errors().contains("1hPs"), "{}", ran.errors());
    };
    world.mode(keys, 0o640);
    refused(78, &["old.knockknock: must not be readable by others (mode 0640)", "Hint: chmod 600"]);
    world.mode(keys, 0o600);
    world.edit(keys, "sjiT", "!!!!");
    refused(78, &["old.knockknock: the cipher key is not standard base64", "Hint: put back its two lines"]);
    world.edit(keys, "!!!!G60X1BTdJ1FAi3J1pg==\n", "");
    refused(78, &["not the keys of a profile", "Hint: "]);
    fs::remove_file(world.path(keys)).unwrap();
    refused(78, &["old.knockknock: the keys of the knockknock profile are missing", "knockq import knockknock"]);
}

#[test]
fn a_count_file_that_is_damaged_or_used_up_stops_all_knocks_and_says_the_way_out() {
    let world = world();
    world.run(SEND).succeeds();
    let file = count_file(&world);
    for damaged in ["", "next 18", "next x\n", "floor 17\n", "next 18\nnext 19\n"] {
        fs::write(&file, damaged).unwrap();
        let name = file.file_name().unwrap().to_str().unwrap();
        world
            .run(SEND)
            .fails(78, &[name, "is damaged, so counts could be used twice", "Hint: move it away", "counter = N"]);
    }
    // As the hint says.
    fs::rename(&file, world.path("away")).unwrap();
    world.edit(".config/knockq/hosts/old.toml", "counter = 17", "counter = 40");
    assert_eq!(opened(&world.run(SEND).succeeds()), (40, 22));

    world.edit(".config/knockq/hosts/old.toml", "counter = 40", &format!("counter = {}", u32::MAX));
    world.run(SEND).succeeds();
    world.run(SEND).fails(78, &["the last count, 4294967295, is used", "Hint: ", "knockq user add"]);
}

#[test]
fn a_send_that_is_killed_at_any_call_makes_no_count_repeat() {
    let world = world();
    let (mut next, mut has_lost) = (17, false);
    for call in 0.. {
        let killed = run_until_call(world.command(SEND), call);
        let (count, _) = opened(&world.run(SEND).succeeds());
        // Either it died before its count was on disk, or that one is lost.
        assert!(count == next || count == next + 1, "call {call}: {count} after {next}");
        has_lost |= count == next + 1 && killed.is_none();
        if let Some(printed) = killed {
            assert_eq!((opened(&printed).0, count), (next, next + 1));
            break;
        }
        next = count + 1;
    }
    assert!(has_lost, "one died with its count on disk");
}

#[test]
fn eight_sends_at_once_use_eight_counts_and_lose_none() {
    let world = world();
    let counts: BTreeSet<u32> = thread::scope(|scope| {
        let sends: Vec<_> = (0..8).map(|_| scope.spawn(|| world.run(SEND).succeeds())).collect();
        sends.into_iter().map(|send| opened(&send.join().unwrap()).0).collect()
    });
    assert_eq!(counts, (17..25).collect());
}

/// Knocks leave in the order of their counts: a server takes no earlier one after a later one.
#[test]
fn a_send_waits_for_another_that_has_its_count_and_not_yet_sent_it() {
    let world = world();
    world.run(SEND).succeeds();
    let path = count_file(&world).with_extension("lock");
    let lock = File::open(&path).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let mut waiting = world.command(SEND).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    BufReader::new(waiting.stderr.take().unwrap()).read_line(&mut said).unwrap();
    assert!(said.contains(&format!("which has held {} for 3 s", path.display())), "{said}");
    assert!(waiting.try_wait().unwrap().is_none());
    drop(lock);
    let printed = Ran(waiting.wait_with_output().unwrap()).succeeds();
    assert_eq!(opened(&printed), (18, 22));
}

#[test]
fn a_profile_that_was_copied_with_its_counts_is_warned_of_once() {
    let world = world();
    let on_machine = |id| world.on_host(&[("machine-id", id)], &world.path, SEND);
    let [here, elsewhere] = ["fedcba9876543210fedcba9876543210\n", "0123456789abcdef0123456789abcdef\n"];
    let nameless = "uninitialized\n";
    let warnings = |ran: &Ran| {
        ran.succeeds();
        ran.errors().matches("this knockknock profile was used on another machine before").count()
    };
    let runs = [here, nameless, here, elsewhere, elsewhere, nameless].map(on_machine);
    assert_eq!(runs.each_ref().map(warnings), [0, 0, 0, 1, 0, 0]);
}

proptest! {
    #[test]
    fn no_count_is_issued_twice_whatever_the_profile_says_between_restarts(
        steps in proptest::collection::vec((any::<u32>(), 1..4_usize), 1..12)
    ) {
        let world = World::empty();
        let stand_in = KEYS.parse::<Secrets>().unwrap().stand_in().unwrap();
        let mut last = None;
        for (least, knocks) in steps {
            let mut file = IssuedFile::<Counts>::open(&world.path("counters"), &[&stand_in], |_| {}).unwrap();
            // The counter of a profile may come from a backup, and lie before what was used.
            let least = if least % 2 == 0 { least } else { least % 1000 };
            for _ in 0..knocks {
                match file.issue(least) {
                    Ok(count) => {
                        assert!(count >= least && last.is_none_or(|last| count > last), "{count} after {last:?}");
                        last = Some(count);
                    }
                    Err(IssuedError::NoCount { .. }) => assert_eq!(last, Some(u32::MAX)),
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }
}
