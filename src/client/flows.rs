//! Flows of knocks, so that none is used twice within a boot.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::issued::lock;
use crate::config::FileError;
use crate::config::secure_file::{self, Privacy};

/// Flows of this boot that are remembered.
const FLOWS: usize = 4096;

/// Names one boot of this kernel.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The flows of knocks sent since this machine booted: within a boot the kernel's sequence numbers of a repeated flow are
/// on a line, and a token is not.
pub(super) struct FlowFile {
    path: PathBuf,
    boot: String,
    flows: Vec<String>,
    _lock: File,
}

impl FlowFile {
    /// Locks and reads the file; flows of an earlier boot are forgotten. `tell` is as for [`super::issued::IssuedFile::open`].
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn open(directory: &Path, tell: impl FnOnce(&Path)) -> Result<Self, FileError> {
        secure_file::create_directory(directory)?;
        let path = directory.join("flows");
        let lock = lock(&directory.join("flows.lock"), tell)?;
        let boot = fs::read_to_string(BOOT_ID).map_err(|cause| FileError::io(Path::new(BOOT_ID), cause))?;
        let boot = boot.trim().to_owned();
        let text = secure_file::read_if_there(&path, Privacy::Secret)?;
        let flows = text.as_ref().and_then(|text| text.strip_prefix(&boot));
        let flows = flows.map(|rest| rest.lines().filter(|line| !line.is_empty()));
        let flows = flows.map(|lines| lines.map(str::to_owned).collect()).unwrap_or_default();
        Ok(Self { path, boot, flows, _lock: lock })
    }

    /// Whether a knock used this flow.
    pub(super) fn contains(&self, source: SocketAddr, destination: SocketAddr) -> bool {
        self.flows.contains(&format!("{source} {destination}"))
    }

    /// Remembers a flow.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn record(&mut self, source: SocketAddr, destination: SocketAddr) -> Result<(), FileError> {
        self.flows.push(format!("{source} {destination}"));
        let surplus = self.flows.len().saturating_sub(FLOWS);
        self.flows.drain(..surplus);
        secure_file::replace(&self.path, &format!("{}\n{}\n", self.boot, self.flows.join("\n")), Privacy::Secret)
    }
}
