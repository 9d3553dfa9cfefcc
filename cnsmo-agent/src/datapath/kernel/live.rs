//! The flows in the tables, and what other policies would say of them.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd as _, BorrowedFd},
    time::Duration,
};

use aya::maps::Map;
use cnsmo_common::{
    blob::NO_RULE,
    control::{Control, TIMEOUTS},
    flow::{Flow, FlowKey, ZONE_OVERLAY, flag},
};
use cnsmo_ebpf::{balance::is_judged_here, parse::Family, pipeline::original};
use cnsmo_proto::model::{Action, Direction, protocol};

use super::{BATCH, Kernel, KernelError, explain::state_word, sys::Batches};
use crate::{
    compile::Compiled,
    effective::Effective,
    explain::Decider,
    live::{Impact, Latest, LiveFlow, LiveFlows},
};

/// Who is told of each flow.
trait Look {
    /// One that is not over; of a translated one the entry that rules are asked about. `age` in jiffies.
    fn look<A: Family>(&mut self, key: &FlowKey<A>, flow: &Flow<A>, age: u32)
    where
        IpAddr: From<A>;
}

impl Kernel {
    pub(super) fn live_flows(&self, max: usize) -> Result<LiveFlows, KernelError> {
        let mut list = List { kernel: self, latest: Latest::new(max), total: 0 };
        self.each_flow(&mut list)?;
        Ok(LiveFlows { flows: list.latest.take().collect(), total: list.total })
    }

    pub(super) fn impact(
        &self,
        policy: &Effective,
        compiled: &Compiled,
        max: usize,
    ) -> Result<Impact, KernelError> {
        let latest = Latest::new(max);
        let mut judge = Judge { kernel: self, policy, compiled, latest, judged: 0, cut: 0 };
        self.each_flow(&mut judge)?;
        let Judge { judged, cut, latest, .. } = judge;
        Ok(Impact { judged, cut, flows: latest.take().collect(), refused: Vec::new() })
    }

    fn each_flow(&self, look: &mut impl Look) -> Result<(), KernelError> {
        let control = self.control.read(0, 1)[0];
        let now = self.clock.now() as u32;
        let half_open = |name| match self.ebpf.map(name) {
            Some(Map::LruHashMap(map)) => Ok(map.fd().as_fd()),
            _ => Err(KernelError::Refused(format!("the object has no table {name}"))),
        };
        let (v4, v6) = (half_open("HALF_OPEN_V4")?, half_open("HALF_OPEN_V6")?);
        for map in [self.flows_v4.fd.as_fd(), v4] {
            each_of::<[u8; 4]>(map, now, &control, look)?;
        }
        for map in [self.flows_v6.fd.as_fd(), v6] {
            each_of::<[u8; 16]>(map, now, &control, look)?;
        }
        Ok(())
    }

    fn flow<A: Family>(&self, key: &FlowKey<A>, flow: &Flow<A>, age: u32) -> LiveFlow
    where
        IpAddr: From<A>,
    {
        let question = original(key, flow.conn.flags);
        let ports = if flow.conn.flags & flag::ORIGIN_HIGH != 0 {
            [key.high_port, key.low_port]
        } else {
            [key.low_port, key.high_port]
        };
        // Of an echo the identifier is where others have ports.
        let has_ports = matches!(key.proto, protocol::TCP | protocol::UDP | protocol::SCTP);
        let end = |address: A, port: [u8; 2]| {
            SocketAddr::new(address.into(), if has_ports { u16::from_be_bytes(port) } else { 0 })
        };
        let to = &flow.translation;
        let is_translated = flow.conn.flags & flag::TRANSLATED != 0;
        let translated = [end(to.src, to.sport), end(to.dst, to.dport)];
        LiveFlow {
            direction: direction(question.direction),
            overlay: key.zone == ZONE_OVERLAY,
            protocol: key.proto,
            src: end(question.src, ports[0]),
            dst: end(question.dst, ports[1]),
            state: state_word(flow.conn.state),
            idle: Duration::from_secs(u64::from(age / self.clock.hz)),
            by: self.decider(flow.conn.slot),
            translated: is_translated.then_some(translated),
        }
    }
}

fn each_of<A: Family>(
    map: BorrowedFd<'_>,
    now: u32,
    control: &Control,
    look: &mut impl Look,
) -> Result<(), KernelError>
where
    FlowKey<A>: aya::Pod,
    Flow<A>: aya::Pod,
    IpAddr: From<A>,
{
    let mut batches = Batches::<FlowKey<A>, Flow<A>>::new(BATCH);
    loop {
        let (entries, done) =
            batches.next(map).map_err(KernelError::kernel("read the table of flows"))?;
        for (key, flow) in entries {
            let conn = flow.conn;
            let timeout = control.timeouts[usize::from(conn.state) & (TIMEOUTS - 1)];
            // Seen after `now` was read: 0.
            let age = (now.wrapping_sub(conn.seen) as i32).max(0).unsigned_abs();
            if age <= timeout && is_judged_here(conn.flags) {
                look.look(&key, &flow, age);
            }
        }
        if done {
            return Ok(());
        }
    }
}

fn direction(direction: cnsmo_common::Direction) -> Direction {
    match direction {
        cnsmo_common::Direction::Ingress => Direction::Ingress,
        cnsmo_common::Direction::Egress => Direction::Egress,
    }
}

struct List<'a> {
    kernel: &'a Kernel,
    latest: Latest<LiveFlow>,
    total: u64,
}

impl Look for List<'_> {
    fn look<A: Family>(&mut self, key: &FlowKey<A>, flow: &Flow<A>, age: u32)
    where
        IpAddr: From<A>,
    {
        self.total += 1;
        self.latest.add(age, self.kernel.flow(key, flow, age));
    }
}

/// As the data path judges flows anew when another policy is live.
struct Judge<'a> {
    kernel: &'a Kernel,
    policy: &'a Effective,
    compiled: &'a Compiled,
    latest: Latest<(LiveFlow, Decider)>,
    judged: u64,
    cut: u64,
}

impl Look for Judge<'_> {
    fn look<A: Family>(&mut self, key: &FlowKey<A>, flow: &Flow<A>, age: u32)
    where
        IpAddr: From<A>,
    {
        self.judged += 1;
        if self.policy.open {
            return;
        }
        let question = original(key, flow.conn.flags);
        let (src, dst) = (question.src.into(), question.dst.into());
        let direction = direction(question.direction);
        let index = self.compiled.classify_lanes(src, dst, question.lanes, direction);
        let Some(by) = self.cuts(index.unwrap_or(NO_RULE), direction) else { return };
        self.cut += 1;
        self.latest.add(age, (self.kernel.flow(key, flow, age), by));
    }
}

impl Judge<'_> {
    /// What refuses a flow that this rule decides about; `None`: it passes.
    fn cuts(&self, index: u32, direction: Direction) -> Option<Decider> {
        let Effective { ingress, egress, audit, rules, .. } = self.policy;
        let (action, on_trial, by) = match rules.get(index as usize).filter(|_| index != NO_RULE) {
            Some(owned) => {
                let by = Decider::Rule(owned.policy.clone(), owned.rule.name.clone());
                (owned.rule.action, owned.audit, by)
            }
            None if direction == Direction::Ingress => (*ingress, audit[0], Decider::Default),
            None => (*egress, audit[1], Decider::Default),
        };
        (action != Action::Allow && !on_trial).then_some(by)
    }
}
