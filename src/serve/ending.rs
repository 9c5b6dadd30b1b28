//! Why root ends.

use std::io;

use thiserror::Error;

use super::channel::Message;
use super::sandbox::SandboxError;

/// Why root leaves its work.
pub(super) enum Ended {
    /// SIGTERM or SIGINT.
    Asked,
    /// The time of `serve --try` is over.
    Unconfirmed,
    Failed(RootError),
}

impl<E: Into<RootError>> From<E> for Ended {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// Why the daemon does not start, or stops.
#[derive(Debug, Error)]
pub enum RootError {
    /// A privilege stayed.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The table could not be loaded. This is what nft says.
    #[error("nft: {0}")]
    Nft(String),
    /// It is for others to load, and they have not.
    #[error("table inet knockq is not there, or not that of this configuration (ruleset = \"external\")")]
    NotLoaded,
    /// Nobody confirmed in time.
    #[error("not confirmed: the gate is taken away, and the guarded ports are as open as without knockq")]
    NotConfirmed,
    /// A child ended with this code, and has said why.
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

/// What no child of ours would do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum Breach {
    /// Another number of bytes, or another byte.
    #[error("it sent what is no message")]
    NoMessage,
    /// A message at the wrong time.
    #[error("it said {0:?}, which nobody waits for")]
    Unasked(Message),
    /// Its messages pile up.
    #[error("it does not read what it is told")]
    Deaf,
    /// What it handed over is not what is expected.
    #[error("what it handed over cannot be read")]
    Unreadable,
}

impl RootError {
    /// A child said what nobody waits for.
    pub(super) const fn unasked(process: &'static str, said: Message) -> Self {
        Self::Breach { process, breach: Breach::Unasked(said) }
    }

    /// What to do.
    pub const fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Sandbox(SandboxError::Unprovable) => {
                Some("boot Linux 5.9 or newer, with CONFIG_SECCOMP_FILTER as every distribution has it")
            }
            Self::Nft(_) => Some("see what is there with `nft list table inet knockq`, and if another knockq runs"),
            Self::NotLoaded => Some(
                "make it anew with `knockq ruleset --output FILE`, include that in /etc/nftables.conf, and load it: nft -f FILE",
            ),
            Self::NotConfirmed => Some("run `knockq confirm` within the time once a knock has opened the port"),
            _ => None,
        }
    }

    /// The exit code, as of sysexits.h.
    pub const fn code(&self) -> u8 {
        const FAILED: u8 = 1;
        const CONFIGURATION: u8 = 78;
        match self {
            Self::Sandbox(SandboxError::Unprovable) => CONFIGURATION,
            Self::ChildFailed { code, .. } => *code,
            _ => FAILED,
        }
    }
}
