//! Elements of sets, as the kernel tells of them: in a listing, or when they are added or deleted.

use std::net::IpAddr;
use std::time::Duration;

use super::attributes::{attribute, attributes};
use super::comment::Comment;
use super::elements::Door;
use super::sets::{Member, SetName};
use crate::service::{Port, Transport};

/// Attribute of elements: the list of them (`NFTA_SET_ELEM_LIST_ELEMENTS`).
const ELEMENTS: u16 = 3;

/// Attributes of one element (`enum nft_set_elem_attributes` of linux/netfilter/nf_tables.h): its key, the milliseconds until
/// it goes, and what nft notes with it.
const KEY: u16 = 1;
const EXPIRATION: u16 = 5;
const USER_DATA: u16 = 6;

/// Attribute of a key: its bytes (`NFTA_DATA_VALUE`).
const VALUE: u16 = 1;

/// Of what nft notes, the comment (`NFTNL_UDATA_SET_ELEM_COMMENT`): its kind, its length, a text with a terminator.
const COMMENT: u8 = 0;

/// An element of a set: a door, or who is in a set of the administrator's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Open<T> {
    /// What it is.
    pub what: T,
    /// What it says of the grant behind it, if the daemon added it.
    pub comment: Option<Comment>,
    /// Time until it goes by itself; `None` if it never does, which the daemon adds none for.
    pub left: Option<Duration>,
}

/// A door that is open.
pub type OpenDoor = Open<Door>;

/// The elements in the attributes of a message. What `what` does not know is left out.
pub(super) fn read<'a, T>(
    message: &'a [u8],
    what: impl Fn(IpAddr, Option<Port>) -> Option<T> + 'a,
) -> impl Iterator<Item = Open<T>> + 'a {
    let elements = attribute(message, ELEMENTS).unwrap_or_default();
    attributes(elements).filter_map(move |(_, element)| {
        let (source, port) = place(attribute(attribute(element, KEY)?, VALUE)?)?;
        let comment = attribute(element, USER_DATA).and_then(comment).and_then(Comment::read);
        let left = attribute(element, EXPIRATION).and_then(|left| left.first_chunk());
        let left = left.map(|left| Duration::from_millis(u64::from_be_bytes(*left)));
        Some(Open { what: what(source, port)?, comment, left })
    })
}

/// The doors among the elements of a set of ours.
pub(super) fn doors(message: &[u8], once: bool) -> impl Iterator<Item = OpenDoor> {
    read(message, move |source, port| Some(Door { source, port: port?, once }))
}

/// The sources among the elements of a set of the administrator's.
pub(super) fn members<'a>(message: &'a [u8], set: &'a SetName) -> impl Iterator<Item = Open<Member>> {
    read(message, |source, port| Some(Member { set: set.clone(), source, port }))
}

/// An address, or the concatenation `addr . inet_proto . inet_service`: each part padded to four bytes.
fn place(key: &[u8]) -> Option<(IpAddr, Option<Port>)> {
    let address = |bytes: &[u8]| {
        let v4 = || Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?));
        let v6 = || Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?));
        v4().or_else(v6)
    };
    if let Some(source) = address(key) {
        return Some((source, None));
    }
    let (source, [protocol, _, _, _, high, low, _, _]) = key.split_last_chunk::<8>()?;
    let number = Some(u16::from_be_bytes([*high, *low])).filter(|number| *number != 0)?; // 0 is no port, and none of ours
    Some((address(source)?, Some(Port { transport: Transport::from_number(*protocol)?, number })))
}

fn comment(mut notes: &[u8]) -> Option<&str> {
    while let [kind, length, rest @ ..] = notes {
        let (note, rest) = rest.split_at_checked(usize::from(*length))?;
        if *kind == COMMENT {
            return std::str::from_utf8(note.strip_suffix(&[0])?).ok();
        }
        notes = rest;
    }
    None
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{comment, doors, place};

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).unwrap();
        let mut attribute = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
        attribute.resize(attribute.len().next_multiple_of(4), 0);
        attribute
    }

    #[test]
    fn an_element_is_read_with_its_comment_and_the_time_that_it_has_left() {
        let key = attribute(1, &attribute(1, &[192, 0, 2, 1, 6, 0, 0, 0, 0, 22, 0, 0]));
        let left = attribute(5, &1500_u64.to_be_bytes());
        let noted = attribute(6, &[&[1, 2, 7, 7, 0, 16][..], b"alice ssh bound\0"].concat());
        let sctp = attribute(1, &attribute(1, &[192, 0, 2, 1, 132, 0, 0, 0, 0, 22, 0, 0]));
        let elements = [attribute(1, &[key.clone(), left, noted].concat()), attribute(1, &sctp), attribute(1, &key)];
        let listed: Vec<_> = doors(&attribute(3, &elements.concat()), true).collect();
        let [daemons, by_hand] = listed.as_slice() else { panic!("{listed:?}") };
        assert_eq!(daemons.what, by_hand.what);
        assert_eq!(daemons.left, Some(Duration::from_millis(1500)));
        assert_eq!(daemons.comment.as_ref().unwrap().to_string(), "alice ssh bound");
        assert!(daemons.what.once && by_hand.left.is_none() && by_hand.comment.is_none());
    }

    #[test]
    fn keys_and_notes_that_are_none_of_ours_are_left_alone() {
        assert!(place(&[192, 0, 2, 1]).unwrap().1.is_none());
        assert!(place(&[0; 16]).unwrap().1.is_none());
        for key in [&[][..], &[0; 3], &[0; 5], &[0; 8], &[192, 0, 2, 1, 6, 0, 0, 0, 0, 0, 0, 0]] {
            assert!(place(key).is_none(), "{key:?}");
        }
        for notes in [&[][..], &[0], &[0, 2, 0], &[0, 1, b'a'], &[0, 2, 0xff, 0], &[1, 1, 0]] {
            assert!(comment(notes).is_none(), "{notes:?}");
        }
    }
}
