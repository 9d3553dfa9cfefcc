use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{Invalid, Labels, Name, error::shorten};
use crate::pb::network as pb;

/// UDP port of a tunnel, unless the spec says otherwise. WireGuard's customary one.
pub const LISTEN_PORT: u16 = 51_820;
/// Bytes that a tunnel adds to a packet over IPv6: header 40, UDP 8, WireGuard 32.
pub const TUNNEL_OVERHEAD: u16 = 80;
/// IPv6 needs it (RFC 8200, section 5).
pub const MTU_MIN: u16 = 1_280;
/// A jumbo frame of 9,000 bytes less [`TUNNEL_OVERHEAD`].
pub const MTU_MAX: u16 = 9_000 - TUNNEL_OVERHEAD;
/// Static addresses in one network; the rest are given out.
pub const STATIC_ADDRESSES_MAX: usize = 65_536;
/// Endpoints and addresses that one VM announces.
pub const ENDPOINTS_MAX: usize = 16;

/// The spec of a `Network`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// At least one of the two is there. Host bits are zero.
    pub ipv4: Option<Ipv4Net>,
    /// See `ipv4`.
    pub ipv6: Option<Ipv6Net>,
    /// VMs that are in it.
    pub members: Labels,
    /// By name of the VM.
    pub addresses: BTreeMap<Name, Addresses>,
    /// UDP port on each VM.
    pub listen_port: u16,
    /// Of the tunnel device; `None`: derived on each VM.
    pub mtu: Option<u16>,
}

impl Network {
    /// The prefixes, IPv4 first.
    pub fn prefixes(&self) -> impl Iterator<Item = IpNet> {
        self.ipv4.map(IpNet::V4).into_iter().chain(self.ipv6.map(IpNet::V6))
    }

    /// Whether an address is one of the network's.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.prefixes().any(|prefix| prefix.contains(&address))
    }
}

/// Addresses of a VM in a network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Addresses {
    /// IPv4.
    pub v4: Option<Ipv4Addr>,
    /// IPv6.
    pub v6: Option<Ipv6Addr>,
}

impl Addresses {
    /// IPv4 first.
    pub fn iter(self) -> impl Iterator<Item = IpAddr> {
        self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6))
    }

    /// From texts; an empty one is none.
    fn parse(v4: &str, v6: &str) -> Result<Self, Invalid> {
        Ok(Self {
            v4: optional(v4, "an IPv4 address").map_err(|e| e.at("ipv4"))?,
            v6: optional(v6, "an IPv6 address").map_err(|e| e.at("ipv6"))?,
        })
    }
}

/// Public half of an X25519 key pair (RFC 7748).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublicKey(pub [u8; 32]);

impl TryFrom<&[u8]> for PublicKey {
    type Error = Invalid;
    fn try_from(bytes: &[u8]) -> Result<Self, Invalid> {
        let wrong = || Invalid::new(format!("{} bytes; a key has 32", bytes.len()));
        bytes.try_into().map(Self).map_err(|_| wrong())
    }
}

/// Base64 (RFC 4648, section 4), as WireGuard's tools show keys.
impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str("…")
    }
}

/// A VM of a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Name of the network.
    pub network: Name,
    /// Name of the VM.
    pub node: Name,
    /// In the network; at least one.
    pub addresses: Addresses,
    /// `None`: not announced yet.
    pub public_key: Option<PublicKey>,
    /// The likeliest first.
    pub endpoints: Vec<SocketAddr>,
    /// Of the node.
    pub labels: Labels,
}

impl TryFrom<pb::NetworkSpec> for Network {
    type Error = Invalid;

    fn try_from(spec: pb::NetworkSpec) -> Result<Self, Invalid> {
        let ipv4: Option<Ipv4Net> =
            optional(&spec.ipv4_prefix, "an IPv4 CIDR").map_err(|e| e.at("ipv4Prefix"))?;
        let ipv6: Option<Ipv6Net> =
            optional(&spec.ipv6_prefix, "an IPv6 CIDR").map_err(|e| e.at("ipv6Prefix"))?;
        if ipv4.is_none() && ipv6.is_none() {
            return Err(
                Invalid::new("missing, and so is ipv6Prefix: one is needed").at("ipv4Prefix")
            );
        }
        if let Some(net) = ipv4.filter(|net| !(8..=30).contains(&net.prefix_len())) {
            return Err(Invalid::new(format!("{net} is not from /8 to /30")).at("ipv4Prefix"));
        }
        if let Some(net) = ipv6.filter(|net| !(16..=126).contains(&net.prefix_len())) {
            return Err(Invalid::new(format!("{net} is not from /16 to /126")).at("ipv6Prefix"));
        }
        if let Some(net) = ipv4.filter(|net| !is_for_hosts(net.network().into())) {
            return Err(Invalid::new(format!("{net} has no addresses for VMs")).at("ipv4Prefix"));
        }
        if let Some(net) = ipv6.filter(|net| !is_for_hosts(net.network().into())) {
            return Err(Invalid::new(format!("{net} has no addresses for VMs")).at("ipv6Prefix"));
        }
        if let Some(net) = ipv4.filter(|net| net.network() != net.addr()) {
            let hint = format!("{net} has host bits; did you mean {}?", net.trunc());
            return Err(Invalid::new(hint).at("ipv4Prefix"));
        }
        if let Some(net) = ipv6.filter(|net| net.network() != net.addr()) {
            let hint = format!("{net} has host bits; did you mean {}?", net.trunc());
            return Err(Invalid::new(hint).at("ipv6Prefix"));
        }
        let members = Labels::new(spec.members).map_err(|e| e.at("members"))?;
        let listen_port = match spec.listen_port {
            0 => LISTEN_PORT,
            n => u16::try_from(n)
                .map_err(|_| Invalid::new(format!("{n} is above 65535")).at("listenPort"))?,
        };
        let mtu = match spec.mtu {
            0 => None,
            n => {
                Some(u16::try_from(n).ok().filter(|n| (MTU_MIN..=MTU_MAX).contains(n)).ok_or_else(
                    || Invalid::new(format!("{n} is not from {MTU_MIN} to {MTU_MAX}")).at("mtu"),
                )?)
            }
        };
        let mut network =
            Self { ipv4, ipv6, members, addresses: BTreeMap::new(), listen_port, mtu };
        network.addresses =
            network.static_addresses(spec.addresses).map_err(|e| e.at("addresses"))?;
        Ok(network)
    }
}

impl Network {
    fn static_addresses(
        &self,
        wire: BTreeMap<String, pb::StaticAddresses>,
    ) -> Result<BTreeMap<Name, Addresses>, Invalid> {
        if wire.len() > STATIC_ADDRESSES_MAX {
            let n = wire.len();
            return Err(Invalid::new(format!("{n}; at most {STATIC_ADDRESSES_MAX} are allowed")));
        }
        let mut owners = BTreeMap::new();
        let mut all = BTreeMap::new();
        for (node, wire) in wire {
            let here = |e: Invalid| e.at(shorten(&node));
            let name = Name::new(node.clone()).map_err(here)?;
            let addresses = Addresses::parse(&wire.ipv4, &wire.ipv6).map_err(here)?;
            for address in addresses.iter() {
                if !self.usable(address) {
                    let why = format!("{address} is not an address for a VM of the network");
                    return Err(here(Invalid::new(why)));
                }
                if let Some(other) = owners.insert(address, name.clone()) {
                    return Err(here(Invalid::new(format!(
                        "{address} is the address of `{other}`"
                    ))));
                }
            }
            if addresses != Addresses::default() {
                all.insert(name, addresses);
            }
        }
        Ok(all)
    }

    /// Whether a VM may have the address: within the prefix, and neither its first nor its last.
    pub fn usable(&self, address: IpAddr) -> bool {
        self.prefixes().any(|net| {
            net.contains(&address) && net.network() != address && net.broadcast() != address
        })
    }
}

impl From<&Network> for pb::NetworkSpec {
    fn from(network: &Network) -> Self {
        let addresses = |(node, a): (&Name, &Addresses)| {
            (node.to_string(), pb::StaticAddresses { ipv4: text(a.v4), ipv6: text(a.v6) })
        };
        Self {
            ipv4_prefix: text(network.ipv4),
            ipv6_prefix: text(network.ipv6),
            members: network.members.as_map().clone(),
            addresses: network.addresses.iter().map(addresses).collect(),
            listen_port: network.listen_port.into(),
            mtu: network.mtu.unwrap_or_default().into(),
        }
    }
}

impl TryFrom<pb::Member> for Member {
    type Error = Invalid;

    fn try_from(wire: pb::Member) -> Result<Self, Invalid> {
        let addresses = Addresses::parse(&wire.ipv4, &wire.ipv6)?;
        if addresses == Addresses::default() {
            return Err(Invalid::new("missing, and so is ipv6: one is needed").at("ipv4"));
        }
        let public_key = match wire.public_key.as_slice() {
            [] => None,
            key => Some(PublicKey::try_from(key).map_err(|e| e.at("publicKey"))?),
        };
        if wire.endpoints.len() > ENDPOINTS_MAX {
            let n = wire.endpoints.len();
            let why = format!("{n} endpoints; at most {ENDPOINTS_MAX} are allowed");
            return Err(Invalid::new(why).at("endpoints"));
        }
        let endpoint = |(n, text): (usize, &String)| {
            let invalid = || Invalid::new(format!("`{}` is not ADDRESS:PORT", shorten(text)));
            text.parse().map_err(|_| invalid().at_index(n).at("endpoints"))
        };
        Ok(Self {
            network: Name::new(wire.network).map_err(|e| e.at("network"))?,
            node: Name::new(wire.node).map_err(|e| e.at("node"))?,
            addresses,
            public_key,
            endpoints: wire.endpoints.iter().enumerate().map(endpoint).collect::<Result<_, _>>()?,
            labels: Labels::new(wire.labels).map_err(|e| e.at("labels"))?,
        })
    }
}

impl From<&Member> for pb::Member {
    fn from(member: &Member) -> Self {
        Self {
            network: member.network.to_string(),
            node: member.node.to_string(),
            ipv4: text(member.addresses.v4),
            ipv6: text(member.addresses.v6),
            public_key: member.public_key.map(|key| key.0.to_vec()).unwrap_or_default(),
            endpoints: member.endpoints.iter().map(ToString::to_string).collect(),
            labels: member.labels.as_map().clone(),
        }
    }
}

/// Whether an address can be one of several hosts': not so the unspecified one, those of the loopback, of one link, of
/// multicast and of limited broadcast, nor IPv4 written as IPv6 (RFC 4291, section 2.5.5.2).
pub(super) fn is_for_hosts(address: IpAddr) -> bool {
    let special = address.is_unspecified() || address.is_loopback() || address.is_multicast();
    !special
        && match address {
            IpAddr::V4(v4) => !v4.is_link_local() && !v4.is_broadcast(),
            IpAddr::V6(v6) => !v6.is_unicast_link_local() && v6.to_ipv4_mapped().is_none(),
        }
}

/// The value of an optional text; an empty one is none.
pub(super) fn optional<T: std::str::FromStr>(text: &str, what: &str) -> Result<Option<T>, Invalid> {
    if text.is_empty() {
        return Ok(None);
    }
    let invalid = |_| Invalid::new(format!("`{}` is not {what}", shorten(text)));
    text.parse().map(Some).map_err(invalid)
}

/// The reverse of [`optional`].
pub(super) fn text(value: Option<impl fmt::Display>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(ipv4: &str, ipv6: &str) -> pb::NetworkSpec {
        pb::NetworkSpec {
            ipv4_prefix: ipv4.into(),
            ipv6_prefix: ipv6.into(),
            ..pb::NetworkSpec::default()
        }
    }

    fn with_addresses(of: &[(&str, &str, &str)]) -> Result<Network, Invalid> {
        let one = |(node, ipv4, ipv6): &(&str, &str, &str)| {
            let addresses = pb::StaticAddresses { ipv4: (*ipv4).into(), ipv6: (*ipv6).into() };
            ((*node).to_owned(), addresses)
        };
        let addresses = of.iter().map(one).collect();
        pb::NetworkSpec { addresses, ..spec("10.70.0.0/24", "fd70::/64") }.try_into()
    }

    #[test]
    fn prefixes_are_checked_by_length_host_bits_and_use() {
        let cases = [
            ("", "", "ipv4Prefix", "missing"),
            ("10.70.0.0", "", "ipv4Prefix", "not an IPv4 CIDR"),
            ("fd70::/64", "", "ipv4Prefix", "not an IPv4 CIDR"),
            ("10.0.0.0/7", "", "ipv4Prefix", "from /8 to /30"),
            ("10.70.0.0/31", "", "ipv4Prefix", "from /8 to /30"),
            ("10.70.0.1/24", "", "ipv4Prefix", "did you mean 10.70.0.0/24"),
            ("224.0.0.0/8", "", "ipv4Prefix", "no addresses for VMs"),
            ("127.0.0.0/8", "", "ipv4Prefix", "no addresses for VMs"),
            ("", "fd70::/15", "ipv6Prefix", "from /16 to /126"),
            ("", "fd70::/127", "ipv6Prefix", "from /16 to /126"),
            ("", "fd70::1/64", "ipv6Prefix", "did you mean fd70::/64"),
            ("", "fe80::/64", "ipv6Prefix", "no addresses for VMs"),
            ("", "::ffff:0:0/104", "ipv6Prefix", "no addresses for VMs"),
        ];
        for (ipv4, ipv6, field, reason) in cases {
            let invalid = Network::try_from(spec(ipv4, ipv6)).expect_err(&format!("{ipv4} {ipv6}"));
            assert_eq!(invalid.field(), field, "{invalid}");
            assert!(invalid.reason().contains(reason), "{invalid}");
        }
        for (ipv4, ipv6) in [("10.0.0.0/8", ""), ("", "fd70::/126"), ("10.0.0.0/30", "fd70::/16")] {
            assert!(Network::try_from(spec(ipv4, ipv6)).is_ok(), "{ipv4} {ipv6}");
        }
    }

    #[test]
    fn a_static_address_is_one_vms_and_inside() {
        for (of, field) in [
            (&[("db1", "10.71.0.1", "")][..], "addresses.db1"),
            (&[("db1", "10.70.0.0", "")], "addresses.db1"),
            (&[("db1", "10.70.0.255", "")], "addresses.db1"),
            (&[("db1", "", "fd70::")], "addresses.db1"),
            (&[("db1", "fd70::1", "")], "addresses.db1.ipv4"),
            (&[("DB", "10.70.0.1", "")], "addresses.DB"),
            (&[("db1", "10.70.0.1", ""), ("db2", "10.70.0.1", "")], "addresses.db2"),
        ] {
            assert_eq!(with_addresses(of).unwrap_err().field(), field, "{of:?}");
        }
        let network = with_addresses(&[("db1", "10.70.0.1", "fd70::1"), ("db2", "", "")]).unwrap();
        assert_eq!(network.addresses.len(), 1, "no address is no entry");
    }

    #[test]
    fn what_is_left_out_has_its_value_and_what_is_there_its_bounds() {
        let network = Network::try_from(spec("10.70.0.0/24", "")).unwrap();
        assert_eq!((network.listen_port, network.mtu), (51_820, None));
        let with = |listen_port, mtu| {
            let spec = pb::NetworkSpec { listen_port, mtu, ..spec("10.70.0.0/24", "") };
            Network::try_from(spec).map(|n| (n.listen_port, n.mtu))
        };
        assert_eq!(with(65_535, 1280), Ok((65_535, Some(1280))));
        assert_eq!(with(65_536, 0).unwrap_err().field(), "listenPort");
        assert_eq!(with(0, 1279).unwrap_err().field(), "mtu");
        assert_eq!(with(0, 8921).unwrap_err().field(), "mtu");
    }

    #[test]
    fn a_member_survives_the_wire_and_a_damaged_one_is_refused() {
        let member = pb::Member {
            network: "shop".into(),
            node: "db1".into(),
            ipv4: "10.70.0.21".into(),
            ipv6: "fd70::21".into(),
            public_key: vec![7; 32],
            endpoints: vec!["192.0.2.1:51820".into(), "[2001:db8::1]:51820".into()],
            labels: [("role".to_owned(), "db".to_owned())].into(),
        };
        let read = Member::try_from(member.clone()).unwrap();
        assert_eq!(pb::Member::from(&read), member);
        let key = read.public_key.unwrap();
        assert_eq!(key.to_string(), "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=");
        type Damage = fn(&mut pb::Member);
        let damages: [(Damage, &str); 5] = [
            (|m| m.public_key.truncate(31), "publicKey"),
            (|m| m.endpoints[1] = "2001:db8::1:51820".into(), "endpoints[1]"),
            (|m| m.endpoints = vec!["192.0.2.1:1".into(); ENDPOINTS_MAX + 1], "endpoints"),
            (|m| (m.ipv4, m.ipv6) = Default::default(), "ipv4"),
            (|m| m.node.clear(), "node"),
        ];
        for (damage, field) in damages {
            let mut damaged = member.clone();
            damage(&mut damaged);
            assert_eq!(Member::try_from(damaged).unwrap_err().field(), field);
        }
    }
}
