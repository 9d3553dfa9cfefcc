//! Who is where: hosts, their addresses on the underlay and in the overlay, and the virtual addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The host of a cloud's router through which outside clients reach the virtual addresses.
pub(crate) const GATEWAY: &str = "gw1";
/// VMs behind the virtual addresses.
pub(crate) const WEB: [&str; 3] = ["web1", "web2", "web3"];

/// Address family of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

/// Where traffic is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum To {
    /// A host's own address.
    Underlay(&'static str),
    /// A VM's address in the network `shop`.
    Overlay(&'static str),
    /// The virtual address that the router leads to the gateway.
    Public,
    /// The virtual address within the network.
    Internal,
}

/// A host of the fleet, before it is built.
#[derive(Debug)]
pub(crate) struct Spec {
    pub(crate) name: &'static str,
    site: u8,
    host: u8,
    /// Of a VM of the fleet.
    pub(crate) vm: Option<Vm>,
}

/// What a VM is beside a host.
#[derive(Debug)]
pub(crate) struct Vm {
    /// Labels of its agent.
    pub(crate) labels: &'static str,
    /// Last part of its addresses in the overlay.
    overlay: u8,
}

impl Spec {
    /// Its own address of a family.
    pub(crate) fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => Ipv4Addr::new(10, 77, self.site, self.host).into(),
            Family::V6 => {
                let site = u16::from(self.site);
                Ipv6Addr::new(0xfd77, site, 0, 0, 0, 0, 0, alike(self.host)).into()
            }
        }
    }
}

const fn vm(name: &'static str, site: u8, host: u8, overlay: u8, labels: &'static str) -> Spec {
    Spec { name, site, host, vm: Some(Vm { labels, overlay }) }
}

const fn outsider(name: &'static str, site: u8, host: u8) -> Spec {
    Spec { name, site, host, vm: None }
}

/// All of them, in the order in which they are built.
pub(crate) const HOSTS: &[Spec] = &[
    vm(GATEWAY, 1, 5, 5, "role=gateway,site=a"),
    vm("web1", 1, 11, 11, "role=web,site=a"),
    vm("web2", 2, 11, 12, "role=web,site=b"),
    vm("web3", 2, 12, 13, "role=web,site=b"),
    vm("db1", 2, 21, 21, "role=db,site=b"),
    outsider("client", 9, 9),
    outsider("core", 9, 2),
];

/// A host by name.
pub(crate) fn spec(name: &str) -> Option<&'static Spec> {
    HOSTS.iter().find(|spec| spec.name == name)
}

/// Names of the VMs that run an agent.
pub(crate) fn vms() -> Vec<&'static str> {
    HOSTS.iter().filter(|spec| spec.vm.is_some()).map(|spec| spec.name).collect()
}

/// Pairs of different VMs, each in both orders.
pub(crate) fn pairs() -> Vec<(&'static str, &'static str)> {
    let vms = vms();
    let pairs = vms.iter().flat_map(|a| vms.iter().map(move |b| (*a, *b)));
    pairs.filter(|(a, b)| a != b).collect()
}

impl To {
    /// The address; `None` if there is no such host, or it is not in the overlay.
    pub(crate) fn address(self, family: Family) -> Option<IpAddr> {
        match self {
            Self::Underlay(name) => Some(spec(name)?.address(family)),
            Self::Overlay(name) => Some(overlay(spec(name)?.vm.as_ref()?.overlay, family)),
            Self::Internal => Some(overlay(80, family)),
            Self::Public => Some(match family {
                Family::V4 => Ipv4Addr::new(10, 77, 100, 80).into(),
                Family::V6 => Ipv6Addr::new(0xfd77, 0x100, 0, 0, 0, 0, 0, 0x80).into(),
            }),
        }
    }

    /// For people.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Underlay(host) => host.to_owned(),
            Self::Overlay(vm) => format!("{vm} in the overlay"),
            Self::Public => "public address".to_owned(),
            Self::Internal => "internal address".to_owned(),
        }
    }
}

/// Whether an address belongs to the network `shop`.
pub(crate) fn in_overlay(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.octets().starts_with(&[10, 70, 0]),
        IpAddr::V6(v6) => v6.segments().starts_with(&[0xfd70, 0, 0, 0]),
    }
}

fn overlay(host: u8, family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 70, 0, host).into(),
        Family::V6 => Ipv6Addr::new(0xfd70, 0, 0, 0, 0, 0, 0, alike(host)).into(),
    }
}

/// The decimal digits as hexadecimal ones, so that the addresses of both families read alike.
fn alike(host: u8) -> u16 {
    u16::from(host / 10 * 16 + host % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_both_families_read_alike() {
        let read =
            |to: To| [Family::V4, Family::V6].map(|family| to.address(family).unwrap().to_string());
        assert_eq!(read(To::Underlay("web3")), ["10.77.2.12", "fd77:2::12"]);
        assert_eq!(read(To::Overlay("web3")), ["10.70.0.13", "fd70::13"]);
        assert_eq!(read(To::Public), ["10.77.100.80", "fd77:100::80"]);
        assert_eq!(read(To::Internal), ["10.70.0.80", "fd70::80"]);
        assert_eq!(To::Overlay("client").address(Family::V4), None);
    }

    #[test]
    fn the_overlay_is_told_from_the_underlay() {
        for family in [Family::V4, Family::V6] {
            assert!(in_overlay(To::Overlay("db1").address(family).unwrap()));
            assert!(!in_overlay(To::Underlay("db1").address(family).unwrap()));
            assert!(!in_overlay(To::Public.address(family).unwrap()));
        }
    }
}
