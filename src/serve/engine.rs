//! The engine: reads what anyone on the network can send, decides what opens for whom, and can do nothing itself.

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

use self::reload::{Reload, unexpected};
use super::channel::{Channel, Message};
use super::clock::{Clock, Jump, unix_now};
use super::control::{Reply, Request};
use super::figures::Figures;
use super::gate_link::GateLink;
use super::reconciler::Reconciler;
use super::refusals::Refusals;
use super::repeats::Trouble;
use super::sandbox::{self, SandboxError};
use super::settings::{Outline, Settings};
use super::store::{Origin, Store, StoreError, StoreFloor, Suspicion};
use super::visitors::{Asker, Visitor, Visitors};
use super::writer::{self, Done, WAITING, Work, Writing};
use super::{calls, handover, terminal, watchers};
use crate::nft::Boot;
use crate::queue::{RelayReader, records};
use crate::verify::{Claim, Decision, Recorded, Refusal, Shut, Verifier};

mod reload;
mod status;

/// Keys that the index moves on by at one go: about a third of a millisecond.
pub const SLICE: usize = 1_000;

/// Time between two looks at the clock.
const TICK: Duration = Duration::from_millis(250);

/// Time that root has to say that it is time to go, when the gate has gone.
const GRACE: Duration = Duration::from_secs(2);

/// Why the engine stops.
#[derive(Debug, Error)]
pub enum EngineError {
    /// A privilege stayed.
    #[error("engine: {0}")]
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
    #[error("engine: {0}")]
    Io(io::Error),
    /// The gate closed its end, and root knows of no reason.
    #[error("engine: the gate hung up; stopping")]
    HungUp,
    /// The gate stands still.
    #[error("engine: the gate gave no answer within 45 seconds; stopping")]
    Silent,
    /// The thread that writes counters is gone.
    #[error("engine: the thread that writes counters is gone; stopping")]
    WriterGone,
}

impl From<io::Error> for EngineError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::TimedOut => Self::Silent,
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::NotConnected => Self::HungUp,
            _ => Self::Io(error),
        }
    }
}

/// Runs the engine until root's process goes away; with `trial`, the gate goes in so many seconds unless somebody confirms it.
///
/// # Errors
/// [`EngineError`]: whatever it is, all processes stop.
pub fn run(trial: Option<u64>) -> Result<(), EngineError> {
    terminal::leave(c"knockq-engine")?;
    give_memory_back()?;
    let root = Channel::of_stdin()?;
    let Some([relay, gate, tables, settings, store, control, status, watch]) = root.expect(Message::Start)? else {
        return Ok(());
    };
    let Settings { identity, server, store_path, registry, policy, outline } = handover::unseal(settings)?;
    let boot = Boot::this()?;
    let unprivileged = sandbox::give_up_privileges(identity, None)?;

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _inside = runtime.enter();
    let root_speaks = socket(root.as_fd().try_clone_to_owned()?)?;
    let relay = RelayReader::new(relay)?;
    let reconciler = Reconciler::new(GateLink::new(gate), tables, policy, boot);
    let tables = socket(reconciler.as_fd().try_clone_to_owned()?)?;
    let visitors = Visitors::new([control, status, watch])?;
    let writing = writer::start()?;
    let store = File::from(store);
    let origin = Origin::of(&store)?;
    unprivileged.allow_only(calls::ENGINE)?;

    let fail = |cause| EngineError::Store { path: store_path.clone(), cause };
    let safe = StoreFloor::after(unix_now(), registry.window, registry.counted());
    let mut store = Store::open(store, server, origin, safe).map_err(fail)?;
    let floor = store.floor().map_err(fail)?;
    tell_doubt(&store_path, store.doubt(), floor.shut(unix_now()).filter(|_| registry.has_tokens()));
    let verifier = writer::prepare(&mut store, registry).map_err(fail)?;
    writing.store.send(store).map_err(|_| EngineError::WriterGone)?;
    root.send(Message::Ready, &[])?;
    let process = Process {
        root,
        root_speaks,
        relay,
        reconciler,
        tables,
        writing,
        visitors,
        queues: None,
        verifier,
        outline,
        reload: Reload::default(),
        has_complained: false,
        trial: trial.map(|seconds| Instant::now() + Duration::from_secs(seconds)),
        confirming: None,
        started: Instant::now(),
        refusals: Refusals::new(Instant::now(), floor),
        figures: Figures::default(),
        claimed: 0,
        is_slow: Trouble::default(),
        clock: Clock::new(SystemTime::now(), Instant::now()),
        is_behind: false,
    };
    runtime.block_on(process.serve())
}

/// Says that no knocks are accepted yet.
fn tell_doubt(store: &str, doubt: Option<Suspicion>, shut: Option<Shut>) {
    match (doubt, shut) {
        (Some(doubt), shut) => {
            let hint = shut.map(|shut| shut.to_string());
            warn!(hint, "{store}: {doubt}; to be safe, no knock of before is taken");
        }
        (None, Some(shut)) => {
            let hint = "the store was made anew by `knockq recover`, or found in doubt at an earlier start";
            warn!(hint, "{store}: {shut}");
        }
        (None, None) => {}
    }
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
    root: Channel,
    /// The same, for the runtime to wait for.
    root_speaks: UnixDatagram,
    relay: RelayReader,
    reconciler: Reconciler,
    /// Where the kernel tells of changes to the tables.
    tables: UnixDatagram,
    writing: Writing,
    /// Those who connect.
    visitors: Visitors,
    /// Where the kernel lists who has which queue.
    queues: Option<File>,
    verifier: Verifier,
    outline: Outline,
    reload: Reload,
    /// It is known that others have not loaded the table.
    has_complained: bool,
    /// When the gate is undone unless somebody confirms it.
    trial: Option<Instant>,
    /// Who waits for root to say that it is not on trial any more.
    confirming: Option<Asker>,
    started: Instant,
    refusals: Refusals,
    figures: Figures,
    /// Claims whose counters are being written, or wait for it.
    claimed: usize,
    /// More wait than may.
    is_slow: Trouble,
    clock: Clock,
    /// The index has not yet reached the clock.
    is_behind: bool,
}

impl Process {
    async fn serve(mut self) -> Result<(), EngineError> {
        match self.work().await {
            // If the gate died, root knows, and tells why.
            Err(EngineError::HungUp) if self.is_told_to_stop().await? => Ok(()),
            done => done,
        }
    }

    async fn work(&mut self) -> Result<(), EngineError> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // Before the table is loaded, what is told of tables waits.
            let serves = self.reconciler.serves();
            let is_behind = self.is_behind || (serves && self.reconciler.is_behind());
            tokio::select! {
                biased;
                said = hear(&self.root, &self.root_speaks) => {
                    if !self.obey(said?)? {
                        return Ok(());
                    }
                }
                visitor = self.visitors.next(), if serves => self.receive(visitor)?,
                done = self.writing.done.recv() => self.take(done.ok_or(EngineError::WriterGone)?)?,
                _ = tick.tick() => self.tick()?,
                changed = self.tables.readable(), if serves => {
                    changed?;
                    self.drain_table_events()?;
                }
                block = self.relay.read() => {
                    let Some(block) = block? else { return Err(EngineError::HungUp) };
                    let Self { verifier, refusals, figures, reconciler, .. } = self;
                    for claim in decide(verifier, refusals, figures, reconciler, block) {
                        self.claim(claim)?;
                    }
                }
                () = tokio::task::yield_now(), if is_behind => {
                    self.is_behind = self.is_behind && self.verifier.advance(unix_now(), SLICE);
                }
            }
            if self.reconciler.serves() && self.reconciler.is_behind() {
                self.reconciler.settle_some()?;
            }
            if self.reconciler.take_lost() {
                self.lost()?;
            }
            self.reconciler.check()?;
        }
    }

    /// All that was told is read: there is no more until the socket says so.
    fn drain_table_events(&mut self) -> io::Result<()> {
        let mut heard = Ok(());
        let _ = self.tables.try_io(Interest::READABLE, || {
            heard = self.reconciler.drain_table_events();
            io::Result::<()>::Err(io::ErrorKind::WouldBlock.into())
        });
        heard
    }

    async fn is_told_to_stop(&self) -> Result<bool, EngineError> {
        let is_told_to_stop = async {
            while !matches!(hear(&self.root, &self.root_speaks).await?, Some((Message::Stop, _)) | None) {}
            Ok(true)
        };
        tokio::time::timeout(GRACE, is_told_to_stop).await.unwrap_or(Ok(false))
    }

    /// Does what root says; `false` if it is time to go.
    fn obey(&mut self, said: Option<(Message, Vec<OwnedFd>)>) -> Result<bool, EngineError> {
        let Some((message, mut descriptors)) = said else { return Ok(false) };
        match (message, descriptors.pop()) {
            (Message::Stop, _) => return Ok(false),
            (Message::Loaded, queues) => {
                self.queues = self.queues.take().or(queues.map(File::from));
                self.loaded()?;
            }
            (Message::Ready, listed) => self.done(false, listed)?,
            (Message::Same, None) => self.done(true, None)?,
            (Message::Settings, Some(settings)) => self.read(settings)?,
            (Message::Refused, Some(why)) => self.refused(why)?,
            (Message::Hangup, None) => self.reload(None)?,
            (Message::Confirm, None) => {
                self.confirming.take().into_iter().for_each(|asker| asker.reply(Reply::Done));
            }
            (Message::Ping, None) => self.root.send(Message::Alive, &[])?,
            _ => return Err(unexpected()),
        }
        Ok(true)
    }

    /// Does what somebody wants who has connected.
    fn receive(&mut self, visitor: Visitor) -> Result<(), EngineError> {
        match visitor {
            Visitor::Asker(Request::Reload, asker) => return self.reload(Some(asker)),
            Visitor::Asker(Request::Revoke(selection), asker) => {
                asker.reply(Reply::Revoked(self.reconciler.revoke(&selection)?));
            }
            Visitor::Asker(Request::Explain, asker) => {
                let part = self.figures.refused_part(self.verifier.accepted(), self.verifier.floor());
                asker.reply(Reply::Explained(part));
            }
            Visitor::Asker(Request::Confirm, asker) => self.confirm(asker)?,
            Visitor::Status(reader) => {
                let status = self.status();
                self.visitors.tell(reader, status);
            }
            Visitor::Watcher(socket, uid) => {
                watchers::admit(socket, uid);
            }
        }
        Ok(())
    }

    /// Root has the last word: until it has said it, whoever asked waits.
    fn confirm(&mut self, asker: Asker) -> Result<(), EngineError> {
        if self.trial.take().is_none() && self.confirming.is_none() {
            let hint = "`knockq serve --try 10m` sets a gate up on trial".to_owned();
            asker.reply(Reply::Refused { message: "the gate is not on trial, so it stays".to_owned(), hint });
        } else if self.confirming.is_none() {
            self.confirming = Some(asker);
            self.root.send(Message::Confirm, &[])?;
        }
        Ok(())
    }

    fn claim(&mut self, claim: Claim) -> Result<(), EngineError> {
        match self.writing.work.try_send(Work::Record(claim)) {
            Ok(()) => self.wait_for(self.claimed.saturating_add(1)),
            Err(mpsc::TrySendError::Full(Work::Record(claim))) => {
                if self.is_slow.is_news(Instant::now()) {
                    warn!("the counters are written more slowly than knocks come: those beyond {WAITING} are refused");
                }
                let (refusal, packet) = claim.give_up();
                self.refuse(&refusal, &packet);
            }
            Err(_) => return Err(EngineError::WriterGone),
        }
        Ok(())
    }

    fn take(&mut self, done: Done) -> Result<(), EngineError> {
        match done {
            Done::Recorded(Ok(recorded)) => self.settle(recorded)?,
            Done::Recorded(Err(refused)) => {
                self.figures.recorded(false, unix_now());
                refused.iter().for_each(|(refusal, packet)| self.refuse(refusal, packet));
                self.wait_for(self.claimed.saturating_sub(refused.len()));
            }
            Done::Prepared(next) => self.prepared(next)?,
        }
        Ok(())
    }

    fn settle(&mut self, recorded: Vec<Recorded>) -> Result<(), EngineError> {
        self.figures.recorded(true, unix_now());
        self.reconciler.drain_table_events()?; // who has deleted a door by hand did so before it is asked for again
        for recorded in &recorded {
            match self.verifier.settle(recorded, unix_now()) {
                Ok(grant) => {
                    self.figures.granted(&grant, unix_now());
                    self.reconciler.grant(grant);
                }
                Err(refusal) => self.refuse(&refusal, &recorded.packet),
            }
        }
        self.wait_for(self.claimed.saturating_sub(recorded.len()));
        Ok(())
    }

    fn refuse(&mut self, refusal: &Refusal, packet: &[u8]) {
        self.refusals.count(refusal, Instant::now());
        self.figures.refused(refusal, packet, unix_now());
    }

    fn wait_for(&mut self, claims: usize) {
        self.claimed = claims;
        self.figures.waiting(claims, unix_now());
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

    fn tick(&mut self) -> Result<(), EngineError> {
        self.watch_clock();
        self.mind_the_time()?;
        let now = unix_now();
        self.is_behind = self.verifier.advance(now, SLICE);
        self.verifier.forget(now);
        self.refusals.tell(Instant::now());
        if self.claimed == 0 && self.is_slow.is_over() {
            info!("the counters of all knocks that waited are written");
        }
        self.refusals.tell_narrowed(self.verifier.narrowed(now));
        if self.reconciler.serves() { Ok(self.reconciler.tick()?) } else { Ok(()) }
    }
}

/// What root says; `None` when it is gone.
async fn hear(root: &Channel, root_speaks: &UnixDatagram) -> io::Result<Option<(Message, Vec<OwnedFd>)>> {
    loop {
        root_speaks.readable().await?;
        match root_speaks.try_io(Interest::READABLE, || root.receive()) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            said => return said,
        }
    }
}

/// Decides on a block of packets: the claims among them. Strangers' SYNs, which are nearly all, end here.
fn decide(
    verifier: &mut Verifier,
    refusals: &mut Refusals,
    figures: &mut Figures,
    reconciler: &mut Reconciler,
    block: &[u8],
) -> Vec<Claim> {
    let (now, told_at) = (unix_now(), Instant::now());
    verifier.advance(now, SLICE);
    let mut claims = Vec::new();
    for packet in records(block) {
        match verifier.handle(packet, now) {
            Decision::Refused(refusal) => {
                let (user, source) = (refusal.user.as_ref().map(display), refusal.source.map(display));
                debug!(reason = %refusal.reason, user, source, "packet");
                refusals.count(&refusal, told_at);
                figures.refused(&refusal, packet, now);
            }
            Decision::Claimed(claim) => claims.push(claim),
            Decision::Withdrawn(withdrawal) => {
                figures.withdrawn(&withdrawal, packet, now);
                reconciler.withdraw(&withdrawal);
                refusals.withdrawn(withdrawal, told_at);
            }
        }
    }
    claims
}

fn socket(descriptor: OwnedFd) -> io::Result<UnixDatagram> {
    let socket = StdSocket::from(descriptor);
    socket.set_nonblocking(true)?;
    UnixDatagram::from_std(socket)
}
