//! From a knock to a connection.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::net::TcpStream;
use tokio::task::spawn_blocking;

use super::aim::{Aim, AimError};
use super::checks::checks;
use super::home::Home;
use super::host::Profile;
use super::port::PortError;
use super::race::Race;
use super::send::{Knock, Notice, RawSockets, SendError, Sent};
use crate::service::Name;

/// Time after which a port that answers with resets will not open any more.
const REFUSED: Duration = Duration::from_secs(2);

/// Time that an address gets at most before the next one is tried.
const ADDRESS: Duration = Duration::from_secs(3);

/// Time that it gets at least, as long as there is any: each one that is tried costs a knock.
const ADDRESS_LEAST: Duration = Duration::from_secs(1);

/// Seconds after which one knocks again, because the knock before may have been lost.
const AGAIN: &[u64] = &[1, 3, 7, 15];

/// The same where each knock that is lost takes one of the twenty counts that the server looks at.
const SELDOM_AGAIN: &[u64] = &[3];

/// Why there is no connection.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// No knock.
    #[error(transparent)]
    Send(#[from] SendError),
    /// The service has no TCP port.
    #[error("host {host}: service {service} has no TCP port")]
    NoTcp {
        /// The profile.
        host: Name,
        /// The service.
        service: Name,
    },
    /// The port answers, but not with a connection.
    #[error("{server}: {cause}")]
    Refused {
        /// Where to.
        server: SocketAddr,
        /// What the kernel said.
        cause: io::Error,
    },
    /// The port stays shut.
    #[error("{server}: still shut {seconds} s after the knock")]
    StillShut {
        /// Where to.
        server: SocketAddr,
        /// For how long it was tried.
        seconds: u64,
        /// What to check, in this order.
        checks: Vec<String>,
    },
    /// The work was stopped from outside.
    #[error("cannot knock: {0}")]
    Stopped(io::Error),
}

impl From<AimError> for ConnectError {
    fn from(error: AimError) -> Self {
        SendError::from(error).into()
    }
}

/// What one knocks with, as often as it takes.
pub struct Knocker {
    home: Home,
    sockets: RawSockets,
    tell: fn(Notice),
}

impl Knocker {
    /// `tell` is as for [`Knock::prepare`].
    pub const fn new(home: Home, sockets: RawSockets, tell: fn(Notice)) -> Self {
        Self { home, sockets, tell }
    }

    /// Knocks once. Blocks for 10 ms, in which the server opens the door, and for the disk.
    ///
    /// # Errors
    /// [`SendError`].
    pub fn knock(&self, aim: &Aim, server: SocketAddr) -> Result<Sent, SendError> {
        self.sockets.send(Knock::prepare(&self.home, aim, server, self.tell)?)
    }

    /// Knocks and connects to the service's TCP port, at one of the server's addresses after the other, as many as there is
    /// time for. A knock may get lost, so it knocks again now and then.
    ///
    /// # Errors
    /// [`ConnectError`], that of the last address that a way leads to.
    pub async fn connect(self: &Arc<Self>, aim: &Arc<Aim>, time: Duration) -> Result<TcpStream, ConnectError> {
        let port = aim.tcp_port();
        let port = port.ok_or_else(|| ConnectError::NoTcp { host: aim.host.clone(), service: aim.service.clone() })?;
        let begun = Instant::now();
        let (mut failure, mut addresses) = (None, aim.servers.iter());
        while let Some(&server) = addresses.next() {
            let left = time.saturating_sub(begun.elapsed());
            if left.is_zero() && failure.is_some() {
                break;
            }
            match self.connect_to(aim, server, port, share(left, addresses.len())).await {
                Ok(stream) => return Ok(stream),
                // Says less than what was met on the way to another.
                Err(ConnectError::Send(SendError::Port(PortError::NoRoute { .. }))) if failure.is_some() => {}
                Err(error) => failure = Some(error),
            }
        }
        Err(failure.unwrap_or_else(|| AimError::NoAddress { host: aim.host.clone(), family: "usable" }.into()))
    }

    async fn connect_to(
        self: &Arc<Self>,
        aim: &Arc<Aim>,
        server: SocketAddr,
        port: u16,
        time: Duration,
    ) -> Result<TcpStream, ConnectError> {
        let mut sent = self.knock_aside(aim, server).await?;
        let mut race = Race::new(at(server, port), sent.source.ip());
        let seconds = match &aim.profile {
            Profile::Token(_) => AGAIN,
            Profile::Knockknock(_) => SELDOM_AGAIN,
        };
        let again = async |race: &mut Race, second| {
            if seconds.contains(&second) {
                sent = self.knock_aside(aim, server).await?;
                race.come_from(sent.source.ip());
            }
            Ok(())
        };
        match reach(&mut race, time, again).await? {
            Some(stream) => Ok(stream),
            None => Err(still_shut(aim, at(server, port), time, &sent)),
        }
    }

    /// On a thread that may block.
    async fn knock_aside(self: &Arc<Self>, aim: &Arc<Aim>, server: SocketAddr) -> Result<Sent, ConnectError> {
        let (knocker, aim) = (Arc::clone(self), Arc::clone(aim));
        let knocked = spawn_blocking(move || knocker.knock(&aim, server)).await;
        Ok(knocked.map_err(|error| ConnectError::Stopped(error.into()))??)
    }
}

/// What an address gets of the time that is left, where so many follow.
fn share(left: Duration, following: usize) -> Duration {
    let Some(following) = u32::try_from(following).ok().filter(|&following| following > 0) else { return left };
    (left / following.saturating_add(1)).clamp(ADDRESS_LEAST, ADDRESS).min(left)
}

/// Connects to the service after a knock, and closes the connection; `false` if that cannot tell whether the door is open,
/// for it is open for one connection only, or to no TCP port. `tick` is called after each second, with their number.
///
/// # Errors
/// [`ConnectError::Refused`] and [`ConnectError::StillShut`].
pub async fn confirm(aim: &Aim, sent: &Sent, time: Duration, tick: impl Fn(u64)) -> Result<bool, ConnectError> {
    let Some(port) = aim.tcp_port().filter(|_| !aim.details.once) else { return Ok(false) };
    let mut race = Race::new(at(sent.server, port), sent.source.ip());
    let tick = async |_: &mut Race, second| {
        tick(second);
        Ok(())
    };
    match reach(&mut race, time, tick).await? {
        Some(_) => Ok(true),
        None => Err(still_shut(aim, at(sent.server, port), time, sent)),
    }
}

/// Runs the race for so long, with this after each second; `None` if there was no answer.
async fn reach(
    race: &mut Race,
    time: Duration,
    mut each_second: impl AsyncFnMut(&mut Race, u64) -> Result<(), ConnectError>,
) -> Result<Option<TcpStream>, ConnectError> {
    for second in 1.. {
        if let Some(stream) = race.run(time.min(Duration::from_secs(second))).await {
            return Ok(Some(stream));
        }
        if let Some(cause) = race.failure_after(REFUSED) {
            return Err(ConnectError::Refused { server: race.server, cause });
        }
        if race.elapsed() >= time {
            break;
        }
        each_second(race, second).await?;
    }
    Ok(None)
}

const fn at(mut server: SocketAddr, port: u16) -> SocketAddr {
    server.set_port(port);
    server
}

fn still_shut(aim: &Aim, server: SocketAddr, time: Duration, sent: &Sent) -> ConnectError {
    let seconds = time.saturating_add(Duration::from_millis(500)).as_secs(); // of a share, to the nearest one
    ConnectError::StillShut { server, seconds, checks: checks(aim, sent) }
}

#[cfg(test)]
mod tests {
    use super::{Duration, share};

    #[test]
    fn each_address_has_its_share_of_the_time_and_the_last_all_that_is_left() {
        for (left, following, expected) in [
            (10_000, 0, 10_000),
            (10_000, 1, 3000),
            (2000, 1, 1000),
            (10_000, 4, 2000),
            (10_000, 9999, 1000),
            (500, 1, 500),
            (0, 1, 0),
            (0, 0, 0),
        ] {
            let shared = share(Duration::from_millis(left), following);
            assert_eq!(shared, Duration::from_millis(expected), "{left} ms, {following} follow");
        }
    }
}
