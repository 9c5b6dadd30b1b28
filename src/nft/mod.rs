//! The kernel's side: the table, and the elements of its sets.

mod attributes;
pub mod boot;
pub mod comment;
mod conntrack;
pub mod elements;
pub mod flows;
pub mod list;
pub mod lister;
pub mod listing;
pub mod load;
pub mod ruleset;
pub mod sessions;
pub mod sets;
pub mod table;
pub mod watch;

pub use boot::Boot;
pub use comment::Comment;
pub use conntrack::track_sessions;
pub use elements::{Door, Doors, Element, ElementError, Ownership, Time};
pub use flows::{Ending, end, established};
pub use list::{Open, OpenDoor};
pub use lister::{Kernel, Lister};
pub use listing::{Listing, Query};
pub use load::{NftError, check, list_rules, list_ruleset};
pub use ruleset::{Ruleset, is_of_before, is_whole};
pub use sessions::{connected, sessions, without_door};
pub use sets::{Layout, Member, SetError, SetName};
pub use table::{TableError, exists, install, is_as_it_should_be, is_live};
pub use watch::{Loaded, Loss, Watch};

/// Name of the one table that is ours, of family `inet`.
pub const TABLE: &str = "knockq";
