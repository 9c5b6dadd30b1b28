//! `knockq user list` and `show`

use std::path::Path;

use clap::Args;
use ipnet::IpNet;
use serde::Serialize;

use super::missing;
use super::profile::{Holder, profile, without_secret};
use crate::cli::columns::columns;
use crate::cli::failure::Failure;
use crate::cli::{ConfigArg, note, print, print_json};
use crate::config::users::UserEntry;
use crate::config::{Expiry, Seconds, ServerConfig};
use crate::nft::SetName;
use crate::service::Name;

#[derive(Args)]
#[command(after_help = "Examples:\n  knockq user list\n  knockq user list --json | jq -r '.[].name'")]
pub(super) struct List {
    /// Print it for programs
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArg,
}

impl List {
    pub(super) fn run(self) -> Result<(), Failure> {
        let config = ServerConfig::load(&self.config.config)?;
        let facts: Vec<Facts<'_>> = config.users.iter().map(|user| Facts::new(user, &config)).collect();
        if self.json {
            return print_json(&facts);
        }
        if facts.is_empty() {
            note("There is no user yet: `knockq user add` makes one");
            return Ok(());
        }
        let head = ["NAME", "SERVICES", "SOURCE", "FROM", "EXPIRES", "KEY"].map(str::to_owned);
        print(&columns(&[vec![head], facts.iter().map(Facts::row).collect()].concat()))
    }
}

#[derive(Args)]
#[command(after_help = "Examples:\n  knockq user show alice\n  knockq user show alice --profile > alice.profile")]
pub(super) struct Show {
    /// The user's name
    name: Name,
    /// Print the profile that the user imports, as `knockq user add` did; it holds no private key
    #[arg(long, conflicts_with = "json")]
    profile: bool,
    /// Print it for programs
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArg,
}

impl Show {
    pub(super) fn run(self) -> Result<(), Failure> {
        let path = &self.config.config;
        let config = ServerConfig::load(path)?;
        let user = config.users.iter().find(|user| user.name == self.name).ok_or_else(|| missing(&self.name, path))?;
        let facts = Facts::new(user, &config);
        if self.profile {
            let (name, key, allowed) = (&user.name, user.public_key, facts.services.as_slice());
            let (open_for, is_preshared) = (user.open_for, user.preshared.is_some());
            let profile = profile(&config, &Holder { name, key, allowed, open_for, is_preshared })?;
            return print(&without_secret(name, &profile));
        }
        if self.json {
            return print_json(&facts);
        }
        print(&columns(&facts.lines()))
    }
}

/// What there is to know of a user. The names of the fields are those of the user's file.
#[derive(Serialize)]
struct Facts<'a> {
    name: &'a Name,
    public_key: String,
    services: Vec<Name>,
    source: &'static str,
    from: &'a [IpNet],
    open_for: Option<Seconds>,
    expires: Option<Expiry>,
    add_to: &'a [SetName],
    psk_file: Option<&'a Path>,
    file: &'a Path,
}

impl<'a> Facts<'a> {
    fn new(user: &'a UserEntry, config: &ServerConfig) -> Self {
        Self {
            name: &user.name,
            public_key: user.public_key.to_string(),
            services: user
                .services
                .iter()
                .filter_map(|&place| Some(config.services.get(place)?.name.clone()))
                .collect(),
            source: if user.must_bind() { "bound" } else { "any" },
            from: &user.from,
            open_for: user.open_for,
            expires: user.expires,
            add_to: &user.add_to,
            psk_file: user.preshared.as_ref().map(|(file, _)| file.as_path()),
            file: &user.path,
        }
    }

    fn row(&self) -> [String; 6] {
        let [services, from] = [list(&self.services), list(self.from)];
        let expires = self.expires.map_or_else(String::new, |expiry| {
            if expiry.is_over() { format!("{expiry} (over)") } else { expiry.to_string() }
        });
        [self.name.to_string(), services, self.source.to_owned(), from, expires, self.public_key.clone()]
    }

    fn lines(&self) -> Vec<[String; 2]> {
        let [name, services, source, from, expires, public_key] = self.row();
        vec![
            ["name".to_owned(), name],
            ["public_key".to_owned(), public_key],
            ["services".to_owned(), services],
            ["source".to_owned(), source],
            ["from".to_owned(), from],
            ["open_for".to_owned(), self.open_for.map_or_else(String::new, |cap| cap.to_string())],
            ["expires".to_owned(), expires],
            ["add_to".to_owned(), list(self.add_to)],
            ["psk_file".to_owned(), self.psk_file.map_or_else(String::new, |file| file.display().to_string())],
            ["file".to_owned(), self.file.display().to_string()],
        ]
    }
}

fn list(items: &[impl ToString]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}
