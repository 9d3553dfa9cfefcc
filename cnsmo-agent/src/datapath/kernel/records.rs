//! Reads what the data path tells of single packets: keeps it for operators, and answers who was rejected.

use std::{
    io,
    net::IpAddr,
    os::fd::AsFd as _,
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
    time::{Duration, SystemTime},
};

use aya::maps::{MapData, RingBuf};
use cnsmo_common::{
    record::{PASSED, Record, budget, why},
    stat::Reason,
};
use cnsmo_proto::model::{Direction, Name};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
    time::{ClockId, clock_gettime},
};

use super::{KernelError, Mapped};
use crate::{
    datapath::answer::{self, Answers},
    flows::{FlowLog, FlowRecord, Why},
};

/// Records in a second, from all CPUs; what is beyond it is counted, not told.
const RECORDS_PER_SECOND: u64 = 200;
/// Answers in a second: who sends packets under a forged source must not have us flood it.
const ANSWERS_PER_SECOND: u64 = 500;

/// Policy and rule by the rule's place in each half, and the generation of the policy there.
pub(super) type Halves = Arc<Mutex<[Names; 2]>>;

#[derive(Debug, Default)]
pub(super) struct Names {
    pub(super) generation: u32,
    pub(super) first_slot: u32,
    pub(super) rules: Vec<Option<(Name, Name)>>,
}

/// The thread that reads. It ends with this.
pub(super) struct Records {
    budgets: Mapped<u64>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Records {
    pub(super) fn start(
        ring: RingBuf<MapData>,
        budgets: Mapped<u64>,
        names: Halves,
        log: Arc<FlowLog>,
    ) -> Result<Self, KernelError> {
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
            .map_err(KernelError::kernel("make an event"))?;
        let stop = Arc::new(stop);
        let answers = Answers::open().map_err(KernelError::kernel("open raw sockets"))?;
        let mut reader = Reader { ring, names, log, answers, stop: Arc::clone(&stop) };
        let thread = std::thread::Builder::new()
            .name("records".to_owned())
            .spawn(move || reader.run())
            .map_err(KernelError::kernel("start a thread"))?;
        let records = Self { budgets, stop, thread: Some(thread) };
        records.refill();
        Ok(records)
    }

    /// To be called every second.
    pub(super) fn refill(&self) {
        let mut left = [0; budget::COUNT as usize];
        left[budget::RECORDS as usize] = RECORDS_PER_SECOND;
        left[budget::ANSWERS as usize] = ANSWERS_PER_SECOND;
        self.budgets.write(0, &left);
    }
}

impl Drop for Records {
    fn drop(&mut self) {
        self.budgets.write(0, &[0; budget::COUNT as usize]);
        if let (Ok(_), Some(thread)) = (self.stop.write(1), self.thread.take()) {
            // It has told of a panic itself.
            let _ = thread.join();
        }
    }
}

struct Reader {
    ring: RingBuf<MapData>,
    names: Halves,
    log: Arc<FlowLog>,
    answers: Answers,
    stop: Arc<EventFd>,
}

impl Reader {
    fn run(&mut self) {
        loop {
            match self.wait() {
                Ok(true) => self.drain(),
                Ok(false) => return,
                Err(error) => {
                    tracing::error!(%error, "packets are neither recorded nor answered any more");
                    return;
                }
            }
        }
    }

    /// False: it is to end.
    fn wait(&self) -> io::Result<bool> {
        let mut fds = [
            PollFd::new(self.ring.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(!fds[1].any().unwrap_or(false)),
            Err(error) => Err(error.into()),
        }
    }

    fn drain(&mut self) {
        while let Some(record) = self.next() {
            if record.why & why::ANSWER != 0
                && let Some(answer) = answer::answer(&record)
                && let Err(error) = self.answers.send(&answer, record.ifindex)
            {
                tracing::debug!(%error, to = %answer.to, "a rejected packet was not answered");
            }
            self.log.push(self.complete(&record));
        }
    }

    fn next(&mut self) -> Option<Record> {
        // SAFETY: the data path writes nothing else, every bit pattern is a record, and the kernel aligns to 8 bytes only
        // by habit.
        let read = |bytes: &[u8]| unsafe { bytes.as_ptr().cast::<Record>().read_unaligned() };
        self.ring.next().filter(|item| item.len() >= size_of::<Record>()).map(|item| read(&item))
    }

    fn complete(&self, record: &Record) -> FlowRecord {
        let (src, dst) = answer::ends(record);
        let word = |at: usize| u16::from_be_bytes([record.l4[at], record.l4[at + 1]]);
        let is_icmp = match src {
            IpAddr::V4(_) => record.proto == 1,
            IpAddr::V6(_) => record.proto == 58,
        };
        let reason = Reason::ALL.into_iter().find(|reason| *reason as u8 == record.outcome);
        FlowRecord {
            sequence: 0,
            time: wall_time(record.time),
            dropped: reason.filter(|_| record.outcome != PASSED).map(Reason::as_str),
            why: if record.why & why::ANSWER != 0 {
                Why::Rejected
            } else if record.outcome != PASSED {
                Why::Dropped
            } else if record.why & why::AUDIT != 0 {
                Why::Audited
            } else {
                Why::Logged
            },
            direction: if record.direction == 0 { Direction::Ingress } else { Direction::Egress },
            overlay: record.zone == cnsmo_common::flow::ZONE_OVERLAY,
            src,
            dst,
            protocol: record.proto,
            ports: match record.proto {
                _ if is_icmp => [record.l4[0].into(), record.l4[1].into()],
                6 | 17 | 132 => [word(0), word(2)],
                _ => [0; 2],
            },
            tcp_flags: if record.proto == 6 { record.l4[13] } else { 0 },
            length: record.length,
            rule: if record.why & why::RULE != 0 { self.rule(record) } else { None },
        }
    }

    fn rule(&self, record: &Record) -> Option<(Name, Name)> {
        let halves = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let names = halves.iter().find(|names| names.generation == record.generation)?;
        let index = record.slot.checked_sub(names.first_slot)?;
        names.rules.get(index as usize)?.clone()
    }
}

/// `nanoseconds`: of the monotonic clock, a moment ago.
fn wall_time(nanoseconds: u64) -> SystemTime {
    let now = SystemTime::now();
    let Ok(monotonic) = clock_gettime(ClockId::CLOCK_MONOTONIC) else { return now };
    let ago = Duration::from(monotonic).saturating_sub(Duration::from_nanos(nanoseconds));
    now.checked_sub(ago).unwrap_or(now)
}
