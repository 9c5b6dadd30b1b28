//! A connection through a door that opens about now.
//!
//! A SYN that comes before the door is open is dropped, and the kernel sends it again only after a second. So fresh attempts
//! follow it soon, at growing distances; none is given up, because the door may let in the first of them alone.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::IpBindAddressNoPort;
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::sleep;

/// Pauses after the first attempts: these begin after 0, 50, 150 and 400 ms. Later pauses are twice the one before.
const PAUSES: [Duration; 3] = [Duration::from_millis(50), Duration::from_millis(100), Duration::from_millis(250)];

/// Attempts to connect to one port from one address.
pub struct Race {
    /// Where to.
    pub server: SocketAddr,
    source: IpAddr,
    begun: Instant,
    pauses: std::array::IntoIter<Duration, 3>,
    pause: Duration,
    next: Duration,
    attempts: JoinSet<io::Result<TcpStream>>,
    failure: Option<(Duration, io::Error)>,
}

impl Race {
    /// Nothing begins before [`Race::run`].
    pub fn new(server: SocketAddr, source: IpAddr) -> Self {
        Self {
            server,
            source,
            begun: Instant::now(),
            pauses: PAUSES.into_iter(),
            pause: Duration::ZERO,
            next: Duration::ZERO,
            attempts: JoinSet::new(),
            failure: None,
        }
    }

    /// Later attempts come from this own address.
    pub const fn come_from(&mut self, source: IpAddr) {
        self.source = source;
    }

    /// How long ago it has begun.
    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Goes on until one attempt has succeeded, or until so much time has passed since the begin. Dropping the race gives
    /// up all others.
    pub async fn run(&mut self, until: Duration) -> Option<TcpStream> {
        loop {
            let elapsed = self.elapsed();
            if elapsed >= self.next {
                self.attempts.spawn(attempt(self.server, self.source));
                self.pause = self.pauses.next().unwrap_or(self.pause.saturating_mul(2));
                self.next = elapsed.saturating_add(self.pause);
            }
            if elapsed >= until {
                return None;
            }
            tokio::select! {
                Some(ended) = self.attempts.join_next() => match ended {
                    Ok(Ok(stream)) => return Some(stream),
                    Ok(Err(error)) => self.failure = Some((self.elapsed(), error)),
                    Err(_) => {} // a task that does not panic and is not cancelled
                },
                () = sleep(self.next.min(until).saturating_sub(elapsed)) => {}
            }
        }
    }

    /// Why attempts have failed that came so long after the begin, or later, if any has.
    pub fn failure_after(&mut self, time: Duration) -> Option<io::Error> {
        self.failure.take_if(|(at, _)| *at >= time).map(|(_, error)| error)
    }
}

/// One attempt to connect, from an own address.
///
/// # Errors
/// The kernel's.
pub async fn attempt(server: SocketAddr, source: IpAddr) -> io::Result<TcpStream> {
    let socket = if server.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // The kernel shall choose the port as it does for any other connection, or an observer could tell by its parity.
    setsockopt(&socket, IpBindAddressNoPort, &true)?;
    socket.bind(own(source, server))?;
    socket.connect(server).await
}

/// A link-local address needs the interface.
fn own(source: IpAddr, server: SocketAddr) -> SocketAddr {
    let mut own = SocketAddr::new(source, 0);
    if let (SocketAddr::V6(own), SocketAddr::V6(server)) = (&mut own, server) {
        own.set_scope_id(server.scope_id());
    }
    own
}
