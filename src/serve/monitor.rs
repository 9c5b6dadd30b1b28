//! The monitor: holds CAP_NET_ADMIN, looks at no byte of a packet, and does nothing but what a fixed-size frame asks and
//! its policy permits.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use caps::Capability;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, ReturnFlags, recvmsg};
use thiserror::Error;
use tracing::{debug, error, info, warn};

use super::channel::{Channel, Message, has_hung_up};
use super::clock::unix_now;
use super::control::Selection;
use super::frames::{FRAME_LEN, Frame, FrameError};
use super::ledger::{Grant, Ledger};
use super::past::Past;
use super::policy::Policy;
use super::rate::Rate;
use super::repeats::Tally;
use super::report::{self, LiveDoor, MonitorPart, RevokedPart};
use super::sandbox::{self, SandboxError};
use super::watchers::{self, CLOSING};
use super::{calls, handover, terminal};
use crate::nft::{Boot, Comment, Door, Doors, Element, ElementError, Loss, Member, Open, OpenDoor, Ownership, Watch};
use crate::queue::{KernelQueue, QueueError, RelayWriter};
use crate::service::Name;

/// Time between two looks at what has run out.
const TICK: Duration = Duration::from_secs(1);

/// Time between two tellings of what was counted.
const TELLING: Duration = Duration::from_secs(10);

/// The clock may differ by so many seconds from one tick to the next before it was set.
const CLOCK_STEP: u64 = 2;

/// Frames taken at one go, so that the queue gets its turn.
const BURST: usize = 64;

/// More frames than the socket can hold.
const IN_FLIGHT: usize = 4096;

/// What to do about doors that were saved.
const SAVING: &str = "save all tables but knockq's: docs/guide-server.md#saving-the-firewall";

/// What makes a set that sources can be added to.
const SETS_HINT: &str = "nft add set FAMILY TABLE SET '{ type ipv4_addr; flags timeout; }', or ipv6_addr";

/// Time that the keeper has to say that it is time to go, when the verifier has gone.
const GRACE: Duration = Duration::from_secs(2);

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
    /// The verifier closed its end, and the keeper knows of no reason.
    #[error("monitor: the verifier hung up; stopping")]
    HungUp,
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
    let boot = Boot::this()?;
    let mut queue = KernelQueue::open(policy.queue)?;
    let unprivileged = sandbox::give_up_privileges(policy.identity, Some(Capability::CAP_NET_ADMIN))?;

    let watch = Watch::new()?;
    queue.bind()?;
    unprivileged.allow_only(calls::MONITOR)?;
    keeper.send(Message::Bound, &[])?;
    let Some([]) = keeper.expect(Message::Loaded)? else { return Ok(()) };
    let (relay, doors) = (RelayWriter::new(relay), Doors::new()?);
    let mut monitor = Monitor {
        keeper,
        queue,
        watch,
        is_owner: false,
        serves: false,
        is_loading: false,
        loss: Loss::Nothing,
        relay,
        frames,
        rate: Rate::new(policy.grants_per_minute, Instant::now()),
        policy,
        next_policy: None,
        not_opened: Tally::default(),
        not_settled: Tally::default(),
        not_added: Tally::default(),
        doors,
        is_unlisted: false,
        ledger: Ledger::new(boot),
        past: Past::default(),
        figures: Figures::default(),
    };
    if !monitor.own_table()? {
        return Err(MonitorError::NoTable);
    }
    if monitor.is_owner {
        info!("the table is owned: nobody else can change or flush it");
    }
    monitor.watch.loss(monitor.doors.number())?; // the loading has deleted the rules of before
    monitor.watch.take_loaded(); // they are listed
    monitor.loss = monitor.take_unmended();
    monitor.take_over()?;
    monitor.keeper.send(Message::Ready, &[])?;
    monitor.serves = true;
    monitor.watch_table()?;
    monitor.serve()
}

struct Monitor {
    keeper: Channel,
    queue: KernelQueue,
    watch: Watch,
    /// The kernel leaves the table to this process alone.
    is_owner: bool,
    /// The keeper knows that all is ready, and may be told of losses.
    serves: bool,
    /// The keeper loads the table: it was asked to, or has said so.
    is_loading: bool,
    /// What was deleted of the table since it was loaded.
    loss: Loss,
    relay: RelayWriter,
    frames: OwnedFd,
    /// The doors that may be opened now.
    rate: Rate,
    policy: Policy,
    /// What comes into force when the verifier has its new settings.
    next_policy: Option<Policy>,
    not_opened: Tally,
    not_settled: Tally,
    not_added: Tally,
    doors: Doors,
    /// Others may have added elements in the daemon's name, and they could not be listed.
    is_unlisted: bool,
    ledger: Ledger,
    past: Past,
    figures: Figures,
}

/// What `status` shows, since the start.
#[derive(Default)]
struct Figures {
    seen: u64,
    opened: u64,
    not_opened: u64,
}

impl Monitor {
    /// Works until it is told to stop. If the verifier died, the keeper knows, and tells why.
    fn serve(mut self) -> Result<(), MonitorError> {
        match self.work() {
            Err(MonitorError::HungUp) if self.is_told_to_stop()? => Ok(()),
            done => done,
        }
    }

    fn work(&mut self) -> Result<(), MonitorError> {
        let tick = Timespec { tv_sec: i64::try_from(TICK.as_secs()).unwrap_or(1), tv_nsec: 0 };
        let (mut last_tick, mut last_telling) = ((Instant::now(), unix_now()), Instant::now());
        loop {
            let [queue, watch, frames, keeper] = self.wait(&tick)?;
            if keeper && !self.hear_keeper()? {
                return Ok(());
            }
            if frames {
                self.take_frames(BURST)?;
            }
            if queue {
                self.take_packets()?;
            }
            if watch {
                self.watch_table()?;
            }
            if last_tick.0.elapsed() >= TICK {
                last_tick = self.tick(last_tick)?;
            }
            if last_telling.elapsed() >= TELLING {
                last_telling = Instant::now();
                self.tell();
            }
        }
    }

    /// Waits a little for the keeper to say that it is time to go.
    fn is_told_to_stop(&self) -> Result<bool, MonitorError> {
        let deadline = Instant::now() + GRACE;
        loop {
            let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).unwrap_or_default();
            match poll(&mut [PollFd::new(&self.keeper, PollFlags::IN)], Some(&left)) {
                Ok(0) => return Ok(false),
                Ok(_) => match self.keeper.receive()? {
                    Some((Message::Stop, _)) => return Ok(true),
                    Some(_) => {} // too late for that
                    None => {
                        mourn_keeper();
                        return Ok(true);
                    }
                },
                Err(Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
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

    /// Reads what was changed of the table, asks the keeper to load it again, once, and changes what is to be changed. Nobody can
    /// take away what we own, nor could the keeper load it.
    fn watch_table(&mut self) -> Result<(), MonitorError> {
        self.hear_of_changes()?;
        self.settle()
    }

    /// From here on what is changed besides the load may have been changed after it.
    fn expect_load(&mut self) {
        self.is_loading = true;
        self.watch.take_unmended(0);
    }

    /// What others have changed of the table since a load was expected.
    fn take_unmended(&mut self) -> Loss {
        // Those who load a table themselves do so before the keeper looks at it.
        let loads = usize::from(self.policy.owns_table);
        self.watch.take_unmended(loads)
    }

    /// Reads what was changed of the table, and what of it was lost. A door that somebody deleted by hand is taken back: it must
    /// not come again with the next restoration.
    fn hear_of_changes(&mut self) -> Result<(), MonitorError> {
        self.read_changes()?;
        let now = Instant::now();
        self.ledger.mark_sets(&self.watch.take_new_sets());
        let loaded = self.watch.take_loaded();
        for door in self.watch.take_deleted() {
            let gone = self.ledger.remove_door(&door);
            for (Door { source, port, .. }, Grant { user, service, .. }) in
                gone.iter().filter(|gone| gone.1.until > now)
            {
                info!(%user, %service, %source, %port, "shut by somebody else");
            }
            self.past.add(&gone, now);
        }
        if loaded.begun {
            self.forget_begun();
        }
        self.mark_loaded(&loaded.doors, now);
        let known = self.policy.sets();
        loaded.members.into_iter().filter(|it| known.contains(&it.set)).for_each(|it| self.ledger.mark_member(it));
        if loaded.are_missed || std::mem::take(&mut self.is_unlisted) {
            // There is nothing to list until the table is loaded again.
            self.is_unlisted = self.compare(false).is_err();
        }
        if self.loss != Loss::Nothing && self.serves && !self.is_owner && !self.is_loading {
            self.expect_load();
            self.keeper.send(Message::Lost, &[])?;
        }
        Ok(())
    }

    fn read_changes(&mut self) -> io::Result<()> {
        let loss = self.watch.loss(self.doors.number())?;
        self.note_loss(loss);
        Ok(())
    }

    fn note_loss(&mut self, loss: Loss) {
        if self.is_owner {
            return; // nobody can take away what we own; what was missed is listed
        }
        if loss == Loss::Doors && self.loss != Loss::Doors {
            self.ledger.lose_doors();
        }
        self.loss = self.loss.max(loss);
    }

    /// Somebody else has loaded doors. What one for a connection was opened for may have come.
    fn mark_loaded<'a>(&mut self, loaded: impl IntoIterator<Item = &'a Door>, now: Instant) {
        let mut over = 0_usize;
        for door in loaded {
            if door.once {
                self.ledger.spend(door);
            }
            self.ledger.mark(door);
            over += usize::from(!self.ledger.is_held(door, now));
        }
        if over > 0 {
            warn!(doors = over, hint = SAVING, "shut: somebody else has loaded doors whose grants are over");
        }
    }

    /// Makes the kernel's elements what the ledger says: dozens in one transaction, for one each takes a slow machine minutes
    /// where there are thousands. The kernel tells of each, so what it says is read in between, or it would run over.
    fn settle(&mut self) -> Result<(), MonitorError> {
        loop {
            let now = Instant::now(); // of each by the time that it is by then
            let changes = self.ledger.take(BURST, now);
            if changes.is_empty() {
                return Ok(());
            }
            let changed = self.doors.change(&changes);
            self.hear_of_changes()?;
            match changed {
                Ok(()) => changes.iter().for_each(|(element, _)| self.settled(element)),
                Err(error) if changes.len() == 1 => {
                    changes.into_iter().for_each(|(element, _)| self.not_settled(element, &error));
                }
                Err(_) => changes.into_iter().for_each(|(element, _)| self.settle_alone(element)),
            }
        }
    }

    /// One that stands in the others' way must not keep them.
    fn settle_alone(&mut self, element: Element) {
        let time = self.ledger.desired(&element, Instant::now());
        let change = (element, time);
        match self.doors.change([&change]) {
            Ok(()) => self.settled(&change.0),
            Err(error) => self.not_settled(change.0, &error),
        }
    }

    fn not_settled(&mut self, element: Element, error: &ElementError) {
        // The table is not there, or somebody else's for a moment.
        if self.is_loading && self.ledger.may_defer() { self.defer(element) } else { self.refused(&element, error) }
    }

    fn settled(&mut self, element: &Element) {
        for (Door { source, port, .. }, Grant { user, service, bound, asked, .. }) in self.ledger.settled(element) {
            self.figures.opened = self.figures.opened.saturating_add(1);
            info!(%user, %service, %source, %port, seconds = asked.unwrap_or(0), bound, "granted");
        }
    }

    fn defer(&mut self, element: Element) {
        for (Door { source, port, .. }, Grant { user, service, bound, asked, .. }) in self.ledger.defer(element) {
            self.figures.opened = self.figures.opened.saturating_add(1);
            let seconds = asked.unwrap_or(0);
            info!(%user, %service, %source, %port, seconds, bound, "granted, once the table is loaded");
        }
    }

    fn refused(&mut self, element: &Element, error: &ElementError) {
        let gone = self.ledger.refused(element);
        for (Door { source, port, .. }, Grant { user, service, .. }) in &gone {
            self.figures.not_opened = self.figures.not_opened.saturating_add(1);
            if self.not_opened.is_first() {
                warn!(%user, %service, %source, %port, "not granted: {error}");
            }
        }
        match element {
            Element::Member(Member { source, set, .. }) if self.not_added.is_first() => {
                warn!(%source, %set, "not as it should be in a set of yours: {error}");
            }
            Element::Opens(Door { source, port, .. }) | Element::Lasts(Door { source, port, .. })
                if gone.is_empty() && self.not_settled.is_first() =>
            {
                warn!(%source, %port, "not as its grants say: {error}");
            }
            _ => {}
        }
    }

    /// Compares the elements that say that they are the daemon's with the ledger, which `adopts` the grants of a daemon of before.
    fn compare(&mut self, adopts: bool) -> Result<(), ElementError> {
        let old_count = adopts && self.policy.old_count;
        let mut wrong = Vec::new();
        let now = Instant::now(); // none must have more time than the kernel gives it, and listing thousands takes a while
        let [open, live] = self.doors.listed()?;
        let open = open.into_iter().map(|open| (open, false));
        for (OpenDoor { what: door, comment, left }, spent) in open.chain(live.into_iter().map(|live| (live, true))) {
            let Some(said) = comment else { continue }; // what somebody opened by hand is not ours to shut
            let counts_until = said.counts_until(left, old_count, self.ledger.boot(), now);
            let Comment { user, service, bound, end } = said;
            if let Some(until) = counts_until.filter(|_| adopts) {
                let members = self.members_of(&user, &door);
                let kill = self.kills(&service);
                let (token, asked, waits) = (None, None, false);
                let grant = Grant { user, service, until, bound, token, kill, spent, members, asked, waits };
                // Who may be there no more leaves the sets with the door, below.
                grant.members.iter().for_each(|member| self.ledger.mark_member(member.clone()));
                self.ledger.adopt(door, grant);
            }
            // One for one connection is never added again: it may be spent by now.
            let says_its_end = end.is_some() || door.once;
            if counts_until.is_none() || !says_its_end || !self.ledger.is_held(&door, now) {
                wrong.push(door);
            }
        }
        self.mark_loaded(&wrong, now);
        self.compare_members(adopts, now);
        Ok(())
    }

    /// The same for who is in the administrator's sets. Whoever a door for one connection has let in is there until it would end.
    fn compare_members(&mut self, adopts: bool, now: Instant) {
        let (policy, old_count) = (self.policy.clone(), adopts && self.policy.old_count);
        for set in policy.sets() {
            let listed = match self.doors.members(set) {
                Ok(listed) => listed,
                Err(error) => {
                    if !matches!(error, ElementError::NoSet) && self.not_added.is_first() {
                        warn!(%set, "who is in a set of yours is not known: {error}");
                    }
                    continue;
                }
            };
            for Open { what: member, comment, left } in listed {
                let Some(said) = comment else { continue };
                let until = said.counts_until(left, old_count, self.ledger.boot(), now);
                let until = until.filter(|_| policy.adds(&said.user, &said.service, set));
                let is_known = !adopts || self.ledger.desired(&Element::Member(member.clone()), now).is_some();
                let opening = policy.services.get(&said.service).filter(|opening| opening.once);
                let port = member.port.or_else(|| opening?.ports.first().copied());
                match (until, port.filter(|_| opening.is_some())) {
                    (Some(_), _) if is_known => {}
                    (Some(until), Some(port)) => {
                        let door = Door { source: member.source, port, once: true };
                        let Comment { user, service, bound, .. } = said;
                        let (token, asked, members) = (None, None, vec![member]);
                        let (kill, spent, waits) = (false, true, false);
                        let grant = Grant { user, service, until, bound, token, kill, spent, members, asked, waits };
                        self.ledger.adopt(door, grant);
                    }
                    _ => self.ledger.mark_member(member),
                }
            }
        }
    }

    /// Does what the keeper says; `false` if it is time to go.
    fn hear_keeper(&mut self) -> Result<bool, MonitorError> {
        let Some((message, mut descriptors)) = self.keeper.receive()? else {
            mourn_keeper();
            return Ok(false);
        };
        match (message, descriptors.pop()) {
            (Message::Stop, _) => return Ok(false),
            (Message::Loaded, _) => return self.take_table_back().map(|()| true),
            (Message::Settings, Some(policy)) => self.next_policy = Some(handover::unseal(policy)?),
            (Message::Enforce, _) => self.enforce()?,
            (Message::Watch, Some(watcher)) => {
                watchers::add(watcher);
                return Ok(true);
            }
            (Message::Report, Some(memory)) => {
                report::write(memory, self.part())?;
                self.keeper.send(Message::Reported, &[])?;
                return Ok(true);
            }
            (Message::Release, _) => {
                self.let_go_of_table()?;
                if !self.is_loading {
                    self.is_loading = true; // what is lost now is loaded anyway
                    self.hear_of_changes()?;
                    self.expect_load();
                }
            }
            (Message::Revoke, Some(selection)) => {
                let memory = descriptors.pop().ok_or(io::ErrorKind::InvalidData).map_err(io::Error::from)?;
                let selection: Selection = handover::unseal(selection)?;
                self.shut("revoked", |door, grant| selection.covers(door.source, &grant.user))?;
                self.forget_begun();
                report::write(memory, self.revoked(&selection, Instant::now()))?;
            }
            _ => return Err(io::Error::from(io::ErrorKind::InvalidData).into()),
        }
        self.keeper.send(Message::Ready, &[])?;
        self.watch_table()?; // what was heard meanwhile is not told again
        Ok(true)
    }

    /// The table is loaded again: owns it where that is possible, and opens the doors that went with the old one.
    fn take_table_back(&mut self) -> Result<(), MonitorError> {
        let is_there = self.own_table()?;
        self.hear_of_changes()?;
        let loss = self.loss;
        self.is_loading = false;
        // The loading itself has deleted rules, and added them. What others have changed meanwhile is another loss.
        let unmended = if is_there { self.take_unmended() } else { Loss::Doors };
        if unmended != Loss::Nothing {
            self.note_loss(unmended);
            self.let_go_of_table()?;
            return self.watch_table();
        }
        self.loss = Loss::Nothing;
        if loss == Loss::Doors {
            self.ledger.mark_all();
        }
        self.ledger.resume();
        self.watch_table()
    }

    /// Owns the table, where the kernel allows it; `false` if it is not there.
    fn own_table(&mut self) -> Result<bool, MonitorError> {
        if !self.policy.owns_table {
            return Ok(true); // whoever loads it must be able to load it again
        }
        let ownership = self.doors.own_table()?;
        self.is_owner = ownership == Ownership::Adopted;
        if ownership == Ownership::Made {
            self.let_go_of_table()?; // what was made is empty, a gate that lets all in
        }
        Ok(ownership != Ownership::Made)
    }

    /// From here on others may change the table, the keeper among them.
    fn let_go_of_table(&mut self) -> Result<(), MonitorError> {
        self.read_changes()?; // what this socket has done is known by its number
        self.doors = Doors::new()?; // it is the owner
        self.is_owner = false;
        Ok(())
    }

    /// What doors have let in must not come again: those who knocked are revoked, or others may have loaded it.
    fn forget_begun(&mut self) {
        if let Err(error) = self.doors.forget_begun() {
            warn!("a SYN that was let in may come again for a minute: {error}");
        }
    }

    /// Notes the doors that were open before this process began, and shuts those that nobody may open any more.
    fn take_over(&mut self) -> Result<(), MonitorError> {
        self.forget_begun();
        self.compare(true)?;
        self.check_sets();
        self.shut_what_policy_forbids()
    }

    fn shut_what_policy_forbids(&mut self) -> Result<(), MonitorError> {
        let (policy, now, unix_now) = (self.policy.clone(), Instant::now(), unix_now());
        self.ledger.remove_members(|grant, member| policy.adds(&grant.user, &grant.service, &member.set));
        self.shut("shut", |door, grant| !policy.upholds(door, grant, now, unix_now))
    }

    /// Puts the next policy in force, and shuts what it does not uphold.
    fn enforce(&mut self) -> Result<(), MonitorError> {
        self.take_frames(IN_FLIGHT)?; // what the verifier asked by its old settings is all there is
        if let Some(policy) = self.next_policy.take() {
            self.rate.change(policy.grants_per_minute);
            self.policy = policy;
            self.shut_what_policy_forbids()?;
            self.check_sets();
        }
        Ok(())
    }

    /// Takes grants back; what others hold open stays open.
    fn shut(&mut self, how: &str, is_meant: impl Fn(&Door, &Grant) -> bool) -> Result<(), MonitorError> {
        let (gone, now) = (self.ledger.remove(is_meant), Instant::now());
        for (Door { source, port, .. }, Grant { user, service, until, .. }) in &gone {
            if *until > now {
                info!(%user, %service, %source, %port, "{how}");
            }
        }
        self.past.add(&gone, now);
        self.settle()
    }

    /// Tells which sets of the administrator's are missing or cannot be used, before somebody knocks.
    fn check_sets(&mut self) {
        for set in self.policy.sets() {
            if let Err(error) = self.doors.check_set(set) {
                warn!(hint = SETS_HINT, "who knocks is not added: {error}");
            }
        }
    }

    /// Doors of those who were revoked, but for what others hold open, and all that it takes to end what began there.
    fn revoked(&mut self, selection: &Selection, now: Instant) -> RevokedPart {
        let ledger = &self.ledger;
        let is_held = |door: &Door| [false, true].iter().any(|&once| ledger.is_held(&Door { once, ..*door }, now));
        let doors = self.past.of(selection, now).filter(|door| !is_held(door)).collect();
        let Policy { trusted, .. } = &self.policy;
        RevokedPart { doors, guarded: self.policy.ports(), trusted: trusted.clone(), is_cut: false }
    }

    /// Whether connections to this service end with their door.
    fn kills(&self, service: &Name) -> bool {
        self.policies().find_map(|policy| policy.services.get(service)).is_some_and(|opening| opening.kill)
    }

    /// What is permitted by: what comes into force next, and what is in force.
    fn policies(&self) -> impl Iterator<Item = &Policy> {
        self.next_policy.iter().chain([&self.policy])
    }

    /// What a user's source is in the administrator's sets, as long as this door is open.
    fn members_of(&mut self, user: &Name, door: &Door) -> Vec<Member> {
        let Self { policy, next_policy, doors, not_added, .. } = self;
        let allowance = next_policy.iter().chain([&*policy]).find_map(|policy| policy.users.get(user));
        let sets = allowance.map_or(&[][..], |allowance| &allowance.add_to);
        let mut members = Vec::new();
        for set in sets {
            match doors.member(set, door) {
                Ok(member) => members.extend(member),
                Err(error) if not_added.is_first() => {
                    warn!(%user, source = %door.source, hint = SETS_HINT, "not added: {error}");
                }
                Err(_) => {}
            }
        }
        members
    }

    /// Gives what is queued its verdict and hands the headers on.
    fn take_packets(&mut self) -> Result<(), MonitorError> {
        let mut pushed = Ok(());
        let relay = &mut self.relay;
        let taken = self.queue.drain(self.policy.answer, |packet| {
            if pushed.is_ok() {
                pushed = relay.push(packet);
            }
        })?;
        self.figures.seen = self.figures.seen.saturating_add(u64::try_from(taken).unwrap_or(0));
        pushed.and_then(|()| relay.flush()).map_err(|_| MonitorError::HungUp)
    }

    /// Answers some frames.
    fn take_frames(&mut self, most: usize) -> Result<(), MonitorError> {
        self.hear_of_changes()?; // who has deleted a door by hand did so before it is asked for again
        for _ in 0..most {
            let Some(frame) = next_frame(&self.frames)? else { break };
            if !self.policy.permits(&frame) && !self.next_policy.as_ref().is_some_and(|next| next.permits(&frame)) {
                return Err(MonitorError::NotPermitted);
            }
            self.answer(frame);
        }
        self.settle()
    }

    /// Does what a permitted frame asks. What the kernel refuses is logged; the door stays as it was.
    fn answer(&mut self, frame: Frame) {
        let now = Instant::now();
        match frame {
            Frame::Open { source, port, once, bound, seconds, user, service, token } => {
                let allowance = self.policies().find_map(|policy| policy.users.get(&user));
                let seconds = allowance.map_or(seconds, |allowance| allowance.time(seconds, unix_now()));
                // At the very second in which the user expires there is none left.
                if seconds == 0 {
                    return;
                }
                // The verifier asks for no more than there may be; what it did is told together, at the next tick.
                if !self.rate.take(now) {
                    return;
                }
                let door = Door { source, port, once };
                let until = now + Duration::from_secs(seconds.into());
                let members = self.members_of(&user, &door);
                let kill = self.kills(&service);
                let (token, asked, spent, waits) = (Some(token), Some(seconds), false, true);
                self.open(door, Grant { user, service, until, bound, token, kill, spent, members, asked, waits });
            }
            Frame::Close { source, port, user, token } => {
                for door in [false, true].map(|once| Door { source, port, once }) {
                    if let Some((gone, true)) = self.ledger.withdraw(&door, &user, token, now) {
                        self.past.add(&[(door, gone)], now);
                    }
                }
            }
        }
    }

    /// A door is to be open for the time of this grant.
    fn open(&mut self, door: Door, grant: Grant) {
        let (Door { source, port, .. }, Grant { user, service, .. }) = (door, &grant);
        let [user, service] = [user, service].map(Clone::clone);
        if !self.ledger.insert(door, grant) {
            self.figures.not_opened = self.figures.not_opened.saturating_add(1);
            if self.not_opened.is_first() {
                warn!(%user, %service, %source, %port, "not granted: too many doors are open");
            }
        }
    }

    fn part(&self) -> MonitorPart {
        let door = |(door, grant, left): (&Door, &Grant, Duration)| LiveDoor {
            source: door.source,
            port: door.port,
            once: door.once,
            user: grant.user.clone(),
            service: grant.service.clone(),
            seconds_left: left.as_secs(),
        };
        let Figures { seen, opened, not_opened } = self.figures;
        let doors = self.ledger.live(Instant::now()).map(door).collect();
        let lost = self.relay.lost_in_all();
        MonitorPart { seen, lost, opened, not_opened, doors, is_cut: false }
    }

    /// Looks after what runs out by itself; tells when it did so, by both clocks.
    fn tick(&mut self, last: (Instant, u64)) -> Result<(Instant, u64), MonitorError> {
        let (now, unix_now) = (Instant::now(), unix_now());
        let closed = self.ledger.forget(now);
        for (Door { source, port, .. }, Grant { user, service, .. }) in &closed {
            if self.policy.log_closings {
                info!(target: CLOSING, %user, %service, %source, %port, "closed");
            } else {
                debug!(target: CLOSING, %user, %service, %source, %port, "closed");
            }
        }
        self.past.add(&closed, now);
        // Doors were opened until their users expire, by a clock that has been set since.
        let expected = last.1.saturating_add(now.duration_since(last.0).as_secs()).saturating_add(CLOCK_STEP);
        if unix_now > expected {
            self.shut_what_policy_forbids()?;
        }
        Ok((now, unix_now))
    }

    /// Tells what was counted since the last time.
    fn tell(&mut self) {
        match self.relay.take_lost() {
            0 => {}
            lost => warn!(lost, "the verifier is slower than the SYNs come: some were dropped unseen"),
        }
        let tallies = [
            (&mut self.not_opened, "opened"),
            (&mut self.not_settled, "made what their grants say"),
            (&mut self.not_added, "added to sets"),
        ];
        for (tally, what) in tallies {
            match tally.take_untold() {
                0 => {}
                doors => warn!(doors, "more could not be {what}, like the one before"),
            }
        }
        match self.rate.take_refused() {
            0 => {}
            requests => {
                let hint = "look who knocks with `knockq grants`; if all is well, raise grants_per_minute";
                warn!(requests, hint, "not granted: more doors were asked for than grants_per_minute allows");
            }
        }
    }
}

/// The next frame, if there is one.
fn next_frame(frames: &OwnedFd) -> Result<Option<Frame>, MonitorError> {
    let mut bytes = [0; FRAME_LEN];
    let mut no_descriptors = RecvAncillaryBuffer::default();
    let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC; // the length that it has, not the one that fits
    let received = match recvmsg(frames, &mut [IoSliceMut::new(&mut bytes)], &mut no_descriptors, flags) {
        Ok(received) if received.bytes == 0 && has_hung_up(frames) => return Err(MonitorError::HungUp),
        Ok(received) => received,
        Err(Errno::CONNRESET) => return Err(MonitorError::HungUp),
        Err(Errno::AGAIN) => return Ok(None),
        Err(error) => return Err(io::Error::from(error).into()),
    };
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(FrameError::Descriptors.into());
    }
    if received.bytes != FRAME_LEN {
        return Err(FrameError::Length(received.bytes).into());
    }
    Ok(Some(Frame::decode(&bytes)?))
}

fn mourn_keeper() {
    error!("the keeper is gone; stopping all, and every door closes by its own timeout");
}
