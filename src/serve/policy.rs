//! What doors there may be, by the configuration: for whom, for how long, and in which of the administrator's sets they show.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::ledger::Hold;
use crate::nft::{Door, SetName};
use crate::service::{Name, Port};
use crate::verify::open_for;

/// Who may hold which doors.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Policy {
    /// The table is the daemon's, not one that others load.
    pub owns_table: bool,
    /// Doors that may be opened in a minute at most.
    pub grants_per_minute: u32,
    /// What can be opened, by name.
    pub services: BTreeMap<Name, Opening>,
    /// Who may open which services, and how.
    pub users: BTreeMap<Name, Allowance>,
    /// Doors that shut have a line in the log.
    pub log_closings: bool,
    /// Networks that are never gated.
    pub trusted: Vec<IpNet>,
    /// Doors count that do not say when they end: the daemon of before did not write it.
    pub old_count: bool,
}

/// The doors of a service.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Opening {
    /// The guarded ports.
    pub ports: Vec<Port>,
    /// For one connection.
    pub once: bool,
    /// Seconds at most.
    pub seconds: u32,
    /// Connections end when the door shuts.
    pub kill: bool,
}

/// What a user may.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct Allowance {
    /// The services.
    pub services: Vec<Name>,
    /// Networks that knocks may come from; none listed means any.
    pub from: Vec<IpNet>,
    /// Only by tokens that are bound to their source.
    pub bound: bool,
    /// Seconds at most.
    pub open_for: Option<u32>,
    /// Unix seconds from which on no door is open.
    pub expires: Option<u64>,
    /// Sets of the administrator's that have the user's source while a door is open.
    pub add_to: Vec<SetName>,
}

impl Allowance {
    fn covers(&self, source: IpAddr, bound: bool) -> bool {
        let may_come = self.from.is_empty() || self.from.iter().any(|network| network.contains(&source));
        may_come && (bound || !self.bound)
    }

    /// For how many of so many seconds a door may stand open from now on.
    pub fn time(&self, seconds: u32, unix_now: u64) -> u32 {
        open_for(seconds, self.open_for, self.expires, unix_now)
    }
}

impl Policy {
    /// Whether a door that was opened may stay open for the time that it has left. A shorter `open_for` of the service is
    /// for the doors to come.
    pub fn still_permits(&self, door: &Door, hold: &Hold, now: Instant, unix_now: u64) -> bool {
        let left = hold.until.saturating_duration_since(now);
        self.opening(&hold.user, &hold.service, door.port).is_some_and(|(allowance, opening)| {
            // To the second: what was granted until the expiry has not changed by what is left of the one that begins.
            let may_have = Duration::from_secs(u64::from(allowance.time(u32::MAX, unix_now)) + 1);
            opening.once == door.once && allowance.covers(door.source, hold.bound) && left < may_have
        })
    }

    /// The guarded ports.
    pub fn ports(&self) -> Vec<Port> {
        self.services.values().flat_map(|opening| opening.ports.iter().copied()).collect()
    }

    /// Whether a source may be in this set for this user and service.
    pub fn adds(&self, user: &Name, service: &Name, set: &SetName) -> bool {
        let allowance = self.users.get(user).filter(|allowance| allowance.services.contains(service));
        allowance.is_some_and(|allowance| allowance.add_to.contains(set))
    }

    /// The sets that sources are added to, each once.
    pub fn sets(&self) -> BTreeSet<&SetName> {
        self.users.values().flat_map(|allowance| &allowance.add_to).collect()
    }

    fn opening(&self, user: &Name, service: &Name, port: Port) -> Option<(&Allowance, &Opening)> {
        let allowance = self.users.get(user).filter(|allowance| allowance.services.contains(service))?;
        let opening = self.services.get(service).filter(|opening| opening.ports.contains(&port))?;
        Some((allowance, opening))
    }
}

#[cfg(test)]
mod tests {
    use super::{Allowance, BTreeMap, Door, Duration, Hold, Instant, Opening, Policy};

    const NOW: u64 = 1_790_000_000;

    fn policy() -> Policy {
        let opening =
            |port: &str, once, seconds| Opening { ports: vec![port.parse().unwrap()], once, seconds, kill: false };
        let name = |text: &str| text.parse().unwrap();
        Policy {
            owns_table: true,
            grants_per_minute: 600,
            services: BTreeMap::from([
                (name("ssh"), opening("tcp/22", false, 30)),
                (name("mail"), opening("tcp/25", true, 60)),
            ]),
            users: BTreeMap::from([
                (name("a"), Allowance { services: vec![name("ssh"), name("mail")], ..Allowance::default() }),
                (name("b"), Allowance { services: vec![name("ssh")], ..Allowance::default() }),
            ]),
            log_closings: false,
            old_count: false,
            trusted: Vec::new(),
        }
    }

    #[test]
    fn a_door_stays_while_its_user_may_still_open_it_like_this() {
        let (policy, now) = (policy(), Instant::now());
        let door = |port: &str, once| Door { source: "192.0.2.1".parse().unwrap(), port: port.parse().unwrap(), once };
        let hold = |user: &str, service: &str| Hold {
            user: user.parse().unwrap(),
            service: service.parse().unwrap(),
            until: now,
            bound: false,
            token: None,
            kill: false,
            spent: false,
            members: Vec::new(),
            asked: None,
            waits: false,
        };
        assert!(policy.still_permits(&door("tcp/22", false), &hold("b", "ssh"), now, NOW));
        assert!(policy.still_permits(&door("tcp/25", true), &hold("a", "mail"), now, NOW));
        assert!(
            !policy.still_permits(&door("tcp/25", true), &hold("b", "mail"), now, NOW),
            "not a service of this user"
        );
        assert!(
            !policy.still_permits(&door("tcp/22", true), &hold("b", "ssh"), now, NOW),
            "no longer for one connection"
        );
        assert!(
            !policy.still_permits(&door("tcp/80", false), &hold("a", "ssh"), now, NOW),
            "no longer a port of the service"
        );
        assert!(!policy.still_permits(&door("tcp/22", false), &hold("c", "ssh"), now, NOW), "no longer a user");
    }

    #[test]
    fn what_a_user_may_no_more_is_not_upheld() {
        let now = Instant::now();
        let upheld = |policy: &Policy, source: &str, bound, seconds| {
            let door = Door { source: source.parse().unwrap(), port: "tcp/22".parse().unwrap(), once: false };
            let until = now + Duration::from_secs(seconds);
            let [user, service] = ["b", "ssh"].map(|name| name.parse().unwrap());
            let (token, kill, spent, waits, members, asked) = (None, false, false, false, Vec::new(), None);
            policy.still_permits(
                &door,
                &Hold { user, service, until, bound, token, kill, spent, members, asked, waits },
                now,
                NOW,
            )
        };
        let narrowed = |narrow: &dyn Fn(&mut Allowance)| {
            let mut policy = policy();
            narrow(policy.users.get_mut(&"b".parse().unwrap()).unwrap());
            policy
        };
        let from = narrowed(&|allowance| {
            allowance.from = vec!["192.0.2.0/24".parse().unwrap(), "2001:db8::/64".parse().unwrap()];
        });
        for (source, may) in
            [("192.0.2.1", true), ("198.51.100.1", false), ("2001:db8::1", true), ("2001:db9::1", false)]
        {
            assert_eq!(upheld(&from, source, false, 1), may, "{source}");
        }
        let bound = narrowed(&|allowance| allowance.bound = true);
        let capped = narrowed(&|allowance| allowance.open_for = Some(10));
        let expires = narrowed(&|allowance| allowance.expires = Some(NOW + 10));
        for source in ["192.0.2.1", "2001:db8::1"] {
            for is_bound in [false, true] {
                assert_eq!(upheld(&bound, source, is_bound, 1), is_bound);
            }
            for (seconds, may) in [(10, true), (11, false)] {
                assert_eq!(upheld(&capped, source, false, seconds), may);
                assert_eq!(upheld(&expires, source, false, seconds), may);
            }
        }
    }
}
