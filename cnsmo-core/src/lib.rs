//! The distributed system state: resources in, revisions out, agents kept in step.
//!
//! From the bottom up:
//! - [`store`]: the durable state, in SQLite or PostgreSQL.
//! - [`lease`]: promises to call again, counted down in memory.
//! - [`subject`]: names of where messages go, and patterns of them; no I/O.
//! - [`state`]: the resources and the rules by which they change; no I/O.
//! - [`fleet`]: what each agent shall run and runs; no I/O.
//! - [`actor`]: the one task that owns all of that.
//! - [`cluster`]: several cores on one database, of which one leads.
//! - [`catalog`]: which instance of which service runs where.
//! - [`bus`]: messages between services.
//! - [`identity`]: who calls, and what that one may do.
//! - `events`: what happened, told from the commits.
//! - [`audit`]: what was done and refused.
//! - [`links`]: commands to agents, over their streams.
//! - [`own`]: the services that a core consists of, each under a supervisor.
//! - [`grpc`]: the API and who may use it.
//! - [`http`]: the same API by HTTP and JSON.
//! - [`server`]: all of it together.

#![forbid(unsafe_code)]

pub mod actor;
pub mod audit;
pub mod bus;
pub mod catalog;
pub mod cluster;
pub mod error;
mod events;
pub mod explain;
pub mod fleet;
pub mod grpc;
pub mod http;
pub mod identity;
pub mod lease;
pub mod links;
pub mod orchestrator;
pub mod own;
pub mod server;
pub mod state;
pub mod store;
pub mod subject;

#[cfg(test)]
#[path = "../../tests/harness/postgres.rs"]
#[expect(unreachable_pub, reason = "shared with the library of the tests, where it is public")]
mod postgres_server;
