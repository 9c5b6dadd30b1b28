//! Frames from the verifier to the monitor: one right form each, and none is permitted that the configuration lacks.
#![no_main]

use std::collections::HashMap;
use std::sync::LazyLock;

use knockq::serve::frames::{FRAME_LEN, Frame, FrameError};
use knockq::serve::policy::{Allowance, Opening, Policy};
use knockq::serve::sandbox::Identity;
use knockq::service::{Answer, Name, Port};
use libfuzzer_sys::fuzz_target;

/// Every door that there is: for whom, for what, where, one connection only, for how many seconds at most.
const DOORS: [(&str, &str, &str, bool, u32); 5] = [
    ("alice", "ssh", "tcp/22", false, 30),
    ("alice", "vpn", "udp/51820", true, 43_200),
    ("alice", "vpn", "tcp/51820", true, 43_200),
    ("bob", "vpn", "udp/51820", true, 43_200),
    ("bob", "vpn", "tcp/51820", true, 43_200),
];

static POLICY: LazyLock<Policy> = LazyLock::new(|| {
    let mut services: HashMap<Name, Opening> = HashMap::new();
    let mut users: HashMap<Name, Allowance> = HashMap::new();
    for (user, service, port, once, seconds) in DOORS {
        let (user, service, port) = (user.parse().unwrap(), service.parse::<Name>().unwrap(), port.parse().unwrap());
        let opening = services.entry(service.clone()).or_insert_with(|| Opening {
            ports: Vec::new(),
            once,
            seconds,
            kill: false,
        });
        if !opening.ports.contains(&port) {
            opening.ports.push(port);
        }
        let may = &mut users.entry(user).or_default().services;
        if !may.contains(&service) {
            may.push(service);
        }
    }
    let identity = Identity { uid: 1, gid: 1 };
    Policy {
        identity,
        queue: 1,
        owns_table: true,
        answer: Answer::Drop,
        grants_per_minute: 600,
        services,
        users,
        log_closings: false,
        trusted: Vec::new(),
        old_count: false,
    }
});

fuzz_target!(|bytes: &[u8]| {
    let frame = match Frame::decode(bytes) {
        Ok(frame) => frame,
        Err(FrameError::Length(length)) => {
            assert!(length == bytes.len() && length != FRAME_LEN);
            return;
        }
        Err(FrameError::Field(_)) => {
            assert_eq!(bytes.len(), FRAME_LEN);
            return;
        }
        Err(FrameError::Descriptors) => panic!("bytes alone carry none"),
    };
    assert_eq!(frame.encode()[..], *bytes, "two forms of {frame:?}");
    assert_eq!(POLICY.permits(&frame), is_configured(&frame), "{frame:?}");
});

fn is_configured(frame: &Frame) -> bool {
    let is = |name: &Name, text: &str| name.as_str() == text;
    let at = |port: &Port, text: &str| port.to_string() == text;
    DOORS.iter().any(|(user, service, port, once, most)| match frame {
        Frame::Open { port: asked, once: alone, seconds, user: who, service: what, .. } => {
            let is_door = is(who, user) && is(what, service) && at(asked, port) && alone == once;
            is_door && *seconds >= 1 && seconds <= most
        }
        Frame::Close { port: asked, .. } => at(asked, port),
    })
}
