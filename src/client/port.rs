//! A source port as connect() would choose it, held until the knock is done.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{IpBindAddressNoPort, TcpFastOpenConnect};
use rustix::io::Errno;
use rustix::net::sockopt::{ip_mtu, ip_ttl, ipv6_mtu, ipv6_unicast_hops};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, getsockname, socket_with};
use thiserror::Error;

use crate::packet::KernelSettings;

/// `TCP_FASTOPEN_NO_COOKIE`, which nix does not have.
#[derive(Clone, Copy, Debug)]
struct TcpFastOpenNoCookie;
nix::setsockopt_impl!(
    TcpFastOpenNoCookie,
    libc::IPPROTO_TCP,
    libc::TCP_FASTOPEN_NO_COOKIE,
    bool,
    nix::sys::socket::sockopt::SetBool
);

/// Random ports that are tried where the kernel does not choose one.
const BIND_TRIES: usize = 64;

/// Top bit of a flow label that no flow label manager gave out (`IPV6_FLOWLABEL_STATELESS_FLAG`).
const FLOW_LABEL_STATELESS: u32 = 0x8_0000;

/// Why there is no port, or no telling what the kernel would send.
#[derive(Debug, Error)]
pub enum PortError {
    /// No way leads there.
    #[error("{destination}: {cause}")]
    NoRoute {
        /// Where to.
        destination: IpAddr,
        /// What the kernel said.
        cause: io::Error,
    },
    /// The own address that was asked for cannot be used.
    #[error("source {source_address}: {cause}")]
    Source {
        /// The address.
        source_address: IpAddr,
        /// What the kernel said.
        cause: io::Error,
    },
    /// A setting of the kernel cannot be read.
    #[error("{}: {cause}", path.display())]
    Setting {
        /// Its file.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// The socket failed.
    #[error("socket: {0}")]
    Socket(#[from] io::Error),
}

/// A socket that holds a source port and sends nothing: an RST that comes back is ignored, closing it is silent.
pub struct HeldPort {
    /// Own address and port.
    pub local: SocketAddr,
    /// Where the knock goes.
    pub destination: SocketAddr,
    _port: OwnedFd,
    /// A UDP socket on the same route, to ask about it.
    route: OwnedFd,
}

impl HeldPort {
    /// Lets the kernel choose route, source address and source port as for a connection, without making one.
    ///
    /// # Errors
    /// [`PortError`].
    pub fn new(destination: SocketAddr, source: Option<IpAddr>) -> Result<Self, PortError> {
        let route = socket(&destination, SocketType::DGRAM)?;
        if let Some(source) = source {
            bind_to(&route, source)?;
        }
        let source_address = connect_to(&route, destination)?.ip();
        let port = socket(&destination, SocketType::STREAM)?;
        let local = if number("net/ipv4/tcp_fastopen")? & 1 == 1 {
            port_of_connect(&port, source, destination)?
        } else {
            port_by_hand(&port, source_address)?
        };
        Ok(Self { local, destination, _port: port, route })
    }

    /// What the kernel's SYN on this route is made of.
    ///
    /// # Errors
    /// When a setting cannot be read.
    pub fn kernel_settings(&self) -> Result<KernelSettings, PortError> {
        let (mtu, hop_limit) = if self.destination.is_ipv4() {
            (ip_mtu(&self.route), ip_ttl(&self.route))
        } else {
            (ipv6_mtu(&self.route), ipv6_unicast_hops(&self.route).map(u32::from))
        };
        let [_, receive_buffer, receive_buffer_max] = numbers("net/ipv4/tcp_rmem")?;
        Ok(KernelSettings {
            timestamps: number("net/ipv4/tcp_timestamps")? != 0,
            sack: number("net/ipv4/tcp_sack")? != 0,
            window_scaling: number("net/ipv4/tcp_window_scaling")? != 0,
            ecn: number("net/ipv4/tcp_ecn")? == 1,
            receive_buffer,
            // Within a namespace net.core is not there; then tcp_rmem decides.
            receive_buffer_max: receive_buffer_max.max(number("net/core/rmem_max").unwrap_or(0)),
            hop_limit: u8::try_from(hop_limit.map_err(io::Error::from)?).unwrap_or(u8::MAX),
            mtu: mtu.map_err(io::Error::from)?,
        })
    }

    /// Random bits for the field that the kernel fills at random: the IPv4 identification or the IPv6 flow label.
    ///
    /// # Errors
    /// When there is no randomness, or a setting cannot be read.
    pub fn filler(&self) -> Result<u32, PortError> {
        let random = getrandom::u32().map_err(io::Error::other)?;
        if self.destination.is_ipv4() {
            return Ok(random);
        }
        let is_labelled = matches!(number("net/ipv6/auto_flowlabels")?, 1 | 3);
        let range = if number("net/ipv6/flowlabel_state_ranges")? == 1 { FLOW_LABEL_STATELESS } else { 0 };
        Ok(if is_labelled { random | range } else { 0 })
    }
}

/// A connect() that waits for data before it sends its SYN (fast open without a cookie) has chosen everything by then.
fn port_of_connect(socket: &OwnedFd, source: Option<IpAddr>, destination: SocketAddr) -> Result<SocketAddr, PortError> {
    setsockopt(socket, TcpFastOpenConnect, &true).map_err(io::Error::from)?;
    setsockopt(socket, TcpFastOpenNoCookie, &true).map_err(io::Error::from)?;
    if let Some(source) = source {
        setsockopt(socket, IpBindAddressNoPort, &true).map_err(io::Error::from)?;
        bind_to(socket, source)?;
    }
    connect_to(socket, destination)
}

/// Where fast open is off: a random port of the parity that connect() takes.
fn port_by_hand(socket: &OwnedFd, source: IpAddr) -> Result<SocketAddr, PortError> {
    let [low, high] = numbers("net/ipv4/ip_local_port_range")?;
    for _ in 0..BIND_TRIES {
        let place = getrandom::u32().map_err(io::Error::other)? % (high.saturating_sub(low) / 2).max(1);
        let local = SocketAddr::new(source, u16::try_from(low + 2 * place).unwrap_or(u16::MAX));
        match bind(socket, &local) {
            Ok(()) => return Ok(local),
            Err(Errno::ADDRINUSE) => {}
            Err(errno) => return Err(io::Error::from(errno).into()),
        }
    }
    Err(io::Error::from(io::ErrorKind::AddrInUse).into())
}

fn socket(destination: &SocketAddr, kind: SocketType) -> Result<OwnedFd, PortError> {
    let family = if destination.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    Ok(socket_with(family, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None).map_err(io::Error::from)?)
}

fn bind_to(socket: &OwnedFd, source_address: IpAddr) -> Result<(), PortError> {
    bind(socket, &SocketAddr::new(source_address, 0))
        .map_err(|errno| PortError::Source { source_address, cause: errno.into() })
}

fn connect_to(socket: &OwnedFd, destination: SocketAddr) -> Result<SocketAddr, PortError> {
    match connect(socket, &destination) {
        Ok(()) | Err(Errno::INPROGRESS) => {}
        Err(errno) => return Err(PortError::NoRoute { destination: destination.ip(), cause: errno.into() }),
    }
    let local = getsockname(socket).map_err(io::Error::from)?;
    Ok(SocketAddr::try_from(local).map_err(io::Error::from)?)
}

fn number(setting: &str) -> Result<u32, PortError> {
    let [number] = numbers(setting)?;
    Ok(number)
}

fn numbers<const N: usize>(setting: &str) -> Result<[u32; N], PortError> {
    let path = Path::new("/proc/sys").join(setting);
    let read = fs::read_to_string(&path).and_then(|text| {
        let numbers: Result<Vec<u32>, _> = text.split_whitespace().map(str::parse).collect();
        let numbers = numbers.ok().and_then(|numbers| numbers.try_into().ok());
        numbers.ok_or_else(|| io::ErrorKind::InvalidData.into())
    });
    read.map_err(|cause| PortError::Setting { path, cause })
}
