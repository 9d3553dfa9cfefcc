//! The distributed system state: resources in, revisions out, agents kept in step.
//!
//! From the bottom up:
//! - [`store`]: the durable state, one SQLite file.
//! - [`state`]: the resources and the rules by which they change; no I/O.
//! - [`fleet`]: what each agent shall run and runs; no I/O.
//! - [`actor`]: the one task that owns all of that.
//! - [`catalog`]: which instance of which service runs where.
//! - [`identity`]: who calls, and what that one may do.
//! - [`audit`]: what was done and refused.
//! - [`grpc`]: the API and who may use it.
//! - [`http`]: the same API by HTTP and JSON.
//! - [`server`]: all of it together.

#![forbid(unsafe_code)]

pub mod actor;
pub mod audit;
pub mod catalog;
pub mod error;
pub mod fleet;
pub mod grpc;
pub mod http;
pub mod identity;
pub mod lease;
pub mod server;
pub mod state;
pub mod store;
