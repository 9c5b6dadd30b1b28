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
use super::ending::{Ended, RootError};
use super::process::{End, Process};

/// Time that a child has to do what it was asked: ten thousand users take two seconds.
pub(super) const WORK: Duration = Duration::from_secs(60);

/// The child that reads the configuration. It alone comes and goes.
pub(super) const CONFIGURATION: &str = "configuration";

/// Child processes by their roles, and the signals that reach root.
pub(super) struct Children {
    processes: Vec<Process>,
    signals: [(i32, UnixStream); 3],
    /// Where their lines go, if not where root's go.
    log: Option<OwnedFd>,
}

/// What woke root.
pub(super) enum Event {
    Signal(i32),
    Message(&'static str, Message, Vec<OwnedFd>),
    /// This child has ended.
    Gone(&'static str),
}

impl Children {
    /// Starts listening to signals.
    pub(super) fn new(log: Option<OwnedFd>) -> io::Result<Self> {
        let [terminate, interrupt, hangup] = [SIGTERM, SIGINT, SIGHUP].map(|signal| {
            let (ours, handlers) = UnixStream::pair()?;
            pipe::register(signal, handlers)?;
            io::Result::Ok((signal, ours))
        });
        Ok(Self { processes: Vec::new(), signals: [terminate?, interrupt?, hangup?], log })
    }

    /// Starts a program as this child.
    pub(super) fn start(&mut self, name: &'static str, program: &Path, arguments: &[&OsStr]) -> io::Result<()> {
        self.processes.push(Process::spawn(name, program, arguments, self.log.as_ref())?);
        Ok(())
    }

    /// Whether a child of this name runs.
    pub(super) fn has(&self, name: &str) -> bool {
        self.processes.iter().any(|process| process.name == name)
    }

    /// Says something to a child.
    pub(super) fn tell(&self, name: &str, message: Message, descriptors: &[OwnedFd]) -> Result<(), RootError> {
        let mut meant = self.processes.iter().filter(|process| process.name == name);
        meant.try_for_each(|process| process.tell(message, descriptors))
    }

    /// Waits for a child to say one of these; a stop comes before. What others say or do waits, and so does a hangup: it asks for
    /// what can only be done afterwards.
    pub(super) fn wait_for(
        &mut self,
        name: &'static str,
        messages: &[Message],
    ) -> Result<(Message, Vec<OwnedFd>), Ended> {
        match self.next(Some(name), Instant::now() + WORK)? {
            Some(Event::Message(_, said, descriptors)) if messages.contains(&said) => Ok((said, descriptors)),
            Some(Event::Message(process, said, _)) => Err(RootError::unasked(process, said).into()),
            Some(Event::Signal(_)) => Err(Ended::Asked),
            Some(Event::Gone(child)) => Err(Ended::Failed(self.stop_all(child))),
            None => Err(Ended::Failed(RootError::TooSlow(name))),
        }
    }

    /// Waits for the next event, `only` of this child and of a stop, if it is named; `None` when the deadline has passed.
    pub(super) fn next(&mut self, only: Option<&str>, deadline: Instant) -> Result<Option<Event>, RootError> {
        let signals = self.signals.iter().filter(|(signal, _)| only.is_none() || *signal != SIGHUP);
        let signals = signals.map(|(signal, stream)| (Source::Signal(*signal, stream), stream.as_fd()));
        let heard = self.processes.iter().filter(|child| only.is_none_or(|name| child.name == name));
        let channels = heard.filter_map(|child| Some((Source::Child(child), child.channel.as_ref()?.as_fd())));
        let (sources, descriptors): (Vec<Source<'_>>, Vec<BorrowedFd<'_>>) = signals.chain(channels).unzip();
        match first_ready(&descriptors, deadline)?.and_then(|first| sources.get(first)) {
            Some(&Source::Signal(signal, mut stream)) => {
                stream.read_exact(&mut [0])?;
                Ok(Some(Event::Signal(signal)))
            }
            Some(Source::Child(child)) => {
                let said = child.hear()?;
                Ok(Some(said.map_or(Event::Gone(child.name), |(said, with)| Event::Message(child.name, said, with))))
            }
            None => Ok(None),
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
    pub(super) fn stop_all(&mut self, gone: &'static str) -> RootError {
        let mut ends = self.end();
        ends.sort_by_key(|(process, _)| *process != gone);
        let signalled = ends.iter().find_map(|(process, end)| match end {
            End::Signalled(SIGSYS) => Some(RootError::ForbiddenCall { process }),
            End::Signalled(signal) => {
                Some(RootError::ChildDied { process, end: format!("was killed by signal {signal}") })
            }
            _ => None,
        });
        let failed = ends.iter().find_map(|(process, end)| match end {
            End::Exited(code) if *code != 0 => {
                Some(RootError::ChildFailed { process, code: u8::try_from(*code).unwrap_or(1) })
            }
            _ => None,
        });
        let lives_on = ends.iter().any(|(process, end)| *process == gone && *end == End::Killed);
        let end = if lives_on { "hung up" } else { "ended" };
        signalled.or(failed).unwrap_or_else(|| RootError::ChildDied { process: gone, end: end.to_owned() })
    }

    /// Ends all children.
    pub(super) fn end(&mut self) -> Vec<(&'static str, End)> {
        self.processes.iter_mut().for_each(Process::hang_up);
        self.processes.drain(..).map(|mut child| (child.name, child.end())).collect()
    }
}

/// Where an event comes from.
enum Source<'a> {
    Signal(i32, &'a UnixStream),
    Child(&'a Process),
}

/// The first of these that has something to say; `None` when the deadline has passed.
fn first_ready(descriptors: &[BorrowedFd<'_>], deadline: Instant) -> io::Result<Option<usize>> {
    let sources = descriptors.iter().map(|source| PollFd::from_borrowed_fd(*source, PollFlags::IN));
    let mut sources: Vec<PollFd<'_>> = sources.collect();
    loop {
        let timeout = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).unwrap_or_default();
        match poll(&mut sources, Some(&timeout)) {
            Ok(_) => return Ok(sources.iter().position(|source| !source.revents().is_empty())),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
