//! `knockq user add`

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use clap::{Args, ValueEnum};

use super::{apply, entry_path, exists};
use crate::cli::failure::{CONFIGURATION, Failure, USAGE};
use crate::cli::init::host_addresses;
use crate::cli::{ConfigArg, note, print};
use crate::client::host::{Key, Profile, ProfileService};
use crate::config::secure_file::{self, Privacy};
use crate::config::{Network, ServerConfig};
use crate::crypto::{KeyError, PublicKey};
use crate::service::Name;

#[derive(Args)]
#[command(after_help = "Example:\n  knockq user add alice --key 'iMvpU…=' --allow ssh > alice.profile")]
pub(super) struct Add {
    /// The user's name
    name: Name,
    /// The public key that `knockq keygen` printed on the user's machine
    #[arg(long, value_name = "BASE64")]
    key: String,
    /// A service that the user may open; may be left out if there is one
    #[arg(long, value_name = "SERVICE")]
    allow: Vec<Name>,
    /// Networks that the user's knocks may come from
    #[arg(long, value_name = "CIDR")]
    from: Vec<Network>,
    /// Take only knocks that are bound to the address they come from
    #[arg(long, value_name = "POLICY")]
    source: Option<SourceArg>,
    #[command(flatten)]
    config: ConfigArg,
}

#[derive(Clone, Copy, ValueEnum)]
enum SourceArg {
    /// Bound to the sender's address, or unbound
    Any,
    /// Bound to the sender's address
    Bound,
}

impl Add {
    pub(super) fn run(self) -> Result<(), Failure> {
        let config = ServerConfig::load(&self.config.config)?;
        let key: PublicKey = self.key.parse().map_err(|error: KeyError| {
            Failure::new(format!("--key: {error}")).hint("`knockq keygen` prints the right one").code(USAGE)
        })?;
        if config.users.iter().any(|user| user.name == self.name) {
            return Err(exists(&self.name));
        }
        if let Some(user) = config.users.iter().find(|user| user.public_key == key) {
            return Err(Failure::new(format!("user {}: user {} has this public key already", self.name, user.name))
                .hint("one key belongs to one user on one machine: make another with `knockq keygen`")
                .code(CONFIGURATION));
        }
        if key == *config.private_key.public() {
            return Err(Failure::new(format!("user {}: this is the server's own key", self.name))
                .hint("the user makes one with `knockq keygen` on their machine")
                .code(CONFIGURATION));
        }
        let allowed = self.allowed_services(&config)?;
        let profile = profile_text(&config, &self.name, key, &allowed)?;

        let path = entry_path(&self.config.config, &self.name);
        secure_file::create_directory(path.parent().unwrap_or(Path::new(".")))?;
        secure_file::create(&path, &self.entry(&key, &allowed), Privacy::Public)?;
        if let Err(error) = ServerConfig::load(&self.config.config) {
            let _ = fs::remove_file(&path); // a configuration that worked must go on working
            return Err(error.into());
        }
        note(&format!("Wrote {}", path.display()));
        note(&format!("Give this profile to {}, who imports it with `knockq host add HOSTNAME -`:", self.name));
        print(&profile)?;
        apply(&self.config.config)
    }

    fn allowed_services(&self, config: &ServerConfig) -> Result<Vec<Name>, Failure> {
        let known: Vec<Name> = config.services.iter().map(|service| service.name.clone()).collect();
        let names: Vec<&str> = known.iter().map(Name::as_str).collect();
        match (self.allow.iter().find(|name| !known.contains(name)), self.allow.is_empty(), known.len()) {
            (Some(unknown), _, _) => Err(Failure::new(format!("--allow: there is no service `{unknown}`"))
                .hint(format!("services are: {}", names.join(", ")))
                .code(USAGE)),
            (None, false, _) => Ok(self.allow.clone()),
            (None, true, 1) => Ok(known),
            (None, true, _) => Err(Failure::new("--allow: there are several services".to_owned())
                .hint(format!("name what the user may open: {}", names.join(", ")))
                .code(USAGE)),
        }
    }

    fn entry(&self, key: &PublicKey, allowed: &[Name]) -> String {
        let list = |items: Vec<String>| items.iter().map(|item| format!("\"{item}\"")).collect::<Vec<_>>().join(", ");
        let mut text = format!("public_key = \"{key}\"\n");
        let _ = writeln!(text, "services   = [{}]", list(allowed.iter().map(ToString::to_string).collect()));
        if !self.from.is_empty() {
            let _ = writeln!(text, "from       = [{}]", list(self.from.iter().map(ToString::to_string).collect()));
        }
        if matches!(self.source, Some(SourceArg::Bound)) {
            text.push_str("source     = \"bound\"\n");
        }
        text
    }
}

/// What a user with this key imports. The first of the services is the one that is opened when none is named.
pub(super) fn profile_text(
    config: &ServerConfig,
    user: &Name,
    client: PublicKey,
    allowed: &[Name],
) -> Result<String, Failure> {
    if allowed.is_empty() {
        return Err(Failure::new(format!("user {user}: may open no service, so no client takes the profile"))
            .hint("put one into `services` of the user's file")
            .code(CONFIGURATION));
    }
    let address = if config.addresses.is_empty() { host_addresses() } else { config.addresses.clone() };
    if address.is_empty() {
        return Err(Failure::new("this host has no address that a client could use".to_owned())
            .hint("set `address = [\"server.example.org\"]` in [server]")
            .code(CONFIGURATION));
    }
    let services = config.services.iter().filter(|service| allowed.contains(&service.name)).map(|service| {
        let (selector, ports, once) = (service.selector, service.ports.clone(), service.once);
        (service.name.clone(), ProfileService { selector, ports, once })
    });
    let profile = Profile {
        server_key: Key(*config.private_key.public()),
        client_key: Key(client),
        address,
        knock_ports: config.knock_ports.clone(),
        window: config.window,
        default: (allowed.len() > 1).then(|| allowed.first().cloned()).flatten(),
        source: None,
        services: services.collect::<BTreeMap<_, _>>(),
    };
    Ok(format!("# knockq profile of {user} (no secret in it)\n{}", profile.to_text()))
}
