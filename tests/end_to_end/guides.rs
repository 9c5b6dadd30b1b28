//! The set-ups of docs/guide-server.md, from the very files that it shows, with the programs that it names, and traffic.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::lab::{Daemon, FAMILIES, Family, Host, Lab, echoes, eventually, knockq, succeeds};

/// Gives whoever runs this an `/etc` and a `/run` of its own, until its standard input ends.
const OWN_FILES: &str = "
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work
mount -t overlay -o lowerdir=/etc,upperdir=/mnt/upper,workdir=/mnt/work overlay /etc
mount -t tmpfs -o mode=755 tmpfs /run
echo ready
read _ || true";

/// Puts a `firewall-cmd` before the other that waits for as long as it takes. The other's 25 seconds are too few for an
/// emulated machine; firewalld does what it was asked all the same, and answers when it has done it.
const PATIENT_FIREWALL_CMD: &str = r#"
mkdir /run/bin
cat >/run/bin/firewall-cmd <<'END'
#!/bin/sh
/usr/bin/firewall-cmd "$@" 2>/run/said && exit
cat /run/said >&2
grep -q 'Did not receive a reply' /run/said || exit 1
until /usr/bin/firewall-cmd --state; do sleep 1; done
END
chmod +x /run/bin/firewall-cmd"#;

/// A host at which somebody administers programs that keep their state in `/etc` and `/run`.
struct Site<'a> {
    host: &'a Host,
    holder: Child,
    _until_dropped: ChildStdin,
    programs: Vec<Child>,
}

impl<'a> Site<'a> {
    fn new(host: &'a Host) -> Self {
        let mut holder = host.enter(|| {
            let mut command = Command::new("unshare");
            command.args(["-m", "sh", "-euc", OWN_FILES]).stdin(Stdio::piped()).stdout(Stdio::piped());
            command.spawn().unwrap()
        });
        let mut ready = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        assert_eq!(ready, "ready\n");
        let until_dropped = holder.stdin.take().unwrap();
        Self { host, holder, _until_dropped: until_dropped, programs: Vec::new() }
    }

    fn command(&self, script: &str) -> Command {
        let mut command = Command::new("nsenter");
        let script = format!("PATH=/run/bin:$PATH; {script}");
        command.args(["-m", "-t", &self.holder.id().to_string(), "sh", "-euc", &script]).stdin(Stdio::null());
        command
    }

    #[track_caller]
    fn sh(&self, script: &str) -> String {
        let output = self.host.enter(|| self.command(script).output().unwrap());
        let said = [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat();
        assert!(output.status.success(), "{script}: {said}");
        said
    }

    fn succeeds(&self, script: &str) -> bool {
        self.host.enter(|| self.command(script).output().unwrap()).status.success()
    }

    /// Starts a program that goes on.
    fn run(&mut self, program: &str) {
        let child = self.host.enter(|| {
            self.command(&format!("exec {program}")).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
        });
        self.programs.push(child);
    }
}

impl Drop for Site<'_> {
    fn drop(&mut self) {
        for program in self.programs.iter_mut().rev().chain([&mut self.holder]) {
            let _ = program.kill();
            let _ = program.wait();
        }
    }
}

fn example(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(path)
}

fn read(path: &str) -> String {
    fs::read_to_string(example(path)).unwrap()
}

/// A lab whose server has an example's configuration, but for its own key and addresses, and for how long doors are open.
fn lab_of(name: &str, more_services: &str, open_for: &str) -> Lab {
    let text = read(&format!("{name}/knockq.toml")) + more_services;
    let (server, services) = text.split_once("[services").unwrap();
    let soon = |line: &str| {
        if line.starts_with("open_for") { format!("open_for = \"{open_for}\"\n") } else { format!("{line}\n") }
    };
    let services: String = format!("[services{services}").lines().map(soon).collect();
    let lab = Lab::network();
    lab.configure(&services);
    server.lines().filter(|line| line.starts_with("trusted")).for_each(|line| lab.set(line));
    let names = services.lines().filter_map(|line| line.strip_prefix("[services.")?.strip_suffix(']'));
    lab.add_user("alice", &names.collect::<Vec<_>>());
    lab
}

/// Nothing answers, neither a segment nor an error.
fn is_silent(client: &Host, server: IpAddr, port: u16) -> bool {
    let attempt = || TcpStream::connect_timeout(&SocketAddr::new(server, port), Duration::from_millis(600));
    client.enter(attempt).is_err_and(|error| error.kind() == ErrorKind::TimedOut)
}

fn doors_are_shut(lab: &Lab) -> bool {
    let sets = ["open4", "open6"].map(|set| lab.server.nft(&["list", "set", "inet", "knockq", set]));
    sets.iter().all(|set| !set.contains("expires"))
}

/// Shut before; opens after a knock for its source alone; shuts again; what was established lives on. Then the host's
/// firewall is loaded again, and all of that is so once more.
#[track_caller]
fn a_knock_opens_and_the_firewall_may_be_loaded_again(lab: &Lab, service: &str, port: u16, reload: impl Fn()) {
    let mut lasting = Vec::new();
    for again in [false, true] {
        for family in FAMILIES {
            let server = family.server();
            for client in [&lab.alice, &lab.mallory] {
                eventually("the gate", || !client.reaches(server, port));
            }
            lab.knock(family, &[service]);
            lab.wait_for_door(family.alice(), port);
            lasting.push(lab.alice.gets_in(server, port));
            assert!(!lab.mallory.reaches(server, port), "for its source alone");
        }
        eventually("closing", || doors_are_shut(lab));
        for family in FAMILIES {
            assert!(!lab.alice.reaches(family.server(), port), "shut again");
        }
        if !again {
            reload();
        }
        assert!(lasting.iter_mut().all(echoes), "what was established lives on, again: {again}");
    }
}

/// The set-up of the guide's first sections: ssh is guarded, web is open to all, and all else is the firewall's to shut.
fn beside_a_firewall(set_up: impl Fn(&mut Site), reload: &str, leaves_our_table_alone: bool) {
    let lab = lab_of("minimal", "[services.mail]\nports = [\"tcp/25\"]\n", "15s");
    [22, 25, 80, 8080].iter().for_each(|port| lab.server.serve(*port));
    let mut site = Site::new(&lab.server);
    set_up(&mut site);
    let others = || {
        for (family, client) in FAMILIES.into_iter().flat_map(|family| [(family, &lab.alice), (family, &lab.mallory)]) {
            client.gets_in(family.server(), 80);
            assert!(
                is_silent(client, family.server(), 8080),
                "what the host's firewall shuts, as silent as a knock port"
            );
        }
    };
    for family in FAMILIES {
        lab.mallory.gets_in(family.server(), 22);
    }
    others();
    let daemon = lab.start();
    others();
    // Without what the sets hold: the kernel remembers for a while what was let in.
    let listed = || lab.server.nft(&["-a", "-t", "list", "table", "inet", "knockq"]);
    a_knock_opens_and_the_firewall_may_be_loaded_again(&lab, "ssh", 22, || {
        let before = listed();
        site.sh(reload);
        assert!(!leaves_our_table_alone || listed() == before, "its reload is none of our table's business");
        others();
    });
    for family in FAMILIES {
        lab.knock(family, &["mail"]);
        lab.wait_for_door(family.alice(), 25);
        assert!(!lab.alice.reaches(family.server(), 25), "a door leads to the host's rules, not past them");
    }
    taken_away(&lab, daemon, 22);
    others();
}

/// As the guide's last section says.
fn taken_away(lab: &Lab, daemon: Daemon, port: u16) {
    daemon.stop();
    lab.server.sh("nft delete table inet knockq");
    for family in FAMILIES {
        lab.mallory.gets_in(family.server(), port);
    }
}

fn load(site: &Site, path: &str) {
    site.sh(&format!("cp {} /etc/nftables.conf; nft -f /etc/nftables.conf", example(path).display()));
}

fn type_in(site: &Site, path: &str) {
    site.sh(&format!(". {}", example(path).display()));
}

#[test]
fn beside_a_plain_nftables_conf_the_gate_stands_and_comes_back_after_its_flush() {
    beside_a_firewall(|site| load(site, "minimal/nftables.conf"), "nft -f /etc/nftables.conf", false);
}

#[test]
fn beside_ufw_the_gate_stands_and_a_reload_does_not_touch_it() {
    beside_a_firewall(|site| type_in(site, "minimal/ufw.sh"), "ufw reload", true);
}

#[test]
fn beside_firewalld_the_gate_stands_and_a_reload_does_not_touch_it() {
    let start = |site: &mut Site| {
        // Without polkit, which this bus could not start: root is asked for no more.
        site.sh("mkdir /run/dbus; mount -t tmpfs tmpfs /usr/share/dbus-1/system-services");
        site.run("dbus-daemon --system --nofork --nopidfile");
        eventually("the bus", || site.succeeds("test -S /run/dbus/system_bus_socket"));
        site.run("firewalld --nofork --nopid");
        eventually("firewalld", || site.succeeds("firewall-cmd --state"));
        site.sh(PATIENT_FIREWALL_CMD);
        type_in(site, "minimal/firewalld.sh");
    };
    beside_a_firewall(start, "firewall-cmd --reload", true);
}

#[test]
fn a_published_port_of_a_container_is_guarded_and_its_others_are_not() {
    let lab = lab_of("containers", "", "15s");
    let container = lab.host("container");
    lab.server.uplink("docker0", &container, "172.17.0", "fd00:17:");
    // The other container.
    container.address("eth0", "172.17.0.3/24", "fd00:17::3/64");
    lab.server.forward();
    lab.server.settle(3);
    container.serve(80);
    lab.server.serve(22);
    lab.alice.serve(9000);
    let site = Site::new(&lab.server);
    load(&site, "minimal/nftables.conf"); // which lets in neither 8080 nor 8081: that is not asked
    let publish = || lab.server.nft(&["-f", example("containers/published.nft").to_str().unwrap()]);
    publish();
    let daemon = lab.start();
    let others = || {
        for family in FAMILIES {
            lab.mallory.gets_in(family.server(), 8081);
            container.gets_in(family.alice(), 9000);
            container.gets_in(family.pick("172.17.0.1", "fd00:17::1"), 22);
            eventually("the gate", || !lab.alice.reaches(family.server(), 22));
        }
    };
    others();
    a_knock_opens_and_the_firewall_may_be_loaded_again(&lab, "wiki", 8080, || {
        site.sh("nft -f /etc/nftables.conf");
        publish();
        others();
    });
    taken_away(&lab, daemon, 8080);
}

#[test]
fn a_router_guards_a_host_inside_by_a_port_of_its_own() {
    let lab = lab_of("router", "", "15s");
    let inside = lab.host("inside");
    lab.server.uplink("lan0", &inside, "192.168.7", "fd00:7:");
    lab.server.forward();
    lab.server.settle(3);
    inside.serve(22);
    lab.alice.serve(9000);
    let site = Site::new(&lab.server);
    load(&site, "router/nftables.conf");
    for family in FAMILIES {
        lab.mallory.gets_in(family.server(), 2222);
    }
    let daemon = lab.start();
    let others = || {
        for family in FAMILIES {
            inside.gets_in(family.alice(), 9000);
            assert!(!lab.alice.reaches(family.pick("192.168.7.2", "fd00:7::2"), 22), "past the router's address");
        }
    };
    others();
    for family in FAMILIES {
        let server = SocketAddr::new(family.alice(), 9000);
        let own = SocketAddr::new(
            if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() },
            2222,
        );
        let connect = || {
            let domain = if server.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
            let socket = socket_with(domain, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
            rustix::net::sockopt::set_socket_reuseaddr(&socket, true).unwrap(); // the connection of before may not be forgotten yet
            rustix::net::bind(&socket, &own).unwrap();
            rustix::net::connect(&socket, &server)
        };
        assert_eq!(inside.enter(connect), Ok(()), "from a port with the number of the guarded one");
    }
    a_knock_opens_and_the_firewall_may_be_loaded_again(&lab, "inside", 2222, || {
        site.sh("nft -f /etc/nftables.conf");
        others();
    });
    for family in FAMILIES {
        let connected = lab.knockq(&lab.alice, &["connect", &family.server().to_string(), "2222"]);
        assert_eq!(succeeds(&connected), "welcome to 22\n");
    }
    taken_away(&lab, daemon, 2222);
}

/// The key pair of one end of a tunnel, private and public.
fn wireguard_keys() -> (String, String) {
    let made =
        Command::new("sh").args(["-euc", "key=$(wg genkey); echo $key; echo $key | wg pubkey"]).output().unwrap();
    let made = String::from_utf8(made.stdout).unwrap();
    let (private, public) = made.trim_end().split_once('\n').unwrap();
    (private.to_owned(), public.to_owned())
}

/// Both ends' files, with real keys, and the server's address of this family in the client's.
fn tunnel(server: &(String, String), alice: &(String, String), family: Family) -> [String; 2] {
    let endpoint = SocketAddr::new(family.server(), 51820).to_string();
    ["wg0.conf", "wg0-alice.conf"].map(|file| {
        let text = read(&format!("services/{file}"));
        let text = text.replace("SERVERS-PRIVATE-KEY", &server.0).replace("SERVERS-PUBLIC-KEY", &server.1);
        let text = text.replace("ALICES-PRIVATE-KEY", &alice.0).replace("ALICES-PUBLIC-KEY", &alice.1);
        text.replace("192.0.2.1:51820", &endpoint).replace("vpn -4", &format!("vpn {}", family.flag()))
    })
}

fn write(site: &Site, path: &str, text: &str) {
    site.sh(&format!("umask 077; mkdir -p \"$(dirname {path})\"; cat >{path} <<'END'\n{text}\nEND"));
}

#[test]
fn ssh_mail_and_wireguard_are_behind_one_set_of_knock_ports() {
    let lab = lab_of("services", "", "30s");
    [22, 25, 465, 993].iter().for_each(|port| lab.server.serve(*port));
    let site = Site::new(&lab.server);
    load(&site, "services/nftables.conf");
    let daemon = lab.start();
    let shut = |lab: &Lab, family: Family, ports: &[u16]| {
        for port in ports {
            assert!(
                !lab.alice.reaches(family.server(), *port) && !lab.mallory.reaches(family.server(), *port),
                "{port}"
            );
        }
    };
    for family in FAMILIES {
        lab.mallory.gets_in(family.server(), 25);
        shut(&lab, family, &[22, 465, 993]);
        lab.knock(family, &["mail"]);
        for port in [465, 993] {
            lab.wait_for_door(family.alice(), port);
            lab.alice.gets_in(family.server(), port);
            assert!(!lab.mallory.reaches(family.server(), port), "for its source alone");
        }
        shut(&lab, family, &[22]);
    }
    a_knock_opens_and_the_firewall_may_be_loaded_again(&lab, "ssh", 22, || {
        site.sh("nft -f /etc/nftables.conf");
    });
    FAMILIES.iter().for_each(|family| a_tunnel_is_made(&lab, &site, *family));
    taken_away(&lab, daemon, 465);
}

/// Over the server's address of this family; both families go through the tunnel.
fn a_tunnel_is_made(lab: &Lab, site: &Site, family: Family) {
    let (server, alice) = (wireguard_keys(), wireguard_keys());
    let [servers, alices] = tunnel(&server, &alice, family);
    write(site, "/etc/wireguard/wg0.conf", &servers);
    site.sh("wg-quick up wg0");
    let was_met = || !site.sh("wg show wg0 latest-handshakes").trim_end().ends_with("\t0");
    let inside = FAMILIES.map(|family| family.pick("10.8.0.1", "fd00:8::1"));
    let answers = |client: &Site| inside.iter().all(|to| client.succeeds(&format!("busybox ping -c 1 -W 2 {to}")));

    // With alice's very file, but without a knock.
    let thief = Site::new(&lab.mallory);
    let without: Vec<&str> = alices.lines().filter(|line| !line.starts_with("PreUp")).collect();
    write(&thief, "/etc/wireguard/wg0.conf", &without.join("\n"));
    thief.sh("wg-quick up wg0");
    assert!(!answers(&thief) && !answers(&thief) && !was_met(), "shut before, and shut to others");

    let client = Site::new(&lab.alice);
    write(&client, "/etc/wireguard/wg0.conf", &alices);
    let program = knockq();
    let path = program.parent().unwrap().display();
    client.sh(&format!("export HOME={} PATH={path}:$PATH; wg-quick up wg0", lab.home("alice").display()));
    eventually("the tunnel", || answers(&client));
    assert!(was_met() && !answers(&thief));
    for to in inside {
        lab.alice.gets_in(to, 22);
    }
    eventually("closing", || doors_are_shut(lab));
    // What he sends before the flushed gate is back would be let in, where the kernel is older than 6.9.
    thief.sh("wg-quick down wg0");
    site.sh("nft -f /etc/nftables.conf");
    eventually("the gate", || !lab.mallory.reaches(family.server(), 22));
    eventually("the tunnel", || answers(&client));
    thief.sh("wg-quick up wg0");
    assert!(!answers(&thief), "for its source alone");
    for host in [&client, &thief, site] {
        host.sh("wg-quick down wg0");
    }
}
