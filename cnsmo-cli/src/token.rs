//! Join tokens: `cnsmo token`.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use anyhow::{Context as _, Result};
use cnsmo_proto::pb::identity::{
    CreateJoinTokenRequest, DeleteJoinTokenRequest, JoinToken, ListJoinTokensRequest, Role,
};
use serde::Serialize;

use crate::{
    args::{Format, TokenArgs},
    client::{Client, refused},
    identity::role_word,
    output,
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
        writeln!(io::stderr(), "expires {time}, or after {uses} {word}; id {}", response.id)?;
    }
    Ok(())
}

/// All pages, in the order in which the tokens were made.
pub(crate) async fn list(client: &Client, format: Format) -> Result<()> {
    let mut core = client.join_tokens().await?;
    let (mut request, mut tokens) = (ListJoinTokensRequest::default(), Vec::new());
    loop {
        let page = core.list_join_tokens(request.clone()).await.map_err(refused)?.into_inner();
        tokens.extend(page.tokens);
        match tokens.last() {
            Some(JoinToken { id, .. }) if page.more => request.after.clone_from(id),
            _ => break,
        }
    }
    tokens.sort_by_key(|token| token.create_time.map(|time| (time.seconds, time.nanos)));
    let all: Vec<_> = tokens.iter().map(Shown::new).collect();
    match format {
        Format::Json => output::print_json(&all),
        Format::Yaml => output::print_yaml(&all),
        Format::Table => {
            let row = |(shown, token): (&Shown, &JoinToken)| {
                let uses = format!("{}/{}", shown.uses, shown.max_uses);
                let labels = output::labels(&token.labels);
                let name = output::or_none(shown.name.as_str());
                vec![shown.id.clone(), shown.role.into(), name, uses, shown.expires.clone(), labels]
            };
            let rows = all.iter().zip(&tokens).map(row).collect();
            output::print_table(&["ID", "ROLE", "NAME", "USES", "EXPIRES", "LABELS"], rows)
        }
    }
}

pub(crate) async fn delete(client: &Client, id: String) -> Result<()> {
    let mut core = client.join_tokens().await?;
    let request = DeleteJoinTokenRequest { id: id.clone() };
    let answer = core.delete_join_token(request).await.map_err(refused)?.into_inner();
    writeln!(io::stdout(), "token {id} deleted (revision {})", answer.revision)?;
    Ok(())
}

/// A token as it is printed.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown {
    id: String,
    role: &'static str,
    name: String,
    uses: u32,
    max_uses: u32,
    created: String,
    expires: String,
    labels: BTreeMap<String, String>,
    state_prefixes: Vec<String>,
    subjects: Vec<String>,
}

impl Shown {
    fn new(token: &JoinToken) -> Self {
        let time = |time: Option<prost_types::Timestamp>| {
            let time = time.map(|time| prost_types::Timestamp { nanos: 0, ..time });
            time.map(|time| time.to_string()).unwrap_or_default()
        };
        Self {
            id: token.id.clone(),
            role: role_word(token.role()),
            name: token.name.clone(),
            uses: token.uses,
            max_uses: token.max_uses,
            created: time(token.create_time),
            expires: time(token.expire_time),
            labels: token.labels.clone(),
            state_prefixes: token.state_prefixes.clone(),
            subjects: token.subjects.clone(),
        }
    }
}

/// A new file: one that is there could be readable by others, or a link to somewhere else.
fn create_file(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(path);
    file.with_context(|| format!("failed to create {}", path.display()))
}
