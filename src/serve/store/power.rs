//! The power fails at any instant of a write. A disk keeps what was synced, and of what came after it any part in any order.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use redb::StorageBackend;
use rustix::fs::{MemfdFlags, memfd_create};

use super::{Origin, Pages, Safe, Store, examine};
use crate::crypto::{Binding, KnockKey, KnockSecrets, Opened, PrivateKey, PublicKey, Side};
use crate::verify::{Counters, Ledger, Reservation};

/// A disk writes so much whole, or not at all.
const SECTOR: usize = 512;

/// A first counter of all.
const FIRST: u64 = 1_790_000_000;

/// What was asked of the disk, one after the other.
#[derive(Clone, Debug)]
enum Step {
    Write(usize, Vec<u8>),
    Length(usize),
    Sync,
}

impl Step {
    fn apply(&self, disk: &mut Vec<u8>) {
        match self {
            Self::Write(place, bytes) => {
                let end = place + bytes.len();
                disk.resize(disk.len().max(end), 0);
                disk[*place..end].copy_from_slice(bytes);
            }
            Self::Length(length) => disk.resize(*length, 0),
            Self::Sync => {}
        }
    }

    /// The first sectors of a write of several.
    fn torn(&self) -> Option<Self> {
        let Self::Write(place, bytes) = self else { return None };
        let half = bytes.len() / 2 / SECTOR * SECTOR;
        (half > 0).then(|| Self::Write(*place, bytes[..half].to_vec()))
    }
}

/// The pages of a store, and all that was asked of them.
#[derive(Clone, Debug)]
struct Recorder {
    pages: Pages,
    steps: Arc<Mutex<Vec<Step>>>,
}

impl Recorder {
    fn note(&self, step: Step) {
        self.steps.lock().unwrap().push(step);
    }
}

impl StorageBackend for Recorder {
    fn len(&self) -> io::Result<u64> {
        self.pages.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.pages.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.note(Step::Length(len.try_into().unwrap()));
        self.pages.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.note(Step::Sync);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.note(Step::Write(offset.try_into().unwrap(), data.to_vec()));
        self.pages.write(offset, data)
    }
}

/// A life of a store until its power failed.
struct Life {
    begin: Vec<u8>,
    steps: Vec<Step>,
    /// The last counter of so many clients had taken effect when there were so many steps.
    effects: Vec<(usize, usize, u64)>,
}

impl Life {
    /// Calls `look` with what a disk may hold afterwards, and which effects of before must be known then.
    fn each_loss(&self, mut look: impl FnMut(&[u8], &[(usize, usize, u64)])) {
        let mut disk = self.begin.clone();
        let mut first = 0;
        for interval in self.steps.split_inclusive(|step| matches!(step, Step::Sync)) {
            let end = first + interval.len() - 1;
            let effects = self.effects.partition_point(|(steps, ..)| *steps <= end);
            for kept in what_is_kept(interval) {
                let mut image = disk.clone();
                kept.iter().for_each(|step| step.apply(&mut image));
                look(&image, &self.effects[..effects]);
            }
            interval.iter().for_each(|step| step.apply(&mut disk));
            first += interval.len();
        }
    }
}

/// Of what was not synced: any first part, also with its last write torn; any last part; all but one.
fn what_is_kept(steps: &[Step]) -> Vec<Vec<Step>> {
    let mut kept = vec![steps.to_vec()];
    for (place, step) in steps.iter().enumerate() {
        let before = steps[..place].to_vec();
        kept.extend(step.torn().map(|torn| [before.clone(), vec![torn]].concat()));
        kept.push([&before, &steps[place + 1..]].concat());
        kept.push(steps[place..].to_vec());
        kept.push(before);
    }
    kept
}

fn memory(bytes: &[u8]) -> File {
    let file = File::from(memfd_create("store", MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len().try_into().unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn key(number: usize) -> PublicKey {
    let mut bytes = [7; 32];
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    bytes.try_into().unwrap()
}

fn opened(n: u64) -> Opened {
    let [own, server] = [(); 2].map(|()| PrivateKey::generate().unwrap());
    let key = KnockKey::new(&KnockSecrets::derive(Side::Client, &own, server.public(), None).unwrap());
    let token = key.seal(n, 22, Binding::Unbound);
    key.open(n, 22, token.tsval, Binding::Unbound).unwrap()
}

/// This counter, of clients of these numbers.
fn reservations(clients: impl Iterator<Item = usize>, n: u64) -> Vec<Reservation> {
    let source = IpAddr::from(Ipv4Addr::LOCALHOST);
    let opened = opened(n);
    clients.map(|client| Counters::default().reserve(&key(client), &opened, source, 7).unwrap()).collect()
}

fn server() -> PublicKey {
    key(usize::MAX >> 1)
}

/// A store over a disk of these bytes that is recorded, from when it is opened.
fn recorded(begin: &[u8]) -> (Store, Arc<Mutex<Vec<Step>>>) {
    let (file, steps) = (memory(begin), Arc::default());
    let recorder = Recorder { pages: Pages::of(file.try_clone().unwrap()), steps: Arc::clone(&steps) };
    let (opened, doubt) = examine(recorder.clone(), &server(), &Origin::of(&file).unwrap()).unwrap();
    opened.header.let_go(&recorder).unwrap();
    (Store { database: Some(opened.database), file, server: server(), doubt }, steps)
}

/// Each batch of clients spends the next counter, until the power fails.
fn live(begin: Vec<u8>, batches: impl Iterator<Item = (usize, u64)>) -> Life {
    let (mut store, steps) = recorded(&begin);
    let mut effects = Vec::new();
    for (clients, n) in batches {
        store.record(reservations(0..clients, n).iter()).unwrap();
        effects.push((steps.lock().unwrap().len(), clients, n));
    }
    let steps = steps.lock().unwrap().clone();
    Life { begin, steps, effects }
}

fn new_store() -> Vec<u8> {
    let file = memory(&[]);
    Store::create(file.try_clone().unwrap(), &server(), Safe::default()).unwrap();
    content(&file)
}

/// It opens, knows what had taken effect, and takes what comes next.
fn is_recovered(image: &[u8], effects: &[(usize, usize, u64)]) {
    let mut store = {
        let file = memory(image);
        let origin = Origin::of(&file).unwrap();
        Store::open(file, server(), origin, Safe::default()).unwrap()
    };
    let clients = effects.iter().map(|(_, clients, _)| *clients).max().unwrap_or(1);
    let last = store.last_counters((0..clients).map(key)).unwrap();
    for (_, clients, n) in effects {
        assert!((0..*clients).all(|client| last[&key(client)] >= *n), "{n} is forgotten");
    }
    let next = FIRST + 1_000_000;
    store.record(reservations(0..1, next).iter()).unwrap();
    assert_eq!(store.last_counters([key(0)].into_iter()).unwrap()[&key(0)], next);
}

/// Looks at whatever a disk may hold; tells how many that were.
fn recovers(life: &Life) -> usize {
    let mut losses = 0;
    life.each_loss(|image, effects| {
        is_recovered(image, effects);
        losses += 1;
    });
    losses
}

#[test]
fn whatever_a_disk_keeps_when_the_power_fails_no_counter_that_took_effect_is_forgotten() {
    let losses = recovers(&live(new_store(), (FIRST..).take(5).map(|n| (1, n))));
    assert!(losses > 100, "only {losses}: this test no longer sees the writes");
}

#[test]
fn a_store_that_grows_when_the_power_fails_forgets_no_counter_that_took_effect() {
    let batches = (1..=9).map(|round| 64 * round).zip(FIRST..);
    let life = live(new_store(), batches);
    assert!(life.steps.iter().any(|step| matches!(step, Step::Length(_))), "it does not grow");
    recovers(&life);
}

#[test]
fn power_that_fails_again_during_the_recovery_costs_nothing_either() {
    const ONE_OF: usize = 4;
    let (mut images, mut losses) = (0, 0);
    live(new_store(), [(1, FIRST)].into_iter()).each_loss(|image, effects| {
        images += 1;
        if images % ONE_OF == 0 {
            let (store, steps) = recorded(image);
            drop(store);
            let steps = steps.lock().unwrap().clone();
            let effects = effects.iter().map(|(_, clients, n)| (0, *clients, *n)).collect();
            losses += recovers(&Life { begin: image.to_vec(), steps, effects });
        }
    });
    assert!(losses > 100, "only {losses}: this test no longer sees the recovery");
}
