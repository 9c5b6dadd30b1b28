//! `knockq connect`

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt::set_socket_keepalive;

use super::failure::Failure;
use super::knock::{KnockArgs, runtime, tell};
use crate::client::connect::Knocker;
use crate::client::send::RawSockets;
use crate::client::{Aim, Home};
use crate::config::Seconds;

#[derive(Args)]
#[command(after_help = "Examples:\n  ssh -o ProxyCommand='knockq connect %h %p' alice@server.example.org\n  \
                        knockq connect home ssh </dev/null\n\n\
                        In ~/.ssh/config, for one host:\n  Host home\n    HostName server.example.org\n    \
                        ProxyCommand knockq connect %h %p")]
pub(super) struct Connect {
    /// The host: its name as given to `knockq host add`, or a name or address of its server
    host: String,
    /// The port to connect to, or the service's name
    port: String,
    #[command(flatten)]
    knock: KnockArgs,
    /// Time within which the connection must stand
    #[arg(long, value_name = "TIME", default_value = "10s")]
    timeout: Seconds,
}

impl Connect {
    pub(super) fn run(self) -> Result<(), Failure> {
        // First of all, so that the capability is gone before anything is read.
        let sockets = RawSockets::open()?;
        let home = Home::of_environment()?;
        let aim = Arc::new(Aim::find(&home, &self.knock.request(&self.host, Some(&self.port)))?);
        let knocker = Arc::new(Knocker::new(home, sockets, tell));
        let time = Duration::from_secs(self.timeout.0.into());
        let runtime = runtime()?;
        let stream = runtime.block_on(knocker.connect(&aim, time))?;
        let fail = |error: io::Error| Failure::new(format!("{} {}: {error}", self.host, self.port));
        let stream =
            stream.into_std().and_then(|stream| stream.set_nonblocking(false).map(|()| stream)).map_err(fail)?;
        drop((runtime, knocker)); // and with them the raw sockets
        splice(stream).map_err(fail)
    }
}

/// Copies both ways until both have ended, each by itself.
fn splice(stream: TcpStream) -> io::Result<()> {
    // ssh would set both on a connection of its own.
    stream.set_nodelay(true)?;
    set_socket_keepalive(&stream, true)?;
    // Not std's, whose output waits for the end of a line.
    let mut input = Patient(io::stdin().as_fd().try_clone_to_owned()?.into());
    let output = Patient(io::stdout().as_fd().try_clone_to_owned()?.into());
    rustix::stdio::dup2_stdout(File::open("/dev/null")?)?; // so that dropping `output` closes it
    let (mut writer, reader) = (stream.try_clone()?, stream);
    let sender = thread::spawn(move || {
        let sent = copy(&mut input, &mut writer);
        let _ = writer.shutdown(Shutdown::Write);
        sent
    });
    match receive(reader, output) {
        // Nobody reads what comes any more.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
        received => received?,
    }
    sender.join().unwrap_or_else(|_| Err(ErrorKind::Other.into()))
}

/// Closes both in the end.
fn receive(mut reader: TcpStream, mut output: Patient) -> io::Result<()> {
    copy(&mut reader, &mut output)
}

/// A descriptor that other programs have as well: any of them may have set it not to wait. This waits all the same.
struct Patient(File);

impl Patient {
    fn wait(&self, until: PollFlags) -> io::Result<()> {
        poll(&mut [PollFd::new(&self.0, until)], None)?;
        Ok(())
    }
}

impl Read for Patient {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait(PollFlags::IN)?,
                done => return done,
            }
        }
    }
}

impl Write for Patient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.0.write(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait(PollFlags::OUT)?,
                done => return done,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Through memory. Knowing what they are, std would have the kernel splice them, and until a pipe can go on its other end
/// cannot even look at it: both programs would wait for each other.
fn copy(from: &mut dyn Read, to: &mut dyn Write) -> io::Result<()> {
    io::copy(from, to).map(drop)
}
