//! Why the daemon does not start, or ends.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::control::ControlError;
use super::gate_table::GateError;
use super::sandbox::SandboxError;
use super::vocabulary::Breach;
use crate::config::{ConfigError, FileError};

/// Why root leaves its work.
pub(super) enum Ended {
    /// SIGTERM or SIGINT.
    Asked,
    /// The time of `serve --try` is over.
    Unconfirmed,
    Failed(ServeError),
}

impl<E: Into<ServeError>> From<E> for Ended {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// Why the daemon does not start, or stops.
#[derive(Debug, Error)]
pub enum ServeError {
    /// Not enough privileges to begin with.
    #[error("serve: needs root with CAP_NET_ADMIN")]
    NotRoot,
    /// The configuration is refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The counter store is not there or not safe.
    #[error(transparent)]
    Store(FileError),
    /// It was replaced or taken away while the daemon started.
    #[error("{}: the counter store was replaced or taken away while the daemon started", path.display())]
    StoreReplaced {
        /// The store's file.
        path: PathBuf,
    },
    /// The account is unusable.
    #[error(transparent)]
    Account(#[from] SandboxError),
    /// Another process has the queue.
    #[error("queue {number}: already bound by {owner}")]
    QueueTaken {
        /// Its number.
        number: u16,
        /// The process, as far as the kernel tells.
        owner: String,
    },
    /// The gate's program is not there.
    #[error("{}: no such file: the program that opens the doors", path.display())]
    NoGate {
        /// Where it should be.
        path: PathBuf,
    },
    /// The table is not as it should be.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// The command socket is not to be had.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// `serve --try` cannot undo what others load.
    #[error("serve --try: ruleset = \"external\" leaves the gate to others, so it cannot be undone here")]
    NothingToUndo,
    /// Nobody confirmed in time.
    #[error("not confirmed: the gate is taken away, and the guarded ports are as open as without knockq")]
    NotConfirmed,
    /// A child reported its own error and ended with this code.
    #[error("{process} could not start")]
    ChildFailed {
        /// Which.
        process: &'static str,
        /// Its exit code.
        code: u8,
    },
    /// A child died.
    #[error("{process} {end}; stopping all, and every door closes by its own timeout")]
    ChildDied {
        /// Which.
        process: &'static str,
        /// How.
        end: String,
    },
    /// The kernel killed a child for a system call that is not in its list.
    #[error(
        "{process} was killed for a system call that it never makes (the kernel's log has its number, type=1326): a fault in it, \
         or somebody has taken it over; stopping all, and every door closes by its own timeout"
    )]
    ForbiddenCall {
        /// Which.
        process: &'static str,
    },
    /// A child said or did what none of ours would.
    #[error("{process} broke the protocol: {breach}; stopping all, and every door closes by its own timeout")]
    Breach {
        /// Which.
        process: &'static str,
        /// What.
        breach: Breach,
    },
    /// A child did not do what it was asked.
    #[error("{0} gave no answer within a minute; stopping all, and every door closes by its own timeout")]
    TooSlow(&'static str),
    /// The kernel refused something.
    #[error("serve: {0}")]
    Io(#[from] io::Error),
}
