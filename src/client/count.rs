//! Counts that were used with a knockknock profile, so that none is used twice: two tokens of one count tell what both ask
//! for, and let who keeps one back ask for something else (docs/protocol.md section 6).

use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use thiserror::Error;

use super::counter::{hex, is_of_content, lock, machine};
use crate::config::FileError;
use crate::config::secure_file::{self, Privacy};
use crate::crypto::PublicKey;
use crate::crypto::knockknock::LAST;

/// What is in a file.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Contents {
    /// No count below is issued any more.
    next: u64,
    /// The machine that wrote it, if it has a name.
    machine: Option<String>,
}

impl Contents {
    /// A text that was cut, and one with anything more, is none.
    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.strip_suffix('\n')?.split('\n').filter(|line| !line.starts_with('#'));
        let next = lines.next()?.strip_prefix("next ")?.parse().ok()?;
        let machine = lines.next().map(|line| line.strip_prefix("machine ").map(str::to_owned));
        let is_whole = lines.next().is_none() && machine != Some(None);
        is_whole.then_some(Self { next, machine: machine.flatten() })
    }

    fn to_text(&self) -> String {
        let mut text = "# knockq: the next count of a knockknock profile. Do not edit, copy or delete.\n".to_owned();
        let _ = writeln!(text, "next {}", self.next);
        if let Some(machine) = &self.machine {
            let _ = writeln!(text, "machine {machine}");
        }
        text
    }
}

/// Why no count can be issued.
#[derive(Debug, Error)]
pub enum CountError {
    /// The file is refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file does not hold what this program writes.
    #[error("{}: is damaged, so counts could be used twice", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// Their 32 bits are used up.
    #[error("{}: the last count, {LAST}, is used", path.display())]
    UsedUp {
        /// The file.
        path: PathBuf,
    },
}

/// The counts of one profile, by its keys, locked against other processes.
pub struct CountFile {
    path: PathBuf,
    contents: Contents,
    is_from_elsewhere: bool,
    lock: File,
}

impl CountFile {
    /// Locks and reads the file; the lock is held until this, or what [`Self::into_lock`] has made of it, is dropped. `tell`
    /// is called with the lock's file where another process has held it for 3 s; then this waits on.
    ///
    /// # Errors
    /// [`CountError`].
    pub fn open(directory: &Path, stand_in: &PublicKey, tell: impl FnOnce(&Path)) -> Result<Self, CountError> {
        secure_file::create_directory(directory)?;
        let path = path(directory, stand_in);
        let lock = lock(&path.with_extension("lock"), tell)?;
        let mut contents = read(&path)?;
        let here = machine();
        let is_from_elsewhere = contents.machine.as_ref().zip(here.as_ref()).is_some_and(|(there, here)| there != here);
        contents.machine = here.or(contents.machine);
        Ok(Self { path, contents, is_from_elsewhere, lock })
    }

    /// Whether another machine has issued the counts that were in the file when it was opened.
    pub const fn is_from_elsewhere(&self) -> bool {
        self.is_from_elsewhere
    }

    /// Issues the next count, `least` at least; it is on disk when this returns.
    ///
    /// # Errors
    /// [`CountError`]; then no count may be used.
    pub fn issue(&mut self, least: u32) -> Result<u32, CountError> {
        let n = self.contents.next.max(least.into());
        let count = u32::try_from(n).map_err(|_| CountError::UsedUp { path: self.path.clone() })?;
        self.contents.next = n.saturating_add(1);
        secure_file::replace(&self.path, &self.contents.to_text(), Privacy::Secret)?;
        Ok(count)
    }

    /// What other processes wait for, without the rest.
    pub fn into_lock(self) -> File {
        self.lock
    }
}

/// The next count of a profile as far as it was knocked with here, 0 at least; it may be issued before this returns.
///
/// # Errors
/// [`CountError`].
pub fn next(directory: &Path, stand_in: &PublicKey) -> Result<u64, CountError> {
    Ok(read(&path(directory, stand_in))?.next)
}

fn path(directory: &Path, stand_in: &PublicKey) -> PathBuf {
    directory.join(hex(Sha256::new().chain_update(stand_in.as_bytes())))
}

fn read(path: &Path) -> Result<Contents, CountError> {
    let damaged = || CountError::Damaged { path: path.to_owned() };
    match secure_file::read_if_there(path, Privacy::Secret) {
        Ok(Some(text)) => Contents::parse(&text).ok_or_else(damaged),
        Ok(None) => Ok(Contents { next: 0, machine: None }),
        Err(error) if is_of_content(&error) => Err(damaged()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, proptest};

    use super::Contents;

    #[test]
    fn what_is_written_is_read_back_and_nothing_else_is_read() {
        for machine in [None, Some("ab12".to_owned())] {
            let contents = Contents { next: 1 << 32, machine };
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
            assert_eq!(Contents::parse(damaged), None, "{damaged:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_that_was_cut_is_read(next in any::<u64>(), cut in 0_usize..100) {
            let text = Contents { next, machine: Some("ab12".to_owned()) }.to_text();
            let cut = &text[..cut.min(text.len() - 1)];
            assert!(Contents::parse(cut).is_none_or(|contents| contents.next == next), "{cut:?}");
        }
    }
}
