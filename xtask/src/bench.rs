//! `cargo xtask bench`: ours beside the peers, in interleaved rounds of one run.

use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use clap::ValueEnum;
use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};

use crate::{
    Json,
    cargo::{self, cargo},
    progress, setup, shell,
};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// All, if none is named
    #[arg(value_enum)]
    section: Option<Section>,
    #[command(flatten)]
    json: Json,
}

/// What can be measured.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Section {
    /// The firewall's data path and compiler
    Fw,
    /// The engine of the overlay
    Vpn,
}

impl Section {
    /// Programs of the agent: the one that measures and prints the rows as JSON, then those that it starts.
    fn programs(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::Fw => ("cnsmo-bench-fw", &[]),
            Self::Vpn => ("cnsmo-bench-vpn", &["cnsmo-agent"]),
        }
    }
}

/// One measurement.
#[derive(Debug, Deserialize, Serialize)]
struct Row {
    id: String,
    unit: String,
    ours: f64,
    peer_name: String,
    peer: f64,
    /// ours / peer, of interleaved rounds.
    ratio: f64,
    /// Which is better: `lower` or `higher`.
    better: String,
    rounds: u32,
}

pub(crate) fn main(options: &Options) -> anyhow::Result<()> {
    setup::need_root("bench")?;
    setup::setup(setup::Scope::Test)?;
    let mut rows = Vec::new();
    for section in options.section.as_ref().map_or(Section::value_variants(), std::slice::from_ref)
    {
        rows.extend(measure(*section)?);
    }
    ensure!(!rows.is_empty(), "nothing was measured");
    println!("{}", table(&rows));
    if let Some(path) = &options.json.json {
        shell::write(path, serde_json::to_string_pretty(&rows)?)?;
    }
    Ok(())
}

fn measure(section: Section) -> anyhow::Result<Vec<Row>> {
    let (program, started) = section.programs();
    progress::heading(&format!("Building {program}, optimised"));
    let mut build = cargo();
    build.args(["build", "--release", "--package=cnsmo-agent", "--bin", program]);
    let built = cargo::build(build.args(started.iter().flat_map(|name| ["--bin", name])))?;
    progress::heading(&format!("Measuring with {program}"));
    let mut command = Command::new(built.executable(program)?);
    let output = command
        .arg("--json")
        .current_dir(shell::root())
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting {program}"))?;
    ensure!(output.status.success(), "{program} failed ({})", output.status);
    serde_json::from_slice(&output.stdout).with_context(|| format!("reading the rows of {program}"))
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header(["id", "unit", "ours", "peer", "", "ours/peer", "better", "rounds"]);
    for row in rows {
        table.add_row([
            row.id.clone(),
            row.unit.clone(),
            format!("{:.1}", row.ours),
            format!("{:.1}", row.peer),
            row.peer_name.clone(),
            format!("{:.3}", row.ratio),
            row.better.clone(),
            row.rounds.to_string(),
        ]);
    }
    for column in [2, 3, 5, 7] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}
