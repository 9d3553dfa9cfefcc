//! Resources as types that only hold valid values. A message is checked once, at the edge of a program, by `TryFrom`;
//! nothing behind it sees a protobuf or an invalid value.

mod balancer;
mod deployment;
mod error;
mod firewall;
mod network;
mod process;

use std::{collections::BTreeMap, fmt};

pub use balancer::{
    ADDRESSES_MAX, Algorithm, Backend, Backends, HealthCheck, LoadBalancer, Mode, PORTS_MAX,
    ServicePort,
};
pub use deployment::{
    ATTRIBUTES_MAX, DEPLOYMENT_PORTS_MAX, Deployment, Instance, NEEDS_MAX, Need, Placement, Port,
    REPLICAS_MAX, Rollout, SPREAD, Template, cycle, port_variable,
};
pub use error::Invalid;
pub use firewall::{
    Action, CONNECTIONS_MAX, Direction, FirewallPolicy, FlowTimeouts, IcmpMatch, LIMIT_FLOWS_MAX,
    LIMIT_PERIODS, PEERS_MAX, PRIORITY_MAX, Peer, PolicyDefaults, PolicyMode, PortRange, Protocol,
    RANGES_MAX, RESOLVED_MAX, RULES_MAX, RateLimit, Rule, TIMEOUT_SECONDS_MAX, protocol,
};
pub use network::{
    Addresses, ENDPOINTS_MAX, LISTEN_PORT, MTU_MAX, MTU_MIN, Member, Network, PublicKey,
    STATIC_ADDRESSES_MAX, TUNNEL_OVERHEAD,
};
pub use process::{
    COMMAND_MAX, Check, Driver, Limits, Probe, Process, TEXT_BYTES_MAX, UNIT_TIMEOUT, Unit,
    VARIABLES_MAX,
};

/// Longest resource name, a DNS label (RFC 1123, section 2.1).
pub const NAME_BYTES_MAX: usize = 63;
/// Labels on one resource. Selectors are matched against each VM, so the number is bounded.
pub const LABELS_MAX: usize = 64;
/// Bytes of a label's key or value.
pub const LABEL_BYTES_MAX: usize = 128;

/// A resource name: 1 to 63 of `a-z`, `0-9` and `-`, neither first nor last a `-`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(String);

impl Name {
    /// Checks `text`.
    pub fn new(text: impl Into<String>) -> Result<Self, Invalid> {
        let text = text.into();
        let fits = (1..=NAME_BYTES_MAX).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !text.starts_with('-')
            && !text.ends_with('-');
        if fits {
            Ok(Self(text))
        } else {
            Err(Invalid::new(format!(
                "`{}` is not a name: 1 to {NAME_BYTES_MAX} of a-z, 0-9 and '-', not at either end",
                error::shorten(&text)
            )))
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::str::FromStr for Name {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        Self::new(text)
    }
}

/// Labels of a resource, or a selector: the labels that a resource must have, all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Labels(BTreeMap<String, String>);

impl Labels {
    /// Checks number, length and characters: printable ASCII without blank, `=` and `,`; keys not empty.
    pub fn new(labels: BTreeMap<String, String>) -> Result<Self, Invalid> {
        if labels.len() > LABELS_MAX {
            return Err(Invalid::new(format!(
                "{} labels; at most {LABELS_MAX} are allowed",
                labels.len()
            )));
        }
        for (key, value) in &labels {
            for (what, text) in [("key", key), ("value", value)] {
                if text.len() > LABEL_BYTES_MAX {
                    return Err(Invalid::new(format!(
                        "the label {what} is longer than {LABEL_BYTES_MAX} bytes"
                    ))
                    .at(error::shorten(key)));
                }
                if !text.bytes().all(|b| b.is_ascii_graphic() && b != b'=' && b != b',') {
                    return Err(Invalid::new(format!(
                        "the label {what} `{}` has a character other than printable ASCII, or one of blank, '=' and ','",
                        error::shorten(text)
                    ))
                    .at(error::shorten(key)));
                }
            }
            if key.is_empty() {
                return Err(Invalid::new("a label key is empty"));
            }
        }
        Ok(Self(labels))
    }

    /// Whether `of` has all of these labels. No labels match everything.
    pub fn selects(&self, of: &Self) -> bool {
        self.0.iter().all(|(key, value)| of.0.get(key) == Some(value))
    }

    /// The labels, by key.
    pub fn as_map(&self) -> &BTreeMap<String, String> {
        &self.0
    }

    /// These labels, with those of `other` in place of equal keys.
    #[must_use]
    pub fn overridden_by(mut self, other: &Self) -> Self {
        self.0.extend(other.0.clone());
        self
    }
}

impl fmt::Display for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for (key, value) in &self.0 {
            write!(f, "{}{key}={value}", if first { "" } else { "," })?;
            first = false;
        }
        Ok(())
    }
}

/// `key=value[,key=value]`, as on command lines.
impl std::str::FromStr for Labels {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        let mut labels = BTreeMap::new();
        for pair in text.split(',').filter(|pair| !pair.is_empty()) {
            let Some((key, value)) = pair.split_once('=') else {
                return Err(Invalid::new(format!(
                    "`{}` is not of the form key=value",
                    error::shorten(pair)
                )));
            };
            if labels.insert(key.to_owned(), value.to_owned()).is_some() {
                return Err(Invalid::new(format!("label `{}` twice", error::shorten(key))));
            }
        }
        Self::new(labels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels() {
        for good in ["a", "web-1", "0", &"x".repeat(63)] {
            assert_eq!(Name::new(good).unwrap().as_str(), good);
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", "ä", &"x".repeat(64)] {
            assert!(Name::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_selector_needs_all_of_its_labels() {
        let node: Labels = "role=web,zone=a".parse().unwrap();
        for (selector, selects) in [
            ("", true),
            ("role=web", true),
            ("role=web,zone=a", true),
            ("role=db", false),
            ("x=y", false),
        ] {
            assert_eq!(selector.parse::<Labels>().unwrap().selects(&node), selects, "{selector}");
        }
    }

    #[test]
    fn labels_refuse_what_a_selector_could_not_write() {
        for bad in ["role", "=web", "role=a b", "role=a=b", "a=1,a=2"] {
            assert!(bad.parse::<Labels>().is_err(), "{bad}");
        }
    }
}
