//! `knockq host`

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::failure::{CONFIGURATION, Failure};
use super::print;
use crate::client::host::MAX_LEN;
use crate::client::{Home, Profile};
use crate::service::Name;

#[derive(Args)]
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
}

impl Host {
    pub(super) fn run(self) -> Result<(), Failure> {
        let HostCommand::Add { name, profile: path, same_server } = self.command;
        let text = read(&path)?;
        let hint = "is it all of what `knockq user add` printed?";
        let profile = Profile::parse(&path, &text).map_err(|error| error.with_hint(hint))?;
        profile.add(&Home::of_environment()?, &name, same_server)?;
        print(&format!(
            "Added host {name}: {} (server key {})\n",
            profile.address.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
            String::from(profile.server_key)
        ))
    }
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
