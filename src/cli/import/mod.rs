//! `knockq import`

mod client;
mod original;
mod server;

use std::collections::HashSet;
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Subcommand};

use super::failure::{Failure, USAGE};
use super::user::one_alone;
use super::{ConfigArg, note};
use crate::config::FileError;
use crate::service::{HostAddress, Name, NameError};

use original::{Found, Original, last_word, look};

#[derive(Args)]
#[command(
    after_help = "Example:\n  knockq import knockknock /etc/knockknock.d/profiles --allow ssh",
    disable_help_subcommand = true
)]
pub(super) struct Import {
    #[command(subcommand)]
    command: ImportCommand,
}

#[derive(Subcommand)]
enum ImportCommand {
    /// Take over a server's profiles of knockknock as users, or a client's profile of one host
    Knockknock(Knockknock),
}

impl Import {
    pub(super) fn run(self) -> Result<(), Failure> {
        match self.command {
            ImportCommand::Knockknock(knockknock) => knockknock.run(),
        }
    }
}

#[derive(Args)]
#[command(
    after_help = "Examples:\n  knockq import knockknock /etc/knockknock.d/profiles --allow ssh      # on the server\n  \
                        knockq import knockknock ~/.knockknock/host.example.org --allow ssh=22    # on a client\n\n\
                        DIR is read and left as it is: cipher.key, mac.key, counter and config, for each profile. \
                        All profiles of a server are taken or none; those that are users already stay as they are.\n\
                        Stop knockknock's own daemon before: from then on the count is kept here."
)]
struct Knockknock {
    /// A server's directory of profiles, or a client's directory of one host
    dir: PathBuf,
    /// Server: a service that the users may open, may be left out if there is one. Client: NAME=PORT, of TCP [default: ssh=22]
    #[arg(long, value_name = "SERVICE")]
    allow: Vec<Allowed>,
    /// Client: what to call the host [default: the directory's name]
    #[arg(long)]
    name: Option<Name>,
    /// Client: name or address of the server [default: the directory's name]
    #[arg(long, value_name = "HOST")]
    address: Vec<HostAddress>,
    #[command(flatten)]
    config: ConfigArg,
}

/// What `--allow` names: a service of the server, or one that a client is to know of.
#[derive(Clone)]
struct Allowed {
    name: Name,
    /// Its port of TCP, which only a client has to be told.
    port: Option<u16>,
}

impl FromStr for Allowed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        one_alone(text)?;
        let (name, port) = text.split_once('=').map_or((text, None), |(name, port)| (name, Some(port)));
        let name = name.parse().map_err(|error: NameError| error.to_string())?;
        let number = |port: &str| {
            let number = port.parse().ok().filter(|&number| number > 0);
            number.ok_or_else(|| format!("`{}` is not a port: write ssh=22", port.escape_default()))
        };
        Ok(Self { name, port: port.map(number).transpose()? })
    }
}

impl Knockknock {
    fn run(self) -> Result<(), Failure> {
        match look(&self.dir)? {
            Found::Profile => self.take_host(),
            Found::Profiles(directories) => self.take_users(&directories),
        }
    }

    fn take_users(self, directories: &[PathBuf]) -> Result<(), Failure> {
        if let Some(Allowed { name, .. }) = self.allow.iter().find(|allowed| allowed.port.is_some()) {
            let message = format!("--allow: the server's configuration says which ports {name} has");
            return Err(usage(message, &format!("say --allow {name}")));
        }
        if self.name.is_some() || !self.address.is_empty() {
            let message = format!("--name and --address are for one host, but {} holds profiles", self.dir.display());
            return Err(usage(message, "leave them out; or, on a client, name the directory of a host inside it"));
        }
        let config = &self.config.config;
        if let Err(cause) = fs::symlink_metadata(config)
            && cause.kind() == ErrorKind::NotFound
        {
            return Err(Failure::from(FileError::io(config, cause)).or_hint(
                "on a server, make a configuration with `knockq init`, or name one with --config; on a client, name the \
                 directory of one host: ~/.knockknock/HOST",
            ));
        }
        let allow: Vec<Name> = self.allow.into_iter().map(|allowed| allowed.name).collect();
        server::take(directories, &allow, &self.config.config)
    }

    fn take_host(self) -> Result<(), Failure> {
        let allowed = |Allowed { name, port }: &Allowed| match port {
            Some(port) => Ok((name.clone(), *port)),
            None => {
                let message = format!("--allow: a client's profile does not say which port {name} has");
                let hint = format!(
                    "say it, as in --allow ssh=22; or, on the server, name the directory above {}",
                    self.dir.display()
                );
                Err(usage(message, &hint))
            }
        };
        let mut services = self.allow.iter().map(allowed).collect::<Result<Vec<_>, _>>()?;
        refuse_repetition(&services)?;
        if services.is_empty() {
            note("Without --allow, it is for ssh, on port 22.");
            services.extend("ssh".parse().map(|ssh| (ssh, 22)));
        }
        let name = self.name.map_or_else(|| last_word(&self.dir, "say --name NAME, to call it otherwise"), Ok)?;
        let mut address = self.address;
        if address.is_empty() {
            address.push(last_word(&self.dir, "say --address HOST")?);
        }
        client::take(&Original::read(&self.dir, name)?, address, &services)
    }
}

/// A service of a host is found by its name, and has one port here.
fn refuse_repetition(services: &[(Name, u16)]) -> Result<(), Failure> {
    let mut seen = HashSet::new();
    match services.iter().find(|(name, _)| !seen.insert(name)) {
        Some((name, port)) => {
            let hint = format!("give it another name, as in --allow {name}-{port}={port}");
            Err(usage(format!("--allow: {name} is named twice"), &hint))
        }
        None => Ok(()),
    }
}

fn usage(message: String, hint: &str) -> Failure {
    Failure::new(message).hint(hint).code(USAGE)
}

/// What nobody can mend who goes on with the format, said once.
fn warn(way_out: &str) {
    note(&format!(
        "warning: this format is weak, whoever speaks it (docs/knockknock.md):\n  \
         - nothing in a knock says where it comes from: whoever is first to send one that was seen opens for themselves\n  \
         - a knock that was held back is good for ever, until a later one is taken\n  \
         - its SYN is like no other, and has no IPv6\n  \
         - after 20 knocks that were lost, none is taken until the count is set by hand\n\
         {way_out}"
    ));
}
