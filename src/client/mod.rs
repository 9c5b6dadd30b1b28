//! The client: profiles of the hosts one knocks at, counters, and the one packet.

pub mod address;
pub mod aim;
pub mod checks;
pub mod clock;
pub mod connect;
mod flows;
pub mod home;
pub mod host;
pub mod issued;
pub mod port;
pub mod proxy;
pub mod race;
pub mod route;
pub mod send;
pub mod socks;
pub mod specimen;

pub use aim::{Aim, AimError, Family, Request, Source};
pub use connect::ConnectError;
pub use home::{Home, HomeError};
pub use host::{KnockknockProfile, KnockknockTerms, Profile, ProfileError, TokenProfile};
pub use send::{SendError, Sent};
