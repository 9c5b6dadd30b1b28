//! Root's command socket: what root asks of the running daemon.
//!
//! A request and its reply are one value each, in postcard's encoding, sent in one go. Both ends are this binary.

use std::fs;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use rustix::fs::Mode;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use rustix::process::umask;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::service::Name;

/// Bytes of the longest request or reply.
const MAX_LEN: usize = 4096;

/// Time that a client has to say what it wants, and to take the reply: root waits for nobody.
const PATIENCE: Duration = Duration::from_secs(1);

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
#[derive(PartialEq, Eq, Debug, Serialize, Deserialize)]
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

    fn of_talking(path: PathBuf, cause: io::Error) -> Self {
        match cause.kind() {
            ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => Self::HungUp { path },
            ErrorKind::InvalidData => Self::OtherVersion { path },
            _ => Self::Io { path, cause },
        }
    }
}

/// Root's end.
pub struct Control {
    listener: UnixListener,
    path: PathBuf,
}

impl Control {
    /// Listens, for root alone.
    ///
    /// # Errors
    /// When another daemon does, or the directory cannot be made.
    pub fn listen(directory: &Path) -> Result<Self, ControlError> {
        let path = socket_path(directory);
        let fail = |cause| ControlError::Io { path: path.clone(), cause };
        if UnixStream::connect(&path).is_ok() {
            return Err(ControlError::Taken { path });
        }
        fs::create_dir_all(directory).map_err(fail)?;
        let _ = fs::remove_file(&path); // of a daemon that was killed
        let before = umask(Mode::XUSR | Mode::RWXG | Mode::RWXO);
        let listener = UnixListener::bind(&path);
        umask(before);
        let listener = listener.map_err(fail)?;
        listener.set_nonblocking(true).map_err(fail)?;
        Ok(Self { listener, path })
    }

    /// Takes one request, with the stream that its reply goes to; `None` if whoever asked did not ask in time, or made no
    /// sense.
    pub fn accept(&self) -> Option<(Request, UnixStream)> {
        let (mut stream, _) = self.listener.accept().ok()?;
        stream.set_nonblocking(false).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        stream.set_write_timeout(Some(PATIENCE)).ok()?;
        Some((receive(&mut stream).ok()?, stream))
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Replies; whoever asked may have gone away.
pub fn reply(mut stream: UnixStream, reply: &Reply) {
    let _ = send(&mut stream, reply);
}

/// Replies with a descriptor.
pub fn hand_over(stream: &UnixStream, memory: &OwnedFd) {
    let Ok(bytes) = postcard::to_stdvec(&Reply::Done) else { return };
    let descriptors = [memory.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        let _ = sendmsg(stream, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL);
    }
}

/// Asks the running daemon for something that it hands over as a descriptor; else its reply.
///
/// # Errors
/// As [`ask`].
pub fn ask_for_memory(directory: &Path, request: &Request) -> Result<Result<OwnedFd, Reply>, ControlError> {
    talk(directory, request, |stream| {
        let (bytes, mut descriptors) = receive_with_descriptors(&*stream)?;
        if bytes.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let reply = postcard::from_bytes(&bytes).map_err(|_| io::ErrorKind::InvalidData)?;
        Ok(descriptors.pop().ok_or(reply))
    })
}

/// What comes next, with two descriptors at most; no bytes at the end.
pub(super) fn receive_with_descriptors(socket: impl AsFd) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = vec![0; MAX_LEN];
    let received = recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    bytes.truncate(received.bytes);
    let descriptors = ancillary.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
        _ => Vec::new(),
    });
    Ok((bytes, descriptors.collect()))
}

/// Asks the running daemon.
///
/// # Errors
/// [`ControlError`]; then nothing has been done, or nobody knows.
pub fn ask(directory: &Path, request: &Request) -> Result<Reply, ControlError> {
    talk(directory, request, receive)
}

fn talk<T>(
    directory: &Path,
    request: &Request,
    answer: impl FnOnce(&mut UnixStream) -> io::Result<T>,
) -> Result<T, ControlError> {
    let path = socket_path(directory);
    let mut stream = UnixStream::connect(&path).map_err(|cause| ControlError::of_connecting(&path, cause))?;
    let told = stream.set_read_timeout(Some(WORK)).and_then(|()| send(&mut stream, request));
    told.and_then(|()| answer(&mut stream)).map_err(|cause| ControlError::of_talking(path, cause))
}

fn socket_path(directory: &Path) -> PathBuf {
    directory.join("control.sock")
}

fn send<T: Serialize>(stream: &mut UnixStream, value: &T) -> io::Result<()> {
    stream.write_all(&postcard::to_stdvec(value).map_err(io::Error::other)?)
}

fn receive<T: DeserializeOwned>(stream: &mut UnixStream) -> io::Result<T> {
    let mut bytes = [0; MAX_LEN];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => {
                let value = postcard::from_bytes(bytes.get(..length).unwrap_or_default());
                return value.map_err(|_| io::ErrorKind::InvalidData.into());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {} // by a signal: SIGHUP, say
            Err(error) => return Err(error),
        }
    }
}
