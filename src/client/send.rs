//! One knock: issue a counter, send one SYN.

use std::fs::File;
use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::slice;
use std::thread;
use std::time::Duration;

use caps::errors::CapsError;
use caps::{CapSet, Capability};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};
use thiserror::Error;

use super::address::{is_global, is_nat64};
use super::aim::{Aim, AimError, Source};
use super::clock::{is_synchronized, unix_now, wait_until};
use super::flows::FlowFile;
use super::home::{Home, HomeError};
use super::host::{KnockknockProfile, Profile, TokenProfile};
use super::issued::{Counters, Counts, IssuedError, IssuedFile};
use super::port::{HeldPort, PortError};
use super::specimen::{self, SpecimenError};
use crate::config::{FileError, Seconds};
use crate::crypto::{Binding, KeyError, KnockKey, KnockPorts, KnockSecrets, Side, knockknock};
use crate::packet::knockknock::{Fields, syn};
use crate::packet::{Flow, Persona};
use crate::service::Name;

/// Seconds that a counter may lie ahead of the clock before the client waits: few servers' clocks are further behind.
const AHEAD: u64 = 30;

/// Time that the server has to open the door before anything connects: half a millisecond and a write to its disk. A SYN
/// that comes too early is dropped, and the kernel sends it again only after a second.
const OPENING: Duration = Duration::from_millis(10);

/// Ports that are asked for until one was not used before in this boot.
const PORT_TRIES: usize = 16;

/// A knock that is ready to be sent: its counter is used up.
pub struct Knock {
    /// The packet from the IP header on.
    pub packet: Vec<u8>,
    /// What is known of it.
    pub sent: Sent,
    /// Held until it is sent, so that the knocks of a key leave in the order of their counters: a server takes no earlier
    /// one after a later one.
    lock: File,
    /// Held until it is sent.
    _port: HeldPort,
}

/// What a user should know before the knock leaves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Notice {
    /// It waits for so many seconds.
    Waiting(u64),
    /// Another process has held this lock for some seconds: it may have been stopped.
    Locked(PathBuf),
    /// Another machine has issued counters with this key.
    CopiedKey,
    /// Another machine has used counts of this knockknock profile.
    CopiedProfile,
}

/// What there is to know of a knock that was sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sent {
    /// The server's address that was knocked at; its port is 0.
    pub server: SocketAddr,
    /// The own address that it came from; its port is 0.
    pub source: SocketAddr,
    /// What it was made of.
    pub token: SentToken,
}

/// What a knock that was sent was made of, by its server's kind.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SentToken {
    /// knockq's own.
    Own {
        /// The address that it holds for.
        bound_to: Option<IpAddr>,
        /// The kernel says that nobody keeps the clock right.
        is_clock_unsynchronized: bool,
        /// A counter was issued in the future once, when the clock was wrong.
        has_future_counter: bool,
        /// Where the server is knocked at.
        knock_ports: KnockPorts,
        /// How far a counter may be off the server's clock.
        window: Seconds,
    },
    /// That of knockknock.
    Knockknock {
        /// Its count.
        count: u32,
        /// Where it went.
        knock_port: u16,
    },
}

/// Why no knock was sent.
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
    /// Who is knocked at, and where.
    #[error(transparent)]
    Aim(#[from] AimError),
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Nothing could be issued to knock with.
    #[error(transparent)]
    Issued(#[from] IssuedError),
    /// The keys agree on nothing.
    #[error("host {host}: {cause}")]
    Key {
        /// The profile.
        host: Name,
        /// Why.
        cause: KeyError,
    },
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
    pub fn send(&self, knock: Knock) -> Result<Sent, SendError> {
        let Knock { packet, sent, lock, _port } = knock;
        let Sent { server, source, .. } = &sent;
        let socket = if server.is_ipv4() { &self.v4 } else { &self.v6 };
        let socket = socket.as_ref().map_err(|&errno| SendError::RawSocket(errno.into()))?;
        // The kernel routes such a packet by this address, not by the one in its header.
        let packet = [IoSlice::new(&packet)];
        let result = match source.ip() {
            IpAddr::V4(source) => send_from(socket, &packet, &ControlMessage::Ipv4PacketInfo(&from_v4(source)), server),
            IpAddr::V6(source) => send_from(socket, &packet, &ControlMessage::Ipv6PacketInfo(&from_v6(source)), server),
        };
        result.map_err(|errno| SendError::Send { server: server.ip(), cause: errno.into() })?;
        drop(lock);
        thread::sleep(OPENING);
        Ok(sent)
    }
}

impl Knock {
    /// Issues a counter and builds the packet to one of the server's addresses. `tell` is called before a wait, and once
    /// where the key comes from another machine.
    ///
    /// # Errors
    /// [`SendError`]. What was issued stays issued.
    pub fn prepare(home: &Home, aim: &Aim, server: SocketAddr, tell: impl Fn(Notice)) -> Result<Self, SendError> {
        aim.check_way(server)?;
        match &aim.profile {
            Profile::Token(profile) => Self::of_token(home, aim, profile, server, tell),
            Profile::Knockknock(profile) => Self::of_knockknock(home, aim, profile, server, tell),
        }
    }

    fn of_token(
        home: &Home,
        aim: &Aim,
        profile: &TokenProfile,
        server: SocketAddr,
        tell: impl Fn(Notice),
    ) -> Result<Self, SendError> {
        let own = home.key()?;
        profile.check_client(&aim.host, own.public()).map_err(AimError::from)?;
        let server_key = &profile.server_key.0;
        let preshared = home.preshared(profile.psk_file.as_deref())?;
        let secrets = KnockSecrets::derive(Side::Client, &own, server_key, preshared.as_ref())
            .map_err(|cause| SendError::Key { host: aim.host.clone(), cause })?;
        let key = KnockKey::new(&secrets);
        let window = u64::from(profile.window.0);

        let tell_lock = |lock: &Path| tell(Notice::Locked(lock.to_owned()));
        let mut counters = IssuedFile::<Counters>::open(&home.counters(), &[own.public(), server_key], tell_lock)?;
        let n = counters.issue(unix_now(), window)?;
        let has_future_counter = counters.has_beyond(unix_now().saturating_add(window));
        if counters.is_from_elsewhere() {
            tell(Notice::CopiedKey);
        }
        wait_until(n.saturating_sub(AHEAD.min(window / 2)), |seconds| tell(Notice::Waiting(seconds)));

        let pad = key.pad(n);
        let mut destination = server; // which keeps the interface of a link-local address
        destination.set_port(pad.knock_port(&profile.knock_ports));
        let port = unused_port(home, destination, aim.own_source(), tell_lock)?;
        let persona = persona(&port, aim.strict)?;
        let bound_to = binding(aim.source, profile.source, port.local.ip(), server.ip());
        let token = key.seal(n, aim.details.selector, bound_to.map_or(Binding::Unbound, Binding::Bound));
        let flow = Flow {
            source: port.local.ip(),
            source_port: port.local.port(),
            destination: destination.ip(),
            destination_port: destination.port(),
        };
        let packet = persona.syn(&flow, token.sequence, token.tsval).map_err(SpecimenError::from)?;
        let sent = SentToken::Own {
            bound_to,
            is_clock_unsynchronized: !is_synchronized(),
            has_future_counter,
            knock_ports: profile.knock_ports.clone(),
            window: profile.window,
        };
        Ok(Self::new(packet, server, sent, counters.into_lock(), port))
    }

    fn of_knockknock(
        home: &Home,
        aim: &Aim,
        profile: &KnockknockProfile,
        server: SocketAddr,
        tell: impl Fn(Notice),
    ) -> Result<Self, SendError> {
        let terms = &profile.knockknock;
        let secrets = home.secrets(&terms.key_file)?;
        let stand_in = secrets.stand_in().map_err(|cause| SendError::Key { host: aim.host.clone(), cause })?;
        let key = knockknock::Key::new(&secrets);

        let tell_lock = |lock: &Path| tell(Notice::Locked(lock.to_owned()));
        let mut counts = IssuedFile::<Counts>::open(&home.counters(), &[&stand_in], tell_lock)?;
        if counts.is_from_elsewhere() {
            tell(Notice::CopiedProfile);
        }
        let (count, token) = loop {
            let count = counts.issue(terms.counter)?;
            let token = key.seal(count, aim.details.selector);
            // The kernel puts an identification of its own where there is none. Servers miss a few counts without harm.
            if token.ip_id != 0 {
                break (count, token);
            }
        };
        let knock_port = terms.knock_port.get();
        let mut destination = server;
        destination.set_port(knock_port);
        let port = HeldPort::new(destination, aim.own_source())?;
        let (SocketAddr::V4(local), SocketAddr::V4(destination)) = (port.local, destination) else {
            return Err(AimError::OnlyV4(aim.host.clone()).into());
        };
        let fields = Fields {
            identification: token.ip_id,
            sequence: token.sequence,
            acknowledgment: token.acknowledgment,
            window: token.window,
        };
        let packet = syn(local, destination, &fields);
        Ok(Self::new(packet, server, SentToken::Knockknock { count, knock_port }, counts.into_lock(), port))
    }

    const fn new(packet: Vec<u8>, server: SocketAddr, token: SentToken, lock: File, port: HeldPort) -> Self {
        let mut source = port.local;
        source.set_port(0);
        Self { packet, sent: Sent { server, source, token }, lock, _port: port }
    }
}

fn send_from(
    socket: &OwnedFd,
    packet: &[IoSlice<'_>],
    source: &ControlMessage<'_>,
    server: &SocketAddr,
) -> Result<usize, nix::Error> {
    sendmsg(
        socket.as_raw_fd(),
        packet,
        slice::from_ref(source),
        MsgFlags::empty(),
        Some(&SockaddrStorage::from(*server)),
    )
}

/// `ipi_spec_dst` of ip(7).
const fn from_v4(source: Ipv4Addr) -> libc::in_pktinfo {
    let none = libc::in_addr { s_addr: 0 };
    let source = libc::in_addr { s_addr: u32::from_ne_bytes(source.octets()) };
    libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: source, ipi_addr: none }
}

/// `ipi6_addr` of RFC 3542.
const fn from_v6(source: Ipv6Addr) -> libc::in6_pktinfo {
    libc::in6_pktinfo { ipi6_addr: libc::in6_addr { s6_addr: source.octets() }, ipi6_ifindex: 0 }
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
fn unused_port(
    home: &Home,
    destination: SocketAddr,
    source: Option<IpAddr>,
    tell: impl FnOnce(&Path),
) -> Result<HeldPort, SendError> {
    let mut flows = FlowFile::open(&home.counters(), tell)?;
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
