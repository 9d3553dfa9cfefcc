//! The spec of a `Network`.

use std::{collections::BTreeMap, net::IpAddr};

use serde::Serialize;

use super::{
    decode::Decoder,
    document,
    tree::{Node, Value},
};
use crate::{
    model,
    pb::network::{NetworkSpec, StaticAddresses},
};

pub(super) fn decode(d: &mut Decoder, node: &Node) -> Option<NetworkSpec> {
    const FIELDS: [&str; 6] = ["ipv4", "ipv6", "members", "addresses", "listenPort", "mtu"];
    let before = d.problems();
    let fields = d.fields(node, &FIELDS)?;
    let mtu = u32::from(model::MTU_MIN)..=u32::from(model::MTU_MAX);
    let spec = NetworkSpec {
        ipv4_prefix: d.optional(&fields, "ipv4", Decoder::filled).unwrap_or_default(),
        ipv6_prefix: d.optional(&fields, "ipv6", Decoder::filled).unwrap_or_default(),
        members: d.optional(&fields, "members", document::labels).unwrap_or_default(),
        addresses: d
            .optional(&fields, "addresses", |d, node| {
                d.entries(node, "a mapping of VMs to addresses", static_addresses)
            })
            .unwrap_or_default(),
        listen_port: d
            .optional(&fields, "listenPort", |d, node| d.number(node, 1..=u16::MAX.into()))
            .unwrap_or_default(),
        mtu: d.optional(&fields, "mtu", |d, node| d.number(node, mtu)).unwrap_or_default(),
    };
    if d.problems() > before {
        return None;
    }
    match model::Network::try_from(spec) {
        Ok(network) => Some((&network).into()),
        Err(invalid) => {
            d.refuse_invalid(node, in_words_of_the_manifest(&invalid));
            None
        }
    }
}

/// One address, or one per family.
fn static_addresses(d: &mut Decoder, node: &Node) -> Option<StaticAddresses> {
    match &node.value {
        Value::Text(text) => {
            let address = text.parse::<IpAddr>();
            match address {
                Ok(IpAddr::V4(v4)) => Some((v4.to_string(), String::new())),
                Ok(IpAddr::V6(v6)) => Some((String::new(), v6.to_string())),
                Err(_) => {
                    d.mistyped(node, "an IP address");
                    None
                }
            }
            .map(|(ipv4, ipv6)| StaticAddresses { ipv4, ipv6 })
        }
        Value::Map(entries) if entries.is_empty() => {
            d.refuse(node, "no address: leave the VM out, and it gets free ones");
            None
        }
        Value::Map(_) => {
            let fields = d.fields(node, &["ipv4", "ipv6"])?;
            Some(StaticAddresses {
                ipv4: d.optional(&fields, "ipv4", Decoder::filled).unwrap_or_default(),
                ipv6: d.optional(&fields, "ipv6", Decoder::filled).unwrap_or_default(),
            })
        }
        Value::Null | Value::Bool(_) | Value::Integer(_) | Value::Float(_) | Value::List(_) => {
            d.mistyped(node, "an IP address, or a mapping with ipv4 and ipv6");
            None
        }
    }
}

/// The model speaks of the API's fields.
fn in_words_of_the_manifest(invalid: &model::Invalid) -> model::Invalid {
    let here = |text: &str| text.replace("ipv4Prefix", "ipv4").replace("ipv6Prefix", "ipv6");
    model::Invalid::new(here(invalid.reason())).at(here(invalid.field()))
}

/// The spec as it is written.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Document {
    #[serde(skip_serializing_if = "String::is_empty")]
    ipv4: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    ipv6: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    members: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    addresses: BTreeMap<String, AddressesDocument>,
    #[serde(skip_serializing_if = "Option::is_none")]
    listen_port: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mtu: Option<u32>,
}

#[derive(Clone, Debug, Serialize)]
struct AddressesDocument {
    #[serde(skip_serializing_if = "String::is_empty")]
    ipv4: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    ipv6: String,
}

impl Document {
    pub(super) fn new(spec: &NetworkSpec) -> Self {
        let addresses = |(node, addresses): (&String, &StaticAddresses)| {
            let StaticAddresses { ipv4, ipv6 } = addresses.clone();
            (node.clone(), AddressesDocument { ipv4, ipv6 })
        };
        Self {
            ipv4: spec.ipv4_prefix.clone(),
            ipv6: spec.ipv6_prefix.clone(),
            members: spec.members.clone(),
            addresses: spec.addresses.iter().map(addresses).collect(),
            listen_port: Some(spec.listen_port).filter(|port| *port > 0),
            mtu: Some(spec.mtu).filter(|mtu| *mtu > 0),
        }
    }
}
