//! Whether a knock has opened the door: a connection tells.

use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};

use super::port::PortError;
use super::send::{SendError, Sent};
use crate::service::Transport;

/// Time after which `--wait` gives up.
const WAIT: Duration = Duration::from_secs(10);

/// Time after which a port that answers with resets will not open any more.
const REFUSED: Duration = Duration::from_secs(2);

/// Time that `--wait` gives its first attempt; each fresh one has twice that of the one before.
const FIRST_ATTEMPT: Duration = Duration::from_millis(400);

impl Sent {
    /// Connects to the service until it answers; `false` if that cannot tell, for the service is for one connection or has
    /// no TCP port.
    ///
    /// # Errors
    /// [`SendError::StillShut`].
    pub fn confirm(&self) -> Result<bool, SendError> {
        let tcp = self.details.ports.iter().find(|port| port.transport == Transport::Tcp);
        let Some(port) = tcp.filter(|_| !self.details.once).map(|port| port.number) else { return Ok(false) };
        let start = Instant::now();
        let mut attempt = FIRST_ATTEMPT;
        while start.elapsed() < WAIT {
            let begun = Instant::now();
            match self.try_connect(port, attempt)? {
                Ok(()) => return Ok(true),
                // A shut door may answer so too, until the knock has opened it.
                Err(Errno::CONNREFUSED) if start.elapsed() > REFUSED => {
                    return Err(SendError::Refused { server: self.server, port });
                }
                Err(_) => {}
            }
            thread::sleep(FIRST_ATTEMPT.saturating_sub(begun.elapsed())); // it was refused at once
            attempt = (attempt * 2).min(WAIT.saturating_sub(start.elapsed())).max(FIRST_ATTEMPT);
        }
        Err(SendError::StillShut { server: self.server, port, seconds: WAIT.as_secs(), checks: self.checks() })
    }

    /// One attempt, from the address that knocked.
    fn try_connect(&self, port: u16, time: Duration) -> Result<Result<(), Errno>, SendError> {
        let (mut destination, mut source) = self.route;
        destination.set_port(port);
        source.set_port(0);
        let family = if source.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let attempt = || {
            let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            set_socket_timeout(&socket, Timeout::Send, Some(time))?;
            bind(&socket, &source)?;
            Ok(connect(&socket, &destination))
        };
        attempt().map_err(|errno: Errno| PortError::Socket(errno.into()).into())
    }

    fn checks(&self) -> Vec<String> {
        let clock = "the clocks of this machine and of the server: they must agree to within the window".to_owned();
        let mut checks = vec![if self.is_clock_unsynchronized {
            format!("{clock}; the kernel says that this one is not synchronised")
        } else {
            clock
        }];
        checks.push("the daemon must run, and your key must be among its users, with this service".to_owned());
        checks.push(match self.bound_to {
            Some(address) => format!(
                "the token holds for {address} alone: does the server see you there, or a NAT? Then use --source"
            ),
            None => "the token is unbound: the server may demand binding. Then use --source with your public address"
                .to_owned(),
        });
        checks.push(
            "a firewall on the way may filter the knock ports, or rewrite sequence numbers or timestamps".to_owned(),
        );
        checks.push(format!(
            "the profile of {} may be older than the server's configuration: ask for a new one",
            self.host
        ));
        checks.push("the service must run, and the server's own firewall must allow it".to_owned());
        checks
    }
}
