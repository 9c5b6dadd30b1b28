//! Any bytes to the fields of a SYN.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{IpNumber, Ipv4HeaderSlice, Ipv6ExtensionsSlice, Ipv6HeaderSlice, TcpHeaderSlice, err};
use thiserror::Error;

/// What the verifier wants to know of a SYN (RFC 9293 section 3.1). Numbers are in host order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Syn {
    /// Who claims to have sent it.
    pub source: IpAddr,
    /// Port it came from.
    pub source_port: u16,
    /// Which of this host's addresses it was sent to.
    pub destination: IpAddr,
    /// Port it was sent to.
    pub destination_port: u16,
    /// Identification of the IPv4 header (RFC 791), which IPv6 has not.
    pub ip_id: Option<u16>,
    /// Initial sequence number.
    pub sequence: u32,
    /// Acknowledgment number, which means nothing in a SYN.
    pub acknowledgment: u32,
    /// Window.
    pub window: u16,
    /// TSval of the timestamp option (RFC 7323), where there is one.
    pub tsval: Option<u32>,
}

/// Why bytes are not a SYN that could be looked at further.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum NotSyn {
    /// A header is longer than the bytes that are here.
    #[error("truncated header")]
    Truncated,
    /// Neither IPv4 nor IPv6, or a header that contradicts itself.
    #[error("malformed header")]
    Malformed,
    /// A fragment of a datagram: its TCP header may be elsewhere.
    #[error("fragment")]
    Fragment,
    /// Another transport.
    #[error("not TCP")]
    NotTcp,
    /// FIN, RST or ACK is set, or SYN is not.
    #[error("not a SYN")]
    NotSyn,
}

impl Syn {
    /// Reads an IPv4 or IPv6 packet that starts at the IP header; its payload may be cut off.
    ///
    /// # Errors
    /// The first reason why it is not a whole SYN header.
    pub fn parse(packet: &[u8]) -> Result<Self, NotSyn> {
        match packet.first().map(|byte| byte >> 4) {
            Some(4) => Self::parse_v4(packet),
            Some(6) => Self::parse_v6(packet),
            Some(_) => Err(NotSyn::Malformed),
            None => Err(NotSyn::Truncated),
        }
    }

    fn parse_v4(packet: &[u8]) -> Result<Self, NotSyn> {
        let header = Ipv4HeaderSlice::from_slice(packet).map_err(|error| match error {
            err::ipv4::HeaderSliceError::Len(_) => NotSyn::Truncated,
            err::ipv4::HeaderSliceError::Content(_) => NotSyn::Malformed,
        })?;
        if header.is_fragmenting_payload() {
            return Err(NotSyn::Fragment);
        }
        let [source, destination] = [header.source(), header.destination()].map(|octets| Ipv4Addr::from(octets).into());
        let rest = packet.get(header.slice().len()..).unwrap_or_default();
        let syn = Self::parse_tcp(source, destination, header.protocol(), rest)?;
        Ok(Self { ip_id: Some(header.identification()), ..syn })
    }

    fn parse_v6(packet: &[u8]) -> Result<Self, NotSyn> {
        let header = Ipv6HeaderSlice::from_slice(packet).map_err(|error| match error {
            err::ipv6::HeaderSliceError::Len(_) => NotSyn::Truncated,
            err::ipv6::HeaderSliceError::Content(_) => NotSyn::Malformed,
        })?;
        let rest = packet.get(header.slice().len()..).unwrap_or_default();
        let (extensions, protocol, rest) =
            Ipv6ExtensionsSlice::from_slice(header.next_header(), rest).map_err(|error| match error {
                err::ipv6_exts::HeaderSliceError::Len(_) => NotSyn::Truncated,
                err::ipv6_exts::HeaderSliceError::Content(_) => NotSyn::Malformed,
            })?;
        if extensions.is_fragmenting_payload() {
            return Err(NotSyn::Fragment);
        }
        let [source, destination] = [header.source(), header.destination()].map(|octets| Ipv6Addr::from(octets).into());
        Self::parse_tcp(source, destination, protocol, rest)
    }

    fn parse_tcp(source: IpAddr, destination: IpAddr, protocol: IpNumber, rest: &[u8]) -> Result<Self, NotSyn> {
        if protocol != IpNumber::TCP {
            return Err(NotSyn::NotTcp);
        }
        let tcp = TcpHeaderSlice::from_slice(rest).map_err(|error| match error {
            err::tcp::HeaderSliceError::Len(_) => NotSyn::Truncated,
            err::tcp::HeaderSliceError::Content(_) => NotSyn::Malformed,
        })?;
        if !tcp.syn() || tcp.fin() || tcp.rst() || tcp.ack() {
            return Err(NotSyn::NotSyn);
        }
        Ok(Self {
            source,
            source_port: tcp.source_port(),
            destination,
            destination_port: tcp.destination_port(),
            ip_id: None,
            sequence: tcp.sequence_number(),
            acknowledgment: tcp.acknowledgment_number(),
            window: tcp.window_size(),
            tsval: timestamp(tcp.options()),
        })
    }
}

/// TSval of the first timestamp option (RFC 7323: kind 8, length 10), past options of any kind (RFC 9293 section 3.1).
fn timestamp(options: &[u8]) -> Option<u32> {
    match *options {
        [1, ref rest @ ..] => timestamp(rest),
        [8, 10, a, b, c, d, _, _, _, _, ..] => Some(u32::from_be_bytes([a, b, c, d])),
        [0, ..] | [_, 0 | 1, ..] => None,
        [_, length, ..] => timestamp(options.get(usize::from(length)..)?),
        _ => None,
    }
}
