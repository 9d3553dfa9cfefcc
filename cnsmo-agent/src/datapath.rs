//! What the control side of the agent asks of the kernel side.

pub mod answer;
pub mod kernel;

use std::{collections::BTreeMap, net::SocketAddr, time::SystemTime};

use cnsmo_proto::model::{Direction, Name};

use crate::{
    effective::{Balancer, Effective},
    explain::{Answer, Question},
    live::{Impact, LiveFlows},
};

/// A data path that enforces one policy at a time.
pub trait Datapath: Send + 'static {
    /// Enforces `policy` in place of the one before, for all packets at once. On an error the one before stays.
    ///
    /// In the order in which nothing is missing at any moment: hooks on the tunnel, backends, virtual addresses, rules;
    /// then virtual addresses and hooks that are no longer wanted go.
    fn apply(&mut self, policy: &Effective) -> Result<(), ApplyError>;

    /// Sends new flows to the backends named now: of the balancers in force, by name, nothing but the backends may
    /// differ. Known flows stay where they are. Milliseconds, and no packet is judged anew.
    fn steer(&mut self, balancers: &[Balancer]) -> Result<(), ApplyError>;

    /// What it does now. Cheap enough for every few seconds.
    fn status(&mut self) -> Status;

    /// Removes a bounded number of expired flows; called every second.
    fn sweep(&mut self);

    /// What would happen to a packet. Nothing is changed by the question.
    ///
    /// # Errors
    /// Of the kernel.
    fn explain(
        &mut self,
        question: &Question,
    ) -> Result<Answer, Box<dyn std::error::Error + Send + Sync>>;

    /// At most `max` of the flows there are.
    ///
    /// # Errors
    /// Of the kernel.
    fn flows(&mut self, max: usize) -> Result<LiveFlows, Box<dyn std::error::Error + Send + Sync>>;

    /// What [`Self::apply`] would do to the flows there are, of which at most `max` are named. Nothing is changed.
    ///
    /// # Errors
    /// Those of [`Self::apply`] that come before anything is changed, and of the kernel.
    fn preview(&mut self, policy: &Effective, max: usize) -> Result<Impact, ApplyError>;
}

/// The policy cannot be enforced; the one before still is.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// These policies are at fault; without them the rest can be enforced.
    #[error("refused: {0:?}")]
    Refused(BTreeMap<Name, String>),
    /// These balancers are at fault; without them the rest can be enforced.
    #[error("balancers refused: {0:?}")]
    BalancersRefused(BTreeMap<Name, String>),
    /// The kernel or the self-check failed.
    #[error("the data path cannot take the policy")]
    Failed(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What the data path does now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Where it is attached.
    pub interfaces: Vec<Attachment>,
    /// Live flows as of the last sweep.
    pub flows: u64,
    /// Rules in the kernel.
    pub rules: u64,
    /// Packets and bytes per policy and rule since the rule is there.
    pub counters: BTreeMap<Name, BTreeMap<Name, Count>>,
    /// When rules were hit last, by policy and rule; without those that were not since somebody looks.
    pub last_hits: BTreeMap<Name, BTreeMap<Name, SystemTime>>,
    /// Packets and bytes dropped, per direction and reason (a stable word).
    pub drops: Vec<(Direction, &'static str, Count)>,
    /// Packets after which a flow could not be kept among the established ones, because their table was full. It goes on among
    /// the half-open ones, where a flood may forget it.
    pub established_full: u64,
    /// Live flows from virtual addresses to each backend's ports, as of the last sweep.
    pub backend_flows: BTreeMap<SocketAddr, u64>,
    /// Kernel ids of the loaded programs, ascending.
    pub program_ids: Vec<u32>,
}

/// One network device with the data path on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Name of the device.
    pub interface: String,
    /// `xdp-native`, `xdp-generic`, `tcx` or `clsact`.
    pub ingress: &'static str,
    /// `tcx` or `clsact`.
    pub egress: &'static str,
}

/// Packets and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes of IP packets, link-layer header included where there is one.
    pub bytes: u64,
}
