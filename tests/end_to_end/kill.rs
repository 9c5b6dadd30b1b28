//! `on_close = "kill"`, as the table does it: each packet needs a door, in both directions.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use knockq::nft;
use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::conntrack::ConntrackMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily};
use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};

use crate::lab::{FAMILIES, Family, Host, Lab, PATIENCE, eventually, succeeds};
use crate::observers::forged;

/// A service whose side of each connection the test holds.
struct Service(TcpListener);

impl Service {
    fn start(host: &Host) -> Self {
        Self(host.enter(|| TcpListener::bind("[::]:7000").unwrap()))
    }

    /// Both ends of a new connection.
    fn connect(&self, client: &Host, family: Family) -> [TcpStream; 2] {
        let server = SocketAddr::new(family.server(), 7000);
        let client = client.enter(|| TcpStream::connect_timeout(&server, PATIENCE)).unwrap();
        [self.0.accept().unwrap().0, client]
    }
}

fn is_heard(mut speaking: &TcpStream, mut hearing: &TcpStream) -> bool {
    hearing.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let mut heard = [0; 5];
    speaking.write_all(b"hello").is_ok() && hearing.read_exact(&mut heard).is_ok()
}

fn goes_on([server, client]: &[TcpStream; 2]) -> bool {
    is_heard(server, client) && is_heard(client, server)
}

fn is_cut([server, client]: &[TcpStream; 2]) -> bool {
    !is_heard(server, client) && !is_heard(client, server)
}

fn lab(services: &str) -> Lab {
    let lab = Lab::network();
    lab.configure(services);
    lab.add_user("alice", &["talk"]);
    lab
}

fn talk(open_for: &str, more: &str) -> String {
    format!("[services.talk]\nports = [\"tcp/7000\"]\nopen_for = \"{open_for}\"\non_close = \"kill\"\n{more}")
}

/// As `conntrack -F` does.
fn flush_conntrack(host: &Host) {
    let mut socket = host.enter(|| Socket::new(NETLINK_NETFILTER).unwrap());
    socket.bind_auto().unwrap();
    for family in [NetfilterProtoFamily::IPv4, NetfilterProtoFamily::IPv6] {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK;
        let flush = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), ConntrackMessage::Delete(Vec::new()));
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(flush));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        socket.send_to(&bytes, &netlink_sys::SocketAddr::new(0, 0), 0).unwrap();
        let (answer, _) = socket.recv_from_full().unwrap();
        assert!(nft::elements::read(&answer).unwrap().is_ok());
    }
}

#[test]
fn a_connection_ends_with_its_door_while_the_daemon_is_dead() {
    let lab = lab(&talk("30s", ""));
    let (service, mut daemon) = (Service::start(&lab.server), lab.start());
    let connections = FAMILIES.map(|family| {
        lab.knock(family, &["talk"]);
        lab.wait_for_door(family.alice(), 7000);
        service.connect(&lab.alice, family)
    });
    daemon.kill();
    assert!(connections.iter().all(goes_on), "the doors are open");
    for (family, ends) in FAMILIES.iter().zip(&connections) {
        eventually("closing", || lab.door(family.alice(), 7000).is_none());
        assert!(is_cut(ends), "{family:?}");
    }
}

#[test]
fn a_renewed_door_keeps_its_connection_and_one_that_conntrack_has_forgotten_goes_on_as_long_as_the_door() {
    let lab = lab(&talk("1h", ""));
    let (service, _daemon) = (Service::start(&lab.server), lab.start());
    for family in FAMILIES {
        lab.knock(family, &["talk"]);
        lab.wait_for_door(family.alice(), 7000);
        let ends = service.connect(&lab.alice, family);
        lab.knock(family, &["talk"]);
        assert!(goes_on(&ends));
        for first in [0, 1] {
            flush_conntrack(&lab.server);
            let [speaking, hearing] = [&ends[first], &ends[1 - first]];
            assert!(is_heard(speaking, hearing) && is_heard(hearing, speaking), "whoever speaks first");
        }
        lab.revoke(&["--user", "alice"]);
        assert!(is_cut(&ends));
        flush_conntrack(&lab.server);
        assert!(is_cut(&ends), "and stays so");
    }
}

#[test]
fn the_one_connection_of_a_once_door_lasts_as_long_as_the_door_would_have() {
    let lab = lab(&talk("20s", "once = true\n"));
    let (service, _daemon) = (Service::start(&lab.server), lab.start());
    for family in FAMILIES {
        lab.knock(family, &["talk"]);
        lab.wait_for_door(family.alice(), 7000);
        let ends = service.connect(&lab.alice, family);
        assert!(goes_on(&ends) && !lab.alice.reaches(family.server(), 7000), "that one alone");
        eventually("closing", || lab.door(family.alice(), 7000).is_none());
        assert!(is_cut(&ends));
        lab.knock(family, &["talk"]);
        lab.wait_for_door(family.alice(), 7000);
        let ends = service.connect(&lab.alice, family);
        lab.revoke(&["--user", "alice"]);
        assert!(is_cut(&ends), "revoked");
    }
}

/// Who comes later, from behind the same address, takes no time from a connection that is there.
#[test]
fn the_connection_of_a_once_door_lasts_whoever_knocks_after_and_whatever_is_taken_back() {
    let lab = lab(&talk("1h", "once = true\n"));
    lab.add_user("bob", &["talk"]);
    lab.edit("users.d/bob.toml", "services", "open_for = \"10s\"\nservices");
    let (service, daemon) = (Service::start(&lab.server), lab.start());
    for family in FAMILIES {
        lab.knock(family, &["talk"]);
        lab.wait_for_door(family.alice(), 7000);
        let ends = service.connect(&lab.alice, family);
        let set = if family == Family::V4 { "once4" } else { "once6" };
        let begins = || lab.server.nft(&["list", "set", "inet", "knockq", set]).contains("expires");
        succeeds(&lab.knockq_as("bob", &lab.alice, &["send", "server", "talk", family.flag()]));
        eventually("bob's door", begins);
        eventually("its end", || !begins());
        assert!(goes_on(&ends), "{}", daemon.log());
        let knock = lab.print_knock(family, &["talk", "--source", "none"]);
        lab.alice.oracle_says(&["replay", &knock]);
        eventually("another knock of hers", begins);
        lab.mallory.oracle_says(&["replay", &knock, "--from", &forged(family).to_string()]);
        eventually("which a copy takes back", || !begins());
        assert!(goes_on(&ends), "{}", daemon.log());
        lab.revoke(&["--user", "alice"]);
        assert!(is_cut(&ends));
    }
}

#[test]
fn an_exchange_over_udp_ends_with_its_door_in_both_directions() {
    let lab = lab("[services.talk]\nports = [\"udp/7001\"]\nopen_for = \"1h\"\non_close = \"kill\"\n");
    let _daemon = lab.start();
    let socket = |host: &Host, port: u16| {
        let socket = host.enter(|| UdpSocket::bind(("::", port))).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        socket
    };
    let (server, client) = (socket(&lab.server, 7001), socket(&lab.alice, 7002));
    for family in FAMILIES {
        let says = |from: &UdpSocket, host, port, to: &UdpSocket| {
            from.send_to(b"hello", SocketAddr::new(host, port)).is_ok() && to.recv_from(&mut [0; 5]).is_ok()
        };
        let asks = || says(&client, family.server(), 7001, &server);
        let answers = || says(&server, family.alice(), 7002, &client);
        assert!(!asks() && !answers());
        lab.knock(family, &["talk"]);
        eventually("the door", || lab.control(&["grants"]).contains(&family.alice().to_string()));
        assert!(asks() && answers() && asks());
        lab.revoke(&["--user", "alice"]);
        assert!(!asks() && !answers());
    }
}

#[test]
fn a_port_that_another_service_ends_connections_at_opens_for_one_that_keeps_them() {
    let lab = lab("[services.talk]\nports = [\"tcp/7000\"]\nonce = true\nopen_for = \"1h\"\n\
                   [services.other]\nports = [\"tcp/7000\"]\nselector = 9\non_close = \"kill\"\n");
    let (service, _daemon) = (Service::start(&lab.server), lab.start());
    for family in FAMILIES {
        lab.knock(family, &["talk"]);
        lab.wait_for_door(family.alice(), 7000);
        assert!(goes_on(&service.connect(&lab.alice, family)));
    }
}

/// Conntrack knows nothing of connections that were there before it had any rule of its own.
#[test]
fn connections_from_before_the_first_gate_live_on_and_those_that_are_cut_are_named() {
    let lab = lab("[services.talk]\nports = [\"tcp/7000\"]\n");
    let service = Service::start(&lab.server);
    let connections = FAMILIES.map(|family| service.connect(&lab.alice, family));
    // Conntrack begins with a rule of others', and takes the service for the one who has begun what it says first.
    let early = FAMILIES.map(|family| service.connect(&lab.alice, family));
    lab.server
        .nft(&["table inet filter { chain input { type filter hook input priority 0; ct state invalid drop; }; }"]);
    assert!(early.iter().all(|[server, client]| is_heard(server, client)));
    let daemon = lab.start();
    for ends in connections.iter().chain(&early) {
        assert!(goes_on(ends) && goes_on(ends), "the service speaks first");
    }
    daemon.stop();
    lab.server.sh("nft delete table inet knockq");
    lab.edit("knockq.toml", "[services.talk]", "[services.talk]\non_close = \"kill\"");
    let config = lab.config().display().to_string();
    let checked = lab.knockq(&lab.server, &["check", "--config", &config]);
    let said = String::from_utf8_lossy(&checked.stderr).into_owned();
    succeeds(&checked);
    let mut daemon = lab.start();
    for (family, ends) in FAMILIES.iter().zip(&connections) {
        let alice = family.alice();
        let warning = format!("warning: {alice} is connected to tcp/7000 without a door, and would be cut");
        assert!(said.contains(&warning), "{said}");
        daemon.wait_for(&format!(
            "is connected without a door, and cut: on_close = \"kill\" source={alice} port=tcp/7000"
        ));
        assert!(is_cut(ends));
    }
}

#[test]
fn a_connection_to_a_published_port_of_a_container_ends_with_its_door() {
    let lab = lab(&talk("1h", ""));
    let container = lab.host("container");
    lab.server.uplink("docker0", &container, "172.17.0", "fd00:17:");
    lab.server.forward();
    lab.server.settle(3);
    lab.server.sh("nft 'table ip nat { chain pre { type nat hook prerouting priority dstnat; \
         fib daddr type local tcp dport 7000 dnat to 172.17.0.2:7000; }; }; \
         table ip6 nat { chain pre { type nat hook prerouting priority dstnat; \
         fib daddr type local tcp dport 7000 dnat to [fd00:17::2]:7000; }; }'");
    let (service, _daemon) = (Service::start(&container), lab.start());
    for family in FAMILIES {
        assert!(!lab.alice.reaches(family.server(), 7000));
        lab.knock(family, &["talk"]);
        lab.wait_for_door(family.alice(), 7000);
        let ends = service.connect(&lab.alice, family);
        assert!(goes_on(&ends));
        lab.revoke(&["--user", "alice"]);
        assert!(is_cut(&ends));
    }
}
