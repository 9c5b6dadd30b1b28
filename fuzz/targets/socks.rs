//! What a program says to the proxy before it is connected.
#![no_main]

use std::net::IpAddr;

use knockq::client::socks::{Login, SocksError, Target, accept};
use knockq::service::HostAddress;
use knockq_fuzz::Scratch;
use libfuzzer_sys::fuzz_target;
use tokio::io::join;
use tokio::runtime::{Builder, Runtime};

thread_local! {
    static RUNTIME: Runtime = Builder::new_current_thread().build().unwrap();
    static LOGIN: Login = Login::read(&Scratch::new("socks").write("auth", "alice:secret\n")).unwrap();
}

fuzz_target!(|bytes: &[u8]| {
    check(bytes, None);
    LOGIN.with(|login| check(bytes, Some(login)));
});

fn check(bytes: &[u8], login: Option<&Login>) {
    let (mut unread, mut answer) = (bytes, Vec::new());
    let accepted = RUNTIME.with(|runtime| runtime.block_on(accept(&mut join(&mut unread, &mut answer), login)));
    let read = &bytes[..bytes.len() - unread.len()];
    let way_in: &[u8] = if login.is_some() { &[5, 2, 1, 0] } else { &[5, 0] };
    match accepted {
        Ok(target) => {
            assert_eq!(answer, way_in);
            assert!(login.is_none() || holds(read, b"\x01\x05alice\x06secret"));
            check_target(read, &target);
        }
        Err(SocksError::Command | SocksError::AddressType | SocksError::Name) => {
            let reply = answer.strip_prefix(way_in).unwrap();
            assert!(matches!(reply, [5, 4 | 7 | 8, 0, 1, 0, 0, 0, 0, 0, 0]), "{reply:?}");
        }
        Err(SocksError::Login) => assert_eq!(answer, [5, 2, 1, 1]),
        Err(SocksError::NoMethod) => assert_eq!(answer, [5, 0xff]),
        Err(SocksError::Io(_) | SocksError::Version) => {
            assert!(answer.len() <= 14 && !holds(&answer, &[5, 0, 0]), "{answer:?}");
        }
    }
}

/// It is what was read last, and can be resolved and printed.
fn check_target(read: &[u8], Target { host, port }: &Target) {
    let address = read.strip_suffix(&port.to_be_bytes()).unwrap();
    let is_last = match host.as_str().parse() {
        Ok(IpAddr::V4(v4)) => address.ends_with(&v4.octets()),
        Ok(IpAddr::V6(v6)) => address.ends_with(&v6.octets()),
        Err(_) => false,
    };
    assert!(is_last || address.ends_with(host.as_str().as_bytes()));
    assert_eq!(host.as_str().parse::<HostAddress>().unwrap(), *host);
}

fn holds(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}
