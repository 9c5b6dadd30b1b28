//! Counts of a knockknock profile: two tokens of one count tell what both ask for, and let who keeps one back ask for something
//! else (docs/protocol.md section 6).

use std::path::Path;

use super::{Contents, Issued, IssuedError, IssuedFile, What, path};
use crate::crypto::PublicKey;

/// The counts that were issued with one profile.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// No count below is issued any more.
    next: u64,
}

impl Issued for Counts {
    const WHAT: What = What::Counts;
    const TITLE: &'static str = "the next count of a knockknock profile";

    fn parse(first: &str, rest: &[&str]) -> Option<Self> {
        let next = first.strip_prefix("next ")?.parse().ok()?;
        rest.is_empty().then_some(Self { next })
    }

    fn lines(&self) -> (String, impl Iterator<Item = u64>) {
        (format!("next {}", self.next), std::iter::empty())
    }
}

impl Counts {
    /// The next count of a profile as far as it was knocked with here, 0 at least; it may be issued before this returns.
    ///
    /// # Errors
    /// [`IssuedError`].
    pub fn next(directory: &Path, stand_in: &PublicKey) -> Result<u64, IssuedError> {
        Ok(Contents::<Self>::read(&path(directory, &[stand_in]))?.issued.next)
    }
}

impl IssuedFile<Counts> {
    /// Issues the next count, `least` at least; it is on disk when this returns.
    ///
    /// # Errors
    /// [`IssuedError`]; then no count may be used.
    pub fn issue(&mut self, least: u32) -> Result<u32, IssuedError> {
        let n = self.contents.issued.next.max(least.into());
        let count = u32::try_from(n).map_err(|_| IssuedError::NoCount { path: self.path.clone() })?;
        self.contents.issued.next = n.saturating_add(1);
        self.write()?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, proptest};

    use super::Counts;
    use crate::client::issued::Contents;

    #[test]
    fn what_is_written_is_read_back_and_nothing_else_is_read() {
        for machine in [None, Some("ab12".to_owned())] {
            let contents = Contents { issued: Counts { next: 1 << 32 }, machine };
            assert_eq!(Contents::parse(&contents.to_text()), Some(contents));
        }
        for damaged in [
            "",
            "\n",
            "17\n",
            "next\n",
            "next x\n",
            "next -1\n",
            "next 17",
            "next 17\nnext 18\n",
            "next 17\nmachine a",
            "next 17\nmachine a\nmachine a\n",
            "machine a\nnext 17\n",
            "next 17\n\n",
            "floor 17\n",
        ] {
            assert_eq!(Contents::<Counts>::parse(damaged), None, "{damaged:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_that_was_cut_is_read(next in any::<u64>(), cut in 0_usize..100) {
            let text = Contents { issued: Counts { next }, machine: Some("ab12".to_owned()) }.to_text();
            let cut = &text[..cut.min(text.len() - 1)];
            assert!(Contents::<Counts>::parse(cut).is_none_or(|contents| contents.issued.next == next), "{cut:?}");
        }
    }
}
