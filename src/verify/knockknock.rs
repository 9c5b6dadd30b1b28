//! What the ancestor's knocks are checked for.

use super::{Candidate, Reason};
use crate::crypto::Opened;
use crate::crypto::knockknock::{Key, Token};
use crate::packet::Syn;

/// The token that a SYN could bear: none over IPv6, whose header has no identification.
pub(super) fn token(syn: &Syn) -> Option<Token> {
    let Syn { ip_id, sequence, acknowledgment, window, .. } = *syn;
    Some(Token { ip_id: ip_id?, sequence, acknowledgment, window })
}

/// The check between an index hit and an opened knock: all of its bits, for nothing else tells it from a stranger's SYN.
pub(super) fn open(syn: &Syn, candidate: Candidate, key: &Key) -> Result<Opened, Reason> {
    let counter = u32::try_from(candidate.n).map_err(|_| Reason::Unknown)?;
    token(syn).and_then(|token| key.open(counter, candidate.port, &token)).ok_or(Reason::WrongTag)
}
