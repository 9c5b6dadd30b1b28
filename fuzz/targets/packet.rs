//! Any bytes as a packet: what is read is what stands there, and a SYN that is taken for this kernel's own is copied right.
#![no_main]

use std::net::IpAddr;

use knockq::packet::{Flow, Persona, Syn};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|packet: &[u8]| {
    let read = Syn::parse(packet).ok();
    let expected = plainly(packet);
    match (read, expected) {
        (Some(syn), Some(expected)) => assert_eq!(syn, expected),
        (Some(syn), None) => panic!("no SYN, but read as {syn:?}"),
        // The one that counts: what has no extension headers must be found.
        (None, Some(_)) => assert_eq!(packet[0] >> 4, 6, "a SYN was overlooked"),
        (None, None) => {}
    }
    if let Ok(persona) = Persona::of(packet) {
        copies(&persona, packet[0] >> 4 == 4);
    }
});

/// RFC 791, 8200, 4302 and 9293, byte by byte.
fn plainly(packet: &[u8]) -> Option<Syn> {
    let (source, destination, protocol, segment) = match packet.first()? >> 4 {
        4 => v4(packet)?,
        6 => v6(packet)?,
        _ => return None,
    };
    let header = segment.get(..usize::from(segment.get(12)? >> 4) * 4)?;
    let is_syn = header.len() >= 20 && header[13] & 0x17 == 0x02;
    let u16_at = |place: usize| u16::from_be_bytes([header[place], header[place + 1]]);
    (protocol == 6 && is_syn).then(|| Syn {
        source,
        source_port: u16_at(0),
        destination,
        destination_port: u16_at(2),
        ip_id: (packet[0] >> 4 == 4).then(|| u16::from_be_bytes([packet[4], packet[5]])),
        sequence: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
        acknowledgment: u32::from_be_bytes([header[8], header[9], header[10], header[11]]),
        window: u16_at(14),
        tsval: tsval(&header[20..]),
    })
}

type Datagram<'a> = (IpAddr, IpAddr, u8, &'a [u8]);

fn v4(packet: &[u8]) -> Option<Datagram<'_>> {
    let length = usize::from(packet[0] & 0x0f) * 4;
    let header = packet.get(..length).filter(|header| header.len() >= 20)?;
    let is_fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
    let address = |place: usize| IpAddr::from(<[u8; 4]>::try_from(&header[place..place + 4]).unwrap());
    (!is_fragment).then(|| (address(12), address(16), header[9], &packet[length..]))
}

fn v6(packet: &[u8]) -> Option<Datagram<'_>> {
    let (header, mut rest) = packet.split_at_checked(40)?;
    let mut next = header[6];
    loop {
        let length = match next {
            0 | 43 | 60 | 135 | 139 | 140 => (usize::from(*rest.get(1)?) + 1) * 8,
            51 => (usize::from(*rest.get(1)?) + 2) * 4,
            44 if u16::from_be_bytes([*rest.get(2)?, *rest.get(3)?]) & 0xfff9 != 0 => return None,
            44 => 8,
            _ => break,
        };
        next = rest[0];
        rest = rest.get(length..)?;
    }
    let address = |place: usize| IpAddr::from(<[u8; 16]>::try_from(&header[place..place + 16]).unwrap());
    Some((address(8), address(24), next, rest))
}

/// The first timestamp option (RFC 7323), past options of any kind, as far as these can be read (RFC 9293 section 3.1).
fn tsval(mut options: &[u8]) -> Option<u32> {
    loop {
        let length = match *options.first()? {
            0 => return None,
            1 => 1,
            _ => usize::from(*options.get(1).filter(|length| **length >= 2)?),
        };
        let (option, rest) = options.split_at_checked(length)?;
        if let [8, _, a, b, c, d, ..] = *option
            && length == 10
        {
            return Some(u32::from_be_bytes([a, b, c, d]));
        }
        options = rest;
    }
}

fn copies(persona: &Persona, is_v4: bool) {
    let [source, destination] = if is_v4 { ["192.0.2.1", "192.0.2.2"] } else { ["2001:db8::1", "2001:db8::2"] };
    let [source, destination]: [IpAddr; 2] = [source, destination].map(|text| text.parse().unwrap());
    let flow = Flow { source, source_port: 40_000, destination, destination_port: 20_001 };
    let knock = persona.syn(&flow, 0xa1b2_c3d4, 0x1122_3344).unwrap();
    // Not every header that could be copied is a SYN; the kernel's own always is.
    if let Ok(syn) = Syn::parse(&knock) {
        let ends = (syn.source, syn.source_port, syn.destination, syn.destination_port);
        assert_eq!(ends, (source, 40_000, destination, 20_001));
        assert_eq!((syn.sequence, syn.tsval), (0xa1b2_c3d4, Some(0x1122_3344)));
    }
}
