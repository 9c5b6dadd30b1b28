//! Connections that came in by a door, as conntrack knows them: they end when conntrack forgets them, for the gate takes their
//! next packet for that of a stranger. Commands use this, the daemon never.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{DefaultNla, NLM_F_ACK, NLM_F_DUMP, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer};
use netlink_packet_netfilter::NetfilterProtoFamily;
use netlink_packet_netfilter::conntrack::{ConntrackAttribute, ConntrackMessage};

use super::attributes::{FAMILY_HEADER, MESSAGE_HEADER, attribute, messages};
use super::conntrack::{Conntrack, DESTINATION_PORT, ESTABLISHED, ORIGINAL, PROTOCOL};
use super::elements::{Door, ElementError, read};
use crate::service::{Port, Transport};

/// Attributes of an entry, besides those that [`super::conntrack`] has: its zone; its number, which keeps another from being
/// deleted that has taken its place.
const ZONE: u16 = 18;
const ID: u16 = 12;

/// Attribute of a tuple.
const ADDRESSES: u16 = 1;

/// Attributes of its addresses: the source, for each family.
const SOURCE4: u16 = 1;
const SOURCE6: u16 = 3;

/// Attribute of its protocol.
const NUMBER: u16 = 1;

/// Attributes of what its protocol knows: the state of TCP.
const PROTOCOL_STATE: u16 = 4;
const TCP: u16 = 1;
const TCP_STATE: u16 = 1;

/// An attribute holds others (`NLA_F_NESTED`).
const NESTED: u16 = 0x8000;

/// What became of connections that were to end.
#[derive(Default, Debug)]
pub struct Ending {
    /// How many ended.
    pub ended: u64,
    /// How many were named, and stay because their network is trusted.
    pub spared: u64,
    /// Doors whose connections may live on, and why.
    pub failed: Vec<(Door, String)>,
    /// Why not all connections could be looked at.
    pub unlisted: Option<String>,
}

/// Ends connections that came in by doors that are `meant`, but for those from trusted networks, for as long as the kernel
/// takes to list them. The gate takes what comes next for a stranger's, and an answer to the server's next packet for the same.
/// What fails spares no other.
pub fn end(is_meant: impl Fn(&Door) -> bool, is_trusted: impl Fn(&Door) -> bool) -> Ending {
    let mut ending = Ending::default();
    let (mut socket, mut found) = (None, Vec::new());
    for family in [NetfilterProtoFamily::IPv4, NetfilterProtoFamily::IPv6] {
        // A socket of its own for each: what is left of a list that broke off is no answer to what is asked next.
        let listed = Conntrack::new().map_err(ElementError::from).and_then(|mut conntrack| {
            conntrack.find(family, &is_meant, &mut found)?;
            Ok(conntrack)
        });
        match listed {
            Ok(conntrack) => socket = Some(conntrack),
            Err(error) => ending.unlisted = Some(error.to_string()),
        }
    }
    let in_all = found.len();
    found.retain(|flow| !is_trusted(&flow.door));
    ending.spared = in_all.saturating_sub(found.len()) as u64;
    for flow in found {
        let door = flow.door;
        match socket.as_mut().ok_or(ElementError::NoAnswer).and_then(|socket| socket.forget(flow)) {
            Ok(was_there) => ending.ended = ending.ended.saturating_add(was_there.into()),
            Err(error) => ending.failed.push((door, error.to_string())),
        }
    }
    ending
}

/// Where connections began that are established now, and the ports that they came to. What cannot be listed is left out.
pub fn established() -> impl Iterator<Item = (IpAddr, Port)> {
    let mut flows = Vec::new();
    for family in [NetfilterProtoFamily::IPv4, NetfilterProtoFamily::IPv6] {
        let _ = Conntrack::new().map_err(ElementError::from).and_then(|mut it| it.find(family, |_| true, &mut flows));
    }
    flows.into_iter().filter(|flow| flow.is_established).map(|flow| (flow.door.source, flow.door.port))
}

/// One connection.
struct Flow {
    /// The door that it came in by, as one that is not `once`.
    door: Door,
    /// Both ends speak.
    is_established: bool,
    family: NetfilterProtoFamily,
    entry: Vec<ConntrackAttribute>,
}

impl Conntrack {
    /// Adds the connections that came in by such doors, `once` or not.
    fn find(
        &mut self,
        family: NetfilterProtoFamily,
        is_meant: impl Fn(&Door) -> bool,
        found: &mut Vec<Flow>,
    ) -> Result<(), ElementError> {
        self.list(family, |entry| {
            if let Some(door) = through(entry).filter(&is_meant) {
                found.push(Flow { door, is_established: is_established(entry), family, entry: only_itself(entry) });
            }
        })
    }

    /// Has conntrack forget a connection; `false` if it has ended by itself.
    fn forget(&mut self, flow: Flow) -> Result<bool, ElementError> {
        self.send(flow.family, ConntrackMessage::Delete(flow.entry), NLM_F_ACK)?;
        let datagram = self.receive()?;
        match messages(&datagram).find_map(read).ok_or(ElementError::NoAnswer)? {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(ElementError::Connections(error)),
        }
    }

    /// Shows each entry's attributes.
    fn list(&mut self, family: NetfilterProtoFamily, mut show: impl FnMut(&[u8])) -> Result<(), ElementError> {
        self.send(family, ConntrackMessage::Get(Vec::new()), NLM_F_DUMP)?;
        loop {
            let datagram = self.receive()?;
            for message in messages(&datagram) {
                match NetlinkBuffer::new_checked(message).map(|message| message.message_type()) {
                    Ok(NLMSG_DONE) => return Ok(()),
                    Ok(NLMSG_ERROR) => {
                        return read(message).unwrap_or(Ok(())).map_err(ElementError::Connections);
                    }
                    _ => show(message.get(MESSAGE_HEADER + FAMILY_HEADER..).unwrap_or_default()),
                }
            }
        }
    }
}

/// The door that a connection came in by, whichever kind it is.
fn through(entry: &[u8]) -> Option<Door> {
    let tuple = attribute(entry, ORIGINAL)?;
    let (addresses, protocol) = (attribute(tuple, ADDRESSES)?, attribute(tuple, PROTOCOL)?);
    let v4 = attribute(addresses, SOURCE4).and_then(|source| Some(IpAddr::from(<[u8; 4]>::try_from(source).ok()?)));
    let v6 = || Some(IpAddr::from(<[u8; 16]>::try_from(attribute(addresses, SOURCE6)?).ok()?));
    let [number] = *attribute(protocol, NUMBER)? else { return None };
    let port = u16::from_be_bytes(attribute(protocol, DESTINATION_PORT)?.try_into().ok()?);
    let port = Port { transport: Transport::from_number(number)?, number: port };
    Some(Door { source: v4.or_else(v6)?, port, once: false })
}

/// Whether a connection of TCP is past its handshake, and not at its end; an exchange of UDP always is.
fn is_established(entry: &[u8]) -> bool {
    let state = attribute(entry, PROTOCOL_STATE).and_then(|info| attribute(attribute(info, TCP)?, TCP_STATE));
    state.is_none_or(|state| state == [ESTABLISHED])
}

/// What names this entry and no other.
fn only_itself(entry: &[u8]) -> Vec<ConntrackAttribute> {
    let part = |kind: u16, flag: u16| {
        attribute(entry, kind).map(|value| ConntrackAttribute::Other(DefaultNla::new(kind | flag, value.to_vec())))
    };
    [part(ORIGINAL, NESTED), part(ZONE, 0), part(ID, 0)].into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::{Door, through};

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).unwrap();
        let mut attribute = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
        attribute.resize(attribute.len().next_multiple_of(4), 0);
        attribute
    }

    #[test]
    fn a_connection_is_known_by_the_door_that_its_first_packet_came_to() {
        for (source, kind, bytes) in
            [("192.0.2.1", 1, vec![192, 0, 2, 1]), ("2020::1", 3, [vec![0x20, 0x20], vec![0; 13], vec![1]].concat())]
        {
            let addresses = attribute(0x8001, &attribute(kind, &bytes));
            let ports = [attribute(1, &[6]), attribute(2, &[0x9c, 0x40]), attribute(3, &[0, 22])].concat();
            let tuple = |protocol: &[u8]| attribute(0x8001, &[&addresses[..], &attribute(0x8002, protocol)].concat());
            let door = Door { source: source.parse().unwrap(), port: "tcp/22".parse().unwrap(), once: false };
            assert_eq!(through(&tuple(&ports)), Some(door));
            assert_eq!(through(&tuple(&attribute(1, &[1]))), None, "icmp has no port");
            let whole = tuple(&ports);
            for end in 0..whole.len() {
                assert_eq!(through(&whole[..end]), None);
            }
        }
    }
}
