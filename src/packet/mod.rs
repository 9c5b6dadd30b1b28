//! A SYN as bytes: read from the queue, and made from one that this host's kernel has built.
//!
//! Pure: bytes in, fields out, and back. Nothing here can panic on any input.

pub mod persona;
pub mod syn;

pub use persona::{Flow, Persona, PersonaError, Route};
pub use syn::{NotSyn, Syn};
