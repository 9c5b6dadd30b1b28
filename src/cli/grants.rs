//! `knockq grants`, `knockq revoke` and `knockq confirm`

use std::collections::HashSet;
use std::fs;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::slice;

use clap::Args;
use serde::Serialize;

use super::columns::columns;
use super::failure::{CONFIGURATION, Failure};
use super::{CONFIG, ConfigArg, note, print, print_json, print_view};
use crate::config::server::{QUEUE, RUNTIME_DIRECTORY};
use crate::config::{ConfigError, FileError, Network, ServerConfig};
use crate::nft::{self, Door, Doors, ElementError, Ending, Kernel, Lister, NftError, OpenDoor};
use crate::serve::configuration::refuse_taken_queue;
use crate::serve::control::{self, ControlError, Reply, Request, Selection};
use crate::serve::report::RevokedPart;
use crate::service::{Name, Port};

/// Doors that are shut in one transaction.
const TOGETHER: usize = 64;

#[derive(Args)]
#[command(after_help = "Examples:\n  knockq grants\n  knockq grants --json | jq '.[].source'\n\n\
                        The kernel is asked, so this works without the daemon too. A door that several users hold open is \
                        listed under the one who holds it longest.")]
pub(super) struct Grants {
    /// As a JSON array
    #[arg(long)]
    json: bool,
}

/// One door, as it is shown.
#[derive(Serialize)]
struct Shown<'a> {
    source: IpAddr,
    port: Port,
    /// `None` if somebody opened it by hand.
    user: Option<&'a str>,
    service: Option<&'a str>,
    bound: bool,
    once: bool,
    /// `None` if it stays open for ever, which only a hand can have done.
    seconds_left: Option<u64>,
}

impl Grants {
    pub(super) fn run(self) -> Result<(), Failure> {
        let mut doors = open_doors()?;
        doors.sort_by_key(|open| (open.what.source, open.what.port));
        let shown: Vec<Shown<'_>> = doors.iter().map(Shown::of).collect();
        if self.json {
            return print_json(&shown);
        }
        if shown.is_empty() {
            note("no door is open");
            return Ok(());
        }
        let head = ["SOURCE", "PORT", "USER", "SERVICE", "LEFT", "ONCE"].map(str::to_owned);
        print_view(&columns(&[vec![head], shown.iter().map(Shown::row).collect()].concat())).map(drop)
    }
}

impl<'a> Shown<'a> {
    fn of(open: &'a OpenDoor) -> Self {
        let opener = open.comment.as_ref();
        Self {
            source: open.what.source,
            port: open.what.port,
            user: opener.map(|opener| opener.user.as_str()),
            service: opener.map(|opener| opener.service.as_str()),
            bound: opener.is_some_and(|opener| opener.bound),
            once: open.what.once,
            seconds_left: open.left.map(|left| left.as_secs()),
        }
    }

    /// Its cells; somebody's own element has neither user nor service.
    fn row(&self) -> [String; 6] {
        let left = self.seconds_left.map_or_else(|| "for ever".to_owned(), time_left);
        let once = if self.once { "once" } else { "" };
        let cells = [self.user.unwrap_or_default(), self.service.unwrap_or_default(), &left, once];
        let [user, service, left, once] = cells.map(str::to_owned);
        [self.source.to_string(), self.port.to_string(), user, service, left, once]
    }
}

/// All doors that are open, as the kernel has them.
pub(super) fn open_doors() -> Result<Vec<OpenDoor>, Failure> {
    let mut open = Kernel::default().open_doors().map_err(|error| match error {
        ElementError::NoSet => NftError::NoTable.into(),
        ElementError::Refused(error) if error.kind() == ErrorKind::PermissionDenied => {
            NftError::NotPermitted(error.to_string()).into()
        }
        other => Failure::from(other),
    })?;
    open.sort_by_key(|open| open.what);
    open.dedup_by_key(|open| open.what); // that of one connection may have two elements
    Ok(open)
}

/// The two largest units.
pub(super) fn time_left(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m {}s", seconds % 60),
        3600..86_400 => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

#[derive(Args)]
#[command(
    after_help = "Examples:\n  knockq revoke 203.0.113.9\n  knockq revoke --user alice\n  knockq revoke --all\n  \
                        knockq revoke 203.0.113.9 --kill\n\n\
                        Established connections live on, unless --kill ends them: those of the user or the address, also if their \
                        doors have shut long ago. Of a user, the daemon knows the addresses of the last week, since its \
                        start. What cannot be ended is named, and the command fails."
)]
pub(super) struct Revoke {
    #[command(flatten)]
    selection: SelectionArgs,
    /// End their established connections too
    #[arg(long)]
    kill: bool,
    #[command(flatten)]
    config: ConfigArg,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct SelectionArgs {
    /// The address or network whose doors are shut
    #[arg(value_name = "ADDR", value_parser = network)]
    source: Option<Network>,
    /// The user whose doors are shut; what others hold open stays open
    #[arg(long, value_name = "NAME")]
    user: Option<Name>,
    /// Shut every door
    #[arg(long)]
    all: bool,
}

/// In a hurry one writes a user's name there.
fn network(text: &str) -> Result<Network, String> {
    text.parse().map_err(|error| match text.parse::<Name>() {
        Ok(name) if text.starts_with(|first: char| first.is_ascii_alphabetic()) => {
            format!("{error}; for a user: --user {name}")
        }
        _ => format!("{error}"),
    })
}

impl Revoke {
    pub(super) fn run(self) -> Result<(), Failure> {
        let (runtime, queue) = runtime(&self.config.config)?;
        let selection = match self.selection {
            SelectionArgs { source: Some(network), .. } => Selection::Source(network.0),
            SelectionArgs { user: Some(user), .. } => Selection::User(user),
            SelectionArgs { .. } => Selection::All,
        };
        let meant: Vec<OpenDoor> = open_doors()?.into_iter().filter(|open| covers(&selection, open)).collect();
        if let Selection::User(user) = &selection
            && !self.kill // the daemon may remember who was removed
            && meant.is_empty()
            && ServerConfig::load(&self.config.config)
                .is_ok_and(|config| config.users.iter().all(|one| one.name != *user))
        {
            return Err(Failure::new(format!("user {user}: is not configured, and no door is open for that name"))
                .hint("see who there is with `knockq user list`")
                .code(CONFIGURATION));
        }
        let mut unshut = Vec::new();
        let whose = match control::ask(&runtime, &Request::Revoke(selection.clone())) {
            // A daemon that is not there holds no book, and no table.
            Err(ControlError::NotRunning { .. }) => {
                must_not_run(&runtime, queue)?;
                let mut doors = Doors::new()?;
                unshut = shut(&meant, |some| doors.close_all(some.iter().map(|open| &open.what)));
                if let Err(error) = doors.forget_begun() {
                    note(&format!("a SYN that was let in may come again for a minute: {error}"));
                }
                if self.kill { whose(&meant, &self.config.config)? } else { RevokedPart::default() }
            }
            asked => match asked? {
                Reply::Revoked(part) => part,
                reply => refused(reply).map(|()| RevokedPart::default())?,
            },
        };
        let ending = if self.kill { end_connections(&selection, &whose) } else { Ending::default() };
        let shown = show(&selection, &meant, &open_doors()?, self.kill.then_some(ending.ended));
        for (Door { source, port, .. }, error) in &unshut {
            note(&format!("{source} {port}: not shut: {error}"));
        }
        let unshut = unshut.into_iter().next().map_or(Ok(()), |(_, error)| Err(error.into()));
        tell(&ending).and(unshut).and(shown)
    }
}

/// Shuts doors, dozens together, and each by itself where the kernel refuses some: those that are not shut, and why.
fn shut<E>(meant: &[OpenDoor], mut close: impl FnMut(&[OpenDoor]) -> Result<(), E>) -> Vec<(&Door, E)> {
    let mut unshut = Vec::new();
    for some in meant.chunks(TOGETHER) {
        if close(some).is_err() {
            unshut.extend(some.iter().filter_map(|open| Some((&open.what, close(slice::from_ref(open)).err()?))));
        }
    }
    unshut
}

/// What the daemon would tell of those who were revoked, but for what only it remembers.
fn whose(meant: &[OpenDoor], config: &Path) -> Result<RevokedPart, Failure> {
    let config = ServerConfig::load(config)?;
    let doors = meant.iter().map(|open| Door { once: false, ..open.what }).collect();
    let guarded = config.services.into_iter().flat_map(|service| service.ports).collect();
    Ok(RevokedPart { doors, guarded, trusted: config.trusted, is_cut: false })
}

/// Ends what began at their doors, and all that a network that was named has to do with guarded ports.
fn end_connections(selection: &Selection, whose: &RevokedPart) -> Ending {
    let is_trusted = |door: &Door| whose.trusted.iter().any(|network| network.contains(&door.source));
    let doors: HashSet<&Door> = whose.doors.iter().filter(|door| !is_trusted(door)).collect();
    let is_named = |door: &Door| selection.is_source(door.source) && whose.guarded.contains(&door.port);
    let ending = nft::end(|door| doors.contains(door) || is_named(door), is_trusted);
    let cut = whose.is_cut.then(|| "there were too many doors to tell them all".to_owned());
    Ending { unlisted: ending.unlisted.or(cut), ..ending }
}

/// Says which connections may live on.
fn tell(ending: &Ending) -> Result<(), Failure> {
    let lines = ending
        .failed
        .iter()
        .map(|(Door { source, port, .. }, cause)| format!("{source} {port}: connections live on: {cause}\n"));
    print(&lines.collect::<String>())?;
    let what = match (&ending.unlisted, ending.failed.first()) {
        (Some(cause), _) => format!("connections live on: {cause}"),
        (None, Some((_, cause))) => format!("not all connections are ended: {cause}"),
        (None, None) if ending.spared > 0 => {
            let message = format!("revoke: {} connections live on: their network is trusted", ending.spared);
            return Err(Failure::new(message).hint("take it out of `trusted`, reload, and revoke again"));
        }
        (None, None) => return Ok(()),
    };
    Err(Failure::new(format!("revoke: {what}")).hint("restart the service: that ends its connections for certain"))
}

fn covers(selection: &Selection, open: &OpenDoor) -> bool {
    match selection {
        Selection::Source(network) => network.contains(&open.what.source),
        Selection::User(user) => Shown::of(open).user == Some(user.as_str()),
        Selection::All => true,
    }
}

/// What became of the doors, and how many connections were ended if they were to be.
fn show(selection: &Selection, meant: &[OpenDoor], left: &[OpenDoor], ended: Option<u64>) -> Result<(), Failure> {
    match (meant.is_empty(), ended) {
        (false, _) => {}
        (true, None) => note("no such door is open"),
        (true, Some(ended)) => note(&format!("no such door is open; connections that were ended: {ended}")),
    }
    let (mut is_by_hand, mut is_unheard) = (false, false);
    let lines = meant.iter().map(|open| {
        let still = left.iter().find(|still| still.what == open.what);
        let is_meant = still.is_some_and(|still| covers(selection, still));
        let state = match &still.map(Shown::of) {
            None => "shut".to_owned(),
            Some(Shown { user: Some(user), .. }) => {
                is_unheard |= is_meant;
                format!("still open for {user}")
            }
            Some(_) => {
                is_by_hand = true;
                "still open, by hand".to_owned()
            }
        };
        format!("{} {}: {state}\n", open.what.source, open.what.port)
    });
    print(&lines.collect::<String>())?;
    if is_unheard {
        let message = "revoke: the daemon does not shut what it was told to".to_owned();
        return Err(Failure::new(message).hint("if nobody has just knocked again: stop it, and revoke again"));
    }
    if is_by_hand {
        let message = "revoke: the daemon leaves alone what it has not opened".to_owned();
        return Err(Failure::new(message).hint("stop it, revoke again, and start it; other doors keep their time"));
    }
    Ok(())
}

#[derive(Args)]
#[command(after_help = "Example:\n  knockq serve --try 10m &\n  ...            # knock, connect\n  knockq confirm")]
pub(super) struct Confirm {
    #[command(flatten)]
    config: ConfigArg,
}

impl Confirm {
    pub(super) fn run(self) -> Result<(), Failure> {
        match ask(&runtime(&self.config.config)?.0, &Request::Confirm) {
            Err(Refusal::Control(error @ ControlError::NotRunning { .. })) => Err(Failure::new(error.to_string())
                .hint("a trial that was not confirmed in time has taken the gate away: begin another, knockq serve --try 10m")),
            asked => {
                asked?;
                print("Confirmed: the gate stays.\n")
            }
        }
    }
}

/// Why the daemon has not done what was asked.
pub(super) enum Refusal {
    Control(ControlError),
    Refused(Failure),
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Control(error) => error.into(),
            Refusal::Refused(failure) => failure,
        }
    }
}

pub(super) fn ask(runtime: &Path, request: &Request) -> Result<(), Refusal> {
    refused(control::ask(runtime, request).map_err(Refusal::Control)?).map_err(Refusal::Refused)
}

/// Whether the daemon has done it.
pub(super) fn refused(reply: Reply) -> Result<(), Failure> {
    match reply {
        Reply::Done | Reply::Revoked(_) | Reply::Explained(_) => Ok(()),
        Reply::Refused { message, hint } => Err(Failure::new(message).hint(hint)),
    }
}

/// Where the daemon listens, and its queue. A configuration that is broken now does not keep anybody from shutting doors.
///
/// # Errors
/// When one that was named is not there: it is not the usual daemon that was meant.
pub(super) fn runtime(config: &Path) -> Result<(PathBuf, u16), Failure> {
    if config != Path::new(CONFIG)
        && let Err(cause) = fs::metadata(config)
        && cause.kind() == ErrorKind::NotFound
    {
        return Err(ConfigError::File(FileError::io(config, cause)).into());
    }
    Ok(ServerConfig::load(config)
        .map_or_else(|_| (RUNTIME_DIRECTORY.into(), QUEUE), |config| (config.runtime, config.queue)))
}

/// Fails if a daemon runs although nobody listens for commands: it would know nothing of what is done without it.
pub(super) fn must_not_run(runtime: &Path, queue: u16) -> Result<(), Failure> {
    refuse_taken_queue(queue).map_err(|error| {
        let runtime = runtime.display();
        Failure::new(format!("the daemon runs, but does not listen in {runtime}: {error}"))
            .hint("name its configuration with --config; if its socket was deleted: systemctl restart knockq")
    })
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::{Door, OpenDoor, TOGETHER, shut, time_left};

    #[test]
    fn a_door_that_the_kernel_does_not_shut_is_told_and_keeps_no_other_open() {
        let open = |number: usize| OpenDoor {
            what: Door {
                source: IpAddr::from(Ipv4Addr::LOCALHOST),
                port: format!("tcp/{}", number + 1).parse().unwrap(),
                once: false,
            },
            comment: None,
            left: None,
        };
        let meant: Vec<OpenDoor> = (0..3 * TOGETHER).map(open).collect();
        let bad = &meant[TOGETHER + 7].what;
        let mut closed = Vec::new();
        let unshut = shut(&meant, |some| {
            if some.iter().any(|open| open.what == *bad) {
                return Err("refused");
            }
            closed.extend(some.iter().map(|open| open.what));
            Ok(())
        });
        assert_eq!(unshut, [(bad, "refused")]);
        assert_eq!(closed.len(), meant.len() - 1);
    }

    #[test]
    fn time_is_shown_in_its_two_largest_units() {
        let shown = [0, 59, 60, 3599, 3600, 86_399, 90_000].map(time_left);
        assert_eq!(shown, ["0s", "59s", "1m 0s", "59m 59s", "1h 0m", "23h 59m", "1d 1h"]);
    }
}
