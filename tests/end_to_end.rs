//! On a real kernel: real daemons, real clients, real packets, over IPv4 and IPv6.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    unreachable_pub,
    reason = "a test fails by panicking"
)]

#[path = "support/lab.rs"]
mod lab;

use lab::{FAMILIES, Lab, eventually};

#[test]
fn a_knock_opens_the_door_for_its_source_and_port_alone_and_it_shuts_again() {
    let lab = Lab::new();
    let _daemon = lab.start();
    for family in FAMILIES {
        let server = family.server();
        assert!(!lab.alice.reaches(server, 22), "shut without a knock");
        lab.knock(family, &[]);
        eventually("the door", || lab.door(family.alice(), 22).is_some());
        let mut connection = lab.alice.connect(server, 22).expect("open after it");
        assert!(!lab.mallory.reaches(server, 22), "shut to another source");
        assert!(!lab.alice.reaches(server, 25), "another guarded port stays shut");
        eventually("closing", || !lab.alice.reaches(server, 22));
        assert!(lab::echoes(&mut connection), "the established connection lives on");
    }
}
