//! Running nft, for what is done now and then: loading and listing. Doors are opened through [`super::elements`].

use std::io::{self, Write};
use std::process::{Command, Output, Stdio};

use thiserror::Error;

use super::TABLE;

/// Where every distribution has it; never looked up by name, for this runs as root.
const NFT: &str = "/usr/sbin/nft";

/// A table that holds a queue statement and nothing else: if nft refuses this, the kernel lacks `nft_queue`.
const PROBE: &str = "table inet knockq_probe {\n chain c {\n queue num 65535\n }\n}\n";

/// Why nft did not do it.
#[derive(Debug, Error)]
pub enum NftError {
    /// Not installed.
    #[error("{NFT}: not found")]
    Missing,
    /// It could not be run.
    #[error("{NFT}: {0}")]
    Run(#[from] io::Error),
    /// The kernel has no queue statement for nft.
    #[error("nft: this kernel has no `queue` statement (CONFIG_NFT_QUEUE)")]
    NoQueueStatement,
    /// The table is not there.
    #[error("nft: there is no table inet {TABLE}")]
    NoTable,
    /// nft lists a set in words that we do not know.
    #[error("nft: cannot read the listing of set {set}: {cause}")]
    Unreadable {
        /// Which.
        set: &'static str,
        /// At what.
        cause: String,
    },
    /// The kernel did not allow it.
    #[error("nft: {0}")]
    NotPermitted(String),
    /// It refused, and said this.
    #[error("nft: {0}")]
    Refused(String),
}

/// Applies a ruleset, all or nothing.
///
/// # Errors
/// With what nft said.
pub fn load(ruleset: &str) -> Result<(), NftError> {
    run(&["-f", "-"], ruleset).map(drop).map_err(explain)
}

/// Lets nft and the kernel check a ruleset without applying it.
///
/// # Errors
/// With what nft said.
pub fn check(ruleset: &str) -> Result<(), NftError> {
    run(&["-c", "-f", "-"], ruleset).map(drop).map_err(explain)
}

/// A table of family inet, as JSON.
pub(super) fn list_table(table: &str) -> Result<String, NftError> {
    run(&["-j", "list", "table", "inet", table], "").map_err(missing)
}

/// The same as text and without elements. It has what nft's JSON leaves out: the table's flags, and in nft 0.9.8 what limits
/// a set.
pub(super) fn list_frame(table: &str) -> Result<String, NftError> {
    run(&["-t", "list", "table", "inet", table], "").map_err(missing)
}

/// One of our sets, as JSON.
pub(super) fn list_set(set: &str) -> Result<String, NftError> {
    run(&["-j", "list", "set", "inet", TABLE, set], "").map_err(missing)
}

fn missing(error: NftError) -> NftError {
    match error {
        NftError::Refused(said) if said.contains("No such file or directory") => NftError::NoTable,
        other => other,
    }
}

/// nft says only `No such file or directory` when a statement's module is missing, so ask it about that alone.
fn explain(error: NftError) -> NftError {
    match error {
        NftError::Refused(_) if run(&["-c", "-f", "-"], PROBE).is_err() => NftError::NoQueueStatement,
        other => other,
    }
}

fn run(arguments: &[&str], input: &str) -> Result<String, NftError> {
    let mut child = Command::new(NFT)
        .args(arguments)
        .env_clear()
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| if error.kind() == io::ErrorKind::NotFound { NftError::Missing } else { error.into() })?;
    // nft reads all of its input before it says anything; if it has died, its status tells more than the broken pipe.
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(input.as_bytes());
    }
    let Output { status, stdout, stderr } = child.wait_with_output()?;
    if status.success() {
        return Ok(String::from_utf8_lossy(&stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&stderr).trim_end().to_owned();
    let said = if said.is_empty() { status.to_string() } else { said };
    Err(if said.contains("Operation not permitted") { NftError::NotPermitted(said) } else { NftError::Refused(said) })
}
