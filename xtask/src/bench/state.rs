//! `cargo xtask bench state`: the core's state.

mod postgres;

use super::Row;

pub(super) fn measure() -> anyhow::Result<Vec<Row>> {
    postgres::measure()
}
