//! `cargo xtask bench fw`: the data path and the compiler of the firewall, by a program that runs them; then packets between
//! pairs of devices, judged by ours, by nftables, or by nobody; and connections to servers with and without a firewall.
//!
//! What is between devices has the sender in its time, which is the same for everybody.

mod connections;
mod packets;

use std::{collections::BTreeMap, path::Path};

use serde::Deserialize;

use super::{Row, driver, driver::Driver};
use crate::{
    netns::{Netns, PinDir, RunDir},
    progress,
};

pub(super) const PROGRAM: &str = "cnsmo-bench-fw";

/// Interleaved ones, of each that is compared.
const ROUNDS: usize = 7;
/// The guarded device of each namespace.
const DEVICE: &str = "in";

pub(super) fn measure() -> anyhow::Result<Vec<Row>> {
    let mut rows = driver::rows(PROGRAM, &[])?;
    let program = driver::build(PROGRAM)?;
    progress::heading("Measuring firewalls between devices");
    rows.extend(packets::measure(&program)?);
    rows.extend(connections::measure(&program)?);
    Ok(rows)
}

/// Our data path in a namespace, and where its pins and state are.
struct Guard {
    driver: Driver,
    _pins: PinDir,
    _state: RunDir,
}

/// What came of the packets that arrived.
#[derive(Deserialize)]
struct Counts {
    /// By reason.
    drops: BTreeMap<String, u64>,
    /// Established ones.
    flows: u64,
}

impl Guard {
    fn start(program: &Path, netns: &Netns, rules: u32, case: &str) -> anyhow::Result<Self> {
        let (pins, state) = (PinDir::new("bench-fw"), RunDir::new("bench-fw")?);
        let mut command = netns.command(program)?;
        command.arg("guard").args([pins.path(), state.path()]);
        let mut driver = Driver::start(command.args([DEVICE, &rules.to_string(), case]))?;
        driver.wait_until_ready()?;
        Ok(Self { driver, _pins: pins, _state: state })
    }

    fn counts(&mut self) -> anyhow::Result<Counts> {
        self.driver.ask("counts")
    }
}
