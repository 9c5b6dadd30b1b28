//! What lies between client and server: translators of addresses and of protocols, boxes that rewrite, and several ways.
//!
//! ```text
//!   client 192.168.7.2 --- router --- 100.64.1.0/24 --- mallory, who forwards --- server
//!   neighbour 192.168.8.2 --/
//! ```

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::process::{Child, Command, Output, Stdio};
use std::thread;

use crate::lab::{self, Capture, FAMILIES, Family, Host, Lab, echoes, eventually, succeeds};
use crate::tcp_offset;

/// Bytes from the start of the TCP header.
const SEQUENCE: usize = 4;
// Where Linux puts its options: MSS, SACK permitted, timestamps.
const MSS: usize = 22;
const TSVAL: usize = 28;

/// A household behind mallory, who is its provider.
struct Household {
    router: Host,
    client: Host,
    neighbour: Host,
}

impl Household {
    fn new(lab: &Lab) -> Self {
        let [router, client, neighbour] = ["router", "client", "neighbour"].map(|role| lab.host(role));
        lab.mallory.uplink("lan0", &router, "100.64.1", "fd64:1:");
        router.uplink("lan0", &client, "192.168.7", "fd88:7:");
        router.uplink("lan1", &neighbour, "192.168.8", "fd88:8:");
        lab.mallory.ip("route add 192.168.0.0/16 via 100.64.1.2");
        lab.mallory.ip("-6 route add fd88::/16 via fd64:1::2");
        for (host, interfaces) in [(&lab.mallory, 2), (&router, 3)] {
            host.settle(interfaces);
            host.forward();
        }
        [&client, &neighbour].iter().for_each(|host| host.settle(1));
        Self { router, client, neighbour }
    }
}

impl Lab {
    /// One host behind mallory, whom the server finds there.
    fn behind_mallory(&self) -> Host {
        let client = self.host("client");
        self.mallory.uplink("lan0", &client, "192.168.7", "fd88:7:");
        self.server.ip("route add 192.168.7.0/24 via 10.77.2.2");
        self.server.ip("-6 route add fd88:7::/64 via fd77:2::2");
        self.mallory.settle(2);
        self.mallory.forward();
        client.settle(1);
        client
    }

    /// Another of alice's profiles for the server, with a line of its own.
    pub(crate) fn add_profile(&self, name: &str, line: &str) {
        let (key, _) = line.split_once(' ').unwrap();
        let text = fs::read_to_string(self.directory.path.join("alice.profile")).unwrap();
        let others = text.lines().filter(|line| !line.starts_with(key)).map(|line| format!("{line}\n"));
        let path = self.directory.path.join(format!("{name}.profile"));
        fs::write(&path, format!("{line}\n{}", others.collect::<String>())).unwrap();
        let add = ["host", "add", name, path.to_str().unwrap(), "--same-server"];
        succeeds(&self.knockq_as("alice", &self.alice, &add));
    }

    /// Alice knocks from this host; the door is for `seen` and lets her in. What `send` said.
    #[track_caller]
    fn knock_lets_in(&self, client: &Host, arguments: &[&str], server: IpAddr, seen: IpAddr) -> String {
        let said = said(&self.knockq(client, &[&["send"], arguments].concat()));
        self.wait_for_door(seen, 22);
        assert!(echoes(&mut client.gets_in(server, 22)), "{said}");
        self.revoke(&["--all"]);
        said
    }
}

#[track_caller]
fn said(sent: &Output) -> String {
    succeeds(sent);
    String::from_utf8(sent.stderr.clone()).unwrap()
}

/// Puts this host's address in the place of those behind it.
fn masquerade(router: &Host) {
    router.nft(&["add table inet nat; add chain inet nat post { type nat hook postrouting priority srcnat; }; \
         add rule inet nat post oifname eth0 masquerade"]);
}

/// Puts these rules in the place of what this host did so far to what it forwards.
fn rewrite(router: &Host, rules: &[&str]) {
    let rules: String = rules.iter().map(|rule| format!("add rule inet box forward {rule}; ")).collect();
    router.nft(&[&format!(
        "add table inet box; delete table inet box; add table inet box; \
         add chain inet box forward {{ type filter hook forward priority mangle; }}; {rules}"
    )]);
}

fn number(packet: &[u8], offset: usize) -> u32 {
    let at = tcp_offset(packet) + offset;
    u32::from_be_bytes(packet[at..at + 4].try_into().unwrap())
}

fn mss(packet: &[u8]) -> u32 {
    number(packet, MSS) >> 16
}

/// A TCP segment that is not of the guarded port.
fn is_knock(packet: &[u8]) -> bool {
    let ports = &packet[tcp_offset(packet)..];
    lab::is_tcp(packet) && ![&ports[..2], &ports[2..4]].contains(&&22_u16.to_be_bytes()[..])
}

#[test]
fn behind_a_nat_or_two_the_door_is_for_the_address_that_the_server_sees_and_a_wrong_binding_is_explained() {
    let lab = Lab::with("open_for = \"1h\"");
    let mut daemon = lab.start();
    let home = Household::new(&lab);
    for family in FAMILIES {
        lab.add_profile(&format!("fixed{}", family.flag()), &format!("source = \"{}\"", family.mallory()));
    }
    for (nats, router) in [&lab.mallory, &home.router].into_iter().enumerate() {
        masquerade(router);
        for family in FAMILIES {
            let (server, seen, flag) = (family.server(), family.mallory(), family.flag());
            let (public, fixed) = (seen.to_string(), format!("fixed{flag}"));
            let opens = |arguments: &[&str]| lab.knock_lets_in(&home.client, arguments, server, seen);
            assert!(opens(&["server", flag]).contains("not bound"), "a NAT will change the address");
            for bound in [&["server", flag, "--source", &public][..], &[&fixed]] {
                let said = opens(bound);
                assert!(said.contains(&format!("bound to {seen}")), "{said}");
            }
            if nats == 0 {
                let own = family.pick("192.168.7.2", "fd88:7::2").to_string();
                succeeds(&lab.knockq(&home.client, &["send", "server", flag, "--source", &own]));
                daemon.wait_for(&format!("refused reason=wrong_tag user=alice source={seen}"));
                assert!(daemon.log().contains("bound to another source address (NAT on the way?)"), "{}", daemon.log());
                assert_eq!(lab.door(seen, 22), None);
            }
        }
    }
}

#[test]
fn a_neighbour_behind_the_same_address_gets_in_while_the_door_is_open_and_never_after() {
    let lab = Lab::network();
    lab.configure(
        "[services.ssh]\nports = [\"tcp/22\"]\nopen_for = \"1h\"\n\
         [services.mail]\nports = [\"tcp/25\"]\nopen_for = \"1h\"\nonce = true\n",
    );
    lab.add_user("alice", &["ssh", "mail"]);
    [22, 25].into_iter().for_each(|port| lab.server.serve(port));
    let _daemon = lab.start();
    let Household { router, client, neighbour } = Household::new(&lab);
    [&lab.mallory, &router].into_iter().for_each(masquerade);
    for family in FAMILIES {
        let server = family.server();
        let knock = |service, port| {
            succeeds(&lab.knockq(&client, &["send", "server", service, family.flag()]));
            lab.wait_for_door(family.mallory(), port);
        };
        assert!(!neighbour.reaches(server, 22), "shut before");
        knock("ssh", 22);
        let mut connections = [&client, &neighbour].map(|host| host.gets_in(server, 22));
        assert!(!lab.alice.reaches(server, 22), "who has another address does not get in");
        lab.revoke(&["--all"]);
        assert!([&client, &neighbour].iter().all(|host| !host.reaches(server, 22)), "shut to both");
        assert!(connections.iter_mut().all(echoes), "established connections live on");

        // For one connection, so for whoever is first.
        for [first, second] in [[&client, &neighbour], [&neighbour, &client]] {
            knock("mail", 25);
            let mut connection = first.gets_in(server, 25);
            assert!(!second.reaches(server, 25), "one is in already");
            assert!(echoes(&mut connection));
        }
    }
}

#[test]
fn where_a_nat_changes_its_address_after_the_knock_the_port_stays_shut_and_both_ends_can_tell() {
    let lab = Lab::with("open_for = \"1h\"");
    lab.add_user("bob", &["ssh"]);
    let daemon = lab.start();
    let client = lab.behind_mallory();
    lab.mallory.address("eth0", "10.77.2.3/24", "fd77:2::3/64");
    // A pool: which address a flow gets depends on its port.
    let pool = |knocks: &str, connections: &str| {
        let rules: String = [("22", connections), ("1-65535", knocks)]
            .iter()
            .map(|(ports, last)| {
                format!(
                    "add rule inet nat post meta nfproto ipv4 tcp dport {ports} snat ip to 10.77.2.{last}; \
                     add rule inet nat post meta nfproto ipv6 tcp dport {ports} snat ip6 to fd77:2::{last}; "
                )
            })
            .collect();
        lab.mallory.nft(&[&format!(
            "add table inet nat; add chain inet nat post {{ type nat hook postrouting priority srcnat; }}; \
             flush chain inet nat post; {rules}"
        )]);
    };
    // At the same time, so as two users: of one user's knocks the later one must not be overtaken.
    let user = |family| if family == Family::V4 { "alice" } else { "bob" };
    let both_wait = || {
        let wait = |family: Family| lab.knockq_as(user(family), &client, &["send", "server", "--wait", family.flag()]);
        thread::scope(|scope| FAMILIES.map(|family| scope.spawn(move || wait(family))).map(|one| one.join().unwrap()))
    };
    pool("2", "3");
    for sent in both_wait() {
        let said = String::from_utf8_lossy(&sent.stderr).into_owned();
        assert_eq!(sent.status.code(), Some(1), "{said}");
        assert!(said.contains("still shut") && said.contains("NAT"), "{said}");
    }
    let grants = lab.control(&["grants"]);
    for family in FAMILIES {
        let [knocked, connected] =
            ["2", "3"].map(|last| family.pick(&format!("10.77.2.{last}"), &format!("fd77:2::{last}")).to_string());
        assert!(grants.contains(&knocked) && !grants.contains(&connected), "{grants}");
        let granted = format!("granted user={} service=ssh source={knocked} ", user(family));
        assert!(daemon.log().contains(&granted), "{}", daemon.log());
    }
    pool("3", "3");
    both_wait().iter().for_each(|sent| drop(succeeds(sent)));
}

#[test]
fn a_knock_passes_where_all_but_its_eight_bytes_is_rewritten_and_nowhere_else() {
    let lab = Lab::with("open_for = \"1h\"");
    let mut daemon = lab.start();
    let client = lab.behind_mallory();
    let own = |family: Family| family.pick("192.168.7.2", "fd88:7::2");
    let breaking = [
        ("tcp sequence set 12345", None),
        // A box that answers in the server's place, and would pass on what it has made of a connection.
        ("synproxy mss 1460 wscale 7 timestamp sack-perm", None),
        ("tcp option timestamp tsval set 7", Some("wrong_tag")),
        // No-operations in its place, as normalisers do. The checksum is wrong then, at which nobody looks.
        ("@th,208,80 set 0x01010101010101010101", Some("no_timestamp")),
    ];
    for (rule, reason) in breaking {
        rewrite(&lab.mallory, &[&format!("tcp flags syn {rule}")]);
        for family in FAMILIES {
            succeeds(&lab.knockq(&client, &["send", "server", family.flag()]));
            if let Some(reason) = reason {
                daemon.wait_for(&format!("refused reason={reason} user=alice source={}", own(family)));
            }
        }
    }
    assert!(daemon.log().contains("or its timestamp was rewritten"), "{}", daemon.log());
    assert!(daemon.log().contains("something on the way takes TCP timestamps off"), "{}", daemon.log());
    assert!(!daemon.log().contains("granted"), "{}", daemon.log());

    // What translators, routers and firewalls change every day.
    rewrite(
        &lab.mallory,
        &[
            "ip id set 4242",
            "ip ttl set 33",
            "ip dscp set cs1",
            "ip6 flowlabel set 0",
            "ip6 hoplimit set 33",
            "ip6 dscp set cs1",
            "tcp flags syn tcp option maxseg size set 1220",
            "tcp flags syn tcp window set 8192",
        ],
    );
    let capture = Capture::start(&lab.server, "eth2", is_knock);
    for family in FAMILIES {
        lab.knock_lets_in(&client, &["server", family.flag()], family.server(), own(family));
    }
    let packets = capture.packets();
    let [v4, v6] = packets.as_slice() else { panic!("{packets:02x?}") };
    assert_eq!((v4[1], &v4[4..6], v4[8], mss(v4)), (8 << 2, &4242_u16.to_be_bytes()[..], 33, 1220));
    assert_eq!((&v6[..4], v6[7], mss(v6)), (&[0x62, 0, 0, 0][..], 33, 1220));
}

/// mallory as a gateway to IPv4: what is sent to a prefix of 96 bits with an IPv4 address behind it leaves from her address.
struct Nat64(Child);

impl Nat64 {
    fn start(gateway: &Host, client: &str, prefixes: &[&str]) -> Self {
        assert!(Command::new("modprobe").arg("tun").status().unwrap().success());
        let translator = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/nat64.py");
        let mut child = gateway.enter(|| {
            let mut command = Command::new("python3");
            command.args([translator, client, "10.64.64.2"]).stdout(Stdio::piped()).spawn().unwrap()
        });
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        gateway.ip("link set nat64 up");
        gateway.ip("route add 10.64.64.2/32 dev nat64");
        prefixes.iter().for_each(|prefix| gateway.ip(&format!("-6 route add {prefix}/96 dev nat64")));
        masquerade(gateway);
        Self(child)
    }
}

impl Drop for Nat64 {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn through_nat64_a_knock_opens_the_door_for_the_gateways_ipv4_address_unless_it_is_bound_to_an_ipv6_one() {
    let lab = Lab::with("open_for = \"1h\"");
    let mut daemon = lab.start();
    let client = lab.behind_mallory();
    // The client has no IPv4, and an IPv6 address that a token could well be bound to.
    client.ip("-4 addr flush dev eth0");
    client.ip("-6 addr flush dev eth0 scope global");
    client.ip("addr add 2600:7::2/64 dev eth0 nodad");
    lab.mallory.ip("addr add 2600:7::1/64 dev lan0 nodad");
    client.ip("-6 route replace default via 2600:7::1");
    let _gateway = Nat64::start(&lab.mallory, "2600:7::2", &["64:ff9b::", "2600:64::"]);
    let (well_known, operators) = ("64:ff9b::10.77.1.1", "2600:64::10.77.1.1");
    lab.add_profile("well-known", &format!("address = [\"{well_known}\"]"));
    lab.add_profile("operators", &format!("address = [\"{operators}\"]"));
    let [well_known, operators] = [well_known, operators].map(|address| address.parse().unwrap());
    let seen = Family::V4.mallory();

    let captures =
        [(&client, "eth0"), (&lab.server, "eth2")].map(|(host, interface)| Capture::start(host, interface, is_knock));
    let said = lab.knock_lets_in(&client, &["well-known"], well_known, seen);
    assert!(said.contains("not bound"), "{said}");
    let [before, after] = captures.map(Capture::packets);
    let ([before], [after]) = (before.as_slice(), after.as_slice()) else { panic!("{before:02x?} {after:02x?}") };
    assert_eq!((before[0] >> 4, after[0] >> 4), (6, 4));
    assert_eq!([SEQUENCE, TSVAL].map(|at| number(before, at)), [SEQUENCE, TSVAL].map(|at| number(after, at)));
    assert_eq!((mss(before), mss(after)), (1440, 1220));

    // Nothing tells that a prefix of the operator's own is one: the token is bound to what the server never sees.
    let bound = said_of(&lab, &client, &["operators"]);
    assert!(bound.contains("bound to 2600:7::2"), "{bound}");
    daemon.wait_for(&format!("refused reason=wrong_tag user=alice source={seen}"));
    assert_eq!(lab.door(seen, 22), None);
    lab.knock_lets_in(&client, &["operators", "--source", "none"], operators, seen);
}

fn said_of(lab: &Lab, client: &Host, arguments: &[&str]) -> String {
    said(&lab.knockq(client, &[&["send"], arguments].concat()))
}

/// The server's address that is on none of the networks which it shares with others.
fn far(family: Family) -> IpAddr {
    family.pick("10.77.9.1", "2600:9::1")
}

/// Alice has a second provider, and neither lets an address through that is the other's.
fn with_two_providers() -> Lab {
    let lab = Lab::with("open_for = \"1h\"");
    lab.server.join("eth3", &lab.alice, "eth1");
    lab.server.address("eth3", "10.77.3.1/24", "fd77:3::1/64");
    lab.alice.address("eth1", "10.77.3.2/24", "fd77:3::2/64");
    lab.server.address("lo", "10.77.9.1/32", "2600:9::1/128");
    lab.server.settle(3);
    lab.alice.settle(2);
    lab.server.nft(&["add table inet providers; \
         add chain inet providers c { type filter hook prerouting priority raw - 10; }; \
         add rule inet providers c iifname { eth1, eth3 } meta l4proto tcp fib saddr . iif oif missing drop"]);
    lab.add_profile("far", "address = [\"10.77.9.1\", \"2600:9::1\"]");
    lab
}

#[test]
fn a_knock_leaves_from_the_address_that_a_connection_would_use() {
    let lab = with_two_providers();
    let _daemon = lab.start();
    let follows = |family: Family, way: &str, expected: IpAddr| {
        let said = said_of(&lab, &lab.alice, &["far", family.flag()]);
        lab.wait_for_door(expected, 22);
        let connection = lab.alice.gets_in(far(family), 22);
        assert_eq!(connection.local_addr().unwrap().ip(), expected, "{way}");
        lab.revoke(&["--all"]);
        said
    };
    for family in FAMILIES {
        let (flag, server) = (family.flag(), far(family).to_string());
        let ip = |arguments: &str| lab.alice.ip(&format!("{flag} {arguments}"));
        let [first, second] = [1, 3].map(|net| family.pick(&format!("10.77.{net}.2"), &format!("fd77:{net}::2")));
        let [first_router, second_router] =
            [1, 3].map(|net| family.pick(&format!("10.77.{net}.1"), &format!("fd77:{net}::1")));
        follows(family, "the default route", first);

        ip(&format!("rule add to {server} lookup 33"));
        ip(&format!("route add default via {second_router} table 33"));
        follows(family, "a rule for this destination", second);
        ip(&format!("rule del to {server} lookup 33"));

        // The server's end of a tunnel, as of a VPN that is for this one server.
        let tunnel = family.pick("10.77.8.2", "fd77:8::2");
        let name = if family == Family::V4 { "gre" } else { "ip6gre" };
        for (host, local, remote, own) in [(&lab.alice, first, first_router, 2), (&lab.server, first_router, first, 1)]
        {
            host.ip(&format!("link add vpn0 type {name} local {local} remote {remote}"));
            host.ip("link set vpn0 up");
            host.address("vpn0", &format!("10.77.8.{own}/24"), &format!("fd77:8::{own}/64"));
        }
        ip(&format!("route add {server} dev vpn0"));
        follows(family, "a tunnel", tunnel);
        [&lab.alice, &lab.server].iter().for_each(|host| host.ip("link del vpn0"));

        let alias = family.pick("10.77.1.7", "fd77:1::7");
        ip(&format!("addr add {alias}/{} dev eth0 {}", if flag == "-4" { 24 } else { 64 }, nodad(family)));
        ip(&format!("route add {server} via {first_router} src {alias}"));
        follows(family, "the route's own source", alias);
        ip(&format!("route del {server}"));
        ip(&format!("addr del {alias}/{} dev eth0", if flag == "-4" { 24 } else { 64 }));

        ip(&format!("route add default via {second_router} metric 10"));
        ip(&format!("route add default via {first_router} metric 20"));
        ip(&format!("route del default via {first_router} metric {}", if flag == "-4" { 0 } else { 1024 }));
        follows(family, "the route with the lower metric", second);
        ip(&format!("route del default via {second_router} metric 10"));
        follows(family, "the route that is left when that provider is gone", first);
    }
}

fn nodad(family: Family) -> &'static str {
    if family == Family::V6 { "nodad" } else { "" }
}

#[test]
fn source_chooses_among_own_addresses_and_a_connection_from_there_alone_gets_in() {
    let lab = with_two_providers();
    let _daemon = lab.start();
    for family in FAMILIES {
        let [second, router] =
            ["2", "1"].map(|last| family.pick(&format!("10.77.3.{last}"), &format!("fd77:3::{last}")));
        lab.alice.ip(&format!("{} rule add from {second} lookup 33", family.flag()));
        lab.alice.ip(&format!("{} route add default via {router} table 33", family.flag()));
        let source = ["--source", &second.to_string()];
        let fixed = format!("fixed{}", family.flag());
        lab.add_profile(&fixed, &format!("source = \"{second}\""));
        for arguments in [&[&*fixed][..], &["far", family.flag(), source[0], source[1]]] {
            lab.revoke(&["--all"]);
            let said = said_of(&lab, &lab.alice, arguments);
            assert!(said.contains(&format!("bound to {second}")), "{said}");
            lab.wait_for_door(second, 22);
        }
        assert!(!lab.alice.reaches(far(family), 22), "a connection from the usual address");
        eventually("a connection from there", || lab.alice.connect_from(second, far(family), 22).is_some());
        let heard = lab
            .knockq(&lab.alice, &[&["connect", "far", "22", family.flag(), "--timeout", "1m"], &source[..]].concat());
        assert_eq!(succeeds(&heard), "welcome to 22\n");
        // Who routes by port has connections leave from elsewhere than knocks, which are for other ports: here they meet.
        lab.alice.ip(&format!("{} rule add ipproto tcp dport 22 lookup 33", family.flag()));
        assert_eq!(lab.alice.gets_in(far(family), 22).local_addr().unwrap().ip(), second);
    }
}

#[test]
fn a_knock_leaves_from_the_temporary_address_and_is_bound_to_it_and_never_from_a_deprecated_one() {
    let lab = with_two_providers();
    let _daemon = lab.start();
    let addresses = |kind: &str| lab.alice.sh(&format!("ip -6 -o addr show dev eth0 scope global {kind}"));
    let follows = |expected: IpAddr| {
        let said = said_of(&lab, &lab.alice, &["far", "-6"]);
        lab.wait_for_door(expected, 22);
        let connection = lab.alice.gets_in(far(Family::V6), 22);
        assert_eq!(connection.local_addr().unwrap().ip(), expected, "{}", addresses(""));
        lab.revoke(&["--all"]);
        said
    };
    lab.server.ip("addr add 2600:1::1/64 dev eth1 nodad");
    lab.alice.ip("addr add 2600:1::2/64 dev eth0 nodad preferred_lft 0");
    follows(Family::V6.alice());

    // As of a router's advertisement: the kernel adds one of its own making, and prefers it.
    lab.alice.sysctl("net/ipv6/conf/eth0/use_tempaddr", "2");
    lab.alice.ip("addr add 2600:1::7/64 dev eth0 nodad mngtmpaddr");
    let temporary = || {
        addresses("temporary -tentative").split_whitespace().find(|word| word.starts_with("2600:1:")).map(str::to_owned)
    };
    eventually("a temporary address", || temporary().is_some());
    let temporary = temporary().unwrap();
    let temporary: IpAddr = temporary.split('/').next().unwrap().parse().unwrap();
    let said = follows(temporary);
    assert!(said.contains(&format!("bound to {temporary}")), "{said}");
}
