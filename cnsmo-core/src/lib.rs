//! The distributed system state: resources in, revisions out, agents kept in step.
//!
//! From the bottom up:
//! - [`store`]: the durable state, one SQLite file.
//! - [`subject`]: names of where messages go, and patterns of them; no I/O.
//! - [`state`]: the resources and the rules by which they change; no I/O.
//! - [`fleet`]: what each agent shall run and runs; no I/O.
//! - [`actor`]: the one task that owns all of that.
//! - [`bus`]: messages between services.
//! - [`identity`]: the certificate authority.
//! - [`grpc`]: the API and who may use it.
//! - [`server`]: all of it together.

#![forbid(unsafe_code)]

pub mod actor;
pub mod bus;
pub mod error;
pub mod fleet;
pub mod grpc;
pub mod identity;
pub mod server;
pub mod state;
pub mod store;
pub mod subject;
