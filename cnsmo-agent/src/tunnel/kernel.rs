//! The kernel's WireGuard, over the generic netlink family `wireguard`.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use cnsmo_proto::model::PublicKey;
use ipnet::IpNet;
use netlink_packet_generic::{
    GenlFamily as _, GenlMessage,
    ctrl::{GenlCtrl, GenlCtrlCmd, nlas::GenlCtrlAttrs},
};
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute,
    WireguardCmd, WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use netlink_sys::protocols::NETLINK_GENERIC;

use super::{
    Backend, DEVICE, PeerStatus,
    key::PrivateKey,
    link::Links,
    netlink::Netlink,
    wireguard::{Mover, PeerSettings, Settings},
};

/// Peers of one message. An attribute has less than 64 KiB, a peer with both addresses some 150 bytes.
const PEERS_PER_MESSAGE: usize = 256;

/// File of the private key below the agent's state directory. See [`super::control::key_path`] for why it is another.
pub(super) fn key_path(state_dir: &Path) -> PathBuf {
    state_dir.join("tunnel-kernel.key")
}

/// See the module.
pub(super) struct Kernel {
    key: PrivateKey,
    links: Links,
    netlink: Netlink,
    /// Resolved once the module is loaded, which making a device does.
    family: Option<u16>,
    applied: Option<Settings>,
}

impl Kernel {
    pub(super) fn open(key: PrivateKey) -> io::Result<Self> {
        let (links, netlink) = (Links::open()?, Netlink::open(NETLINK_GENERIC)?);
        Ok(Self { key, links, netlink, family: None, applied: None })
    }

    fn family(&mut self) -> anyhow::Result<u16> {
        if let Some(family) = self.family {
            return Ok(family);
        }
        let name = GenlCtrlAttrs::FamilyName(WireguardMessage::family_name().to_owned());
        let request = GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: vec![name] };
        let answer = self.netlink.get(GenlMessage::from_payload(request))?;
        let id =
            answer.into_iter().flat_map(|answer| answer.payload.nlas).find_map(|nla| match nla {
                GenlCtrlAttrs::FamilyId(id) => Some(id),
                _ => None,
            });
        self.family = id;
        id.context("the kernel has no netlink family of WireGuard")
    }

    fn message(
        &mut self,
        cmd: WireguardCmd,
        mut attributes: Vec<WireguardAttribute>,
    ) -> anyhow::Result<GenlMessage<WireguardMessage>> {
        attributes.insert(0, WireguardAttribute::IfName(DEVICE.to_owned()));
        let mut message = GenlMessage::from_payload(WireguardMessage { cmd, attributes });
        message.set_resolved_family_id(self.family()?);
        Ok(message)
    }

    fn configure(&mut self, attributes: Vec<WireguardAttribute>) -> anyhow::Result<()> {
        let message = self.message(WireguardCmd::SetDevice, attributes)?;
        Ok(self.netlink.change(message, 0)?)
    }

    /// What the device has: an earlier agent may have set it up.
    fn read(&mut self) -> anyhow::Result<BTreeMap<PublicKey, (PeerSettings, PeerStatus)>> {
        let message = self.message(WireguardCmd::GetDevice, Vec::new())?;
        let mut peers = BTreeMap::new();
        for answer in self.netlink.dump(message)? {
            for attribute in answer.payload.attributes {
                let WireguardAttribute::Peers(found) = attribute else { continue };
                for peer in found {
                    read_peer(&peer, &mut peers);
                }
            }
        }
        Ok(peers)
    }
}

impl Mover for Kernel {
    fn backend(&self) -> Backend {
        Backend::Kernel
    }

    fn set(&mut self, wanted: &Settings) -> anyhow::Result<()> {
        if self.applied.as_ref() == Some(wanted) {
            return Ok(());
        }
        if self.links.find(DEVICE)?.is_none() {
            self.links.create_wireguard(DEVICE)?;
            self.applied = None;
        }
        let before = match self.applied.take() {
            Some(applied) => applied.peers,
            None => self.read()?.into_iter().map(|(key, (peer, _))| (key, peer)).collect(),
        };
        // The kernel keeps sessions and socket if neither changes.
        self.configure(vec![
            WireguardAttribute::PrivateKey(*self.key.bytes()),
            WireguardAttribute::ListenPort(wanted.listen_port),
        ])?;
        let changes = changes(&before, &wanted.peers);
        for batch in changes.chunks(PEERS_PER_MESSAGE) {
            self.configure(vec![WireguardAttribute::Peers(batch.to_vec())])?;
        }
        self.applied = Some(wanted.clone());
        Ok(())
    }

    fn peers(&mut self) -> anyhow::Result<BTreeMap<PublicKey, PeerStatus>> {
        // Nothing is known of peers before there is a device.
        if self.links.find(DEVICE)?.is_none() {
            return Ok(BTreeMap::new());
        }
        Ok(self.read()?.into_iter().map(|(key, (_, status))| (key, status)).collect())
    }

    fn revive(&mut self) -> anyhow::Result<()> {
        Ok(())
    }

    fn stop(&mut self) -> anyhow::Result<()> {
        self.applied = None;
        Ok(())
    }
}

/// Removals first: an address may move from one peer to another.
fn changes(
    before: &BTreeMap<PublicKey, PeerSettings>,
    wanted: &BTreeMap<PublicKey, PeerSettings>,
) -> Vec<WireguardPeer> {
    let removed = before.keys().filter(|key| !wanted.contains_key(key)).map(|key| {
        WireguardPeer(vec![
            WireguardPeerAttribute::PublicKey(key.0),
            WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe),
        ])
    });
    let changed = wanted.iter().filter_map(|(key, peer)| {
        let old = before.get(key);
        let mut attributes = vec![WireguardPeerAttribute::PublicKey(key.0)];
        if old.map(|old| &old.allowed) != Some(&peer.allowed) {
            let allowed = peer.allowed.iter().map(allowed_ip).collect();
            attributes.push(WireguardPeerAttribute::Flags(WireguardPeerFlags::ReplaceAllowedIps));
            attributes.push(WireguardPeerAttribute::AllowedIps(allowed));
        }
        if let Some(endpoint) = peer.endpoint
            && old.and_then(|old| old.endpoint) != Some(endpoint)
        {
            attributes.push(WireguardPeerAttribute::Endpoint(endpoint));
        }
        (old.is_none() || attributes.len() > 1).then_some(WireguardPeer(attributes))
    });
    removed.chain(changed).collect()
}

fn allowed_ip(net: &IpNet) -> WireguardAllowedIp {
    let family = match net {
        IpNet::V4(_) => WireguardAddressFamily::Ipv4,
        IpNet::V6(_) => WireguardAddressFamily::Ipv6,
    };
    WireguardAllowedIp(vec![
        WireguardAllowedIpAttr::Family(family),
        WireguardAllowedIpAttr::IpAddr(net.addr()),
        WireguardAllowedIpAttr::Cidr(net.prefix_len()),
    ])
}

/// A peer may come in several parts, the later ones with nothing but addresses.
fn read_peer(peer: &WireguardPeer, peers: &mut BTreeMap<PublicKey, (PeerSettings, PeerStatus)>) {
    let key = peer.iter().find_map(|attribute| match attribute {
        WireguardPeerAttribute::PublicKey(key) => Some(PublicKey(*key)),
        _ => None,
    });
    let Some(key) = key else { return };
    let (settings, status) = peers.entry(key).or_default();
    for attribute in peer.iter() {
        match attribute {
            WireguardPeerAttribute::Endpoint(endpoint) => {
                settings.endpoint = Some(*endpoint);
                status.endpoint = Some(*endpoint);
            }
            WireguardPeerAttribute::LastHandshake(at) => {
                // Zero: never.
                status.last_handshake = u64::try_from(at.seconds)
                    .ok()
                    .filter(|seconds| *seconds > 0)
                    .map(|seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
            }
            WireguardPeerAttribute::RxBytes(bytes) => status.received_bytes = *bytes,
            WireguardPeerAttribute::TxBytes(bytes) => status.sent_bytes = *bytes,
            WireguardPeerAttribute::AllowedIps(nets) => {
                settings.allowed.extend(nets.iter().filter_map(read_allowed_ip));
            }
            _ => {}
        }
    }
}

fn read_allowed_ip(net: &WireguardAllowedIp) -> Option<IpNet> {
    let (mut address, mut len): (Option<IpAddr>, _) = (None, None);
    for attribute in net.iter() {
        match attribute {
            WireguardAllowedIpAttr::IpAddr(ip) => address = Some(*ip),
            WireguardAllowedIpAttr::Cidr(cidr) => len = Some(*cidr),
            _ => {}
        }
    }
    IpNet::new(address?, len?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(address: &str, endpoint: &str) -> PeerSettings {
        let allowed = [address.parse().unwrap()].into();
        PeerSettings { allowed, endpoint: endpoint.parse().ok() }
    }

    #[test]
    fn only_what_differs_is_sent() {
        let before: BTreeMap<_, _> = [
            (PublicKey([1; 32]), settings("10.0.0.1/32", "1.1.1.1:1")),
            (PublicKey([2; 32]), settings("10.0.0.2/32", "1.1.1.1:2")),
            (PublicKey([3; 32]), settings("10.0.0.3/32", "1.1.1.1:3")),
        ]
        .into();
        assert!(changes(&before, &before).is_empty());

        let mut wanted = before.clone();
        wanted.remove(&PublicKey([1; 32]));
        wanted.insert(PublicKey([2; 32]), settings("10.0.0.2/32", "2.2.2.2:2"));
        wanted.insert(
            PublicKey([3; 32]),
            PeerSettings { endpoint: None, ..before[&PublicKey([3; 32])].clone() },
        );
        wanted.insert(PublicKey([4; 32]), settings("10.0.0.1/32", ""));
        let expected = [
            vec![
                WireguardPeerAttribute::PublicKey([1; 32]),
                WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe),
            ],
            vec![
                WireguardPeerAttribute::PublicKey([2; 32]),
                WireguardPeerAttribute::Endpoint("2.2.2.2:2".parse().unwrap()),
            ],
            vec![
                WireguardPeerAttribute::PublicKey([4; 32]),
                WireguardPeerAttribute::Flags(WireguardPeerFlags::ReplaceAllowedIps),
                WireguardPeerAttribute::AllowedIps(vec![allowed_ip(
                    &"10.0.0.1/32".parse().unwrap(),
                )]),
            ],
        ];
        let sent: Vec<_> = changes(&before, &wanted).into_iter().map(|peer| peer.0).collect();
        assert_eq!(sent, expected);
    }
}
