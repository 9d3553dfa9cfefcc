//! The tunnel of this VM into its network: WireGuard, in the kernel or in an engine of our own.

pub mod control;
pub mod engine;
mod kernel;
pub mod key;
mod link;
mod netlink;
mod process;
mod wireguard;

use std::{collections::BTreeMap, net::SocketAddr, time::SystemTime};

use cnsmo_proto::model::{Addresses, Name, PublicKey};
use ipnet::IpNet;

pub use self::wireguard::{TunnelOptions, WireGuard};

/// Name of the device. A VM is in one network at most.
pub const DEVICE: &str = "cnsmo0";

/// The one tunnel device of this VM, whatever moves its packets. It outlives the agent.
pub trait Tunnel: Send + 'static {
    /// Of the key pair that was made on this VM and whose private half never leaves it.
    fn public_key(&self) -> PublicKey;

    /// First half of a change: afterwards the device is there, with these addresses, port and MTU, and knows the peers of
    /// `config` beside those it had. Packets do not flow through a device that was not there before. Sessions that are not
    /// concerned are not touched.
    fn prepare(&mut self, config: &TunnelConfig) -> Result<Device, TunnelError>;

    /// Second half, once the device is guarded: it carries packets, and knows no peers but those of `config`. `None`: there
    /// is no device any more.
    fn complete(&mut self, config: Option<&TunnelConfig>) -> Result<(), TunnelError>;

    /// Called every second: what has died is started again, a peer that does not answer is tried at its next endpoint.
    fn tend(&mut self) -> Result<(), TunnelError>;

    /// The device that is there, whoever made it and whatever it shall be: one that an earlier agent left carries packets.
    fn existing(&mut self) -> Option<Device>;

    /// What it does now; `None` before a configuration was prepared.
    fn status(&mut self) -> Option<TunnelStatus>;
}

/// What the tunnel of this VM shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelConfig {
    /// Name of the network.
    pub network: Name,
    /// Of this VM.
    pub addresses: Addresses,
    /// Of the network: what is sent there goes into the tunnel.
    pub prefixes: Vec<IpNet>,
    /// UDP port.
    pub listen_port: u16,
    /// Of the device; `None`: derived from the network cards.
    pub mtu: Option<u16>,
    /// The other VMs of the network, this one left out.
    pub peers: BTreeMap<PublicKey, Peer>,
}

/// Another VM of the network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Name of the VM.
    pub node: Name,
    /// Its addresses in the network: what it may send from, and what is sent to it.
    pub addresses: Addresses,
    /// Where its tunnel may be reached, the likeliest first.
    pub endpoints: Vec<SocketAddr>,
}

/// The device behind a tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Name.
    pub name: String,
    /// In bytes.
    pub mtu: u16,
}

/// What moves packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The kernel's WireGuard.
    Kernel,
    /// A process of our own.
    Engine,
}

/// What a tunnel does now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelStatus {
    /// Name of the network.
    pub network: Name,
    /// What moves packets.
    pub backend: Backend,
    /// Why that.
    pub reason: String,
    /// The device.
    pub device: Device,
    /// By name of the VM.
    pub peers: BTreeMap<Name, PeerStatus>,
}

/// What a tunnel knows of a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerStatus {
    /// Where its packets go now.
    pub endpoint: Option<SocketAddr>,
    /// `None`: never.
    pub last_handshake: Option<SystemTime>,
    /// Of encrypted packets.
    pub received_bytes: u64,
    /// Of encrypted packets.
    pub sent_bytes: u64,
}

/// The tunnel cannot be what it shall be.
#[derive(Debug, thiserror::Error)]
#[error("failed to {what}")]
pub struct TunnelError {
    /// What was attempted.
    pub what: String,
    /// Why it failed.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}
