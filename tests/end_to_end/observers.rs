//! What somebody does who sees knocks pass, and forges the address that packets come from.

use std::fs;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::process::Output;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use knockq::crypto::{Binding, KnockPorts};
use knockq::packet::Syn;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with};

use crate::lab::{FAMILIES, Family, Lab, echoes, eventually, succeeds};
use crate::recorded::persona;
use crate::{UntilDropped, flow, raw_socket, send_raw};

/// Sees all packets that come to or leave this host, from the IP header on.
fn sniffer() -> OwnedFd {
    let all = Protocol::from_raw(NonZeroU32::new(u32::from(3_u16.to_be())).unwrap()); // ETH_P_ALL
    let socket = socket_with(AddressFamily::PACKET, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(all)).unwrap();
    set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_millis(50))).unwrap();
    socket
}

/// An address that is nobody's.
pub fn forged(family: Family) -> IpAddr {
    family.pick("10.77.2.77", "fd77:2::77")
}

/// Sends a copy of each knock of alice's from a forged address, until it is over; counts them.
fn copy_each_knock(sniffer: &OwnedFd, sockets: &[(Family, OwnedFd)], is_over: &AtomicBool, copies: &AtomicUsize) {
    let mut bytes = [0; 2048];
    while !is_over.load(Ordering::Relaxed) {
        let Ok((_, length)) = recv(sniffer, &mut bytes, RecvFlags::empty()) else { continue };
        let Ok(syn) = Syn::parse(&bytes[..length]) else { continue };
        for (family, socket) in sockets {
            if syn.source == family.alice() && (20_000..=21_023).contains(&syn.destination_port) {
                let flow = flow(forged(*family), family.server(), syn.destination_port);
                let copy = persona(*family == Family::V4).syn(&flow, syn.sequence, syn.tsval.unwrap()).unwrap();
                send_raw(socket, *family, &copy);
                copies.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

#[test]
fn an_observer_who_copies_each_unbound_knock_keeps_alice_out_and_all_who_look_are_told() {
    let lab = Lab::network();
    lab.configure("[services.ssh]\nports = [\"tcp/2222\"]\nopen_for = \"1h\"\n"); // nobody listens there
    lab.add_user("alice", &["ssh"]);
    let daemon = lab.start();
    let sniffer = lab.server.enter(sniffer);
    let sockets: Vec<_> =
        FAMILIES.into_iter().map(|family| (family, lab.mallory.enter(|| raw_socket(family)))).collect();
    let (is_over, copies) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let _until_dropped = UntilDropped(&is_over);
        scope.spawn(|| copy_each_knock(&sniffer, &sockets, &is_over, &copies));
        for family in FAMILIES {
            // On a slow machine a copy may come so late that the door is open for a moment, and nobody listens there.
            let is_told = |ran: &Output| {
                let errors = String::from_utf8_lossy(&ran.stderr).into_owned();
                let is_shut = errors.contains("still shut") && errors.contains("copies each knock");
                !ran.status.success() && is_shut && errors.contains("--source ADDRESS")
            };
            let flags = [family.flag(), "--source", "none"];
            for command in [&["connect", "server", "ssh", "--timeout", "4s"][..], &["send", "server", "--wait"]] {
                eventually("the remedy", || is_told(&lab.knockq(&lab.alice, &[command, &flags[..]].concat())));
            }
            eventually("no door", || lab.door(family.alice(), 2222).is_none());
            assert_eq!(lab.door(forged(family), 2222), None);
        }
        let withdrawn = |family: Family| {
            let line = format!(
                "withdrawn reason=spent_twice user=alice service=ssh source={} elsewhere={} hint=",
                family.alice(),
                forged(family)
            );
            daemon.log().lines().filter(|text| text.contains(&line) && text.contains("--source")).count()
        };
        let seen = copies.load(Ordering::Relaxed);
        assert!(seen >= 2 * FAMILIES.len(), "{seen} knocks");
        eventually("a line for each", || FAMILIES.into_iter().map(withdrawn).sum::<usize>() == seen);
        let explained = lab.control(&["explain", "--config", lab.config().to_str().unwrap()]);
        assert!(explained.contains("one packet with a forged address is enough"), "{explained}");
        for family in FAMILIES {
            lab.knock(family, &["--source", &family.alice().to_string()]);
            lab.wait_for_door(family.alice(), 2222);
        }
        thread::sleep(Duration::from_millis(300));
    });
    FAMILIES.iter().for_each(|family| drop(lab.wait_for_door(family.alice(), 2222)));
    daemon.stop();
}

#[test]
fn a_copy_of_the_first_knock_takes_nothing_from_what_the_second_opened() {
    let lab = Lab::with("open_for = \"1h\"\non_close = \"kill\"");
    let daemon = lab.start();
    for family in FAMILIES {
        let copy = |packet: &str| {
            let before = daemon.log().matches("withdrawn").count();
            lab.mallory.oracle_says(&["replay", packet, "--from", &forged(family).to_string()]);
            eventually("the withdrawal", || daemon.log().matches("withdrawn").count() > before);
            thread::sleep(Duration::from_millis(300));
        };
        let knocks = [(); 3].map(|()| lab.print_knock(family, &["--source", "none"]));
        let granted =
            || daemon.log().matches(&format!("granted user=alice service=ssh source={}", family.alice())).count();
        for (count, knock) in (1..).zip(&knocks) {
            lab.alice.oracle_says(&["replay", knock]);
            eventually("the grant", || granted() == count);
        }
        let mut connection = lab.alice.gets_in(family.server(), 22);
        assert!(echoes(&mut connection));
        for knock in [&knocks[0], &knocks[2]] {
            copy(knock);
            assert!(lab.door(family.alice(), 22).is_some(), "the second holds it open");
            assert!(echoes(&mut connection), "which rests on the second");
        }
        copy(&knocks[1]);
        eventually("closing", || lab.door(family.alice(), 22).is_none());
    }
    daemon.stop();
}

/// The link-local address of an interface, and the interface's number.
fn link_local(host: &crate::lab::Host, interface: &str) -> (Ipv6Addr, u32) {
    let address = host.sh(&format!("ip -6 -o addr show dev {interface} scope link"));
    let address = address.split_whitespace().find(|word| word.starts_with("fe80")).unwrap();
    let index = host.sh(&format!("ip -o link show {interface} | cut -d: -f1"));
    (address.split('/').next().unwrap().parse().unwrap(), index.trim().parse().unwrap())
}

#[test]
fn a_door_for_a_link_local_address_is_refused_by_name_on_both_sides() {
    let lab = Lab::new();
    let daemon = lab.start();
    let ((source, index), (server, _)) = (link_local(&lab.alice, "eth0"), link_local(&lab.server, "eth1"));

    let profile = fs::read_to_string(lab.directory.path.join("alice.profile")).unwrap();
    let lines = profile.lines().map(|line| {
        if line.starts_with("address") { format!("address = [\"{server}%{index}\"]") } else { line.to_owned() }
    });
    let path = lab.directory.path.join("near.profile");
    fs::write(&path, lines.collect::<Vec<_>>().join("\n")).unwrap();
    succeeds(&lab.knockq(&lab.alice, &["host", "add", "near", path.to_str().unwrap(), "--same-server"]));
    let counters = lab.home("alice").join(".local/state/knockq/counters");
    for command in [&["send", "near"][..], &["connect", "near", "22"]] {
        let ran = lab.knockq(&lab.alice, command);
        let errors = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert!(!ran.status.success() && errors.contains(&format!("{server}: is link-local")), "{errors}");
        assert!(errors.contains("Hint: name another address of the server"), "{errors}");
    }
    assert!(!counters.exists(), "no counter is used up");

    let key = lab.alice_key();
    let n = lab.next_counter();
    let token = key.seal(n, 22, Binding::Unbound);
    let knock_port = key.pad(n).knock_port(&KnockPorts::new([20_000..=21_023]).unwrap());
    let syn = |source: IpAddr, server: IpAddr| {
        persona(false).syn(&flow(source, server, knock_port), token.sequence, token.tsval).unwrap()
    };
    let packet = syn(source.into(), server.into());
    let to = SocketAddr::V6(SocketAddrV6::new(server, 0, 0, index));
    lab.alice.enter(|| sendto(raw_socket(Family::V6), &packet, SendFlags::empty(), &to).unwrap());
    let said = format!("refused reason=link_local user=alice source={source} hint=");
    eventually("the refusal", || daemon.log().contains(&said));
    let (copy, family) = (syn(Family::V6.alice(), Family::V6.server()), Family::V6);
    lab.alice.enter(|| send_raw(&raw_socket(family), family, &copy));
    eventually("that it is spent", || {
        daemon.log().contains(&format!("refused reason=replayed user=alice source={}", family.alice()))
    });
    lab.stays_shut(family);
    let explained = lab.control(&["explain", "--config", lab.config().to_str().unwrap()]);
    assert!(
        explained.contains("from an IPv6 link-local address, a door for which would hold on every link"),
        "{explained}"
    );
    daemon.stop();
}
