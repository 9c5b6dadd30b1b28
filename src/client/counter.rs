//! Counters that this key has issued, so that none is used twice (docs/protocol.md section 2).

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::config::FileError;
use crate::config::secure_file::{self, Privacy};
use crate::crypto::PublicKey;

/// Counters that are kept one by one; beyond, the smallest goes into the floor. Only so many knocks sent while the clock
/// was wrong could lock a key out.
const KEPT: usize = 4096;

/// Flows of this boot that are remembered.
const FLOWS: usize = 4096;

/// Time for which another process may have a lock before it is told: each knock has it for some milliseconds.
const LOCKED: Duration = Duration::from_secs(3);

/// Pause before a lock that another process has is tried again.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Each names one installation of a system (machine-id(5), dbus-uuidgen(1)); the second without systemd too.
const MACHINE_IDS: [&str; 2] = ["/etc/machine-id", "/var/lib/dbus/machine-id"];

/// Names one boot of this kernel.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The rule, without files.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Issued {
    /// All counters up to here count as issued.
    floor: u64,
    issued: BTreeSet<u64>,
}

impl Issued {
    /// The least counter that is not before `now`, above all that were issued up to `now + window`, and not issued.
    pub fn next(&self, now: u64, window: u64) -> Option<u64> {
        let end = now.checked_add(window)?;
        let last = self.issued.range(..=end).next_back().copied();
        let mut n = now.max(self.floor.checked_add(1)?).max(last.map_or(Some(0), |last| last.checked_add(1))?);
        while self.issued.contains(&n) {
            n = n.checked_add(1)?;
        }
        Some(n)
    }

    /// Notes that a counter is used.
    pub fn record(&mut self, n: u64) {
        self.issued.insert(n);
        while self.issued.len() > KEPT {
            if let Some(smallest) = self.issued.pop_first() {
                self.floor = self.floor.max(smallest);
            }
        }
    }

    /// Whether a counter was issued that a server would take only later than `end`.
    pub fn has_beyond(&self, end: u64) -> bool {
        self.issued.last().is_some_and(|&last| last > end)
    }
}

/// What is in a file.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Contents {
    issued: Issued,
    /// The machine that wrote it, if it has a name.
    machine: Option<String>,
}

impl Contents {
    /// A text that was cut, be it before its floor or within a number, holds fewer counters than were issued: it is none.
    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.strip_suffix('\n')?.split('\n').filter(|line| !line.starts_with('#')).peekable();
        let floor = lines.next()?.strip_prefix("floor ")?.parse().ok()?;
        let machine = lines.next_if(|line| line.starts_with("machine "));
        let machine = machine.and_then(|line| line.strip_prefix("machine ")).map(str::to_owned);
        let issued = lines.map(|line| line.parse().ok()).collect::<Option<_>>()?;
        Some(Self { issued: Issued { floor, issued }, machine })
    }

    fn to_text(&self) -> String {
        let mut text = "# knockq: counters that were used with one server. Do not edit, copy or delete.\n".to_owned();
        let _ = writeln!(text, "floor {}", self.issued.floor);
        if let Some(machine) = &self.machine {
            let _ = writeln!(text, "machine {machine}");
        }
        for n in &self.issued.issued {
            let _ = writeln!(text, "{n}");
        }
        text
    }
}

/// This machine's name, which says nothing about it to who reads it elsewhere; none where the system has given it none.
pub(super) fn machine() -> Option<String> {
    MACHINE_IDS.into_iter().find_map(|path| {
        let text = std::fs::read_to_string(path).ok()?;
        let id = text.trim();
        let is_id = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_id.then(|| hex(Sha256::new().chain_update("knockq machine ").chain_update(id)))
    })
}

/// The first half of a digest in hexadecimal.
pub(super) fn hex(digest: Sha256) -> String {
    digest.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// Why no counter can be issued.
#[derive(Debug, Error)]
pub enum CounterError {
    /// The file is refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file does not hold what this program writes.
    #[error("{}: is damaged, so counters could be used twice", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// So many knocks were sent under a wrong clock that none is left.
    #[error("{}: every counter up to {floor} is used up, and that is in the future", path.display())]
    UsedUp {
        /// The file.
        path: PathBuf,
        /// Unix seconds.
        floor: u64,
    },
}

/// The counters of one (client, server), locked against other processes.
pub struct CounterFile {
    path: PathBuf,
    contents: Contents,
    is_from_elsewhere: bool,
    lock: File,
}

impl CounterFile {
    /// Locks and reads the file; the lock is held until this, or what [`Self::into_lock`] has made of it, is dropped.
    /// `tell` is called with the lock's file where another process has held it for 3 s; then this waits on.
    ///
    /// # Errors
    /// [`CounterError`].
    pub fn open(
        directory: &Path,
        client: &PublicKey,
        server: &PublicKey,
        tell: impl FnOnce(&Path),
    ) -> Result<Self, CounterError> {
        secure_file::create_directory(directory)?;
        let name = hex(Sha256::new().chain_update(client.as_bytes()).chain_update(server.as_bytes()));
        let path = directory.join(&name);
        let lock = lock(&directory.join(format!("{name}.lock")), tell)?;
        let damaged = || CounterError::Damaged { path: path.clone() };
        let mut contents = match secure_file::read_if_there(&path, Privacy::Secret) {
            Ok(Some(text)) => Contents::parse(&text).ok_or_else(damaged)?,
            Ok(None) => Contents::default(),
            Err(error) if is_of_content(&error) => return Err(damaged()),
            Err(error) => return Err(error.into()),
        };
        let here = machine();
        let is_from_elsewhere = contents.machine.as_ref().zip(here.as_ref()).is_some_and(|(there, here)| there != here);
        contents.machine = here.or(contents.machine);
        Ok(Self { path, contents, is_from_elsewhere, lock })
    }

    /// Whether another machine has issued the counters that were in the file when it was opened: the key was copied, or has
    /// moved. From the next counter on the file is this machine's.
    pub const fn is_from_elsewhere(&self) -> bool {
        self.is_from_elsewhere
    }

    /// Issues a counter; it is on disk when this returns.
    ///
    /// # Errors
    /// [`CounterError`]; then no counter may be used.
    pub fn issue(&mut self, now: u64, window: u64) -> Result<u64, CounterError> {
        let issued = &mut self.contents.issued;
        let floor = issued.floor;
        let n = issued.next(now, window).filter(|_| floor <= now.saturating_add(window));
        let n = n.ok_or_else(|| CounterError::UsedUp { path: self.path.clone(), floor })?;
        issued.record(n);
        secure_file::replace(&self.path, &self.contents.to_text(), Privacy::Secret)?;
        Ok(n)
    }

    /// What other processes wait for, without the rest.
    pub fn into_lock(self) -> File {
        self.lock
    }

    /// See [`Issued::has_beyond`].
    pub fn has_beyond(&self, end: u64) -> bool {
        self.contents.issued.has_beyond(end)
    }
}

/// The flows of knocks sent since this machine booted: within a boot the kernel's sequence numbers of a repeated flow are
/// on a line, and a token is not.
pub struct FlowFile {
    path: PathBuf,
    boot: String,
    flows: Vec<String>,
    _lock: File,
}

impl FlowFile {
    /// Locks and reads the file; flows of an earlier boot are forgotten. `tell` is as for [`CounterFile::open`].
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn open(directory: &Path, tell: impl FnOnce(&Path)) -> Result<Self, FileError> {
        secure_file::create_directory(directory)?;
        let path = directory.join("flows");
        let lock = lock(&directory.join("flows.lock"), tell)?;
        let boot = std::fs::read_to_string(BOOT_ID).map_err(|cause| FileError::io(Path::new(BOOT_ID), cause))?;
        let boot = boot.trim().to_owned();
        let text = secure_file::read_if_there(&path, Privacy::Secret)?;
        let flows = text.as_ref().and_then(|text| text.strip_prefix(&boot));
        let flows = flows.map(|rest| rest.lines().filter(|line| !line.is_empty()));
        let flows = flows.map(|lines| lines.map(str::to_owned).collect()).unwrap_or_default();
        Ok(Self { path, boot, flows, _lock: lock })
    }

    /// Whether a knock used this flow.
    pub fn contains(&self, source: SocketAddr, destination: SocketAddr) -> bool {
        self.flows.contains(&format!("{source} {destination}"))
    }

    /// Remembers a flow.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn record(&mut self, source: SocketAddr, destination: SocketAddr) -> Result<(), FileError> {
        self.flows.push(format!("{source} {destination}"));
        let surplus = self.flows.len().saturating_sub(FLOWS);
        self.flows.drain(..surplus);
        secure_file::replace(&self.path, &format!("{}\n{}\n", self.boot, self.flows.join("\n")), Privacy::Secret)
    }
}

/// Whether a file is refused for what is in it. The remedies for other files, a backup or a new one, would repeat counters.
pub(super) const fn is_of_content(error: &FileError) -> bool {
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

#[cfg(test)]
mod tests {
    use super::{Contents, Issued};
    use proptest::prelude::{any, proptest};
    use std::collections::BTreeSet;

    const NOW: u64 = 1_790_000_000;

    #[test]
    fn counters_start_at_the_clock_and_never_fall_behind_an_issued_one() {
        let mut issued = Issued::default();
        for (now, expected) in
            [(NOW, NOW), (NOW, NOW + 1), (NOW + 1, NOW + 2), (NOW + 10, NOW + 10), (NOW + 5, NOW + 11)]
        {
            let n = issued.next(now, 60).unwrap();
            assert_eq!(n, expected);
            issued.record(n);
        }
    }

    #[test]
    fn a_clock_that_was_two_hours_ahead_locks_nobody_out() {
        let mut issued = Issued::default();
        issued.record(issued.next(NOW + 7200, 60).unwrap());
        assert_eq!(issued.next(NOW, 60), Some(NOW));
        assert!(issued.has_beyond(NOW + 60), "and it is known that one lies ahead");
        assert_eq!(issued.next(NOW + 7200, 60), Some(NOW + 7201));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut issued = Issued::default();
        for n in [NOW, NOW + 1, u64::MAX] {
            issued.record(n);
        }
        for machine in [None, Some("ab12".to_owned())] {
            let contents = Contents { issued: issued.clone(), machine };
            assert_eq!(Contents::parse(&contents.to_text()), Some(contents));
        }
        for damaged in [
            "",
            "\n",
            "floor x\n",
            "12\n",
            "floor 1\n1x\n",
            "floor 1\n-1\n",
            "floor 1\n12",
            "12\nfloor 1\n",
            "machine a\nfloor 1\n",
            "floor 1\nmachine a",
            "floor 1\nmachine a\nmachine a\n",
            "floor 1\n12\nmachine a\n",
        ] {
            assert_eq!(Contents::parse(damaged), None, "{damaged:?}");
        }
    }

    proptest! {
        #[test]
        fn no_clock_makes_a_counter_repeat_or_locks_a_key_out(clocks in proptest::collection::vec(any::<u64>(), 1..400)) {
            let mut issued = Issued::default();
            let mut seen = BTreeSet::new();
            for now in clocks {
                if let Some(n) = issued.next(now, 60) {
                    assert!(n >= now && seen.insert(n));
                    issued.record(n);
                }
            }
            let n = issued.next(NOW, 60).unwrap();
            assert!((NOW..=NOW + 61).contains(&n), "{n}");
        }
    }
}
