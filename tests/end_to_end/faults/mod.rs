//! Nothing is lost: each fault of docs/faults.md, done to real processes, files and tables.

mod counters;
mod crash;
mod reload;
mod start;
mod table;
mod knock;
mod power;
mod restart;
