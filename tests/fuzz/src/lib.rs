//! Fuzzing targets: functions that take any bytes and panic where something is wrong with our code.
//!
//! `cargo test` runs each on the inputs in `corpus`, and on a fixed number of inputs made from them.
//! `cargo xtask fuzz` lets libFuzzer look for inputs that reach new code.

pub mod compiler;
pub mod mutate;
pub mod pipeline;
pub mod policy;
