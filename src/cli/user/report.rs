//! `knockq user list` and `show`

use std::path::Path;

use clap::Args;
use ipnet::IpNet;
use serde::Serialize;

use super::missing;
use super::profile::{Holder, profile, without_secret};
use crate::cli::columns::columns;
use crate::cli::failure::Failure;
use crate::cli::{ConfigArg, note, print, print_json, print_view};
use crate::config::users::UserEntry;
use crate::config::{Moment, Seconds, ServerConfig};
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
        print_view(&columns(&[vec![head], facts.iter().map(Facts::row).collect()].concat())).map(drop)
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
            if let Some(profile) = &user.knockknock {
                return Err(Failure::new(format!(
                    "user {}: has a knockknock profile, which is not kept here",
                    user.name
                ))
                .hint(format!("the client has it; its keys are in {}", profile.key_file.display())));
            }
            let (name, key, allowed) = (&user.name, user.public_key, facts.services.as_slice());
            let (open_for, is_preshared) = (user.open_for, user.preshared.is_some());
            let profile = profile(&config, &Holder { name, key, allowed, open_for, is_preshared })?;
            return print(&without_secret(name, &profile));
        }
        if self.json {
            return print_json(&facts);
        }
        print_view(&columns(&facts.lines())).map(drop)
    }
}

/// What there is to know of a user. The names of the fields are those of the user's file.
#[derive(Serialize)]
struct Facts<'a> {
    name: &'a Name,
    /// None beside a knockknock profile.
    public_key: Option<String>,
    services: Vec<Name>,
    source: &'static str,
    from: &'a [IpNet],
    open_for: Option<Seconds>,
    expires: Option<Moment>,
    add_to: &'a [SetName],
    psk_file: Option<&'a Path>,
    knockknock: Option<ProfileFacts<'a>>,
    file: &'a Path,
}

/// What there is to know of a knockknock profile.
#[derive(Serialize)]
struct ProfileFacts<'a> {
    key_file: &'a Path,
    knock_port: u16,
    counter: u32,
    as_of: Moment,
}

impl<'a> Facts<'a> {
    fn new(user: &'a UserEntry, config: &ServerConfig) -> Self {
        Self {
            name: &user.name,
            public_key: user.knockknock.is_none().then(|| user.public_key.to_string()),
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
            knockknock: user.knockknock.as_ref().map(|profile| ProfileFacts {
                key_file: &profile.key_file,
                knock_port: profile.knock_port,
                counter: profile.counter,
                as_of: profile.as_of,
            }),
            file: &user.path,
        }
    }

    fn row(&self) -> [String; 6] {
        let [services, from] = [list(&self.services), list(self.from)];
        let expires = self.expires.map_or_else(String::new, |expiry| {
            if expiry.is_over() { format!("{expiry} (over)") } else { expiry.to_string() }
        });
        [self.name.to_string(), services, self.source.to_owned(), from, expires, self.key()]
    }

    fn key(&self) -> String {
        self.public_key.clone().unwrap_or_else(|| "(knockknock)".to_owned())
    }

    fn lines(&self) -> Vec<[String; 2]> {
        let [name, services, source, from, expires, _] = self.row();
        let key = match &self.knockknock {
            None => ["public_key".to_owned(), self.key()],
            Some(ProfileFacts { key_file, knock_port, counter, as_of }) => [
                "knockknock".to_owned(),
                format!("{}, to port {knock_port}, from knock {counter} on as of {as_of}", key_file.display()),
            ],
        };
        vec![
            ["name".to_owned(), name],
            key,
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
