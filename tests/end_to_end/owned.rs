//! A process of the daemon that belongs to an attacker, and what the others let it do.
//!
//! Root's process is tests/support/owned.rs, and so is the one that is played, which hands its end of the channel over: here the
//! test is the engine, the gate, or the child that reads the configuration. All others are the real ones, on a real kernel.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::slice;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use knockq::nft::{Comment, Door, Doors, Element, Member, Ownership, Query};
use knockq::serve::channel::{Channel, Message};
use knockq::serve::commands::{self, COMMAND_LEN, Command, Outcome, monotonic};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::UntilDropped;
use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually, knockq, resident};

/// Time after which all must be gone. Two children that are killed take 5 s each, but an emulated machine is slow.
const BOUND: Duration = Duration::from_secs(60);

/// Lines of a start.
const AT_START: [&str; 5] =
    ["knockq: ready", "there is no user", "has no Landlock", "the table is owned", "others can flush the gate"];

/// A daemon, one process of which is played here.
struct Owned {
    daemon: Daemon,
    /// Root's, the gate's and the engine's id.
    processes: Vec<Pid>,
    channel: Option<Channel>,
    /// The process lives as long as this.
    process: Option<UnixStream>,
}

/// Where a process that is to be played finds the test.
struct Stage {
    listener: UnixListener,
    path: PathBuf,
}

impl Stage {
    fn new(path: PathBuf) -> Self {
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self { listener, path }
    }

    /// The process, which lives as long as this, and its end of the channel.
    fn enter(self) -> (UnixStream, Channel) {
        let mut process = None;
        eventually("the process", || {
            process = self.listener.accept().ok();
            process.is_some()
        });
        fs::remove_file(self.path).unwrap();
        let (process, _) = process.unwrap();
        process.set_nonblocking(false).unwrap();
        let [channel] = Channel::new(process.try_clone().unwrap().into()).expect(Message::Start).unwrap().unwrap();
        set_socket_timeout(&channel, Timeout::Recv, Some(BOUND)).unwrap();
        (process, Channel::new(channel))
    }
}

fn stage_path(lab: &Lab) -> PathBuf {
    lab.directory.path.join("stage")
}

fn spawn(lab: &Lab, role: &str, arguments: &[&str]) -> Daemon {
    let played = knockq().with_file_name("examples").join("owned");
    let [root, gate] = ["knockq-root", "knockq-gate"].map(|name| knockq().with_file_name(name));
    let gate = if role == "gate" { played.clone() } else { gate };
    let programs = lab.directory.path.join("bin");
    for (name, program) in [("knockq", played), ("knockq-gate", gate), ("knockq-root", root)] {
        // By another process: one that another test starts would keep what we write to open, and it could not be run.
        let copied = std::process::Command::new("cp")
            .arg("--remove-destination")
            .args([&program, &programs.join(name)])
            .status()
            .unwrap();
        assert!(copied.success());
    }
    fs::write(programs.join("owned"), format!("{role}:{}", stage_path(lab).display())).unwrap();
    Daemon::spawn_program(&programs.join("knockq"), lab, arguments, &[])
}

impl Owned {
    fn spawn(lab: &Lab, role: &str, arguments: &[&str]) -> Self {
        let stage = Stage::new(stage_path(lab));
        let daemon = spawn(lab, role, arguments);
        let (process, channel) = stage.enter();
        Self { daemon, processes: Vec::new(), channel: Some(channel), process: Some(process) }
    }

    fn is_ready(&mut self) {
        self.daemon.wait_for("knockq: ready");
        self.processes = self.daemon.processes().map(|(_, pid)| pid).to_vec();
    }

    fn channel(&self) -> &Channel {
        self.channel.as_ref().unwrap()
    }

    fn say(&self, message: Message) {
        self.channel().send(message, &[]).unwrap();
    }

    /// The next that root says, but for its pings.
    fn is_told<const N: usize>(&self, message: Message) -> [OwnedFd; N] {
        loop {
            match self.channel().receive().unwrap().unwrap() {
                (Message::Ping, _) => self.say(Message::Alive),
                (said, descriptors) => {
                    assert_eq!(said, message);
                    return descriptors.try_into().unwrap();
                }
            }
        }
    }

    /// What the daemon has logged since its start.
    fn events(&self) -> Vec<String> {
        let log = self.daemon.log();
        let is_event = |line: &&str| !AT_START.iter().any(|usual| line.contains(usual));
        log.lines().filter(is_event).map(str::to_owned).collect()
    }

    /// All stop, soon, with this one line.
    #[track_caller]
    fn ends_with(mut self, line: &str) {
        let start = Instant::now();
        if let Some(channel) = &self.channel {
            while matches!(channel.receive(), Ok(Some((message, _))) if message != Message::Stop) {}
            self.process = None; // so that nobody has to wait until it is killed
        }
        assert_eq!(self.daemon.end(), Some(1), "{}", self.daemon.log());
        for pid in &self.processes {
            eventually("the end of all", || kill(*pid, None).is_err());
        }
        assert!(start.elapsed() < BOUND);
        let events = self.events();
        assert!(events.len() == 1 && events[0].contains(line), "not one line with `{line}`: {events:#?}");
    }
}

/// The engine: said to be ready, like the real one, and then the attacker's.
struct Engine {
    owned: Owned,
    relay: Option<OwnedFd>,
    gate: Option<OwnedFd>,
    tables: OwnedFd,
    status: UnixListener,
}

impl Engine {
    fn start(lab: &Lab) -> Self {
        Self::start_with(lab, &[])
    }

    fn start_with(lab: &Lab, arguments: &[&str]) -> Self {
        let mut owned = Owned::spawn(lab, "engine", arguments);
        let [relay, gate, tables, _settings, _store, _control, status, _watch] = owned.is_told(Message::Start);
        owned.say(Message::Ready);
        let [_queues] = owned.is_told(Message::Loaded);
        owned.say(Message::Ready);
        owned.is_ready();
        let status = UnixListener::from(status);
        status.set_nonblocking(false).unwrap();
        Self { owned, relay: Some(relay), gate: Some(gate), tables, status }
    }

    fn gate(&self) -> &OwnedFd {
        self.gate.as_ref().unwrap()
    }

    fn send(&self, bytes: &[u8]) {
        send(self.gate(), bytes, SendFlags::NOSIGNAL).unwrap();
    }

    /// What the gate answers to this.
    fn ask(&self, commands: &[Command]) -> Outcome {
        ask(self.gate(), commands).expect("the gate is there")
    }

    /// Has root do what a reload takes, as the real one would.
    fn reload(&self) {
        self.owned.daemon.signal(Signal::SIGHUP);
        let [] = self.owned.is_told(Message::Hangup);
        self.owned.say(Message::Read);
        let [_settings] = self.owned.is_told(Message::Settings);
        for (said, answer) in [
            (Message::Check, Message::Same),
            (Message::Permit, Message::Ready),
            (Message::Enforce, Message::Ready),
            (Message::Reloaded, Message::Ready),
        ] {
            self.owned.say(said);
            let [] = self.owned.is_told(answer);
        }
    }

    fn stop(mut self) {
        self.owned.daemon.signal(Signal::SIGTERM);
        self.owned.process = None;
        assert_eq!(self.owned.daemon.end(), Some(0), "{}", self.owned.daemon.log());
    }
}

/// `None` when the gate is gone.
fn ask(gate: &OwnedFd, commands: &[Command]) -> Option<Outcome> {
    let message: Vec<u8> = commands.iter().flat_map(Command::encode).collect();
    send(gate, &message, SendFlags::NOSIGNAL).ok()?;
    let mut bytes = [0; 64 << 10];
    let (length, _) = recv(gate, &mut bytes, RecvFlags::empty()).ok()?;
    Outcome::decode(&bytes[..length]).map(|(answer, _)| answer)
}

/// The gate: ready, as if it had bound the queue, and then the attacker's. Its end of the relay comes with it.
fn gate(lab: &Lab) -> (Owned, OwnedFd) {
    let mut owned = Owned::spawn(lab, "gate", &[]);
    let [relay, commands, _limits] = owned.is_told(Message::Start);
    owned.say(Message::Bound);
    thread::spawn(move || answer_all(&commands));
    let [] = owned.is_told(Message::Release);
    owned.say(match lab.server.enter(|| Doors::new().unwrap().own_table().unwrap()) {
        Ownership::Made => Message::Made,
        Ownership::Adopted => Message::Persists,
        Ownership::Unsupported => Message::Ready,
    });
    for message in [Message::Loaded, Message::Enforce] {
        let [] = owned.is_told(message);
        owned.say(Message::Ready);
    }
    owned.is_ready();
    (owned, relay)
}

/// As if all of it were done, and every set empty.
fn answer_all(commands: &OwnedFd) {
    const NOTHING_MORE: [u8; 20] = [20, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]; // NLMSG_DONE
    let mut bytes = [0; 64 << 10];
    while let Ok((length @ 1.., _)) = recv(commands, &mut bytes, RecvFlags::empty()) {
        let is_next = commands::decode(&bytes[..length]).unwrap() == [Command::Next];
        let answer = Outcome::default().encode(if is_next { &NOTHING_MORE } else { &[] });
        let _ = send(commands, &answer, SendFlags::NOSIGNAL);
    }
}

/// What only root may change: the rules of all tables, and the names of the files.
#[derive(PartialEq, Eq, Debug)]
struct World {
    rules: Vec<String>,
    files: BTreeSet<PathBuf>,
}

impl World {
    fn of(lab: &Lab) -> Self {
        let listing = lab.server.nft(&["list", "ruleset"]);
        let mut is_door = false;
        let mut rules = Vec::new();
        for line in listing.lines() {
            is_door |= line.contains("expires");
            if !is_door && !line.contains("flags owner") {
                // nft's remarks change: whose table it is, and in newer ones how many doors are open.
                rules.push(line.split('#').next().unwrap().trim_end().to_owned());
            }
            is_door &= !line.contains('}');
        }
        let mut files = BTreeSet::new();
        walk(&lab.directory.path, &mut files);
        files.retain(|file| file.extension().is_none_or(|extension| extension != "log"));
        files.retain(|file| !file.starts_with(lab.directory.path.join("home"))); // where alice counts her knocks
        Self { rules, files }
    }
}

fn walk(directory: &Path, files: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            walk(&entry, files);
        }
        files.insert(entry);
    }
}

/// A lab whose gate stands, beside a table of somebody else's.
fn lab_with(ssh: &str) -> (Lab, World) {
    let lab = Lab::with(ssh);
    lab.server.sh("nft 'add table inet others; add set inet others s { type inet_service; elements = { 1 }; }'");
    fs::create_dir(lab.directory.path.join("bin")).unwrap();
    for name in ["knockq", "knockq-gate", "knockq-root", "owned"] {
        File::create(lab.directory.path.join("bin").join(name)).unwrap();
    }
    lab.start().stop();
    let world = World::of(&lab);
    (lab, world)
}

/// No rule, no other table and no file has changed, and these doors alone are open.
#[track_caller]
fn nothing_else_changed(lab: &Lab, world: &World, doors: usize) {
    assert_eq!(World::of(lab), *world);
    assert_eq!(open_doors(lab).len(), doors);
}

/// The elements of all sets of doors, as nft lists them.
fn open_doors(lab: &Lab) -> Vec<String> {
    let listing = lab.server.nft(&["list", "table", "inet", "knockq"]);
    let elements = listing.split(['{', ',', '}']).map(str::trim);
    elements.filter(|element| element.contains("expires")).map(str::to_owned).collect()
}

fn put(source: IpAddr, port: &str, once: bool, seconds: u64) -> Command {
    let comment = Comment::read("alice ssh 1 00000001").unwrap();
    let door = Door { source, port: port.parse().unwrap(), once };
    Command::Put(Element::Opens(door), monotonic() + Duration::from_secs(seconds), comment)
}

/// What alice's knock makes the real one ask for.
fn permitted(source: IpAddr) -> Command {
    put(source, "tcp/22", false, 6)
}

fn delete(source: IpAddr, port: &str) -> Command {
    Command::Delete(Element::Opens(Door { source, port: port.parse().unwrap(), once: false }))
}

fn member(source: IpAddr, set: &str) -> Element {
    Element::Member(Member { set: set.parse().unwrap(), source, port: None })
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_message_that_is_none_stops_all_with_one_line_and_opens_nothing() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let good = permitted(Family::V4.alice()).encode();
    for (bytes, said) in [
        ([&[99], &random::<{ COMMAND_LEN - 1 }>()[..]].concat(), "a command's field `what` is wrong"),
        (Vec::new(), "0 bytes are not"),
        (good[..COMMAND_LEN - 1].to_vec(), "767 bytes are not"),
        ([&good[..], &[0]].concat(), "769 bytes are not"),
        (good.repeat(65), "49920 bytes are not 1 to 64 commands of 768"),
    ] {
        let engine = Engine::start(&lab);
        engine.send(&bytes);
        engine.owned.ends_with(&format!("gate: the engine broke the protocol ({said}"));
        nothing_else_changed(&lab, &world, 0);
    }
    let engine = Engine::start(&lab);
    let null = File::open("/dev/null").unwrap();
    let commands = Channel::new(engine.gate().try_clone().unwrap());
    commands.send(Message::Start, &[null.as_fd()]).unwrap();
    engine.owned.ends_with("gate: the engine broke the protocol (a command carries no descriptors)");
    nothing_else_changed(&lab, &world, 0);
}

/// No user may be let in from elsewhere than from here, there, and 203.0.113.0/24.
#[test]
fn what_is_not_configured_stops_all_with_one_line_and_opens_nothing() {
    let (lab, _) = lab_with("open_for = \"6s\"");
    lab.server.sh("nft add set inet others mine '{ type ipv4_addr; flags timeout; }'");
    let entry = lab.config().with_file_name("users.d").join("alice.toml");
    let text = fs::read_to_string(&entry).unwrap();
    let [v4, v6] = FAMILIES.map(|family| family.alice());
    let from = format!("from = [\"{v4}/32\", \"{v6}/128\", \"203.0.113.0/24\"]\nadd_to = [\"inet others mine\"]\n");
    fs::write(&entry, format!("{from}{text}")).unwrap();
    let world = World::of(&lab);
    let comment = || Comment::read("alice ssh 1 00000001").unwrap();
    let refused = |source: IpAddr| {
        let lasts = Element::Lasts(Door { source, port: "tcp/22".parse().unwrap(), once: true });
        let open = Element::Opens(Door { source, port: "tcp/22".parse().unwrap(), once: false });
        vec![
            put(source, "tcp/22", true, 6),
            put(source, "tcp/22", true, 0),
            put(source, "udp/22", false, 6),
            put(source, "tcp/80", false, 6),
            put(if source.is_ipv4() { Family::V4 } else { Family::V6 }.mallory(), "tcp/22", false, 6),
            Command::Put(lasts, monotonic() + Duration::from_secs(6), comment()),
            Command::Put(member(source, "inet others s"), monotonic() + Duration::from_secs(6), comment()),
            Command::Delete(member(source, "inet others s")),
            Command::Ask(member(source, "inet others s"), Query::Elements),
            Command::Known(open, Duration::from_secs(3600)),
        ]
    };
    for (number, (v4, v6)) in refused(v4).into_iter().zip(refused(v6)).enumerate() {
        let engine = Engine::start(&lab);
        engine.send(&if number % 2 == 0 { v4 } else { v6 }.encode());
        // What comes after it is too late, be the gate there to refuse it or not.
        let _ = send(engine.gate(), &permitted(Family::V4.alice()).encode(), SendFlags::NOSIGNAL);
        engine.owned.ends_with("gate: the engine asked for what the configuration does not allow; stopping");
        nothing_else_changed(&lab, &world, 0);
    }
}

/// A batch of nf_tables: delete table inet others.
fn deletion_of_a_table() -> Vec<u8> {
    let message = |kind: u16, flags: u16, family: u8, resource: u16, attributes: &[u8]| {
        let length = u32::try_from(20 + attributes.len()).unwrap();
        let header = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 8]].concat();
        [&header[..], &[family, 0], &resource.to_be_bytes(), attributes].concat()
    };
    const NF_TABLES: u16 = 10;
    let name = [&[11_u8, 0, 1, 0][..], b"others\0", &[0]].concat();
    let delete = message(NF_TABLES << 8 | 2, 5, 1, 0, &name); // NLM_F_REQUEST, NLM_F_ACK
    [message(0x10, 1, 0, NF_TABLES, &[]), delete, message(0x11, 1, 0, NF_TABLES, &[])].concat()
}

#[test]
fn where_the_engine_hears_of_changes_it_can_command_nothing() {
    let (lab, _) = lab_with("open_for = \"6s\"");
    let engine = Engine::start(&lab);
    let ask = || {
        send(&engine.tables, &deletion_of_a_table(), SendFlags::empty()).unwrap();
        let mut answer = [0; 4096];
        loop {
            let (length, _) = recv(&engine.tables, &mut answer, RecvFlags::empty()).unwrap();
            if answer[4..6] == 2_u16.to_ne_bytes() && length >= 20 {
                return i32::from_ne_bytes(answer[16..20].try_into().unwrap());
            }
        }
    };
    thread::scope(|scope| {
        let unprivileged = scope.spawn(|| {
            caps::clear(None, caps::CapSet::Effective).unwrap(); // of this thread
            ask()
        });
        assert_eq!(unprivileged.join().unwrap(), -Errno::PERM.raw_os_error());
    });
    assert!(lab.server.nft(&["list", "tables"]).contains("inet others"));
    assert_eq!(ask(), 0, "whoever has the capability is obeyed, so that this test shows something");
    engine.stop();
}

#[test]
fn an_engine_that_hangs_up_and_lives_on_stops_all_with_one_true_line() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let gate_says = "gate: the engine hung up; stopping";
    for (what, line) in [
        ("gate", gate_says),
        ("relay", gate_says),
        ("channel", "knockq: engine hung up; stopping all"),
        ("all", "knockq: engine hung up; stopping all"),
    ] {
        let mut engine = Engine::start(&lab);
        if ["gate", "all"].contains(&what) {
            engine.gate = None;
        }
        if ["relay", "all"].contains(&what) {
            engine.relay = None;
        }
        if what == "relay" {
            eventually("a SYN, with which it is noticed", || {
                assert!(!lab.alice.reaches(Family::V6.server(), 20_000));
                engine.owned.daemon.log().contains(line)
            });
        }
        if ["channel", "all"].contains(&what) {
            engine.owned.channel = None;
        }
        engine.owned.ends_with(line);
        nothing_else_changed(&lab, &world, 0);
    }
}

#[test]
fn commands_that_come_again_or_out_of_order_do_what_they_say_and_no_more() {
    let (lab, world) = lab_with("open_for = \"1h\"");
    let engine = Engine::start(&lab);
    for family in FAMILIES {
        let (put, delete) = (put(family.alice(), "tcp/22", false, 3600), delete(family.alice(), "tcp/22"));
        for (command, doors) in
            [(&delete, 0), (&put, 1), (&put, 1), (&delete, 0), (&delete, 0), (&put, 1), (&delete, 0)]
        {
            assert_eq!(engine.ask(std::slice::from_ref(command)).errno, 0);
            assert_eq!(open_doors(&lab).len(), doors, "{command:?}");
        }
        let opened = format!("gate: opened tcp/22 to {} for 3", family.alice());
        assert!(engine.owned.daemon.log().contains(&opened), "whatever the engine says: {}", engine.owned.daemon.log());
    }
    engine.stop();
    nothing_else_changed(&lab, &world, 0);
}

/// Commands of all kinds that are permitted, as fast as they go: doors for ever new sources of both families, the same door
/// again, and doors that nobody has opened taken back.
fn flood(gate: &OwnedFd, is_over: &AtomicBool) -> u64 {
    let mut sent = 0;
    for number in 0_u32.. {
        let v4 = IpAddr::from(Ipv4Addr::from(0x0a4e_0000 + number));
        let v6 = IpAddr::from(Ipv6Addr::from(0xfd78_u128 << 112 | u128::from(number)));
        let door = |source| put(source, "tcp/22", false, 3600);
        for command in [door(v4), door(v6), delete(Family::V4.mallory(), "tcp/22"), delete(v6, "tcp/25"), door(v4)] {
            if is_over.load(Ordering::Relaxed) || ask(gate, &[command]).is_none() {
                return sent;
            }
            sent += 1;
        }
    }
    sent
}

#[test]
fn a_flood_of_permitted_commands_opens_what_the_rate_allows_and_holds_nothing_up() {
    let (lab, world) = lab_with("open_for = \"1h\"");
    lab.set("grants_per_minute = 30");
    let engine = Engine::start(&lab);
    let [root, gate] = [engine.owned.processes[0], engine.owned.processes[1]];
    let [root_before, gate_before] = [root, gate].map(resident);
    let start = Instant::now();
    let is_over = AtomicBool::new(false);
    let allowed = || 30 + usize::try_from(start.elapsed().as_secs()).unwrap() / 2 + 1;
    let log = || engine.owned.daemon.log();
    thread::scope(|scope| {
        let until_dropped = UntilDropped(&is_over);
        let flooding = scope.spawn(|| flood(engine.gate(), &is_over));
        eventually("the doors that the rate allows", || {
            engine.owned.say(Message::Alive); // root may have asked by now
            open_doors(&lab).len() >= 20
        });

        // What the kernel queues, and what root says, still get their turn.
        (0..3).for_each(|_| engine.reload());
        for family in FAMILIES {
            assert!(!lab.alice.reaches(family.server(), 20_000));
        }
        let relayed = rustix::io::ioctl_fionread(engine.relay.as_ref().unwrap()).unwrap();
        assert!(relayed >= 2 * 128, "{relayed} bytes");

        for element in open_doors(&lab) {
            assert!(element.contains(" . tcp . 22 timeout "), "{element}");
        }
        drop(until_dropped);
        let sent = flooding.join().unwrap();
        assert!(sent > 1_000, "{sent} commands are no flood");
    });
    let doors = open_doors(&lab).len();
    assert!(doors <= allowed(), "{doors} doors after {:?}", start.elapsed());
    assert!(log().matches("gate: opened").count() <= allowed());
    assert!(log().lines().count() <= allowed() + 20, "{}", log());
    for (pid, before) in [(root, root_before), (gate, gate_before)] {
        assert!(resident(pid) < before + 4096, "{} KB, and before {before}", resident(pid));
    }
    engine.stop();
    nothing_else_changed(&lab, &world, doors);
}

#[test]
fn the_rate_counts_renewals_too_and_follows_the_configuration() {
    let lab = Lab::with("open_for = \"6s\"");
    fs::create_dir(lab.directory.path.join("bin")).unwrap();
    lab.set("grants_per_minute = 2");
    let engine = Engine::start(&lab);
    let is_opened = |source| engine.ask(&[permitted(source)]).errno == 0;
    for family in FAMILIES {
        let command = permitted(family.alice());
        for times in 1..=2 {
            let asked = engine.ask(slice::from_ref(&command));
            assert_eq!(asked.errno, 0, "{times}: for no longer than it was paid for");
        }
    }
    thread::sleep(Duration::from_secs(2));
    for family in FAMILIES {
        assert_eq!(engine.ask(&[permitted(family.alice())]).errno, Errno::DQUOT.raw_os_error());
        assert!(!is_opened(family.mallory()));
    }
    let text = fs::read_to_string(lab.config()).unwrap();
    fs::write(lab.config(), text.replace("grants_per_minute = 2", "grants_per_minute = 60000")).unwrap();
    engine.reload();
    for family in FAMILIES {
        assert!(is_opened(family.alice()) && is_opened(family.mallory()));
    }
    engine.stop();
}

#[test]
fn an_engine_that_says_what_it_may_not_stops_all_with_one_line() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let null = File::open("/dev/null").unwrap();
    let unasked = |said: &str| format!("it said {said}, which nobody waits for");
    let no_message = || "it sent what is no message".to_owned();
    for (bytes, descriptors, line) in [
        (&[99][..], 0, no_message()),
        (&[7, 7], 0, no_message()),
        (&[], 0, no_message()),
        (&[7; 4096], 0, no_message()),
        (&[7], 100, no_message()),
        (&[Message::Ready as u8 + 1], 0, unasked("Ready")),
        (&[Message::Ready as u8 + 1], 1, unasked("Ready")),
        (&[Message::Bound as u8 + 1], 0, unasked("Bound")),
        (&[Message::Unable as u8 + 1], 0, unasked("Unable")),
        (&[Message::Stop as u8 + 1], 0, unasked("Stop")),
        (&[Message::Permit as u8 + 1], 0, unasked("Permit")),
        (&[Message::Enforce as u8 + 1], 0, unasked("Enforce")),
        (&[Message::Confirm as u8 + 1], 0, unasked("Confirm")),
    ] {
        let engine = Engine::start(&lab);
        say(engine.owned.channel(), bytes, &vec![null.as_fd(); descriptors]);
        engine.owned.ends_with(&format!("knockq: engine broke the protocol: {line}; stopping all"));
        nothing_else_changed(&lab, &world, 0);
    }
}

/// Sends any bytes and descriptors.
fn say(channel: &Channel, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, sendmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(100))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(descriptors.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
    sendmsg(channel, &[std::io::IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
}

/// Whatever it writes, the command that asked trusts nothing in it.
#[test]
fn what_an_engine_writes_for_the_status_harms_neither_the_daemon_nor_who_asked() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let engine = Engine::start(&lab);
    let runtime = lab.runtime().display().to_string();
    let version = [&[5][..], env!("CARGO_PKG_VERSION").as_bytes()].concat();
    for (bytes, error) in [
        (vec![0; 4], "another version"),
        (vec![0xff; 64], "another version"),
        (random::<4096>().to_vec(), "another version"),
        ([&version[..], &[0xff; 64]].concat(), "invalid data"),
        ([&version[..], &random::<4096>()].concat(), "invalid data"),
        ([&version[..], &[1; 16 << 20]].concat(), "invalid data"),
    ] {
        thread::scope(|scope| {
            let asked = scope.spawn(|| lab.knockq(&lab.server, &["status", "--runtime", &runtime]));
            let (mut reader, _) = engine.status.accept().unwrap();
            let _ = reader.write_all(&bytes); // it reads no more than it has room for
            drop(reader);
            let asked = asked.join().unwrap();
            let said = String::from_utf8_lossy(&asked.stderr).into_owned();
            assert!(asked.status.code() == Some(1) && said.contains("status.sock: ") && said.contains(error), "{said}");
        });
    }
    engine.stop();
    nothing_else_changed(&lab, &world, 0);
}

#[test]
fn an_answer_that_is_none_stops_all_with_one_line() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let line = |said: &str| format!("knockq: engine broke the protocol: it said {said}, which nobody waits for");
    let engine = Engine::start(&lab);
    engine.owned.daemon.signal(Signal::SIGHUP);
    let [] = engine.owned.is_told(Message::Hangup);
    engine.owned.say(Message::Bound);
    engine.owned.ends_with(&line("Bound"));
    nothing_else_changed(&lab, &world, 0);
    // While it starts.
    let engine = Owned::spawn(&lab, "engine", &[]);
    engine.say(Message::Unable);
    engine.ends_with(&line("Unable"));
    nothing_else_changed(&lab, &world, 0);
}

#[test]
fn a_gate_that_says_what_it_may_not_stops_all_with_one_line() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let unasked = |said: &str| format!("it said {said}, which nobody waits for");
    for (bytes, line) in [
        (&[0][..], "it sent what is no message".to_owned()),
        (&[Message::Ready as u8 + 1], unasked("Ready")),
        (&[Message::Bound as u8 + 1], unasked("Bound")),
        (&[Message::Load as u8 + 1], unasked("Load")),
    ] {
        let (gate, _relay) = gate(&lab);
        say(gate.channel(), bytes, &[]);
        gate.ends_with(&format!("knockq: gate broke the protocol: {line}; stopping all"));
        nothing_else_changed(&lab, &world, 0);
    }
    let gate = Owned::spawn(&lab, "gate", &[]);
    let [_relay, _commands, _limits] = gate.is_told::<3>(Message::Start);
    gate.say(Message::Ready);
    gate.ends_with(&format!("knockq: gate broke the protocol: {}; stopping all", unasked("Ready")));
    nothing_else_changed(&lab, &world, 0);
}

#[test]
fn a_gate_that_hangs_up_and_lives_on_stops_all_with_one_true_line() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let (mut owned, _relay) = gate(&lab);
    owned.channel = None;
    owned.ends_with("knockq: gate hung up; stopping all");
    nothing_else_changed(&lab, &world, 0);
    let (owned, relay) = gate(&lab);
    drop(relay);
    owned.ends_with("engine: the gate hung up; stopping");
    nothing_else_changed(&lab, &world, 0);
}

/// It is paced, so that nft is not run without end.
#[test]
fn an_engine_that_has_the_table_loaded_for_ever_holds_up_neither_root_nor_the_clock() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let mut played = Engine::start_with(&lab, &["--try", "20s"]);
    let engine = &mut played.owned;
    let start = Instant::now();
    let mut loads = 0;
    (0..50).for_each(|_| engine.say(Message::Load));
    while let Ok(Some((told, _))) = engine.channel().receive() {
        match told {
            Message::Loaded => loads += 1,
            Message::Ping => engine.say(Message::Alive),
            _ => break,
        }
        if loads > 10 && engine.channel().send(Message::Load, &[]).is_err() {
            break;
        }
    }
    assert!((4..=start.elapsed().as_millis() / 100 + 1).contains(&loads), "{loads} in {:?}", start.elapsed());
    engine.process = None;
    assert_eq!(engine.daemon.end(), Some(1));
    assert!(start.elapsed() < 2 * BOUND, "{:?}", start.elapsed());
    assert!(engine.daemon.log().contains("not confirmed: the gate is taken away"), "{}", engine.daemon.log());
    assert_eq!(lab.server.nft(&["list", "tables"]).trim(), "table inet others");
    assert_eq!(World::of(&lab).files, world.files);
}

/// Root asks each half minute whether it lives, and it only ever says other things.
#[test]
fn an_engine_that_says_everything_but_that_it_lives_stops_all_after_a_minute() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let mut played = Engine::start(&lab);
    let engine = &mut played.owned;
    let start = Instant::now();
    while let Ok(Some((told, _))) = engine.channel().receive() {
        match told {
            Message::Stop => break,
            Message::Ping | Message::Same => engine.say(Message::Check),
            other => panic!("{other:?}"),
        }
    }
    engine.process = None;
    assert_eq!(engine.daemon.end(), Some(1));
    assert!(start.elapsed() < 2 * BOUND, "{:?}", start.elapsed());
    let last = engine.events().pop().unwrap();
    assert!(last.contains("knockq: engine gave no answer within a minute; stopping all"), "{last}");
    nothing_else_changed(&lab, &world, 0);
}

#[test]
fn a_gate_that_never_answers_stops_all_after_a_minute() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let (owned, _relay) = gate(&lab);
    owned.daemon.signal(Signal::SIGHUP);
    let [_limits] = owned.is_told(Message::Settings);
    thread::sleep(Duration::from_secs(61));
    owned.ends_with("knockq: gate gave no answer within a minute; stopping all");
    nothing_else_changed(&lab, &world, 0);
}

#[test]
fn a_reader_of_the_configuration_that_says_what_it_may_not_stops_all_with_one_line() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let (pipe, mut writer) = std::io::pipe().unwrap();
    writer.write_all(&random::<64>()).unwrap();
    for (bytes, descriptors, line) in [
        (&[77][..], 0, "it sent what is no message"),
        (&[Message::Load as u8 + 1], 0, "it said Load, which nobody waits for"),
        (&[Message::Ready as u8 + 1], 0, "what it handed over cannot be read"),
        (&[Message::Ready as u8 + 1], 3, "what it handed over cannot be read"),
    ] {
        let mut daemon = spawn(&lab, "configuration", &[]);
        daemon.wait_for("knockq: ready");
        let stage = Stage::new(stage_path(&lab));
        daemon.signal(Signal::SIGHUP);
        let (process, channel) = stage.enter();
        let processes = daemon.processes().map(|(_, pid)| pid).to_vec();
        say(&channel, bytes, &vec![pipe.as_fd(); descriptors]);
        let owned = Owned { daemon, processes, channel: Some(channel), process: Some(process) };
        owned.ends_with(&format!("knockq: configuration broke the protocol: {line}; stopping all"));
        nothing_else_changed(&lab, &world, 0);
    }
}

#[test]
fn a_reader_of_the_configuration_that_hangs_up_and_lives_on_changes_nothing() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let mut daemon = spawn(&lab, "configuration", &[]);
    daemon.wait_for("knockq: ready");
    let stage = Stage::new(stage_path(&lab));
    daemon.signal(Signal::SIGHUP);
    let (_process, channel) = stage.enter();
    drop(channel);
    daemon.wait_for("not reloaded: the configuration is refused; the configuration of before stays in force");
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    daemon.stop();
    assert_eq!(World::of(&lab), world);
}
