//! What is on the wire, and what passes the gate.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use knockq::crypto::{Binding, KnockPorts};
use knockq::packet::Flow;

use crate::lab::{self, Capture, FAMILIES, Family, Lab, eventually, hex, refused};
use crate::recorded::persona;
use crate::{UntilDropped, raw_socket, send_raw, source, tcp_offset, unix_now};

/// Without the SYNs that the kernel sends again after a second, where a test is held up for as long.
fn once(mut packets: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    packets.dedup_by_key(|packet| packet[tcp_offset(packet)..][..8].to_vec()); // ports and sequence number
    packets
}

#[test]
fn one_knock_is_one_packet_and_nothing_answers_it_nor_any_other_syn_there() {
    let lab = Lab::new();
    let _daemon = lab.start();
    for family in FAMILIES {
        let capture = Capture::start(&lab.alice, "eth0", lab::is_tcp);
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
        let packets = capture.packets();
        assert_eq!(packets.len(), 1, "{packets:02x?}");

        // a SYN without a knock, to a knock port: the same silence
        let capture = Capture::start(&lab.alice, "eth0", lab::is_tcp);
        assert!(!lab.alice.reaches(family.server(), 20_000));
        let packets = once(capture.packets());
        let from_alice = packets.iter().filter(|packet| source(packet) == family.alice()).count();
        assert_eq!((from_alice, packets.len()), (1, 1), "{packets:02x?}");
    }
}

#[test]
fn a_knock_is_all_that_leaves_and_a_reset_is_met_with_silence() {
    let lab = Lab::new();
    for family in FAMILIES {
        // Everything but the search for neighbours, and that for multicast groups behind its hop-by-hop header.
        let everything = |packet: &[u8]| packet[0] >> 4 == 4 || !matches!(packet[6], 0 | 58);
        let sides = [(&lab.alice, "eth0"), (&lab.server, "eth1"), (&lab.server, "eth2")];
        let captures = sides.map(|(host, interface)| Capture::start(host, interface, everything));
        lab.knock(family, &[]);
        thread::sleep(Duration::from_millis(1500)); // a SYN would be sent again after one second
        let [left, arrived, elsewhere] = captures.map(Capture::packets);
        // No daemon runs: the port is closed, and the server's kernel says so.
        let [knock, reset] = left.as_slice() else { panic!("{left:02x?}") };
        assert_eq!((source(knock), source(reset)), (family.alice(), family.server()));
        assert_eq!(reset[tcp_offset(reset) + 13], 0x14, "RST and ACK");
        assert_eq!((arrived, elsewhere), (left, vec![]));
    }
}

#[test]
fn the_syn_of_a_knock_is_the_kernels_own_but_for_what_is_random() {
    let lab = Lab::new();
    let _daemon = lab.start();
    for family in FAMILIES {
        let capture = Capture::start(&lab.alice, "eth0", lab::is_tcp);
        lab.knock(family, &[]);
        assert!(!lab.alice.reaches(family.server(), 20_000));
        let packets = once(capture.packets());
        let [knock, genuine] = packets.as_slice() else { panic!("{packets:02x?}") };
        assert_eq!(constant_part(knock), constant_part(genuine));
        let port = |packet: &[u8]| packet[tcp_offset(packet) + 1] & 1;
        assert_eq!(port(knock), port(genuine), "parity of the source port");
        for packet in [knock, genuine] {
            let checked = lab.alice.sh(&format!(
                "printf %s {} > /tmp/{1}.hex; python3 - /tmp/{1}.hex <<'END'\n{CHECKSUM}\nEND\nrm /tmp/{1}.hex",
                hex(packet),
                lab.alice.name
            ));
            // The kernel leaves its own to the (virtual) card; the knock carries its own.
            assert!(packet == genuine || checked.trim() == "0", "checksum is off by {checked}");
        }
    }
}

/// Folds pseudo-header and segment: 0 when the checksum is right (RFC 9293 section 3.1).
const CHECKSUM: &str = "\
import sys
p = bytes.fromhex(open(sys.argv[1]).read())
v4 = p[0] >> 4 == 4
addresses, tcp = (p[12:20], p[20:]) if v4 else (p[8:40], p[40:])
b = addresses + len(tcp).to_bytes(4, 'big') + bytes([0, 0, 0, 6]) + tcp
s = sum(int.from_bytes(b[i:i + 2], 'big') for i in range(0, len(b), 2))
while s >> 16: s = (s & 0xffff) + (s >> 16)
print(s ^ 0xffff)";

#[test]
fn everything_else_passes_untouched() {
    let lab = Lab::new();
    lab.alice.serve(8080);
    lab.mallory.serve(22);
    lab.mallory.serve(20_000);
    lab.server.forward();
    let _daemon = lab.start();
    for family in FAMILIES {
        let server = family.server();
        assert!(lab.alice.reaches(server, 80), "a port that is not guarded");
        assert!(refused(&lab.alice, server, 81), "a closed port answers as before");
        assert!(lab.server.reaches(family.alice(), 8080), "the server's own connections");
        let from_knock_port = lab.server.sh(&format!(
            "python3 - <<'END'\nimport socket\ns = socket.socket(socket.{})\ns.bind(('{server}', 20001))\n\
             s.settimeout(20)\ns.connect(('{}', 8080))\nprint(s.recv(7).decode())\nEND",
            if family == Family::V4 { "AF_INET" } else { "AF_INET6" },
            family.alice()
        ));
        assert_eq!(from_knock_port.trim(), "welcome", "its own connection from a knock port");
        assert!(lab.alice.reaches(family.mallory(), 22), "forwarded to a guarded port's number");
        assert!(lab.alice.reaches(family.mallory(), 20_000), "forwarded to a knock port's number");
        assert!(lab.server.reaches(family.pick("127.0.0.1", "::1"), 22), "loopback");
        assert!(lab.server.reaches(server, 22), "the server to itself");
    }
}

#[test]
fn a_guarded_udp_port_is_shut_to_broadcasts_and_multicasts_too() {
    let lab = Lab::network();
    lab.configure("[services.vpn]\nports = [\"udp/5000\"]\nopen_for = \"1h\"\n");
    lab.add_user("alice", &["vpn"]);
    let receiver = lab.server.enter(|| std::net::UdpSocket::bind(("::", 5000)).unwrap());
    receiver.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let arrives = |target: &str| {
        lab.alice.enter(|| {
            let target: SocketAddr = target.parse().unwrap();
            let any: SocketAddr = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().unwrap();
            let sender = std::net::UdpSocket::bind(any).unwrap();
            sender.set_broadcast(true).unwrap();
            sender.send_to(b"x", target).unwrap();
        });
        receiver.recv(&mut [0; 8]).is_ok()
    };
    let link_local = lab.server.sh("ip -6 -o addr show dev eth1 scope link");
    let link_local = link_local.split_whitespace().find(|word| word.starts_with("fe80")).unwrap();
    let index = lab.alice.sh("cat /sys/class/net/eth0/ifindex 2>/dev/null || ip -o link show eth0 | cut -d: -f1");
    let link_local = format!("[{}%{}]:5000", link_local.split('/').next().unwrap(), index.trim());
    let multicast = format!("[ff02::1%{}]:5000", index.trim());
    let targets =
        ["10.77.1.1:5000", "[fd77:1::1]:5000", "10.77.1.255:5000", "255.255.255.255:5000", &multicast, &link_local];
    let without: Vec<&str> = targets.into_iter().filter(|target| arrives(target)).collect();
    assert_eq!(without, targets, "without the gate all arrive");
    let _daemon = lab.start();
    let with: Vec<&str> = targets.into_iter().filter(|target| arrives(target)).collect();
    assert_eq!(with, Vec::<&str>::new(), "with it none does");
    for family in FAMILIES {
        lab.knock(family, &["vpn"]);
    }
    eventually("the doors", || arrives("10.77.1.1:5000") && arrives("[fd77:1::1]:5000"));
}

#[test]
fn knocks_under_a_flood_of_syns_are_all_honoured() {
    let lab = Lab::with("open_for = \"1h\"");
    lab.set("window = \"10m\"");
    let daemon = lab.start();
    let ports = KnockPorts::new([20_000..=21_023]).unwrap();
    let key = lab.alice_key();
    let first = unix_now() - 50;
    for (round, family) in (0..).zip(FAMILIES) {
        let persona = persona(family == Family::V4);
        let syn = |source: IpAddr, destination_port, sequence, tsval| {
            let flow = Flow { source, source_port: 40_000, destination: family.server(), destination_port };
            persona.syn(&flow, sequence, tsval).unwrap()
        };
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            let until_dropped = UntilDropped(&is_over);
            // bounded: 20,000 SYNs of a stranger at most
            scope.spawn(|| {
                lab.mallory.enter(|| {
                    let socket = raw_socket(family);
                    for number in (0..20_000_u32).take_while(|_| !is_over.load(Ordering::Relaxed)) {
                        let port = 20_000 + u16::try_from(number % 1024).unwrap();
                        let packet = syn(family.mallory(), port, number.wrapping_mul(2_654_435_761), number);
                        send_raw(&socket, family, &packet);
                    }
                });
            });
            lab.alice.enter(|| {
                let socket = raw_socket(family);
                for n in (first + round * 50..).take(50) {
                    let token = key.seal(n, 22, Binding::Unbound);
                    let port = key.pad(n).knock_port(&ports);
                    send_raw(&socket, family, &syn(family.alice(), port, token.sequence, token.tsval));
                    thread::sleep(Duration::from_millis(10));
                }
            });
            let grants = || daemon.log().matches(&format!("source={} ", family.alice())).count();
            eventually("fifty grants", || grants() == 50);
            drop(until_dropped);
        });
    }
    assert_eq!(daemon.log().matches("granted").count(), 100);
}

/// The packet with zeros for what every connection draws anew: ID or flow label, ports, sequence number, TSval, and the
/// checksums that follow from them.
fn constant_part(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let tcp = tcp_offset(&packet);
    let random: &[(usize, usize)] = if tcp == 20 { &[(4, 6), (10, 12)] } else { &[(1, 4)] };
    let tcp_random = [(0, 2), (2, 4), (4, 8), (16, 18), (28, 32)].map(|(from, to)| (tcp + from, tcp + to));
    for (from, to) in random.iter().copied().chain(tcp_random) {
        packet[from..to].fill(0);
    }
    packet
}

/// The tests above would pass on a server that nobody can reach at all: this one shows that the hosts can talk.
#[test]
fn without_the_daemon_the_same_ports_are_open() {
    let lab = Lab::new();
    for family in FAMILIES {
        for port in [22, 25, 80] {
            assert!(lab.alice.reaches(family.server(), port) && lab.mallory.reaches(family.server(), port));
        }
        assert!(refused(&lab.alice, family.server(), 20_000));
    }
    drop(lab.alice.enter(|| TcpListener::bind("127.0.0.1:0")).unwrap());
}
