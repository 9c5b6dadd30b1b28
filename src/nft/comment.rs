//! What an element says of the grant behind it.

use std::fmt;

use crate::service::Name;

/// What the comment of an element ends in whose knock was bound to its source.
const BOUND: &str = "bound";

/// The comment of an element that the daemon has added: `user service end boot`, and maybe `bound`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Comment {
    /// Who knocked.
    pub user: Name,
    /// For what.
    pub service: Name,
    /// When the grant ends; knockq 0.1.0 did not write it.
    pub end: Option<End>,
    /// By a token that was bound to the source.
    pub bound: bool,
}

/// When a grant ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct End {
    /// Seconds on the clock that elements go by too, which begins with the boot and which nobody sets.
    pub(super) seconds: u64,
    /// That boot: the first eight digits of its id.
    pub(super) boot: u32,
}

impl Comment {
    /// Reads it; `None` if it is the administrator's own.
    pub fn read(text: &str) -> Option<Self> {
        let words: Vec<&str> = text.split(' ').collect();
        let (words, bound) = match words.split_last()? {
            (&BOUND, before) if before.len() % 2 == 0 => (before, true),
            _ => (words.as_slice(), false),
        };
        let (user, service, end) = match *words {
            [user, service] => (user, service, None),
            [user, service, seconds, id] => (user, service, Some(End { seconds: number(seconds)?, boot: boot(id)? })),
            _ => return None,
        };
        Some(Self { user: user.parse().ok()?, service: service.parse().ok()?, end, bound })
    }
}

impl fmt::Display for Comment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.user, self.service)?;
        if let Some(End { seconds, boot }) = self.end {
            write!(f, " {seconds} {boot:08x}")?;
        }
        if self.bound { write!(f, " {BOUND}") } else { Ok(()) }
    }
}

/// As it is written, and in no other way.
fn number(text: &str) -> Option<u64> {
    text.parse().ok().filter(|number: &u64| number.to_string() == text)
}

fn boot(text: &str) -> Option<u32> {
    u32::from_str_radix(text, 16).ok().filter(|id| format!("{id:08x}") == text)
}
