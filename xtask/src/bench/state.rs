//! `cargo xtask bench state`: the core beside etcd, both on this machine's disk and loopback.

mod fleet;

use super::Row;

pub(super) fn measure() -> anyhow::Result<Vec<Row>> {
    fleet::measure()
}
