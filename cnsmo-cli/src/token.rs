use std::{
    fs::OpenOptions,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use anyhow::{Context as _, Result};
use cnsmo_proto::pb::identity::CreateJoinTokenRequest;

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
    };
    let mut core = client.join_tokens().await?;
    let response = core.create_join_token(request).await.map_err(refused)?.into_inner();
    match &args.output {
        Some(path) => write(path, &response.token)
            .with_context(|| format!("failed to write the token to {}", path.display()))?,
        None => writeln!(io::stdout(), "{}", response.token)?,
    }
    if let Some(time) = response.expire_time {
        writeln!(io::stderr(), "expires {time}, after {} uses at the latest", args.max_uses)?;
    }
    Ok(())
}

/// A new file: one that is there could be readable by others, or a link to somewhere else.
fn write(path: &Path, token: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    writeln!(file, "{token}")
}
