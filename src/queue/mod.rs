//! From the kernel's queue to the engine: SYNs get one verdict at once, whatever they hold, and their headers are handed on, unread.

pub mod kernel;
mod reader;
pub mod relay;

pub use kernel::{KernelQueue, QueueError};
pub use reader::{RelayReader, records};
pub use relay::{RECORD_LEN, RelayWriter};
