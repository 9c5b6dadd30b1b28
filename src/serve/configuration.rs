//! The child that reads the configuration and its keys, at the start and at each reload, and hands on what each process
//! needs of it. A file that cannot be read or understood ends this child, and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use caps::Capability;
use rustix::fs::{FlockOperation, flock, fstat};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::channel::{Channel, Message, message_pair};
use super::control::ControlError;
use super::handover;
use super::limits::Limits;
use super::plan::Plan;
use super::policy::{Allowance, Opening, Policy};
use super::sandbox::{self, Identity, SandboxError};
use super::settings::{Outline, Settings};
use super::sockets::Sockets;
use crate::config::secure_file::{self, Privacy};
use crate::config::server::RulesetMode;
use crate::config::users::UserEntry;
use crate::config::{ConfigError, FileError, Moment, ServerConfig};
use crate::crypto::PublicKey;
use crate::nft::{self, Watch};
use crate::queue::relay;
use crate::service::{Port, Transport};
use crate::verify::Service;

/// The engine where the configured account does not exist: `nobody`, as everywhere.
const ENGINE_FALLBACK: Identity = Identity { uid: 65_534, gid: 65_534 };

/// The gate where its account does not exist: it must not be the engine's.
const GATE_FALLBACK: Identity = Identity { uid: 65_533, gid: 65_533 };

/// Where the users are, beside the configuration.
const USERS: &str = "users.d";

/// Where the kernel lists who has which queue.
pub(super) const QUEUES: &str = "/proc/net/netfilter/nfnetlink_queue";

/// Why the daemon cannot be started, or reload.
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
    /// The account is unusable, or a privilege stayed.
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
    /// A program of the daemon's is not there.
    #[error("{}: no such file: a program of the daemon's", path.display())]
    NoProgram {
        /// Where it should be.
        path: PathBuf,
    },
    /// A socket is not to be had.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// `serve --try` cannot undo what others load.
    #[error("serve --try: ruleset = \"external\" leaves the gate to others, so it cannot be undone here")]
    NothingToUndo,
    /// The kernel refused something.
    #[error("serve: {0}")]
    Io(#[from] io::Error),
}

/// What the next configuration is compared with.
#[derive(Serialize, Deserialize)]
struct Before {
    fixed: Fixed,
    /// Ports that are guarded, and those whose connections end with their door.
    guarded: Vec<Port>,
    kill: Vec<Port>,
}

/// What only a restart can change.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct Fixed {
    server: PublicKey,
    store: PathBuf,
    runtime: PathBuf,
    queue: u16,
    ruleset_mode: RulesetMode,
    /// Whom engine and gate become.
    accounts: [Identity; 2],
}

impl Fixed {
    fn of(config: &ServerConfig, accounts: [Identity; 2]) -> Self {
        Self {
            server: *config.private_key.public(),
            store: config.store_path(),
            runtime: config.runtime.clone(),
            queue: config.queue,
            ruleset_mode: config.ruleset_mode,
            accounts,
        }
    }

    /// The setting that differs, if any.
    fn difference(&self, other: &Self) -> Option<&'static str> {
        let settings = [
            ("private_key", self.server == other.server),
            ("state", self.store == other.store),
            ("runtime", self.runtime == other.runtime),
            ("queue", self.queue == other.queue),
            ("ruleset", self.ruleset_mode == other.ruleset_mode),
            ("user", self.accounts == other.accounts),
        ];
        settings.into_iter().find(|(_, is_same)| !is_same).map(|(setting, _)| setting)
    }
}

/// Reads the configuration, shows it, and hands root what each process needs. At the start these are, besides root's [`Plan`]: for
/// the gate, its end of the relay, its end of the commands, its [`Limits`]; for the engine the other ends, where the kernel tells
/// of tables, its [`Settings`], the store, and the sockets that others connect to. At a reload: limits and settings.
///
/// # Errors
/// [`ServeError::Config`] and [`ServeError::Account`] for what is wrong in the files.
pub fn run(path: &Path, on_trial: bool, show: impl FnOnce(&ServerConfig)) -> Result<(), ServeError> {
    let root = Channel::of_stdin()?;
    let Some((Message::Start, mut before)) = root.receive()? else { return Ok(()) };
    match before.pop() {
        None => start(&root, path, on_trial, show),
        Some(before) => reload(&root, path, &before, show),
    }
}

fn start(root: &Channel, path: &Path, on_trial: bool, show: impl FnOnce(&ServerConfig)) -> Result<(), ServeError> {
    let is_there = nft::exists().unwrap_or(false); // or root says what is wrong with nft
    let tables = Watch::listen()?;
    sandbox::keep_only(&[Capability::CAP_SETGID])?; // for the sockets that a group may connect to
    let changed = last_change(path);
    let mut config = ServerConfig::load(path)?;
    let (accounts, missing) = accounts(&config)?;
    if on_trial && config.ruleset_mode == RulesetMode::External {
        return Err(ServeError::NothingToUndo);
    }
    let store = open_store(&config.store_path())?;
    refuse_taken_queue(config.queue)?;
    let group = (!missing.contains(&config.account)).then_some(accounts[0].gid);
    let Sockets { control, status, watch } = Sockets::listen(&config.runtime, group)?;
    if last_change(path) != changed {
        config = ServerConfig::load(path)?; // from here on, who changes a user tells the daemon
    }
    for account in &missing {
        let hint = format!("useradd --system --no-create-home --shell /usr/sbin/nologin {account}");
        tracing::warn!(hint, "there is no user `{account}`, so a user id that nobody has stands in for it");
    }
    show(&config);
    // A gate of before let the server's answers pass, whoever had begun.
    let are_new = !is_there || was_of_before(path);
    let Made { plan, limits, settings } = Made::of(&config, accounts, path, |_| are_new, |_| true)?;
    let (relay_reader, relay_writer) = relay::pipe()?;
    let (commands, commanded) = message_pair()?;
    let [for_gate, for_engine] = [
        vec![relay_writer, commanded, limits],
        vec![relay_reader, commands, tables, settings, store, control, status, watch],
    ];
    let all: Vec<OwnedFd> = [plan].into_iter().chain(for_gate).chain(for_engine).collect();
    root.send(Message::Ready, &all.iter().map(AsFd::as_fd).collect::<Vec<_>>())?;
    Ok(())
}

fn reload(root: &Channel, path: &Path, before: &OwnedFd, show: impl FnOnce(&ServerConfig)) -> Result<(), ServeError> {
    sandbox::keep_only(&[])?;
    sandbox::write_only_to(&[])?;
    let Before { fixed, guarded, kill } =
        postcard::from_bytes(&Plan::read(before)?.before).map_err(io::Error::other)?;
    let config = ServerConfig::load(path)?;
    let (accounts, _) = accounts(&config)?;
    if let Some(setting) = fixed.difference(&Fixed::of(&config, accounts)) {
        let why = format!("only a restart changes `{setting}`\nsystemctl restart knockq");
        root.send(Message::Refused, &[handover::seal_bytes(why.as_bytes())?.as_fd()])?;
        return Ok(());
    }
    show(&config);
    let is_new = |port: &Port| !guarded.contains(port);
    let Made { plan, limits, settings } = Made::of(&config, accounts, path, is_new, |port| !kill.contains(port))?;
    root.send(Message::Ready, &[&plan, &limits, &settings].map(AsFd::as_fd))?;
    Ok(())
}

/// What is made of a configuration for root, gate and engine, sealed.
struct Made {
    plan: OwnedFd,
    limits: OwnedFd,
    settings: OwnedFd,
}

impl Made {
    /// `is_new` are ports that were not guarded before, `kills` those whose connections did not end with their door.
    fn of(
        config: &ServerConfig,
        accounts: [Identity; 2],
        path: &Path,
        is_new: impl Fn(&Port) -> bool,
        kills: impl Fn(&Port) -> bool,
    ) -> Result<Self, ServeError> {
        let ruleset = config.ruleset();
        let kill: Vec<Port> = ruleset.kill.iter().copied().filter(kills).collect();
        let settings = Settings {
            identity: accounts[0],
            server: *config.private_key.public(),
            store_path: config.store_path().display().to_string(),
            registry: config.registry()?,
            policy: policy(config, was_of_before(path)),
            outline: Outline {
                users: config.users.len(),
                services: config.services.len(),
                knock_ports: config.all_knock_ports().to_string(),
                queue: config.queue,
                include_file: include_file(path).display().to_string(),
                connected: nft::connected(&kill, &ruleset.trusted, std::iter::empty()),
            },
        };
        let Outline { users, services, knock_ports, .. } = &settings.outline;
        let is_managed = config.ruleset_mode == RulesetMode::Managed;
        let before =
            Before { fixed: Fixed::of(config, accounts), guarded: ruleset.guarded.clone(), kill: ruleset.kill.clone() };
        let plan = Plan {
            is_managed,
            summary: format!("ready: users {users}, services {services}, knock ports {knock_ports}"),
            ruleset: ruleset.to_string(),
            check: if is_managed { ruleset.for_check() } else { ruleset.for_comparison() },
            before: postcard::to_stdvec(&before).map_err(io::Error::other)?,
        };
        let limits = Limits { sessions: sessions(&ruleset.guarded, is_new, is_managed), ..limits(config, accounts[1]) };
        Ok(Self {
            plan: plan.seal()?,
            limits: handover::seal_bytes(limits.to_string().as_bytes())?,
            settings: handover::seal(&settings)?,
        })
    }
}

/// Connections that are there before their port is guarded: what `revoke --kill` has ended since must not come back.
fn sessions(guarded: &[Port], is_new: impl Fn(&Port) -> bool, is_managed: bool) -> BTreeSet<(SocketAddr, SocketAddr)> {
    let mut sessions = if is_managed { nft::sessions().unwrap_or_default() } else { Vec::new() };
    sessions.retain(|(_, server)| {
        let port = Port { transport: Transport::Tcp, number: server.port() };
        guarded.contains(&port) && is_new(&port) && !server.ip().is_loopback()
    });
    sessions.into_iter().collect()
}

/// Opens the counter store for the engine. From here on no other process takes it, nor puts another in its place.
fn open_store(path: &Path) -> Result<OwnedFd, ServeError> {
    let file = secure_file::open(path, Privacy::Secret, OpenOptions::new().read(true).write(true));
    let file = OwnedFd::from(file.map_err(ServeError::Store)?);
    let _ = flock(&file, FlockOperation::NonBlockingLockExclusive); // or the engine says who has it
    let (opened, there) = (fstat(&file).map_err(io::Error::from)?, fs::symlink_metadata(path));
    let is_there = there.is_ok_and(|there| (there.dev(), there.ino()) == (opened.st_dev, opened.st_ino));
    if is_there { Ok(file) } else { Err(ServeError::StoreReplaced { path: path.to_owned() }) }
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

/// When a user's file last came, went or was replaced.
fn last_change(path: &Path) -> Option<SystemTime> {
    fs::metadata(path.with_file_name(USERS)).and_then(|directory| directory.modified()).ok()
}

fn include_file(path: &Path) -> PathBuf {
    path.with_file_name("knockq.nft")
}

/// Whether the table was loaded last by a daemon whose doors did not say when they end.
fn was_of_before(path: &Path) -> bool {
    secure_file::read(&include_file(path), Privacy::Public).is_ok_and(|kept| nft::is_of_before(&kept))
}

/// Keeps a text that comes on standard input in the include file, if it is another: at the next boot the gate begins with it.
///
/// # Errors
/// When it cannot be written.
pub fn keep(path: &Path) -> Result<(), ServeError> {
    sandbox::keep_only(&[])?;
    let text = io::read_to_string(io::stdin())?;
    if secure_file::read(path, Privacy::Public).is_ok_and(|kept| *kept == text) {
        return Ok(());
    }
    secure_file::replace(path, &text, Privacy::Public).map_err(ServeError::Store)
}

/// Whom engine and gate become, in this order, and the accounts of theirs that do not exist.
///
/// # Errors
/// When an account is root's, or both have one user id: then each could reach into the other.
pub fn accounts(config: &ServerConfig) -> Result<([Identity; 2], Vec<String>), ServeError> {
    let names = [config.account.clone(), format!("{}-gate", config.account)];
    let found = [Identity::of_account(&names[0])?, Identity::of_account(&names[1])?];
    let missing = names.into_iter().zip(&found).filter(|(_, found)| found.is_none()).map(|(name, _)| name).collect();
    let [engine, gate] = found;
    let accounts = [engine.unwrap_or(ENGINE_FALLBACK), gate.unwrap_or(GATE_FALLBACK)];
    if accounts[0].uid == accounts[1].uid {
        return Err(SandboxError::Shared(config.account.clone()).into());
    }
    Ok((accounts, missing))
}

fn policy(config: &ServerConfig, old_count: bool) -> Policy {
    let kill = config.ruleset().kill; // the table asks by port, of whichever service that is
    let opening = |service: &Service| Opening {
        ports: service.ports.clone(),
        once: service.once,
        seconds: service.open_for,
        kill: service.ports.iter().any(|port| kill.contains(port)),
    };
    let name = |place: &usize| config.services.get(*place).map(|service| service.name.clone());
    let services = config.services.iter().map(|service| (service.name.clone(), opening(service)));
    let allowance = |user: &UserEntry| Allowance {
        services: user.services.iter().filter_map(name).collect(),
        from: user.from.clone(),
        bound: user.must_bind(),
        open_for: user.open_for.map(|cap| cap.0),
        expires: user.expires.map(Moment::unix),
        add_to: user.add_to.clone(),
    };
    let users = config.users.iter().map(|user| (user.name.clone(), allowance(user)));
    Policy {
        owns_table: config.ruleset_mode == RulesetMode::Managed,
        grants_per_minute: config.grants_per_minute,
        services: services.collect(),
        users: users.collect(),
        log_closings: config.log_closings,
        trusted: config.trusted.clone(),
        old_count,
    }
}

fn limits(config: &ServerConfig, identity: Identity) -> Limits {
    let mut ports = BTreeMap::new();
    for Service { ports: guarded, once, open_for, .. } in &config.services {
        for port in guarded {
            let most = ports.entry((*port, *once)).or_insert(*open_for);
            *most = (*most).max(*open_for);
        }
    }
    let is_from_anywhere = config.users.iter().any(|user| user.from.is_empty());
    Limits {
        identity,
        queue: config.queue,
        owns_table: config.ruleset_mode == RulesetMode::Managed,
        answer: config.answer,
        grants_per_minute: config.grants_per_minute,
        ports,
        from: (!is_from_anywhere).then(|| config.users.iter().flat_map(|user| user.from.iter().copied()).collect()),
        sets: config.users.iter().flat_map(|user| user.add_to.iter().cloned()).collect(),
        sessions: BTreeSet::new(),
    }
}
