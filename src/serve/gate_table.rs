//! The table, as root tends it: loaded, or only checked where the host's own nftables.conf loads it.

use std::iter;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;
use tracing::{error, info, warn};

use crate::config::secure_file::{self, Privacy};
use crate::config::server::RulesetMode;
use crate::nft::{self, Ruleset, TableError};
use crate::service::Port;

/// Times that the table is loaded again before giving up, and the time between.
const RESTORE_TRIES: u32 = 100;
const RESTORE_PAUSE: Duration = Duration::from_millis(10);

/// Connections that are told of when they are cut.
const CUTS_TOLD: usize = 8;

/// Why the gate does not stand.
#[derive(Debug, Error)]
pub enum GateError {
    /// It could not be loaded.
    #[error(transparent)]
    Table(#[from] TableError),
    /// It is for others to load, and they have not.
    #[error("table inet knockq is not there, or not that of this configuration (ruleset = \"external\")")]
    NotLoaded {
        /// The include file.
        include_file: PathBuf,
    },
}

impl GateError {
    /// What to do before the next reload.
    pub(super) fn hint(&self) -> String {
        match self {
            Self::Table(_) => "knockq ruleset --check".to_owned(),
            Self::NotLoaded { include_file } => {
                format!("knockq ruleset --output {}; load nftables.conf; reload again", include_file.display())
            }
        }
    }
}

/// The table and who loads it.
pub(super) struct GateTable {
    ruleset: Ruleset,
    mode: RulesetMode,
    include_file: PathBuf,
    /// Nobody else can change or flush it.
    is_ours_alone: bool,
}

impl GateTable {
    pub(super) const fn new(ruleset: Ruleset, mode: RulesetMode, include_file: PathBuf) -> Self {
        Self { ruleset, mode, include_file, is_ours_alone: false }
    }

    /// Others load the table.
    pub(super) fn is_for_others(&self) -> bool {
        self.mode == RulesetMode::External
    }

    /// Nobody else can change or flush the table.
    pub(super) const fn is_ours_alone(&self) -> bool {
        self.is_ours_alone
    }

    /// Whether this ruleset would make another table.
    pub(super) fn differs_from(&self, ruleset: &Ruleset) -> bool {
        self.ruleset != *ruleset
    }

    /// Sees to it that the table is there as it should be.
    pub(super) fn raise(&mut self) -> Result<(), GateError> {
        match self.mode {
            RulesetMode::External => self.expect_live(&self.ruleset),
            RulesetMode::Managed => {
                warn_of_cuts(&self.ruleset, |_| true);
                // A gate of before let the server's answers pass, whoever had begun.
                let kept = secure_file::read(&self.include_file, Privacy::Public);
                if kept.is_ok_and(|kept| nft::is_of_before(&kept)) || !nft::exists().map_err(TableError::from)? {
                    keep_sessions(&self.ruleset, |_| true);
                }
                self.is_ours_alone = self.install()?;
                nft::remove_of_before();
                self.keep();
                Ok(())
            }
        }
    }

    /// Says so if others can flush it.
    pub(super) fn say_who_can_flush_it(&self) {
        if self.mode == RulesetMode::Managed && !self.is_ours_alone {
            let hint = format!("include \"{}\" in /etc/nftables.conf", self.include_file.display());
            info!(
                hint,
                "others can flush the gate, for this kernel is older than Linux 6.9 or a plain table was there"
            );
        }
    }

    /// Whether [`GateTable::replace`] would work.
    pub(super) fn could_become(&self, ruleset: &Ruleset) -> Result<(), GateError> {
        match self.mode {
            RulesetMode::External => self.expect_live(ruleset),
            RulesetMode::Managed => Ok(nft::check(&ruleset.for_check()).map_err(TableError::from)?),
        }
    }

    /// Replaces the table by that of another ruleset, or leaves it as it is. What others load is only expected from now on.
    pub(super) fn replace(&mut self, ruleset: Ruleset) -> Result<(), GateError> {
        let mut next = Self::new(ruleset, self.mode, self.include_file.clone());
        if self.mode == RulesetMode::Managed {
            warn_of_cuts(&next.ruleset, |port| !self.ruleset.kill.contains(port));
            keep_sessions(&next.ruleset, |port| !self.ruleset.guarded.contains(port));
            next.is_ours_alone = next.install_in_spite_of_others()?; // nobody owns the table at this moment
        }
        *self = next;
        Ok(())
    }

    /// Somebody changed or deleted the table: loads it again; `false` if that is for others to do, and they have not yet.
    ///
    /// The gate is open until this is done. Whoever deleted the table may still be at it.
    pub(super) fn restore(&self) -> Result<bool, GateError> {
        if self.mode == RulesetMode::External {
            return Ok(self.is_live());
        }
        self.install_in_spite_of_others()?;
        warn!("somebody else changed or deleted table inet knockq: it is loaded again, and open doors are open again");
        Ok(true)
    }

    /// Says what others have to do.
    pub(super) fn complain(&self) {
        let hint = format!("nft -f {}", self.include_file.display());
        error!(
            hint,
            "somebody else changed or deleted table inet knockq: until it is loaded, guarded ports may be open"
        );
    }

    /// Whatever happened: if the table is gone, the gate must not stay open. If we own it, it cannot be.
    pub(super) fn leave_shut(&self) {
        if self.mode == RulesetMode::Managed {
            let _ = self.install();
        }
    }

    fn install(&self) -> Result<bool, TableError> {
        nft::install(&self.ruleset.to_string())
    }

    /// Whoever flushes all tables may be at it still.
    fn install_in_spite_of_others(&self) -> Result<bool, TableError> {
        for _ in 1..RESTORE_TRIES {
            if let Ok(installed) = self.install() {
                return Ok(installed);
            }
            std::thread::sleep(RESTORE_PAUSE);
        }
        self.install()
    }

    fn is_live(&self) -> bool {
        nft::is_live(&self.ruleset).unwrap_or(false)
    }

    fn expect_live(&self, ruleset: &Ruleset) -> Result<(), GateError> {
        let is_live = nft::is_live(ruleset).map_err(TableError::from)?;
        if is_live { Ok(()) } else { Err(GateError::NotLoaded { include_file: self.include_file.clone() }) }
    }

    /// Keeps the include file beside the configuration what was loaded last, also where somebody has lost or edited it: the
    /// next boot begins with it. What others load is theirs to write.
    pub(super) fn keep(&self) {
        if self.is_for_others() {
            return;
        }
        let text = self.ruleset.to_string();
        let is_kept = secure_file::read(&self.include_file, Privacy::Public).is_ok_and(|kept| *kept == text);
        if !is_kept && let Err(error) = secure_file::replace(&self.include_file, &text, Privacy::Public) {
            warn!("the next boot begins with the gate of before: {error}");
        }
    }
}

/// Connections that are there before their port is guarded live on. What keeps conntrack from knowing them keeps no gate from
/// standing.
fn keep_sessions(ruleset: &Ruleset, is_new: impl Fn(&Port) -> bool) {
    let ports: Vec<Port> = ruleset.guarded.iter().copied().filter(is_new).collect();
    if let Err(error) = nft::track_sessions(&ports) {
        warn!("connections from before the gate may be cut: {error}");
    }
}

/// Says who is cut off when connections to these ports end with their door.
fn warn_of_cuts(ruleset: &Ruleset, is_new: impl Fn(&Port) -> bool) {
    let ports: Vec<Port> = ruleset.kill.iter().copied().filter(is_new).collect();
    for (source, port) in nft::without_door(&ports, &ruleset.trusted, iter::empty()).iter().take(CUTS_TOLD) {
        warn!(%source, %port, "is connected without a door, and cut: on_close = \"kill\"");
    }
}
