use anyhow::Result;
use cnsmo_proto::{
    manifest,
    pb::network::{Member, Network, Refused, StaticAddresses},
};

use super::{describe_conditions, describe_metadata, field, section};
use crate::output::{NONE, addresses, labels, or_none};

/// Characters of a public key in a table: enough to tell keys apart. `-o json` has all of it.
const KEY_SHOWN: usize = 10;

pub(super) fn describe(network: &Network) -> Result<()> {
    let spec = network.spec.clone().unwrap_or_default();
    let status = network.status.clone().unwrap_or_default();
    describe_metadata(network.metadata.as_ref())?;
    field("Prefixes", &addresses(&spec.ipv4_prefix, &spec.ipv6_prefix))?;
    field("Selector", &labels(&spec.members))?;
    field("Listen port", &spec.listen_port.to_string())?;
    field("MTU", &if spec.mtu == 0 { "derived".to_owned() } else { spec.mtu.to_string() })?;
    let fixed =
        |(node, at): (&String, &StaticAddresses)| vec![node.clone(), addresses(&at.ipv4, &at.ipv6)];
    section("Fixed addresses", &["NODE", "ADDRESSES"], spec.addresses.iter().map(fixed).collect())?;
    let members = status.members.iter().map(member_row).collect();
    section("Members", &["NODE", "ADDRESSES", "KEY", "ENDPOINTS"], members)?;
    let refused = |r: &Refused| vec![r.node.clone(), or_none(&r.message)];
    section("Refused", &["NODE", "MESSAGE"], status.refused.iter().map(refused).collect())?;
    describe_conditions(&status.conditions)
}

fn member_row(member: &Member) -> Vec<String> {
    let key = match manifest::public_key(&member.public_key) {
        key if key.is_empty() => NONE.to_owned(),
        key => key.chars().take(KEY_SHOWN).chain("...".chars()).collect(),
    };
    vec![
        member.node.clone(),
        addresses(&member.ipv4, &member.ipv6),
        key,
        or_none(member.endpoints.join(",")),
    ]
}
