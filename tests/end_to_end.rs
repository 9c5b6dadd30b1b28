//! On a real kernel: real daemons, real clients, real packets, over IPv4 and IPv6.

#[path = "support/lab.rs"]
mod lab;

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use knockq::crypto::{Binding, KnockKey, KnockPorts, KnockSecrets, PrivateKey, Side};
use knockq::nft::{Door, Doors};
use knockq::packet::{Flow, KernelSettings, Persona};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with};

use lab::{Capture, Daemon, FAMILIES, Family, Host, Lab, eventually, hex, succeeds};
use nix::sys::signal::{Signal, kill};

#[test]
fn a_knock_opens_the_door_for_its_source_and_port_alone_and_it_shuts_again() {
    let lab = Lab::new();
    let _daemon = lab.start();
    for family in FAMILIES {
        let server = family.server();
        assert!(!lab.alice.reaches(server, 22), "shut without a knock");
        lab.knock(family, &[]);
        let element = lab.wait_for_door(family.alice(), 22);
        assert!(element.contains("comment \"alice ssh\""), "{element}");
        let mut connection = lab.alice.connect(server, 22).expect("open after it");
        assert!(!lab.mallory.reaches(server, 22), "shut to another source");
        assert!(!lab.alice.reaches(server, 25), "another guarded port stays shut");
        eventually("closing", || !lab.alice.reaches(server, 22));
        assert!(lab::echoes(&mut connection), "the established connection lives on");
    }
}

#[test]
fn send_wait_confirms_and_says_what_to_check_when_the_port_stays_shut() {
    let lab = Lab::new();
    let daemon = lab.start();
    for family in FAMILIES {
        let sent = lab.knockq(&lab.alice, &["send", "server", "ssh", "--wait", family.flag()]);
        let said = String::from_utf8_lossy(&sent.stderr).into_owned();
        assert!(
            sent.status.success() && said.contains(&format!("ssh of server is open at {}", family.server())),
            "{said}"
        );
    }
    daemon.stop();
    thread::sleep(Duration::from_secs(4));
    let sent = lab.knockq(&lab.alice, &["send", "server", "--wait"]);
    let said = String::from_utf8_lossy(&sent.stderr).into_owned();
    assert_eq!(sent.status.code(), Some(1), "{said}");
    assert!(said.contains("still shut") && said.contains("Hint: check") && said.contains("clock"), "{said}");
}

#[test]
fn one_knock_is_one_packet_and_nothing_answers_it_nor_any_other_syn_there() {
    let lab = Lab::new();
    let _daemon = lab.start();
    for family in FAMILIES {
        let capture = Capture::start(&lab, &lab.alice, "eth0", "tcp");
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
        let packets = capture.packets();
        assert_eq!(packets.len(), 1, "{packets:02x?}");

        // a SYN without a knock, to a knock port: the same silence
        let capture = Capture::start(&lab, &lab.alice, "eth0", "tcp");
        assert!(!lab.alice.reaches(family.server(), 20_000));
        let packets = capture.packets();
        let from_alice = packets.iter().filter(|packet| source(packet) == family.alice()).count();
        assert_eq!((from_alice, packets.len()), (1, 1), "{packets:02x?}");
    }
}

#[test]
fn the_syn_of_a_knock_is_the_kernels_own_but_for_what_is_random() {
    let lab = Lab::new();
    let _daemon = lab.start();
    for family in FAMILIES {
        let capture = Capture::start(&lab, &lab.alice, "eth0", "tcp");
        lab.knock(family, &[]);
        assert!(!lab.alice.reaches(family.server(), 20_000));
        let packets = capture.packets();
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
fn a_replay_opens_nothing_from_the_same_or_another_source_or_after_a_restart() {
    let lab = Lab::new();
    let daemon = lab.start();
    let mut spent = Vec::new();
    for family in FAMILIES {
        let alice = family.alice().to_string();
        let packet = lab.print_knock(family, &["--source", &alice]);
        lab.alice.oracle_says(&["replay", &packet]);
        lab.wait_for_door(family.alice(), 22);
        eventually("closing", || lab.door(family.alice(), 22).is_none());
        lab.alice.oracle_says(&["replay", &packet]);
        lab.mallory.oracle_says(&["replay", &packet, "--from", &family.mallory().to_string()]);
        lab.stays_shut(family);
        spent.push((family, packet));
    }
    let log = daemon.stop();
    assert!(log.contains("this knock was spent before"), "{log}");
    let mut daemon = lab.start();
    for (family, packet) in &spent {
        lab.alice.oracle_says(&["replay", packet]);
        lab.mallory.oracle_says(&["replay", packet, "--from", &family.mallory().to_string()]);
        lab.stays_shut(*family);
    }
    for (_, pid) in daemon.processes() {
        kill(pid, Signal::SIGKILL).unwrap();
    }
    daemon.end();
    let _daemon = lab.start();
    for (family, packet) in &spent {
        lab.alice.oracle_says(&["replay", packet]);
        lab.stays_shut(*family);
        lab.knock(*family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
}

#[test]
fn an_unbound_knock_that_comes_from_two_addresses_loses_its_door() {
    let lab = Lab::with("open_for = \"1h\"");
    let mut daemon = lab.start();
    for family in FAMILIES {
        let packet = lab.print_knock(family, &["--source", "none"]);
        lab.alice.oracle_says(&["replay", &packet]);
        lab.wait_for_door(family.alice(), 22);
        lab.mallory.oracle_says(&["replay", &packet, "--from", &family.mallory().to_string()]);
        eventually("withdrawal", || lab.door(family.alice(), 22).is_none());
        assert_eq!(lab.door(family.mallory(), 22), None);
        daemon.wait_for(&format!("elsewhere={}", family.mallory()));
    }
}

#[test]
fn what_no_user_may_do_opens_nothing() {
    let lab = Lab::new();
    let mut daemon = lab.start();
    let stranger = succeeds(&lab.knockq_as("stranger", &lab.alice, &["keygen"]));
    assert_eq!(stranger.trim_end().len(), 44);
    for family in FAMILIES {
        let (from, to) = (family.alice().to_string(), family.server().to_string());
        let key = |user: &str| lab.home(user).join(".config/knockq/key").display().to_string();
        let send = |user: &str, more: &[&str]| {
            let server_key = lab.server_key();
            let key = key(user);
            let ends = ["--client-key", &key, "--server-key", &server_key, "--from", &from, "--to", &to];
            lab.alice.oracle_says(&[&["send", "--knock-ports", "20000-21023"], &ends[..], more].concat());
        };
        send("alice", &["--port", "25"]);
        lab.stays_shut(family);
        send("stranger", &["--port", "22"]);
        lab.stays_shut(family);
        send("alice", &["--port", "22", "--knock-port", "19999"]);
        lab.stays_shut(family);
        send("alice", &["--port", "22", "--knock-port", "20000"]);
        daemon.wait_for("reason=wrong_knock_port");
        lab.stays_shut(family);
        send("alice", &["--port", "22", "--bind", "192.0.2.1"]);
        daemon.wait_for("reason=wrong_tag");
        lab.stays_shut(family);
        let old = unix_now() - 90;
        send("alice", &["--port", "22", "--counter", &old.to_string()]);
        lab.stays_shut(family);
        send("alice", &["--port", "22"]);
        lab.wait_for_door(family.alice(), 22);
    }
}

#[test]
fn a_bound_knock_whose_source_nat_changes_opens_nothing_and_the_log_says_why() {
    let lab = Lab::new();
    let mut daemon = lab.start();
    // alice now sits behind mallory, who masquerades
    let inner = Host::new(u32::MAX, &format!("inner{}", lab.alice.name.len()));
    inner.join("eth0", &lab.mallory, "lan0");
    inner.address("eth0", "10.88.0.2/24", "fd88::2/64");
    lab.mallory.address("lan0", "10.88.0.1/24", "fd88::1/64");
    inner.ip("route add default via 10.88.0.1");
    inner.ip("-6 route add default via fd88::1");
    lab.mallory.sysctl("net/ipv4/ip_forward", "1");
    lab.mallory.sysctl("net/ipv6/conf/all/forwarding", "1");
    lab.mallory.nft(&["add table inet nat; add chain inet nat post { type nat hook postrouting priority srcnat; }; \
         add rule inet nat post oifname eth0 masquerade"]);
    for family in FAMILIES {
        let own = family.pick("10.88.0.2", "fd88::2").to_string();
        succeeds(&lab.knockq(&inner, &["send", "server", family.flag(), "--source", &own]));
        daemon.wait_for(&format!("source={}", family.mallory()));
        assert!(daemon.log().contains("bound to another source address (NAT on the way?)"), "{}", daemon.log());
        assert_eq!(lab.door(family.mallory(), 22), None);
        // bound to what the server sees, or to nothing, it passes
        for source in [family.mallory().to_string(), "none".to_owned()] {
            eventually("closing", || lab.door(family.mallory(), 22).is_none());
            succeeds(&lab.knockq(&inner, &["send", "server", family.flag(), "--source", &source]));
            lab.wait_for_door(family.mallory(), 22);
        }
        assert!(inner.reaches(family.server(), 22), "the connection takes the same way");
    }
}

#[test]
fn everything_else_passes_untouched() {
    let lab = Lab::new();
    lab.alice.serve(8080);
    lab.mallory.serve(22);
    lab.mallory.serve(20_000);
    lab.server.sysctl("net/ipv4/ip_forward", "1");
    lab.server.sysctl("net/ipv6/conf/all/forwarding", "1");
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
fn a_second_knock_renews_the_time() {
    let lab = Lab::with("open_for = \"6s\"");
    let _daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &[]);
        let first = seconds_left(&lab.wait_for_door(family.alice(), 22));
        thread::sleep(Duration::from_secs(3));
        let before = seconds_left(&lab.door(family.alice(), 22).expect("still open"));
        assert!(before < first, "{before} {first}");
        lab.knock(family, &[]);
        eventually("renewal", || lab.door(family.alice(), 22).is_some_and(|door| seconds_left(&door) > before));
        let element = lab.door(family.alice(), 22).unwrap();
        assert!(element.contains("comment \"alice ssh\""), "{element}");
    }
}

#[test]
fn a_once_service_lets_one_connection_in() {
    let lab = Lab::with("open_for = \"1m\"\nonce = true");
    let _daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
        let mut connection = lab.alice.connect(family.server(), 22).expect("the first");
        assert!(!lab.alice.reaches(family.server(), 22), "a second");
        assert_eq!(lab.door(family.alice(), 22), None, "the kernel has shut the door");
        assert!(lab::echoes(&mut connection));
    }
}

#[test]
fn a_user_whose_tokens_must_be_bound_and_come_from_home_is_held_to_it() {
    let lab = Lab::with("open_for = \"3s\"");
    let entry = lab.config().with_file_name("users.d").join("alice.toml");
    let text = fs::read_to_string(&entry).unwrap();
    fs::write(&entry, format!("{text}source = \"bound\"\nfrom = [\"10.77.1.0/24\", \"fd77:1::/64\"]\n")).unwrap();
    let mut daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &["--source", "none"]);
        daemon.wait_for("reason=wrong_tag");
        lab.stays_shut(family);
        let packet = lab.print_knock(family, &["--source", &family.mallory().to_string()]);
        lab.mallory.oracle_says(&["replay", &packet, "--from", &family.mallory().to_string()]);
        daemon.wait_for("reason=source_not_allowed");
        assert_eq!(lab.door(family.mallory(), 22), None);
        lab.knock(family, &["--source", &family.alice().to_string()]);
        lab.wait_for_door(family.alice(), 22);
    }
}

#[test]
fn an_independent_oracle_knocks_and_reads_our_knocks() {
    let lab = Lab::new();
    let _daemon = lab.start();
    let key = |path: &str| lab.directory.path.join(path).display().to_string();
    let (server_key, client_file) = (lab.server_key(), key("home/alice/.config/knockq/key"));
    for family in FAMILIES {
        let (alice, server) = (family.alice().to_string(), family.server().to_string());
        for bind in ["none", &alice] {
            eventually("closing", || lab.door(family.alice(), 22).is_none());
            lab.alice.oracle_says(&[
                "send",
                "--client-key",
                &client_file,
                "--server-key",
                &server_key,
                "--knock-ports",
                "20000-21023",
                "--from",
                &alice,
                "--to",
                &server,
                "--port",
                "22",
                "--bind",
                bind,
                "--counter",
                &lab.next_counter().to_string(),
            ]);
            lab.wait_for_door(family.alice(), 22);

            let packet = lab.print_knock(family, &["--source", bind]);
            let public = succeeds(&lab.knockq(&lab.alice, &["keygen", "--show"]));
            let opened = lab.server.oracle_says(&[
                "open",
                "--server-private",
                &key("etc/server.key"),
                "--client-key",
                public.trim_end(),
                "--knock-ports",
                "20000-21023",
                "--window",
                "60",
                "--port",
                "22",
                "--port",
                "25",
                &packet,
            ]);
            let source = if bind == "none" { "unbound" } else { bind };
            assert!(
                opened.contains("\"port\": 22") && opened.contains(&format!("\"source\": \"{source}\"")),
                "{opened}"
            );
        }
    }
}

#[test]
fn the_include_file_applied_again_doubles_no_rule_and_keeps_open_doors() {
    let lab = Lab::with("open_for = \"1h\"");
    let daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    daemon.stop();
    let shape = || {
        let listing = lab.server.nft(&["list", "table", "inet", "knockq"]);
        listing.lines().filter(|line| !line.contains("expires")).map(str::to_owned).collect::<Vec<_>>()
    };
    let before = shape();
    let config = lab.config().display().to_string();
    let file = lab.directory.path.join("again.nft");
    let printed = succeeds(&lab.knockq(&lab.server, &["ruleset", "--config", &config]));
    // nft cannot name the flags of a table that persists, so there (Linux 6.9) the line that adds it must go
    let persists = daemon_owned_the_table(&lab);
    fs::write(&file, if persists { printed.replace("add table inet knockq\n", "") } else { printed }).unwrap();
    for _ in 0..2 {
        lab.server.nft(&["-f", file.to_str().unwrap()]);
    }
    assert_eq!(shape(), before);
    for family in FAMILIES {
        assert!(lab.door(family.alice(), 22).is_some());
        assert!(lab.alice.reaches(family.server(), 22));
    }
    let _daemon = lab.start();
    assert!(FAMILIES.iter().all(|family| lab.door(family.alice(), 22).is_some()), "a start keeps them too");
}

/// Whether this kernel lets the daemon own its table, as its log says.
fn daemon_owned_the_table(lab: &Lab) -> bool {
    let logs = fs::read_dir(&lab.directory.path).unwrap().map(|entry| entry.unwrap().path());
    let logs = logs.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    logs.into_iter().any(|log| fs::read_to_string(log).unwrap().contains("the table is owned"))
}

#[test]
fn stopping_leaves_open_doors_to_their_timeouts_and_the_gate_shut() {
    let lab = Lab::with("open_for = \"12s\"");
    let daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    let log = daemon.stop();
    assert!(log.contains("stopped; doors that are open keep the time that they have left"), "{log}");
    for family in FAMILIES {
        assert!(lab.alice.reaches(family.server(), 22), "still open");
        assert!(!lab.mallory.reaches(family.server(), 22), "shut to others");
    }
    eventually("closing", || FAMILIES.iter().all(|family| !lab.alice.reaches(family.server(), 22)));
    lab.knock(Family::V4, &[]);
    lab.stays_shut(Family::V4);
}

#[test]
fn the_death_of_any_process_stops_all_with_one_line_and_opens_nothing() {
    let lab = Lab::new();
    for (role, line) in [
        ("monitor", "monitor was killed by signal 9; stopping all"),
        ("verifier", "verifier was killed by signal 9; stopping all"),
        ("keeper", "monitor: error: the keeper is gone; stopping all"),
    ] {
        let mut daemon = lab.start();
        let processes = daemon.processes();
        let (_, pid) = processes.into_iter().find(|(name, _)| *name == role).unwrap();
        kill(pid, Signal::SIGKILL).unwrap();
        let code = daemon.end();
        assert_eq!(code, if role == "keeper" { None } else { Some(1) }, "{}", daemon.log());
        eventually("the others' end", || processes.iter().all(|(_, pid)| kill(*pid, None).is_err()));
        let log = daemon.log();
        let after: Vec<&str> = log.lines().skip_while(|line| !line.contains("ready")).skip(1).collect();
        assert!(after.len() == 1 && after[0].contains(line), "{after:?}");
        for family in FAMILIES {
            lab.knock(family, &[]);
            lab.stays_shut(family);
        }
    }
}

#[test]
fn a_table_that_somebody_deletes_is_back_at_once_with_its_open_doors() {
    let lab = Lab::with("open_for = \"1h\"");
    let daemon = lab.start();
    for (number, family) in FAMILIES.into_iter().enumerate() {
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
        lab.server.sh("nft flush ruleset");
        // Linux 6.9 and newer leave the table alone; elsewhere it is loaded again
        eventually("the gate", || !lab.mallory.reaches(family.server(), 22));
        if !daemon.log().contains("the table is owned") {
            eventually("the restoration", || daemon.log().matches("it is loaded again").count() == number + 1);
        }
        let element = lab.wait_for_door(family.alice(), 22);
        assert!(element.contains("comment \"alice ssh\""), "{element}");
        assert!(lab.alice.reaches(family.server(), 22), "open doors are open again");
        assert!(!lab.mallory.reaches(family.server(), 22));
    }
}

#[test]
fn a_table_that_is_deleted_under_a_flood_with_many_doors_open_is_back_with_all_of_them() {
    let lab = Lab::with("open_for = \"1h\"");
    let daemon = lab.start();
    let key = lab.alice_key();
    let ports = KnockPorts::new([20_000..=21_023]).unwrap();
    let persona = Persona::new(&KERNEL, &Family::V4.server()).unwrap();
    let syn = |source: [u8; 4], port, sequence, tsval| {
        let flow = Flow {
            source: source.into(),
            source_port: 40_000,
            destination: Family::V4.server(),
            destination_port: port,
        };
        persona.syn(&flow, sequence, tsval, 7).unwrap()
    };
    // Each from an address of its own. Telling of 128 would overflow a socket's usual buffer.
    let doors = 110_u8;
    let first = unix_now() - 50;
    lab.alice.enter(|| {
        let socket = raw_socket(Family::V4);
        for place in 0..doors {
            let n = first + u64::from(place);
            let token = key.seal(n, 22, Binding::Unbound);
            let source = [10, 99, 0, place];
            send_raw(&socket, Family::V4, &syn(source, key.pad(n).knock_port(&ports), token.sequence, token.tsval));
            thread::sleep(Duration::from_millis(10));
        }
    });
    let open = || lab.server.nft(&["list", "set", "inet", "knockq", "open4"]).matches("expires").count();
    eventually("all doors", || open() == usize::from(doors));
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        // bounded: 50,000 SYNs at most, so that some are queued whenever the table goes
        scope.spawn(|| {
            lab.mallory.enter(|| {
                let socket = raw_socket(Family::V4);
                for number in (0..50_000_u32).take_while(|_| !is_over.load(Ordering::Relaxed)) {
                    let packet = syn([10, 77, 2, 2], 20_000, number, number);
                    send_raw(&socket, Family::V4, &packet);
                }
            });
        });
        for _ in 0..5 {
            lab.server.sh("nft flush ruleset");
            eventually("all doors again", || {
                let listing = lab.server.sh("nft list set inet knockq open4 2>/dev/null || true");
                listing.matches("expires").count() == usize::from(doors)
            });
        }
        is_over.store(true, Ordering::Relaxed);
    });
    thread::sleep(Duration::from_secs(1));
    assert!(!lab.mallory.reaches(Family::V4.server(), 22), "the gate stands");
    let restored = daemon.log().matches("it is loaded again").count();
    assert!(restored <= 10, "it was loaded {restored} times for 5 deletions");
}

#[test]
fn a_door_with_less_than_a_millisecond_left_closes_like_any_other() {
    let lab = Lab::network();
    for (set, address) in [("open4", "ipv4_addr"), ("open6", "ipv6_addr")] {
        let shape = format!("{{ type {address} . inet_proto . inet_service; flags timeout; }}");
        lab.server.sh(&format!("nft 'add table inet knockq; add set inet knockq {set} {shape}'"));
    }
    for family in FAMILIES {
        let port = "tcp/22".parse().unwrap();
        let door = Door { source: family.alice(), port, once: false };
        lab.server.enter(|| Doors::new().unwrap().open(&door, Duration::from_micros(999), "alice ssh").unwrap());
        eventually("closing", || {
            !lab.server.nft(&["list", "table", "inet", "knockq"]).contains(&family.alice().to_string())
        });
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
fn a_full_disk_opens_nothing_and_service_resumes_by_itself() {
    let lab = Lab::new();
    let state = lab.directory.path.join("state");
    let small = lab.directory.path.join("small");
    fs::create_dir(&small).unwrap();
    lab.server.sh(&format!("mount -t tmpfs -o size=2m,mode=700 none {}", small.display()));
    lab.server.sh(&format!("cp {}/counters.redb {} && chmod 600 {1}/counters.redb", state.display(), small.display()));
    let text = fs::read_to_string(lab.config()).unwrap();
    fs::write(lab.config(), text.replace(state.to_str().unwrap(), small.to_str().unwrap())).unwrap();
    let daemon = lab.start();
    let filler = small.join("filler");
    for (round, family) in (1..).zip(FAMILIES) {
        lab.server.sh(&format!("dd if=/dev/zero of={} bs=4k 2>/dev/null || true", filler.display()));
        // The store has a few pages to spare, so the first knocks may still be written.
        let failures = || daemon.log().matches("the counters cannot be written, so nothing is opened").count();
        eventually("a failed write", || {
            lab.knock(family, &[]);
            thread::sleep(Duration::from_millis(200));
            failures() >= round
        });
        eventually("closing", || lab.door(family.alice(), 22).is_none());
        lab.knock(family, &[]);
        lab.stays_shut(family);
        fs::remove_file(&filler).unwrap();
        lab.knock(family, &[]);
        lab.wait_for_door(family.alice(), 22);
    }
    drop(daemon);
    lab.server.sh(&format!("umount {}", small.display()));
}

#[test]
fn no_socket_of_any_network_family_is_bound() {
    let lab = Lab::new();
    let daemon = lab.start();
    for (role, pid) in daemon.processes() {
        let own: BTreeSet<String> = fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .filter_map(|entry| {
                fs::read_link(entry.unwrap().path())
                    .ok()?
                    .to_str()?
                    .strip_prefix("socket:[")?
                    .strip_suffix(']')
                    .map(str::to_owned)
            })
            .collect();
        for table in ["tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6", "icmp", "icmp6", "packet"] {
            let Ok(text) = fs::read_to_string(format!("/proc/{pid}/net/{table}")) else { continue };
            let bound = text.lines().skip(1).find(|line| line.split_whitespace().any(|field| own.contains(field)));
            assert_eq!(bound, None, "{role} has a socket in /proc/net/{table}");
        }
    }
    let listening = lab.server.sh("cat /proc/net/tcp /proc/net/tcp6 | awk '$4 == \"0A\"' | wc -l");
    assert_eq!(listening.trim(), "3", "only the three services of this test listen");
}

#[test]
fn each_process_has_its_own_user_and_no_more_than_it_needs() {
    let lab = Lab::new();
    let daemon = lab.start();
    let mut users = BTreeSet::new();
    for (role, pid) in daemon.processes() {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(&format!("{name}:"))).unwrap();
            line.split_once(':').unwrap().1.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        assert!(users.insert(field("Uid")), "{role} shares its user");
        if role == "keeper" {
            continue;
        }
        let net_admin = if role == "monitor" { 1_u64 << 12 } else { 0 };
        for set in ["CapEff", "CapPrm", "CapBnd"] {
            assert_eq!(u64::from_str_radix(&field(set), 16).unwrap(), net_admin, "{role} {set}");
        }
        for set in ["CapInh", "CapAmb"] {
            assert_eq!(u64::from_str_radix(&field(set), 16).unwrap(), 0, "{role} {set}");
        }
        assert_eq!(field("NoNewPrivs"), "1", "{role}");
        assert_eq!(field("Groups"), "", "{role}");
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
        assert!(environment.is_empty(), "{role}");
    }
}

#[test]
fn the_service_manager_is_told_when_the_gate_stands() {
    let lab = Lab::new();
    let path = lab.directory.path.join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let daemon = Daemon::spawn(&lab, &[("NOTIFY_SOCKET", path.to_str().unwrap()), ("JOURNAL_STREAM", "8:1")]);
    let mut buffer = [0; 64];
    let length = socket.recv(&mut buffer).unwrap();
    assert_eq!(std::str::from_utf8(&buffer[..length]).unwrap().trim_end(), "READY=1");
    assert!(!lab.alice.reaches(Family::V4.server(), 22), "the gate stands");
    let log = daemon.stop();
    assert!(log.lines().all(|line| line.starts_with('<')), "priorities for the journal: {log}");
}

#[test]
fn a_queue_or_table_that_is_taken_is_named_and_nothing_changes() {
    let lab = Lab::new();
    let _daemon = lab.start();
    let before = lab.server.nft(&["list", "ruleset"]);
    let mut second = Daemon::spawn(&lab, &[]);
    assert_eq!(second.end(), Some(1));
    assert!(second.log().contains("queue 4097: already bound by process"), "{}", second.log());
    assert!(second.log().contains("Hint: "), "{}", second.log());
    assert_eq!(lab.server.nft(&["list", "ruleset"]), before);
    lab.knock(Family::V4, &[]);
    lab.wait_for_door(Family::V4.alice(), 22);
}

#[test]
fn a_table_that_nft_cannot_fill_stops_the_start_and_changes_nothing() {
    let lab = Lab::new();
    lab.server.sh("nft 'add table inet knockq; add set inet knockq open4 { type ipv4_addr; }'");
    let before = lab.server.nft(&["list", "ruleset"]);
    let mut daemon = Daemon::spawn(&lab, &[]);
    assert_eq!(daemon.end(), Some(1));
    let log = daemon.log();
    assert!(log.contains("knockq: nft: ") && log.contains("open4") && log.contains("Hint: "), "{log}");
    assert!(!log.contains("CONFIG_NFT_QUEUE"), "another cause: {log}");
    assert_eq!(lab.server.nft(&["list", "ruleset"]), before);
}

#[test]
fn a_broken_configuration_starts_nothing_and_leaves_the_last_gate() {
    let lab = Lab::new();
    lab.start().stop();
    lab.set("no_such_key = 1");
    let mut daemon = Daemon::spawn(&lab, &[]);
    assert_eq!(daemon.end(), Some(78));
    assert!(daemon.log().contains("knockq.toml:4:1: unknown field `no_such_key`"), "{}", daemon.log());
    assert!(!lab.alice.reaches(Family::V4.server(), 22));
}

#[test]
fn a_store_of_another_server_is_refused() {
    let lab = Lab::new();
    let other = Lab::new();
    let store = |lab: &Lab| lab.directory.path.join("state/counters.redb");
    fs::copy(store(&other), store(&lab)).unwrap();
    let mut daemon = Daemon::spawn(&lab, &[]);
    assert_eq!(daemon.end(), Some(78));
    assert!(daemon.log().contains("counters.redb: belongs to the server key"), "{}", daemon.log());
    fs::write(store(&lab), "").unwrap();
    let mut daemon = Daemon::spawn(&lab, &[]);
    assert_eq!(daemon.end(), Some(78));
    assert!(daemon.log().contains("counters.redb: is not a counter store"), "{}", daemon.log());
    assert_eq!(lab.server.nft(&["list", "ruleset"]), "", "no table without a verifier");
}

#[test]
fn knocks_under_a_flood_of_syns_are_all_honoured() {
    let lab = Lab::with("open_for = \"1h\"");
    let daemon = lab.start();
    let ports = KnockPorts::new([20_000..=21_023]).unwrap();
    let key = lab.alice_key();
    let first = unix_now() - 50;
    for (round, family) in (0..).zip(FAMILIES) {
        let persona = Persona::new(&KERNEL, &family.server()).unwrap();
        let syn = |source: IpAddr, destination_port, sequence, tsval| {
            let flow = Flow { source, source_port: 40_000, destination: family.server(), destination_port };
            persona.syn(&flow, sequence, tsval, 7).unwrap()
        };
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
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
            is_over.store(true, Ordering::Relaxed);
        });
    }
    assert_eq!(daemon.log().matches("granted").count(), 100);
}

const KERNEL: KernelSettings = KernelSettings {
    timestamps: true,
    sack: true,
    window_scaling: true,
    ecn: false,
    receive_buffer: 131_072,
    receive_buffer_max: 6 << 20,
    hop_limit: 64,
    mtu: 1500,
};

fn raw_socket(family: Family) -> OwnedFd {
    let domain = if family == Family::V4 { AddressFamily::INET } else { AddressFamily::INET6 };
    socket_with(domain, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW)).unwrap()
}

fn send_raw(socket: &OwnedFd, family: Family, packet: &[u8]) {
    sendto(socket, packet, SendFlags::empty(), &SocketAddr::new(family.server(), 0)).unwrap();
}

impl Lab {
    /// Waits for a door and tells its element.
    #[track_caller]
    fn wait_for_door(&self, source: IpAddr, port: u16) -> String {
        let start = Instant::now();
        loop {
            if let Some(element) = self.door(source, port) {
                return element;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "no door for {source} to {port}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// No door opens, to anyone, in the time that one would take.
    #[track_caller]
    fn stays_shut(&self, family: Family) {
        thread::sleep(Duration::from_millis(300));
        for source in [family.alice(), family.mallory()] {
            assert_eq!(self.door(source, 22), None);
            assert_eq!(self.door(source, 25), None);
        }
        assert!(!self.alice.reaches(family.server(), 22));
        assert!(!self.mallory.reaches(family.server(), 22));
    }

    /// What alice's key and the server's agree on.
    fn alice_key(&self) -> KnockKey {
        let own: PrivateKey =
            fs::read_to_string(self.home("alice").join(".config/knockq/key")).unwrap().parse().unwrap();
        let server = self.server_key().parse().unwrap();
        KnockKey::new(&KnockSecrets::derive(Side::Client, &own, &server, None).unwrap())
    }

    /// A counter above those that alice has used so far.
    fn next_counter(&self) -> u64 {
        let directory = self.home("alice").join(".local/state/knockq/counters");
        let files = fs::read_dir(directory)
            .into_iter()
            .flatten()
            .map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap());
        let used =
            files.flat_map(|text| text.lines().filter_map(|line| line.parse::<u64>().ok()).collect::<Vec<_>>()).max();
        unix_now().max(used.unwrap_or(0) + 1)
    }
}

fn unix_now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

fn seconds_left(element: &str) -> f64 {
    let text = element.split("expires ").nth(1).unwrap().split(' ').next().unwrap();
    let (mut seconds, mut number) = (0.0, String::new());
    for c in text.replace("ms", "%").chars() {
        if c.is_ascii_digit() {
            number.push(c);
            continue;
        }
        let factor = match c {
            'd' => 86_400.0,
            'h' => 3600.0,
            'm' => 60.0,
            's' => 1.0,
            _ => 0.001,
        };
        seconds += factor * number.parse::<f64>().unwrap();
        number.clear();
    }
    seconds
}

fn refused(host: &Host, server: IpAddr, port: u16) -> bool {
    let connected = host.enter(|| TcpStream::connect_timeout(&SocketAddr::new(server, port), Duration::from_secs(5)));
    connected.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
}

fn tcp_offset(packet: &[u8]) -> usize {
    if packet[0] >> 4 == 4 { 20 } else { 40 }
}

fn source(packet: &[u8]) -> IpAddr {
    if packet[0] >> 4 == 4 {
        IpAddr::from(<[u8; 4]>::try_from(&packet[12..16]).unwrap())
    } else {
        IpAddr::from(<[u8; 16]>::try_from(&packet[8..24]).unwrap())
    }
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
