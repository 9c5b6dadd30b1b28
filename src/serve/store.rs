//! The last accepted counter of every key, on disk (docs/protocol.md section 2).
//!
//! The file is made by `init` together with the server's key, whose public half it carries: a store of another server, or
//! none, would let old knocks be replayed.

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::sync::Arc;
use std::{fmt, io};

use redb::{Database, Durability, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition, TableError};
use rustix::fs::fstat;
use thiserror::Error;

use crate::crypto::PublicKey;
use crate::verify::{CounterLog, Floor, Reservation};

mod origin;
mod pages;

pub use origin::Origin;
use pages::{Header, HeaderLast, Pages};

/// client_public || server_public -> last accepted n.
const COUNTERS: TableDefinition<'_, [u8; 64], u64> = TableDefinition::new("counters");

/// Facts about the store itself.
const FACTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("facts");

/// The server's public key.
const SERVER: &str = "server_public";

/// The file that the store was made in, as [`Origin`] names it.
const ORIGIN: &str = "origin";

/// No n up to this one is accepted for any key, 8 bytes big-endian.
const FLOOR: &str = "floor";

/// A count of a knockknock profile that was set before this moment is not trusted: the store may have known of more. Unix
/// seconds, 8 bytes big-endian.
const FORGOT: &str = "forgot";

/// What the tables mean, 4 bytes big-endian. A store that does not say is of version 1.
const VERSION: &str = "version";

/// The only version that there is.
const KNOWN_VERSION: u32 = 1;

/// Bytes of pages that redb keeps in memory.
const CACHE: usize = 1 << 20;

/// Why the store cannot be used.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Another process has it open.
    #[error("is in use by another process")]
    InUse,
    /// It is not a store of counters.
    #[error("is not a counter store")]
    NotAStore,
    /// It belongs to another server key.
    #[error("belongs to the server key {0}")]
    OtherServer(String),
    /// A newer knockq made it.
    #[error("is of version {0}, and this knockq knows none above {KNOWN_VERSION}")]
    Newer(u32),
    /// Some of it is not what was written.
    #[error("is damaged: {0}")]
    Damaged(String),
    /// Reading or writing failed.
    #[error("{0}")]
    Failed(io::Error),
    /// The database refused something else.
    #[error("{0}")]
    Database(redb::Error),
}

/// From whichever of redb's errors.
impl<E: Into<redb::Error>> From<E> for StoreError {
    fn from(error: E) -> Self {
        match error.into() {
            redb::Error::Corrupted(what) => Self::Damaged(what),
            redb::Error::Io(error) if error.kind() == io::ErrorKind::InvalidData => Self::NotAStore,
            redb::Error::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Self::Damaged("it is cut short".to_owned())
            }
            redb::Error::Io(error) => Self::Failed(error),
            other => Self::Database(other),
        }
    }
}

/// An open store.
pub struct Store {
    /// `None` after a failed write: redb refuses all others until it is opened anew.
    database: Option<Database>,
    file: File,
    server: PublicKey,
    doubt: Option<Suspicion>,
}

/// Why a store may have forgotten what it once knew.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Suspicion {
    /// Its last commit is not whole, so the one before stands in for it. The power may have failed before it was durable, or
    /// the disk has lost it since, which nobody can tell apart.
    Shortened,
    /// It was made in another file: a backup that was restored, say.
    Copy,
}

impl fmt::Display for Suspicion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shortened => "its last write was not whole",
            Self::Copy => "is a copy of a counter store, restored or moved",
        })
    }
}

impl Store {
    /// Makes an empty store in an empty file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create(file: File, server: &PublicKey, safe: StoreFloor) -> Result<(), StoreError> {
        Self::create_after(&OldStore::default(), file, server, safe)
    }

    /// Makes a store in an empty file that takes over what another one knew: no counter and no floor is ever lowered.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create_after(
        remains: &OldStore,
        file: File,
        server: &PublicKey,
        safe: StoreFloor,
    ) -> Result<(), StoreError> {
        let origin = Origin::of(&file)?;
        let database = database(locked(file)?, &Arc::default())?;
        let floor = remains.floor.max(safe.floor);
        let transaction = database.begin_write()?;
        {
            let mut facts = transaction.open_table(FACTS)?;
            facts.insert(SERVER, server.as_bytes().as_slice())?;
            facts.insert(ORIGIN, origin.as_bytes())?;
            facts.insert(FLOOR, floor.to_be_bytes().as_slice())?;
            facts.insert(FORGOT, safe.since.to_be_bytes().as_slice())?;
            facts.insert(VERSION, KNOWN_VERSION.to_be_bytes().as_slice())?;
            let mut counters = transaction.open_table(COUNTERS)?;
            for (row, n) in &remains.rows {
                counters.insert(row, n)?;
            }
        }
        transaction.commit()?;
        Ok(())
    }

    /// Opens the store of this server, and checks every page of it.
    ///
    /// If that leaves a [`Suspicion`], what was accepted before cannot be told, and `safe` says what cannot be of it. `origin` is
    /// that of `file`.
    ///
    /// # Errors
    /// When it is not one, another server's, a newer knockq's, or damaged.
    pub fn open(file: File, server: PublicKey, origin: Origin, safe: StoreFloor) -> Result<Self, StoreError> {
        Self::open_in(locked(file.try_clone()?)?, file, server, origin, safe)
    }

    fn open_in(
        pages: impl StorageBackend + Clone,
        file: File,
        server: PublicKey,
        origin: Origin,
        safe: StoreFloor,
    ) -> Result<Self, StoreError> {
        // On the disk nothing changes before the floor is where it belongs: who ends meanwhile finds the same again.
        let (opened, doubt) = examine(pages.clone(), &server, &origin)?;
        let settled = doubt.map_or(Ok(()), |_| settle(&opened.database, &origin, safe));
        if let Err(error) = settled.and_then(|()| Ok(opened.header.let_go(&pages)?)) {
            opened.header.close();
            return Err(error);
        }
        Ok(Self { database: Some(opened.database), file, server, doubt })
    }

    /// Looks at the store of this server as [`Store::open`] would, and changes nothing: why it may have forgotten what it once
    /// knew, if so, and its floor of before.
    ///
    /// # Errors
    /// The same.
    pub fn check(file: File, server: &PublicKey) -> Result<(Option<Suspicion>, Floor), StoreError> {
        let origin = Origin::of(&file)?;
        let (opened, doubt) = examine(locked(file)?, server, &origin)?;
        opened.header.close();
        Ok((doubt, floor(&opened.database).map(Floor::new)?))
    }

    /// Why it may have forgotten what it once knew, if so.
    pub const fn doubt(&self) -> Option<Suspicion> {
        self.doubt
    }

    /// Whether nobody else can open it any more: its file has no name, or another file has it.
    pub fn is_deleted(&self) -> bool {
        fstat(&self.file).is_ok_and(|file| file.st_nlink == 0)
    }

    /// The last accepted counter of every key in `known` that had one: of a token, or the number of a profile's knock.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn last_counters(
        &mut self,
        known: impl Iterator<Item = PublicKey>,
    ) -> Result<HashMap<PublicKey, u64>, StoreError> {
        let server = self.server;
        let transaction = self.database()?.begin_read()?;
        let counters = transaction.open_table(COUNTERS)?;
        let entry = |client: PublicKey| Ok(counters.get(row(&client, &server))?.map(|n| (client, n.value())));
        known.map(entry).filter_map(Result::transpose).collect()
    }

    /// Up to where counters of tokens may have been accepted that it does not know.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn floor(&mut self) -> Result<Floor, StoreError> {
        floor(self.database()?).map(Floor::new)
    }

    /// Counts of knockknock profiles that were set before this moment, in Unix seconds, may be less than what was accepted
    /// since, and then forgotten. A store of before there were profiles says it by its floor.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn forgot(&mut self) -> Result<u64, StoreError> {
        let database = self.database()?;
        seconds(database, FORGOT)?.map_or_else(|| floor(database), Ok)
    }

    /// After a write that failed it is opened anew, and not examined again: at most the commit that failed is missing, which the
    /// verifier's memory has.
    fn database(&mut self) -> Result<&Database, StoreError> {
        if self.database.is_none() {
            let pages = locked(self.file.try_clone()?)?;
            let Opened { database, header } = unchanged(pages.clone())?;
            header.let_go(&pages)?;
            self.database = Some(database);
        }
        self.database.as_ref().ok_or(StoreError::NotAStore)
    }
}

/// What cannot have been accepted before, although nobody knows it any more. By default, anything.
#[derive(Clone, Copy, Default)]
pub struct StoreFloor {
    /// Counters of tokens above this one, in Unix seconds.
    pub floor: u64,
    /// Counts of knockknock profiles that are set at this moment or later, in Unix seconds.
    pub since: u64,
}

impl StoreFloor {
    /// From now on: tokens that are ahead of every window, and counts that are set later than this second, and than those
    /// that were `counted` by a clock that was ahead of this one.
    pub fn after(now: u64, window: u64, counted: impl Iterator<Item = u64>) -> Self {
        Self { floor: now.saturating_add(window), since: counted.fold(now, u64::max).saturating_add(1) }
    }
}

/// What a store knew that another one is to replace. Nobody else can open that store while this lives.
#[derive(Default)]
pub struct OldStore {
    rows: HashMap<[u8; 64], u64>,
    floor: u64,
    _lock: Option<Database>,
}

impl OldStore {
    /// Reads a whole store, of whichever server key: its rows carry their server's.
    ///
    /// # Errors
    /// When somebody has it open, or it is no store, a newer knockq's, or damaged.
    pub fn read(file: File) -> Result<Self, StoreError> {
        let Opened { database, header } = unchanged(locked(file)?)?;
        header.close();
        refuse_newer(&database)?;
        let floor = floor(&database)?;
        let transaction = database.begin_read()?;
        let counters = transaction.open_table(COUNTERS)?;
        let rows = counters.iter()?.map(|row| {
            let (row, n) = row?;
            Ok((row.value(), n.value()))
        });
        let rows = rows.collect::<Result<_, StoreError>>()?;
        Ok(Self { rows, floor, _lock: Some(database) })
    }

    /// How many keys have a counter in it.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether no key has.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// No counter up to this one was accepted for any key.
    pub const fn floor(&self) -> u64 {
        self.floor
    }

    /// The last counter that was accepted for this pair of keys, if there is one.
    pub fn last(&self, client: &PublicKey, server: &PublicKey) -> Option<u64> {
        self.rows.get(&row(client, server)).copied()
    }

    /// The highest counter that was accepted, if there is one.
    pub fn highest(&self) -> Option<u64> {
        self.rows.values().copied().max()
    }
}

impl CounterLog for Store {
    type Error = StoreError;

    fn record<'a>(&mut self, batch: impl Iterator<Item = &'a Reservation>) -> Result<(), StoreError> {
        let server = self.server;
        let recorded = write(self.database()?, &server, batch);
        if recorded.is_err() {
            self.database = None;
        }
        recorded
    }
}

fn write<'a>(
    database: &Database,
    server: &PublicKey,
    batch: impl Iterator<Item = &'a Reservation>,
) -> Result<(), StoreError> {
    let mut transaction = database.begin_write()?;
    transaction.set_durability(Durability::Immediate)?;
    {
        let mut counters = transaction.open_table(COUNTERS)?;
        for reservation in batch {
            let row = row(reservation.client(), server);
            let written = counters.get(row)?.map(|n| n.value());
            if written.is_none_or(|n| n < reservation.n()) {
                counters.insert(row, reservation.n())?;
            }
        }
    }
    transaction.commit()?;
    Ok(())
}

fn floor(database: &Database) -> Result<u64, StoreError> {
    seconds(database, FLOOR)?.ok_or(StoreError::NotAStore)
}

/// A fact that is a moment.
fn seconds(database: &Database, name: &str) -> Result<Option<u64>, StoreError> {
    let bytes = fact(database, name)?.map(|bytes| <[u8; 8]>::try_from(bytes).map_err(|_| StoreError::NotAStore));
    Ok(bytes.transpose()?.map(u64::from_be_bytes))
}

/// A database whose header on the disk is still as it was.
struct Opened {
    database: Database,
    header: Arc<Header>,
}

/// Opens a database, and checks every page of it.
fn unchanged(pages: impl StorageBackend) -> Result<Opened, StoreError> {
    // redb would make a new, empty database of an empty file.
    if pages.len()? == 0 {
        return Err(StoreError::NotAStore);
    }
    let header = Arc::new(Header::held_back());
    Ok(Opened { database: database(pages, &header)?, header })
}

/// Refuses a store that is not this server's, and tells whether it may have forgotten something.
fn examine(
    pages: impl StorageBackend,
    server: &PublicKey,
    origin: &Origin,
) -> Result<(Opened, Option<Suspicion>), StoreError> {
    let named = pages::root(&pages);
    let opened = unchanged(pages)?;
    let is_copy = || {
        refuse_newer(&opened.database)?;
        refuse_other(&opened.database, server)?;
        Ok(fact(&opened.database, ORIGIN)?.is_none_or(|known| known != origin.as_bytes()))
    };
    let is_copy = is_copy().inspect_err(|_: &StoreError| opened.header.close())?;
    // redb takes the commit that the header calls the last, or where it is not whole the one before. The one beside it may also
    // be newer: of who was killed while they closed the store, which changes no table. So what the tables hold tells.
    let is_shortened = opened.header.root() != named;
    let doubt = if is_shortened { Some(Suspicion::Shortened) } else { is_copy.then_some(Suspicion::Copy) };
    Ok((opened, doubt))
}

/// From here on it takes only what is safe, and is at home in its file.
fn settle(database: &Database, origin: &Origin, safe: StoreFloor) -> Result<(), StoreError> {
    let floor = floor(database)?.max(safe.floor);
    let since = seconds(database, FORGOT)?.unwrap_or(0).max(safe.since);
    let transaction = database.begin_write()?;
    {
        let mut facts = transaction.open_table(FACTS)?;
        facts.insert(FLOOR, floor.to_be_bytes().as_slice())?;
        facts.insert(FORGOT, since.to_be_bytes().as_slice())?;
        facts.insert(ORIGIN, origin.as_bytes())?;
    }
    transaction.commit()?;
    Ok(())
}

fn refuse_newer(database: &Database) -> Result<(), StoreError> {
    let Some(version) = fact(database, VERSION)? else { return Ok(()) };
    match <[u8; 4]>::try_from(version).map(u32::from_be_bytes) {
        Ok(version) if version > KNOWN_VERSION => Err(StoreError::Newer(version)),
        Ok(_) => Ok(()),
        Err(_) => Err(StoreError::NotAStore),
    }
}

fn refuse_other(database: &Database, server: &PublicKey) -> Result<(), StoreError> {
    let key = fact(database, SERVER)?.and_then(|key| <[u8; 32]>::try_from(key).ok());
    match key.and_then(|key| PublicKey::try_from(key).ok()) {
        Some(key) if key == *server => Ok(()),
        Some(key) => Err(StoreError::OtherServer(key.to_string())),
        None => Err(StoreError::NotAStore),
    }
}

fn fact(database: &Database, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
    let facts = match database.begin_read()?.open_table(FACTS) {
        Err(TableError::TableDoesNotExist(_) | TableError::TableTypeMismatch { .. }) => {
            return Err(StoreError::NotAStore);
        }
        facts => facts?,
    };
    Ok(facts.get(name)?.map(|value| value.value().to_vec()))
}

/// The pages of a file that nobody else has open.
fn locked(file: File) -> Result<Pages, StoreError> {
    // The lock goes with the file, and is not taken twice by its duplicates.
    match file.try_lock() {
        Ok(()) => Ok(Pages::of(file)),
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse),
        Err(TryLockError::Error(error)) => Err(StoreError::Failed(error)),
    }
}

fn database(pages: impl StorageBackend, header: &Arc<Header>) -> Result<Database, StoreError> {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE);
    builder.set_check_integrity_on_open(true); // else redb believes what a damaged page says, or panics over it
    Ok(builder.create_with_backend(HeaderLast::new(pages, Arc::clone(header)))?)
}

fn row(client: &PublicKey, server: &PublicKey) -> [u8; 64] {
    let mut row = [0; 64];
    let bytes = client.as_bytes().iter().chain(server.as_bytes());
    row.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    row
}

#[cfg(test)]
mod power;
