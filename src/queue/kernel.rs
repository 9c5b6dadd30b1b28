//! The netfilter queue, over the nfq crate.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use nfq::{Queue, Verdict};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use thiserror::Error;

use crate::service::Answer;

/// Bytes of each packet that the kernel hands up: all headers of a SYN, with room for IPv6 extension headers.
pub(super) const COPY_LEN: u16 = 126;

/// Packets that the kernel holds for us at most; it drops more.
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

/// The socket of a queue.
pub struct KernelQueue {
    queue: Queue,
    /// A second descriptor of nfq's socket, which nfq itself keeps to itself.
    socket: OwnedFd,
    number: u16,
}

impl KernelQueue {
    /// Opens the socket. Looking up its descriptor needs a process that may still look at itself, so do it before
    /// privileges are given up.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(number: u16) -> Result<Self, QueueError> {
        let open = || {
            let before = open_sockets()?;
            let queue = Queue::open()?;
            let socket = socket_opened_since(&before)?;
            io::Result::Ok(Self { queue, socket, number })
        };
        open().map_err(|source| QueueError::Io { number, source })
    }

    /// Binds the queue. From now on its packets wait for [`KernelQueue::drain`]; never in fail-open mode.
    ///
    /// Do it before the table is loaded: nfq throws packets away that come while it configures.
    ///
    /// # Errors
    /// [`QueueError`]. The caller must hold CAP_NET_ADMIN: then a refusal means that another process has the queue.
    pub fn bind(&mut self) -> Result<(), QueueError> {
        let number = self.number;
        self.try_bind().map_err(|source| match Errno::from_io_error(&source) {
            Some(Errno::PERM | Errno::BUSY) => QueueError::Taken { number },
            Some(Errno::PROTONOSUPPORT | Errno::INVAL | Errno::OPNOTSUPP) => QueueError::Unsupported { number },
            _ => QueueError::Io { number, source },
        })
    }

    fn try_bind(&mut self) -> io::Result<()> {
        set_socket_recv_buffer_size_force(&self.socket, SOCKET_BUFFER)?;
        self.queue.bind(self.number)?;
        self.queue.set_copy_range(self.number, COPY_LEN)?;
        self.queue.set_queue_max_len(self.number, QUEUE_LEN)?;
        self.queue.set_nonblocking(true);
        Ok(())
    }

    /// Takes up to a burst of packets, gives each the same verdict and shows it to `each`; returns how many there were.
    ///
    /// # Errors
    /// When the kernel refuses a verdict: then nothing more can be done but to stop.
    pub fn drain(&mut self, answer: Answer, mut each: impl FnMut(&[u8])) -> Result<usize, QueueError> {
        let verdict = match answer {
            Answer::Drop => Verdict::Drop,
            Answer::Reset => Verdict::Accept, // nobody listens at a knock port, so the kernel itself resets
        };
        let fail = |number| move |source| QueueError::Io { number, source };
        for taken in 0..BURST {
            let mut message = match self.queue.recv() {
                Ok(message) => message,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(taken),
                // The answer to an earlier verdict: the kernel had already dropped that packet itself.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(fail(self.number)(error)),
            };
            message.set_verdict(verdict);
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

/// The sockets among this process's descriptors.
fn open_sockets() -> io::Result<BTreeSet<RawFd>> {
    let entries = fs::read_dir("/proc/self/fd")?.collect::<io::Result<Vec<_>>>()?;
    let is_socket = |path: &Path| fs::read_link(path).is_ok_and(|link| link.to_string_lossy().starts_with("socket:"));
    let sockets = entries.iter().filter(|entry| is_socket(&entry.path()));
    Ok(sockets.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// A duplicate of the one socket that this thread has opened since, by asking the kernel for our own descriptor.
fn socket_opened_since(before: &BTreeSet<RawFd>) -> io::Result<OwnedFd> {
    let number = open_sockets()?.difference(before).copied().next().ok_or(io::ErrorKind::NotFound)?;
    let myself = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(&myself, number, PidfdGetfdFlags::empty())?)
}
