//! Tests across crates. They need root; in an emulated VM the module `kernel` runs alone.
#![expect(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

mod cases;
