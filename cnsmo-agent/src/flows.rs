//! What happened to single packets of late: those that were dropped, logged, let pass on trial or rejected.

use std::{
    collections::VecDeque,
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use cnsmo_proto::{
    model::{Direction, Name},
    pb::{
        flow::{PacketRecord, RecordsPage, RecordsQuery, Why as PbWhy},
        policy,
    },
};

/// Records kept; the oldest are forgotten.
const KEPT_MAX: usize = 4_096;
/// Records in one answer.
const PAGE_MAX: u32 = 500;

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
#[derive(Debug, Default)]
pub struct FlowLog(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    records: VecDeque<FlowRecord>,
    /// Number of the next one.
    next: u64,
}

/// Records from one place on.
#[derive(Debug, PartialEq, Eq)]
pub struct Page {
    /// In order.
    pub records: Vec<FlowRecord>,
    /// Where to go on.
    pub next: u64,
    /// Records before these that were forgotten.
    pub missed: u64,
}

impl FlowLog {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a record, under the next number.
    pub fn push(&self, mut record: FlowRecord) {
        let mut kept = self.kept();
        record.sequence = kept.next;
        kept.next += 1;
        if kept.records.len() == KEPT_MAX {
            kept.records.pop_front();
        }
        kept.records.push_back(record);
    }

    /// At most `max` records from number `from` on. A number that was not given yet is one of another run: from the
    /// oldest on.
    pub fn read(&self, from: u64, max: usize) -> Page {
        let kept = self.kept();
        let from = if from > kept.next { 0 } else { from };
        let first = kept.records.front().map_or(kept.next, |record| record.sequence);
        let skip = usize::try_from(from.saturating_sub(first)).unwrap_or(usize::MAX);
        let records: Vec<_> = kept.records.iter().skip(skip).take(max).cloned().collect();
        let next = records.last().map_or(kept.next, |record| record.sequence + 1);
        Page { records, next, missed: first.saturating_sub(from) }
    }

    /// At most the last `max` records.
    pub fn last(&self, max: usize) -> Page {
        let (next, kept) = {
            let kept = self.kept();
            (kept.next, kept.records.len())
        };
        self.read(next - max.min(kept) as u64, max)
    }

    /// What the core asks.
    pub fn answer(&self, query: RecordsQuery) -> RecordsPage {
        let max = query.max.min(PAGE_MAX) as usize;
        let Page { records, next, missed } = match query.from {
            Some(from) => self.read(from, max),
            None => self.last(max),
        };
        RecordsPage { records: records.into_iter().map(Into::into).collect(), next, missed }
    }
}

impl From<FlowRecord> for PacketRecord {
    fn from(record: FlowRecord) -> Self {
        let is_icmp = record.protocol == if record.src.is_ipv4() { 1 } else { 58 };
        let [first, second] = record.ports.map(u32::from);
        let (source_port, destination_port) = if is_icmp { (0, 0) } else { (first, second) };
        let (icmp_type, icmp_code) = if is_icmp { (first, second) } else { (0, 0) };
        let (policy, rule) = match record.rule {
            Some((policy, rule)) => (policy.to_string(), rule.to_string()),
            None => (String::new(), String::new()),
        };
        Self {
            sequence: record.sequence,
            time: Some(record.time.into()),
            why: match record.why {
                Why::Dropped => PbWhy::Dropped,
                Why::Rejected => PbWhy::Rejected,
                Why::Logged => PbWhy::Logged,
                Why::Audited => PbWhy::Audited,
            }
            .into(),
            drop_reason: record.dropped.unwrap_or_default().to_owned(),
            direction: match record.direction {
                Direction::Ingress => policy::Direction::Ingress,
                Direction::Egress => policy::Direction::Egress,
            }
            .into(),
            overlay: record.overlay,
            source: record.src.to_string(),
            destination: record.dst.to_string(),
            protocol: record.protocol.into(),
            source_port,
            destination_port,
            icmp_type,
            icmp_code,
            tcp_flags: record.tcp_flags.into(),
            length: record.length,
            policy,
            rule,
        }
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

    fn numbers(page: Page) -> (Vec<u64>, u64, u64) {
        let Page { records, next, missed } = page;
        (records.into_iter().map(|record| record.sequence).collect(), next, missed)
    }

    #[test]
    fn reading_goes_on_where_it_ended() {
        let log = FlowLog::default();
        assert_eq!(numbers(log.read(0, 10)), (vec![], 0, 0));
        (0..5).for_each(|port| log.push(record(port)));
        assert_eq!(numbers(log.read(0, 3)), (vec![0, 1, 2], 3, 0));
        assert_eq!(numbers(log.read(3, 3)), (vec![3, 4], 5, 0));
        assert_eq!(numbers(log.read(5, 3)), (vec![], 5, 0));
        assert_eq!(numbers(log.last(2)), (vec![3, 4], 5, 0));
        assert_eq!(numbers(log.last(9)), (vec![0, 1, 2, 3, 4], 5, 0));
        log.push(record(5));
        assert_eq!(numbers(log.read(5, 3)), (vec![5], 6, 0));
        assert_eq!(numbers(log.read(70, 1)), (vec![0], 1, 0), "of another run");
    }

    #[test]
    fn the_oldest_are_forgotten_and_that_is_told() {
        let log = FlowLog::default();
        let all = KEPT_MAX as u64 + 10;
        (0..all).for_each(|port| log.push(record(port as u16)));
        assert_eq!(numbers(log.read(4, 2)), (vec![10, 11], 12, 6));
        assert_eq!(log.read(0, usize::MAX).records.len(), KEPT_MAX);
        assert_eq!(numbers(log.last(1)), (vec![all - 1], all, 0));
    }

    #[test]
    fn icmp_has_types_and_others_have_ports() {
        let tcp = PacketRecord::from(record(80));
        assert_eq!((tcp.source_port, tcp.destination_port, tcp.icmp_type), (1, 80, 0));
        let icmp = FlowRecord { protocol: 1, ports: [3, 4], ..record(0) };
        let icmp = PacketRecord::from(icmp);
        assert_eq!((icmp.icmp_type, icmp.icmp_code, icmp.source_port), (3, 4, 0));
    }

    #[test]
    fn a_page_is_bounded_whatever_is_asked() {
        let log = FlowLog::default();
        (0..1_000).for_each(|port| log.push(record(port)));
        let page = log.answer(RecordsQuery { from: Some(0), max: u32::MAX });
        assert_eq!((page.records.len(), page.next), (500, 500));
        let page = log.answer(RecordsQuery { from: None, max: 3 });
        assert_eq!((page.records[0].sequence, page.next), (997, 1_000));
    }
}
