//! `users.d/NAME.toml`: one user a file.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::Deserialize;
use toml::Spanned;

use super::limits::{At, OPENINGS, within};
use super::secure_file::{self, Privacy};
use super::{ConfigError, Diagnostic, Expiry, FileError, Network, Seconds};
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
    /// Their key.
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
    pub expires: Option<Expiry>,
    /// What both sides hold besides their keys, with its file.
    pub preshared: Option<(PathBuf, PresharedKey)>,
    /// Sets of the administrator's own that have them as long as they are let in.
    pub add_to: Vec<SetName>,
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
    public_key: Spanned<String>,
    services: Vec<Spanned<String>>,
    #[serde(default)]
    source: Source,
    #[serde(default)]
    from: Vec<Network>,
    add_to: Option<Spanned<Vec<SetName>>>,
    expires: Option<Expiry>,
    psk_file: Option<Spanned<PathBuf>>,
    open_for: Option<Spanned<Seconds>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "lowercase")]
enum Source {
    #[default]
    Any,
    Bound,
}

/// Sets that one user may be added to: each costs a question to the kernel at each knock.
const MAX_SETS: usize = 16;

/// Reads every user of a directory, in the order of their names.
///
/// # Errors
/// The first thing that is wrong, with its place.
pub fn load(directory: &Path, services: &[Service], server: &PublicKey) -> Result<Vec<UserEntry>, ConfigError> {
    let mut owners = HashMap::from([(*server, "the server".to_owned())]);
    let places = services.iter().enumerate().map(|(place, service)| (service.name.as_str(), place)).collect();
    files(directory)?.iter().map(|path| load_one(path, &places, &mut owners)).collect()
}

fn load_one(
    path: &Path,
    known: &BTreeMap<&str, usize>,
    owners: &mut HashMap<PublicKey, String>,
) -> Result<UserEntry, ConfigError> {
    let text = secure_file::read(path, Privacy::Public)?;
    let at = |span, message: String| Diagnostic::new(path, &text, span, message);
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let name: Name = stem
        .parse()
        .map_err(|error: NameError| at(0..0, error.to_string()).with_hint("rename the file: its name is the user's"))?;
    let file: File = toml::from_str(&text).map_err(|error| Diagnostic::of_toml(path, &text, &error))?;

    let open_for = file.open_for.map(|cap| within(cap, &OPENINGS, "open_for", &at)).transpose()?;
    if let Some(sets) = file.add_to.as_ref().filter(|sets| sets.get_ref().len() > MAX_SETS) {
        return Err(at(sets.span(), format!("add_to lists more than {MAX_SETS} sets")).into());
    }
    let preshared = file.psk_file.map(|file| preshared(path, &file, &at)).transpose()?;
    let at_key = |message| at(file.public_key.span(), message);
    let public_key: PublicKey =
        file.public_key.get_ref().parse().map_err(|error: KeyError| at_key(error.to_string()))?;
    if let Some(owner) = owners.insert(public_key, format!("user {name}")) {
        let hint = "one key belongs to one user on one machine: make another with `knockq keygen`";
        return Err(at_key(format!("{owner} has this public key already")).with_hint(hint).into());
    }
    let (mut places, mut listed) = (Vec::new(), HashSet::new());
    for service in &file.services {
        let place = *known.get(service.get_ref().as_str()).ok_or_else(|| {
            let known: Vec<&str> = known.keys().copied().collect();
            at(service.span(), format!("there is no service `{}`", service.get_ref().escape_default()))
                .with_hint(format!("services are: {}", known.join(", ")))
        })?;
        if listed.insert(place) {
            places.push(place);
        }
    }
    let from = file.from.into_iter().map(|network| network.0).collect();
    let source = match file.source {
        Source::Any => SourcePolicy::Any,
        Source::Bound => SourcePolicy::Bound,
    };
    Ok(UserEntry {
        name,
        path: path.to_owned(),
        public_key,
        services: places,
        source,
        from,
        open_for,
        expires: file.expires,
        preshared,
        add_to: file.add_to.map(Spanned::into_inner).unwrap_or_default(),
    })
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
