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
const MAX_DESCRIPTORS: usize = 13;

/// What is said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Message {
    /// Root to child: these descriptors are yours.
    Start,
    /// Gate to root: the queue is bound, the table may be loaded.
    Bound,
    /// Root to gate: let go of the table, it is about to be loaded anew.
    Release,
    /// Gate to root, let go of the table: it persists without an owner.
    Persists,
    /// Gate to root, let go of the table: the same, but it was not there, and is empty.
    Made,
    /// Root to both: the table is loaded.
    Loaded,
    /// Child to root, or root to engine: what was asked last is done.
    Ready,
    /// Engine to root: the table is not there, or not the one of this configuration; it is for others to load.
    Unable,
    /// Root to engine: here are the settings that were read. Root to gate: do what these limits allow, too, from now on.
    Settings,
    /// Root to gate: the limits of before are over; the gate takes packets from now on. Engine to root: it may hear so.
    Enforce,
    /// Root to child: it is time to go.
    Stop,
    /// Engine to root: have the configuration read again.
    Read,
    /// Root to engine: it was not taken, and here is why.
    Refused,
    /// Engine to root: would the table of what was read load? Where others load it: what does nft list?
    Check,
    /// Root to engine: it is the table that is loaded.
    Same,
    /// Engine to root: the gate is to do what was read, too.
    Permit,
    /// Engine to root: load the table of what is in force.
    Load,
    /// Engine to root: what was read is in force.
    Reloaded,
    /// Engine to root: what was read is not put in force.
    Kept,
    /// Engine to root: the table is not what it should be, and others have to load it.
    Lost,
    /// Engine to root: it is what it should be again.
    Found,
    /// Engine to root: the gate is not on trial any more. Root to engine: so it is.
    Confirm,
    /// Root to engine: somebody wants the configuration to be read again.
    Hangup,
    /// Root to engine: say that you live.
    Ping,
    /// Engine to root: it lives.
    Alive,
}

impl Message {
    /// Each, in the order of the bytes that stand for them.
    pub const ALL: [Self; 25] = [
        Self::Start,
        Self::Bound,
        Self::Release,
        Self::Persists,
        Self::Made,
        Self::Loaded,
        Self::Ready,
        Self::Unable,
        Self::Settings,
        Self::Enforce,
        Self::Stop,
        Self::Read,
        Self::Refused,
        Self::Check,
        Self::Same,
        Self::Permit,
        Self::Load,
        Self::Reloaded,
        Self::Kept,
        Self::Lost,
        Self::Found,
        Self::Confirm,
        Self::Hangup,
        Self::Ping,
        Self::Alive,
    ];

    const fn byte(self) -> u8 {
        self as u8 + 1
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
    fn a_message_with_more_descriptors_than_there_may_be_is_refused() {
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
