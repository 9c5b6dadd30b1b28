//! answer = "reset": what a port scan of the host sees.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use crate::lab::{self, Capture, FAMILIES, Family, Host, Lab, eventually, hex, refused};
use crate::recorded::persona;
use crate::{flow, raw_socket, send_raw, source, tcp_offset};

const CLOSED: u16 = 4_444;

/// A stranger's SYN with DSCP bits set, whose sequence number tells its answer from others.
fn probe(host: &Host, family: Family, port: u16, sequence: u32) {
    let persona = persona(family == Family::V4);
    let mut packet = persona.syn(&flow(family.alice(), family.server(), port), sequence, 1).unwrap();
    match family {
        Family::V4 => packet[1] = 0x10,
        Family::V6 => packet[0] |= 0x01,
    }
    host.enter(|| send_raw(&raw_socket(family), family, &packet));
}

/// The answer to a SYN with this sequence number, with zeros where each answer differs: ports, acknowledgement, checksums,
/// and of the flow label all but whether there is one.
fn answer(packets: &[Vec<u8>], family: Family, sequence: u32) -> Option<Vec<u8>> {
    let acknowledges = |packet: &&Vec<u8>| {
        let tcp = tcp_offset(packet);
        source(packet) == family.server() && packet[tcp + 8..tcp + 12] == (sequence + 1).to_be_bytes()
    };
    let mut packet = packets.iter().find(acknowledges)?.clone();
    let tcp = tcp_offset(&packet);
    for (from, to) in [(0, 4), (8, 12), (16, 18)] {
        packet[tcp + from..tcp + to].fill(0);
    }
    match family {
        Family::V4 => packet[10..12].fill(0),
        Family::V6 => {
            let is_labelled = packet[1] & 0x0f != 0 || packet[2] != 0 || packet[3] != 0;
            packet[1] &= 0xf0;
            (packet[2], packet[3]) = (0, u8::from(is_labelled));
        }
    }
    Some(packet)
}

#[test]
fn every_syn_is_answered_like_one_to_a_closed_port_knock_or_not() {
    let lab = Lab::new();
    lab.set("answer = \"reset\"");
    let daemon = lab.start();
    for family in FAMILIES {
        let capture = Capture::start(&lab.alice, "eth0", lab::is_tcp);
        probe(&lab.alice, family, CLOSED, 1000);
        probe(&lab.alice, family, 20_007, 2000);
        probe(&lab.alice, family, 22, 3000);
        let knock = lab.print_knock(family, &[]);
        let knock: Vec<u8> =
            (0..knock.len()).step_by(2).map(|at| u8::from_str_radix(&knock[at..at + 2], 16).unwrap()).collect();
        let tcp = tcp_offset(&knock);
        let sequence = u32::from_be_bytes(knock[tcp + 4..tcp + 8].try_into().unwrap());
        lab.alice.enter(|| send_raw(&raw_socket(family), family, &knock));
        lab.wait_for_door(family.alice(), 22);
        let packets = capture.packets();

        let expected = answer(&packets, family, 1000).expect("an answer of the closed port");
        let at_knock_port = answer(&packets, family, 2000).expect("an answer of the knock port");
        assert_eq!(hex(&at_knock_port), hex(&expected), "{family:?}: a knock port without a knock");
        let mut to_knock = answer(&packets, family, sequence).expect("an answer to the knock");
        let mut plain = expected.clone();
        // The knock has no DSCP bits, and the kernel copies those of what it answers.
        for packet in [&mut to_knock, &mut plain] {
            match family {
                Family::V4 => packet[1] = 0,
                Family::V6 => packet[0] &= 0xf0,
            }
        }
        assert_eq!(hex(&to_knock), hex(&plain), "{family:?}: a knock");
        // nft's reset for the guarded port copies no DSCP and sets no flow label (docs/protocol.md section 5).
        let mut at_guarded_port = answer(&packets, family, 3000).expect("an answer of the guarded port");
        if family == Family::V6 {
            (at_guarded_port[3], plain[3]) = (0, 0);
        }
        assert_eq!(hex(&at_guarded_port), hex(&plain), "{family:?}: the guarded port");

        assert!(lab.alice.reaches(family.server(), 22), "the door is open");
        eventually("closing", || refused(&lab.alice, family.server(), 22));
        // A reset before the door opens is not the end; after two seconds it is.
        let wait = || lab.knockq(&lab.alice, &["send", "server", family.flag(), "--wait"]);
        eventually("a door in time", || wait().status.success());
        eventually("closing", || refused(&lab.alice, family.server(), 22));
        assert!(refused(&lab.mallory, family.server(), 20_000) && refused(&lab.mallory, family.server(), 22));
    }
    let waited = lab.knockq(&lab.alice, &["send", "server", "-4", "--source", "192.0.2.1", "--wait"]);
    let said = String::from_utf8_lossy(&waited.stderr).into_owned();
    assert!(
        waited.status.code() == Some(1) && said.contains("refused (os error 111)"),
        "a knock that is refused: {said}"
    );
    daemon.stop();
    for family in FAMILIES {
        assert!(
            !lab.alice.reaches(family.server(), 22) && !lab.alice.reaches(family.server(), 20_000),
            "dead, so shut"
        );
    }
}

#[test]
fn a_guarded_udp_port_is_answered_like_a_closed_one() {
    let lab = Lab::network();
    lab.configure("[services.vpn]\nports = [\"udp/5000\"]\nopen_for = \"1h\"\n");
    lab.set("answer = \"reset\"");
    lab.add_user("alice", &["vpn"]);
    let _daemon = lab.start();
    let listener = lab.server.enter(|| UdpSocket::bind("[::]:5000").unwrap());
    listener.set_nonblocking(true).unwrap();
    let mut buffer = [0; 16];
    for family in FAMILIES {
        let socket = lab.alice.enter(|| UdpSocket::bind((family.pick("0.0.0.0", "::"), 0)).unwrap());
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket.connect(SocketAddr::new(family.server(), 5000)).unwrap();
        socket.send(b"hello").unwrap();
        let answered = socket.recv(&mut buffer).unwrap_err();
        assert_eq!(answered.kind(), std::io::ErrorKind::ConnectionRefused, "{family:?}: port unreachable");
        assert!(listener.recv(&mut buffer).is_err(), "the service has not seen it");
        lab.knock(family, &[]);
        eventually("the door", || socket.send(b"hello").is_ok() && listener.recv(&mut buffer).is_ok());
    }
}
