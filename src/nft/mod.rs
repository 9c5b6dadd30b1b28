//! The kernel's side: the table, and the elements of its sets.

pub mod elements;
pub mod list;
pub mod load;
pub mod ruleset;
pub mod table;
pub mod watch;

pub use elements::{Door, Doors, ElementError, Ownership};
pub use list::{OpenDoor, open_doors};
pub use load::{NftError, check};
pub use ruleset::{Ruleset, is_whole};
pub use table::{TableError, install, is_live, remove};
pub use watch::{Loss, Watch};

/// Name of the one table that is ours, of family `inet`.
pub const TABLE: &str = "knockq";
