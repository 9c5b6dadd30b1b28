//! Words of files and command lines: what is understood is printed as it would be understood again, and what is refused
//! is named in a way that a terminal can bear.
#![no_main]

use std::fmt::{Debug, Display};
use std::str::FromStr;

use knockq::config::{Network, Seconds};
use knockq::crypto::{KnockPorts, PresharedKey, PrivateKey, PublicKey};
use knockq::service::{HostAddress, Name, Port};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    check::<Name>(text);
    check::<HostAddress>(text);
    check::<Port>(text);
    check::<Network>(text);
    check::<Seconds>(text);
    check::<PublicKey>(text);
    check_knock_ports(text);
    if let Ok(key) = text.parse::<PrivateKey>() {
        assert_eq!(key.to_file_line().parse::<PrivateKey>().unwrap().public(), key.public());
    }
    let _ = text.parse::<PresharedKey>().map_err(|error| check_refusal(&error));
});

fn check<T: FromStr<Err: Display> + Display + PartialEq + Debug>(text: &str) {
    match text.parse::<T>() {
        Ok(value) => {
            let printed = value.to_string();
            assert!(
                printed.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"' && byte != b'\\'),
                "{printed:?}"
            );
            assert_eq!(printed.parse::<T>().ok(), Some(value));
        }
        Err(error) => check_refusal(&error),
    }
}

fn check_knock_ports(text: &str) {
    match KnockPorts::try_from(text.split(',').map(str::to_owned).collect::<Vec<_>>()) {
        Ok(ports) => {
            let list: Vec<u16> = ports.iter().collect();
            assert!(list.is_sorted_by(|a, b| a < b) && list[0] > 0 && list.len() <= KnockPorts::MAX_LEN);
            assert!(ports.contains(ports.pick(u32::MAX)));
            assert_eq!(KnockPorts::try_from(Vec::from(ports.clone())).unwrap(), ports);
        }
        Err(error) => check_refusal(&error),
    }
}

fn check_refusal(error: &dyn Display) {
    let said = error.to_string();
    assert!(!said.contains(char::is_control), "{said:?}");
}
