//! Connections of others to this host's ports, as its sockets know them before a gate stands there.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::{fs, io};

use ipnet::IpNet;

use super::Lister;
use crate::service::{Port, Transport};

/// TCP connections of this host's sockets: the other end, and ours.
///
/// # Errors
/// When /proc does not tell.
pub fn sessions() -> io::Result<Vec<(SocketAddr, SocketAddr)>> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(fs::read_to_string);
    let mut sessions = Vec::new();
    for table in tables {
        match table {
            Ok(table) => sessions.extend(table.lines().filter_map(session)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {} // no IPv6
            Err(error) => return Err(error),
        }
    }
    Ok(sessions)
}

/// A line of these tables: number, our address, the other's, state, and more (proc_net_tcp.rst of the kernel).
fn session(line: &str) -> Option<(SocketAddr, SocketAddr)> {
    const ESTABLISHED: &str = "01";
    let mut words = line.split_ascii_whitespace().skip(1);
    let (ours, other) = (words.next().and_then(end_of_session)?, words.next().and_then(end_of_session)?);
    (words.next()? == ESTABLISHED).then_some((other, ours))
}

/// An address in words of 32 bits as this machine orders their bytes, and a port, all in hexadecimal.
fn end_of_session(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| Some(u32::from_str_radix(address.get(at..at.checked_add(8)?)?, 16).ok()?.to_ne_bytes());
    let address = if address.len() == 8 {
        IpAddr::from(word(0)?)
    } else {
        let words = [word(0)?, word(8)?, word(16)?, word(24)?];
        IpAddr::from(<[u8; 16]>::try_from(words.concat()).ok()?)
    };
    Some(SocketAddr::new(address.to_canonical(), port))
}

/// Who is connected to these ports, and not from a trusted network. `others` are connections besides those of this host's sockets.
pub fn connected(
    ports: &[Port],
    trusted: &[IpNet],
    others: impl Iterator<Item = (IpAddr, Port)>,
) -> BTreeSet<(IpAddr, Port)> {
    let of_sockets = sessions().unwrap_or_default().into_iter();
    let of_sockets =
        of_sockets.map(|(client, server)| (client.ip(), Port { transport: Transport::Tcp, number: server.port() }));
    let mut connected: BTreeSet<(IpAddr, Port)> = of_sockets.chain(others).collect();
    connected.retain(|(source, port)| {
        ports.contains(port) && !source.is_loopback() && !trusted.iter().any(|network| network.contains(source))
    });
    connected
}

/// Who of these has no door: what is cut where connections end with their door.
pub fn without_door(mut connected: BTreeSet<(IpAddr, Port)>, doors: &mut impl Lister) -> BTreeSet<(IpAddr, Port)> {
    if !connected.is_empty() {
        let doors = doors.open_doors().unwrap_or_default();
        let doors: BTreeSet<_> = doors.iter().map(|open| (open.what.source, open.what.port)).collect();
        connected.retain(|end| !doors.contains(end));
    }
    connected
}

#[cfg(test)]
mod tests {
    use super::session;

    #[test]
    fn an_established_connection_is_read_from_the_kernels_tables() {
        // As a little-endian machine shows them.
        let [v4, v6] = [
            "   1: 0A00000A:0016 01021FAC:C3A1 01 00000000:00000000 02:000A7214 00000000     0        0 17 2 0 20 4 30 10 -1",
            "   0: 0000000000000000FFFF00000100000A:0016 0000000000000000FFFF00000200000A:9C40 01 00000000:00000000 00:0 0",
        ];
        if cfg!(target_endian = "little") {
            let ends = |client: &str, server: &str| Some((client.parse().unwrap(), server.parse().unwrap()));
            assert_eq!(session(v4), ends("172.31.2.1:50081", "10.0.0.10:22"));
            assert_eq!(session(v6), ends("10.0.0.2:40000", "10.0.0.1:22"), "of a socket of both families");
        }
        assert_eq!(session(&v4.replace(" 01 ", " 06 ")), None, "waits to be forgotten");
        assert_eq!(session("  sl  local_address rem_address   st tx_queue"), None);
        for end in 0..50 {
            assert_eq!(session(&v4[..end.min(33)]), None);
        }
    }
}
