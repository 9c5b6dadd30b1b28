//! From the kernel's queue to the verifier: SYNs are dropped at once and their headers handed on, unread.

pub mod kernel;
pub mod relay;

pub use kernel::{KernelQueue, QueueError};
pub use relay::{RECORD_LEN, RelayReader, RelayWriter, records};
