//! The daemon: three processes of three programs, each with less than the one before.
//!
//! ```text
//! root      starts the others, runs nft with texts made before; sees no packet and no command of the gate's
//!    | channel (stdin)                       | channel (stdin): which entry of its list
//! gate      own uid, CAP_NET_ADMIN         engine    own uid, nothing
//!    queue -> DROP, first bytes     --pipe-->  parse, decide, counters durable, who holds which door
//!    changes the table's sets     <-commands-  put, delete
//!                                  -answers->  talks to those who connect; knows the order of a reload
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
pub mod handover;
pub mod ledger;
pub mod limits;
pub mod line;
pub mod log;
pub mod observers;
pub mod past;
pub mod plan;
pub mod policy;
mod process;
mod program;
pub mod rate;
pub mod reconciler;
pub mod refusals;
pub mod repeats;
pub mod report;
pub mod root;
pub mod sandbox;
pub mod settings;
mod sockets;
pub mod start;
pub mod store;
mod terminal;
mod visitors;
pub mod watchers;
mod writer;
