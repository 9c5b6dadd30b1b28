//! What a client has issued, so that nothing is used twice: one file for each key and server, or for each knockknock profile.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use thiserror::Error;

pub use self::counters::Counters;
pub use self::counts::Counts;
use crate::config::FileError;
use crate::config::secure_file::{self, Privacy};
use crate::crypto::PublicKey;
use crate::crypto::knockknock::LAST;

mod counters;
mod counts;

/// Time for which another process may have a lock before it is told: each knock has it for some milliseconds.
const LOCKED: Duration = Duration::from_secs(3);

/// Pause before a lock that another process has is tried again.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Each names one installation of a system (machine-id(5), dbus-uuidgen(1)); the second without systemd too.
const MACHINE_IDS: [&str; 2] = ["/etc/machine-id", "/var/lib/dbus/machine-id"];

/// What is issued, and the rule by which.
pub trait Issued: Default {
    /// What it is called, of many.
    const WHAT: What;

    /// The first line of its file, for whoever opens that.
    const TITLE: &'static str;

    /// Reads its lines; a text that was cut must be none.
    fn parse(first: &str, rest: &[&str]) -> Option<Self>;

    /// What stands first in its file, and what stands in a line each.
    fn lines(&self) -> (String, impl Iterator<Item = u64>);
}

/// What can be issued.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    /// Counters of tokens: [`Counters`].
    Counters,
    /// Counts of a knockknock profile: [`Counts`].
    Counts,
}

/// What is in a file.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Contents<T> {
    issued: T,
    /// The machine that wrote it, if it has a name.
    machine: Option<String>,
}

impl<T: Issued> Contents<T> {
    /// A text that was cut, be it before its end or within a number, holds less than was issued: it is none.
    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.strip_suffix('\n')?.split('\n').filter(|line| !line.starts_with('#')).peekable();
        let first = lines.next()?;
        let machine = lines.next_if(|line| line.starts_with("machine "));
        let machine = machine.and_then(|line| line.strip_prefix("machine ")).map(str::to_owned);
        Some(Self { issued: T::parse(first, &lines.collect::<Vec<_>>())?, machine })
    }

    fn to_text(&self) -> String {
        let (first, rest) = self.issued.lines();
        let mut text = format!("# knockq: {}. Do not edit, copy or delete.\n{first}\n", T::TITLE);
        if let Some(machine) = &self.machine {
            let _ = writeln!(text, "machine {machine}");
        }
        for n in rest {
            let _ = writeln!(text, "{n}");
        }
        text
    }

    fn read(path: &Path) -> Result<Self, IssuedError> {
        let damaged = || IssuedError::Damaged { path: path.to_owned(), what: T::WHAT };
        match secure_file::read_if_there(path, Privacy::Secret) {
            Ok(Some(text)) => Self::parse(&text).ok_or_else(damaged),
            Ok(None) => Ok(Self { issued: T::default(), machine: None }),
            Err(error) if is_of_content(&error) => Err(damaged()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Why nothing can be issued.
#[derive(Debug, Error)]
pub enum IssuedError {
    /// The file is refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file does not hold what this program writes.
    #[error("{}: is damaged, so {} could be used twice", path.display(), match what { What::Counters => "counters", What::Counts => "counts" })]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is in it.
        what: What,
    },
    /// So many knocks were sent under a wrong clock that no counter is left.
    #[error("{}: every counter up to {floor} is used up, and that is in the future", path.display())]
    NoCounter {
        /// The file.
        path: PathBuf,
        /// Unix seconds.
        floor: u64,
    },
    /// The 32 bits of counts are used up.
    #[error("{}: the last count, {LAST}, is used", path.display())]
    NoCount {
        /// The file.
        path: PathBuf,
    },
}

/// What was issued with some keys, locked against other processes.
pub struct IssuedFile<T> {
    path: PathBuf,
    contents: Contents<T>,
    is_from_elsewhere: bool,
    lock: File,
}

impl<T: Issued> IssuedFile<T> {
    /// Locks and reads the file; the lock is held until this, or what [`Self::into_lock`] has made of it, is dropped.
    /// `keys` are the client's and the server's, or what stands for a profile's. `tell` is called with the lock's file where another
    /// process has held it for 3 s; then this waits on.
    ///
    /// # Errors
    /// [`IssuedError`].
    pub fn open(directory: &Path, keys: &[&PublicKey], tell: impl FnOnce(&Path)) -> Result<Self, IssuedError> {
        secure_file::create_directory(directory)?;
        let path = path(directory, keys);
        let lock = lock(&path.with_extension("lock"), tell)?;
        let mut contents = Contents::read(&path)?;
        let here = machine();
        let is_from_elsewhere = contents.machine.as_ref().zip(here.as_ref()).is_some_and(|(there, here)| there != here);
        contents.machine = here.or(contents.machine);
        Ok(Self { path, contents, is_from_elsewhere, lock })
    }

    /// Whether another machine has issued what was in the file when it was opened: the keys were copied, or have moved. From the
    /// next that is issued on the file is this machine's.
    pub const fn is_from_elsewhere(&self) -> bool {
        self.is_from_elsewhere
    }

    /// What other processes wait for, without the rest.
    pub fn into_lock(self) -> File {
        self.lock
    }

    /// It is on disk when this returns.
    fn write(&self) -> Result<(), FileError> {
        secure_file::replace(&self.path, &self.contents.to_text(), Privacy::Secret)
    }
}

fn path(directory: &Path, keys: &[&PublicKey]) -> PathBuf {
    directory.join(hex(keys.iter().fold(Sha256::new(), |digest, key| digest.chain_update(key.as_bytes()))))
}

/// This machine's name, which says nothing about it to who reads it elsewhere; none where the system has given it none.
fn machine() -> Option<String> {
    MACHINE_IDS.into_iter().find_map(|path| {
        let text = std::fs::read_to_string(path).ok()?;
        let id = text.trim();
        let is_id = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_id.then(|| hex(Sha256::new().chain_update("knockq machine ").chain_update(id)))
    })
}

/// The first half of a digest in hexadecimal.
fn hex(digest: Sha256) -> String {
    digest.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// Whether a file is refused for what is in it. The remedies for other files, a backup or a new one, would repeat counters.
const fn is_of_content(error: &FileError) -> bool {
    matches!(error, FileError::Empty { .. } | FileError::NotText { .. } | FileError::TooLarge { .. })
}

/// Waits for as long as it takes, for no counter may be issued without it; but not in silence.
pub(super) fn lock(path: &Path, tell: impl FnOnce(&Path)) -> Result<File, FileError> {
    let file = secure_file::open(path, Privacy::Secret, OpenOptions::new().create(true).append(true).mode(0o600))?;
    let fail = |errno| FileError::io(path, errno);
    let begun = Instant::now();
    while begun.elapsed() < LOCKED {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => thread::sleep(LOCK_PAUSE),
            done => return done.map(|()| file).map_err(fail),
        }
    }
    tell(path);
    flock(&file, FlockOperation::LockExclusive).map_err(fail)?;
    Ok(file)
}
