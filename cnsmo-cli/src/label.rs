use std::{
    collections::BTreeMap,
    io::{self, Write as _},
};

use anyhow::{Result, bail};
use cnsmo_proto::{
    model::Labels,
    pb::{
        meta::Metadata,
        node::Node,
        resource::{
            ApplyRequest, GetRequest, Kind, Resource, apply_request::Mode,
            resource::Resource as Inner,
        },
    },
};

use crate::{
    args::LabelArgs,
    client::{Client, Resources, refused},
    output::{kind_word, labels},
};

pub(crate) async fn label(client: &Client, args: LabelArgs) -> Result<()> {
    let kind = Kind::from(args.kind);
    if kind != Kind::Node {
        bail!("only the labels of nodes are changed here: those of other kinds are in their files");
    }
    let changes = args.changes.iter().map(|text| change(text)).collect::<Result<Vec<_>>>()?;
    let mut core = client.resources().await?;
    let name = args.name.to_string();
    let mut changed = labels_of(&mut core, &name).await?;
    for (key, value) in changes {
        match value {
            Some(value) => changed.insert(key, value),
            None => changed.remove(&key),
        };
    }
    let shown = labels(&changed);
    let metadata = Metadata { name: name.clone(), labels: changed, ..Metadata::default() };
    let node = Node { metadata: Some(metadata), spec: None, status: None };
    let revision = update(&mut core, node).await?;
    writeln!(io::stdout(), "{}/{name} {shown}\nrevision {revision}", kind_word(kind))?;
    Ok(())
}

pub(crate) async fn labels_of(
    core: &mut Resources,
    node: &str,
) -> Result<BTreeMap<String, String>> {
    let request = GetRequest { kind: Kind::Node.into(), name: node.to_owned() };
    let resource = core.get(request).await.map_err(refused)?.into_inner().resource;
    match resource.and_then(|resource| resource.resource) {
        Some(Inner::Node(node)) => Ok(node.metadata.unwrap_or_default().labels),
        _ => bail!("the core sent no node"),
    }
}

/// Writes a VM that is there; the revision.
pub(crate) async fn update(core: &mut Resources, node: Node) -> Result<i64> {
    let request = ApplyRequest {
        resources: vec![Resource { resource: Some(Inner::Node(node)) }],
        mode: Mode::Update.into(),
        ..ApplyRequest::default()
    };
    Ok(core.apply(request).await.map_err(refused)?.into_inner().revision)
}

/// `KEY=VALUE`, or `KEY-` without a value.
fn change(text: &str) -> Result<(String, Option<String>)> {
    let (key, value) = match (text.split_once('='), text.strip_suffix('-')) {
        (Some((key, value)), _) => (key, Some(value.to_owned())),
        (None, Some(key)) => (key, None),
        (None, None) => bail!("`{text}` is neither KEY=VALUE nor KEY-"),
    };
    Labels::new(BTreeMap::from([(key.to_owned(), value.clone().unwrap_or_default())]))?;
    Ok((key.to_owned(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_sets_or_removes() {
        let set = |key: &str, value: &str| (key.to_owned(), Some(value.to_owned()));
        assert_eq!(change("role=web").unwrap(), set("role", "web"));
        assert_eq!(change("role=").unwrap(), set("role", ""));
        assert_eq!(change("role=a-").unwrap(), set("role", "a-"));
        assert_eq!(change("role-").unwrap(), ("role".to_owned(), None));
        for bad in ["role", "=web", "-", "a b=c"] {
            assert!(change(bad).is_err(), "{bad}");
        }
    }
}
