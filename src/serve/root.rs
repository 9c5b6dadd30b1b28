//! Root: a program of its own. It starts the others, and does what stands in a short list when the engine says so: it runs nft with
//! texts that were made before the first packet came. It sees no packet and no command of the gate's, and stops all when one
//! of the others dies.

use std::convert::Infallible;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::slice;
use std::thread::sleep;
use std::time::{Duration, Instant};

use caps::Capability;
use sd_notify::NotifyState;
use signal_hook::consts::SIGHUP;

use self::table::DELETE;
use super::channel::Message;
use super::children::{CONFIGURATION, Children, Event, WORK};
pub use super::ending::RootError;
use super::ending::{Breach, Ended};
use super::line::Lines;
use super::plan::Plan;
use super::program::{Failed, nft};
use super::{calls, handover, sandbox, terminal};

mod table;

/// Time between two runs of nft for the engine, whatever it says.
const PAUSE: Duration = Duration::from_millis(100);

/// Time between two questions whether the engine lives.
const PING: Duration = Duration::from_secs(30);

/// What root needs as long as it lives: for nft, and to end a child that does not end.
const TO_WORK: &[Capability] = &[Capability::CAP_NET_ADMIN, Capability::CAP_KILL];

/// What its children need until they have become others, with less.
const TO_START: &[Capability] = &[Capability::CAP_SETUID, Capability::CAP_SETGID, Capability::CAP_SETPCAP];

/// What the service manager shows while others have to load the table.
const OPEN: &str = "table inet knockq is not what it should be, so guarded ports may be open: see the log";

/// How root is started, by `knockq serve`.
pub struct Start {
    /// The configuration's path.
    pub config: PathBuf,
    /// Seconds after which the gate is taken away, unless it is confirmed.
    pub trial: Option<u64>,
    /// What the others are told of the log.
    pub flags: Vec<String>,
    /// The programs `knockq` and `knockq-gate`, by descriptors that stay open: an upgrade does not change what is started.
    pub knockq: PathBuf,
    /// As above.
    pub gate: PathBuf,
    /// Where lines go.
    pub lines: Lines,
}

/// Runs the daemon until it is told to stop.
///
/// # Errors
/// [`RootError`]. Doors that are open stay open for the time that they have left; the gate stays shut.
pub fn run(start: Start) -> Result<(), RootError> {
    let log = terminal::writing_end(io::stderr())?; // while it may be opened: the terminal may be another user's
    let children = Children::new(log)?; // a signal that comes from here on is not lost
    sandbox::keep_only(&[TO_WORK, TO_START].concat())?;
    sandbox::forbid(calls::NEVER, calls::MISSING)?;
    let lines = start.lines;
    let mut root = Root {
        trial: start.trial.map(|seconds| Instant::now() + Duration::from_secs(seconds)),
        start,
        children,
        plan: None,
        next: None,
        persists: false,
        has_loaded: false,
        reading: None,
        is_lost: false,
        has_hung_up: false,
        nft_ran: None,
        pinged: None,
        ping: Instant::now() + PING,
    };
    let Err(ended) = root.bring_up().and_then(|()| root.watch());
    match root.stop(ended) {
        Ended::Failed(error) => Err(error),
        Ended::Asked => {
            lines.info("stopped; doors that are open keep the time that they have left");
            Ok(())
        }
        Ended::Unconfirmed => Err(RootError::NotConfirmed),
    }
}

struct Root {
    start: Start,
    children: Children,
    /// What is in force, and the memory that it came in.
    plan: Option<(Plan, OwnedFd)>,
    /// What was read, with the gate's limits, and is to be put in force.
    next: Option<(Plan, OwnedFd, OwnedFd)>,
    /// The table persists without an owner.
    persists: bool,
    /// The gate stands, and must not be left open.
    has_loaded: bool,
    /// When the gate is undone unless somebody confirms it.
    trial: Option<Instant>,
    /// When the child that reads the configuration has taken too long.
    reading: Option<Instant>,
    /// Others have to load the table.
    is_lost: bool,
    /// The engine was told of a SIGHUP, and has not had anything read since.
    has_hung_up: bool,
    /// When nft was run last for the engine.
    nft_ran: Option<Instant>,
    /// When the engine was asked whether it lives, if it has not said so; and when it will be.
    pinged: Option<Instant>,
    ping: Instant,
}

impl Root {
    /// Starts everything. The order matters: the engine understands knocks, then the queue is bound, then the table sends it
    /// packets.
    fn bring_up(&mut self) -> Result<(), Ended> {
        self.start_reading()?;
        let (_, mut handed) = self.children.wait_for(CONFIGURATION, &[Message::Ready])?;
        self.dismiss_reader();
        let (plan, memory) = take_plan(&mut handed)?;
        if handed.len() < GATE_AT_START {
            return Err(unreadable().into());
        }
        let for_gate: Vec<OwnedFd> = handed.drain(..GATE_AT_START).collect();
        let beside = self.start.config.parent().unwrap_or(Path::new("/"));
        if !sandbox::write_only_to(&[beside, Path::new("/dev/null")])? {
            self.start.lines.warning(
                "this kernel has no Landlock: one lock less on the daemon's processes \
                 hint=\"boot with `lsm=landlock,...`, or a kernel with CONFIG_SECURITY_LANDLOCK\"",
            );
        }
        let trial = self.start.trial.map(|seconds| format!("--trial={seconds}"));
        self.start_child("engine", &trial.iter().map(OsStr::new).collect::<Vec<_>>())?;
        self.children.tell("engine", Message::Start, &handed)?;
        drop(handed); // or the other ends would not be seen to be gone
        self.children.wait_for("engine", &[Message::Ready])?;
        let priorities = self.start.flags.iter().filter(|flag| *flag == "--priorities").map(OsStr::new);
        let arguments: Vec<&OsStr> = [OsStr::new(env!("CARGO_PKG_VERSION"))].into_iter().chain(priorities).collect();
        self.children.start("gate", &self.start.gate, &arguments)?;
        self.children.tell("gate", Message::Start, &for_gate)?;
        drop(for_gate);
        self.children.wait_for("gate", &[Message::Bound])?;
        sandbox::keep_only(TO_WORK)?;

        let (is_managed, summary) = (plan.is_managed, plan.summary.clone());
        self.plan = Some((plan, memory));
        if is_managed {
            self.load()?;
        }
        self.ask_gate(Message::Loaded, &[])?;
        let queues = File::open("/proc/net/netfilter/nfnetlink_queue").map(OwnedFd::from); // since the gate has one
        self.children.tell("engine", Message::Loaded, &queues.into_iter().collect::<Vec<_>>())?;
        loop {
            match self.children.wait_for("engine", &[Message::Ready, Message::Unable, Message::Check])?.0 {
                Message::Ready => break,
                Message::Check => self.check()?,
                _ => return Err(RootError::NotLoaded.into()),
            }
        }
        self.ask_gate(Message::Enforce, &[])?;
        self.keep();
        self.start.lines.info(&summary);
        self.notify(&[NotifyState::Ready, NotifyState::Status(&summary)]);
        if let Some(seconds) = self.start.trial {
            self.trial = Some(Instant::now() + Duration::from_secs(seconds));
            let hint = "unless confirmed, the gate is taken away seconds";
            self.start.lines.info(&format!("on trial: {hint}={seconds} hint=\"knockq confirm\""));
        }
        Ok(())
    }

    /// Does what comes, until it is told to stop or a child dies.
    fn watch(&mut self) -> Result<Infallible, Ended> {
        loop {
            self.mind_the_time()?; // each time, for what else comes may never end
            let answer = self.pinged.map_or(self.ping, |pinged| pinged + WORK);
            let deadline = [self.trial, self.reading].into_iter().flatten().fold(answer, Instant::min);
            match self.children.next(None, deadline)? {
                Some(Event::Signal(SIGHUP)) => self.pass_hangup_on()?,
                Some(Event::Signal(_)) => return Err(Ended::Asked),
                Some(Event::Message(CONFIGURATION, Message::Ready, read)) => self.take_configuration(read)?,
                Some(Event::Message(CONFIGURATION, Message::Refused, why)) => {
                    self.dismiss_reader();
                    self.children.tell("engine", Message::Refused, &why)?;
                }
                Some(Event::Gone(CONFIGURATION)) => self.refuse_configuration("the configuration is refused")?,
                Some(Event::Gone(child)) => return Err(Ended::Failed(self.children.stop_all(child))),
                Some(Event::Message("engine", said, _)) => {
                    let began = Instant::now();
                    self.obey(said)?;
                    // What waits to be heard while a program takes its time is not late.
                    let took = Some(began.elapsed()).filter(|took| *took > PAUSE * 10).unwrap_or_default();
                    let ends = [&mut self.pinged, &mut self.reading].into_iter().flatten();
                    ends.for_each(|end| *end += took);
                }
                Some(Event::Message(process, said, _)) => return Err(RootError::unasked(process, said).into()),
                None => {}
            }
        }
    }

    /// Once until the engine has the configuration read: any number of them asks for one reading that comes after them.
    fn pass_hangup_on(&mut self) -> Result<(), RootError> {
        if mem::replace(&mut self.has_hung_up, true) {
            return Ok(());
        }
        self.children.tell("engine", Message::Hangup, &[])
    }

    /// Does what time alone brings.
    fn mind_the_time(&mut self) -> Result<(), Ended> {
        let now = Instant::now();
        let is_over = |end: Option<Instant>| end.is_some_and(|end| end <= now);
        if is_over(self.trial) {
            return Err(Ended::Unconfirmed);
        }
        if is_over(self.reading) {
            self.refuse_configuration("reading the configuration takes too long")?;
        }
        if is_over(self.pinged.map(|pinged| pinged + WORK)) {
            return Err(RootError::TooSlow("engine").into());
        }
        if self.ping <= now {
            self.ping = now + PING;
            self.pinged.get_or_insert(now);
            self.children.tell("engine", Message::Ping, &[])?;
        }
        Ok(())
    }

    /// Does what the engine says: this, and nothing else.
    fn obey(&mut self, said: Message) -> Result<(), Ended> {
        let is_managed = self.plan.as_ref().is_some_and(|(plan, _)| plan.is_managed);
        match said {
            Message::Alive => self.pinged = None,
            Message::Permit if self.next.is_some() => {
                if let Some(next) = self.next.take() {
                    let permitted = self.ask_gate(Message::Settings, slice::from_ref(&next.2));
                    self.next = Some(next);
                    permitted?;
                }
                self.children.tell("engine", Message::Ready, &[])?;
            }
            Message::Read if !self.children.has(CONFIGURATION) => {
                self.pace();
                if let Ok(now) = NotifyState::monotonic_usec_now() {
                    self.notify(&[NotifyState::Reloading, now]);
                }
                (self.next, self.has_hung_up) = (None, false);
                if let Err(error) = self.start_reading() {
                    self.dismiss_reader();
                    self.refuse(&format!("nobody can be started to read the configuration: {error}\nfree resources"))?;
                }
            }
            Message::Check => self.check()?,
            Message::Enforce if self.next.is_some() => {
                self.ask_gate(Message::Enforce, &[])?;
                self.plan = self.next.take().map(|(plan, memory, _)| (plan, memory));
                self.children.tell("engine", Message::Ready, &[])?;
            }
            Message::Load if is_managed => {
                self.pace();
                self.load()?;
                self.ask_gate(Message::Loaded, &[])?;
                self.children.tell("engine", Message::Loaded, &[])?;
            }
            Message::Reloaded => {
                self.pace();
                self.keep();
                self.tell_ready();
                self.children.tell("engine", Message::Ready, &[])?;
            }
            Message::Kept => {
                self.pace();
                self.next = None;
                self.tell_ready();
            }
            Message::Lost | Message::Found => {
                self.pace();
                self.is_lost = said == Message::Lost;
                self.notify(&[NotifyState::Status(self.status())]);
            }
            Message::Confirm if self.trial.is_some() => {
                self.trial = None;
                self.start.lines.info("confirmed: the gate stays");
                self.children.tell("engine", Message::Confirm, &[])?;
            }
            _ => return Err(RootError::unasked("engine", said).into()),
        }
        Ok(())
    }

    /// Has the configuration read by a child, while everything goes on.
    fn start_reading(&mut self) -> io::Result<()> {
        let config = self.start.config.clone();
        let mut arguments = vec![OsStr::new("--config"), config.as_os_str()];
        if self.start.trial.is_some() {
            arguments.push(OsStr::new("--trial"));
        }
        let before = self.plan.as_ref().map(|(_, memory)| memory.try_clone()).transpose()?;
        self.start_child(CONFIGURATION, &arguments)?;
        self.reading = Some(Instant::now() + WORK);
        self.children.tell(CONFIGURATION, Message::Start, before.as_slice()).map_err(io::Error::other)
    }

    /// Starts `knockq` in a role.
    fn start_child(&mut self, name: &'static str, arguments: &[&OsStr]) -> io::Result<()> {
        let flags = self.start.flags.iter().map(OsStr::new);
        let arguments: Vec<&OsStr> =
            [OsStr::new(name)].into_iter().chain(arguments.iter().copied()).chain(flags).collect();
        self.children.start(name, &self.start.knockq, &arguments)
    }

    fn take_configuration(&mut self, mut read: Vec<OwnedFd>) -> Result<(), Ended> {
        self.dismiss_reader();
        let (plan, memory) = take_plan(&mut read)?;
        let [limits, settings] = read.try_into().map_err(|_| unreadable())?;
        self.next = Some((plan, memory, limits));
        Ok(self.children.tell("engine", Message::Settings, &[settings])?)
    }

    /// The configuration could not be read; if it was refused, the child has said why.
    fn refuse_configuration(&mut self, why: &str) -> Result<(), Ended> {
        self.dismiss_reader();
        let hint = format!("knockq check --config {}", self.start.config.display());
        Ok(self.refuse(&format!("{why}\n{hint}"))?)
    }

    fn dismiss_reader(&mut self) {
        self.children.dismiss(CONFIGURATION);
        self.reading = None;
    }

    fn refuse(&self, why: &str) -> Result<(), RootError> {
        self.children.tell("engine", Message::Refused, &[handover::seal_bytes(why.as_bytes())?])
    }

    /// Waits until nft may be run for the engine again.
    fn pace(&mut self) {
        if let Some(ran) = self.nft_ran {
            sleep(PAUSE.saturating_sub(ran.elapsed()));
        }
        self.nft_ran = Some(Instant::now());
    }

    /// Asks the gate for something and waits until it is done.
    fn ask_gate(&mut self, message: Message, descriptors: &[OwnedFd]) -> Result<Message, Ended> {
        const ANSWERS: [Message; 3] = [Message::Ready, Message::Persists, Message::Made];
        self.children.tell("gate", message, descriptors)?;
        let answers = if message == Message::Release { &ANSWERS[..] } else { &[Message::Ready] };
        Ok(self.children.wait_for("gate", answers)?.0)
    }

    /// Tells the service manager what is ready.
    fn tell_ready(&self) {
        self.notify(&[NotifyState::Ready, NotifyState::Status(self.status())]);
    }

    fn status(&self) -> &str {
        let summary = self.plan.as_ref().map_or("", |(plan, _)| &plan.summary);
        if self.is_lost { OPEN } else { summary }
    }

    /// The service manager may have gone, or never have been there: that is no reason to stop.
    fn notify(&self, state: &[NotifyState<'_>]) {
        if let Err(error) = sd_notify::notify(state) {
            self.start.lines.warning(&format!("the service manager does not listen: {error}"));
        }
    }

    /// Ends the others. A gate that nobody has confirmed goes with them, whatever the cause; any other stays shut: that the table
    /// was lost may not have been heard yet.
    fn stop(&mut self, ended: Ended) -> Ended {
        self.notify(&[NotifyState::Stopping]);
        let is_on_trial = self.trial.is_some();
        // If the gate lives and owns the table, nft is refused, and nobody has deleted it.
        if self.has_loaded && !is_on_trial && self.load_once(self.persists).is_err() && !self.children.has("gate") {
            let _ = self.load_once(false);
        }
        self.children.end();
        if !(self.has_loaded && is_on_trial) {
            return ended;
        }
        match (nft(&["-f", "-"], DELETE), ended) {
            (Err(Failed { said, .. }), _) => Ended::Failed(RootError::Nft(said)),
            (Ok(_), Ended::Asked) => Ended::Unconfirmed,
            (Ok(_), ended) => ended,
        }
    }
}

/// Descriptors that are the gate's at the start: the relay, the engine's commands, its limits.
const GATE_AT_START: usize = 3;

/// The plan comes first of what was handed over.
fn take_plan(handed: &mut Vec<OwnedFd>) -> Result<(Plan, OwnedFd), RootError> {
    if handed.is_empty() {
        return Err(unreadable());
    }
    let memory = handed.remove(0);
    let plan = Plan::read(&memory).map_err(|_| unreadable())?;
    Ok((plan, memory))
}

const fn unreadable() -> RootError {
    RootError::Breach { process: CONFIGURATION, breach: Breach::Unreadable }
}
