//! A real core in this process, or as a program, and real clients.

#![expect(
    clippy::unwrap_used,
    reason = "tests panic; clippy does not see that the helpers are tests too"
)]

mod agents;
mod api;
mod bus;
mod cluster;
mod crash;
mod enrolment;
mod events;
mod harness;
mod history;
mod hostile;
mod http;
mod identity;
mod overlay;
mod pause;
mod postgres;
mod program;
mod restore;
#[path = "../../tests/harness/postgres.rs"]
#[expect(unreachable_pub, reason = "shared with the library of the tests, where it is public")]
mod server;
mod services;
mod state;
mod streams;
