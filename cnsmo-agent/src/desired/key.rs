use std::fmt;

use cnsmo_proto::model::{Invalid, Name};

const FIREWALL_POLICY: &str = "firewall-policy";
const NETWORK: &str = "network";
const MEMBER: &str = "member";
const LOAD_BALANCER: &str = "load-balancer";
const BACKEND: &str = "backend";
const INSTANCE: &str = "instance";

/// Names a resource in the set of a VM, as `Resource.name` of agent.proto does.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// `firewall-policy/NAME`
    FirewallPolicy(Name),
    /// `network/NAME`
    Network(Name),
    /// `member/NETWORK/NODE`
    Member(Name, Name),
    /// `load-balancer/NAME`
    LoadBalancer(Name),
    /// `backend/BALANCER/NODE` or, of an instance there, `backend/BALANCER/NODE/INSTANCE`
    Backend(Name, Name, Option<Name>),
    /// `instance/DEPLOYMENT/NAME`
    Instance(Name, Name),
}

impl Key {
    /// Whether it is of a service's instance, which packets do not go by.
    pub fn is_instance(&self) -> bool {
        matches!(self, Self::Instance(..))
    }

    /// Whether it is `whole` or a record derived for it, which may be what is wrong with `whole`.
    pub fn is_part_of(&self, whole: &Self) -> bool {
        match (self, whole) {
            (Self::Member(network, _), Self::Network(name)) => network == name,
            (Self::Backend(balancer, ..), Self::LoadBalancer(name)) => balancer == name,
            _ => self == whole,
        }
    }
}

impl std::str::FromStr for Key {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let (kind, rest) = text.split_once('/').unwrap_or((text, ""));
        let pair = || {
            let (first, second) = rest.split_once('/').unwrap_or((rest, ""));
            Ok((Name::new(first)?, Name::new(second)?))
        };
        match kind {
            FIREWALL_POLICY => Name::new(rest).map(Self::FirewallPolicy),
            NETWORK => Name::new(rest).map(Self::Network),
            LOAD_BALANCER => Name::new(rest).map(Self::LoadBalancer),
            MEMBER => pair().map(|(network, node)| Self::Member(network, node)),
            INSTANCE => pair().map(|(deployment, name)| Self::Instance(deployment, name)),
            BACKEND => {
                let (balancer, backend) = rest.split_once('/').unwrap_or((rest, ""));
                let (node, instance) = match backend.split_once('/') {
                    Some((node, instance)) => (node, Some(Name::new(instance)?)),
                    None => (backend, None),
                };
                Ok(Self::Backend(Name::new(balancer)?, Name::new(node)?, instance))
            }
            _ => Err(Invalid::new("begins with no kind of resource that this agent knows")),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FirewallPolicy(name) => write!(f, "{FIREWALL_POLICY}/{name}"),
            Self::Network(name) => write!(f, "{NETWORK}/{name}"),
            Self::Member(network, node) => write!(f, "{MEMBER}/{network}/{node}"),
            Self::LoadBalancer(name) => write!(f, "{LOAD_BALANCER}/{name}"),
            Self::Instance(deployment, name) => write!(f, "{INSTANCE}/{deployment}/{name}"),
            Self::Backend(balancer, node, None) => write!(f, "{BACKEND}/{balancer}/{node}"),
            Self::Backend(balancer, node, Some(instance)) => {
                write!(f, "{BACKEND}/{balancer}/{node}/{instance}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_as_they_are_written() {
        for text in [
            "firewall-policy/a",
            "network/n",
            "member/n/vm-1",
            "load-balancer/b",
            "backend/b/vm-1",
            "backend/b/vm-1/web-1",
            "instance/web/web-1",
        ] {
            assert_eq!(text.parse::<Key>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "a",
            "policy/a",
            "network",
            "network/",
            "network/a/b",
            "member/n",
            "member/n/x/y",
            "backend/b",
            "backend/b/x/",
            "backend/b/x/y/z",
        ] {
            assert!(text.parse::<Key>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn derived_records_are_parts_of_what_they_are_derived_for() {
        let key = |text: &str| text.parse::<Key>().unwrap();
        for (part, whole, is) in [
            ("network/n", "network/n", true),
            ("member/n/a", "network/n", true),
            ("member/m/a", "network/n", false),
            ("backend/n/a", "network/n", false),
            ("backend/b/a", "load-balancer/b", true),
            ("backend/b/a/web-1", "load-balancer/b", true),
            ("load-balancer/b", "backend/b/a", false),
        ] {
            assert_eq!(key(part).is_part_of(&key(whole)), is, "{part} of {whole}");
        }
    }
}
