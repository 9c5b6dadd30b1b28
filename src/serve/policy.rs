//! What the monitor lets the verifier ask for: its own copy, checked again.

use serde::{Deserialize, Serialize};

use super::frames::Frame;
use super::sandbox::Identity;
use crate::service::Port;

/// The monitor's settings.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Policy {
    /// Whom it becomes.
    pub identity: Identity,
    /// Number of the queue.
    pub queue: u16,
    /// The doors there are.
    pub openings: Vec<Opening>,
}

/// A port that may be opened, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Opening {
    /// The guarded port.
    pub port: Port,
    /// For one connection.
    pub once: bool,
    /// Seconds at most.
    pub seconds: u32,
}

impl Policy {
    /// Whether this may be asked.
    pub fn permits(&self, frame: &Frame) -> bool {
        match frame {
            Frame::Open { port, once, seconds, .. } => self.openings.iter().any(|opening| {
                opening.port == *port && opening.once == *once && (1..=opening.seconds).contains(seconds)
            }),
            Frame::Close { port, .. } => self.openings.iter().any(|opening| opening.port == *port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Frame, Identity, Opening, Policy};

    #[test]
    fn only_configured_doors_within_their_time_are_permitted() {
        let port = |text: &str| text.parse().unwrap();
        let policy = Policy {
            identity: Identity { uid: 1, gid: 1 },
            queue: 1,
            openings: vec![
                Opening { port: port("tcp/22"), once: false, seconds: 30 },
                Opening { port: port("tcp/25"), once: true, seconds: 60 },
            ],
        };
        let open = |text: &str, once, seconds| Frame::Open {
            source: "192.0.2.1".parse().unwrap(),
            port: port(text),
            once,
            seconds,
            user: "a".parse().unwrap(),
            service: "b".parse().unwrap(),
        };
        for allowed in [open("tcp/22", false, 30), open("tcp/22", false, 1), open("tcp/25", true, 60)] {
            assert!(policy.permits(&allowed), "{allowed:?}");
        }
        for refused in [
            open("tcp/22", false, 31),
            open("tcp/22", false, 0),
            open("tcp/22", true, 30),
            open("udp/22", false, 30),
            open("tcp/25", false, 60),
            open("tcp/80", false, 1),
        ] {
            assert!(!policy.permits(&refused), "{refused:?}");
        }
    }
}
