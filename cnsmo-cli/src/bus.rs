//! Messages between services, for a look and by hand.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use clap::Subcommand;
use cnsmo_proto::pb::bus::{
    DeleteGroupRequest, Group, ListMessagesRequest, ListStreamsRequest, Message, ReplayRequest,
    Stream, Subscription,
};
use cnsmo_service::bus::{Bus, Event};
use serde::Serialize;

use crate::{
    args::{Format, wait_time},
    client::{Client, refused},
    output::{or_none, print_json, print_table, print_text, print_yaml},
};

/// Largest payload that a core takes; more is not read.
const PAYLOAD_BYTES_MAX: u64 = 1 << 20;
/// Characters of a payload in a table.
const PREVIEW_CHARS: usize = 48;
/// Messages that may be on their way to a subscriber: a burst, while standard output is busy.
const CREDIT: u32 = 256;

#[derive(Subcommand)]
pub(crate) enum BusCommand {
    /// Publish a message: VALUE, the content of a file, or standard input
    Publish {
        #[command(flatten)]
        message: MessageArgs,
        /// Keep it on disk until each queue group of its stream has acknowledged it
        #[arg(long)]
        durable: bool,
        /// For --durable: a second message with the same id within 10 minutes is not kept
        #[arg(long, requires = "durable", value_name = "ID")]
        id: Option<String>,
        /// For --durable: messages of one key are delivered one at a time, in order
        #[arg(long, requires = "durable", value_name = "KEY")]
        key: Option<String>,
    },
    /// Print messages as they come, until interrupted; durable ones are acknowledged
    Subscribe(SubscribeArgs),
    /// Send a message to one subscriber and print its reply
    Request {
        #[command(flatten)]
        message: MessageArgs,
        /// At most 5m
        #[arg(long, default_value = "10s", value_parser = wait_time)]
        timeout: Duration,
        /// Give it to another subscriber if the first one goes away
        #[arg(long)]
        idempotent: bool,
    },
    /// List the streams of durable messages and their queue groups
    Streams,
    /// List messages of a stream; dead letters are in dead.STREAM
    Messages {
        stream: String,
        /// Those behind this sequence
        #[arg(long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(i64).range(0..))]
        after: i64,
        /// At most 1000
        #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000))]
        limit: u32,
    },
    /// Put dead letters of a stream back, each for the group that gave it up
    Replay {
        stream: String,
        /// Sequences in dead.STREAM [default: all]
        sequences: Vec<i64>,
        /// Only those of this group
        #[arg(long, value_name = "NAME")]
        group: Option<String>,
    },
    /// End a durable queue group: what it has not acknowledged is no longer kept for it
    DeleteGroup { stream: String, group: String },
}

#[derive(clap::Args)]
pub(crate) struct MessageArgs {
    subject: String,
    /// Not for secrets: others on this machine see arguments
    #[arg(conflicts_with = "file")]
    value: Option<String>,
    /// The payload; - for standard input
    #[arg(short = 'f', long, value_name = "FILE|-")]
    file: Option<PathBuf>,
    /// How to read the payload, for example application/json
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TYPE")]
    content_type: String,
    /// Beside the payload; repeatable
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
}

#[derive(clap::Args)]
pub(crate) struct SubscribeArgs {
    /// A subject; * stands for one token, > at the end for one or more
    pattern: String,
    /// Share the messages with the other members of this queue group
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
    /// Durable messages
    #[arg(long, requires = "group")]
    durable: bool,
    /// For --durable and a new group: where it begins [default: behind the last message]
    #[arg(long, default_value_t = 0, hide_default_value = true, requires = "durable", value_name = "N", value_parser = clap::value_parser!(i64).range(0..))]
    from: i64,
    /// End after so many messages
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

pub(crate) async fn bus(client: &Client, format: Format, command: BusCommand) -> Result<()> {
    match command {
        BusCommand::Publish { message, durable, id, key } => {
            let mut message = message.read()?;
            message.message_id = id.unwrap_or_default();
            message.ordering_key = key.unwrap_or_default();
            publish(client, format, message, durable).await
        }
        BusCommand::Subscribe(args) => subscribe(client, format, args).await,
        BusCommand::Request { message, timeout, idempotent } => {
            request(client, format, message.read()?, timeout, idempotent).await
        }
        BusCommand::Streams => streams(client, format).await,
        BusCommand::Messages { stream, after, limit } => {
            let request = ListMessagesRequest { stream, after_sequence: after, limit };
            messages(client, format, request).await
        }
        BusCommand::Replay { stream, sequences, group } => {
            let request = ReplayRequest { stream, sequences, group: group.unwrap_or_default() };
            let mut core = client.bus().await?;
            let replayed = core.replay(request).await.map_err(refused)?.into_inner().replayed;
            print_counts(format, "replayed", replayed)
        }
        BusCommand::DeleteGroup { stream, group } => {
            let request = DeleteGroupRequest { stream, group };
            client.bus().await?.delete_group(request).await.map_err(refused)?;
            Ok(())
        }
    }
}

impl MessageArgs {
    fn read(self) -> Result<Message> {
        let Self { subject, value, file, content_type, headers } = self;
        let payload = match (value, file) {
            (Some(value), _) => value.into_bytes(),
            (None, Some(path)) if path != Path::new("-") => {
                let file = File::open(&path);
                read(file.with_context(|| format!("failed to open {}", path.display()))?)
                    .with_context(|| format!("failed to read {}", path.display()))?
            }
            (None, _) => read(io::stdin()).context("failed to read standard input")?,
        };
        let headers = headers.into_iter().collect();
        let payload = payload.into();
        Ok(Message { subject, payload, content_type, headers, ..Message::default() })
    }
}

/// One byte more than a core takes tells that it is too much.
fn read(from: impl Read) -> io::Result<Vec<u8>> {
    let mut payload = Vec::new();
    from.take(PAYLOAD_BYTES_MAX + 1).read_to_end(&mut payload)?;
    Ok(payload)
}

fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("not of the form NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

async fn publish(client: &Client, format: Format, message: Message, durable: bool) -> Result<()> {
    let bus = Bus::new(client.connect().await?);
    if !durable {
        let receivers = bus.publish(message).await.map_err(refused)?;
        return print_counts(format, "receivers", receivers.into());
    }
    let (sequence, duplicate) = bus.publish_durable(message).await.map_err(refused)?;
    #[derive(Serialize)]
    struct Kept {
        sequence: i64,
        duplicate: bool,
    }
    let kept = Kept { sequence, duplicate };
    match format {
        Format::Table => {
            let note = if duplicate { " (kept before)" } else { "" };
            print_text(&format!("sequence {sequence}{note}\n"))
        }
        Format::Json => print_json(&kept),
        Format::Yaml => print_yaml(&kept),
    }
}

async fn request(
    client: &Client,
    format: Format,
    message: Message,
    timeout: Duration,
    idempotent: bool,
) -> Result<()> {
    let bus = Bus::new(client.connect().await?);
    let reply = bus.request(message, timeout, idempotent).await.map_err(refused)?;
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Reply<'a> {
        served_by: &'a str,
        content_type: &'a str,
        headers: &'a BTreeMap<String, String>,
        #[serde(flatten)]
        payload: Payload,
    }
    let document = || Reply {
        served_by: &reply.served_by,
        content_type: &reply.content_type,
        headers: &reply.headers,
        payload: Payload::of(&reply.payload),
    };
    match format {
        Format::Table => Ok(io::stdout().write_all(&reply.payload)?),
        Format::Json => print_json(&document()),
        Format::Yaml => print_yaml(&document()),
    }
}

async fn subscribe(client: &Client, format: Format, args: SubscribeArgs) -> Result<()> {
    let SubscribeArgs { pattern, group, durable, from, count } = args;
    let subscription = Subscription {
        subject: pattern,
        queue_group: group.unwrap_or_default(),
        durable,
        start_sequence: from,
        ..Subscription::default()
    };
    let bus = Bus::new(client.connect().await?);
    let credit = count.map_or(CREDIT, |count| u32::try_from(count).unwrap_or(CREDIT).min(CREDIT));
    let mut subscriber = bus.subscribe(subscription, credit);
    let mut left = count.unwrap_or(u64::MAX);
    while left > 0 {
        match subscriber.next().await.map_err(refused)? {
            Event::Subscribed { .. } => {}
            Event::Lagged { skipped } => writeln!(io::stderr(), "too slow: {skipped} missed")?,
            Event::Delivery(incoming) => {
                let (sequence, attempt) = (incoming.delivery.sequence, incoming.delivery.attempt);
                print_message(format, &Document::of(sequence, attempt, &incoming.message()))?;
                left -= 1;
                incoming.ack().await;
            }
        }
    }
    // What was said last is on its way before the connection ends.
    subscriber.end().await;
    Ok(())
}

async fn streams(client: &Client, format: Format) -> Result<()> {
    let mut core = client.bus().await?;
    let answer = core.list_streams(ListStreamsRequest {}).await.map_err(refused)?;
    let streams = answer.into_inner().streams;
    let documents = || streams.iter().map(StreamDocument::from).collect::<Vec<_>>();
    match format {
        Format::Json => print_json(&documents()),
        Format::Yaml => print_yaml(&documents()),
        Format::Table => print_table(
            &["STREAM", "MESSAGES", "LAST", "GROUP", "SUBJECT", "PENDING", "AT WORK", "MEMBERS"],
            streams.iter().flat_map(rows).collect(),
        ),
    }
}

/// A line for each group, or one for a stream without.
fn rows(stream: &Stream) -> Vec<Vec<String>> {
    let of = |group: Option<&Group>| {
        let number = |of: fn(&Group) -> String| or_none(group.map(of).unwrap_or_default());
        vec![
            stream.name.clone(),
            stream.messages.to_string(),
            stream.last_sequence.to_string(),
            number(|group| group.name.clone()),
            number(|group| group.subject.clone()),
            number(|group| group.pending.to_string()),
            number(|group| group.in_flight.to_string()),
            number(|group| group.members.to_string()),
        ]
    };
    if stream.groups.is_empty() {
        return vec![of(None)];
    }
    stream.groups.iter().map(|group| of(Some(group))).collect()
}

async fn messages(client: &Client, format: Format, request: ListMessagesRequest) -> Result<()> {
    let mut core = client.bus().await?;
    let stored = core.list_messages(request).await.map_err(refused)?.into_inner().messages;
    let documents: Vec<_> = stored
        .into_iter()
        .map(|stored| Document::of(stored.sequence, 0, &stored.message.unwrap_or_default()))
        .collect();
    match format {
        Format::Json => print_json(&documents),
        Format::Yaml => print_yaml(&documents),
        Format::Table => print_table(
            &["SEQUENCE", "SUBJECT", "KEY", "HEADERS", "PAYLOAD"],
            documents
                .iter()
                .map(|document| {
                    vec![
                        document.sequence.to_string(),
                        document.subject.clone(),
                        or_none(document.ordering_key.clone()),
                        crate::output::labels(&document.headers),
                        document.payload.preview(),
                    ]
                })
                .collect(),
        ),
    }
}

fn print_message(format: Format, document: &Document) -> Result<()> {
    match format {
        Format::Table => {
            let mut line = document.subject.clone();
            if document.sequence > 0 {
                line = format!("{line} {}", document.sequence);
            }
            writeln!(io::stdout(), "{line} {}", document.payload.preview())?;
        }
        Format::Json => {
            let line = serde_json::to_string(document).context("failed to write JSON")?;
            writeln!(io::stdout(), "{line}")?;
        }
        Format::Yaml => {
            print_text("---\n")?;
            print_yaml(document)?;
        }
    }
    io::stdout().flush()?;
    Ok(())
}

fn print_counts(format: Format, what: &str, count: i64) -> Result<()> {
    let document = BTreeMap::from([(what, count)]);
    match format {
        Format::Table => print_text(&format!("{what} {count}\n")),
        Format::Json => print_json(&document),
        Format::Yaml => print_yaml(&document),
    }
}

/// Stable names for programs.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    subject: String,
    #[serde(skip_serializing_if = "is_zero")]
    sequence: i64,
    #[serde(skip_serializing_if = "is_none")]
    attempt: u32,
    #[serde(skip_serializing_if = "String::is_empty")]
    message_id: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    ordering_key: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    content_type: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    headers: BTreeMap<String, String>,
    #[serde(flatten)]
    payload: Payload,
}

impl Document {
    fn of(sequence: i64, attempt: u32, message: &Message) -> Self {
        let payload = Payload::of(&message.payload);
        let Message { subject, content_type, headers, message_id, ordering_key, .. } =
            message.clone();
        Self {
            subject,
            sequence,
            attempt,
            message_id,
            ordering_key,
            content_type,
            headers,
            payload,
        }
    }
}

fn is_zero(sequence: &i64) -> bool {
    *sequence == 0
}

fn is_none(attempt: &u32) -> bool {
    *attempt == 0
}

/// As text where it is one.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
enum Payload {
    Payload(String),
    PayloadBase64(String),
}

impl Payload {
    fn of(bytes: &[u8]) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(text) => Self::Payload(text.to_owned()),
            Err(_) => Self::PayloadBase64(STANDARD.encode(bytes)),
        }
    }

    /// On one line, without what a terminal would take for a command.
    fn preview(&self) -> String {
        let (Self::Payload(text) | Self::PayloadBase64(text)) = self;
        let mut preview: String =
            text.chars().take(PREVIEW_CHARS).flat_map(char::escape_debug).collect();
        if text.chars().count() > PREVIEW_CHARS {
            preview.push('…');
        }
        preview
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct StreamDocument<'a> {
    name: &'a str,
    messages: i64,
    bytes: i64,
    first_sequence: i64,
    last_sequence: i64,
    groups: Vec<GroupDocument<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct GroupDocument<'a> {
    name: &'a str,
    subject: &'a str,
    pending: i64,
    in_flight: i64,
    members: u32,
}

impl<'a> From<&'a Stream> for StreamDocument<'a> {
    fn from(stream: &'a Stream) -> Self {
        let group = |group: &'a Group| GroupDocument {
            name: &group.name,
            subject: &group.subject,
            pending: group.pending,
            in_flight: group.in_flight,
            members: group.members,
        };
        Self {
            name: &stream.name,
            messages: stream.messages,
            bytes: stream.bytes,
            first_sequence: stream.first_sequence,
            last_sequence: stream.last_sequence,
            groups: stream.groups.iter().map(group).collect(),
        }
    }
}
