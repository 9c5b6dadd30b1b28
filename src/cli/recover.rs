//! `knockq recover`

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use clap::Args;

use super::failure::{CONFIGURATION, Failure};
use super::{ConfigArg, note, print};
use crate::client::clock::{is_synchronized, unix_now};
use crate::config::secure_file::{self, Draft, Privacy};
use crate::config::{Seconds, ServerConfig};
use crate::serve::configuration::refuse_taken_queue;
use crate::serve::engine::EngineError;
use crate::serve::store::{OldStore, Store, StoreError, StoreFloor};

/// What is left where a store holds what knockq has not written.
const WAY_OUT: &str = "knockq has not written that, so trust neither this store nor the keys: make both anew with `knockq init` in \
                       new directories, copy the services and users.d, and give all users new profiles";

#[derive(Args)]
#[command(after_help = "Example:\n  systemctl stop knockq && knockq recover && systemctl start knockq\n\n\
                        For a store that is lost, or that was restored from a backup or snapshot and so has forgotten\n\
                        knocks. The new one takes no counter up to now + window, which all that were accepted before are;\n\
                        users can knock again once the clock has passed that. So set the clock first. The old store is\n\
                        kept beside the new one. It does no harm to run this twice.")]
pub(super) struct Recover {
    /// How far this machine's clock was ahead of the right time before the loss, if it was
    #[arg(long, value_name = "DURATION", default_value = "0s")]
    ahead: Seconds,
    #[command(flatten)]
    config: ConfigArg,
}

impl Recover {
    pub(super) fn run(self) -> Result<(), Failure> {
        let config = ServerConfig::load(&self.config.config)?;
        // A daemon whose store was deleted goes on with a file that has no name any more, and so no lock to be seen.
        refuse_taken_queue(config.queue).map_err(|error| is_running(&error.to_string()))?;
        let path = config.store_path();
        let old = Old::find(&path)?;
        let now = unix_now();
        old.refuse_absurd_floor(&path, now, &config)?;
        warn_of_clock(now, &old, &config);

        secure_file::create_directory(&config.state)?;
        let window = u64::from(config.window.0).saturating_add(self.ahead.0.into());
        let safe = StoreFloor::after(now, window, config.registry()?.counted());
        let (draft, file) = Draft::new(&path, Privacy::Secret)?;
        Store::create_after(&old.remains, file, config.private_key.public(), safe)
            .map_err(|cause| Failure::new(format!("{}: {cause}", path.display())))?;
        let kept = old.keep_aside(&path, now)?;
        draft.install()?;
        print(&report(&path, kept.as_deref(), &old))?;
        print(&waiting(now, safe.floor, &old.remains, &config))
    }
}

/// The store that is to be replaced, if there is one.
struct Old {
    is_there: bool,
    remains: OldStore,
    /// Why nothing of it can be taken over.
    damage: Option<StoreError>,
}

impl Old {
    fn find(path: &Path) -> Result<Self, Failure> {
        let lost = || Self { is_there: false, remains: OldStore::default(), damage: None };
        let file = match secure_file::open(path, Privacy::Secret, OpenOptions::new().read(true).write(true)) {
            Err(error) if error.kind() == Some(ErrorKind::NotFound) => return Ok(lost()),
            other => other?,
        };
        match OldStore::read(file) {
            Ok(remains) => Ok(Self { is_there: true, remains, damage: None }),
            Err(StoreError::InUse) => Err(is_running(&format!("{}: {}", path.display(), StoreError::InUse))),
            Err(cause @ StoreError::Newer(_)) => {
                Err(EngineError::Store { path: path.display().to_string(), cause }.into())
            }
            Err(damage) => Ok(Self { is_there: true, damage: Some(damage), ..lost() }),
        }
    }

    /// A floor is never lowered, so with one that no clock comes to nobody could ever knock again.
    fn refuse_absurd_floor(&self, path: &Path, now: u64, config: &ServerConfig) -> Result<(), Failure> {
        let floor = self.remains.floor();
        if !is_no_time(floor, now, config) {
            return Ok(());
        }
        let message = format!(
            "{}: takes no knock up to counter {floor}, and a counter is a Unix time: no clock comes to that",
            path.display()
        );
        Err(Failure::new(message).hint(WAY_OUT).code(CONFIGURATION))
    }

    /// A copy of it, so that there is a store at every moment until the new one takes its place. A second name would do
    /// for that, but not let it be told for what it is when it is put back: one that has forgotten what came after it.
    fn keep_aside(&self, path: &Path, now: u64) -> Result<Option<PathBuf>, Failure> {
        if !self.is_there {
            return Ok(None);
        }
        let name = |number: u64| path.with_extension(format!("redb.{number}"));
        let free = (now..).map(name).find(|name| !name.exists()).unwrap_or_else(|| name(now));
        let mut old = secure_file::open(path, Privacy::Secret, OpenOptions::new().read(true))?;
        let (draft, mut copy) = Draft::new(&free, Privacy::Secret)?;
        io::copy(&mut old, &mut copy)
            .and_then(|_| copy.sync_all())
            .map_err(|cause| Failure::new(format!("{}: {cause}", free.display())))?;
        draft.install()?;
        Ok(Some(free))
    }
}

/// Whether no clock comes to this counter. Whatever took it was ahead by more than a clock can have been, as `--ahead` has it.
fn is_no_time(n: u64, now: u64, config: &ServerConfig) -> bool {
    let [window, ahead] = [config.window, Seconds(u32::MAX)].map(|seconds| u64::from(seconds.0));
    n > now.saturating_add(window).saturating_add(ahead)
}

fn is_running(cause: &str) -> Failure {
    Failure::new(format!("recover: the daemon runs: {cause}")).hint("stop it first: systemctl stop knockq")
}

/// With a clock that is behind, knocks of the past look like knocks to come.
fn warn_of_clock(now: u64, old: &Old, config: &ServerConfig) {
    if !is_synchronized() {
        note("warning: the kernel says that this machine's clock is not synchronised; the new store rests on it");
    }
    let end = now.saturating_add(config.window.0.into());
    if let Some(highest) = old.remains.highest().filter(|highest| *highest > end) {
        note(&format!(
            "warning: the old store took a counter that is {} s ahead of this machine's clock. \
             If the clock is behind now, set it and run this again; if it was ahead then, give --ahead",
            highest - now
        ));
    }
}

fn report(path: &Path, kept: Option<&Path>, old: &Old) -> String {
    let fate = match (kept, &old.damage) {
        (None, _) => "There was no old one".to_owned(),
        (Some(kept), None) => {
            format!(
                "The old one is kept as {}; the counters of its {} keys are taken over",
                kept.display(),
                old.remains.len()
            )
        }
        (Some(kept), Some(damage)) => {
            format!("The old one {damage}: nothing is taken over, it is kept as {}", kept.display())
        }
    };
    format!("Made a new counter store: {}\n{fate}.\n", path.display())
}

fn waiting(now: u64, floor: u64, remains: &OldStore, config: &ServerConfig) -> String {
    let mut text = format!(
        "No knock of before can be replayed. Users can knock again in {} s\n",
        remains.floor().max(floor).saturating_sub(now).saturating_add(1)
    );
    for user in &config.users {
        if user.knockknock.is_some() {
            let _ = writeln!(
                text,
                "{0} has a knockknock profile, and waits until its count is set: knockq user counter {0} NUMBER",
                user.name
            );
        } else if let Some(last) =
            remains.last(&user.public_key, config.private_key.public()).filter(|last| *last > floor)
        {
            let name = &user.name;
            let _ = if is_no_time(last, now, config) {
                writeln!(
                    text,
                    "{name} can knock no more, for no clock comes to counter {last}, which is spent. {WAY_OUT}"
                )
            } else {
                let wait = last.saturating_sub(now).saturating_add(1);
                writeln!(text, "{name} has spent a counter ahead of that, and can knock again in {wait} s")
            };
        }
    }
    text.push_str("Next: start the daemon, for example with `systemctl start knockq`\n");
    text
}
