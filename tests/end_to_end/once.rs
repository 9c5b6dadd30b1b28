//! Doors for one connection.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use knockq::crypto::{Binding, KnockPorts};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::lab::{FAMILIES, Family, Host, Lab, echoes, eventually};
use crate::recorded::persona;
use crate::{flow, raw_socket, send_raw, unix_now};

/// A hundred knocks, and two connections at the same moment for each.
#[test]
fn exactly_one_of_two_simultaneous_connections_gets_in() {
    const RACES: u64 = 50;
    let lab = Lab::with("open_for = \"1h\"\nonce = true");
    lab.set("window = \"10m\""); // a slow machine takes longer than a second for each
    let daemon = lab.start();
    let ports = KnockPorts::new([20_000..=21_023]).unwrap();
    let key = lab.alice_key();
    let first = unix_now() - RACES;
    for (round, family) in (0..).zip(FAMILIES) {
        let persona = persona(family == Family::V4);
        for n in (first + round * RACES..).take(50) {
            let token = key.seal(n, 22, Binding::Unbound);
            let flow = flow(family.alice(), family.server(), key.pad(n).knock_port(&ports));
            let packet = persona.syn(&flow, token.sequence, token.tsval).unwrap();
            let granted = daemon.log().matches("granted").count();
            lab.alice.enter(|| send_raw(&raw_socket(family), family, &packet));
            eventually("the grant", || daemon.log().matches("granted").count() > granted);
            let start = Barrier::new(2);
            let connect = || lab.alice.enter(|| begin(family, &start));
            let both =
                thread::scope(|scope| [scope.spawn(connect), scope.spawn(connect)].map(|one| one.join().unwrap()));
            let inside = || both.iter().filter(|connection| connection.peer_addr().is_ok()).count();
            eventually("a connection", || inside() > 0);
            thread::sleep(Duration::from_millis(400));
            assert_eq!(inside(), 1, "{family:?}, knock {n}");
            // A child that another test is just starting has copies: closed, the SYN would come again, and take the next door.
            both.iter().for_each(|connection| connection.shutdown(Shutdown::Both).unwrap());
        }
    }
}

/// A connection whose SYN leaves when `start` says.
fn begin(family: Family, start: &Barrier) -> TcpStream {
    let domain = if family == Family::V4 { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(domain, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None).unwrap();
    start.wait();
    assert_eq!(rustix::net::connect(&socket, &SocketAddr::new(family.server(), 22)), Err(Errno::INPROGRESS));
    socket.into()
}

/// One connection whose first answer is lost: the SYN that comes again belongs to it.
fn survives_the_loss_of_a_syn_ack(lose: fn(&Lab) -> &Host, hook: &str) {
    let lab = Lab::with("open_for = \"1h\"\nonce = true");
    let _daemon = lab.start();
    let loser = lose(&lab);
    lab.server.sysctl("net/ipv4/tcp_synack_retries", "0"); // else the answer comes again, and no SYN has to
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
        loser.sh(&format!(
            "nft 'add table inet loss; add chain inet loss c {{ type filter hook {hook} priority raw; }}; \
             add rule inet loss c tcp sport 22 tcp flags & (syn | ack) == (syn | ack) drop'"
        ));
        let connection = thread::scope(|scope| {
            let connecting = scope.spawn(|| {
                lab.alice.enter(|| {
                    TcpStream::connect_timeout(&SocketAddr::new(family.server(), 22), Duration::from_secs(20))
                })
            });
            eventually("the first SYN", || lab.door(family.alice(), 22).is_none());
            loser.sh("nft delete table inet loss");
            connecting.join().unwrap()
        });
        connection.expect("the SYN that came again was let in");
        assert!(!lab.alice.reaches(family.server(), 22), "{family:?}: and no second connection");
    }
}

#[test]
fn a_syn_that_comes_again_before_any_answer_spends_nothing_more() {
    // Before connection tracking sees it, so that for the server nothing was ever answered.
    survives_the_loss_of_a_syn_ack(|lab| &lab.server, "output");
}

#[test]
fn a_syn_ack_that_is_lost_on_the_way_spends_nothing_more() {
    survives_the_loss_of_a_syn_ack(|lab| &lab.alice, "prerouting");
}

#[test]
fn a_once_service_lets_one_connection_in() {
    let lab = Lab::with("open_for = \"1h\"\nonce = true");
    let _daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
        let mut connection = lab.alice.connect(family.server(), 22).expect("the one connection");
        assert_eq!(lab.door(family.alice(), 22), None);
        assert!(!lab.alice.reaches(family.server(), 22), "and no second one");
        assert!(echoes(&mut connection));
    }
}

/// As a forged segment, or one of a connection that is over, would be.
#[test]
fn a_segment_that_begins_no_connection_spends_no_door() {
    let lab = Lab::with("open_for = \"1h\"\nonce = true");
    let _daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
        let mut segment = persona(family == Family::V4).syn(&flow(family.alice(), family.server(), 22), 1, 1).unwrap();
        let flags = if family == Family::V4 { 20 } else { 40 } + 13;
        segment[flags] = 0x04; // RST; its checksum is wrong now, which no rule looks at
        lab.alice.enter(|| send_raw(&raw_socket(family), family, &segment));
        thread::sleep(Duration::from_millis(500));
        assert!(lab.door(family.alice(), 22).is_some());
        lab.alice.gets_in(family.server(), 22);
    }
}
