//! One knock: choose the address, issue a counter, send one SYN.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::Duration;

use caps::errors::CapsError;
use caps::{CapSet, Capability};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, bind, ipproto, sendto, socket_with};
use thiserror::Error;

use super::address::{is_global, is_nat64, own_addresses};
use super::clock::{is_synchronized, unix_now, wait_until};
use super::counter::{CounterError, CounterFile, FlowFile};
use super::home::{Home, HomeError};
use super::host::{Profile, ProfileError, ProfileService};
use super::port::{HeldPort, PortError};
use super::specimen::{self, SpecimenError};
use crate::config::FileError;
use crate::crypto::{Binding, KeyError, KnockKey, KnockSecrets, Side};
use crate::packet::{Flow, Persona};
use crate::service::{HostAddress, Name};

/// Seconds that a counter may lie ahead of the clock before the client waits: few servers' clocks are further behind.
const AHEAD: u64 = 30;

/// Time that the server has to open the door before anything connects: half a millisecond and a write to its disk. A SYN
/// that comes too early is dropped, and the kernel sends it again only after a second.
const OPENING: Duration = Duration::from_millis(10);

/// Ports that are asked for until one was not used before in this boot.
const PORT_TRIES: usize = 16;

/// Which addresses of the server count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    /// The first that resolves.
    Any,
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
}

/// What the token is bound to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// The profile's address, or the own one if the server sees it as it is.
    Auto,
    /// Nothing.
    Unbound,
    /// This address: one of the own, or that of a NAT on the way.
    Address(IpAddr),
}

/// What to knock for.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Name of a profile.
    pub host: &'a str,
    /// A service's name or port.
    pub service: Option<&'a str>,
    /// Which addresses count.
    pub family: Family,
    /// What the token is bound to.
    pub source: Source,
    /// Rather none than a knock that its timestamp sets apart.
    pub strict: bool,
}

/// A knock that is ready to be sent: its counter is used up.
pub struct Knock {
    /// The packet from the IP header on.
    pub packet: Vec<u8>,
    /// What is known of it.
    pub sent: Sent,
    port: HeldPort,
}

/// What a user wants to know of a knock.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sent {
    /// The profile's name.
    pub host: Name,
    /// The service asked for.
    pub service: Name,
    /// What the service is.
    pub details: ProfileService,
    /// The server's address that was knocked at.
    pub server: IpAddr,
    /// Where it went, and from where.
    pub(super) route: (SocketAddr, SocketAddr),
    /// The address that the token holds for.
    pub bound_to: Option<IpAddr>,
    /// The kernel says that nobody keeps the clock right.
    pub is_clock_unsynchronized: bool,
    /// A counter was issued in the future once, when the clock was wrong.
    pub has_future_counter: bool,
}

/// Why no knock was sent, or no door opened.
#[derive(Debug, Error)]
pub enum SendError {
    /// No raw socket.
    #[error("cannot open a raw socket: operation not permitted")]
    NotPermitted,
    /// No raw socket of this family.
    #[error("cannot open a raw socket: {0}")]
    RawSocket(io::Error),
    /// CAP_NET_RAW stayed.
    #[error("cannot give up CAP_NET_RAW: {0}")]
    Capability(#[from] CapsError),
    /// The user's files.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The profile.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// No counter.
    #[error(transparent)]
    Counter(#[from] CounterError),
    /// The keys agree on nothing.
    #[error("host {host}: {cause}")]
    Key {
        /// The profile.
        host: Name,
        /// Why.
        cause: KeyError,
    },
    /// The name has no address.
    #[error("{name}: cannot be resolved ({cause})")]
    Resolve {
        /// The host name.
        name: String,
        /// What the resolver said.
        cause: io::Error,
    },
    /// No address of the wanted family.
    #[error("host {host}: has no {family} address")]
    NoAddress {
        /// The profile.
        host: Name,
        /// `IPv4`, `IPv6` or `usable`.
        family: &'static str,
    },
    /// The profile's source address is of the other family than the one asked for.
    #[error("source {0}: is not of the family that the knock is to use")]
    SourceFamily(IpAddr),
    /// No port or route.
    #[error(transparent)]
    Port(#[from] PortError),
    /// The kernel's SYN cannot be seen, or is no model.
    #[error(transparent)]
    Specimen(#[from] SpecimenError),
    /// `--strict`: a random TSval stands out.
    #[error("the timestamps of this host's connections follow one clock, so an observer could tell a knock by its own")]
    TimestampLine,
    /// It did not leave.
    #[error("{server}: the knock could not be sent: {cause}")]
    Send {
        /// Where to.
        server: IpAddr,
        /// What the kernel said.
        cause: io::Error,
    },
    /// It was sent, but the port answers with resets.
    #[error("{server} port {port}: refuses connections")]
    Refused {
        /// Where to.
        server: IpAddr,
        /// The service's port.
        port: u16,
    },
    /// It was sent, but the port stays shut.
    #[error("{server} port {port}: still shut {seconds} s after the knock")]
    StillShut {
        /// Where to.
        server: IpAddr,
        /// The service's port.
        port: u16,
        /// For how long it was tried.
        seconds: u64,
        /// What to check, the likeliest first.
        checks: Vec<String>,
    },
}

/// The one privilege: raw sockets of both families.
pub struct RawSockets {
    v4: Result<OwnedFd, Errno>,
    v6: Result<OwnedFd, Errno>,
}

/// Drops CAP_NET_RAW for good; what is open stays usable.
///
/// # Errors
/// When it does not go.
pub fn give_up_raw_sockets() -> Result<(), SendError> {
    for set in [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::drop(None, set, Capability::CAP_NET_RAW)?;
    }
    Ok(())
}

impl RawSockets {
    /// Opens both, and drops CAP_NET_RAW for good.
    ///
    /// # Errors
    /// [`SendError::NotPermitted`] without the capability.
    pub fn open() -> Result<Self, SendError> {
        let raw = |family| socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW));
        let sockets = Self { v4: raw(AddressFamily::INET), v6: raw(AddressFamily::INET6) };
        if sockets.v4.as_ref().is_err_and(|&errno| errno == Errno::PERM) {
            return Err(SendError::NotPermitted);
        }
        give_up_raw_sockets()?;
        Ok(sockets)
    }

    /// Sends the packet of a knock, as it is, and gives the server a moment to open the door.
    ///
    /// # Errors
    /// The kernel's.
    pub fn send(&self, knock: &Knock) -> Result<(), SendError> {
        let mut destination = knock.port.destination;
        destination.set_port(0); // a raw socket's address has none
        let socket = if destination.is_ipv4() { &self.v4 } else { &self.v6 };
        let socket = socket.as_ref().map_err(|&errno| SendError::RawSocket(errno.into()))?;
        // The kernel routes such a packet by the socket's address, not by the one in its header.
        let mut source = knock.port.local;
        source.set_port(0);
        bind(socket, &source).map_err(|errno| SendError::RawSocket(errno.into()))?;
        sendto(socket, &knock.packet, SendFlags::empty(), &destination)
            .map_err(|errno| SendError::Send { server: destination.ip(), cause: errno.into() })?;
        thread::sleep(OPENING);
        Ok(())
    }
}

impl Knock {
    /// Issues a counter and builds the packet. `tell` is called before a wait.
    ///
    /// # Errors
    /// [`SendError`]. What was issued stays issued.
    pub fn prepare(home: &Home, request: &Request<'_>, tell: impl Fn(u64)) -> Result<Self, SendError> {
        let (host, profile) = Profile::load(home, request.host)?;
        let (service, details) = profile.service(&host, request.service)?;
        let own = home.key()?;
        let server_key = &profile.server_key.0;
        let secrets = KnockSecrets::derive(Side::Client, &own, server_key, None)
            .map_err(|cause| SendError::Key { host: host.clone(), cause })?;
        let key = KnockKey::new(&secrets);
        let family = family(request, profile.source)?;
        let server = resolve(&host, &profile.address, family)?;
        let window = u64::from(profile.window.0);

        let mut counters = CounterFile::open(&home.counters(), own.public(), server_key)?;
        let n = counters.issue(unix_now(), window)?;
        let has_future_counter = counters.has_beyond(unix_now().saturating_add(window));
        drop(counters);
        wait_until(n.saturating_sub(AHEAD.min(window / 2)), tell);

        let pad = key.pad(n);
        let destination = SocketAddr::new(server.ip(), pad.knock_port(&profile.knock_ports));
        let destination = with_scope(destination, &server);
        let port = unused_port(home, destination, own_source(request.source))?;
        let persona = persona(&port, request.strict)?;
        let bound_to = binding(request.source, profile.source, port.local.ip(), server.ip());
        let token = key.seal(n, details.selector, bound_to.map_or(Binding::Unbound, Binding::Bound));
        let flow = Flow {
            source: port.local.ip(),
            source_port: port.local.port(),
            destination: destination.ip(),
            destination_port: destination.port(),
        };
        let packet = persona.syn(&flow, token.sequence, token.tsval).map_err(SpecimenError::from)?;
        let details = details.clone();
        let service = service.clone();
        let sent = Sent {
            host,
            service,
            details,
            server: server.ip(),
            route: (destination, port.local),
            bound_to,
            is_clock_unsynchronized: !is_synchronized(),
            has_future_counter,
        };
        Ok(Self { packet, sent, port })
    }
}

/// The family to knock over: a source address that the token is to be bound to decides.
fn family(request: &Request<'_>, profile: Option<IpAddr>) -> Result<Family, SendError> {
    let source = match request.source {
        Source::Auto => profile,
        Source::Unbound => None,
        Source::Address(address) => Some(address),
    };
    let Some(source) = source else { return Ok(request.family) };
    let meant = if source.is_ipv4() { Family::V4 } else { Family::V6 };
    if request.family == Family::Any || request.family == meant {
        Ok(meant)
    } else {
        Err(SendError::SourceFamily(source))
    }
}

/// The address that a connection would use: the first of the wanted family.
fn resolve(host: &Name, names: &[HostAddress], family: Family) -> Result<SocketAddr, SendError> {
    let wanted = |address: &SocketAddr| match family {
        Family::Any => true,
        Family::V4 => address.is_ipv4(),
        Family::V6 => address.is_ipv6(),
    };
    let mut failure = None;
    for name in names {
        match (name.as_str(), 0).to_socket_addrs() {
            Ok(addresses) => {
                if let Some(address) = addresses.into_iter().find(wanted) {
                    return Ok(address);
                }
            }
            Err(cause) => failure = Some(SendError::Resolve { name: name.to_string(), cause }),
        }
    }
    let family = match family {
        Family::Any => "usable",
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    };
    Err(failure.unwrap_or_else(|| SendError::NoAddress { host: host.clone(), family }))
}

/// A link-local destination keeps its interface.
fn with_scope(mut destination: SocketAddr, resolved: &SocketAddr) -> SocketAddr {
    if let (SocketAddr::V6(destination), SocketAddr::V6(resolved)) = (&mut destination, resolved) {
        destination.set_scope_id(resolved.scope_id());
    }
    destination
}

/// `--source` also chooses among own addresses; another one is a NAT's and only goes into the token.
fn own_source(source: Source) -> Option<IpAddr> {
    let Source::Address(address) = source else { return None };
    own_addresses().contains(&address).then_some(address)
}

/// What the token is bound to (docs/protocol.md section 3): never from bound to unbound by itself.
fn binding(asked: Source, profile: Option<IpAddr>, own: IpAddr, server: IpAddr) -> Option<IpAddr> {
    match asked {
        Source::Unbound => None,
        Source::Address(address) => Some(address),
        Source::Auto => profile.or_else(|| (is_global(&own) && !is_nat64(&server)).then_some(own)),
    }
}

/// The SYN that the kernel would send from this port.
fn persona(port: &HeldPort, strict: bool) -> Result<Persona, SendError> {
    let settings = port.route_settings()?;
    let family = if port.destination.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    if strict && specimen::has_one_timestamp_line(&settings, family)? {
        return Err(SendError::TimestampLine);
    }
    Ok(specimen::persona(&settings, family)?)
}

/// A held port whose flow no earlier knock of this boot had.
fn unused_port(home: &Home, destination: SocketAddr, source: Option<IpAddr>) -> Result<HeldPort, SendError> {
    let mut flows = FlowFile::open(&home.counters())?;
    let mut held = Vec::new(); // so that the kernel chooses another each time
    for _ in 0..PORT_TRIES {
        let port = HeldPort::new(destination, source)?;
        if !flows.contains(port.local, destination) {
            flows.record(port.local, destination)?;
            return Ok(port);
        }
        held.push(port);
    }
    Err(PortError::Socket(io::ErrorKind::AddrInUse.into()).into())
}

#[cfg(test)]
mod tests {
    use super::{Source, binding};

    #[test]
    fn a_token_is_bound_wherever_the_server_sees_the_own_address() {
        let address = |text: &str| text.parse().unwrap();
        let server = address("192.0.2.1");
        let bind = |asked, profile, own, server| binding(asked, profile, own, server);
        assert_eq!(bind(Source::Auto, None, address("8.8.8.8"), server), Some(address("8.8.8.8")));
        assert_eq!(bind(Source::Auto, None, address("10.0.0.1"), server), None, "a NAT will change it");
        assert_eq!(bind(Source::Auto, Some(address("9.9.9.9")), address("10.0.0.1"), server), Some(address("9.9.9.9")));
        assert_eq!(bind(Source::Auto, None, address("2600::1"), address("64:ff9b::1")), None, "NAT64 will change it");
        assert_eq!(bind(Source::Unbound, Some(address("9.9.9.9")), address("8.8.8.8"), server), None);
        assert_eq!(
            bind(Source::Address(address("9.9.9.9")), None, address("10.0.0.1"), server),
            Some(address("9.9.9.9"))
        );
    }
}
