//! knockq hides network services.
//!
//! A knock is one TCP SYN to a closed port. Eight bytes that a genuine SYN draws at random, its sequence number and its
//! timestamp, are ciphertext; everything else is what the sender's own kernel would have sent. One nft rule hands such SYNs
//! to `knockq serve` through a netfilter queue, where all get one verdict at once, knock or not: dropped, or with
//! `answer = "reset"` passed on to a port where nobody listens. A knock that is decoded, fresh
//! and permitted puts (source, port) into an nft set for a while: the door to the guarded port.
//!
//! The modules, each of which knows only those above it (`tests/layers.rs` holds them to that):
//!
//! | module | is |
//! |---|---|
//! | [`service`] | what a knock opens: names, transports, ports |
//! | [`crypto`] | pure: keys, and the eight bytes of a token |
//! | [`packet`] | pure: a SYN read, and a SYN built as this kernel would |
//! | [`verify`] | pure: `handle(bytes, now) -> Decision` |
//! | [`queue`] | the kernel's queue, and the relay of packet headers |
//! | [`nft`] | the table, and the elements of its sets |
//! | [`config`] | files that administrators and users edit |
//! | [`serve`] | the daemon: root, gate, engine |
//! | [`client`] | profiles, counters, and the one packet |
//! | [`cli`] | words into calls |
//!
//! The specification is `docs/protocol.md`. The library is here for the tests, the examples and the benchmarks; the command
//! is the interface.

#![forbid(unsafe_code)]
// Not in Cargo.toml, for tests and examples may do all of this.
#![warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, unreachable_pub)]

pub mod cli;
pub mod client;
pub mod config;
pub mod crypto;
pub mod nft;
pub mod packet;
pub mod queue;
pub mod serve;
pub mod service;
pub mod verify;
