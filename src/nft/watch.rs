//! Hearing that somebody else took the table away, or a door of it.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use netlink_packet_core::NetlinkBuffer;
use netlink_packet_netfilter::NetfilterSubsystem;
use netlink_packet_netfilter::nftables::TableFlags;
use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use rustix::net::{RecvFlags, recv};

use super::TABLE;
use super::attributes::{FAMILY_HEADER, MESSAGE_HEADER, attribute, messages, number};
use super::elements::{BEGUN, Door, SETS};
use super::list::{self, Open};
use super::sets::{Member, SetName};

/// Multicast group of nf_tables (`NFNLGRP_NFTABLES`).
const GROUP: u32 = 7;

/// Bytes of the largest datagram that is looked at; the kernel sends a page at most.
const DATAGRAM: usize = 32 << 10;

/// Bytes that wait to be read: our own doors are told of too, a few hundred bytes each.
const BUFFER: usize = 8 << 20;

/// Time that the rest of a transaction may take to be told.
const REST: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// What was changed of our table, or deleted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
pub enum Loss {
    /// Nothing.
    #[default]
    Nothing,
    /// Rules, chains or what they look up: the gate may be open.
    Rules,
    /// Sets or the table: the doors are gone too.
    Doors,
}

/// A socket on which the kernel tells of changes to any table. Whoever reads it needs no privilege.
pub struct Watch {
    socket: OwnedFd,
    told: Told,
}

/// What was told, and not taken yet.
#[derive(Default)]
pub struct Told {
    /// The worst that was changed since the transactions were counted last.
    worst: Loss,
    /// How many transactions have changed more than doors since then, and are over.
    edits: usize,
    /// The one that is being told has.
    is_edit: bool,
    /// The doors that were deleted, each by itself, and not made again since.
    deleted: HashSet<Door>,
    /// Sets that were made, and are none of ours.
    new_sets: HashSet<SetName>,
    loaded: Loaded,
}

/// Elements that others have added, and that say that they are the daemon's.
#[derive(Default)]
pub struct Loaded {
    /// Doors.
    pub doors: HashSet<Door>,
    /// In sets of the administrator's, whichever they are.
    pub members: HashSet<Member>,
    /// What the kernel alone notes: which SYNs were let in.
    pub begun: bool,
    /// There may be more: some were told that cannot be read any more.
    pub are_missed: bool,
}

impl Watch {
    /// A socket that listens, for [`Watch::new`]. It needs CAP_NET_ADMIN, for the size of its buffer.
    ///
    /// # Errors
    /// The kernel's.
    pub fn listen() -> io::Result<OwnedFd> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.add_membership(GROUP)?;
        socket.set_non_blocking(true)?;
        set_socket_recv_buffer_size_force(&socket, BUFFER)?;
        socket.as_fd().try_clone_to_owned()
    }

    /// Reads from such a socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, told: Told::default() }
    }

    /// Reads what has been told; the worst that was changed. Loading the table again changes it too: then
    /// [`Watch::take_unmended`] tells what it has not made good. What sockets of these numbers have added is none of others'.
    ///
    /// # Errors
    /// The kernel's.
    pub fn loss(&mut self, own: [u32; 2]) -> io::Result<Loss> {
        let mut loss = Loss::Nothing;
        let mut datagram = vec![0; DATAGRAM];
        loop {
            match recv(&self.socket, datagram.as_mut_slice(), RecvFlags::DONTWAIT) {
                Ok((length, _)) => loss = loss.max(self.told.read(datagram.get(..length).unwrap_or_default(), own)),
                // Told of the beginning of a transaction, whoever acts on it would take the rest for another.
                Err(Errno::AGAIN) if self.told.is_edit && self.is_told_soon() => {}
                Err(Errno::AGAIN) => return Ok(loss),
                // More was told than the socket held: our table may have been among it.
                Err(Errno::NOBUFS) => loss = self.told.miss(),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn is_told_soon(&self) -> bool {
        poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&REST)).is_ok_and(|ready| ready > 0)
    }

    /// What may have been changed beyond so many loads, since this was asked last: if there were other transactions besides,
    /// nobody knows which came last.
    pub fn take_unmended(&mut self, loads: usize) -> Loss {
        self.told.take_unmended(loads)
    }

    /// The doors that were deleted, by whomever, and are not there again. Those that went with their set, or whose time was
    /// over, are none of them. They are told once.
    pub fn take_deleted(&mut self) -> HashSet<Door> {
        std::mem::take(&mut self.told.deleted)
    }

    /// The sets that others have made. They are told once.
    pub fn take_new_sets(&mut self) -> HashSet<SetName> {
        std::mem::take(&mut self.told.new_sets)
    }

    /// The elements that others have added in the daemon's name. They are told once.
    pub fn take_loaded(&mut self) -> Loaded {
        std::mem::take(&mut self.told.loaded)
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Told {
    /// What a datagram tells: the worst that was changed. Doors that are deleted are noted, until they are made again.
    pub fn read(&mut self, datagram: &[u8], own: [u32; 2]) -> Loss {
        let mut worst = Loss::Nothing;
        for message in messages(datagram) {
            if is_end_of_transaction(message) {
                self.edits = self.edits.saturating_add(usize::from(std::mem::take(&mut self.is_edit)));
            }
            let Some(change) = Change::read(message) else { continue };
            let is_loaded = change.kind == NEW_ELEMENT && !own.contains(&change.by);
            if !change.is_of_our_table() {
                self.new_sets.extend(change.set().filter(|_| change.kind == NEW_SET));
                self.loaded
                    .members
                    .extend(change.set().filter(|_| is_loaded).iter().flat_map(|set| change.members(set)));
                continue;
            }
            for Open { what: door, comment, .. } in change.doors() {
                match change.kind {
                    DELETE_ELEMENT if !own.contains(&change.by) => self.deleted.insert(door),
                    _ => self.deleted.remove(&door),
                };
                self.loaded.doors.extend(comment.filter(|_| is_loaded).map(|_| door));
            }
            self.loaded.begun |= is_loaded && change.is_of_begun();
            let loss = change.loss();
            self.is_edit |= loss != Loss::Nothing;
            worst = worst.max(loss);
        }
        self.worst = self.worst.max(worst);
        worst
    }

    /// Something was told that cannot be read any more: there may have been any number of transactions.
    const fn miss(&mut self) -> Loss {
        (self.worst, self.edits, self.loaded.are_missed) = (Loss::Doors, usize::MAX, true);
        Loss::Doors
    }

    /// See [`Watch::take_unmended`].
    pub fn take_unmended(&mut self, loads: usize) -> Loss {
        let edits = std::mem::take(&mut self.edits).saturating_add(usize::from(std::mem::take(&mut self.is_edit)));
        let worst = std::mem::take(&mut self.worst);
        if edits == loads { Loss::Nothing } else { worst }
    }

    /// The doors that were deleted and not made again since.
    pub const fn deleted(&self) -> &HashSet<Door> {
        &self.deleted
    }
}

/// The kernel says so to all, whichever table it was about.
fn is_end_of_transaction(message: &[u8]) -> bool {
    kind(message) == Some(NEW_GENERATION)
}

/// What kind of message of nf_tables this is, if it is one.
fn kind(message: &[u8]) -> Option<u8> {
    let [subsystem, kind] = NetlinkBuffer::new_checked(message).ok()?.message_type().to_be_bytes();
    (subsystem == u8::from(NetfilterSubsystem::NfTables)).then_some(kind)
}

/// Kinds of messages (`enum nf_tables_msg_types` of linux/netfilter/nf_tables.h).
const NEW_TABLE: u8 = 0;
const DELETE_TABLE: u8 = 2;
const NEW_CHAIN: u8 = 3;
const DELETE_CHAIN: u8 = 5;
const NEW_RULE: u8 = 6;
const DELETE_RULE: u8 = 8;
const NEW_SET: u8 = 9;
const DELETE_SET: u8 = 11;
const NEW_ELEMENT: u8 = 12;
const DELETE_ELEMENT: u8 = 14;
const NEW_GENERATION: u8 = 15;

/// The family of our table (`NFPROTO_INET`).
const INET: u8 = 1;

/// Attribute of all these messages: the table's name (`NFTA_TABLE_NAME` and its like).
const TABLE_NAME: u16 = 1;

/// Attribute of a table: its flags (`NFTA_TABLE_FLAGS`).
const TABLE_FLAGS: u16 = 2;

/// Attribute of elements: their set's name (`NFTA_SET_ELEM_LIST_SET`).
const SET_NAME: u16 = 2;

/// A change of our table. Of what the kernel tells, only names, flags and doors are looked at: the rest is as deep as rules
/// are.
struct Change<'a> {
    kind: u8,
    /// The socket that asked for it.
    by: u32,
    family: u8,
    attributes: &'a [u8],
}

impl<'a> Change<'a> {
    /// `None` if it is no message of nf_tables.
    fn read(message: &'a [u8]) -> Option<Self> {
        let change = Self {
            kind: kind(message)?,
            by: NetlinkBuffer::new_checked(message).ok()?.port_number(),
            family: *message.get(MESSAGE_HEADER)?,
            attributes: message.get(MESSAGE_HEADER + FAMILY_HEADER..)?,
        };
        Some(change)
    }

    fn is_of_our_table(&self) -> bool {
        self.family == INET && self.name(TABLE_NAME).is_some_and(|name| name == TABLE.as_bytes())
    }

    /// The set that it is about, which is none of ours.
    fn set(&self) -> Option<SetName> {
        SetName::of_kernel(self.family, self.name(TABLE_NAME)?, self.name(SET_NAME)?)
    }

    /// Those of its elements that say that they are the daemon's.
    fn members(&self, set: &SetName) -> Vec<Member> {
        list::members(self.attributes, set).filter(|open| open.comment.is_some()).map(|open| open.what).collect()
    }

    /// Whatever is changed but the doors.
    fn loss(&self) -> Loss {
        match self.kind {
            DELETE_TABLE | DELETE_SET => Loss::Doors,
            // Else it was only made, or has another owner.
            NEW_TABLE if self.is_dormant() => Loss::Rules,
            NEW_ELEMENT | DELETE_ELEMENT if self.is_of_doors() => Loss::Nothing,
            NEW_CHAIN | DELETE_CHAIN | NEW_RULE | DELETE_RULE | NEW_SET | NEW_ELEMENT | DELETE_ELEMENT => Loss::Rules,
            _ => Loss::Nothing,
        }
    }

    fn is_dormant(&self) -> bool {
        number(self.attributes, TABLE_FLAGS).is_some_and(|flags| flags & TableFlags::Dormant.bits() != 0)
    }

    /// Whether it is about what comes and goes.
    fn is_of_doors(&self) -> bool {
        self.set_of_doors().is_some() || self.is_of_begun()
    }

    /// Whether it is about what was let in.
    fn is_of_begun(&self) -> bool {
        self.name(SET_NAME).is_some_and(|name| BEGUN.iter().any(|set| name == set.as_bytes()))
    }

    /// Whether the doors of the set that it is about are for one connection, if it is about a set of doors.
    fn set_of_doors(&self) -> Option<bool> {
        let name = self.name(SET_NAME)?;
        SETS.iter().find(|(set, _)| name == set.as_bytes()).map(|(_, once)| *once)
    }

    /// The doors that its elements are, if they are added or deleted.
    fn doors(&self) -> impl Iterator<Item = Open<Door>> + use<'a> {
        let once = self.set_of_doors().filter(|_| matches!(self.kind, NEW_ELEMENT | DELETE_ELEMENT));
        let attributes = self.attributes;
        once.into_iter().flat_map(move |once| list::doors(attributes, once))
    }

    /// A text without its terminator.
    fn name(&self, kind: u16) -> Option<&'a [u8]> {
        attribute(self.attributes, kind)?.split(|&byte| byte == 0).next()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::{Door, Loss, Member, Told};

    /// The daemon's socket; what has changed something has another here.
    const OWN: [u32; 2] = [1, 1];

    fn loss(datagram: &[u8]) -> Loss {
        Told::default().read(datagram, OWN)
    }

    #[test]
    fn a_table_of_another_family_is_none_of_ours_and_its_new_sets_are_known() {
        for (family, set) in [(2, Some("ip knockq mine")), (10, Some("ip6 knockq mine")), (1, None), (99, None)] {
            let mut message = told(9, &[ours(), attribute(2, b"mine\0")]);
            message[16] = family;
            let mut all = Told::default();
            assert_eq!(all.read(&message, OWN), if family == 1 { Loss::Rules } else { Loss::Nothing });
            assert_eq!(all.new_sets, set.into_iter().map(|set| set.parse().unwrap()).collect(), "{family}");
        }
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).unwrap();
        let mut attribute = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
        attribute.resize(attribute.len().next_multiple_of(4), 0);
        attribute
    }

    /// A message of nf_tables, which is subsystem 10.
    fn told(kind: u8, attributes: &[Vec<u8>]) -> Vec<u8> {
        let rest = [&u16::from_be_bytes([10, kind]).to_ne_bytes()[..], &[0; 10], &[1, 0, 0, 0], &attributes.concat()];
        let rest = rest.concat();
        [&u32::try_from(4 + rest.len()).unwrap().to_ne_bytes()[..], &rest].concat()
    }

    fn ours() -> Vec<u8> {
        attribute(1, b"knockq\0")
    }

    #[test]
    fn a_loss_is_what_of_our_table_is_changed_but_the_doors() {
        let dormant = attribute(2, &1_u32.to_be_bytes());
        let [doors, guarded] = [b"open4\0".as_slice(), b"guarded\0"].map(|set| attribute(2, set));
        for (kind, attributes, loss) in [
            (2, vec![ours()], Loss::Doors),
            (2, vec![attribute(1, b"other\0")], Loss::Nothing),
            (2, vec![attribute(1, b"knockq_check\0")], Loss::Nothing),
            (0, vec![ours(), attribute(2, &[0; 4])], Loss::Nothing),
            (0, vec![ours(), dormant], Loss::Rules),
            (5, vec![ours()], Loss::Rules),
            (8, vec![ours()], Loss::Rules),
            (11, vec![ours(), doors.clone()], Loss::Doors),
            (14, vec![ours(), doors], Loss::Nothing),
            (14, vec![ours(), guarded], Loss::Rules),
            (15, vec![ours()], Loss::Nothing),
        ] {
            assert_eq!(Told::default().read(&told(kind, &attributes), OWN), loss, "{kind} {attributes:02x?}");
        }
    }

    #[test]
    fn one_load_is_all_that_may_have_happened_while_the_table_was_loaded() {
        let end = told(15, &[]);
        let [deleted, added] = [8, 6].map(|kind| told(kind, &[ours()]));
        let load = [&deleted[..], &added, &added, &end].concat();
        let theirs = [&told(6, &[attribute(1, b"other\0")])[..], &end].concat();
        let door = [&doors(12, b"open4\0", &[&[192, 0, 2, 1, 6, 0, 0, 0, 0, 22, 0, 0]])[..], &end].concat();
        let unmended = |parts: &[&[u8]], loads| {
            let mut all = Told::default();
            for part in parts {
                all.read(part, OWN);
            }
            let unmended = all.take_unmended(loads);
            assert_eq!(all.take_unmended(0), Loss::Nothing, "it is told once");
            unmended
        };
        assert_eq!(unmended(&[&theirs, &load, &door, &theirs], 1), Loss::Nothing);
        assert_eq!(unmended(&[&load, &added, &end], 1), Loss::Rules, "a rule after it");
        assert_eq!(unmended(&[&load, &added], 1), Loss::Rules, "of which not all is told yet");
        assert_eq!(
            unmended(&[&told(2, &[ours()]), &end, &load], 1),
            Loss::Doors,
            "before it, or after it for all we know"
        );
        assert_eq!(unmended(&[&door], 1), Loss::Nothing);
        assert_eq!(unmended(&[&load], 0), Loss::Rules, "others load it");
        let mut missed = Told::default();
        missed.miss();
        missed.read(&load, OWN);
        assert_eq!(missed.take_unmended(1), Loss::Doors, "what could not be read");
    }

    /// What elements of a set of doors are: address, protocol, port.
    fn doors(kind: u8, set: &[u8], keys: &[&[u8]]) -> Vec<u8> {
        let element = |key: &&[u8]| attribute(1, &attribute(1, &attribute(1, key)));
        let elements: Vec<u8> = keys.iter().flat_map(element).collect();
        told(kind, &[ours(), attribute(2, set), attribute(3, &elements)])
    }

    #[test]
    fn a_door_that_is_deleted_and_not_made_again_is_known() {
        let v4 = [192, 0, 2, 1, 6, 0, 0, 0, 0, 22, 0, 0];
        let v6 = [[0x20; 16].as_slice(), &[17, 0, 0, 0, 0xca, 0x6c, 0, 0]].concat();
        let mut all = Told::default();
        let mut after = |datagram: &[u8]| {
            all.read(datagram, OWN);
            all.deleted().clone()
        };
        let ssh = Door { source: "192.0.2.1".parse().unwrap(), port: "tcp/22".parse().unwrap(), once: false };
        let vpn = Door { source: [0x20; 16].into(), port: "udp/51820".parse().unwrap(), once: true };
        let delete = doors(14, b"open4\0", &[&v4]);
        assert_eq!(after(&delete), HashSet::from([ssh]));
        assert_eq!(after(&doors(14, b"once6\0", &[&v6, &v6[..23]])), HashSet::from([ssh, vpn]));
        assert_eq!(after(&doors(14, b"guarded\0", &[&v4])), HashSet::from([ssh, vpn]));
        assert_eq!(after(&doors(12, b"once4\0", &[&v4])), HashSet::from([ssh, vpn]), "another set");
        let renewed = [doors(12, b"open4\0", &[&v4]), delete, doors(12, b"open4\0", &[&v4])].concat();
        assert_eq!(after(&renewed), HashSet::from([vpn]));
        assert_eq!(after(&doors(12, b"once6\0", &[&v6])), HashSet::new());
    }

    /// An element with a comment, as nft makes and the kernel tells of it, by a socket.
    fn added(by: u32, family: u8, table: &[u8], set: &[u8], key: &[u8], comment: &[u8]) -> Vec<u8> {
        let noted = [&[0, u8::try_from(comment.len() + 1).unwrap()], comment, &[0]].concat();
        let element = [attribute(1, &attribute(1, key)), attribute(6, &noted)].concat();
        let mut message = told(12, &[attribute(1, table), attribute(2, set), attribute(3, &attribute(1, &element))]);
        message[12..16].copy_from_slice(&by.to_ne_bytes());
        message[16] = family;
        message
    }

    #[test]
    fn what_others_add_in_the_daemons_name_is_known_and_what_it_adds_itself_is_not() {
        let v4 = [192, 0, 2, 1, 6, 0, 0, 0, 0, 22, 0, 0];
        let v6 = [[0x20; 16].as_slice(), &[17, 0, 0, 0, 0xca, 0x6c, 0, 0]].concat();
        let ssh = Door { source: "192.0.2.1".parse().unwrap(), port: "tcp/22".parse().unwrap(), once: false };
        let vpn = Door { source: [0x20; 16].into(), port: "udp/51820".parse().unwrap(), once: true };
        for (by, comment, is_told) in [
            (7, "alice ssh 9 0000000a", true),
            (7, "alice ssh bound", true),
            (7, "my own laptop", false),
            (OWN[0], "alice ssh 9 0000000a", false),
        ] {
            let mut all = Told::default();
            let comment = comment.as_bytes();
            let door = [
                added(by, 1, b"knockq\0", b"open4\0", &v4, comment),
                added(by, 1, b"knockq\0", b"once6\0", &v6, comment),
            ];
            assert_eq!(all.read(&door.concat(), OWN), Loss::Nothing);
            let doors = if is_told { HashSet::from([ssh, vpn]) } else { HashSet::new() };
            assert_eq!(all.loaded.doors, doors, "{comment:?}");
            for (family, set, key, port) in [
                (2, "ip mine v4", &v4[..], Some(ssh.port)),
                (2, "ip mine v4", &v4[..4], None),
                (10, "ip6 mine v6", &v6[..], Some(vpn.port)),
                (1, "inet mine v6", &v6[..16], None),
            ] {
                let name = set.rsplit_once(' ').unwrap().1.as_bytes();
                let source = if name == b"v4" { ssh.source } else { vpn.source };
                all.read(&added(by, family, b"mine\0", &[name, b"\0"].concat(), key, comment), OWN);
                let member = Member { set: set.parse().unwrap(), source, port };
                assert_eq!(all.loaded.members.contains(&member), is_told, "{member:?} {comment:?}");
            }
        }
        let mut all = Told::default();
        all.miss();
        assert!(all.loaded.are_missed);
    }

    #[test]
    fn lengths_that_go_beyond_what_is_there_are_not_followed() {
        let element = told(14, &[ours(), attribute(2, b"guarded\0"), attribute(3, &[0x10, 0xc0, 0, 0])]);
        assert_eq!(loss(&element), Loss::Rules, "the length within is none of ours");
        for end in 0..element.len() {
            assert_eq!(loss(&element[..end]), Loss::Nothing);
        }
        for place in 0..element.len() {
            let mut wrong = element.clone();
            wrong[place] = 0xff;
            loss(&wrong);
        }
    }
}
