//! `knockq init`

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::{self, IsTerminal};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{self, Path, PathBuf};

use clap::Args;
use ipnet::IpNet;

use super::failure::{CONFIGURATION, Failure, USAGE};
use super::inspect::{ephemeral_ports, warn_of_ephemeral_ports};
use super::{note, print, sockets};
use crate::client::address::{is_global, own_addresses};
use crate::client::clock::unix_now;
use crate::config::secure_file::{self, Privacy};
use crate::config::server::{RUNTIME_DIRECTORY, STATE_DIRECTORY};
use crate::config::{FileError, ServerConfig};
use crate::crypto::{KnockPorts, KnockPortsError, PrivateKey};
use crate::serve::store::{Store, StoreFloor};
use crate::service::{HostAddress, Port, Transport};

/// Knock ports that are chosen where none are given.
const KNOCK_PORTS: u16 = 1024;

/// Where the search for them begins.
const FIRST_KNOCK_PORT: u16 = 20_000;

/// Names of services (services(5)), which a small system may lack.
const SERVICES: &str = "/etc/services";

/// What it says of common ones where Debian's package netbase is installed.
const COMMON: &str = "\
ftp 21/tcp
ssh 22/tcp
telnet 23/tcp
smtp 25/tcp
domain 53/tcp
domain 53/udp
http 80/tcp
pop3 110/tcp
ntp 123/udp
imap2 143/tcp
snmp 161/udp
ldap 389/tcp
https 443/tcp
https 443/udp
microsoft-ds 445/tcp
submissions 465/tcp
isakmp 500/udp
syslog 514/udp
submission 587/tcp
ipp 631/tcp
ldaps 636/tcp
domain-s 853/tcp
rsync 873/tcp
imaps 993/tcp
pop3s 995/tcp
socks 1080/tcp
openvpn 1194/tcp
openvpn 1194/udp
ms-sql-s 1433/tcp
nfs 2049/tcp
mysql 3306/tcp
ms-wbt-server 3389/tcp
svn 3690/tcp
sieve 4190/tcp
ipsec-nat-t 4500/udp
sip 5060/tcp
sip 5060/udp
sip-tls 5061/tcp
xmpp-client 5222/tcp
xmpp-server 5269/tcp
postgresql 5432/tcp
amqp 5672/tcp
redis 6379/tcp
ircs-u 6697/tcp
http-alt 8080/tcp
git 9418/tcp
";

#[derive(Args)]
#[command(after_help = "Example:\n  knockq init --protect tcp/22 --protect udp/51820 --address vpn.example.org")]
pub(super) struct Init {
    /// A port to shut to all but those who knock
    #[arg(long, value_name = "TRANSPORT/PORT", required = true)]
    protect: Vec<Port>,
    /// Ports to knock at, such as 20000-21023 [default: 1024 where nobody listens]
    #[arg(long, value_name = "PORTS", value_delimiter = ',')]
    knock_ports: Vec<String>,
    /// Name or address that clients reach this host by [default: its own addresses]
    #[arg(long, value_name = "HOST")]
    address: Vec<HostAddress>,
    /// Where to put the configuration
    #[arg(long, value_name = "DIR", default_value = "/etc/knockq")]
    dir: PathBuf,
    /// Where to keep the counters
    #[arg(long, value_name = "DIR", default_value = STATE_DIRECTORY)]
    state: PathBuf,
    /// Where the daemon listens for `revoke` and its like
    #[arg(long, value_name = "DIR", default_value = RUNTIME_DIRECTORY)]
    runtime: PathBuf,
}

impl Init {
    pub(super) fn run(self) -> Result<(), Failure> {
        let absolute = |path: &Path| path::absolute(path).map_err(|cause| FileError::io(path, cause));
        let (state, runtime) = (absolute(&self.state)?, absolute(&self.runtime)?);
        let knock_ports = self.choose_knock_ports()?;
        let addresses = if self.address.is_empty() { host_addresses() } else { self.address.clone() };
        let trusted = offer_trust();
        let paths = Paths {
            key: self.dir.join("server.key"),
            config: self.dir.join("knockq.toml"),
            users: self.dir.join("users.d"),
            ruleset: self.dir.join("knockq.nft"),
            store: state.join("counters.redb"),
        };
        paths.refuse_existing()?;

        let mut made = Made::default();
        for directory in [&self.dir, &state, &paths.users] {
            secure_file::create_directory(directory)?;
        }
        let key = PrivateKey::generate().map_err(|error| Failure::new(error.to_string()))?;
        made.file(&paths.key, &key.to_file_line(), Privacy::Secret)?;
        made.file(
            &paths.config,
            &self.config_text(&knock_ports, &addresses, trusted, &state, &runtime),
            Privacy::Public,
        )?;
        made.store(&paths.store, &key)?;
        let config = ServerConfig::load(&paths.config)?;
        made.file(&paths.ruleset, &config.ruleset().to_string(), Privacy::Public)?;
        made.keep();
        warn_of_ephemeral_ports(&config);
        print(&self.next_steps(&paths, &key, &config))
    }

    fn choose_knock_ports(&self) -> Result<KnockPorts, Failure> {
        let fail = |error: KnockPortsError| Failure::new(format!("--knock-ports: {error}")).code(USAGE);
        if !self.knock_ports.is_empty() {
            let ports = KnockPorts::try_from(self.knock_ports.clone()).map_err(fail)?;
            let is_guarded = |port: &&Port| port.transport == Transport::Tcp && ports.iter().any(|n| n == port.number);
            return match self.protect.iter().find(is_guarded) {
                Some(port) => Err(Failure::new(format!("--knock-ports: {port} is to be guarded"))
                    .hint("choose knock ports where no service listens")
                    .code(USAGE)),
                None => Ok(ports),
            };
        }
        let mut taken = listening_ports();
        taken.extend(self.protect.iter().map(|port| port.number));
        let limit = *ephemeral_ports().start();
        let is_free = |first: &u16| {
            first
                .checked_add(KNOCK_PORTS - 1)
                .is_some_and(|last| last < limit && taken.range(*first..=last).next().is_none())
        };
        let above = (FIRST_KNOCK_PORT..limit.max(FIRST_KNOCK_PORT)).step_by(usize::from(KNOCK_PORTS));
        let below = (1024..FIRST_KNOCK_PORT).rev().step_by(usize::from(KNOCK_PORTS));
        let first = above.chain(below).find(is_free).ok_or_else(|| {
            Failure::new(format!("no {KNOCK_PORTS} ports in a row are free below {limit}"))
                .hint("choose some yourself: --knock-ports 20000-20255,21000-21255")
        })?;
        KnockPorts::new([first..=first + (KNOCK_PORTS - 1)]).map_err(fail)
    }

    fn config_text(
        &self,
        knock_ports: &KnockPorts,
        addresses: &[HostAddress],
        trusted: Option<IpAddr>,
        state: &Path,
        runtime: &Path,
    ) -> String {
        let list = |items: &[String]| items.iter().map(|item| format!("{item:?}")).collect::<Vec<_>>().join(", ");
        let mut text = String::from("# knockq: see docs/configuration.md; check it with `knockq check`.\n\n[server]\n");
        let _ = writeln!(text, "private_key = \"server.key\"");
        let _ = writeln!(text, "knock_ports = [{}]", list(&Vec::from(knock_ports.clone())));
        if addresses.is_empty() {
            let _ = writeln!(text, "# address   = [\"server.example.org\"]   # what goes into profiles");
        } else {
            let _ = writeln!(
                text,
                "address     = [{}]   # what goes into profiles",
                list(&addresses.iter().map(ToString::to_string).collect::<Vec<_>>())
            );
        }
        if let Some(address) = trusted {
            let _ = writeln!(text, "trusted     = [\"{}\"]   # never gated", IpNet::from(address));
        }
        for (setting, directory, default) in
            [("state      ", state, STATE_DIRECTORY), ("runtime    ", runtime, RUNTIME_DIRECTORY)]
        {
            if directory != Path::new(default) {
                let _ = writeln!(text, "{setting} = {:?}", directory.display().to_string());
            }
        }
        // One number is one service, over both transports if both are named: it is also what a token names it by.
        let mut services: BTreeMap<u16, BTreeSet<Port>> = BTreeMap::new();
        for port in &self.protect {
            services.entry(port.number).or_default().insert(*port);
        }
        let mut names = BTreeSet::new();
        for ports in services.values() {
            let Some(first) = ports.first() else { continue };
            let name = Some(service_name(first)).filter(|name| names.insert(name.clone()));
            let name = name.unwrap_or_else(|| numbered_name(first));
            let ports = list(&ports.iter().map(ToString::to_string).collect::<Vec<_>>());
            let _ = writeln!(text, "\n[services.{name}]\nports    = [{ports}]");
            text.push_str("open_for = \"30s\"   # how long new connections may be made\n");
        }
        text
    }

    fn next_steps(&self, paths: &Paths, key: &PrivateKey, config: &ServerConfig) -> String {
        let option = if self.dir == Path::new("/etc/knockq") {
            String::new()
        } else {
            format!(" --config {}", paths.config.display())
        };
        let addresses: Vec<&str> = config.addresses.iter().map(HostAddress::as_str).collect();
        let addresses = match addresses.as_slice() {
            [] => "none found: set `address` in [server]".to_owned(),
            found => format!("{} (set `address` in [server] if clients use another)", found.join(", ")),
        };
        let service = config.services.first().map(|service| service.name.to_string()).unwrap_or_default();
        let allow: String = config.services.iter().map(|service| format!(" --allow {}", service.name)).collect();
        format!(
            "Wrote {} and beside it server.key, users.d/ and knockq.nft; counters are in {}.\n\
             Server key: {}\nKnock ports: {}\nAddresses in profiles: {}\n\n\
             Next:\n  \
             1. On the client:  knockq keygen\n  \
             2. Here:           knockq user add NAME --key PUBLIC-KEY{allow}{option}\n  \
             3. On the client:  knockq host add HOST -      (paste the profile that step 2 printed)\n  \
             4. Here:           knockq serve{option}\n  \
             5. On the client:  knockq send HOST {service} --wait\n\n\
             The host's own firewall must allow the guarded port: knockq only shuts it.\n\
             Keep a session open until step 5 has worked. Knocks need clocks within {} of each other.\n",
            paths.config.display(),
            self.state.display(),
            key.public(),
            config.knock_ports,
            addresses,
            config.window,
        )
    }
}

struct Paths {
    key: PathBuf,
    config: PathBuf,
    users: PathBuf,
    ruleset: PathBuf,
    store: PathBuf,
}

impl Paths {
    fn refuse_existing(&self) -> Result<(), Failure> {
        match [&self.key, &self.config, &self.ruleset, &self.store].into_iter().find(|path| path.exists()) {
            Some(path) => Err(Failure::new(format!("{}: exists already, and init overwrites nothing", path.display()))
                .hint("move it away, or name other directories with --dir and --state")
                .code(CONFIGURATION)),
            None => Ok(()),
        }
    }
}

/// Files that are taken away again unless all of them could be made.
#[derive(Default)]
struct Made(Vec<PathBuf>);

impl Made {
    fn file(&mut self, path: &Path, contents: &str, privacy: Privacy) -> Result<(), Failure> {
        secure_file::create(path, contents, privacy)?;
        self.0.push(path.to_owned());
        Ok(())
    }

    fn store(&mut self, path: &Path, key: &PrivateKey) -> Result<(), Failure> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
        let file = file.map_err(|cause| FileError::Io { path: path.to_owned(), cause })?;
        self.0.push(path.to_owned());
        Store::create(file, key.public(), StoreFloor { floor: 0, since: unix_now() })
            .map_err(|cause| Failure::new(format!("{}: {cause}", path.display())))
    }

    fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

/// Under SSH, the address that one would lock out; asked for on a terminal, mentioned elsewhere.
fn offer_trust() -> Option<IpAddr> {
    let connection = std::env::var("SSH_CONNECTION").ok()?;
    let address: IpAddr = connection.split_whitespace().next()?.parse().ok()?;
    if !io::stdin().is_terminal() {
        note(&format!(
            "You are logged in from {address}. To keep it out of the gate, add trusted = [\"{}\"] to [server]",
            IpNet::from(address)
        ));
        return None;
    }
    note(&format!("You are logged in from {address}. Keep that address out of the gate? [y/N]"));
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).ok()?;
    matches!(answer.trim(), "y" | "Y" | "yes").then_some(address)
}

/// The name in /etc/services, else the usual one, else `tcp-22`.
fn service_name(port: &Port) -> String {
    let services = fs::read_to_string(SERVICES).unwrap_or_default();
    let wanted = format!("{}/{}", port.number, port.transport);
    let name = services.lines().chain(COMMON.lines()).find_map(|line| {
        let mut fields = line.split_whitespace();
        let name = fields.next()?;
        (fields.next()? == wanted && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'))
            .then(|| name.to_owned())
    });
    name.unwrap_or_else(|| numbered_name(port))
}

fn numbered_name(port: &Port) -> String {
    format!("{}-{}", port.transport, port.number)
}

/// TCP ports that somebody listens on, of either family.
fn listening_ports() -> BTreeSet<u16> {
    let ports = sockets::listeners().into_iter().map(|listener| listener.port);
    ports.filter(|port| port.transport == Transport::Tcp).map(|port| port.number).collect()
}

/// This host's addresses that a client could use: global ones, or else any that are not link-local.
pub(super) fn host_addresses() -> Vec<HostAddress> {
    let mut addresses = own_addresses();
    addresses.retain(|address| match address {
        IpAddr::V4(v4) => !v4.is_link_local() && !v4.is_loopback(),
        IpAddr::V6(v6) => !v6.is_unicast_link_local() && !v6.is_loopback(),
    });
    if addresses.iter().any(is_global) {
        addresses.retain(is_global);
    }
    addresses.into_iter().map(HostAddress::from).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::{COMMON, service_name};
    use crate::service::{Name, Port};

    #[test]
    fn a_service_without_a_name_is_called_by_its_port() {
        assert_eq!(service_name(&"tcp/64999".parse().unwrap()), "tcp-64999");
    }

    #[test]
    fn a_common_service_has_one_name_that_a_configuration_takes() {
        let mut ports = HashSet::new();
        for line in COMMON.lines() {
            let (name, port) = line.split_once(' ').unwrap();
            let (number, transport) = port.split_once('/').unwrap();
            assert!(name.parse::<Name>().is_ok(), "{name}");
            assert!(format!("{transport}/{number}").parse::<Port>().is_ok(), "{port}");
            assert!(ports.insert(port), "{port} twice");
        }
    }
}
