//! `cargo xtask bench fw`: the data path and the compiler of the firewall, by a program that runs them.

use super::{Row, driver};

pub(super) const PROGRAM: &str = "cnsmo-bench-fw";

pub(super) fn measure() -> anyhow::Result<Vec<Row>> {
    driver::rows(PROGRAM, &[])
}
