//! Those who connect to the daemon: root, with commands, and who looks on. Nobody is waited for: who does not say in time what he
//! wants, or does not take what he is told, is left.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram as StdSocket, UnixListener as StdListener};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::sockopt::socket_peercred;
use rustix::net::{Shutdown, SocketFlags, accept_with, shutdown};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixDatagram, UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::{sleep, sleep_until, timeout};

use super::control::{MAX_LEN, Reply, Request};
use super::report::{Status, encode};
use super::watchers;

/// Time that root's command has to say what it wants.
const PATIENCE: Duration = Duration::from_secs(1);

/// Time that a client has to take what it is told.
const TAKING: Duration = Duration::from_secs(10);

/// Commands of root's that are waited for at most.
const COMMANDS: usize = 64;

/// Time between two who look on: whoever connects all the time leaves the daemon its own.
const PAUSE: Duration = Duration::from_millis(20);

/// Who has come.
pub(super) enum Visitor {
    /// Root wants this, and waits for its reply.
    Asker(Request, Asker),
    /// Somebody wants to know the status.
    Status(Reader),
    /// Somebody watches: the socket, and whose it is.
    Watcher(OwnedFd, u32),
}

/// Where a reply goes.
pub(super) struct Asker(UnixStream);

/// Where a status goes; he has one of the places as long as he reads.
pub(super) struct Reader {
    stream: UnixStream,
    place: Place,
}

/// The sockets that root made.
pub(super) struct Visitors {
    control: UnixListener,
    status: UnixListener,
    /// One that keeps messages apart; the runtime knows none of that kind.
    watch: UnixDatagram,
    asking: mpsc::Sender<(Request, Asker)>,
    asked: mpsc::Receiver<(Request, Asker)>,
    /// The users of those who read a status.
    readers: Arc<Mutex<Vec<u32>>>,
    /// Who had the last turn comes second: clients of one kind that come all the time keep none of the other out.
    last_was_status: bool,
    /// When the last was accepted, and when the next will be.
    accepted: Instant,
    resumes: Instant,
}

/// One of the places of those who read a status.
struct Place {
    readers: Arc<Mutex<Vec<u32>>>,
    uid: u32,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = readers.iter().position(|uid| *uid == self.uid) {
            readers.swap_remove(place);
        }
    }
}

impl Visitors {
    /// Begins to listen, within a runtime.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn new([control, status, watch]: [OwnedFd; 3]) -> io::Result<Self> {
        let now = Instant::now();
        let (asking, asked) = mpsc::channel(COMMANDS);
        Ok(Self {
            control: UnixListener::from_std(StdListener::from(control))?,
            status: UnixListener::from_std(StdListener::from(status))?,
            watch: UnixDatagram::from_std(StdSocket::from(watch))?,
            asking,
            asked,
            readers: Arc::default(),
            last_was_status: false,
            accepted: now,
            resumes: now,
        })
    }

    /// The next who comes. Dropping this loses nobody.
    pub(super) async fn next(&mut self) -> Visitor {
        loop {
            tokio::select! {
                biased;
                Some((request, asker)) = self.asked.recv() => return Visitor::Asker(request, asker),
                accepted = self.control.accept(), if self.asking.capacity() > 0 => {
                    let Ok((stream, _)) = accepted else {
                        sleep(PAUSE).await; // there is no descriptor for it
                        continue;
                    };
                    if let Ok(place) = self.asking.clone().try_reserve_owned() {
                        tokio::spawn(async move {
                            if let Ok(Some(request)) = timeout(PATIENCE, request(stream)).await {
                                place.send(request);
                            }
                        });
                    }
                }
                visitor = observer(&self.status, &self.watch, self.last_was_status, self.resumes) => {
                    self.accepted = Instant::now();
                    self.last_was_status = matches!(visitor, Accepted::Status(_));
                    self.resumes = self.accepted + PAUSE;
                    match visitor {
                        Accepted::Status(Some((stream, uid))) => {
                            if let Some(place) = self.place(uid) {
                                return Visitor::Status(Reader { stream, place });
                            }
                        }
                        Accepted::Watcher(Some((socket, uid))) => return Visitor::Watcher(socket, uid),
                        Accepted::Status(None) | Accepted::Watcher(None) => {}
                    }
                }
            }
        }
    }

    fn place(&self, uid: u32) -> Option<Place> {
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        let has_place = watchers::has_place(uid, readers.iter().copied());
        has_place.then(|| {
            readers.push(uid);
            Place { readers: Arc::clone(&self.readers), uid }
        })
    }

    /// Tells how the daemon is. Half of the time is for knocks, whoever asks.
    pub(super) fn tell(&mut self, Reader { stream, place }: Reader, status: Status) {
        tokio::spawn(async move {
            write(stream, encode(status)).await;
            drop(place);
        });
        let now = Instant::now();
        self.resumes = now + PAUSE.max(now.duration_since(self.accepted));
    }
}

impl Asker {
    /// Replies; whoever asked may have gone away.
    pub(super) fn reply(self, reply: Reply) {
        tokio::spawn(write(self.0, encode(reply)));
    }
}

/// What root's command wants.
async fn request(mut stream: UnixStream) -> Option<(Request, Asker)> {
    let mut bytes = [0; MAX_LEN];
    let length = stream.read(&mut bytes).await.ok()?;
    let request = postcard::from_bytes(bytes.get(..length)?).ok()?;
    Some((request, Asker(stream)))
}

async fn write(mut stream: UnixStream, bytes: Vec<u8>) {
    let _ = timeout(TAKING, stream.write_all(&bytes)).await;
}

enum Accepted {
    Status(Option<(UnixStream, u32)>),
    Watcher(Option<(OwnedFd, u32)>),
}

/// The next who looks on, when it is time for one.
async fn observer(status: &UnixListener, watch: &UnixDatagram, last_was_status: bool, resumes: Instant) -> Accepted {
    sleep_until(resumes.into()).await;
    let status = async {
        let stream = status.accept().await.ok().map(|(stream, _)| stream);
        Accepted::Status(stream.and_then(|stream| stream.peer_cred().ok().map(|peer| (stream, peer.uid()))))
    };
    let watcher = async {
        let accept = || Ok(accept_with(watch, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?);
        let socket = watch.async_io(Interest::READABLE, accept).await.ok();
        Accepted::Watcher(socket.and_then(|socket| {
            shutdown(&socket, Shutdown::Read).ok()?; // there is nothing that a watcher could say
            let uid = socket_peercred(&socket).ok()?.uid.as_raw();
            Some((socket, uid))
        }))
    };
    if last_was_status {
        tokio::select! { biased; visitor = watcher => visitor, visitor = status => visitor }
    } else {
        tokio::select! { biased; visitor = status => visitor, visitor = watcher => visitor }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::{UnixListener, UnixStream};

    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};

    use super::{Visitor, Visitors};

    #[test]
    fn who_asks_for_the_status_all_the_time_keeps_nobody_from_watching() {
        let directory = std::env::temp_dir().join(format!("knockq-visitors-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let address = |name: &str| SocketAddrUnix::new(directory.join(name)).unwrap();
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let seqpacket = || socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let stream = |name: &str| {
            let listener = UnixListener::bind(directory.join(name)).unwrap();
            listener.set_nonblocking(true).unwrap();
            OwnedFd::from(listener)
        };
        let watch = seqpacket();
        bind(&watch, &address("watch")).unwrap();
        listen(&watch, 8).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _inside = runtime.enter();
        let mut visitors = Visitors::new([stream("control"), stream("status"), watch]).unwrap();
        let _asking = [(); 2].map(|()| UnixStream::connect(directory.join("status")).unwrap());
        let _watching = [(); 2].map(|()| {
            let socket = seqpacket();
            connect(&socket, &address("watch")).unwrap();
            socket
        });
        let turns = [(); 4].map(|()| matches!(runtime.block_on(visitors.next()), Visitor::Status(_)));
        fs::remove_dir_all(&directory).unwrap();
        assert_eq!(turns, [true, false, true, false]);
    }
}
