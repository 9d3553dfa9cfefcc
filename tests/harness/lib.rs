//! What tests on namespaces and real processes stand on: everything made here is removed on drop, also on panic.

pub mod core;
pub mod frame;
pub mod netns;
pub mod postgres;
pub mod process;
pub mod usage;

pub use self::core::CoreProcess;
pub use netns::{Netns, PinDir, RunDir, sweep, unique};
pub use postgres::Postgres;
pub use process::{Process, pause};
