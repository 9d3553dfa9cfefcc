//! Flows that the data path knows, and what other policies would do to them.

use std::{net::SocketAddr, time::Duration};

use cnsmo_proto::{
    model::Direction,
    pb::{
        flow::{CutFlow, FlowsImpact, ListFlowsResponse, LiveFlow as PbLiveFlow, RefusedPolicy},
        policy,
    },
};

use crate::explain::{Decider, translated};

/// Flows in one answer.
pub const FLOWS_MAX: u32 = 10_000;
/// Flows in an answer to who does not say how many.
const FLOWS: u32 = 1_000;

/// One flow, both its directions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveFlow {
    /// Of its first packet.
    pub direction: Direction,
    /// On the tunnel device.
    pub overlay: bool,
    /// IANA number.
    pub protocol: u8,
    /// Who began it; without a port where the protocol has none.
    pub src: SocketAddr,
    /// Whom its first packet was sent to.
    pub dst: SocketAddr,
    /// A stable word.
    pub state: &'static str,
    /// Since its last packet.
    pub idle: Duration,
    /// What has admitted it.
    pub by: Decider,
    /// Source and destination of its packets where they are others.
    pub translated: Option<[SocketAddr; 2]>,
}

/// Some of the flows there are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LiveFlows {
    /// Those with the latest packets, in that order.
    pub flows: Vec<LiveFlow>,
    /// All that there are.
    pub total: u64,
}

/// What policies would do to the flows there are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Impact {
    /// Flows that would be judged.
    pub judged: u64,
    /// Of these, flows that would be cut.
    pub cut: u64,
    /// Those with the latest packets, in that order, and what would cut each.
    pub flows: Vec<(LiveFlow, Decider)>,
    /// Policies that would be refused, and why.
    pub refused: Vec<(String, String)>,
}

/// How many flows an answer has, if so many are asked for; 0: it is not said.
pub fn bounded(max: u32) -> usize {
    let max = if max == 0 { FLOWS } else { max };
    max.min(FLOWS_MAX) as usize
}

/// Of many, those with the smallest age, in that order, without keeping all of them.
#[derive(Debug)]
pub struct Latest<T> {
    max: usize,
    kept: Vec<(u32, T)>,
}

impl<T> Latest<T> {
    /// At most `max` of them.
    pub fn new(max: usize) -> Self {
        Self { max, kept: Vec::new() }
    }

    /// One more.
    pub fn add(&mut self, age: u32, one: T) {
        self.kept.push((age, one));
        if self.kept.len() > self.max.saturating_mul(2) {
            self.cut();
        }
    }

    /// All that are left.
    pub fn take(mut self) -> impl Iterator<Item = T> {
        self.cut();
        self.kept.into_iter().map(|(_, one)| one)
    }

    fn cut(&mut self) {
        self.kept.sort_by_key(|(age, _)| *age);
        self.kept.truncate(self.max);
    }
}

impl From<LiveFlow> for PbLiveFlow {
    fn from(flow: LiveFlow) -> Self {
        let (policy, rule, by_default) = flow.by.in_words();
        Self {
            direction: match flow.direction {
                Direction::Ingress => policy::Direction::Ingress,
                Direction::Egress => policy::Direction::Egress,
            }
            .into(),
            overlay: flow.overlay,
            protocol: flow.protocol.into(),
            source: flow.src.ip().to_string(),
            destination: flow.dst.ip().to_string(),
            source_port: flow.src.port().into(),
            destination_port: flow.dst.port().into(),
            state: flow.state.to_owned(),
            idle: flow.idle.try_into().ok(),
            policy,
            rule,
            by_default,
            translated: flow.translated.map(translated),
        }
    }
}

impl From<LiveFlows> for ListFlowsResponse {
    fn from(live: LiveFlows) -> Self {
        Self { flows: live.flows.into_iter().map(Into::into).collect(), total: live.total }
    }
}

impl From<Impact> for FlowsImpact {
    fn from(impact: Impact) -> Self {
        let cut = |(flow, by): (LiveFlow, Decider)| {
            let (policy, rule, by_default) = by.in_words();
            CutFlow { flow: Some(flow.into()), policy, rule, by_default }
        };
        let refused = |(policy, message)| RefusedPolicy { policy, message };
        Self {
            judged: impact.judged,
            cut: impact.cut,
            flows: impact.flows.into_iter().map(cut).collect(),
            refused: impact.refused.into_iter().map(refused).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_are_kept_in_order_however_many_there_are() {
        for max in [0, 1, 7, 2_000] {
            let mut latest = Latest::new(max);
            for n in 0..1_000_u32 {
                // 541 and 1,000 have no common factor: each age comes once.
                let age = n * 541 % 1_000;
                latest.add(age, age);
                assert!(latest.kept.len() <= 2 * max + 1);
            }
            let expected: Vec<_> = (0..1_000).take(max).collect();
            assert_eq!(latest.take().collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn how_many_is_bounded() {
        assert_eq!([0, 1, 10_000, u32::MAX].map(bounded), [1_000, 1, 10_000, 10_000]);
    }
}
