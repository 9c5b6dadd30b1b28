//! Who listens on this host, as the kernel tells in /proc/net.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::service::{Port, Transport};

/// A socket that takes what comes from anywhere.
pub(super) struct Listener {
    /// Where.
    pub(super) port: Port,
    /// On which of this host's addresses; an unspecified one stands for all.
    pub(super) address: IpAddr,
}

impl Listener {
    /// Whether others than this host itself reach it.
    pub(super) fn is_reachable(&self) -> bool {
        !self.address.to_canonical().is_loopback()
    }
}

/// Where the kernel lists sockets, and in which state one is that waits: TCP_LISTEN, or TCP_CLOSE of one that is bound alone.
const TABLES: [(&str, Transport, &str); 4] = [
    ("/proc/net/tcp", Transport::Tcp, "0A"),
    ("/proc/net/tcp6", Transport::Tcp, "0A"),
    ("/proc/net/udp", Transport::Udp, "07"),
    ("/proc/net/udp6", Transport::Udp, "07"),
];

/// All of this network namespace, of either family.
pub(super) fn listeners() -> Vec<Listener> {
    let read = |(path, transport, waits): (&str, Transport, &str)| {
        let text = fs::read_to_string(path).unwrap_or_default();
        text.lines().filter_map(|line| listener(line, transport, waits)).collect::<Vec<_>>()
    };
    TABLES.into_iter().flat_map(read).collect()
}

/// `sl local_address rem_address st ...`, of a socket that waits.
fn listener(line: &str, transport: Transport, waits: &str) -> Option<Listener> {
    let mut fields = line.split_whitespace().skip(1);
    let (address, number) = fields.next()?.rsplit_once(':')?;
    let number = u16::from_str_radix(number, 16).ok()?;
    (fields.nth(1)? == waits).then_some(())?;
    Some(Listener { port: Port { transport, number }, address: address_of(address)? })
}

/// Words of 32 bits, each as this machine has it in memory.
fn address_of(text: &str) -> Option<IpAddr> {
    let word = |place: usize| {
        let digits = text.get(8 * place..8 * place + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    if text.len() == 8 {
        return Some(Ipv4Addr::from(word(0)?).into());
    }
    let bytes = [word(0)?, word(1)?, word(2)?, word(3)?].concat();
    Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::listeners;
    use crate::service::Transport;

    #[test]
    fn sockets_that_wait_are_seen_with_their_address() {
        for address in ["127.0.0.1:0", "[::1]:0", "0.0.0.0:0", "[::]:0"] {
            let (tcp, udp) = (TcpListener::bind(address).unwrap(), UdpSocket::bind(address).unwrap());
            for (transport, bound) in
                [(Transport::Tcp, tcp.local_addr().unwrap()), (Transport::Udp, udp.local_addr().unwrap())]
            {
                let all = listeners();
                let found = all.iter().find(|one| {
                    (one.port.transport, one.port.number, one.address) == (transport, bound.port(), bound.ip())
                });
                assert_eq!(found.unwrap().is_reachable(), !bound.ip().is_loopback());
            }
        }
    }
}
