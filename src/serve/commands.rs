//! What the engine may ask of the gate: commands of a fixed size, up to 64 in a message, and one answer to each message.
//!
//! ```text
//!   command                                        answer
//!   0        what: 1 put, 2 delete, 3 known,       0..4     error number of the kernel, or 0
//!            4 list, 5 describe, 6 next,           4        1: the gate owns the table
//!            7 forget, 8 count                     5..8     zero
//!   1        set: 1 open, 2 once, 3 live,          8..12    number of the socket that changes the table
//!            4 the administrator's                12..16    zero
//!   2        family: 4 or 6                       16..24    packets taken from the queue
//!   3        transport: 6, 17, or 0 for none      24..32    those that the relay had no room for
//!   4..6     port                                 32..      to `next`: a datagram of the kernel's
//!   6..8     zero
//!   8..16    milliseconds: its end (put, known), on the clock that begins with the boot and that nobody sets
//!  16..32    address, IPv4 in its first four bytes
//!  32..240   comment (put), padded with zeros
//! 240..768   the administrator's set, padded with zeros
//! ```
//!
//! Numbers are big-endian. Every byte has one right form, so whatever decodes encodes to itself.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use thiserror::Error;

use crate::nft::{Comment, Door, Element, Member, Query};
use crate::service::{Port, Transport};

/// Bytes of a command.
pub const COMMAND_LEN: usize = 768;

/// Commands in one message at most.
pub const BATCH: usize = 64;

/// Bytes of an answer, but for a datagram.
pub const ANSWER_LEN: usize = 32;

/// Where a command's fields with text begin, and where they end.
const COMMENT_AT: usize = 32;
const SET_AT: usize = 240;

/// What is asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Command {
    /// This element is to be there for so long, whether it is or not. On the way it is an end, or a delay would make it longer.
    Put(Element, Duration, Comment),
    /// It is to be gone, whether it is there or not.
    Delete(Element),
    /// It was there before the gate began.
    Known(Element, Duration),
    /// Ask the kernel about the set that this could be an element of.
    Ask(Element, Query),
    /// The next part of the kernel's answer.
    Next,
    /// What was let in must not come again.
    Forget,
    /// Nothing but the answer.
    Count,
}

/// A message that the engine cannot have meant: the peer is not what it should be.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CommandError {
    /// Another number of bytes than whole commands have.
    #[error("{0} bytes are not 1 to {BATCH} commands of {COMMAND_LEN}")]
    Length(usize),
    /// A message carries nothing but its bytes.
    #[error("a command carries no descriptors")]
    Descriptors,
    /// A field holds what it must not.
    #[error("a command's field `{0}` is wrong")]
    Field(&'static str),
}

/// The time on the clock that begins with the boot and that nobody sets.
pub fn monotonic() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Monotonic)).unwrap_or_default()
}

impl Command {
    /// The same with another time: an end for a time that is left, or the other way round.
    pub fn with_time(self, change: impl Fn(Duration) -> Duration) -> Self {
        match self {
            Self::Put(element, time, comment) => Self::Put(element, change(time), comment),
            Self::Known(element, time) => Self::Known(element, change(time)),
            other => other,
        }
    }

    /// The bytes of this command.
    pub fn encode(&self) -> [u8; COMMAND_LEN] {
        let mut bytes = [0; COMMAND_LEN];
        let (what, element, time, comment) = match self {
            Self::Put(element, time, comment) => (1, Some(element), Some(time), comment.to_string()),
            Self::Delete(element) => (2, Some(element), None, String::new()),
            Self::Known(element, time) => (3, Some(element), Some(time), String::new()),
            Self::Ask(element, Query::Elements) => (4, Some(element), None, String::new()),
            Self::Ask(element, Query::Layout) => (5, Some(element), None, String::new()),
            Self::Next => (6, None, None, String::new()),
            Self::Forget => (7, None, None, String::new()),
            Self::Count => (8, None, None, String::new()),
        };
        let milliseconds = time.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        let mut fields = vec![(0, vec![what]), (8, milliseconds.to_be_bytes().to_vec()), (COMMENT_AT, comment.into())];
        if let Some(element) = element {
            let (set, source, port, name) = match element {
                Element::Opens(door) => (if door.once { 2 } else { 1 }, door.source, Some(door.port), String::new()),
                Element::Lasts(door) => (3, door.source, Some(door.port), String::new()),
                Element::Member(Member { set, source, port }) => (4, *source, *port, set.to_string()),
            };
            let (family, address) = match source {
                IpAddr::V4(address) => (4, address.octets().to_vec()),
                IpAddr::V6(address) => (6, address.octets().to_vec()),
            };
            let transport = port.map_or(0, |port| port.transport.number());
            let number = port.map_or(0, |port| port.number);
            fields.extend([(1, vec![set, family, transport]), (4, number.to_be_bytes().to_vec())]);
            fields.extend([(16, address), (SET_AT, name.into())]);
        }
        for (place, field) in fields {
            bytes.iter_mut().skip(place).zip(field).for_each(|(to, from)| *to = from);
        }
        bytes
    }

    /// Reads a command.
    ///
    /// # Errors
    /// Whatever is not exactly what [`Command::encode`] makes.
    fn decode(bytes: &[u8; COMMAND_LEN]) -> Result<Self, CommandError> {
        let [what, set, family, transport, high, low, _, _, rest @ ..] = bytes;
        let wrong = CommandError::Field;
        let (milliseconds, rest) = rest.split_first_chunk::<8>().ok_or(wrong("time"))?;
        let (address, _) = rest.split_first_chunk::<16>().ok_or(wrong("address"))?;
        let [a, b, c, d, ..] = *address;
        let source = match family {
            4 => Some(IpAddr::from(Ipv4Addr::from([a, b, c, d]))),
            6 => Some(IpAddr::from(Ipv6Addr::from(*address))),
            _ => None,
        };
        let number = u16::from_be_bytes([*high, *low]);
        let port = Transport::from_number(*transport).map(|transport| Port { transport, number });
        let door = |once| {
            let port = port.ok_or(wrong("transport"))?;
            Ok(Door { source: source.ok_or(wrong("family"))?, port, once })
        };
        let element = || match set {
            1 | 2 => Ok(Element::Opens(door(*set == 2)?)),
            3 => Ok(Element::Lasts(door(true)?)),
            4 => {
                let set = text(bytes, SET_AT, COMMAND_LEN).and_then(|set| set.parse().ok()).ok_or(wrong("name"))?;
                Ok(Element::Member(Member { set, source: source.ok_or(wrong("family"))?, port }))
            }
            _ => Err(wrong("set")),
        };
        let time = Duration::from_millis(u64::from_be_bytes(*milliseconds));
        let comment = || text(bytes, COMMENT_AT, SET_AT).and_then(Comment::read).ok_or(wrong("comment"));
        let command = match what {
            1 => Self::Put(element()?, time, comment()?),
            2 => Self::Delete(element()?),
            3 => Self::Known(element()?, time),
            4 => Self::Ask(element()?, Query::Elements),
            5 => Self::Ask(element()?, Query::Layout),
            6 => Self::Next,
            7 => Self::Forget,
            8 => Self::Count,
            _ => return Err(wrong("what")),
        };
        if command.encode() == *bytes { Ok(command) } else { Err(wrong("padding")) }
    }
}

/// The text in a field, without its padding.
fn text(bytes: &[u8], start: usize, end: usize) -> Option<&str> {
    std::str::from_utf8(bytes.get(start..end)?.split(|&byte| byte == 0).next()?).ok()
}

/// Reads a message.
///
/// # Errors
/// [`CommandError`].
pub fn decode(message: &[u8]) -> Result<Vec<Command>, CommandError> {
    let (commands, rest) = message.as_chunks::<COMMAND_LEN>();
    if commands.is_empty() || commands.len() > BATCH || !rest.is_empty() {
        return Err(CommandError::Length(message.len()));
    }
    let commands = commands.iter().map(Command::decode).collect::<Result<Vec<_>, _>>()?;
    // What asks comes alone: beside others it would not be done, and the answer would not say so.
    let asks = |command: &Command| !matches!(command, Command::Put(..) | Command::Delete(_) | Command::Known(..));
    if commands.len() > 1 && commands.iter().any(asks) { Err(CommandError::Field("what")) } else { Ok(commands) }
}

/// What the gate answers.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Outcome {
    /// 0: it is done; else the kernel's error number.
    pub errno: i32,
    /// The kernel lets nobody else change the table.
    pub owns_table: bool,
    /// By which the kernel names the gate's socket when it tells who has changed something.
    pub number: u32,
    /// Packets taken from the queue.
    pub seen: u64,
    /// Those that the relay had no room for.
    pub lost: u64,
}

impl Outcome {
    /// The bytes, with a datagram of the kernel's behind them.
    pub fn encode(&self, datagram: &[u8]) -> Vec<u8> {
        let Self { errno, owns_table, number, seen, lost } = *self;
        let mut bytes = Vec::with_capacity(ANSWER_LEN + datagram.len());
        bytes.extend(errno.to_be_bytes());
        bytes.extend([u8::from(owns_table), 0, 0, 0]);
        bytes.extend(number.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(seen.to_be_bytes());
        bytes.extend(lost.to_be_bytes());
        bytes.extend(datagram);
        bytes
    }

    /// Reads the bytes, and what is behind them.
    pub fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (errno, rest) = bytes.split_first_chunk()?;
        let ([owns, ..], rest) = rest.split_first_chunk::<4>()?;
        let (number, rest) = rest.split_first_chunk()?;
        let (_, rest) = rest.split_first_chunk::<4>()?;
        let (seen, rest) = rest.split_first_chunk()?;
        let (lost, datagram) = rest.split_first_chunk()?;
        let (seen, lost) = (u64::from_be_bytes(*seen), u64::from_be_bytes(*lost));
        let (errno, number) = (i32::from_be_bytes(*errno), u32::from_be_bytes(*number));
        Some((Self { errno, owns_table: *owns == 1, number, seen, lost }, datagram))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, proptest};

    use super::{
        ANSWER_LEN, COMMAND_LEN, Command, CommandError, Comment, Door, Duration, Element, Outcome, Query, decode,
    };
    use crate::nft::Member;

    fn door(source: &str, once: bool) -> Door {
        Door { source: source.parse().unwrap(), port: "udp/51820".parse().unwrap(), once }
    }

    fn put(source: &str) -> Command {
        let comment = Comment::read("alice ssh 1234 0a1b2c3d bound").unwrap();
        Command::Put(Element::Opens(door(source, true)), Duration::from_secs(30), comment)
    }

    #[test]
    fn commands_survive_the_way() {
        for source in ["203.0.113.9", "2001:db8::9", "::ffff:192.0.2.1"] {
            let [open, once] = [false, true].map(|once| door(source, once));
            let set = format!("inet {} {}", "t".repeat(255), "s".repeat(255)).parse().unwrap();
            let member = |port| Element::Member(Member { set: Clone::clone(&set), source: open.source, port });
            for command in [
                put(source),
                Command::Delete(Element::Lasts(once)),
                Command::Delete(member(Some(open.port))),
                Command::Known(Element::Opens(open), Duration::MAX.min(Duration::from_millis(u64::MAX))),
                Command::Ask(member(None), Query::Layout),
                Command::Ask(Element::Opens(Door::first_of(open.source)), Query::Elements),
                Command::Next,
                Command::Forget,
                Command::Count,
            ] {
                assert_eq!(decode(&command.encode()), Ok(vec![command.clone()]));
                let twice = [command.encode(), command.encode()].concat();
                let changes = matches!(command, Command::Put(..) | Command::Delete(_) | Command::Known(..));
                let both = vec![command.clone(), command];
                assert_eq!(decode(&twice), if changes { Ok(both) } else { Err(CommandError::Field("what")) });
            }
        }
    }

    #[test]
    fn messages_of_another_length_are_refused() {
        let one = put("203.0.113.9").encode();
        for length in [0, 1, COMMAND_LEN - 1, COMMAND_LEN + 1, 65 * COMMAND_LEN] {
            let bytes: Vec<u8> = one.iter().copied().cycle().take(length).collect();
            assert_eq!(decode(&bytes), Err(CommandError::Length(length)));
        }
    }

    #[test]
    fn a_field_with_another_value_than_its_own_is_refused_by_name() {
        let bytes = put("203.0.113.9").encode();
        let changes = [
            (0, 0, "what"),
            (0, 9, "what"),
            (0, 6, "padding"),
            (1, 0, "set"),
            (1, 4, "name"),
            (2, 5, "family"),
            (3, 1, "transport"),
            (6, 1, "padding"),
            (20, 1, "padding"),
            (32, b'\n', "comment"),
            (32, 0, "comment"),
            (239, b'x', "padding"),
            (240, b'x', "padding"),
        ];
        for (place, value, field) in changes {
            let mut changed = bytes;
            changed[place] = value;
            assert_eq!(decode(&changed), Err(CommandError::Field(field)), "byte {place}");
        }
    }

    #[test]
    fn an_answer_survives_the_way() {
        let answer = Outcome { errno: -7, owns_table: true, number: 3, seen: u64::MAX, lost: 1 };
        assert_eq!(Outcome::decode(&answer.encode(&[1, 2])), Some((answer, &[1, 2][..])));
        assert!((0..ANSWER_LEN).all(|end| Outcome::decode(&answer.encode(&[])[..end]).is_none()));
    }

    proptest! {
        #[test]
        fn whatever_decodes_encodes_to_itself(mut bytes in proptest::collection::vec(any::<u8>(), COMMAND_LEN), what in 0_u8..9, set in 0_u8..5) {
            (bytes[0], bytes[1], bytes[2]) = (what, set, 4);
            bytes[6..].iter_mut().enumerate().for_each(|(place, byte)| *byte = if place < 14 { *byte } else { 0 });
            if let Ok(commands) = decode(&bytes) {
                assert_eq!(commands[0].encode()[..], bytes);
            }
        }
    }
}
