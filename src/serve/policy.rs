//! What the monitor lets the verifier ask for: its own copy, checked again.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::book::Grant;
use super::frames::Frame;
use super::sandbox::Identity;
use crate::nft::Door;
use crate::service::{Answer, Name, Port};

/// The monitor's settings.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Policy {
    /// Whom it becomes.
    pub identity: Identity,
    /// Number of the queue.
    pub queue: u16,
    /// The table is the daemon's, not one that others load.
    pub owns_table: bool,
    /// The verdict on every packet.
    pub answer: Answer,
    /// Doors that may be opened in a minute at most.
    pub grants_per_minute: u32,
    /// What can be opened, by name.
    pub services: HashMap<Name, Opening>,
    /// Who may open which services.
    pub users: HashMap<Name, Vec<Name>>,
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
}

impl Policy {
    /// Whether this may be asked.
    pub fn permits(&self, frame: &Frame) -> bool {
        match frame {
            Frame::Open { port, once, seconds, user, service, .. } => self
                .opening(user, service, *port)
                .is_some_and(|opening| opening.once == *once && (1..=opening.seconds).contains(seconds)),
            Frame::Close { port, .. } => self.services.values().any(|opening| opening.ports.contains(port)),
        }
    }

    /// Whether a door that was opened may stay open.
    pub fn upholds(&self, door: &Door, grant: &Grant) -> bool {
        self.opening(&grant.user, &grant.service, door.port).is_some_and(|opening| opening.once == door.once)
    }

    fn opening(&self, user: &Name, service: &Name, port: Port) -> Option<&Opening> {
        let may = self.users.get(user)?.contains(service);
        self.services.get(service).filter(|opening| may && opening.ports.contains(&port))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::{Answer, Door, Frame, Grant, HashMap, Identity, Opening, Policy};

    fn policy() -> Policy {
        let opening = |port: &str, once, seconds| Opening { ports: vec![port.parse().unwrap()], once, seconds };
        let name = |text: &str| text.parse().unwrap();
        Policy {
            identity: Identity { uid: 1, gid: 1 },
            queue: 1,
            owns_table: true,
            answer: Answer::Drop,
            grants_per_minute: 600,
            services: HashMap::from([
                (name("ssh"), opening("tcp/22", false, 30)),
                (name("mail"), opening("tcp/25", true, 60)),
            ]),
            users: HashMap::from([(name("a"), vec![name("ssh"), name("mail")]), (name("b"), vec![name("ssh")])]),
        }
    }

    #[test]
    fn only_what_is_configured_for_the_user_within_its_time_is_permitted() {
        let open = |user: &str, service: &str, port: &str, once, seconds| Frame::Open {
            source: "192.0.2.1".parse().unwrap(),
            port: port.parse().unwrap(),
            once,
            seconds,
            user: user.parse().unwrap(),
            service: service.parse().unwrap(),
        };
        let policy = policy();
        for allowed in [
            open("a", "ssh", "tcp/22", false, 30),
            open("b", "ssh", "tcp/22", false, 1),
            open("a", "mail", "tcp/25", true, 60),
        ] {
            assert!(policy.permits(&allowed), "{allowed:?}");
        }
        for refused in [
            open("a", "ssh", "tcp/22", false, 31),
            open("a", "ssh", "tcp/22", false, 0),
            open("a", "ssh", "tcp/22", true, 30),
            open("a", "ssh", "udp/22", false, 30),
            open("a", "ssh", "tcp/25", false, 30),
            open("a", "mail", "tcp/25", false, 60),
            open("b", "mail", "tcp/25", true, 60),
            open("c", "ssh", "tcp/22", false, 30),
            open("a", "web", "tcp/80", false, 1),
        ] {
            assert!(!policy.permits(&refused), "{refused:?}");
        }
    }

    #[test]
    fn a_door_stays_while_its_user_may_still_open_it_like_this() {
        let (policy, now) = (policy(), Instant::now());
        let door = |port: &str, once| Door { source: "192.0.2.1".parse().unwrap(), port: port.parse().unwrap(), once };
        let grant = |user: &str, service: &str| Grant {
            user: user.parse().unwrap(),
            service: service.parse().unwrap(),
            until: now,
        };
        assert!(policy.upholds(&door("tcp/22", false), &grant("b", "ssh")));
        assert!(policy.upholds(&door("tcp/25", true), &grant("a", "mail")));
        assert!(!policy.upholds(&door("tcp/25", true), &grant("b", "mail")), "not a service of this user");
        assert!(!policy.upholds(&door("tcp/22", true), &grant("b", "ssh")), "no longer for one connection");
        assert!(!policy.upholds(&door("tcp/80", false), &grant("a", "ssh")), "no longer a port of the service");
        assert!(!policy.upholds(&door("tcp/22", false), &grant("c", "ssh")), "no longer a user");
    }
}
