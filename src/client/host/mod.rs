//! Profiles: what a client knows of a host that it knocks at.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;
use zeroize::Zeroizing;

use super::{Home, HomeError};
use crate::config::secure_file::{self, Privacy};
use crate::config::{Diagnostic, FileError, Seconds};
use crate::crypto::{KnockPorts, PrivateKey, PublicKey};
use crate::service::{HostAddress, Name, Port, Transport};

/// Bytes of a profile at most.
pub const MAX_LEN: usize = 1 << 20;

/// A profile. Written, its first base64 text is the server's public key.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// The server's public key.
    pub server_key: Key,
    /// The public key that the server knows this user by.
    pub client_key: Key,
    /// In an invitation: the private key that belongs to it. It is read and never written: no stored profile has one.
    #[serde(default, skip_serializing)]
    pub client_private_key: Option<BroughtKey>,
    /// Names or addresses of the server, in the order in which they are tried.
    pub address: Vec<HostAddress>,
    /// Where one knocks.
    pub knock_ports: KnockPorts,
    /// How far a counter may be off the server's clock.
    pub window: Seconds,
    /// What is opened when no service is named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default: Option<Name>,
    /// The address that the server sees this client come from, where it is fixed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<IpAddr>,
    /// The file of the pre-shared key, named from where the own key is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub psk_file: Option<PathBuf>,
    /// What this user may open.
    pub services: BTreeMap<Name, ProfileService>,
}

/// A public key as text.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Key(pub PublicKey);

impl TryFrom<String> for Key {
    type Error = crate::crypto::KeyError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Self)
    }
}

impl From<Key> for String {
    fn from(key: Key) -> Self {
        key.0.to_string()
    }
}

/// The private key that an invitation brings.
#[derive(Clone)]
pub struct BroughtKey(pub PrivateKey);

impl fmt::Debug for BroughtKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BroughtKey")
    }
}

impl PartialEq for BroughtKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.public() == other.0.public()
    }
}

impl Eq for BroughtKey {}

/// Without a copy of the text.
impl<'de> Deserialize<'de> for BroughtKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = BroughtKey;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a private key")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<BroughtKey, E> {
                text.parse().map(BroughtKey).map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Text)
    }
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

/// What [`Profile::add`] has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Added {
    /// It was not there before.
    pub is_new: bool,
    /// The private key that it brings is this machine's now.
    pub took_key: bool,
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
        toml::from_str(text).map_err(|error| Diagnostic::of_toml(path, text, &error))
    }

    /// The profile as text.
    pub fn to_text(&self) -> String {
        toml::to_string(self).unwrap_or_default()
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
        if profile.client_private_key.is_some() {
            return Err(ProfileError::HoldsKey { path });
        }
        Ok((name, profile))
    }

    /// The profile with a private key in it, as text. Its first base64 text is the server's public key all the same.
    pub fn to_invitation(&self, key: &PrivateKey) -> Zeroizing<String> {
        let text = self.to_text();
        let (server_key, rest) = text.split_once('\n').unwrap_or_default();
        let line = key.to_file_line();
        Zeroizing::new([server_key, "\nclient_private_key = \"", line.trim_end(), "\"\n", rest].concat())
    }

    /// Adds a profile under a name of the user's choice. `same_server` allows a server key that another profile has under
    /// another address. The private key that an invitation brings becomes this machine's, if it has none.
    ///
    /// What is there already, of this very profile, does no harm: a second try ends what a crash has cut short.
    ///
    /// # Errors
    /// [`ProfileError`]; nothing is written then.
    pub fn add(&self, home: &Home, name: &Name, same_server: bool) -> Result<Added, ProfileError> {
        self.check_whole(name)?;
        let brought = self.key_to_take(home, name)?;
        let stored = Self { client_private_key: None, ..self.clone() };
        let is_there = home.host_path(name).exists();
        if is_there && !Self::load(home, name.as_str()).is_ok_and(|(_, there)| there == stored) {
            return Err(ProfileError::Exists(name.clone()));
        }
        self.check_server(home, name, same_server)?;
        home.preshared(self.psk_file.as_deref())?;
        // First the key: without a profile it stands in no second try's way.
        if let Some(key) = brought {
            home.adopt_key(key)?;
        }
        if !is_there {
            stored.write(home, name).inspect_err(|_| {
                if brought.is_some() {
                    home.give_key_back();
                }
            })?;
        }
        Ok(Added { is_new: !is_there, took_key: brought.is_some() })
    }

    fn check_whole(&self, name: &Name) -> Result<(), ProfileError> {
        let has_foreign_key = self.client_private_key.as_ref().is_some_and(|key| *key.0.public() != self.client_key.0);
        let lacking = if self.address.is_empty() {
            "address"
        } else if self.services.is_empty() {
            "service"
        } else if self.default.as_ref().is_some_and(|default| !self.services.contains_key(default)) {
            "service by the name of its default"
        } else if has_foreign_key {
            "private key that belongs to its client_key"
        } else {
            return Ok(());
        };
        Err(ProfileError::Lacks { name: name.clone(), what: lacking })
    }

    /// The private key that this machine is to have from now on, if it has none yet. Else it must be that of the profile.
    fn key_to_take(&self, home: &Home, name: &Name) -> Result<Option<&PrivateKey>, ProfileError> {
        let name = name.clone();
        let (own, brought) = match (home.key(), &self.client_private_key) {
            (Err(HomeError::NoKey { .. }), Some(key)) => (*key.0.public(), Some(&key.0)),
            (own, _) => (*own?.public(), None),
        };
        if self.server_key.0 == own {
            return Err(ProfileError::OwnKey(name));
        }
        match (self.client_key.0 == own, &self.client_private_key) {
            (true, _) => Ok(brought),
            (false, None) => Err(ProfileError::OtherClient { name, made_for: self.client_key.0, own }),
            (false, Some(_)) => {
                let is_used = !Self::names(home)?.is_empty();
                Err(ProfileError::OtherKey { name, own, path: home.key_path(), is_used })
            }
        }
    }

    /// Whether another profile has the server's key, but no address of this one.
    fn check_server(&self, home: &Home, name: &Name, same_server: bool) -> Result<(), ProfileError> {
        let has_other_address = |other: &Self| !other.address.iter().any(|address| self.address.contains(address));
        let all = Self::all(home)?;
        let namesake = all.iter().find(|(_, other)| other.server_key == self.server_key && has_other_address(other));
        match namesake.filter(|_| !same_server) {
            Some((other, _)) => Err(ProfileError::KnownKey { name: name.clone(), other: other.clone() }),
            None => Ok(()),
        }
    }

    fn write(&self, home: &Home, name: &Name) -> Result<(), ProfileError> {
        secure_file::create_directory(&home.hosts())?;
        Ok(secure_file::create(&home.host_path(name), &self.to_text(), Privacy::Secret)?)
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
            self.services.iter().find(|(_, service)| service.ports.iter().any(is_asked))
        };
        let found = match (asked, &self.default) {
            (Some(asked), _) => self
                .services
                .iter()
                .find(|(name, _)| name.as_str() == asked)
                .or_else(|| by_port(Transport::Tcp))
                .or_else(|| by_port(Transport::Udp)),
            (None, Some(default)) => self.services.get_key_value(default),
            (None, None) => self.services.iter().next().filter(|_| self.services.len() == 1),
        };
        found.ok_or_else(|| ProfileError::NoService {
            host: host.clone(),
            asked: asked.unwrap_or("(default)").escape_default().to_string(),
            known: self.services.keys().map(ToString::to_string).collect(),
        })
    }

    /// Takes a profile away, be it right or broken. Counters are not its business and stay: they belong to the pair of
    /// keys, which may meet again.
    ///
    /// # Errors
    /// When there is none by that name, or it cannot be deleted.
    pub fn remove(home: &Home, name: &Name) -> Result<(), ProfileError> {
        secure_file::remove(&home.host_path(name)).map_err(|error| match error.kind() {
            Some(io::ErrorKind::NotFound) => ProfileError::Missing(name.to_string()),
            _ => error.into(),
        })
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
}
