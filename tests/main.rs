//! Tests across crates. They need root; in an emulated VM the module `kernel` runs alone.

mod cases;
