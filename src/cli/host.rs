//! `knockq host`

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;

use super::columns::columns;
use super::failure::{CONFIGURATION, Failure};
use super::{note, print, print_json};
use crate::client::host::MAX_LEN;
use crate::client::{Home, Profile, ProfileError};
use crate::service::Name;

#[derive(Args)]
#[command(
    after_help = "Examples:\n  knockq host add home alice.profile\n  knockq host list",
    disable_help_subcommand = true
)]
pub(super) struct Host {
    #[command(subcommand)]
    command: HostCommand,
}

#[derive(Subcommand)]
enum HostCommand {
    /// Add the profile that the administrator's `knockq user add` printed
    #[command(
        after_help = "Examples:\n  knockq host add home profile.toml\n  knockq host add home -      # paste it, then Ctrl-D"
    )]
    Add {
        /// What to call the host
        name: Name,
        /// The profile's file, or `-` for standard input
        profile: PathBuf,
        /// The server is one that another profile has under another address
        #[arg(long)]
        same_server: bool,
    },
    /// List the hosts that one knocks at
    #[command(after_help = "Examples:\n  knockq host list\n  knockq host list --json | jq -r '.[].name'")]
    List {
        /// Print it for programs
        #[arg(long)]
        json: bool,
    },
    /// Print a host's profile, with its server's public key
    #[command(after_help = "Example:\n  knockq host show home")]
    Show {
        /// The host's name
        name: Name,
        /// Print it for programs
        #[arg(long)]
        json: bool,
    },
    /// Take a host's profile away
    #[command(after_help = "Example:\n  knockq host remove home\n\n\
                            Counters that were used with its server are kept: none of them is ever used again.")]
    Remove {
        /// The host's name
        name: Name,
    },
}

impl Host {
    pub(super) fn run(self) -> Result<(), Failure> {
        match self.command {
            HostCommand::Add { name, profile, same_server } => add(&name, &profile, same_server),
            HostCommand::List { json } => list(json),
            HostCommand::Show { name, json } => show(&name, json),
            HostCommand::Remove { name } => remove(&name),
        }
    }
}

fn add(name: &Name, path: &Path, same_server: bool) -> Result<(), Failure> {
    let text = read(path)?;
    let hint = "is it all of what `knockq user add` printed?";
    let profile = Profile::parse(path, &text).map_err(|error| error.with_hint(hint))?;
    profile.add(&Home::of_environment()?, name, same_server)?;
    let server_key = String::from(profile.server_key);
    print(&format!("Added host {name}: {} (server key {server_key})\n", list_of(&profile.address, ", ")))
}

/// A profile under the name that the user gave it.
#[derive(Serialize)]
struct Named {
    name: Name,
    #[serde(flatten)]
    profile: Profile,
}

/// One broken profile hides no other.
fn list(json: bool) -> Result<(), Failure> {
    let home = Home::of_environment()?;
    let (mut hosts, mut broken) = (Vec::new(), Vec::new());
    for name in Profile::names(&home)? {
        match Profile::load(&home, name.as_str()) {
            Ok((name, profile)) => hosts.push(Named { name, profile }),
            Err(error) => broken.push((name, error)),
        }
    }
    match (json, hosts.is_empty()) {
        (true, _) => print_json(&hosts)?,
        (false, false) => print(&rows(&hosts))?,
        (false, true) if broken.is_empty() => note("There is no host yet: `knockq host add NAME PROFILE` adds one"),
        (false, true) => {}
    }
    refuse(&broken)
}

fn rows(hosts: &[Named]) -> String {
    let head = ["NAME", "ADDRESSES", "SERVICES"].map(str::to_owned);
    let row = |Named { name, profile }: &Named| {
        let services: Vec<&Name> = profile.services.keys().collect();
        [name.to_string(), list_of(&profile.address, ","), list_of(&services, ",")]
    };
    columns(&[vec![head], hosts.iter().map(row).collect()].concat())
}

fn refuse(broken: &[(Name, ProfileError)]) -> Result<(), Failure> {
    let Some((first, _)) = broken.first() else { return Ok(()) };
    let said: Vec<String> = broken.iter().map(|(name, error)| format!("host {name}: {error}")).collect();
    let hint = format!("mend it, or take it away: knockq host remove {first}");
    Err(Failure::new(said.join("\n")).hint(hint))
}

fn show(name: &Name, json: bool) -> Result<(), Failure> {
    let (name, profile) = Profile::load(&Home::of_environment()?, name.as_str())?;
    if json { print_json(&Named { name, profile }) } else { print(&profile.to_text()) }
}

fn remove(name: &Name) -> Result<(), Failure> {
    let home = Home::of_environment()?;
    Profile::remove(&home, name)?;
    print(&format!(
        "Removed host {name}. Counters that were used with its server stay in {}, so none is used again\n",
        home.counters().display()
    ))
}

fn list_of(items: &[impl ToString], separator: &str) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(separator)
}

fn read(path: &Path) -> Result<String, Failure> {
    let fail = |error| Failure::new(format!("{}: {error}", path.display()));
    let limit = u64::try_from(MAX_LEN + 1).unwrap_or(u64::MAX);
    let mut text = String::new();
    if path == Path::new("-") {
        io::stdin().take(limit).read_to_string(&mut text).map_err(fail)?;
    } else {
        std::fs::File::open(path).and_then(|file| file.take(limit).read_to_string(&mut text)).map_err(fail)?;
    }
    if text.len() > MAX_LEN {
        return Err(Failure::new(format!("{}: is larger than 1 MiB", path.display())).code(CONFIGURATION));
    }
    Ok(text)
}
