//! What a route changes in the SYNs that are sent over it.

use std::io;
use std::net::SocketAddr;

use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteMetric};
use netlink_packet_route::{AddressFamily, IpProtocol, RouteNetlinkMessage};
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};

use crate::packet::Route;

/// `RTAX_FEATURE_ECN` of linux/rtnetlink.h.
const FEATURE_ECN: u32 = 1;

/// Bit of `RTAX_MTU` among locked metrics.
const LOCKED_MTU: u32 = 1 << 2;

/// Bytes of an answer at most.
const ANSWER_MAX: usize = 8192;

/// A route as far as SYNs are concerned.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RouteSettings {
    /// What is changed in the packet itself.
    pub route: Route,
    /// Largest receive window, in bytes (`window`).
    pub window: Option<u32>,
}

impl RouteSettings {
    /// The settings that a plain route has: its MTU decides on the segment size (`ipv4_default_advmss`,
    /// `ip6_default_advmss`).
    fn plain(is_v4: bool, mtu: u32, hop_limit: u8) -> Self {
        let mss =
            if is_v4 { mtu.saturating_sub(40).clamp(256, 65495) } else { mtu.saturating_sub(60).clamp(1220, 65515) };
        let mss = u16::try_from(mss).unwrap_or(u16::MAX);
        let route = Route { hop_limit, mss, initial_segments: None, ecn: false, may_fragment: false };
        Self { route, window: None }
    }

    /// Asks the kernel for the route of a connection. MTU in bytes and hop limit are those that it tells to sockets.
    ///
    /// # Errors
    /// The kernel's.
    pub fn of(local: SocketAddr, destination: SocketAddr, mtu: u32, hop_limit: u8) -> io::Result<Self> {
        let mut settings = Self::plain(destination.is_ipv4(), mtu, hop_limit);
        for attribute in ask(local, destination)?.attributes {
            let RouteAttribute::Metrics(metrics) = attribute else { continue };
            metrics.into_iter().for_each(|metric| settings.apply(metric));
        }
        Ok(settings)
    }

    fn apply(&mut self, metric: RouteMetric) {
        let route = &mut self.route;
        match metric {
            RouteMetric::Hoplimit(limit) => route.hop_limit = u8::try_from(limit).unwrap_or(u8::MAX),
            RouteMetric::Advmss(mss) => route.mss = u16::try_from(mss).unwrap_or(u16::MAX),
            RouteMetric::InitRwnd(segments) => route.initial_segments = Some(segments),
            RouteMetric::Features(features) => route.ecn = features & FEATURE_ECN != 0,
            RouteMetric::Lock(metrics) => route.may_fragment = metrics & LOCKED_MTU != 0,
            RouteMetric::Window(bytes) => self.window = Some(bytes),
            _ => {}
        }
    }
}

/// `ip route get`
fn ask(local: SocketAddr, destination: SocketAddr) -> io::Result<RouteMessage> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    let question = RouteNetlinkMessage::GetRoute(question(local, destination));
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(question));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    let socket = Socket::new(NETLINK_ROUTE)?;
    socket.send_to(&bytes, &netlink_sys::SocketAddr::new(0, 0), 0)?;
    let mut answer = Vec::with_capacity(ANSWER_MAX);
    socket.recv(&mut answer, 0)?;
    read(&answer)
}

/// The route that the kernel answers with.
///
/// # Errors
/// The kernel's, or `InvalidData` for another answer.
pub fn read(answer: &[u8]) -> io::Result<RouteMessage> {
    match NetlinkMessage::deserialize(answer).map_err(io::Error::other)?.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) => Ok(route),
        NetlinkPayload::Error(error) => Err(io::Error::from_raw_os_error(error.raw_code().saturating_neg())),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn question(local: SocketAddr, destination: SocketAddr) -> RouteMessage {
    let mut question = RouteMessage::default();
    let (family, length) = if destination.is_ipv4() { (AddressFamily::Inet, 32) } else { (AddressFamily::Inet6, 128) };
    question.header.address_family = family;
    question.header.destination_prefix_length = length;
    question.header.source_prefix_length = length;
    question.attributes = vec![
        RouteAttribute::Destination(destination.ip().into()),
        RouteAttribute::Source(local.ip().into()),
        RouteAttribute::IpProto(IpProtocol::Tcp.into()),
        RouteAttribute::Sport(local.port()),
        RouteAttribute::Dport(destination.port()),
    ];
    if let SocketAddr::V6(destination) = destination
        && destination.scope_id() != 0
    {
        question.attributes.push(RouteAttribute::Oif(destination.scope_id()));
    }
    question
}

#[cfg(test)]
mod tests {
    use super::{RouteSettings, read};

    #[test]
    fn a_refusal_is_an_error_whatever_its_number() {
        for code in [-101, i32::MIN, 1] {
            let refusal = [&20_u32.to_ne_bytes()[..], &2_u16.to_ne_bytes(), &[0; 10], &code.to_ne_bytes()].concat();
            assert!(read(&refusal).is_err(), "{code}");
        }
    }

    #[test]
    fn the_segment_size_follows_the_mtu_as_measured_on_linux() {
        for (mtu, v4, v6) in [
            (1500, 1460, 1440),
            (1280, 1240, 1220),
            (1420, 1380, 1360),
            (9000, 8960, 8940),
            (68, 256, 1220),
            (65536, 65495, 65476),
        ] {
            assert_eq!(RouteSettings::plain(true, mtu, 64).route.mss, v4, "MTU {mtu} over IPv4");
            assert_eq!(RouteSettings::plain(false, mtu, 64).route.mss, v6, "MTU {mtu} over IPv6");
        }
    }
}
