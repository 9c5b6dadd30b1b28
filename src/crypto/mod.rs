//! The cryptography of a knock: keys, and the eight bytes of a token.
//!
//! Pure: no file, no clock, no socket. `docs/protocol.md` is the specification, `tests/vectors/` its worked examples.

pub mod keys;
pub mod knockknock;
pub mod ports;
pub mod secret;
pub mod token;

pub use keys::{KeyError, KnockSecrets, PresharedKey, PrivateKey, PublicKey, Side};
pub use ports::{KnockPorts, KnockPortsError};
pub use secret::Secret;
pub use token::{Binding, KnockKey, Opened, Pad, Token};
