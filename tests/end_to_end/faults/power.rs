//! The power fails while a counter is being written. What a disk may keep of that is in src/serve/store/power.rs; here a
//! daemon begins with it.

use std::fs;
use std::process::Command;

use super::knock::{self, Knock};
use crate::debugger::{FDATASYNC, FTRUNCATE, PWRITE64, Traced, other_thread};
use crate::lab::{Daemon, Family, Lab, eventually};

/// The store before each call that the second knock's counter takes to be written. The first one's is on the disk.
fn cut_short(lab: &Lab, daemon: &mut Daemon, first: &Knock, second: &Knock) -> Vec<Vec<u8>> {
    let (_, engine) = daemon.processes()[2];
    let writer = Traced::attach(other_thread(engine));
    first.send(lab);
    writer.run_to(&[FDATASYNC]);
    assert_eq!(writer.finish(), 0);
    second.send(lab);
    let mut states = Vec::new();
    let mut call = 0;
    while call != FDATASYNC {
        call = writer.run_to(&[PWRITE64, FTRUNCATE, FDATASYNC]);
        states.push(fs::read(lab.store()).unwrap());
    }
    first.has_opened(lab);
    daemon.kill();
    writer.bury();
    states
}

#[test]
fn a_daemon_that_begins_with_what_a_loss_of_power_left_knows_what_was_spent() {
    let lab = knock::lab();
    for [first, second] in [[Family::V4, Family::V6], [Family::V6, Family::V4]] {
        let [first, second] = [first, second].map(|family| Knock::new(&lab, family));
        let mut states = cut_short(&lab, &mut knock::start(&lab), &first, &second);
        assert!(states.len() > 2, "the writes are not seen");
        let last = states.pop().unwrap();
        for state in [states.swap_remove(0), states.swap_remove(states.len() / 2), last] {
            eventually("a table that nobody owns", || {
                lab.server.enter(|| {
                    Command::new("nft").args(["delete", "table", "inet", "knockq"]).status().unwrap().success()
                })
            });
            fs::write(lab.store(), state).unwrap();
            let daemon = knock::start(&lab);
            first.is_spent(&lab, &daemon);
            lab.knock(second.family, &[]);
            second.has_opened(&lab);
            assert_eq!(lab.door(first.family.alice(), 22), None);
            daemon.stop();
        }
        lab.server.nft(&["delete", "table", "inet", "knockq"]);
    }
}
