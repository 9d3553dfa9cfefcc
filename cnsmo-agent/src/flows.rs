//! What happened to single packets of late: those that were dropped, logged, let pass on trial or rejected.

use std::{
    collections::VecDeque,
    net::IpAddr,
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

use cnsmo_proto::model::{Direction, Name};
use tokio::sync::watch;

/// Records kept; the oldest are forgotten.
const KEPT_MAX: usize = 4_096;

/// One packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowRecord {
    /// Grows by one with each record of one run of the agent.
    pub sequence: u64,
    /// When it was judged.
    pub time: SystemTime,
    /// Why it was dropped (a stable word); `None`: it passed.
    pub dropped: Option<&'static str>,
    /// Why it is recorded.
    pub why: Why,
    /// Towards the VM or away from it.
    pub direction: Direction,
    /// It was seen on the tunnel device.
    pub overlay: bool,
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// IANA number.
    pub protocol: u8,
    /// TCP, UDP, SCTP: source and destination port. ICMP: type and code.
    pub ports: [u16; 2],
    /// TCP flags.
    pub tcp_flags: u8,
    /// Bytes of the frame.
    pub length: u32,
    /// Policy and rule that decided; `None`: another one, or it has been replaced since.
    pub rule: Option<(Name, Name)>,
}

/// Why a packet is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It was dropped.
    Dropped,
    /// It was dropped, and its sender was told.
    Rejected,
    /// The rule is logged.
    Logged,
    /// It passed because the policy is on trial.
    Audited,
}

/// The last records of this VM.
#[derive(Debug)]
pub struct FlowLog {
    records: Mutex<VecDeque<FlowRecord>>,
    next: watch::Sender<u64>,
}

impl Default for FlowLog {
    fn default() -> Self {
        Self { records: Mutex::default(), next: watch::Sender::new(0) }
    }
}

impl FlowLog {
    /// Keeps a record, under the next number.
    pub fn push(&self, mut record: FlowRecord) {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        record.sequence = *self.next.borrow();
        if records.len() == KEPT_MAX {
            records.pop_front();
        }
        records.push_back(record);
        // Under the lock: numbers and places agree.
        self.next.send_modify(|next| *next += 1);
    }

    /// At most `max` records from number `from` on, and the number to go on with. Older ones than are kept are skipped.
    pub fn read(&self, from: u64, max: usize) -> (Vec<FlowRecord>, u64) {
        let records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        let first = records.front().map_or(0, |record| record.sequence);
        let skip = usize::try_from(from.saturating_sub(first)).unwrap_or(usize::MAX);
        let found: Vec<_> = records.iter().skip(skip).take(max).cloned().collect();
        let next = found.last().map_or(*self.next.borrow(), |record| record.sequence + 1);
        (found, next)
    }

    /// At most the last `max` records.
    pub fn last(&self, max: usize) -> (Vec<FlowRecord>, u64) {
        let next = *self.next.borrow();
        self.read(next.saturating_sub(max as u64), max)
    }

    /// The number of the next record, as it changes.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.next.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn record(port: u16) -> FlowRecord {
        FlowRecord {
            sequence: 0,
            time: SystemTime::UNIX_EPOCH,
            dropped: Some("denied"),
            why: Why::Dropped,
            direction: Direction::Ingress,
            overlay: false,
            src: Ipv4Addr::LOCALHOST.into(),
            dst: Ipv4Addr::LOCALHOST.into(),
            protocol: 6,
            ports: [1, port],
            tcp_flags: 2,
            length: 60,
            rule: None,
        }
    }

    fn numbers((records, next): (Vec<FlowRecord>, u64)) -> (Vec<u64>, u64) {
        (records.iter().map(|record| record.sequence).collect(), next)
    }

    #[test]
    fn reading_goes_on_where_it_ended() {
        let log = FlowLog::default();
        assert_eq!(numbers(log.read(0, 10)), (vec![], 0));
        (0..5).for_each(|port| log.push(record(port)));
        assert_eq!(numbers(log.read(0, 3)), (vec![0, 1, 2], 3));
        assert_eq!(numbers(log.read(3, 3)), (vec![3, 4], 5));
        assert_eq!(numbers(log.read(5, 3)), (vec![], 5));
        assert_eq!(numbers(log.last(2)), (vec![3, 4], 5));
        log.push(record(5));
        assert_eq!(numbers(log.read(5, 3)), (vec![5], 6));
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let log = FlowLog::default();
        let all = KEPT_MAX as u64 + 10;
        (0..all).for_each(|port| log.push(record(port as u16)));
        assert_eq!(numbers(log.read(0, 2)), (vec![10, 11], 12));
        assert_eq!(log.read(0, usize::MAX).0.len(), KEPT_MAX);
        assert_eq!(numbers(log.last(1)), (vec![all - 1], all));
    }
}
