//! How the daemon starts: what is read, who is started with what, and the gate that stands at the end of it.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use caps::Capability;
use rustix::fs::fstat;
use tracing::{info, warn};

use super::channel::{Message, message_pair};
use super::children::{CONFIGURATION, Children};
use super::configuration::{self, Fixed, Plan};
use super::control::Control;
use super::ending::{Ended, ServeError};
use super::gate_table::{GateError, GateTable};
use super::manager::{self, NotifyState};
use super::observers::Observers;
use super::sandbox;
use crate::config::secure_file::{self, Privacy};
use crate::config::server::RulesetMode;
use crate::nft::{self, Watch};
use crate::queue::relay;

/// What root needs as long as it lives: for nft, and to end a child that does not end.
pub(super) const TO_WORK: &[Capability] = &[Capability::CAP_NET_ADMIN, Capability::CAP_KILL];

/// What its children need until they have become others, with less.
pub(super) const TO_START: &[Capability] = &[Capability::CAP_SETUID, Capability::CAP_SETGID, Capability::CAP_SETPCAP];

/// The gate's program.
const GATE: &str = "knockq-gate";

/// Where the users are, beside the configuration.
const USERS: &str = "users.d";

/// Where the kernel lists who has which queue.
pub(super) const QUEUES: &str = "/proc/net/netfilter/nfnetlink_queue";

/// What stands when everything is started.
pub(super) struct Raised {
    pub(super) fixed: Fixed,
    pub(super) control: Control,
    pub(super) observers: Observers,
    /// How many may knock, and for how many services.
    pub(super) counts: (usize, usize),
    pub(super) gate: GateTable,
    /// What is ready, in one line.
    pub(super) summary: String,
    /// Users have come or gone since they were read, when nobody could say so yet.
    pub(super) is_outdated: bool,
}

/// Starts everything. The order matters: the engine understands knocks, then the queue is bound, then the table sends it
/// packets.
pub(super) fn bring_up(children: &mut Children, config_path: &Path, trial: Option<Duration>) -> Result<Raised, Ended> {
    let changed = last_change(config_path);
    children.start(CONFIGURATION, &["--config".as_ref(), config_path.as_os_str()])?;
    let (_, read) = children.wait_for(CONFIGURATION, &[Message::Ready], |_, _| Ok(()))?;
    children.dismiss(CONFIGURATION);
    let (plan, settings, limits) = configuration::take(read)?;
    let Plan { fixed, observers, missing_accounts, ruleset, users, services, knock_ports } = plan;
    for account in missing_accounts {
        let hint = format!("useradd --system --no-create-home --shell /usr/sbin/nologin {account}");
        warn!(hint, "there is no user `{account}`, so a user id that nobody has stands in for it");
    }
    if trial.is_some() && fixed.ruleset_mode == RulesetMode::External {
        return Err(ServeError::NothingToUndo.into());
    }
    let store = open_store(&fixed.store)?;
    refuse_taken_queue(fixed.queue)?;
    let control = Control::listen(&fixed.runtime)?;
    let observers = Observers::listen(&fixed.runtime, observers)?;
    let is_outdated = last_change(config_path) != changed; // from here on, who changes a user tells us
    let include_file = config_path.with_file_name("knockq.nft");
    let own = [fixed.runtime.as_path(), config_path.parent().unwrap_or(Path::new("/")), Path::new("/dev/null")];
    if !sandbox::write_only_to(&own)? {
        let hint = "boot with `lsm=landlock,...`, or a kernel with CONFIG_SECURITY_LANDLOCK";
        warn!(hint, "this kernel has no Landlock: one lock less on the daemon's processes");
    }
    start_both(children, &gate_program()?, &settings, &limits, &store)?;
    // Until the engine had it, `recover` could put another in its place, which would not know what is written to this one.
    if !is_at(&store, &fixed.store)? {
        return Err(ServeError::StoreReplaced { path: fixed.store }.into());
    }
    sandbox::keep_only(TO_WORK)?;

    let mut gate = GateTable::new(ruleset, fixed.ruleset_mode, include_file);
    gate.raise()?;
    if let Err(ended) = show_table(children) {
        children.end();
        return Err(if trial.is_some() { take_gate_away(ended) } else { ended });
    }
    gate.say_who_can_flush_it();
    info!(users, services, knock_ports, queue = fixed.queue, "ready");
    let summary = manager::summary(users, services, &knock_ports);
    manager::notify(&[NotifyState::Ready, NotifyState::Status(&summary)]);
    Ok(Raised { fixed, control, observers, counts: (users, services), gate, summary, is_outdated })
}

/// When a user's file last came, went or was replaced.
fn last_change(config_path: &Path) -> Option<SystemTime> {
    fs::metadata(config_path.with_file_name(USERS)).and_then(|directory| directory.modified()).ok()
}

/// The program beside this one, or where it is installed.
fn gate_program() -> Result<PathBuf, ServeError> {
    let own = fs::read_link("/proc/self/exe")?;
    let installed = own.ancestors().nth(2).map(|prefix| prefix.join("libexec/knockq").join(GATE));
    let mut programs = [Some(own.with_file_name(GATE)), installed].into_iter().flatten();
    programs.find(|program| program.exists()).ok_or_else(|| ServeError::NoGate { path: own.with_file_name(GATE) })
}

/// Starts engine and gate, and hands each what is its own.
fn start_both(
    children: &mut Children,
    gate: &Path,
    settings: &OwnedFd,
    limits: &OwnedFd,
    store: &OwnedFd,
) -> Result<(), Ended> {
    let (relay_reader, relay_writer) = relay::pipe()?;
    let (commands, commanded) = message_pair()?;
    children.start("engine", &[])?;
    children.tell("engine", Message::Start, &[&relay_reader, &commands, &Watch::listen()?, settings, store])?;
    children.wait_for("engine", &[Message::Ready], |_, _| Ok(()))?;
    children.start_gate(gate)?;
    children.tell("gate", Message::Start, &[&relay_writer, &commanded, limits])?;
    children.wait_for("gate", &[Message::Bound], |_, _| Ok(()))?;
    Ok(())
}

/// Tells both that the table is loaded: doors that were open before are there still. From then on the gate takes packets.
fn show_table(children: &mut Children) -> Result<(), Ended> {
    for (child, message) in [("gate", Message::Loaded), ("engine", Message::Loaded), ("gate", Message::Enforce)] {
        children.tell(child, message, &[])?;
        children.wait_for(child, &[Message::Ready], |_, _| Ok(()))?;
    }
    Ok(())
}

/// Nobody has confirmed it.
pub(super) fn take_gate_away(ended: Ended) -> Ended {
    match (nft::remove(), ended) {
        (Err(error), _) => Ended::Failed(GateError::from(error).into()),
        (Ok(()), Ended::Asked) => Ended::Unconfirmed,
        (Ok(()), ended) => ended,
    }
}

fn open_store(path: &Path) -> Result<OwnedFd, ServeError> {
    let file = secure_file::open(path, Privacy::Secret, OpenOptions::new().read(true).write(true));
    Ok(file.map_err(ServeError::Store)?.into())
}

/// Whether a file still has this name.
fn is_at(file: &OwnedFd, path: &Path) -> io::Result<bool> {
    let file = fstat(file)?;
    Ok(fs::symlink_metadata(path).is_ok_and(|there| (there.dev(), there.ino()) == (file.st_dev, file.st_ino)))
}

/// The kernel would only say that it is not permitted.
///
/// # Errors
/// When a process has the queue, most likely a daemon that runs.
pub fn refuse_taken_queue(number: u16) -> Result<(), ServeError> {
    let queues = fs::read_to_string(QUEUES).unwrap_or_default();
    for line in queues.lines() {
        let mut fields = line.split_whitespace();
        if fields.next().and_then(|field| field.parse().ok()) == Some(number) {
            let port = fields.next().unwrap_or("?");
            let name = fs::read_to_string(format!("/proc/{port}/comm")).unwrap_or_default();
            let owner = match name.trim_end() {
                "" => format!("netlink port {port}"),
                name => format!("process {port} ({name})"),
            };
            return Err(ServeError::QueueTaken { number, owner });
        }
    }
    Ok(())
}
