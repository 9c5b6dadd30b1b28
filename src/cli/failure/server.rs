//! What is wrong on the server, and what to do about it.

use std::io;

use super::{CONFIGURATION, Failure, PERMISSION, USAGE};
use crate::config::FileError;
use crate::nft::{ElementError, NftError, TableError};
use crate::serve::configuration::ServeError;
use crate::serve::control::ControlError;
use crate::serve::engine::EngineError;
use crate::serve::sandbox::SandboxError;
use crate::serve::store::StoreError;

/// What to do where counters cannot be written.
const DISK: &str = "counters must be written before anything is opened: look at the disk, with `df` and `mount`";

impl From<NftError> for Failure {
    fn from(error: NftError) -> Self {
        let failure = Self::new(error.to_string());
        match error {
            NftError::Missing => failure.hint("apt-get install nftables"),
            NftError::Lacks(word) => failure
                .hint(format!(
                    "modprobe {}; else boot a distribution's kernel, or install nftables 0.9.8 or newer",
                    word.module
                ))
                .code(CONFIGURATION),
            NftError::NotPermitted(_) => failure.hint("run this as root").code(PERMISSION),
            NftError::Refused(_) => failure.hint("see the table with `nft list table inet knockq`"),
            NftError::NoTable => failure.hint("the gate does not stand: start `knockq serve`"),
            NftError::Run(_) => failure,
        }
    }
}

impl From<ServeError> for Failure {
    fn from(error: ServeError) -> Self {
        let message = error.to_string();
        match error {
            ServeError::Config(error) => error.into(),
            ServeError::Control(error) => error.into(),
            ServeError::NothingToUndo => {
                Self::new(message).hint("leave --try out, or set ruleset = \"managed\"").code(USAGE)
            }
            ServeError::Store(FileError::Io { path, cause }) if cause.kind() == io::ErrorKind::NotFound => {
                Self::new(format!("{}: the counter store is missing", path.display()))
                    .hint("if it is lost for good, or comes from a backup: knockq recover")
                    .code(CONFIGURATION)
            }
            ServeError::Store(FileError::Io { path, cause }) if cause.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                Self::new(format!("{}: {cause}", path.display())).hint(DISK)
            }
            ServeError::Store(error) => error.into(),
            ServeError::NotRoot => Self::new(message).hint("run it as root: sudo knockq serve").code(PERMISSION),
            ServeError::StoreReplaced { .. } => {
                Self::new(message).hint("start the daemon when `knockq recover` is done")
            }
            ServeError::Account(SandboxError::Step { .. } | SandboxError::NotGone(_)) => Self::new(message),
            ServeError::Account(SandboxError::Unprovable) => Self::new(message)
                .hint("boot Linux 5.9 or newer, with CONFIG_SECCOMP_FILTER as every distribution has it")
                .code(CONFIGURATION),
            ServeError::Account(_) => Self::new(message).code(CONFIGURATION),
            ServeError::QueueTaken { .. } => {
                Self::new(message).hint("is another knockq running? Else set `queue = N` in [server]")
            }
            ServeError::NoProgram { .. } => Self::new(message).hint("install all of them: make install"),
            ServeError::Io(_) => Self::new(message),
        }
    }
}

impl From<ElementError> for Failure {
    fn from(error: ElementError) -> Self {
        TableError::from(error).into()
    }
}

impl From<TableError> for Failure {
    fn from(error: TableError) -> Self {
        match error {
            TableError::Nft(error) => error.into(),
            TableError::Element(_) => Self::new(error.to_string()).hint("is another knockq running? It owns the table"),
        }
    }
}

impl From<ControlError> for Failure {
    fn from(error: ControlError) -> Self {
        let failure = Self::new(error.to_string());
        match error {
            ControlError::NotRunning { .. } => failure.hint("start it: systemctl start knockq"),
            ControlError::HungUp { .. } => {
                failure.hint("journalctl -u knockq says why it ended, if it did; then the same command again")
            }
            ControlError::Taken { .. } => {
                failure.hint("is another knockq running? Else set another `runtime` in [server]")
            }
            ControlError::Busy { .. } => failure.hint("see who has that socket open, with `ss -xp`"),
            ControlError::Silent { .. } | ControlError::OtherVersion { .. } => failure.hint("systemctl restart knockq"),
            ControlError::Io { cause, .. } if cause.kind() == io::ErrorKind::PermissionDenied => {
                failure.hint("run this as root").code(PERMISSION)
            }
            ControlError::Io { .. } => failure.hint("see what the daemon's log says"),
        }
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        let failure = Self::new(error.to_string());
        match error {
            // Another time it may work.
            EngineError::Store { cause: StoreError::Failed(_), .. } => failure.hint(DISK),
            EngineError::Store { cause: StoreError::InUse, .. } => {
                failure.hint("if it is a daemon of before, it ends when the disk answers; see who it is with `fuser`")
            }
            EngineError::Store { cause: StoreError::Newer(_), .. } => failure
                .hint("install the knockq that made it, or a newer one; or make a new store: move it away, and knockq recover")
                .code(CONFIGURATION),
            EngineError::Store { cause: StoreError::Damaged(_), .. } => {
                failure.hint("make a new store: knockq recover").code(CONFIGURATION)
            }
            EngineError::Store { .. } => failure
                .hint("put back the store that belongs to this server key, or make a new one: knockq recover")
                .code(CONFIGURATION),
            _ => failure,
        }
    }
}
