//! How `knockq serve` becomes root's program.

use std::convert::Infallible;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{self, Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use caps::{CapSet, Capability};
use rustix::fs::{Mode, OFlags};

use super::configuration::ServeError;
use super::log::Style;

/// Root's and the gate's programs.
const ROOT: &str = "knockq-root";
const GATE: &str = "knockq-gate";

/// Runs root's program in the place of this one; it has this one and the gate's as descriptors, so that an upgrade while it runs
/// changes nothing of what it starts.
///
/// # Errors
/// When this is not root's, or one of them is not there or cannot be run.
pub fn become_root(config: &Path, trial: Option<Duration>, style: Style) -> Result<Infallible, ServeError> {
    let may = caps::has_cap(None, CapSet::Effective, Capability::CAP_NET_ADMIN).unwrap_or(false);
    if !rustix::process::geteuid().is_root() || !may {
        return Err(ServeError::NotRoot);
    }
    close_fds::set_fds_cloexec(3, &[]); // what we inherited is not for root
    let own = fs::read_link("/proc/self/exe")?;
    let (root, gate) = (program(&own, ROOT)?, program(&own, GATE)?);
    let (knockq, gate) = (kept_open(Path::new("/proc/self/exe"))?, kept_open(&gate)?);
    let trial = trial.map_or("-".to_owned(), |trial| trial.as_secs().to_string());
    let mut command = Command::new(root);
    command.arg0("knockq serve").args([env!("CARGO_PKG_VERSION"), &trial]);
    command.args([&knockq, &gate].map(|program| program.as_raw_fd().to_string())).arg(path::absolute(config)?);
    command.args(style.flags());
    Err(command.exec().into())
}

/// A program beside this one, or where it is installed.
fn program(own: &Path, name: &str) -> Result<PathBuf, ServeError> {
    let installed = own.ancestors().nth(2).map(|prefix| prefix.join("libexec/knockq").join(name));
    let mut programs = [Some(own.with_file_name(name)), installed].into_iter().flatten();
    programs.find(|program| program.exists()).ok_or_else(|| ServeError::NoProgram { path: own.with_file_name(name) })
}

/// A descriptor that the next program has, too.
fn kept_open(program: &Path) -> Result<OwnedFd, ServeError> {
    Ok(rustix::fs::open(program, OFlags::RDONLY, Mode::empty()).map_err(std::io::Error::from)?)
}
