//! Profiles of knockknock's, taken over by `knockq import`, and the SYN of its client as Debian's hping3 sends it.

use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use etherparse::{IpNumber, Ipv6Header, TcpHeader};
use knockq::crypto::PrivateKey;
use knockq::crypto::knockknock::{Key, Token};
use serde_json::Value;

use crate::lab::{Daemon, FAMILIES, Family, Host, Lab, eventually, succeeds};
use crate::status::count;
use crate::{raw_socket, send_raw};

/// Where carol's profile knocks.
const KNOCK_PORT: u16 = 2222;

/// The number of carol's first knock.
const FIRST: u32 = 17;

/// Nothing of the original's is IPv6.
const SERVER: Family = Family::V4;

/// Makes a profile in a directory, as knockknock does, with keys of this number.
fn profile(directory: &Path, number: u8, knock_port: u16, counter: u32) -> Key {
    DirBuilder::new().recursive(true).mode(0o700).create(directory).unwrap();
    let [cipher, mac] = [0x11, 0x77].map(|salt| BASE64.encode([number ^ salt; 16]) + "\n");
    let key = Key::new(&[cipher.as_str(), &mac].concat().parse().unwrap());
    for (file, contents) in [
        ("cipher.key", cipher),
        ("mac.key", mac),
        ("counter", format!("{counter}\n")),
        ("config", format!("[main]\nknock_port = {knock_port}\n\n")),
    ] {
        fs::write(directory.join(file), contents).unwrap();
        fs::set_permissions(directory.join(file), Permissions::from_mode(0o600)).unwrap();
    }
    key
}

/// What knockknock's client runs for a knock.
fn hping3(host: &Host, knock_port: u16, token: &Token) {
    let Token { ip_id, sequence, acknowledgment, window } = *token;
    assert_ne!(ip_id, 0, "the kernel would put another in its place: take other keys or counters");
    let [id, window, sequence, acknowledgment, port, server] =
        [&ip_id as &dyn ToString, &window, &sequence, &acknowledgment, &knock_port, &SERVER.server()]
            .map(ToString::to_string);
    let mut command = Command::new("hping3");
    command.args(["-S", "-c", "1", "-p", &port, "-N", &id, "-w", &window, "-M", &sequence, "-L", &acknowledgment]);
    // It says that nobody answers, as is right.
    let ran = host.enter(|| command.arg(&server).output().unwrap());
    let said = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(said.contains("1 packets transmitted"), "{said}");
}

impl Lab {
    fn originals(&self) -> std::path::PathBuf {
        self.directory.path.join("profiles")
    }

    /// What is in that directory become users who may open ssh.
    fn import(&self) -> String {
        let (directory, config) = (self.originals().display().to_string(), self.config().display().to_string());
        self.control(&["import", "knockknock", &directory, "--allow", "ssh", "--config", &config])
    }

    /// A server with carol, who has a profile of knockknock's.
    fn with_carol() -> (Self, Key) {
        let lab = Self::with("open_for = \"1h\"");
        let key = profile(&lab.originals().join("carol"), 1, KNOCK_PORT, FIRST);
        lab.import();
        (lab, key)
    }

    /// Carol's knock of this number, for ssh.
    fn knock_of(&self, key: &Key, number: u32) {
        hping3(&self.alice, KNOCK_PORT, &key.seal(number, 22));
    }

    /// The knock opens ssh for where it came from; the door is shut again.
    #[track_caller]
    fn opens(&self, send: impl Fn()) {
        send();
        self.wait_for_door(SERVER.alice(), 22);
        drop(self.alice.gets_in(SERVER.server(), 22));
        self.revoke(&["--all"]);
    }

    /// The daemon sees a packet, and makes nothing of it.
    #[track_caller]
    fn refuses(&self, send: impl Fn()) {
        let seen = |status: &Value| status["syns"]["seen"].as_u64().unwrap();
        let ended = |status: &Value| -> u64 {
            status["packets"].as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum()
        };
        let before = self.status();
        send();
        eventually("the packet", || {
            let now = self.status();
            seen(&now) > seen(&before) && ended(&now) == seen(&now)
        });
        assert_eq!(count(&self.status(), "granted"), count(&before, "granted"));
        for family in FAMILIES {
            assert_eq!(self.door(family.alice(), 22), None);
        }
    }

    /// What `knockq explain` found last of a user's knocks.
    fn cause(&self, user: &str) -> Value {
        let config = self.config().display().to_string();
        let found: Value = serde_json::from_str(&self.control(&["explain", "--json", "--config", &config])).unwrap();
        let theirs: Vec<&Value> = found.as_array().unwrap().iter().filter(|finding| finding["user"] == user).collect();
        theirs.last().unwrap_or_else(|| panic!("nothing of {user}: {found:#}"))["causes"].clone()
    }

    fn set_counter(&self, user: &str, number: u32) {
        let config = self.config().display().to_string();
        self.control(&["user", "counter", user, &number.to_string(), "--config", &config]);
    }
}

#[test]
fn a_knock_of_the_originals_client_opens_once_and_never_again_whatever_befalls_the_daemon() {
    let lab = Lab::with("open_for = \"1h\"");
    let mut daemon = lab.start();
    let key = profile(&lab.originals().join("carol"), 1, KNOCK_PORT, FIRST);
    assert_eq!(lab.import(), "user carol: ssh, knock port 2222, next counter 17\n");
    assert!(!lab.alice.reaches(SERVER.server(), 22));
    lab.opens(|| lab.knock_of(&key, FIRST));
    daemon.wait_for("granted user=carol service=ssh source=10.77.1.2 port=tcp/22 seconds=3600 bound=false");
    lab.refuses(|| lab.knock_of(&key, FIRST));

    daemon.kill();
    let mut daemon = lab.start();
    lab.refuses(|| lab.knock_of(&key, FIRST));
    lab.opens(|| lab.knock_of(&key, FIRST + 1));
    daemon.kill();
    let daemon = lab.start();
    for number in [FIRST, FIRST + 1] {
        lab.refuses(|| lab.knock_of(&key, number));
    }
    lab.opens(|| lab.knock_of(&key, FIRST + 2));
    daemon.stop();
}

/// Server and client each took their half of one profile; and whoever still has the original goes on with the same numbers.
#[test]
fn what_both_sides_have_imported_opens_for_send_and_connect_and_for_the_original_in_between() {
    let (lab, key) = Lab::with_carol();
    let halves = lab.home("carol").join(".knockknock/10.77.1.1");
    profile(&halves, 1, KNOCK_PORT, FIRST);
    let carol = |arguments: &[&str]| succeeds(&lab.knockq_as("carol", &lab.alice, arguments));
    carol(&["import", "knockknock", halves.to_str().unwrap(), "--name", "home"]);
    let daemon = lab.start();
    carol(&["send", "home", "--wait"]);
    drop(lab.alice.gets_in(SERVER.server(), 22));
    lab.revoke(&["--all"]);
    assert_eq!(carol(&["connect", "home", "22"]), "welcome to 22\n");
    lab.revoke(&["--all"]);
    for number in [5_u32, 20, 35] {
        lab.opens(|| lab.knock_of(&key, FIRST + number));
    }

    // This client's count is far behind now, as after a restored backup.
    lab.refuses(|| {
        carol(&["send", "home"]);
    });
    let causes = lab.cause("carol");
    let behind = causes.as_array().unwrap().iter().find(|cause| cause["cause"] == "count_behind");
    let next = behind.unwrap_or_else(|| panic!("{causes:#}"))["next"].as_u64().unwrap();
    assert_eq!(next, u64::from(FIRST + 36));
    let host = lab.home("carol").join(".config/knockq/hosts/home.toml");
    let text = fs::read_to_string(&host).unwrap();
    fs::write(&host, text.replace(&format!("counter = {FIRST}"), &format!("counter = {next}"))).unwrap();
    carol(&["send", "home", "--wait"]);
    lab.wait_for_door(SERVER.alice(), 22);
    daemon.stop();
}

#[test]
fn nineteen_lost_knocks_are_tolerated_and_after_twenty_explain_names_the_way_out() {
    let (lab, key) = Lab::with_carol();
    let daemon = lab.start();
    let mut next = FIRST;
    for lost in [0, 2, 19] {
        lab.opens(|| lab.knock_of(&key, next + lost));
        next += lost + 1;
    }
    // Those that were lost, or held back, are spent.
    for held in [next - 2, next - 19] {
        lab.refuses(|| lab.knock_of(&key, held));
    }

    let sent = next + 20;
    lab.refuses(|| lab.knock_of(&key, sent));
    let causes = lab.cause("carol");
    let is_it = |cause: &&Value| cause["cause"] == "count_ahead";
    let ahead = causes.as_array().unwrap().iter().find(is_it).unwrap_or_else(|| panic!("{causes:#}"));
    assert_eq!((&ahead["knocks"], &ahead["next"]), (&20.into(), &(sent + 1).into()), "{ahead}");
    let config = lab.config().display().to_string();
    let text = lab.control(&["explain", "--config", &config]);
    let way_out = format!("knockq user counter carol {}", sent + 1);
    assert!(text.contains(&way_out), "{text}");

    let words: Vec<&str> = way_out.split(' ').skip(1).chain(["--config", &config]).collect();
    lab.control(&words);
    lab.refuses(|| lab.knock_of(&key, sent));
    lab.opens(|| lab.knock_of(&key, sent + 1));
    daemon.stop();
}

#[test]
fn a_knock_counts_at_its_profiles_own_port_alone() {
    let (lab, key) = Lab::with_carol();
    profile(&lab.originals().join("dave"), 2, 3333, 0);
    let daemon = lab.start();
    assert!(lab.import().contains("user dave: ssh, knock port 3333, next counter 0"));
    for port in [3333, 20_000] {
        lab.refuses(|| hping3(&lab.alice, port, &key.seal(FIRST, 22)));
    }
    // For what carol may not open, and for what nobody can.
    for service in [25, 4444] {
        lab.refuses(|| hping3(&lab.alice, KNOCK_PORT, &key.seal(FIRST + 1, service)));
    }
    lab.refuses(|| lab.knock_of(&key, FIRST)); // what came to another port is spent
    lab.opens(|| lab.knock_of(&key, FIRST + 1));
    daemon.stop();
}

/// The same words in IPv6: it has no IP ID, and so holds no knock of this format.
#[test]
fn no_knock_of_the_original_is_taken_over_ipv6() {
    let (lab, key) = Lab::with_carol();
    let daemon = lab.start();
    let Token { sequence, acknowledgment, window, .. } = key.seal(FIRST, 22);
    let (v6, mut tcp) = (Family::V6, TcpHeader::new(40_000, KNOCK_PORT, sequence, window));
    tcp.syn = true;
    tcp.acknowledgment_number = acknowledgment;
    let octets = |family: Family, pick: fn(Family) -> std::net::IpAddr| match pick(family) {
        std::net::IpAddr::V6(address) => address.octets(),
        std::net::IpAddr::V4(_) => unreachable!(),
    };
    let ip = Ipv6Header {
        payload_length: 20,
        next_header: IpNumber::TCP,
        hop_limit: 64,
        source: octets(v6, Family::alice),
        destination: octets(v6, Family::server),
        ..Ipv6Header::default()
    };
    tcp.checksum = tcp.calc_checksum_ipv6(&ip, &[]).unwrap();
    let packet = [ip.to_bytes().as_slice(), &tcp.to_bytes()].concat();
    lab.refuses(|| lab.alice.enter(|| send_raw(&raw_socket(v6), v6, &packet)));
    lab.opens(|| lab.knock_of(&key, FIRST));
    daemon.stop();
}

#[test]
fn a_hundred_users_and_a_hundred_profiles_are_served_by_one_daemon() {
    let lab = Lab::with("open_for = \"1h\"");
    for number in 2..=100 {
        let public = *PrivateKey::generate().unwrap().public();
        let entry = lab.config().with_file_name("users.d").join(format!("token-{number:03}.toml"));
        fs::write(entry, format!("public_key = \"{public}\"\nservices = [\"ssh\"]\n")).unwrap();
    }
    let keys: Vec<Key> = (1..=100_u8)
        .map(|number| {
            let directory = lab.originals().join(format!("profile-{number:03}"));
            profile(&directory, number, 2000 + u16::from(number), 1000 * u32::from(number))
        })
        .collect();
    assert_eq!(lab.import().lines().count(), 100);
    let mut daemon = lab.start();
    assert_eq!(lab.status()["users"], 200);
    let knock = |number: usize| {
        let number_16 = u16::try_from(number).unwrap();
        hping3(&lab.alice, 2000 + number_16, &keys[number - 1].seal(1000 * u32::from(number_16), 22));
    };
    for number in [1, 57, 100] {
        lab.opens(|| knock(number));
        daemon.wait_for(&format!("granted user=profile-{number:03} service=ssh source=10.77.1.2"));
        lab.refuses(|| knock(number));
    }
    for (before, family) in (0..).zip(FAMILIES) {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
        assert_eq!(count(&lab.status(), "granted"), 4 + before);
    }
    daemon.stop();
}

/// Spends a knock, loses the store, and finds all knocks refused until the count is set anew.
#[track_caller]
fn waits_for_a_count(lab: &Lab, key: &Key, lose: impl FnOnce(Daemon)) {
    let daemon = lab.start();
    lab.opens(|| lab.knock_of(key, FIRST));
    lose(daemon);
    let mut daemon = lab.start();
    daemon.wait_for("knockq user counter");
    for number in [FIRST, FIRST + 1] {
        lab.refuses(|| lab.knock_of(key, number));
        let causes = lab.cause("carol");
        assert_eq!(
            (&causes[0]["cause"], &causes[0]["next"]),
            (&"not_counted".into(), &Value::Null),
            "a replay names none"
        );
    }
    lab.set_counter("carol", FIRST + 2);
    for number in [FIRST, FIRST + 1] {
        lab.refuses(|| lab.knock_of(key, number));
    }
    lab.opens(|| lab.knock_of(key, FIRST + 2));
    daemon.stop();
}

#[test]
fn a_store_that_is_lost_takes_no_knock_of_a_profile_until_its_count_is_set_anew() {
    let (lab, key) = Lab::with_carol();
    waits_for_a_count(&lab, &key, |daemon| {
        daemon.stop();
        fs::remove_file(lab.store()).unwrap();
        let config = lab.config().display().to_string();
        lab.control(&["recover", "--config", &config]);
    });
}

#[test]
fn a_store_that_is_restored_from_a_copy_takes_no_knock_of_a_profile_until_its_count_is_set_anew() {
    let (lab, key) = Lab::with_carol();
    let copy = lab.directory.path.join("copy");
    fs::copy(lab.store(), &copy).unwrap();
    waits_for_a_count(&lab, &key, |daemon| {
        daemon.stop();
        // Over the bytes of the store, it could not be told from it (docs/faults.md).
        fs::remove_file(lab.store()).unwrap();
        fs::copy(&copy, lab.store()).unwrap();
    });
}

/// The knock ports of profiles belong into the table, which is the administrator's own here.
#[test]
fn where_the_table_is_the_administrators_an_import_says_that_it_has_to_be_loaded_anew() {
    let lab = Lab::with("open_for = \"1h\"");
    lab.set("ruleset = \"external\"");
    lab.load_include_file();
    let daemon = lab.start();
    let key = profile(&lab.originals().join("carol"), 1, KNOCK_PORT, FIRST);
    let (directory, config) = (lab.originals().display().to_string(), lab.config().display().to_string());
    let import =
        || lab.knockq(&lab.server, &["import", "knockknock", &directory, "--allow", "ssh", "--config", &config]);
    let refused = import();
    let errors = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && errors.contains("knockq ruleset --output"), "{errors}");
    lab.load_include_file();
    succeeds(&import());
    lab.opens(|| lab.knock_of(&key, FIRST));
    daemon.stop();
}

/// The floor of a store in doubt is one of tokens.
#[test]
fn where_all_users_have_profiles_of_the_original_a_store_in_doubt_shuts_nobody_out_until_a_time() {
    let (lab, key) = Lab::with_carol();
    let config = lab.config().display().to_string();
    lab.control(&["user", "remove", "alice", "--config", &config]);
    let copy = lab.store().with_extension("copy");
    fs::copy(lab.store(), &copy).unwrap();
    fs::rename(copy, lab.store()).unwrap();
    let daemon = lab.start();
    let check = lab.knockq(&lab.server, &["check", "--config", &config]);
    succeeds(&check);
    let status = lab.control(&["status", "--config", &config]);
    let said = format!("{}{status}", String::from_utf8_lossy(&check.stderr));
    assert!(!said.contains("no knocks are accepted"), "{said}");
    assert_eq!(lab.status()["store"]["in_doubt_until"], Value::Null);
    lab.set_counter("carol", FIRST);
    lab.opens(|| lab.knock_of(&key, FIRST)); // long before a window has passed
    let log = daemon.stop();
    assert!(log.contains("is a copy of a counter store") && !log.contains("no knocks are accepted"), "{log}");
}
