//! Who may open what.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::crypto::{KnockKey, KnockPorts, KnockSecrets, PublicKey, knockknock};
use crate::service::{Name, Port};

/// A service that can be asked for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Service {
    /// Its name in the configuration.
    pub name: Name,
    /// The port number that stands for it in a token.
    pub selector: u16,
    /// The ports that a grant opens.
    pub ports: Vec<Port>,
    /// Seconds for which new connections may be made.
    pub open_for: u32,
    /// The kernel shuts the door behind the first connection.
    pub once: bool,
    /// Connections end when the door shuts.
    pub kill: bool,
}

/// Which tokens of a user count.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum SourcePolicy {
    /// Bound to the source they come from, or unbound.
    Any,
    /// Only bound ones.
    Bound,
}

/// What knocks are made with.
#[derive(Clone, Serialize, Deserialize)]
pub enum Secrets {
    /// Tokens: what the server's key and the user's agree on.
    Token(KnockSecrets),
    /// The ancestor's.
    Knockknock(KnockknockProfile),
}

impl Secrets {
    /// Whether knocks are made with the same keys.
    pub fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Token(one), Self::Token(other)) => one.is_same(other),
            (Self::Knockknock(one), Self::Knockknock(other)) => one.secrets.is_same(&other.secrets),
            _ => false,
        }
    }
}

/// A profile of knockknock's.
#[derive(Clone, Serialize, Deserialize)]
pub struct KnockknockProfile {
    /// Its keys.
    pub secrets: knockknock::Secrets,
    /// Where it knocks.
    pub knock_port: u16,
    /// The next knock's number at least.
    pub counter: u32,
    /// When that was said, in Unix seconds.
    pub as_of: u64,
}

/// The keyed state of a user's functions.
#[derive(Clone)]
pub enum Key {
    /// For tokens.
    Token(KnockKey),
    /// For the ancestor's knocks.
    Knockknock {
        /// Keyed.
        key: knockknock::Key,
        /// Where they come to.
        knock_port: u16,
    },
}

impl Secrets {
    /// Keys the functions.
    pub fn key(&self) -> Key {
        match self {
            Self::Token(secrets) => Key::Token(KnockKey::new(secrets)),
            Self::Knockknock(KnockknockProfile { secrets, knock_port, .. }) => {
                Key::Knockknock { key: knockknock::Key::new(secrets), knock_port: *knock_port }
            }
        }
    }
}

/// For how many seconds a door may stand open from now on: no longer than its service has it, than its user may, and than they have
/// left until they expire, so that no door has to be shut then. `expires` and `now` are Unix seconds.
pub fn open_for(service: u32, user: Option<u32>, expires: Option<u64>, now: u64) -> u32 {
    let left = expires.map(|expiry| u32::try_from(expiry.saturating_sub(now)).unwrap_or(u32::MAX));
    [user, left].into_iter().flatten().fold(service, u32::min)
}

/// A user: one key pair, and what it may do.
#[derive(Clone, Serialize, Deserialize)]
pub struct User {
    /// Name in the configuration.
    pub name: Name,
    /// Their public key, which counters are kept by, or what stands for it.
    pub public_key: PublicKey,
    /// What their knocks are made with.
    pub secrets: Secrets,
    /// Places of the services in [`Registry::services`] that they may open.
    pub services: Vec<usize>,
    /// Which tokens count.
    pub source: SourcePolicy,
    /// Networks their knocks may come from; none listed means any.
    pub from: Vec<IpNet>,
    /// Seconds that a service opens for at most.
    pub open_for: Option<u32>,
    /// Unix seconds from which on nothing is granted.
    pub expires: Option<u64>,
}

impl User {
    /// The counter that counts as the last accepted one, where this one was: what a knockknock profile's entry says counts too.
    pub fn last(&self, accepted: Option<u64>) -> Option<u64> {
        match &self.secrets {
            Secrets::Token(_) => accepted,
            Secrets::Knockknock(profile) => accepted.max(u64::from(profile.counter).checked_sub(1)),
        }
    }

    /// Whether a knock may come from here.
    pub fn may_come_from(&self, source: IpAddr) -> bool {
        self.from.is_empty() || self.from.iter().any(|network| network.contains(&source))
    }
}

/// All that the verifier knows: made by the child `configuration` from checked files, so names, keys and selectors are unique and every
/// place in [`User::services`] exists.
#[derive(Clone, Serialize, Deserialize)]
pub struct Registry {
    /// Seconds that a counter may be off the server's clock, either way.
    pub window: u64,
    /// The server's knock ports.
    pub knock_ports: KnockPorts,
    /// Doors that may be opened in a minute at most, by all together.
    pub grants_per_minute: u32,
    /// What can be opened.
    pub services: Vec<Service>,
    /// By whom.
    pub users: Vec<User>,
}

impl Registry {
    /// Whether anybody knocks with tokens.
    pub fn has_tokens(&self) -> bool {
        self.users.iter().any(|user| matches!(user.secrets, Secrets::Token(_)))
    }

    /// When the count of each knockknock profile was set, in Unix seconds.
    pub fn counted(&self) -> impl Iterator<Item = u64> {
        self.users.iter().filter_map(|user| match &user.secrets {
            Secrets::Token(_) => None,
            Secrets::Knockknock(profile) => Some(profile.as_of),
        })
    }

    /// The selectors that this user may name.
    pub fn selectors<'a>(&'a self, user: &'a User) -> impl Iterator<Item = u16> + 'a {
        user.services.iter().filter_map(|&place| self.services.get(place)).map(|service| service.selector)
    }

    /// The service behind a selector, if this user may open it.
    pub fn permitted(&self, user: &User, selector: u16) -> Option<&Service> {
        user.services.iter().filter_map(|&place| self.services.get(place)).find(|service| service.selector == selector)
    }
}
