//! The relay from the gate to the engine, over a real pipe: what was pushed arrives, and no block, however wrong, is
//! believed.
#![no_main]

use std::io;

use knockq::queue::relay::pipe;
use knockq::queue::{RECORD_LEN, RelayReader, RelayWriter, records};
use knockq_fuzz::Input;
use libfuzzer_sys::fuzz_target;
use tokio::runtime::{Builder, Runtime};

thread_local! {
    static RUNTIME: Runtime = Builder::new_current_thread().enable_io().build().unwrap();
}

fuzz_target!(|bytes: &[u8]| {
    check_records(bytes);
    RUNTIME.with(|runtime| {
        runtime.block_on(async {
            read_raw(bytes).await;
            push_and_read(Input::new(bytes)).await;
        });
    });
});

fn check_records(block: &[u8]) {
    let packets: Vec<&[u8]> = records(block).collect();
    assert_eq!(packets.len(), block.len() / RECORD_LEN);
    for (packet, record) in packets.iter().zip(block.chunks(RECORD_LEN)) {
        let claimed = usize::from(u16::from_be_bytes([record[0], record[1]]));
        assert_eq!(*packet, &record[2..2 + claimed.min(RECORD_LEN - 2)]);
    }
}

/// A gate that writes anything: a block is taken whole, or is the end.
async fn read_raw(bytes: &[u8]) {
    let (reader, writer) = pipe().unwrap();
    let written = rustix::io::write(&writer, bytes).unwrap_or(0);
    drop(writer);
    let mut reader = RelayReader::new(reader).unwrap();
    match reader.read().await {
        Ok(None) => assert_eq!(written, 0),
        Ok(Some(block)) => assert_eq!(block, &bytes[..written]),
        Err(error) => {
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            assert_ne!(written % RECORD_LEN, 0);
        }
    }
}

async fn push_and_read(mut input: Input<'_>) {
    let (reader, writer) = pipe().unwrap();
    let (mut reader, mut writer) = (RelayReader::new(reader).unwrap(), RelayWriter::new(writer));
    let mut pushed: Vec<&[u8]> = Vec::new();
    while !input.is_over() && pushed.len() < 100 {
        let packet = input.bytes();
        writer.push(packet).unwrap();
        pushed.push(&packet[..packet.len().min(RECORD_LEN - 2)]);
    }
    writer.flush().unwrap();
    assert_eq!(writer.take_lost(), 0);
    if !pushed.is_empty() {
        let block = reader.read().await.unwrap().unwrap();
        assert!(records(block).eq(pushed));
    }
}
