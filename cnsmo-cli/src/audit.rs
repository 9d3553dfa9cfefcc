//! `cnsmo audit`: what was done and refused.

use std::io::{self, Write as _};

use anyhow::{Context as _, Result, bail};
use cnsmo_proto::pb::identity::{AuditRecord, ListAuditRequest};
use cnsmo_service::audit;
use serde::Serialize;

use crate::{
    args::Format,
    client::{Client, Identities, refused},
    output,
};

#[derive(clap::Args)]
pub(crate) struct AuditArgs {
    /// Records after this number
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(i64).range(0..))]
    after: i64,
    /// At most so many records, the newest of them [default: all]
    #[arg(long, value_name = "N")]
    last: Option<usize>,
    /// Print nothing but whether each record follows from the one before
    #[arg(long, conflicts_with_all = ["after", "last"])]
    verify: bool,
}

pub(crate) async fn audit(client: &Client, format: Format, args: AuditArgs) -> Result<()> {
    let mut core = client.identities().await?;
    if args.verify {
        return verify(&mut core).await;
    }
    let mut shown = Vec::new();
    let mut after = args.after;
    loop {
        let (records, more) = page(&mut core, after).await?;
        after = records.last().map_or(after, |last| last.sequence);
        shown.extend(records.iter().map(Shown::new));
        if let Some(last) = args.last {
            shown.drain(..shown.len().saturating_sub(last));
        }
        if !more {
            break;
        }
    }
    match format {
        Format::Json => output::print_json(&shown),
        Format::Yaml => output::print_yaml(&shown),
        Format::Table => {
            let heads =
                ["NO", "TIME", "IDENTITY", "ROLE", "CALL", "DECISION", "STATUS", "REVISION"];
            let table = output::table(&heads, shown.iter().map(Shown::row).collect(), "");
            writeln!(io::stdout(), "{table}")?;
            Ok(())
        }
    }
}

/// The first record that is kept is believed: those before it may have been removed for their age.
async fn verify(core: &mut Identities) -> Result<()> {
    let (mut checked, mut last): (u64, Option<AuditRecord>) = (0, None);
    loop {
        let after = last.as_ref().map_or(0, |last| last.sequence);
        let (records, more) = page(core, after).await?;
        for record in records {
            let whole = match &last {
                None if record.sequence == 1 => audit::follows(&record, None),
                None => true,
                Some(last) => audit::follows(&record, Some(last)),
            };
            if !whole {
                let number = record.sequence;
                bail!("record {number} does not follow from the one before: the audit was changed");
            }
            checked += 1;
            last = Some(record);
        }
        if !more {
            break;
        }
    }
    writeln!(io::stdout(), "{checked} records, each follows from the one before")?;
    Ok(())
}

async fn page(core: &mut Identities, after: i64) -> Result<(Vec<AuditRecord>, bool)> {
    let answer = core.list_audit(ListAuditRequest { after, page_size: 0 }).await;
    let answer = answer.map_err(refused)?.into_inner();
    let goes_on = !answer.more || answer.records.last().is_some_and(|last| last.sequence > after);
    goes_on.then_some((answer.records, answer.more)).context("the core repeats its records")
}

/// A record as it is printed.
#[derive(Serialize)]
struct Shown {
    sequence: i64,
    time: String,
    identity: String,
    role: String,
    rpc: String,
    decision: String,
    status: String,
    revision: i64,
    detail: String,
    hash: String,
}

impl Shown {
    fn new(record: &AuditRecord) -> Self {
        Self {
            sequence: record.sequence,
            time: record.time.map(|time| time.to_string()).unwrap_or_default(),
            identity: record.identity.clone(),
            role: record.role.clone(),
            rpc: record.rpc.clone(),
            decision: record.decision.clone(),
            status: record.status.clone(),
            revision: record.revision,
            detail: record.detail.clone(),
            hash: output::hex(&record.hash),
        }
    }

    fn row(&self) -> Vec<String> {
        let revision = if self.revision == 0 { "" } else { &self.revision.to_string() };
        let call = self.rpc.rsplit('/').next().unwrap_or_default();
        let number = self.sequence.to_string();
        [
            &number,
            &self.time,
            &self.identity,
            &self.role,
            call,
            &self.decision,
            &self.status,
            revision,
        ]
        .map(output::or_none)
        .to_vec()
    }
}
