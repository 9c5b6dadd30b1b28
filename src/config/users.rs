//! `users.d/NAME.toml`: one user a file.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::Deserialize;
use toml::Spanned;

use super::limits::{At, OPENINGS, within};
use super::secure_file::{self, Privacy};
use super::{ConfigError, Diagnostic, FileError, Knockknock, Moment, Network, Seconds, knockknock};
use crate::crypto::{KeyError, PresharedKey, PublicKey};
use crate::nft::SetName;
use crate::service::{Name, NameError};
use crate::verify::{Service, SourcePolicy};

/// A user as configured.
pub struct UserEntry {
    /// The file's name without `.toml`.
    pub name: Name,
    /// The file.
    pub path: PathBuf,
    /// Their key, or what stands for those of their knockknock profile.
    pub public_key: PublicKey,
    /// Places of what they may open in the list of services.
    pub services: Vec<usize>,
    /// Which tokens count.
    pub source: SourcePolicy,
    /// Networks they may come from; none listed means any.
    pub from: Vec<IpNet>,
    /// For how long a knock of theirs opens a service at most.
    pub open_for: Option<Seconds>,
    /// From when on they open nothing.
    pub expires: Option<Moment>,
    /// What both sides hold besides their keys, with its file.
    pub preshared: Option<(PathBuf, PresharedKey)>,
    /// Sets of the administrator's own that have them as long as they are let in.
    pub add_to: Vec<SetName>,
    /// Their knocks are of the ancestor's format.
    pub knockknock: Option<Knockknock>,
}

impl UserEntry {
    /// Whether only tokens that are bound to their source count.
    pub fn must_bind(&self) -> bool {
        self.source == SourcePolicy::Bound
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    public_key: Option<Spanned<String>>,
    services: Vec<Spanned<String>>,
    source: Option<Spanned<Source>>,
    #[serde(default)]
    from: Vec<Network>,
    add_to: Option<Spanned<Vec<SetName>>>,
    expires: Option<Moment>,
    psk_file: Option<Spanned<PathBuf>>,
    open_for: Option<Spanned<Seconds>>,
    knockknock: Option<knockknock::Table>,
}

#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Source {
    Any,
    Bound,
}

/// Sets that one user may be added to: each costs a question to the kernel at each knock.
const MAX_SETS: usize = 16;

/// What users' files refer to.
struct Known<'a> {
    services: &'a [Service],
    places: BTreeMap<&'a str, usize>,
    /// Who has which key.
    owners: HashMap<PublicKey, String>,
}

/// Reads every user of a directory, in the order of their names.
///
/// # Errors
/// The first thing that is wrong, with its place.
pub fn load(directory: &Path, services: &[Service], server: &PublicKey) -> Result<Vec<UserEntry>, ConfigError> {
    let owners = HashMap::from([(*server, "the server".to_owned())]);
    let places = services.iter().enumerate().map(|(place, service)| (service.name.as_str(), place)).collect();
    let mut known = Known { services, places, owners };
    files(directory)?.iter().map(|path| known.load_one(path)).collect()
}

impl Known<'_> {
    fn load_one(&mut self, path: &Path) -> Result<UserEntry, ConfigError> {
        let text = secure_file::read(path, Privacy::Public)?;
        let at = |span, message: String| Diagnostic::new(path, &text, span, message);
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let name: Name = stem.parse().map_err(|error: NameError| {
            at(0..0, error.to_string()).with_hint("rename the file: its name is the user's")
        })?;
        let file: File = toml::from_str(&text).map_err(|error| Diagnostic::of_toml(path, &text, &error))?;
        file.refuse_beside_knockknock(&at)?;

        let open_for = file.open_for.map(|cap| within(cap, &OPENINGS, "open_for", &at)).transpose()?;
        if let Some(sets) = file.add_to.as_ref().filter(|sets| sets.get_ref().len() > MAX_SETS) {
            return Err(at(sets.span(), format!("add_to lists more than {MAX_SETS} sets")).into());
        }
        let (public_key, knockknock) = match file.knockknock {
            None => (public_key(file.public_key.as_ref(), &at)?, None),
            Some(table) => {
                let profile = table.load(path, self.services, &at)?;
                let stand_in = profile.secrets.stand_in();
                let stand_in = stand_in.map_err(|cause| ConfigError::Key { path: path.to_owned(), cause })?;
                (stand_in, Some(profile))
            }
        };
        if let Some(owner) = self.owners.insert(public_key, format!("user {name}")) {
            let key = file
                .public_key
                .as_ref()
                .map(|key| (key.span(), "this public key", "make another with `knockq keygen`"));
            let (span, what, hint) = key.unwrap_or((0..0, "the keys of this profile", "take one of them away"));
            let hint = format!("one key belongs to one user on one machine: {hint}");
            return Err(at(span, format!("{owner} has {what} already")).with_hint(hint).into());
        }
        let preshared = file.psk_file.map(|file| preshared(path, &file, &at)).transpose()?;
        Ok(UserEntry {
            name,
            path: path.to_owned(),
            public_key,
            services: self.places_of(&file.services, &at)?,
            source: file.source.map_or(SourcePolicy::Any, |source| source.into_inner().into()),
            from: file.from.into_iter().map(|network| network.0).collect(),
            open_for,
            expires: file.expires,
            preshared,
            add_to: file.add_to.map(Spanned::into_inner).unwrap_or_default(),
            knockknock,
        })
    }

    /// The places of these services, each once.
    fn places_of(&self, services: &[Spanned<String>], at: &At<'_>) -> Result<Vec<usize>, Diagnostic> {
        let (mut places, mut listed) = (Vec::new(), HashSet::new());
        for service in services {
            let place = *self.places.get(service.get_ref().as_str()).ok_or_else(|| {
                let known: Vec<&str> = self.places.keys().copied().collect();
                at(service.span(), format!("there is no service `{}`", service.get_ref().escape_default()))
                    .with_hint(format!("services are: {}", known.join(", ")))
            })?;
            if listed.insert(place) {
                places.push(place);
            }
        }
        Ok(places)
    }
}

impl File {
    /// What a knock of knockknock's format cannot keep.
    fn refuse_beside_knockknock(&self, at: &At<'_>) -> Result<(), Diagnostic> {
        if self.knockknock.is_none() {
            return Ok(());
        }
        let bound = self.source.as_ref().filter(|source| *source.get_ref() == Source::Bound);
        let wrong = [
            (self.public_key.as_ref().map(Spanned::span), "public_key", "take one of both away"),
            (self.psk_file.as_ref().map(Spanned::span), "psk_file", "take it away: the profile has its own keys"),
            (
                bound.map(Spanned::span),
                "source = \"bound\"",
                "its knocks hold for no source: take this away, and list the networks that they may come from in `from`",
            ),
        ];
        match wrong.into_iter().find_map(|(span, what, hint)| Some((span?, what, hint))) {
            Some((span, what, hint)) => Err(at(span, format!("{what} stands beside [knockknock]")).with_hint(hint)),
            None => Ok(()),
        }
    }
}

impl From<Source> for SourcePolicy {
    fn from(source: Source) -> Self {
        match source {
            Source::Any => Self::Any,
            Source::Bound => Self::Bound,
        }
    }
}

fn public_key(key: Option<&Spanned<String>>, at: &At<'_>) -> Result<PublicKey, Diagnostic> {
    let key = key.ok_or_else(|| at(0..0, "missing field `public_key`".to_owned()))?;
    key.get_ref().parse().map_err(|error: KeyError| at(key.span(), error.to_string()))
}

/// A user's pre-shared key, from a file that is named from where the user's own is.
fn preshared(entry: &Path, file: &Spanned<PathBuf>, at: &At<'_>) -> Result<(PathBuf, PresharedKey), ConfigError> {
    let path = entry.with_file_name(file.get_ref());
    let Some(text) = secure_file::read_if_there(&path, Privacy::Secret)? else {
        let missing = at(file.span(), format!("{}: there is no such file", path.display()));
        return Err(missing.with_hint("put the pre-shared key there, mode 0600").into());
    };
    let key = text.parse();
    key.map(|key| (path.clone(), key)).map_err(|cause| ConfigError::PresharedKey { path, cause })
}

/// The `*.toml` files of a directory, sorted; none if there is no directory.
fn files(directory: &Path) -> Result<Vec<PathBuf>, FileError> {
    let mut paths = secure_file::entries(directory)?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    Ok(paths)
}
