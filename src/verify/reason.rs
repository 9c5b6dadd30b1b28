//! Why a packet ended as it did.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::packet::NotSyn;

/// The one end of every packet. Counters and logs are made of these and of nothing else.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// A header was cut off.
    Truncated,
    /// A header contradicts itself.
    Malformed,
    /// A fragment.
    Fragment,
    /// Another transport than TCP.
    NotTcp,
    /// Another segment than a SYN.
    NotSyn,
    /// No key makes this sequence number now: what every stranger's SYN is.
    Unknown,
    /// The window of this key is narrowed, and this counter is more than a few seconds off.
    Narrowed,
    /// Three wrong tags have withdrawn this counter.
    Exhausted,
    /// The token belongs to another knock port: the client's profile is older than the server's.
    WrongKnockPort,
    /// The source is an IPv6 link-local address, which means another host on each link.
    LinkLocal,
    /// The source is outside the user's `from` networks.
    SourceNotAllowed,
    /// The timestamp option that carries half of the token was taken off on the way.
    NoTimestamp,
    /// The tag does not hold for this source.
    WrongTag,
    /// The counter is too far from the server's clock.
    OutsideWindow,
    /// More knocks of a knockknock profile than one a second.
    TooFast,
    /// This counter was accepted before.
    Replayed,
    /// A later counter of this key was accepted before.
    Superseded,
    /// This counter may have been accepted before: the store may have forgotten it.
    InDoubt,
    /// An unbound token that was accepted came again from another address: its grant is withdrawn.
    SpentTwice,
    /// The counter could not be made durable.
    NotDurable,
    /// The user may not, or no longer, open this service.
    NotPermitted,
    /// The user's entry has expired.
    Expired,
    /// The user has had their share of `grants_per_minute`.
    OverRate,
    /// The door is opened.
    Granted,
}

impl Reason {
    /// Every reason, in the order of the checks.
    pub const ALL: [Self; 24] = [
        Self::Truncated,
        Self::Malformed,
        Self::Fragment,
        Self::NotTcp,
        Self::NotSyn,
        Self::Unknown,
        Self::Narrowed,
        Self::Exhausted,
        Self::WrongKnockPort,
        Self::LinkLocal,
        Self::SourceNotAllowed,
        Self::NoTimestamp,
        Self::WrongTag,
        Self::OutsideWindow,
        Self::TooFast,
        Self::Replayed,
        Self::Superseded,
        Self::InDoubt,
        Self::SpentTwice,
        Self::NotDurable,
        Self::NotPermitted,
        Self::Expired,
        Self::OverRate,
        Self::Granted,
    ];

    /// The word for logs and reports.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Truncated => "truncated",
            Self::Malformed => "malformed",
            Self::Fragment => "fragment",
            Self::NotTcp => "not_tcp",
            Self::NotSyn => "not_syn",
            Self::Unknown => "unknown",
            Self::Narrowed => "narrowed",
            Self::Exhausted => "exhausted",
            Self::WrongKnockPort => "wrong_knock_port",
            Self::LinkLocal => "link_local",
            Self::SourceNotAllowed => "source_not_allowed",
            Self::NoTimestamp => "no_timestamp",
            Self::WrongTag => "wrong_tag",
            Self::OutsideWindow => "outside_window",
            Self::TooFast => "too_fast",
            Self::Replayed => "replayed",
            Self::Superseded => "superseded",
            Self::InDoubt => "in_doubt",
            Self::SpentTwice => "spent_twice",
            Self::NotDurable => "not_durable",
            Self::NotPermitted => "not_permitted",
            Self::Expired => "expired",
            Self::OverRate => "over_rate",
            Self::Granted => "granted",
        }
    }

    /// What an operator could do about it, where the packet can have come from one of the own users.
    pub const fn explanation(self) -> Option<&'static str> {
        Some(match self {
            Self::Narrowed => "many wrong tags came for this key in the last minute, so only clocks within 5 s count",
            Self::Exhausted => "three wrong tags came for this counter; the user's next knock has another",
            Self::WrongKnockPort => "the client's profile has other knock ports than this server: import a new one",
            Self::LinkLocal => {
                "a door for an IPv6 link-local address would hold on every link: knock at another address of the server"
            }
            Self::SourceNotAllowed => "the source is outside the user's `from` networks",
            Self::NoTimestamp => "something on the way takes TCP timestamps off",
            Self::WrongTag => {
                "the token is bound to another source address (NAT on the way?), or its timestamp was rewritten"
            }
            Self::OutsideWindow => "the clocks of client and server are too far apart",
            Self::TooFast => {
                "a knockknock profile may knock once a second, and as often at once as the window has seconds"
            }
            Self::Replayed => "this knock was spent before",
            Self::Superseded => "a later knock of this key was accepted before",
            Self::InDoubt => {
                "by its client's clock it is of a time in which no knocks are accepted (counter store in doubt)"
            }
            Self::SpentTwice => {
                "an unbound token came from two addresses, so what it opened is taken back: somebody copied it, for which one \
                 packet with a forged address is enough. Bind knocks (--source ADDRESS), or take another path"
            }
            Self::NotDurable => "its counter could not be written, or not in time: see what this log says of the store",
            Self::NotPermitted => "the user's entry does not list this service",
            Self::Expired => "the user's entry has expired",
            Self::OverRate => {
                "the user has had their share of grants_per_minute, which is no more than is left for all others"
            }
            _ => return None,
        })
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<NotSyn> for Reason {
    fn from(shape: NotSyn) -> Self {
        match shape {
            NotSyn::Truncated => Self::Truncated,
            NotSyn::Malformed => Self::Malformed,
            NotSyn::Fragment => Self::Fragment,
            NotSyn::NotTcp => Self::NotTcp,
            NotSyn::NotSyn => Self::NotSyn,
        }
    }
}
