//! `knockq user add`

use clap::Args;

use super::entry::Entry;
use super::profile::{profile, without_secret};
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
    #[command(flatten)]
    entry: Entry,
}

impl Add {
    pub(super) fn run(self) -> Result<(), Failure> {
        let config = self.entry.configuration()?;
        let key = self.public_key(&config)?;
        let (name, file) = (&self.entry.name, self.entry.config());
        let allowed = self.entry.allowed_services(&config)?;
        let profile = without_secret(name, &profile(&config, name, key, &allowed)?);

        let path = self.entry.write(&key, &allowed)?;
        note(&format!("Wrote {}", path.display()));
        note(&format!(
            "Give this profile to {name}, who imports it with `knockq host add HOSTNAME -`, which must show this:"
        ));
        note(&format!("server key fingerprint: {}", config.private_key.public().fingerprint()));
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
