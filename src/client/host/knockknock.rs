//! Profiles of servers that take the token of knockknock, the ancestor.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Profile, ProfileError, ProfileService, lacking, write};
use crate::client::{Home, HomeError};
use crate::config::secure_file::{self, Privacy};
use crate::crypto::knockknock::Secrets;
use crate::service::{HostAddress, Name};

/// A profile of a server that takes knockknock's token, be it knockknock itself or knockq. It holds no secret.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnockknockProfile {
    /// Names or addresses of the server, in the order in which they are tried. Their IPv4 addresses are knocked at: half of
    /// the token's first word is in a field that IPv6 has not.
    pub address: Vec<HostAddress>,
    /// What is opened when no service is named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default: Option<Name>,
    /// Which of this machine's addresses knocks come from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<Ipv4Addr>,
    /// What is knockknock's own.
    pub knockknock: KnockknockTerms,
    /// What this user may open.
    pub services: BTreeMap<Name, ProfileService>,
}

/// What knocks of this profile are made of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnockknockTerms {
    /// The file of its two keys, named from where this machine's own key would be: one line each, as
    /// [`Secrets`] reads them.
    pub key_file: PathBuf,
    /// The one port where one knocks.
    pub knock_port: NonZeroU16,
    /// The next knock's count at least; what was issued here counts too.
    pub counter: u32,
}

impl KnockknockTerms {
    /// Where an import puts the keys of a profile, for [`Self::key_file`]: they go away with it.
    pub fn key_file_of(name: &Name) -> PathBuf {
        Path::new("hosts").join(format!("{name}.knockknock"))
    }
}

impl KnockknockProfile {
    /// Adds a profile under a name of the user's choice, and puts its keys into its `key_file`: `keys` are two lines, as
    /// [`Secrets`] reads them. Whether it is new is told.
    ///
    /// What is there already, of this very profile, does no harm: a second try ends what a crash has cut short. Keys without
    /// a profile are what such a crash has left, and are replaced.
    ///
    /// # Errors
    /// [`ProfileError`]; nothing is written then.
    pub fn add(&self, home: &Home, name: &Name, keys: &str) -> Result<bool, ProfileError> {
        self.check_whole(name)?;
        let path = home.beside_key(&self.knockknock.key_file);
        keys.parse::<Secrets>().map_err(|cause| HomeError::Secrets { path: path.clone(), cause })?;
        secure_file::create_directory(&home.hosts())?;
        let has_keys = secure_file::read_if_there(&path, Privacy::Secret);
        let has_keys = has_keys.is_ok_and(|text| text.is_some_and(|text| text.trim_end() == keys.trim_end()));
        if home.host_path(name).exists() {
            let is_this = has_keys && Profile::is_stored(&self.clone().into(), home, name);
            return if is_this { Ok(false) } else { Err(ProfileError::Exists(name.clone())) };
        }
        // First the keys: without a profile they stand in no second try's way.
        if !has_keys {
            secure_file::replace(&path, keys, Privacy::Secret)?;
        }
        write(home, name, &Profile::from(self.clone()).to_text()).inspect_err(|_| {
            let _ = secure_file::remove(&path);
        })?;
        Ok(true)
    }

    fn check_whole(&self, name: &Name) -> Result<(), ProfileError> {
        let is_v6 = |address: &HostAddress| {
            address.as_str().parse().is_ok_and(|address: IpAddr| address.to_canonical().is_ipv6())
        };
        let no_v4 = self.address.iter().all(is_v6).then_some("IPv4 address, and no name that may have one");
        match lacking(&self.address, self.default.as_ref(), &self.services).or(no_v4) {
            Some(what) => Err(ProfileError::Lacks { name: name.clone(), what }),
            None => Ok(()),
        }
    }
}
