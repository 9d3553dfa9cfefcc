//! `cargo xtask bench`: ours beside the peers, in interleaved rounds of one run.

pub(crate) mod driver;
mod fw;
mod idle;
mod lb;
mod state;
mod vpn;

use anyhow::ensure;
use clap::ValueEnum;
use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};

use crate::{Json, netns, progress, setup, shell};

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
    /// What core and agent take while nothing happens
    Idle,
    /// The load balancer on a gateway, beside a proxy and the kernel's address translation
    Lb,
    /// The core, beside etcd
    State,
    /// The tunnel, beside other WireGuard programs in user space
    Vpn,
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
    better: Better,
    rounds: u32,
}

/// What stands beside a measurement that has no peer: the most, or the least, that it may be.
const LIMIT: &str = "limit";

#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum Better {
    Lower,
    Higher,
}

impl Row {
    /// Medians of what was sampled in turn, one sample of each side per round; the ratio is the median of the rounds' own,
    /// which a machine that is slower for a while changes least.
    fn of(
        id: &str,
        (unit, better): (&str, Better),
        ours: &[f64],
        (peer_name, peer): (&str, &[f64]),
    ) -> anyhow::Result<Self> {
        ensure!(!ours.is_empty() && ours.len() == peer.len(), "{id}: rounds are missing");
        let ratios: Vec<_> = ours.iter().zip(peer).map(|(ours, peer)| ours / peer).collect();
        let row = Self {
            id: id.to_owned(),
            unit: unit.to_owned(),
            ours: median(ours),
            peer_name: peer_name.to_owned(),
            peer: median(peer),
            ratio: median(&ratios),
            better,
            rounds: u32::try_from(ours.len())?,
        };
        let finite = [row.ours, row.peer, row.ratio].iter().all(|value| value.is_finite());
        ensure!(finite, "{id}: nothing came through in a round ({row:?})");
        // What comes later may fail, and the table comes last.
        progress::say(&format!(
            "        {id}: {:.1} {unit}, {peer_name} {:.1}, ratio {:.3}",
            row.ours, row.peer, row.ratio
        ));
        Ok(row)
    }
}

pub(crate) fn main(options: &Options) -> anyhow::Result<()> {
    setup::need_root("bench")?;
    setup::setup(setup::Scope::Test)?;
    netns::sweep();
    let mut rows = Vec::new();
    for section in options.section.as_ref().map_or(Section::value_variants(), std::slice::from_ref)
    {
        rows.extend(match section {
            Section::Fw => fw::measure()?,
            Section::Idle => idle::measure()?,
            Section::Lb => lb::measure()?,
            Section::State => state::measure()?,
            Section::Vpn => vpn::measure()?,
        });
    }
    ensure!(!rows.is_empty(), "nothing was measured");
    println!("{}", table(&rows));
    if let Some(path) = &options.json.json {
        shell::write(path, serde_json::to_string_pretty(&rows)?)?;
    }
    Ok(())
}

/// The upper one of two in the middle.
pub(crate) fn median(samples: &[f64]) -> f64 {
    let mut samples = samples.to_vec();
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN)
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header(["id", "unit", "ours", "peer", "", "ours/peer", "better", "rounds"]);
    for row in rows {
        table.add_row([
            row.id.clone(),
            row.unit.clone(),
            value(row.ours),
            value(row.peer),
            row.peer_name.clone(),
            format!("{:.3}", row.ratio),
            format!("{:?}", row.better).to_lowercase(),
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

/// Three digits at least.
fn value(value: f64) -> String {
    let decimals = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_the_medians_and_the_median_of_the_ratios() {
        let unit = ("ns", Better::Lower);
        let row = Row::of("x", unit, &[4.0, 1.0, 9.0], ("peer", &[1.0, 2.0, 3.0])).unwrap();
        assert_eq!((row.ours, row.peer, row.ratio, row.rounds), (4.0, 2.0, 3.0, 3));
    }

    #[test]
    fn a_round_without_traffic_is_an_error() {
        let unit = ("Gb/s", Better::Higher);
        assert!(Row::of("x", unit, &[1.0], ("peer", &[0.0])).is_err());
        assert!(Row::of("x", unit, &[1.0, 2.0], ("peer", &[1.0])).is_err());
        assert!(Row::of("x", unit, &[], ("peer", &[])).is_err());
    }
}
