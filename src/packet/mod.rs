//! A SYN as bytes: read from the queue, and made as this host's kernel builds one, or as knockknock does.
//!
//! Pure: bytes in, fields out, and back. Nothing here can panic on any input.

pub mod knockknock;
pub mod persona;
pub mod syn;

pub use persona::{Flow, Persona, PersonaError, Route};
pub use syn::{NotSyn, Syn};
