//! What `knockq user add` and `invite` have in common: who may open what, and the file that says so.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::profile::Holder;
use super::{entry_path, exists};
use crate::cli::failure::{Failure, USAGE};
use crate::cli::{ConfigArg, note};
use crate::config::secure_file::{self, Privacy};
use crate::config::{Moment, Network, Seconds, ServerConfig};
use crate::crypto::PublicKey;
use crate::nft::SetName;
use crate::service::{Name, NameError};

#[derive(Args)]
pub(super) struct Entry {
    /// The user's name
    pub(super) name: Name,
    /// A service that the user may open; may be left out if there is one
    #[arg(long, value_name = "SERVICE", value_parser = service)]
    allow: Vec<Name>,
    /// Networks that the user's knocks may come from
    #[arg(long, value_name = "CIDR")]
    from: Vec<Network>,
    /// Take only knocks that are bound to the address they come from
    #[arg(long, value_name = "POLICY")]
    source: Option<SourceArg>,
    /// A knock opens for so long at most, if the service allows more: 90s, 15m, 2h, 1d
    #[arg(long, value_name = "DURATION")]
    open_for: Option<Seconds>,
    /// From then on the user opens nothing: 2027-01-31, or 2027-01-31T18:00:00Z
    #[arg(long, value_name = "DATE")]
    expires: Option<Moment>,
    /// A set of yours that the user's address is added to while a door is open: 'inet filter alice'
    #[arg(long, value_name = "SET")]
    add_to: Vec<SetName>,
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

/// What `--allow` takes.
fn service(text: &str) -> Result<Name, String> {
    one_alone(text)?;
    text.parse().map_err(|error: NameError| error.to_string())
}

/// In a hurry one writes several services into one `--allow`.
///
/// # Errors
/// What to write then.
pub(in crate::cli) fn one_alone(text: &str) -> Result<(), String> {
    let each = text.split(',').map(str::trim).filter(|service| !service.is_empty());
    let repeated: Vec<String> = each.map(|service| format!("--allow {}", service.escape_default())).collect();
    if text.contains(',') { Err(format!("once for each service: {}", repeated.join(" "))) } else { Ok(()) }
}

/// What `--allow` stands for: those services, or the only one.
///
/// # Errors
/// When there is no such service, or none is named of several.
pub(in crate::cli) fn allowed_services(allow: &[Name], config: &ServerConfig) -> Result<Vec<Name>, Failure> {
    let known: Vec<Name> = config.services.iter().map(|service| service.name.clone()).collect();
    let names: Vec<&str> = known.iter().map(Name::as_str).collect();
    match (allow.iter().find(|name| !known.contains(name)), allow.is_empty(), known.len()) {
        (Some(unknown), _, _) => Err(Failure::new(format!("--allow: there is no service `{unknown}`"))
            .hint(format!("services are: {}", names.join(", ")))
            .code(USAGE)),
        (None, false, _) => Ok(allow.to_vec()),
        (None, true, 1) => Ok(known),
        (None, true, _) => Err(Failure::new("--allow: there are several services".to_owned())
            .hint(format!("name what the user may open: {}", names.join(", ")))
            .code(USAGE)),
    }
}

impl Entry {
    pub(super) fn config(&self) -> &Path {
        &self.config.config
    }

    /// The server's configuration, which has no user of this name yet.
    pub(super) fn configuration(&self) -> Result<ServerConfig, Failure> {
        let config = ServerConfig::load(self.config())?;
        if config.users.iter().any(|user| user.name == self.name) {
            return Err(exists(&self.name, self.config()));
        }
        Ok(config)
    }

    pub(super) fn allowed_services(&self, config: &ServerConfig) -> Result<Vec<Name>, Failure> {
        allowed_services(&self.allow, config)
    }

    /// An end that has come is seldom what was meant.
    pub(super) fn warn_if_expired(&self) {
        if let Some(expiry) = self.expires.filter(|expiry| expiry.is_over()) {
            note(&format!("warning: {} opens nothing, for {expiry} is over", self.name));
        }
    }

    /// Whom the profile is for.
    pub(super) fn holder<'a>(&'a self, key: PublicKey, allowed: &'a [Name], is_preshared: bool) -> Holder<'a> {
        Holder { name: &self.name, key, allowed, open_for: self.open_for, is_preshared }
    }

    /// Makes the user's file, on disk when this returns.
    pub(super) fn write(&self, key: &PublicKey, allowed: &[Name], psk_file: Option<&Path>) -> Result<PathBuf, Failure> {
        let path = entry_path(self.config(), &self.name);
        secure_file::create_directory(path.parent().unwrap_or(Path::new(".")))?;
        secure_file::create(&path, &self.text(key, allowed, psk_file), Privacy::Public)?;
        if let Err(error) = ServerConfig::load(self.config()) {
            let _ = fs::remove_file(&path); // a configuration that worked must go on working
            return Err(error.into());
        }
        Ok(path)
    }

    fn text(&self, key: &PublicKey, allowed: &[Name], psk_file: Option<&Path>) -> String {
        let list = |items: Vec<String>| items.iter().map(|item| format!("\"{item}\"")).collect::<Vec<_>>().join(", ");
        let mut text = format!("public_key = \"{key}\"\n");
        let _ = writeln!(text, "services   = [{}]", list(allowed.iter().map(ToString::to_string).collect()));
        if !self.from.is_empty() {
            let _ = writeln!(text, "from       = [{}]", list(self.from.iter().map(ToString::to_string).collect()));
        }
        if matches!(self.source, Some(SourceArg::Bound)) {
            text.push_str("source     = \"bound\"\n");
        }
        let lines = [
            ("open_for", self.open_for.map(|cap| cap.to_string())),
            ("expires", self.expires.map(|expiry| expiry.to_string())),
            ("psk_file", psk_file.map(|file| file.display().to_string())),
        ];
        for (key, value) in lines {
            if let Some(value) = value {
                let _ = writeln!(text, "{key:<10} = {}", toml::Value::from(value));
            }
        }
        if !self.add_to.is_empty() {
            let _ = writeln!(text, "add_to     = [{}]", list(self.add_to.iter().map(ToString::to_string).collect()));
        }
        text
    }
}
