//! Trying a policy in the kernel before packets meet it.

use std::net::IpAddr;

use aya::{TestRunOptions, programs::TestRun as _};
use cnsmo_common::{
    blob::{NO_RULE, lanes},
    probe::{Header, TRACE_LEN},
};
use cnsmo_proto::model::Direction;

use super::{Kernel, KernelError, load::classifier};
use crate::{
    compile::{reference::first_match, trace},
    effective::Effective,
};

/// Headers tried per policy.
const HEADERS: usize = TRACE_LEN as usize;
/// The linear reference is slow: for more rules than this fewer headers are tried.
const COMPARISONS_MAX: usize = 40_000_000;
const HEADERS_MIN: usize = 256;

impl Kernel {
    /// Classifies headers with the half that `Control::probe` names, by the code that packets meet, and compares each
    /// result with the linear reference.
    pub(super) fn check(&self, policy: &Effective) -> Result<(), KernelError> {
        let affordable = COMPARISONS_MAX / policy.rules.len().max(1);
        let count = affordable.clamp(HEADERS_MIN, HEADERS);
        let headers = self.fill_trace(policy, count);
        self.results.write(0, &vec![NO_RULE - 1; headers.len()]);

        let probe = classifier(&self.ebpf, "probe")?;
        let frame = [0; 64];
        let repeat = headers.len() as u32;
        let options = TestRunOptions { data_in: Some(&frame), repeat, ..Default::default() };
        probe.test_run(options).map_err(KernelError::kernel("try the policy"))?;

        let results = self.results.read(0, headers.len());
        for (header, seen) in headers.iter().zip(results) {
            let expected = first_match(policy, header).unwrap_or(NO_RULE);
            if seen != expected {
                return Err(KernelError::Refused(format!(
                    "self-check: {header:?} met rule {seen} in the kernel, should meet {expected}"
                )));
            }
        }
        Ok(())
    }

    /// Writes headers for the probe program, and returns them.
    pub(super) fn fill_trace(&self, policy: &Effective, count: usize) -> Vec<trace::Header> {
        let seed = u64::from(self.live.generation);
        let headers = trace::headers(policy, count, seed);
        let words: Vec<Header> = headers.iter().map(in_words).collect();
        self.trace.write(0, &words);
        self.position.write(0, &[0]);
        headers
    }
}

fn in_words(header: &trace::Header) -> Header {
    let words = |address: IpAddr| match address {
        IpAddr::V4(address) => [0, u64::from(address.to_bits())],
        IpAddr::V6(address) => {
            let bits = address.to_bits();
            [(bits >> 64) as u64, bits as u64]
        }
    };
    Header {
        src: words(header.src),
        dst: words(header.dst),
        lanes: lanes(header.sport, header.dport, header.proto),
        direction: u8::from(header.direction == Direction::Egress),
        family: if header.src.is_ipv4() { 4 } else { 6 },
        pad: [0; 22],
    }
}
