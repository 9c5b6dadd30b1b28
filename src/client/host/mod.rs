//! Profiles: what a client knows of a host that it knocks at.

mod knockknock;
mod token;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use knockknock::{KnockknockProfile, KnockknockTerms};
pub use token::{Added, BroughtKey, Key, TokenProfile};

use super::{Home, HomeError};
use crate::config::secure_file::{self, Privacy};
use crate::config::{Diagnostic, FileError, Seconds};
use crate::crypto::PublicKey;
use crate::service::{HostAddress, Name, Port, Transport};

/// Bytes of a profile at most.
pub const MAX_LEN: usize = 1 << 20;

/// A profile, by what its server takes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(untagged)]
pub enum Profile {
    /// knockq's own token.
    Token(TokenProfile),
    /// That of knockknock, the ancestor: the profile has a table `[knockknock]`.
    Knockknock(KnockknockProfile),
}

impl From<TokenProfile> for Profile {
    fn from(profile: TokenProfile) -> Self {
        Self::Token(profile)
    }
}

impl From<KnockknockProfile> for Profile {
    fn from(profile: KnockknockProfile) -> Self {
        Self::Knockknock(profile)
    }
}

/// By what one tells which it is, before all else in it is looked at.
#[derive(Deserialize)]
struct Kind {
    knockknock: Option<IgnoredAny>,
}

/// A service as the client needs to know it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProfileService {
    /// The number that stands for it in a token.
    pub selector: u16,
    /// The ports that it opens.
    pub ports: Vec<Port>,
    /// How long they stay open; profiles of before do not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open_for: Option<Seconds>,
    /// Only one connection gets in.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub once: bool,
}

/// Why a profile cannot be used or added.
#[derive(Debug, Error)]
pub enum ProfileError {
    /// The user's files are refused.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The profile's file is refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is no profile.
    #[error(transparent)]
    Content(#[from] Diagnostic),
    /// Somebody has put an invitation among the profiles.
    #[error("{}: is an invitation, with a private key in it", path.display())]
    HoldsKey {
        /// The file.
        path: PathBuf,
    },
    /// There is one by that name.
    #[error("host {0}: there is a profile by this name")]
    Exists(Name),
    /// Its keys are in a file of their own, which an import takes along.
    #[error("host {0}: this is a knockknock profile, whose keys are in a file of their own")]
    Knockknock(Name),
    /// There is none by that name.
    #[error("host {0}: there is no profile by this name")]
    Missing(String),
    /// The server's key is known from elsewhere.
    #[error("host {name}: its server key is that of host {other}, which has another address")]
    KnownKey {
        /// The new profile.
        name: Name,
        /// The profile that has the key.
        other: Name,
    },
    /// It was made for another key than this machine's.
    #[error("host {name}: this profile was made for the key {made_for}, but this machine's key is {own}")]
    OtherClient {
        /// The new profile.
        name: Name,
        /// The key in the profile.
        made_for: PublicKey,
        /// The key here.
        own: PublicKey,
    },
    /// It brings a key, and this machine has one.
    #[error("host {name}: this profile brings a private key, but this machine has another one, {own}")]
    OtherKey {
        /// The new profile.
        name: Name,
        /// The public key here.
        own: PublicKey,
        /// The file of the key here.
        path: PathBuf,
        /// A profile was made for the key here.
        is_used: bool,
    },
    /// Client and server cannot have one key.
    #[error("host {0}: its server key is this machine's own key")]
    OwnKey(Name),
    /// It lists no address or no service.
    #[error("host {name}: the profile has no {what}")]
    Lacks {
        /// The profile.
        name: Name,
        /// What it lacks.
        what: &'static str,
    },
    /// No such service in the profile.
    #[error("host {host}: the profile has no service `{asked}`")]
    NoService {
        /// The profile.
        host: Name,
        /// What was asked for.
        asked: String,
        /// What there is.
        known: Vec<String>,
    },
}

impl Profile {
    /// Reads a profile's text.
    ///
    /// # Errors
    /// With the place of what is wrong.
    pub fn parse(path: &Path, text: &str) -> Result<Self, Diagnostic> {
        let is_knockknock = toml::from_str::<Kind>(text).is_ok_and(|kind| kind.knockknock.is_some());
        let parsed = if is_knockknock {
            toml::from_str(text).map(Self::Knockknock)
        } else {
            toml::from_str(text).map(Self::Token)
        };
        parsed.map_err(|error| Diagnostic::of_toml(path, text, &error))
    }

    /// The profile as text.
    pub fn to_text(&self) -> String {
        toml::to_string(self).unwrap_or_default()
    }

    /// Names or addresses of the server, in the order in which they are tried.
    pub fn address(&self) -> &[HostAddress] {
        match self {
            Self::Token(profile) => &profile.address,
            Self::Knockknock(profile) => &profile.address,
        }
    }

    /// What is opened when no service is named.
    pub const fn default(&self) -> Option<&Name> {
        match self {
            Self::Token(profile) => profile.default.as_ref(),
            Self::Knockknock(profile) => profile.default.as_ref(),
        }
    }

    /// The address that knocks come from, where it is fixed.
    pub fn source(&self) -> Option<IpAddr> {
        match self {
            Self::Token(profile) => profile.source,
            Self::Knockknock(profile) => profile.source.map(IpAddr::V4),
        }
    }

    /// What this user may open.
    pub const fn services(&self) -> &BTreeMap<Name, ProfileService> {
        match self {
            Self::Token(profile) => &profile.services,
            Self::Knockknock(profile) => &profile.services,
        }
    }

    /// Loads the profile of this name.
    ///
    /// # Errors
    /// [`ProfileError`].
    pub fn load(home: &Home, name: &str) -> Result<(Name, Self), ProfileError> {
        let missing = || ProfileError::Missing(name.escape_default().to_string());
        let name: Name = name.parse().map_err(|_| missing())?;
        let path = home.host_path(&name);
        let text = secure_file::read_if_there(&path, Privacy::Secret)?.ok_or_else(missing)?;
        let profile = Self::parse(&path, &text)?;
        if matches!(&profile, Self::Token(profile) if profile.client_private_key.is_some()) {
            return Err(ProfileError::HoldsKey { path });
        }
        Ok((name, profile))
    }

    /// The service of this name or with this port, of two that share a number the one over TCP; with none given, the default
    /// or the only one.
    ///
    /// # Errors
    /// [`ProfileError::NoService`].
    pub fn service(&self, host: &Name, asked: Option<&str>) -> Result<(&Name, &ProfileService), ProfileError> {
        let number = asked.and_then(|asked| asked.parse::<u16>().ok());
        let by_port = |transport| {
            let is_asked = |port: &Port| Some(port.number) == number && port.transport == transport;
            self.services().iter().find(|(_, service)| service.ports.iter().any(is_asked))
        };
        let found = match (asked, self.default()) {
            (Some(asked), _) => self
                .services()
                .iter()
                .find(|(name, _)| name.as_str() == asked)
                .or_else(|| by_port(Transport::Tcp))
                .or_else(|| by_port(Transport::Udp)),
            (None, Some(default)) => self.services().get_key_value(default),
            (None, None) => self.services().iter().next().filter(|_| self.services().len() == 1),
        };
        found.ok_or_else(|| ProfileError::NoService {
            host: host.clone(),
            asked: asked.unwrap_or("(default)").escape_default().to_string(),
            known: self.services().keys().map(ToString::to_string).collect(),
        })
    }

    /// Takes a profile away, be it right or broken, and the knockknock keys beside it, if there are any: that is told.
    /// Counters are not its business and stay: they belong to the keys, which may come back.
    ///
    /// # Errors
    /// When there is none by that name, or it cannot be deleted.
    pub fn remove(home: &Home, name: &Name) -> Result<bool, ProfileError> {
        let path = home.host_path(name);
        if path.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            return Err(ProfileError::Missing(name.to_string()));
        }
        // First the keys: as long as there is a profile, a second try ends what was cut short.
        let had_keys = match secure_file::remove(&home.beside_key(&KnockknockTerms::key_file_of(name))) {
            Err(error) if error.kind() == Some(io::ErrorKind::NotFound) => false,
            removed => removed.map(|()| true)?,
        };
        secure_file::remove(&path)?;
        Ok(had_keys)
    }

    /// The names of all profiles, right or broken, in order.
    ///
    /// # Errors
    /// When their directory cannot be read.
    pub fn names(home: &Home) -> Result<Vec<Name>, ProfileError> {
        let paths = secure_file::entries(&home.hosts())?;
        let stems = paths.iter().filter_map(|path| path.file_name()?.to_str()?.strip_suffix(".toml"));
        let mut names: Vec<Name> = stems.filter_map(|stem| stem.parse().ok()).collect();
        names.sort_unstable();
        Ok(names)
    }

    fn all(home: &Home) -> Result<Vec<(Name, Self)>, ProfileError> {
        Self::names(home)?.iter().map(|name| Self::load(home, name.as_str())).collect()
    }

    /// Whether this very profile is stored under this name.
    fn is_stored(&self, home: &Home, name: &Name) -> bool {
        Self::load(home, name.as_str()).is_ok_and(|(_, there)| there == *self)
    }
}

/// What a profile must have, and this one has not.
fn lacking(
    address: &[HostAddress],
    default: Option<&Name>,
    services: &BTreeMap<Name, ProfileService>,
) -> Option<&'static str> {
    if address.is_empty() {
        Some("address")
    } else if services.is_empty() {
        Some("service")
    } else if default.is_some_and(|default| !services.contains_key(default)) {
        Some("service by the name of its default")
    } else {
        None
    }
}

fn write(home: &Home, name: &Name, text: &str) -> Result<(), ProfileError> {
    secure_file::create_directory(&home.hosts())?;
    Ok(secure_file::create(&home.host_path(name), text, Privacy::Secret)?)
}
