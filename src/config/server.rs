//! `knockq.toml`: the server and its services.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::limits::{At, OPENINGS, within_or};
use super::secure_file::{self, Privacy};
use super::users::{self, UserEntry};
use super::{ConfigError, Diagnostic, Knockknock, Moment, Network, Seconds};
use crate::crypto::{KnockPorts, KnockSecrets, PrivateKey, Side};
use crate::nft::Ruleset;
use crate::service::{Answer, HostAddress, Name, Port, Transport};
use crate::verify::{KnockknockProfile, Registry, Secrets, Service, User};

/// Where the counters are kept, unless `state` names another directory.
pub const STATE_DIRECTORY: &str = "/var/lib/knockq";

/// Where the daemon's socket is, unless `runtime` names another directory.
pub const RUNTIME_DIRECTORY: &str = "/run/knockq";

/// The queue, unless `queue` names another one.
pub const QUEUE: u16 = 4097;

/// Seconds that a window may have: below, knocks fail on the slightest skew; above, the index grows past its use.
const WINDOWS: RangeInclusive<Seconds> = Seconds(5)..=Seconds(600);

/// Doors that may be opened in a minute, unless `grants_per_minute` says otherwise: ten a second.
const GRANTS: u32 = 600;

/// What it may say: a thousand a second is more than any disk takes counters.
const GRANTS_PER_MINUTE: RangeInclusive<u32> = 1..=60_000;

/// A configuration that was read, checked and understood.
pub struct ServerConfig {
    /// The server's key.
    pub private_key: PrivateKey,
    /// Where one knocks.
    pub knock_ports: KnockPorts,
    /// How far a counter may be off.
    pub window: Seconds,
    /// What SYNs to a knock port or a guarded port get.
    pub answer: Answer,
    /// Who loads the table.
    pub ruleset_mode: RulesetMode,
    /// Number of the netfilter queue.
    pub queue: u16,
    /// Doors that may be opened in a minute at most, whoever asks.
    pub grants_per_minute: u32,
    /// Doors that shut have a line in the log.
    pub log_closings: bool,
    /// Account that the verifier runs as.
    pub account: String,
    /// Networks that are never gated.
    pub trusted: Vec<IpNet>,
    /// Host names or addresses that clients are told.
    pub addresses: Vec<HostAddress>,
    /// Directory of the counter store.
    pub state: PathBuf,
    /// Directory of the daemon's socket.
    pub runtime: PathBuf,
    /// What can be opened, by name.
    pub services: Vec<Service>,
    /// Who may, by name.
    pub users: Vec<UserEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    server: Server,
    #[serde(default)]
    services: BTreeMap<Name, Spanned<ServiceTable>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Server {
    private_key: PathBuf,
    knock_ports: Spanned<KnockPorts>,
    window: Option<Spanned<Seconds>>,
    #[serde(default)]
    answer: Answer,
    #[serde(default)]
    ruleset: RulesetMode,
    queue: Option<u16>,
    grants_per_minute: Option<Spanned<u32>>,
    #[serde(default)]
    log_closings: bool,
    user: Option<Name>,
    #[serde(default)]
    trusted: Vec<Network>,
    #[serde(default)]
    address: Vec<HostAddress>,
    state: Option<PathBuf>,
    runtime: Option<PathBuf>,
}

/// Who loads the table.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RulesetMode {
    /// `serve`, which also loads it again when somebody else takes it away.
    #[default]
    Managed,
    /// The host's nftables.conf includes it; `serve` only checks that it is there and right.
    External,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ServiceTable {
    ports: Spanned<Vec<Port>>,
    open_for: Option<Spanned<Seconds>>,
    #[serde(default)]
    once: bool,
    selector: Option<u16>,
    #[serde(default)]
    on_close: OnClose,
}

/// What becomes of established connections when a door shuts.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum OnClose {
    /// They live on.
    #[default]
    Keep,
    /// They end.
    Kill,
}

impl ServerConfig {
    /// Reads the file, the server's key, and the users beside it.
    ///
    /// # Errors
    /// The first thing that is wrong, with its place.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = secure_file::read(path, Privacy::Public)?;
        let file: File = toml::from_str(&text).map_err(|error| misread(path, &text, &error))?;
        let at = |span, message: String| Diagnostic::new(path, &text, span, message);
        let File { server, services } = file;

        let window = within_or(server.window, Seconds(60), &WINDOWS, "window", &at)?;
        let grants_per_minute =
            within_or(server.grants_per_minute, GRANTS, &GRANTS_PER_MINUTE, "grants_per_minute", &at)?;
        let services = services
            .into_iter()
            .map(|(name, table)| service(name, table, &at))
            .collect::<Result<Vec<(Service, Range<usize>)>, Diagnostic>>()?;
        check_services(&services, &server.knock_ports, grants_per_minute, &at)?;
        let services: Vec<Service> = services.into_iter().map(|(service, _)| service).collect();

        let directory = path.parent().unwrap_or(Path::new("."));
        let key_path = directory.join(&server.private_key);
        let key = secure_file::read(&key_path, Privacy::Secret).map_err(ConfigError::ServerKeyFile)?;
        let private_key: PrivateKey = key.parse().map_err(|cause| ConfigError::ServerKey { path: key_path, cause })?;
        let users = users::load(&directory.join("users.d"), &services, private_key.public())?;
        Ok(Self {
            private_key,
            knock_ports: server.knock_ports.into_inner(),
            window,
            answer: server.answer,
            ruleset_mode: server.ruleset,
            queue: server.queue.unwrap_or(QUEUE),
            grants_per_minute,
            log_closings: server.log_closings,
            account: server.user.map_or_else(|| "knockq".to_owned(), String::from),
            trusted: server.trusted.into_iter().map(|network| network.0).collect(),
            addresses: server.address,
            state: directory.join(server.state.unwrap_or_else(|| STATE_DIRECTORY.into())),
            runtime: directory.join(server.runtime.unwrap_or_else(|| RUNTIME_DIRECTORY.into())),
            services,
            users,
        })
    }

    /// The counter store's file.
    pub fn store_path(&self) -> PathBuf {
        self.state.join("counters.redb")
    }

    /// Agrees on keys with every user (44 us each), for the verifier.
    ///
    /// # Errors
    /// When a key agrees on nothing, which loading has ruled out.
    pub fn registry(&self) -> Result<Registry, ConfigError> {
        let user = |entry: &UserEntry| {
            Ok(User {
                name: entry.name.clone(),
                public_key: entry.public_key,
                secrets: self.secrets(entry)?,
                services: entry.services.clone(),
                source: entry.source,
                from: entry.from.clone(),
                open_for: entry.open_for.map(|cap| cap.0),
                expires: entry.expires.map(Moment::unix),
            })
        };
        Ok(Registry {
            window: self.window.0.into(),
            knock_ports: self.knock_ports.clone(),
            grants_per_minute: self.grants_per_minute,
            services: self.services.clone(),
            users: self.users.iter().map(user).collect::<Result<_, ConfigError>>()?,
        })
    }

    fn secrets(&self, entry: &UserEntry) -> Result<Secrets, ConfigError> {
        if let Some(Knockknock { secrets, knock_port, counter, as_of, .. }) = &entry.knockknock {
            let (secrets, as_of) = (secrets.clone(), as_of.unix());
            return Ok(Secrets::Knockknock(KnockknockProfile {
                secrets,
                knock_port: *knock_port,
                counter: *counter,
                as_of,
            }));
        }
        let preshared = entry.preshared.as_ref().map(|(_, key)| key);
        KnockSecrets::derive(Side::Server, &self.private_key, &entry.public_key, preshared)
            .map(Secrets::Token)
            .map_err(|cause| ConfigError::Key { path: entry.path.clone(), cause })
    }

    /// Every port that somebody knocks at: the server's own, and those of knockknock profiles.
    pub fn all_knock_ports(&self) -> KnockPorts {
        self.knock_ports.and(self.users.iter().filter_map(|user| Some(user.knockknock.as_ref()?.knock_port)))
    }

    /// The table for this configuration.
    pub fn ruleset(&self) -> Ruleset {
        let ports = |services: &mut dyn Iterator<Item = &Service>| {
            let ports: BTreeSet<Port> = services.flat_map(|service| service.ports.clone()).collect();
            ports.into_iter().collect()
        };
        Ruleset {
            guarded: ports(&mut self.services.iter()),
            kill: ports(&mut self.services.iter().filter(|service| service.kill)),
            knock_ports: self.all_knock_ports().ranges(),
            trusted: self.trusted.clone(),
            answer: self.answer,
            queue: self.queue,
        }
    }
}

/// What is wrong, and where a setting belongs that was written below another table, as at the end of the file.
fn misread(path: &Path, text: &str, error: &toml::de::Error) -> Diagnostic {
    let diagnostic = Diagnostic::of_toml(path, text, error);
    match unknown_field(error).filter(|field| is_of_server(field)) {
        Some(field) => diagnostic
            .with_hint(format!("`{field}` belongs to [server]: write it there, above the next line in brackets")),
        None => diagnostic,
    }
}

fn unknown_field(error: &toml::de::Error) -> Option<&str> {
    Some(error.message().strip_prefix("unknown field `")?.split_once('`')?.0)
}

fn is_of_server(field: &str) -> bool {
    let alone = toml::Table::from_iter([(field.to_owned(), false.into())]);
    alone.try_into::<Server>().is_err_and(|error| unknown_field(&error).is_none())
}

fn service(name: Name, table: Spanned<ServiceTable>, at: &At<'_>) -> Result<(Service, Range<usize>), Diagnostic> {
    let ServiceTable { ports, open_for, once, selector, on_close } = table.into_inner();
    let open_for = within_or(open_for, Seconds(30), &OPENINGS, "open_for", at)?;
    let span = ports.span();
    let ports = ports.into_inner();
    let Some(first) = ports.first() else {
        return Err(at(span, format!("service {name} has no port")).with_hint("ports = [\"tcp/22\"]"));
    };
    let selector = selector.unwrap_or(first.number);
    Ok((Service { name, selector, ports, open_for: open_for.0, once, kill: on_close == OnClose::Kill }, span))
}

fn check_services(
    services: &[(Service, Range<usize>)],
    knock_ports: &Spanned<KnockPorts>,
    grants_per_minute: u32,
    at: &At<'_>,
) -> Result<(), Diagnostic> {
    if services.is_empty() {
        return Err(
            at(0..0, "no service is configured".to_owned()).with_hint("add [services.ssh] with ports = [\"tcp/22\"]")
        );
    }
    let mut owners: HashMap<u16, &Name> = HashMap::new();
    for (service, span) in services {
        if let Some(other) = owners.insert(service.selector, &service.name) {
            let message = format!("services {other} and {} have the same selector {}", service.name, service.selector);
            return Err(at(span.clone(), message).with_hint("give one of them `selector = N`, a number of its own"));
        }
        let doors = service.ports.len();
        if u32::try_from(doors).map_or(true, |doors| doors > grants_per_minute) {
            let message = format!(
                "service {} has {doors} ports, which open together or not at all, and grants_per_minute is {grants_per_minute}",
                service.name
            );
            return Err(at(span.clone(), message).with_hint(format!("grants_per_minute = {}", 2 * doors)));
        }
        let is_knocked_at =
            |port: &&Port| port.transport == Transport::Tcp && knock_ports.get_ref().contains(port.number);
        if let Some(port) = service.ports.iter().find(is_knocked_at) {
            let message = format!("knock port {} is guarded by service {}", port.number, service.name);
            return Err(at(knock_ports.span(), message).with_hint("choose knock ports where no service listens"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;
    use std::path::Path;
    use std::{env, fs, process};

    use rustix::time::{ClockId, clock_gettime};

    use super::ServerConfig;
    use crate::crypto::PrivateKey;

    /// Seconds of this thread's CPU that it takes to read so many services, and a user of them all.
    fn cost(directory: &Path, services: usize) -> f64 {
        let mut text = "[server]\nprivate_key = \"key\"\nknock_ports = [\"20000\"]\n".to_owned();
        let mut listed = String::new();
        for number in 0..services {
            let _ = writeln!(text, "[services.s{number}]\nports = [\"udp/9\"]\nselector = {number}");
            let _ = write!(listed, "\"s{number}\",");
        }
        let user = PrivateKey::generate().unwrap();
        fs::write(directory.join("knockq.toml"), text).unwrap();
        fs::write(
            directory.join("users.d/u.toml"),
            format!("public_key = \"{}\"\nservices = [{listed}]", user.public()),
        )
        .unwrap();
        let now = || {
            let now = clock_gettime(ClockId::ThreadCPUTime);
            now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
        };
        let start = now();
        let config = ServerConfig::load(&directory.join("knockq.toml")).unwrap();
        let cost = now() - start;
        assert_eq!((config.services.len(), config.users[0].services.len()), (services, services));
        cost
    }

    /// Not how fast it is, which is another's business: it must not grow with the square.
    #[test]
    fn four_times_the_services_cost_about_four_times_as_much() {
        let directory = env::temp_dir().join(format!("knockq-services-{}", process::id()));
        fs::create_dir_all(directory.join("users.d")).unwrap();
        fs::write(directory.join("key"), PrivateKey::generate().unwrap().to_file_line().as_bytes()).unwrap();
        fs::set_permissions(directory.join("key"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let [few, many] = [4_000, 16_000].map(|services| cost(&directory, services));
        fs::remove_dir_all(directory).unwrap();
        assert!(many < 9.0 * few, "{few} s, then {many} s");
    }
}
