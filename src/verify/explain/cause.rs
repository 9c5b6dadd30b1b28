//! What was wrong with a packet, and how that is said.

use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

use crate::service::Name;
use crate::verify::{Reason, Shut};

/// What was wrong with a packet.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "cause", rename_all = "snake_case")]
pub enum Cause {
    /// It bears nobody's token, within a day.
    NoKey,
    /// The client's clock is behind the server's.
    ClockBehind {
        /// By so much.
        seconds: u64,
    },
    /// The client's clock is ahead of the server's.
    ClockAhead {
        /// By so much.
        seconds: u64,
    },
    /// It is older than the window, and a later knock of this key was accepted.
    Old {
        /// By so much.
        seconds: u64,
    },
    /// It came to another knock port than the server's list gives.
    WrongKnockPort {
        /// The port that it came to.
        port: u16,
    },
    /// The source is an IPv6 link-local address.
    LinkLocal,
    /// The source lies outside the user's networks.
    FromMismatch {
        /// Where it came from.
        source: IpAddr,
    },
    /// There is no timestamp.
    TimestampStripped,
    /// It is bound to another address.
    WrongSource {
        /// The address that it is bound to.
        bound: IpAddr,
        /// The address that it came from.
        source: IpAddr,
    },
    /// Its tag holds for no address that is known here.
    TimestampRewritten,
    /// It is bound to no address, and this user's must be.
    NotBound,
    /// What only the daemon knew when the packet came.
    State {
        /// Its reason.
        reason: Reason,
    },
    /// It came while no knocks were accepted.
    InDoubt(Shut),
    /// The user may not open this service.
    PortNotAllowed {
        /// The service.
        service: Name,
    },
    /// There is no such service.
    NoSuchService {
        /// The selector that stands for it.
        selector: u16,
    },
    /// The user's entry has expired.
    Expired,
    /// A knockknock profile's knock beyond those that the server looks at.
    CountAhead {
        /// Whose.
        user: Name,
        /// By so many knocks.
        knocks: u64,
        /// The number of the knock after it.
        next: u64,
    },
    /// One long before the next that the server takes.
    CountBehind {
        /// By so many knocks.
        knocks: u64,
        /// The next that it takes.
        next: u64,
    },
    /// One of a profile whose count the daemon does not know.
    NotCounted {
        /// Whose.
        user: Name,
    },
    /// One whose sequence number is right, and not the rest.
    Rewritten,
    /// Nothing, by the configuration of now.
    Nothing,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoKey => f.write_str("no key fits"),
            Self::ClockBehind { seconds } => write!(f, "with a clock {} behind", Time(*seconds)),
            Self::ClockAhead { seconds } => write!(f, "with a clock {} ahead", Time(*seconds)),
            Self::Old { seconds } => write!(
                f,
                "{} old, and a later knock was accepted: a replay of a recorded one, or a clock that was set back",
                Time(*seconds)
            ),
            Self::WrongKnockPort { port } => {
                write!(f, "to the wrong knock port {port}: the client's profile is outdated, import a new one")
            }
            Self::LinkLocal => f.write_str(
                "from an IPv6 link-local address, a door for which would hold on every link: knock at another address of the \
                 server",
            ),
            Self::FromMismatch { source } => write!(f, "from {source}, outside the `from` networks of the user's entry"),
            Self::TimestampStripped => f.write_str("without its timestamp: something on the way takes TCP timestamps off"),
            Self::WrongSource { bound, source } => {
                write!(f, "bound to {bound}, but it came from {source}: NAT on the way, or somebody else sent a copy")
            }
            Self::TimestampRewritten => f.write_str(
                "with a tag that holds for no address known here: its timestamp was rewritten on the way, or it is bound \
                 to an address that NAT changed",
            ),
            Self::NotBound => f.write_str("bound to no address, which the user's entry demands (source = \"bound\")"),
            Self::State { reason } => match (reason, reason.explanation()) {
                (Reason::Replayed, _) => f.write_str("a replay: this knock was spent before"),
                (_, Some(explanation)) => f.write_str(explanation),
                (reason, None) => write!(f, "{reason}"),
            },
            Self::InDoubt(shut) => write!(f, "refused while this held: {shut}"),
            Self::PortNotAllowed { service } => write!(f, "for {service}, which the user's entry does not list"),
            Self::NoSuchService { selector } => write!(f, "for service number {selector}, which this server does not have"),
            Self::Expired => f.write_str("of a user whose entry has expired"),
            Self::CountAhead { user, knocks, next } => write!(
                f,
                "ahead of the server's count by {knocks}, and 20 are looked at: knockq user counter {user} {next}"
            ),
            Self::CountBehind { knocks, next } => write!(
                f,
                "behind the server's count by {knocks}: a replay of a recorded one, or a client whose count went back \
                 (counter = {next} in its profile mends that)"
            ),
            Self::NotCounted { user } => write!(
                f,
                "whose count the daemon does not know: none was taken yet, or the counter store has forgotten it, and then this \
                 may be a replay. Ask the client for the number of its next knock: knockq user counter {user} NUMBER"
            ),
            Self::Rewritten => f.write_str(
                "with the right sequence number, and with another IP ID, acknowledgment number or window than belongs to it: \
                 something on the way rewrote them",
            ),
            Self::Nothing => f.write_str("and nothing is wrong with it by the configuration of now"),
        }
    }
}

/// A time in its two largest units.
struct Time(u64);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (hours, minutes, seconds) = (self.0 / 3600, self.0 / 60 % 60, self.0 % 60);
        match (hours, minutes) {
            (0, 0) => write!(f, "{seconds} s"),
            (0, _) => write!(f, "{minutes} min {seconds} s"),
            _ => write!(f, "{hours} h {minutes} min"),
        }
    }
}
