//! What the engine is told by the child that reads the configuration.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::policy::Policy;
use super::sandbox::Identity;
use crate::crypto::PublicKey;
use crate::service::Port;
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
    /// What there is to tell of the configuration.
    pub outline: Outline,
}

/// What there is to tell of a configuration.
#[derive(Clone, Default, Serialize, Deserialize)]
pub struct Outline {
    /// How many may knock.
    pub users: usize,
    /// For how many services.
    pub services: usize,
    /// Where.
    pub knock_ports: String,
    /// Number of the queue.
    pub queue: u16,
    /// The include file's path.
    pub include_file: String,
    /// Who was connected, when it was read, to ports whose connections did not end with their door before, and now do.
    pub connected: BTreeSet<(IpAddr, Port)>,
}
