//! Settings that root hands to a child, as memory that nobody can change any more.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use serde::Serialize;
use serde::de::DeserializeOwned;
use zeroize::Zeroizing;

/// What nobody can do to it any more.
const SEALS: SealFlags = SealFlags::WRITE.union(SealFlags::GROW).union(SealFlags::SHRINK).union(SealFlags::SEAL);

/// Bytes at most: ten thousand users take a few million.
const MAX_LEN: u64 = 256 << 20;

/// Writes a value to sealed memory.
///
/// # Errors
/// The kernel's.
pub fn seal<T: Serialize>(value: &T) -> io::Result<OwnedFd> {
    seal_bytes(&Zeroizing::new(postcard::to_stdvec(value).map_err(io::Error::other)?))
}

/// Writes bytes to sealed memory.
///
/// # Errors
/// The kernel's.
pub fn seal_bytes(bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut memory = File::from(memfd_create("knockq", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    memory.write_all(bytes)?;
    memory.rewind()?;
    fcntl_add_seals(&memory, SEALS)?;
    Ok(memory.into())
}

/// Reads the value back, and closes the memory.
///
/// # Errors
/// When it is no sealed memory, which could change or never end, or does not hold such a value.
pub fn unseal<T: DeserializeOwned>(memory: OwnedFd) -> io::Result<T> {
    postcard::from_bytes(&unseal_bytes(memory)?).map_err(io::Error::other)
}

/// Reads a text back, and closes the memory.
///
/// # Errors
/// As [`unseal`].
pub fn unseal_text(memory: OwnedFd) -> io::Result<String> {
    String::from_utf8(unseal_bytes(memory)?.to_vec()).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Reads bytes back, and closes the memory.
///
/// # Errors
/// When it is no sealed memory, which could change or never end.
pub fn unseal_bytes(memory: OwnedFd) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut memory = File::from(memory);
    if !fcntl_get_seals(&memory)?.contains(SEALS) || memory.seek(SeekFrom::End(0))? > MAX_LEN {
        return Err(io::ErrorKind::InvalidData.into());
    }
    memory.rewind()?;
    let mut bytes = Zeroizing::new(Vec::new());
    // Without `take`, std would ask for the file's metadata, which is no call for a process without files.
    memory.take(MAX_LEN).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::{File, MAX_LEN, MemfdFlags, OwnedFd, SEALS, SealFlags, fcntl_add_seals, memfd_create, seal, unseal};

    fn memory(seals: SealFlags) -> File {
        let memory = File::from(memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap());
        fcntl_add_seals(&memory, seals).unwrap();
        memory
    }

    #[test]
    fn a_value_survives_the_way() {
        assert_eq!(unseal::<Vec<u32>>(seal(&vec![1_u32, 2, 3]).unwrap()).unwrap(), [1, 2, 3]);
    }

    #[test]
    fn what_could_change_or_never_end_is_not_read() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(&[0]).unwrap();
        drop(writer);
        assert!(unseal::<u8>(reader.into()).is_err(), "a pipe, which need not end");
        for missing in [SealFlags::WRITE, SealFlags::GROW, SealFlags::SHRINK, SealFlags::SEAL] {
            let memory = memory(SealFlags::empty());
            (&memory).write_all(&[0]).unwrap();
            fcntl_add_seals(&memory, SEALS - missing).unwrap();
            assert!(unseal::<u8>(OwnedFd::from(memory)).is_err(), "{missing:?}");
        }
        let large = memory(SealFlags::empty());
        large.set_len(MAX_LEN + 1).unwrap();
        fcntl_add_seals(&large, SEALS).unwrap();
        assert!(unseal::<u8>(large.into()).is_err());
    }
}
