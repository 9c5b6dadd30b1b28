//! Knocks that are sent more than once.

use crate::lab::{Daemon, FAMILIES, Family, Lab, eventually, hex};
use crate::{raw_socket, send_raw};

/// A server that opens ssh for an hour, and to which the bytes of a knock are fresh for ten minutes: what refuses them until
/// then is their counter.
pub(super) fn lab() -> Lab {
    let lab = Lab::with("open_for = \"1h\"");
    lab.set("window = \"10m\"");
    lab
}

/// A daemon that tells of each packet.
pub(super) fn start(lab: &Lab) -> Daemon {
    let mut daemon = Daemon::spawn_with(lab, &["--debug"], &[]);
    daemon.wait_for("knockq: ready");
    daemon
}

/// A knock whose bytes are known, so that they can be sent again.
pub(super) struct Knock {
    pub(super) family: Family,
    packet: Vec<u8>,
}

impl Knock {
    /// Bound to its sender.
    pub(super) fn new(lab: &Lab, family: Family) -> Self {
        Self::with_source(lab, family, &family.alice().to_string())
    }

    pub(super) fn with_source(lab: &Lab, family: Family, source: &str) -> Self {
        let hex = lab.print_knock(family, &["--source", source]);
        let byte = |place| u8::from_str_radix(&hex[place..place + 2], 16).unwrap();
        Self { family, packet: (0..hex.len()).step_by(2).map(byte).collect() }
    }

    pub(super) fn both(lab: &Lab) -> [Self; 2] {
        FAMILIES.map(|family| Self::new(lab, family))
    }

    pub(super) fn send(&self, lab: &Lab) {
        lab.alice.enter(|| send_raw(&raw_socket(self.family), self.family, &self.packet));
    }

    /// The same bytes, from another address than hers.
    pub(super) fn send_as_mallory(&self, lab: &Lab) {
        let from = self.family.mallory().to_string();
        lab.mallory.oracle_says(&["replay", &hex(&self.packet), "--from", &from]);
    }

    /// The same bytes once more are told for what they are, and open nothing.
    #[track_caller]
    pub(super) fn is_spent(&self, lab: &Lab, daemon: &Daemon) {
        self.is_spent_for("alice", lab, daemon);
    }

    /// The same, where alice's key has another name.
    #[track_caller]
    pub(super) fn is_spent_for(&self, user: &str, lab: &Lab, daemon: &Daemon) {
        self.is_refused(&["replayed", "superseded"], user, lab, daemon);
    }

    /// They open nothing, for the store may have forgotten them.
    #[track_caller]
    pub(super) fn is_in_doubt(&self, lab: &Lab, daemon: &Daemon) {
        self.is_refused(&["in_doubt"], "alice", lab, daemon);
    }

    #[track_caller]
    fn is_refused(&self, reasons: &[&str], user: &str, lab: &Lab, daemon: &Daemon) {
        let refused = |reason| format!("packet reason={reason} user={user} source={}", self.family.alice());
        let count = || reasons.iter().map(|reason| daemon.log().matches(&refused(reason)).count()).sum::<usize>();
        let before = count();
        self.send(lab);
        eventually("a refusal", || count() != before);
        assert_eq!(lab.door(self.family.alice(), 22), None);
    }

    /// Its door is open, to alice alone.
    #[track_caller]
    pub(super) fn has_opened(&self, lab: &Lab) {
        lab.wait_for_door(self.family.alice(), 22);
        assert!(lab.alice.reaches(self.family.server(), 22) && !lab.mallory.reaches(self.family.server(), 22));
    }

    #[track_caller]
    pub(super) fn has_opened_nothing(&self, lab: &Lab) {
        assert_eq!(lab.door(self.family.alice(), 22), None);
        assert!(!lab.alice.reaches(self.family.server(), 22));
    }
}
