//! Makes the kernel's sets what the ledger says, through the gate, and hears what others change of them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use super::clock::unix_now;
use super::commands::{BATCH, Command, monotonic};
use super::control::Selection;
use super::gate_link::GateLink;
use super::ledger::{Hold, Ledger};
use super::past::Past;
use super::policy::Policy;
use super::rate::Rate;
use super::repeats::Tally;
use super::report::{Doors, LiveDoor, RevokedPart};
use super::watchers::CLOSING;
use crate::nft::{Boot, Door, Element, ElementError, Layout, Loss, Member, SetName, Time, Watch, without_door};
use crate::service::{Name, Port};
use crate::verify::{Grant, Withdrawal};

mod found;
mod members;
mod table;

/// Time between two looks at what has run out.
const TICK: Duration = Duration::from_secs(1);

/// Time between two tellings of what was counted.
const TELLING: Duration = Duration::from_secs(10);

/// The clock may differ by so many seconds from one tick to the next before it was set.
const CLOCK_STEP: u64 = 2;

/// The gate answers within much less, unless it is held up.
const LATE: Duration = Duration::from_millis(500);

/// Connections that are told of when they are cut.
const CUTS_TOLD: usize = 8;

/// The kernel's sets, as the engine sees to them.
pub struct Reconciler {
    gate: GateLink,
    watch: Watch,
    /// Root knows that all is ready, and may be told of losses.
    serves: bool,
    /// Root loads the table: it is to be asked to, or has said so.
    is_loading: bool,
    /// Root is to be asked for that.
    is_to_be_loaded: bool,
    /// What was deleted of the table since it was loaded.
    loss: Loss,
    /// The doors that may be opened now.
    rate: Rate,
    policy: Policy,
    /// The administrator's sets that the gate knows of, from the policy: and at a reload from the one before, too.
    sets: BTreeSet<SetName>,
    not_opened: Tally,
    not_settled: Tally,
    not_added: Tally,
    /// What the administrator's sets take.
    layouts: BTreeMap<SetName, Layout>,
    /// Others may have added elements in the daemon's name, and they could not be listed.
    is_unlisted: bool,
    ledger: Ledger,
    /// What the gate was told last is to be told again, for it took too long.
    is_late: bool,
    past: Past,
    figures: Figures,
    last_tick: (Instant, u64),
    last_telling: Instant,
}

/// What `status` shows, since the start.
#[derive(Default)]
struct Figures {
    opened: u64,
    not_opened: u64,
    /// Packets that were told lost.
    lost: u64,
}

impl AsFd for Reconciler {
    /// Where the kernel tells of changes.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }
}

impl Reconciler {
    /// Before the table is loaded.
    pub fn new(gate: GateLink, watch: OwnedFd, policy: Policy, boot: Boot) -> Self {
        let now = Instant::now();
        Self {
            gate,
            watch: Watch::new(watch),
            serves: false,
            is_loading: false,
            is_to_be_loaded: false,
            loss: Loss::Nothing,
            rate: Rate::new(policy.grants_per_minute, now),
            sets: policy.sets().into_iter().cloned().collect(),
            policy,
            not_opened: Tally::default(),
            not_settled: Tally::default(),
            not_added: Tally::default(),
            layouts: BTreeMap::new(),
            is_unlisted: false,
            ledger: Ledger::new(boot),
            is_late: false,
            past: Past::default(),
            figures: Figures::default(),
            last_tick: (now, unix_now()),
            last_telling: now,
        }
    }

    /// The table is root's to load, not for others.
    pub const fn owns_table(&self) -> bool {
        self.policy.owns_table
    }

    /// The kernel leaves the table to the gate alone, as the gate said last.
    pub const fn is_ours_alone(&self) -> bool {
        self.gate.last().owns_table
    }

    /// Says who is cut off, of those who are connected to ports whose connections end with their door from now on.
    pub fn warn_of_cuts(&mut self, connected: BTreeSet<(IpAddr, Port)>) {
        for (source, port) in without_door(connected, &mut self.gate).iter().take(CUTS_TOLD) {
            warn!(%source, %port, "is connected without a door, and cut: on_close = \"kill\"");
        }
    }

    /// Whether the table has been loaded.
    pub const fn serves(&self) -> bool {
        self.serves
    }

    /// Why the gate does not answer any more, if so.
    ///
    /// # Errors
    /// `TimedOut`, or that it is gone.
    pub fn check(&self) -> io::Result<()> {
        self.gate.check()
    }

    /// Whether [`Reconciler::settle_some`] has something to do.
    pub fn is_behind(&self) -> bool {
        self.ledger.is_unsettled()
    }

    /// Makes all of the kernel's elements what the ledger says.
    ///
    /// # Errors
    /// The kernel's.
    pub fn settle(&mut self) -> io::Result<()> {
        while self.is_behind() {
            self.settle_some()?;
        }
        Ok(())
    }

    /// Makes some of them so: dozens in one transaction, for one each takes a slow machine minutes where there are thousands. The
    /// kernel tells of each, so what it says is read in between, or it would run over.
    ///
    /// # Errors
    /// The kernel's.
    pub fn settle_some(&mut self) -> io::Result<()> {
        let clock = monotonic(); // before the ledger says how long: never longer
        let mut changes = self.ledger.take(BATCH, Instant::now()); // of each by the time that it is by then
        changes.retain(|(element, _)| self.may_touch(element));
        if self.is_loading && self.ledger.may_defer() {
            // Who is let in belongs into a set once the door is open.
            let waits = |change: &mut (Element, _)| matches!(change, (Element::Member(_), Some(_)));
            changes.extract_if(.., waits).for_each(|(element, _)| drop(self.ledger.defer(element)));
        }
        let commands: Vec<_> = changes.iter().cloned().map(|change| command(change, clock)).collect();
        let asked = Instant::now();
        let changed = if commands.is_empty() { Ok(Vec::new()) } else { self.gate.call(&commands) };
        self.gate.check()?;
        self.drain_table_events()?;
        match changed {
            Ok(_) => {
                changes.iter().for_each(|(element, _)| self.settled(element));
                self.mend_late(&changes, asked.elapsed());
            }
            Err(error) if changes.len() == 1 => {
                changes.into_iter().for_each(|(element, _)| self.not_settled(element, &error));
            }
            Err(_) => changes.into_iter().for_each(|(element, _)| self.settle_alone(element)),
        }
        Ok(())
    }

    /// The kernel counts from when it is told: what a gate tells that is held up stands open for so much longer, until it is told
    /// again. Once, for it may be so slow each time.
    fn mend_late(&mut self, changes: &[(Element, Option<Time>)], took: Duration) {
        self.is_late = took > LATE && !self.is_late;
        for (element, _) in changes.iter().filter(|(_, time)| self.is_late && time.is_some()) {
            match element {
                Element::Opens(door) | Element::Lasts(door) => self.ledger.mark(door),
                Element::Member(member) => self.ledger.mark_member(member.clone()),
            }
        }
    }

    /// The gate takes whoever asks about a set that no configuration names for an intruder.
    fn may_touch(&self, element: &Element) -> bool {
        match element {
            Element::Member(Member { set, .. }) => self.sets.contains(set),
            Element::Opens(_) | Element::Lasts(_) => true,
        }
    }

    /// One that stands in the others' way must not keep them.
    fn settle_alone(&mut self, element: Element) {
        let clock = monotonic();
        let time = self.ledger.desired(&element, Instant::now());
        match self.gate.call(&[command((element.clone(), time), clock)]) {
            Ok(_) => self.settled(&element),
            Err(error) => self.not_settled(element, &error),
        }
    }

    fn not_settled(&mut self, element: Element, error: &ElementError) {
        // The table is not there, or somebody else's for a moment.
        let may_come = self.is_loading && self.ledger.may_defer() && !matches!(error, ElementError::OverRate);
        if may_come { self.defer(element) } else { self.refused(&element, error) }
    }

    fn settled(&mut self, element: &Element) {
        for (Door { source, port, .. }, Hold { user, service, bound, asked, .. }) in self.ledger.settled(element) {
            self.figures.opened = self.figures.opened.saturating_add(1);
            info!(%user, %service, %source, %port, seconds = asked.unwrap_or(0), bound, "granted");
        }
    }

    fn defer(&mut self, element: Element) {
        for (Door { source, port, .. }, Hold { user, service, bound, asked, .. }) in self.ledger.defer(element) {
            self.figures.opened = self.figures.opened.saturating_add(1);
            let seconds = asked.unwrap_or(0);
            info!(%user, %service, %source, %port, seconds, bound, "granted, once the table is loaded");
        }
    }

    fn refused(&mut self, element: &Element, error: &ElementError) {
        let gone = self.ledger.refused(element);
        if self.gate.check().is_err() {
            return; // that is the end, and is told
        }
        for (Door { source, port, .. }, Hold { user, service, .. }) in &gone {
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

    /// Takes back what is meant, and tells at which doors connections may have begun.
    ///
    /// # Errors
    /// The kernel's.
    pub fn revoke(&mut self, selection: &Selection) -> io::Result<RevokedPart> {
        self.drain_table_events()?;
        self.shut("revoked", |door, hold| selection.covers(door.source, &hold.user))?;
        self.forget_begun();
        self.gate.check()?; // or it is not done
        Ok(self.revoked(selection, Instant::now()))
    }

    /// What doors have let in must not come again: those who knocked are revoked, or others may have loaded it.
    fn forget_begun(&mut self) {
        if let Err(error) = self.gate.call(&[Command::Forget])
            && self.gate.check().is_ok()
        {
            warn!("a SYN that was let in may come again for a minute: {error}");
        }
    }

    fn shut_what_policy_forbids(&mut self) -> io::Result<()> {
        let (policy, now, unix_now) = (self.policy.clone(), Instant::now(), unix_now());
        self.ledger.remove_members(|hold, member| policy.adds(&hold.user, &hold.service, &member.set));
        self.shut("shut", |door, hold| !policy.still_permits(door, hold, now, unix_now))
    }

    /// Puts a policy in force, and shuts what it does not uphold.
    ///
    /// # Errors
    /// The kernel's.
    pub fn enforce(&mut self, policy: Policy) -> io::Result<()> {
        self.rate.change(policy.grants_per_minute);
        let sets: BTreeSet<SetName> = policy.sets().into_iter().cloned().collect();
        self.sets.extend(sets.iter().cloned());
        self.policy = policy;
        self.drain_table_events()?;
        self.shut_what_policy_forbids()?;
        self.sets = sets;
        self.look_at_sets();
        self.gate.check()
    }

    /// Takes grants back; what others hold open stays open.
    fn shut(&mut self, how: &str, is_meant: impl Fn(&Door, &Hold) -> bool) -> io::Result<()> {
        let (gone, now) = (self.ledger.remove(is_meant), Instant::now());
        for (Door { source, port, .. }, Hold { user, service, until, .. }) in &gone {
            if *until > now {
                info!(%user, %service, %source, %port, "{how}");
            }
        }
        self.past.add(&gone, now);
        self.settle()
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
        self.policy.services.get(service).is_some_and(|opening| opening.kill)
    }

    /// Doors are to be open for the time of a grant, as the next settling has it.
    pub fn grant(&mut self, granted: Grant) {
        let Grant { user, service, source, ports, open_for, once, bound, token, .. } = granted;
        for port in ports {
            let now = Instant::now();
            let seconds = self.policy.users.get(&user).map_or(0, |allowance| allowance.time(open_for, unix_now()));
            // At the very second in which the user expires there is none left. What the rate refused is told together.
            if seconds == 0 || !self.rate.take(now) {
                continue;
            }
            let door = Door { source, port, once };
            let until = now + Duration::from_secs(seconds.into());
            let (members, kill) = (self.members_of(&user, &door), self.kills(&service));
            let (user, service, asked) = (user.clone(), service.clone(), Some(seconds));
            let (token, spent, waits) = (Some(token), false, true);
            self.open(door, Hold { user, service, until, bound, token, kill, spent, members, asked, waits });
        }
    }

    /// Takes back what a token opened, as the next settling has it.
    pub fn withdraw(&mut self, withdrawal: &Withdrawal) {
        let (Withdrawal { user, source, token, ports, .. }, now) = (withdrawal, Instant::now());
        let doors = ports.iter().flat_map(|port| [false, true].map(|once| Door { source: *source, port: *port, once }));
        for door in doors {
            if let Some((gone, true)) = self.ledger.withdraw(&door, user, *token, now) {
                self.past.add(&[(door, gone)], now);
            }
        }
    }

    /// A door is to be open for the time of this hold.
    fn open(&mut self, door: Door, hold: Hold) {
        let (Door { source, port, .. }, Hold { user, service, .. }) = (door, &hold);
        let [user, service] = [user, service].map(Clone::clone);
        if !self.ledger.insert(door, hold) {
            self.figures.not_opened = self.figures.not_opened.saturating_add(1);
            if self.not_opened.is_first() {
                warn!(%user, %service, %source, %port, "not granted: too many doors are open");
            }
        }
    }

    /// The doors that are open, where so many knocks were over their user's rate; packets that the gate has seen, and those of
    /// them that never came here.
    pub fn doors(&mut self, over_rate: u64) -> (Doors, u64, u64) {
        self.gate.call(&[Command::Count]).ok(); // it has counted on
        let door = |(door, hold, left): (&Door, &Hold, Duration)| LiveDoor {
            source: door.source,
            port: door.port,
            once: door.once,
            user: hold.user.clone(),
            service: hold.service.clone(),
            seconds_left: left.as_secs(),
        };
        let Figures { opened, not_opened, .. } = self.figures;
        let open = self.ledger.live(Instant::now()).map(door).collect();
        (Doors { opened, not_opened, over_rate, open }, self.gate.last().seen, self.gate.last().lost)
    }

    /// Looks after what runs out by itself, and tells what was counted. Call it a few times a second.
    ///
    /// # Errors
    /// The kernel's.
    pub fn tick(&mut self) -> io::Result<()> {
        let (now, unix_now) = (Instant::now(), unix_now());
        let last = self.last_tick;
        if now.duration_since(last.0) < TICK {
            return Ok(());
        }
        self.last_tick = (now, unix_now);
        let closed = self.ledger.forget(now);
        for (Door { source, port, .. }, Hold { user, service, .. }) in &closed {
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
        if now.duration_since(self.last_telling) >= TELLING {
            self.last_telling = now;
            self.tell();
        }
        Ok(())
    }

    /// Tells what was counted since the last time.
    fn tell(&mut self) {
        self.gate.call(&[Command::Count]).ok();
        let lost = self.gate.last().lost;
        match lost.saturating_sub(std::mem::replace(&mut self.figures.lost, lost)) {
            0 => {}
            lost => warn!(lost, "the engine is slower than the SYNs come: some were dropped unseen"),
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

/// What makes an element so from this time on, or takes it away.
fn command((element, time): (Element, Option<Time>), clock: Duration) -> Command {
    match time {
        Some((left, comment)) => Command::Put(element, clock + left, comment),
        None => Command::Delete(element),
    }
}
