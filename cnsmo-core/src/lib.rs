//! The distributed system state: resources in, revisions out, agents kept in step.
//!
//! From the bottom up:
//! - [`store`]: the durable state, one SQLite file.
//! - [`state`]: the resources and the rules by which they change; no I/O.
//! - [`fleet`]: what each agent shall run and runs; no I/O.
//! - [`actor`]: the one task that owns all of that.
//! - [`catalog`]: which instance of which service runs where.
//! - [`identity`]: the certificate authority.
//! - [`grpc`]: the API and who may use it.
//! - [`server`]: all of it together.

#![forbid(unsafe_code)]

pub mod actor;
pub mod catalog;
pub mod error;
pub mod fleet;
pub mod grpc;
pub mod identity;
pub mod server;
pub mod state;
pub mod store;
