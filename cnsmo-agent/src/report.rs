//! What the agent tells about its VM.

use std::collections::BTreeMap;

use cnsmo_proto::{
    model::Name,
    pb::{
        agent::{PolicyCounters, StatusReport},
        node::{DropCounter, FirewallStatus, Interface, NodeStatus},
        policy::RuleCounter,
    },
};

use crate::{
    datapath::{Attachment, Count, Status},
    node,
};

/// The state of this VM and its data path, for the core.
pub fn status_report(status: Status, trouble: Option<(&'static str, String)>) -> StatusReport {
    let (reason, message) = trouble.unwrap_or_default();
    let interfaces = status.interfaces.into_iter().map(interface).collect();
    let node = NodeStatus {
        reason: reason.to_owned(),
        message,
        addresses: node::addresses(),
        kernel: node::kernel_release(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        interfaces,
        firewall: Some(FirewallStatus {
            flows: status.flows,
            rules: status.rules,
            drops: status.drops.into_iter().map(drop_counter).collect(),
        }),
        ..NodeStatus::default()
    };
    let policies = status.counters.into_iter().map(policy_counters).collect();
    StatusReport { node: Some(node), policies, load_balancers: Vec::new() }
}

fn interface(attachment: Attachment) -> Interface {
    Interface {
        name: attachment.interface,
        ingress: attachment.ingress.to_owned(),
        egress: attachment.egress.to_owned(),
    }
}

fn drop_counter(
    (direction, reason, count): (cnsmo_proto::model::Direction, &str, Count),
) -> DropCounter {
    let Count { packets, bytes } = count;
    DropCounter { reason: reason.to_owned(), direction: direction.to_string(), packets, bytes }
}

fn policy_counters((policy, rules): (Name, BTreeMap<Name, Count>)) -> PolicyCounters {
    let counter = |(rule, Count { packets, bytes }): (Name, Count)| RuleCounter {
        rule: rule.to_string(),
        packets,
        bytes,
    };
    PolicyCounters { policy: policy.to_string(), rules: rules.into_iter().map(counter).collect() }
}

#[cfg(test)]
mod tests {
    use cnsmo_proto::model::Direction;

    use super::*;

    #[test]
    fn everything_the_data_path_says_is_reported() {
        let count = Count { packets: 3, bytes: 180 };
        let name = |n: &str| Name::new(n).unwrap();
        let status = Status {
            interfaces: vec![Attachment {
                interface: "eth0".into(),
                ingress: "xdp-native",
                egress: "tcx",
            }],
            flows: 5,
            rules: 2,
            counters: [(name("web"), [(name("http"), count)].into())].into(),
            drops: vec![(Direction::Ingress, "policy", count)],
        };
        let report = status_report(status, Some(("LedgerDamaged", "why".into())));
        let node = report.node.unwrap();
        assert_eq!((node.reason.as_str(), node.message.as_str()), ("LedgerDamaged", "why"));
        assert_eq!(node.interfaces[0].ingress, "xdp-native");
        let firewall = node.firewall.unwrap();
        assert_eq!((firewall.flows, firewall.rules), (5, 2));
        assert_eq!(firewall.drops[0].direction, "ingress");
        assert_eq!(firewall.drops[0].bytes, 180);
        assert_eq!(report.policies[0].rules[0].rule, "http");
        assert_eq!(report.policies[0].rules[0].packets, 3);
    }
}
