//! `knockq explain`

use clap::Args;
use serde::Serialize;

use super::failure::Failure;
use super::grants::refused;
use super::{ConfigArg, note, print, print_json};
use crate::config::{Network, ServerConfig};
use crate::serve::control::{self, Request};
use crate::serve::explain::{Cause, Finding, findings, together};
use crate::serve::report::{self, RefusedPart};

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
        let part: RefusedPart = match control::ask_for_memory(&config.runtime, &Request::Explain)? {
            Ok(memory) => report::read(memory).map_err(|error| {
                Failure::new(format!("explain: the daemon's answer cannot be read: {error}"))
                    .hint("if knockq was updated: systemctl restart knockq")
            })?,
            Err(reply) => {
                refused(reply)?;
                return Err(Failure::new("explain: the daemon handed nothing over".to_owned()));
            }
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
        print(&shown.iter().map(Shown::line).collect::<String>())
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

/// A Unix time as `2026-11-22 14:02:11Z` (civil_from_days of <https://howardhinnant.github.io/date_algorithms.html>).
fn utc(time: u64) -> String {
    let (days, rest) = (time / 86_400 + 719_468, time % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn a_unix_time_is_shown_as_a_date() {
        for (time, shown) in [
            (0, "1970-01-01 00:00:00Z"),
            (951_782_399, "2000-02-28 23:59:59Z"),
            (951_782_400, "2000-02-29 00:00:00Z"),
            (951_868_800, "2000-03-01 00:00:00Z"),
            (1_795_356_131, "2026-11-22 14:02:11Z"),
            (4_107_542_399, "2100-02-28 23:59:59Z"),
            (4_107_542_400, "2100-03-01 00:00:00Z"),
        ] {
            assert_eq!(utc(time), shown, "{time}");
        }
    }
}
