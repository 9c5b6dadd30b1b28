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
use super::ledger::{Grant, Ledger};
use super::past::Past;
use super::policy::Policy;
use super::rate::Rate;
use super::repeats::Tally;
use super::report::{DoorsPart, LiveDoor, RevokedPart};
use super::watchers::CLOSING;
use crate::nft::{
    Boot, Comment, Door, Element, ElementError, Layout, Lister, Loss, Member, Open, OpenDoor, SetError, SetName, Time,
    Watch, without_door,
};
use crate::service::{Name, Port};
use crate::verify::{self, Withdrawal};

/// Time between two looks at what has run out.
const TICK: Duration = Duration::from_secs(1);

/// Time between two tellings of what was counted.
const TELLING: Duration = Duration::from_secs(10);

/// The clock may differ by so many seconds from one tick to the next before it was set.
const CLOCK_STEP: u64 = 2;

/// Connections that are told of when they are cut.
const CUTS_TOLD: usize = 8;

/// What to do about doors that were saved.
const SAVING: &str = "save all tables but knockq's: docs/guide-server.md#saving-the-firewall";

/// What makes a set that sources can be added to.
const SETS_HINT: &str = "nft add set FAMILY TABLE SET '{ type ipv4_addr; flags timeout; }', or ipv6_addr";

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
            past: Past::default(),
            figures: Figures::default(),
            last_tick: (now, unix_now()),
            last_telling: now,
        }
    }

    /// The table is loaded: the first time, takes over the doors that are open, and shuts those that nobody may open any more;
    /// later, opens those that went with the old one.
    ///
    /// # Errors
    /// Whatever makes it useless to go on.
    pub fn loaded(&mut self) -> io::Result<()> {
        self.gate.call(&[Command::Count]).ok(); // it has another number now
        if self.serves {
            return self.take_table_back();
        }
        self.watch.loss(self.gate.numbers())?; // the loading has deleted the rules of before
        self.watch.take_loaded(); // they are listed
        self.loss = self.take_unmended();
        if self.loss != Loss::Nothing {
            self.ask_for_load();
        }
        self.forget_begun();
        let compared = self.compare(true);
        self.gate.check()?;
        compared.map_err(io::Error::other)?;
        let (ledger, clock, now) = (&self.ledger, monotonic(), Instant::now());
        let known = ledger.ends(now).map(|(door, left)| Command::Known(Element::Opens(*door), clock + left));
        let known: Vec<_> = known.collect();
        known.chunks(BATCH).for_each(|some| drop(self.gate.call(some)));
        self.look_at_sets();
        self.shut_what_policy_forbids()?;
        self.serves = true;
        self.drain_table_events()?; // what was lost meanwhile is to be told
        self.gate.check()
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

    /// Root is to load the table again; told once.
    pub const fn take_lost(&mut self) -> bool {
        std::mem::replace(&mut self.is_to_be_loaded, false)
    }

    /// Whether [`Reconciler::settle_some`] has something to do.
    pub fn is_behind(&self) -> bool {
        self.ledger.is_unsettled()
    }

    /// Whoever owns the table: root takes it from the gate before it loads another.
    fn ask_for_load(&mut self) {
        self.expect_load();
        self.is_to_be_loaded = true;
    }

    /// From here on what is changed besides the load may have been changed after it.
    fn expect_load(&mut self) {
        self.is_loading = true;
        self.watch.take_unmended(0);
    }

    /// What others have changed of the table since a load was expected.
    fn take_unmended(&mut self) -> Loss {
        // Those who load a table themselves do so before root looks at it.
        let loads = usize::from(self.policy.owns_table);
        self.watch.take_unmended(loads)
    }

    /// Reads what was changed of the table, and what of it was lost. A door that somebody deleted by hand is taken back: it must
    /// not come again with the next restoration.
    ///
    /// # Errors
    /// The kernel's.
    pub fn drain_table_events(&mut self) -> io::Result<()> {
        self.read_changes()?;
        let now = Instant::now();
        let made = self.watch.take_new_sets();
        self.layouts.retain(|set, _| !made.contains(set));
        self.ledger.mark_sets(&made);
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
        let of_ours = loaded.members.into_iter().filter(|member| self.sets.contains(&member.set));
        of_ours.for_each(|member| self.ledger.mark_member(member));
        if loaded.are_missed {
            self.layouts.clear(); // sets may have been made anew
        }
        if loaded.are_missed || std::mem::take(&mut self.is_unlisted) {
            // There is nothing to list until the table is loaded again.
            self.is_unlisted = self.compare(false).is_err();
        }
        // Nobody can take away what we own, nor could root load it.
        if self.loss != Loss::Nothing && self.serves && !self.gate.last().owns_table && !self.is_loading {
            self.ask_for_load();
        }
        Ok(())
    }

    fn read_changes(&mut self) -> io::Result<()> {
        let loss = self.watch.loss(self.gate.numbers())?;
        self.note_loss(loss);
        Ok(())
    }

    fn note_loss(&mut self, loss: Loss) {
        if !self.gate.last().owns_table {
            self.lose(loss); // nobody can take away what we own; what was missed is listed
        }
    }

    fn lose(&mut self, loss: Loss) {
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
        let changed = if commands.is_empty() { Ok(Vec::new()) } else { self.gate.call(&commands) };
        self.gate.check()?;
        self.drain_table_events()?;
        match changed {
            Ok(_) => changes.iter().for_each(|(element, _)| self.settled(element)),
            Err(error) if changes.len() == 1 => {
                changes.into_iter().for_each(|(element, _)| self.not_settled(element, &error));
            }
            Err(_) => changes.into_iter().for_each(|(element, _)| self.settle_alone(element)),
        }
        Ok(())
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
        if self.gate.check().is_err() {
            return; // that is the end, and is told
        }
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
        let [open, live] = self.gate.listed()?;
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
            let listed = match self.gate.members(set) {
                Ok(listed) => listed,
                Err(error) => {
                    let is_told = matches!(error, ElementError::NoSet) || self.gate.check().is_err();
                    if !is_told && self.not_added.is_first() {
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

    /// Root is about to load another table, which the gate has let go of, or is about to.
    ///
    /// # Errors
    /// The kernel's.
    pub fn released(&mut self) -> io::Result<()> {
        self.read_changes()?;
        self.gate.released();
        if !self.is_loading {
            self.is_loading = true; // what is lost now is loaded anyway
            self.drain_table_events()?;
            self.expect_load();
        }
        Ok(())
    }

    /// Takes back what is meant, and tells at which doors connections may have begun.
    ///
    /// # Errors
    /// The kernel's.
    pub fn revoke(&mut self, selection: &Selection) -> io::Result<RevokedPart> {
        self.drain_table_events()?;
        self.shut("revoked", |door, grant| selection.covers(door.source, &grant.user))?;
        self.forget_begun();
        self.gate.check()?; // or it is not done
        Ok(self.revoked(selection, Instant::now()))
    }

    fn take_table_back(&mut self) -> io::Result<()> {
        self.drain_table_events()?;
        let loss = self.loss;
        self.is_loading = false;
        // The loading itself has deleted rules, and added them. What others have changed meanwhile is another loss.
        let unmended = self.take_unmended();
        if unmended == Loss::Nothing {
            self.loss = Loss::Nothing;
            if loss == Loss::Doors {
                self.ledger.mark_all();
            }
            self.ledger.resume();
        } else {
            self.lose(unmended);
            self.ask_for_load();
        }
        self.drain_table_events()
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
        self.ledger.remove_members(|grant, member| policy.adds(&grant.user, &grant.service, &member.set));
        self.shut("shut", |door, grant| !policy.still_permits(door, grant, now, unix_now))
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
    fn shut(&mut self, how: &str, is_meant: impl Fn(&Door, &Grant) -> bool) -> io::Result<()> {
        let (gone, now) = (self.ledger.remove(is_meant), Instant::now());
        for (Door { source, port, .. }, Grant { user, service, until, .. }) in &gone {
            if *until > now {
                info!(%user, %service, %source, %port, "{how}");
            }
        }
        self.past.add(&gone, now);
        self.settle()
    }

    /// Looks what the administrator's sets take; tells which are missing or cannot be used, before somebody knocks.
    fn look_at_sets(&mut self) {
        self.layouts.clear();
        for set in self.policy.clone().sets() {
            if let Err(error) = self.layout(set)
                && self.gate.check().is_ok()
            {
                warn!(hint = SETS_HINT, "who knocks is not added: {error}");
            }
        }
    }

    fn layout(&mut self, set: &SetName) -> Result<Layout, SetError> {
        if let Some(layout) = self.layouts.get(set) {
            return Ok(*layout);
        }
        let layout = self.gate.layout(set)?;
        self.layouts.insert(set.clone(), layout);
        Ok(layout)
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

    /// What a user's source is in the administrator's sets, as long as this door is open.
    fn members_of(&mut self, user: &Name, door: &Door) -> Vec<Member> {
        let sets = self.policy.users.get(user).map(|allowance| allowance.add_to.clone()).unwrap_or_default();
        let mut members = Vec::new();
        for set in sets {
            match self.layout(&set) {
                Ok(layout) => members.extend(set.member(layout, door)),
                Err(error) if self.gate.check().is_ok() && self.not_added.is_first() => {
                    warn!(%user, source = %door.source, hint = SETS_HINT, "not added: {error}");
                }
                Err(_) => {}
            }
        }
        members
    }

    /// Doors are to be open for the time of a grant, as the next settling has it.
    pub fn grant(&mut self, granted: verify::Grant) {
        let verify::Grant { user, service, source, ports, open_for, once, bound, token, .. } = granted;
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
            self.open(door, Grant { user, service, until, bound, token, kill, spent, members, asked, waits });
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

    /// What there is to tell.
    pub fn part(&mut self) -> DoorsPart {
        self.gate.call(&[Command::Count]).ok(); // it has counted on
        let door = |(door, grant, left): (&Door, &Grant, Duration)| LiveDoor {
            source: door.source,
            port: door.port,
            once: door.once,
            user: grant.user.clone(),
            service: grant.service.clone(),
            seconds_left: left.as_secs(),
        };
        let Figures { opened, not_opened, .. } = self.figures;
        let doors = self.ledger.live(Instant::now()).map(door).collect();
        let (seen, lost) = (self.gate.last().seen, self.gate.last().lost);
        DoorsPart { seen, lost, opened, not_opened, doors, is_cut: false }
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
