//! A reload, and who loads the table: the engine knows the order, and root does each step when it is told to. No knock is lost: the
//! queue stays bound, what is new is prepared beside the work, and the table changes in one transaction.

use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::{EngineError, Process};
use crate::nft;
use crate::serve::channel::Message;
use crate::serve::clock::unix_now;
use crate::serve::control::Reply;
use crate::serve::handover;
use crate::serve::report::Reloaded;
use crate::serve::visitors::Asker;
use crate::serve::writer::{Prepared, Work};

/// Time between two looks at a table that others have to load.
const LOOK: Duration = Duration::from_secs(1);

/// Time that it may take to prepare for what is new.
const PREPARING: Duration = Duration::from_secs(60);

/// Who may wait for a reload at most: each holds a descriptor.
const MAX_ASKERS: usize = 64;

/// Why a configuration cannot be put in force while the disk does not answer, and what to do.
const WAITS_FOR_DISK: &str = "the counters of its users cannot be read, for the disk does not answer";
const DISK_HINT: &str = "look after the disk; the configuration is read again when it answers";

/// What goes on.
#[derive(Default)]
pub(super) enum Step {
    /// Nothing.
    #[default]
    Idle,
    /// Root looks for the first time whether the table that others load is there.
    Starting,
    /// The same later, when it was not.
    Looking,
    /// Root has the configuration read.
    Reading,
    /// These settings were read; root looks whether their table would load.
    Checking(OwnedFd),
    /// The other thread understands them, until then at most.
    Preparing(Instant),
    /// Root tells the gate of them.
    Permitting,
    /// Root ends what was before.
    Enforcing,
    /// Root loads the table.
    Loading,
    /// Root keeps the table for the next boot.
    Keeping,
}

/// The reload that goes on, and who waits for it.
#[derive(Default)]
pub(super) struct Reload {
    step: Step,
    /// The table changes.
    differs: bool,
    askers: Vec<Asker>,
    /// Who came too late for it: the files may have changed since it read them.
    late: Option<Vec<Asker>>,
    /// The other thread has settings that it could not yet prepare, because the disk does not answer.
    pub(super) waits_for_disk: bool,
    /// When the configuration was last read again, in Unix seconds, and whether it was taken.
    pub(super) last: Option<Reloaded>,
    /// The table is not what it should be, and it is for others to load it: when to look again.
    pub(super) look: Option<Instant>,
    /// Times that root was told to load the table, and has not yet.
    loads: u32,
    /// What was prepared.
    next: Option<Box<Prepared>>,
}

impl Process {
    /// Has the configuration read, while everything goes on; once more if that is being done already.
    pub(super) fn reload(&mut self, asker: Option<Asker>) -> Result<(), EngineError> {
        if !matches!(self.reload.step, Step::Idle) {
            let late = self.reload.late.get_or_insert_default();
            match asker {
                Some(asker) if late.len() >= MAX_ASKERS => asker.reply(Reply::Refused {
                    message: "the daemon cannot do this now: too many wait for a reload".to_owned(),
                    hint: "try again".to_owned(),
                }),
                asker => late.extend(asker),
            }
            return Ok(());
        }
        self.reload.askers.extend(asker);
        self.go_on(Step::Reading, Message::Read)
    }

    fn go_on(&mut self, step: Step, message: Message) -> Result<(), EngineError> {
        self.reload.step = step;
        Ok(self.root.send(message, &[])?)
    }

    /// Root has done what was asked, and `listed` what there is of tables, where that was it.
    pub(super) fn done(&mut self, same: bool, listed: Option<OwnedFd>) -> Result<(), EngineError> {
        match std::mem::take(&mut self.reload.step) {
            Step::Starting => {
                let is_right = is_right(listed)?;
                if is_right {
                    self.begin()?;
                }
                self.root.send(if is_right { Message::Ready } else { Message::Unable }, &[])?;
                self.reload_once_more()
            }
            Step::Looking => {
                if is_right(listed)? {
                    self.found()?;
                } else {
                    self.missed()?;
                }
                self.reload_once_more()
            }
            Step::Checking(_) if !self.reconciler.owns_table() && !is_right(listed)? => {
                let file = &self.outline.include_file;
                let hint = format!("knockq ruleset --output {file}; load nftables.conf; reload again");
                let why = "table inet knockq is not there, or not that of this configuration (ruleset = \"external\")";
                self.refuse_reload(why, &hint)
            }
            Step::Checking(settings) => {
                self.reload.differs = !same;
                self.prepare(settings)
            }
            Step::Permitting => {
                if let Some(next) = self.reload.next.take() {
                    let Prepared { verifier, policy, outline } = *next;
                    self.verifier.replace_with(verifier);
                    self.figures.keep(self.verifier.users());
                    self.reconciler.enforce(policy)?;
                    self.outline = outline;
                }
                self.go_on(Step::Enforcing, Message::Enforce)
            }
            Step::Enforcing if !self.reconciler.owns_table() => {
                self.reload.look = self.reload.look.map(|_| Instant::now()); // it may be right by now
                self.go_on(Step::Keeping, Message::Reloaded)
            }
            Step::Enforcing if self.reload.differs => {
                self.reconciler.released()?;
                self.reload.step = Step::Loading;
                // One that root was told of before comes after what is in force by now.
                if self.reload.loads == 0 { self.load() } else { Ok(()) }
            }
            Step::Enforcing => self.go_on(Step::Keeping, Message::Reloaded),
            Step::Keeping => self.reloaded(),
            _ => Err(unexpected()),
        }
    }

    /// Has the other thread understand new settings.
    fn prepare(&mut self, settings: OwnedFd) -> Result<(), EngineError> {
        match self.writing.work.try_send(Work::Prepare(settings)) {
            Ok(()) => self.reload.step = Step::Preparing(Instant::now() + PREPARING),
            Err(mpsc::TrySendError::Full(_)) => {
                self.refuse_reload(WAITS_FOR_DISK, "look after the disk; then reload again")?;
            }
            Err(mpsc::TrySendError::Disconnected(_)) => return Err(EngineError::WriterGone),
        }
        Ok(())
    }

    /// The settings were read.
    pub(super) fn read(&mut self, settings: OwnedFd) -> Result<(), EngineError> {
        if !matches!(self.reload.step, Step::Reading) {
            return Err(unexpected());
        }
        if self.reload.waits_for_disk {
            return self.refuse_reload(WAITS_FOR_DISK, DISK_HINT);
        }
        self.go_on(Step::Checking(settings), Message::Check)
    }

    /// The other thread has understood the settings, or cannot.
    pub(super) fn prepared(&mut self, next: Option<Box<Prepared>>) -> Result<(), EngineError> {
        if !matches!(self.reload.step, Step::Preparing(_)) {
            // The disk has answered: what was refused for it is read again, for the files may have changed.
            self.reload.waits_for_disk = false;
            return self.reload(None);
        }
        if next.is_none() {
            return self.refuse_reload("the counters of its users cannot be read", "journalctl -u knockq");
        }
        self.reload.next = next;
        self.go_on(Step::Permitting, Message::Permit)
    }

    /// Root has not done it, and tells why, and what to do.
    pub(super) fn refused(&mut self, why: OwnedFd) -> Result<(), EngineError> {
        let why = handover::unseal_text(why)?;
        let (why, hint) = why.split_once('\n').unwrap_or((&why, ""));
        match std::mem::take(&mut self.reload.step) {
            Step::Reading | Step::Checking(_) => self.refuse_reload(why, hint),
            Step::Starting => {
                error!("what is loaded cannot be compared: {why}");
                Ok(self.root.send(Message::Unable, &[])?)
            }
            Step::Looking => {
                self.missed()?;
                self.reload_once_more()
            }
            _ => Err(unexpected()),
        }
    }

    fn refuse_reload(&mut self, why: &str, hint: &str) -> Result<(), EngineError> {
        self.reload.last = Some(Reloaded { at: unix_now(), taken: false });
        error!(hint, "not reloaded: {why}; the configuration of before stays in force");
        let message = format!("not reloaded: {why}; the configuration of before stays in force");
        self.root.send(Message::Kept, &[])?;
        self.end_reload(|| Reply::Refused { message: message.clone(), hint: hint.to_owned() })
    }

    fn reloaded(&mut self) -> Result<(), EngineError> {
        let (users, services, knock_ports) = (self.outline.users, self.outline.services, &self.outline.knock_ports);
        info!(users, services, knock_ports, "reloaded");
        self.reload.last = Some(Reloaded { at: unix_now(), taken: true });
        self.reconciler.warn_of_cuts(std::mem::take(&mut self.outline.connected));
        self.end_reload(|| Reply::Done)
    }

    fn end_reload(&mut self, reply: impl Fn() -> Reply) -> Result<(), EngineError> {
        self.reload.step = Step::Idle;
        self.reload.askers.drain(..).for_each(|asker| asker.reply(reply()));
        self.reload_once_more()
    }

    /// For those who came too late for the last one, if there are any.
    fn reload_once_more(&mut self) -> Result<(), EngineError> {
        let Some(late) = self.reload.late.take() else { return Ok(()) };
        self.reload.askers.extend(late);
        self.reload(None)
    }

    /// The table is loaded: for the first time, because it was lost, or because it is another.
    pub(super) fn loaded(&mut self) -> Result<(), EngineError> {
        if !self.reconciler.serves() {
            if !self.reconciler.owns_table() {
                return self.go_on(Step::Starting, Message::Check);
            }
            self.begin()?;
            return Ok(self.root.send(Message::Ready, &[])?);
        }
        self.reconciler.loaded()?;
        self.reload.loads = self.reload.loads.saturating_sub(1);
        if matches!(self.reload.step, Step::Loading) {
            return if self.reload.loads == 0 { self.go_on(Step::Keeping, Message::Reloaded) } else { Ok(()) };
        }
        warn!("somebody else changed or deleted table inet knockq: it is loaded again, and open doors are open again");
        Ok(())
    }

    /// The gate stands for the first time.
    fn begin(&mut self) -> Result<(), EngineError> {
        self.reconciler.loaded()?;
        self.reconciler.warn_of_cuts(std::mem::take(&mut self.outline.connected));
        if self.reconciler.owns_table() && !self.reconciler.is_ours_alone() {
            let hint = format!("include \"{}\" in /etc/nftables.conf", self.outline.include_file);
            info!(
                hint,
                "others can flush the gate, for this kernel is older than Linux 6.9 or a plain table was there"
            );
        }
        Ok(())
    }

    /// The table is lost. Whoever is to load it does; the gate is open until then.
    pub(super) fn lost(&mut self) -> Result<(), EngineError> {
        if self.reconciler.owns_table() {
            return self.load();
        }
        self.reload.look.get_or_insert_with(Instant::now);
        self.look()
    }

    fn load(&mut self) -> Result<(), EngineError> {
        self.reload.loads = self.reload.loads.saturating_add(1);
        Ok(self.root.send(Message::Load, &[])?)
    }

    /// Looks whether others have loaded the table, if it is time for that and nothing else goes on.
    fn look(&mut self) -> Result<(), EngineError> {
        let is_time = self.reload.look.is_some_and(|look| look <= Instant::now());
        if is_time && matches!(self.reload.step, Step::Idle) {
            self.go_on(Step::Looking, Message::Check)?;
        }
        Ok(())
    }

    /// Others have loaded the table.
    fn found(&mut self) -> Result<(), EngineError> {
        self.reconciler.loaded()?;
        if self.reload.look.take().is_some() && std::mem::take(&mut self.has_complained) {
            info!("table inet knockq is as it should be again, and open doors are open again");
            self.root.send(Message::Found, &[])?;
        }
        Ok(())
    }

    /// They have not.
    fn missed(&mut self) -> Result<(), EngineError> {
        self.reload.look = Some(Instant::now() + LOOK);
        if !std::mem::replace(&mut self.has_complained, true) {
            let hint = format!("nft -f {}", self.outline.include_file);
            error!(
                hint,
                "somebody else changed or deleted table inet knockq: until it is loaded, guarded ports may be open"
            );
            self.root.send(Message::Lost, &[])?;
        }
        Ok(())
    }

    /// What time alone brings.
    pub(super) fn mind_the_time(&mut self) -> Result<(), EngineError> {
        if matches!(self.reload.step, Step::Preparing(until) if until <= Instant::now()) {
            self.reload.waits_for_disk = true; // its lookups go on, and a new daemon would wait for the same disk
            return self.refuse_reload(WAITS_FOR_DISK, DISK_HINT);
        }
        self.look()
    }
}

/// Whether the table that is there is the one that there should be.
fn is_right(listed: Option<OwnedFd>) -> Result<bool, EngineError> {
    let listed = handover::unseal_text(listed.ok_or_else(unexpected)?)?;
    let mut parts = listed.split('\0');
    let mut part = || parts.next().unwrap_or_default();
    Ok(nft::is_as_it_should_be([part(), part(), part(), part()]))
}

pub(super) fn unexpected() -> EngineError {
    std::io::Error::from(std::io::ErrorKind::InvalidData).into()
}
