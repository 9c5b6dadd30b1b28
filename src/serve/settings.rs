//! What the engine is told by the child that reads the configuration.

use serde::{Deserialize, Serialize};

use super::policy::Policy;
use super::sandbox::Identity;
use crate::crypto::PublicKey;
use crate::verify::Registry;

/// The engine's settings.
#[derive(Serialize, Deserialize)]
pub struct Settings {
    /// Whom it becomes.
    pub identity: Identity,
    /// The server's key, which the store must carry.
    pub server: PublicKey,
    /// What the store is called in messages.
    pub store_path: String,
    /// Who may what, by their knocks.
    pub registry: Registry,
    /// Who may hold which doors.
    pub policy: Policy,
}
