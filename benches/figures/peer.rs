//! Peers.
use crate::{Row, Scale};
pub fn rows(_: &Scale) -> Vec<Row> { Vec::new() }
