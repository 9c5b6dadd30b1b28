//! The monitor: holds CAP_NET_ADMIN, looks at no byte of a packet, and does nothing but what a fixed-size frame asks and
//! its policy permits.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use caps::Capability;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use thiserror::Error;
use tracing::{error, info, warn};

use super::book::{Book, Grant};
use super::channel::{Channel, Message};
use super::frames::{FRAME_LEN, Frame, FrameError};
use super::policy::Policy;
use super::sandbox::{self, SandboxError};
use super::{handover, terminal};
use crate::nft::{Door, Doors, ElementError, Ownership, Watch};
use crate::queue::{KernelQueue, QueueError, RelayWriter};

/// Time between two looks at what has run out.
const TICK: Duration = Duration::from_secs(10);

/// Frames taken at one go, so that the queue gets its turn.
const BURST: usize = 64;

/// Why the monitor stops.
#[derive(Debug, Error)]
pub enum MonitorError {
    /// A privilege stayed.
    #[error("monitor: {0}")]
    Sandbox(#[from] SandboxError),
    /// The queue is not to be had, or failed.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The element socket is not to be had.
    #[error("monitor: {0}")]
    Elements(#[from] ElementError),
    /// The verifier sent what it never would.
    #[error("monitor: the verifier broke the protocol ({0}); stopping")]
    Frame(#[from] FrameError),
    /// The verifier asked for what the configuration does not have.
    #[error("monitor: the verifier asked for a door that is not configured; stopping")]
    NotPermitted,
    /// The table was gone when it should have been loaded.
    #[error("monitor: table inet knockq is not there; stopping")]
    NoTable,
    /// A descriptor failed.
    #[error("monitor: {0}")]
    Io(#[from] io::Error),
}

/// Runs the monitor until the keeper goes away.
///
/// # Errors
/// [`MonitorError`]: whatever it is, all processes stop.
pub fn run() -> Result<(), MonitorError> {
    terminal::leave(c"knockq-monitor")?;
    let keeper = Channel::of_stdin()?;
    let Some([relay, frames, settings]) = keeper.expect(Message::Start)? else { return Ok(()) };
    let policy: Policy = handover::unseal(settings)?;
    let mut queue = KernelQueue::open(policy.queue)?;
    sandbox::give_up_privileges(policy.identity, Some(Capability::CAP_NET_ADMIN))?;

    let watch = Watch::new()?;
    queue.bind()?;
    keeper.send(Message::Bound, &[])?;
    let Some([]) = keeper.expect(Message::Loaded)? else { return Ok(()) };
    let mut doors = Doors::new()?;
    let is_owner = match doors.own_table()? {
        Ownership::Adopted => true,
        Ownership::Unsupported => false,
        Ownership::Made => return Err(MonitorError::NoTable), // and so it is empty: a gate that lets all in
    };
    if is_owner {
        info!("the table is owned: nobody else can change or flush it");
    }
    keeper.send(Message::Ready, &[])?;
    let (relay, book) = (RelayWriter::new(relay), Book::default());
    Monitor { keeper, queue, watch, is_owner, is_lost: false, relay, frames, policy, doors, book }.serve()
}

struct Monitor {
    keeper: Channel,
    queue: KernelQueue,
    watch: Watch,
    /// The kernel leaves the table to this process alone.
    is_owner: bool,
    /// The keeper has been asked to load the table again.
    is_lost: bool,
    relay: RelayWriter,
    frames: OwnedFd,
    policy: Policy,
    doors: Doors,
    book: Book,
}

impl Monitor {
    fn serve(mut self) -> Result<(), MonitorError> {
        let tick = Timespec { tv_sec: i64::try_from(TICK.as_secs()).unwrap_or(1), tv_nsec: 0 };
        let mut last_tick = Instant::now();
        loop {
            let [queue, watch, frames, keeper] = self.wait(&tick)?;
            let verifier_lives = (!frames || self.take_frames()?) && (!queue || self.take_packets()?);
            let keeper_lives = !keeper || self.hear_keeper()?;
            if !verifier_lives || !keeper_lives {
                return Ok(()); // the keeper tells why
            }
            if watch && self.watch.table_is_lost()? {
                self.report_loss()?;
            }
            if last_tick.elapsed() >= TICK {
                last_tick = Instant::now();
                self.tick(last_tick);
            }
        }
    }

    /// Waits for any of queue, watch, frames and keeper; tells which have something.
    fn wait(&self, timeout: &Timespec) -> Result<[bool; 4], MonitorError> {
        let sources = [self.queue.as_fd(), self.watch.as_fd(), self.frames.as_fd(), self.keeper.as_fd()];
        let mut sources = sources.map(|source| PollFd::from_borrowed_fd(source, PollFlags::IN));
        match poll(&mut sources, Some(timeout)) {
            Ok(_) | Err(Errno::INTR) => Ok(sources.map(|source| !source.revents().is_empty())),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    /// Asks the keeper to load the table again, once. Nobody can take away what we own, nor could the keeper load it.
    fn report_loss(&mut self) -> Result<(), MonitorError> {
        if !self.is_owner && !self.is_lost {
            self.is_lost = true;
            self.keeper.send(Message::Lost, &[])?;
        }
        Ok(())
    }

    /// The keeper says that the table is loaded again, or that it is time to go: `false`.
    fn hear_keeper(&mut self) -> Result<bool, MonitorError> {
        match self.keeper.receive()? {
            Some((Message::Loaded, _)) => {}
            Some((Message::Stop, _)) => return Ok(false),
            Some(_) => return Err(io::Error::from(io::ErrorKind::InvalidData).into()),
            None => {
                error!("the keeper is gone; stopping all, and every door closes by its own timeout");
                return Ok(false);
            }
        }
        // What the kernel has told until now, the loading itself has done; from here on it is another loss.
        self.watch.table_is_lost()?;
        self.is_lost = false;
        let now = Instant::now();
        for doors in self.book.standing(now).chunks(BURST) {
            for door in doors {
                if let Err(error) = self.put(door, now) {
                    warn!(source = %door.source, port = %door.port, "not opened again: {error}");
                }
            }
            if self.watch.table_is_lost()? {
                self.report_loss()?;
                break;
            }
        }
        Ok(true)
    }

    /// Drops what is queued and hands the headers on; `false` when the verifier is gone.
    fn take_packets(&mut self) -> Result<bool, MonitorError> {
        let mut pushed = Ok(());
        let relay = &mut self.relay;
        self.queue.drain(|packet| {
            if pushed.is_ok() {
                pushed = relay.push(packet);
            }
        })?;
        Ok(pushed.and_then(|()| relay.flush()).is_ok())
    }

    /// Answers a few frames; `false` when the verifier is gone.
    fn take_frames(&mut self) -> Result<bool, MonitorError> {
        for _ in 0..BURST {
            let mut frame = [0; FRAME_LEN + 1];
            let length = match recv(self.frames.as_fd(), &mut frame, RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(Errno::CONNRESET) => return Ok(false),
                Ok((length, _)) => length,
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(io::Error::from(error).into()),
            };
            let frame = Frame::decode(frame.get(..length).unwrap_or_default())?;
            if !self.policy.permits(&frame) {
                return Err(MonitorError::NotPermitted);
            }
            self.answer(frame);
        }
        Ok(true)
    }

    /// Does what a permitted frame asks. What the kernel refuses is logged; the door stays as it was.
    fn answer(&mut self, frame: Frame) {
        let now = Instant::now();
        match frame {
            Frame::Open { source, port, once, seconds, user, service } => {
                let door = Door { source, port, once };
                let until = now + Duration::from_secs(seconds.into());
                let grant = Grant { user: user.clone(), service: service.clone(), until };
                if !self.book.note(door, grant, now) {
                    warn!(%user, %service, %source, %port, "not granted: too many doors are open");
                    return;
                }
                match self.put(&door, now) {
                    Ok(()) => info!(%user, %service, %source, %port, seconds, "granted"),
                    Err(error) => {
                        self.book.strike(&door, &user);
                        warn!(%user, %service, %source, %port, "not granted: {error}");
                    }
                }
            }
            Frame::Close { source, port, user } => {
                for door in [false, true].map(|once| Door { source, port, once }) {
                    if self.book.strike(&door, &user)
                        && let Err(error) = self.put(&door, now)
                    {
                        warn!(%user, %source, %port, "not taken back: {error}");
                    }
                }
            }
        }
    }

    /// Makes the kernel's element what the book says.
    fn put(&mut self, door: &Door, now: Instant) -> Result<(), ElementError> {
        match self.book.longest(door, now) {
            Some((grant, left)) => self.doors.open(door, left, &format!("{} {}", grant.user, grant.service)),
            None => self.doors.close(door),
        }
    }

    fn tick(&mut self, now: Instant) {
        self.book.forget(now);
        match self.relay.take_lost() {
            0 => {}
            lost => warn!(lost, "the verifier is slower than the SYNs come: some were dropped unseen"),
        }
    }
}
