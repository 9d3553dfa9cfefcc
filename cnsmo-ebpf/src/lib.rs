//! The data path: everything that decides about a packet, as a library. The same source is compiled into the kernel
//! programs (`src/bin/cnsmo`) and runs on the host in tests and for `--dry-run`.
//!
//! Read [`pipeline`] first: it is the order of the stages.
#![cfg_attr(not(any(test, feature = "host")), no_std)]

pub mod balance;
pub mod classify;
pub mod connections;
pub mod conntrack;
#[cfg(test)]
mod frames;
#[cfg(any(test, feature = "host"))]
pub mod host;
pub mod limit;
pub mod packet;
pub mod parse;
pub mod pipeline;
pub mod rewrite;
pub mod tables;
