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

use super::route::RouteSettings;

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

/// Why there is no port, or no telling what its route is.
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
        let (route, source_address) = route_to(destination, source)?;
        let port = socket(&destination, SocketType::STREAM)?;
        let local = if number("net/ipv4/tcp_fastopen")? & 1 == 1 {
            port_of_connect(&port, source, destination)?
        } else {
            port_by_hand(&port, source_address)?
        };
        Ok(Self { local, destination, _port: port, route })
    }

    /// What the route changes in a SYN.
    ///
    /// # Errors
    /// The kernel's.
    pub fn route_settings(&self) -> Result<RouteSettings, PortError> {
        let (mtu, hop_limit) = if self.destination.is_ipv4() {
            (ip_mtu(&self.route), ip_ttl(&self.route))
        } else {
            (ipv6_mtu(&self.route), ipv6_unicast_hops(&self.route).map(u32::from))
        };
        let hop_limit = u8::try_from(hop_limit.map_err(io::Error::from)?).unwrap_or(u8::MAX);
        Ok(RouteSettings::of(self.local, self.destination, mtu.map_err(io::Error::from)?, hop_limit)?)
    }
}

/// The own address that a connection to there would come from.
///
/// # Errors
/// [`PortError`]; [`PortError::NoRoute`] if no way leads there.
pub fn source_address(destination: SocketAddr, source: Option<IpAddr>) -> Result<IpAddr, PortError> {
    Ok(route_to(destination, source)?.1)
}

/// A UDP socket on the route, which sends nothing, and its own address.
fn route_to(destination: SocketAddr, source: Option<IpAddr>) -> Result<(OwnedFd, IpAddr), PortError> {
    let route = socket(&destination, SocketType::DGRAM)?;
    if let Some(source) = source {
        bind_to(&route, source)?;
    }
    let source = connect_to(&route, destination)?.ip();
    Ok((route, source))
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
