//! Settings that the keeper hands to a child, as memory that nobody can change any more.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use serde::Serialize;
use serde::de::DeserializeOwned;
use zeroize::Zeroizing;

/// Bytes of the largest value: ten thousand users take two million.
const MAX_LEN: u64 = 1 << 30;

/// Writes a value to sealed memory.
///
/// # Errors
/// The kernel's.
pub fn seal<T: Serialize>(value: &T) -> io::Result<OwnedFd> {
    let bytes = Zeroizing::new(postcard::to_stdvec(value).map_err(io::Error::other)?);
    let mut memory = File::from(memfd_create("knockq", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    memory.write_all(&bytes)?;
    memory.rewind()?;
    fcntl_add_seals(&memory, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(memory.into())
}

/// Reads the value back, and closes the memory.
///
/// # Errors
/// When it does not hold such a value.
pub fn unseal<T: DeserializeOwned>(memory: OwnedFd) -> io::Result<T> {
    let mut bytes = Zeroizing::new(Vec::new());
    // Without `take`, std would ask for the file's metadata, which is no call for a process without files.
    File::from(memory).take(MAX_LEN).read_to_end(&mut bytes)?;
    postcard::from_bytes(&bytes).map_err(io::Error::other)
}
