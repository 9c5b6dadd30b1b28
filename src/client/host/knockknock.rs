//! Profiles of servers that take the token of knockknock, the ancestor.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Profile, ProfileError, ProfileService, lacking, write};
use crate::client::issued::Counts;
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

    /// The next knock's count, as far as it can be told: 2^32 when all are used.
    pub fn next_count(&self, home: &Home) -> Option<u64> {
        let stand_in = home.secrets(&self.knockknock.key_file).ok()?.stand_in().ok()?;
        let next = Counts::next(&home.counters(), &stand_in).ok()?;
        Some(next.max(self.knockknock.counter.into()))
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::{Home, KnockknockProfile, Profile, ProfileError};
    use crate::service::Name;

    const KEYS: &str = "sjiTG60X1BTdJ1FAi3J1pg==\n1hPsDZAaENI/HY8wSE5vCw==\n";

    const TEXT: &str = "address = [\"host.example.org\"]\ndefault = \"ssh\"\n\n\
                        [knockknock]\nkey_file = \"hosts/old.knockknock\"\nknock_port = 2222\ncounter = 17\n\n\
                        [services.ssh]\nselector = 22\nports = [\"tcp/22\"]\n";

    /// A home for one test, gone with it.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(test: &str) -> (Self, Home) {
            let path = std::env::temp_dir().join(format!("knockq-hosts-{}-{test}", std::process::id()));
            fs::create_dir(&path).unwrap();
            let home = Home::below(&path);
            (Self(path), home)
        }

        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.0.join("config/hosts").join(name)).unwrap()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn profile(text: &str) -> KnockknockProfile {
        match Profile::parse(Path::new("old.toml"), text) {
            Ok(Profile::Knockknock(profile)) => profile,
            other => panic!("{other:?}"),
        }
    }

    fn name() -> Name {
        "old".parse().unwrap()
    }

    #[test]
    fn a_profile_that_is_written_is_read_back_and_looks_as_the_manual_has_it() {
        for text in [TEXT.to_owned(), TEXT.replace("\n\n[knock", "\nsource = \"10.0.0.2\"\n\n[knock")] {
            assert_eq!(Profile::from(profile(&text)).to_text(), text);
        }
        let odd = profile(&TEXT.replace("hosts/old", r"\t\u0007\r\u001b'''\n\u007f"));
        let text = Profile::from(odd.clone()).to_text();
        assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
        assert_eq!(profile(&text), odd);
    }

    #[test]
    fn a_profile_comes_with_its_keys_and_goes_with_them_and_twice_is_no_harm() {
        let (scratch, home) = Scratch::new("come-and-go");
        let old = profile(TEXT);
        assert!(old.add(&home, &name(), KEYS).unwrap());
        assert!(!old.add(&home, &name(), KEYS).unwrap(), "nothing is new");
        assert_eq!((scratch.read("old.toml"), scratch.read("old.knockknock")), (TEXT.to_owned(), KEYS.to_owned()));
        let (_, stored) = Profile::load(&home, "old").unwrap();
        assert_eq!(stored, old.clone().into());
        home.secrets(&old.knockknock.key_file).unwrap();

        let other = profile(&TEXT.replace("17", "18"));
        let other_keys = KEYS.replace("sji", "tji");
        for (profile, keys) in [(&other, KEYS), (&old, other_keys.as_str())] {
            assert!(matches!(profile.add(&home, &name(), keys), Err(ProfileError::Exists(_))));
        }
        assert!(Profile::remove(&home, &name()).unwrap());
        assert_eq!(fs::read_dir(home.hosts()).unwrap().count(), 0);
        assert!(matches!(Profile::remove(&home, &name()), Err(ProfileError::Missing(_))));
    }

    #[test]
    fn keys_that_a_crash_left_without_a_profile_are_replaced() {
        let (scratch, home) = Scratch::new("left");
        let old = profile(TEXT);
        old.add(&home, &name(), &KEYS.replace("sji", "tji")).unwrap();
        fs::remove_file(home.host_path(&name())).unwrap();
        assert!(old.add(&home, &name(), KEYS).unwrap());
        assert_eq!(scratch.read("old.knockknock"), KEYS);
    }

    #[test]
    fn what_cannot_be_knocked_at_is_not_added_and_leaves_nothing() {
        let (scratch, home) = Scratch::new("refused");
        let addresses = |addresses: &str| profile(&TEXT.replace("\"host.example.org\"", addresses));
        for (profile, keys, said) in [
            (addresses(""), KEYS, "has no address"),
            (addresses("\"2001:db8::1\", \"::1\""), KEYS, "has no IPv4 address, and no name that may have one"),
            (profile(&TEXT.replace("\"ssh\"", "\"web\"")), KEYS, "has no service by the name of its default"),
            (profile(TEXT), "abc\n", "not the keys of a profile"),
        ] {
            let error = profile.add(&home, &name(), keys).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        assert!(!scratch.0.join("config").exists());
        assert!(addresses("\"2001:db8::1\", \"192.0.2.1\"").add(&home, &name(), KEYS).unwrap());
    }

    #[test]
    fn fields_of_the_other_kind_and_numbers_that_are_none_are_refused_with_their_place() {
        for (from, to, said) in [
            ("address", "server_key = \"x\"\naddress", "old.toml:1:1: unknown field `server_key`"),
            ("address", "window = \"60s\"\naddress", "old.toml:1:1: unknown field `window`"),
            ("address", "psk_file = \"x\"\naddress", "old.toml:1:1: unknown field `psk_file`"),
            ("address", "source = \"::1\"\naddress", "old.toml:1:10: invalid IPv4 address"),
            ("counter = 17", "counter = 17\nwindow = 20", "old.toml:8:1: unknown field `window`"),
            ("counter = 17", "counter = -1", "old.toml:7:11: invalid value"),
            ("counter = 17", "counter = 4294967296", "old.toml:7:11: invalid value"),
            ("counter = 17\n", "", "missing field `counter`"),
            ("= 2222", "= 0", "old.toml:6:14: invalid value"),
            ("= 2222", "= 65536", "old.toml:6:14: invalid value"),
        ] {
            let error = Profile::parse(Path::new("old.toml"), &TEXT.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        let error = Profile::parse(Path::new("old.toml"), KEYS).unwrap_err().to_string();
        assert!(error.contains("is a key file") && !error.contains("sji"), "{error}");
    }
}
