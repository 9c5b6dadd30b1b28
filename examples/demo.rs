//! A knock opens a real port on a real kernel, step by step. Run it with `make demo`.
//!
//! Two network namespaces are the hosts. Everything else is what it is in earnest: `knockq` itself, nft, a TCP service.

#[path = "../tests/support/lab.rs"]
mod lab;

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use lab::{Capture, Daemon, FAMILIES, Family, Lab, echoes, hex};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with};

/// A second address of the client, for the thief who copied the knock.
const THIEF: [&str; 2] = ["10.77.1.66", "fd77:1::66"];

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|_| {})); // the reason is told once, in the last line
    match std::panic::catch_unwind(demo) {
        Ok(()) => {
            println!("\ndemo: ok");
            ExitCode::SUCCESS
        }
        Err(reason) => {
            let reason = reason.downcast_ref::<String>().map(String::as_str).or(reason.downcast_ref::<&str>().copied());
            println!("\ndemo: failed: {}", reason.unwrap_or("see above"));
            ExitCode::FAILURE
        }
    }
}

fn demo() {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    println!("Two hosts, client and server, joined by a wire, on Linux {}", release.trim());

    step("The server guards port 22, on which a service listens, and knows one user");
    let lab = Lab::network();
    lab.alice.ip(&format!("addr add {}/24 dev eth0", THIEF[0]));
    // not preferred, so that it is used only where it is asked for
    lab.alice.ip(&format!("addr add {}/64 dev eth0 nodad preferred_lft 0", THIEF[1]));
    lab.server.serve(22);
    println!("  server$ knockq init --protect tcp/22");
    lab.configure("[services.ssh]\nports = [\"tcp/22\"]\nopen_for = \"6s\"\n");
    println!("  client$ knockq keygen");
    println!("  server$ knockq user add alice --key ... --allow ssh > alice.profile");
    println!("  client$ knockq host add server alice.profile");
    lab.add_user("alice", &["ssh"]);
    println!("  server$ knockq serve");
    let mut daemon = lab.start();
    show_log(&daemon, 0);

    for family in FAMILIES {
        let (client, server) = (family.alice(), family.server());
        println!("\n--- {family:?}: client {client}, server {server} ---");
        knock_and_connect(&lab, &mut daemon, family);
    }

    step("The daemon stops; the gate stays shut");
    daemon.stop();
    for family in FAMILIES {
        connect(&lab, family, family.alice(), false);
    }
}

fn knock_and_connect(lab: &Lab, daemon: &mut Daemon, family: Family) {
    let (client, server) = (family.alice(), family.server());
    let thief = family.pick(THIEF[0], THIEF[1]);

    step("The port is dead: a connection meets silence");
    connect(lab, family, client, false);

    step("One knock");
    println!("  client$ knockq send server ssh {} --source {client}", family.flag());
    let lines = daemon.log().lines().count();
    let capture = Capture::start(&lab.alice, "eth0", lab::is_tcp);
    lab.knock(family, &["--source", &client.to_string()]);
    daemon.wait_for(&format!("granted user=alice service=ssh source={client}"));
    let start = Instant::now();
    let packets = capture.packets();
    let [knock] = packets.as_slice() else { panic!("{} packets went by instead of one", packets.len()) };
    show_packet(lab, knock);
    show_log(daemon, lines);

    step("The connection succeeds, and the service's banner appears");
    let mut connection = connect(lab, family, client, true).expect("it was checked");

    step("The same bytes again, from the same address and from a thief's, open nothing");
    let lines = daemon.log().lines().count();
    send(lab, server, knock);
    lab.alice.oracle_says(&["replay", "--from", &thief.to_string(), &hex(knock)]);
    daemon.wait_for("reason=replayed user=alice");
    thread::sleep(Duration::from_millis(500));
    show_log(daemon, lines);
    connect(lab, family, thief, false);
    assert_eq!(lab.door(thief, 22), None, "a replay opened a door");

    step("The door closes by itself, 6 s after the knock");
    while lab.door(client, 22).is_some() {
        assert!(start.elapsed() < Duration::from_secs(30), "the door does not close");
        thread::sleep(Duration::from_millis(100));
    }
    connect(lab, family, client, false);

    step("The connection that was made lives on");
    assert!(echoes(&mut connection), "the established connection is dead");
    println!("  client> hello\n  server> hello");
}

fn step(what: &str) {
    println!("\n* {what}");
}

/// Connects from one of the client's addresses to the guarded port, which must answer, or must not.
fn connect(lab: &Lab, family: Family, from: IpAddr, is_open: bool) -> Option<TcpStream> {
    let server = family.server();
    let connection = lab.alice.connect_from(from, server, 22);
    let answer = if connection.is_some() { "\"welcome to 22\"" } else { "silence" };
    println!("  client, from {from}, connects to {server} port 22: {answer}");
    assert_eq!(connection.is_some(), is_open, "the port is not as it should be");
    connection
}

fn show_log(daemon: &Daemon, from_line: usize) {
    for line in daemon.log().lines().skip(from_line) {
        println!("  server| {line}");
    }
}

fn show_packet(lab: &Lab, packet: &[u8]) {
    let file = lab.directory.path.join("knock.pcap");
    // A capture file of raw IP packets (LINKTYPE_RAW, 101) that holds this one.
    let length = u32::try_from(packet.len()).unwrap().to_le_bytes();
    let header = [0xa1b2_c3d4_u32.to_le_bytes(), [2, 0, 4, 0], [0; 4], [0; 4], 65535_u32.to_le_bytes(), [101, 0, 0, 0]];
    std::fs::write(&file, [&header.concat(), &[0; 8][..], &length, &length, packet].concat()).unwrap();
    let shown = Command::new("tcpdump").args(["-nn", "-t", "-r"]).arg(&file).output().unwrap();
    println!("  wire|   {}", String::from_utf8_lossy(&shown.stdout).trim());
    println!("  wire|   {}", hex(packet));
}

fn send(lab: &Lab, server: IpAddr, packet: &[u8]) {
    let family = if server.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    lab.alice.enter(|| {
        let socket = socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW)).unwrap();
        sendto(&socket, packet, SendFlags::empty(), &SocketAddr::new(server, 0)).unwrap();
    });
}
