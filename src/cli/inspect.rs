//! What `check`, `doctor` and `init` look at: the store, the daemon, sets, and the kernel's ports.

use std::collections::BTreeMap;
use std::fs;
use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::failure::{CONFIGURATION, Failure};
use super::note;
use crate::client::clock::unix_now;
use crate::config::ServerConfig;
use crate::config::secure_file::{self, Privacy};
use crate::nft::{ElementError, Kernel, Lister, SetError, SetName};
use crate::serve::configuration::ServeError;
use crate::serve::engine::EngineError;
use crate::serve::observers;
use crate::serve::report::{Shut, Status};
use crate::serve::store::{Store, StoreError};

/// Time that a daemon has to tell how it is.
const ANSWER: Duration = Duration::from_secs(5);

/// How far the counter store can be trusted, in words where not.
pub(super) enum Trust {
    /// It is whole, and this server's.
    Whole,
    /// No knocks are accepted until a time that is known.
    Shut(String),
    /// Nor for a window after the next start.
    Suspicion(String),
    /// Somebody has it open, and does not say.
    Unknown(String),
}

/// Looks at the counter store. The daemon, if it runs, has it open, and is asked.
pub(super) fn check_store(config: &ServerConfig) -> Result<Trust, Failure> {
    let path = config.store_path();
    let file = secure_file::open(&path, Privacy::Secret, OpenOptions::new().read(true).write(true));
    let trust = |shut: Option<_>| match shut {
        Some(shut) => Trust::Shut(format!("{}: {shut}", path.display())),
        None => Trust::Whole,
    };
    match Store::check(file.map_err(ServeError::Store)?, config.private_key.public()) {
        Ok((Some(doubt), _)) => Ok(Trust::Suspicion(format!(
            "{}: {doubt}; to be safe, no knock of before will be taken, and users can knock again a window after the \
             start, those with a knockknock profile when their count is set",
            path.display()
        ))),
        Ok((None, floor)) => {
            let has_tokens = config.registry()?.has_tokens();
            Ok(trust(floor.shut(unix_now()).filter(|_| has_tokens)))
        }
        Err(StoreError::InUse) => Ok(ask_daemon(config).map_or_else(
            || {
                let is_asked = "is in use, and the daemon does not tell whether it is in doubt";
                Trust::Unknown(format!("{}: {is_asked}", path.display()))
            },
            |daemon| trust(daemon.store.in_doubt_until.map(|until| Shut::new(until, unix_now()))),
        )),
        Err(cause) => Err(EngineError::Store { path: path.display().to_string(), cause }.into()),
    }
}

/// What the daemon tells of itself, if it runs and answers soon.
pub(super) fn ask_daemon(config: &ServerConfig) -> Option<Status> {
    let (answers, answer) = mpsc::channel();
    let runtime = config.runtime.clone();
    let ask = move || drop(answers.send(observers::status(&runtime).ok()));
    thread::Builder::new().spawn(ask).ok()?;
    answer.recv_timeout(ANSWER).ok()?
}

/// Fails unless the administrator's sets that users are added to are there. Only who may change the packet filter can look at
/// them: those that were not seen.
pub(super) fn unseen_sets(config: &ServerConfig) -> Result<Vec<&SetName>, Failure> {
    let named = config.users.iter().flat_map(|user| user.add_to.iter().map(move |set| (set, &user.path)));
    let named: BTreeMap<&SetName, &PathBuf> = named.collect();
    let mut unseen = Vec::new();
    if named.is_empty() {
        return Ok(unseen);
    }
    let mut kernel = Kernel::default();
    for (set, entry) in named {
        match kernel.layout(set) {
            Ok(_) => {}
            Err(SetError::Kernel(_, ElementError::Refused(error))) if error.kind() == ErrorKind::PermissionDenied => {
                unseen.push(set);
            }
            Err(error) => {
                return Err(Failure::new(format!("{}: add_to: {error}", entry.display()))
                    .hint(set_hint(set, &error))
                    .code(CONFIGURATION));
            }
        }
    }
    Ok(unseen)
}

/// nft makes no set in a table that is not there, and none by the name of another.
fn set_hint(set: &SetName, error: &SetError) -> String {
    let set = set.to_string();
    let table = set.rsplit_once(' ').map_or(set.as_str(), |(table, _)| table);
    let add = format!("nft 'add table {table}; add set {set} {{ type ipv4_addr; flags timeout; }}', or ipv6_addr");
    match error {
        SetError::Type(_) | SetError::Flags(_) => {
            format!("delete it, and the rules that look there, first; then: {add}")
        }
        SetError::Missing(_) | SetError::Kernel(..) => add,
    }
}

/// A connection of this host's own may take a knock port in that range as its source.
pub(super) fn warn_of_ephemeral_ports(config: &ServerConfig) {
    if let Some(message) = ephemeral_knock_port(config) {
        note(&format!("warning: {message}"));
    }
}

/// The first knock port that the kernel may give to a connection of this host's own, in words.
pub(super) fn ephemeral_knock_port(config: &ServerConfig) -> Option<String> {
    let range = ephemeral_ports();
    let reserved = reserved_ports();
    let is_given = |port: &u16| range.contains(port) && !reserved.iter().any(|ports| ports.contains(port));
    let port = config.all_knock_ports().iter().find(is_given)?;
    let (start, end) = (range.start(), range.end());
    Some(format!("knock port {port} lies inside net.ipv4.ip_local_port_range ({start}-{end})"))
}

/// What the kernel leaves out of that range, as it lists them.
pub(super) fn reserved_port_list() -> String {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports").unwrap_or_default();
    text.trim().to_owned()
}

fn reserved_ports() -> Vec<RangeInclusive<u16>> {
    let range = |range: &str| {
        let (start, end) = range.split_once('-').unwrap_or((range, range));
        Some(start.parse().ok()?..=end.parse().ok()?)
    };
    reserved_port_list().split(',').filter_map(range).collect()
}

/// The kernel's range for source ports; Linux's default where it cannot be read.
pub(super) fn ephemeral_ports() -> RangeInclusive<u16> {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut numbers = text.split_whitespace().map_while(|number| number.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(low), Some(high)) => low..=high,
        _ => 32_768..=60_999,
    }
}
