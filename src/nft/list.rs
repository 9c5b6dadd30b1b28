//! Reading which doors are open, as the kernel has them.

use std::net::IpAddr;
use std::time::Duration;

use nftables::expr::{Elem, Expression, NamedExpression};
use nftables::schema::{NfListObject, NfObject, Nftables};
use serde::{Deserialize, Serialize};

use super::Door;
use super::elements::SETS;
use super::load::{NftError, list_set};
use crate::service::{Name, Port, Transport};

/// What the comment of a door ends in that was opened by a bound token.
const BOUND: &str = "bound";

/// A door that is open.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct OpenDoor {
    /// Which.
    pub door: Door,
    /// What its element says of it: `user service`, and maybe `bound`, if the daemon opened it.
    pub comment: String,
    /// How long it stays open, in whole seconds; `None` for ever, which the daemon never opens a door for.
    pub left: Option<Duration>,
}

impl OpenDoor {
    /// Who opened it for what, and whether by a token that was bound to the source; `None` if somebody opened it by hand.
    pub fn opener(&self) -> Option<(&str, &str, bool)> {
        let (user, rest) = self.comment.split_once(' ')?;
        Some(match rest.split_once(' ') {
            Some((service, how)) => (user, service, how == BOUND),
            None => (user, rest, false),
        })
    }
}

/// What an element says of a door, for [`OpenDoor::opener`].
pub fn comment(user: &Name, service: &Name, bound: bool) -> String {
    let how = if bound { " bound" } else { "" };
    format!("{user} {service}{how}")
}

/// All doors that are open.
///
/// # Errors
/// When there is no table, or nft cannot list it.
pub fn open_doors() -> Result<Vec<OpenDoor>, NftError> {
    let mut doors = Vec::new();
    for (set, once) in SETS {
        let listed = read(&list_set(set)?, once);
        doors.extend(listed.map_err(|cause| NftError::Unreadable { set, cause: cause.to_string() })?);
    }
    doors.sort_by_key(|open: &OpenDoor| open.door);
    doors.dedup_by_key(|open| open.door); // that of one connection may have two elements
    Ok(doors)
}

/// The doors in nft's listing of a set. Elements that are no door of ours are left out.
///
/// # Errors
/// When it is not the JSON that is known.
pub fn read(listing: &str, once: bool) -> Result<Vec<OpenDoor>, serde_json::Error> {
    let listing: Nftables<'_> = serde_json::from_str(listing)?;
    let elements = listing.objects.iter().filter_map(elements).flatten();
    Ok(elements.filter_map(|element| open_door(element, once)).collect())
}

fn elements<'a>(object: &'a NfObject<'a>) -> Option<&'a [Expression<'a>]> {
    let NfObject::ListObject(NfListObject::Set(set)) = object else { return None };
    set.elem.as_deref()
}

fn open_door(element: &Expression<'_>, once: bool) -> Option<OpenDoor> {
    // What somebody added for ever, by hand, is a bare key.
    let (key, expires, comment) = match element {
        Expression::Named(NamedExpression::Elem(Elem { val, expires, comment, .. })) => {
            (val.as_ref(), *expires, comment.as_deref())
        }
        key => (key, None, None),
    };
    let Expression::Named(NamedExpression::Concat(key)) = key else { return None };
    let [Expression::String(source), Expression::String(transport), Expression::Number(number)] = key.as_slice() else {
        return None;
    };
    let source: IpAddr = source.parse().ok()?;
    let transport = [Transport::Tcp, Transport::Udp].into_iter().find(|known| known.to_string() == *transport)?;
    let number = u16::try_from(*number).ok().filter(|number| *number != 0)?; // 0 is no port, and none of ours
    let port = Port { transport, number };
    let left = expires.map(|seconds| Duration::from_secs(seconds.into()));
    Some(OpenDoor { door: Door { source, port, once }, comment: comment.unwrap_or_default().to_owned(), left })
}
