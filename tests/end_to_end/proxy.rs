//! `knockq proxy`: real programs, the proxy, the daemon.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::{Sshd, ssh};
use crate::lab::{FAMILIES, Family, Host, Lab, PATIENCE, echoes, eventually, knockq, succeeds};

/// A proxy on loopback of alice's host.
pub(crate) struct Proxy {
    child: Child,
    log: PathBuf,
    address: SocketAddr,
}

impl Proxy {
    /// Alice's host knows `server4` and `server6` by name meanwhile.
    pub(crate) fn start(lab: &Lab, family: Family, arguments: &[&str]) -> Self {
        let etc = Path::new("/etc/netns").join(&lab.alice.name);
        fs::create_dir_all(&etc).unwrap();
        fs::write(etc.join("hosts"), "127.0.0.1 localhost\n10.77.1.1 server4\nfd77:1::1 server6\n").unwrap();
        let log = lab.directory.path.join(format!("proxy-{family:?}.log"));
        let stderr = File::create(&log).unwrap();
        let listen = SocketAddr::new(family.pick("127.0.0.1", "::1"), 0).to_string();
        // Which also puts the file in the place of /etc/hosts, for this process alone.
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &lab.alice.name]).arg(knockq()).args(["proxy", "--listen", &listen]);
        command.args(arguments).env("HOME", lab.home("alice")).stdin(Stdio::null()).stderr(stderr);
        let child = command.spawn().unwrap();
        let mut proxy = Self { child, log, address: ([0, 0, 0, 0], 0).into() };
        eventually("the proxy listens", || {
            assert!(proxy.child.try_wait().unwrap().is_none(), "{}", proxy.log());
            proxy.log().ends_with('\n')
        });
        proxy.address = proxy.log().trim_end().rsplit(' ').next().unwrap().parse().unwrap();
        proxy
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    fn count(&self, text: &str) -> usize {
        self.log().matches(text).count()
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// How many it has open.
    fn sockets(&self) -> usize {
        let open = fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        let is_socket =
            |path: PathBuf| fs::read_link(path).is_ok_and(|link| link.to_string_lossy().starts_with("socket:"));
        open.filter(|entry| is_socket(entry.as_ref().unwrap().path())).count()
    }

    /// A connection to the proxy, which hears these bytes.
    fn hears(&self, host: &Host, bytes: &[u8]) -> TcpStream {
        let mut stream = host.enter(|| TcpStream::connect(self.address)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    }

    /// A connection through the proxy, or the code of its refusal.
    pub(crate) fn connect(&self, host: &Host, target: &Target, port: u16) -> Result<TcpStream, u8> {
        self.ask(host, 1, target, port)
    }

    fn ask(&self, host: &Host, command: u8, target: &Target, port: u16) -> Result<TcpStream, u8> {
        let mut request = vec![5, 1, 0, 5, command, 0];
        match target {
            Target::Address(IpAddr::V4(address)) => request.extend([&[1][..], &address.octets()].concat()),
            Target::Address(IpAddr::V6(address)) => request.extend([&[4][..], &address.octets()].concat()),
            Target::Name(name) => {
                request.extend([&[3, u8::try_from(name.len()).unwrap()], name.as_bytes()].concat());
            }
        }
        request.extend(port.to_be_bytes());
        let mut stream = self.hears(host, &request);
        let mut reply = [0; 6];
        stream.read_exact(&mut reply).unwrap();
        let [5, 0, 5, code, 0, address_type] = reply else { panic!("{reply:?}") };
        stream.read_exact(&mut [0; 18][..if address_type == 4 { 18 } else { 6 }]).unwrap();
        if code == 0 { Ok(stream) } else { Err(code) }
    }

    /// Through it to a banner, and an echo.
    fn reaches(&self, host: &Host, target: &Target, port: u16) -> bool {
        self.connect(host, target, port).is_ok_and(|stream| talks(stream, port))
    }

    /// The exit code of an end by this signal.
    fn end(mut self, signal: Signal) -> Option<i32> {
        kill(self.pid(), signal).unwrap();
        let mut code = None;
        eventually("the proxy ends", || {
            code = self.child.try_wait().unwrap().map(|status| status.code());
            code.is_some()
        });
        code.unwrap()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- the proxy's log\n{}---", self.log());
        }
    }
}

/// Takes alice's own hosts file away.
struct Names<'a>(&'a Lab);

impl Drop for Names<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(Path::new("/etc/netns").join(&self.0.alice.name));
    }
}

pub(crate) enum Target {
    Address(IpAddr),
    Name(&'static str),
}

impl Target {
    fn name(family: Family) -> Self {
        Self::Name(if family == Family::V4 { "server4" } else { "server6" })
    }
}

/// A child that ends with this.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Banner and echo of [`Host::serve`].
pub(crate) fn talks(mut stream: TcpStream, port: u16) -> bool {
    let expected = format!("welcome to {port}\n");
    let mut banner = vec![0; expected.len()];
    stream.read_exact(&mut banner).is_ok() && banner == expected.as_bytes() && echoes(&mut stream)
}

fn curl(lab: &Lab, proxy: &Proxy, url: &str, more: &[&str]) -> Output {
    lab.alice.enter(|| {
        let mut command = Command::new("curl");
        command.args(["--silent", "--show-error", "--fail", "--max-time", "60", "--noproxy", ""]);
        command.args(["--proxy", &format!("socks5h://{}", proxy.address), url]).args(more).output().unwrap()
    })
}

/// A server that guards the web (8080), and alice's profile for it.
fn web() -> (Lab, Killed) {
    let lab = Lab::network();
    lab.configure("[services.web]\nports = [\"tcp/8443\", \"tcp/8080\"]\nopen_for = \"60s\"\n");
    lab.add_user("alice", &["web"]);
    let pages = lab.directory.path.join("pages");
    fs::create_dir(&pages).unwrap();
    fs::write(pages.join("page"), "a page\n").unwrap();
    let server = lab.server.enter(|| {
        let mut command = Command::new("python3");
        command.args(["-m", "http.server", "8080", "--bind", "::", "--directory"]).arg(&pages);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    });
    eventually("a web server", || lab.server.enter(|| TcpStream::connect((Ipv6Addr::LOCALHOST, 8080))).is_ok());
    (lab, Killed(server))
}

#[test]
fn curl_gets_a_page_from_behind_a_door_by_name_and_by_address() {
    let (lab, _server) = web();
    let _names = Names(&lab);
    let _daemon = lab.start();
    for family in FAMILIES {
        let proxy = Proxy::start(&lab, family, &[]);
        assert!(
            lab.alice
                .enter(|| TcpStream::connect_timeout(
                    &(family.server(), 8080).into(),
                    std::time::Duration::from_secs(1)
                ))
                .is_err()
        );
        let name = if family == Family::V4 { "server4" } else { "server6" };
        assert_eq!(succeeds(&curl(&lab, &proxy, &format!("http://{name}:8080/page"), &[])), "a page\n");
        assert!(proxy.log().contains(&format!("Knocked at server ({}) for web\n", family.server())), "{}", proxy.log());
        let address = SocketAddr::new(family.server(), 8080);
        assert_eq!(succeeds(&curl(&lab, &proxy, &format!("http://{address}/page"), &[])), "a page\n");
        assert_eq!(proxy.count("Knocked"), 1, "the door was open: {}", proxy.log());
    }
}

#[test]
fn ssh_goes_through_a_door_by_way_of_the_proxy() {
    let lab = Lab::network();
    lab.configure("[services.ssh]\nports = [\"tcp/22\"]\nopen_for = \"6s\"\n");
    lab.add_user("alice", &["ssh"]);
    let _sshd = Sshd::start(&lab);
    let _names = Names(&lab);
    let _daemon = lab.start();
    for family in FAMILIES {
        let proxy = Proxy::start(&lab, family, &[]);
        let name = if family == Family::V4 { "server4" } else { "server6" };
        let way = format!("ProxyCommand nc.openbsd -X 5 -x {} %h %p\nHostKeyAlias {}", proxy.address, family.server());
        let mut ssh = ssh(&lab, "ssh", &way, &[name, "head -c 300000 /dev/zero | wc -c; wc -c"]);
        let said = succeeds(&lab.alice.enter(|| ssh.output().unwrap()));
        assert_eq!(said.split_whitespace().collect::<Vec<_>>(), ["300000", "0"]);
        assert_eq!(proxy.count("Knocked"), 1, "{}", proxy.log());
    }
}

#[test]
fn hosts_and_ports_without_a_profile_are_reached_straight_and_nothing_is_told_of_them() {
    let lab = Lab::new();
    let _names = Names(&lab);
    lab.alice.serve(9000);
    let daemon = lab.start();
    for family in FAMILIES {
        let proxy = Proxy::start(&lab, family, &[]);
        assert!(proxy.reaches(&lab.alice, &Target::Address(family.alice()), 9000), "no profile");
        assert!(proxy.reaches(&lab.alice, &Target::Name("localhost"), 9000), "a name without a profile");
        assert!(proxy.reaches(&lab.alice, &Target::name(family), 80), "not guarded");
        assert_eq!(proxy.connect(&lab.alice, &Target::name(family), 81).err(), Some(5), "refused");
        assert_eq!(proxy.connect(&lab.alice, &Target::Name("no-such-host.invalid"), 80).err(), Some(4));
        assert_eq!(proxy.connect(&lab.alice, &Target::Name("no host"), 80).err(), Some(4));
        for command in [2, 3, 9] {
            assert_eq!(proxy.ask(&lab.alice, command, &Target::name(family), 22).err(), Some(7));
        }
        // A name and three commands; a line may come after the answer.
        eventually("four lines in the log", || proxy.count("Refused the client at") == 4);
        assert_eq!(proxy.log().lines().count(), 5, "{}", proxy.log());
        assert!(!daemon.log().contains("granted"), "{}", daemon.log());
    }
}

#[test]
fn a_broken_profile_may_be_that_of_a_host_without_one_and_stops_no_other() {
    let lab = Lab::new();
    let _names = Names(&lab);
    lab.alice.serve(9000);
    let _daemon = lab.start();
    let broken = lab.home("alice").join(".config/knockq/hosts/broken.toml");
    fs::write(&broken, "address = 1\n").unwrap();
    fs::set_permissions(&broken, fs::Permissions::from_mode(0o600)).unwrap();
    for family in FAMILIES {
        let proxy = Proxy::start(&lab, family, &[]);
        assert_eq!(proxy.connect(&lab.alice, &Target::Address(family.alice()), 9000).err(), Some(1));
        let expected = format!("Failed for {}: {}:1:", SocketAddr::new(family.alice(), 9000), broken.display());
        eventually("a line in the log", || proxy.log().lines().any(|line| line.starts_with(&expected)));
        assert!(proxy.reaches(&lab.alice, &Target::name(family), 22));
    }
}

#[test]
fn a_hundred_connections_at_once_take_one_knock() {
    let lab = Lab::with("open_for = \"60s\"");
    let _names = Names(&lab);
    let daemon = lab.start();
    for family in FAMILIES {
        let proxy = Proxy::start(&lab, family, &[]);
        thread::scope(|scope| {
            let talk = || assert!(proxy.reaches(&lab.alice, &Target::name(family), 22));
            let all: Vec<_> = (0..100).map(|_| scope.spawn(talk)).collect();
            all.into_iter().for_each(|one| one.join().unwrap());
        });
        assert_eq!(proxy.count("Knocked at server"), 1, "{}", proxy.log());
        // A knock may get lost, or its answer come late, so one knocks again a few times while the first connection is made.
        let granted = format!("granted user=alice service=ssh source={} ", family.alice());
        let granted = || daemon.log().matches(&granted).count();
        eventually("the line", || granted() > 0);
        assert!(granted() < 5, "{}", daemon.log());
    }
}

#[test]
fn for_a_service_that_lets_one_connection_in_each_connection_has_its_knock() {
    let lab = Lab::with("open_for = \"60s\"\nonce = true");
    let _names = Names(&lab);
    let _daemon = lab.start();
    for family in FAMILIES {
        let proxy = Proxy::start(&lab, family, &[]);
        thread::scope(|scope| {
            let talk = || assert!(proxy.reaches(&lab.alice, &Target::name(family), 22));
            let all: Vec<_> = (0..5).map(|_| scope.spawn(talk)).collect();
            all.into_iter().for_each(|one| one.join().unwrap());
        });
        assert_eq!(proxy.count("Knocked at server"), 5, "{}", proxy.log());
    }
}

#[test]
fn a_door_that_was_shut_before_its_time_is_knocked_at_again() {
    let lab = Lab::with("open_for = \"1h\"");
    let _names = Names(&lab);
    let _daemon = lab.start();
    for family in FAMILIES {
        let proxy = Proxy::start(&lab, family, &[]);
        let target = Target::Address(family.server());
        let mut idle = proxy.connect(&lab.alice, &target, 22).unwrap();
        idle.read_exact(&mut [0; 14]).unwrap();
        lab.wait_for_door(family.alice(), 22);
        lab.revoke(&["--all"]);
        eventually("the door is shut", || lab.door(family.alice(), 22).is_none());
        assert!(proxy.reaches(&lab.alice, &target, 22));
        assert_eq!(proxy.count("Knocked at server"), 2, "{}", proxy.log());
        assert!(echoes(&mut idle), "a connection that says nothing lives on, whatever its door does");
    }
}

#[test]
fn a_door_that_stays_shut_is_told_with_what_to_check() {
    let lab = Lab::new();
    let _names = Names(&lab);
    let _daemon = lab.start();
    lab.server.nft(&["add table inet other"]);
    lab.server.nft(&["add chain inet other input { type filter hook input priority 10; }"]);
    lab.server.nft(&["add rule inet other input tcp dport 22 drop"]);
    for family in FAMILIES {
        let proxy = Proxy::start(&lab, family, &[]);
        assert_eq!(proxy.connect(&lab.alice, &Target::Address(family.server()), 22).err(), Some(6));
        eventually("a line in the log", || proxy.log().lines().count() == 2);
        let expected = "22: still shut 10 s after the knock. Hint: check, in this order: - ";
        assert!(proxy.log().contains(expected), "{}", proxy.log());
    }
}

#[test]
fn each_side_may_end_what_it_sends_and_still_hear_the_other() {
    let lab = Lab::network();
    let _names = Names(&lab);
    let listener = lab.server.enter(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, 7777))).unwrap();
    for family in FAMILIES {
        let proxy = Proxy::start(&lab, family, &[]);
        let connect = || {
            let client = proxy.connect(&lab.alice, &Target::Address(family.server()), 7777).unwrap();
            (client, listener.accept().unwrap().0)
        };
        let ends_first = |mut first: TcpStream, mut second: TcpStream| {
            let sent = vec![7; 1 << 20];
            let sender = thread::spawn(move || {
                first.write_all(&sent).unwrap();
                first.shutdown(Shutdown::Write).unwrap();
                first
            });
            let mut received = Vec::new();
            second.read_to_end(&mut received).unwrap();
            assert_eq!(received.len(), 1 << 20);
            second.write_all(b"thanks").unwrap();
            drop(second);
            let mut answer = String::new();
            sender.join().unwrap().read_to_string(&mut answer).unwrap();
            assert_eq!(answer, "thanks");
        };
        let (client, server) = connect();
        ends_first(client, server);
        let (client, server) = connect();
        ends_first(server, client);
    }
}

#[test]
fn only_the_right_user_and_password_get_in_and_neither_is_told() {
    let (lab, _server) = web();
    let _names = Names(&lab);
    let _daemon = lab.start();
    let auth = lab.directory.path.join("auth");
    fs::write(&auth, "alice:correct horse\n").unwrap();
    fs::set_permissions(&auth, fs::Permissions::from_mode(0o600)).unwrap();
    for family in FAMILIES {
        let proxy = Proxy::start(&lab, family, &["--auth", auth.to_str().unwrap()]);
        let url = format!("http://{}/page", SocketAddr::new(family.server(), 8080));
        let by = |user: &str| curl(&lab, &proxy, &url, &["--proxy-user", user]);
        assert!(!by("alice:battery staple").status.success());
        assert!(!by("bob:correct horse").status.success());
        assert!(!curl(&lab, &proxy, &url, &[]).status.success());
        assert_eq!(succeeds(&by("alice:correct horse")), "a page\n");
        let lines =
            [("wrong user or password", 2), ("--auth and what the client was told must agree", 1), ("Knocked at", 1)];
        eventually("all lines in the log", || lines.iter().all(|(text, count)| proxy.count(text) == *count));
        let log = proxy.log();
        assert!(!log.contains("horse") && !log.contains("battery"), "{log}");
    }
}

#[test]
fn bytes_that_are_no_socks_get_no_answer_and_do_no_harm() {
    let lab = Lab::new();
    let _names = Names(&lab);
    let _daemon = lab.start();
    for family in FAMILIES {
        let proxy = Proxy::start(&lab, family, &[]);
        let http = format!("GET http://{}/ HTTP/1.1\r\n\r\n", family.server());
        for bytes in [&b"\x04\x01\0\x16\x0a\x4d\x01\x01\0"[..], http.as_bytes(), &[0; 4000], &[0xff; 4000]] {
            let mut answer = Vec::new();
            let _ = proxy.hears(&lab.alice, bytes).read_to_end(&mut answer); // reset, where not all was read
            assert_eq!(answer, [0_u8; 0]);
        }
        assert_eq!(proxy.count("speaks no SOCKS 5"), 4, "{}", proxy.log());
        let unfinished: Vec<_> = (0..50).map(|_| proxy.hears(&lab.alice, b"\x05\x01")).collect();
        (0..50).for_each(|_| drop(proxy.hears(&lab.alice, b"\x05\x01\0\x05\x01\0\x03\xff")));
        assert!(proxy.reaches(&lab.alice, &Target::name(family), 22));
        assert!(proxy.log().len() < 1000, "{}", proxy.log());
        assert_eq!(
            unfinished.into_iter().map(|mut stream| stream.read(&mut [0]).unwrap()).max(),
            Some(0),
            "none waits on"
        );
    }
}

#[test]
fn more_connections_than_there_may_be_wait_until_one_ends() {
    let lab = Lab::network();
    let _names = Names(&lab);
    lab.alice.serve(9000);
    for family in FAMILIES {
        let proxy = Proxy::start(&lab, family, &[]);
        let target = Target::Address(family.alice());
        let mut all: Vec<_> = (0..256).map(|_| proxy.connect(&lab.alice, &target, 9000).unwrap()).collect();
        thread::scope(|scope| {
            let next = scope.spawn(|| assert!(proxy.reaches(&lab.alice, &target, 9000)));
            eventually("a line in the log", || proxy.log().contains("256 connections at once"));
            assert!(!next.is_finished());
            drop(all.pop());
            next.join().unwrap();
        });
        assert!(all.into_iter().all(|stream| talks(stream, 9000)));
    }
}

#[test]
fn a_proxy_has_no_capability_and_ends_at_once_with_0_when_it_is_told_to() {
    let lab = Lab::new();
    let _names = Names(&lab);
    let _daemon = lab.start();
    for (family, signal) in FAMILIES.into_iter().zip([Signal::SIGTERM, Signal::SIGINT]) {
        let proxy = Proxy::start(&lab, family, &[]);
        let listens_alone = proxy.sockets();
        assert!(proxy.reaches(&lab.alice, &Target::name(family), 22), "it knocks");
        eventually("the end of that connection", || proxy.sockets() == listens_alone);
        let status = fs::read_to_string(format!("/proc/{}/status", proxy.pid())).unwrap();
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            let line = status.lines().find_map(|line| line.strip_prefix(set)).unwrap();
            let bits = u64::from_str_radix(line.trim(), 16).unwrap();
            assert_eq!(bits & 1 << 13, 0, "CAP_NET_RAW in {set} {line}");
        }
        let mut connection = proxy.connect(&lab.alice, &Target::name(family), 80).unwrap();
        let (address, log) = (proxy.address, proxy.log.clone());
        assert_eq!(proxy.end(signal), Some(0));
        let mut rest = Vec::new();
        let _ = connection.read_to_end(&mut rest); // the banner, or nothing
        assert!(lab.alice.enter(|| TcpStream::connect(address)).is_err());
        let log = fs::read_to_string(log).unwrap();
        assert!(log.ends_with("Stopped; connections closed: 1\n"), "{log}");
    }
}
