//! The socket to connection tracking.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Protocol, Status, Tuple,
};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily};
use netlink_sys::{Socket, SocketAddr as NetlinkAddress, protocols::NETLINK_NETFILTER};

use super::attributes::{FAMILY_HEADER, MESSAGE_HEADER, attribute, messages};
use super::elements::{ElementError, read};

/// Attributes of an entry (`enum ctattr_type` of linux/netfilter/nfnetlink_conntrack.h): as its first packet was, before any
/// translation.
pub(super) const ORIGINAL: u16 = 1;

/// Attribute of such a tuple, and of its protocol.
pub(super) const PROTOCOL: u16 = 2;
const SOURCE_PORT: u16 = 2;
pub(super) const DESTINATION_PORT: u16 = 3;

/// The state of an established connection (`TCP_CONNTRACK_ESTABLISHED`).
pub(super) const ESTABLISHED: u8 = 3;

/// Has conntrack know TCP connections of this host's sockets, the client's end and ours, each as begun by its client: on a host that
/// tracks none until the gate is loaded, they would be cut, and the administrator's session among them.
///
/// # Errors
/// When an entry cannot be made.
pub fn track_sessions(sessions: &BTreeSet<(SocketAddr, SocketAddr)>) -> Result<(), ElementError> {
    if sessions.is_empty() {
        return Ok(());
    }
    let mut conntrack = Conntrack::new()?;
    sessions.iter().try_for_each(|(client, server)| conntrack.make(*client, *server))
}

/// The socket that tells of connections, makes and ends them. It needs CAP_NET_ADMIN at each use.
pub(super) struct Conntrack {
    socket: Socket,
    sequence: u32,
}

impl Conntrack {
    pub(super) fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&NetlinkAddress::new(0, 0))?;
        socket.set_non_blocking(true)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Has conntrack know an established connection as begun by its client. It may already, or take the server for the one who
    /// began it, where that spoke first after conntrack had.
    pub(super) fn make(&mut self, client: SocketAddr, server: SocketAddr) -> Result<(), ElementError> {
        const SECONDS: u32 = 5 * 24 * 60 * 60; // until its next packet, as by default
        let entry = vec![
            ConntrackAttribute::CtaTupleOrig(tuple(client, server)),
            ConntrackAttribute::CtaTupleReply(tuple(server, client)),
            ConntrackAttribute::CtaStatus(Status::SeenReply | Status::Assured | Status::Confirmed),
            ConntrackAttribute::CtaTimeout(SECONDS),
            ConntrackAttribute::CtaProtoInfo(vec![ProtoInfo::TCP(vec![ProtoInfoTCP::State(ESTABLISHED)])]),
        ];
        let is_ipv4 = client.is_ipv4();
        let family = if is_ipv4 { NetfilterProtoFamily::IPv4 } else { NetfilterProtoFamily::IPv6 };
        let flags = NLM_F_CREATE | NLM_F_EXCL | NLM_F_ACK;
        match self.ask(family, ConntrackMessage::New(entry.clone()), flags) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            done => return done.map_err(ElementError::Connections),
        }
        let named = vec![ConntrackAttribute::CtaTupleOrig(tuple(server, client))];
        self.send(family, ConntrackMessage::Get(named.clone()), 0)?;
        if !began_at(&self.receive()?, server.port(), client.port()) {
            return Ok(());
        }
        let forgotten = self.ask(family, ConntrackMessage::Delete(named), NLM_F_ACK);
        forgotten
            .and_then(|()| self.ask(family, ConntrackMessage::New(entry), flags))
            .map_err(ElementError::Connections)
    }

    /// What the kernel says to it.
    fn ask(&mut self, family: NetfilterProtoFamily, message: ConntrackMessage, flags: u16) -> io::Result<()> {
        self.send(family, message, flags)?;
        let datagram = self.receive().map_err(io::Error::other)?;
        messages(&datagram).find_map(read).unwrap_or_else(|| Err(io::ErrorKind::InvalidData.into()))
    }

    pub(super) fn send(&mut self, family: NetfilterProtoFamily, inner: ConntrackMessage, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let payload = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), inner);
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(payload));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(|_| ())
    }

    pub(super) fn receive(&self) -> Result<Vec<u8>, ElementError> {
        let mut datagram = Vec::with_capacity(64 << 10);
        match self.socket.recv(&mut datagram, 0) {
            Ok(_) => Ok(datagram),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(ElementError::NoAnswer),
            Err(error) => Err(error.into()),
        }
    }
}

fn tuple(from: SocketAddr, to: SocketAddr) -> Vec<Tuple> {
    let addresses = [IPTuple::SourceAddress(from.ip()), IPTuple::DestinationAddress(to.ip())];
    let ports = [ProtoTuple::SourcePort(from.port()), ProtoTuple::DestinationPort(to.port())];
    let protocol = [vec![ProtoTuple::Protocol(Protocol::Tcp)], ports.to_vec()].concat();
    vec![Tuple::Ip(addresses.to_vec()), Tuple::Proto(protocol)]
}

/// Whether the entry that the kernel tells of began with a packet from and to these ports.
fn began_at(datagram: &[u8], from: u16, to: u16) -> bool {
    let entry = datagram.get(MESSAGE_HEADER + FAMILY_HEADER..).unwrap_or_default();
    let protocol = attribute(entry, ORIGINAL).and_then(|tuple| attribute(tuple, PROTOCOL));
    let port = |kind: u16| protocol.and_then(|protocol| attribute(protocol, kind)).map(<[u8]>::to_vec);
    port(SOURCE_PORT) == Some(from.to_be_bytes().to_vec()) && port(DESTINATION_PORT) == Some(to.to_be_bytes().to_vec())
}
