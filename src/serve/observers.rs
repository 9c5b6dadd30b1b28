//! The sockets for those who may look and do nothing: root, and the group of the daemon's account.
//!
//! Root accepts connections there and never reads from one, so there is nothing that a client could say; nor does it
//! wait for a client.

use std::fs;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::unistd::{Gid, setegid};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use rustix::net::sockopt::{Timeout, set_socket_send_buffer_size, set_socket_timeout, socket_peercred};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags,
    SocketType, accept_with, bind, connect, listen, sendmsg, shutdown, socket_with,
};
use rustix::process::umask;

use super::control::{ControlError, receive_with_descriptors};
use super::report::{self, DoorsPart, EnginePart, KnocksPart, RootPart};
use super::watchers::{self, Event};

/// Bytes of the message that hands a status over: more than a quarter of the smallest send buffer, so that a socket can be
/// written to only when it was taken.
const STATUS_LEN: usize = 2048;

/// Time between two clients: whoever connects all the time leaves the daemon its own.
const PAUSE: Duration = Duration::from_millis(20);

/// Time between two watchers: each is told of to the other processes, who must come after it.
const PAUSE_OF_WATCHERS: Duration = Duration::from_millis(250);

/// Time that a client waits for the daemon: as long as it waits for its processes.
const WORK: Duration = Duration::from_secs(150);

/// Clients that wait to be accepted.
const BACKLOG: i32 = 64;

/// Root's end of one socket.
struct Listener {
    socket: OwnedFd,
    path: PathBuf,
}

/// What a client comes for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wish {
    /// To know the status.
    Status,
    /// To watch.
    Watch,
}

/// Root's ends.
pub(super) struct Observers {
    status: Listener,
    watch: Listener,
    /// What the last one came for.
    last: Wish,
    /// Clients that have not yet taken what they were told, and their users: what is on its way to them counts against what
    /// root may send.
    unread: Vec<(OwnedFd, u32)>,
    /// When the last was accepted, and when the next will be.
    accepted: Instant,
    resumes: Instant,
}

/// What all processes tell.
pub struct Status {
    /// Root.
    pub root: RootPart,
    /// Of knocks.
    pub knocks: KnocksPart,
    /// Of doors.
    pub doors: DoorsPart,
}

impl Observers {
    /// Listens, for root and this group. Root need not be able to give files to others: what it makes while it is of the
    /// group belongs to that.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn listen(directory: &Path, group: Option<u32>) -> Result<Self, ControlError> {
        let status = Listener::new(directory.join("status.sock"), group)?;
        let watch = Listener::new(directory.join("watch.sock"), group)?;
        let now = Instant::now();
        Ok(Self { status, watch, last: Wish::Watch, unread: Vec::new(), accepted: now, resumes: now })
    }

    /// When the next client is accepted, if that is not now.
    pub(super) fn resumes(&self, now: Instant) -> Option<Instant> {
        (self.resumes > now).then_some(self.resumes)
    }

    /// Where clients come who want to know the status, and those who watch, if it is time for one. Who had the last turn comes
    /// second: clients of one kind that come all the time keep none of the other out.
    pub(super) fn listeners(&self) -> Option<[(Wish, BorrowedFd<'_>); 2]> {
        let status = (Wish::Status, self.status.socket.as_fd());
        let watch = (Wish::Watch, self.watch.socket.as_fd());
        let in_turn = if self.last == Wish::Status { [watch, status] } else { [status, watch] };
        self.resumes(Instant::now()).is_none().then_some(in_turn)
    }

    /// The next client who wants to know the status; `None` if too many leave theirs unread.
    pub(super) fn accept_status(&mut self) -> Option<OwnedFd> {
        self.last = Wish::Status;
        self.accepted = Instant::now();
        self.resumes = self.accepted + PAUSE;
        let client = self.status.accept()?;
        self.unread.retain(|(client, _)| !can_be_written(client));
        watchers::has_place(user(&client)?, self.unread.iter().map(|(_, uid)| *uid)).then_some(client)
    }

    /// The next client who watches, and whose it is.
    pub(super) fn accept_watcher(&mut self) -> Option<(OwnedFd, u32)> {
        self.last = Wish::Watch;
        self.resumes = Instant::now() + PAUSE_OF_WATCHERS;
        let client = self.watch.accept()?;
        let uid = user(&client)?;
        Some((client, uid))
    }

    /// Hands a client what there is to tell. Whoever does not take it has not asked.
    pub(super) fn hand_over(&mut self, client: OwnedFd, root: &RootPart, engine: &OwnedFd) {
        let Ok(mut bytes) = postcard::to_stdvec(&(env!("CARGO_PKG_VERSION"), root)) else { return };
        bytes.resize(bytes.len().max(STATUS_LEN), 0);
        let descriptors = [engine.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        if set_socket_send_buffer_size(&client, 1).is_ok() // the smallest that the kernel gives
            && ancillary.push(SendAncillaryMessage::ScmRights(&descriptors))
            && sendmsg(&client, &[IoSlice::new(&bytes)], &mut ancillary, flags).is_ok()
            && let Some(uid) = user(&client)
        {
            self.unread.push((client, uid));
        }
        let now = Instant::now();
        self.resumes = now + PAUSE.max(now.duration_since(self.accepted)); // half of the time is for knocks
    }
}

/// The user id of who connected.
fn user(client: &OwnedFd) -> Option<u32> {
    socket_peercred(client).ok().map(|peer| peer.uid.as_raw())
}

/// Whether all that was said was taken, or never can be.
fn can_be_written(client: &OwnedFd) -> bool {
    poll(&mut [PollFd::new(client, PollFlags::OUT)], Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

impl Listener {
    fn new(path: PathBuf, group: Option<u32>) -> Result<Self, ControlError> {
        let _ = fs::remove_file(&path); // of a daemon that was killed
        match listener(&path, group) {
            Ok(socket) => Ok(Self { socket, path }),
            Err(cause) => Err(ControlError::Io { path, cause }),
        }
    }

    /// The next client, who can say nothing.
    fn accept(&self) -> Option<OwnedFd> {
        let client = accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).ok()?;
        shutdown(&client, Shutdown::Read).ok()?;
        Some(client)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn listener(path: &Path, group: Option<u32>) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    let address = SocketAddrUnix::new(path)?;
    let own = Gid::effective();
    let group = group.map_or(own, Gid::from_raw);
    if group != own {
        setegid(group)?;
    }
    let before = umask(Mode::XUSR | Mode::XGRP | Mode::RWXO);
    let bound = bind(&socket, &address);
    umask(before);
    if group != own {
        setegid(own)?;
    }
    bound?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Asks the running daemon how it is.
///
/// # Errors
/// [`ControlError`].
pub fn status(directory: &Path) -> Result<Status, ControlError> {
    let path = directory.join("status.sock");
    let connection = connection(&path)?;
    let fail = |cause| ControlError::Io { path: path.clone(), cause };
    let (bytes, descriptors) = receive_with_descriptors(&connection).map_err(fail)?;
    let (version, rest) = postcard::take_from_bytes::<String>(&bytes).unwrap_or_default();
    if bytes.is_empty() {
        return Err(ControlError::Busy { path });
    }
    if version != env!("CARGO_PKG_VERSION") {
        return Err(ControlError::OtherVersion { path });
    }
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let parts = || {
        let (root, _) = postcard::take_from_bytes(rest).map_err(|_| invalid())?;
        let [engine] = descriptors.try_into().map_err(|_| invalid())?;
        let EnginePart { knocks, doors } = report::read(engine)?;
        Ok(Status { root, knocks, doors })
    };
    parts().map_err(fail)
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
    let path = directory.join("watch.sock");
    let connection = connection(&path)?;
    match set_socket_timeout(&connection, Timeout::Recv, None) {
        Ok(()) => Ok(Watching { connection, path }),
        Err(cause) => Err(ControlError::Io { path, cause: cause.into() }),
    }
}

impl Watching {
    /// Waits for the next event; `None` at the daemon's end.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn event(&self) -> Result<Option<Event>, ControlError> {
        let fail = |cause| ControlError::Io { path: self.path.clone(), cause };
        loop {
            let (bytes, _) = match receive_with_descriptors(&self.connection) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                received => received.map_err(fail)?,
            };
            if bytes.is_empty() {
                return Ok(None);
            }
            let event: Event = serde_json::from_slice(&bytes).map_err(|error| fail(error.into()))?;
            if !event.0.is_empty() {
                return Ok(Some(event));
            }
        }
    }
}

fn connection(path: &Path) -> Result<OwnedFd, ControlError> {
    let connect = || {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        set_socket_timeout(&socket, Timeout::Recv, Some(WORK))?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        io::Result::Ok(socket)
    };
    connect().map_err(|cause| ControlError::of_connecting(path, cause))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::{Instant, Listener, Observers, Wish};

    #[test]
    fn who_asks_for_the_status_all_the_time_keeps_nobody_from_watching() {
        let directory = std::env::temp_dir().join(format!("knockq-observers-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let listener = |name: &str| {
            let path = directory.join(name);
            Listener { socket: UnixListener::bind(&path).unwrap().into(), path }
        };
        let (status, watch, now) = (listener("status.sock"), listener("watch.sock"), Instant::now());
        let clients = ["status.sock", "status.sock", "watch.sock", "watch.sock"];
        let _clients = clients.map(|name| UnixStream::connect(directory.join(name)).unwrap());
        let mut observers =
            Observers { status, watch, last: Wish::Watch, unread: Vec::new(), accepted: now, resumes: now };
        let turns = [(); 4].map(|()| {
            let wish = loop {
                if let Some([(wish, _), _]) = observers.listeners() {
                    break wish;
                }
                std::thread::yield_now();
            };
            let is_accepted = match wish {
                Wish::Status => observers.accept_status().is_some(),
                Wish::Watch => observers.accept_watcher().is_some(),
            };
            assert!(is_accepted);
            wish
        });
        drop(observers);
        fs::remove_dir(&directory).unwrap();
        assert_eq!(turns, [Wish::Status, Wish::Watch, Wish::Status, Wish::Watch]);
    }
}
