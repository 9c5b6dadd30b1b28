//! What lies below a directory.

use std::fs;
use std::path::{Path, PathBuf};

/// All that is no directory, in order.
pub fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let nested = entries.map(|path| if path.is_dir() { files(&path) } else { vec![path] });
    let mut found: Vec<PathBuf> = nested.flatten().collect();
    found.sort();
    found
}
