//! From the modules' errors to message, hint and exit code.

use std::fmt;
use std::io;
use std::path::Path;

use crate::client::count::CountError;
use crate::client::counter::CounterError;
use crate::client::port::PortError;
use crate::client::proxy::ProxyError;
use crate::client::socks::LoginError;
use crate::client::specimen::SpecimenError;
use crate::client::{AimError, ConnectError, HomeError, ProfileError, SendError};
use crate::config::{ConfigError, Diagnostic, FileError};
use crate::crypto::KeyError;
use crate::nft::{ElementError, NftError, TableError};
use crate::packet::PersonaError;
use crate::serve::configuration::ServeError;
use crate::serve::control::ControlError;
use crate::serve::engine::EngineError;
use crate::serve::sandbox::SandboxError;
use crate::serve::store::StoreError;

/// Something did not work.
pub(super) const FAILED: u8 = 1;
/// The command line is wrong (sysexits.h: EX_USAGE).
pub(super) const USAGE: u8 = 64;
/// A command that was to be run cannot be, as shells and env(1) have it.
pub(super) const NOT_RUN: u8 = 126;
/// There is no such command.
pub(super) const NOT_FOUND: u8 = 127;
/// A privilege is missing (EX_NOPERM).
pub(super) const PERMISSION: u8 = 77;
/// A configuration, key or profile is wrong (EX_CONFIG).
pub(super) const CONFIGURATION: u8 = 78;

/// What to do where counters cannot be written.
const DISK: &str = "counters must be written before anything is opened: look at the disk, with `df` and `mount`";

/// What to do with a knockknock profile that is to be added.
pub(super) const IMPORT: &str =
    "take it from where knockknock has it, keys and all: knockq import knockknock ~/.knockknock/HOST";

/// How a command ends when it does not succeed.
pub(super) struct Failure {
    message: String,
    hint: Option<String>,
    pub(super) code: u8,
}

impl Failure {
    pub(super) const fn new(message: String) -> Self {
        Self { message, hint: None, code: FAILED }
    }

    pub(super) fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    pub(super) fn code(self, code: u8) -> Self {
        Self { code, ..self }
    }

    /// A hint where there is none yet.
    pub(super) fn or_hint(self, hint: &str) -> Self {
        Self { hint: self.hint.or_else(|| Some(hint.to_owned())), ..self }
    }

    /// What is wrong, and what to do about it.
    pub(super) fn into_parts(self) -> (String, Option<String>) {
        (self.message, self.hint)
    }

    /// In one line, for a log.
    pub(super) fn line(&self) -> String {
        let hint = self.hint.as_ref().map(|hint| format!(". Hint: {hint}")).unwrap_or_default();
        format!("{}{hint}", self.message).split_whitespace().collect::<Vec<_>>().join(" ")
    }

    fn maybe_hint(self, hint: Option<String>) -> Self {
        Self { hint, ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.message.is_empty() {
            writeln!(f, "knockq: {}", self.message)?;
        }
        match &self.hint {
            Some(hint) => writeln!(f, "Hint: {hint}"),
            None => Ok(()),
        }
    }
}

impl From<FileError> for Failure {
    fn from(error: FileError) -> Self {
        let code = if error.is_permission() {
            PERMISSION
        } else if error.is_of_disk() {
            FAILED
        } else {
            CONFIGURATION
        };
        Self::new(error.to_string()).maybe_hint(error.hint()).code(code)
    }
}

impl From<Diagnostic> for Failure {
    fn from(error: Diagnostic) -> Self {
        ConfigError::Content(error).into()
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        match error {
            ConfigError::File(FileError::Io { path, cause }) if cause.kind() == io::ErrorKind::NotFound => {
                Self::new(format!("{}: {cause}", path.display()))
                    .hint("make a configuration with `knockq init --protect tcp/22`, or name one with --config")
                    .code(CONFIGURATION)
            }
            ConfigError::ServerKeyFile(error) if error.kind() != Some(io::ErrorKind::NotFound) => error.into(),
            ConfigError::File(error) => error.into(),
            other => Self::new(other.to_string()).maybe_hint(other.hint()).code(CONFIGURATION),
        }
    }
}

impl From<NftError> for Failure {
    fn from(error: NftError) -> Self {
        let failure = Self::new(error.to_string());
        match error {
            NftError::Missing => failure.hint("apt-get install nftables"),
            NftError::Lacks(word) => failure
                .hint(format!(
                    "modprobe {}; else boot a distribution's kernel, or install nftables 0.9.8 or newer",
                    word.module
                ))
                .code(CONFIGURATION),
            NftError::NotPermitted(_) => failure.hint("run this as root").code(PERMISSION),
            NftError::Refused(_) => failure.hint("see the table with `nft list table inet knockq`"),
            NftError::NoTable => failure.hint("the gate does not stand: start `knockq serve`"),
            NftError::Run(_) => failure,
        }
    }
}

impl From<ServeError> for Failure {
    fn from(error: ServeError) -> Self {
        let message = error.to_string();
        match error {
            ServeError::Config(error) => error.into(),
            ServeError::Control(error) => error.into(),
            ServeError::NothingToUndo => {
                Self::new(message).hint("leave --try out, or set ruleset = \"managed\"").code(USAGE)
            }
            ServeError::Store(FileError::Io { path, cause }) if cause.kind() == io::ErrorKind::NotFound => {
                Self::new(format!("{}: the counter store is missing", path.display()))
                    .hint("if it is lost for good, or comes from a backup: knockq recover")
                    .code(CONFIGURATION)
            }
            ServeError::Store(FileError::Io { path, cause }) if cause.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                Self::new(format!("{}: {cause}", path.display())).hint(DISK)
            }
            ServeError::Store(error) => error.into(),
            ServeError::NotRoot => Self::new(message).hint("run it as root: sudo knockq serve").code(PERMISSION),
            ServeError::StoreReplaced { .. } => {
                Self::new(message).hint("start the daemon when `knockq recover` is done")
            }
            ServeError::Account(SandboxError::Step { .. } | SandboxError::NotGone(_)) => Self::new(message),
            ServeError::Account(SandboxError::Unprovable) => Self::new(message)
                .hint("boot Linux 5.9 or newer, with CONFIG_SECCOMP_FILTER as every distribution has it")
                .code(CONFIGURATION),
            ServeError::Account(_) => Self::new(message).code(CONFIGURATION),
            ServeError::QueueTaken { .. } => {
                Self::new(message).hint("is another knockq running? Else set `queue = N` in [server]")
            }
            ServeError::NoProgram { .. } => Self::new(message).hint("install all of them: make install"),
            ServeError::Io(_) => Self::new(message),
        }
    }
}

impl From<ElementError> for Failure {
    fn from(error: ElementError) -> Self {
        TableError::from(error).into()
    }
}

impl From<TableError> for Failure {
    fn from(error: TableError) -> Self {
        match error {
            TableError::Nft(error) => error.into(),
            TableError::Element(_) => Self::new(error.to_string()).hint("is another knockq running? It owns the table"),
        }
    }
}

impl From<ControlError> for Failure {
    fn from(error: ControlError) -> Self {
        let failure = Self::new(error.to_string());
        match error {
            ControlError::NotRunning { .. } => failure.hint("start it: systemctl start knockq"),
            ControlError::HungUp { .. } => {
                failure.hint("journalctl -u knockq says why it ended, if it did; then the same command again")
            }
            ControlError::Taken { .. } => {
                failure.hint("is another knockq running? Else set another `runtime` in [server]")
            }
            ControlError::Busy { .. } => failure.hint("see who has that socket open, with `ss -xp`"),
            ControlError::Silent { .. } | ControlError::OtherVersion { .. } => failure.hint("systemctl restart knockq"),
            ControlError::Io { cause, .. } if cause.kind() == io::ErrorKind::PermissionDenied => {
                failure.hint("run this as root").code(PERMISSION)
            }
            ControlError::Io { .. } => failure.hint("see what the daemon's log says"),
        }
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        let failure = Self::new(error.to_string());
        match error {
            // Another time it may work.
            EngineError::Store { cause: StoreError::Failed(_), .. } => failure.hint(DISK),
            EngineError::Store { cause: StoreError::InUse, .. } => {
                failure.hint("if it is a daemon of before, it ends when the disk answers; see who it is with `fuser`")
            }
            EngineError::Store { cause: StoreError::Newer(_), .. } => failure
                .hint("install the knockq that made it, or a newer one; or make a new store: move it away, and knockq recover")
                .code(CONFIGURATION),
            EngineError::Store { cause: StoreError::Damaged(_), .. } => {
                failure.hint("make a new store: knockq recover").code(CONFIGURATION)
            }
            EngineError::Store { .. } => failure
                .hint("put back the store that belongs to this server key, or make a new one: knockq recover")
                .code(CONFIGURATION),
            _ => failure,
        }
    }
}

impl From<HomeError> for Failure {
    fn from(error: HomeError) -> Self {
        let failure = Self::new(error.to_string()).code(CONFIGURATION);
        match error {
            HomeError::NoHome => failure.hint("set HOME, or XDG_CONFIG_HOME and XDG_STATE_HOME"),
            HomeError::File(error) => error.into(),
            HomeError::NoKey { .. } => failure.hint("make one with `knockq keygen`"),
            HomeError::NoPresharedKey { .. } => {
                failure.hint("put there what the administrator has given you besides the profile, mode 0600")
            }
            HomeError::NoSecrets { .. } | HomeError::Secrets { .. } => failure.hint(
                "put back its two lines, mode 0600; or `knockq host remove` the profile, and `knockq import knockknock` it again",
            ),
            HomeError::Key { cause: KeyError::ZeroPresharedKey, .. } => {
                failure.hint("have the administrator make another")
            }
            HomeError::Key { .. } => failure.hint("restore it, or move it away and make another with `knockq keygen`"),
        }
    }
}

impl From<ProfileError> for Failure {
    fn from(error: ProfileError) -> Self {
        let failure = Self::new(error.to_string()).code(CONFIGURATION);
        match error {
            ProfileError::Home(error) => error.into(),
            ProfileError::File(error) => error.into(),
            ProfileError::Content(error) => error.into(),
            ProfileError::Exists(name) => {
                failure.hint(format!("choose another name, or take the old one away: knockq host remove {name}"))
            }
            ProfileError::Missing(_) => {
                failure.hint("see which there are with `knockq host list`; `knockq host add NAME PROFILE` adds one")
            },
            ProfileError::KnownKey { .. } => {
                failure.hint("if both are one server, add it with --same-server; else somebody copied a key")
            }
            ProfileError::OtherClient { .. } => failure.hint(
                "one key belongs to one device: send this one's to the administrator, who adds it under a name of its own, \
                 such as alice-laptop: knockq keygen --show. A profile of before goes by: knockq host remove NAME",
            ),
            ProfileError::OtherKey { path, is_used, .. } => failure.hint(other_key(&path, is_used)),
            ProfileError::HoldsKey { .. } => {
                failure.hint("move it to another directory, and import it from there: knockq host add NAME FILE")
            }
            ProfileError::Knockknock(_) => {
                failure.hint(IMPORT)
            }
            ProfileError::OwnKey(_) | ProfileError::Lacks { .. } => {
                failure.hint("ask the administrator for a new profile")
            }
            ProfileError::NoService { known, .. } => {
                failure.hint(format!("name one of: {}", known.join(", "))).code(USAGE)
            }
        }
    }
}

fn other_key(path: &Path, is_used: bool) -> String {
    let send = "send this machine's public key to the administrator, for `knockq user add`: knockq keygen --show";
    if is_used {
        return format!("one key belongs to one machine, and is good for every server: {send}");
    }
    let path = path.display();
    format!("no profile here is for that key: move it away, and do this again: mv {path} {path}.old; or {send}")
}

impl From<CounterError> for Failure {
    fn from(error: CounterError) -> Self {
        let failure = Self::new(error.to_string()).code(CONFIGURATION);
        match error {
            CounterError::File(error) => error.into(),
            CounterError::Damaged { .. } | CounterError::UsedUp { .. } => {
                failure.hint("make a new key: move the old one away, `knockq keygen`, and ask for a new profile")
            }
        }
    }
}

impl From<CountError> for Failure {
    fn from(error: CountError) -> Self {
        let failure = Self::new(error.to_string()).code(CONFIGURATION);
        match error {
            CountError::File(error) => error.into(),
            CountError::Damaged { .. } => failure.hint(
                "move it away, and agree on a count above all that were used: `counter = N` in the profile here, \
                 `knockq user counter NAME N` on the server",
            ),
            CountError::UsedUp { .. } => {
                failure.hint("ask the administrator for a profile of knockq's own: knockq user add")
            }
        }
    }
}

impl From<PortError> for Failure {
    fn from(error: PortError) -> Self {
        let failure = Self::new(error.to_string());
        match error {
            PortError::NoRoute { .. } => failure.hint("check the network: ip route"),
            PortError::Source { .. } => failure.hint("see the own addresses with: ip address"),
            _ => failure,
        }
    }
}

impl From<AimError> for Failure {
    fn from(error: AimError) -> Self {
        let failure = Self::new(error.to_string());
        match error {
            AimError::Profile(error) => error.into(),
            AimError::Port(error) => error.into(),
            AimError::Ambiguous { hosts, .. } => {
                let hosts: Vec<String> = hosts.iter().map(ToString::to_string).collect();
                failure.hint(format!("name the profile: {}", hosts.join(" or "))).code(USAGE)
            }
            AimError::Resolve { .. } => {
                failure.hint("check the name and the resolver, or put an address into the profile")
            }
            AimError::LinkLocal(_) => {
                failure.hint("name another address of the server, and put it into the profile: `address`")
            }
            AimError::NoAddress { .. } => failure.hint("leave out -4 or -6, or add an address to the profile"),
            AimError::OnlyV4(_) => failure.hint("leave out -6, and --source with an IPv6 address").code(USAGE),
            AimError::NoV4(_) => failure.hint(
                "name the host by its profile, or by an IPv4 address; or add one, or a name that has one, to the profile",
            ),
            AimError::BindsNothing { .. } => {
                failure.hint("leave out --source, and `source` in the profile; or name an own IPv4 address").code(USAGE)
            }
            AimError::StandsOut(_) => failure
                .hint("leave out --strict and accept it, or ask for a profile of knockq's own: knockq user add")
                .code(USAGE),
            AimError::SourceFamily(_) => {
                failure.hint("leave out -4 and -6, or say --source ADDR or --source none").code(USAGE)
            }
        }
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        let failure = Self::new(error.to_string());
        match error {
            ConnectError::Send(error) => error.into(),
            ConnectError::NoTcp { .. } => {
                failure.hint("knock with `knockq send`, and use the service as it is").code(USAGE)
            }
            ConnectError::Refused { .. } => failure.hint(
                "start the service on the server, if it does not run; else the server answers with resets where it has \
                 taken no knock, or has taken back what an unbound one opened because a copy came from elsewhere, and its \
                 log says why: then bind the knock (--source ADDRESS), or take another path",
            ),
            ConnectError::StillShut { checks, .. } => {
                failure.hint(format!("check, in this order:\n  - {}", checks.join("\n  - ")))
            }
            ConnectError::Stopped(_) => failure,
        }
    }
}

impl From<LoginError> for Failure {
    fn from(error: LoginError) -> Self {
        let failure = match error {
            LoginError::File(error) => error.into(),
            LoginError::Content(_) => Self::new(error.to_string()).code(CONFIGURATION),
        };
        failure.or_hint("write it anew: (umask 077; echo \"alice:$(openssl rand -hex 16)\" >FILE)")
    }
}

impl From<ProxyError> for Failure {
    fn from(error: ProxyError) -> Self {
        match error {
            ProxyError::Knock(error) => error.into(),
            other => Self::new(other.to_string()),
        }
    }
}

impl From<SendError> for Failure {
    fn from(error: SendError) -> Self {
        let failure = Self::new(error.to_string());
        match error {
            SendError::NotPermitted => {
                failure.hint("sudo setcap cap_net_raw+ep \"$(command -v knockq)\"").code(PERMISSION)
            }
            SendError::Home(error) => error.into(),
            SendError::Aim(error) => error.into(),
            SendError::File(error) => error.into(),
            SendError::Counter(error) => error.into(),
            SendError::Count(error) => error.into(),
            SendError::Key { .. } => failure.hint("ask the administrator for a new profile").code(CONFIGURATION),
            SendError::Port(error) => error.into(),
            SendError::Specimen(SpecimenError::Persona(PersonaError::NoTimestamps)) => {
                failure.hint("sysctl net.ipv4.tcp_timestamps=1")
            }
            SendError::Specimen(SpecimenError::Loopback(_)) => {
                failure.hint("this host must be able to connect to itself: ip link set lo up, and let the firewall allow it")
            }
            SendError::Specimen(SpecimenError::Persona(PersonaError::Unfamiliar)) => {
                failure.hint("please report it, with `uname -r` and the output of `knockq --version`")
            }
            SendError::Specimen(SpecimenError::NotKept) => failure.hint("sysctl net.ipv4.tcp_syncookies=1"),
            SendError::TimestampLine => failure.hint(
                "use Linux 6.12.94, 6.18.17 or newer with net.ipv4.tcp_timestamps=1, or leave out --strict and accept it",
            ),
            SendError::Send { cause, .. } if cause.kind() == io::ErrorKind::PermissionDenied => {
                failure.hint("this host's own firewall forbids it: allow output to the knock ports")
            }
            _ => failure,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::path::Path;

    use super::{CONFIGURATION, FAILED, Failure, PERMISSION};
    use crate::config::FileError;

    #[test]
    fn a_disk_that_takes_no_writes_is_no_wrong_configuration() {
        for (kind, code) in [
            (ErrorKind::StorageFull, FAILED),
            (ErrorKind::QuotaExceeded, FAILED),
            (ErrorKind::ReadOnlyFilesystem, FAILED),
            (ErrorKind::PermissionDenied, PERMISSION),
            (ErrorKind::NotFound, CONFIGURATION),
        ] {
            let failure = Failure::from(FileError::io(Path::new("f"), kind));
            assert_eq!(failure.code, code, "{kind}");
            assert_eq!(failure.to_string().contains("df"), code == FAILED, "{failure}");
        }
    }
}
