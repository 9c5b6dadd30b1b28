//! Which addresses mean the same at both ends of a path.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The addresses of this host's interfaces.
pub fn own_addresses() -> Vec<IpAddr> {
    let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
    let addresses = interfaces.filter_map(|interface| {
        let storage = interface.address?;
        let v4 = storage.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| storage.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    });
    addresses.collect()
}

/// Whether an address is globally reachable (IANA's special-purpose registries, RFC 6890 and its updates), so that a
/// server sees it as it is.
pub fn is_global(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_global_v4(address),
        IpAddr::V6(address) => is_global_v6(address),
    }
}

/// Whether packets to this address are translated to IPv4 on the way (RFC 6052, RFC 8215), so that the server sees another
/// source.
pub fn is_nat64(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(_) => false,
        IpAddr::V6(address) => matches!(address.segments(), [0x64, 0xff9b, 0, 0, 0, 0, _, _] | [0x64, 0xff9b, 1, ..]),
    }
}

fn is_global_v4(address: &Ipv4Addr) -> bool {
    let is_special = match address.octets() {
        [0 | 10 | 127, ..] | [169, 254, ..] | [192, 168, ..] | [198, 18 | 19, ..] => true,
        [240..=255, ..] => true,
        [100, b, ..] => (64..128).contains(&b),
        [172, b, ..] => (16..32).contains(&b),
        [192, 0, 0 | 2, _] | [198, 51, 100, _] | [203, 0, 113, _] | [192, 88, 99, _] => true,
        _ => address.is_multicast(),
    };
    !is_special
}

fn is_global_v6(address: &Ipv6Addr) -> bool {
    // Only 2000::/3 is given out; within it, documentation, benchmarking and 6to4 are not reachable.
    match address.segments() {
        [0x2001, 0x0db8, ..] | [0x3fff, 0..=0x0fff, ..] | [0x2002, ..] | [0x2001, 0..=0x01ff, ..] => false,
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

#[cfg(test)]
mod tests {
    use super::{is_global, is_nat64};

    #[test]
    fn only_addresses_that_the_server_would_see_count_as_global() {
        for text in [
            "8.8.8.8",
            "1.1.1.1",
            "100.63.0.1",
            "172.32.0.1",
            "223.255.255.255",
            "2a00::1",
            "2600:1::2",
            "2001:4860::1",
        ] {
            assert!(is_global(&text.parse().unwrap()), "{text}");
        }
        for text in [
            "0.0.0.0",
            "10.0.0.1",
            "100.64.0.1",
            "127.0.0.1",
            "169.254.1.1",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.2.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:8.8.8.8",
            "64:ff9b::808:808",
            "100::1",
            "2001:db8::1",
            "2001::1",
            "2002::1",
            "fc00::1",
            "fe80::1",
            "ff02::1",
        ] {
            assert!(!is_global(&text.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn nat64_prefixes_are_known() {
        for (text, expected) in [
            ("64:ff9b::c000:201", true),
            ("64:ff9b:1:2::1", true),
            ("64:ff9b:2::1", false),
            ("2001:db8::1", false),
            ("192.0.2.1", false),
        ] {
            assert_eq!(is_nat64(&text.parse().unwrap()), expected, "{text}");
        }
    }
}
