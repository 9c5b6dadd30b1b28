//! `knockq user`

mod add;
mod change;
mod counter;
mod entry;
mod invite;
mod profile;
mod report;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::failure::{CONFIGURATION, Failure};
use super::grants::{Refusal, ask, must_not_run};
use super::note;
use crate::config::{Moment, ServerConfig};
use crate::serve::control::{ControlError, Request};
use crate::service::Name;

pub(super) use entry::{allowed_services, one_alone};

#[derive(Args)]
#[command(
    after_help = "Examples:\n  knockq user add alice --key 'iMvpU…=' > alice.profile\n  knockq user list",
    disable_help_subcommand = true
)]
pub(super) struct User {
    #[command(subcommand)]
    command: UserCommand,
}

#[derive(Subcommand)]
enum UserCommand {
    /// Let a client's key open services, and print the profile that its user imports
    Add(add::Add),
    /// Let a user open services with a key that is made here, and print the profile that holds it, once
    Invite(invite::Invite),
    /// List who may knock
    List(report::List),
    /// Show one user, or print their profile again
    Show(report::Show),
    /// Take a user away
    Remove(change::Remove),
    /// Give a user another name
    Rename(change::Rename),
    /// Set the count of a user's knockknock profile
    Counter(counter::Counter),
}

impl User {
    pub(super) fn run(self) -> Result<(), Failure> {
        match self.command {
            UserCommand::Add(add) => add.run(),
            UserCommand::Invite(invite) => invite.run(),
            UserCommand::List(list) => list.run(),
            UserCommand::Show(show) => show.run(),
            UserCommand::Remove(remove) => remove.run(),
            UserCommand::Rename(rename) => rename.run(),
            UserCommand::Counter(counter) => counter.run(),
        }
    }
}

/// What the names of files end in that hold the keys of knockknock profiles, where an import has put them.
pub(super) const KEY_FILE: &str = "knockknock";

/// The file that a user of this name has, or would have.
fn entry_path(config: &Path, name: &Name) -> PathBuf {
    config.with_file_name("users.d").join(format!("{name}.toml"))
}

/// When the count of each knockknock profile was set, as far as the configuration is right: a counter store that was lost when
/// the clock was behind them waits for a later one.
pub(super) fn all_counted(config: &Path) -> Vec<Moment> {
    let users = ServerConfig::load(config).map(|config| config.users).unwrap_or_default();
    users.into_iter().filter_map(|user| Some(user.knockknock?.as_of)).collect()
}

fn missing(name: &Name, config: &Path) -> Failure {
    Failure::new(format!("user {name}: there is no {}", entry_path(config, name).display()))
        .hint("see who there is with `knockq user list`")
        .code(CONFIGURATION)
}

fn exists(name: &Name, config: &Path) -> Failure {
    let remove = format!("take that user away: knockq user remove {name}");
    let hint = match other_device(name, config) {
        Some(device) => format!("give another device of theirs a name of its own, such as {device}; else {remove}"),
        None => format!("choose another name, or {remove}"),
    };
    // The command that failed has most likely emptied the file that held the profile.
    let hint = format!("{hint}. `knockq user show {name} --profile` prints the profile again");
    Failure::new(format!("user {name}: exists already")).hint(hint).code(CONFIGURATION)
}

/// What another device of the same person could be called.
fn other_device(name: &Name, config: &Path) -> Option<Name> {
    const DEVICES: [&str; 4] = ["laptop", "phone", "tablet", "desktop"];
    let whose = DEVICES.iter().find_map(|device| name.as_str().strip_suffix(device)?.strip_suffix('-'));
    let whose = whose.unwrap_or(name.as_str());
    let names = DEVICES.iter().filter_map(|device| format!("{whose}-{device}").parse::<Name>().ok());
    names.into_iter().find(|name| !entry_path(config, name).exists())
}

/// Makes the daemon take over a change of the users, which is on disk by now.
pub(super) fn apply(config: &Path) -> Result<(), Failure> {
    let config = ServerConfig::load(config)
        .inspect_err(|_| note("The daemon cannot take this over: the configuration is wrong."))?;
    match ask(&config.runtime, &Request::Reload) {
        Err(Refusal::Control(ControlError::NotRunning { .. })) => {
            must_not_run(&config.runtime, config.queue)?;
            note("It applies when the daemon starts: none runs now.");
        }
        asked => {
            asked?;
            note("The daemon has taken it over.");
        }
    }
    Ok(())
}
