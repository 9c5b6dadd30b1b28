//! `knockq doctor`

mod beyond;
mod field;
mod firewall;
mod follow;
mod gate;
mod listing;
mod ports;
mod translation;

use std::fmt::{self, Display, Write as _};
use std::path::Path;

use clap::Args;
use rustix::process::geteuid;
use serde::Serialize;

use super::failure::{CONFIGURATION, FAILED, Failure, PERMISSION};
use super::inspect::{Trust, check_store, unseen_sets};
use super::{ConfigArg, print_json, print_view};
use crate::client::clock::is_synchronized;
use crate::config::ServerConfig;
use crate::nft::list_ruleset;
use crate::serve::configuration::accounts;

pub(super) use beyond::Host;

#[derive(Args)]
#[command(after_help = "Examples:\n  knockq doctor\n  knockq doctor --json | jq '.[] | select(.state != \"ok\")'\n\n\
                        It looks at this host alone, and changes nothing. Exit codes: 0 no problem, 1 problems, \
                        78 the configuration cannot be read.")]
pub(super) struct Doctor {
    /// As a JSON array
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArg,
}

/// How something was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// As it should be.
    Ok,
    /// Worth knowing; knocks work.
    Note,
    /// Knocks do not work, or what was to be hidden is not.
    Problem,
    /// It could not be looked at, or depends on what is not known here.
    Unknown,
}

/// One line of the report.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    state: State,
    message: String,
    hint: Option<String>,
}

impl Finding {
    fn new(check: &'static str, state: State, message: impl Into<String>) -> Self {
        Self { check, state, message: message.into(), hint: None }
    }

    fn ok(check: &'static str, message: impl Into<String>) -> Self {
        Self::new(check, State::Ok, message)
    }

    fn note(check: &'static str, message: impl Into<String>) -> Self {
        Self::new(check, State::Note, message)
    }

    fn problem(check: &'static str, message: impl Into<String>) -> Self {
        Self::new(check, State::Problem, message)
    }

    fn unknown(check: &'static str, message: impl Into<String>) -> Self {
        Self::new(check, State::Unknown, message)
    }

    /// What a command would fail with; where a privilege is missing, nothing was seen.
    fn failed(check: &'static str, failure: impl Into<Failure>) -> Self {
        let failure = failure.into();
        let state = if failure.code == PERMISSION { State::Unknown } else { State::Problem };
        let (message, hint) = failure.into_parts();
        Self { hint, ..Self::new(check, state, message) }
    }

    fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }
}

impl Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.state {
            State::Ok => "ok",
            State::Note => "note",
            State::Problem => "problem",
            State::Unknown => "unknown",
        };
        writeln!(f, "{state:<9}{}", self.message.replace('\n', "\n         "))?;
        match &self.hint {
            Some(hint) => writeln!(f, "         Hint: {}", hint.replace('\n', "\n         ")),
            None => Ok(()),
        }
    }
}

impl Doctor {
    pub(super) fn run(self) -> Result<(), Failure> {
        if !geteuid().is_root() {
            let failure = Failure::new("doctor: needs root, to see keys, tables and queues".to_owned());
            return Err(failure.hint("sudo knockq doctor").code(PERMISSION));
        }
        let (findings, is_read) = examine(&self.config.config);
        if self.json {
            print_json(&findings)?;
        } else {
            let text = findings.iter().fold(String::new(), |mut text, finding| {
                let _ = write!(text, "{finding}");
                text
            });
            print_view(&text)?;
        }
        let has_problem = findings.iter().any(|finding| finding.state == State::Problem);
        match (is_read, has_problem) {
            (true, false) => Ok(()),
            (true, true) => Err(Failure::new(String::new()).code(FAILED)),
            (false, _) => Err(Failure::new(String::new()).code(CONFIGURATION)),
        }
    }
}

/// All findings, and whether the configuration could be read: without it there is little to look at.
fn examine(path: &Path) -> (Vec<Finding>, bool) {
    let config = match ServerConfig::load(path) {
        Ok(config) => config,
        Err(error) => return (vec![Finding::failed("configuration", error), clock()], false),
    };
    let users = config.users.len();
    let read =
        format!("{}: it, its key and its users ({users}) can be read, and only root can change them", path.display());
    let mut findings = vec![Finding::ok("configuration", read)];
    findings.push(accounts_are_there(&config));
    findings.push(store(&config));
    findings.push(clock());
    findings.push(gate::kernel(&config));
    findings.push(gate::table(&config, path));
    findings.extend(gate::trial(&config));
    findings.extend(sets(&config));
    findings.push(gate::include_file(&config, path));
    findings.extend(gate::saved());
    findings.push(gate::queue(&config));
    match list_ruleset() {
        Ok(listing) => {
            let tables = listing::read(&listing);
            findings.extend(ports::all(&config, &tables));
            findings.extend(firewall::all(&config, &tables));
            findings.extend(translation::published(&config, &tables));
            findings.extend(beyond::all(&config, &tables));
        }
        Err(error) => {
            findings.extend(ports::all(&config, &[]));
            let (message, hint) = Failure::from(error).into_parts();
            let message = format!("the host's tables cannot be listed: {message}");
            findings.push(Finding { hint, ..Finding::unknown("firewall", message) });
        }
    }
    (findings, true)
}

fn accounts_are_there(config: &ServerConfig) -> Finding {
    const CHECK: &str = "accounts";
    match accounts(config) {
        Err(error) => Finding::failed(CHECK, error),
        Ok((_, missing)) if missing.is_empty() => Finding::ok(CHECK, "the daemon's two accounts are there"),
        Ok((_, missing)) => {
            let add = |name: &String| format!("useradd --system --no-create-home --shell /usr/sbin/nologin {name}");
            let message =
                format!("there is no user `{}`, so a user id that nobody has stands in", missing.join("`, `"));
            Finding::note(CHECK, message).hint(missing.iter().map(add).collect::<Vec<_>>().join("\n"))
        }
    }
}

fn store(config: &ServerConfig) -> Finding {
    const CHECK: &str = "store";
    match check_store(config) {
        Err(failure) => Finding::failed(CHECK, failure),
        Ok(Trust::Whole) => {
            Finding::ok(CHECK, format!("{}: is whole, and this server's", config.store_path().display()))
        }
        Ok(Trust::Shut(said)) => Finding::problem(CHECK, said)
            .hint("let the daemon run and wait until then; its log of this start or an earlier one says why: journalctl -u knockq"),
        Ok(Trust::Suspicion(said)) => {
            Finding::problem(CHECK, said).hint("start the daemon, for that time begins then: systemctl start knockq")
        }
        Ok(Trust::Unknown(said)) => Finding::unknown(CHECK, said).hint("see what it does: journalctl -u knockq"),
    }
}

/// The administrator's sets that users are added to, if any are.
fn sets(config: &ServerConfig) -> Option<Finding> {
    const CHECK: &str = "sets";
    config.users.iter().find(|user| !user.add_to.is_empty())?;
    Some(match unseen_sets(config) {
        Err(failure) => Finding::failed(CHECK, failure),
        Ok(unseen) if unseen.is_empty() => Finding::ok(CHECK, "all sets that users are added to are there"),
        Ok(_) => Finding::unknown(CHECK, "whether the sets that users are added to are there, only root can see"),
    })
}

fn clock() -> Finding {
    const CHECK: &str = "clock";
    if is_synchronized() {
        return Finding::ok(CHECK, "the clock is synchronised");
    }
    Finding::problem(
        CHECK,
        "the clock is not synchronised: a knock is refused where clocks differ by more than the window",
    )
    .hint("apt-get install systemd-timesyncd, or chrony; then look with `timedatectl`")
}
