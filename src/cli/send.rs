//! `knockq send`

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::failure::{Failure, NOT_FOUND, NOT_RUN};
use super::knock::{KnockArgs, Progress, runtime, tell};
use super::{note, print};
use crate::client::connect::confirm;
use crate::client::send::{Knock, RawSockets, SentToken};
use crate::client::{Aim, Home, Sent};

/// Time after which `--wait` gives up.
const WAIT: Duration = Duration::from_secs(10);

#[derive(Args)]
#[command(after_help = "Examples:\n  knockq send home\n  knockq send home ssh --wait && ssh home\n  \
                        knockq send home -- ssh home\n  knockq send -6 home 443 --source none\n\n\
                        With COMMAND, the exit code is the command's; 126 and 127 if it cannot be run or is not there.")]
pub(super) struct Send {
    /// The host: its name as given to `knockq host add`, or a name or address of its server
    host: String,
    /// A service's name or port; may be left out if there is one, or the profile has a default
    service: Option<String>,
    #[command(flatten)]
    knock: KnockArgs,
    /// Confirm by connecting to the service, for up to 10 s, and say what to check if it stays shut
    #[arg(long, conflicts_with = "print")]
    wait: bool,
    /// Print the packet instead of sending it; its counter is used up
    #[arg(long, value_name = "FORMAT", conflicts_with = "command")]
    print: Option<Format>,
    /// Run this once the service is open, as with --wait
    #[arg(last = true)]
    command: Vec<OsString>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// From the IP header on, in hexadecimal
    Hex,
}

impl Send {
    /// Whether nothing is to be sent.
    pub(super) const fn prints(&self) -> bool {
        self.print.is_some()
    }

    pub(super) fn run(self) -> Result<(), Failure> {
        // First of all, so that the capability is gone before anything is read.
        let sockets = if self.print.is_none() { Some(RawSockets::open()?) } else { None };
        let home = Home::of_environment()?;
        let aim = Aim::find(&home, &self.knock.request(&self.host, self.service.as_deref()))?;
        let knock = Knock::prepare(&home, &aim, aim.server()?, tell)?;
        let Some(sockets) = sockets else {
            return print(&(knock.packet.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + "\n"));
        };
        let sent = sockets.send(knock)?;
        drop(sockets);
        report(&aim, &sent);
        if self.wait || !self.command.is_empty() {
            wait(&aim, &sent)?;
        }
        self.command.split_first().map_or(Ok(()), |(program, arguments)| Err(become_command(program, arguments)))
    }
}

fn report(aim: &Aim, sent: &Sent) {
    let (Aim { host, service, .. }, server) = (aim, sent.server.ip());
    let what = match &sent.token {
        SentToken::Own { bound_to: Some(address), .. } => format!("bound to {address}"),
        SentToken::Own { bound_to: None, .. } => {
            "not bound to an address: until it arrives, whoever copies it could spend it first".to_owned()
        }
        SentToken::Knockknock { count, .. } => format!("count {count}"),
    };
    note(&format!("Knocked at {host} ({server}) for {service}; {what}"));
    let SentToken::Own { is_clock_unsynchronized, has_future_counter, .. } = sent.token else { return };
    if is_clock_unsynchronized {
        note(
            "warning: this machine's clock is not synchronised, says its kernel, and a server takes knocks of its own time only: \
             see timedatectl",
        );
    }
    if has_future_counter {
        note(
            "warning: this machine's clock was ahead once; a knock of then, if copied, could be spent when its time comes",
        );
    }
}

fn wait(aim: &Aim, sent: &Sent) -> Result<(), Failure> {
    let (Aim { host, service, .. }, server) = (aim, sent.server.ip());
    let progress = Progress::new(format!("{service} of {host} to open"));
    let confirmed = runtime()?.block_on(confirm(aim, sent, WAIT, |seconds| progress.tick(seconds)));
    drop(progress);
    note(&if confirmed? {
        format!("{service} of {host} is open at {server}")
    } else {
        format!("{service} of {host} cannot be confirmed by a connection: it is for one connection only, or not TCP")
    });
    Ok(())
}

/// Turns this process into the command's; returns only if that fails.
fn become_command(program: &OsString, arguments: &[OsString]) -> Failure {
    let error = Command::new(program).args(arguments).exec();
    let code = if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_RUN };
    Failure::new(format!("{}: {error}", program.display()))
        .hint("the door is open; name a program after --, with its arguments")
        .code(code)
}
