//! `knockq user list` and `show`

use std::path::Path;

use clap::Args;
use ipnet::IpNet;
use serde::Serialize;

use super::missing;
use super::profile::{profile, without_secret};
use crate::cli::columns::columns;
use crate::cli::failure::Failure;
use crate::cli::{ConfigArg, note, print, print_json};
use crate::config::ServerConfig;
use crate::config::users::UserEntry;
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
        let head = ["NAME", "SERVICES", "SOURCE", "FROM", "KEY"].map(str::to_owned);
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
            let profile = profile(&config, &user.name, user.public_key, &facts.services)?;
            return print(&without_secret(&user.name, &profile));
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
            file: &user.path,
        }
    }

    fn row(&self) -> [String; 5] {
        let [services, from] = [list(&self.services), list(self.from)];
        [self.name.to_string(), services, self.source.to_owned(), from, self.public_key.clone()]
    }

    fn lines(&self) -> [[String; 2]; 6] {
        let [name, services, source, from, public_key] = self.row();
        [
            ["name".to_owned(), name],
            ["public_key".to_owned(), public_key],
            ["services".to_owned(), services],
            ["source".to_owned(), source],
            ["from".to_owned(), from],
            ["file".to_owned(), self.file.display().to_string()],
        ]
    }
}

fn list(items: &[impl ToString]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}
