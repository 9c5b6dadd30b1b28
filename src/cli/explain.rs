//! `knockq explain`

use clap::Args;
use serde::Serialize;

use super::failure::Failure;
use super::grants::refused;
use super::time::utc;
use super::{ConfigArg, note, print_json, print_view};
use crate::config::{Network, ServerConfig};
use crate::serve::control::{self, Reply, Request};
use crate::serve::explain::{Cause, Finding, findings, together};

#[derive(Args)]
#[command(
    after_help = "Examples:\n  knockq explain\n  knockq explain 203.0.113.9\n  knockq explain --json | jq '.[] | select(.user)'\n\n\
                        The daemon remembers the last 256 refused packets that had to do with a key, and the last 1024 \
                        SYNs of strangers. They are searched here, not in the daemon, with every user's key and a clock \
                        that is up to a day off either way. No token is shown."
)]
pub(super) struct Explain {
    /// Only what came from this address or network
    #[arg(value_name = "ADDR")]
    source: Option<Network>,
    /// As a JSON array
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArg,
}

/// More keys than these take longer than a moment.
const FEW: usize = 50;

#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    finding: Finding,
    /// How many came alike, the last of them at this time.
    count: u64,
    explanation: String,
}

impl Explain {
    pub(super) fn run(self) -> Result<(), Failure> {
        let config = ServerConfig::load(&self.config.config)?;
        let registry = config.registry()?;
        let part = match control::ask(&config.runtime, &Request::Explain)? {
            Reply::Explained(part) => part,
            reply => return refused(reply),
        };
        let users = registry.users.len();
        let tell = |place: usize| {
            if users > FEW && place.is_multiple_of(users / 10) {
                note(&format!("searching with the key of user {} of {users}", place + 1));
            }
        };
        let network = self.source.map(|network| network.0);
        let found = together(findings(&registry, &part, network, tell));
        let shown: Vec<Shown> = found.into_iter().map(Shown::of).collect();
        if self.json {
            return print_json(&shown);
        }
        if shown.is_empty() {
            note("no SYN was refused");
        }
        print_view(&shown.iter().map(Shown::line).collect::<String>()).map(drop)
    }
}

impl Shown {
    fn of((finding, count): (Finding, u64)) -> Self {
        let explanation = explanation(&finding);
        Self { finding, count, explanation }
    }

    fn line(&self) -> String {
        let Self { finding: Finding { at, source, .. }, count, explanation } = self;
        let times = if *count > 1 { format!(" ({count} times)") } else { String::new() };
        format!("{source} {} {explanation}{times}\n", utc(*at))
    }
}

/// What it was, in a sentence without its subject.
fn explanation(finding: &Finding) -> String {
    if finding.causes == [Cause::NoKey] {
        return "no key fits".to_owned();
    }
    let whose = finding.user.as_ref().map_or_else(|| "a key".to_owned(), |user| format!("{user}'s key"));
    let causes: Vec<String> = finding.causes.iter().map(ToString::to_string).collect();
    let service = finding.service.as_ref().map(|service| format!(" for {service}")).unwrap_or_default();
    let names_it = |cause: &Cause| matches!(cause, Cause::PortNotAllowed { .. });
    let service = if finding.causes.iter().any(names_it) { String::new() } else { service };
    format!("is {whose}{service}, {}", causes.join("; "))
}
