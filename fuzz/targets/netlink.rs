//! What the kernel says over netlink, as far as it is read here: changes of tables, verdicts on doors, and routes.
#![no_main]

use knockq::client::route;
use knockq::nft::{Loss, elements, watch};
use libfuzzer_sys::fuzz_target;

/// `NLMSG_ERROR` of linux/netlink.h, which is also an acknowledgement.
const NLMSG_ERROR: u16 = 2;

/// Bytes of a message's header.
const HEADER: usize = 16;

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, message)) = bytes.split_first() else { return };
    match kind % 4 {
        0 => drop(route::read(message)),
        1 => check_verdict(message),
        _ => check_watch(message),
    }
});

/// Only an acknowledgement is one.
fn check_verdict(answer: &[u8]) {
    let Some(verdict) = elements::read(answer) else { return };
    assert_eq!(u16::from_ne_bytes([answer[4], answer[5]]), NLMSG_ERROR);
    let code = i32::from_ne_bytes(answer[HEADER..HEADER + 4].try_into().unwrap());
    assert_eq!(verdict.is_ok(), code == 0);
}

/// Other tables are none of our business, and no loss is overlooked when nothing was loaded.
fn check_watch(datagram: &[u8]) {
    let mut told = watch::Told::default();
    let worst = told.read(datagram, [0; 2]);
    let name = b"knockq";
    if !datagram.windows(name.len()).any(|window| window == name) {
        assert_eq!(worst, Loss::Nothing);
        assert!(told.deleted().is_empty());
    }
    assert_eq!(told.take_unmended(0), worst);
}
