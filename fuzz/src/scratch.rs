//! Files and sockets for a target.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// A directory of this process, which others cannot change. It is left behind for `make clean`.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes it, in the directory that `fuzz/run` gives as TMPDIR.
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("knockq-fuzz-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a file that is its owner's alone.
    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, contents).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    }
}
