//! Where a user's key, profiles and counters are.

use std::env;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::config::FileError;
use crate::config::secure_file::{self, Privacy};
use crate::crypto::knockknock::{Secrets, SecretsError};
use crate::crypto::{KeyError, PresharedKey, PrivateKey};
use crate::service::Name;

/// Why the user's own files cannot be used.
#[derive(Debug, Error)]
pub enum HomeError {
    /// No directory to look in.
    #[error("HOME is not set, so there is no place for keys and profiles")]
    NoHome,
    /// A file is refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is no key yet.
    #[error("{}: there is no key yet", path.display())]
    NoKey {
        /// Where it would be.
        path: PathBuf,
    },
    /// The profile names a pre-shared key that is not there.
    #[error("{}: the pre-shared key is missing", path.display())]
    NoPresharedKey {
        /// Where it would be.
        path: PathBuf,
    },
    /// The profile names knockknock keys that are not there.
    #[error("{}: the keys of the knockknock profile are missing", path.display())]
    NoSecrets {
        /// Where they would be.
        path: PathBuf,
    },
    /// A file holds no knockknock keys.
    #[error("{}: {cause}", path.display())]
    Secrets {
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: SecretsError,
    },
    /// A key file holds no key.
    #[error("{}: {cause}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: KeyError,
    },
}

/// The two directories of the XDG base directory specification that are ours.
#[derive(Clone)]
pub struct Home {
    configuration: PathBuf,
    state: PathBuf,
}

impl Home {
    /// `$XDG_CONFIG_HOME/knockq` and `$XDG_STATE_HOME/knockq`, by default under `~/.config` and `~/.local/state`.
    ///
    /// # Errors
    /// [`HomeError::NoHome`].
    pub fn of_environment() -> Result<Self, HomeError> {
        let directory = |variable: &str, below_home: &str| {
            let set = env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
            let home = || Some(PathBuf::from(env::var_os("HOME").filter(|home| !home.is_empty())?).join(below_home));
            set.or_else(home).map(|path| path.join("knockq")).ok_or(HomeError::NoHome)
        };
        Ok(Self {
            configuration: directory("XDG_CONFIG_HOME", ".config")?,
            state: directory("XDG_STATE_HOME", ".local/state")?,
        })
    }

    /// Both in this directory.
    #[cfg(test)]
    pub(super) fn below(path: &Path) -> Self {
        Self { configuration: path.join("config"), state: path.join("state") }
    }

    /// The private key's file.
    pub fn key_path(&self) -> PathBuf {
        self.configuration.join("key")
    }

    /// The pre-shared key of a profile, if it names one.
    ///
    /// # Errors
    /// When its file is not there, or is not one that nobody else can read.
    pub fn preshared(&self, file: Option<&Path>) -> Result<Option<PresharedKey>, HomeError> {
        let Some(file) = file else { return Ok(None) };
        let path = self.beside_key(file);
        let text = secure_file::read_if_there(&path, Privacy::Secret)?;
        let text = text.ok_or_else(|| HomeError::NoPresharedKey { path: path.clone() })?;
        text.parse().map(Some).map_err(|cause| HomeError::Key { path, cause })
    }

    /// The keys of a knockknock profile.
    ///
    /// # Errors
    /// When their file is not there, or is not one that nobody else can read, or holds others.
    pub fn secrets(&self, file: &Path) -> Result<Secrets, HomeError> {
        let path = self.beside_key(file);
        let text = secure_file::read_if_there(&path, Privacy::Secret)?;
        let text = text.ok_or_else(|| HomeError::NoSecrets { path: path.clone() })?;
        text.parse().map_err(|cause| HomeError::Secrets { path, cause })
    }

    /// A file that a profile names from where the own key is.
    pub(super) fn beside_key(&self, file: &Path) -> PathBuf {
        self.configuration.join(file)
    }

    /// The directory of the host profiles.
    pub fn hosts(&self) -> PathBuf {
        self.configuration.join("hosts")
    }

    /// The file of one host profile.
    pub fn host_path(&self, name: &Name) -> PathBuf {
        self.hosts().join(format!("{name}.toml"))
    }

    /// The directory of counters.
    pub fn counters(&self) -> PathBuf {
        self.state.join("counters")
    }

    /// Makes the key.
    ///
    /// # Errors
    /// When there is one.
    pub fn make_key(&self) -> Result<PrivateKey, HomeError> {
        let path = self.key_path();
        let key = PrivateKey::generate().map_err(|cause| HomeError::Key { path: path.clone(), cause })?;
        self.adopt_key(&key)?;
        Ok(key)
    }

    /// Makes this key the machine's; it is on disk when this returns.
    ///
    /// # Errors
    /// When there is one.
    pub fn adopt_key(&self, key: &PrivateKey) -> Result<(), HomeError> {
        secure_file::create_directory(&self.configuration)?;
        Ok(secure_file::create(&self.key_path(), &key.to_file_line(), Privacy::Secret)?)
    }

    /// Takes back what [`Home::adopt_key`] did, if it can be.
    pub(super) fn give_key_back(&self) {
        let _ = secure_file::remove(&self.key_path());
    }

    /// Reads the key.
    ///
    /// # Errors
    /// When there is none, or its file is not safe.
    pub fn key(&self) -> Result<PrivateKey, HomeError> {
        let path = self.key_path();
        let Some(text) = secure_file::read_if_there(&path, Privacy::Secret)? else {
            return Err(HomeError::NoKey { path });
        };
        text.parse().map_err(|cause| HomeError::Key { path, cause })
    }
}
