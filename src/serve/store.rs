//! The last accepted counter of every key, on disk (docs/protocol.md section 2).
//!
//! The file is made by `init` together with the server's key, whose public half it carries: a store of another server, or
//! none, would let old knocks be replayed.

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::{Database, Durability, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition, TableError};
use rustix::fs::fstat;
use thiserror::Error;

use crate::crypto::PublicKey;
use crate::verify::{Ledger, Reservation};

/// client_public || server_public -> last accepted n.
const COUNTERS: TableDefinition<'_, [u8; 64], u64> = TableDefinition::new("counters");

/// Facts about the store itself.
const FACTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("facts");

/// The server's public key.
const SERVER: &str = "server_public";

/// No n up to this one is accepted for any key, 8 bytes big-endian.
const FLOOR: &str = "floor";

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
    has_lost: bool,
}

impl Store {
    /// Makes an empty store in an empty file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create(file: File, server: &PublicKey, floor: u64) -> Result<(), StoreError> {
        Self::create_after(&Remains::default(), file, server, floor)
    }

    /// Makes a store in an empty file that takes over what another one knew: no counter and no floor is ever lowered.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create_after(remains: &Remains, file: File, server: &PublicKey, floor: u64) -> Result<(), StoreError> {
        let database = open(file, &Arc::default())?;
        let floor = remains.floor.max(floor);
        let transaction = database.begin_write()?;
        {
            let mut facts = transaction.open_table(FACTS)?;
            facts.insert(SERVER, server.as_bytes().as_slice())?;
            facts.insert(FLOOR, floor.to_be_bytes().as_slice())?;
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
    /// If its last commit is not whole, the one before stands in for it. The power may have failed before it was durable,
    /// or the disk has lost it since, which nobody can tell apart: so no counter up to `floor` is accepted from then on.
    /// That must be above all that can have been accepted.
    ///
    /// # Errors
    /// When it is not one, another server's, a newer knockq's, or damaged.
    pub fn open(file: File, server: PublicKey, floor: u64) -> Result<Self, StoreError> {
        // redb would make a new, empty database of an empty file.
        if is_empty(&file) {
            return Err(StoreError::NotAStore);
        }
        // On the disk nothing changes before the floor is where it belongs: who ends meanwhile finds the same again.
        let (header, before) = (Arc::new(Header::held_back()), last_commit(&file));
        let database = open(file.try_clone().map_err(StoreError::Failed)?, &header)?;
        // Opening it ends with a commit, which takes the other place than the last one did.
        let has_lost = header.last_commit() == before;
        let settled = settle(&database, &server, has_lost.then_some(floor));
        if let Err(error) = settled.and_then(|()| header.let_go(&file).map_err(StoreError::Failed)) {
            header.close();
            return Err(error);
        }
        Ok(Self { database: Some(database), file, server, has_lost })
    }

    /// Whether its last commit was not whole.
    pub const fn has_lost_a_commit(&self) -> bool {
        self.has_lost
    }

    /// Whether nobody else can open it any more: its file has no name, or another file has it.
    pub fn is_deleted(&self) -> bool {
        fstat(&self.file).is_ok_and(|file| file.st_nlink == 0)
    }

    /// The last accepted counter of every key in `known`: what is written, or the floor where that is higher.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn last_counters(
        &mut self,
        known: impl Iterator<Item = PublicKey>,
    ) -> Result<HashMap<PublicKey, u64>, StoreError> {
        let server = self.server;
        let database = self.database()?;
        let floor = floor(database)?;
        let transaction = database.begin_read()?;
        let counters = transaction.open_table(COUNTERS)?;
        let last = |client: PublicKey| {
            let written = counters.get(row(&client, &server))?;
            Ok((client, written.map_or(0, |n| n.value()).max(floor)))
        };
        known.map(last).collect()
    }

    fn database(&mut self) -> Result<&Database, StoreError> {
        if self.database.is_none() {
            let file = self.file.try_clone().map_err(StoreError::Failed)?;
            self.database = Some(open(file, &Arc::default())?);
        }
        self.database.as_ref().ok_or(StoreError::NotAStore)
    }
}

/// What a store knew that another one is to replace. Nobody else can open that store while this lives.
#[derive(Default)]
pub struct Remains {
    rows: HashMap<[u8; 64], u64>,
    floor: u64,
    _lock: Option<Database>,
}

impl Remains {
    /// Reads a whole store, of whichever server key: its rows carry their server's.
    ///
    /// # Errors
    /// When somebody has it open, or it is no store, a newer knockq's, or damaged.
    pub fn read(file: File) -> Result<Self, StoreError> {
        if is_empty(&file) {
            return Err(StoreError::NotAStore);
        }
        let header = Arc::new(Header::held_back());
        let database = open(file, &header)?;
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

impl Ledger for Store {
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
    let floor = fact(database, FLOOR)?.and_then(|floor| <[u8; 8]>::try_from(floor).ok());
    floor.map(u64::from_be_bytes).ok_or(StoreError::NotAStore)
}

/// Refuses a store that is not ours, and raises the floor of one that is.
fn settle(database: &Database, server: &PublicKey, floor: Option<u64>) -> Result<(), StoreError> {
    refuse_newer(database)?;
    refuse_other(database, server)?;
    floor.map_or(Ok(()), |floor| raise_floor(database, floor))
}

fn raise_floor(database: &Database, to: u64) -> Result<(), StoreError> {
    let floor = floor(database)?.max(to);
    let transaction = database.begin_write()?;
    transaction.open_table(FACTS)?.insert(FLOOR, floor.to_be_bytes().as_slice())?;
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

fn open(file: File, header: &Arc<Header>) -> Result<Database, StoreError> {
    // The lock goes with the file, and is not taken twice by its duplicates.
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(StoreError::InUse),
        Err(TryLockError::Error(error)) => return Err(StoreError::Failed(error)),
    }
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE);
    builder.set_check_integrity_on_open(true); // else redb believes what a damaged page says, or panics over it
    Ok(builder.create_with_backend(Pages { file, header: Arc::clone(header) })?)
}

/// In which of two places the last commit lies.
fn last_commit(file: &File) -> Option<u8> {
    let mut header = [0; LAST_COMMIT + 1];
    file.read_exact_at(&mut header, 0).ok()?;
    place(&header)
}

/// Where redb's header says so (its file format), and in which bit.
const LAST_COMMIT: usize = 9;
const PLACE: u8 = 1;

fn place(header: &[u8]) -> Option<u8> {
    header.get(LAST_COMMIT).map(|byte| byte & PLACE)
}

fn is_empty(mut file: &File) -> bool {
    file.seek(SeekFrom::End(0)).is_ok_and(|length| length == 0)
}

/// The pages of the store, through a descriptor and by calls that cannot name a file: the verifier may make no others.
#[derive(Debug)]
struct Pages {
    file: File,
    header: Arc<Header>,
}

impl StorageBackend for Pages {
    fn len(&self) -> io::Result<u64> {
        (&self.file).seek(SeekFrom::End(0))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(out, offset)?;
        if offset == 0 {
            self.header.overlay(out);
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.header.refuse_if_closed()?;
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.header.refuse_if_closed()?;
        self.header.write_unless_held(&self.file)?;
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.header.refuse_if_closed()?;
        if offset == 0 {
            self.header.keep(data);
            return Ok(());
        }
        self.file.write_all_at(data, offset)
    }
}

/// redb's header, which says which commit counts. It is kept back until all pages are written: whatever ends this process
/// between two writes, or a disk that is full by then, leaves no half commit. Only a loss of power can.
#[derive(Debug, Default)]
struct Header(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    bytes: Option<Vec<u8>>,
    /// Not written either when redb syncs.
    is_held: bool,
    /// Nothing is written any more.
    is_closed: bool,
}

impl Header {
    /// One that stays as it is on the disk until it is let go.
    fn held_back() -> Self {
        Self(Mutex::new(Kept { is_held: true, ..Kept::default() }))
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, bytes: &[u8]) {
        self.kept().bytes = Some(bytes.to_vec());
    }

    fn overlay(&self, out: &mut [u8]) {
        let kept = self.kept();
        out.iter_mut().zip(kept.bytes.iter().flatten()).for_each(|(out, kept)| *out = *kept);
    }

    fn write_unless_held(&self, file: &File) -> io::Result<()> {
        let mut kept = self.kept();
        let bytes = if kept.is_held { None } else { kept.bytes.take() };
        bytes.map_or(Ok(()), |bytes| file.write_all_at(&bytes, 0))
    }

    /// Writes what was held back: first the pages that it speaks of must be durable, then it.
    fn let_go(&self, file: &File) -> io::Result<()> {
        file.sync_data()?;
        self.kept().is_held = false;
        self.write_unless_held(file)?;
        file.sync_data()
    }

    fn close(&self) {
        self.kept().is_closed = true;
    }

    fn refuse_if_closed(&self) -> io::Result<()> {
        if self.kept().is_closed { Err(io::ErrorKind::ReadOnlyFilesystem.into()) } else { Ok(()) }
    }

    fn last_commit(&self) -> Option<u8> {
        self.kept().bytes.as_deref().and_then(place)
    }
}

fn row(client: &PublicKey, server: &PublicKey) -> [u8; 64] {
    let mut row = [0; 64];
    let bytes = client.as_bytes().iter().chain(server.as_bytes());
    row.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    row
}
