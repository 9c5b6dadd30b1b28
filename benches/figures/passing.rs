//! What the gate costs a packet of a connection that was let in.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use crate::lab::{Family, Host, Lab, eventually};
use crate::{Row, Scale};

/// What stands before the port.
const GATES: [(&str, Option<&str>); 3] =
    [("no gate", None), ("a gate", Some("keep")), ("a gate, on_close = \"kill\"", Some("kill"))];

pub fn rows(scale: &Scale) -> Vec<Row> {
    [Family::V4, Family::V6].into_iter().flat_map(|family| family_rows(scale, family)).collect()
}

/// The best of three alternating runs of each.
fn family_rows(scale: &Scale, family: Family) -> Vec<Row> {
    let mut best = [0.0_f64; 3];
    for _ in 0..3 {
        for (best, (_, on_close)) in best.iter_mut().zip(GATES) {
            *best = best.max(rate(family, on_close, scale.flood / 10));
        }
    }
    let figure = |gate: &str| format!("datagrams of an exchange that was let in, from one thread, {family:?}, {gate}");
    let row = |((gate, _), rate): ((&str, _), f64)| {
        Row(figure(gate), "", format!("{rate:.0} a second, {:.2} of those without", rate / best[0]))
    };
    GATES.into_iter().zip(best).map(row).collect()
}

fn rate(family: Family, on_close: Option<&str>, time: Duration) -> f64 {
    let lab = Lab::network();
    let services = "[services.talk]\nports = [\"udp/7001\"]\nopen_for = \"1h\"\n";
    lab.configure(&format!("{services}on_close = \"{}\"\n", on_close.unwrap_or("keep")));
    lab.add_user("alice", &["talk"]);
    let daemon = on_close.map(|_| lab.start());
    let socket = |host: &Host| {
        let socket = host.enter(|| UdpSocket::bind(("::", 7001))).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket
    };
    let (server, client) = (socket(&lab.server), socket(&lab.alice));
    client.connect(SocketAddr::new(family.server(), 7001)).unwrap();
    if daemon.is_some() {
        lab.knock(family, &["talk"]);
        let is_open = || lab.server.nft(&["list", "table", "inet", "knockq"]).contains(&family.alice().to_string());
        eventually("the door", is_open);
    }
    client.send(b"hello").unwrap();
    let (_, peer) = server.recv_from(&mut [0; 5]).unwrap();
    server.send_to(b"hello", peer).unwrap();
    client.recv(&mut [0; 5]).unwrap();
    let (begun, mut sent) = (Instant::now(), 0_u32);
    while begun.elapsed() < time {
        for _ in 0..100 {
            client.send(b"hello").unwrap();
        }
        sent += 100;
    }
    f64::from(sent) / begun.elapsed().as_secs_f64()
}
