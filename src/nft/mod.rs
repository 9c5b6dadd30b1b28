//! The kernel's side: the table, and the elements of its sets.

pub mod elements;
pub mod load;
pub mod ruleset;
pub mod watch;

pub use elements::{Door, Doors, ElementError, Ownership};
pub use load::{NftError, check, load};
pub use ruleset::Ruleset;
pub use watch::Watch;

/// Name of the one table that is ours, of family `inet`.
pub const TABLE: &str = "knockq";
