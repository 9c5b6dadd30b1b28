//! The power fails at any instant of a write, or the process is killed. A disk keeps what was synced, and of what came after it
//! any part in any order; the kernel keeps all that it was given before the kill.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use redb::StorageBackend;
use rustix::fs::{MemfdFlags, memfd_create};

use super::{Origin, Pages, Store, StoreFloor, Suspicion};
use crate::crypto::{Binding, KnockKey, KnockSecrets, Opened, PrivateKey, PublicKey, Side};
use crate::verify::{CounterLog, Counters, Reservation};

/// A disk writes so much whole, or not at all.
const SECTOR: usize = 512;

/// A first counter of all.
const FIRST: u64 = 1_790_000_000;

/// What is safe where a store that is recorded is in doubt.
const SAFE: StoreFloor = StoreFloor { floor: FIRST - 1, since: FIRST };

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

/// A life of a store: opened, used and closed.
struct Life {
    begin: Vec<u8>,
    origin: Origin,
    steps: Vec<Step>,
    effects: Vec<Effect>,
}

/// When there were so many steps, this counter of so many clients had taken effect.
type Effect = (usize, usize, u64);

impl Life {
    /// Calls `look` with what the file holds after a kill before each step, or within one, and which effects must be known then.
    fn each_kill(&self, mut look: impl FnMut(&[u8], &[Effect])) {
        let mut disk = self.begin.clone();
        for (taken, step) in self.steps.iter().enumerate() {
            let effects = &self.effects[..self.effects.partition_point(|(steps, ..)| *steps <= taken)];
            look(&disk, effects);
            if let Some(torn) = step.torn() {
                torn.apply(&mut disk);
                look(&disk, effects);
            }
            step.apply(&mut disk);
        }
        look(&disk, &self.effects);
    }

    /// Calls `look` with what a disk may hold after a loss of power, which effects of before must be known then, and the counter
    /// of the commit that its header names, if that was under way.
    fn each_loss(&self, mut look: impl FnMut(&[u8], &[Effect], Option<u64>)) {
        let mut disk = self.begin.clone();
        let mut first = 0;
        for interval in self.steps.split_inclusive(|step| matches!(step, Step::Sync)) {
            let end = first + interval.len() - 1;
            let effects = self.effects.partition_point(|(steps, ..)| *steps <= end);
            let under_way = self.effects.get(effects).filter(|(steps, ..)| *steps == end + 1).map(|(.., n)| *n);
            for kept in what_is_kept(interval) {
                let mut image = disk.clone();
                kept.iter().for_each(|step| step.apply(&mut image));
                let has_header = kept.iter().any(|step| matches!(step, Step::Write(0, _)));
                look(&image, &self.effects[..effects], under_way.filter(|_| has_header));
            }
            interval.iter().for_each(|step| step.apply(&mut disk));
            first += interval.len();
        }
    }

    /// Calls `look` with what follows each loss of power: the store is opened again, which settles what is in doubt, and closed.
    fn each_recovery(&self, mut look: impl FnMut(&Self)) {
        self.each_loss(|image, effects, _| {
            let (store, steps) = recorded(image, self.origin);
            drop(store);
            let steps = steps.lock().unwrap().clone();
            look(&Self { begin: image.to_vec(), origin: self.origin, steps, effects: long_ago(effects) });
        });
    }

    /// The same of each loss of power that leaves a doubt, until that is settled, if the file gets shorter by then.
    fn each_settlement_that_cuts(&self, mut look: impl FnMut(&Self)) {
        self.each_loss(|image, effects, _| {
            let (store, steps) = recorded(image, self.origin);
            let steps = steps.lock().unwrap().clone();
            let is_cut = steps.iter().any(|step| matches!(step, Step::Length(length) if *length < image.len()));
            if is_cut && store.doubt().is_some() {
                look(&Self { begin: image.to_vec(), origin: self.origin, steps, effects: long_ago(effects) });
            }
        });
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
    clients.map(|client| Counters::default().reserve(&key(client), &opened, source, 7, true).unwrap()).collect()
}

fn server() -> PublicKey {
    key(usize::MAX >> 1)
}

/// A store over a disk of these bytes that is recorded, from when it is opened.
fn recorded(begin: &[u8], origin: Origin) -> (Store, Arc<Mutex<Vec<Step>>>) {
    let (file, steps) = (memory(begin), Arc::default());
    let recorder = Recorder { pages: Pages::of(file.try_clone().unwrap()), steps: Arc::clone(&steps) };
    (Store::open_in(recorder, file, server(), origin, SAFE).unwrap(), steps)
}

/// Each batch of clients spends the next counter; then the store is closed.
fn live((begin, origin): (Vec<u8>, Origin), batches: impl Iterator<Item = (usize, u64)>) -> Life {
    let (mut store, steps) = recorded(&begin, origin);
    let mut effects = Vec::new();
    for (clients, n) in batches {
        store.record(reservations(0..clients, n).iter()).unwrap();
        effects.push((steps.lock().unwrap().len(), clients, n));
    }
    drop(store);
    let steps = steps.lock().unwrap().clone();
    Life { begin, origin, steps, effects }
}

/// An empty store, and where it is at home.
fn new_store() -> (Vec<u8>, Origin) {
    let file = memory(&[]);
    Store::create(file.try_clone().unwrap(), &server(), StoreFloor::default()).unwrap();
    (content(&file), Origin::of(&file).unwrap())
}

/// It opens, knows what had taken effect, and takes what comes next. Tells why it may have forgotten something, if so; of a
/// counter that its header names and that it does not know it must.
fn is_recovered(image: &[u8], origin: Origin, effects: &[Effect], named: Option<u64>) -> Option<Suspicion> {
    let mut store = Store::open(memory(image), server(), origin, StoreFloor::default()).unwrap();
    let doubt = store.doubt();
    let clients = effects.iter().map(|(_, clients, _)| *clients).max().unwrap_or(1);
    let last = store.last_counters((0..clients).map(key)).unwrap();
    for (_, clients, n) in effects {
        assert!((0..*clients).all(|client| last[&key(client)] >= *n), "{n} is forgotten");
    }
    let is_forgotten = named.is_some_and(|n| last.get(&key(0)) < Some(&n));
    assert!(
        !is_forgotten || doubt == Some(Suspicion::Shortened),
        "{named:?} may have opened a door, and nobody is told"
    );
    let next = FIRST + 1_000_000;
    store.record(reservations(0..1, next).iter()).unwrap();
    assert_eq!(store.last_counters([key(0)].into_iter()).unwrap()[&key(0)], next);
    doubt
}

/// Looks at whatever a disk may hold; tells how often that was, and how often in doubt.
fn recovers(life: &Life) -> (usize, usize) {
    let (mut losses, mut doubts) = (0, 0);
    life.each_loss(|image, effects, named| {
        losses += 1;
        doubts += usize::from(is_recovered(image, life.origin, effects, named).is_some());
    });
    (losses, doubts)
}

/// What had taken effect before another life began.
fn long_ago(effects: &[Effect]) -> Vec<Effect> {
    effects.iter().map(|(_, clients, n)| (0, *clients, *n)).collect()
}

/// A life in which the file grows.
fn growing() -> Life {
    live(new_store(), (1..=9).map(|round| 64 * round).zip(FIRST..))
}

#[test]
fn whatever_a_disk_keeps_when_the_power_fails_no_counter_that_took_effect_is_forgotten() {
    let (losses, doubts) = recovers(&live(new_store(), (FIRST..).take(5).map(|n| (1, n))));
    assert!(losses > 100, "only {losses}: this test no longer sees the writes");
    assert!(doubts > 10, "only {doubts}: this test no longer sees commits that are not whole");
}

#[test]
fn a_store_that_grows_when_the_power_fails_forgets_no_counter_that_took_effect() {
    let life = growing();
    assert!(life.steps.iter().any(|step| matches!(step, Step::Length(_))), "it does not grow");
    recovers(&life);
}

#[test]
fn power_that_fails_again_during_the_recovery_costs_nothing_either() {
    const ONE_OF: usize = 4;
    let (mut images, mut losses) = (0, 0);
    live(new_store(), [(1, FIRST)].into_iter()).each_recovery(|again| {
        images += 1;
        if images % ONE_OF == 0 {
            losses += recovers(again).0;
        }
    });
    assert!(losses > 100, "only {losses}: this test no longer sees the recovery");
    let (mut images, mut losses) = (0, 0);
    growing().each_settlement_that_cuts(|again| {
        images += 1;
        if images % ONE_OF == 0 {
            losses += recovers(again).0;
        }
    });
    assert!(losses > 100, "only {losses}: this test no longer sees the file cut");
}

#[test]
fn killed_while_a_doubt_about_a_store_that_grew_is_settled_its_process_leaves_the_doubt_or_what_is_safe() {
    let mut kills = 0;
    growing().each_settlement_that_cuts(|again| {
        again.each_kill(|image, effects| {
            kills += 1;
            let doubt = is_recovered(image, again.origin, effects, None);
            let mut store = Store::open(memory(image), server(), again.origin, StoreFloor::default()).unwrap();
            assert!(doubt.is_some() || store.floor().unwrap().covers(SAFE.floor), "the doubt is forgotten");
        });
    });
    assert!(kills > 100, "only {kills}: this test no longer sees the file cut");
}

#[test]
fn a_store_whose_process_is_killed_between_any_two_writes_is_whole_and_knows_every_counter_that_took_effect() {
    let mut kills = 0;
    let mut is_whole = |image: &[u8], origin, effects: &[Effect]| {
        kills += 1;
        assert_eq!(is_recovered(image, origin, effects, None), None, "after {} counters", effects.len());
    };
    for counters in 0..3 {
        let life = live(new_store(), (FIRST..).take(counters).map(|n| (1, n)));
        life.each_kill(|image, effects| is_whole(image, life.origin, effects));
    }
    // And killed again: while it is recovered, takes another counter, and is closed.
    let life = live(new_store(), [(1, FIRST)].into_iter());
    life.each_kill(|image, effects| {
        let again = live((image.to_vec(), life.origin), [(1, FIRST + 1)].into_iter());
        let effects = [long_ago(effects), again.effects.clone()].concat();
        Life { effects, ..again }.each_kill(|image, effects| is_whole(image, life.origin, effects));
    });
    assert!(kills > 400, "only {kills}: this test no longer sees the writes");
}
