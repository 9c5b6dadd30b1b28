//! The `[knockknock]` table of a user's file: a profile of the ancestor's (docs/knockknock.md).

use std::num::NonZeroU16;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

use super::limits::At;
use super::secure_file::{self, Privacy};
use super::{ConfigError, Moment};
use crate::crypto::knockknock::Secrets;
use crate::service::{Port, Transport};
use crate::verify::Service;

/// A profile as configured.
pub struct Knockknock {
    /// The file of its keys.
    pub key_file: PathBuf,
    /// Its keys.
    pub secrets: Secrets,
    /// Where it knocks.
    pub knock_port: u16,
    /// The next knock's number at least.
    pub counter: u32,
    /// When that was said.
    pub as_of: Moment,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Table {
    key_file: Spanned<PathBuf>,
    knock_port: Spanned<NonZeroU16>,
    counter: u32,
    as_of: Moment,
}

impl Table {
    /// Reads the keys, from a file that is named from where the user's own is, and makes sure that no service has the knock
    /// port.
    pub(super) fn load(self, entry: &Path, services: &[Service], at: &At<'_>) -> Result<Knockknock, ConfigError> {
        let number = self.knock_port.get_ref().get();
        let port = Port { transport: Transport::Tcp, number };
        if let Some(service) = services.iter().find(|service| service.ports.contains(&port)) {
            let message = format!("knock port {number} is guarded by service {}", service.name);
            let hint = "choose one where no service listens, for the client's profile too";
            return Err(at(self.knock_port.span(), message).with_hint(hint).into());
        }
        let path = entry.with_file_name(self.key_file.get_ref());
        let Some(text) = secure_file::read_if_there(&path, Privacy::Secret)? else {
            let missing = at(self.key_file.span(), format!("{}: there is no such file", path.display()));
            let hint = "put the profile's keys there, mode 0600: its cipher.key, then its mac.key, a line each";
            return Err(missing.with_hint(hint).into());
        };
        match text.parse() {
            Ok(secrets) => {
                Ok(Knockknock { key_file: path, secrets, knock_port: number, counter: self.counter, as_of: self.as_of })
            }
            Err(cause) => Err(ConfigError::ProfileKeys { path, cause }),
        }
    }
}
