//! Hearing that somebody else took the table away.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, NfTablesMessage, RuleAttribute, SetAttribute, SetElementList, TableAttribute, TableFlags,
};
use netlink_packet_netfilter::{NetfilterMessage, NetfilterMessageInner};
use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_recv_buffer_size_force;

use super::TABLE;
use super::elements::SETS;

/// Multicast group of nf_tables (`NFNLGRP_NFTABLES`).
const GROUP: u32 = 7;

/// Bytes of the largest datagram that is looked at; the kernel sends a page at most.
const DATAGRAM: usize = 32 << 10;

/// Bytes that wait to be read: our own doors are told of too, a few hundred bytes each.
const BUFFER: usize = 8 << 20;

/// What was changed of our table, or deleted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Loss {
    /// Nothing.
    Nothing,
    /// Rules, chains or what they look up: the gate may be open.
    Rules,
    /// Sets or the table: the doors are gone too.
    Doors,
}

/// A socket on which the kernel tells of changes to any table.
pub struct Watch {
    socket: Socket,
    /// What was changed since a rule was added last.
    unmended: Loss,
}

impl Watch {
    /// Starts listening. It needs CAP_NET_ADMIN, for the size of its buffer.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.add_membership(GROUP)?;
        socket.set_non_blocking(true)?;
        set_socket_recv_buffer_size_force(&socket, BUFFER)?;
        Ok(Self { socket, unmended: Loss::Nothing })
    }

    /// Reads what has been told; the worst that was changed. Loading the table again changes it too: then
    /// [`Watch::take_unmended`] tells what it has not made good.
    ///
    /// # Errors
    /// The kernel's.
    pub fn loss(&mut self) -> io::Result<Loss> {
        let mut loss = Loss::Nothing;
        loop {
            let mut datagram = Vec::with_capacity(DATAGRAM);
            match self.socket.recv(&mut datagram, 0) {
                Ok(_) => {
                    for message in messages(&datagram) {
                        let deleted = loss_by(&message);
                        self.unmended = if adds_rule(&message) { Loss::Nothing } else { self.unmended.max(deleted) };
                        loss = loss.max(deleted);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(loss),
                // More was told than the socket held: our table may have been among it.
                Err(error) if Errno::from_io_error(&error) == Some(Errno::NOBUFS) => {
                    (loss, self.unmended) = (Loss::Doors, Loss::Doors);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// What was changed after the last rule was added. A load ends with adding rules, so whatever this is, somebody else
    /// has changed it since. It is told once.
    pub const fn take_unmended(&mut self) -> Loss {
        std::mem::replace(&mut self.unmended, Loss::Nothing)
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The messages of a datagram, as far as they can be read.
fn messages(datagram: &[u8]) -> impl Iterator<Item = NetlinkMessage<NetfilterMessage>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = rest.first_chunk::<4>().and_then(|length| usize::try_from(u32::from_ne_bytes(*length)).ok())?;
        let message = rest.get(..length).filter(|message| message.len() >= 16)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(NetlinkMessage::deserialize(message).ok())
    })
    .flatten()
}

/// Whether this adds a rule to our table.
fn adds_rule(message: &NetlinkMessage<NetfilterMessage>) -> bool {
    let Some(NfTablesMessage::NewRule(rule)) = of_nf_tables(message) else { return false };
    rule.attributes.iter().any(|a| matches!(a, RuleAttribute::Table(name) if name == TABLE))
}

fn of_nf_tables(message: &NetlinkMessage<NetfilterMessage>) -> Option<&NfTablesMessage> {
    let NetlinkPayload::InnerMessage(message) = &message.payload else { return None };
    let NetfilterMessageInner::NfTables(message) = &message.inner else { return None };
    Some(message)
}

/// Whatever is changed but the doors.
fn loss_by(message: &NetlinkMessage<NetfilterMessage>) -> Loss {
    use NfTablesMessage as M;
    let is_ours = |name: &String| name == TABLE;
    let Some(message) = of_nf_tables(message) else { return Loss::Nothing };
    let is_of_ours = match message {
        M::DeleteTable(table) => {
            table.attributes.iter().any(|a| matches!(a, TableAttribute::Name(name) if is_ours(name)))
        }
        // Else it was only made, or has another owner.
        M::NewTable(table) => {
            let attributes = &table.attributes;
            let sleeps = |flags: &TableFlags| flags.contains(TableFlags::Dormant);
            attributes.iter().any(|a| matches!(a, TableAttribute::Name(name) if is_ours(name)))
                && attributes.iter().any(|a| matches!(a, TableAttribute::Flags(flags) if sleeps(flags)))
        }
        M::NewSet(set) | M::DeleteSet(set) => {
            set.attributes.iter().any(|a| matches!(a, SetAttribute::Table(name) if is_ours(name)))
        }
        M::NewChain(chain) | M::DeleteChain(chain) => {
            chain.attributes.iter().any(|a| matches!(a, ChainAttribute::Table(name) if is_ours(name)))
        }
        M::NewRule(rule) | M::DeleteRule(rule) => {
            rule.attributes.iter().any(|a| matches!(a, RuleAttribute::Table(name) if is_ours(name)))
        }
        M::NewSetElement(element) | M::DeleteSetElement(element) => {
            let attributes = &element.attributes;
            let is_door = |name: &String| SETS.iter().any(|(set, _)| name == set);
            attributes.iter().any(|a| matches!(a, SetElementList::Table(name) if is_ours(name)))
                && !attributes.iter().any(|a| matches!(a, SetElementList::Set(name) if is_door(name)))
        }
        _ => false,
    };
    match message {
        M::DeleteTable(_) | M::DeleteSet(_) if is_of_ours => Loss::Doors,
        _ if is_of_ours => Loss::Rules,
        _ => Loss::Nothing,
    }
}
