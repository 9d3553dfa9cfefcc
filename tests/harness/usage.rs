//! What a process takes, as proc(5) tells.

use std::{collections::BTreeSet, fs, time::Duration};

use anyhow::{Context as _, bail};

/// Memory of a process, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// `VmRSS`: all that is in memory, the text of the program too.
    pub resident: u64,
    /// `RssAnon`: heaps and stacks alone, which no file stands behind.
    pub anonymous: u64,
}

/// What a process has in memory now.
pub fn memory(process: u32) -> anyhow::Result<Memory> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let bytes = |field: &str| -> anyhow::Result<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        Ok(kib.with_context(|| format!("no {field}"))?.trim().parse::<u64>()? * 1_024)
    };
    Ok(Memory { resident: bytes("VmRSS")?, anonymous: bytes("RssAnon")? })
}

/// In user mode and in the kernel, of all its threads since it began: `utime` and `stime` of proc_pid_stat(5).
pub fn processor_time(process: u32) -> anyhow::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The name before may hold anything.
    let (_, fields) = stat.rsplit_once(')').context("no name")?;
    let mut fields = fields.split_whitespace().skip(11);
    let mut ticks =
        || -> anyhow::Result<u64> { Ok(fields.next().context("too few fields")?.parse()?) };
    // USER_HZ is 100 on all architectures that the data path runs on.
    Ok(Duration::from_millis((ticks()? + ticks()?) * 10))
}

/// Where the network namespace of a process takes what comes, the kernel's own sockets too: `tcp/7443`, as `ss -ltu` tells.
pub fn ports(process: u32) -> anyhow::Result<BTreeSet<String>> {
    // In proc_net(5) TCP that listens has the state 0A; UDP without a peer, and anything raw, has 07.
    let tables = [("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07"), ("raw", "07")];
    let mut ports = BTreeSet::new();
    for (table, listens) in tables.into_iter().chain([("raw6", "07")]) {
        let path = format!("/proc/{process}/net/{table}");
        let text = match fs::read_to_string(&path) {
            // A kernel without IPv6.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            text => text.with_context(|| format!("reading {path}"))?,
        };
        for line in text.lines().skip(1) {
            let mut fields = line.split_whitespace().skip(1);
            let (Some(local), _, Some(state)) = (fields.next(), fields.next(), fields.next())
            else {
                bail!("{path}: `{line}`");
            };
            let (_, port) = local.rsplit_once(':').with_context(|| format!("{path}: {local}"))?;
            let port = u16::from_str_radix(port, 16).with_context(|| format!("{path}: {local}"))?;
            if state == listens {
                ports.insert(format!("{}/{port}", table.trim_end_matches('6')));
            }
        }
    }
    Ok(ports)
}
