//! A real core in this process, or as a program, and real clients.

#![expect(
    clippy::unwrap_used,
    reason = "tests panic; clippy does not see that the helpers are tests too"
)]

mod agents;
mod api;
mod bus;
mod enrolment;
mod harness;
mod overlay;
mod program;
