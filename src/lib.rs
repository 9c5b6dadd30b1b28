//! knockq hides network services behind single-packet knocks.
pub mod crypto;
pub mod packet;
pub mod service;
pub mod verify;
