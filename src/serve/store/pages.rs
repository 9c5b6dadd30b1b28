//! The pages of a store, and its header, which is written last.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::StorageBackend;

/// Where redb's header says in which of two places the last commit lies, and in which bit; where these places begin, and how
/// long they are; and where in one of them the tables' root is named (`header.rs` of redb 4).
const LAST_COMMIT: usize = 9;
const PLACE: u8 = 1;
const PLACES: usize = 64;
const COMMIT: usize = 128;
const ROOT: Range<usize> = 8..40;

/// What the tables hold, all of it: the number of their root page and its checksum, which is over those of the pages below.
pub(super) type Root = [u8; 32];

/// What the tables hold by the commit that the header calls the last.
pub(super) fn root(pages: &impl StorageBackend) -> Option<Root> {
    let mut header = [0; PLACES + 2 * COMMIT];
    pages.read(0, &mut header).ok()?;
    root_in(&header)
}

fn root_in(header: &[u8]) -> Option<Root> {
    let place = usize::from(header.get(LAST_COMMIT)? & PLACE);
    let commit = header.get(PLACES..)?.chunks_exact(COMMIT).nth(place)?;
    commit.get(ROOT)?.try_into().ok()
}

/// Pages on the disk, through a descriptor and by calls that cannot name a file: the engine may make no others.
#[derive(Clone, Debug)]
pub(super) struct Pages(Arc<File>);

impl Pages {
    pub(super) fn of(file: File) -> Self {
        Self(Arc::new(file))
    }
}

impl StorageBackend for Pages {
    fn len(&self) -> io::Result<u64> {
        (&*self.0).seek(SeekFrom::End(0))
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

/// Pages whose header is written when all others are: whatever ends this process between two writes, or a disk that is full
/// by then, leaves no half commit. Only a loss of power can.
#[derive(Debug)]
pub(super) struct HeaderLast<P> {
    pages: P,
    header: Arc<Header>,
}

impl<P> HeaderLast<P> {
    pub(super) const fn new(pages: P, header: Arc<Header>) -> Self {
        Self { pages, header }
    }
}

impl<P: StorageBackend> StorageBackend for HeaderLast<P> {
    fn len(&self) -> io::Result<u64> {
        self.header.kept().len.map_or_else(|| self.pages.len(), Ok)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.pages.read(offset, out)?;
        if offset == 0 {
            self.header.overlay(out);
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.header.refuse_if_closed()?;
        if self.header.keep_if_shorter(len, self.pages.len()?) { Ok(()) } else { self.pages.set_len(len) }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.header.refuse_if_closed()?;
        self.header.write_unless_held(&self.pages)?;
        self.pages.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.header.refuse_if_closed()?;
        if offset == 0 {
            self.header.keep(data);
            return Ok(());
        }
        self.pages.write(offset, data)
    }
}

/// redb's header, which says which commit counts.
#[derive(Debug, Default)]
pub(super) struct Header(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    bytes: Option<Vec<u8>>,
    /// What the file is to be cut to, and already is for redb: the header on the disk may speak of pages beyond.
    len: Option<u64>,
    /// Not written either when redb syncs.
    is_held: bool,
    /// Nothing is written any more.
    is_closed: bool,
}

impl Header {
    /// One that stays as it is on the disk until it is let go.
    pub(super) fn held_back() -> Self {
        Self(Mutex::new(Kept { is_held: true, ..Kept::default() }))
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, bytes: &[u8]) {
        self.kept().bytes = Some(bytes.to_vec());
    }

    /// Whether the file is not to be cut, or grown, to this length now.
    fn keep_if_shorter(&self, len: u64, on_disk: u64) -> bool {
        let mut kept = self.kept();
        kept.len = (kept.is_held && len < on_disk).then_some(len);
        kept.len.is_some()
    }

    fn overlay(&self, out: &mut [u8]) {
        let kept = self.kept();
        out.iter_mut().zip(kept.bytes.iter().flatten()).for_each(|(out, kept)| *out = *kept);
    }

    fn write_unless_held(&self, pages: &impl StorageBackend) -> io::Result<()> {
        let mut kept = self.kept();
        let bytes = if kept.is_held { None } else { kept.bytes.take() };
        bytes.map_or(Ok(()), |bytes| pages.write(0, &bytes))
    }

    /// Writes what was held back: first the pages that it speaks of must be durable, then it, and then the file may be cut.
    pub(super) fn let_go(&self, pages: &impl StorageBackend) -> io::Result<()> {
        pages.sync_data()?;
        self.kept().is_held = false;
        self.write_unless_held(pages)?;
        pages.sync_data()?;
        let len = self.kept().len.take();
        len.map_or(Ok(()), |len| pages.set_len(len))
    }

    /// Nothing is written any more.
    pub(super) fn close(&self) {
        self.kept().is_closed = true;
    }

    fn refuse_if_closed(&self) -> io::Result<()> {
        if self.kept().is_closed { Err(io::ErrorKind::ReadOnlyFilesystem.into()) } else { Ok(()) }
    }

    /// What the tables hold by the commit that it calls the last.
    pub(super) fn root(&self) -> Option<Root> {
        self.kept().bytes.as_deref().and_then(root_in)
    }
}
