//! The client as people use it every day: with ssh, in scripts, by other names than the profile's.

use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, Read, Write, pipe};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_setfl};

use crate::lab::{self, FAMILIES, Family, Host, Lab, eventually, knockq, succeeds};

/// Debian's OpenSSH server in the lab's server, until this is dropped.
pub(crate) struct Sshd {
    child: Child,
    log: PathBuf,
}

impl Sshd {
    pub(crate) fn start(lab: &Lab) -> Self {
        fs::create_dir_all("/run/sshd").unwrap();
        let directory = lab.directory.path.join("ssh");
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, Permissions::from_mode(0o700)).unwrap();
        let path = |name: &str| directory.join(name).display().to_string();
        for key in ["host", "user"] {
            let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f", &path(key)]).output();
            succeeds(&made.unwrap());
        }
        let (host, user) = (path("host"), path("user.pub"));
        let settings = format!(
            "HostKey {host}\nAuthorizedKeysFile {user}\nStrictModes no\nUsePAM no\nPidFile none\n\
             PermitRootLogin yes\nPrintMotd no\nSubsystem sftp internal-sftp\n"
        );
        fs::write(path("sshd_config"), settings).unwrap();
        let log = File::create(path("log")).unwrap();
        let child = lab.server.enter(|| {
            let mut command = Command::new("/usr/sbin/sshd");
            command.args(["-D", "-e", "-f", &path("sshd_config")]).stdin(Stdio::null()).stderr(log);
            command.spawn().unwrap()
        });
        let listens = || lab.server.enter(|| TcpStream::connect(("127.0.0.1", 22)).is_ok());
        eventually("sshd", listens);
        let host = fs::read_to_string(path("host.pub")).unwrap();
        let hosts = ["10.77.1.1", "fd77:1::1"].map(|address| format!("{address} {host}"));
        fs::write(path("known_hosts"), hosts.concat()).unwrap();
        let client = format!(
            "IdentityFile {}\nUserKnownHostsFile {}\nStrictHostKeyChecking yes\nUser root\nConnectTimeout 20\n",
            path("user"),
            path("known_hosts")
        );
        fs::write(path("config"), client).unwrap();
        Self { child, log: path("log").into() }
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM);
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- sshd's log\n{}---", fs::read_to_string(&self.log).unwrap_or_default());
        }
    }
}

/// ssh or scp on alice's host, with this added to its configuration.
pub(crate) fn ssh(lab: &Lab, program: &str, more: &str, arguments: &[&str]) -> Command {
    let directory = lab.directory.path.join("ssh");
    let config = format!("{more}\n{}", fs::read_to_string(directory.join("config")).unwrap());
    let file = directory.join("config.with-more");
    fs::write(&file, config).unwrap();
    let mut command = Command::new(program);
    command.arg("-F").arg(file).args(arguments).env("HOME", lab.home("alice")).env("PATH", path()).stdin(Stdio::null());
    command
}

/// With the knockq under test.
fn path() -> String {
    format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", knockq().parent().unwrap().display())
}

fn run(host: &Host, mut command: Command) -> Output {
    host.enter(|| command.output().unwrap())
}

const PROXY_COMMAND: &str = "ProxyCommand=knockq connect %h %p";

/// Services that a test plays itself; alice may open all of them.
fn lab_with_services(services: &str) -> Lab {
    let lab = Lab::network();
    lab.configure(services);
    lab.add_user("alice", &["ssh"]);
    lab
}

#[test]
fn ssh_and_scp_connect_through_a_knock_and_meet_silence_without() {
    let lab = lab_with_services("[services.ssh]\nports = [\"tcp/22\"]\nopen_for = \"6s\"\n");
    let _sshd = Sshd::start(&lab);
    let _daemon = lab.start();
    let file = lab.directory.path.join("file");
    let contents: Vec<u8> = (0..10_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(&file, &contents).unwrap();
    for family in FAMILIES {
        let server = family.server().to_string();
        let without = run(&lab.alice, ssh(&lab, "ssh", "ConnectTimeout 1", &[&server, "true"]));
        assert_eq!(without.status.code(), Some(255), "{without:?}");
        let knocked = run(&lab.alice, ssh(&lab, "ssh", "", &["-o", PROXY_COMMAND, &server, "echo $((6 * 7))"]));
        assert_eq!(succeeds(&knocked), "42\n");
        assert!(knocked.stderr.is_empty(), "{}", String::from_utf8_lossy(&knocked.stderr));

        // An entry of ~/.ssh/config, as docs/guide-client.md has it.
        let entry = format!("Host home\n    HostName {server}\n    ProxyCommand knockq connect %h %p\nHost *\n");
        let copy = lab.directory.path.join(format!("copy-{family:?}"));
        let copied = run(
            &lab.alice,
            ssh(&lab, "scp", &entry, &["-q", file.to_str().unwrap(), &format!("home:{}", copy.display())]),
        );
        succeeds(&copied);
        assert!(fs::read(copy).unwrap() == contents, "another file arrived");
        let failed = run(&lab.alice, ssh(&lab, "ssh", &entry, &["home", "exit 7"]));
        assert_eq!(failed.status.code(), Some(7), "{failed:?}");
    }
}

/// A connection that nobody uses for an hour, in seconds: the firewall forgets it soon, the door is shut long since, and what
/// keeps it known is the keepalive that `connect` asks for, as ssh does on connections of its own.
#[test]
fn an_idle_ssh_session_outlives_its_door() {
    let lab = lab_with_services("[services.ssh]\nports = [\"tcp/22\"]\nopen_for = \"2s\"\n");
    let _sshd = Sshd::start(&lab);
    let _daemon = lab.start();
    for (key, value) in [("tcp_keepalive_time", "1"), ("tcp_keepalive_intvl", "1")] {
        lab.alice.sysctl(&format!("net/ipv4/{key}"), value);
    }
    lab.server.sysctl("net/netfilter/nf_conntrack_tcp_timeout_established", "5");
    for family in FAMILIES {
        let server = family.server().to_string();
        let mut command = ssh(&lab, "ssh", "", &["-o", PROXY_COMMAND, &server, "cat"]);
        let mut session = lab.alice.enter(|| command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
        let (mut input, output) = (session.stdin.take().unwrap(), session.stdout.take().unwrap());
        let mut output = BufReader::new(output);
        let mut echoes = |text: &str| {
            input.write_all(format!("{text}\n").as_bytes()).unwrap();
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
            line.trim_end() == text
        };
        assert!(echoes("hello"));
        eventually("closing", || lab.door(family.alice(), 22).is_none());
        thread::sleep(Duration::from_secs(10)); // twice what the firewall remembers it for
        assert!(echoes("still there"));
        drop(input);
        assert!(session.wait().unwrap().success());
    }
}

/// Takes one connection, and hands it to this.
fn answer(host: &Host, port: u16, serve: impl FnOnce(TcpStream) + Send + 'static) -> thread::JoinHandle<()> {
    let mut listener = None;
    eventually("a port to listen on", || {
        listener = host.enter(|| TcpListener::bind(("::", port))).ok(); // connections of before may still be there
        listener.is_some()
    });
    thread::spawn(move || serve(listener.unwrap().accept().unwrap().0))
}

fn connect(lab: &Lab, family: Family, more: &[&str]) -> Command {
    let mut command = Command::new(knockq());
    command.args(["connect", "server", "22", family.flag()]).args(more).env("HOME", lab.home("alice"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn each_direction_of_a_connection_ends_by_itself_and_its_end_is_the_commands() {
    let lab = lab_with_services("[services.ssh]\nports = [\"tcp/22\"]\nopen_for = \"6s\"\nonce = true\n");
    let _daemon = lab.start();
    for family in FAMILIES {
        // The client ends first: the server reads all, and still answers.
        let served = answer(&lab.server, 22, |mut stream| {
            let mut all = String::new();
            stream.read_to_string(&mut all).unwrap();
            stream.write_all(format!("{} bytes", all.len()).as_bytes()).unwrap();
        });
        let mut child = lab.alice.enter(|| connect(&lab, family, &[]).spawn().unwrap());
        child.stdin.take().unwrap().write_all(&[b'x'; 300_000]).unwrap();
        assert_eq!(succeeds(&child.wait_with_output().unwrap()), "300000 bytes");
        served.join().unwrap();

        // The server ends first: standard output ends, and standard input still arrives.
        let (tell, told) = mpsc::channel();
        let served = answer(&lab.server, 22, move |mut stream| {
            stream.write_all(b"no newline").unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut all = String::new();
            stream.read_to_string(&mut all).unwrap();
            tell.send(all).unwrap();
        });
        let mut child = lab.alice.enter(|| connect(&lab, family, &[]).spawn().unwrap());
        let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut all = String::new();
        output.read_to_string(&mut all).unwrap();
        assert_eq!(all, "no newline");
        input.write_all(b"after its end").unwrap();
        drop(input);
        assert_eq!(told.recv_timeout(lab::PATIENCE).unwrap(), "after its end");
        assert!(child.wait().unwrap().success());
        served.join().unwrap();

        // The connection breaks.
        let served = answer(&lab.server, 22, |mut stream| {
            stream.read_exact(&mut [0]).unwrap();
            rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap(); // closing it resets it
        });
        let mut child = lab.alice.enter(|| connect(&lab, family, &[]).spawn().unwrap());
        child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        let broken = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&broken.stderr).into_owned();
        assert!(broken.status.code() == Some(1) && said.contains("reset by peer"), "{said}");
        served.join().unwrap();
    }
}

/// Whoever else has a descriptor may set it so: it belongs to all of them.
#[test]
fn nothing_is_lost_over_standard_input_and_output_that_do_not_wait() {
    let lab = lab_with_services("[services.ssh]\nports = [\"tcp/22\"]\nopen_for = \"6s\"\nonce = true\n");
    let _daemon = lab.start();
    for family in FAMILIES {
        let served = answer(&lab.server, 22, |mut stream| {
            stream.write_all(b"hello").unwrap();
            let mut all = vec![0; 1_000_000];
            stream.read_exact(&mut all).unwrap();
            stream.write_all(&all).unwrap();
        });
        let ((input, mut sender), (mut receiver, output)) = (pipe().unwrap(), pipe().unwrap());
        fcntl_setfl(&input, OFlags::NONBLOCK).unwrap();
        fcntl_setfl(&output, OFlags::NONBLOCK).unwrap();
        let full = output.try_clone().unwrap();
        let mut command = connect(&lab, family, &[]);
        let child = lab.alice.enter(|| command.stdin(input).stdout(output).spawn().unwrap());
        drop(command);
        let mut hello = [0; 5];
        receiver.read_exact(&mut hello).unwrap(); // by then it waits for its input
        sender.write_all(&vec![7; 1_000_000]).unwrap();
        drop(sender);
        // By its places, not by its bytes: what small writes leave of a page stays empty.
        let is_full = || poll(&mut [PollFd::new(&full, PollFlags::OUT)], Some(&Timespec::default())).unwrap() == 0;
        eventually("a full pipe", is_full);
        drop(full);
        let mut all = Vec::new();
        receiver.read_to_end(&mut all).unwrap();
        assert!(all == vec![7; 1_000_000], "{} bytes", all.len());
        succeeds(&child.wait_with_output().unwrap());
        served.join().unwrap();
    }
}

#[test]
fn connect_says_why_there_is_no_connection() {
    let lab = Lab::new();
    lab.add_user("bob", &["ssh", "mail"]);
    let daemon = lab.start();
    daemon.stop();
    for family in FAMILIES {
        let shut = run(&lab.alice, connect(&lab, family, &["--timeout", "2s"]));
        let said = String::from_utf8_lossy(&shut.stderr).into_owned();
        assert_eq!(shut.status.code(), Some(1), "{said}");
        for text in ["still shut 2 s after the knock", "in this order", "clock", "NAT", "20000-21023", "profile"] {
            assert!(said.contains(text), "no {text}: {said}");
        }
    }
    for (host, port, code, expected) in [
        ("server", "25", 64, "no service `25`"),
        ("elsewhere", "22", 78, "there is no profile by this name"),
        ("server", "ssh2", 64, "name one of: ssh"),
    ] {
        let refused = lab.knockq(&lab.alice, &["connect", host, port]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.status.code() == Some(code) && said.contains(expected), "{said}");
    }
}

#[test]
fn a_command_is_run_once_the_service_is_open_and_not_before() {
    let lab = Lab::new();
    let daemon = lab.start();
    for family in FAMILIES {
        let send =
            |command: &[&str]| lab.knockq(&lab.alice, &[&["send", "server", family.flag(), "--"], command].concat());
        assert_eq!(succeeds(&send(&["sh", "-c", "echo \"$0 $1\"", "one", "two words"])), "one two words\n");
        assert_eq!(send(&["sh", "-c", "exit 7"]).status.code(), Some(7));
        let missing = send(&["no-such-program"]);
        let said = String::from_utf8_lossy(&missing.stderr).into_owned();
        assert!(missing.status.code() == Some(127) && said.contains("no-such-program: No such file"), "{said}");
        assert_eq!(send(&["/"]).status.code(), Some(126));
    }
    daemon.stop();
    eventually("closing", || FAMILIES.iter().all(|family| lab.door(family.alice(), 22).is_none()));
    let shut = lab.knockq(&lab.alice, &["send", "server", "-4", "--", "echo", "open"]);
    assert!(shut.status.code() == Some(1) && shut.stdout.is_empty(), "{shut:?}");
}

#[test]
fn waiting_is_shown_on_a_terminal_and_nowhere_else() {
    let lab = Lab::new();
    let daemon = lab.start();
    daemon.stop();
    let python = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)";
    let mut command = Command::new("python3");
    command.args(["-c", python]).arg(knockq()).args(["send", "server", "-4", "--wait"]).env("HOME", lab.home("alice"));
    let on_terminal = run(&lab.alice, command);
    let shown = String::from_utf8_lossy(&on_terminal.stdout).into_owned();
    assert_eq!(on_terminal.status.code(), Some(1), "{shown}");
    assert!(shown.contains("\rWaiting for ssh of server to open: 3 s") && shown.contains("still shut"), "{shown}");
    let in_pipe = lab.knockq(&lab.alice, &["send", "server", "-4", "--wait"]);
    assert!(!String::from_utf8_lossy(&in_pipe.stderr).contains("Waiting"), "{in_pipe:?}");
}

/// The addresses of alice's profile.
fn set_addresses(lab: &Lab, addresses: &[&str]) {
    let profile = lab.home("alice").join(".config/knockq/hosts/server.toml");
    let text = fs::read_to_string(&profile).unwrap();
    let lines = text.lines().map(|line| match line.starts_with("address") {
        true => format!("address = {addresses:?}\n"),
        false => format!("{line}\n"),
    });
    fs::write(&profile, lines.collect::<String>()).unwrap();
}

#[test]
fn a_host_may_be_named_by_its_profile_by_an_address_or_by_its_name() {
    let lab = Lab::new();
    let daemon = lab.start();
    set_addresses(&lab, &["10.77.1.1", "Server.Knockq.Example", "fd77:1::1"]);
    // Names of its own, as /etc/hosts has them for this host alone.
    let own = format!("/etc/netns/{}", lab.alice.name);
    fs::create_dir_all(&own).unwrap();
    fs::write(format!("{own}/hosts"), "fd77:1::1 Server.Knockq.Example\n10.77.1.1 other.knockq.example\n").unwrap();
    let send = |name: &str| {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &lab.alice.name]).arg(knockq()).args(["send", name, "--wait"]);
        command.env("HOME", lab.home("alice")).output().unwrap()
    };
    for (name, server) in [
        ("server", "10.77.1.1"),
        ("10.77.1.1", "10.77.1.1"),
        ("FD77:1:0::1", "fd77:1::1"),
        ("server.knockq.example.", "fd77:1::1"), // in the profile, in other letters
        ("other.knockq.example", "10.77.1.1"),   // not in the profile, but its address is
    ] {
        let sent = send(name);
        let said = String::from_utf8_lossy(&sent.stderr).into_owned();
        assert!(sent.status.success() && said.contains(&format!("Knocked at server ({server})")), "{name}: {said}");
    }
    fs::remove_dir_all(own).unwrap();
    assert_eq!(send("elsewhere.knockq.example").status.code(), Some(78));
    daemon.stop();
}

/// Each name would take its resolver's ten seconds, two minutes in all.
#[test]
fn names_that_no_resolver_answers_for_do_not_keep_a_knock_from_an_address() {
    let lab = Lab::new();
    let daemon = lab.start();
    let names: Vec<String> = (0..12).map(|n| format!("server{n}.knockq.example")).collect();
    let addresses: Vec<&str> = names.iter().map(String::as_str).chain(["10.77.1.1"]).collect();
    set_addresses(&lab, &addresses);
    lab.server.nft(&["add table inet other"]);
    lab.server.nft(&["add chain inet other input { type filter hook input priority 10; }"]);
    lab.server.nft(&["add rule inet other input udp dport 53 drop"]);
    let own = format!("/etc/netns/{}", lab.alice.name);
    fs::create_dir_all(&own).unwrap();
    fs::write(format!("{own}/resolv.conf"), "nameserver 10.77.1.1\n").unwrap();
    File::options().create(true).append(true).open("/etc/resolv.conf").unwrap(); // which ip lays the other over
    let mut command = Command::new("timeout");
    command.args(["60", "ip", "netns", "exec", &lab.alice.name]).arg(knockq()).args(["connect", "server", "22"]);
    let connected = command.env("HOME", lab.home("alice")).stdin(Stdio::null()).output().unwrap();
    fs::remove_dir_all(own).unwrap();
    assert_eq!(succeeds(&connected), "welcome to 22\n");
    daemon.stop();
}

#[test]
fn an_address_that_no_way_leads_to_is_left_for_the_next() {
    let lab = Lab::new();
    let daemon = lab.start();
    // One that nobody has, one whose packets are lost, and the server.
    set_addresses(&lab, &["10.99.0.1", "fd99::1", "fd77:1::1"]);
    lab.alice.ip("route add unreachable 10.99.0.0/16");
    lab.alice.ip("-6 route add blackhole fd99::/16");
    let sent = lab.knockq(&lab.alice, &["send", "server", "--wait"]);
    assert!(String::from_utf8_lossy(&sent.stderr).contains("Knocked at server (fd77:1::1)"), "{sent:?}");
    succeeds(&sent);
    // With a way to all of them `connect` finds out which one answers.
    lab.alice.ip("route del unreachable 10.99.0.0/16");
    lab.alice.ip("-6 route del blackhole fd99::/16");
    let connected = run(&lab.alice, {
        let mut command = Command::new(knockq());
        command
            .args(["connect", "server", "ssh", "--timeout", "30s"])
            .env("HOME", lab.home("alice"))
            .stdin(Stdio::null());
        command
    });
    assert_eq!(succeeds(&connected), "welcome to 22\n");
    daemon.stop();
}

/// The first two attempts never get through, however often the kernel sends them again.
#[test]
fn a_fresh_attempt_connects_where_those_before_are_lost() {
    let lab = Lab::with("open_for = \"1h\"");
    let _daemon = lab.start();
    for family in FAMILIES {
        let syn = "add rule inet lossy out tcp dport 22 tcp flags & (syn | ack) == syn";
        lab.alice.nft(&[&format!(
            "add table inet lossy; add chain inet lossy out {{ type filter hook output priority 0; }}; \
             add set inet lossy lost {{ type inet_service; flags dynamic; }}; {syn} tcp sport @lost drop; \
             {syn} limit rate over 1/hour burst 2 packets accept; {syn} add @lost {{ tcp sport }} drop"
        )]);
        let child = lab.alice.enter(|| connect(&lab, family, &["--timeout", "2m"]).spawn().unwrap());
        assert_eq!(succeeds(&child.wait_with_output().unwrap()), "welcome to 22\n");
        lab.alice.nft(&["delete table inet lossy"]);
    }
}

/// The first knock never arrives.
#[test]
fn connect_knocks_again_where_a_knock_is_lost() {
    let lab = Lab::with("open_for = \"1h\"");
    let daemon = lab.start();
    for (granted, family) in (1..).zip(FAMILIES) {
        lab.server.nft(&[
            "add table inet lossy; add chain inet lossy in { type filter hook prerouting priority -400; }; \
             add rule inet lossy in tcp dport 20000-21023 limit rate over 1/hour burst 1 packets accept; \
             add rule inet lossy in tcp dport 20000-21023 drop",
        ]);
        let child = lab.alice.enter(|| connect(&lab, family, &["--timeout", "2m"]).spawn().unwrap());
        assert_eq!(succeeds(&child.wait_with_output().unwrap()), "welcome to 22\n");
        eventually("its line", || daemon.log().matches("granted").count() >= granted);
        lab.server.nft(&["delete table inet lossy"]);
    }
}
