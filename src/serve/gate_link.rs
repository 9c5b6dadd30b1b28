//! The engine's end of the way to the gate: a message of commands, and its answer.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::commands::{ANSWER_LEN, Command, Outcome};
use crate::nft::{Element, ElementError, Lister, Query};

/// Time that the gate has to answer: less than root gives the engine, so that the one at fault is named.
const PATIENCE: Duration = Duration::from_secs(45);

/// Bytes of the longest datagram that the gate hands on.
const DATAGRAM: usize = 32 << 10;

/// The gate.
pub struct GateLink {
    socket: OwnedFd,
    last: Outcome,
    /// By which the kernel named the gate's sockets: the last, and the one before.
    numbers: [u32; 2],
    failed: Option<io::Error>,
}

impl GateLink {
    /// The engine's end.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, last: Outcome::default(), numbers: [0; 2], failed: None }
    }

    /// Has the gate carry out these commands, all or none, and returns what the kernel said to it.
    ///
    /// # Errors
    /// The kernel's; [`ElementError::NoAnswer`] where the gate gives none, and then [`GateLink::check`] tells.
    pub fn call(&mut self, commands: &[Command]) -> Result<Vec<u8>, ElementError> {
        if self.failed.is_some() {
            return Err(ElementError::NoAnswer); // or a late answer would be taken for the next
        }
        let (answer, datagram) = self.exchange(commands).map_err(|error| {
            self.failed.get_or_insert(error);
            ElementError::NoAnswer
        })?;
        self.last = answer;
        let [last, before] = self.numbers;
        self.numbers = match last {
            0 => [answer.number; 2],
            _ if last == answer.number => [last, before],
            _ => [answer.number, last],
        };
        let is = |errno: Errno| answer.errno == errno.raw_os_error();
        match answer.errno {
            0 => Ok(datagram),
            _ if is(Errno::DQUOT) => Err(ElementError::OverRate),
            _ if is(Errno::NODATA) => Err(ElementError::NoAnswer),
            _ if is(Errno::NFILE) => Err(ElementError::Full),
            errno => Err(ElementError::Refused(io::Error::from_raw_os_error(errno))),
        }
    }

    fn exchange(&self, commands: &[Command]) -> io::Result<(Outcome, Vec<u8>)> {
        let message: Vec<u8> = commands.iter().flat_map(Command::encode).collect();
        let deadline = Instant::now() + PATIENCE;
        self.wait(PollFlags::OUT, deadline)?;
        send(&self.socket, &message, SendFlags::NOSIGNAL)?;
        self.wait(PollFlags::IN, deadline)?;
        let mut bytes = vec![0; ANSWER_LEN + DATAGRAM];
        let (length, _) = recv(&self.socket, bytes.as_mut_slice(), RecvFlags::DONTWAIT)?;
        let (answer, datagram) = bytes.get(..length).and_then(Outcome::decode).ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok((answer, datagram.to_vec()))
    }

    fn wait(&self, what: PollFlags, deadline: Instant) -> io::Result<()> {
        loop {
            let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).unwrap_or_default();
            match poll(&mut [PollFd::new(&self.socket, what)], Some(&left)) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Why the gate does not answer any more, if so.
    ///
    /// # Errors
    /// `TimedOut`, or that it is gone.
    pub fn check(&self) -> io::Result<()> {
        self.failed.as_ref().map_or(Ok(()), |error| Err(error.kind().into()))
    }

    /// What it said last of itself.
    pub const fn last(&self) -> &Outcome {
        &self.last
    }

    /// The gate has let go of the table, or is about to.
    pub const fn released(&mut self) {
        self.last.owns_table = false;
    }

    /// By which the kernel names what the gate has changed.
    pub const fn numbers(&self) -> [u32; 2] {
        self.numbers
    }
}

impl Lister for GateLink {
    fn ask(&mut self, element: &Element, query: Query) -> Result<(), ElementError> {
        self.call(&[Command::Ask(element.clone(), query)]).map(drop)
    }

    fn next(&mut self) -> Result<Vec<u8>, ElementError> {
        self.call(&[Command::Next])
    }
}
