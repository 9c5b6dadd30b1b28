//! Reading files that decide over access: only regular ones, of the right owner, that nobody else can change.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{self, Component, Path, PathBuf};

use rustix::fs::{CWD, OFlags, RenameFlags, renameat_with};
use rustix::io::Errno;
use rustix::process::geteuid;
use thiserror::Error;
use zeroize::Zeroizing;

/// Bytes of the largest file that is read.
const MAX_LEN: u64 = 1 << 20;

/// Mode bits: writable by the group or by others.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// Mode bits: anything at all for the group or for others.
const OPEN_TO_OTHERS: u32 = 0o077;

/// Mode bit: in this directory only owners may rename and delete (`/tmp`).
const STICKY: u32 = 0o1000;

/// Why a file is refused. The path comes first in every message.
#[derive(Debug, Error)]
pub enum FileError {
    /// It cannot be opened or read.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },
    /// A link, directory, device, pipe or socket.
    #[error("{}: is not a regular file", path.display())]
    NotRegular {
        /// The file.
        path: PathBuf,
    },
    /// It belongs to another user.
    #[error("{}: belongs to uid {uid}, not to root or to you", path.display())]
    Owner {
        /// The file or directory.
        path: PathBuf,
        /// Its owner.
        uid: u32,
    },
    /// A secret that others can read.
    #[error("{}: must not be readable by others (mode {mode:04o})", path.display())]
    Readable {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Others can change it, or put another in its place.
    #[error("{}: must not be writable by others (mode {mode:04o})", path.display())]
    Writable {
        /// The file or a directory above it.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Longer than any such file should be.
    #[error("{}: is larger than 1 MiB", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Not text.
    #[error("{}: is not UTF-8 text", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
    },
    /// As a crash of the machine or a full disk leaves it behind.
    #[error("{}: is empty", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// What stands where a directory should, or a link that leads to none.
    #[error("{}: is not a directory", path.display())]
    NotDirectory {
        /// It, on the way to the file.
        path: PathBuf,
    },
}

impl FileError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Readable { path, .. } => Some(format!("chmod 600 {}", path.display())),
            Self::Writable { path, .. } => Some(format!("chmod go-w {}", path.display())),
            Self::Owner { path, .. } => Some(format!("chown {} {}", geteuid().as_raw(), path.display())),
            Self::Io { cause, .. } if cause.kind() == io::ErrorKind::PermissionDenied => {
                Some("check its owner and those of the directories above, or run this as root".to_owned())
            }
            Self::Io { .. } if self.is_of_disk() => {
                Some("look at the disk, with `df` and `mount`, and do this again".to_owned())
            }
            Self::Io { .. } => None,
            Self::NotRegular { .. } => {
                Some("put a file in its place: links, devices, pipes and sockets are not read".to_owned())
            }
            Self::NotDirectory { .. } => Some("put a directory in its place".to_owned()),
            Self::TooLarge { .. } | Self::NotText { .. } | Self::Empty { .. } => {
                Some("restore it from a backup, or move it away and make it anew".to_owned())
            }
        }
    }

    /// The kernel's kind of error, if it was the kernel that refused.
    pub fn kind(&self) -> Option<io::ErrorKind> {
        match self {
            Self::Io { cause, .. } => Some(cause.kind()),
            _ => None,
        }
    }

    /// Whether the cause is a missing privilege of the caller.
    pub fn is_permission(&self) -> bool {
        self.kind() == Some(io::ErrorKind::PermissionDenied)
    }

    /// Whether the disk takes no writes, which has nothing to do with what is in the file.
    pub fn is_of_disk(&self) -> bool {
        use io::ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
        matches!(self.kind(), Some(StorageFull | QuotaExceeded | ReadOnlyFilesystem))
    }

    pub(crate) fn io(path: &Path, cause: impl Into<io::Error>) -> Self {
        Self::Io { path: path.to_owned(), cause: cause.into() }
    }
}

/// Who may read a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Privacy {
    /// Its owner alone.
    Secret,
    /// Anyone.
    Public,
}

/// Reads a whole text file, after all checks on it and on every directory above it.
///
/// # Errors
/// [`FileError`].
pub fn read(path: &Path, privacy: Privacy) -> Result<Zeroizing<String>, FileError> {
    let file = open(path, privacy, OpenOptions::new().read(true))?;
    let path = || path.to_owned();
    // Its length may change until it is read, so reading has a limit of its own.
    if file.metadata().is_ok_and(|metadata| metadata.len() > MAX_LEN) {
        return Err(FileError::TooLarge { path: path() });
    }
    let mut text = Zeroizing::new(String::new());
    match file.take(MAX_LEN + 1).read_to_string(&mut text) {
        Ok(0) => Err(FileError::Empty { path: path() }),
        Ok(length) if u64::try_from(length).is_ok_and(|length| length > MAX_LEN) => {
            Err(FileError::TooLarge { path: path() })
        }
        Ok(_) => Ok(text),
        Err(cause) if cause.kind() == io::ErrorKind::InvalidData => Err(FileError::NotText { path: path() }),
        Err(cause) => Err(FileError::Io { path: path(), cause }),
    }
}

/// As [`read`]; nothing if there is no such file. A link that leads nowhere is not "no file".
///
/// # Errors
/// [`FileError`].
pub fn read_if_there(path: &Path, privacy: Privacy) -> Result<Option<Zeroizing<String>>, FileError> {
    match read(path, privacy) {
        Err(error) if error.kind() == Some(io::ErrorKind::NotFound) => Ok(None),
        other => other.map(Some),
    }
}

/// What is in a directory, after all checks on it and on every directory above it; nothing if there is no such directory.
///
/// # Errors
/// [`FileError`].
pub fn entries(directory: &Path) -> Result<Vec<PathBuf>, FileError> {
    let fail = |cause| FileError::io(directory, cause);
    match fs::symlink_metadata(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(fail)?,
    };
    checked(directory, directory)?;
    let entries = fs::read_dir(directory).map_err(fail)?;
    entries.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>().map_err(fail)
}

/// Opens a file, after all checks on it and on every directory above it.
///
/// # Errors
/// [`FileError`].
pub fn open(path: &Path, privacy: Privacy, options: &mut OpenOptions) -> Result<File, FileError> {
    let directory = check_directories(path)?;
    let resolved = directory.join(path.file_name().unwrap_or_default());
    // Says what is wrong also where opening is not allowed, and opens no device. What is opened is looked at again.
    if let Ok(metadata) = fs::symlink_metadata(&resolved) {
        check_file(path, &metadata, privacy)?;
    }
    // O_NONBLOCK: opening a pipe must not wait for its other end. O_NOCTTY: a terminal must not become this process's.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let file = options.custom_flags(flags).open(resolved).map_err(|cause| match Errno::from_io_error(&cause) {
        Some(Errno::LOOP | Errno::ISDIR | Errno::NXIO) => FileError::NotRegular { path: path.to_owned() },
        _ => FileError::io(path, cause),
    })?;
    let metadata = file.metadata().map_err(|cause| FileError::io(path, cause))?;
    check_file(path, &metadata, privacy)?;
    Ok(file)
}

/// Makes a file that must not be there yet, with these contents, on disk before this returns; all or nothing, whatever
/// happens meanwhile.
///
/// # Errors
/// [`FileError`], also if it exists.
pub fn create(path: &Path, contents: &str, privacy: Privacy) -> Result<(), FileError> {
    let draft = written(path, contents, privacy)?;
    link(&draft.temporary, path)
}

/// Puts a new file in the place of an old one, at once and durably.
///
/// # Errors
/// [`FileError`]; the old file is whole then.
pub fn replace(path: &Path, contents: &str, privacy: Privacy) -> Result<(), FileError> {
    written(path, contents, privacy)?.install()
}

fn written(path: &Path, contents: &str, privacy: Privacy) -> Result<Draft, FileError> {
    let (draft, mut file) = Draft::new(path, privacy)?;
    file.write_all(contents.as_bytes()).and_then(|()| file.sync_all()).map_err(|cause| FileError::io(path, cause))?;
    Ok(draft)
}

/// A file in the making. It has a name that nothing reads, in the directory where it is to be, and is gone when this is
/// dropped.
pub struct Draft {
    temporary: PathBuf,
    path: PathBuf,
}

impl Draft {
    /// Makes the empty file that is to be at `path`.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn new(path: &Path, privacy: Privacy) -> Result<(Self, File), FileError> {
        check_directories(path)?;
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.new", std::process::id()));
        let draft = Self { temporary: path.with_file_name(name), path: path.to_owned() };
        let mode = if privacy == Privacy::Secret { 0o600 } else { 0o644 };
        let _ = fs::remove_file(&draft.temporary); // of a process of this number that died
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(mode).open(&draft.temporary);
        let file = file.map_err(|cause| FileError::io(path, cause))?;
        Ok((draft, file))
    }

    /// Puts it in its place, durably and at once, also if there is another. Its contents must be on disk.
    ///
    /// # Errors
    /// [`FileError`]; the other file is whole then.
    pub fn install(self) -> Result<(), FileError> {
        let moved = fs::rename(&self.temporary, &self.path).and_then(|()| sync_parent(&self.path));
        moved.map_err(|cause| FileError::io(&self.path, cause))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.temporary); // nothing is there once it is installed
    }
}

/// Gives a file a second name, durably.
///
/// # Errors
/// [`FileError`] with the second name, also if there is such a file.
fn link(path: &Path, second: &Path) -> Result<(), FileError> {
    fs::hard_link(path, second).and_then(|()| sync_parent(second)).map_err(|cause| FileError::io(second, cause))
}

/// Takes a file away, durably. Nothing of it is looked at: what is broken can be removed too.
///
/// # Errors
/// [`FileError`], also if there is none.
pub fn remove(path: &Path) -> Result<(), FileError> {
    fs::remove_file(path).and_then(|()| sync_parent(path)).map_err(|cause| FileError::io(path, cause))
}

/// Gives a file another name in one step, durably: nobody sees both names or none.
///
/// # Errors
/// [`FileError`] with the path that it is about, also if `from` is missing or `to` exists.
pub fn rename(from: &Path, to: &Path) -> Result<(), FileError> {
    renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE).map_err(|errno| {
        let path = if errno == Errno::EXIST { to } else { from };
        FileError::io(path, errno)
    })?;
    sync_parent(to).map_err(|cause| FileError::io(to, cause))
}

/// Makes a directory, and those above it, for its owner alone; one that is there is checked and left as it is.
///
/// # Errors
/// [`FileError`]; nothing is made below a directory that others could change.
pub fn create_directory(path: &Path) -> Result<(), FileError> {
    let absolute = path::absolute(path).map_err(|cause| FileError::io(path, cause))?;
    if let Some(there) = absolute.ancestors().find(|above| fs::symlink_metadata(above).is_ok()) {
        checked(there, path)?;
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|cause| FileError::io(path, cause))
}

fn sync_parent(path: &Path) -> io::Result<()> {
    File::open(parent(path))?.sync_all()
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Checks every directory above a file; the one that it is in, without links.
fn check_directories(path: &Path) -> Result<PathBuf, FileError> {
    checked(parent(path), path)
}

/// Walks to a directory, on behalf of the file `path`, and checks each directory on the way; it, without links. A link is
/// followed if its owner is one of the two, and so is what it leads through; the directory that holds it was checked.
fn checked(directory: &Path, path: &Path) -> Result<PathBuf, FileError> {
    let fail = |cause| FileError::io(path, cause);
    let absolute = path::absolute(directory).map_err(fail)?;
    let mut ahead = steps(&absolute);
    let mut reached = PathBuf::from("/");
    check_directory(&reached, &fs::metadata(&reached).map_err(fail)?)?;
    while let Some(step) = ahead.pop() {
        if step == ".." {
            reached.pop();
            continue;
        }
        let next = reached.join(step);
        let metadata = fs::symlink_metadata(&next).map_err(fail)?;
        if !metadata.is_symlink() {
            check_directory(&next, &metadata)?;
            reached = next;
            continue;
        }
        check_owner(&next, &metadata)?;
        check_leads_to_directory(&next, path)?;
        let target = fs::read_link(&next).map_err(fail)?;
        if target.is_absolute() {
            reached = PathBuf::from("/");
        }
        ahead.extend(steps(&target));
    }
    Ok(reached)
}

/// The names in a path, the last first, so that the next one is at the end.
fn steps(path: &Path) -> Vec<OsString> {
    let is_step = |component: &Component<'_>| matches!(component, Component::Normal(_) | Component::ParentDir);
    path.components().rev().filter(is_step).map(|component| component.as_os_str().to_owned()).collect()
}

/// A link that leads nowhere, or round in a circle, ends here.
fn check_leads_to_directory(link: &Path, path: &Path) -> Result<(), FileError> {
    match fs::metadata(link) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Err(cause) if cause.kind() == io::ErrorKind::PermissionDenied => Err(FileError::io(path, cause)),
        _ => Err(FileError::NotDirectory { path: link.to_owned() }),
    }
}

fn check_directory(path: &Path, metadata: &Metadata) -> Result<(), FileError> {
    if !metadata.is_dir() {
        return Err(FileError::NotDirectory { path: path.to_owned() });
    }
    check_owner(path, metadata)?;
    let mode = metadata.mode() & 0o7777;
    if mode & WRITABLE_BY_OTHERS != 0 && mode & STICKY == 0 {
        return Err(FileError::Writable { path: path.to_owned(), mode });
    }
    Ok(())
}

fn check_file(path: &Path, metadata: &Metadata, privacy: Privacy) -> Result<(), FileError> {
    if !metadata.is_file() {
        return Err(FileError::NotRegular { path: path.to_owned() });
    }
    check_owner(path, metadata)?;
    let mode = metadata.mode() & 0o7777;
    if privacy == Privacy::Secret && mode & OPEN_TO_OTHERS != 0 {
        return Err(FileError::Readable { path: path.to_owned(), mode });
    }
    if mode & WRITABLE_BY_OTHERS != 0 {
        return Err(FileError::Writable { path: path.to_owned(), mode });
    }
    Ok(())
}

fn check_owner(path: &Path, metadata: &Metadata) -> Result<(), FileError> {
    match metadata.uid() {
        0 => Ok(()),
        uid if uid == geteuid().as_raw() => Ok(()),
        uid => Err(FileError::Owner { path: path.to_owned(), uid }),
    }
}
