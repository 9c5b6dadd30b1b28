//! The thread beside the lookups, which waits for the disk so that they never do.

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Barrier};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tokio::sync::mpsc as channel;
use tracing::{error, info, warn};

use super::clock::unix_now;
use super::policy::Policy;
use super::repeats::Trouble;
use super::settings::{Outline, Settings};
use super::store::{Store, StoreError};
use super::{handover, log};
use crate::verify::{Claim, Recorded, Refusal, Registry, Secrets, User, Verifier};

/// Claims that wait for the disk at most; one more is refused.
pub(super) const WAITING: usize = 1024;

/// Claims that one commit takes.
const BATCH: usize = 64;

/// Time that the store may take to be closed when this process ends: the disk may be slow, and root waits for five seconds.
/// A store that is not closed is as whole; it takes longer to open. A thread that waits for a disk that hangs cannot end, nor
/// then can this process: root leaves it behind.
const CLOSING: Duration = Duration::from_secs(2);

/// Why the database may panic. It keeps its own order, and checks it when the store is opened.
const CHANGED: &str = "the counter store does not hold what was written to it";

/// What the thread beside the lookups does, for it would hold them up.
pub(super) enum Work {
    /// Make a counter durable.
    Record(Claim),
    /// Understand new settings.
    Prepare(OwnedFd),
}

/// What came of it.
pub(super) enum Done {
    /// The disk took a batch of claims, or did not: then with their packets.
    Recorded(Result<Vec<Recorded>, Vec<(Refusal, Vec<u8>)>>),
    /// What the new settings make; the verifier knows no more of the past than the store does; or there can be none.
    Prepared(Option<Box<Prepared>>),
}

/// What takes the place of what is in force.
pub(super) struct Prepared {
    pub(super) verifier: Verifier,
    pub(super) policy: Policy,
    pub(super) outline: Outline,
}

/// The thread beside the lookups. When this is dropped, the thread ends after the batch that it writes, whatever waits, and
/// closes the store. The fields are dropped in this order.
pub(super) struct Writing {
    /// It waits for the store, once.
    pub(super) store: mpsc::SyncSender<Store>,
    pub(super) work: mpsc::SyncSender<Work>,
    pub(super) done: channel::Receiver<Done>,
    _thread: Thread,
}

/// Dropped, it waits for the end of the thread, but not for ever.
struct Thread {
    handle: Option<JoinHandle<()>>,
    /// Hung up by the thread when it has closed the store.
    is_closed: mpsc::Receiver<Infallible>,
}

impl Drop for Thread {
    fn drop(&mut self) {
        if self.is_closed.recv_timeout(CLOSING) == Err(RecvTimeoutError::Disconnected) {
            let _ = self.handle.take().map(JoinHandle::join); // if it panicked, it has said so
        }
    }
}

/// Starts the thread beside the lookups, which then waits for the store: no thread can be started once the system calls are
/// limited, and nothing is read from the disk before.
pub(super) fn start() -> io::Result<Writing> {
    let (closed, is_closed) = mpsc::channel();
    let (writer, store) = mpsc::sync_channel::<Store>(1);
    let (work, waiting) = mpsc::sync_channel::<Work>(WAITING);
    let (outcomes, done) = channel::channel(WAITING);
    let started = Arc::new(Barrier::new(2));
    let is_started = Arc::clone(&started);
    let write = move || {
        let _closed: mpsc::Sender<Infallible> = closed; // dropped after the store
        is_started.wait();
        let Ok(store) = store.recv() else { return };
        let mut writer = Writer { store, cannot_write: Trouble::default(), is_deleted: false };
        let mut next = None;
        while let Some(first) = next.take().or_else(|| waiting.recv().ok()) {
            let outcome = match first {
                Work::Record(first) => {
                    let mut batch = vec![first];
                    while batch.len() < BATCH && next.is_none() {
                        match waiting.try_recv() {
                            Ok(Work::Record(claim)) => batch.push(claim),
                            Ok(other) => next = Some(other),
                            Err(_) => break,
                        }
                    }
                    Done::Recorded(writer.record(batch))
                }
                Work::Prepare(settings) => Done::Prepared(
                    prepare_anew(&mut writer.store, settings)
                        .inspect_err(|cause| error!("the new settings cannot be put in force: {cause}"))
                        .ok()
                        .map(Box::new),
                ),
            };
            if outcomes.blocking_send(outcome).is_err() {
                return;
            }
        }
    };
    let handle = Some(thread::Builder::new().name("counters".to_owned()).spawn(write)?);
    started.wait(); // what a thread does to start is no call that it may make later
    Ok(Writing { store: writer, work, done, _thread: Thread { handle, is_closed } })
}

/// What the thread beside the lookups has.
struct Writer {
    store: Store,
    cannot_write: Trouble,
    is_deleted: bool,
}

impl Writer {
    fn record(&mut self, batch: Vec<Claim>) -> Result<Vec<Recorded>, Vec<(Refusal, Vec<u8>)>> {
        match log::suspect(CHANGED, || Claim::record(batch, &mut self.store)) {
            Ok(recorded) => {
                if self.cannot_write.is_over() {
                    info!("the counters can be written again, and knocks open what they should");
                }
                self.look_whether_it_is_deleted();
                Ok(recorded)
            }
            Err((refusals, cause)) => {
                if self.cannot_write.is_news(Instant::now()) {
                    let hint = "look at the disk, with `df` and `mount`";
                    error!(hint, "the counters cannot be written, so nothing is opened until they can: {cause}");
                }
                Err(refusals)
            }
        }
    }

    /// What is written to a file without a name is durable only as long as somebody has it open.
    fn look_whether_it_is_deleted(&mut self) {
        if !self.is_deleted && self.store.is_deleted() {
            self.is_deleted = true;
            let hint = "stop the daemon, run `knockq recover`, and start it again";
            error!(hint, "the counter store was deleted: what is written to it ends with this daemon");
        }
    }
}

fn prepare_anew(store: &mut Store, settings: OwnedFd) -> io::Result<Prepared> {
    let Settings { registry, policy, outline, .. } = handover::unseal(settings)?;
    Ok(Prepared { verifier: prepare(store, registry).map_err(io::Error::other)?, policy, outline })
}

/// A verifier by these settings, with the counters that the store knows. Of users whose count it may have forgotten, no knock
/// is one.
pub(super) fn prepare(store: &mut Store, mut registry: Registry) -> Result<Verifier, StoreError> {
    let forgot = store.forgot()?;
    let hint = way_out(forgot, registry.counted().fold(unix_now(), u64::max));
    let is_forgotten = |user: &User| matches!(&user.secrets, Secrets::Knockknock(profile) if profile.as_of < forgot);
    let (waiting, users): (Vec<User>, _) = registry.users.into_iter().partition(is_forgotten);
    registry.users = users;
    if !waiting.is_empty() {
        let users: Vec<&str> = waiting.iter().map(|user| user.name.as_str()).collect();
        warn!(
            users = users.join(", "),
            hint,
            "the counter store was made anew or restored since these profiles were counted: no knock of theirs is taken"
        );
    }
    let last = store.last_counters(registry.users.iter().map(|user| user.public_key))?;
    Ok(Verifier::new(registry, &last, unix_now()).above(store.floor()?))
}

/// Of a store that forgot at this moment; a count that is set now is of the second after the `latest` of clock and counts.
const fn way_out(forgot: u64, latest: u64) -> &'static str {
    if forgot > latest.saturating_add(1) {
        "the clock was ahead then, so first stop the daemon and run `knockq recover`; then ask their clients for the number of \
         the next knock, and set it: knockq user counter NAME NUMBER"
    } else {
        "ask their clients for the number of the next knock, and set it: knockq user counter NAME NUMBER"
    }
}

#[cfg(test)]
mod tests {
    use super::way_out;

    #[test]
    fn a_count_that_would_still_be_too_old_when_it_is_set_has_another_way_out() {
        for (forgot, is_ahead) in [(0, false), (7, false), (8, false), (9, true), (u64::MAX, true)] {
            assert_eq!(way_out(forgot, 7).contains("knockq recover"), is_ahead, "{forgot}");
        }
        assert!(!way_out(u64::MAX, u64::MAX).contains("recover"));
    }
}
