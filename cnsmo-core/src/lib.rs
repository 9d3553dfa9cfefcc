//! The distributed system state: resources in, revisions out, agents kept in step.
//!
//! From the bottom up:
//! - [`store`]: the durable state, one SQLite file.
//! - [`state`]: the resources and the rules by which they change; no I/O.
//! - [`fleet`]: what each agent shall run and runs; no I/O.
//! - [`actor`]: the one task that owns all of that.
//! - [`cluster`]: several cores on one database, of which one leads.
//! - [`identity`]: the certificate authority.
//! - [`grpc`]: the API and who may use it.
//! - [`server`]: all of it together.

#![forbid(unsafe_code)]

pub mod actor;
pub mod cluster;
pub mod error;
pub mod fleet;
pub mod grpc;
pub mod identity;
pub mod server;
pub mod state;
pub mod store;

#[cfg(test)]
#[path = "../../tests/harness/postgres.rs"]
#[expect(unreachable_pub, reason = "shared with the library of the tests, where it is public")]
mod postgres_server;
