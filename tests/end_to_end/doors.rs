//! What a knock opens, for whom, and for how long.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};
use std::{fs, thread};

use knockq::crypto::KnockPorts;
use knockq::nft::{Comment, Door, Doors, Element};

use crate::lab::{self, FAMILIES, Family, Lab, eventually, succeeds};
use crate::{seconds_left, unix_now};

#[test]
fn a_knock_opens_the_door_for_its_source_and_port_alone_and_it_shuts_again() {
    let lab = Lab::new();
    let _daemon = lab.start();
    for family in FAMILIES {
        let server = family.server();
        assert!(!lab.alice.reaches(server, 22), "shut without a knock");
        lab.knock(family, &[]);
        let element = lab.wait_for_door(family.alice(), 22);
        assert!(element.contains("comment \"alice ssh "), "{element}");
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
    eventually("closing", || FAMILIES.iter().all(|family| lab.door(family.alice(), 22).is_none()));
    let sent = lab.knockq(&lab.alice, &["send", "server", "--wait"]);
    let said = String::from_utf8_lossy(&sent.stderr).into_owned();
    assert_eq!(sent.status.code(), Some(1), "{said}");
    assert!(said.contains("still shut") && said.contains("Hint: check") && said.contains("clock"), "{said}");
}

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
    daemon.kill();
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
        let (n, ports) = (unix_now(), KnockPorts::new([20_000..=21_023]).unwrap());
        let wrong_port = if lab.alice_key().pad(n).knock_port(&ports) == 20_000 { "20001" } else { "20000" };
        send("alice", &["--port", "22", "--knock-port", wrong_port, "--counter", &n.to_string()]);
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
fn a_second_knock_renews_the_time() {
    let lab = Lab::with("open_for = \"30s\"");
    let _daemon = lab.start();
    for family in FAMILIES {
        lab.knock(family, &[]);
        let first = seconds_left(&lab.wait_for_door(family.alice(), 22));
        thread::sleep(Duration::from_secs(3));
        let before = seconds_left(&lab.door(family.alice(), 22).expect("still open"));
        assert!(before < first, "{before} {first}");
        // On a machine that is held up, one may come when the door is as old as before.
        eventually("renewal", || {
            lab.knock(family, &[]);
            lab.door(family.alice(), 22).is_some_and(|door| seconds_left(&door) > before)
        });
        let element = lab.door(family.alice(), 22).unwrap();
        assert!(element.contains("comment \"alice ssh "), "{element}");
    }
}

#[test]
fn a_user_whose_tokens_must_be_bound_and_come_from_home_is_held_to_it() {
    let lab = Lab::with("open_for = \"1h\"");
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
    let lab = Lab::with("open_for = \"1h\"");
    let _daemon = lab.start();
    let key = |path: &str| lab.directory.path.join(path).display().to_string();
    let (server_key, client_file) = (lab.server_key(), key("home/alice/.config/knockq/key"));
    for family in FAMILIES {
        let (alice, server) = (family.alice().to_string(), family.server().to_string());
        for bind in ["none", &alice] {
            lab.control(&["revoke", "--all", "--config", &lab.config().display().to_string()]);
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
fn a_door_with_less_than_a_millisecond_left_closes_like_any_other() {
    let lab = Lab::network();
    for (set, address) in [("open4", "ipv4_addr"), ("open6", "ipv6_addr")] {
        let shape = format!("{{ type {address} . inet_proto . inet_service; flags timeout; }}");
        lab.server.sh(&format!("nft 'add table inet knockq; add set inet knockq {set} {shape}'"));
    }
    for family in FAMILIES {
        let port = "tcp/22".parse().unwrap();
        let door = Door { source: family.alice(), port, once: false };
        lab.server.enter(|| {
            Doors::new()
                .unwrap()
                .change([&(
                    Element::Opens(door),
                    Some((Duration::from_micros(999), Comment::read("alice ssh").unwrap())),
                )])
                .unwrap();
        });
        eventually("closing", || {
            !lab.server.nft(&["list", "table", "inet", "knockq"]).contains(&family.alice().to_string())
        });
    }
}

#[test]
fn a_service_of_several_ports_and_transports_opens_and_shuts_as_one() {
    let lab = Lab::network();
    lab.configure(
        "[services.mesh]\nports = [\"tcp/22\", \"udp/5000\", \"tcp/25\", \"udp/22\"]\nopen_for = \"20s\"\n\
         [services.other]\nports = [\"udp/6000\"]\n",
    );
    lab.add_user("alice", &["mesh"]);
    [22, 25].into_iter().for_each(|port| lab.server.serve(port));
    let _daemon = lab.start();
    let udp = [5000, 22, 6000].map(|port| lab.server.enter(|| UdpSocket::bind(("::", port)).unwrap()));
    udp.iter().for_each(|socket| socket.set_nonblocking(true).unwrap());
    let sender = lab.alice.enter(|| UdpSocket::bind("[::]:0").unwrap());
    // Which ports can be reached, in the order tcp/22, tcp/25, udp/5000, udp/22, udp/6000.
    let open = |family: Family| {
        let over_udp = udp.each_ref().map(|socket| {
            let server = match family.server() {
                IpAddr::V4(address) => address.to_ipv6_mapped().into(),
                address => address,
            };
            let mut buffer = [0; 16];
            while socket.recv(&mut buffer).is_ok() {}
            sender.send_to(b"hello", SocketAddr::new(server, socket.local_addr().unwrap().port())).unwrap();
            let start = Instant::now();
            loop {
                let is_heard = socket.recv(&mut buffer).is_ok();
                if is_heard || start.elapsed() > Duration::from_millis(500) {
                    break is_heard;
                }
                thread::sleep(Duration::from_millis(10));
            }
        });
        let over_tcp = [22, 25].map(|port| lab.alice.reaches(family.server(), port));
        [over_tcp.as_slice(), &over_udp].concat()
    };
    for family in FAMILIES {
        assert_eq!(open(family), [false; 5]);
        lab.knock(family, &[]);
        for port in [22, 25] {
            lab.wait_for_door(family.alice(), port);
        }
        assert_eq!(open(family), [true, true, true, true, false]);
        eventually("closing", || lab.door(family.alice(), 22).is_none() && lab.door(family.alice(), 25).is_none());
        assert_eq!(open(family), [false; 5]);
    }
}
