//! Profiles, keys and devices: what people do with them, and what happens to them on the way.

#[path = "support/killer.rs"]
mod killer;
#[path = "support/tree.rs"]
mod tree;
#[path = "support/world.rs"]
mod world;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use knockq::crypto::{KnockKey, KnockSecrets, PrivateKey, PublicKey, Side};
use rustix::fs::{FlockOperation, flock};

use killer::run_until_call;
use world::{KNOCKQ, Ran, World, json};

const OTHER_KEY: &str = "y4p1aUaYDQ5GXyhXHs0XxBvXjsH7bfmeStQcm0hFJks=";

/// With a server, and without a client's key.
fn server(more: &[&str]) -> World {
    let world = World::empty();
    let fixed = ["--knock-ports", "20000-21023", "--address", "127.0.0.1", "--address", "::1"];
    let services = if more.is_empty() { &["--protect", "tcp/22"] } else { more };
    world.init(&[&fixed, services].concat()).succeeds();
    world
}

fn with_stdin(mut command: Command, stdin: &[u8]) -> Ran {
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let _ = child.stdin.take().unwrap().write_all(stdin); // who is not interested may hang up
    Ran(child.wait_with_output().unwrap())
}

fn paste(world: &World, name: &str, text: impl AsRef<[u8]>) -> Ran {
    with_stdin(world.command(&["host", "add", name, "-"]), text.as_ref())
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

/// The value of a key of a profile or of a user's file.
fn field<'a>(text: &'a str, key: &str) -> &'a str {
    let line = text.lines().find(|line| line.split_whitespace().next() == Some(key));
    line.unwrap_or_else(|| panic!("no {key} in {text}")).split('"').nth(1).unwrap()
}

/// The counter of a packet for ssh that `send --print hex` printed, as the server finds it.
fn counter(world: &World, packet: &str) -> u64 {
    let server: PrivateKey = read(&world.path("etc/server.key")).parse().unwrap();
    let client: PublicKey = world.run(&["keygen", "--show"]).succeeds().parse().unwrap();
    let key = KnockKey::new(&KnockSecrets::derive(Side::Server, &server, &client, None).unwrap());
    let sequence = if packet.starts_with('4') { &packet[48..56] } else { &packet[88..96] };
    let sequence = u32::from_str_radix(sequence, 16).unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    (now - 600..now + 600).find(|&n| key.pad(n).sequence_for(22) == sequence).unwrap()
}

const SEND: &[&str] = &["send", "home", "--print", "hex"];

fn knocking_world() -> World {
    let world = World::new();
    world.edit(".config/knockq/hosts/home.toml", "[\"192.0.2.1\"]", "[\"127.0.0.1\", \"::1\"]");
    world
}

/// The file of the counters that were issued, of a machine that has one server.
fn issued(world: &World) -> PathBuf {
    let files = tree::files(&world.path(".local/state/knockq/counters"));
    files.into_iter().find(|path| path.file_name().unwrap().len() == 32).unwrap()
}

#[test]
fn a_pasted_profile_is_taken_whatever_line_ends_blank_lines_and_indentation_it_has_got() {
    let world = World::new();
    let profile = read(&world.path("alice.profile"));
    let stored = read(&world.path(".config/knockq/hosts/home.toml"));
    for (number, pasted) in [
        profile.clone(),
        profile.trim_end().to_owned(),
        profile.replace('\n', "\r\n"),
        format!("\n\n \t\n{profile}\n  \n\n"),
        profile.lines().map(|line| format!("    {line}  \n")).collect(),
        profile.replace('\n', "\n\n"),
        format!("\u{feff}{profile}"),
        profile.replace("# knockq", "#knockq").replace(" = ", "="),
    ]
    .iter()
    .enumerate()
    {
        let name = format!("home-{number}");
        paste(&world, &name, pasted).succeeds();
        assert_eq!(read(&world.path(&format!(".config/knockq/hosts/{name}.toml"))), stored, "{pasted:?}");
    }
}

#[test]
fn what_else_befell_a_pasted_profile_is_told_with_its_remedy() {
    let world = World::new();
    let profile = read(&world.path("alice.profile"));
    let before = world.files();
    let quoted: String = profile.lines().map(|line| format!("> {line}\n")).collect();
    let alone = "Hint: give all of what was printed and nothing else: from the line `# knockq profile of …`";
    let changed = "Hint: quotation marks or spaces were changed on the way";
    let cases: &[(String, &[&str])] = &[
        (quoted, &["stdin:1:3: ", "Hint: these are lines of a quoted mail: take the marks off"]),
        (profile.replace("= \"", "= \u{201c}").replace("\"\n", "\u{201d}\n"), &["stdin:2:", changed]),
        (profile.replace(" = ", "\u{a0}=\u{a0}"), &["stdin:2:", changed]),
        (format!("$ knockq user show alice --profile\n{profile}"), &["stdin:1:3: ", alone]),
        (format!("{profile}The daemon has taken it over.\n"), &["stdin:12:5: ", alone]),
        (format!("{profile}{profile}"), &["stdin:", "duplicate key", alone]),
        (profile[..profile.find("[services").unwrap()].to_owned(), &["missing field `services`", alone]),
        (profile[..profile.find("ports = [\"tcp").unwrap()].to_owned(), &["missing field `ports`", alone]),
        (profile[..profile.len() / 2].to_owned(), &["stdin:", alone]),
        (String::new(), &["stdin: is empty", alone]),
        (" \r\n\n".to_owned(), &["stdin: is empty", alone]),
    ];
    for (text, said) in cases {
        paste(&world, "pasted", text).fails(78, said);
    }
    let utf16: Vec<u8> = profile.encode_utf16().flat_map(u16::to_le_bytes).collect();
    paste(&world, "pasted", [&[0xff, 0xfe][..], &utf16].concat()).fails(78, &["stdin: ", "UTF-8", "Hint: "]);
    world.run(&["host", "add", "x", "no-such-file"]).fails(1, &["no-such-file: No such file", "Hint: name the file"]);
    assert_eq!(world.files(), before);

    // As the hint says.
    let quoted: String = profile.lines().map(|line| format!("> > {line}\n")).collect();
    let mut sed = Command::new("sed");
    sed.arg("s/^[> ]*//");
    paste(&world, "pasted", with_stdin(sed, quoted.as_bytes()).succeeds()).succeeds();
}

#[test]
fn on_a_terminal_host_add_says_how_to_paste() {
    let world = World::new();
    let mut terminal = Command::new("script");
    terminal.args(["-qec", &format!("{KNOCKQ} host add pasted -"), "/dev/null"]).env("HOME", &world.path);
    let shown = with_stdin(terminal, read(&world.path("alice.profile")).as_bytes()).succeeds();
    assert!(shown.contains("Paste the profile, then press Ctrl-D on a line of its own."), "{shown}");
    assert!(world.path(".config/knockq/hosts/pasted.toml").exists(), "{shown}");
}

#[test]
fn an_invitation_is_printed_once_and_the_server_keeps_the_public_key_alone() {
    let world = server(&[]);
    let invited = world.user(&["invite", "alice"]);
    let invitation = invited.succeeds();
    assert!(invited.errors().contains("is not shown again"), "{}", invited.errors());
    let private = field(&invitation, "client_private_key");
    let key: PrivateKey = private.parse().unwrap();
    assert_eq!(field(&invitation, "client_key"), key.public().to_string());
    let first = invitation.split('"').nth(1).unwrap();
    assert_eq!(first, field(&invitation, "server_key"), "the first base64 text");

    assert_eq!(field(&read(&world.path("etc/users.d/alice.toml")), "public_key"), key.public().to_string());
    for file in world.files() {
        let bytes = fs::read(&file).unwrap();
        assert!(!bytes.windows(private.len()).any(|window| window == private.as_bytes()), "{}", file.display());
    }
    let again = world.user(&["show", "alice", "--profile"]).succeeds();
    assert_eq!(
        again.lines().skip(1).collect::<Vec<_>>(),
        invitation.lines().skip(1).filter(|line| !line.starts_with("client_private_key")).collect::<Vec<_>>()
    );
    world.user(&["invite", "alice"]).fails(78, &["user alice: exists already", "such as alice-laptop", "Hint: "]);
    assert!(world.check().succeeds().contains("users 1"));
}

#[test]
fn an_invitation_takes_the_limits_that_user_add_takes() {
    let world = server(&["--protect", "tcp/22", "--protect", "udp/51820"]);
    let before = world.files();
    world.user(&["invite", "bob"]).fails(64, &["--allow: there are several services", "Hint: "]);
    world.user(&["invite", "bob", "--allow", "mail"]).fails(64, &["there is no service `mail`", "Hint: "]);
    world.user(&["invite", "b/b", "--allow", "ssh"]).fails(64, &["is not a name"]);
    assert_eq!(world.files(), before);
    let limits = ["--allow", "ssh", "--from", "10.0.0.0/8", "--source", "bound"];
    let invitation = world.user(&[&["invite", "bob"], &limits[..]].concat()).succeeds();
    assert!(invitation.contains("[services.ssh]") && !invitation.contains("51820"), "{invitation}");
    let shown = json(&world.user(&["show", "bob", "--json"]));
    assert_eq!(shown["services"], serde_json::json!(["ssh"]));
    assert_eq!(shown["from"], serde_json::json!(["10.0.0.0/8"]));
    assert_eq!(shown["source"], "bound");
}

#[test]
fn a_machine_without_a_key_has_that_of_the_invitation_from_then_on_and_its_profile_holds_none() {
    let world = server(&[]);
    let invitation = world.user(&["invite", "alice"]).succeeds();
    let private = field(&invitation, "client_private_key");
    let added = paste(&world, "home", &invitation);
    added.succeeds();
    assert!(added.errors().contains("is this machine's now: "), "{}", added.errors());

    let key = world.path(".config/knockq/key");
    assert_eq!(read(&key), format!("{private}\n"));
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o7777, 0o600);
    let stored = world.path(".config/knockq/hosts/home.toml");
    assert!(!read(&stored).contains("private") && !read(&stored).contains(private), "{}", read(&stored));
    for arguments in [&["host", "show", "home"][..], &["host", "show", "home", "--json"], &["host", "list", "--json"]] {
        assert!(!world.run(arguments).succeeds().contains(private));
    }
    for family in ["-4", "-6"] {
        let packet = world.run(&[SEND, &[family]].concat()).succeeds();
        counter(&world, &packet); // which the server would find
    }

    // Again, under another name, and from a file, which is a matter of the same key.
    assert!(paste(&world, "home", &invitation).succeeds().contains("There is this profile already"));
    fs::write(world.path("invitation"), &invitation).unwrap();
    let file = world.text("invitation");
    let again = world.run(&["host", "add", "second", &file]);
    again.succeeds();
    assert!(again.errors().contains(&format!("{file} still holds the private key: delete it")), "{}", again.errors());
    // Among the profiles it is none.
    fs::copy(world.path("invitation"), world.path(".config/knockq/hosts/third.toml")).unwrap();
    world.mode(".config/knockq/hosts/third.toml", 0o600);
    world.run(&["host", "show", "third"]).fails(78, &["third.toml: is an invitation", "Hint: move it"]);
    assert_eq!(read(&key), format!("{private}\n"));
}

#[test]
fn a_machine_that_has_another_key_keeps_it_and_says_what_to_do_with_an_invitation() {
    let world = server(&[]);
    let invitation = world.user(&["invite", "alice"]).succeeds();
    let own = world.run(&["keygen"]).succeeds();
    let before = read(&world.path(".config/knockq/key"));
    let said =
        format!("host home: this profile brings a private key, but this machine has another one, {}", own.trim());
    let refused = paste(&world, "home", &invitation);
    refused.fails(78, &[&said, "Hint: no profile here is for that key: move it away", "knockq keygen --show"]);
    assert_eq!(read(&world.path(".config/knockq/key")), before);
    assert!(!world.path(".config/knockq/hosts/home.toml").exists());

    // As one of the two remedies says.
    let profile = world.user_add("alice-laptop", own.trim(), &[]).succeeds();
    paste(&world, "home", &profile).succeeds();
    let refused = paste(&world, "other", &invitation);
    refused.fails(78, &["Hint: one key belongs to one machine", "`knockq user add`: knockq keygen --show"]);
    // As the other says.
    world.run(&["host", "remove", "home"]).succeeds();
    let hint = paste(&world, "home", &invitation).errors();
    let command = hint.split("again: ").nth(1).unwrap().split(';').next().unwrap();
    assert!(Command::new("sh").args(["-c", command]).status().unwrap().success(), "{command}");
    paste(&world, "home", &invitation).succeeds();
}

#[test]
fn an_invitation_that_is_wrong_is_refused_and_its_key_never_shown() {
    let world = server(&[]);
    let invitation = world.user(&["invite", "alice"]).succeeds();
    let private = field(&invitation, "client_private_key");
    let other = PrivateKey::generate().unwrap();
    for (text, said) in [
        (invitation.replace(private, other.to_file_line().trim()), "no private key that belongs to its client_key"),
        (invitation.replace(private, "AAAA"), "stdin:3:22: not a key: 3 bytes instead of 32"),
        (invitation.replace("window", "windw"), "unknown field `windw`"),
        (invitation.replace("=\"\nclient_key", "=\nclient_key"), "stdin:3:"),
        (invitation.replace("client_private_key = ", "client_private_key = 7 "), "stdin:3:"),
        (format!("{invitation}more\n"), "stdin:"),
    ] {
        let refused = paste(&world, "home", &text);
        refused.fails(78, &[said, "Hint: "]);
        assert!(!refused.errors().contains(&private[..8]), "{}", refused.errors());
    }
    assert!(!world.path(".config").exists(), "nothing is left of it");
}

#[test]
fn an_invitation_goes_nowhere_where_others_could_read_it_or_nobody() {
    let world = server(&[]);
    let config = world.config().display().to_string();
    let invite = ["user", "invite", "alice", "--config", &config];
    let before = world.files();
    let into = |stdout: Stdio| Ran(world.command(&invite).stdout(stdout).output().unwrap());
    for mode in [0o644, 0o640, 0o602] {
        let path = world.path("invitation");
        let file = File::create(&path).unwrap();
        world.mode("invitation", mode);
        into(file.into()).fails(
            78,
            &[&format!("stdout: is a file that others can read (mode {mode:04o})"), "Hint: take it away", "umask 077"],
        );
        assert_eq!(read(&path), "");
        fs::remove_file(path).unwrap();
    }
    for device in ["/dev/null", "/dev/full"] {
        let file = File::options().write(true).open(device).unwrap();
        into(file.into()).fails(1, &["stdout: is a device, where the private key would be lost", "Hint: "]);
    }
    // Nobody reads: the key is lost, and so is the user.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    into(writer.into()).fails(1, &["stdout: ", "Hint: user alice was not added", "Invite again"]);
    assert_eq!(world.files(), before);

    let file = File::create(world.path("invitation")).unwrap();
    world.mode("invitation", 0o600);
    into(file.into()).succeeds();
    world.run(&["host", "add", "home", &world.text("invitation")]).succeeds();
}

/// What a QR code in half blocks says, as a reader sees it.
fn scan(shown: &str) -> String {
    const PIXELS: usize = 4; // a side of a module
    let own = |line: &str| line.trim_end().strip_prefix("\x1b[30;47m")?.strip_suffix("\x1b[0m").map(str::to_owned);
    let lines: Vec<Vec<char>> = shown.lines().filter_map(own).map(|line| line.chars().collect()).collect();
    let is_dark = |x: usize, y: usize| match (lines[y / 2][x], y % 2) {
        ('\u{2588}', _) | ('\u{2580}', 0) | ('\u{2584}', 1) => true,
        (' ' | '\u{2580}' | '\u{2584}', _) => false,
        (other, _) => panic!("{other:?}"),
    };
    let (width, height) = (lines[0].len(), lines.len() * 2);
    for (x, y) in (0..width).flat_map(|x| (0..height).map(move |y| (x, y))) {
        let is_quiet = x < 4 || y < 4 || x >= width - 4 || y >= height - 4;
        assert!(!is_quiet || !is_dark(x, y), "the quiet zone has four modules");
    }
    let grey = |x: usize, y: usize| if is_dark(x / PIXELS, y / PIXELS) { 0 } else { 255 };
    let mut image = rqrr::PreparedImage::prepare_from_greyscale(width * PIXELS, height * PIXELS, grey);
    let grids = image.detect_grids();
    assert_eq!(grids.len(), 1);
    grids[0].decode().unwrap().1
}

#[test]
fn an_invitation_is_scanned_from_the_terminal_and_pasted() {
    let world = server(&[]);
    let more = "\n[services.vpn]\nports = [\"udp/51820\"]\n\n[services.web]\nports = [\"tcp/443\", \"tcp/80\"]\n";
    fs::write(world.config(), read(&world.config()) + more).unwrap();
    let shown =
        world.user(&["invite", "alice", "--qr", "--allow", "ssh", "--allow", "vpn", "--allow", "web"]).succeeds();
    let scanned = scan(&shown);
    assert!(!shown.contains(field(&scanned, "client_private_key")));
    paste(&world, "home", &scanned).succeeds();
    counter(&world, &world.run(SEND).succeeds());
}

#[test]
fn a_qr_code_that_cannot_be_read_is_not_begun() {
    let world = server(&[]);
    let before = world.files();
    let config = world.config().display().to_string();
    let on_terminal = |columns: u16, rows: u16| {
        let command = format!("stty cols {columns} rows {rows}; {KNOCKQ} user invite alice --qr --config {config}");
        let mut terminal = Command::new("script");
        Ran(terminal.args(["-qec", &command, "/dev/null"]).stdin(Stdio::null()).output().unwrap())
    };
    for (columns, rows) in [(60, 100), (100, 30)] {
        let refused = on_terminal(columns, rows);
        let shown = String::from_utf8_lossy(&refused.0.stdout).into_owned();
        assert_eq!(refused.0.status.code(), Some(1), "{shown}");
        assert!(shown.contains(&format!("--qr: the terminal has {columns} columns and {rows} rows")), "{shown}");
        assert!(shown.contains("Hint: make the terminal larger"), "{shown}");
    }
    assert_eq!(world.files(), before);
    let shown = on_terminal(100, 60).succeeds();
    paste(&world, "home", scan(&shown)).succeeds();

    let apart: Vec<String> = (10_000..10_900).map(|half| format!("\"{}\"", 2 * half)).collect();
    world.edit("etc/knockq.toml", "\"20000-21023\"", &apart.join(", "));
    let before = world.files();
    world.user(&["invite", "bob", "--qr"]).fails(64, &["--qr: the profile has ", "bytes", "Hint: leave out --qr"]);
    assert_eq!(world.files(), before);
    world.user(&["invite", "bob"]).succeeds();
}

#[test]
fn everybody_shows_the_same_fingerprint_of_a_server_key_and_sha256sum_too() {
    let world = server(&[]);
    let own = world.run(&["keygen"]).succeeds();
    let user = world.user_add("alice", own.trim(), &[]);
    let profile = user.succeeds();
    let key = field(&profile, "server_key");
    let mut tool = Command::new("sh");
    tool.args(["-c", "base64 -d | sha256sum | cut -c1-32 | sed 's/..../& /g;s/ $//'"]);
    let fingerprint = with_stdin(tool, key.as_bytes()).succeeds().trim_end().to_owned();
    assert_eq!(fingerprint.split(' ').count(), 8, "{fingerprint}");

    let line = format!("server key fingerprint: {fingerprint}\n");
    assert!(user.errors().contains(&fingerprint), "{}", user.errors());
    assert!(world.user(&["invite", "bob"]).errors().contains(&fingerprint));
    assert!(world.check().succeeds().contains(&line));
    assert!(paste(&world, "home", &profile).succeeds().contains(&line));
    let shown = world.run(&["host", "show", "home"]).succeeds();
    assert!(shown.ends_with(&format!("# {line}")), "{shown}");
    assert_eq!(json(&world.run(&["host", "show", "home", "--json"]))["server_key_fingerprint"], *fingerprint);
    assert_eq!(json(&world.run(&["host", "list", "--json"]))[0]["server_key_fingerprint"], *fingerprint);
    paste(&world, "again", &shown).succeeds();
}

#[test]
fn the_messages_teach_one_key_a_device() {
    let world = World::new();
    let own = world.run(&["keygen", "--show"]).succeeds();
    world.run(&["keygen"]).fails(1, &["there is a key already", "another device makes a key of its own"]);
    let add = |name: &str, key: &str| world.user_add(name, key.trim(), &[]);
    add("alice", OTHER_KEY).fails(78, &["user alice: exists already", "a name of its own, such as alice-laptop;"]);
    add("bob", &own).fails(78, &["user alice has this public key already", "its own, such as alice-laptop"]);
    let profile = add("alice-laptop", OTHER_KEY).succeeds();
    let third = PrivateKey::generate().unwrap().public().to_string();
    add("alice-laptop", &third).fails(78, &["such as alice-phone;"]);
    paste(&world, "second", &profile).fails(
        78,
        &[
            "host second: this profile was made for the key",
            "Hint: one key belongs to one device",
            "alice-laptop",
            "keygen --show",
        ],
    );
    let long = "a".repeat(64);
    add(&long, &third).succeeds();
    add(&long, &third).fails(78, &["exists already", "Hint: choose another name"]);
}

#[test]
fn a_host_add_that_is_killed_at_any_call_is_ended_by_a_second_one() {
    let world = server(&[]);
    let invitation = world.user(&["invite", "alice"]).succeeds();
    fs::write(world.path("invitation"), &invitation).unwrap();
    let (add, config) = (["host", "add", "home", &world.text("invitation")], world.path(".config"));
    let mut states = BTreeSet::new();
    for call in 0.. {
        let _ = fs::remove_dir_all(&config);
        let whole = run_until_call(world.command(&add), call);
        let has = |name: &str| config.join("knockq").join(name).exists();
        states.insert((has("key"), has("hosts/home.toml")));
        if whole.is_some() {
            break;
        }
        world.run(&add).succeeds();
        assert_eq!(read(&config.join("knockq/key")).trim(), field(&invitation, "client_private_key"), "call {call}");
        world.run(&["host", "show", "home"]).succeeds();
    }
    assert_eq!(states, BTreeSet::from([(false, false), (true, false), (true, true)]), "each was met, and no other");
}

#[test]
fn a_host_add_that_fails_leaves_no_key_behind() {
    let world = server(&[]);
    let invitation = world.user(&["invite", "alice"]).succeeds();
    // Where the profile cannot be written, and the key can.
    let hosts = world.path(".config/knockq/hosts");
    fs::create_dir_all(&hosts).unwrap();
    let mut command = Command::new("unshare");
    let script =
        "mount -t tmpfs -o size=4k,mode=700 none \"$1\" && head -c 4096 /dev/zero >\"$1/full\" && shift && exec \"$@\"";
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(&hosts).args([KNOCKQ, "host", "add", "home", "-"]);
    command.env("HOME", &world.path);
    with_stdin(command, invitation.as_bytes()).fails(1, &["home.toml: No space left on device", "Hint: "]);
    assert!(!world.path(".config/knockq/key").exists());
    paste(&world, "home", &invitation).succeeds();
}

#[test]
fn an_invite_that_is_killed_at_any_call_leaves_a_server_that_is_right_and_a_name_to_take_away() {
    let world = server(&[]);
    let config = world.config().display().to_string();
    let invite = ["user", "invite", "alice", "--config", &config];
    let entry = world.path("etc/users.d/alice.toml");
    for call in 0.. {
        let printed = run_until_call(world.command(&invite), call);
        let is_whole = printed.is_some();
        assert!(entry.exists() || !is_whole, "call {call}: nothing is printed for a user who is not there");
        world.check().succeeds();
        if entry.exists() {
            world
                .user(&["invite", "alice"])
                .fails(78, &["exists already", "take that user away: knockq user remove alice"]);
            world.user(&["remove", "alice"]).succeeds();
        }
        if is_whole {
            break;
        }
    }
}

#[test]
fn eight_sends_at_once_lose_no_counter_and_use_none_twice() {
    let world = knocking_world();
    let printed = thread::scope(|scope| {
        let world = &world;
        let send = |family| scope.spawn(move || world.run(&[SEND, &[family]].concat()).succeeds());
        let knocks: Vec<_> = ["-4", "-6"].into_iter().cycle().take(8).map(send).collect();
        knocks.into_iter().map(|knock| knock.join().unwrap()).collect::<Vec<_>>()
    });
    let used: BTreeSet<u64> = printed.iter().map(|packet| counter(&world, packet)).collect();
    assert_eq!(used.len(), 8);
    let text = read(&issued(&world));
    let written: BTreeSet<u64> = text.lines().filter_map(|line| line.parse().ok()).collect();
    assert_eq!(used, written);
}

/// A process that was stopped, or hangs, has its locks for ever.
#[test]
fn a_send_that_another_process_keeps_waiting_says_so_and_goes_on_once_it_can() {
    let world = knocking_world();
    world.run(SEND).succeeds();
    let flows = issued(&world).with_file_name("flows.lock");
    for path in [issued(&world).with_extension("lock"), flows] {
        let lock = File::open(&path).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        let mut waiting = world.command(SEND).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = String::new();
        BufReader::new(waiting.stderr.take().unwrap()).read_line(&mut said).unwrap();
        let expected =
            format!("which has held {0} for 3 s. If it has hung, see which it is with `fuser {0}`", path.display());
        assert!(said.contains(&expected), "{said}");
        assert!(waiting.try_wait().unwrap().is_none());
        drop(lock);
        Ran(waiting.wait_with_output().unwrap()).succeeds();
    }
}

#[test]
fn a_send_that_is_killed_at_any_call_makes_no_counter_repeat() {
    let world = knocking_world();
    let counters = world.path(".local/state/knockq/counters");
    let mut has_lost = false;
    for call in 0.. {
        // Else so many knocks in a row would have to wait.
        let _ = fs::remove_dir_all(&counters);
        let first = counter(&world, &world.run(SEND).succeeds());
        let killed = run_until_call(world.command(SEND), call);
        let recorded = read(&issued(&world));
        let next = counter(&world, &world.run(SEND).succeeds());
        // What was on disk when it died is used, whether anybody saw it or not.
        let used: Vec<u64> = recorded.lines().filter_map(|line| line.parse().ok()).collect();
        assert!(used.contains(&first) && !used.contains(&next), "call {call}: {next} after {recorded}");
        has_lost |= used.len() == 2 && killed.is_none();
        if let Some(printed) = killed {
            assert!(used.contains(&counter(&world, &printed)));
            break;
        }
    }
    assert!(has_lost, "one died with its counter on disk");
}

/// The /etc of two machines, and of systems that have no name, or none yet.
const HERE: &[(&str, &str)] = &[("machine-id", "fedcba9876543210fedcba9876543210\n")];
const ELSEWHERE: &[(&str, &str)] = &[("machine-id", "0123456789abcdef0123456789abcdef\n")];
const NAMELESS: [&[(&str, &str)]; 3] = [&[], &[("machine-id", "")], &[("machine-id", "uninitialized\n")]];

/// What the file of counters in a home says of its machine.
fn machine(world: &World, home: &Path) -> Option<String> {
    let text = read(&home.join(issued(world).strip_prefix(&world.path).unwrap()));
    text.lines().find_map(|line| line.strip_prefix("machine ").map(str::to_owned))
}

/// How often a command that succeeds says that the key was used elsewhere.
fn warnings(ran: &Ran) -> usize {
    ran.succeeds();
    ran.errors().matches("warning: this key was used on another machine before").count()
}

/// A home with all that is in the world's.
fn copy(world: &World) -> PathBuf {
    let copy = world.path("copy");
    fs::create_dir(&copy).unwrap();
    let mut cp = Command::new("cp");
    cp.args(["-a", &world.text(".config"), &world.text(".local"), &world.text("copy")]);
    assert!(cp.status().unwrap().success());
    copy
}

#[test]
fn a_file_of_counters_knows_which_machine_issued_them_and_goes_over_to_the_next() {
    let world = knocking_world();
    let send = |etc, home: &Path| warnings(&world.on_host(etc, home, SEND));
    assert_eq!(send(HERE, &world.path), 0);
    let here = machine(&world, &world.path).unwrap();
    assert!(!HERE[0].1.contains(&here), "which is nobody else's to know");

    let copy = copy(&world);
    assert_eq!(send(HERE, &copy), 0, "a copy on the same machine, a restored backup for one, is no matter");
    assert_eq!(send(ELSEWHERE, &copy), 1);
    assert_ne!(machine(&world, &copy).unwrap(), here);
    assert_eq!(send(HERE, &copy), 1, "it was the other's by then");
    assert_eq!(send(HERE, &world.path), 0);

    // Files of before, and systems without a name, have no such line.
    let path = issued(&world);
    let text = read(&path).replace(&format!("machine {here}\n"), "");
    fs::write(&path, &text).unwrap();
    assert_eq!(send(HERE, &world.path), 0);
    assert_eq!(machine(&world, &world.path), Some(here));
}

#[test]
fn a_machine_without_a_name_knocks_and_neither_warns_nor_takes_the_file_over() {
    let world = knocking_world();
    let send = |etc| warnings(&world.on_host(etc, &world.path, SEND));
    assert_eq!(NAMELESS.map(send), [0; 3]);
    assert_eq!(machine(&world, &world.path), None);
    assert_eq!(send(HERE), 0);
    let here = machine(&world, &world.path);
    assert_eq!(NAMELESS.map(send), [0; 3]);
    assert!(here.is_some() && machine(&world, &world.path) == here);
    assert_eq!([send(HERE), send(ELSEWHERE)], [0, 1]);
}

#[test]
fn a_key_that_was_copied_with_its_counters_is_warned_of_once() {
    let world = knocking_world();
    let send = |etc, home: &Path| world.on_host(etc, home, SEND);
    assert_eq!([(); 2].map(|()| warnings(&send(HERE, &world.path))), [0, 0]);
    let copy = copy(&world);
    let there = send(ELSEWHERE, &copy);
    assert_eq!(warnings(&there), 1, "{}", there.errors());
    assert!(there.errors().contains("`knockq keygen`"), "{}", there.errors());
    assert_eq!(warnings(&send(ELSEWHERE, &copy)), 0, "once");
    assert_eq!(warnings(&send(HERE, &world.path)), 0, "where it belongs");
}
