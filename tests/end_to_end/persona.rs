//! Is a knock the SYN that the kernel would send? Field by field, between the same two hosts.

use std::time::Instant;

use crate::lab::{self, Capture, FAMILIES, Family, Lab, hex, succeeds};
use crate::{source, tcp_offset};

/// A closed port: the server's kernel answers with RST, so a connection is one SYN as well.
const CLOSED: u16 = 20_000;

/// Samples by which parities are compared: ports drawn at random would pass one run in 256.
const SAMPLES: usize = 8;

#[test]
fn over_mtu_1500_a_knock_is_the_kernels_syn() {
    over_mtu(1500, ["64240", "64800"]);
}

#[test]
fn over_mtu_1420_a_knock_is_the_kernels_syn() {
    over_mtu(1420, ["64860", "65280"]);
}

#[test]
fn over_mtu_1280_a_knock_is_the_kernels_syn() {
    over_mtu(1280, ["64480", "64660"]);
}

#[test]
fn over_mtu_9000_a_knock_is_the_kernels_syn() {
    over_mtu(9000, ["62720", "62580"]);
}

/// The windows are those of a kernel whose `tcp_rmem` is that of Linux 4.18 and later.
fn over_mtu(mtu: u32, windows: [&str; 2]) {
    let lab = Lab::new();
    lab.alice.sysctl("net/ipv4/tcp_rmem", "4096 131072 6291456");
    lab.alice.ip(&format!("link set eth0 mtu {mtu}"));
    lab.server.ip(&format!("link set eth1 mtu {mtu}"));
    for ((family, headers), window) in FAMILIES.into_iter().zip([40, 60]).zip(windows) {
        let mss = (mtu - headers).to_string();
        a_knock_is_the_kernels_syn(&lab, family, &[("MSS", &mss), ("window", window)]);
    }
}

#[test]
fn with_tcp_sack_off_a_knock_is_the_kernels_syn() {
    with_setting("net/ipv4/tcp_sack", "0", &[("options' order", "MSS NOP NOP TS NOP WS")]);
}

#[test]
fn with_window_scaling_off_a_knock_is_the_kernels_syn() {
    with_setting("net/ipv4/tcp_window_scaling", "0", &[("options' order", "MSS SACK TS"), ("window scale", "none")]);
}

#[test]
fn with_tcp_ecn_on_a_knock_is_the_kernels_syn() {
    with_setting("net/ipv4/tcp_ecn", "1", &[("flags", "c2")]);
}

#[test]
fn with_a_small_tcp_rmem_a_knock_is_the_kernels_syn() {
    let lab = Lab::new();
    lab.alice.sysctl("net/ipv4/tcp_rmem", "4096 4096 65536");
    for (family, window) in FAMILIES.into_iter().zip(["1460", "1440"]) {
        a_knock_is_the_kernels_syn(&lab, family, &[("window", window)]);
    }
}

#[test]
fn with_a_large_tcp_rmem_a_knock_is_the_kernels_syn() {
    with_setting("net/ipv4/tcp_rmem", "4096 1000000 67108864", &[("window scale", "11")]);
}

fn with_setting(key: &str, value: &str, expected: &[(&str, &str)]) {
    let lab = Lab::new();
    lab.alice.sysctl(key, value);
    for family in FAMILIES {
        a_knock_is_the_kernels_syn(&lab, family, expected);
    }
}

#[test]
fn with_its_own_hop_limit_and_without_path_mtu_discovery_a_knock_is_the_kernels_syn() {
    let lab = Lab::new();
    lab.alice.sysctl("net/ipv4/ip_default_ttl", "77");
    lab.alice.sysctl("net/ipv4/ip_no_pmtu_disc", "1");
    lab.alice.sysctl("net/ipv6/conf/eth0/hop_limit", "78");
    a_knock_is_the_kernels_syn(&lab, Family::V4, &[("TTL", "77"), ("DF and fragment", "0000")]);
    a_knock_is_the_kernels_syn(&lab, Family::V6, &[("hop limit", "78")]);
}

#[test]
fn without_flow_labels_a_knock_has_none_either() {
    let lab = Lab::new();
    lab.alice.sysctl("net/ipv6/auto_flowlabels", "0");
    for packet in both(&lab, Family::V6) {
        assert_eq!(hex(&packet[..4]), "60000000");
    }
}

#[test]
fn over_a_route_with_attributes_a_knock_is_the_kernels_syn() {
    let lab = Lab::new();
    for (attributes, v4, v6) in [
        ("hoplimit 33", [("TTL", "33")].as_slice(), [("hop limit", "33")].as_slice()),
        ("mtu 1400", &[("MSS", "1360")], &[("MSS", "1340")]),
        ("mtu lock 1400", &[("MSS", "1360"), ("DF and fragment", "0000")], &[("MSS", "1340")]),
        ("advmss 1000", &[("MSS", "1000")], &[("MSS", "1000")]),
        ("window 20000", &[("window scale", "0")], &[("window scale", "0")]),
        ("initrwnd 7", &[("window", "10220")], &[("window", "10080")]),
        ("features ecn", &[("flags", "c2")], &[("flags", "c2")]),
        ("advmss 1200 initrwnd 3 window 9000 hoplimit 9", &[("window", "3600")], &[("window", "3600")]),
    ] {
        for (family, expected) in FAMILIES.into_iter().zip([v4, v6]) {
            println!("{attributes} {family:?}"); // shown if it fails
            lab.alice.ip(&format!("route replace {} dev eth0 {attributes}", family.server()));
            a_knock_is_the_kernels_syn(&lab, family, expected);
        }
    }
}

#[test]
fn source_ports_have_the_parity_of_the_kernels() {
    for (range, fast_open) in [("32768 60999", "1"), ("32769 60998", "1"), ("32768 60999", "0")] {
        let lab = Lab::new();
        lab.alice.sysctl("net/ipv4/ip_local_port_range", range);
        lab.alice.sysctl("net/ipv4/tcp_fastopen", fast_open);
        for family in FAMILIES {
            let capture = Capture::start(&lab.alice, "eth0", lab::is_tcp);
            for _ in 0..SAMPLES {
                lab.knock(family, &[]);
                assert!(!lab.alice.reaches(family.server(), CLOSED));
            }
            let syns = capture.packets().into_iter().filter(|packet| source(packet) == family.alice());
            let parities: Vec<u8> = syns.map(|packet| packet[tcp_offset(&packet) + 1] & 1).collect();
            let low = range.split(' ').next().unwrap().parse::<u32>().unwrap();
            assert_eq!(parities, vec![u8::try_from(low & 1).unwrap(); 2 * SAMPLES], "{range} {family:?}");
        }
    }
}

#[test]
fn with_timestamps_off_a_knock_is_refused_with_a_hint_and_nothing_leaves() {
    let lab = Lab::new();
    lab.alice.sysctl("net/ipv4/tcp_timestamps", "0");
    for family in FAMILIES {
        let said = is_refused(&lab, family, &[]);
        assert!(said.contains("TCP timestamps are switched off on this host"), "{said}");
        assert!(said.contains("Hint: sysctl net.ipv4.tcp_timestamps=1"), "{said}");
    }
}

#[test]
fn where_loopback_is_shut_a_knock_is_refused_with_a_hint_and_nothing_leaves() {
    let lab = Lab::new();
    lab.alice.nft(&["add table inet shut; add chain inet shut arriving { type filter hook input priority 0; }"]);
    lab.alice.nft(&["add rule inet shut arriving iif lo drop"]);
    for family in FAMILIES {
        let said = is_refused(&lab, family, &[]);
        assert!(said.contains("cannot see this kernel's own SYN over loopback: timed out"), "{said}");
        assert!(said.contains("Hint: this host must be able to connect to itself"), "{said}");
    }
}

#[test]
fn strict_refuses_where_all_timestamps_follow_one_clock() {
    let lab = Lab::new();
    lab.alice.sysctl("net/ipv4/tcp_timestamps", "2");
    for family in FAMILIES {
        assert!(the_wire_shows_one_clock(&lab, family));
        let said = is_refused(&lab, family, &["--strict"]);
        assert!(said.contains("timestamps"), "{said}");
        assert!(said.contains("Hint: "), "{said}");
        lab.knock(family, &[]);
    }
}

#[test]
fn strict_knocks_if_and_only_if_the_timestamps_on_the_wire_do_not_follow_one_clock() {
    let lab = Lab::new();
    for family in FAMILIES {
        let one_clock = the_wire_shows_one_clock(&lab, family);
        println!("{family:?}: one clock for all connections of a pair of hosts: {one_clock}"); // depends on the kernel
        if one_clock {
            is_refused(&lab, family, &["--strict"]);
        } else {
            lab.knock(family, &["--strict"]);
        }
    }
}

/// By the SYNs of two connections to one host: within the time between them, or anywhere?
fn the_wire_shows_one_clock(lab: &Lab, family: Family) -> bool {
    let capture = Capture::start(&lab.alice, "eth0", lab::is_tcp);
    let start = Instant::now();
    for port in [CLOSED, CLOSED + 1] {
        assert!(!lab.alice.reaches(family.server(), port));
    }
    let elapsed = start.elapsed().as_millis();
    let packets = capture.packets();
    let syns = packets.iter().filter(|packet| source(packet) == family.alice());
    let tsvals: Vec<u32> =
        syns.map(|syn| u32::from_be_bytes(syn[tcp_offset(syn) + 28..][..4].try_into().unwrap())).collect();
    let [first, second] = tsvals[..] else { panic!("{packets:02x?}") };
    u128::from(second.wrapping_sub(first)) <= elapsed + 1
}

/// What `send` says; it must fail, and no packet leaves.
fn is_refused(lab: &Lab, family: Family, more: &[&str]) -> String {
    let capture = Capture::start(&lab.alice, "eth0", lab::is_tcp);
    let output = lab.knockq(&lab.alice, &[&["send", "server", family.flag()], more].concat());
    assert_eq!(output.status.code(), Some(1));
    let packets = capture.packets();
    assert!(packets.is_empty(), "{packets:02x?}");
    String::from_utf8(output.stderr).unwrap()
}

/// A knock and the SYN of a connection, as they leave.
fn both(lab: &Lab, family: Family) -> [Vec<u8>; 2] {
    let capture = Capture::start(&lab.alice, "eth0", lab::is_tcp);
    succeeds(&lab.knockq(&lab.alice, &["send", "server", family.flag()]));
    assert!(!lab.alice.reaches(family.server(), CLOSED));
    let mut packets = capture.packets();
    packets.retain(|packet| source(packet) == family.alice());
    packets.try_into().unwrap_or_else(|packets| panic!("not one packet each: {packets:02x?}"))
}

/// Compares what is constant, each field by its name; some fields must have the value that the setting was made for.
fn a_knock_is_the_kernels_syn(lab: &Lab, family: Family, expected: &[(&str, &str)]) {
    let [knock, genuine] = both(lab, family).map(|packet| fields(&packet));
    let pairs = knock.iter().zip(&genuine).filter(|(knock, genuine)| knock != genuine);
    let differences: Vec<String> = pairs
        .map(|(knock, genuine)| format!("{}: {} of a knock, {} of the kernel", knock.0, knock.1, genuine.1))
        .collect();
    assert!(differences.is_empty() && knock.len() == genuine.len(), "{family:?}: {differences:#?}");
    for (field, value) in expected {
        let (_, found) = genuine.iter().find(|(name, _)| name == field).unwrap();
        assert_eq!(found, value, "{family:?}: the kernel's {field}");
    }
}

type Field = (&'static str, String);

/// What a kernel does not draw at random.
fn fields(packet: &[u8]) -> Vec<Field> {
    let tcp = &packet[tcp_offset(packet)..];
    let decimal = |bytes: &[u8]| u16::from_be_bytes(bytes.try_into().unwrap()).to_string();
    let mut fields = if packet[0] >> 4 == 4 {
        vec![
            ("version and header length", hex(&packet[..1])),
            ("TOS", hex(&packet[1..2])),
            ("total length", decimal(&packet[2..4])),
            ("DF and fragment", hex(&packet[6..8])),
            ("TTL", packet[8].to_string()),
            ("protocol", packet[9].to_string()),
        ]
    } else {
        vec![
            ("version", hex(&packet[..1])[..1].to_owned()),
            ("traffic class", hex(&packet[..2])[1..3].to_owned()),
            ("payload length", decimal(&packet[4..6])),
            ("next header", packet[6].to_string()),
            ("hop limit", packet[7].to_string()),
        ]
    };
    fields.extend([
        ("acknowledgement number", hex(&tcp[8..12])),
        ("data offset", (tcp[12] >> 4).to_string()),
        ("reserved bits", (tcp[12] & 15).to_string()),
        ("flags", hex(&tcp[13..14])),
        ("window", decimal(&tcp[14..16])),
        ("urgent pointer", hex(&tcp[18..20])),
        ("payload", hex(&tcp[usize::from(tcp[12] >> 4) * 4..])),
    ]);
    fields.extend(options(&tcp[20..usize::from(tcp[12] >> 4) * 4]));
    fields
}

/// The options' order, their bytes but for TSval, and what is in them.
fn options(mut rest: &[u8]) -> Vec<Field> {
    let (mut order, mut bytes) = (Vec::new(), String::new());
    let (mut mss, mut scale, mut echo) = (["none"; 3]).map(str::to_owned).into();
    while let Some(kind) = rest.first() {
        let length = if *kind < 2 { 1 } else { usize::from(rest[1]) };
        let (option, more) = rest.split_at(length);
        let (name, shown) = match kind {
            0 => ("END", hex(option)),
            1 => ("NOP", hex(option)),
            2 => ("MSS", hex(option)),
            3 => ("WS", hex(option)),
            4 => ("SACK", hex(option)),
            8 => ("TS", format!("{}________{}", hex(&option[..2]), hex(&option[6..]))),
            _ => ("another", hex(option)),
        };
        match kind {
            2 => mss = u16::from_be_bytes(option[2..].try_into().unwrap()).to_string(),
            3 => scale = option[2].to_string(),
            8 => echo = hex(&option[6..]),
            _ => {}
        }
        order.push(name);
        bytes.push_str(&shown);
        rest = more;
    }
    vec![
        ("options' order", order.join(" ")),
        ("options", bytes),
        ("MSS", mss),
        ("window scale", scale),
        ("TSecr", echo),
    ]
}
