//! The whole table: loaded, compared, taken away.

use serde_json::Value;
use thiserror::Error;

use super::load::{NftError, list_frame, list_table, load};
use super::{Doors, ElementError, Ownership, Ruleset, TABLE};

/// Name of the table that is made for comparison only.
pub(super) const SHADOW: &str = "knockq_check";

/// Why the table is not as it should be.
#[derive(Debug, Error)]
pub enum TableError {
    /// nft did not do it.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// The kernel did not do it.
    #[error(transparent)]
    Element(#[from] ElementError),
}

/// Loads an include file, all or nothing; `true` if the table persists without an owner, so that a daemon can adopt it and
/// nobody else flush it then.
///
/// # Errors
/// [`TableError`]; what was there is there still.
pub fn install(ruleset: &str) -> Result<bool, TableError> {
    // Made and let go at once: nft fills the orphan, then the gate adopts it.
    let ownership = Doors::new()?.own_table()?;
    let persists = ownership != Ownership::Unsupported;
    // nft 1.0.6 cannot name such a table's flags, so it must not try to add it.
    let add_table = format!("add table inet {TABLE}\n");
    let loaded = if persists { load(&ruleset.replace(&add_table, "")) } else { load(ruleset) };
    if loaded.is_err() && ownership == Ownership::Made {
        let _ = Doors::new()?.delete_table(); // it is empty; the error that is reported is the cause
    }
    loaded?;
    Ok(persists)
}

/// Whether there is a table of ours, of whatever kind.
///
/// # Errors
/// When nft cannot list it.
pub fn exists() -> Result<bool, NftError> {
    match list_frame(TABLE) {
        Ok(_) => Ok(true),
        Err(NftError::NoTable) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the kernel's table is the one that this ruleset makes: the same sets, chains and rules, whatever doors are open.
///
/// # Errors
/// When nft cannot make the ruleset, or list it. That there is no table is no error.
pub fn is_live(ruleset: &Ruleset) -> Result<bool, NftError> {
    let Ok(live) = list_table(TABLE) else { return Ok(false) };
    let live_frame = list_frame(TABLE)?;
    let fresh = format!("add table inet {SHADOW}\ndelete table inet {SHADOW}\n");
    load(&(fresh.clone() + &ruleset.for_comparison()))?;
    let (shadow, shadow_frame) = (list_table(SHADOW), list_frame(SHADOW));
    load(&fresh)?;
    Ok(is_as_it_should_be([&live, &live_frame, &shadow?, &shadow_frame?]))
}

/// Whether the table that is there is like the one that was made for comparison: each as JSON, and as text.
pub fn is_as_it_should_be([live, live_frame, shadow, shadow_frame]: [&str; 4]) -> bool {
    !live.is_empty()
        && !live_frame.lines().any(|line| is_flags(line) && line.contains("dormant"))
        && contents(live) == contents(shadow)
        && frame(live_frame).eq(frame(shadow_frame))
}

/// Whether a line says what kind of table this is; those of sets are further in.
fn is_flags(line: &str) -> bool {
    line.starts_with("\tflags ")
}

/// What a table says but for its name, its flags, and nft's remarks: newer ones tell the number of elements.
fn frame(listing: &str) -> impl Iterator<Item = &str> {
    let lines = listing.lines().skip(1).filter(|line| !is_flags(line) && !line.is_empty());
    lines.map(|line| line.split_once('#').map_or(line, |(said, _)| said).trim_end())
}

/// What a table is made of, as far as the ruleset says it.
fn contents(listing: &str) -> Vec<Value> {
    let listing: Value = serde_json::from_str(listing).unwrap_or_default();
    let objects = listing.get("nftables").and_then(Value::as_array).cloned().unwrap_or_default();
    objects.into_iter().filter_map(content).collect()
}

fn content(mut object: Value) -> Option<Value> {
    let (kind, about) = object.as_object_mut()?.iter_mut().next()?;
    if kind == "metainfo" || kind == "table" {
        return None;
    }
    let is_of_doors = about.get("flags").is_some_and(|flags| flags.to_string().contains("timeout"));
    let about = about.as_object_mut()?;
    about.remove("handle");
    about.remove("table");
    about.remove("count"); // the elements, as nft 1.1.7 tells
    if is_of_doors {
        about.remove("elem");
    } else if let Some(elements) = about.get_mut("elem").and_then(Value::as_array_mut) {
        elements.sort_by_key(Value::to_string); // a hash table has no order
    }
    Some(object)
}
