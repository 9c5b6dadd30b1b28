//! The engine's end of the relay.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;

use super::relay::RECORD_LEN;

/// Bytes that one read takes.
const READ_LEN: usize = 64 << 10;

/// Under load the reader lets records gather for this long: a wake-up costs more than fifty records.
const GATHER: Duration = Duration::from_micros(200);

/// It waits for records.
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

    /// Waits for records and returns them as one block for [`records`]; `None` when the gate is gone.
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
    use super::{RECORD_LEN, RelayReader, records};
    use crate::queue::relay::{PIPE_LEN, RelayWriter, pipe};

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
        assert_eq!(reader.read().await.unwrap(), None, "the gate is gone");
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
