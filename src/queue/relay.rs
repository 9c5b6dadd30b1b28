//! Header records from the monitor to the verifier, through a pipe.
//!
//! A record is 128 bytes: the number of packet bytes (2, big-endian), then those bytes, then zeros. Neither side trusts
//! the other: a writer never waits, a reader never believes a length.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;

use super::kernel::COPY_LEN;

/// Bytes of one record.
pub const RECORD_LEN: usize = 128;

/// Records that one write hands over: a pipe takes 4096 bytes whole or not at all (`PIPE_BUF`).
const WRITE_RECORDS: usize = 4096 / RECORD_LEN;

/// Bytes that the pipe holds: 8192 records.
const PIPE_LEN: usize = 1 << 20;

/// Bytes that one read takes.
const READ_LEN: usize = 64 << 10;

/// Under load the reader lets records gather for this long: a wake-up costs more than fifty records.
const GATHER: Duration = Duration::from_micros(200);

/// Makes the pipe: its reading end, then its writing end.
///
/// # Errors
/// The kernel's.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    fcntl_setpipe_size(&writer, PIPE_LEN)?;
    Ok((reader, writer))
}

/// The monitor's end. It never blocks.
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
    /// `BrokenPipe` when the verifier is gone.
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

/// The verifier's end.
pub struct RelayReader {
    pipe: Receiver,
    buffer: Vec<u8>,
    last_read: Instant,
}

impl RelayReader {
    /// Reads from this pipe, within a runtime.
    ///
    /// # Errors
    /// When it is not the reading end of a pipe.
    pub fn new(pipe: OwnedFd) -> io::Result<Self> {
        Ok(Self { pipe: Receiver::from_owned_fd(pipe)?, buffer: vec![0; READ_LEN], last_read: Instant::now() })
    }

    /// Waits for records and returns them as one block for [`records`]; `None` when the monitor is gone.
    ///
    /// # Errors
    /// The kernel's, or `InvalidData` for a piece of a record.
    pub async fn read(&mut self) -> io::Result<Option<&[u8]>> {
        self.pipe.readable().await?;
        // Only a flood wakes us twice within so short a time. Sleeping here, where tokio's timer is too coarse, lets one
        // wake-up serve many records; the grants that wait meanwhile wait 200 us at most.
        if let Some(rest) = GATHER.checked_sub(self.last_read.elapsed()) {
            std::thread::sleep(rest);
        }
        let length = self.pipe.read(&mut self.buffer).await?;
        self.last_read = Instant::now();
        match length {
            0 => Ok(None),
            _ if length % RECORD_LEN == 0 => Ok(self.buffer.get(..length)),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// The packets of a block of records. A length that does not fit its record is cut to it.
pub fn records(block: &[u8]) -> impl Iterator<Item = &[u8]> {
    block.chunks_exact(RECORD_LEN).map(|record| match record {
        [high, low, packet @ ..] => {
            let length = usize::from(u16::from_be_bytes([*high, *low]));
            packet.get(..length).unwrap_or(packet)
        }
        _ => &[],
    })
}

#[cfg(test)]
mod tests {
    use super::{PIPE_LEN, RECORD_LEN, RelayReader, RelayWriter, pipe, records};

    #[tokio::test(flavor = "current_thread")]
    async fn packets_arrive_as_they_were_pushed_and_cut_to_a_record() {
        let (reader, writer) = pipe().unwrap();
        let (mut reader, mut writer) = (RelayReader::new(reader).unwrap(), RelayWriter::new(writer));
        for packet in [&[1_u8; 60][..], &[], &[2; 1500]] {
            writer.push(packet).unwrap();
        }
        writer.flush().unwrap();
        let block = reader.read().await.unwrap().unwrap();
        let lengths: Vec<_> = records(block).map(<[u8]>::len).collect();
        assert_eq!(lengths, [60, 0, 126]);
        drop(writer);
        assert_eq!(reader.read().await.unwrap(), None, "the monitor is gone");
    }

    #[test]
    fn a_reader_that_does_not_read_costs_records_and_nothing_else() {
        let (reader, writer) = pipe().unwrap();
        let mut writer = RelayWriter::new(writer);
        for _ in 0..10_000 {
            writer.push(&[0; 60]).unwrap();
        }
        writer.flush().unwrap();
        let held = u64::try_from(PIPE_LEN / RECORD_LEN).unwrap();
        assert_eq!(writer.take_lost(), 10_000 - held);
        assert_eq!(writer.take_lost(), 0);
        drop(reader);
        writer.push(&[]).unwrap();
        assert_eq!(writer.flush().unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_length_beyond_its_record_is_cut() {
        let mut record = [7; RECORD_LEN];
        record[..2].copy_from_slice(&u16::MAX.to_be_bytes());
        assert_eq!(records(&record).map(<[u8]>::len).collect::<Vec<_>>(), [RECORD_LEN - 2]);
    }
}
