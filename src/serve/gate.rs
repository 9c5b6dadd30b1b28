//! The gate: holds CAP_NET_ADMIN, looks at no byte of a packet, and does what the engine asks, within the limits that root has handed
//! over.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use caps::Capability;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendFlags, recvmsg, sendmsg};
use thiserror::Error;

use super::admission::{Admission, NotPermitted};
use super::channel::{Channel, Message, has_hung_up};
use super::commands::{self, BATCH, COMMAND_LEN, Command, CommandError, Outcome, monotonic};
use super::limits::{Limits, NoLimit};
use super::line::Lines;
use super::sandbox::{self, SandboxError};
use super::{calls, handover, terminal};
use crate::nft::{Comment, Door, Doors, Element, ElementError, Listing, Ownership, track_sessions};
use crate::queue::{KernelQueue, QueueError, RelayWriter};

/// Time between two looks at what is over.
const TICK: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// Time that root has to say that it is time to go, when the engine has gone.
const GRACE: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };

/// Why the gate stops.
#[derive(Debug, Error)]
pub enum GateError {
    /// A privilege stayed.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The queue is not to be had, or failed.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The kernel's tables are not to be had.
    #[error(transparent)]
    Elements(#[from] ElementError),
    /// Root handed over what are no limits.
    #[error(transparent)]
    Limits(#[from] NoLimit),
    /// The engine sent what it never would.
    #[error("the engine broke the protocol ({0}); stopping")]
    Command(#[from] CommandError),
    /// The engine asked for what the configuration does not have.
    #[error("the engine asked for what the configuration does not allow; stopping")]
    NotPermitted,
    /// The engine closed its end, and root knows of no reason.
    #[error("the engine hung up; stopping")]
    HungUp,
    /// The engine's answers pile up.
    #[error("the engine does not read what it is told; stopping")]
    Deaf,
    /// The table was gone when it should have been loaded.
    #[error("table inet knockq is not there; stopping")]
    NoTable,
    /// A descriptor failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl GateError {
    /// What to do.
    pub const fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Queue(QueueError::Taken { .. }) => Some("set another `queue = N` in [server]"),
            Self::Queue(QueueError::Unsupported { .. }) => Some("modprobe nfnetlink_queue"),
            _ => None,
        }
    }
}

/// Runs the gate until root goes away.
///
/// # Errors
/// [`GateError`]: whatever it is, all processes stop.
pub fn run(lines: Lines) -> Result<(), GateError> {
    terminal::leave(c"knockq-gate")?;
    let root = Channel::of_stdin()?;
    let Some([relay, engine, limits]) = root.expect(Message::Start)? else { return Ok(()) };
    let limits: Limits = handover::unseal_text(limits)?.parse()?;
    monotonic(); // the first time it looks for the clock by calls that are deadly later
    let mut queue = KernelQueue::open(limits.queue)?;
    let unprivileged = sandbox::give_up_privileges(limits.identity, Some(Capability::CAP_NET_ADMIN))?;
    queue.bind()?;
    unprivileged.allow_only(calls::GATE)?;
    let mut gate = Gate {
        lines,
        root,
        queue,
        relay: RelayWriter::new(relay),
        engine,
        doors: Doors::new()?,
        owns_table: false,
        admission: Admission::new(limits, Instant::now()),
        listing: None,
        untold: Vec::new(),
        seen: 0,
    };
    gate.keep_sessions(gate.admission.limits());
    gate.root.send(Message::Bound, &[])?;
    match gate.serve() {
        Err(GateError::HungUp) if gate.is_told_to_stop()? => Ok(()),
        done => done,
    }
}

struct Gate {
    lines: Lines,
    root: Channel,
    queue: KernelQueue,
    relay: RelayWriter,
    engine: OwnedFd,
    doors: Doors,
    /// The kernel leaves the table to this process alone.
    owns_table: bool,
    admission: Admission,
    listing: Option<Listing>,
    /// Lines of the log that come after the next answer.
    untold: Vec<String>,
    /// Packets taken from the queue.
    seen: u64,
}

impl Gate {
    fn serve(&mut self) -> Result<(), GateError> {
        let mut last_tick = Instant::now();
        loop {
            let sources = [self.root.as_fd(), self.engine.as_fd(), self.queue.as_fd()];
            let mut sources = sources.map(|source| PollFd::from_borrowed_fd(source, PollFlags::IN));
            let waited_for = sources.get_mut(..if self.admission.is_open() { 3 } else { 2 }).unwrap_or_default();
            if let Err(error) = poll(waited_for, Some(&TICK))
                && error != Errno::INTR
            {
                return Err(io::Error::from(error).into());
            }
            let [root, engine, queue] = sources.map(|source| !source.revents().is_empty());
            if root && !self.handle_message()? {
                return Ok(());
            }
            if engine {
                self.answer_engine()?;
            }
            if queue {
                self.take_packets()?;
            }
            if last_tick.elapsed().as_secs() >= TICK.tv_sec.unsigned_abs() {
                last_tick = Instant::now();
                self.admission.forget(last_tick);
            }
        }
    }

    /// If the engine died, root knows, and tells why: waits a little for its word.
    fn is_told_to_stop(&self) -> Result<bool, GateError> {
        loop {
            match poll(&mut [PollFd::new(&self.root, PollFlags::IN)], Some(&GRACE)) {
                Ok(0) => return Ok(false),
                Ok(_) => match self.root.receive()? {
                    Some((Message::Stop, _)) => return Ok(true),
                    Some(_) => {} // too late for that
                    None => return Ok(!self.log_root_gone()),
                },
                Err(Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
    }

    /// `false`: it is time to go.
    fn log_root_gone(&self) -> bool {
        self.lines.error("root is gone; stopping all, and every door closes by its own timeout");
        false
    }

    /// Does what root says; `false` if it is time to go.
    fn handle_message(&mut self) -> Result<bool, GateError> {
        let Some((message, mut descriptors)) = self.root.receive()? else {
            return Ok(self.log_root_gone());
        };
        let answer = match (message, descriptors.pop()) {
            (Message::Stop, _) => return Ok(false),
            (Message::Loaded, _) => {
                self.own_table()?;
                Message::Ready
            }
            (Message::Release, _) => self.release_table()?,
            (Message::Settings, Some(limits)) => {
                let limits: Limits = handover::unseal_text(limits)?.parse()?;
                self.keep_sessions(&limits);
                self.admission.prepare(limits);
                Message::Ready
            }
            (Message::Enforce, _) => {
                self.admission.enforce();
                Message::Ready
            }
            _ => return Err(io::Error::from(io::ErrorKind::InvalidData).into()),
        };
        self.root.send(answer, &[])?;
        Ok(true)
    }

    /// Connections that are there before their port is guarded live on. What keeps conntrack from knowing them keeps no gate from
    /// standing.
    fn keep_sessions(&self, limits: &Limits) {
        if let Err(error) = track_sessions(&limits.sessions) {
            self.lines.warning(&format!("connections from before the gate may be cut: {error}"));
        }
    }

    /// Owns the table, where the kernel allows it.
    fn own_table(&mut self) -> Result<(), GateError> {
        if !self.admission.limits().owns_table {
            return Ok(()); // whoever loads it must be able to load it again
        }
        let ownership = self.doors.own_table()?;
        let owned_before = std::mem::replace(&mut self.owns_table, ownership == Ownership::Adopted);
        if ownership == Ownership::Made {
            self.let_go_of_table()?; // what was made is empty, a gate that lets all in
            if !self.admission.is_open() {
                return Err(GateError::NoTable);
            }
        }
        if self.owns_table && !owned_before && !self.admission.is_open() {
            self.lines.info("the table is owned: nobody else can change or flush it");
        }
        Ok(())
    }

    /// Lets go of the table, and says how it is to be loaded: nft fills one that persists without an owner, then this adopts it.
    fn release_table(&mut self) -> Result<Message, GateError> {
        self.let_go_of_table()?;
        if !self.admission.limits().owns_table {
            return Ok(Message::Ready);
        }
        let ownership = self.doors.own_table()?;
        self.let_go_of_table()?;
        Ok(match ownership {
            Ownership::Made => Message::Made,
            Ownership::Adopted => Message::Persists,
            Ownership::Unsupported => Message::Ready,
        })
    }

    /// From here on others may change the table, root among them.
    fn let_go_of_table(&mut self) -> Result<(), GateError> {
        self.doors = Doors::new()?; // the socket is the owner
        self.owns_table = false;
        Ok(())
    }

    /// Gives what is queued its verdict and hands the first bytes on.
    fn take_packets(&mut self) -> Result<(), GateError> {
        let mut pushed = Ok(());
        let relay = &mut self.relay;
        let taken = self.queue.drain(self.admission.limits().answer, |packet| {
            if pushed.is_ok() {
                pushed = relay.push(packet);
            }
        })?;
        self.seen = self.seen.saturating_add(u64::try_from(taken).unwrap_or(0));
        pushed.and_then(|()| relay.flush()).map_err(|_| GateError::HungUp)
    }

    /// Takes one message of the engine's, and answers it.
    fn answer_engine(&mut self) -> Result<(), GateError> {
        let Some(commands) = next_message(&self.engine)? else { return Ok(()) };
        let (errno, datagram) = match self.obey(commands)? {
            Ok(datagram) => (0, datagram),
            Err(error) => (errno(&error), Vec::new()),
        };
        let (number, lost) = (self.doors.number(), self.relay.lost_in_all());
        let answer = Outcome { errno, owns_table: self.owns_table, number, seen: self.seen, lost };
        let (bytes, mut nothing) = (answer.encode(&datagram), SendAncillaryBuffer::default());
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match sendmsg(&self.engine, &[IoSlice::new(&bytes)], &mut nothing, flags) {
            Ok(_) => Ok::<(), GateError>(()),
            // The latter two where the kernel is older (seen on 5.10).
            Err(Errno::PIPE | Errno::CONNRESET | Errno::CONNREFUSED | Errno::NOTCONN) => Err(GateError::HungUp),
            Err(Errno::AGAIN) => Err(GateError::Deaf),
            Err(error) => Err(io::Error::from(error).into()),
        }?;
        self.untold.drain(..).for_each(|line| self.lines.info(&line)); // a log that stands still keeps no answer back
        Ok(())
    }

    /// What the kernel answers to commands.
    fn obey(&mut self, commands: Vec<Command>) -> Result<Result<Vec<u8>, ElementError>, GateError> {
        let (clock, now, mut times) = (monotonic(), Instant::now(), Vec::with_capacity(commands.len()));
        let commands: Vec<Command> =
            commands.into_iter().map(|command| command.with_time(|end| end.saturating_sub(clock))).collect();
        for command in &commands {
            match self.admission.admits(command, now) {
                Ok(Some(time)) => times.push(time),
                Ok(None) => return Ok(Err(ElementError::OverRate)),
                Err(NotPermitted) => return Err(GateError::NotPermitted),
            }
        }
        let done = match commands.as_slice() {
            [Command::Next] => {
                return Ok(self.listing.as_mut().ok_or(ElementError::NoAnswer).and_then(Listing::answer));
            }
            [Command::Ask(element, query)] => Listing::of(element, *query).map(|listing| self.listing = Some(listing)),
            [Command::Forget] => self.doors.forget_begun(),
            [Command::Count] => Ok(()),
            changes => self.change(changes, &times),
        };
        Ok(done.map(|()| Vec::new()))
    }

    /// Changes elements, all or none, for no longer than these times.
    fn change(&mut self, commands: &[Command], times: &[Duration]) -> Result<(), ElementError> {
        let changes = commands.iter().zip(times).filter_map(|(command, most)| match command {
            Command::Put(element, _, comment) => Some((element.clone(), Some((*most, comment.clone())))),
            Command::Delete(element) => Some((element.clone(), None)),
            _ => None,
        });
        let changes: Vec<_> = changes.collect();
        self.doors.change(&changes)?;
        changes.iter().for_each(|change| self.note(change));
        Ok(())
    }

    /// Notes which door has opened, whatever the engine says of it.
    fn note(&mut self, (element, time): &(Element, Option<(Duration, Comment)>)) {
        let (Element::Opens(door), Some((time, Comment { user, service, .. }))) = (element, time) else { return };
        if self.admission.opens(door) {
            let (Door { source, port, .. }, seconds) = (door, time.as_secs());
            self.untold.push(format!("opened {port} to {source} for {seconds} s ({user}, {service})"));
        }
    }
}

/// The next message of the engine's, if there is one.
fn next_message(engine: &OwnedFd) -> Result<Option<Vec<Command>>, GateError> {
    let mut bytes = vec![0; BATCH * COMMAND_LEN];
    let mut no_descriptors = RecvAncillaryBuffer::default();
    let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC; // the length that it has, not the one that fits
    let received = match recvmsg(engine, &mut [IoSliceMut::new(&mut bytes)], &mut no_descriptors, flags) {
        Ok(received) if received.bytes == 0 && has_hung_up(engine) => return Err(GateError::HungUp),
        Ok(received) => received,
        Err(Errno::CONNRESET) => return Err(GateError::HungUp),
        Err(Errno::AGAIN) => return Ok(None),
        Err(error) => return Err(io::Error::from(error).into()),
    };
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(CommandError::Descriptors.into());
    }
    let message = bytes.get(..received.bytes).ok_or(CommandError::Length(received.bytes))?;
    Ok(Some(commands::decode(message)?))
}

/// How an answer says it.
fn errno(error: &ElementError) -> i32 {
    let errno = match error {
        ElementError::Full => Errno::NFILE,
        ElementError::NoSet => Errno::NOENT,
        ElementError::OverRate => Errno::DQUOT,
        ElementError::NoAnswer => Errno::NODATA,
        ElementError::Refused(error) | ElementError::Socket(error) | ElementError::Connections(error) => {
            Errno::from_io_error(error).unwrap_or(Errno::IO)
        }
    };
    errno.raw_os_error()
}
