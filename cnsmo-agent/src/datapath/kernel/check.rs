//! Trying a policy in the kernel before packets meet it.

use std::net::IpAddr;

use aya::{TestRunOptions, programs::TestRun as _};
use cnsmo_common::{
    blob::{NO_RULE, lanes},
    control::Control,
    probe::{Header, TRACE_LEN},
};
use cnsmo_proto::model::Direction;
use rayon::prelude::*;

use super::{Kernel, KernelError, load::classifier};
use crate::{
    compile::{reference::first_matches, trace},
    effective::Effective,
};

/// Headers tried per policy.
const HEADERS: usize = TRACE_LEN as usize;
/// The linear reference is slow: for more rules than this fewer headers are tried.
const COMPARISONS_MAX: usize = 40_000_000;
const HEADERS_MIN: usize = 256;
/// Headers that a thread compares in one pass over the rules.
const CHUNK: usize = 64;

impl Kernel {
    /// Before a policy goes live: as many headers as there is time for, with the half that `Control::probe` names.
    pub(super) fn check(&self, policy: &Effective) -> Result<(), KernelError> {
        let affordable = COMPARISONS_MAX / policy.rules.len().max(1);
        let count = affordable.clamp(HEADERS_MIN, HEADERS);
        let headers = trace::headers(policy, count, u64::from(self.live.generation));
        self.compare(policy, &headers)
    }

    /// As the check of a policy before it goes live, with the live one, which is `policy`, and these headers, [`TRACE_LEN`]
    /// at most. Program `probe` goes on with them.
    pub fn check_live(
        &mut self,
        policy: &Effective,
        headers: &[trace::Header],
    ) -> Result<(), KernelError> {
        self.store(std::mem::offset_of!(Control, probe), self.live.pack().0);
        self.compare(policy, headers)
    }

    /// Classifies headers by the code that packets meet, and compares each result with the linear reference.
    fn compare(&self, policy: &Effective, headers: &[trace::Header]) -> Result<(), KernelError> {
        self.write_trace(headers);
        self.position.write(0, &[0]);
        self.results.write(0, &vec![NO_RULE - 1; headers.len()]);

        let probe = classifier(&self.ebpf, "probe")?;
        let frame = [0; 64];
        let repeat = headers.len() as u32;
        let options = TestRunOptions { data_in: Some(&frame), repeat, ..Default::default() };
        probe.test_run(options).map_err(KernelError::kernel("try the policy"))?;

        let results = self.results.read(0, headers.len());
        let wrong = headers.par_chunks(CHUNK).zip(results.par_chunks(CHUNK)).find_map_first(
            |(headers, results)| {
                let expected = first_matches(policy, headers);
                let each = headers.iter().zip(results).zip(expected);
                each.map(|((header, seen), expected)| (header, *seen, expected.unwrap_or(NO_RULE)))
                    .find(|(_, seen, expected)| seen != expected)
            },
        );
        let Some((header, seen, expected)) = wrong else { return Ok(()) };
        Err(KernelError::Refused(format!(
            "self-check: {header:?} met rule {seen} in the kernel, should meet {expected}"
        )))
    }

    pub(super) fn write_trace(&self, headers: &[trace::Header]) {
        let words: Vec<Header> = headers.iter().map(in_words).collect();
        self.trace.write(0, &words);
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
