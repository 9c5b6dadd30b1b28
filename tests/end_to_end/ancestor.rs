//! Against the server of knockknock: an independent one, after the description of its format.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::lab::{self, Capture, Family, Lab, eventually, hex, succeeds};
use crate::proxy::{Proxy, Target, talks};
use crate::{raw_socket, send_raw};

const CIPHER_KEY: &str = "sjiTG60X1BTdJ1FAi3J1pg==\n";
const MAC_KEY: &str = "1hPsDZAaENI/HY8wSE5vCw==\n";

/// All TCP is dropped but to opened ports.
const RULES: &str = "table inet old {\n\
                     set opened { type ipv4_addr . inet_service; flags timeout; }\n\
                     chain input { type filter hook input priority 0;\n\
                     ct state established,related accept\n\
                     iif lo accept\n\
                     ip saddr . tcp dport @opened accept\n\
                     meta l4proto tcp drop\n}\n}\n";

/// The server of knockknock in the lab's server, with one profile for alice.
struct Ancestor<'a> {
    lab: &'a Lab,
    child: Child,
    log: PathBuf,
}

impl<'a> Ancestor<'a> {
    /// With the counter that alice's profile begins with, 17.
    fn start(lab: &'a Lab) -> Self {
        Self::start_with(lab, 0)
    }

    /// The same; so many of the first knocks get lost.
    fn start_with(lab: &'a Lab, lost: u32) -> Self {
        let rules = lab.directory.path.join("rules");
        fs::write(&rules, RULES).unwrap();
        lab.server.nft(&["-f", rules.to_str().unwrap()]);
        original(&Self::profile(lab));
        let log = lab.directory.path.join("ancestor.log");
        let child = Self::spawn(lab, &log, lost);
        Self { lab, child, log }
    }

    fn profile(lab: &Lab) -> PathBuf {
        lab.directory.path.join("ancestor/alice")
    }

    fn spawn(lab: &Lab, log: &Path, lost: u32) -> Child {
        let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/knockknock_server.py");
        let output = File::create(log).unwrap();
        let errors = output.try_clone().unwrap();
        let directory = Self::profile(lab);
        let child = lab.server.enter(|| {
            let mut command = Command::new("python3");
            command.arg(program).arg(directory.parent().unwrap()).args(["inet old opened", &lost.to_string()]);
            command.stdin(Stdio::null()).stdout(output).stderr(errors).spawn().unwrap()
        });
        eventually("the ancestor's server", || fs::read_to_string(log).unwrap().contains("ready\n"));
        child
    }

    fn counter(&self) -> u32 {
        fs::read_to_string(Self::profile(self.lab).join("counter")).unwrap().trim().parse().unwrap()
    }

    /// What came of the SYNs so far.
    fn said(&self) -> Vec<String> {
        fs::read_to_string(&self.log).unwrap().lines().skip(1).map(str::to_owned).collect()
    }

    #[track_caller]
    fn wait_for(&self, lines: usize) -> Vec<String> {
        eventually("another line of the ancestor's server", || self.said().len() >= lines);
        self.said()
    }
}

impl Drop for Ancestor<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the ancestor's log\n{}---", fs::read_to_string(&self.log).unwrap_or_default());
        }
    }
}

/// A profile as knockknock has it, on both sides.
fn original(directory: &Path) {
    DirBuilder::new().recursive(true).mode(0o700).create(directory).unwrap();
    let config = "[main]\nknock_port = 2222\n";
    for (name, text) in [("cipher.key", CIPHER_KEY), ("mac.key", MAC_KEY), ("counter", "17\n"), ("config", config)] {
        write_secret(&directory.join(name), text);
    }
}

fn write_secret(path: &Path, text: &str) {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.unwrap().write_all(text.as_bytes()).unwrap();
}

/// Hosts, services, and alice's profile, with the server's addresses of both families and no key of her machine.
fn lab() -> Lab {
    let lab = Lab::network();
    for port in [22, 25] {
        lab.server.serve(port);
    }
    let hosts = lab.home("alice").join(".config/knockq/hosts");
    fs::create_dir_all(&hosts).unwrap();
    let profile = "address = [\"fd77:1::1\", \"10.77.1.1\"]\ndefault = \"ssh\"\n\n\
                   [knockknock]\nkey_file = \"hosts/server.knockknock\"\nknock_port = 2222\ncounter = 17\n\n\
                   [services.ssh]\nselector = 22\nports = [\"tcp/22\"]\n\n\
                   [services.mail]\nselector = 25\nports = [\"tcp/25\"]\n";
    let keys = [CIPHER_KEY, MAC_KEY].concat();
    for (file, text) in [("server.toml", profile), ("server.knockknock", &keys)] {
        write_secret(&hosts.join(file), text);
    }
    lab
}

fn server_address() -> IpAddr {
    Family::V4.server()
}

fn opened(port: u16, count: u32) -> String {
    format!("opened {port} for 10.77.1.2 count {count}")
}

fn bytes(printed: &str) -> Vec<u8> {
    (0..printed.len()).step_by(2).map(|at| u8::from_str_radix(&printed[at..at + 2], 16).unwrap()).collect()
}

/// A knock that is not sent.
fn print_knock(lab: &Lab) -> Vec<u8> {
    bytes(succeeds(&lab.knockq(&lab.alice, &["send", "server", "--print", "hex"])).trim_end())
}

#[test]
fn an_ancestors_server_opens_for_one_knock_after_the_other_and_for_no_copy_of_one() {
    let lab = lab();
    let server = Ancestor::start(&lab);
    assert!(!lab.alice.reaches(server_address(), 22));
    let capture = Capture::start(&lab.alice, "eth0", lab::is_tcp);
    let sent = lab.knockq(&lab.alice, &["send", "server"]);
    succeeds(&sent);
    assert_eq!(String::from_utf8_lossy(&sent.stderr), "Knocked at server (10.77.1.1) for ssh; count 17\n");
    assert_eq!(server.wait_for(1), [opened(22, 17)]);
    let packets = capture.packets();
    let [knock] = packets.as_slice() else { panic!("{packets:02x?}") };
    drop(lab.alice.gets_in(server_address(), 22));
    succeeds(&lab.knockq(&lab.alice, &["send", "server", "25"]));
    succeeds(&lab.knockq(&lab.alice, &["send", "10.77.1.1"]));
    assert_eq!(server.wait_for(3)[1..], [opened(25, 18), opened(22, 19)]);

    // The same bytes again, as the wire had them: from the same address, and from another.
    lab.alice.enter(|| send_raw(&raw_socket(Family::V4), Family::V4, knock));
    assert_eq!(server.wait_for(4)[3], "refused 10.77.1.2", "{}", hex(knock));
    let printed = print_knock(&lab);
    for _ in 0..2 {
        lab.alice.enter(|| send_raw(&raw_socket(Family::V4), Family::V4, &printed));
    }
    assert_eq!(server.wait_for(6)[4..], [opened(22, 20), "refused 10.77.1.2".to_owned()]);
    succeeds(&lab.knockq(&lab.alice, &["send", "server"]));
    assert_eq!(server.wait_for(7)[6], opened(22, 21), "and all goes on");
    assert_eq!(server.counter(), 22);
}

#[test]
fn knocks_that_are_lost_do_no_harm_until_they_are_twenty_and_then_the_count_is_named_with_the_way_out() {
    let lab = lab();
    let mut server = Ancestor::start(&lab);
    let mut next = 17;
    for (round, lost) in [2, 19].into_iter().enumerate() {
        for _ in 0..lost {
            print_knock(&lab);
        }
        succeeds(&lab.knockq(&lab.alice, &["send", "server", "mail"]));
        next += lost;
        assert_eq!(server.wait_for(round + 1)[round], opened(25, next));
        next += 1;
    }
    let lines = server.said().len();
    for _ in 0..20 {
        print_knock(&lab);
    }
    let waited = lab.knockq(&lab.alice, &["send", "server", "--wait"]);
    assert_eq!(waited.status.code(), Some(1));
    let said = String::from_utf8(waited.stderr).unwrap();
    let count = format!("check, in this order:\n  - the count: this knock's was {}, and", next + 20);
    assert!(said.contains(&count) && said.contains("`knockq explain` on the server"), "{said}");
    let places = ["the count: ", "the knock port: ", "a firewall on the way", "the daemon must", "the service must"];
    let places = places.map(|check| said.find(&format!("\n  - {check}")).unwrap_or_else(|| panic!("{check}: {said}")));
    assert!(places.is_sorted(), "{said}");
    assert!(said.contains("the profile says 2222"), "{said}");
    assert_eq!(server.wait_for(lines + 1)[lines], "refused 10.77.1.2");

    // The ancestor's own way out, and knockq's where the client is the one that is behind.
    let _ = server.child.kill();
    let _ = server.child.wait();
    fs::write(Ancestor::profile(&lab).join("counter"), "1000\n").unwrap();
    server.child = Ancestor::spawn(&lab, &server.log, 0);
    let profile = lab.home("alice").join(".config/knockq/hosts/server.toml");
    let text = fs::read_to_string(&profile).unwrap().replace("counter = 17", "counter = 1000");
    fs::write(&profile, text).unwrap();
    let confirmed = lab.knockq(&lab.alice, &["send", "server", "--wait"]);
    succeeds(&confirmed);
    assert!(String::from_utf8_lossy(&confirmed.stderr).contains("ssh of server is open at 10.77.1.1"));
    assert_eq!(server.wait_for(1), [opened(22, 1000)]);
}

#[test]
fn connect_knocks_at_an_ancestors_server_once_more_where_the_knock_is_lost() {
    let lab = lab();
    let server = Ancestor::start_with(&lab, 1);
    let connected = lab.knockq(&lab.alice, &["connect", "server", "22", "--timeout", "1m"]);
    assert_eq!(succeeds(&connected), "welcome to 22\n");
    assert_eq!(server.wait_for(2), ["lost 10.77.1.2".to_owned(), opened(22, 18)]);
}

#[test]
fn commands_connections_and_the_proxy_go_through_an_ancestors_door() {
    let lab = lab();
    let server = Ancestor::start(&lab);
    let connected = lab.knockq(&lab.alice, &["connect", "server", "22"]);
    assert_eq!(succeeds(&connected), "welcome to 22\n");
    assert_eq!(server.wait_for(1)[0], opened(22, 17));
    lab.server.nft(&["flush", "set", "inet", "old", "opened"]);
    let command = ["send", "server", "25", "--", "nc", "-w", "60", "10.77.1.1", "25"];
    assert_eq!(succeeds(&lab.knockq(&lab.alice, &command)), "welcome to 25\n");
    lab.server.nft(&["flush", "set", "inet", "old", "opened"]);

    let proxy = Proxy::start(&lab, Family::V4, &[]);
    for target in [Target::Address(server_address()), Target::Name("server")] {
        assert!(talks(proxy.connect(&lab.alice, &target, 22).unwrap(), 22));
    }
    // The profile is found by the address, and says that there is no way: nothing goes past the door.
    assert!(proxy.connect(&lab.alice, &Target::Address(Family::V6.server()), 22).is_err());
    let error = "has no IPv4 address there, and a knockknock token goes over no other";
    eventually("the proxy's log", || proxy.log().contains(error));
}

#[test]
fn both_ends_that_have_left_knockknock_go_on_with_its_profiles_and_find_back_when_their_counts_have_parted() {
    let lab = Lab::with("open_for = \"1h\"");
    let (profiles, config) = (lab.directory.path.join("profiles"), lab.config().display().to_string());
    let own = profiles.join("carol");
    original(&own);
    lab.control(&["import", "knockknock", profiles.to_str().unwrap(), "--allow", "ssh", "--config", &config]);
    let client = ["import", "knockknock", own.to_str().unwrap(), "--name", "old", "--address", "10.77.1.1"];
    succeeds(&lab.knockq(&lab.alice, &client));
    let daemon = lab.start();
    let waits = |said: &str| {
        let sent = lab.knockq(&lab.alice, &["send", "old", "--wait"]);
        let errors = String::from_utf8(sent.stderr).unwrap();
        assert!(errors.contains(said), "{errors}");
        sent.status.success()
    };
    assert!(waits("ssh of old is open at 10.77.1.1"));
    lab.revoke(&["--all"]);
    assert_eq!(succeeds(&lab.knockq(&lab.alice, &["connect", "old", "22"])), "welcome to 22\n");
    lab.revoke(&["--all"]);
    let proxy = Proxy::start(&lab, Family::V4, &[]);
    assert!(talks(proxy.connect(&lab.alice, &Target::Name("old"), 22).unwrap(), 22));
    lab.revoke(&["--all"]);
    assert!(!lab.alice.reaches(server_address(), 22));

    for _ in 0..20 {
        succeeds(&lab.knockq(&lab.alice, &["send", "old", "--print", "hex"]));
    }
    assert!(!waits("\n  - the count: this knock's was "));
    let shown = succeeds(&lab.knockq(&lab.alice, &["host", "show", "old"]));
    let next = shown.lines().find_map(|line| line.strip_prefix("# next counter: ")).unwrap();
    let explained = lab.control(&["explain", "--config", &config]);
    assert!(explained.contains(&format!("knockq user counter carol {next}")), "{explained}");
    lab.control(&["user", "counter", "carol", next, "--config", &config]);
    assert!(waits("ssh of old is open at 10.77.1.1"));
    daemon.stop();
}
