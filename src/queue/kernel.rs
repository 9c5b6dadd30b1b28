//! The netfilter queue, over the nfq crate.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use nfq::{Queue, Verdict};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use thiserror::Error;

/// Bytes of each packet that the kernel hands up: all headers of a SYN, with room for IPv6 extension headers.
pub(super) const COPY_LEN: u16 = 126;

/// Packets that the kernel holds for us at most; more are dropped, as all are in the end.
const QUEUE_LEN: u32 = 16_384;

/// Bytes of the socket's buffer: room for a burst of 8000 SYNs.
const SOCKET_BUFFER: usize = 8 << 20;

/// Packets taken at one go, so that grants and signals get their turn.
const BURST: usize = 64;

/// Why the queue cannot be used.
#[derive(Debug, Error)]
pub enum QueueError {
    /// Another process has it.
    #[error("queue {number}: already bound by another process")]
    Taken {
        /// The queue's number.
        number: u16,
    },
    /// The kernel has no nfnetlink_queue.
    #[error("queue {number}: this kernel has no netfilter queue (CONFIG_NETFILTER_NETLINK_QUEUE)")]
    Unsupported {
        /// The queue's number.
        number: u16,
    },
    /// Anything else.
    #[error("queue {number}: {source}")]
    Io {
        /// The queue's number.
        number: u16,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A bound queue.
pub struct KernelQueue {
    queue: Queue,
    /// A second descriptor of nfq's socket, which nfq itself keeps to itself.
    socket: OwnedFd,
    number: u16,
}

impl KernelQueue {
    /// Binds the queue. From now on its packets wait for [`KernelQueue::drain`]; never in fail-open mode.
    ///
    /// Do it before the table is loaded: nfq throws packets away that come while it configures.
    ///
    /// # Errors
    /// [`QueueError`]. The caller must hold CAP_NET_ADMIN: then a refusal means that another process has the queue.
    pub fn bind(number: u16) -> Result<Self, QueueError> {
        Self::try_bind(number).map_err(|source| match Errno::from_io_error(&source) {
            Some(Errno::PERM | Errno::BUSY) => QueueError::Taken { number },
            Some(Errno::PROTONOSUPPORT | Errno::INVAL | Errno::OPNOTSUPP) => QueueError::Unsupported { number },
            _ => QueueError::Io { number, source },
        })
    }

    fn try_bind(number: u16) -> io::Result<Self> {
        let before = open_descriptors()?;
        let mut queue = Queue::open()?;
        let socket = descriptor_opened_since(&before)?;
        set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER)?;
        queue.bind(number)?;
        queue.set_copy_range(number, COPY_LEN)?;
        queue.set_queue_max_len(number, QUEUE_LEN)?;
        queue.set_nonblocking(true);
        Ok(Self { queue, socket, number })
    }

    /// Takes up to a burst of packets, drops each and shows it to `each`; returns how many there were.
    ///
    /// # Errors
    /// When the kernel refuses a verdict: then nothing more can be done but to stop.
    pub fn drain(&mut self, mut each: impl FnMut(&[u8])) -> Result<usize, QueueError> {
        let fail = |number| move |source| QueueError::Io { number, source };
        for taken in 0..BURST {
            let mut message = match self.queue.recv() {
                Ok(message) => message,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(taken),
                Err(error) => return Err(fail(self.number)(error)),
            };
            message.set_verdict(Verdict::Drop);
            each(message.get_payload());
            self.queue.verdict(message).map_err(fail(self.number))?;
        }
        Ok(BURST)
    }
}

impl AsFd for KernelQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn open_descriptors() -> io::Result<BTreeSet<RawFd>> {
    let numbers = fs::read_dir("/proc/self/fd")?.map(|entry| Ok(entry?.file_name().to_string_lossy().parse().ok()));
    Ok(numbers.collect::<io::Result<Vec<Option<RawFd>>>>()?.into_iter().flatten().collect())
}

/// A duplicate of the one socket that this thread has opened since, by asking the kernel for our own descriptor.
fn descriptor_opened_since(before: &BTreeSet<RawFd>) -> io::Result<OwnedFd> {
    let is_socket = |number: &RawFd| {
        fs::read_link(format!("/proc/self/fd/{number}")).is_ok_and(|link| link.to_string_lossy().starts_with("socket:"))
    };
    let number = open_descriptors()?.difference(before).copied().find(is_socket).ok_or(io::ErrorKind::NotFound)?;
    let myself = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(&myself, number, PidfdGetfdFlags::empty())?)
}
