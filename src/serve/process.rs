//! A child process: this binary again, in another role.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::channel::{Channel, Message, message_pair};
use super::log::Style;

/// Time that a child has to end when it is told to.
const STOP: Duration = Duration::from_secs(5);

/// A child, and the keeper's end of the channel to it.
pub(super) struct Process {
    pub(super) name: &'static str,
    child: Child,
    pub(super) channel: Option<Channel>,
}

impl Process {
    /// Starts this binary with the role as its command, these arguments, an empty environment and the channel as standard input.
    pub(super) fn spawn(name: &'static str, arguments: &[&OsStr], style: Style) -> io::Result<Self> {
        let (ours, theirs) = message_pair()?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0(format!("knockq: {name}")).arg(name).args(arguments);
        for (flag, is_set) in [("--priorities", style.priorities), ("--debug", style.debug)] {
            if is_set {
                command.arg(flag);
            }
        }
        let child = command.env_clear().current_dir("/").stdin(theirs).stdout(Stdio::null()).spawn()?;
        Ok(Self { name, child, channel: Some(Channel::new(ours)) })
    }

    pub(super) fn send(&self, message: Message, descriptors: &[&OwnedFd]) -> io::Result<()> {
        let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(|descriptor| descriptor.as_fd()).collect();
        self.channel.as_ref().map_or(Ok(()), |channel| channel.send(message, &descriptors))
    }

    /// Tells it to go, and hangs up.
    pub(super) fn hang_up(&mut self) {
        let _ = self.send(Message::Stop, &[]); // hanging up does it too, but looks like the keeper's death
        self.channel = None;
    }

    /// Waits for its end; kills it if it takes too long.
    pub(super) fn end(&mut self) -> Option<ExitStatus> {
        let deadline = Instant::now() + STOP;
        while Instant::now() < deadline {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        self.child.wait().ok()
    }
}
