//! A real core in this process, or as a program, and real clients.

mod agents;
mod api;
mod enrolment;
mod harness;
mod program;
