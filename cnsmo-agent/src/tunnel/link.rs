//! The device as the kernel sees it, whatever moves its packets: MTU, addresses, routes.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
};

use cnsmo_proto::model::{MTU_MIN, TUNNEL_OVERHEAD};
use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage as Message,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{
        AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkFlags, LinkInfo,
        LinkLayerType, LinkMessage,
    },
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
        RouteType,
    },
};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::netlink::Netlink;

/// Marks our routes, so that none of others is taken away. Not in `/etc/iproute2/rt_protos`.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(205);
/// Packets that wait for the engine. 500 lost packets of bulk transfers.
const TX_QUEUE_LEN: u32 = 1_000;
/// Where the cards take more, the path behind them may not: Ethernet's 1,500 less the overhead.
const MTU_DERIVED_MAX: u16 = 1_420;

/// Devices, addresses and routes of this VM.
#[derive(Debug)]
pub(super) struct Links(Netlink);

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) mtu: u32,
    pub(super) up: bool,
    pub(super) kind: Option<InfoKind>,
    tx_queue_len: u32,
}

impl Links {
    pub(super) fn open() -> io::Result<Self> {
        Netlink::open(NETLINK_ROUTE).map(Self)
    }

    pub(super) fn find(&mut self, name: &str) -> io::Result<Option<Link>> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.into()));
        match self.0.get(Message::GetLink(message)) {
            Ok(Some(Message::NewLink(link))) => Ok(Some(Link::from(&link))),
            Ok(_) => Ok(None),
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(e) => Err(e),
        }
    }

    pub(super) fn create_wireguard(&mut self, name: &str) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.into()));
        message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Wireguard)]));
        self.0.change(Message::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    pub(super) fn delete(&mut self, link: &Link) -> io::Result<()> {
        self.0.change(Message::DelLink(link.message()), 0)
    }

    /// MTU and queue; changes nothing that is as wanted.
    pub(super) fn set_up_queue(&mut self, link: &Link, mtu: u16) -> io::Result<()> {
        if link.mtu == u32::from(mtu) && link.tx_queue_len == TX_QUEUE_LEN {
            return Ok(());
        }
        let mut message = link.message();
        message.attributes.push(LinkAttribute::Mtu(mtu.into()));
        message.attributes.push(LinkAttribute::TxQueueLen(TX_QUEUE_LEN));
        self.0.change(Message::SetLink(message), 0)
    }

    /// Lets packets flow. The device has no address but those it is given.
    pub(super) fn up(&mut self, link: &Link) -> io::Result<()> {
        if link.up {
            return Ok(());
        }
        let mut message = link.message();
        let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let spec = vec![AfSpecUnspec::Inet6(vec![none])];
        message.attributes.push(LinkAttribute::AfSpecUnspec(spec));
        match self.0.change(Message::SetLink(message), 0) {
            // The VM has no IPv6.
            Err(e) if e.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
            other => other?,
        }
        let mut message = link.message();
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.0.change(Message::SetLink(message), 0)
    }

    /// Gives the device these addresses beside those it has.
    pub(super) fn add_addresses(
        &mut self,
        link: &Link,
        wanted: &BTreeSet<IpAddr>,
    ) -> io::Result<()> {
        for address in wanted.difference(&self.addresses(link)?) {
            let message = Message::NewAddress(address_message(link, *address));
            self.0.change(message, NLM_F_CREATE | NLM_F_EXCL)?;
        }
        Ok(())
    }

    /// Takes all addresses but these from the device. Routes must not name them any more: the kernel would remove them.
    pub(super) fn keep_addresses(
        &mut self,
        link: &Link,
        wanted: &BTreeSet<IpAddr>,
    ) -> io::Result<()> {
        for address in self.addresses(link)?.difference(wanted) {
            self.0.change(Message::DelAddress(address_message(link, *address)), 0)?;
        }
        Ok(())
    }

    /// Sends these prefixes into the device, from the address given, and no others. Routes that others made stay; one of
    /// theirs to the same prefix is an error.
    pub(super) fn set_routes(
        &mut self,
        link: &Link,
        wanted: &BTreeMap<IpNet, IpAddr>,
    ) -> io::Result<()> {
        let there = self.routes(link)?;
        for (prefix, source) in wanted {
            let flags = match there.get(prefix) {
                Some(Some(same)) if same == source => continue,
                Some(_) => NLM_F_CREATE | NLM_F_REPLACE,
                None => NLM_F_CREATE | NLM_F_EXCL,
            };
            self.0.change(Message::NewRoute(route_message(link, prefix, Some(source))), flags)?;
        }
        for prefix in there.keys().filter(|prefix| !wanted.contains_key(prefix)) {
            self.0.change(Message::DelRoute(route_message(link, prefix, None)), 0)?;
        }
        Ok(())
    }

    /// What fits through `interfaces` with the tunnel's overhead; of all Ethernet devices if none are named.
    pub(super) fn derive_mtu(&mut self, interfaces: &[String]) -> io::Result<u16> {
        let mut smallest = u32::from(MTU_DERIVED_MAX + TUNNEL_OVERHEAD);
        for answer in self.0.dump(Message::GetLink(LinkMessage::default()))? {
            let Message::NewLink(message) = answer else { continue };
            let named =
                |name: &String| message.attributes.contains(&LinkAttribute::IfName(name.clone()));
            let ethernet = message.header.link_layer_type == LinkLayerType::Ether
                && message.header.flags.contains(LinkFlags::Up);
            if if interfaces.is_empty() { ethernet } else { interfaces.iter().any(named) } {
                smallest = smallest.min(Link::from(&message).mtu);
            }
        }
        let mtu = smallest.saturating_sub(TUNNEL_OVERHEAD.into());
        Ok(u16::try_from(mtu).unwrap_or(MTU_DERIVED_MAX).max(MTU_MIN))
    }

    fn addresses(&mut self, link: &Link) -> io::Result<BTreeSet<IpAddr>> {
        let mut found = BTreeSet::new();
        for answer in self.0.dump(Message::GetAddress(AddressMessage::default()))? {
            let Message::NewAddress(message) = answer else { continue };
            if message.header.index != link.index {
                continue;
            }
            let address = |a: &AddressAttribute| match a {
                AddressAttribute::Local(address) | AddressAttribute::Address(address) => {
                    Some(*address)
                }
                _ => None,
            };
            found.extend(message.attributes.iter().find_map(address));
        }
        Ok(found)
    }

    /// Ours, with their preferred source addresses.
    fn routes(&mut self, link: &Link) -> io::Result<BTreeMap<IpNet, Option<IpAddr>>> {
        let mut found = BTreeMap::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            let answers = match self.0.dump(Message::GetRoute(request)) {
                // The VM has no IPv6.
                Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => continue,
                other => other?,
            };
            for answer in answers {
                let Message::NewRoute(message) = answer else { continue };
                if message.header.protocol == PROTOCOL
                    && message.attributes.contains(&RouteAttribute::Oif(link.index))
                {
                    found.extend(destination(&message));
                }
            }
        }
        Ok(found)
    }
}

impl Link {
    fn message(&self) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        message
    }
}

impl From<&LinkMessage> for Link {
    fn from(message: &LinkMessage) -> Self {
        let mut this = Self {
            index: message.header.index,
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
            kind: None,
            tx_queue_len: 0,
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::Mtu(mtu) => this.mtu = *mtu,
                LinkAttribute::TxQueueLen(len) => this.tx_queue_len = *len,
                LinkAttribute::LinkInfo(infos) => {
                    this.kind = infos.iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind.clone()),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        this
    }
}

/// Of one address; the network is a route, which knows who made it.
fn address_message(link: &Link, address: IpAddr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = link.index;
    message.header.family = family(address);
    message.header.prefix_len = IpNet::from(address).prefix_len();
    message.attributes.push(AddressAttribute::Local(address));
    message.attributes.push(AddressAttribute::Address(address));
    if address.is_ipv6() {
        // Usable at once: routes name it.
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    message
}

fn route_message(link: &Link, prefix: &IpNet, source: Option<&IpAddr>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(prefix.addr());
    message.header.destination_prefix_length = prefix.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = PROTOCOL;
    message.header.scope =
        if prefix.addr().is_ipv4() { RouteScope::Link } else { RouteScope::Universe };
    message.header.kind = RouteType::Unicast;
    message.attributes.push(RouteAttribute::Destination(RouteAddress::from(prefix.network())));
    let source = source.map(|source| RouteAttribute::PrefSource(RouteAddress::from(*source)));
    message.attributes.extend(source);
    message.attributes.push(RouteAttribute::Oif(link.index));
    message
}

fn destination(message: &RouteMessage) -> Option<(IpNet, Option<IpAddr>)> {
    let address = |address: &RouteAddress| match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    };
    let (mut to, mut source) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(destination) => to = address(destination),
            RouteAttribute::PrefSource(preferred) => source = address(preferred),
            _ => {}
        }
    }
    Some((IpNet::new(to?, message.header.destination_prefix_length).ok()?, source))
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}
