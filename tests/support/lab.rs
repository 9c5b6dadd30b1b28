//! Hosts that are network namespaces, joined by veth, with real daemons and real clients in them.
//!
//! ```text
//!   alice 10.77.1.2, fd77:1::2 --- 10.77.1.1, fd77:1::1  server  10.77.2.1, fd77:2::1 --- 10.77.2.2, fd77:2::2 mallory
//! ```

#![allow(dead_code, reason = "each test and example uses its own part")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use knockq::serve::store::{Store, StoreFloor};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{self, LinkAddr, SockFlag, SockProtocol, SockType};
use nix::unistd::Pid;
use rustix::net::sockopt::{self, Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, bind, connect, listen, shutdown, socket_with};
use rustix::process::{Resource, Rlimit, setrlimit};

/// Time that something may take that does happen: an emulated machine is slow.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Time after which a silent port counts as shut: the first retransmission comes after one second.
const SHUT: Duration = Duration::from_millis(600);

/// The binary that was built with this test or example: two directories up from both.
pub fn knockq() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    own.ancestors().nth(2).unwrap().join("knockq")
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    V4,
    V6,
}

pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

impl Family {
    pub fn flag(self) -> &'static str {
        match self {
            Self::V4 => "-4",
            Self::V6 => "-6",
        }
    }

    /// The server as alice knows it.
    pub fn server(self) -> IpAddr {
        self.pick("10.77.1.1", "fd77:1::1")
    }

    pub fn alice(self) -> IpAddr {
        self.pick("10.77.1.2", "fd77:1::2")
    }

    pub fn mallory(self) -> IpAddr {
        self.pick("10.77.2.2", "fd77:2::2")
    }

    pub fn pick(self, v4: &str, v6: &str) -> IpAddr {
        match self {
            Self::V4 => v4.parse().unwrap(),
            Self::V6 => v6.parse().unwrap(),
        }
    }
}

/// Whether this kernel was booted with IPv6, as all but one test needs.
pub fn has_ipv6() -> bool {
    Path::new("/proc/net/if_inet6").exists()
}

/// A host: a network namespace that goes away with it.
pub struct Host {
    pub name: String,
    /// Of its services.
    listeners: Mutex<Vec<TcpListener>>,
}

impl Host {
    pub fn new(lab: u32, role: &str) -> Self {
        let name = format!("kq{}-{lab}-{role}", std::process::id());
        run(Command::new("ip").args(["netns", "add", &name]));
        let host = Self { name, listeners: Mutex::default() };
        if has_ipv6() {
            // Else an address is none for two seconds, until it is known to be unique.
            host.sysctl("net/ipv6/conf/default/accept_dad", "0");
        }
        host.ip("link set lo up");
        host
    }

    /// Runs on a thread of this host; processes started there are there too.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(format!("/run/netns/{}", self.name)).unwrap();
        thread::scope(|scope| {
            let entered = scope.spawn(move || {
                setns(&namespace, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            entered.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    pub fn ip(&self, arguments: &str) {
        run(Command::new("ip").args(["-n", &self.name]).args(arguments.split_whitespace()));
    }

    pub fn sh(&self, script: &str) -> String {
        let output = self.enter(|| Command::new("sh").args(["-euc", script]).output().unwrap());
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn nft(&self, arguments: &[&str]) -> String {
        let output = self.enter(|| Command::new("nft").args(arguments).output().unwrap());
        assert!(output.status.success(), "nft {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn sysctl(&self, key: &str, value: &str) {
        self.enter(|| fs::write(format!("/proc/sys/{key}"), value)).unwrap_or_else(|error| panic!("{key}: {error}"));
    }

    /// Joins this host's `interface` with another's.
    pub fn join(&self, interface: &str, other: &Self, other_interface: &str) {
        run(Command::new("ip").args(["link", "add", interface, "netns", &self.name, "type", "veth", "peer"]).args([
            "name",
            other_interface,
            "netns",
            &other.name,
        ]));
        for (host, interface) in [(self, interface), (other, other_interface)] {
            host.ip(&format!("link set {interface} up"));
        }
    }

    /// Joins this host's `interface` with the `eth0` of another, whose default routes lead here: `.1` and `:1` are this
    /// host's addresses in the two networks, `.2` and `:2` the other's.
    pub fn uplink(&self, interface: &str, other: &Self, v4: &str, v6: &str) {
        self.join(interface, other, "eth0");
        self.address(interface, &format!("{v4}.1/24"), &format!("{v6}:1/64"));
        other.address("eth0", &format!("{v4}.2/24"), &format!("{v6}:2/64"));
        other.ip(&format!("route add default via {v4}.1"));
        if has_ipv6() {
            other.ip(&format!("-6 route add default via {v6}:1"));
        }
    }

    /// Forwards what is for others, from now on.
    pub fn forward(&self) {
        self.sysctl("net/ipv4/ip_forward", "1");
        self.sysctl("net/ipv6/conf/all/forwarding", "1");
    }

    /// Waits until so many interfaces have a link-local address: without it they ask for no neighbour of whom they forward to.
    pub fn settle(&self, interfaces: usize) {
        let addresses = || fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap();
        let settled = || self.enter(addresses).lines().filter(|address| address.starts_with("fe80")).count();
        eventually("link-local addresses", || settled() >= interfaces);
    }

    pub fn address(&self, interface: &str, v4: &str, v6: &str) {
        self.ip(&format!("addr add {v4} dev {interface}"));
        if has_ipv6() {
            self.ip(&format!("addr add {v6} dev {interface} nodad"));
        }
    }

    /// Serves a banner, then echoes, on every address of this host.
    pub fn serve(&self, port: u16) {
        let any = if has_ipv6() { "::" } else { "0.0.0.0" };
        self.accept_from(self.enter(|| TcpListener::bind((any, port)).unwrap()), port);
    }

    /// The same, with a socket that was made ready for it.
    pub fn serve_with(&self, port: u16, prepare: impl FnOnce(&OwnedFd) + Send) {
        let listener = self.enter(|| {
            let socket = socket_with(AddressFamily::INET6, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
            prepare(&socket);
            bind(&socket, &SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port)).unwrap();
            listen(&socket, 16).unwrap();
            TcpListener::from(socket)
        });
        self.accept_from(listener, port);
    }

    fn accept_from(&self, listener: TcpListener, port: u16) {
        self.listeners.lock().unwrap().push(listener.try_clone().unwrap());
        thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                thread::spawn(move || {
                    let _ = stream.write_all(format!("welcome to {port}\n").as_bytes());
                    let mut buffer = [0; 64];
                    while let Ok(length @ 1..) = stream.read(&mut buffer) {
                        let _ = stream.write_all(&buffer[..length]);
                    }
                });
            }
        });
    }

    /// A connection to an open port, with its banner read; `None` if the port stays silent.
    pub fn connect(&self, server: IpAddr, port: u16) -> Option<TcpStream> {
        self.connect_within(SHUT, server, port)
    }

    /// A connection to a port that must be open, however long the way and slow the machine.
    #[track_caller]
    pub fn gets_in(&self, server: IpAddr, port: u16) -> TcpStream {
        self.connect_within(PATIENCE, server, port).expect("the port is open")
    }

    /// The same as `connect`, with the time that it may take.
    pub fn connect_within(&self, time: Duration, server: IpAddr, port: u16) -> Option<TcpStream> {
        let address = SocketAddr::new(server, port);
        welcomed(self.enter(|| TcpStream::connect_timeout(&address, time)).ok()?)
    }

    /// The same as `connect`, from one of this host's addresses.
    pub fn connect_from(&self, source: IpAddr, server: IpAddr, port: u16) -> Option<TcpStream> {
        let family = if server.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = self.enter(|| {
            let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
            bind(&socket, &SocketAddr::new(source, 0)).unwrap();
            set_socket_timeout(&socket, Timeout::Send, Some(SHUT)).unwrap();
            connect(&socket, &SocketAddr::new(server, port)).is_ok().then_some(socket)
        });
        welcomed(socket?.into())
    }

    pub fn reaches(&self, server: IpAddr, port: u16) -> bool {
        self.connect(server, port).is_some()
    }

    pub fn oracle(&self, arguments: &[&str]) -> Output {
        let oracle = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/oracle.py");
        self.enter(|| Command::new("python3").arg(oracle).args(arguments).output().unwrap())
    }

    /// What the oracle printed; it must succeed.
    pub fn oracle_says(&self, arguments: &[&str]) -> String {
        let output = self.oracle(arguments);
        assert!(output.status.success(), "oracle {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }
}

impl Drop for Host {
    /// A socket that is left would keep the namespace, with all that the kernel has in it.
    fn drop(&mut self) {
        for listener in self.listeners.lock().unwrap().iter() {
            let _ = shutdown(listener, Shutdown::Both);
        }
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// Reads the banner of [`Host::serve`]; `None` if the gate came back between the handshake and the banner.
fn welcomed(mut stream: TcpStream) -> Option<TcpStream> {
    stream.set_read_timeout(Some(PATIENCE / 3)).unwrap();
    let mut banner = [0; 11];
    match stream.read_exact(&mut banner) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return None,
        read => read.unwrap(),
    }
    assert_eq!(&banner, b"welcome to ");
    while banner[0] != b'\n' {
        stream.read_exact(&mut banner[..1]).unwrap();
    }
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    Some(stream)
}

/// Still talking after whatever happened in between.
pub fn echoes(stream: &mut TcpStream) -> bool {
    let mut answer = [0; 5];
    stream.write_all(b"hello").is_ok() && stream.read_exact(&mut answer).is_ok() && answer == *b"hello"
}

/// Three hosts, a configured server, and alice's key and profile.
pub struct Lab {
    pub alice: Host,
    pub mallory: Host,
    pub server: Host,
    pub directory: Scratch,
    number: u32,
    _deadline: Deadline,
}

impl Lab {
    /// A server that guards ssh (22) for 10 s and mail (25); alice may open ssh alone. Web (80) is not guarded.
    pub fn new() -> Self {
        Self::with("open_for = \"10s\"")
    }

    /// The same, with other settings for ssh.
    pub fn with(ssh: &str) -> Self {
        let lab = Self::network();
        lab.configure(&format!(
            "[services.ssh]\nports = [\"tcp/22\"]\n{ssh}\n[services.mail]\nports = [\"tcp/25\"]\nopen_for = \"6s\"\n"
        ));
        lab.add_user("alice", &["ssh"]);
        for port in [22, 25, 80] {
            lab.server.serve(port);
        }
        lab
    }

    /// Hosts and wires, nothing else.
    pub fn network() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        // This process plays the services of all labs, and some serve hundreds of connections.
        setrlimit(Resource::Nofile, Rlimit { current: Some(8192), maximum: Some(8192) }).unwrap();
        let [alice, mallory, server] = ["alice", "mallory", "server"].map(|role| Host::new(number, role));
        for (place, client) in [(1, &alice), (2, &mallory)] {
            server.uplink(&format!("eth{place}"), client, &format!("10.77.{place}"), &format!("fd77:{place}:"));
        }
        if has_ipv6() {
            [(&alice, 1), (&mallory, 1), (&server, 2)].iter().for_each(|(host, interfaces)| host.settle(*interfaces));
        }
        if std::env::var_os("KNOCKQ_TABLE").is_some_and(|table| table == "plain") {
            server.nft(&["add", "table", "inet", "knockq"]); // so the daemon cannot own it, as before Linux 6.9
        }
        Self { alice, mallory, server, directory: Scratch::new(), number, _deadline: Deadline::start() }
    }

    /// One more host, joined with none yet.
    pub fn host(&self, role: &str) -> Host {
        Host::new(self.number, role)
    }

    pub fn config(&self) -> PathBuf {
        self.directory.path.join("etc/knockq.toml")
    }

    /// `knockq init`, then these services instead of its own.
    pub fn configure(&self, services: &str) {
        let path = |part: &str| self.directory.path.join(part).display().to_string();
        let addresses = ["--address", "10.77.1.1", "--address", "fd77:1::1"];
        let directories = ["--dir", &path("etc"), "--state", &path("state"), "--runtime", &path("run")];
        succeeds(
            &self.knockq(&self.server, &[&["init", "--protect", "tcp/22"], &addresses[..], &directories].concat()),
        );
        let text = fs::read_to_string(self.config()).unwrap();
        let (head, _) = text.split_once("[services").unwrap();
        fs::write(self.config(), format!("{head}{services}")).unwrap();
    }

    /// Sets a line of `[server]`.
    pub fn set(&self, line: &str) {
        let text = fs::read_to_string(self.config()).unwrap();
        fs::write(self.config(), text.replace("[server]\n", &format!("[server]\n{line}\n"))).unwrap();
    }

    /// A user's `keygen`, the administrator's `user add`, the user's `host add`: as the README says.
    pub fn add_user(&self, name: &str, services: &[&str]) {
        let key = succeeds(&self.knockq_as(name, &self.alice, &["keygen"]));
        let config = self.config().display().to_string();
        let mut arguments = vec!["user", "add", name, "--key", key.trim_end(), "--config", &config];
        arguments.extend(services.iter().flat_map(|service| ["--allow", service]));
        let profile = succeeds(&self.knockq(&self.server, &arguments));
        let path = self.directory.path.join(format!("{name}.profile"));
        fs::write(&path, profile).unwrap();
        succeeds(&self.knockq_as(name, &self.alice, &["host", "add", "server", path.to_str().unwrap()]));
    }

    pub fn knockq(&self, host: &Host, arguments: &[&str]) -> Output {
        self.knockq_as("alice", host, arguments)
    }

    pub fn knockq_as(&self, user: &str, host: &Host, arguments: &[&str]) -> Output {
        let home = self.home(user);
        fs::create_dir_all(&home).unwrap();
        host.enter(|| {
            let mut command = Command::new(knockq());
            command.env_clear().env("HOME", home).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
            command.args(arguments).stdin(Stdio::null()).output().unwrap()
        })
    }

    pub fn home(&self, user: &str) -> PathBuf {
        self.directory.path.join("home").join(user)
    }

    /// Alice knocks; she must be able to send it.
    pub fn knock(&self, family: Family, more: &[&str]) {
        succeeds(&self.knockq(&self.alice, &[&["send", "server", family.flag()], more].concat()));
    }

    /// The packet of a knock that is not sent, in hexadecimal.
    pub fn print_knock(&self, family: Family, more: &[&str]) -> String {
        let printed = self.knockq(&self.alice, &[&["send", "server", family.flag(), "--print", "hex"], more].concat());
        succeeds(&printed).trim_end().to_owned()
    }

    pub fn start(&self) -> Daemon {
        Daemon::start(self)
    }

    pub fn server_key(&self) -> String {
        let profile = fs::read_to_string(self.directory.path.join("alice.profile")).unwrap();
        let line = profile.lines().find(|line| line.starts_with("server_key")).unwrap();
        line.split('"').nth(1).unwrap().to_owned()
    }

    /// A counter store of this server where it has none yet. A copy of another one would be taken for what it is.
    pub fn make_store(&self, path: &Path) {
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(path).unwrap();
        Store::create(file, &self.server_key().parse().unwrap(), StoreFloor::default()).unwrap();
    }

    /// Seconds that are left of a door, if it is open.
    pub fn door(&self, source: IpAddr, port: u16) -> Option<String> {
        let listing = self.server.nft(&["list", "table", "inet", "knockq"]);
        let key = format!("{source} . tcp . {port} ");
        let elements = listing.split(['{', ',', '}']).map(str::trim);
        elements.filter(|element| element.starts_with(&key)).map(str::to_owned).next()
    }
}

/// Ends the whole run with the name of a test that lasts too long: in a virtual machine that is given up later, nobody would
/// learn which it was. Dropped after all else of a [`Lab`], for what hangs may be the tidying up.
struct Deadline {
    _dropped: mpsc::Sender<()>,
}

impl Deadline {
    const AFTER: Duration = Duration::from_secs(600);

    fn start() -> Self {
        let test = thread::current().name().unwrap_or("?").to_owned();
        let (dropped, is_dropped) = mpsc::channel::<()>();
        thread::spawn(move || {
            if is_dropped.recv_timeout(Self::AFTER) == Err(RecvTimeoutError::Timeout) {
                let seconds = Self::AFTER.as_secs();
                // Past what the harness captures of a test's output, which it shows when the test ends.
                let _ = writeln!(std::io::stderr(), "test {test} has not ended after {seconds} s; giving up all");
                std::process::exit(1);
            }
        });
        Self { _dropped: dropped }
    }
}

/// A daemon in the server's namespace.
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    fn start(lab: &Lab) -> Self {
        let mut daemon = Self::spawn(lab, &[]);
        daemon.wait_for("knockq: ready");
        assert!(daemon.child.try_wait().unwrap().is_none(), "{}", daemon.log());
        daemon
    }

    pub fn spawn(lab: &Lab, environment: &[(&str, &str)]) -> Self {
        Self::spawn_with(lab, &[], environment)
    }

    /// With more arguments to `serve`.
    pub fn spawn_with(lab: &Lab, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        Self::spawn_program(&knockq(), lab, arguments, environment)
    }

    /// Another program in the place of knockq.
    pub fn spawn_program(program: &Path, lab: &Lab, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let log = lab.directory.path.join(format!("serve-{}.log", COUNT.fetch_add(1, Ordering::Relaxed)));
        let stderr = File::create(&log).unwrap();
        let child = lab.server.enter(|| {
            let mut command = Command::new(program);
            command.args(["serve", "--config"]).arg(lab.config()).args(arguments).envs(environment.iter().copied());
            command.stdin(Stdio::null()).stderr(stderr).spawn().unwrap()
        });
        Self { child, log }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Waits until the log has this text; fails if it does not come.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        let start = Instant::now();
        while !self.log().contains(text) {
            let has_ended = self.child.try_wait().unwrap().is_some();
            assert!(!has_ended && start.elapsed() < PATIENCE, "no `{text}` in the log:\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ids of root, gate and engine.
    pub fn processes(&self) -> [(&'static str, Pid); 3] {
        let root = self.child.id();
        let find = |role: &str| {
            // The list may miss some while others come and go.
            let children = fs::read_to_string(format!("/proc/{root}/task/{root}/children")).unwrap();
            let is_role = |pid: &&str| {
                let command = fs::read_to_string(format!("/proc/{pid}/cmdline"));
                command.is_ok_and(|command| command.starts_with(&format!("knockq: {role}")))
            };
            children.split_whitespace().find(is_role).map(|pid| Pid::from_raw(pid.parse().unwrap()))
        };
        let of = |role: &str| {
            let mut found = None;
            eventually(role, || {
                found = find(role);
                found.is_some()
            });
            found.unwrap()
        };
        [("root", Pid::from_raw(root.cast_signed())), ("gate", of("gate")), ("engine", of("engine"))]
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Kills all of its processes, in this order, and waits for the end.
    #[track_caller]
    pub fn kill(&mut self) -> Option<i32> {
        for (_, pid) in self.processes() {
            // The death of one may have ended the next.
            assert!(matches!(kill(pid, Signal::SIGKILL), Ok(()) | Err(Errno::ESRCH)));
        }
        self.end()
    }

    /// Waits for its end, which must come soon; tells the exit code.
    #[track_caller]
    pub fn end(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(start.elapsed() < PATIENCE, "the daemon does not end:\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn stop(mut self) -> String {
        self.signal(Signal::SIGTERM);
        assert_eq!(self.end(), Some(0), "{}", self.log());
        self.log()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.signal(Signal::SIGTERM);
            let start = Instant::now();
            while let Ok(None) = self.child.try_wait() {
                if start.elapsed() > PATIENCE {
                    let _ = self.child.kill(); // perhaps a test that failed holds or has stopped a process of it
                    break;
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
        if thread::panicking() {
            eprintln!("--- the daemon's log\n{}---", self.log());
        }
    }
}

/// A directory for one test.
pub struct Scratch {
    pub path: PathBuf,
}

impl Scratch {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("knockq-test-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self { path }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// What crosses one interface, either way: the kernel keeps it until somebody asks, whatever else runs.
pub struct Capture {
    socket: OwnedFd,
    interface: usize,
    is_wanted: fn(&[u8]) -> bool,
}

impl Capture {
    /// Of IP packets, those that are wanted.
    pub fn start(host: &Host, interface: &str, is_wanted: fn(&[u8]) -> bool) -> Self {
        host.enter(|| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let family = socket::AddressFamily::Packet;
            let socket = socket::socket(family, SockType::Datagram, flags, SockProtocol::EthAll).unwrap();
            sockopt::set_socket_recv_buffer_size_force(&socket, 8 << 20).unwrap();
            let interface = usize::try_from(if_nametoindex(interface).unwrap()).unwrap();
            Self { socket, interface, is_wanted }
        })
    }

    /// Ends the capture; the packets from the IP header on.
    pub fn packets(self) -> Vec<Vec<u8>> {
        thread::sleep(Duration::from_millis(300));
        let (mut packets, mut bytes) = (Vec::new(), vec![0; 1 << 16]);
        while let Ok((length, Some(from))) = socket::recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut bytes) {
            let packet = &bytes[..length];
            let is_ip = [libc::ETH_P_IP, libc::ETH_P_IPV6].contains(&u16::from_be(from.protocol()).into());
            if is_ip && from.ifindex() == self.interface && (self.is_wanted)(packet) {
                packets.push(packet.to_vec());
            }
        }
        packets
    }
}

pub fn is_tcp(packet: &[u8]) -> bool {
    packet[if packet[0] >> 4 == 4 { 9 } else { 6 }] == 6
}

/// The port answers with a reset.
pub fn refused(host: &Host, server: IpAddr, port: u16) -> bool {
    let connected = host.enter(|| TcpStream::connect_timeout(&SocketAddr::new(server, port), Duration::from_secs(5)));
    connected.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[track_caller]
pub fn succeeds(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// KiB of memory that a process holds.
pub fn resident(pid: Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Waits until something is so; fails if it does not come to pass.
#[track_caller]
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "{what} does not come to pass");
        thread::sleep(Duration::from_millis(50));
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
