//! The SYN of knockknock's client, which is `hping3 -S -c 1 -p PORT -N ID -w WINDOW -M SEQUENCE -L ACKNOWLEDGMENT HOST`
//! (docs/protocol.md section 6). No kernel sends its like: it has no options, and an acknowledgment number without the flag.

use std::net::SocketAddrV4;

use etherparse::{IpNumber, Ipv4Header, TcpHeader};

/// The fields that hold the token, in host order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fields {
    /// Identification of the IPv4 header. For 0 the kernel puts another: it cannot be sent.
    pub identification: u16,
    /// TCP sequence number.
    pub sequence: u32,
    /// TCP acknowledgment number.
    pub acknowledgment: u32,
    /// TCP window.
    pub window: u16,
}

/// The packet from the IP header on, 40 bytes with right checksums.
pub fn syn(source: SocketAddrV4, destination: SocketAddrV4, fields: &Fields) -> Vec<u8> {
    let mut ip = Ipv4Header {
        total_len: 40,
        identification: fields.identification,
        dont_fragment: false,
        time_to_live: 64,
        protocol: IpNumber::TCP,
        source: source.ip().octets(),
        destination: destination.ip().octets(),
        ..Ipv4Header::default()
    };
    ip.header_checksum = ip.calc_header_checksum();
    let mut tcp = TcpHeader::new(source.port(), destination.port(), fields.sequence, fields.window);
    tcp.syn = true;
    tcp.acknowledgment_number = fields.acknowledgment;
    tcp.checksum = tcp.calc_checksum_ipv4(&ip, &[]).unwrap_or_default(); // it fails for larger payloads than none
    [ip.to_bytes().as_slice(), tcp.to_bytes().as_slice()].concat()
}

#[cfg(test)]
mod tests {
    use super::{Fields, syn};

    /// What `hping3 -S -c 1 -p 2222 -N 50121 -w 4660 -M 2712847316 -L 287454020 10.99.7.2` sends (Debian's 3.a2.ds2-10).
    const OF_HPING3: [u8; 40] = [
        0x45, 0x00, 0x00, 0x28, 0xc3, 0xc9, 0x00, 0x00, 0x40, 0x06, 0x94, 0x3e, 0x0a, 0x63, 0x07, 0x01, 0x0a, 0x63,
        0x07, 0x02, 0x08, 0xee, 0x08, 0xae, 0xa1, 0xb2, 0xc3, 0xd4, 0x11, 0x22, 0x33, 0x44, 0x50, 0x02, 0x12, 0x34,
        0xbf, 0x5c, 0x00, 0x00,
    ];

    #[test]
    fn the_packet_is_byte_for_byte_that_of_hping3() {
        let fields =
            Fields { identification: 50121, sequence: 0xa1b2_c3d4, acknowledgment: 0x1122_3344, window: 0x1234 };
        let [source, destination] = ["10.99.7.1:2286", "10.99.7.2:2222"].map(|text| text.parse().unwrap());
        assert_eq!(syn(source, destination, &fields), OF_HPING3);
    }
}
