//! A SYN that this host's kernel sends to itself, to learn from.
//!
//! What a kernel puts into a SYN follows from its version and a dozen settings. Rather than compute it, knockq lets the
//! kernel make one: a connection over loopback, whose SYN the listening end keeps (`TCP_SAVE_SYN`, Linux 4.2). Nothing
//! leaves the host, and no privilege is needed.

use std::ffi::OsString;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::sys::socket::sockopt::{GetOsString, GetStruct, SetBool, SetStruct, TcpMaxSeg};
use nix::sys::socket::{getsockopt, setsockopt};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, acceptfrom_with, bind, connect, getsockname, listen, socket_with,
};
use thiserror::Error;

use super::route::RouteSettings;
use crate::packet::{Persona, PersonaError};

/// Time that a connection over loopback may take. It takes less than a millisecond.
const PATIENCE: Duration = Duration::from_secs(2);

/// Connections that may wait: one, unless somebody else on this host is in the way.
const BACKLOG: i32 = 16;

/// Largest value that `TCP_MAXSEG` takes.
const MAXSEG_MAX: u16 = 32767;

/// `TCP_SAVE_SYN`: a listening socket keeps the SYN of each connection.
#[derive(Clone, Copy, Debug)]
struct SaveSyn;
nix::setsockopt_impl!(SaveSyn, libc::IPPROTO_TCP, libc::TCP_SAVE_SYN, bool, SetBool);

/// `TCP_WINDOW_CLAMP`: the largest window that a socket announces.
#[derive(Clone, Copy, Debug)]
struct WindowClamp;
nix::setsockopt_impl!(WindowClamp, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, u32, SetStruct<u32>);

/// `TCP_SAVED_SYN` into a buffer in which no SYN has place: refused if there is one.
#[derive(Clone, Copy, Debug)]
struct NoPlaceForSyn;
nix::getsockopt_impl!(NoPlaceForSyn, libc::IPPROTO_TCP, libc::TCP_SAVED_SYN, OsString, GetOsString<[u8; 1]>);

/// Why nothing was learnt.
#[derive(Debug, Error)]
pub enum SpecimenError {
    /// The connection over loopback failed.
    #[error("cannot see this kernel's own SYN over loopback: {0}")]
    Loopback(#[from] io::Error),
    /// The listening end has no SYN to show.
    #[error("cannot see this kernel's own SYN: it was not kept")]
    NotKept,
    /// It cannot serve.
    #[error(transparent)]
    Persona(#[from] PersonaError),
}

/// The SYN that this kernel would send over a route.
///
/// # Errors
/// [`SpecimenError`].
pub fn persona(settings: &RouteSettings, family: AddressFamily) -> Result<Persona, SpecimenError> {
    Ok(Persona::of(&specimen(settings, family)?)?.over(&settings.route))
}

/// Whether the TSvals of all connections between two hosts follow one clock, so that the one of a knock stands out.
///
/// Of two connections one after the other the second then has a TSval that is greater by the milliseconds between them,
/// and else any. The chance that an offset drawn anew looks so is below one in a million.
///
/// # Errors
/// [`SpecimenError`].
pub fn has_one_timestamp_line(settings: &RouteSettings, family: AddressFamily) -> Result<bool, SpecimenError> {
    let start = Instant::now();
    let (first, second) = (persona(settings, family)?, persona(settings, family)?);
    let elapsed = u32::try_from(start.elapsed().as_millis()).unwrap_or(u32::MAX).saturating_add(1);
    let difference = first.tsval().zip(second.tsval()).map(|(first, second)| second.wrapping_sub(first));
    Ok(difference.is_some_and(|difference| difference <= elapsed))
}

/// Connects to itself as it would connect over the route, as far as a socket's options can make it so.
fn specimen(settings: &RouteSettings, family: AddressFamily) -> Result<Vec<u8>, SpecimenError> {
    let loopback: IpAddr =
        if family == AddressFamily::INET { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    let listener = socket(family)?;
    setsockopt(&listener, SaveSyn, &true).map_err(io::Error::from)?;
    bind(&listener, &SocketAddr::new(loopback, 0)).map_err(io::Error::from)?;
    listen(&listener, BACKLOG).map_err(io::Error::from)?;
    let client = socket(family)?;
    if settings.route.mss <= MAXSEG_MAX {
        setsockopt(&client, TcpMaxSeg, &settings.route.mss.into()).map_err(io::Error::from)?;
    }
    if let Some(window) = settings.window {
        setsockopt(&client, WindowClamp, &window).map_err(io::Error::from)?;
    }
    let address = getsockname(&listener).map_err(io::Error::from)?;
    connect(&client, &address).map_err(in_time)?;
    kept_syn(&accept_from(&listener, &client)?)
}

/// A socket whose `connect` and `accept` end in time.
fn socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    for timeout in [Timeout::Send, Timeout::Recv] {
        set_socket_timeout(&socket, timeout, Some(PATIENCE))?;
    }
    Ok(socket)
}

/// How `connect` and `accept` say that their time is over.
fn in_time(errno: Errno) -> io::Error {
    match errno {
        Errno::INPROGRESS | Errno::AGAIN => io::ErrorKind::TimedOut.into(),
        errno => errno.into(),
    }
}

/// The other end of this client; whoever else on this host connects is turned away.
fn accept_from(listener: &OwnedFd, client: &OwnedFd) -> io::Result<OwnedFd> {
    let own = getsockname(client)?;
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        let (accepted, peer) = acceptfrom_with(listener, SocketFlags::CLOEXEC).map_err(in_time)?;
        if peer.as_ref() == Some(&own) {
            return Ok(accepted);
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// Reads `TCP_SAVED_SYN`. The kernel refuses a buffer that is too small, and nix one that is too large: so each length
/// that IPv4 or IPv6 and TCP headers can have is tried, from the least.
macro_rules! kept_syn {
    ($($name:ident $length:literal)*) => {
        $(
            #[derive(Clone, Copy)]
            struct $name;
            nix::getsockopt_impl!($name, libc::IPPROTO_TCP, libc::TCP_SAVED_SYN, [u8; $length], GetStruct<[u8; $length]>);
        )*

        fn kept_syn(socket: &OwnedFd) -> Result<Vec<u8>, SpecimenError> {
            if getsockopt(socket, NoPlaceForSyn) != Err(nix::Error::EINVAL) {
                return Err(SpecimenError::NotKept);
            }
            $(
                match getsockopt(socket, $name) {
                    Err(nix::Error::EINVAL) => {}
                    read => return Ok(read.map_err(io::Error::from)?.to_vec()),
                }
            )*
            Err(PersonaError::Unfamiliar.into())
        }
    };
}

kept_syn! {
    Syn40 40 Syn44 44 Syn48 48 Syn52 52 Syn56 56 Syn60 60 Syn64 64 Syn68 68
    Syn72 72 Syn76 76 Syn80 80 Syn84 84 Syn88 88 Syn92 92 Syn96 96 Syn100 100
}
