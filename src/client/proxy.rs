//! A SOCKS 5 proxy that knocks where a profile says so, and goes straight through everywhere else.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt::set_socket_keepalive;
use thiserror::Error;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream, lookup_host};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::{spawn_blocking, spawn_local};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::aim::{Aim, AimError, Request};
use super::connect::{ConnectError, Knocker};
use super::home::Home;
use super::host::{ProfileError, ProfileService};
use super::port::PortError;
use super::race::attempt;
use super::send::SendError;
use super::socks::{self, Login, Reply, SocksError, Target};
use crate::service::Name;

/// Connections at once. Each takes two of the 1024 descriptors that a process commonly may have, and a few while it begins.
const CONNECTIONS: usize = 256;

/// Time within which a client must have said where it wants to go. It is on this machine, and has a place meanwhile.
const HANDSHAKE: Duration = Duration::from_secs(3);

/// Time within which a connection through a door must stand, all knocks included.
const KNOCKED: Duration = Duration::from_secs(10);

/// Time after which a door that should be open is not: the kernel sends a lost SYN again after one second.
const OPEN: Duration = Duration::from_secs(2);

/// Time within which a connection that needs no knock must stand.
const STRAIGHT: Duration = Duration::from_secs(30);

/// What of it an address gets before the next one is tried.
const STRAIGHT_ADDRESS: Duration = Duration::from_secs(5);

/// Seconds that a door stays open where the profile does not say it.
const OPEN_FOR: u32 = 5;

/// Pause after a connection could not be accepted, which is for want of descriptors or memory.
const PAUSE: Duration = Duration::from_secs(1);

/// Why a client gets no connection.
#[derive(Debug, Error)]
pub enum ProxyError {
    /// There is a profile, and it came to nothing.
    #[error(transparent)]
    Knock(#[from] ConnectError),
    /// Others knock for the same service, and it took too long.
    #[error("other connections have waited for this door for {} s", KNOCKED.as_secs())]
    Busy,
    /// There is no profile, and the name has no address.
    #[error("cannot be resolved ({0})")]
    Resolve(io::Error),
    /// There is no profile, and no connection.
    #[error(transparent)]
    Straight(io::Error),
}

impl ProxyError {
    fn reply(&self) -> Reply {
        match self {
            Self::Busy | Self::Knock(ConnectError::StillShut { .. }) => Reply::TimedOut,
            Self::Knock(ConnectError::Send(SendError::Aim(
                AimError::Resolve { .. } | AimError::NoAddress { .. } | AimError::NoV4(_),
            )))
            | Self::Resolve(_) => Reply::HostUnreachable,
            Self::Knock(ConnectError::Send(
                SendError::Port(PortError::NoRoute { .. }) | SendError::Aim(AimError::Port(PortError::NoRoute { .. })),
            )) => Reply::NetworkUnreachable,
            Self::Straight(cause) | Self::Knock(ConnectError::Refused { cause, .. }) => reply_to(cause.kind()),
            Self::Knock(_) => Reply::Failed,
        }
    }
}

const fn reply_to(kind: ErrorKind) -> Reply {
    match kind {
        ErrorKind::ConnectionRefused => Reply::Refused,
        ErrorKind::NetworkUnreachable => Reply::NetworkUnreachable,
        ErrorKind::HostUnreachable => Reply::HostUnreachable,
        ErrorKind::TimedOut => Reply::TimedOut,
        ErrorKind::PermissionDenied => Reply::NotAllowed,
        _ => Reply::Failed,
    }
}

/// Time for which it is not told again that there are so many connections.
const TOLD: Duration = Duration::from_secs(60);

/// What there is to tell. Nothing is told of connections that need no knock.
pub enum Event<'a> {
    /// A door was knocked at, and a connection went through.
    Knocked {
        /// The host and the service.
        aim: &'a Aim,
        /// Where to.
        server: SocketAddr,
    },
    /// There is a profile, but no connection.
    Failed {
        /// Where to.
        target: &'a Target,
        /// Why.
        error: ProxyError,
    },
    /// A client did not come so far as to be understood.
    Client {
        /// Where it came from.
        peer: SocketAddr,
        /// Why.
        error: SocksError,
    },
    /// As many connections as there may be: the next one waits until one ends.
    Full(usize),
    /// A connection could not be accepted.
    Accept(io::Error),
}

/// The proxy. Its knocks are one after the other for each service of a host, so that those who wait for one find the door
/// open.
pub struct Proxy {
    home: Home,
    request: Request<'static>,
    knocker: Arc<Knocker>,
    login: Option<Login>,
    tell: fn(Event<'_>),
    places: Arc<Semaphore>,
    doors: Mutex<HashMap<Service, Arc<Mutex<Doors>>>>,
}

/// A profile's name, and a service's.
type Service = (Name, Name);

impl Proxy {
    /// `request` says how to knock; its host and service are those of each connection.
    pub fn new(
        home: Home,
        request: Request<'static>,
        knocker: Knocker,
        login: Option<Login>,
        tell: fn(Event<'_>),
    ) -> Self {
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        Self { home, request, knocker: Arc::new(knocker), login, tell, places, doors: Mutex::default() }
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        CONNECTIONS.saturating_sub(self.places.available_permits())
    }

    /// Serves whoever comes. Connections are tasks of the [`tokio::task::LocalSet`] that this runs in, and end with it.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        let mut told: Option<Instant> = None;
        loop {
            let (client, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                Err(error) => {
                    (self.tell)(Event::Accept(error));
                    sleep(PAUSE).await;
                    continue;
                }
            };
            if self.places.available_permits() == 0 && told.is_none_or(|at| at.elapsed() > TOLD) {
                told = Some(Instant::now());
                (self.tell)(Event::Full(CONNECTIONS));
            }
            let Ok(place) = Arc::clone(&self.places).acquire_owned().await else { return };
            let proxy = Arc::clone(&self);
            spawn_local(async move {
                proxy.attend(client, peer).await;
                drop(place);
            });
        }
    }

    async fn attend(self: Arc<Self>, mut client: TcpStream, peer: SocketAddr) {
        let target = match timeout(HANDSHAKE, socks::accept(&mut client, self.login.as_ref())).await {
            Ok(Ok(target)) => target,
            Ok(Err(SocksError::Io(_))) | Err(_) => return,
            Ok(Err(error)) => return (self.tell)(Event::Client { peer, error }),
        };
        match self.reach(&target).await {
            // Whoever breaks off knows it.
            Ok(server) => drop(splice(client, server).await),
            Err(error) => {
                let _ = socks::reply(&mut client, error.reply(), None).await;
                if !matches!(error, ProxyError::Straight(_) | ProxyError::Resolve(_)) {
                    (self.tell)(Event::Failed { target: &target, error });
                }
            }
        }
    }

    async fn reach(&self, target: &Target) -> Result<TcpStream, ProxyError> {
        match self.aim(target).await? {
            Some(aim) => self.through_door(&Arc::new(aim), target.port).await,
            None => straight(target).await,
        }
    }

    /// What to knock for; nothing if there is no profile of this host, or it has no such port.
    async fn aim(&self, target: &Target) -> Result<Option<Aim>, ConnectError> {
        let (home, request, Target { host, port }) = (self.home.clone(), self.request, target.clone());
        let find =
            move || Aim::find(&home, &Request { host: host.as_str(), service: Some(&port.to_string()), ..request });
        match spawn_blocking(find).await.map_err(|error| ConnectError::Stopped(error.into()))? {
            // A service may have such a name, or a UDP port of this number.
            Ok(aim) => Ok((aim.tcp_port() == Some(target.port)).then_some(aim)),
            Err(AimError::Profile(ProfileError::Missing(_) | ProfileError::NoService { .. })) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Through a door that is open, or that a knock opens.
    async fn through_door(&self, aim: &Arc<Aim>, port: u16) -> Result<TcpStream, ProxyError> {
        let arrived = Instant::now();
        let doors = Arc::clone(self.doors.lock().await.entry((aim.host.clone(), aim.service.clone())).or_default());
        loop {
            // Whoever knocks holds this meanwhile, and the others wait for that knock.
            let mut known = timeout_at(arrived + KNOCKED, doors.lock()).await.map_err(|_| ProxyError::Busy)?;
            let Some(door) = known.open(aim) else {
                let begun = Instant::now();
                let waited = Duration::from_secs((begun - arrived).as_secs()); // whole ones, for it may be told
                let stream = self.knocker.connect(aim, KNOCKED.saturating_sub(waited)).await?;
                known.add(&stream, begun, &aim.details);
                let server = stream.peer_addr().map_err(ProxyError::Straight)?;
                (self.tell)(Event::Knocked { aim, server });
                return Ok(stream);
            };
            drop(known);
            let mut server = door.server;
            server.set_port(port);
            if let Ok(Ok(stream)) = timeout(OPEN, attempt(server, door.source)).await {
                return Ok(stream);
            }
            doors.lock().await.forget(&door);
        }
    }
}

/// The doors of one service that are open.
#[derive(Default)]
struct Doors(Vec<OpenDoor>);

#[derive(Clone, Copy, PartialEq)]
struct OpenDoor {
    server: SocketAddr,
    source: IpAddr,
    until: Instant,
}

impl Doors {
    /// One that leads to an address of the aim.
    fn open(&mut self, aim: &Aim) -> Option<OpenDoor> {
        let now = Instant::now();
        self.0.retain(|door| door.until > now);
        let leads_there = |door: &&OpenDoor| aim.servers.iter().any(|server| server.ip() == door.server.ip());
        self.0.iter().find(leads_there).copied()
    }

    /// The door that this connection went through. `begun` is before the knock, and so the door is open for longer than is
    /// reckoned with.
    fn add(&mut self, stream: &TcpStream, begun: Instant, service: &ProfileService) {
        let lasts = lasts(service);
        if let (Ok(server), Ok(own), false) = (stream.peer_addr(), stream.local_addr(), lasts.is_zero()) {
            self.0.retain(|door| door.server.ip() != server.ip());
            self.0.push(OpenDoor { server, source: own.ip(), until: begun + lasts });
        }
    }

    fn forget(&mut self, shut: &OpenDoor) {
        self.0.retain(|door| door != shut);
    }
}

/// How long other connections may use a door: a fifth less than it is open, and a second at least, in which a SYN may come
/// too late.
fn lasts(service: &ProfileService) -> Duration {
    let open_for = service.open_for.map_or(OPEN_FOR, |seconds| seconds.0);
    let lasts = if service.once { 0 } else { open_for.saturating_sub((open_for / 5).max(1)) };
    Duration::from_secs(lasts.into())
}

/// To the first address that answers, as any program would connect.
async fn straight(target: &Target) -> Result<TcpStream, ProxyError> {
    let connected = timeout(STRAIGHT, async {
        let addresses = lookup_host((target.host.as_str(), target.port)).await.map_err(ProxyError::Resolve)?;
        let mut addresses = addresses.peekable();
        let mut failure = io::Error::from(ErrorKind::NotFound);
        while let Some(address) = addresses.next() {
            let time = if addresses.peek().is_some() { STRAIGHT_ADDRESS } else { STRAIGHT };
            match timeout(time, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => failure = error,
                Err(_) => failure = ErrorKind::TimedOut.into(),
            }
        }
        Err(ProxyError::Straight(failure))
    });
    connected.await.unwrap_or_else(|_| Err(ProxyError::Straight(ErrorKind::TimedOut.into())))
}

/// Says that there is a connection, and copies both ways until both have ended, each by itself.
async fn splice(mut client: TcpStream, mut server: TcpStream) -> io::Result<()> {
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
        set_socket_keepalive(stream, true)?;
    }
    socks::reply(&mut client, Reply::Succeeded, Some(server.local_addr()?)).await?;
    copy_bidirectional(&mut client, &mut server).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::{Duration, ProfileService, lasts};
    use crate::config::Seconds;

    #[test]
    fn a_door_is_used_for_less_time_than_it_is_open() {
        let service = |open_for: Option<u32>, once| ProfileService {
            selector: 22,
            ports: vec![],
            open_for: open_for.map(Seconds),
            once,
        };
        for (open_for, once, expected) in [
            (None, false, 4),
            (Some(0), false, 0),
            (Some(1), false, 0),
            (Some(6), false, 5),
            (Some(30), false, 24),
            (Some(86_400), false, 69_120),
            (Some(30), true, 0),
        ] {
            assert_eq!(lasts(&service(open_for, once)), Duration::from_secs(expected), "{open_for:?}");
        }
    }
}
