//! `cnsmo import`: a policy from the rules of another firewall.
//!
//! A front end per language reads chains of rules ([`ir`]), [`flatten`] makes them one list in which the first match decides, and
//! [`emit`] says that list as a policy. What a rule matches is a product of sets of numbers ([`sets`]), so that
//! conditions of chains, negations and several chains on one hook are computed and not guessed. A rule that a policy
//! cannot say is kept as one that decides nothing, which tells what leaving it out does.

mod draft;
mod emit;
mod flatten;
mod iptables;
mod ir;
mod names;
mod nftables;
mod sets;
#[cfg(test)]
mod tests;
mod text;

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail};
use cnsmo_proto::{
    manifest::Manifest,
    model::{Labels, Name, PRIORITY_MAX},
    pb::{
        meta::Metadata,
        policy::{FirewallPolicy, FirewallPolicySpec},
        resource::{Resource, resource::Resource as Kind},
    },
};
use serde::Serialize;

use crate::{
    args::Format,
    load,
    output::{print_json, print_text, yaml},
};
use emit::Outcome;
use ir::{Effect, Left, RuleSet};

/// The input could not be read.
const EXIT_UNREADABLE: u8 = 2;
/// A policy was printed, and not all rules are in it.
const EXIT_LEFT_OUT: u8 = 4;

#[derive(clap::Subcommand)]
pub(crate) enum ImportCommand {
    /// From the output of `nft -j list ruleset`
    Nftables {
        /// JSON; - for standard input
        #[arg(value_name = "FILE|-")]
        file: PathBuf,
        #[command(flatten)]
        policy: PolicyArgs,
    },
    /// From the output of iptables-save and ip6tables-save
    #[command(name = "iptables-save")]
    IptablesSave {
        /// Rules for IPv4; - for standard input
        #[arg(value_name = "FILE|-", required_unless_present = "ipv6")]
        file: Option<PathBuf>,
        /// Rules for IPv6; - for standard input
        #[arg(long, value_name = "FILE|-")]
        ipv6: Option<PathBuf>,
        #[command(flatten)]
        policy: PolicyArgs,
    },
}

#[derive(clap::Args)]
pub(crate) struct PolicyArgs {
    /// Of the policy
    #[arg(long, default_value = "imported")]
    name: Name,
    /// Labels of the VMs that it is for [default: all]
    #[arg(long, default_value = "", hide_default_value = true, value_name = "KEY=VALUE,...")]
    target: Labels,
    /// Of the policy; lower is asked first
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(0..=i64::from(PRIORITY_MAX)))]
    priority: u32,
    /// Print what can be translated also if it accepts more than the rules do
    #[arg(long)]
    partial: bool,
}

/// What `-o json` prints.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    /// None if it was refused.
    policy: Option<&'a Manifest>,
    left_out: Vec<LeftOut<'a>>,
    notes: &'a [String],
}

#[derive(Serialize)]
struct LeftOut<'a> {
    place: &'a str,
    rule: &'a str,
    reason: &'a str,
    effect: &'static str,
}

pub(crate) fn import(format: Format, command: &ImportCommand) -> Result<ExitCode> {
    let (read, policy) = match command {
        ImportCommand::Nftables { file, policy } => (read_nftables(file), policy),
        ImportCommand::IptablesSave { file, ipv6, policy } => {
            (read_iptables(file.as_deref(), ipv6.as_deref()), policy)
        }
    };
    let set = match read {
        Ok(set) => set,
        Err(error) => {
            writeln!(io::stderr(), "error: {error:#}")?;
            return Ok(EXIT_UNREADABLE.into());
        }
    };
    let outcome = emit::translate(&set, policy.target.clone(), policy.priority)?;
    report(format, policy, &outcome)
}

/// As messages call it.
fn name_of(name: String) -> String {
    if name == "-" { "standard input".to_owned() } else { name }
}

fn read_nftables(file: &Path) -> Result<RuleSet> {
    let (name, text) = load::read(file)?;
    nftables::read(&name_of(name), &text).map_err(anyhow::Error::msg)
}

fn read_iptables(ipv4: Option<&Path>, ipv6: Option<&Path>) -> Result<RuleSet> {
    if ipv4 == ipv6 && ipv4 == Some(Path::new("-")) {
        bail!("standard input can be one of the two files");
    }
    let mut all = RuleSet::default();
    for (file, v6) in [(ipv4, false), (ipv6, true)] {
        let Some(file) = file else { continue };
        let (name, text) = load::read(file)?;
        all.merge(iptables::read(&name_of(name), &text, v6).map_err(anyhow::Error::msg)?);
    }
    Ok(all)
}

/// Prints the policy, unless it accepts more than the rules did and that was not asked for.
fn report(format: Format, args: &PolicyArgs, outcome: &Outcome) -> Result<ExitCode> {
    let Outcome { left, notes, .. } = outcome;
    for Left { place, rule, reason, effect } in left {
        writeln!(io::stderr(), "left out ({}): {place}: {rule}: {reason}", effect.word())?;
    }
    for note in notes {
        writeln!(io::stderr(), "note: {note}")?;
    }
    let wider = left.iter().filter(|left| left.effect == Effect::Wider).count();
    let refused = wider > 0 && !args.partial;
    let manifest = manifest(args, outcome)?;
    let left_out = left.iter().map(|Left { place, rule, reason, effect }| LeftOut {
        place,
        rule,
        reason,
        effect: effect.word(),
    });
    match format {
        Format::Json => print_json(&Document {
            policy: (!refused).then_some(&manifest),
            left_out: left_out.collect(),
            notes,
        })?,
        Format::Table | Format::Yaml if !refused => {
            print_text(&(comments(outcome) + &yaml(&manifest)?))?;
        }
        Format::Table | Format::Yaml => {}
    }
    if refused {
        bail!(
            "no policy: without the {wider} rules that are marked `wider` it would accept more than they \
             do; --partial prints it all the same"
        );
    }
    Ok(if left.is_empty() { ExitCode::SUCCESS } else { EXIT_LEFT_OUT.into() })
}

fn manifest(args: &PolicyArgs, outcome: &Outcome) -> Result<Manifest> {
    let metadata = Metadata { name: args.name.to_string(), ..Metadata::default() };
    let spec = FirewallPolicySpec::from(&outcome.policy);
    let policy = FirewallPolicy { metadata: Some(metadata), spec: Some(spec), status: None };
    Manifest::new(&Resource { resource: Some(Kind::FirewallPolicy(policy)) })
        .context("a policy without content")
}

/// What a reader of the policy has to know, at its top.
fn comments(outcome: &Outcome) -> String {
    let mut text = String::new();
    // A line break would end the comment.
    let one_line = |text: &str| text.replace(|c: char| c.is_control(), " ");
    for Left { place, rule, reason, effect } in &outcome.left {
        let line = one_line(&format!("left out ({}): {place}: {rule}: {reason}", effect.word()));
        // Writing to a String cannot fail.
        _ = writeln!(text, "# {line}");
    }
    for note in &outcome.notes {
        _ = writeln!(text, "# note: {}", one_line(note));
    }
    text
}
