//! The socket to connection tracking.

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

use super::attributes::messages;
use super::elements::{ElementError, read};

/// The state of an established connection (`TCP_CONNTRACK_ESTABLISHED`).
pub(super) const ESTABLISHED: u8 = 3;

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

    /// Has conntrack know an established connection; it may already.
    pub(super) fn make(&mut self, client: SocketAddr, server: SocketAddr) -> Result<(), ElementError> {
        const SECONDS: u32 = 5 * 24 * 60 * 60; // until its next packet, as by default
        let tuple = |from: SocketAddr, to: SocketAddr| {
            let ports = [ProtoTuple::SourcePort(from.port()), ProtoTuple::DestinationPort(to.port())];
            let addresses = [IPTuple::SourceAddress(from.ip()), IPTuple::DestinationAddress(to.ip())];
            let protocol = [vec![ProtoTuple::Protocol(Protocol::Tcp)], ports.to_vec()].concat();
            vec![Tuple::Ip(addresses.to_vec()), Tuple::Proto(protocol)]
        };
        let entry = vec![
            ConntrackAttribute::CtaTupleOrig(tuple(client, server)),
            ConntrackAttribute::CtaTupleReply(tuple(server, client)),
            ConntrackAttribute::CtaStatus(Status::SeenReply | Status::Assured | Status::Confirmed),
            ConntrackAttribute::CtaTimeout(SECONDS),
            ConntrackAttribute::CtaProtoInfo(vec![ProtoInfo::TCP(vec![ProtoInfoTCP::State(ESTABLISHED)])]),
        ];
        let is_ipv4 = client.is_ipv4();
        let family = if is_ipv4 { NetfilterProtoFamily::IPv4 } else { NetfilterProtoFamily::IPv6 };
        self.send(family, ConntrackMessage::New(entry), NLM_F_CREATE | NLM_F_EXCL | NLM_F_ACK)?;
        let datagram = self.receive()?;
        match messages(&datagram).find_map(read).ok_or(ElementError::NoAnswer)? {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(ElementError::Connections(error)),
            _ => Ok(()),
        }
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
