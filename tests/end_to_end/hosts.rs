//! What is this host? In every network the same: what is for it is guarded and opens to who knocks, what goes to another passes.
//!
//! Each test makes a network of [`Lab::network`]'s three hosts, and asks the same of it. What does not hold is collected, so
//! that one run tells all of it.

use std::cell::RefCell;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{BindToDevice, IpTransparent};

use crate::lab::{Daemon, FAMILIES, Family, Host, Lab, echoes, succeeds};

/// An address of each family.
type Addresses = [&'static str; 2];

const ALICE: Addresses = ["10.77.1.2", "fd77:1::2"];
const MALLORY: Addresses = ["10.77.2.2", "fd77:2::2"];
/// The server as alice knows it.
const NEAR: Addresses = ["10.77.1.1", "fd77:1::1"];
/// The server as mallory knows it: what alice sends there comes in where another address is.
const ACROSS: Addresses = ["10.77.2.1", "fd77:2::1"];

/// `ssh`, which stays open.
const SSH: u16 = 22;
/// `mail`, which is for one connection.
const MAIL: u16 = 25;
/// Not guarded.
const WEB: u16 = 80;
/// One of the knock ports.
const KNOCK: u16 = 20_007;

/// What has not happened by then does not happen, be the machine slow.
const SOON: Duration = Duration::from_secs(20);

/// A lab whose server runs no service yet, and whose alice may open those that it will have.
fn network() -> Lab {
    let lab = Lab::network();
    lab.configure(
        "[services.ssh]\nports = [\"tcp/22\"]\nopen_for = \"1h\"\n\
         [services.mail]\nports = [\"tcp/25\"]\nopen_for = \"1h\"\nonce = true\n",
    );
    lab.add_user("alice", &["ssh", "mail"]);
    [&lab.alice, &lab.mallory].into_iter().for_each(serve_too);
    lab
}

/// What the guarded host serves.
const SERVICES: [u16; 3] = [SSH, MAIL, WEB];

/// Others' services are none of its business, be they at its knock ports.
fn serve_too(host: &Host) {
    [SSH, KNOCK, WEB].into_iter().for_each(|port| host.serve(port));
}

/// The same network, with services and the gate.
fn guarded(lab: Lab) -> Site {
    SERVICES.into_iter().for_each(|port| lab.server.serve(port));
    Site::new(lab)
}

/// A network with the gate in it.
struct Site {
    _daemon: Daemon, // ends before its files go
    lab: Lab,
    /// What does not hold.
    wrong: RefCell<Vec<String>>,
}

/// Who knocks, and from where.
#[derive(Clone, Copy)]
struct Client<'a>(&'a Host, Addresses);

impl Site {
    fn new(lab: Lab) -> Self {
        let daemon = lab.start();
        Self { _daemon: daemon, lab, wrong: RefCell::default() }
    }

    fn alice(&self) -> Client<'_> {
        Client(&self.lab.alice, ALICE)
    }

    fn check(&self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            let what = what();
            eprintln!("does not hold: {what}"); // also if something else panics
            self.wrong.borrow_mut().push(what);
        }
    }

    /// What comes to these addresses of the server is shut to all, and open to this client once it has knocked.
    fn guards(&self, place: &str, addresses: Addresses, Client(client, sources): Client<'_>, strangers: &[&Host]) {
        let profile = format!("at-{}", addresses[0]);
        self.lab.add_profile(&profile, &format!("address = {addresses:?}"));
        let all: Vec<&Host> = strangers.iter().copied().chain([client]).collect();
        for family in FAMILIES {
            let [server, source] = [addresses, sources].map(|[v4, v6]| family.pick(v4, v6));
            let cell = |what: &str| format!("{place}: {server}: {what}");
            if let Some(host) = all.iter().find(|host| !talk(host, server, WEB)) {
                self.check(false, || cell(&format!("is not there for {}", host.name)));
                continue;
            }
            for port in [SSH, MAIL] {
                self.check(!any_reaches(&all, server, port), || cell(&format!("tcp/{port} is open to all")));
            }
            let seen = self.syns();
            for (service, port) in [("ssh", SSH), ("mail", MAIL)] {
                let cell = |what: &str| cell(&format!("{service}: {what}"));
                succeeds(&self.lab.knockq(client, &["send", &profile, service, family.flag()]));
                if !within(|| self.lab.door(source, port).is_some()) {
                    self.check(false, || cell("a knock opens no door"));
                    continue;
                }
                self.check(!any_reaches(strangers, server, port), || cell("the door is open to strangers"));
                self.check(talk(client, server, port), || cell("who knocked does not get in"));
                if port == MAIL {
                    self.check(!any_reaches(&all, server, port), || cell("a second connection gets in"));
                }
                self.lab.revoke(&["--all"]);
                self.check(!any_reaches(&all, server, port), || cell("it is open when all is revoked"));
            }
            self.check(self.syns() == seen + 2, || cell("`status` does not count the two knocks"));
        }
    }

    /// What goes past the server to another host is answered, and none of it is taken for a knock.
    fn passes(&self, way: &str, from: &Host, to: Addresses) {
        let seen = self.syns();
        for family in FAMILIES {
            let to = family.pick(to[0], to[1]);
            self.check(talk(from, to, WEB), || format!("{way}: {to} is not there"));
            for port in [SSH, KNOCK] {
                self.check(talk(from, to, port), || format!("{way}: {to}: tcp/{port} does not pass"));
            }
        }
        self.check(self.syns() == seen, || format!("{way}: the daemon sees what is not for it"));
    }

    /// SYNs that the daemon has seen.
    fn syns(&self) -> u64 {
        self.lab.status()["syns"]["seen"].as_u64().unwrap()
    }

    #[track_caller]
    fn holds(self) {
        let wrong = self.wrong.take();
        assert!(wrong.is_empty(), "{} cells of this network do not hold:\n{}", wrong.len(), wrong.join("\n"));
    }
}

/// A connection is made, and what is said goes there and back.
fn talk(from: &Host, to: IpAddr, port: u16) -> bool {
    from.connect_within(SOON, to, port).is_some_and(|mut stream| echoes(&mut stream))
}

fn any_reaches(hosts: &[&Host], to: IpAddr, port: u16) -> bool {
    thread::scope(|scope| {
        let tries: Vec<_> = hosts.iter().map(|host| scope.spawn(move || host.reaches(to, port))).collect();
        tries.into_iter().any(|one| one.join().unwrap())
    })
}

fn within(mut is_so: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while !is_so() {
        if start.elapsed() > SOON {
            return false;
        }
        thread::sleep(Duration::from_millis(50));
    }
    true
}

impl Host {
    /// Into this bridge or VRF. IPv6 addresses go by it, others stay.
    fn enslave(&self, interface: &str, master: &str, v6: &str) {
        self.ip(&format!("link set {interface} master {master}"));
        self.ip(&format!("-6 addr replace {v6} dev {interface} nodad"));
    }

    fn dual_route(&self, v4: &str, v6: &str, rest: &str) {
        self.ip(&format!("route add {v4} {rest}"));
        self.ip(&format!("-6 route add {v6} {rest}"));
    }
}

#[test]
fn at_every_address_of_its_own_a_host_is_guarded_and_what_it_forwards_passes() {
    let lab = network();
    lab.server.forward();
    lab.server.address("lo", "10.77.9.1/32", "fd77:9::1/128");
    lab.server.dual_route("local 10.77.30.0/24", "local fd77:30::/64", "dev lo");
    let site = guarded(lab);
    site.guards("plain", NEAR, site.alice(), &[&site.lab.mallory]);
    site.guards("on another interface than it comes to", ACROSS, site.alice(), &[&site.lab.mallory]);
    site.guards("on lo", ["10.77.9.1", "fd77:9::1"], site.alice(), &[&site.lab.mallory]);
    site.guards("by a local route", ["10.77.30.5", "fd77:30::5"], site.alice(), &[&site.lab.mallory]);
    site.lab.server.address("eth2", "10.77.2.77/24", "fd77:2::77/64");
    site.guards("added later", ["10.77.2.77", "fd77:2::77"], site.alice(), &[&site.lab.mallory]);
    site.passes("forwarded", &site.lab.alice, MALLORY);
    site.passes("forwarded", &site.lab.mallory, ALICE);
    site.holds();
}

#[test]
fn a_default_route_and_a_way_back_by_another_interface_make_no_difference() {
    let lab = network();
    lab.server.ip("route add default via 10.77.2.2");
    lab.server.ip("-6 route add default via fd77:2::2");
    lab.server.join("eth3", &lab.alice, "eth1");
    lab.server.address("eth3", "10.77.3.1/24", "fd77:3::1/64");
    lab.alice.address("eth1", "10.77.3.2/24", "fd77:3::2/64");
    // What alice sends there comes in by eth1, and what she gets by eth3.
    lab.alice.ip("route add 10.77.2.1/32 via 10.77.1.1 src 10.77.3.2");
    lab.alice.ip("-6 route add fd77:2::1/128 via fd77:1::1 src fd77:3::2");
    let site = guarded(lab);
    site.guards("default route", NEAR, site.alice(), &[&site.lab.mallory]);
    let from_afar = Client(&site.lab.alice, ["10.77.3.2", "fd77:3::2"]);
    site.guards("asymmetric", ACROSS, from_afar, &[&site.lab.mallory]);
    site.holds();
}

#[test]
fn a_router_by_policy_routing_is_guarded_and_what_it_forwards_passes() {
    for by_mark in [false, true] {
        let lab = network();
        lab.server.forward();
        let selector = if by_mark { "fwmark 7" } else { "iif eth1" };
        for family in FAMILIES {
            let [flag, router] =
                [family.flag(), family.pick(MALLORY[0], MALLORY[1]).to_string().as_str()].map(str::to_owned);
            lab.server.ip(&format!("{flag} rule add {selector} lookup 100"));
            lab.server.ip(&format!("{flag} route add default via {router} table 100"));
        }
        if by_mark {
            lab.server.nft(&["add table inet marks; \
                 add chain inet marks c { type filter hook prerouting priority mangle; }; \
                 add rule inet marks c iif eth1 meta mark set 7"]);
        }
        lab.mallory.address("lo", "10.99.0.9/32", "fd99::9/128");
        let site = guarded(lab);
        site.guards(selector, NEAR, site.alice(), &[&site.lab.mallory]);
        site.guards(selector, ACROSS, site.alice(), &[&site.lab.mallory]);
        site.passes(selector, &site.lab.alice, ["10.99.0.9", "fd99::9"]);
        site.passes(selector, &site.lab.mallory, ALICE);
        site.holds();
    }
}

/// Alice and mallory on one wire, which the server bridges; between them a network that is none of the server's.
fn bridge(is_filtered: bool) {
    const GUESTS: [Addresses; 2] = [["10.78.0.2", "fd78::2"], ["10.78.0.3", "fd78::3"]];
    let lab = network();
    let _ = Command::new("modprobe").arg("br_netfilter").status();
    let server = &lab.server;
    ["eth1", "eth2"].iter().for_each(|port| server.ip(&format!("addr flush dev {port}")));
    server.ip("link add br0 type bridge");
    ["eth1", "eth2"].iter().for_each(|port| server.ip(&format!("link set {port} master br0")));
    server.ip("link set br0 up");
    server.address("br0", "10.77.1.1/24", "fd77:1::1/64");
    for key in ["iptables", "ip6tables"] {
        server.sysctl(&format!("net/bridge/bridge-nf-call-{key}"), if is_filtered { "1" } else { "0" });
    }
    lab.mallory.address("eth0", "10.77.1.3/24", "fd77:1::3/64");
    for (guest, [v4, v6]) in [&lab.alice, &lab.mallory].into_iter().zip(GUESTS) {
        guest.address("eth0", &format!("{v4}/24"), &format!("{v6}/64"));
    }
    let site = guarded(lab);
    let way = if is_filtered { "bridge with br_netfilter" } else { "bridge" };
    site.guards(way, NEAR, site.alice(), &[&site.lab.mallory]);
    site.passes(way, &site.lab.alice, GUESTS[1]);
    site.passes(way, &site.lab.mallory, GUESTS[0]);
    site.holds();
}

#[test]
fn a_bridge_is_guarded_and_its_guests_reach_each_other() {
    bridge(false);
}

#[test]
fn a_bridge_whose_frames_go_through_the_packet_filter_is_guarded_and_its_guests_reach_each_other() {
    bridge(true);
}

#[test]
fn a_macvlan_is_guarded_and_another_host_on_the_same_wire_is_not() {
    let lab = network();
    lab.server.ip("link add mv0 link eth1 type macvlan mode bridge");
    lab.server.ip("link set mv0 up");
    lab.server.address("mv0", "10.77.7.1/24", "fd77:7::1/64");
    lab.alice.address("eth0", "10.77.7.2/24", "fd77:7::2/64");
    let container = lab.host("container");
    lab.server.ip(&format!("link add mv1 link eth1 netns {} type macvlan mode bridge", container.name));
    container.ip("link set mv1 up");
    container.address("mv1", "10.77.7.3/24", "fd77:7::3/64");
    serve_too(&container);
    let site = guarded(lab);
    let alice = Client(&site.lab.alice, ["10.77.7.2", "fd77:7::2"]);
    site.guards("macvlan", ["10.77.7.1", "fd77:7::1"], alice, &[&container]);
    site.passes("macvlan", &site.lab.alice, ["10.77.7.3", "fd77:7::3"]);
    site.passes("macvlan", &container, alice.1);
    site.holds();
}

#[test]
fn a_port_that_a_container_publishes_is_guarded_and_the_container_reaches_others() {
    let lab = network();
    let container = lab.host("container");
    lab.server.uplink("docker0", &container, "172.17.0", "fd00:17:");
    lab.server.forward();
    publish(&lab.server, "fib daddr type local");
    serve_too(&container);
    container.serve(MAIL);
    let site = Site::new(lab);
    site.guards("published", NEAR, site.alice(), &[&site.lab.mallory]);
    site.guards("published", ACROSS, site.alice(), &[&site.lab.mallory]);
    site.passes("from a container", &container, ALICE);
    site.passes("to a container", &site.lab.alice, ["172.17.0.2", "fd00:17::2"]);
    site.holds();
}

/// As a container engine does; `at` says which packets are for this host.
fn publish(server: &Host, at: &str) {
    server.nft(&[&format!(
        "add table inet containers; \
         add chain inet containers c {{ type nat hook prerouting priority dstnat; }}; \
         add rule inet containers c {at} tcp dport {{ 22, 25, 80 }} dnat ip to 172.17.0.2; \
         add rule inet containers c {at} tcp dport {{ 22, 25, 80 }} dnat ip6 to fd00:17::2"
    )]);
}

#[test]
fn what_a_proxy_takes_from_those_who_connect_to_others_passes_by_redirect_and_meets_the_gate_by_tproxy_as_is_documented()
 {
    const FAR: Addresses = ["10.99.0.9", "fd99::9"];
    let lab = network();
    let server = &lab.server;
    for family in FAMILIES {
        let flag = family.flag();
        server.ip(&format!("{flag} rule add fwmark 1 lookup 100"));
        server.ip(&format!("{flag} route add local default dev lo table 100"));
        server.ip(&format!("{flag} route add {} via {}", family.pick(FAR[0], FAR[1]), family.mallory()));
    }
    server.serve_with(8080, |socket| setsockopt(socket, IpTransparent, &true).unwrap());
    let proxy = |kind: &str, [v4, v6]: [&str; 2]| {
        lab.server.nft(&[&format!(
            "add table inet proxy; delete table inet proxy; add table inet proxy; \
             add chain inet proxy c {{ type {kind} hook prerouting priority mangle; }}; \
             add rule inet proxy c iifname eth1 ip daddr {} tcp dport {{ 22, 80 }} {v4}; \
             add rule inet proxy c iifname eth1 ip6 daddr {} tcp dport {{ 22, 80 }} {v6}",
            FAR[0], FAR[1]
        )]);
    };
    let _daemon = lab.start();
    let arrives = |family: Family, port| talk(&lab.alice, family.pick(FAR[0], FAR[1]), port);
    proxy("nat", ["redirect to :8080"; 2]);
    assert!(FAMILIES.iter().all(|family| [SSH, WEB].iter().all(|port| arrives(*family, *port))));
    proxy("filter", ["tproxy ip to :8080 meta mark set 1", "tproxy ip6 to :8080 meta mark set 1"]);
    assert!(FAMILIES.iter().all(|family| arrives(*family, WEB)));
    let is_silent = |family: &Family| !lab.alice.reaches(family.pick(FAR[0], FAR[1]), SSH);
    assert!(FAMILIES.iter().all(is_silent), "what is documented has changed");
}

#[test]
fn on_a_vlan_a_host_is_guarded_and_what_it_forwards_passes() {
    let lab = network();
    lab.server.forward();
    for (host, interface, last) in [(&lab.server, "eth1", 1), (&lab.alice, "eth0", 2)] {
        host.ip(&format!("link add link {interface} name vlan7 type vlan id 7"));
        host.ip("link set vlan7 up");
        host.address("vlan7", &format!("10.77.7.{last}/24"), &format!("fd77:7::{last}/64"));
    }
    lab.alice.ip("route replace default via 10.77.7.1");
    lab.alice.ip("-6 route replace default via fd77:7::1");
    let site = guarded(lab);
    let alice = Client(&site.lab.alice, ["10.77.7.2", "fd77:7::2"]);
    site.guards("VLAN", ["10.77.7.1", "fd77:7::1"], alice, &[]);
    site.guards("VLAN, on another interface", ACROSS, alice, &[&site.lab.mallory]);
    site.passes("VLAN", &site.lab.alice, MALLORY);
    site.passes("VLAN", &site.lab.mallory, alice.1);
    site.holds();
}

/// Alice and mallory in one VRF of the server's, and beyond it another host.
fn vrf(is_bound: bool, has_default_route: bool) {
    let lab = network();
    let outside = lab.host("outside");
    let server = &lab.server;
    server.uplink("eth3", &outside, "10.77.3", "fd77:3:");
    if has_default_route {
        server.ip("route add default via 10.77.3.2");
        server.ip("-6 route add default via fd77:3::2");
    }
    server.ip("link add vrf0 type vrf table 10");
    server.ip("link set vrf0 up");
    server.enslave("eth1", "vrf0", "fd77:1::1/64");
    server.enslave("eth2", "vrf0", "fd77:2::1/64");
    server.address("vrf0", "10.77.9.1/32", "fd77:9::1/128");
    server.settle(3);
    server.forward();
    if is_bound {
        let bind = |socket: &OwnedFd| setsockopt(socket, BindToDevice, &"vrf0".into()).unwrap();
        SERVICES.into_iter().for_each(|port| server.serve_with(port, bind));
    } else {
        server.sysctl("net/ipv4/tcp_l3mdev_accept", "1");
        SERVICES.into_iter().for_each(|port| server.serve(port));
    }
    let site = Site::new(lab);
    let strangers = [&site.lab.mallory];
    let addresses = [
        ("VRF, on another interface of it", ACROSS),
        ("VRF, on the interface", NEAR),
        ("VRF, on the VRF's device", ["10.77.9.1", "fd77:9::1"]),
    ];
    // A default route makes no difference between them, and emulated machines are slow.
    for (name, address) in addresses.into_iter().take(if has_default_route { 1 } else { 3 }) {
        site.guards(name, address, site.alice(), &strangers);
    }
    site.passes("VRF", &site.lab.alice, MALLORY);
    site.passes("VRF", &site.lab.mallory, ALICE);
    if !is_bound {
        let outside = Client(&outside, ["10.77.3.2", "fd77:3::2"]);
        site.guards("outside of the VRF", ["10.77.3.1", "fd77:3::1"], outside, &[]);
    }
    site.holds();
}

#[test]
fn in_a_vrf_a_service_that_is_bound_to_it_is_guarded_and_what_is_forwarded_there_passes() {
    vrf(true, false);
}

#[test]
fn in_a_vrf_a_service_of_all_vrfs_is_guarded_and_what_is_forwarded_there_passes() {
    vrf(false, false);
}

#[test]
fn in_a_vrf_beside_a_default_route_a_bound_service_is_guarded_and_what_is_forwarded_passes() {
    vrf(true, true);
}

#[test]
fn in_a_vrf_beside_a_default_route_a_service_of_all_vrfs_is_guarded_and_what_is_forwarded_passes() {
    vrf(false, true);
}

impl Lab {
    /// Loaded before the start, this is named by all who look, and without it by nobody.
    fn all_name(&self, tables: &str, said: &[&str]) {
        let config = self.config().display().to_string();
        let check = || String::from_utf8(self.knockq(&self.server, &["check", "--config", &config]).stderr).unwrap();
        let has_all = |text: &str| said.iter().all(|part| text.contains(part));
        self.doctor().has("beyond", "ok", &[]);
        assert!(!has_all(&check()) && !has_all(&self.start().stop()), "what is not there is named");
        self.server.nft(&[tables]);
        let found = self.doctor();
        assert!(
            ["problem", "unknown"].iter().any(|state| found.finds("beyond", state, said)),
            "doctor does not name it"
        );
        let warned = check();
        assert!(warned.contains("warning: ") && has_all(&warned), "{warned}");
        let log = self.start().stop();
        assert!(has_all(&log), "{log}");
    }
}

#[test]
fn a_transparent_proxy_for_a_guarded_port_is_named_by_serve_check_and_doctor() {
    network().all_name(
        "add table inet proxy; add chain inet proxy c { type filter hook prerouting priority mangle; }; \
         add rule inet proxy c iifname eth1 tcp dport { 22, 80 } tproxy to :8080",
        &["tcp/22: table inet proxy has a transparent proxy take it", "tproxy to :8080", "trusted"],
    );
}

#[test]
fn in_a_vrf_a_port_that_is_passed_on_at_all_addresses_is_named_by_serve_check_and_doctor() {
    let lab = network();
    lab.server.ip("link add vrf0 type vrf table 10");
    lab.all_name(
        "add table inet containers; add chain inet containers c { type nat hook prerouting priority dstnat; }; \
         add rule inet containers c iifname eth1 tcp dport 22 dnat ip to 172.17.0.2",
        &["tcp/22: is passed on (dnat ip to 172.17.0.2)", "VRF (vrf0)", "fib daddr . iif type local"],
    );
}

#[test]
fn in_a_vrf_a_port_that_is_passed_on_is_guarded_at_the_interfaces_own_address_alone_as_is_documented() {
    let lab = network();
    let container = lab.host("container");
    let server = &lab.server;
    server.uplink("docker0", &container, "172.17.0", "fd00:17:");
    server.ip("link add vrf0 type vrf table 10");
    server.ip("link set vrf0 up");
    server.enslave("eth1", "vrf0", "fd77:1::1/64");
    server.enslave("eth2", "vrf0", "fd77:2::1/64");
    server.enslave("docker0", "vrf0", "fd00:17::1/64");
    server.settle(3);
    server.forward();
    publish(server, "iifname { eth1, eth2 }");
    serve_too(&container);
    container.serve(MAIL);
    let site = Site::new(lab);
    site.guards("published in a VRF", NEAR, site.alice(), &[]);
    let across = |family: Family| family.pick(ACROSS[0], ACROSS[1]);
    // The newest kernel (7.2) lets nothing through there.
    let is_open = FAMILIES.map(|family| talk(&site.lab.alice, across(family), SSH));
    assert!([[true; 2], [false; 2]].contains(&is_open), "what is documented has changed: {is_open:?}");
    // The remedy.
    site.lab.server.nft(&["delete table inet containers"]);
    publish(&site.lab.server, "fib daddr . iif type local");
    site.guards("published in a VRF at its interface", NEAR, site.alice(), &[]);
    assert!(!FAMILIES.iter().any(|family| site.lab.alice.reaches(across(*family), SSH)));
    site.holds();
}

#[test]
fn a_flowtable_is_named_by_serve_check_and_doctor_where_connections_are_to_be_ended() {
    let lab = Lab::with("open_for = \"6s\"\non_close = \"kill\"");
    lab.all_name(
        "add table inet fast; add flowtable inet fast f { hook ingress priority 0; devices = { eth1, eth2 }; }; \
         add chain inet fast c { type filter hook forward priority 0; }; \
         add rule inet fast c meta l4proto tcp flow add @f",
        &["table inet fast offloads what it forwards", "on_close = \"kill\"", "(tcp/22)"],
    );
}
