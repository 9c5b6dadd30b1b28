//! knockq hides network services behind single-packet knocks.
pub mod cli;
pub mod client;
pub mod config;
pub mod crypto;
pub mod nft;
pub mod packet;
pub mod queue;
pub mod serve;
pub mod service;
pub mod verify;
