//! The keeper's children, and everything that can wake it.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

use super::channel::{Channel, Message};
use super::control::Control;
use super::ending::{Ended, ServeError};
use super::log::Style;
use super::process::Process;

/// Time that a child has to do what it was asked: ten thousand users take two seconds.
const WORK: Duration = Duration::from_secs(60);

/// The role of the child that reads the configuration. It alone comes and goes.
pub(super) const CONFIGURATION: &str = "configuration";

/// Child processes by their roles, and the signals that reach the keeper.
pub(super) struct Children {
    processes: Vec<Process>,
    signals: [(i32, UnixStream); 3],
    style: Style,
}

/// What woke the keeper.
pub(super) enum Event {
    Signal(i32),
    Message(&'static str, Message, Vec<OwnedFd>),
    /// This child has ended.
    Gone(&'static str),
    /// Somebody wants something.
    Request,
}

impl Children {
    /// Starts listening to signals.
    pub(super) fn new(style: Style) -> io::Result<Self> {
        let [terminate, interrupt, hangup] = [SIGTERM, SIGINT, SIGHUP].map(|signal| {
            let (ours, handlers) = UnixStream::pair()?;
            pipe::register(signal, handlers)?;
            io::Result::Ok((signal, ours))
        });
        Ok(Self { processes: Vec::new(), signals: [terminate?, interrupt?, hangup?], style })
    }

    /// Starts this binary in a role.
    pub(super) fn start(&mut self, name: &'static str, arguments: &[&OsStr]) -> io::Result<()> {
        self.processes.push(Process::spawn(name, arguments, self.style)?);
        Ok(())
    }

    /// Whether a child in this role runs.
    pub(super) fn has(&self, name: &str) -> bool {
        self.processes.iter().any(|process| process.name == name)
    }

    /// Says something to a child.
    pub(super) fn tell(&self, name: &str, message: Message, descriptors: &[&OwnedFd]) -> io::Result<()> {
        self.processes
            .iter()
            .filter(|process| process.name == name)
            .try_for_each(|process| process.send(message, descriptors))
    }

    /// Waits for a child to say one of these; hands all else that happens meanwhile to `otherwise`. What the child
    /// `configuration` says or does waits, unless it is the one: its end is nobody else's.
    pub(super) fn wait_for(
        &mut self,
        name: &'static str,
        messages: &[Message],
        mut otherwise: impl FnMut(&mut Self, Event) -> Result<(), Ended>,
    ) -> Result<(Message, Vec<OwnedFd>), Ended> {
        let deadline = Instant::now() + WORK;
        loop {
            match self.next_of(|other| other == name || other != CONFIGURATION, None, Some(deadline))? {
                Some(Event::Message(from, said, descriptors)) if from == name && messages.contains(&said) => {
                    return Ok((said, descriptors));
                }
                Some(Event::Signal(SIGTERM | SIGINT)) => return Err(Ended::Asked),
                Some(Event::Gone(_)) => return Err(Ended::Failed(self.bury())),
                Some(other) => otherwise(self, other)?,
                None => return Err(Ended::Failed(ServeError::TooSlow(name))),
            }
        }
    }

    /// Waits for the next event; `None` when the deadline has passed.
    pub(super) fn next(&mut self, control: Option<&Control>, deadline: Option<Instant>) -> io::Result<Option<Event>> {
        self.next_of(|_| true, control, deadline)
    }

    /// The same, but of the children only those in these roles are heard.
    fn next_of(
        &mut self,
        is_heard: impl Fn(&str) -> bool,
        control: Option<&Control>,
        deadline: Option<Instant>,
    ) -> io::Result<Option<Event>> {
        let signals = self.signals.iter().map(|(_, stream)| stream.as_fd());
        let heard: Vec<&Process> = self.processes.iter().filter(|child| is_heard(child.name)).collect();
        let channels = heard.iter().filter_map(|child| child.channel.as_ref()).map(AsFd::as_fd);
        let sources = signals.chain(channels).chain(control.map(AsFd::as_fd));
        let mut sources: Vec<PollFd<'_>> =
            sources.map(|source| PollFd::from_borrowed_fd(source, PollFlags::IN)).collect();
        loop {
            let timeout = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            match poll(&mut sources, timeout.and_then(|time| Timespec::try_from(time).ok()).as_ref()) {
                Ok(0) => return Ok(None),
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let first = sources.iter().position(|source| !source.revents().is_empty()).unwrap_or_default();
        drop(sources);
        self.event_at(first, &heard).map(Some)
    }

    /// The event at a place in the order of [`Children::next_of`].
    fn event_at(&self, place: usize, heard: &[&Process]) -> io::Result<Event> {
        if let Some((signal, stream)) = self.signals.get(place) {
            (&mut &*stream).read_exact(&mut [0])?;
            return Ok(Event::Signal(*signal));
        }
        let Some(child) = heard.get(place - self.signals.len()) else { return Ok(Event::Request) };
        Ok(match child.channel.as_ref().map(Channel::receive) {
            Some(Ok(Some((message, descriptors)))) => Event::Message(child.name, message, descriptors),
            _ => Event::Gone(child.name),
        })
    }

    /// Ends one child.
    pub(super) fn dismiss(&mut self, name: &str) -> Option<ExitStatus> {
        let place = self.processes.iter().position(|process| process.name == name)?;
        let mut process = self.processes.remove(place);
        process.hang_up();
        process.end()
    }

    /// Ends all children and tells the cause: one that was killed, or else one that failed. A child whose peer is gone ends
    /// quietly.
    pub(super) fn bury(&mut self) -> ServeError {
        let ends = self.end();
        let killed = ends.iter().find_map(|(process, status)| Some((*process, status.as_ref()?.signal()?)));
        let failed = ends
            .iter()
            .find_map(|(process, status)| Some((*process, status.as_ref()?.code().filter(|code| *code != 0)?)));
        match (killed, failed) {
            (Some((process, signal)), _) => {
                ServeError::ChildDied { process, end: format!("was killed by signal {signal}") }
            }
            (None, Some((process, code))) => ServeError::ChildFailed { process, code: u8::try_from(code).unwrap_or(1) },
            (None, None) => ServeError::ChildDied { process: "a child", end: "ended".to_owned() },
        }
    }

    /// Ends all children.
    pub(super) fn end(&mut self) -> Vec<(&'static str, Option<ExitStatus>)> {
        self.processes.iter_mut().for_each(Process::hang_up);
        self.processes.drain(..).map(|mut child| (child.name, child.end())).collect()
    }
}
