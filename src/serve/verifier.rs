//! The verifier: reads what anyone on the network can send, and can do nothing itself.

use std::collections::VecDeque;
use std::fs::File;
use std::hint::black_box;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram as StdSocket;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use thiserror::Error;
use tokio::io::Interest;
use tokio::net::UnixDatagram;
use tokio::time::MissedTickBehavior;
use tracing::field::display;
use tracing::{debug, info, warn};

use super::channel::{Channel, Message};
use super::clock::{Clock, Jump, unix_now};
use super::figures::Figures;
use super::frames::Frame;
use super::refusals::Refusals;
use super::repeats::Trouble;
use super::report;
use super::sandbox::{self, SandboxError};
use super::settings::Settings;
use super::store::{Origin, Safe, Store, StoreError};
use super::writer::{self, Done, WAITING, Work, Writing};
use super::{calls, handover, terminal, watchers};
use crate::queue::{RelayReader, records};
use crate::verify::{Claim, Decision, Grant, Recorded, Refusal, Verifier, Withdrawal};

/// Keys that the index moves on by at one go: about a third of a millisecond.
pub const SLICE: usize = 1_000;

/// Time between two looks at the clock.
const TICK: Duration = Duration::from_millis(250);

/// Time that the keeper has to say that it is time to go, when the monitor has gone.
const GRACE: Duration = Duration::from_secs(2);

/// Why the verifier stops.
#[derive(Debug, Error)]
pub enum VerifierError {
    /// A privilege stayed.
    #[error("verifier: {0}")]
    Sandbox(#[from] SandboxError),
    /// The counters are not to be had.
    #[error("{path}: {cause}")]
    Store {
        /// The store's file.
        path: String,
        /// Why not.
        cause: StoreError,
    },
    /// A descriptor failed.
    #[error("verifier: {0}")]
    Io(#[from] io::Error),
    /// The monitor closed its end, and the keeper knows of no reason.
    #[error("verifier: the monitor hung up; stopping")]
    HungUp,
    /// The thread that writes counters is gone.
    #[error("verifier: the thread that writes counters is gone; stopping")]
    WriterGone,
}

/// Runs the verifier until the keeper goes away.
///
/// # Errors
/// [`VerifierError`]: whatever it is, all processes stop.
pub fn run() -> Result<(), VerifierError> {
    terminal::leave(c"knockq-verifier")?;
    give_memory_back()?;
    let keeper = Channel::of_stdin()?;
    let Some([relay, frames, settings, store]) = keeper.expect(Message::Start)? else { return Ok(()) };
    let Settings { identity, server, store_path, registry } = handover::unseal(settings)?;
    let unprivileged = sandbox::give_up_privileges(identity, None)?;

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _inside = runtime.enter();
    let keeper_speaks = socket(keeper.as_fd().try_clone_to_owned()?)?;
    let (relay, frames) = (RelayReader::new(relay)?, socket(frames)?);
    let writing = writer::start()?;
    let store = File::from(store);
    let origin = Origin::of(&store)?;
    unprivileged.allow_only(calls::VERIFIER)?;

    let fail = |cause| VerifierError::Store { path: store_path.clone(), cause };
    let safe = Safe::after(unix_now(), registry.window, registry.counted());
    let mut store = Store::open(store, server, origin, safe).map_err(fail)?;
    let floor = store.floor().map_err(fail)?;
    match (store.doubt(), floor.shut(unix_now()).filter(|_| registry.has_tokens())) {
        (Some(doubt), shut) => {
            let hint = shut.map(|shut| shut.to_string());
            warn!(hint, "{store_path}: {doubt}; to be safe, no knock of before is taken");
        }
        (None, Some(shut)) => {
            let hint = "the store was made anew by `knockq recover`, or found in doubt at an earlier start";
            warn!(hint, "{store_path}: {shut}");
        }
        (None, None) => {}
    }
    let verifier = writer::prepare(&mut store, registry).map_err(fail)?;
    writing.store.send(store).map_err(|_| VerifierError::WriterGone)?;
    keeper.send(Message::Ready, &[])?;
    let process = Process {
        keeper,
        keeper_speaks,
        relay,
        frames,
        writing,
        verifier,
        next: None,
        refusals: Refusals::new(Instant::now(), floor),
        figures: Figures::default(),
        claimed: VecDeque::new(),
        is_slow: Trouble::default(),
        clock: Clock::new(SystemTime::now(), Instant::now()),
        is_behind: false,
    };
    runtime.block_on(process.serve())
}

/// Frees more than the GNU C library keeps for itself. When it first gives memory of a thread's back, it opens a file that
/// says how the kernel lends it (`/proc/sys/vm/overcommit_memory`), and remembers that: later the call would be deadly.
/// This must come first, for the more a process has freed, the more the library keeps.
fn give_memory_back() -> io::Result<()> {
    const BLOCK: usize = 64 << 10;
    const BLOCKS: usize = 16;
    let take_and_free = || drop(black_box((0..BLOCKS).map(|_| Vec::<u8>::with_capacity(BLOCK)).collect::<Vec<_>>()));
    let freed = thread::Builder::new().spawn(take_and_free)?.join();
    freed.map_err(|_| io::Error::other("the thread that frees memory is gone"))
}

struct Process {
    keeper: Channel,
    /// The same, for the runtime to wait for.
    keeper_speaks: UnixDatagram,
    relay: RelayReader,
    frames: UnixDatagram,
    writing: Writing,
    verifier: Verifier,
    /// What is to take its place.
    next: Option<Box<Verifier>>,
    refusals: Refusals,
    figures: Figures,
    /// The packets of claims whose counters are being written, or wait for it, in the order in which they are.
    claimed: VecDeque<Vec<u8>>,
    /// More wait than may.
    is_slow: Trouble,
    clock: Clock,
    /// The index has not yet reached the clock.
    is_behind: bool,
}

impl Process {
    async fn serve(mut self) -> Result<(), VerifierError> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                said = hear(&self.keeper, &self.keeper_speaks) => {
                    if !self.obey(said?)? {
                        return Ok(());
                    }
                }
                done = self.writing.done.recv() => self.take(done.ok_or(VerifierError::WriterGone)?).await?,
                _ = tick.tick() => self.tick(),
                block = self.relay.read() => {
                    let Some(block) = block? else { return self.part_from_monitor().await };
                    let decisions = decide(&mut self.verifier, &mut self.refusals, &mut self.figures, block);
                    self.carry_out(decisions).await?;
                }
                () = tokio::task::yield_now(), if self.is_behind => {
                    self.is_behind = self.verifier.advance(unix_now(), SLICE);
                }
            }
        }
    }

    /// If the monitor died, the keeper knows, and tells why.
    async fn part_from_monitor(&self) -> Result<(), VerifierError> {
        let is_told_to_stop = async {
            while !matches!(hear(&self.keeper, &self.keeper_speaks).await?, Some((Message::Stop, _)) | None) {}
            Ok(())
        };
        tokio::time::timeout(GRACE, is_told_to_stop).await.unwrap_or(Err(VerifierError::HungUp))
    }

    async fn carry_out(&mut self, decisions: Vec<(Decision, Vec<u8>)>) -> Result<(), VerifierError> {
        for (decision, packet) in decisions {
            match decision {
                Decision::Refused(refusal) => self.refuse(&refusal, &packet),
                Decision::Claimed(claim) => self.claim(claim, packet)?,
                Decision::Withdrawn(withdrawal) => self.withdraw(withdrawal, &packet).await,
            }
        }
        Ok(())
    }

    /// Does what the keeper says; `false` if it is time to go.
    fn obey(&mut self, said: Option<(Message, Vec<OwnedFd>)>) -> Result<bool, VerifierError> {
        match said {
            Some((Message::Settings, mut descriptors)) => {
                let settings = descriptors.pop().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
                match self.writing.work.try_send(Work::Prepare(settings)) {
                    Ok(()) => {}
                    Err(mpsc::TrySendError::Full(_)) => self.keeper.send(Message::Unable, &[])?,
                    Err(mpsc::TrySendError::Disconnected(_)) => return Err(VerifierError::WriterGone),
                }
            }
            Some((Message::Enforce, _)) => {
                if let Some(next) = self.next.take() {
                    self.verifier.succeed(*next);
                    self.figures.keep(self.verifier.users());
                }
                self.keeper.send(Message::Ready, &[])?;
            }
            Some((Message::Watch, descriptors)) => descriptors.into_iter().for_each(|watcher| {
                watchers::add(watcher);
            }),
            Some((Message::Report, mut descriptors)) => {
                let memory = descriptors.pop().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
                let narrowed = self.verifier.narrowed(unix_now()).cloned().collect();
                report::write(
                    memory,
                    self.figures.part(self.verifier.live(), narrowed, self.verifier.effective_floor()),
                )?;
                self.keeper.send(Message::Reported, &[])?;
            }
            Some((Message::Explain, mut descriptors)) => {
                let memory = descriptors.pop().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
                report::write(memory, self.figures.refused_part(self.verifier.accepted(), self.verifier.floor()))?;
                self.keeper.send(Message::Reported, &[])?;
            }
            Some((Message::Stop, _)) | None => return Ok(false),
            Some(_) => return Err(io::Error::from(io::ErrorKind::InvalidData).into()),
        }
        Ok(true)
    }

    fn claim(&mut self, claim: Claim, packet: Vec<u8>) -> Result<(), VerifierError> {
        match self.writing.work.try_send(Work::Record(claim)) {
            Ok(()) => {
                self.claimed.push_back(packet);
                self.tell_waiting();
            }
            Err(mpsc::TrySendError::Full(Work::Record(claim))) => {
                if self.is_slow.is_news(Instant::now()) {
                    warn!("the counters are written more slowly than knocks come: those beyond {WAITING} are refused");
                }
                self.refuse(&claim.give_up(), &packet);
            }
            Err(_) => return Err(VerifierError::WriterGone),
        }
        Ok(())
    }

    async fn take(&mut self, done: Done) -> Result<(), VerifierError> {
        match done {
            Done::Recorded(Ok(recorded)) => self.settle(recorded).await,
            Done::Recorded(Err(refusals)) => {
                self.figures.recorded(false, unix_now());
                for refusal in refusals {
                    let packet = self.claimed.pop_front().unwrap_or_default();
                    self.refuse(&refusal, &packet);
                }
                self.tell_waiting();
            }
            Done::Prepared(next) => {
                let outcome = if next.is_some() { Message::Ready } else { Message::Unable };
                self.next = next;
                self.keeper.send(outcome, &[])?;
            }
        }
        Ok(())
    }

    async fn settle(&mut self, recorded: Vec<Recorded>) {
        self.figures.recorded(true, unix_now());
        for recorded in recorded {
            let packet = self.claimed.pop_front().unwrap_or_default();
            match self.verifier.settle(&recorded, unix_now()) {
                Ok(grant) => {
                    self.figures.granted(&grant, unix_now());
                    self.open(grant).await;
                }
                Err(refusal) => self.refuse(&refusal, &packet),
            }
        }
        self.tell_waiting();
    }

    async fn open(&self, grant: Grant) {
        let Grant { user, service, source, ports, open_for: seconds, once, bound, token, .. } = grant;
        for port in ports {
            let (user, service) = (user.clone(), service.clone());
            self.ask(&Frame::Open { source, port, once, bound, seconds, user, service, token }).await;
        }
    }

    async fn withdraw(&mut self, withdrawal: Withdrawal, packet: &[u8]) {
        self.figures.withdrawn(&withdrawal, packet, unix_now());
        let Withdrawal { user, source, token, .. } = &withdrawal;
        for port in &withdrawal.ports {
            let (source, port, user, token) = (*source, *port, user.clone(), *token);
            self.ask(&Frame::Close { source, port, user, token }).await;
        }
        self.refusals.withdrawn(withdrawal, Instant::now());
    }

    fn refuse(&mut self, refusal: &Refusal, packet: &[u8]) {
        self.refusals.count(refusal, Instant::now());
        self.figures.refused(refusal, packet, unix_now());
    }

    fn tell_waiting(&mut self) {
        self.figures.waiting(self.claimed.len(), unix_now());
    }

    async fn ask(&self, frame: &Frame) {
        if self.frames.send(&frame.encode()).await.is_err() {
            debug!("the monitor is gone"); // so is its end of the relay, which ends this process
        }
    }

    /// The index follows the clock by itself; this only tells.
    fn watch_clock(&mut self) {
        let jump = self.clock.jump(SystemTime::now(), Instant::now());
        jump.into_iter().for_each(|jump| self.figures.jumped(jump, unix_now()));
        match jump {
            Some(Jump::Forward(by)) => {
                warn!(seconds = by.as_secs(), "the clock went forward: it was set, or this machine slept");
            }
            Some(Jump::Back(by)) => {
                let hint = "who has knocked meanwhile can do so again when the clock has passed that time";
                warn!(seconds = by.as_secs(), hint, "the clock was set back; what was spent stays spent");
            }
            None => {}
        }
    }

    fn tick(&mut self) {
        self.watch_clock();
        let now = unix_now();
        self.is_behind = self.verifier.advance(now, SLICE);
        self.verifier.forget(now);
        self.refusals.tell(Instant::now());
        if self.claimed.is_empty() && self.is_slow.is_over() {
            info!("the counters of all knocks that waited are written");
        }
        self.refusals.tell_narrowed(self.verifier.narrowed(now));
    }
}

/// What the keeper says; `None` when it is gone.
async fn hear(keeper: &Channel, keeper_speaks: &UnixDatagram) -> io::Result<Option<(Message, Vec<OwnedFd>)>> {
    loop {
        keeper_speaks.readable().await?;
        match keeper_speaks.try_io(Interest::READABLE, || keeper.receive()) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            said => return said,
        }
    }
}

/// Decides on a block of packets. Strangers' SYNs, which are nearly all, end here.
fn decide(
    verifier: &mut Verifier,
    refusals: &mut Refusals,
    figures: &mut Figures,
    block: &[u8],
) -> Vec<(Decision, Vec<u8>)> {
    let (now, told_at) = (unix_now(), Instant::now());
    verifier.advance(now, SLICE);
    let mut decisions = Vec::new();
    for packet in records(block) {
        match verifier.handle(packet, now) {
            Decision::Refused(refusal) => {
                let (user, source) = (refusal.user.as_ref().map(display), refusal.source.map(display));
                debug!(reason = %refusal.reason, user, source, "packet");
                refusals.count(&refusal, told_at);
                figures.refused(&refusal, packet, now);
            }
            decision => decisions.push((decision, packet.to_vec())),
        }
    }
    decisions
}

fn socket(descriptor: OwnedFd) -> io::Result<UnixDatagram> {
    let socket = StdSocket::from(descriptor);
    socket.set_nonblocking(true)?;
    UnixDatagram::from_std(socket)
}
