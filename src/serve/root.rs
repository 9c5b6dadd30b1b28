//! Root: root, but it sees no packet and no frame. It has the configuration read, starts the others, tends the table,
//! does what root asks, and stops all when one of the others dies.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{self, Path, PathBuf};
use std::time::{Duration, Instant};

use caps::{CapSet, Capability};
use signal_hook::consts::SIGHUP;
use tracing::{error, info};

use super::channel::Message;
use super::children::{CONFIGURATION, Children, Event};
use super::clock::unix_now;
use super::configuration::{self, Fixed, Plan};
use super::control::{self, Control, Reply, Request};
use super::ending::{Ended, ServeError};
use super::gate_table::GateTable;
use super::log::{self, Style};
use super::manager::{self, NotifyState};
use super::observers::Observers;
use super::report::{self, Queue, RootPart, Table};
use super::start::{self, Raised, TO_START, TO_WORK, take_gate_away};
use super::vocabulary::Breach;
use super::{calls, handover, sandbox, terminal, watchers};

/// Time between two looks at a table that others have to load.
const LOOK: Duration = Duration::from_secs(1);

/// Time that reading the configuration may take: ten thousand users take two seconds.
const READING: Duration = Duration::from_secs(60);

/// Who may wait for a reload at most: each holds a descriptor.
const MAX_ASKERS: usize = 64;

/// Why a configuration cannot be put in force while the disk does not answer, and what to do.
const WAITS_FOR_DISK: &str = "the counters of its users cannot be read, for the disk does not answer";
const DISK_HINT: &str = "look after the disk; the configuration is read again when it answers";

/// Runs the daemon until it is told to stop; with `trial`, for so long at most unless it is confirmed.
///
/// # Errors
/// [`ServeError`]. Doors that are open stay open for the time that they have left; the gate stays shut.
pub fn run(config_path: &Path, trial: Option<Duration>, style: Style) -> Result<(), ServeError> {
    log::start("knockq", style);
    let may = caps::has_cap(None, CapSet::Effective, Capability::CAP_NET_ADMIN).unwrap_or(false);
    if !rustix::process::geteuid().is_root() || !may {
        return Err(ServeError::NotRoot);
    }
    close_fds::set_fds_cloexec(3, &[]); // what we inherited is not for the children
    let log = terminal::writing_end(io::stderr())?; // while it may be opened: the terminal may be another user's
    let mut children = Children::new(style, log)?; // a signal that comes from here on is not lost
    sandbox::keep_only(&[TO_WORK, TO_START].concat())?;
    sandbox::forbid(calls::NEVER, calls::MISSING)?;
    let config_path = path::absolute(config_path)?;
    let ended = match start::bring_up(&mut children, &config_path, trial) {
        Ok(raised) => {
            let (mut root, control) = Root::new(children, config_path, raised, trial);
            let Err(ended) = root.watch(&control);
            root.stop(ended)
        }
        Err(ended) => {
            children.end();
            ended
        }
    };
    match ended {
        Ended::Failed(error) => Err(error),
        Ended::Asked => {
            info!("stopped; doors that are open keep the time that they have left");
            Ok(())
        }
        Ended::Unconfirmed => Err(ServeError::NotConfirmed),
    }
}

/// The daemon, once all of it works.
struct Root {
    children: Children,
    config_path: PathBuf,
    fixed: Fixed,
    gate: GateTable,
    observers: Observers,
    started: Instant,
    /// How many may knock, and for how many services.
    counts: (usize, usize),
    /// When the configuration was last read again, in Unix seconds, and whether it was taken.
    reloaded: Option<(u64, bool)>,
    /// What is ready, in one line.
    summary: String,
    /// The table is not what it should be, and it is for others to load it: when to look again.
    look: Option<Instant>,
    /// The engine has new settings that it could not yet prepare, because the disk does not answer.
    is_preparing: bool,
    /// When the gate is undone unless somebody confirms it.
    trial: Option<Instant>,
    /// When the child that reads the configuration has taken too long.
    reading: Option<Instant>,
    /// Who waits for the reload that goes on.
    askers: Vec<UnixStream>,
    /// Who came too late for it: the files may have changed since it read them.
    late: Option<Vec<UnixStream>>,
}

impl Root {
    fn new(children: Children, config_path: PathBuf, raised: Raised, trial: Option<Duration>) -> (Self, Control) {
        let Raised { fixed, control, observers, counts, gate, summary, is_outdated } = raised;
        let trial = trial.map(|time| {
            info!(
                seconds = time.as_secs(),
                hint = "knockq confirm",
                "on trial: unless confirmed, the gate is taken away"
            );
            Instant::now() + time
        });
        let root = Self {
            children,
            config_path,
            fixed,
            gate,
            observers,
            started: Instant::now(),
            counts,
            reloaded: None,
            summary,
            look: None,
            is_preparing: false,
            trial,
            reading: None,
            askers: Vec::new(),
            late: is_outdated.then(Vec::new),
        };
        (root, control)
    }

    /// Does what comes, until it is told to stop or a child dies.
    fn watch(&mut self, control: &Control) -> Result<std::convert::Infallible, Ended> {
        self.reload_once_more()?;
        loop {
            self.mind_the_time()?; // each time, for what else comes may never end
            let resumes = self.observers.resumes(Instant::now());
            let deadline = self.trial.into_iter().chain(self.reading).chain(self.look).chain(resumes).min();
            match self.children.next(control, &self.observers, deadline)? {
                Some(Event::Signal(SIGHUP)) => self.reload(None)?,
                Some(Event::Signal(_)) => return Err(Ended::Asked),
                Some(Event::Request) => self.answer(control.accept())?,
                Some(Event::Status) => self.tell_observer()?,
                Some(Event::Watch) => self.admit_watcher()?,
                Some(Event::Message(CONFIGURATION, Message::Ready, read)) => self.take_configuration(read)?,
                Some(Event::Gone(CONFIGURATION)) => self.keep_configuration("the configuration is refused")?,
                Some(Event::Gone(child)) => return Err(Ended::Failed(self.children.stop_all(child))),
                Some(Event::Message("engine", Message::Lost, _)) => self.restore()?,
                Some(Event::Message("engine", Message::Prepared | Message::Unable, _)) => self.catch_up()?,
                Some(Event::Message(process, said, _)) => {
                    return Err(ServeError::Breach { process, breach: Breach::Unasked(said) }.into());
                }
                None => {}
            }
        }
    }

    /// Does what time alone brings.
    fn mind_the_time(&mut self) -> Result<(), Ended> {
        let now = Instant::now();
        let is_over = |end: Option<Instant>| end.is_some_and(|end| end <= now);
        if is_over(self.trial) {
            return Err(Ended::Unconfirmed);
        }
        if is_over(self.reading) {
            self.keep_configuration("reading the configuration takes too long")?;
        }
        if is_over(self.look) { self.restore() } else { Ok(()) }
    }

    /// Somebody changed or deleted the table.
    fn restore(&mut self) -> Result<(), Ended> {
        let look = Instant::now() + LOOK;
        if restore(&mut self.children, &self.gate)? {
            if self.look.take().is_some() {
                info!("table inet knockq is as it should be again, and open doors are open again");
                self.tell_status();
            }
        } else if self.look.replace(look).is_none() {
            self.gate.complain();
            self.tell_status();
        }
        Ok(())
    }

    /// Tells the service manager what there is to see.
    fn tell_status(&self) {
        let status = if self.look.is_some() { manager::OPEN } else { &self.summary };
        manager::notify(&[NotifyState::Status(status)]);
    }

    fn answer(&mut self, request: Option<(Request, UnixStream)>) -> Result<(), Ended> {
        match request {
            Some((Request::Reload, stream)) => self.reload(Some(stream)),
            Some((Request::Revoke(selection), stream)) => {
                match handover::seal(&selection).and_then(|selection| Ok((selection, report::memory()?))) {
                    Ok((selection, memory)) => {
                        self.ask("engine", Message::Revoke, &[&memory, &selection])?;
                        control::hand_over(&stream, &memory);
                    }
                    Err(error) => control::reply(stream, &busy(&error.to_string())),
                }
                self.catch_up_with_reloads()
            }
            Some((Request::Explain, stream)) => {
                match report::memory() {
                    Ok(memory) => {
                        self.ask_for("engine", Message::Explain, &[&memory], &[Message::Reported])?;
                        control::hand_over(&stream, &memory);
                    }
                    Err(error) => control::reply(stream, &busy(&error.to_string())),
                }
                self.catch_up_with_reloads()
            }
            Some((Request::Confirm, stream)) => {
                control::reply(stream, &self.confirm());
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// What `ask` found to be done.
    fn catch_up_with_reloads(&mut self) -> Result<(), Ended> {
        if self.children.has(CONFIGURATION) { Ok(()) } else { self.reload_once_more() }
    }

    /// Hands somebody who looks on what the daemon tells of itself. Nothing of it is looked at here.
    fn tell_observer(&mut self) -> Result<(), Ended> {
        let Some(client) = self.observers.accept_status() else { return Ok(()) };
        let Ok(engine) = report::memory() else { return Ok(()) };
        self.ask_for("engine", Message::Report, &[&engine], &[Message::Reported])?;
        let part = self.part();
        self.observers.hand_over(client, &part, &engine);
        self.catch_up_with_reloads()
    }

    /// Has somebody told what happens.
    fn admit_watcher(&mut self) -> Result<(), Ended> {
        let Some((client, uid)) = self.observers.accept_watcher() else { return Ok(()) };
        let Ok(copy) = client.try_clone() else { return Ok(()) };
        if !watchers::admit(copy, uid) {
            watchers::turn_away(client);
            return Ok(());
        }
        Ok(self.children.tell("engine", Message::Watch, &[&client])?)
    }

    fn part(&self) -> RootPart {
        let now = Instant::now();
        let (users, services) = self.counts;
        let queues = fs::read_to_string(start::QUEUES).unwrap_or_default();
        RootPart {
            uptime: now.duration_since(self.started).as_secs(),
            users,
            services,
            table: Table {
                is_managed: !self.gate.is_for_others(),
                is_right: self.look.is_none(),
                is_owned: self.gate.is_ours_alone(),
                trial: self.trial.map(|end| end.saturating_duration_since(now).as_secs()),
            },
            queue: Queue::of_listing(&queues, self.fixed.queue),
            reloaded: self.reloaded,
            waits_for_disk: self.is_preparing,
        }
    }

    fn confirm(&mut self) -> Reply {
        if self.trial.take().is_none() {
            let hint = "`knockq serve --try 10m` sets a gate up on trial".to_owned();
            return Reply::Refused { message: "the gate is not on trial, so it stays".to_owned(), hint };
        }
        info!("confirmed: the gate stays");
        Reply::Done
    }

    /// Has the configuration read by a child, while everything goes on; once more if that is being done already.
    fn reload(&mut self, asker: Option<UnixStream>) -> Result<(), Ended> {
        if self.children.has(CONFIGURATION) {
            let late = self.late.get_or_insert_default();
            match asker {
                Some(stream) if late.len() >= MAX_ASKERS => control::reply(stream, &busy("too many wait for a reload")),
                asker => late.extend(asker),
            }
            return Ok(());
        }
        self.askers.extend(asker);
        if let Ok(now) = NotifyState::monotonic_usec_now() {
            manager::notify(&[NotifyState::Reloading, now]);
        }
        match self.children.start(CONFIGURATION, &["--config".as_ref(), self.config_path.as_os_str()]) {
            Ok(()) => {
                self.reading = Some(Instant::now() + READING);
                Ok(())
            }
            Err(error) => {
                self.refuse(&format!("nobody can be started to read the configuration: {error}"), "free resources")
            }
        }
    }

    /// The configuration could not be read; if it was refused, the child has said why.
    fn keep_configuration(&mut self, why: &str) -> Result<(), Ended> {
        self.dismiss_reader();
        let hint = format!("knockq check --config {}", self.config_path.display());
        self.refuse(why, &hint)
    }

    fn dismiss_reader(&mut self) {
        self.reading = None;
        self.children.dismiss(CONFIGURATION);
    }

    fn refuse(&mut self, why: &str, hint: &str) -> Result<(), Ended> {
        self.reloaded = Some((unix_now(), false));
        error!(hint, "not reloaded: {why}; the configuration of before stays in force");
        let message = format!("not reloaded: {why}; the configuration of before stays in force");
        self.end_reload(|| Reply::Refused { message: message.clone(), hint: hint.to_owned() })
    }

    fn end_reload(&mut self, reply: impl Fn() -> Reply) -> Result<(), Ended> {
        self.askers.drain(..).for_each(|stream| control::reply(stream, &reply()));
        manager::notify(&[NotifyState::Ready]);
        self.reload_once_more()
    }

    /// For those who came too late for the last one, if there are any.
    fn reload_once_more(&mut self) -> Result<(), Ended> {
        let Some(late) = self.late.take() else { return Ok(()) };
        self.askers = late;
        self.reload(None)
    }

    /// Puts a configuration in force that was read and understood. No knock is lost: the queue stays bound, the engine
    /// prepares beside its work, and the table changes in one transaction.
    fn take_configuration(&mut self, read: Vec<OwnedFd>) -> Result<(), Ended> {
        self.dismiss_reader();
        let (plan, settings, limits) = configuration::take(read)?;
        let Plan { fixed, ruleset, users, services, knock_ports, .. } = plan;
        if self.is_preparing {
            return self.refuse(WAITS_FOR_DISK, DISK_HINT);
        }
        if let Some(setting) = self.fixed.difference(&fixed) {
            return self.refuse(&format!("only a restart changes `{setting}`"), "systemctl restart knockq");
        }
        if (self.gate.is_for_others() || self.gate.differs_from(&ruleset))
            && let Err(error) = self.gate.could_become(&ruleset)
        {
            return self.refuse(&error.to_string(), &error.hint());
        }
        match self.ask_for("engine", Message::Settings, &[&settings], &[Message::Prepared, Message::Unable]) {
            Ok(Message::Prepared) => {}
            Ok(_) => return self.refuse("the counters of its users cannot be read", "journalctl -u knockq"),
            // Its lookups go on, and a new daemon would wait for the same disk.
            Err(Ended::Failed(ServeError::TooSlow(_))) => {
                self.is_preparing = true;
                return self.refuse(WAITS_FOR_DISK, DISK_HINT);
            }
            Err(ended) => return Err(ended),
        }
        // The gate permits what either configuration does until the engine asks by the new one alone.
        self.ask("gate", Message::Settings, &[&limits])?;
        self.ask("engine", Message::Enforce, &[])?;
        self.ask("gate", Message::Enforce, &[])?;
        if self.gate.differs_from(&ruleset) {
            self.ask("engine", Message::Release, &[])?;
            self.ask("gate", Message::Release, &[])?;
            self.gate.replace(ruleset)?;
            if self.gate.is_for_others() {
                self.restore()?;
            } else {
                show(&mut self.children)?;
            }
        }
        self.gate.keep();
        self.say_reloaded(users, services, &knock_ports)
    }

    fn say_reloaded(&mut self, users: usize, services: usize, knock_ports: &str) -> Result<(), Ended> {
        info!(users, services, knock_ports, "reloaded");
        self.reloaded = Some((unix_now(), true));
        self.counts = (users, services);
        self.summary = manager::summary(users, services, knock_ports);
        self.tell_status();
        self.end_reload(|| Reply::Done)
    }

    /// The disk has answered: what was refused for it is read again, for the files may have changed.
    fn catch_up(&mut self) -> Result<(), Ended> {
        self.is_preparing = false;
        self.reload(None)
    }

    /// Asks a child for something and waits until it is done. If the table is taken away meanwhile, that comes first.
    fn ask(&mut self, name: &'static str, message: Message, descriptors: &[&OwnedFd]) -> Result<(), Ended> {
        self.ask_for(name, message, descriptors, &[Message::Ready]).map(drop)
    }

    /// The same, for one of these answers.
    fn ask_for(
        &mut self,
        name: &'static str,
        message: Message,
        descriptors: &[&OwnedFd],
        answers: &[Message],
    ) -> Result<Message, Ended> {
        let was_right = self.look.is_none();
        let Self { children, gate, look, late, is_preparing, .. } = self;
        children.tell(name, message, descriptors)?;
        let answer = children.wait_for(name, answers, |children, event| match event {
            // It is about to be loaded anyway, and until then it must have no owner.
            Event::Message("engine", Message::Lost, _) if message == Message::Release => Ok(()),
            Event::Message("engine", Message::Lost, _) => {
                if !restore(children, gate)? {
                    *look = Some(Instant::now() + LOOK);
                    gate.complain();
                }
                Ok(())
            }
            Event::Message("engine", ..) => {
                *is_preparing = false;
                late.get_or_insert_default();
                Ok(())
            }
            _ => Ok(()),
        })?;
        if was_right && self.look.is_some() {
            self.tell_status();
        }
        Ok(answer.0)
    }

    /// Ends the others. A gate that nobody has confirmed goes with them, whatever the cause; any other stays shut.
    fn stop(mut self, ended: Ended) -> Ended {
        manager::notify(&[NotifyState::Stopping]);
        if self.trial.is_none() {
            self.gate.leave_shut(); // that the table was lost may not have been heard yet
        }
        self.children.end();
        if self.trial.is_none() { ended } else { take_gate_away(ended) }
    }
}

/// Loads the table again, of which the gate lets go; `false` if that is for others to do, and they have not yet.
fn restore(children: &mut Children, gate: &GateTable) -> Result<bool, Ended> {
    tell_gate(children, Message::Release)?;
    let is_right = gate.restore()?;
    if is_right {
        show(children)?;
    }
    Ok(is_right)
}

/// The table is loaded.
fn show(children: &mut Children) -> Result<(), Ended> {
    tell_gate(children, Message::Loaded)?;
    Ok(children.tell("engine", Message::Loaded, &[])?)
}

fn tell_gate(children: &mut Children, message: Message) -> Result<(), Ended> {
    children.tell("gate", message, &[])?;
    children.wait_for("gate", &[Message::Ready], |_, _| Ok(())).map(drop)
}

fn busy(why: &str) -> Reply {
    Reply::Refused { message: format!("the daemon cannot do this now: {why}"), hint: "try again".to_owned() }
}
