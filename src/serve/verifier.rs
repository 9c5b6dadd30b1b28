//! The verifier: reads what anyone on the network can send, and can do nothing itself.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram as StdSocket;
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::net::UnixDatagram;
use tokio::sync::mpsc as channel;
use tokio::time::MissedTickBehavior;
use tracing::{debug, error, warn};

use super::channel::{Channel, Message};
use super::frames::Frame;
use super::refusals::Refusals;
use super::sandbox::{self, Identity, SandboxError};
use super::store::{Store, StoreError};
use super::{handover, terminal};
use crate::crypto::PublicKey;
use crate::queue::{RelayReader, records};
use crate::verify::{Claim, Decision, Grant, Reason, Recorded, Refusal, Registry, Verifier, Withdrawal};

/// Keys that the index moves on by at one go: about a third of a millisecond.
pub const SLICE: usize = 1_000;

/// Time between two looks at the clock.
const TICK: Duration = Duration::from_millis(250);

/// Claims that wait for the disk at most; one more is refused.
const WAITING: usize = 1024;

/// Claims that one commit takes.
const BATCH: usize = 64;

/// The verifier's settings.
#[derive(Serialize, Deserialize)]
pub struct Settings {
    /// Whom it becomes.
    pub identity: Identity,
    /// The server's key, which the store must carry.
    pub server: PublicKey,
    /// What the store is called in messages.
    pub store_path: String,
    /// Who may what.
    pub registry: Registry,
}

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
    let keeper = Channel::of_stdin()?;
    let Some([relay, frames, settings, store]) = keeper.expect(Message::Start)? else { return Ok(()) };
    let Settings { identity, server, store_path, registry } = handover::unseal(settings)?;
    sandbox::give_up_privileges(identity, None)?;

    let fail = |cause| VerifierError::Store { path: store_path.clone(), cause };
    let mut store = Store::open(File::from(store), server).map_err(fail)?;
    let last = store.last_counters(registry.users.iter().map(|user| user.public_key)).map_err(fail)?;
    let verifier = Verifier::new(registry, last, unix_now());
    let (claims, written) = start_writer(store)?;

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        keeper.send(Message::Ready, &[])?;
        Process {
            keeper: socket(keeper.into())?,
            relay: RelayReader::new(relay)?,
            frames: socket(frames)?,
            claims,
            written,
            verifier,
            refusals: Refusals::new(Instant::now()),
            was_narrowed: false,
            is_behind: false,
        }
        .serve()
        .await
    })
}

/// What the disk made of a batch of claims.
type Written = Result<Vec<Recorded>, Vec<Refusal>>;

/// Starts the thread that makes counters durable, so that a slow disk never stops a lookup.
fn start_writer(mut store: Store) -> io::Result<(mpsc::SyncSender<Claim>, channel::Receiver<Written>)> {
    let (claims, waiting) = mpsc::sync_channel::<Claim>(WAITING);
    let (done, written) = channel::channel(WAITING);
    let write = move || {
        while let Ok(first) = waiting.recv() {
            let batch = std::iter::once(first).chain(waiting.try_iter().take(BATCH - 1)).collect();
            let outcome = Claim::record(batch, &mut store).map_err(|(refusals, cause)| {
                error!("the counters cannot be written, so nothing is opened: {cause}");
                refusals
            });
            if done.blocking_send(outcome).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("counters".to_owned()).spawn(write)?;
    Ok((claims, written))
}

struct Process {
    keeper: UnixDatagram,
    relay: RelayReader,
    frames: UnixDatagram,
    claims: mpsc::SyncSender<Claim>,
    written: channel::Receiver<Written>,
    verifier: Verifier,
    refusals: Refusals,
    was_narrowed: bool,
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
                _ = self.keeper.readable() => return Ok(()),
                written = self.written.recv() => self.settle(written.ok_or(VerifierError::WriterGone)?).await,
                _ = tick.tick() => self.tick(),
                block = self.relay.read() => {
                    let Some(block) = block? else { return Ok(()) }; // the keeper tells why the monitor is gone
                    let decisions = decide(&mut self.verifier, &mut self.refusals, block);
                    self.carry_out(decisions).await?;
                }
                () = tokio::task::yield_now(), if self.is_behind => {
                    self.is_behind = self.verifier.advance(unix_now(), SLICE);
                }
            }
        }
    }

    async fn carry_out(&mut self, decisions: Vec<Decision>) -> Result<(), VerifierError> {
        for decision in decisions {
            match decision {
                Decision::Refused(refusal) => self.refusals.count(&refusal),
                Decision::Claimed(claim) => self.claim(claim)?,
                Decision::Withdrawn(withdrawal) => self.withdraw(withdrawal).await,
            }
        }
        Ok(())
    }

    fn claim(&mut self, claim: Claim) -> Result<(), VerifierError> {
        match self.claims.try_send(claim) {
            Ok(()) => Ok(()),
            Err(mpsc::TrySendError::Full(claim)) => {
                error!("the counters are written more slowly than knocks come");
                self.refusals.count(&claim.refuse(Reason::NotDurable));
                Ok(())
            }
            Err(mpsc::TrySendError::Disconnected(_)) => Err(VerifierError::WriterGone),
        }
    }

    async fn settle(&mut self, written: Written) {
        let recorded = match written {
            Ok(recorded) => recorded,
            Err(refusals) => {
                refusals.iter().for_each(|refusal| self.refusals.count(refusal));
                return;
            }
        };
        for recorded in recorded {
            match self.verifier.settle(&recorded, unix_now()) {
                Ok(grant) => self.open(grant).await,
                Err(refusal) => self.refusals.count(&refusal),
            }
        }
    }

    async fn open(&self, grant: Grant) {
        let Grant { user, service, source, ports, open_for: seconds, once, .. } = grant;
        for port in ports {
            let (user, service) = (user.clone(), service.clone());
            self.ask(&Frame::Open { source, port, once, seconds, user, service }).await;
        }
    }

    async fn withdraw(&self, withdrawal: Withdrawal) {
        let Withdrawal { user, source, elsewhere, ports } = withdrawal;
        let hint = Reason::SpentTwice.explanation();
        warn!(reason = %Reason::SpentTwice, %user, %source, %elsewhere, hint, "withdrawn");
        for port in ports {
            self.ask(&Frame::Close { source, port, user: user.clone() }).await;
        }
    }

    async fn ask(&self, frame: &Frame) {
        if self.frames.send(&frame.encode()).await.is_err() {
            debug!("the monitor is gone"); // so is its end of the relay, which ends this process
        }
    }

    fn tick(&mut self) {
        let now = unix_now();
        self.is_behind = self.verifier.advance(now, SLICE);
        self.verifier.forget(now);
        self.refusals.tell(Instant::now());
        let is_narrowed = self.verifier.is_narrowed(now);
        if is_narrowed && !self.was_narrowed {
            warn!("many wrong tags: for a minute only knocks with a clock within 5 s are looked up");
        }
        self.was_narrowed = is_narrowed;
    }
}

/// Decides on a block of packets. Strangers' SYNs, which are nearly all, end here.
fn decide(verifier: &mut Verifier, refusals: &mut Refusals, block: &[u8]) -> Vec<Decision> {
    let now = unix_now();
    verifier.advance(now, SLICE);
    let mut decisions = Vec::new();
    for packet in records(block) {
        match verifier.handle(packet, now) {
            Decision::Refused(refusal) => {
                debug!(reason = %refusal.reason, source = ?refusal.source, "packet");
                refusals.count(&refusal);
            }
            decision => decisions.push(decision),
        }
    }
    decisions
}

fn socket(descriptor: OwnedFd) -> io::Result<UnixDatagram> {
    let socket = StdSocket::from(descriptor);
    socket.set_nonblocking(true)?;
    UnixDatagram::from_std(socket)
}

/// Unix seconds; a clock before 1970 is 1970.
fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
