//! Doors as set elements, over one netlink socket: 5 to 8 us each, where running nft takes 3 ms.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NLMSG_ERROR, NetlinkBuffer, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_netfilter::nftables::{
    DataAttribute, ListAttribute, NfTablesMessage, SetElementAttribute, SetElementList, SetElementMessage,
    TableAttribute, TableFlags, TableMessage,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily, NetfilterSubsystem,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::TABLE;
use super::comment::Comment;
use super::sets::{Member, SetName};
use crate::service::{Port, Transport};

/// The family of our table.
const INET: NetfilterProtoFamily = NetfilterProtoFamily::Inet;

/// Times that a transaction is tried again when another one is in its way.
const RETRIES: usize = 20;

/// Bytes of the longest answer: the kernel lists as many elements at once as there is room for, up to this.
const DATAGRAM: usize = 8192;

/// Bytes of a comment with its terminator: one byte of length (libnftnl's `udata`).
const COMMENT_MAX: usize = 253;

/// The sets of doors, and whether theirs are for one connection. Such a door may have an element in two sets.
pub(super) const SETS: [(&str, bool); 6] =
    [("open4", false), ("open6", false), ("once4", true), ("once6", true), ("live4", true), ("live6", true)];

/// The sets in which the kernel notes what has begun.
pub(super) const BEGUN: [&str; 3] = ["sequences", "begun4", "begun6"];

/// One element: this source may connect to this port.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Door {
    /// Who may come in.
    pub source: IpAddr,
    /// Where.
    pub port: Port,
    /// The kernel deletes it when the first SYN has passed.
    pub once: bool,
}

impl Door {
    /// None of this source's comes before it in their order.
    pub const fn first_of(source: IpAddr) -> Self {
        Self { source, port: Port { transport: Transport::Tcp, number: 0 }, once: false }
    }
}

/// An element that the daemon adds and deletes. What a connection needs to last comes before what it needs to begin.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Element {
    /// What a door for one connection has let in may last, where connections end with their door.
    Lasts(Door),
    /// A door is open.
    Opens(Door),
    /// A source is in a set of the administrator's.
    Member(Member),
}

impl Element {
    /// All that a door may have in our table.
    pub fn of(door: &Door) -> impl Iterator<Item = Self> {
        door.once.then_some(Self::Lasts(*door)).into_iter().chain([Self::Opens(*door)])
    }

    /// One for each set of ours, to name the set by.
    pub(super) fn one_of_each_set() -> impl Iterator<Item = Self> {
        let [v4, v6] = [IpAddr::from([0; 4]), IpAddr::from([0; 16])];
        [v4, v6].into_iter().flat_map(|source| {
            let door = |once| Door { once, ..Door::first_of(source) };
            [Self::Opens(door(false)), Self::Opens(door(true)), Self::Lasts(door(true))]
        })
    }

    /// One of a set of the administrator's, to name the set by.
    pub(super) fn in_set(set: &SetName) -> Self {
        Self::Member(Member { set: set.clone(), source: IpAddr::from([0; 4]), port: None })
    }

    /// The set that it is in.
    pub(super) fn place(&self) -> Place<'_> {
        let ours = |of: &Door, [v4, v6]: [&'static str; 2]| Place {
            family: INET,
            table: TABLE,
            set: if of.source.is_ipv4() { v4 } else { v6 },
        };
        match self {
            Self::Lasts(door) => ours(door, ["live4", "live6"]),
            Self::Opens(door) if door.once => ours(door, ["once4", "once6"]),
            Self::Opens(door) => ours(door, ["open4", "open6"]),
            Self::Member(Member { set, .. }) => Place { family: set.family(), table: &set.table, set: &set.set },
        }
    }

    fn key(&self) -> Vec<u8> {
        match self {
            Self::Lasts(Door { source, port, .. }) | Self::Opens(Door { source, port, .. }) => {
                key(*source, Some(*port))
            }
            Self::Member(Member { source, port, .. }) => key(*source, *port),
        }
    }
}

/// An address, or the concatenation `addr . inet_proto . inet_service`: each part padded to four bytes.
fn key(source: IpAddr, port: Option<Port>) -> Vec<u8> {
    let mut key = match source {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    if let Some(Port { transport, number }) = port {
        key.extend([transport.number(), 0, 0, 0]);
        key.extend(number.to_be_bytes());
        key.extend([0, 0]);
    }
    key
}

/// A message of a transaction, with the family of the table that it is about, and flags of its own.
type Change = (NetfilterProtoFamily, NfTablesMessage, u16);

/// A set, wherever it is.
pub(super) struct Place<'a> {
    pub(super) family: NetfilterProtoFamily,
    pub(super) table: &'a str,
    pub(super) set: &'a str,
}

/// Why the kernel's sets could not be changed.
#[derive(Debug, Error)]
pub enum ElementError {
    /// The socket failed.
    #[error("netlink: {0}")]
    Socket(#[from] io::Error),
    /// The kernel refused the transaction.
    #[error("netlink: the kernel refused the change: {0}")]
    Refused(io::Error),
    /// The set is not there, or its table.
    #[error("netlink: there is no such set")]
    NoSet,
    /// The set holds as many elements as it can.
    #[error("netlink: a set of table inet {TABLE} is full")]
    Full,
    /// The kernel refused to show a connection, or to end it.
    #[error("netlink: connection tracking refused: {0}")]
    Connections(io::Error),
    /// It gave no answer.
    #[error("netlink: the kernel did not answer")]
    NoAnswer,
    /// The gate opens no more doors within this minute.
    #[error("more doors were asked for than grants_per_minute allows")]
    OverRate,
}

/// How long an element has, and what it says of its grant.
pub type Time = (Duration, Comment);

/// Whose the table is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ownership {
    /// Made now, and owned by this socket.
    Made,
    /// It was there without an owner, and is owned by this socket now.
    Adopted,
    /// The kernel is older than Linux 6.9, or a plain table is there.
    Unsupported,
}

/// The socket that opens and closes doors.
pub struct Doors {
    socket: Socket,
    /// By which the kernel names this socket when it tells who has changed something.
    number: u32,
}

impl Doors {
    /// Opens the socket. It needs CAP_NET_ADMIN at each use.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new() -> Result<Self, ElementError> {
        let (socket, number) = socket()?;
        Ok(Self { socket, number })
    }

    /// Who this is when the kernel tells who has changed something.
    pub const fn number(&self) -> u32 {
        self.number
    }

    /// Gives elements so long from now on, whether they are there or not, and deletes those without a time: all of them, or
    /// none. One transaction for dozens takes a fraction of the time of one for each.
    ///
    /// Adding an element that is there does not renew it, so it is added, deleted and added in one transaction, none of
    /// which can fail.
    ///
    /// # Errors
    /// When the table or a set is gone, a set is full, or the capability is missing.
    pub fn change<'a>(
        &mut self,
        changes: impl IntoIterator<Item = &'a (Element, Option<Time>)>,
    ) -> Result<(), ElementError> {
        let messages = changes.into_iter().flat_map(|(element, time)| match time {
            Some((left, comment)) => renewal(element, *left, &comment.to_string()).to_vec(),
            None => deletion(element).to_vec(),
        });
        let messages: Vec<_> = messages.collect();
        if messages.is_empty() { Ok(()) } else { self.transact(&messages) }
    }

    /// Closes doors, whether they are open or not: all of them, or none.
    ///
    /// # Errors
    /// As [`Doors::change`].
    pub fn close_all<'a>(&mut self, doors: impl IntoIterator<Item = &'a Door>) -> Result<(), ElementError> {
        let elements: Vec<_> = doors.into_iter().flat_map(Element::of).map(|element| (element, None)).collect();
        self.change(&elements)
    }

    /// Forgets which SYNs were let in: none may come again.
    ///
    /// # Errors
    /// As [`Doors::change`].
    pub fn forget_begun(&mut self) -> Result<(), ElementError> {
        let flush = |set: &str| {
            let attributes = vec![SetElementList::Table(TABLE.to_owned()), SetElementList::Set(set.to_owned())];
            (INET, NfTablesMessage::DeleteSetElement(SetElementMessage { attributes }), 0)
        };
        self.transact(&BEGUN.map(flush))
    }

    /// Makes the table, owned by this socket and persistent: then it survives another's `flush ruleset` and the death of
    /// its owner. A persistent table without an owner is adopted.
    ///
    /// # Errors
    /// Any but that the kernel or the table that is there does not allow it.
    pub fn own_table(&mut self) -> Result<Ownership, ElementError> {
        match self.transact(&[(INET, own(), NLM_F_CREATE | NLM_F_EXCL)]) {
            Err(ElementError::Refused(error)) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(ElementError::Refused(error)) if is_unsupported(&error) => return Ok(Ownership::Unsupported),
            done => return done.map(|()| Ownership::Made),
        }
        match self.transact(&[(INET, own(), NLM_F_CREATE)]) {
            Err(ElementError::Refused(error)) if is_unsupported(&error) => Ok(Ownership::Unsupported),
            done => done.map(|()| Ownership::Adopted),
        }
    }

    /// Deletes the table and all that is in it.
    ///
    /// # Errors
    /// When it is not there, or another's.
    pub fn delete_table(&mut self) -> Result<(), ElementError> {
        let attributes = vec![TableAttribute::Name(TABLE.to_owned())];
        self.transact(&[(INET, NfTablesMessage::DeleteTable(TableMessage { attributes }), 0)])
    }

    /// Sends a batch as one transaction and reads the kernel's verdict, which is there when `send` returns.
    fn transact(&mut self, messages: &[Change]) -> Result<(), ElementError> {
        for _ in 0..RETRIES {
            match self.try_transact(messages) {
                Err(ElementError::Refused(error)) if is_transient(&error) => {}
                done => return done,
            }
        }
        self.try_transact(messages)
    }

    fn try_transact(&mut self, messages: &[Change]) -> Result<(), ElementError> {
        let mut batch = Vec::new();
        let last = messages.len().saturating_sub(1);
        append(&mut batch, NetfilterProtoFamily::Unspec, ControlMessage::BatchBegin.into(), 0);
        for (place, (family, message, flags)) in messages.iter().enumerate() {
            let ack = if place == last { NLM_F_ACK } else { 0 };
            append(&mut batch, *family, message.clone().into(), flags | ack);
        }
        append(&mut batch, NetfilterProtoFamily::Unspec, ControlMessage::BatchEnd.into(), 0);
        self.socket.send(&batch, 0)?;
        self.verdict()
    }

    fn verdict(&self) -> Result<(), ElementError> {
        let mut verdict = Err(ElementError::NoAnswer);
        while let Some(answer) = receive(&self.socket).transpose() {
            verdict = match (answer.map(|answer| read(&answer)), verdict) {
                (Ok(Some(Ok(()))), Err(ElementError::NoAnswer)) => Ok(()),
                (Ok(Some(Err(error))), Ok(()) | Err(ElementError::NoAnswer)) => Err(refused(error)),
                // More was refused than could be told: what was must not be taken for the verdict on what comes next.
                (Err(error), _) if Errno::from_io_error(&error) == Some(Errno::NOBUFS) => Err(error.into()),
                (Err(error), _) => return Err(error.into()),
                (Ok(_), earlier) => earlier,
            };
        }
        verdict
    }
}

/// A socket to the kernel's packet filter, which never waits.
pub(super) fn socket() -> io::Result<(Socket, u32)> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    let number = socket.bind_auto()?.port_number();
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.set_non_blocking(true)?;
    Ok((socket, number))
}

/// What the kernel says next, if it does.
pub(super) fn receive(socket: &Socket) -> io::Result<Option<Vec<u8>>> {
    let mut datagram = Vec::with_capacity(DATAGRAM);
    match socket.recv(&mut datagram, 0) {
        Ok(_) => Ok(Some(datagram)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

/// Adds a message to what is sent to the kernel.
pub(super) fn append(batch: &mut Vec<u8>, family: NetfilterProtoFamily, inner: NetfilterMessageInner, flags: u16) {
    // A batch names its subsystem in the header of its first and last message.
    let subsystem = match inner {
        NetfilterMessageInner::None(_) => NetfilterSubsystem::NfTables.into(),
        _ => 0_u8,
    };
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let payload = NetfilterMessage::new(NetfilterHeader::new(family, 0, subsystem.into()), inner);
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(payload));
    message.finalize();
    let start = batch.len();
    batch.resize(start + message.buffer_len(), 0);
    message.serialize(batch.get_mut(start..).unwrap_or_default());
}

/// Whether the kernel has done what was asked, if that is what it says.
pub fn read(answer: &[u8]) -> Option<io::Result<()>> {
    // Nothing else is asked for, and nothing else is looked into.
    NetlinkBuffer::new_checked(answer).ok().filter(|answer| answer.message_type() == NLMSG_ERROR)?;
    match NetlinkMessage::<NetfilterMessage>::deserialize(answer).ok()?.payload {
        // Not `to_io`, which panics over the one number that has no opposite.
        NetlinkPayload::Error(answer) => {
            Some(answer.code.map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(code.get().saturating_neg()))))
        }
        _ => None,
    }
}

fn own() -> NfTablesMessage {
    let flags = TableFlags::Owner | TableFlags::Persisent;
    NfTablesMessage::NewTable(TableMessage {
        attributes: vec![TableAttribute::Name(TABLE.to_owned()), TableAttribute::Flags(flags)],
    })
}

/// Of an element that may be there or not.
fn renewal(element: &Element, timeout: Duration, comment: &str) -> [Change; 3] {
    let (place, key) = (element.place(), element.key());
    let added = || NfTablesMessage::NewSetElement(message(&place, &key, Some(timeout), comment));
    let deleted = NfTablesMessage::DeleteSetElement(message(&place, &key, None, ""));
    [(place.family, added(), NLM_F_CREATE), (place.family, deleted, 0), (place.family, added(), NLM_F_CREATE)]
}

/// Of an element that may be there or not: it is added before.
fn deletion(element: &Element) -> [Change; 2] {
    let (place, key) = (element.place(), element.key());
    let added = NfTablesMessage::NewSetElement(message(&place, &key, Some(Duration::from_secs(1)), ""));
    let deleted = NfTablesMessage::DeleteSetElement(message(&place, &key, None, ""));
    [(place.family, added, NLM_F_CREATE), (place.family, deleted, 0)]
}

fn message(place: &Place<'_>, key: &[u8], timeout: Option<Duration>, comment: &str) -> SetElementMessage {
    let mut element = vec![SetElementAttribute::Key(DataAttribute::Value(key.to_vec()))];
    if let Some(timeout) = timeout {
        // The kernel reads 0 as never: what is left of a door must not become for ever.
        let milliseconds = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).max(1);
        element.push(SetElementAttribute::Timeout(milliseconds));
    }
    if !comment.is_empty() {
        element.push(SetElementAttribute::UserData(user_data(comment)));
    }
    SetElementMessage {
        attributes: vec![
            SetElementList::Table(place.table.to_owned()),
            SetElementList::Set(place.set.to_owned()),
            SetElementList::Elements(vec![ListAttribute::Element(element)]),
        ],
    }
}

/// A comment as nft writes it: type 0, length, text, terminator.
fn user_data(comment: &str) -> Vec<u8> {
    let text = comment.as_bytes().get(..COMMENT_MAX).unwrap_or(comment.as_bytes());
    let length = u8::try_from(text.len() + 1).unwrap_or(u8::MAX);
    [&[0, length], text, &[0]].concat()
}

pub(super) fn refused(error: io::Error) -> ElementError {
    if Errno::from_io_error(&error) == Some(Errno::NFILE) { ElementError::Full } else { ElementError::Refused(error) }
}

fn is_unsupported(error: &io::Error) -> bool {
    Errno::from_io_error(error).is_some_and(|errno| matches!(errno, Errno::OPNOTSUPP | Errno::INVAL))
}

fn is_transient(error: &io::Error) -> bool {
    Errno::from_io_error(error).is_some_and(|errno| matches!(errno, Errno::BUSY | Errno::AGAIN | Errno::INTR))
}

#[cfg(test)]
mod tests {
    use super::read;

    /// An answer of the kernel's, with the header of what it answers.
    fn answer(code: i32) -> Vec<u8> {
        let header = |length: u32, kind: u16| [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10]].concat();
        [header(36, 2), code.to_ne_bytes().to_vec(), header(20, 0x0a0c)].concat()
    }

    #[test]
    fn only_an_acknowledgement_means_that_it_is_done() {
        assert!(read(&answer(0)).unwrap().is_ok());
        assert_eq!(read(&answer(-2)).unwrap().unwrap_err().kind(), std::io::ErrorKind::NotFound);
        assert!(read(&answer(i32::MIN)).unwrap().is_err(), "a number that has no opposite");
        let mut other = answer(0);
        other[4] = 3;
        assert!(read(&other).is_none());
        for end in 0..20 {
            assert!(read(&answer(0)[..end]).is_none());
        }
    }
}
