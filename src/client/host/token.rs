//! Profiles of servers that take knockq's own token, and the invitations that they may come in.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize};
use zeroize::Zeroizing;

use super::{Profile, ProfileError, ProfileService, lacking, write};
use crate::client::{Home, HomeError};
use crate::config::Seconds;
use crate::crypto::{KnockPorts, PrivateKey, PublicKey};
use crate::service::{HostAddress, Name};

/// A profile of a server that takes knockq's own token. Written, its first base64 text is the server's public key.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenProfile {
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

/// What [`TokenProfile::add`] has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Added {
    /// It was not there before.
    pub is_new: bool,
    /// The private key that it brings is this machine's now.
    pub took_key: bool,
}

impl TokenProfile {
    /// The profile as text.
    pub fn to_text(&self) -> String {
        toml::to_string(self).unwrap_or_default()
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
        if is_there && !Profile::is_stored(&stored.clone().into(), home, name) {
            return Err(ProfileError::Exists(name.clone()));
        }
        self.check_server(home, name, same_server)?;
        home.preshared(self.psk_file.as_deref())?;
        // First the key: without a profile it stands in no second try's way.
        if let Some(key) = brought {
            home.adopt_key(key)?;
        }
        if !is_there {
            write(home, name, &stored.to_text()).inspect_err(|_| {
                if brought.is_some() {
                    home.give_key_back();
                }
            })?;
        }
        Ok(Added { is_new: !is_there, took_key: brought.is_some() })
    }

    fn check_whole(&self, name: &Name) -> Result<(), ProfileError> {
        let has_foreign_key = self.client_private_key.as_ref().is_some_and(|key| *key.0.public() != self.client_key.0);
        let foreign_key = has_foreign_key.then_some("private key that belongs to its client_key");
        match lacking(&self.address, self.default.as_ref(), &self.services).or(foreign_key) {
            Some(what) => Err(ProfileError::Lacks { name: name.clone(), what }),
            None => Ok(()),
        }
    }

    /// Whether it was made for this machine's key: the server knows no other by it.
    ///
    /// # Errors
    /// [`ProfileError::OtherClient`].
    pub fn check_client(&self, name: &Name, own: &PublicKey) -> Result<(), ProfileError> {
        if self.client_key.0 == *own {
            return Ok(());
        }
        Err(ProfileError::OtherClient { name: name.clone(), made_for: self.client_key.0, own: *own })
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
            (false, None) => self.check_client(&name, &own).map(|()| None),
            (false, Some(_)) => {
                let is_elsewise = |name: &Name| {
                    Profile::load(home, name.as_str()).is_ok_and(|(_, other)| matches!(other, Profile::Knockknock(_)))
                };
                let is_used = !Profile::names(home)?.iter().all(is_elsewise);
                Err(ProfileError::OtherKey { name, own, path: home.key_path(), is_used })
            }
        }
    }

    /// Whether another profile has the server's key, but no address of this one.
    fn check_server(&self, home: &Home, name: &Name, same_server: bool) -> Result<(), ProfileError> {
        let has_other_address = |other: &Self| !other.address.iter().any(|address| self.address.contains(address));
        let all = Profile::all(home)?;
        let namesake = all.iter().find(|(_, other)| match other {
            Profile::Token(other) => other.server_key == self.server_key && has_other_address(other),
            Profile::Knockknock(_) => false,
        });
        match namesake.filter(|_| !same_server) {
            Some((other, _)) => Err(ProfileError::KnownKey { name: name.clone(), other: other.clone() }),
            None => Ok(()),
        }
    }
}
