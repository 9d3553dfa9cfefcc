//! Keys of the users' own state.

use std::{
    fs::File,
    io::{self, Read, Write as _},
    path::Path,
};

use anyhow::{Context as _, Result, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use cnsmo_proto::pb::state::{
    Compare, Event, GetRequest, KeyValue, ListRequest, Op, Put, TxnRequest, TxnResponse,
    WatchRequest, WatchResponse, compare::Target, event::Type, op, watch_response::Kind,
};
use serde::Serialize;

use crate::{
    args::{DeleteKeyArgs, Format, KvCommand, ListKeysArgs, PutArgs, WatchKeysArgs},
    client::{Client, refused},
    output::{NONE, or_none, print_json, print_table, print_text, print_yaml},
};

/// Largest value that a core takes; more is not read.
const VALUE_BYTES_MAX: u64 = 1 << 20;
/// Characters of a value in a table.
const PREVIEW_CHARS: usize = 48;

pub(crate) async fn kv(client: &Client, format: Format, command: KvCommand) -> Result<()> {
    match command {
        KvCommand::Get { key } => get(client, format, key).await,
        KvCommand::Put(args) => put(client, format, args).await,
        KvCommand::Delete(args) => delete(client, format, args).await,
        KvCommand::List(args) => list(client, format, args).await,
        KvCommand::Watch(args) => watch(client, format, args).await,
    }
}

/// As a table: the value alone, byte for byte.
async fn get(client: &Client, format: Format, key: String) -> Result<()> {
    let request = GetRequest { key: key.clone(), min_revision: 0 };
    let answer = client.state().await?.get(request).await.map_err(refused)?.into_inner();
    let Some(kv) = answer.kv else { bail!("{key}: does not exist") };
    match format {
        Format::Table => Ok(io::stdout().write_all(&kv.value)?),
        Format::Json => print_json(&Document::of(&kv)),
        Format::Yaml => print_yaml(&Document::of(&kv)),
    }
}

async fn put(client: &Client, format: Format, args: PutArgs) -> Result<()> {
    let PutArgs { key, value, file, content_type, lease, if_revision, if_absent } = args;
    let value = match (value, file) {
        (Some(value), _) => value.into_bytes(),
        (None, Some(path)) if path != Path::new("-") => {
            let file = File::open(&path);
            read(file.with_context(|| format!("failed to open {}", path.display()))?)
                .with_context(|| format!("failed to read {}", path.display()))?
        }
        (None, _) => read(io::stdin()).context("failed to read standard input")?,
    };
    let content_type = content_type.unwrap_or_default();
    let put =
        Put { key: key.clone(), value: value.into(), content_type, lease_id: lease.unwrap_or(0) };
    let expected = if if_absent { Some(0) } else { if_revision };
    let answer = commit(client, &key, op::Op::Put(put), expected).await?;
    print_revision(format, &answer)
}

async fn delete(client: &Client, format: Format, args: DeleteKeyArgs) -> Result<()> {
    let DeleteKeyArgs { key, prefix, if_revision } = args;
    let op = if prefix { op::Op::DeletePrefix(key.clone()) } else { op::Op::Delete(key.clone()) };
    let answer = commit(client, &key, op, if_revision).await?;
    print_revision(format, &answer)
}

/// One operation, if the key is still at the revision that is expected of it.
async fn commit(
    client: &Client,
    key: &str,
    op: op::Op,
    expected: Option<i64>,
) -> Result<TxnResponse> {
    let compare = expected.map(|revision| Compare {
        key: key.to_owned(),
        target: Some(Target::ModRevision(revision)),
    });
    let request = TxnRequest {
        compare: compare.into_iter().collect(),
        success: vec![Op { op: Some(op) }],
        failure: vec![Op { op: Some(op::Op::Get(key.to_owned())) }],
        ..TxnRequest::default()
    };
    let answer = client.state().await?.txn(request).await.map_err(refused)?.into_inner();
    if answer.succeeded {
        return Ok(answer);
    }
    match (answer.kvs.first().map_or(0, |kv| kv.mod_revision), expected) {
        (0, _) => bail!("{key}: does not exist; nothing was changed"),
        (_, Some(0)) => bail!("{key}: exists already; nothing was changed"),
        (found, _) => bail!("{key}: has revision {found}; nothing was changed"),
    }
}

fn print_revision(format: Format, answer: &TxnResponse) -> Result<()> {
    #[derive(Serialize)]
    struct Committed {
        revision: i64,
    }
    let committed = Committed { revision: answer.revision };
    match format {
        Format::Table => print_text(&format!("revision {}\n", answer.revision)),
        Format::Json => print_json(&committed),
        Format::Yaml => print_yaml(&committed),
    }
}

async fn list(client: &Client, format: Format, args: ListKeysArgs) -> Result<()> {
    let ListKeysArgs { prefix, keys_only } = args;
    let mut request =
        ListRequest { prefix: prefix.unwrap_or_default(), keys_only, ..ListRequest::default() };
    let mut core = client.state().await?;
    let mut kvs = Vec::new();
    loop {
        let page = core.list(request.clone()).await.map_err(refused)?.into_inner();
        kvs.extend(page.kvs);
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            break;
        }
    }
    let documents = || kvs.iter().map(Document::of).collect::<Vec<_>>();
    match format {
        Format::Json => print_json(&documents()),
        Format::Yaml => print_yaml(&documents()),
        Format::Table if keys_only => kvs.iter().try_for_each(|kv| {
            writeln!(io::stdout(), "{}", kv.key)?;
            Ok(())
        }),
        Format::Table => {
            let header = ["KEY", "REVISION", "VERSION", "LEASE", "BYTES", "VALUE"];
            print_table(&header, kvs.iter().map(row).collect())
        }
    }
}

fn row(kv: &KeyValue) -> Vec<String> {
    let lease = if kv.lease_id == 0 { NONE.to_owned() } else { kv.lease_id.to_string() };
    vec![
        kv.key.clone(),
        kv.mod_revision.to_string(),
        kv.version.to_string(),
        lease,
        kv.value.len().to_string(),
        or_none(preview(&kv.value)),
    ]
}

async fn watch(client: &Client, format: Format, args: WatchKeysArgs) -> Result<()> {
    let WatchKeysArgs { prefix, from, epoch, prev } = args;
    let request = WatchRequest {
        prefix: prefix.unwrap_or_default(),
        start_revision: from,
        prev_kv: prev,
        bookmark_interval: None,
        epoch,
    };
    let mut core = client.state().await?;
    let mut stream = core.watch(request).await.map_err(refused)?.into_inner();
    while let Some(message) = stream.message().await.map_err(refused)? {
        print(format, &message)?;
    }
    bail!("the core ended the watch")
}

fn print(format: Format, message: &WatchResponse) -> Result<()> {
    let mut lines = Vec::new();
    match message.kind() {
        Kind::Snapshot | Kind::Events => {
            lines.extend(message.events.iter().map(EventDocument::of));
        }
        Kind::Synced => lines.push(EventDocument::named("synced", message.revision)),
        Kind::Compacted => lines.push(EventDocument::named("compacted", message.revision)),
        Kind::Bookmark | Kind::Unspecified => {}
    }
    for line in lines {
        match format {
            Format::Table => writeln!(io::stdout(), "{}", line.text())?,
            Format::Json => {
                let json = serde_json::to_string(&line).context("failed to write JSON")?;
                writeln!(io::stdout(), "{json}")?;
            }
            Format::Yaml => {
                print_text("---\n")?;
                print_yaml(&line)?;
            }
        }
    }
    io::stdout().flush()?;
    Ok(())
}

/// A key as JSON and YAML have it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    key: String,
    /// If it is text.
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    /// If it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    value_base64: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    content_type: String,
    create_revision: i64,
    mod_revision: i64,
    version: i64,
    #[serde(skip_serializing_if = "is_zero")]
    lease_id: i64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_zero(number: &i64) -> bool {
    *number == 0
}

impl Document {
    fn of(kv: &KeyValue) -> Self {
        let text = std::str::from_utf8(&kv.value).ok().map(str::to_owned);
        Self {
            key: kv.key.clone(),
            value_base64: text.is_none().then(|| STANDARD.encode(&kv.value)),
            value: text,
            content_type: kv.content_type.clone(),
            create_revision: kv.create_revision,
            mod_revision: kv.mod_revision,
            version: kv.version,
            lease_id: kv.lease_id,
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct EventDocument {
    event: &'static str,
    revision: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    kv: Option<Document>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prev_kv: Option<Document>,
    #[serde(skip)]
    preview: String,
}

impl EventDocument {
    fn named(event: &'static str, revision: i64) -> Self {
        Self { event, revision, kv: None, prev_kv: None, preview: String::new() }
    }

    fn of(event: &Event) -> Self {
        let name = match event.r#type() {
            Type::Put => "put",
            Type::Delete => "delete",
            Type::Expire => "expire",
            Type::Unspecified => "unknown",
        };
        let kv = event.kv.clone().unwrap_or_default();
        Self {
            event: name,
            revision: kv.mod_revision,
            preview: preview(&kv.value),
            kv: Some(Document::of(&kv)),
            prev_kv: event.prev_kv.as_ref().map(Document::of),
        }
    }

    fn text(&self) -> String {
        let key = self.kv.as_ref().map(|kv| kv.key.as_str()).unwrap_or_default();
        let line = format!("{:<9} {:>8} {key} {}", self.event, self.revision, self.preview);
        line.trim_end().to_owned()
    }
}

/// The beginning of a value, in one line.
fn preview(value: &[u8]) -> String {
    let Ok(text) = std::str::from_utf8(value) else { return "(binary)".to_owned() };
    let mut preview: String =
        text.chars().take(PREVIEW_CHARS).collect::<String>().escape_debug().to_string();
    if text.chars().nth(PREVIEW_CHARS).is_some() {
        preview.push('…');
    }
    preview
}

fn read(from: impl Read) -> Result<Vec<u8>> {
    let mut value = Vec::new();
    from.take(VALUE_BYTES_MAX + 1).read_to_end(&mut value)?;
    if value.len() as u64 > VALUE_BYTES_MAX {
        bail!("a value takes at most {VALUE_BYTES_MAX} bytes");
    }
    Ok(value)
}
