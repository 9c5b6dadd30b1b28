//! What all commands that knock have in common.

use std::io::{self, IsTerminal, Write};
use std::net::IpAddr;
use std::str::FromStr;

use clap::Args;
use tokio::runtime::{Builder, Runtime};

use super::failure::Failure;
use super::note;
use crate::client::send::Notice;
use crate::client::{Family, Request, Source};

/// How to knock.
#[derive(Args)]
pub(super) struct KnockArgs {
    /// Knock over IPv4
    #[arg(short = '4', conflicts_with = "v6")]
    v4: bool,
    /// Knock over IPv6
    #[arg(short = '6')]
    v6: bool,
    /// The address that the server sees, to which the knock is bound; `none` binds it to none
    #[arg(long, value_name = "ADDR|none")]
    source: Option<SourceArg>,
    /// Refuse to knock where this host's timestamps would let an observer tell a knock from a connection
    #[arg(long)]
    strict: bool,
}

impl KnockArgs {
    pub(super) fn request<'a>(&self, host: &'a str, service: Option<&'a str>) -> Request<'a> {
        let family = match (self.v4, self.v6) {
            (true, _) => Family::V4,
            (_, true) => Family::V6,
            _ => Family::Any,
        };
        let source = self.source.map_or(Source::Auto, |source| source.0);
        Request { host, service, family, source, strict: self.strict }
    }
}

#[derive(Clone, Copy)]
struct SourceArg(Source);

impl FromStr for SourceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self(Source::Unbound)),
            _ => text
                .parse::<IpAddr>()
                .map(|address| Self(Source::Address(address)))
                .map_err(|_| "not an IP address, nor `none`".to_owned()),
        }
    }
}

/// Says what a user should know before the knock leaves.
pub(super) fn tell(notice: Notice) {
    match notice {
        Notice::Waiting(seconds) => {
            note(&format!("Many knocks in a row: waiting {seconds} s, so that the server takes this one."));
        }
        Notice::Locked(lock) => note(&format!(
            "Waiting for another knockq, which has held {0} for 3 s. If it has hung, see which it is with `fuser {0}`, and end it.",
            lock.display()
        )),
        Notice::CopiedProfile => note(
            "warning: this knockknock profile was used on another machine before. If that one still knocks, both use the same \
             counts, which lose and betray knocks: have one profile for each. This is said once.",
        ),
        Notice::CopiedKey => note(
            "warning: this key was used on another machine before. If that one still knocks, make a key for this one: move \
             the copied one away, `knockq keygen`, and ask for a new profile. This is said once.",
        ),
    }
}

/// What connections run on.
pub(super) fn runtime() -> Result<Runtime, Failure> {
    Builder::new_current_thread().enable_all().build().map_err(|error| Failure::new(format!("cannot start: {error}")))
}

/// A line that says how long something has been awaited; only on a terminal, where it is taken away in the end.
pub(super) struct Progress {
    what: String,
    is_terminal: bool,
}

impl Progress {
    pub(super) fn new(what: String) -> Self {
        Self { what, is_terminal: io::stderr().is_terminal() }
    }

    pub(super) fn tick(&self, seconds: u64) {
        if self.is_terminal {
            let _ = write!(io::stderr(), "\rWaiting for {}: {seconds} s", self.what);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.is_terminal {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}
