//! Messages and attributes of netlink, as the kernel sends them: read no deeper than needed, and no length believed that goes
//! beyond what is there.

use netlink_packet_core::NlasIterator;

/// Bytes of `struct nlmsghdr`, which stands before a message.
pub(super) const MESSAGE_HEADER: usize = 16;

/// Bytes of `struct nfgenmsg`, which stands before the attributes.
pub(super) const FAMILY_HEADER: usize = 4;

/// Bytes of `struct nlattr`, which stands before a value.
const ATTRIBUTE_HEADER: usize = 4;

/// The messages of a datagram, up to one that goes beyond its end.
pub(super) fn messages(datagram: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = rest.first_chunk::<4>().and_then(|length| usize::try_from(u32::from_ne_bytes(*length)).ok())?;
        let message = rest.get(..length).filter(|message| message.len() >= MESSAGE_HEADER)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// Kinds and values, up to one that goes beyond the end.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes).map_while(Result::ok).filter_map(|found| {
        let (kind, end) = (found.kind(), usize::from(found.length()));
        Some((kind, found.into_inner().get(ATTRIBUTE_HEADER..end)?))
    })
}

/// The value of this kind.
pub(super) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// A number of 32 bits, big-endian.
pub(super) fn number(bytes: &[u8], kind: u16) -> Option<u32> {
    attribute(bytes, kind).and_then(|value| value.first_chunk()).map(|value| u32::from_be_bytes(*value))
}
