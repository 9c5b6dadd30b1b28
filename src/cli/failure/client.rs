//! What is wrong at a client, and what to do about it.

use std::io;
use std::path::Path;

use super::{CONFIGURATION, Failure, IMPORT, PERMISSION, USAGE};
use crate::client::issued::{IssuedError, What};
use crate::client::port::PortError;
use crate::client::proxy::ProxyError;
use crate::client::socks::LoginError;
use crate::client::specimen::SpecimenError;
use crate::client::{AimError, ConnectError, HomeError, ProfileError, SendError};
use crate::crypto::KeyError;
use crate::packet::PersonaError;

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

impl From<IssuedError> for Failure {
    fn from(error: IssuedError) -> Self {
        let failure = Self::new(error.to_string()).code(CONFIGURATION);
        match error {
            IssuedError::File(error) => error.into(),
            IssuedError::Damaged { what: What::Counters, .. } | IssuedError::NoCounter { .. } => {
                failure.hint("make a new key: move the old one away, `knockq keygen`, and ask for a new profile")
            }
            IssuedError::Damaged { what: What::Counts, .. } => failure.hint(
                "move it away, and agree on a count above all that were used: `counter = N` in the profile here, \
                 `knockq user counter NAME N` on the server",
            ),
            IssuedError::NoCount { .. } => {
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
            SendError::Issued(error) => error.into(),
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
