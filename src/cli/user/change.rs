//! `knockq user remove` and `rename`. Both look at no file's contents: at three in the morning it is the broken one that has
//! to go.

use std::io::ErrorKind;

use clap::Args;

use super::{apply, entry_path, exists, missing};
use crate::cli::failure::{Failure, USAGE};
use crate::cli::{ConfigArg, print};
use crate::config::secure_file;
use crate::service::Name;

#[derive(Args)]
#[command(after_help = "Example:\n  knockq user remove alice\n\n\
                        Doors that are open for the user are shut at once; connections stay.\n\
                        The user's counter is kept: an old knock opens nothing even if the key comes back.")]
pub(super) struct Remove {
    /// The user's name
    name: Name,
    #[command(flatten)]
    config: ConfigArg,
}

impl Remove {
    pub(super) fn run(self) -> Result<(), Failure> {
        let (name, config) = (self.name, self.config.config);
        let path = entry_path(&config, &name);
        secure_file::remove(&path).map_err(|error| match error.kind() {
            Some(ErrorKind::NotFound) => missing(&name, &config),
            _ => error.into(),
        })?;
        print(&format!("Removed user {name}: deleted {}\n", path.display()))?;
        apply(&config)
    }
}

#[derive(Args)]
#[command(after_help = "Example:\n  knockq user rename alice alice-laptop\n\n\
                        Key, profile and counter stay as they are. Doors that are open under the old name are shut: one more knock \
                        opens them again.")]
pub(super) struct Rename {
    /// The user's name
    old: Name,
    /// What it is to be
    new: Name,
    #[command(flatten)]
    config: ConfigArg,
}

impl Rename {
    pub(super) fn run(self) -> Result<(), Failure> {
        let (old, new, config) = (self.old, self.new, self.config.config);
        if old == new {
            return Err(Failure::new(format!("user {old}: has this name already")).code(USAGE));
        }
        // In one step: a daemon that reloads meanwhile sees the key in one file, neither in two nor in none.
        secure_file::rename(&entry_path(&config, &old), &entry_path(&config, &new)).map_err(|error| {
            match error.kind() {
                Some(ErrorKind::NotFound) => missing(&old, &config),
                Some(ErrorKind::AlreadyExists) => exists(&new, &config),
                _ => error.into(),
            }
        })?;
        print(&format!("Renamed user {old} to {new}\n"))?;
        apply(&config)
    }
}
