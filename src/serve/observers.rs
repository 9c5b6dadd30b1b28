//! What a client does to look on.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, socket_with};

use super::control::{ControlError, read_all, status_path, watch_path};
use super::report::Status;
use super::watchers::{Event, MAX_EVENT};

/// Time that the daemon has to answer: its engine waits for the gate for less.
const PATIENCE: Duration = Duration::from_secs(50);

/// Asks the running daemon how it is.
///
/// # Errors
/// [`ControlError`].
pub fn status(directory: &Path) -> Result<Status, ControlError> {
    let path = status_path(directory);
    let told = || {
        let stream = UnixStream::connect(&path).map_err(|cause| ControlError::of_connecting(&path, cause))?;
        let read = stream.set_read_timeout(Some(PATIENCE)).and_then(|()| read_all(&stream));
        read.map_err(|cause| ControlError::of_talking(path.clone(), cause))
    };
    let bytes = told()?;
    if bytes.is_empty() {
        return Err(ControlError::Busy { path });
    }
    let (version, _) = postcard::take_from_bytes::<String>(&bytes).unwrap_or_default();
    if version != env!("CARGO_PKG_VERSION") {
        return Err(ControlError::OtherVersion { path });
    }
    let invalid = |_| ControlError::Io { path, cause: ErrorKind::InvalidData.into() };
    postcard::from_bytes(&bytes).map_err(invalid)
}

/// What happens from now on.
pub struct Watching {
    connection: OwnedFd,
    path: PathBuf,
}

/// Watches the running daemon.
///
/// # Errors
/// [`ControlError`].
pub fn watch(directory: &Path) -> Result<Watching, ControlError> {
    let path = watch_path(directory);
    let connection = connection(&path)?;
    Ok(Watching { connection, path })
}

impl Watching {
    /// Waits for the next event; `None` at the daemon's end.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn event(&self) -> Result<Option<Event>, ControlError> {
        let fail = |cause| ControlError::Io { path: self.path.clone(), cause };
        loop {
            let mut bytes = [0; MAX_EVENT];
            let bytes = match recv(&self.connection, &mut bytes, RecvFlags::empty()) {
                Err(Errno::INTR) => continue,
                Ok((0, _)) => return Ok(None),
                received => bytes.get(..received.map_err(|error| fail(error.into()))?.0).unwrap_or_default(),
            };
            let event: Event = serde_json::from_slice(bytes).map_err(|error| fail(error.into()))?;
            if !event.0.is_empty() {
                return Ok(Some(event));
            }
        }
    }
}

fn connection(path: &Path) -> Result<OwnedFd, ControlError> {
    let connect = || {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        io::Result::Ok(socket)
    };
    connect().map_err(|cause| ControlError::of_connecting(path, cause))
}
