//! The daemon: three processes, re-executed from one binary, each with less than the one before.
//!
//! ```text
//! keeper    root; reads the configuration, starts the others, runs nft; sees no packet and no frame
//!    | channel (stdin)                        | channel (stdin)
//! monitor   own uid, CAP_NET_ADMIN          verifier   own uid, nothing
//!    queue -> DROP, header records  --pipe-->  parse, decide, counters durable
//!    set elements by netlink      <--frames--  "open", "close"
//! ```
//!
//! Any death stops all. Nothing listens on the queue then, so the kernel drops what is queued, and doors close by their own
//! timeouts.

pub mod calls;
pub mod channel;
mod children;
mod clock;
pub mod configuration;
pub mod control;
pub mod ending;
pub mod explain;
pub mod figures;
pub mod frames;
pub mod gate;
pub mod handover;
pub mod keeper;
pub mod ledger;
pub mod log;
mod manager;
pub mod monitor;
pub mod observers;
pub mod past;
pub mod policy;
mod process;
pub mod rate;
pub mod refusals;
pub mod repeats;
pub mod report;
pub mod sandbox;
pub mod settings;
pub mod start;
pub mod store;
mod terminal;
pub mod verifier;
pub mod vocabulary;
pub mod watchers;
mod writer;
