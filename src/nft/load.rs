//! Running nft, for what is done now and then: loading and listing. Doors are opened through [`super::elements`].

use std::io::{self, Write};
use std::process::{Command, Output, Stdio};

use thiserror::Error;

use super::TABLE;

/// Where every distribution has it; never looked up by name, for this runs as root.
const NFT: &str = "/usr/sbin/nft";

/// A word of the ruleset that kernels may lack, and nft too where it is old.
#[derive(Debug)]
pub struct Word {
    name: &'static str,
    /// The kernel's module for it, and its option.
    pub module: &'static str,
    option: &'static str,
    /// What stands in a ruleset that needs it.
    sign: &'static str,
    /// The contents of a table that needs it and nothing else.
    probe: &'static str,
}

/// Each is tried by itself, because no version number tells: distributions add to old kernels and leave out of new ones.
const WORDS: [Word; 4] = [
    Word {
        name: "`queue` statement",
        module: "nft_queue",
        option: "CONFIG_NFT_QUEUE",
        sign: "queue num",
        probe: "chain c { queue num 65535; };",
    },
    Word {
        name: "`limit` in a set",
        module: "nft_limit",
        option: "CONFIG_NFT_LIMIT",
        sign: "limit rate",
        probe: "set s { type ipv4_addr; size 1; flags dynamic,timeout; limit rate 1/week burst 1 packets; };",
    },
    Word {
        name: "`fib` expression",
        module: "nft_fib_inet",
        option: "CONFIG_NFT_FIB_INET",
        sign: "fib daddr",
        probe: "chain c { type filter hook prerouting priority 0; fib daddr type local; };",
    },
    Word {
        name: "`reject` before routing",
        module: "nft_reject_inet",
        option: "CONFIG_NFT_REJECT_INET",
        sign: "reject with",
        probe: "chain c { type filter hook prerouting priority 0; reject with icmpx type port-unreachable; };",
    },
];

/// Why nft did not do it.
#[derive(Debug, Error)]
pub enum NftError {
    /// Not installed.
    #[error("{NFT}: not found")]
    Missing,
    /// It could not be run.
    #[error("{NFT}: {0}")]
    Run(#[from] io::Error),
    /// The kernel has no such word for nft, or nft itself does not know it.
    #[error("nft: this kernel has no {} ({}), or this nft is too old for it", .0.name, .0.option)]
    Lacks(&'static Word),
    /// The table is not there.
    #[error("nft: there is no table inet {TABLE}")]
    NoTable,
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
    run(&["-f", "-"], ruleset).map(drop).map_err(|error| explain(error, ruleset))
}

/// Lets nft and the kernel check a ruleset without applying it.
///
/// # Errors
/// With what nft said.
pub fn check(ruleset: &str) -> Result<(), NftError> {
    run(&["-c", "-f", "-"], ruleset).map(drop).map_err(|error| explain(error, ruleset))
}

/// All tables of this host as text, without counters. Of rules that iptables made, nft's JSON tells no more than that they are
/// there; as text they are in nft's own words.
///
/// # Errors
/// With what nft said.
pub fn list_ruleset() -> Result<String, NftError> {
    run(&["-s", "list", "ruleset"], "")
}

/// The same without the elements of sets, of which there may be many.
///
/// # Errors
/// With what nft said.
pub fn list_rules() -> Result<String, NftError> {
    run(&["-s", "-t", "list", "ruleset"], "")
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

fn missing(error: NftError) -> NftError {
    match error {
        NftError::Refused(said) if said.contains("No such file or directory") => NftError::NoTable,
        other => other,
    }
}

/// nft says only `No such file or directory` when a module is missing, and points to lines that nobody has seen, so ask it
/// about each word alone.
fn explain(error: NftError, ruleset: &str) -> NftError {
    let NftError::Refused(said) = &error else { return error };
    let is_lacking = |word: &&Word| {
        let table = format!("table inet knockq_probe {{ {} }}\n", word.probe);
        ruleset.contains(word.sign) && run(&["-c", "-f", "-"], &table).is_err()
    };
    match WORDS.iter().find(is_lacking) {
        Some(word) => NftError::Lacks(word),
        None => NftError::Refused(with_its_line(said, ruleset)),
    }
}

/// What nft said, with the line that it is about, which nft 0.9.8 does not show.
fn with_its_line(said: &str, ruleset: &str) -> String {
    let number = said.split(':').nth(1).and_then(|number| number.parse::<usize>().ok());
    let line = number.and_then(|number| ruleset.lines().nth(number.checked_sub(1)?));
    line.filter(|line| !said.contains(line)).map_or_else(|| said.to_owned(), |line| format!("{said}\n{line}"))
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
