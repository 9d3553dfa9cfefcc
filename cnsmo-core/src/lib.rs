//! The distributed system state: resources in, revisions out, agents kept in step.
//!
//! - [`store`]: the durable state, one SQLite file.
//! - [`state`]: the resources and the rules by which they change.

#![forbid(unsafe_code)]

pub mod actor;
pub mod error;
pub mod fleet;
pub mod state;
pub mod store;
