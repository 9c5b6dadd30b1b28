//! Messages from the engine to the gate: one right form each, and whatever is asked, nothing opens that the limits lack.
#![no_main]

use std::time::{Duration, Instant};

use knockq::nft::{Door, Element};
use knockq::serve::admission::Admission;
use knockq::serve::commands::{BATCH, COMMAND_LEN, Command, CommandError, decode};
use knockq::serve::limits::Limits;
use libfuzzer_sys::fuzz_target;

const LIMITS: &str =
    "rate 60\nport tcp/22 30\nonce udp/51820 43200\nfrom 192.0.2.0/24\nfrom 2001:db8::/32\nset inet mine s\n";

fuzz_target!(|bytes: &[u8]| {
    let commands = match decode(bytes) {
        Ok(commands) => commands,
        Err(CommandError::Length(length)) => {
            assert!(
                length == bytes.len() && (length % COMMAND_LEN != 0 || !(1..=BATCH * COMMAND_LEN).contains(&length))
            );
            return;
        }
        Err(CommandError::Field(_)) => {
            assert_eq!(bytes.len() % COMMAND_LEN, 0);
            return;
        }
        Err(CommandError::Descriptors) => panic!("bytes alone carry none"),
    };
    assert_eq!(commands.iter().flat_map(Command::encode).collect::<Vec<u8>>(), bytes, "two forms of {commands:?}");
    let (limits, now) = (LIMITS.parse::<Limits>().unwrap(), Instant::now());
    let mut admission = Admission::new(limits, now);
    admission.enforce();
    for command in &commands {
        if let Ok(Some(time)) = admission.admits(command, now)
            && let Command::Put(Element::Opens(door) | Element::Lasts(door), ..) = command
        {
            assert!(is_configured(door, time), "{command:?}");
        }
    }
});

fn is_configured(Door { source, port, once }: &Door, time: Duration) -> bool {
    let is_near = source.to_string().starts_with("192.0.2.") || source.to_string().starts_with("2001:db8:");
    let most = match (port.to_string().as_str(), once) {
        ("tcp/22", false) => 30,
        ("udp/51820", true) => 43_200,
        _ => return false,
    };
    is_near && time <= Duration::from_secs(most + 1) // put again for what was paid for, which the engine rounds
}
