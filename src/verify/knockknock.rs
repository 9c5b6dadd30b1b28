//! What the ancestor's knocks are checked for.

use super::{Candidate, Reason, User};
use crate::crypto::Opened;
use crate::crypto::knockknock::{Key, Token};
use crate::packet::Syn;

/// The token that a SYN could bear: none over IPv6, whose header has no identification.
pub(super) fn token(syn: &Syn) -> Option<Token> {
    let Syn { ip_id, sequence, acknowledgment, window, .. } = *syn;
    Some(Token { ip_id: ip_id?, sequence, acknowledgment, window })
}

/// The checks between an index hit and an opened knock. All of its bits come first, for nothing else tells it from a
/// stranger's SYN.
pub(super) fn open(syn: &Syn, candidate: Candidate, user: &User, key: &Key, knock_port: u16) -> Result<Opened, Reason> {
    let counter = u32::try_from(candidate.n).map_err(|_| Reason::Unknown)?;
    let opened = token(syn).and_then(|token| key.open(counter, candidate.port, &token)).ok_or(Reason::WrongTag)?;
    if knock_port != syn.destination_port {
        return Err(Reason::WrongKnockPort);
    }
    if !user.may_come_from(syn.source) {
        return Err(Reason::SourceNotAllowed);
    }
    Ok(opened)
}
