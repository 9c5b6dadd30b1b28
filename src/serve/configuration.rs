//! The child that reads the configuration and its keys, at the start and at each reload, and hands on what each process
//! needs of it. A file that cannot be read or understood ends this child, and nothing else.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::channel::{Channel, Message};
use super::children::CONFIGURATION;
use super::ending::ServeError;
use super::handover;
use super::limits::Limits;
use super::policy::{Allowance, Opening, Policy};
use super::sandbox::{self, Identity, SandboxError};
use super::settings::Settings;
use super::vocabulary::Breach;
use crate::config::secure_file::{self, Privacy};
use crate::config::server::RulesetMode;
use crate::config::users::UserEntry;
use crate::config::{Moment, ServerConfig};
use crate::crypto::PublicKey;
use crate::nft::{self, Ruleset};
use crate::verify::Service;

/// The engine where the configured account does not exist: `nobody`, as everywhere.
const ENGINE_FALLBACK: Identity = Identity { uid: 65_534, gid: 65_534 };

/// The gate where its account does not exist: it must not be the engine's.
const GATE_FALLBACK: Identity = Identity { uid: 65_533, gid: 65_533 };

/// What root's process needs of a configuration.
#[derive(Serialize, Deserialize)]
pub struct Plan {
    /// What only a restart can change.
    pub fixed: Fixed,
    /// The group of the engine's account, whose members may look on; `None` where there is no such account.
    pub observers: Option<u32>,
    /// Accounts that others stand in for.
    pub missing_accounts: Vec<String>,
    /// The table.
    pub ruleset: Ruleset,
    /// How many may knock.
    pub users: usize,
    /// For how many services.
    pub services: usize,
    /// Where.
    pub knock_ports: String,
}

/// What only a restart can change.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub struct Fixed {
    /// The server's key.
    pub server: PublicKey,
    /// The counter store's file.
    pub store: PathBuf,
    /// Directory of the daemon's socket.
    pub runtime: PathBuf,
    /// Number of the queue.
    pub queue: u16,
    /// Who loads the table.
    pub ruleset_mode: RulesetMode,
    /// Whom engine and gate become.
    pub accounts: [Identity; 2],
}

/// What this child has handed to root: its plan, and what is for the engine and for the gate.
///
/// # Errors
/// When it is anything else.
pub fn take(handed: Vec<OwnedFd>) -> Result<(Plan, OwnedFd, OwnedFd), ServeError> {
    let breach = || ServeError::Breach { process: CONFIGURATION, breach: Breach::Unreadable };
    let [plan, settings, limits] = handed.try_into().map_err(|_| breach())?;
    Ok((handover::unseal(plan).map_err(|_| breach())?, settings, limits))
}

impl Fixed {
    /// The setting that differs, if any.
    pub fn difference(&self, other: &Self) -> Option<&'static str> {
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

/// Reads the configuration, shows it, and hands root three sealed memories: its [`Plan`], the engine's [`Settings`], the
/// gate's [`Limits`].
///
/// # Errors
/// [`ServeError::Config`] and [`ServeError::Account`] for what is wrong in the files.
pub fn run(path: &Path, show: impl FnOnce(&ServerConfig)) -> Result<(), ServeError> {
    let root = Channel::of_stdin()?;
    sandbox::keep_only(&[])?;
    sandbox::write_only_to(&[])?;
    let config = ServerConfig::load(path)?;
    let (accounts, missing_accounts) = accounts(&config)?;
    show(&config);
    let [engine, gate] = accounts;
    let settings = Settings {
        identity: engine,
        server: *config.private_key.public(),
        store_path: config.store_path().display().to_string(),
        registry: config.registry()?,
        policy: policy(&config, was_of_before(path)),
    };
    let settings = handover::seal(&settings)?;
    let limits = handover::seal_bytes(limits(&config, gate).to_string().as_bytes())?;
    let plan = handover::seal(&plan(&config, accounts, missing_accounts))?;
    root.send(Message::Ready, &[&plan, &settings, &limits].map(AsFd::as_fd))?;
    Ok(())
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

/// Whether the table was loaded last by a daemon whose doors did not say when they end.
fn was_of_before(path: &Path) -> bool {
    let kept = secure_file::read(&path.with_file_name("knockq.nft"), Privacy::Public);
    kept.is_ok_and(|kept| nft::is_of_before(&kept))
}

fn plan(config: &ServerConfig, accounts: [Identity; 2], missing_accounts: Vec<String>) -> Plan {
    let [engine, _] = accounts;
    Plan {
        fixed: Fixed {
            server: *config.private_key.public(),
            store: config.store_path(),
            runtime: config.runtime.clone(),
            queue: config.queue,
            ruleset_mode: config.ruleset_mode,
            accounts,
        },
        observers: (!missing_accounts.contains(&config.account)).then_some(engine.gid),
        missing_accounts,
        ruleset: config.ruleset(),
        users: config.users.len(),
        services: config.services.len(),
        knock_ports: config.all_knock_ports().to_string(),
    }
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
    }
}
