//! A child process of root's: a program, the channel to it, and its end.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::channel::{Channel, Message, message_pair};
use super::ending::{Breach, RootError};

/// Time that a child has to end when it is told to.
const STOP: Duration = Duration::from_secs(5);

/// Time that it has to be gone once it is killed: one whose disk hangs cannot be before the disk answers.
const KILL: Duration = Duration::from_millis(500);

/// A child, and root's end of the channel to it.
pub(super) struct Process {
    pub(super) name: &'static str,
    child: Child,
    pub(super) channel: Option<Channel>,
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
        log: Option<&OwnedFd>,
    ) -> io::Result<Self> {
        let (ours, theirs) = message_pair()?;
        let mut command = Command::new(program);
        command.arg0(format!("knockq: {name}")).args(arguments);
        if let Some(log) = log {
            command.stderr(log.try_clone()?);
        }
        let child = command.env_clear().current_dir("/").stdin(theirs).stdout(Stdio::null()).spawn()?;
        Ok(Self { name, child, channel: Some(Channel::new(ours)) })
    }

    /// Tells it something. It is never waited for.
    pub(super) fn tell(&self, message: Message, descriptors: &[OwnedFd]) -> Result<(), RootError> {
        let Some(channel) = &self.channel else { return Ok(()) };
        let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        channel.send(message, &descriptors).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => self.breaks(Breach::Deaf),
            _ => error.into(),
        })
    }

    /// What it says; `None` when it has hung up.
    pub(super) fn hear(&self) -> Result<Option<(Message, Vec<OwnedFd>)>, RootError> {
        match self.channel.as_ref().map(Channel::receive) {
            Some(Ok(said)) => Ok(said),
            Some(Err(error)) if error.kind() == io::ErrorKind::InvalidData => Err(self.breaks(Breach::NoMessage)),
            _ => Ok(None),
        }
    }

    const fn breaks(&self, breach: Breach) -> RootError {
        RootError::Breach { process: self.name, breach }
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
    use super::{Breach, Channel, Command, Message, Process, RootError, message_pair};

    /// A child that has ended, and the end of the channel that it would hold.
    fn process() -> (Process, Channel) {
        let (ours, theirs) = message_pair().unwrap();
        let child = Command::new("true").spawn().unwrap();
        (Process { name: "engine", child, channel: Some(Channel::new(ours)) }, Channel::new(theirs))
    }

    #[test]
    fn a_child_that_reads_nothing_is_named_and_nobody_waits_for_it() {
        let (mut process, theirs) = process();
        let told = (0..100_000).find_map(|_| process.tell(Message::Settings, &[]).err());
        assert!(matches!(told, Some(RootError::Breach { process: "engine", breach: Breach::Deaf })), "{told:?}");
        drop(theirs);
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
