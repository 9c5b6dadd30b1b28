//! What the verifier is told by the child that reads the configuration.

use serde::{Deserialize, Serialize};

use super::sandbox::Identity;
use crate::crypto::PublicKey;
use crate::verify::Registry;

/// The verifier's settings.
#[derive(Serialize, Deserialize)]
pub struct Settings {
    /// Whom it becomes.
    pub identity: Identity,
    /// The server's key, which the store must carry.
    pub server: PublicKey,
    /// What the store is called in messages.
    pub store_path: String,
    /// Who may what.
    pub registry: Registry,
}
