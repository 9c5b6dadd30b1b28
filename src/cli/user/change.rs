//! `knockq user remove` and `rename`. Neither needs a file that is right: at three in the morning it is the broken one that has
//! to go.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use clap::Args;

use super::{KEY_FILE, apply, entry_path, exists, missing};
use crate::cli::failure::{Failure, USAGE};
use crate::cli::{ConfigArg, print};
use crate::config::{ServerConfig, secure_file};
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
        let keys = imported_keys(&config, &name);
        secure_file::remove(&path).map_err(|error| match error.kind() {
            Some(ErrorKind::NotFound) => missing(&name, &config),
            _ => error.into(),
        })?;
        print(&format!("Removed user {name}: deleted {}\n", path.display()))?;
        if let Some(keys) = keys {
            secure_file::remove(&keys)?;
            print(&format!("Deleted their knockknock keys: {}\n", keys.display()))?;
        }
        apply(&config)
    }
}

/// The file of a user's keys that an import has made, where the configuration is right: nobody else's are in it then.
fn imported_keys(config: &Path, name: &Name) -> Option<PathBuf> {
    let users = ServerConfig::load(config).ok()?.users;
    let user = users.into_iter().find(|user| user.name == *name)?;
    let file = user.knockknock?.key_file;
    let is_imported = file.parent() == user.path.parent() && file.extension().is_some_and(|end| end == KEY_FILE);
    is_imported.then_some(file)
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
