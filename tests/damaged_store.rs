//! A counter store whose bytes a disk has changed: it is refused, or knows of every counter that was accepted.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::FileExt;
use std::panic::{self, AssertUnwindSafe};
use std::path::PathBuf;

use knockq::crypto::{Binding, KnockKey, KnockSecrets, PrivateKey, PublicKey, Side};
use knockq::serve::store::{OldStore, Origin, Store, StoreError, StoreFloor, Suspicion};
use knockq::verify::{Counters, Floor, Fresh};

/// Bytes of a page of redb's.
const PAGE: usize = 4096;

/// Users, so that counters take several pages.
const USERS: u64 = 300;

/// Counters that each user spent, one commit for each: the pages of commits before are used again.
const COMMITS: u64 = 6;

/// Above all counters that were accepted.
const FLOOR: u64 = 2_000;

/// A store as a daemon leaves it, and what it knows.
struct Subject {
    server: PublicKey,
    users: Vec<PublicKey>,
    path: PathBuf,
    /// After a clean end, and after `kill -9`.
    contents: [Vec<u8>; 2],
}

impl Subject {
    fn new(name: &str) -> Self {
        // In memory where there is such a place: a disk would be waited for a thousand times.
        let memory = PathBuf::from("/dev/shm");
        let directory = if memory.is_dir() { memory } else { std::env::temp_dir() };
        let path = directory.join(format!("knockq-damage-{}-{name}", std::process::id()));
        let key = PrivateKey::generate().unwrap();
        let server = *key.public();
        let own: Vec<PrivateKey> = (0..USERS).map(|_| PrivateKey::generate().unwrap()).collect();
        let users: Vec<PublicKey> = own.iter().map(|own| *own.public()).collect();
        Store::create(create(&path), &server, StoreFloor::default()).unwrap();
        let mut store = reopen(&path, server, FLOOR).unwrap();
        let mut counters = Counters::default();
        // What matters of an opened token here is its counter alone.
        let key = KnockKey::new(&KnockSecrets::derive(Side::Client, &own[0], &server, None).unwrap());
        for n in 1_000..1_000 + COMMITS {
            let token = key.seal(n, 22, Binding::Unbound);
            let opened = key.open(n, 22, token.tsval, Binding::Unbound).unwrap();
            let reserve = |user| counters.reserve(user, &opened, IpAddr::V4(Ipv4Addr::LOCALHOST), 7, true).unwrap();
            Fresh::record(users.iter().map(reserve).collect(), &mut store).unwrap();
        }
        let killed = fs::read(&path).unwrap();
        drop(store);
        let closed = fs::read(&path).unwrap();
        Self { server, users, path, contents: [closed, killed] }
    }

    /// Opens it with these contents; tells whether it was whole, shortened by a commit, or refused.
    #[track_caller]
    fn opens(&self, contents: &[u8], how: &str) -> Outcome {
        fs::write(&self.path, contents).unwrap();
        let opened = reopen(&self.path, self.server, FLOOR);
        let counters = opened.and_then(|mut store| {
            let counters = store.last_counters(self.users.iter().copied())?;
            Ok((store.doubt() == Some(Suspicion::Shortened), counters, store.floor()?))
        });
        match counters {
            Ok((has_lost, counters, floor)) => {
                self.know_all(&counters, floor, how);
                if has_lost { Outcome::Shortened } else { Outcome::Whole }
            }
            Err(StoreError::Damaged(_) | StoreError::NotAStore | StoreError::Database(_)) => Outcome::Refused,
            Err(error) => panic!("{how}: {error:?}"),
        }
    }

    #[track_caller]
    fn know_all(&self, counters: &HashMap<PublicKey, u64>, floor: Floor, how: &str) {
        let last = 999 + COMMITS;
        for user in &self.users {
            let known = counters.get(user);
            assert!(floor.covers(last) || known >= Some(&last), "{how}: {known:?} {floor:?}");
        }
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outcome {
    Whole,
    Shortened,
    Refused,
}

fn open(path: &PathBuf) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

fn reopen(path: &PathBuf, server: PublicKey, floor: u64) -> Result<Store, StoreError> {
    let file = open(path);
    let origin = Origin::of(&file).unwrap();
    Store::open(file, server, origin, StoreFloor { floor, since: 0 })
}

fn create(path: &PathBuf) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).unwrap()
}

/// Numbers that are the same in each run (George Marsaglia's xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % u64::try_from(end).unwrap()).unwrap()
    }
}

/// Pages that hold anything.
fn used_pages(contents: &[u8]) -> Vec<usize> {
    let pages = contents.chunks(PAGE).enumerate();
    pages.filter(|(_, page)| page.iter().any(|byte| *byte != 0)).map(|(number, _)| number).collect()
}

#[test]
fn a_store_is_whole_after_a_clean_end_and_after_a_kill() {
    let subject = Subject::new("whole");
    for contents in &subject.contents {
        assert_eq!(subject.opens(contents, "untouched"), Outcome::Whole);
    }
}

#[test]
fn a_store_that_is_refused_or_only_read_stays_as_it_is() {
    let subject = Subject::new("refused");
    for contents in &subject.contents {
        fs::write(&subject.path, contents).unwrap();
        let other = *PrivateKey::generate().unwrap().public();
        let refused = reopen(&subject.path, other, FLOOR);
        assert!(matches!(refused, Err(StoreError::OtherServer(_))));
        assert_eq!(OldStore::read(open(&subject.path)).unwrap().len(), subject.users.len());
        assert!(fs::read(&subject.path).unwrap() == *contents);
    }
}

#[test]
fn each_page_that_is_overwritten_is_noticed_or_bears_nothing() {
    let subject = Subject::new("pages");
    let mut outcomes = Vec::new();
    for contents in &subject.contents {
        for page in used_pages(contents) {
            for fill in [0x00, 0x5a, 0xff] {
                let mut damaged = contents.clone();
                damaged[page * PAGE..][..PAGE].fill(fill);
                outcomes.push(subject.opens(&damaged, &format!("page {page} filled with {fill:#x}")));
            }
        }
    }
    for outcome in [Outcome::Whole, Outcome::Shortened, Outcome::Refused] {
        assert!(outcomes.contains(&outcome), "never {outcome:?}: {outcomes:?}");
    }
}

#[test]
fn flipped_bits_are_noticed_or_bear_nothing() {
    let subject = Subject::new("bits");
    let mut random = Random(0x006b_6e6f_636b);
    for contents in &subject.contents {
        let pages = used_pages(contents);
        // Every bit of what says where the two commits lie, and some anywhere.
        let header = (0..320 * 8).step_by(37);
        let anywhere = (0..300).map(|_| pages[random.below(pages.len())] * PAGE * 8 + random.below(PAGE * 8));
        for bit in header.chain(anywhere.collect::<Vec<_>>()) {
            let mut damaged = contents.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            subject.opens(&damaged, &format!("bit {bit} flipped"));
        }
    }
}

#[test]
fn a_store_that_is_cut_or_padded_anywhere_is_refused_or_knows_all() {
    let subject = Subject::new("cut");
    for contents in &subject.contents {
        let used = used_pages(contents).last().unwrap() + 1;
        for length in (0..used * PAGE).step_by(1_000).chain([0, 1, 9, 10, 319, 320, PAGE, contents.len() - 1]) {
            subject.opens(&contents[..length], &format!("cut to {length}"));
        }
        for more in [1, PAGE, 10 * PAGE, 1 << 22] {
            let mut padded = contents.clone();
            padded.resize(contents.len() + more, 0);
            subject.opens(&padded, &format!("padded with {more}"));
        }
    }
}

#[test]
fn a_commit_of_which_only_some_pages_arrived_is_taken_back_and_nothing_of_before_is_taken() {
    let subject = Subject::new("torn");
    let [_, before] = &subject.contents;
    fs::write(&subject.path, before).unwrap();
    let mut store = reopen(&subject.path, subject.server, FLOOR).unwrap();
    let opened = fs::read(&subject.path).unwrap();
    raise(&subject, &mut store, 1_100);
    let after = fs::read(&subject.path).unwrap();
    drop(store);
    // What a commit makes the file shorter by goes when it is durable.
    let after = [&after[..], &opened[after.len()..]].concat();
    let pages = 0..after.len() / PAGE;
    let changed: Vec<usize> = pages.filter(|page| page_of(&opened, *page) != page_of(&after, *page)).collect();
    assert!(changed.len() > 2 && changed[0] == 0, "{changed:?}");
    for lost in &changed[1..] {
        let mut torn = after.clone();
        torn[lost * PAGE..][..PAGE].copy_from_slice(page_of(&opened, *lost));
        assert_eq!(subject.opens(&torn, &format!("page {lost} of a commit did not arrive")), Outcome::Shortened);
        // It stays so: what was forgotten is not remembered.
        let mut again = reopen(&subject.path, subject.server, 0).unwrap();
        assert!(again.doubt().is_none() && again.floor().unwrap() == Floor::new(FLOOR));
        drop(again);
        assert_eq!(OldStore::read(open(&subject.path)).unwrap().floor(), FLOOR);
    }
    let mut none = after.clone();
    none[..PAGE].copy_from_slice(page_of(&opened, 0));
    assert_eq!(subject.opens(&none, "the commit itself did not arrive"), Outcome::Whole);
}

fn page_of(contents: &[u8], page: usize) -> &[u8] {
    &contents[page * PAGE..][..PAGE]
}

/// One more counter, for the first user.
fn raise(subject: &Subject, store: &mut Store, n: u64) {
    let (own, key) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
    let key = KnockKey::new(&KnockSecrets::derive(Side::Client, &own, key.public(), None).unwrap());
    let token = key.seal(n, 22, Binding::Unbound);
    let opened = key.open(n, 22, token.tsval, Binding::Unbound).unwrap();
    let reservation =
        Counters::default().reserve(&subject.users[0], &opened, IpAddr::V4(Ipv4Addr::LOCALHOST), 7, true).unwrap();
    Fresh::record(vec![reservation], store).unwrap();
}

#[test]
fn a_store_whose_bytes_are_overwritten_while_it_is_open_never_says_less_than_is_durable() {
    let subject = Subject::new("open");
    let mut random = Random(0x6b6e_6f63_6b71);
    for round in 0..40 {
        fs::write(&subject.path, &subject.contents[1]).unwrap();
        let mut store = reopen(&subject.path, subject.server, FLOOR).unwrap();
        let pages = used_pages(&fs::read(&subject.path).unwrap());
        let file = open(&subject.path);
        for _ in 0..4 {
            let page = pages[random.below(pages.len())];
            file.write_all_at(&[0x5a; PAGE], u64::try_from(page * PAGE).unwrap()).unwrap();
        }
        // redb may panic over what it reads now; the daemon then ends, with a line that says so.
        let _ = panic::catch_unwind(AssertUnwindSafe(|| {
            raise(&subject, &mut store, 1_100);
            drop(store);
        }));
        subject.opens(&fs::read(&subject.path).unwrap(), &format!("round {round}"));
    }
}
