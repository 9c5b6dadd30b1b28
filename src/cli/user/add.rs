//! `knockq user add`

use std::path::{PathBuf, absolute};

use clap::Args;

use super::entry::Entry;
use super::profile::{brought_as, profile, without_secret};
use super::{apply, other_device};
use crate::cli::failure::{CONFIGURATION, Failure, USAGE};
use crate::cli::{note, print};
use crate::config::ServerConfig;
use crate::crypto::{KeyError, PublicKey};

#[derive(Args)]
#[command(after_help = "Example:\n  knockq user add alice --key 'iMvpU…=' --allow ssh > alice.profile\n\n\
                        One key belongs to one device: give each of alice's a name, such as alice-laptop.")]
pub(super) struct Add {
    /// The public key that `knockq keygen` printed on the user's machine
    #[arg(long, value_name = "BASE64")]
    key: String,
    /// A file with a pre-shared key, which the user needs too; it stays where it is (mode 0600)
    #[arg(long, value_name = "FILE")]
    psk_file: Option<PathBuf>,
    #[command(flatten)]
    entry: Entry,
}

impl Add {
    pub(super) fn run(self) -> Result<(), Failure> {
        let config = self.entry.configuration()?;
        let key = self.public_key(&config)?;
        let (name, file) = (&self.entry.name, self.entry.config());
        let allowed = self.entry.allowed_services(&config)?;
        let psk_file = self.psk_file.as_deref().map(absolute).transpose();
        let psk_file = psk_file.map_err(|error| Failure::new(format!("--psk-file: {error}")))?;
        let holder = self.entry.holder(key, &allowed, psk_file.is_some());
        let profile = without_secret(name, &profile(&config, &holder)?);

        let path = self.entry.write(&key, &allowed, psk_file.as_deref())?;
        note(&format!("Wrote {}", path.display()));
        self.entry.warn_if_expired();
        note(&format!(
            "Give this profile to {name}, who imports it with `knockq host add HOSTNAME -`, which must show this:"
        ));
        note(&format!("server key fingerprint: {}", config.private_key.public().fingerprint()));
        if let Some(file) = &psk_file {
            note(&format!(
                "{name} also needs what is in {}, by another way: as ~/.config/knockq/{}, mode 0600",
                file.display(),
                brought_as(name).display()
            ));
        }
        print(&profile)?;
        apply(file)
    }

    fn public_key(&self, config: &ServerConfig) -> Result<PublicKey, Failure> {
        let (name, file) = (&self.entry.name, self.entry.config());
        let key: PublicKey = self.key.parse().map_err(|error: KeyError| {
            Failure::new(format!("--key: {error}")).hint("`knockq keygen` prints the right one").code(USAGE)
        })?;
        if let Some(user) = config.users.iter().find(|user| user.public_key == key) {
            let such_as = other_device(&user.name, file).map_or_else(String::new, |name| format!(", such as {name}"));
            return Err(Failure::new(format!("user {name}: user {} has this public key already", user.name))
                .hint(format!(
                    "one key belongs to one device: `knockq keygen` on the other one makes its key, to add under a name of \
                     its own{such_as}"
                ))
                .code(CONFIGURATION));
        }
        if key == *config.private_key.public() {
            return Err(Failure::new(format!("user {name}: this is the server's own key"))
                .hint("the user makes one with `knockq keygen` on their machine")
                .code(CONFIGURATION));
        }
        Ok(key)
    }
}
