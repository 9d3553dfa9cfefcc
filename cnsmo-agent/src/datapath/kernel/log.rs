//! Messages of the programs, forwarded to the agent's log.

use aya::Ebpf;
use aya_log::EbpfLogger;

use super::{KernelError, Mapped};

/// Bytes of the ring: more than [`REPORTS_PER_POLL`] messages need. Rounded up to a page.
pub(super) const RING_BYTES: u32 = 4_096;
/// Messages that the programs may write between two polls; more tell nothing new. What they are about is counted whole
/// among the drops.
const REPORTS_PER_POLL: u64 = 4;

/// The receiving end. Not pinned: programs that outlive their agent write until they may not any more.
pub(super) struct ProgramLog {
    /// None: the object writes no messages.
    ring: Option<EbpfLogger<ToTracing>>,
    reports_left: Mapped<u64>,
}

impl ProgramLog {
    pub(super) fn open(ebpf: &mut Ebpf, reports_left: Mapped<u64>) -> Result<Self, KernelError> {
        let ring = match EbpfLogger::init_with_logger(ebpf, ToTracing) {
            Ok(ring) => Some(ring),
            Err(aya_log::Error::MapNotFound) => {
                tracing::warn!("the programs have no log; their messages are lost");
                None
            }
            Err(error) => return Err(KernelError::kernel("read the log of the programs")(error)),
        };
        reports_left.write(0, &[REPORTS_PER_POLL]);
        Ok(Self { ring, reports_left })
    }

    /// Forwards what was written since the last poll.
    pub(super) fn poll(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        // Before the refill: a ring that is filled while it is read would never be empty.
        ring.flush();
        self.reports_left.write(0, &[REPORTS_PER_POLL]);
    }
}

struct ToTracing;

impl log::Log for ToTracing {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        tracing::warn!(stage = record.target(), "{}", record.args());
    }

    fn flush(&self) {}
}
