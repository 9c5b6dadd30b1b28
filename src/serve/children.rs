//! Root's children, and everything that can wake it.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGSYS, SIGTERM};
use signal_hook::low_level::pipe;

use super::channel::Message;
use super::control::Control;
use super::ending::{Ended, ServeError};
use super::log::Style;
use super::observers::{Observers, Wish};
use super::process::{End, Process};

/// Time that a child has to do what it was asked: ten thousand users take two seconds.
const WORK: Duration = Duration::from_secs(60);

/// The role of the child that reads the configuration. It alone comes and goes.
pub(super) const CONFIGURATION: &str = "configuration";

/// Child processes by their roles, and the signals that reach root.
pub(super) struct Children {
    processes: Vec<Process>,
    signals: [(i32, UnixStream); 3],
    style: Style,
    /// Where their lines go, if not where root's go.
    log: Option<OwnedFd>,
}

/// What woke root.
pub(super) enum Event {
    Signal(i32),
    Message(&'static str, Message, Vec<OwnedFd>),
    /// This child has ended.
    Gone(&'static str),
    /// Somebody wants something.
    Request,
    /// Somebody wants to know how the daemon is.
    Status,
    /// Somebody wants to know what happens.
    Watch,
}

/// Where an event comes from.
#[derive(Clone, Copy)]
enum Source {
    Signal(i32),
    Control,
    Observer(Wish),
    /// The child at this place.
    Child(usize),
}

impl Children {
    /// Starts listening to signals.
    pub(super) fn new(style: Style, log: Option<OwnedFd>) -> io::Result<Self> {
        let [terminate, interrupt, hangup] = [SIGTERM, SIGINT, SIGHUP].map(|signal| {
            let (ours, handlers) = UnixStream::pair()?;
            pipe::register(signal, handlers)?;
            io::Result::Ok((signal, ours))
        });
        Ok(Self { processes: Vec::new(), signals: [terminate?, interrupt?, hangup?], style, log })
    }

    /// Starts this binary in a role.
    pub(super) fn start(&mut self, name: &'static str, arguments: &[&OsStr]) -> io::Result<()> {
        let arguments = [&[name.as_ref()], arguments].concat();
        self.spawn(name, Path::new("/proc/self/exe"), &arguments, self.style)
    }

    /// Starts the gate, a program of its own.
    pub(super) fn start_gate(&mut self, program: &Path) -> io::Result<()> {
        let style = Style { debug: false, ..self.style };
        self.spawn("gate", program, &[env!("CARGO_PKG_VERSION").as_ref()], style)
    }

    fn spawn(&mut self, name: &'static str, program: &Path, arguments: &[&OsStr], style: Style) -> io::Result<()> {
        self.processes.push(Process::spawn(name, program, arguments, style, self.log.as_ref())?);
        Ok(())
    }

    /// Whether a child in this role runs.
    pub(super) fn has(&self, name: &str) -> bool {
        self.processes.iter().any(|process| process.name == name)
    }

    /// Says something to a child.
    pub(super) fn tell(&mut self, name: &str, message: Message, descriptors: &[&OwnedFd]) -> Result<(), ServeError> {
        let mut meant = self.processes.iter_mut().filter(|process| process.name == name);
        meant.try_for_each(|process| process.tell(message, descriptors))
    }

    /// Waits for a child to say one of these; hands all else that happens meanwhile to `otherwise`. What the child
    /// `configuration` says or does waits, unless it is the one: its end is nobody else's. So does what the engine says while the
    /// gate is waited for, which is never long. A hangup waits too: it asks for what can only be done afterwards.
    pub(super) fn wait_for(
        &mut self,
        name: &'static str,
        messages: &[Message],
        mut otherwise: impl FnMut(&mut Self, Event) -> Result<(), Ended>,
    ) -> Result<(Message, Vec<OwnedFd>), Ended> {
        let deadline = Instant::now() + WORK;
        // Looked at each time: what else happens may never end.
        while Instant::now() < deadline {
            match self.next_of(Some(name), None, None, Some(deadline))? {
                Some(Event::Message(from, said, descriptors)) if from == name && messages.contains(&said) => {
                    return Ok((said, descriptors));
                }
                Some(Event::Signal(SIGTERM | SIGINT)) => return Err(Ended::Asked),
                Some(Event::Gone(child)) => return Err(Ended::Failed(self.stop_all(child))),
                Some(other) => otherwise(self, other)?,
                None => {}
            }
        }
        Err(Ended::Failed(ServeError::TooSlow(name)))
    }

    /// Waits for the next event; `None` when the deadline has passed.
    ///
    /// # Errors
    /// Among others, when a child says what it may not.
    pub(super) fn next(
        &mut self,
        control: &Control,
        observers: &Observers,
        deadline: Option<Instant>,
    ) -> Result<Option<Event>, ServeError> {
        self.next_of(None, Some(control), Some(observers), deadline)
    }

    /// The same, but without what waits while this child is waited for. What root wants comes before what children say,
    /// and what others want to know comes last.
    fn next_of(
        &mut self,
        waited_for: Option<&str>,
        control: Option<&Control>,
        observers: Option<&Observers>,
        deadline: Option<Instant>,
    ) -> Result<Option<Event>, ServeError> {
        let is_heard =
            |child: &str| waited_for.is_none_or(|name| child == name || (child != CONFIGURATION && name != "gate"));
        let signals = self.signals.iter().filter(|(signal, _)| waited_for.is_none() || *signal != SIGHUP);
        let signals = signals.map(|(signal, stream)| (Source::Signal(*signal), stream.as_fd()));
        let control = control.map(|control| (Source::Control, control.as_fd()));
        let heard = self.processes.iter().enumerate().filter(|(_, child)| is_heard(child.name));
        let channels = heard.filter_map(|(place, child)| Some((Source::Child(place), child.channel.as_ref()?.as_fd())));
        let observers = observers.and_then(Observers::listeners).into_iter().flatten();
        let observers = observers.map(|(wish, socket)| (Source::Observer(wish), socket));
        let all = signals.chain(control).chain(channels).chain(observers);
        let (sources, descriptors): (Vec<Source>, Vec<BorrowedFd<'_>>) = all.unzip();
        let first = first_ready(&descriptors, deadline)?.and_then(|first| sources.get(first).copied());
        first.map_or(Ok(None), |source| self.event_of(source))
    }

    fn event_of(&mut self, source: Source) -> Result<Option<Event>, ServeError> {
        match source {
            Source::Signal(signal) => {
                let mut streams = self.signals.iter().filter(|(other, _)| *other == signal);
                streams.try_for_each(|(_, stream)| (&mut &*stream).read_exact(&mut [0]))?;
                Ok(Some(Event::Signal(signal)))
            }
            Source::Control => Ok(Some(Event::Request)),
            Source::Observer(Wish::Status) => Ok(Some(Event::Status)),
            Source::Observer(Wish::Watch) => Ok(Some(Event::Watch)),
            Source::Child(place) => {
                let Some(child) = self.processes.get_mut(place) else { return Ok(None) };
                let said = child.hear()?;
                Ok(Some(said.map_or(Event::Gone(child.name), |(said, with)| Event::Message(child.name, said, with))))
            }
        }
    }

    /// Ends one child.
    pub(super) fn dismiss(&mut self, name: &str) {
        if let Some(place) = self.processes.iter().position(|process| process.name == name) {
            let mut process = self.processes.remove(place);
            process.hang_up();
            process.end();
        }
    }

    /// Ends all children, of which this one has hung up, and tells the cause: one that was killed, or else one that failed,
    /// or else this one. A child whose peer is gone ends quietly.
    pub(super) fn stop_all(&mut self, gone: &'static str) -> ServeError {
        let mut ends = self.end();
        ends.sort_by_key(|(process, _)| *process != gone);
        let signalled = ends.iter().find_map(|(process, end)| match end {
            End::Signalled(SIGSYS) => Some(ServeError::ForbiddenCall { process }),
            End::Signalled(signal) => {
                Some(ServeError::ChildDied { process, end: format!("was killed by signal {signal}") })
            }
            _ => None,
        });
        let failed = ends.iter().find_map(|(process, end)| match end {
            End::Exited(code) if *code != 0 => {
                Some(ServeError::ChildFailed { process, code: u8::try_from(*code).unwrap_or(1) })
            }
            _ => None,
        });
        let lives_on = ends.iter().any(|(process, end)| *process == gone && *end == End::Killed);
        let end = if lives_on { "hung up" } else { "ended" };
        signalled.or(failed).unwrap_or_else(|| ServeError::ChildDied { process: gone, end: end.to_owned() })
    }

    /// Ends all children.
    pub(super) fn end(&mut self) -> Vec<(&'static str, End)> {
        self.processes.iter_mut().for_each(Process::hang_up);
        self.processes.drain(..).map(|mut child| (child.name, child.end())).collect()
    }
}

/// The first of these that has something to say; `None` when the deadline has passed.
fn first_ready(descriptors: &[BorrowedFd<'_>], deadline: Option<Instant>) -> io::Result<Option<usize>> {
    let sources = descriptors.iter().map(|source| PollFd::from_borrowed_fd(*source, PollFlags::IN));
    let mut sources: Vec<PollFd<'_>> = sources.collect();
    loop {
        let timeout = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        match poll(&mut sources, timeout.and_then(|time| Timespec::try_from(time).ok()).as_ref()) {
            Ok(_) => return Ok(sources.iter().position(|source| !source.revents().is_empty())),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
