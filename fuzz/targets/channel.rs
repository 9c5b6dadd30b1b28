//! The channel between root and its children, over a real pair of sockets, with real descriptors: anything but a
//! message is refused, and no descriptor stays behind.
#![no_main]

use std::fs;
use std::io;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::LazyLock;

use knockq::serve::channel::{Channel, Message, message_pair};
use knockq_fuzz::Input;
use libfuzzer_sys::fuzz_target;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// More than a message may carry.
const MOST: usize = 14;

static CARRIED: LazyLock<fs::File> = LazyLock::new(|| fs::File::open("/dev/null").unwrap());

fuzz_target!(|bytes: &[u8]| {
    LazyLock::force(&CARRIED);
    let before = open_descriptors();
    talk(Input::new(bytes));
    assert_eq!(open_descriptors(), before, "a descriptor was left open");
});

fn talk(mut input: Input<'_>) {
    let (peer, own) = message_pair().unwrap();
    let own = Channel::new(own);
    for _ in 0..4 {
        let count = usize::from(input.byte()) % (MOST + 1);
        let expected = input.byte() % 4;
        let said = input.bytes();
        if !send(&peer, said, count) {
            return;
        }
        if expected == 0 {
            check_expected(own.expect::<2>(Message::Start), said, count);
        } else {
            check_received(own.receive(), said, count);
        }
    }
    drop(peer);
    assert!(own.receive().unwrap().is_none());
}

fn send(peer: &OwnedFd, said: &[u8], count: usize) -> bool {
    let descriptors: Vec<BorrowedFd<'_>> = (0..count).map(|_| CARRIED.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if count > 0 {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
    }
    sendmsg(peer, &[IoSlice::new(said)], &mut ancillary, SendFlags::NOSIGNAL).is_ok()
}

fn is_message(said: &[u8], count: usize) -> bool {
    matches!(said, [message] if (1..=Message::ALL.len()).contains(&usize::from(*message))) && count < MOST
}

fn check_received(received: io::Result<Option<(Message, Vec<OwnedFd>)>>, said: &[u8], count: usize) {
    match received {
        Ok(Some((_, descriptors))) => {
            assert!(is_message(said, count), "{said:?} with {count} descriptors is no message");
            assert_eq!(descriptors.len(), count);
        }
        // A datagram of no bytes looks like the end, and is taken for it.
        Ok(None) => assert!(said.is_empty()),
        Err(error) => {
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            assert!(!is_message(said, count));
        }
    }
}

fn check_expected(received: io::Result<Option<[OwnedFd; 2]>>, said: &[u8], count: usize) {
    match received {
        Ok(Some(_)) => assert_eq!((said, count), ([1].as_slice(), 2)),
        Ok(None) => assert!(said.is_empty() || (said == [11] && is_message(said, count))),
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::InvalidData),
    }
}

fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}
