//! A server's profiles of knockknock become users.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::original::{Original, last_word};
use super::warn;
use crate::cli::failure::{CONFIGURATION, Failure};
use crate::cli::user::{self, KEY_FILE};
use crate::cli::{note, print};
use crate::config::secure_file::{self, Privacy};
use crate::config::users::UserEntry;
use crate::config::{Moment, ServerConfig};
use crate::service::Name;

const REMEDY: &str =
    "copy the profile, with `cp -a`, to a directory of another name, and import that: users are named by it";

/// Takes over all of these profiles or none. What a run before has made of them is left as it is.
///
/// # Errors
/// The first thing that is wrong; whatever this run has made is gone again then.
pub(super) fn take(directories: &[PathBuf], allow: &[Name], config_file: &Path) -> Result<(), Failure> {
    let originals = read(directories)?;
    let config = ServerConfig::load(config_file)?;
    let services = user::allowed_services(allow, &config)?;
    let mut said = String::new();
    let mut new = Vec::new();
    for original in &originals {
        match there(original, &config)? {
            Some(name) => said += &format!("user {name}: has the keys of {} already: left as it is\n", original.name),
            None => {
                said += &line(original, &services);
                new.push(original);
            }
        }
    }
    let mut made = Made(Vec::new());
    let as_of = Moment::after(config.users.iter().filter_map(|user| Some(user.knockknock.as_ref()?.as_of)));
    made.all(&new, &services, as_of, config_file)?;
    ServerConfig::load(config_file)?; // a configuration that worked must go on working
    made.keep();
    print(&said)?;
    if !new.is_empty() {
        note("The count of these users is kept here from now on: do not start knockknock's daemon again.");
        warn("Leave it, one user after another: `knockq user invite` on this host, or `knockq keygen` on theirs.");
    }
    user::apply(config_file)
}

/// All profiles, no two of which may have the same keys.
fn read(directories: &[PathBuf]) -> Result<Vec<Original>, Failure> {
    let one = |directory: &PathBuf| Original::read(directory, last_word(directory, REMEDY)?);
    let originals = directories.iter().map(one).collect::<Result<Vec<_>, _>>()?;
    let mut owners = HashMap::new();
    for original in &originals {
        if let Some(other) = owners.insert(original.stand_in, &original.directory) {
            let (one, two) = (other.display(), original.directory.display());
            return Err(Failure::new(format!("{two}: has the same keys as {one}"))
                .hint("one profile belongs to one client: move one of the two away")
                .code(CONFIGURATION));
        }
    }
    Ok(originals)
}

/// The user that a profile is already.
fn there<'a>(original: &Original, config: &'a ServerConfig) -> Result<Option<&'a Name>, Failure> {
    let Original { name, directory, .. } = original;
    if let Some(user) = config.users.iter().find(|user| user.public_key == original.stand_in) {
        return Ok(Some(&user.name));
    }
    let key_name = key_name(name);
    let has_key_file =
        |user: &&UserEntry| user.knockknock.as_ref().is_some_and(|profile| profile.key_file.ends_with(&key_name));
    let (message, hint) = if config.users.iter().any(|user| user.name == *name) {
        let message = format!("user {name}: exists already, with other keys than {}", directory.display());
        (
            message,
            format!("give that user another name, `knockq user rename {name} NEW`, or: knockq user remove {name}"),
        )
    } else if let Some(user) = config.users.iter().find(has_key_file) {
        (format!("user {name}: {key_name} holds the keys of user {}", user.name), REMEDY.to_owned())
    } else {
        return Ok(None);
    };
    Err(Failure::new(message).hint(hint).code(CONFIGURATION))
}

/// The file of a user's keys, beside their entry.
fn key_name(name: &Name) -> String {
    format!("{name}.{KEY_FILE}")
}

fn line(Original { name, knock_port, counter, .. }: &Original, services: &[Name]) -> String {
    let services: Vec<&str> = services.iter().map(Name::as_str).collect();
    format!("user {name}: {}, knock port {knock_port}, next counter {counter}\n", services.join(", "))
}

/// Files that are taken away again unless they are kept, the last one first.
struct Made(Vec<PathBuf>);

impl Made {
    fn all(
        &mut self,
        originals: &[&Original],
        services: &[Name],
        as_of: Moment,
        config_file: &Path,
    ) -> Result<(), Failure> {
        let directory = config_file.with_file_name("users.d");
        secure_file::create_directory(&directory)?;
        originals.iter().try_for_each(|original| self.user(original, services, as_of, &directory))
    }

    /// First the keys: without an entry they are nobody's, and a second run finds them.
    fn user(&mut self, original: &Original, services: &[Name], as_of: Moment, directory: &Path) -> Result<(), Failure> {
        let key_name = key_name(&original.name);
        let key_file = directory.join(&key_name);
        match secure_file::read_if_there(&key_file, Privacy::Secret)? {
            Some(keys) if *keys == *original.keys => {}
            Some(_) => {
                return Err(Failure::new(format!("{}: holds other keys, and is no user's", key_file.display()))
                    .hint("move it away, and do this again")
                    .code(CONFIGURATION));
            }
            None => self.file(key_file, &original.keys, Privacy::Secret)?,
        }
        let entry = directory.join(format!("{}.toml", original.name));
        self.file(entry, &entry_text(original, services, &key_name, as_of), Privacy::Public)
    }

    fn file(&mut self, path: PathBuf, contents: &str, privacy: Privacy) -> Result<(), Failure> {
        secure_file::create(&path, contents, privacy)?;
        self.0.push(path);
        Ok(())
    }

    fn keep(&mut self) {
        self.0.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            let _ = secure_file::remove(path);
        }
    }
}

fn entry_text(original: &Original, services: &[Name], key_name: &str, as_of: Moment) -> String {
    let Original { knock_port, counter, .. } = original;
    let services: Vec<String> = services.iter().map(|service| format!("\"{service}\"")).collect();
    format!(
        "services = [{}]\n\n[knockknock]\nkey_file   = \"{key_name}\"\nknock_port = {knock_port}\n\
         counter    = {counter}\nas_of      = \"{as_of}\"\n",
        services.join(", ")
    )
}
