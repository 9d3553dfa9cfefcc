use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use anyhow::{Context as _, Result};
use cnsmo_proto::pb::identity::{CreateJoinTokenRequest, Role};

use crate::{
    args::TokenArgs,
    client::{Client, refused},
};

/// Standard output holds the token and nothing else, for `$(cnsmo token create)`.
pub(crate) async fn create(client: &Client, args: TokenArgs) -> Result<()> {
    let request = CreateJoinTokenRequest {
        ttl: Some(prost_types::Duration::try_from(args.ttl)?),
        max_uses: args.max_uses,
        labels: args.labels.as_map().clone(),
        role: Role::from(args.role).into(),
        name: args.name.map(|name| name.to_string()).unwrap_or_default(),
        state_prefixes: args.state_prefixes,
        subjects: args.subjects,
    };
    let mut core = client.join_tokens().await?;
    // Before the core makes a token that nobody could read.
    let mut file = args.output.as_deref().map(create_file).transpose()?;
    let response = match core.create_join_token(request).await {
        Ok(response) => response.into_inner(),
        Err(status) => {
            if let Some(path) = &args.output {
                fs::remove_file(path)?;
            }
            return Err(refused(status));
        }
    };
    match &mut file {
        Some(file) => writeln!(file, "{}", response.token).context("failed to write the token")?,
        None => writeln!(io::stdout(), "{}", response.token)?,
    }
    if let Some(time) = response.expire_time {
        let (time, uses) = (prost_types::Timestamp { nanos: 0, ..time }, args.max_uses);
        let word = if uses == 1 { "use" } else { "uses" };
        writeln!(io::stderr(), "expires {time}, or after {uses} {word}")?;
    }
    Ok(())
}

/// A new file: one that is there could be readable by others, or a link to somewhere else.
fn create_file(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(path);
    file.with_context(|| format!("failed to create {}", path.display()))
}
