//! The SYN that this host's kernel would send, but for the eight bytes of the token (docs/protocol.md section 4).

use std::net::IpAddr;

use etherparse::{Ipv4Header, Ipv6Header, TcpHeader, TcpOptionElement};
use thiserror::Error;

/// What a route changes in the SYNs that are sent over it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Route {
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// Segment size that is announced, in bytes.
    pub mss: u16,
    /// Most segments that the first window may have (`initrwnd`).
    pub initial_segments: Option<u32>,
    /// Connections ask for ECN (`features ecn`).
    pub ecn: bool,
    /// IPv4 packets may be fragmented on the way (`mtu lock`).
    pub may_fragment: bool,
}

/// The two ends of the knock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flow {
    /// Own address.
    pub source: IpAddr,
    /// Own port, one that the kernel chose and holds.
    pub source_port: u16,
    /// The server.
    pub destination: IpAddr,
    /// A knock port of the server.
    pub destination_port: u16,
}

/// A SYN of the kernel's own, in which addresses, ports, sequence number and TSval are still to be replaced.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Persona {
    ip: Ip,
    tcp: TcpHeader,
    options: Vec<TcpOptionElement>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Ip {
    V4(Ipv4Header),
    V6(Ipv6Header),
}

impl Persona {
    /// Takes on a SYN that this kernel has sent, from the IP header on.
    ///
    /// # Errors
    /// [`PersonaError::NoTimestamps`]: half of the token would have no place. [`PersonaError::Unfamiliar`]: the packet
    /// would not come out as it went in.
    pub fn of(syn: &[u8]) -> Result<Self, PersonaError> {
        let persona = Self::read(syn).filter(|persona| persona.bytes().is_ok_and(|bytes| bytes == syn));
        let persona = persona.ok_or(PersonaError::Unfamiliar)?;
        persona.tsval().map(|_| persona).ok_or(PersonaError::NoTimestamps)
    }

    fn read(syn: &[u8]) -> Option<Self> {
        let (ip, segment) = match syn.first()? >> 4 {
            4 => Ipv4Header::from_slice(syn).map(|(ip, segment)| (Ip::V4(ip), segment)).ok()?,
            _ => Ipv6Header::from_slice(syn).map(|(ip, segment)| (Ip::V6(ip), segment)).ok()?,
        };
        let (tcp, _) = TcpHeader::from_slice(segment).ok()?;
        let options = tcp.options_iterator().collect::<Result<_, _>>().ok()?;
        Some(Self { ip, tcp, options })
    }

    /// The TSval that the kernel chose, in ticks of its clock.
    pub fn tsval(&self) -> Option<u32> {
        self.options.iter().find_map(|option| match option {
            TcpOptionElement::Timestamp(tsval, _) => Some(*tsval),
            _ => None,
        })
    }

    /// Changes what the kernel would change for a route (`tcp_connect_init`, `tcp_ecn_send_syn`, `ip_queue_xmit`).
    #[must_use]
    pub fn over(mut self, route: &Route) -> Self {
        match &mut self.ip {
            Ip::V4(ip) => {
                ip.time_to_live = route.hop_limit;
                ip.dont_fragment &= !route.may_fragment;
            }
            Ip::V6(ip) => ip.hop_limit = route.hop_limit,
        }
        for option in &mut self.options {
            if let TcpOptionElement::MaximumSegmentSize(mss) = option {
                *mss = route.mss;
            }
        }
        if let Some(segments) = route.initial_segments {
            let most = segments.saturating_mul(u32::from(route.mss));
            self.tcp.window_size = self.tcp.window_size.min(u16::try_from(most).unwrap_or(u16::MAX));
        }
        self.tcp.ece |= route.ecn;
        self.tcp.cwr |= route.ecn;
        self
    }

    /// The packet of a knock, from the IP header on, with right checksums.
    ///
    /// IPv4 identification and IPv6 flow label are those that the kernel drew at random for its own SYN.
    ///
    /// # Errors
    /// [`PersonaError::MixedFamilies`].
    pub fn syn(&self, flow: &Flow, sequence: u32, tsval: u32) -> Result<Vec<u8>, PersonaError> {
        let mut knock = self.clone();
        knock.tcp.source_port = flow.source_port;
        knock.tcp.destination_port = flow.destination_port;
        knock.tcp.sequence_number = sequence;
        for option in &mut knock.options {
            if let TcpOptionElement::Timestamp(kernels, _) = option {
                *kernels = tsval;
            }
        }
        knock.tcp.set_options(&knock.options).map_err(|_| PersonaError::Unfamiliar)?; // which the checksum covers
        let checksum = match (&mut knock.ip, flow.source, flow.destination) {
            (Ip::V4(ip), IpAddr::V4(source), IpAddr::V4(destination)) => {
                (ip.source, ip.destination) = (source.octets(), destination.octets());
                ip.header_checksum = ip.calc_header_checksum();
                knock.tcp.calc_checksum_ipv4(ip, &[])
            }
            (Ip::V6(ip), IpAddr::V6(source), IpAddr::V6(destination)) => {
                (ip.source, ip.destination) = (source.octets(), destination.octets());
                knock.tcp.calc_checksum_ipv6(ip, &[])
            }
            _ => return Err(PersonaError::MixedFamilies),
        };
        knock.tcp.checksum = checksum.map_err(|_| PersonaError::Unfamiliar)?;
        knock.bytes()
    }

    fn bytes(&self) -> Result<Vec<u8>, PersonaError> {
        let mut tcp = self.tcp.clone();
        tcp.set_options(&self.options).map_err(|_| PersonaError::Unfamiliar)?;
        let ip = match &self.ip {
            Ip::V4(ip) => ip.to_bytes().to_vec(),
            Ip::V6(ip) => ip.to_bytes().to_vec(),
        };
        Ok([ip.as_slice(), tcp.to_bytes().as_slice()].concat())
    }
}

/// Why no SYN can be built.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PersonaError {
    /// `net.ipv4.tcp_timestamps` is 0.
    #[error("TCP timestamps are switched off on this host, and half of the knock travels in them")]
    NoTimestamps,
    /// One end is IPv4, the other IPv6.
    #[error("source and destination are of different families")]
    MixedFamilies,
    /// A header or an option that this version cannot copy.
    #[error("this kernel's SYN holds something that is not known here")]
    Unfamiliar,
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::{Flow, Persona, PersonaError, Route};
    use crate::packet::Syn;

    /// SYNs over loopback with TCP_MAXSEG 1460, of Linux 6.18 with 4 GiB of memory and more.
    const V4: &str = "4500003cbbde4000400680db7f0000017f000001b0f2d4b502e7e90c00000000a002faf0fe300000\
                      020405b40402080ab7907c3c000000000103030a";
    const V6: &str = "6001744e00280640000000000000000000000000000000010000000000000000000000000000000\
                      1828e9f931f17ef7600000000a002faf000300000020405b40402080a61fd888b000000000103030a";
    /// With tcp_timestamps = 0.
    const NO_TIMESTAMPS: &str = "45000034bbde4000400680e37f0000017f000001b0f2d4b502e7e90c000000008002faf0fe28000\
                                 0020405b40101040201030307";

    fn bytes(hex: &str) -> Vec<u8> {
        let digit = |place| u8::from_str_radix(&hex[place..place + 2], 16).unwrap();
        (0..hex.len()).step_by(2).map(digit).collect()
    }

    fn flow(source: &str, destination: &str) -> Flow {
        let [source, destination] = [source, destination].map(|text| text.parse::<IpAddr>().unwrap());
        Flow { source, source_port: 40000, destination, destination_port: 20001 }
    }

    const ROUTE: Route = Route { hop_limit: 64, mss: 1460, initial_segments: None, ecn: false, may_fragment: false };

    fn knock(specimen: &str, route: &Route, flow: &Flow) -> Vec<u8> {
        Persona::of(&bytes(specimen)).unwrap().over(route).syn(flow, 0xa1b2_c3d4, 0x1122_3344).unwrap()
    }

    #[test]
    fn a_knock_differs_from_the_kernels_syn_only_where_it_must() {
        let v4 = "4500003cbbde40004006____0a6307010a6307029c404e21a1b2c3d400000000a002faf0____0000\
                  020405b40402080a11223344000000000103030a";
        let v6 = "6001744e0028064020010db800000000000000000000000120010db800000000000000000000000\
                  29c404e21a1b2c3d400000000a002faf0____0000020405b40402080a11223344000000000103030a";
        for (specimen, expected, flow) in
            [(V4, v4, flow("10.99.7.1", "10.99.7.2")), (V6, v6, flow("2001:db8::1", "2001:db8::2"))]
        {
            let knock: String = knock(specimen, &ROUTE, &flow).iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(knock.len(), expected.len());
            for (place, (is, should)) in knock.chars().zip(expected.chars()).enumerate() {
                assert!(should == '_' || is == should, "at {place} of {knock}");
            }
        }
    }

    #[test]
    fn what_is_built_is_read_back_alike() {
        for (specimen, flow) in [(V4, flow("10.99.7.1", "10.99.7.2")), (V6, flow("2001:db8::1", "2001:db8::2"))] {
            let syn = Syn::parse(&knock(specimen, &ROUTE, &flow)).unwrap();
            assert_eq!((syn.source, syn.destination), (flow.source, flow.destination));
            assert_eq!((syn.source_port, syn.destination_port), (40000, 20001));
            assert_eq!((syn.sequence, syn.tsval), (0xa1b2_c3d4, Some(0x1122_3344)));
        }
    }

    #[test]
    fn a_route_changes_what_the_kernel_would_change() {
        let route = Route { hop_limit: 5, mss: 1000, initial_segments: Some(3), ecn: true, may_fragment: true };
        let v4 = knock(V4, &route, &flow("10.99.7.1", "10.99.7.2"));
        assert_eq!((v4[6], v4[8]), (0, 5), "DF, TTL");
        assert_eq!((v4[33], &v4[34..36]), (0xc2, [0x0b, 0xb8].as_slice()), "SYN with ECE and CWR; window");
        assert_eq!(v4[40..44], [2, 4, 0x03, 0xe8]);
        let v6 = knock(V6, &Route { initial_segments: Some(1000), ..route }, &flow("2001:db8::1", "2001:db8::2"));
        assert_eq!(v6[7], 5, "hop limit");
        assert_eq!(v6[54..56], [0xfa, 0xf0], "a window is never made larger");
    }

    #[test]
    fn bits_that_the_kernel_sets_stay_set() {
        let accurate_ecn = knock(&V4.replace("a002", "a1c2"), &ROUTE, &flow("10.99.7.1", "10.99.7.2"));
        assert_eq!(accurate_ecn[32..34], [0xa1, 0xc2], "AE, CWR, ECE (RFC 9768) and SYN");
        let in_ip = knock(&V4.replacen("4500", "4502", 1), &ROUTE, &flow("10.99.7.1", "10.99.7.2"));
        assert_eq!(in_ip[..2], [0x45, 0x02], "ECT(0), as dctcp has it");
    }

    #[test]
    fn a_syn_without_timestamps_or_with_something_unknown_is_no_persona() {
        assert_eq!(Persona::of(&bytes(NO_TIMESTAMPS)), Err(PersonaError::NoTimestamps));
        let unknown_option = V4.replace("0103030a", "fd04f989");
        let reserved_bit = V4.replace("a002", "a402");
        let data = format!("{V4}00");
        for syn in [unknown_option, reserved_bit, data, V4[..60].to_owned(), String::new(), "ff".to_owned()] {
            assert_eq!(Persona::of(&bytes(&syn)), Err(PersonaError::Unfamiliar), "{syn}");
        }
    }

    #[test]
    fn a_persona_of_one_family_makes_no_knock_of_the_other() {
        let persona = Persona::of(&bytes(V4)).unwrap();
        assert_eq!(persona.syn(&flow("2001:db8::1", "2001:db8::2"), 1, 2), Err(PersonaError::MixedFamilies));
        assert_eq!(persona.syn(&flow("10.99.7.1", "2001:db8::2"), 1, 2), Err(PersonaError::MixedFamilies));
    }
}
