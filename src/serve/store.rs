//! The last accepted counter of every key, on disk (docs/protocol.md section 2).
//!
//! The file is made by `init` together with the server's key, whose public half it carries: a store of another server, or
//! none, would let old knocks be replayed.

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use redb::{Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};
use thiserror::Error;

use crate::crypto::PublicKey;
use crate::verify::{Ledger, Reservation};

mod origin;

pub use origin::Origin;

/// client_public || server_public -> last accepted n.
const COUNTERS: TableDefinition<'_, [u8; 64], u64> = TableDefinition::new("counters");

/// Facts about the store itself.
const FACTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("facts");

/// The server's public key.
const SERVER: &str = "server_public";

/// No n up to this one is accepted for any key, 8 bytes big-endian.
const FLOOR: &str = "floor";

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
    /// Reading or writing failed.
    #[error("{0}")]
    Database(#[from] redb::Error),
}

/// An open store.
pub struct Store {
    /// `None` after a failed write: redb refuses all others until it is opened anew.
    database: Option<Database>,
    file: File,
    server: PublicKey,
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
        let origin = Origin::of(&file).map_err(redb::Error::Io)?;
        let database = open(file)?;
        let floor = remains.floor.max(floor);
        let transaction = database.begin_write().map_err(redb::Error::from)?;
        {
            let mut facts = transaction.open_table(FACTS).map_err(redb::Error::from)?;
            facts.insert(SERVER, server.as_bytes().as_slice()).map_err(redb::Error::from)?;
            facts.insert(FLOOR, floor.to_be_bytes().as_slice()).map_err(redb::Error::from)?;
            facts.insert(origin::ORIGIN, origin.as_bytes()).map_err(redb::Error::from)?;
            let mut counters = transaction.open_table(COUNTERS).map_err(redb::Error::from)?;
            for (row, n) in &remains.rows {
                counters.insert(row, n).map_err(redb::Error::from)?;
            }
        }
        transaction.commit().map_err(redb::Error::from)?;
        Ok(())
    }

    /// Opens the store of this server.
    ///
    /// # Errors
    /// When it is not one, or another server's.
    pub fn open(file: File, server: PublicKey) -> Result<Self, StoreError> {
        // redb would make a new, empty database of an empty file.
        if is_empty(&file) {
            return Err(StoreError::NotAStore);
        }
        let mut store = Self { database: None, file, server };
        match fact(store.database()?, SERVER)? {
            Some(key) if key == *server.as_bytes() => Ok(store),
            Some(key) => {
                let key = <[u8; 32]>::try_from(key).ok().and_then(|key| PublicKey::try_from(key).ok());
                Err(key.map_or(StoreError::NotAStore, |key| StoreError::OtherServer(key.to_string())))
            }
            None => Err(StoreError::NotAStore),
        }
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
        let transaction = database.begin_read().map_err(redb::Error::from)?;
        let counters = transaction.open_table(COUNTERS).map_err(redb::Error::from)?;
        let last = |client: PublicKey| {
            let written = counters.get(row(&client, &server)).map_err(redb::Error::from)?;
            Ok((client, written.map_or(0, |n| n.value()).max(floor)))
        };
        known.map(last).collect()
    }

    fn database(&mut self) -> Result<&Database, StoreError> {
        if self.database.is_none() {
            let file = self.file.try_clone().map_err(|error| StoreError::Database(redb::Error::Io(error)))?;
            self.database = Some(open(file)?);
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
    /// When somebody has it open, or it is no store.
    ///
    /// # Panics
    /// redb does, over some kinds of damage.
    pub fn read(file: File) -> Result<Self, StoreError> {
        if is_empty(&file) {
            return Err(StoreError::NotAStore);
        }
        let mut database = open(file)?;
        // Else redb believes what a damaged page says.
        database.check_integrity().map_err(|error| StoreError::Database(error.into()))?;
        let floor = floor(&database)?;
        let transaction = database.begin_read().map_err(redb::Error::from)?;
        let counters = transaction.open_table(COUNTERS).map_err(redb::Error::from)?;
        let rows = counters.iter().map_err(redb::Error::from)?.map(|row| {
            let (row, n) = row.map_err(redb::Error::from)?;
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
    let mut transaction = database.begin_write().map_err(redb::Error::from)?;
    transaction.set_durability(Durability::Immediate).map_err(redb::Error::from)?;
    {
        let mut counters = transaction.open_table(COUNTERS).map_err(redb::Error::from)?;
        for reservation in batch {
            let row = row(reservation.client(), server);
            let written = counters.get(row).map_err(redb::Error::from)?.map(|n| n.value());
            if written.is_none_or(|n| n < reservation.n()) {
                counters.insert(row, reservation.n()).map_err(redb::Error::from)?;
            }
        }
    }
    transaction.commit().map_err(redb::Error::from)?;
    Ok(())
}

fn floor(database: &Database) -> Result<u64, StoreError> {
    let floor = fact(database, FLOOR)?.and_then(|floor| <[u8; 8]>::try_from(floor).ok());
    floor.map(u64::from_be_bytes).ok_or(StoreError::NotAStore)
}

fn fact(database: &Database, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
    let transaction = database.begin_read().map_err(redb::Error::from)?;
    let facts = transaction.open_table(FACTS).map_err(|_| StoreError::NotAStore)?;
    let fact = facts.get(name).map_err(redb::Error::from)?;
    Ok(fact.map(|value| value.value().to_vec()))
}

fn open(file: File) -> Result<Database, StoreError> {
    let refuse = |error| match error {
        DatabaseError::Storage(redb::StorageError::Io(error)) if error.kind() == io::ErrorKind::InvalidData => {
            StoreError::NotAStore
        }
        other => StoreError::Database(other.into()),
    };
    // The lock goes with the file, and is not taken twice by its duplicates.
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(StoreError::InUse),
        Err(TryLockError::Error(error)) => return Err(StoreError::Database(redb::Error::Io(error))),
    }
    Database::builder().set_cache_size(CACHE).create_with_backend(Pages(file)).map_err(refuse)
}

fn is_empty(mut file: &File) -> bool {
    file.seek(SeekFrom::End(0)).is_ok_and(|length| length == 0)
}

/// The pages of the store, through a descriptor and by calls that cannot name a file: the verifier may make no others.
#[derive(Debug)]
struct Pages(File);

impl StorageBackend for Pages {
    fn len(&self) -> io::Result<u64> {
        (&self.0).seek(SeekFrom::End(0))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(out, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }
}

fn row(client: &PublicKey, server: &PublicKey) -> [u8; 64] {
    let mut row = [0; 64];
    let bytes = client.as_bytes().iter().chain(server.as_bytes());
    row.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    row
}

#[cfg(test)]
mod power;
