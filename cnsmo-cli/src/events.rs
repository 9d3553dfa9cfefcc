//! `cnsmo events`: what happened.

use std::io::{self, Write as _};

use anyhow::{Context as _, Result, bail};
use cnsmo_proto::pb::event::{Event, WatchEventsRequest, watch_events_response::Message};
use serde::Serialize;

use crate::{
    args::{EventsArgs, Format},
    client::{Client, refused},
    output::{or_none, print_text, print_yaml},
};

/// One line, object or document each, as they come.
pub(crate) async fn events(client: &Client, format: Format, args: EventsArgs) -> Result<()> {
    let EventsArgs { from, follow, kinds, name } = args;
    let request = WatchEventsRequest { from_revision: from, follow, kinds, name };
    let mut core = client.events().await?;
    let mut stream = core.watch_events(request).await.map_err(refused)?.into_inner();
    while let Some(response) = stream.message().await.map_err(refused)? {
        // Where history ends tells a program nothing that the revisions do not.
        if let Some(Message::Event(event)) = response.message {
            print_event(format, &event)?;
        }
    }
    if follow {
        bail!("the core ended the stream")
    }
    Ok(())
}

/// Stable names for programs.
#[derive(Serialize)]
struct Document<'a> {
    revision: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    time: Option<String>,
    kind: &'a str,
    name: &'a str,
    what: &'a str,
    reason: &'a str,
    message: &'a str,
    node: &'a str,
    by: &'a str,
}

impl<'a> From<&'a Event> for Document<'a> {
    fn from(event: &'a Event) -> Self {
        Self {
            revision: event.revision,
            time: event.time.as_ref().map(ToString::to_string),
            kind: &event.kind,
            name: &event.name,
            what: &event.what,
            reason: &event.reason,
            message: &event.message,
            node: &event.node,
            by: &event.by,
        }
    }
}

fn print_event(format: Format, event: &Event) -> Result<()> {
    match format {
        Format::Json => {
            let line =
                serde_json::to_string(&Document::from(event)).context("failed to write JSON")?;
            writeln!(io::stdout(), "{line}")?;
        }
        Format::Yaml => {
            print_text("---\n")?;
            print_yaml(&Document::from(event))?;
        }
        Format::Table => {
            let line = line(event);
            writeln!(io::stdout(), "{}", line.trim_end())?;
        }
    }
    io::stdout().flush()?;
    Ok(())
}

fn line(event: &Event) -> String {
    let Event { revision, time, kind, name, what, reason, message, node, by } = event;
    // Seconds are enough for people.
    let time = or_none(time.as_ref().map(ToString::to_string).unwrap_or_default());
    let time = time.split('.').next().unwrap_or_default().trim_end_matches('Z');
    let mut line = format!("{revision:>8}  {time:<19}  {kind}/{name} {what}");
    for (word, value) in [("", reason), ("node=", node), ("by=", by)] {
        // A node's own events name it already.
        if !value.is_empty() && value != name {
            line += &format!(" {word}{value}");
        }
    }
    if !message.is_empty() {
        line += &format!(": {message}");
    }
    line
}
