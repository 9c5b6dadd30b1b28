//! The daemon: three processes, re-executed from one binary.
pub mod frames;
pub mod sandbox;
pub mod store;
