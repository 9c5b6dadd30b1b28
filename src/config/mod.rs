//! Files that an administrator or a user edits, parsed once into types that hold only what is right.

pub mod diagnostic;
pub mod duration;
pub mod knockknock;
mod limits;
pub mod moment;
pub mod network;
pub mod secure_file;
pub mod server;
pub mod users;

pub use crate::verify::open_for;
pub use diagnostic::{ConfigError, Diagnostic};
pub use duration::Seconds;
pub use knockknock::Knockknock;
pub use moment::Moment;
pub use network::Network;
pub use secure_file::FileError;
pub use server::ServerConfig;
