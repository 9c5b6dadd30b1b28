//! The daemon: three processes, each with less than the one before.
//!
//! ```text
//! root      starts the others, loads the table, does what root asks; sees no packet and no command of the engine's
//!    | channel (stdin)                       | channel (stdin)
//! gate      own uid, CAP_NET_ADMIN         engine    own uid, nothing
//!    queue -> DROP, first bytes     --pipe-->  parse, decide, counters durable, who holds which door
//!    changes the table's sets     <-commands-  put, delete
//!                                  -answers->
//! ```
//!
//! Any death stops all. Nothing listens on the queue then, so the kernel drops what is queued, and doors close by their own
//! timeouts.

pub mod admission;
pub mod calls;
pub mod channel;
mod children;
mod clock;
pub mod commands;
pub mod configuration;
pub mod control;
pub mod ending;
pub mod engine;
pub mod explain;
pub mod figures;
pub mod gate;
pub mod gate_link;
pub mod gate_table;
pub mod handover;
pub mod ledger;
pub mod limits;
pub mod log;
mod manager;
pub mod observers;
pub mod past;
pub mod policy;
mod process;
pub mod rate;
pub mod reconciler;
pub mod refusals;
pub mod repeats;
pub mod report;
pub mod root;
pub mod sandbox;
pub mod settings;
pub mod start;
pub mod store;
mod terminal;
pub mod vocabulary;
pub mod watchers;
mod writer;
