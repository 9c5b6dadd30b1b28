//! A SYN as bytes: read from the queue, and built as this host's kernel would build it.
//!
//! Pure: bytes in, fields out, and back. Nothing here can panic on any input.

pub mod persona;
pub mod syn;

pub use persona::{Flow, KernelSettings, Persona, PersonaError};
pub use syn::{NotSyn, Syn};
