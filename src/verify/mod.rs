//! The decision: which SYN is a knock, of whom, and what it opens.
//!
//! Pure: it is handed bytes and a time, and answers with a [`Decision`]. The daemon, the tests and the benchmarks run the
//! same code. Times are Unix seconds throughout, as the counter is one.

pub mod explain;
pub mod floor;
pub mod index;
mod knockknock;
pub mod reason;
pub mod registry;
pub mod replay;
mod shares;
mod tries;
pub mod verifier;

pub use floor::{Floor, Shut};
pub use index::{Candidate, Index};
pub use reason::Reason;
pub use registry::{Key, KnockknockProfile, Registry, Secrets, Service, SourcePolicy, User, open_for};
pub use replay::{CounterLog, Counters, Fresh, Reservation};
pub use verifier::{Claim, Decision, Grant, Recorded, Refusal, Verifier, Withdrawal};
