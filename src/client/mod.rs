//! The client: profiles of the hosts one knocks at, counters, and the one packet.

pub mod address;
pub mod clock;
mod confirm;
pub mod counter;
pub mod home;
pub mod host;
pub mod port;
pub mod route;
pub mod send;
pub mod specimen;

pub use home::{Home, HomeError};
pub use host::{Profile, ProfileError};
pub use send::{SendError, Sent};
