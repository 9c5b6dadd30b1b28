//! The SYN that this host's kernel would send, but for the eight bytes of the token (docs/protocol.md section 4).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{IpFragOffset, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header, TcpHeader, TcpOptionElement};
use thiserror::Error;

/// What the kernel's TCP takes from its settings, from the route and from nowhere else.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KernelSettings {
    /// `net.ipv4.tcp_timestamps` is not 0.
    pub timestamps: bool,
    /// `net.ipv4.tcp_sack`.
    pub sack: bool,
    /// `net.ipv4.tcp_window_scaling`.
    pub window_scaling: bool,
    /// `net.ipv4.tcp_ecn` is 1: outgoing connections ask for ECN (RFC 3168).
    pub ecn: bool,
    /// The middle number of `net.ipv4.tcp_rmem`: bytes of a new socket's receive buffer.
    pub receive_buffer: u32,
    /// The larger of the last number of `net.ipv4.tcp_rmem` and `net.core.rmem_max`, in bytes.
    pub receive_buffer_max: u32,
    /// TTL or hop limit: of the host for IPv4, of the route for IPv6.
    pub hop_limit: u8,
    /// MTU of this route, in bytes.
    pub mtu: u32,
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

/// The constant part of the SYNs that this kernel sends over one route.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Persona {
    hop_limit: u8,
    mss: u16,
    window: u16,
    window_scale: Option<u8>,
    sack: bool,
    ecn: bool,
}

impl Persona {
    /// Computes what `net/ipv4/tcp_output.c` (`tcp_connect_init`, `tcp_syn_options`) would.
    ///
    /// # Errors
    /// [`PersonaError::NoTimestamps`]: half of the token would have no place.
    pub fn new(kernel: &KernelSettings, destination: &IpAddr) -> Result<Self, PersonaError> {
        if !kernel.timestamps {
            return Err(PersonaError::NoTimestamps);
        }
        let headers = if destination.is_ipv4() { 40 } else { 60 };
        let mss = kernel.mtu.saturating_sub(headers).clamp(256, 65535 - 40);
        Ok(Self {
            hop_limit: kernel.hop_limit,
            mss: u16::try_from(mss).unwrap_or(u16::MAX),
            window: initial_window(kernel.receive_buffer, mss),
            window_scale: kernel.window_scaling.then(|| window_scale(kernel.receive_buffer_max)),
            sack: kernel.sack,
            ecn: kernel.ecn,
        })
    }

    /// The packet, from the IP header on, with right checksums.
    ///
    /// `filler` goes where the kernel draws at random and the token is not: the IPv4 identification takes its low 16
    /// bits, the IPv6 flow label its low 20.
    ///
    /// # Errors
    /// [`PersonaError::MixedFamilies`].
    pub fn syn(&self, flow: &Flow, sequence: u32, tsval: u32, filler: u32) -> Result<Vec<u8>, PersonaError> {
        let mut tcp = TcpHeader::new(flow.source_port, flow.destination_port, sequence, self.window);
        tcp.syn = true;
        tcp.ece = self.ecn;
        tcp.cwr = self.ecn;
        tcp.set_options(&self.options(tsval)).map_err(|_| PersonaError::Length)?;
        match (flow.source, flow.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => self.over_v4(tcp, source, destination, filler),
            (IpAddr::V6(source), IpAddr::V6(destination)) => self.over_v6(tcp, source, destination, filler),
            _ => Err(PersonaError::MixedFamilies),
        }
    }

    /// The options in the kernel's order (`tcp_options_write`).
    fn options(&self, tsval: u32) -> Vec<TcpOptionElement> {
        let mut options = vec![TcpOptionElement::MaximumSegmentSize(self.mss)];
        if self.sack {
            options.push(TcpOptionElement::SelectiveAcknowledgementPermitted);
        } else {
            options.extend([TcpOptionElement::Noop, TcpOptionElement::Noop]);
        }
        options.push(TcpOptionElement::Timestamp(tsval, 0));
        if let Some(scale) = self.window_scale {
            options.extend([TcpOptionElement::Noop, TcpOptionElement::WindowScale(scale)]);
        }
        options
    }

    fn over_v4(
        &self,
        mut tcp: TcpHeader,
        source: Ipv4Addr,
        destination: Ipv4Addr,
        filler: u32,
    ) -> Result<Vec<u8>, PersonaError> {
        let mut ip =
            Ipv4Header::new(tcp.header_len_u16(), self.hop_limit, IpNumber::TCP, source.octets(), destination.octets())
                .map_err(|_| PersonaError::Length)?;
        ip.dont_fragment = true;
        ip.fragment_offset = IpFragOffset::ZERO;
        let [.., a, b] = filler.to_be_bytes();
        ip.identification = u16::from_be_bytes([a, b]);
        ip.header_checksum = ip.calc_header_checksum();
        tcp.checksum = tcp.calc_checksum_ipv4(&ip, &[]).map_err(|_| PersonaError::Length)?;
        Ok([ip.to_bytes().as_slice(), tcp.to_bytes().as_slice()].concat())
    }

    fn over_v6(
        &self,
        mut tcp: TcpHeader,
        source: Ipv6Addr,
        destination: Ipv6Addr,
        filler: u32,
    ) -> Result<Vec<u8>, PersonaError> {
        let ip = Ipv6Header {
            traffic_class: 0,
            flow_label: Ipv6FlowLabel::try_new(filler & 0x000f_ffff).unwrap_or_default(),
            payload_length: tcp.header_len_u16(),
            next_header: IpNumber::TCP,
            hop_limit: self.hop_limit,
            source: source.octets(),
            destination: destination.octets(),
        };
        tcp.checksum = tcp.calc_checksum_ipv6(&ip, &[]).map_err(|_| PersonaError::Length)?;
        Ok([ip.to_bytes().as_slice(), tcp.to_bytes().as_slice()].concat())
    }
}

/// `tcp_select_initial_window`: half of the receive buffer, in whole segments, 65535 at most.
fn initial_window(receive_buffer: u32, mss: u32) -> u16 {
    let space = receive_buffer / 2;
    let whole = if space > mss { space - space % mss } else { space };
    u16::try_from(whole).unwrap_or(u16::MAX)
}

/// The scale that makes the largest buffer expressible in 16 bits: `clamp(ilog2(max) - 15, 0, 14)`.
fn window_scale(receive_buffer_max: u32) -> u8 {
    let bits = receive_buffer_max.max(1).ilog2().saturating_sub(15).min(14);
    u8::try_from(bits).unwrap_or(14)
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
    /// A header did not take its content.
    #[error("a header does not fit")]
    Length,
}

#[cfg(test)]
mod tests {
    use super::{Flow, KernelSettings, Persona, PersonaError};
    use crate::packet::Syn;
    use std::net::IpAddr;

    /// Debian's defaults with 4 GiB and more of memory on Linux 6.18.
    const KERNEL: KernelSettings = KernelSettings {
        timestamps: true,
        sack: true,
        window_scaling: true,
        ecn: false,
        receive_buffer: 131_072,
        receive_buffer_max: 32 << 20,
        hop_limit: 64,
        mtu: 1500,
    };

    fn flow(source: &str, destination: &str) -> Flow {
        let [source, destination] = [source, destination].map(|text| text.parse().unwrap());
        Flow { source, source_port: 40000, destination, destination_port: 20001 }
    }

    fn packet(kernel: &KernelSettings, flow: &Flow) -> Vec<u8> {
        Persona::new(kernel, &flow.destination).unwrap().syn(flow, 0xa1b2_c3d4, 0x1122_3344, 0x000a_bcde).unwrap()
    }

    #[test]
    fn every_field_of_the_ipv4_syn_is_in_its_place() {
        let bytes = packet(&KERNEL, &flow("10.99.7.1", "10.99.7.2"));
        let hex = |range: std::ops::Range<usize>| bytes[range].iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(hex(0..10), "4500003cbcde40004006", "version to protocol");
        assert_eq!(hex(12..20), "0a6307010a630702", "addresses");
        assert_eq!(hex(20..36), "9c404e21a1b2c3d400000000a002faf0", "ports to window");
        assert_eq!(hex(38..60), "0000020405b40402080a11223344000000000103030a", "urgent pointer and options");
    }

    #[test]
    fn what_is_built_is_read_back_alike() {
        for flow in [flow("10.99.7.1", "10.99.7.2"), flow("2001:db8::1", "2001:db8::2")] {
            let syn = Syn::parse(&packet(&KERNEL, &flow)).unwrap();
            assert_eq!((syn.source, syn.destination), (flow.source, flow.destination));
            assert_eq!((syn.source_port, syn.destination_port), (40000, 20001));
            assert_eq!((syn.sequence, syn.tsval), (0xa1b2_c3d4, Some(0x1122_3344)));
        }
    }

    #[test]
    fn window_follows_mtu_as_measured_on_linux() {
        let v4: IpAddr = "192.0.2.1".parse().unwrap();
        let v6: IpAddr = "2001:db8::1".parse().unwrap();
        for (mtu, address, mss, window) in [
            (1500, v4, 1460, 64240),
            (1500, v6, 1440, 64800),
            (1280, v4, 1240, 64480),
            (1400, v4, 1360, 65280),
            (1420, v4, 1380, 64860),
            (1492, v4, 1452, 65340),
            (9000, v4, 8960, 62720),
        ] {
            let persona = Persona::new(&KernelSettings { mtu, ..KERNEL }, &address).unwrap();
            assert_eq!((persona.mss, persona.window), (mss, window), "MTU {mtu}");
        }
    }

    #[test]
    fn window_follows_the_receive_buffer_as_measured_on_linux() {
        let v4: IpAddr = "192.0.2.1".parse().unwrap();
        for (receive_buffer, window) in [(131_072, 64240), (262_144, 65535), (65536, 32120), (2048, 1024)] {
            let persona = Persona::new(&KernelSettings { receive_buffer, ..KERNEL }, &v4).unwrap();
            assert_eq!(persona.window, window, "tcp_rmem[1] = {receive_buffer}");
        }
    }

    #[test]
    fn window_scale_follows_the_largest_buffer() {
        for (bytes, scale) in [(6 << 20, 7), (32 << 20, 10), (131_072, 2), (65535, 0), (u32::MAX, 14)] {
            assert_eq!(super::window_scale(bytes), scale, "{bytes}");
        }
    }

    #[test]
    fn without_sack_or_scaling_the_options_change_as_the_kernels_do() {
        let kernel = KernelSettings { sack: false, window_scaling: false, ecn: true, ..KERNEL };
        let bytes = packet(&kernel, &flow("10.99.7.1", "10.99.7.2"));
        assert_eq!(bytes.len(), 20 + 20 + 16);
        assert_eq!(bytes[33], 0xc2, "SYN with ECE and CWR");
        assert_eq!(bytes[40..46], [2, 4, 5, 0xb4, 1, 1]);
    }

    #[test]
    fn a_host_without_timestamps_is_refused() {
        let kernel = KernelSettings { timestamps: false, ..KERNEL };
        assert_eq!(Persona::new(&kernel, &"192.0.2.1".parse().unwrap()), Err(PersonaError::NoTimestamps));
    }
}
