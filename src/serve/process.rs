//! A child process: this binary again, in another role.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::channel::{Channel, Message, has_word, message_pair};
use super::ending::ServeError;
use super::log::Style;
use super::vocabulary::{Breach, Vocabulary};

/// Time that a child has to end when it is told to.
const STOP: Duration = Duration::from_secs(5);

/// Time that it has to be gone once it is killed: one whose disk hangs cannot be before the disk answers.
const KILL: Duration = Duration::from_millis(500);

/// A child, and root's end of the channel to it.
pub(super) struct Process {
    pub(super) name: &'static str,
    child: Child,
    pub(super) channel: Option<Channel>,
    vocabulary: Vocabulary,
}

/// How a child ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// With this exit code.
    Exited(i32),
    /// By this signal, which was none of ours.
    Signalled(i32),
    /// It lived on, and we killed it.
    Killed,
}

impl Process {
    /// Starts a program with these arguments, an empty environment and the channel as standard input; its lines go to `log`, or
    /// where root's go.
    pub(super) fn spawn(
        name: &'static str,
        program: &Path,
        arguments: &[&OsStr],
        style: Style,
        log: Option<&OwnedFd>,
    ) -> io::Result<Self> {
        let (ours, theirs) = message_pair()?;
        let mut command = Command::new(program);
        command.arg0(format!("knockq: {name}")).args(arguments);
        for (flag, is_set) in [("--priorities", style.priorities), ("--debug", style.debug)] {
            if is_set {
                command.arg(flag);
            }
        }
        if let Some(log) = log {
            command.stderr(log.try_clone()?);
        }
        let child = command.env_clear().current_dir("/").stdin(theirs).stdout(Stdio::null()).spawn()?;
        Ok(Self { name, child, channel: Some(Channel::new(ours)), vocabulary: Vocabulary::new(name) })
    }

    /// Tells it something.
    pub(super) fn tell(&mut self, message: Message, descriptors: &[&OwnedFd]) -> Result<(), ServeError> {
        if self.vocabulary.is_to_be_silent() && self.channel.as_ref().is_some_and(has_word) {
            self.hear()?; // what waits to be heard was said too early
        }
        let Some(channel) = &self.channel else { return Ok(()) };
        self.vocabulary.tell(message);
        let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(|descriptor| descriptor.as_fd()).collect();
        channel.send(message, &descriptors).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => self.breaks(Breach::Deaf),
            _ => error.into(),
        })
    }

    /// What it says; `None` when it has hung up.
    pub(super) fn hear(&mut self) -> Result<Option<(Message, Vec<OwnedFd>)>, ServeError> {
        match self.channel.as_ref().map(Channel::receive) {
            Some(Ok(Some((message, descriptors)))) => {
                self.vocabulary.hear(message, descriptors.len()).map_err(|breach| self.breaks(breach))?;
                Ok(Some((message, descriptors)))
            }
            Some(Err(error)) if error.kind() == io::ErrorKind::InvalidData => Err(self.breaks(Breach::NoMessage)),
            _ => Ok(None),
        }
    }

    const fn breaks(&self, breach: Breach) -> ServeError {
        ServeError::Breach { process: self.name, breach }
    }

    /// Tells it to go, and hangs up.
    pub(super) fn hang_up(&mut self) {
        let _ = self.tell(Message::Stop, &[]); // hanging up does it too, but looks like root's death
        self.channel = None;
    }

    /// Waits for its end; kills it if it takes too long, and waits on, but not for ever.
    pub(super) fn end(&mut self) -> End {
        for (time, end) in [(STOP, None), (KILL, Some(End::Killed))] {
            let deadline = Instant::now() + time;
            while Instant::now() < deadline {
                if let Ok(Some(status)) = self.child.try_wait() {
                    return end.unwrap_or_else(|| End::of(status));
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            let _ = self.child.kill();
        }
        End::Killed
    }
}

impl End {
    fn of(status: ExitStatus) -> Self {
        status.signal().map_or_else(|| Self::Exited(status.code().unwrap_or_default()), Self::Signalled)
    }
}

#[cfg(test)]
mod tests {
    use super::{Breach, Channel, Command, Message, Process, ServeError, Vocabulary, message_pair};

    /// A child that has ended, and the end of the channel that it would hold.
    fn process() -> (Process, Channel) {
        let (ours, theirs) = message_pair().unwrap();
        let child = Command::new("true").spawn().unwrap();
        let channel = Some(Channel::new(ours));
        (Process { name: "engine", child, channel, vocabulary: Vocabulary::new("engine") }, Channel::new(theirs))
    }

    #[test]
    fn a_child_that_reads_nothing_is_named_and_nobody_waits_for_it() {
        let (mut process, theirs) = process();
        let told = (0..100_000).map(|_| process.tell(Message::Settings, &[])).find_map(Result::err);
        assert!(matches!(told, Some(ServeError::Breach { process: "engine", breach: Breach::Deaf })), "{told:?}");
        drop(theirs);
        process.end();
    }

    #[test]
    fn what_a_child_says_before_it_is_told_anything_is_a_breach() {
        let (mut process, theirs) = process();
        theirs.send(Message::Ready, &[]).unwrap();
        let told = process.tell(Message::Start, &[]).unwrap_err();
        let breach = Breach::Unasked(Message::Ready);
        assert!(matches!(told, ServeError::Breach { breach: said, .. } if said == breach), "{told:?}");
        process.end();
    }

    #[test]
    fn the_last_words_of_a_peer_are_heard_although_it_left_something_unread() {
        let (process, theirs) = process();
        theirs.send(Message::Ready, &[]).unwrap();
        process.channel.as_ref().unwrap().send(Message::Stop, &[]).unwrap();
        drop(process);
        assert!(matches!(theirs.receive(), Ok(Some((Message::Stop, _)))));
        assert!(matches!(theirs.receive(), Ok(None)));
    }
}
