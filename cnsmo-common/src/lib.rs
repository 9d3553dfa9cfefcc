//! What the eBPF programs and the agent agree on, and nothing else: layouts, map names, bounds.
//!
//! Every struct is `repr(C)`, made of integers and byte arrays with explicit padding, and states its size. A change of
//! anything here is a change of [`ABI_VERSION`]: an agent never reuses pinned maps of another version.
#![no_std]

pub mod blob;

/// Bumped with every change of this crate's layouts or meanings; `cargo xtask tidy` refuses a change without it.
pub const ABI_VERSION: u32 = 1;
