//! Header records from the gate to the engine, through a pipe.
//!
//! A record is 128 bytes: the number of packet bytes (2, big-endian), then those bytes, then zeros. Neither side trusts
//! the other: a writer never waits, a reader never believes a length.

use std::io;
use std::os::fd::OwnedFd;

use super::kernel::COPY_LEN;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

/// Bytes of one record.
pub const RECORD_LEN: usize = 128;

/// Records that one write hands over: a pipe takes 4096 bytes whole or not at all (`PIPE_BUF`).
const WRITE_RECORDS: usize = 4096 / RECORD_LEN;

/// Bytes that the pipe holds: 8192 records.
pub(super) const PIPE_LEN: usize = 1 << 20;

/// Makes the pipe: its reading end, then its writing end.
///
/// # Errors
/// The kernel's.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    fcntl_setpipe_size(&writer, PIPE_LEN)?;
    Ok((reader, writer))
}

/// The gate's end. It never blocks.
pub struct RelayWriter {
    pipe: OwnedFd,
    pending: Vec<u8>,
    lost: u64,
    lost_in_all: u64,
}

impl RelayWriter {
    /// Writes into this pipe.
    pub fn new(pipe: OwnedFd) -> Self {
        Self { pipe, pending: Vec::with_capacity(WRITE_RECORDS * RECORD_LEN), lost: 0, lost_in_all: 0 }
    }

    /// Adds a packet's first bytes to what the next [`RelayWriter::flush`] hands over.
    ///
    /// # Errors
    /// As [`RelayWriter::flush`].
    pub fn push(&mut self, packet: &[u8]) -> io::Result<()> {
        let packet = packet.get(..usize::from(COPY_LEN)).unwrap_or(packet);
        let length = u16::try_from(packet.len()).unwrap_or(COPY_LEN);
        self.pending.extend(length.to_be_bytes());
        self.pending.extend(packet);
        self.pending.resize(self.pending.len().next_multiple_of(RECORD_LEN), 0);
        if self.pending.len() >= WRITE_RECORDS * RECORD_LEN { self.flush() } else { Ok(()) }
    }

    /// Hands over what was pushed. If the pipe is full it is lost, and counted.
    ///
    /// # Errors
    /// `BrokenPipe` when the engine is gone.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let records = u64::try_from(self.pending.len() / RECORD_LEN).unwrap_or(0);
        let written = rustix::io::write(&self.pipe, &self.pending);
        self.pending.clear();
        match written {
            Ok(_) => Ok(()),
            Err(Errno::AGAIN) => {
                self.lost = self.lost.saturating_add(records);
                self.lost_in_all = self.lost_in_all.saturating_add(records);
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// How many records were lost since the start.
    pub const fn lost_in_all(&self) -> u64 {
        self.lost_in_all
    }

    /// How many records were lost since the last call.
    pub const fn take_lost(&mut self) -> u64 {
        std::mem::replace(&mut self.lost, 0)
    }
}
