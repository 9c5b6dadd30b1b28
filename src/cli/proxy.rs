//! `knockq proxy`

use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level::pipe;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, UnixStream};
use tokio::task::{LocalSet, spawn_local};

use super::failure::Failure;
use super::knock::{self, KnockArgs, runtime};
use super::note;
use crate::client::connect::Knocker;
use crate::client::proxy::{self, Event};
use crate::client::send::RawSockets;
use crate::client::socks::{Login, SocksError};
use crate::client::{Aim, Home};

#[derive(Args)]
#[command(
    after_help = "Examples:\n  knockq proxy\n  curl --proxy socks5h://127.0.0.1:1080 http://server.example.org/\n  \
                        ssh -o ProxyCommand='nc -X 5 -x 127.0.0.1:1080 %h %p' alice@server.example.org\n  \
                        knockq proxy --listen 127.0.0.1:1081 --listen '[::1]:1081' --auth ~/.config/knockq/proxy\n\n\
                        A browser, here Firefox: Settings, Network Settings, Manual proxy configuration; \
                        SOCKS Host 127.0.0.1, Port 1080, SOCKS v5, and Proxy DNS when using SOCKS v5.\n\n\
                        Whoever can connect to it can use your doors: on a machine of several users, say --auth."
)]
pub(super) struct Proxy {
    /// Where to listen: an address of loopback; may be given several times
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:1080")]
    listen: Vec<Listen>,
    /// Let in only who has the user and password in this file: one line, user:password, that you alone may read
    #[arg(long, value_name = "FILE")]
    auth: Option<PathBuf>,
    #[command(flatten)]
    knock: KnockArgs,
}

#[derive(Clone, Copy)]
struct Listen(SocketAddr);

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let address: SocketAddr =
            text.parse().map_err(|_| "not an address with a port, as in 127.0.0.1:1080 and [::1]:1080".to_owned())?;
        if address.ip().is_loopback() {
            return Ok(Self(address));
        }
        Err("not an address of loopback: the proxy would knock for everybody who can reach it. Listen on 127.0.0.1 or [::1], \
             and come from elsewhere through `ssh -L 1080:127.0.0.1:1080`"
            .to_owned())
    }
}

impl Proxy {
    pub(super) fn run(self) -> Result<(), Failure> {
        // First of all, so that the capability is gone before anything is read.
        let sockets = RawSockets::open()?;
        let login = self.auth.as_deref().map(Login::read).transpose()?;
        let home = Home::of_environment()?;
        let knocker = Knocker::new(home.clone(), sockets, knock::tell);
        let proxy = Arc::new(proxy::Proxy::new(home, self.knock.request("", None), knocker, login, tell));
        let runtime = runtime()?;
        let done = LocalSet::new().block_on(&runtime, self.serve(&proxy));
        runtime.shutdown_background(); // a resolver may hold a thread for long
        done
    }

    /// Until a signal. Who is connected then is cut off, as if the program itself had been ended.
    async fn serve(&self, proxy: &Arc<proxy::Proxy>) -> Result<(), Failure> {
        let fail = |error: io::Error| Failure::new(format!("cannot start: {error}"));
        let mut signals = signals().map_err(fail)?;
        let mut listeners = Vec::new();
        for Listen(address) in &self.listen {
            listeners.push(TcpListener::bind(address).await.map_err(|error| not_bound(*address, &error))?);
        }
        for listener in listeners {
            note(&format!("Listening on {}", listener.local_addr().map_err(fail)?));
            spawn_local(Arc::clone(proxy).serve(listener));
        }
        signals.read_u8().await.map_err(fail)?;
        note(&format!("Stopped; connections closed: {}", proxy.connections()));
        Ok(())
    }
}

/// A byte comes out of it when the process is to end.
fn signals() -> io::Result<UnixStream> {
    let (reader, writer) = StdUnixStream::pair()?;
    for signal in [SIGINT, SIGTERM] {
        pipe::register(signal, writer.try_clone()?)?;
    }
    reader.set_nonblocking(true)?;
    UnixStream::from_std(reader)
}

fn not_bound(address: SocketAddr, error: &io::Error) -> Failure {
    let failure = Failure::new(format!("--listen {address}: {error}"));
    match error.kind() {
        io::ErrorKind::AddrInUse => failure.hint(format!(
            "does a proxy run already? See who has the port with `ss -ltnp sport = :{0}`, or listen on another",
            address.port()
        )),
        io::ErrorKind::PermissionDenied => failure.hint("listen on a port above 1023"),
        _ => failure,
    }
}

/// One line each.
fn tell(event: Event<'_>) {
    note(&match event {
        Event::Knocked { aim: Aim { host, service, .. }, server } => {
            format!("Knocked at {host} ({}) for {service}", server.ip())
        }
        Event::Failed { target, error } => format!("Failed for {target}: {}", Failure::from(error).line()),
        Event::Client { peer, error } => {
            let remedy = match error {
                SocksError::Version => ": have it use SOCKS 5, neither SOCKS 4 nor an HTTP proxy",
                SocksError::NoMethod => ": --auth and what the client was told must agree",
                _ => "",
            };
            format!("Refused the client at {peer}: {error}{remedy}")
        }
        Event::Full(connections) => format!("{connections} connections at once: more have to wait until one ends"),
        Event::Accept(error) => format!("Cannot accept a connection: {error}"),
    });
}
