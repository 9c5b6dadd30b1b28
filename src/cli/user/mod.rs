//! `knockq user`

mod add;
mod change;
mod report;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::failure::{CONFIGURATION, Failure};
use super::grants::{Refusal, ask, must_not_run};
use super::note;
use crate::config::ServerConfig;
use crate::serve::control::{ControlError, Request};
use crate::service::Name;

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
    /// List who may knock
    List(report::List),
    /// Show one user, or print their profile again
    Show(report::Show),
    /// Take a user away
    Remove(change::Remove),
    /// Give a user another name
    Rename(change::Rename),
}

impl User {
    pub(super) fn run(self) -> Result<(), Failure> {
        match self.command {
            UserCommand::Add(add) => add.run(),
            UserCommand::List(list) => list.run(),
            UserCommand::Show(show) => show.run(),
            UserCommand::Remove(remove) => remove.run(),
            UserCommand::Rename(rename) => rename.run(),
        }
    }
}

/// The file that a user of this name has, or would have.
fn entry_path(config: &Path, name: &Name) -> PathBuf {
    config.with_file_name("users.d").join(format!("{name}.toml"))
}

fn missing(name: &Name, config: &Path) -> Failure {
    Failure::new(format!("user {name}: there is no {}", entry_path(config, name).display()))
        .hint("see who there is with `knockq user list`")
        .code(CONFIGURATION)
}

fn exists(name: &Name) -> Failure {
    Failure::new(format!("user {name}: exists already"))
        .hint(format!("choose another name, or take that user away: knockq user remove {name}"))
        .code(CONFIGURATION)
}

/// Makes the daemon take over a change of the users, which is on disk by now.
fn apply(config: &Path) -> Result<(), Failure> {
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
