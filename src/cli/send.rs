//! `knockq send`

use std::net::IpAddr;
use std::str::FromStr;

use clap::{Args, ValueEnum};

use super::failure::Failure;
use super::{note, print};
use crate::client::Home;
use crate::client::send::{Family, Knock, RawSockets, Request, Sent, Source};

#[derive(Args)]
#[command(
    after_help = "Examples:\n  knockq send home\n  knockq send home ssh --wait && ssh home\n  knockq send -6 home 443 --source none"
)]
pub(super) struct Send {
    /// The host's name, as given to `knockq host add`
    host: String,
    /// A service's name or port; may be left out if there is one
    service: Option<String>,
    /// Knock over IPv4
    #[arg(short = '4', conflicts_with = "v6")]
    v4: bool,
    /// Knock over IPv6
    #[arg(short = '6')]
    v6: bool,
    /// The address that the server sees, to which the knock is bound; `none` binds it to none
    #[arg(long, value_name = "ADDR|none")]
    source: Option<SourceArg>,
    /// Confirm by connecting to the service, and say what to check if it stays shut
    #[arg(long, conflicts_with = "print")]
    wait: bool,
    /// Refuse to knock where this host's timestamps would let an observer tell a knock from a connection
    #[arg(long)]
    strict: bool,
    /// Print the packet instead of sending it; its counter is used up
    #[arg(long, value_name = "FORMAT")]
    print: Option<Format>,
}

#[derive(Clone, Copy)]
struct SourceArg(Source);

impl FromStr for SourceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self(Source::Unbound)),
            _ => text
                .parse::<IpAddr>()
                .map(|address| Self(Source::Address(address)))
                .map_err(|_| "not an IP address, nor `none`".to_owned()),
        }
    }
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
        let source = self.source.map_or(Source::Auto, |source| source.0);
        let family = match (self.v4, self.v6) {
            (true, _) => Family::V4,
            (_, true) => Family::V6,
            _ => Family::Any,
        };
        let request =
            Request { host: &self.host, service: self.service.as_deref(), family, source, strict: self.strict };
        let knock = Knock::prepare(&home, &request, |seconds| {
            note(&format!("Many knocks in a row: waiting {seconds} s, so that the server takes this one."));
        })?;
        match &sockets {
            Some(sockets) => sockets.send(&knock)?,
            None => return print(&(knock.packet.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + "\n")),
        }
        report(&knock.sent);
        if self.wait { confirm(&knock.sent) } else { Ok(()) }
    }
}

fn report(sent: &Sent) {
    let Sent { host, service, server, bound_to, .. } = sent;
    let binding = match bound_to {
        Some(address) => format!("bound to {address}"),
        None => "not bound to an address: until it arrives, whoever copies it could spend it first".to_owned(),
    };
    note(&format!("Knocked at {host} ({server}) for {service}; {binding}"));
    if sent.is_clock_unsynchronized {
        note(
            "warning: the kernel says that this machine's clock is not synchronised; a server takes knocks of its own time",
        );
    }
    if sent.has_future_counter {
        note(
            "warning: this machine's clock was ahead once; a knock of then, if copied, could be spent when its time comes",
        );
    }
}

fn confirm(sent: &Sent) -> Result<(), Failure> {
    let Sent { host, service, server, .. } = sent;
    if sent.confirm()? {
        note(&format!("{service} of {host} is open at {server}"));
    } else {
        note(&format!(
            "{service} of {host} cannot be confirmed by a connection: it is for one connection only, or not TCP"
        ));
    }
    Ok(())
}
