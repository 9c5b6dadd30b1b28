//! What root asks of the running daemon, through a socket of its own: a request and its reply are one value each, in postcard's
//! encoding, each sent in one go. Both ends are this binary.

use std::io::{self, ErrorKind, Read, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::report::{Part, ROOM, RefusedPart, RevokedPart};
use crate::service::Name;

/// Bytes of the longest request.
pub(super) const MAX_LEN: usize = 4096;

/// Time that the daemon may take: as long as it waits for the files, and then for a disk. Ten thousand users take two
/// seconds to reload.
const WORK: Duration = Duration::from_secs(150);

/// What is asked.
#[derive(PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Request {
    /// Read the configuration again.
    Reload,
    /// Shut doors, and hand over which were whose.
    Revoke(Selection),
    /// Keep the gate that `serve --try` set up.
    Confirm,
    /// Hand over what the engine knows of the packets that were refused last.
    Explain,
}

/// Which doors.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Selection {
    /// Those of a source address or network.
    Source(IpNet),
    /// What a user opened.
    User(Name),
    /// Every one.
    All,
}

impl Selection {
    /// Whether this grant is meant.
    pub fn covers(&self, source: IpAddr, user: &Name) -> bool {
        self.is_source(source) || self.is_of(user)
    }

    /// Whether this user's doors are meant, whatever their source.
    pub fn is_of(&self, user: &Name) -> bool {
        match self {
            Self::Source(_) => false,
            Self::User(meant) => user == meant,
            Self::All => true,
        }
    }

    /// Whether this source is meant, whoever it is.
    pub fn is_source(&self, source: IpAddr) -> bool {
        self.network().is_some_and(|network| network.contains(&source))
    }

    /// The network that is meant, whoever is there.
    pub const fn network(&self) -> Option<IpNet> {
        match self {
            Self::Source(network) => Some(*network),
            _ => None,
        }
    }
}

/// What came of it.
#[derive(Serialize, Deserialize)]
pub enum Reply {
    /// It is done.
    Done,
    /// It is not, and why.
    Refused {
        /// Why.
        message: String,
        /// What to do about it.
        hint: String,
    },
    /// Doors are shut, and these were whose.
    Revoked(RevokedPart),
    /// What was refused last.
    Explained(RefusedPart),
}

impl Part for Reply {
    fn halve(&mut self) {
        match self {
            Self::Done | Self::Refused { .. } => {}
            Self::Revoked(part) => part.halve(),
            Self::Explained(part) => part.halve(),
        }
    }
}

/// Why nobody answers, or the answer is no use.
#[derive(Debug, Error)]
pub enum ControlError {
    /// Nobody listens.
    #[error("{}: the daemon is not running", path.display())]
    NotRunning {
        /// The socket.
        path: PathBuf,
    },
    /// It has ended, or could make nothing of the request.
    #[error("{}: the daemon hung up before it answered, so what was asked may be done or not", path.display())]
    HungUp {
        /// The socket.
        path: PathBuf,
    },
    /// Another daemon listens.
    #[error("{}: another daemon listens there", path.display())]
    Taken {
        /// The socket.
        path: PathBuf,
    },
    /// It has other clients who leave what they asked for unread.
    #[error("{}: the daemon has told its status to many who do not take it", path.display())]
    Busy {
        /// The socket.
        path: PathBuf,
    },
    /// It does not answer.
    #[error("{}: the daemon runs, but does not answer: its engine stands still", path.display())]
    Silent {
        /// The socket.
        path: PathBuf,
    },
    /// The daemon was started from another version of this binary.
    #[error("{}: the daemon that runs is another version than this command", path.display())]
    OtherVersion {
        /// The socket.
        path: PathBuf,
    },
    /// The socket failed.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },
}

impl ControlError {
    pub(super) fn of_connecting(path: &Path, cause: io::Error) -> Self {
        let path = path.to_owned();
        match cause.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Self::NotRunning { path },
            _ => Self::Io { path, cause },
        }
    }

    pub(super) fn of_talking(path: PathBuf, cause: io::Error) -> Self {
        match cause.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Self::Silent { path },
            ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => Self::HungUp { path },
            ErrorKind::InvalidData => Self::OtherVersion { path },
            _ => Self::Io { path, cause },
        }
    }
}

/// Asks the running daemon.
///
/// # Errors
/// [`ControlError`]; then nothing has been done, or nobody knows.
pub fn ask(directory: &Path, request: &Request) -> Result<Reply, ControlError> {
    let path = control_path(directory);
    let mut stream = UnixStream::connect(&path).map_err(|cause| ControlError::of_connecting(&path, cause))?;
    let request = postcard::to_stdvec(request).map_err(io::Error::other);
    let told = stream.set_read_timeout(Some(WORK)).and(request).and_then(|request| stream.write_all(&request));
    let reply = told.and_then(|()| read_all(&stream)).and_then(|reply| match reply.as_slice() {
        [] => Err(ErrorKind::UnexpectedEof.into()),
        reply => postcard::from_bytes(reply).map_err(|_| ErrorKind::InvalidData.into()),
    });
    reply.map_err(|cause| ControlError::of_talking(path, cause))
}

/// All that the daemon says.
pub(super) fn read_all(stream: &UnixStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.take(u64::try_from(ROOM).unwrap_or(u64::MAX)).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Where root's commands go.
pub(super) fn control_path(directory: &Path) -> PathBuf {
    directory.join("control.sock")
}

/// Where the status is told.
pub(super) fn status_path(directory: &Path) -> PathBuf {
    directory.join("status.sock")
}

/// Where events are told.
pub(super) fn watch_path(directory: &Path) -> PathBuf {
    directory.join("watch.sock")
}
