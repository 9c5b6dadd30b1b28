//! The connection between root and a child: one-byte messages, with descriptors.
//!
//! The child finds its end as standard input, which is the one way to inherit a descriptor without unsafe code.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// Descriptors that one message carries at most.
const MAX_DESCRIPTORS: usize = 5;

/// What is said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Message {
    /// Root to child: these descriptors are yours.
    Start,
    /// Gate to root: the queue is bound, the table may be loaded.
    Bound,
    /// Root to both: the table is loaded.
    Loaded,
    /// Child to root: it works; or, it has done what was asked last.
    Ready,
    /// Engine to root: somebody took the table away, load it again.
    Lost,
    /// Root to engine: get ready for these new settings. Root to gate: do what these limits allow, too, from now on.
    Settings,
    /// Engine to root: it is not ready for the new settings, and will not be.
    Unable,
    /// Root to both, first to the engine: the old settings are over. The gate takes packets from now on.
    Enforce,
    /// Root to both: let go of the table, it is about to be loaded anew.
    Release,
    /// Root to engine: shut these doors, and write into this memory at which connections may have begun.
    Revoke,
    /// Root to child: it is time to go.
    Stop,
    /// Root to engine: write into this memory how it is.
    Report,
    /// Engine to root: it is written.
    Reported,
    /// Root to engine: write into this memory what was refused last.
    Explain,
    /// Root to engine: whoever is at the other end wants to know what happens.
    Watch,
    /// Engine to root: it is ready for the new settings.
    Prepared,
}

impl Message {
    const ALL: [Self; 16] = [
        Self::Start,
        Self::Bound,
        Self::Loaded,
        Self::Ready,
        Self::Lost,
        Self::Settings,
        Self::Unable,
        Self::Enforce,
        Self::Release,
        Self::Revoke,
        Self::Stop,
        Self::Report,
        Self::Reported,
        Self::Explain,
        Self::Watch,
        Self::Prepared,
    ];

    const fn byte(self) -> u8 {
        match self {
            Self::Start => 1,
            Self::Bound => 2,
            Self::Loaded => 3,
            Self::Ready => 4,
            Self::Lost => 5,
            Self::Settings => 6,
            Self::Unable => 7,
            Self::Enforce => 8,
            Self::Release => 9,
            Self::Revoke => 10,
            Self::Stop => 11,
            Self::Report => 12,
            Self::Reported => 13,
            Self::Explain => 14,
            Self::Watch => 15,
            Self::Prepared => 16,
        }
    }
}

/// One end.
pub struct Channel(OwnedFd);

/// A pair of connected ends that keep messages apart, closed on exec.
///
/// # Errors
/// The kernel's.
pub fn message_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

impl Channel {
    /// Root's end.
    pub const fn new(end: OwnedFd) -> Self {
        Self(end)
    }

    /// A child's end.
    ///
    /// # Errors
    /// When standard input is closed.
    pub fn of_stdin() -> io::Result<Self> {
        Ok(Self(io::stdin().as_fd().try_clone_to_owned()?))
    }

    /// Says something and hands over copies of descriptors. If the peer is gone, that is noticed where its answer is
    /// awaited.
    ///
    /// # Errors
    /// `WouldBlock` when the peer does not read, else the kernel's.
    pub fn send(&self, message: Message, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // Never waits: a peer that does not read what little is said is not what it should be.
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match sendmsg(&self.0, &[IoSlice::new(&[message.byte()])], &mut ancillary, flags) {
            // The latter two of a peer that goes at this very moment, where the kernel is older (seen on 5.10).
            Ok(_) | Err(Errno::PIPE | Errno::CONNREFUSED | Errno::NOTCONN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for a message; `None` when the peer has hung up.
    ///
    /// # Errors
    /// `InvalidData` for anything that is not a message; `WouldBlock` where there is none and the end does not wait.
    pub fn receive(&self) -> io::Result<Option<(Message, Vec<OwnedFd>)>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 2];
        let received = loop {
            match recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::CONNRESET) => {} // told once, of a peer that left unread what we said; its last words come next
                received => break received?,
            }
        };
        let descriptors = ancillary.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
            _ => Vec::new(),
        });
        let descriptors: Vec<OwnedFd> = descriptors.collect();
        if received.bytes == 0 && has_hung_up(&self.0) {
            return Ok(None);
        }
        let is_cut = received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
        // The space is rounded up: one descriptor more than it is for may have come.
        let is_whole = received.bytes == 1 && !is_cut && descriptors.len() <= MAX_DESCRIPTORS;
        let message = Message::ALL.into_iter().find(|message| is_whole && bytes == [message.byte(), 0]);
        message.map(|message| Some((message, descriptors))).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Waits for one message and no other; `None` when it is time to go, or the peer is gone.
    ///
    /// # Errors
    /// `InvalidData` for another message or number of descriptors.
    pub fn expect<const N: usize>(&self, expected: Message) -> io::Result<Option<[OwnedFd; N]>> {
        match self.receive()? {
            Some((message, descriptors)) if message == expected => {
                descriptors.try_into().map(Some).map_err(|_| io::ErrorKind::InvalidData.into())
            }
            Some((Message::Stop, _)) | None => Ok(None),
            Some(_) => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// Whether there is something to receive.
pub(super) fn has_word(socket: &impl AsFd) -> bool {
    is(socket, PollFlags::IN)
}

/// Whether the peer of a socket has closed its end. Reading nothing does not tell: a message may have no bytes.
pub(super) fn has_hung_up(socket: &impl AsFd) -> bool {
    is(socket, PollFlags::RDHUP)
}

fn is(socket: &impl AsFd, state: PollFlags) -> bool {
    poll(&mut [PollFd::new(socket, state)], Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::fd::AsFd;

    use super::{Channel, MAX_DESCRIPTORS, Message, message_pair};

    #[test]
    fn a_message_with_more_descriptors_than_five_is_refused() {
        let (peer, own) = message_pair().unwrap();
        let (peer, own) = (Channel::new(peer), Channel::new(own));
        let carried = io::stderr();
        peer.send(Message::Start, &[carried.as_fd(); MAX_DESCRIPTORS]).unwrap();
        let (message, descriptors) = own.receive().unwrap().unwrap();
        assert_eq!((message, descriptors.len()), (Message::Start, MAX_DESCRIPTORS));
        peer.send(Message::Start, &[carried.as_fd(); MAX_DESCRIPTORS + 1]).unwrap();
        assert_eq!(own.receive().unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
