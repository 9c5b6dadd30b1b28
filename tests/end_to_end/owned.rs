//! A process of the daemon that belongs to an attacker, and what the others let it do.
//!
//! The keeper runs tests/support/owned.rs, which hands its end of the channel over: here the test is the verifier, the
//! monitor, or the child that reads the configuration. All others are the real ones, on a real kernel.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use knockq::serve::channel::{Channel, Message};
use knockq::serve::frames::{FRAME_LEN, Frame};
use knockq::serve::report::{self, RevokedPart};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{SendFlags, send};

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
    /// The keeper's, the monitor's and the verifier's id.
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
    let program = knockq().with_file_name("examples").join("owned");
    let owned = format!("{role}:{}", stage_path(lab).display());
    Daemon::spawn_program(&program, lab, arguments, &[("KNOCKQ_OWNED", &owned)])
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

    fn is_told<const N: usize>(&self, message: Message) -> [OwnedFd; N] {
        self.channel().expect(message).unwrap().unwrap()
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

/// The verifier: said to be ready, like the real one, and then the attacker's.
struct Verifier {
    owned: Owned,
    relay: Option<OwnedFd>,
    frames: Option<OwnedFd>,
}

impl Verifier {
    fn start(lab: &Lab) -> Self {
        let mut owned = Owned::spawn(lab, "verifier", &[]);
        let [relay, frames, _settings, _store] = owned.is_told(Message::Start);
        owned.say(Message::Ready);
        owned.is_ready();
        Self { owned, relay: Some(relay), frames: Some(frames) }
    }

    fn frames(&self) -> &OwnedFd {
        self.frames.as_ref().unwrap()
    }

    fn send(&self, bytes: &[u8]) {
        send(self.frames(), bytes, SendFlags::NOSIGNAL).unwrap();
    }

    /// Does what a reload asks of it, as the real one would.
    fn reload(&self) {
        let reloads = || self.owned.daemon.log().matches("knockq: reloaded").count();
        let before = reloads();
        self.owned.daemon.signal(Signal::SIGHUP);
        let [_settings] = self.owned.is_told(Message::Settings);
        self.owned.say(Message::Ready);
        let [] = self.owned.is_told(Message::Enforce);
        self.owned.say(Message::Ready);
        eventually("reloading", || reloads() > before);
    }

    fn stop(mut self) {
        self.owned.daemon.signal(Signal::SIGTERM);
        self.owned.process = None;
        assert_eq!(self.owned.daemon.end(), Some(0), "{}", self.owned.daemon.log());
    }
}

/// The monitor: ready, as if it had bound the queue, and then the attacker's. Its end of the relay comes with it.
fn monitor(lab: &Lab, arguments: &[&str]) -> (Owned, OwnedFd) {
    let mut owned = Owned::spawn(lab, "monitor", arguments);
    let [relay, _frames, _policy] = owned.is_told(Message::Start);
    owned.say(Message::Bound);
    let [] = owned.is_told(Message::Loaded);
    owned.say(Message::Ready);
    owned.is_ready();
    (owned, relay)
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

fn open(source: IpAddr, port: &str, once: bool, seconds: u32, user: &str, service: &str) -> Frame {
    let [user, service] = [user, service].map(|name| name.parse().unwrap());
    Frame::Open { source, port: port.parse().unwrap(), once, bound: false, seconds, user, service, token: 1 }
}

/// What alice's knock asks for.
fn permitted(source: IpAddr) -> Frame {
    open(source, "tcp/22", false, 6, "alice", "ssh")
}

fn close(source: IpAddr, port: &str) -> Frame {
    Frame::Close { source, port: port.parse().unwrap(), user: "alice".parse().unwrap(), token: 1 }
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_frame_that_is_none_stops_all_with_one_line_and_opens_nothing() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let good = permitted(Family::V4.alice()).encode();
    for (bytes, said) in [
        (random::<FRAME_LEN>().to_vec(), "a frame's field `"),
        (Vec::new(), "a frame has 160 bytes, not 0"),
        (good[..FRAME_LEN - 1].to_vec(), "a frame has 160 bytes, not 159"),
        ([&good[..], &[0]].concat(), "a frame has 160 bytes, not 161"),
        (good.repeat(600), "a frame has 160 bytes, not 96000"),
    ] {
        let verifier = Verifier::start(&lab);
        verifier.send(&bytes);
        verifier.owned.ends_with(&format!("monitor: the verifier broke the protocol ({said}"));
        nothing_else_changed(&lab, &world, 0);
    }
    let verifier = Verifier::start(&lab);
    let null = File::open("/dev/null").unwrap();
    let frames = Channel::new(verifier.frames().try_clone().unwrap());
    frames.send(Message::Start, &[null.as_fd()]).unwrap();
    verifier.owned.ends_with("monitor: the verifier broke the protocol (a frame carries no descriptors)");
    nothing_else_changed(&lab, &world, 0);
}

#[test]
fn a_door_that_is_not_configured_stops_all_with_one_line_and_opens_nothing() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let refused = |source| {
        [
            open(source, "tcp/22", false, 7, "alice", "ssh"),
            open(source, "tcp/22", true, 6, "alice", "ssh"),
            open(source, "tcp/25", false, 6, "alice", "mail"),
            open(source, "tcp/80", false, 6, "alice", "ssh"),
            open(source, "tcp/22", false, 6, "root", "ssh"),
            close(source, "tcp/80"),
        ]
    };
    let [v4, v6] = FAMILIES.map(|family| refused(family.alice()));
    for frame in v4.into_iter().step_by(2).chain(v6.into_iter().skip(1).step_by(2)) {
        let verifier = Verifier::start(&lab);
        verifier.send(&frame.encode());
        // What comes after it is too late, be the monitor there to refuse it or not.
        let _ = send(verifier.frames(), &permitted(Family::V4.alice()).encode(), SendFlags::NOSIGNAL);
        verifier.owned.ends_with("monitor: the verifier asked for a door that is not configured; stopping");
        nothing_else_changed(&lab, &world, 0);
    }
}

#[test]
fn a_verifier_that_hangs_up_and_lives_on_stops_all_with_one_true_line() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let monitor_says = "monitor: the verifier hung up; stopping";
    for (what, line) in [
        ("frames", monitor_says),
        ("relay", monitor_says),
        ("channel", "knockq: verifier hung up; stopping all"),
        ("all", "knockq: verifier hung up; stopping all"),
    ] {
        let mut verifier = Verifier::start(&lab);
        if ["frames", "all"].contains(&what) {
            verifier.frames = None;
        }
        if ["relay", "all"].contains(&what) {
            verifier.relay = None;
        }
        if what == "relay" {
            eventually("a SYN, with which it is noticed", || {
                assert!(!lab.alice.reaches(Family::V6.server(), 20_000));
                verifier.owned.daemon.log().contains(line)
            });
        }
        if ["channel", "all"].contains(&what) {
            verifier.owned.channel = None;
        }
        verifier.owned.ends_with(line);
        nothing_else_changed(&lab, &world, 0);
    }
}

#[test]
fn frames_that_come_again_or_out_of_order_do_what_they_say_and_no_more() {
    let (lab, world) = lab_with("open_for = \"1h\"");
    let verifier = Verifier::start(&lab);
    let granted = || verifier.owned.daemon.log().matches("monitor: granted").count();
    for (number, family) in FAMILIES.into_iter().enumerate() {
        let frame = open(family.alice(), "tcp/22", false, 3600, "alice", "ssh").encode();
        let close = close(family.alice(), "tcp/22").encode();
        verifier.send(&close);
        for _ in 0..3 {
            verifier.send(&frame);
        }
        eventually("three grants", || granted() == 6 * number + 3);
        assert_eq!(open_doors(&lab).len(), 1, "one door");
        for _ in 0..3 {
            verifier.send(&close);
        }
        eventually("closing", || open_doors(&lab).is_empty());
        for _ in 0..3 {
            verifier.send(&frame);
        }
        eventually("three grants", || granted() == 6 * number + 6);
        assert_eq!(open_doors(&lab).len(), 1, "one door");
        verifier.send(&close);
        eventually("closing", || open_doors(&lab).is_empty());
    }
    verifier.stop();
    nothing_else_changed(&lab, &world, 0);
}

/// Requests of all kinds that are permitted, as fast as they go: doors for ever new sources of both families, the same door
/// again, and doors that nobody has opened taken back.
fn flood(frames: &OwnedFd, is_over: &AtomicBool) -> u64 {
    let mut sent = 0;
    for number in 0_u32.. {
        let v4 = IpAddr::from(Ipv4Addr::from(0x0a4e_0000 + number));
        let v6 = IpAddr::from(Ipv6Addr::from(0xfd78_u128 << 112 | u128::from(number)));
        let door = |source| open(source, "tcp/22", false, 3600, "alice", "ssh");
        for frame in [door(v4), door(v6), close(Family::V4.mallory(), "tcp/22"), close(v6, "tcp/25"), door(v4)] {
            if is_over.load(Ordering::Relaxed) || send(frames, &frame.encode(), SendFlags::NOSIGNAL).is_err() {
                return sent;
            }
            sent += 1;
        }
    }
    sent
}

#[test]
fn a_flood_of_permitted_frames_opens_what_the_rate_allows_and_holds_nothing_up() {
    let (lab, world) = lab_with("open_for = \"1h\"");
    lab.set("grants_per_minute = 30");
    let verifier = Verifier::start(&lab);
    let [keeper, monitor] = [verifier.owned.processes[0], verifier.owned.processes[1]];
    let [keeper_before, monitor_before] = [keeper, monitor].map(resident);
    let start = Instant::now();
    let is_over = AtomicBool::new(false);
    let allowed = || 30 + usize::try_from(start.elapsed().as_secs()).unwrap() / 2 + 1;
    let log = || verifier.owned.daemon.log();
    let told = || log().matches("not granted: more doors were asked for than grants_per_minute allows").count();
    thread::scope(|scope| {
        let until_dropped = UntilDropped(&is_over);
        let flooding = scope.spawn(|| flood(verifier.frames(), &is_over));
        eventually("the doors that the rate allows", || open_doors(&lab).len() >= 20);

        // What root asks, what the kernel queues, and what the keeper says still get their turn.
        let config = lab.config().display().to_string();
        for _ in 0..3 {
            lab.control(&["revoke", "203.0.113.0/24", "--config", &config]);
            verifier.reload();
        }
        for family in FAMILIES {
            assert!(!lab.alice.reaches(family.server(), 20_000));
        }
        let relayed = rustix::io::ioctl_fionread(verifier.relay.as_ref().unwrap()).unwrap();
        assert!(relayed >= 2 * 128, "{relayed} bytes");

        eventually("the line of what was refused", || told() > 0);
        for element in open_doors(&lab) {
            assert!(element.contains(" . tcp . 22 timeout 1h expires "), "{element}");
        }
        drop(until_dropped);
        let sent = flooding.join().unwrap();
        assert!(sent > 10_000, "{sent} frames are no flood");
    });
    let doors = open_doors(&lab).len();
    assert!(doors <= allowed(), "{doors} doors after {:?}", start.elapsed());
    assert!(log().matches("monitor: granted").count() <= allowed());
    assert!(told() <= 1 + usize::try_from(start.elapsed().as_secs()).unwrap() / 10, "{}", log());
    assert!(log().lines().count() <= allowed() + told() + 20, "{}", log());
    for (pid, before) in [(keeper, keeper_before), (monitor, monitor_before)] {
        assert!(resident(pid) < before + 4096, "{} KB, and before {before}", resident(pid));
    }
    verifier.stop();
    nothing_else_changed(&lab, &world, doors);
}

#[test]
fn the_rate_counts_renewals_too_and_follows_the_configuration() {
    let lab = Lab::with("open_for = \"6s\"");
    lab.set("grants_per_minute = 2");
    let verifier = Verifier::start(&lab);
    let granted = || verifier.owned.daemon.log().matches("monitor: granted").count();
    let ask = |count: usize| {
        for family in FAMILIES.into_iter().cycle().take(count) {
            verifier.send(&permitted(family.alice()).encode());
        }
    };
    ask(6);
    eventually("what was refused", || verifier.owned.daemon.log().contains("not granted: more doors were asked for"));
    assert!(verifier.owned.daemon.log().contains("requests=4 hint="), "{}", verifier.owned.daemon.log());
    assert_eq!(granted(), 2);

    let text = fs::read_to_string(lab.config()).unwrap();
    fs::write(lab.config(), text.replace("grants_per_minute = 2", "grants_per_minute = 60000")).unwrap();
    verifier.reload();
    ask(6);
    eventually("all of them", || granted() == 8);
    verifier.stop();
}

#[test]
fn a_verifier_that_says_what_it_may_not_stops_all_with_one_line() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let null = File::open("/dev/null").unwrap();
    let unasked = |said: &str| format!("it said {said}, which nobody waits for");
    let no_message = || "it sent what is no message".to_owned();
    for (bytes, descriptors, line) in [
        (&[99][..], 0, no_message()),
        (&[4, 4], 0, no_message()),
        (&[], 0, no_message()),
        (&[4; 4096], 0, no_message()),
        (&[4], 100, no_message()),
        (&[4], 0, unasked("Ready")),
        (&[4], 1, unasked("Ready")),
        (&[5], 0, unasked("Lost")),
        (&[11], 0, unasked("Stop")),
        (&[13], 0, unasked("Reported")),
    ] {
        let verifier = Verifier::start(&lab);
        say(verifier.owned.channel(), bytes, &vec![null.as_fd(); descriptors]);
        verifier.owned.ends_with(&format!("knockq: verifier broke the protocol: {line}; stopping all"));
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

/// Whatever it writes, the keeper hands it on unread, and the command that asked trusts nothing in it.
#[test]
fn what_a_verifier_writes_for_the_status_harms_neither_the_daemon_nor_who_asked() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let verifier = Verifier::start(&lab);
    let runtime = lab.runtime().display().to_string();
    for bytes in [&[0; 4][..], &[0xff; 64], &random::<4096>()] {
        thread::scope(|scope| {
            let asked = scope.spawn(|| lab.knockq(&lab.server, &["status", "--runtime", &runtime]));
            let [memory] = verifier.owned.is_told(Message::Report);
            let mut memory = File::from(memory);
            assert!(memory.set_len(1 << 40).is_err(), "it can fill no more");
            memory.write_all(bytes).unwrap();
            verifier.owned.say(Message::Reported);
            let asked = asked.join().unwrap();
            let said = String::from_utf8_lossy(&asked.stderr).into_owned();
            assert!(asked.status.code() == Some(1) && said.contains("status.sock: invalid data"), "{said}");
        });
    }
    verifier.stop();
    nothing_else_changed(&lab, &world, 0);
}

#[test]
fn an_answer_that_is_none_stops_all_with_one_line() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let null = File::open("/dev/null").unwrap();
    for (answer, descriptors, line) in [
        (Message::Bound, 0, "it said Bound, which nobody waits for"),
        (Message::Ready, 1, "the number of descriptors with its Ready is 1"),
    ] {
        let verifier = Verifier::start(&lab);
        verifier.owned.daemon.signal(Signal::SIGHUP);
        let [_settings] = verifier.owned.is_told(Message::Settings);
        verifier.owned.channel().send(answer, &vec![null.as_fd(); descriptors]).unwrap();
        verifier.owned.ends_with(&format!("knockq: verifier broke the protocol: {line}; stopping all"));
        nothing_else_changed(&lab, &world, 0);
    }
    // While it starts.
    let verifier = Owned::spawn(&lab, "verifier", &[]);
    verifier.say(Message::Unable);
    verifier.ends_with("knockq: verifier broke the protocol: it said Unable, which nobody waits for; stopping all");
    nothing_else_changed(&lab, &world, 0);
}

#[test]
fn a_monitor_that_says_what_it_may_not_stops_all_with_one_line() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let unasked = |said: &str| format!("it said {said}, which nobody waits for");
    for (bytes, line) in [
        (&[0][..], "it sent what is no message".to_owned()),
        (&[4], unasked("Ready")),
        (&[2], unasked("Bound")),
        (&[7], unasked("Unable")),
    ] {
        let (monitor, _relay) = monitor(&lab, &[]);
        say(monitor.channel(), bytes, &[]);
        monitor.ends_with(&format!("knockq: monitor broke the protocol: {line}; stopping all"));
        nothing_else_changed(&lab, &world, 0);
    }
    for (told, line) in [(Message::Start, unasked("Ready")), (Message::Loaded, unasked("Lost"))] {
        let monitor = Owned::spawn(&lab, "monitor", &[]);
        let [_relay, _frames, _policy] = monitor.is_told::<3>(Message::Start);
        if told == Message::Loaded {
            monitor.say(Message::Bound);
            let [] = monitor.is_told(Message::Loaded);
            monitor.say(Message::Lost);
        } else {
            monitor.say(Message::Ready);
        }
        monitor.ends_with(&format!("knockq: monitor broke the protocol: {line}; stopping all"));
        nothing_else_changed(&lab, &world, 0);
    }
}

#[test]
fn a_monitor_that_hangs_up_and_lives_on_stops_all_with_one_true_line() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let (mut owned, _relay) = monitor(&lab, &[]);
    owned.channel = None;
    owned.ends_with("knockq: monitor hung up; stopping all");
    nothing_else_changed(&lab, &world, 0);
    let (owned, relay) = monitor(&lab, &[]);
    drop(relay);
    owned.ends_with("verifier: the monitor hung up; stopping");
    nothing_else_changed(&lab, &world, 0);
}

#[test]
fn a_monitor_that_loses_the_table_twice_before_it_is_loaded_again_stops_all() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let (mut monitor, _relay) = monitor(&lab, &[]);
    for _ in 0..100 {
        monitor.say(Message::Lost);
    }
    let channel = monitor.channel.take().unwrap();
    while matches!(channel.receive(), Ok(Some((message, _))) if message != Message::Stop) {}
    monitor.process = None;
    assert_eq!(monitor.daemon.end(), Some(1));
    let events = monitor.events();
    let line = "knockq: monitor broke the protocol: it said Lost, which nobody waits for; stopping all";
    assert!(events.len() == 2 && events[0].contains("it is loaded again") && events[1].contains(line), "{events:#?}");
    nothing_else_changed(&lab, &world, 0);
}

#[test]
fn a_monitor_that_loses_the_table_for_ever_holds_up_neither_root_nor_the_clock() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let (mut monitor, _relay) = monitor(&lab, &["--try", "40s"]);
    let start = Instant::now();
    let config = lab.config().display().to_string();
    thread::scope(|scope| {
        let channel = monitor.channel();
        let losing = scope.spawn(move || {
            let mut losses = 0;
            channel.send(Message::Lost, &[]).unwrap();
            while let Ok(Some((told, mut descriptors))) = channel.receive() {
                match told {
                    Message::Loaded => losses += 1,
                    Message::Revoke => {
                        report::write(descriptors.remove(0), RevokedPart::default()).unwrap();
                        channel.send(Message::Ready, &[]).unwrap();
                    }
                    _ => return losses,
                }
                if told == Message::Loaded && channel.send(Message::Lost, &[]).is_err() {
                    break;
                }
            }
            losses
        });
        lab.control(&["revoke", "203.0.113.0/24", "--config", &config]);
        assert!(losing.join().unwrap() > 3);
    });
    monitor.process = None;
    assert_eq!(monitor.daemon.end(), Some(1));
    assert!(start.elapsed() < 2 * BOUND, "{:?}", start.elapsed());
    assert!(monitor.daemon.log().contains("not confirmed: the gate is taken away"), "{}", monitor.daemon.log());
    assert_eq!(lab.server.nft(&["list", "tables"]).trim(), "table inet others");
    assert_eq!(World::of(&lab).files, world.files);
}

/// A minute each.
#[test]
fn a_child_that_never_answers_stops_all_after_a_minute() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let verifier = Verifier::start(&lab);
    verifier.owned.daemon.signal(Signal::SIGHUP);
    let [_settings] = verifier.owned.is_told(Message::Settings);
    verifier.owned.channel().send(Message::Ready, &[]).unwrap();
    thread::sleep(Duration::from_secs(60)); // it reads nothing more
    let [] = verifier.owned.is_told(Message::Enforce);
    verifier.owned.ends_with("knockq: verifier gave no answer within a minute; stopping all");
    nothing_else_changed(&lab, &world, 0);
}

/// The keeper asks it to shut a door, and it only ever says that the table is lost.
#[test]
fn a_monitor_that_says_everything_but_the_answer_stops_all_after_a_minute() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let (mut monitor, _relay) = monitor(&lab, &[]);
    let start = Instant::now();
    thread::scope(|scope| {
        let config = lab.config().display().to_string();
        let asked = scope.spawn({
            let lab = &lab;
            move || lab.knockq(&lab.server, &["revoke", "203.0.113.0/24", "--config", &config])
        });
        let channel = monitor.channel();
        while let Ok(Some((told, _))) = channel.receive() {
            match told {
                Message::Stop => break,
                Message::Revoke | Message::Loaded => channel.send(Message::Lost, &[]).unwrap(),
                other => panic!("{other:?}"),
            }
        }
        let said = String::from_utf8(asked.join().unwrap().stderr).unwrap();
        assert!(
            said.contains("control.sock: the daemon hung up before it answered") && said.contains("Hint: "),
            "{said}"
        );
    });
    monitor.process = None;
    assert_eq!(monitor.daemon.end(), Some(1));
    assert!(start.elapsed() < 2 * BOUND, "{:?}", start.elapsed());
    let last = monitor.events().pop().unwrap();
    assert!(last.contains("knockq: monitor gave no answer within a minute; stopping all"), "{last}");
    nothing_else_changed(&lab, &world, 0);
}

#[test]
fn a_reader_of_the_configuration_that_says_what_it_may_not_stops_all_with_one_line() {
    let (lab, world) = lab_with("open_for = \"6s\"");
    let (pipe, mut writer) = std::io::pipe().unwrap();
    writer.write_all(&random::<64>()).unwrap();
    for (bytes, descriptors, line) in [
        (&[77][..], 0, "it sent what is no message"),
        (&[5], 0, "it said Lost, which nobody waits for"),
        (&[4], 2, "the number of descriptors with its Ready is 2"),
        (&[4], 3, "what it handed over cannot be read"),
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
