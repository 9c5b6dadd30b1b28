//! `knockq host`

use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, Read};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;
use zeroize::Zeroizing;

use super::columns::columns;
use super::failure::{CONFIGURATION, Failure, IMPORT};
use super::{note, print, print_json, print_view};
use crate::client::host::MAX_LEN;
use crate::client::{Home, Profile, ProfileError};
use crate::service::Name;

#[derive(Args)]
#[command(
    after_help = "Examples:\n  knockq host add home alice.profile\n  knockq host list",
    disable_help_subcommand = true
)]
pub(super) struct Host {
    #[command(subcommand)]
    command: HostCommand,
}

#[derive(Subcommand)]
enum HostCommand {
    /// Add the profile that the administrator's `knockq user add` or `user invite` printed
    #[command(
        after_help = "Examples:\n  knockq host add home alice.profile\n  knockq host add home -      # paste it, then Ctrl-D\n\n\
                      The fingerprint that it prints must be the one that `knockq check` prints on the server.\n\
                      A private key in the profile, as `knockq user invite` puts there, becomes this machine's key if it has none."
    )]
    Add {
        /// What to call the host
        name: Name,
        /// The profile's file, or `-` for standard input
        profile: PathBuf,
        /// The server is one that another profile has under another address
        #[arg(long)]
        same_server: bool,
    },
    /// List the hosts that one knocks at
    #[command(after_help = "Examples:\n  knockq host list\n  knockq host list --json | jq -r '.[].name'")]
    List {
        /// Print it for programs
        #[arg(long)]
        json: bool,
    },
    /// Print a host's profile, with its server's public key and that key's fingerprint
    #[command(after_help = "Example:\n  knockq host show home")]
    Show {
        /// The host's name
        name: Name,
        /// Print it for programs
        #[arg(long)]
        json: bool,
    },
    /// Take a host's profile away
    #[command(after_help = "Example:\n  knockq host remove home\n\n\
                            Counters that were used with its server are kept: none of them is ever used again.")]
    Remove {
        /// The host's name
        name: Name,
    },
}

impl Host {
    pub(super) fn run(self) -> Result<(), Failure> {
        match self.command {
            HostCommand::Add { name, profile, same_server } => add(&name, &profile, same_server),
            HostCommand::List { json } => list(json),
            HostCommand::Show { name, json } => show(&name, json),
            HostCommand::Remove { name } => remove(&name),
        }
    }
}

fn add(name: &Name, path: &Path, same_server: bool) -> Result<(), Failure> {
    let is_pasted = path == Path::new("-");
    let subject = if is_pasted { Path::new("stdin") } else { path };
    let text = read(is_pasted, subject)?;
    let profile = Profile::parse(subject, &text).map_err(|error| error.with_hint(remedy(&text)))?;
    let Profile::Token(profile) = profile else { return Err(ProfileError::Knockknock(name.clone()).into()) };
    let home = Home::of_environment()?;
    let added = profile.add(&home, name, same_server)?;
    let services: Vec<&Name> = profile.services.keys().collect();
    let done = if added.is_new { "Added host" } else { "There is this profile already: host" };
    print(&format!(
        "{done} {name}: {}, for {}\nserver key fingerprint: {}\n",
        list_of(&profile.address, ", "),
        list_of(&services, ", "),
        profile.server_key.0.fingerprint()
    ))?;
    note("Ask the administrator for the fingerprint that `knockq check` prints on the server: it must be the same.");
    if added.took_key {
        note(&format!("The private key that it brought is this machine's now: {}", home.key_path().display()));
    }
    if profile.client_private_key.is_some() && path.is_file() {
        note(&format!("{} still holds the private key: delete it", path.display()));
    }
    Ok(())
}

/// What most likely befell a text on its way. Line ends, blank lines and indentation are no harm.
fn remedy(text: &str) -> &'static str {
    if text.lines().any(|line| line.starts_with('>')) {
        "these are lines of a quoted mail: take the marks off, with sed 's/^[> ]*//', or have it sent as a file"
    } else if text.contains("[knockknock]") {
        IMPORT
    } else if text.contains(['\u{201c}', '\u{201d}', '\u{201e}', '\u{a0}']) {
        "quotation marks or spaces were changed on the way: have it sent as a file"
    } else {
        "give all of what was printed and nothing else: from the line `# knockq profile of …` to the last one of [services…]. \
         `knockq user show NAME --profile` on the server prints it again"
    }
}

/// A profile under the name that the user gave it.
#[derive(Serialize)]
struct Named {
    name: Name,
    /// Servers of knockknock have no key.
    #[serde(skip_serializing_if = "Option::is_none")]
    server_key_fingerprint: Option<String>,
    /// Theirs have a count, which is said where it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    next_counter: Option<u64>,
    #[serde(flatten)]
    profile: Profile,
}

impl Named {
    fn of(home: &Home, (name, profile): (Name, Profile)) -> Self {
        let (server_key_fingerprint, next_counter) = match &profile {
            Profile::Token(profile) => (Some(profile.server_key.0.fingerprint()), None),
            Profile::Knockknock(profile) => (None, profile.next_count(home)),
        };
        Self { name, server_key_fingerprint, next_counter, profile }
    }
}

/// One broken profile hides no other.
fn list(json: bool) -> Result<(), Failure> {
    let home = Home::of_environment()?;
    let (mut hosts, mut broken) = (Vec::new(), Vec::new());
    for name in Profile::names(&home)? {
        match Profile::load(&home, name.as_str()) {
            Ok(found) => hosts.push(Named::of(&home, found)),
            Err(error) => broken.push((name, error)),
        }
    }
    match (json, hosts.is_empty()) {
        (true, _) => print_json(&hosts)?,
        (false, false) => {
            print_view(&rows(&hosts))?;
        }
        (false, true) if broken.is_empty() => note("There is no host yet: `knockq host add NAME PROFILE` adds one"),
        (false, true) => {}
    }
    refuse(&broken)
}

fn rows(hosts: &[Named]) -> String {
    let head = ["NAME", "ADDRESSES", "SERVICES"].map(str::to_owned);
    let row = |Named { name, profile, .. }: &Named| {
        let services: Vec<&Name> = profile.services().keys().collect();
        [name.to_string(), list_of(profile.address(), ","), list_of(&services, ",")]
    };
    columns(&[vec![head], hosts.iter().map(row).collect()].concat())
}

fn refuse(broken: &[(Name, ProfileError)]) -> Result<(), Failure> {
    let Some((first, _)) = broken.first() else { return Ok(()) };
    let said: Vec<String> = broken.iter().map(|(name, error)| format!("host {name}: {error}")).collect();
    let hint = format!("mend it, or take it away: knockq host remove {first}");
    Err(Failure::new(said.join("\n")).hint(hint))
}

fn show(name: &Name, json: bool) -> Result<(), Failure> {
    let home = Home::of_environment()?;
    let named = Named::of(&home, Profile::load(&home, name.as_str())?);
    if json {
        return print_json(&named);
    }
    let fingerprint = named.server_key_fingerprint.map(|shown| format!("# server key fingerprint: {shown}\n"));
    let next = named.next_counter.map(|next| format!("# next counter: {next}\n"));
    print(&[named.profile.to_text(), fingerprint.unwrap_or_default(), next.unwrap_or_default()].concat())
}

fn remove(name: &Name) -> Result<(), Failure> {
    let home = Home::of_environment()?;
    let keys = if Profile::remove(&home, name)? { " and its knockknock keys" } else { "" };
    print(&format!(
        "Removed host {name}{keys}. Counters that were used with its server stay in {}, so none is used again\n",
        home.counters().display()
    ))
}

fn list_of(items: &[impl ToString], separator: &str) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(separator)
}

fn read(is_pasted: bool, path: &Path) -> Result<Zeroizing<String>, Failure> {
    let subject = path.display();
    let limit = u64::try_from(MAX_LEN + 1).unwrap_or(u64::MAX);
    // One piece of memory, for it may hold a private key.
    let mut text = Zeroizing::new(String::with_capacity(MAX_LEN + 2));
    let done = if is_pasted {
        if io::stdin().is_terminal() {
            note("Paste the profile, then press Ctrl-D on a line of its own.");
        }
        io::stdin().take(limit).read_to_string(&mut text)
    } else {
        File::open(path).and_then(|file| file.take(limit).read_to_string(&mut text))
    };
    done.map_err(|error| {
        let failure = Failure::new(format!("{subject}: {error}"));
        match error.kind() {
            ErrorKind::NotFound => failure.hint("name the file of the profile, or `-` to paste it"),
            ErrorKind::InvalidData => failure.hint("a profile is text: have it sent again").code(CONFIGURATION),
            _ => failure,
        }
    })?;
    if text.len() > MAX_LEN {
        return Err(Failure::new(format!("{subject}: is larger than 1 MiB")).code(CONFIGURATION));
    }
    if text.trim().is_empty() {
        return Err(Failure::new(format!("{subject}: is empty")).hint(remedy("")).code(CONFIGURATION));
    }
    Ok(text)
}
