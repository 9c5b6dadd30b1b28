//! A process is killed at an exact instant between a knock and its door.

use nix::sys::signal::{Signal, kill};

use crate::debugger::{Traced, other_thread};
use crate::lab::{FAMILIES, Lab};

const FDATASYNC: u64 = 75;

#[test]
fn a_knock_whose_verifier_is_killed_before_the_durable_write_opens_nothing() {
    let lab = Lab::new();
    for family in FAMILIES {
        let mut daemon = lab.start();
        let (_, verifier) = daemon.processes()[2];
        let writer = Traced::attach(other_thread(verifier));
        lab.knock(family, &[]);
        writer.run_to(&[FDATASYNC]);
        kill(verifier, Signal::SIGKILL).unwrap();
        writer.bury();
        assert_eq!(daemon.end(), Some(1), "{}", daemon.log());
        lab.stays_shut(family);
    }
}
