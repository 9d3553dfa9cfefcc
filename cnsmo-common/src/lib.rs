//! What the eBPF programs and the agent agree on, and nothing else: layouts, bounds, the words that switch policies.
//!
//! Every struct is `repr(C)`, made of integers and byte arrays with explicit padding, and states its size. A change of
//! anything here is a change of [`ABI_VERSION`]: an agent never reuses pinned maps of another version.
#![no_std]

pub mod balance;
pub mod blob;
pub mod control;
pub mod explain;
pub mod flow;
#[cfg(feature = "user")]
mod pod;
pub mod probe;
pub mod record;
pub mod stat;

/// Bumped with every change of this crate's layouts or meanings; `cargo xtask tidy` refuses a change without it.
pub const ABI_VERSION: u32 = 4;

/// Towards the VM, or away from it; the number is the place of the direction's part in all tables.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Towards the VM.
    Ingress = 0,
    /// Away from the VM.
    Egress = 1,
}
