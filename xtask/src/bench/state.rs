//! `cargo xtask bench state`: the core beside etcd, and on PostgreSQL; all on this machine's disk and loopback.

mod bus;
mod fleet;
mod postgres;
mod store;

use super::Row;

pub(super) fn measure() -> anyhow::Result<Vec<Row>> {
    let mut rows = store::measure()?;
    rows.extend(bus::measure()?);
    rows.extend(postgres::measure()?);
    rows.extend(fleet::measure()?);
    Ok(rows)
}
