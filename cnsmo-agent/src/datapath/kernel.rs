//! The data path in the kernel: load, fill, attach, switch policies, count. Nothing else in the agent names aya.
//!
//! Maps and links stay pinned under bpffs, so that packets are judged with the agent dead. A restarted agent loads the
//! programs anew over the pinned maps, replaces them in the pinned links, each at one stroke, and finds the policy live.

mod attach;
mod balance;
mod check;
mod explain;
mod hits;
mod live;
mod load;
mod log;
mod open;
mod records;
mod sys;

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use aya::{
    Ebpf, TestRunAttrs, TestRunOptions, TestRunResult,
    maps::{HashMap, MapData, PerCpuArray},
    programs::{Program, TestRun as _},
};
use balance::{Balancers, Plan};
use cnsmo_common::{
    balance::FILTER_WORDS,
    control::{Control, LIMITS_MAX, Limit, LiveParts, RuleAction, SLOT_FIRST, TIMEOUTS, switch},
    explain::Explanation,
    flow::{Flow, FlowKey, flag, state},
    probe::{BENCH_HEADERS, Header},
    record::budget,
    stat,
};
use cnsmo_ebpf::{connections::number_of, parse};
use cnsmo_proto::{
    model::{Direction, FlowTimeouts, Name},
    pb::{agent as pb, policy::RuleCounter},
};
use hits::{Hits, RuleName};
use ipnet::IpNet;
use log::ProgramLog;
use open::{Numbers, OpenFlows};
use prost::Message as _;
use records::{Halves, Names, Records};
use sys::{Batches, GracePeriod, Mapped, give_memory_back};

use super::{ApplyError, Attachment, Count, Datapath, Status};
use crate::{
    compile::{
        Compiled, Limits,
        actions::{actions, limits, live},
        compile, trace,
    },
    effective::{Balancer, Effective, TunnelDevice},
    explain::{Answer, Question},
    flows::FlowLog,
    live::{Impact, LiveFlows},
};

/// The compiled programs.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/cnsmo"));

/// Time after the first start in which TCP segments without a flow may make one, where rules allow it: connections that
/// are older than the firewall live on. Ends early when the first policy that enforces is replaced.
const PICKUP: Duration = Duration::from_secs(60);
/// Seconds in which the fragments of a datagram must arrive; short, because identifiers come again soon (RFC 4963).
const FRAGMENT_SECONDS: u32 = 2;
/// Flows looked at per [`Datapath::sweep`]: some milliseconds.
const SWEEP_MAX: usize = 16_384;
/// Flows per system call of a sweep.
const BATCH: usize = 4_096;

/// Bytes that a program may add to a frame: an Ethernet header.
const GROWTH: usize = 14;

/// How the data path is set up. The sizes are fixed while its maps are pinned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Folder for the pins, on bpffs, of this data path alone.
    pub pins: PathBuf,
    /// Folder for what must outlive the agent and cannot be pinned.
    pub state: PathBuf,
    /// Devices to guard.
    pub interfaces: Vec<String>,
    /// Where ingress is hooked.
    pub xdp: XdpChoice,
    /// Entries of each flow table (half-open and established, IPv4 and IPv6).
    pub flows: u32,
    /// Bytes of one half of one family's policy; rounded up to a power of two.
    pub policy_bytes: usize,
    /// Rules in all.
    pub rules_max: u32,
}

/// Where ingress is hooked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpChoice {
    /// Native XDP where the driver takes it, else generic, else TC.
    Auto,
    /// Native XDP or an error.
    Native,
    /// Generic XDP or an error.
    Generic,
    /// TC.
    Off,
}

/// The data path cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A file or folder.
    #[error("failed to use {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A call of the kernel.
    #[error("failed to {what}")]
    Kernel {
        /// What was attempted.
        what: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The verifier's word, or a hook's.
    #[error("{0}")]
    Refused(String),
}

impl KernelError {
    fn file(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { path, source }
    }

    fn kernel<E>(what: impl Into<String>) -> impl FnOnce(E) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let what = what.into();
        move |source| Self::Kernel { what, source: source.into() }
    }
}

impl From<KernelError> for ApplyError {
    fn from(error: KernelError) -> Self {
        Self::Failed(Box::new(error))
    }
}

/// The data path of this VM.
pub struct Kernel {
    options: Options,
    ebpf: Ebpf,
    log: ProgramLog,
    /// Packets of [`Status::established_full`] beyond which the log hears of it again.
    tell_full_beyond: u64,
    control: Mapped<Control>,
    /// IPv4, IPv6.
    blobs: [Mapped<u64>; 2],
    rules: Mapped<RuleAction>,
    limits: Mapped<Limit>,
    trace: Mapped<Header>,
    results: Mapped<u32>,
    explanation: Mapped<Explanation>,
    position: Mapped<u32>,
    rule_counts: PerCpuArray<MapData, stat::Count>,
    rule_counts_fd: OwnedFd,
    stat_counts: PerCpuArray<MapData, stat::Count>,
    flows_v4: Flows<[u8; 4]>,
    flows_v6: Flows<[u8; 16]>,
    open_flows: OpenFlows,
    balancers: Balancers,
    grace: GracePeriod,
    clock: Clock,
    live: LiveParts,
    /// When it became live, or when this was opened.
    live_since: Instant,
    /// Of the live rules, by index; those built in have none.
    names: Vec<Option<(Name, Name)>>,
    /// As `names`, with those that are built in.
    rules_in_force: Vec<(Option<Name>, Name)>,
    /// As `names`, of both halves, for who reads the records.
    halves: Halves,
    /// `None`: nobody reads them, and there are none.
    records: Option<Records>,
    /// What rules had counted when their half was retired.
    retired: BTreeMap<(Name, Name), Count>,
    hits: Hits,
    attachments: Vec<Attachment>,
    /// Kernel indexes of the devices attached to; another one under the same name is another device.
    devices: Vec<u32>,
    /// The tunnel device attached to, and its index.
    tunnel: Option<(Attachment, u32)>,
    /// What XDP leaves to TC is judged there.
    gateway: bool,
    /// Whole rounds of the sweeps when balancers were last removed.
    kept_since: [u64; 2],
    /// The network has changed and no policy was switched to since.
    moved: bool,
    /// Balancers in force; `None`: not known yet.
    plan: Option<Plan>,
}

impl Kernel {
    /// Loads the programs over the pinned maps, or over new ones. Attaches nothing: the first policy comes before.
    pub fn open(options: Options) -> Result<Self, KernelError> {
        let loaded = load::load(&options)?;
        let fresh = loaded.fresh;
        let mut kernel = loaded.into_kernel(options)?;
        kernel.set_times(fresh);
        let (retired, seen) = read_retired(&kernel.retired_path());
        (kernel.retired, kernel.hits) = (retired, Hits::new(seen));
        give_memory_back();
        Ok(kernel)
    }

    /// Has packets that are dropped, logged or let pass on trial told to `log`, and those that are rejected answered.
    pub fn record(&mut self, log: Arc<FlowLog>) -> Result<(), KernelError> {
        let ring = load::records(&mut self.ebpf)?;
        let budgets = load::map_own(&self.ebpf, "BUDGETS", budget::COUNT as usize)?;
        self.records = Some(Records::start(ring, budgets, Arc::clone(&self.halves), log)?);
        Ok(())
    }

    /// Changes timeouts and switches. The policy in force stays.
    pub fn change_control(&mut self, change: impl FnOnce(&mut Control)) {
        let mut control = self.control.read(0, 1)[0];
        change(&mut control);
        control.live = self.live.pack().0;
        self.control.write(0, &[control]);
    }

    /// Names of all programs in the object.
    pub fn programs(&self) -> Vec<String> {
        self.ebpf.programs().map(|(name, _)| name.to_owned()).collect()
    }

    /// Has the kernel run `program` on one frame, against the live maps: its return value and the frame afterwards.
    pub fn test_run(&mut self, program: &str, frame: &[u8]) -> Result<(u32, Vec<u8>), KernelError> {
        let mut out = vec![0; frame.len() + GROWTH];
        let run = self.run(program, frame, &mut out, 1)?;
        out.truncate(run.data_size_out as usize);
        Ok((run.return_value, out))
    }

    /// As [`Self::test_run`], `repeat` times: the time of one run as the kernel measures it.
    pub fn time(
        &mut self,
        program: &str,
        frame: &[u8],
        repeat: u32,
    ) -> Result<Duration, KernelError> {
        Ok(self.run(program, frame, &mut vec![0; frame.len() + GROWTH], repeat)?.duration)
    }

    /// Since when packets are judged by the policy in force. Of one that was found in force: since it was found.
    pub fn in_force_since(&self) -> Instant {
        self.live_since
    }

    /// Lets `bench_flows` and `bench_no_firewall` begin anew, with that many flows, a power of two.
    pub fn set_bench_flows(&mut self, flows: u32) {
        self.position.write(0, &[0, flows - 1]);
    }

    /// As [`Self::set_bench_flows`], for `bench_balancer` and `bench_no_balancer`, which write `headers` to the frame before
    /// each run. Until the next policy is applied.
    pub fn set_bench_headers(&mut self, headers: &[u8; BENCH_HEADERS], flows: u32) {
        let (words, _) = headers.as_chunks();
        let words: Vec<_> = words.iter().map(|word| u32::from_ne_bytes(*word)).collect();
        self.results.write(0, &words);
        self.set_bench_flows(flows);
    }

    /// What `bench_send` sends next: to the addresses and destination ports of these headers in turn, [`TRACE_LEN`] of them,
    /// IPv4 all, out of the device of that kernel index. The rest is `frame`, whose checksum is that of the addresses left out.
    pub fn set_bench_traffic(
        &mut self,
        headers: &[trace::Header],
        frame: &[u8; BENCH_HEADERS],
        device: u32,
    ) {
        self.write_trace(headers);
        self.set_bench_headers(frame, 1);
        self.results.write(BENCH_HEADERS / 4, &[device]);
    }

    /// Has the kernel send that many frames by `bench_send`, `batch` of them at a time, from the namespace of this thread: the
    /// time that each took, with all that became of it on this processor.
    pub fn send(&mut self, frames: u32, batch: u32) -> Result<Duration, KernelError> {
        let frame = [0; BENCH_HEADERS];
        let options = TestRunOptions {
            data_in: Some(&frame),
            repeat: frames,
            attrs: TestRunAttrs::new().xdp_live_frames(batch),
            ..Default::default()
        };
        Ok(self.run_by("bench_send", options)?.duration)
    }

    /// Pins a program, for others to attach.
    pub fn pin_program(&mut self, name: &str, path: &Path) -> Result<(), KernelError> {
        load::ensure_loaded(&mut self.ebpf, name)?;
        let program = self.ebpf.program_mut(name);
        let program = program.ok_or_else(|| KernelError::Refused(format!("no program {name}")))?;
        program.pin(path).map_err(KernelError::kernel(format!("pin program {name}")))
    }

    fn run(
        &mut self,
        name: &str,
        frame: &[u8],
        out: &mut [u8],
        repeat: u32,
    ) -> Result<TestRunResult, KernelError> {
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(out),
            repeat,
            ..Default::default()
        };
        self.run_by(name, options)
    }

    fn run_by(
        &mut self,
        name: &str,
        options: TestRunOptions<'_>,
    ) -> Result<TestRunResult, KernelError> {
        load::ensure_loaded(&mut self.ebpf, name)?;
        let result = match self.ebpf.program(name) {
            Some(Program::Xdp(program)) => program.test_run(options),
            Some(Program::SchedClassifier(program)) => program.test_run(options),
            _ => return Err(KernelError::Refused(format!("{name} cannot be run by itself"))),
        };
        result.map_err(KernelError::kernel(format!("run program {name}")))
    }

    /// Removes programs, links and maps under `pins` from the kernel.
    pub fn detach(pins: &Path) -> Result<(), KernelError> {
        attach::detach_all(pins);
        match fs::remove_dir_all(pins) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(KernelError::file(pins)(error))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Of those that are loaded: some are when they are needed first.
    fn program_ids(&self) -> Vec<u32> {
        let infos = self.ebpf.programs().filter_map(|(_, program)| program.info().ok());
        let mut ids: Vec<_> = infos.map(|info| info.id()).collect();
        ids.sort_unstable();
        ids
    }

    fn half_words(&self) -> usize {
        load::half_words(&self.options)
    }

    fn limits(&self) -> Limits {
        Limits { blob_words: self.half_words(), rules: self.options.rules_max as usize }
    }

    fn set_times(&mut self, fresh: bool) {
        let (now, hz) = (self.clock.now(), self.clock.hz);
        self.change_control(|control| {
            control.timeouts = timeouts(FlowTimeouts::default()).map(|seconds| seconds * hz);
            control.fragment_timeout = FRAGMENT_SECONDS * hz;
            control.refresh = hz;
            if fresh {
                control.pickup_until = now + PICKUP.as_secs() * u64::from(hz);
            }
        });
    }

    /// Whether the live half already is `compiled`.
    fn is_live(&self, policy: &Effective, compiled: &Compiled, next: LiveParts) -> bool {
        let at = self.half_words() * usize::from(self.live.half);
        let parts = LiveParts { half: self.live.half, generation: self.live.generation, ..next };
        self.live.generation != 0
            && parts == self.live
            && self.blobs[0].holds(at, &compiled.v4.words)
            && self.blobs[1].holds(at, &compiled.v6.words)
            && self.rules.holds(
                self.first_rule(self.live.half),
                &actions(policy, self.first_slot(self.live.half)),
            )
            && self.limits.holds(first_limit(self.live.half), &limits(policy))
    }

    fn first_rule(&self, half: u8) -> usize {
        self.options.rules_max as usize * usize::from(half)
    }

    fn first_slot(&self, half: u8) -> u32 {
        SLOT_FIRST + self.first_rule(half) as u32
    }

    /// Writes the idle half, tries it in the kernel, then makes it live by one store.
    fn switch(
        &mut self,
        policy: &Effective,
        compiled: &Compiled,
        next: LiveParts,
    ) -> Result<(), KernelError> {
        let half = next.half;
        let at = self.half_words() * usize::from(half);
        let actions = actions(policy, self.first_slot(half));
        for (blob, family) in self.blobs.iter().zip([&compiled.v4, &compiled.v6]) {
            blob.write(at, &family.words);
            if !blob.holds(at, &family.words) {
                return Err(KernelError::Refused("the policy did not arrive in the kernel".into()));
            }
        }
        self.rules.write(self.first_rule(half), &actions);
        self.limits.write(first_limit(half), &limits(policy));
        self.store(std::mem::offset_of!(Control, probe), next.pack().0);
        self.check(policy)?;
        let (first, n) = (self.first_slot(half), actions.len() as u32);
        let fd = self.rule_counts_fd.as_fd();
        sys::clear_per_cpu(fd, first, n, size_of::<stat::Count>(), self.cpus()?)
            .map_err(KernelError::kernel("clear the counters"))?;

        if self.live.generation != 0 && !self.live.open {
            // What this policy cuts must not come back as a connection older than the firewall.
            self.store(std::mem::offset_of!(Control, pickup_until), 0);
        }
        self.publish_names(next, policy);
        self.store(std::mem::offset_of!(Control, live), next.pack().0);
        self.live_since = Instant::now();
        self.grace.settle();
        self.look_at_rules();
        self.retire(policy);
        self.live = next;
        self.set_names(policy);
        write_retired(&self.retired_path(), &self.retired, self.hits.by_name(&self.names));
        Ok(())
    }

    fn set_names(&mut self, policy: &Effective) {
        let names = names(policy);
        self.hits.rename(&self.names, &names);
        self.names = names;
        let rules = policy.rules.iter();
        self.rules_in_force = rules.map(|o| (o.policy.clone(), o.rule.name.clone())).collect();
    }

    /// For who reads the records of packets that `live` judges.
    fn publish_names(&self, live: LiveParts, policy: &Effective) {
        let first_slot = self.first_slot(live.half);
        let names = Names { generation: live.generation, first_slot, rules: names(policy) };
        let mut halves = self.halves.lock().unwrap_or_else(PoisonError::into_inner);
        halves[usize::from(live.half)] = names;
    }

    /// A hook goes with its device: attaches to devices that were made anew under their names.
    fn follow_devices(&mut self) {
        for n in 0..self.attachments.len() {
            let interface = &self.options.interfaces[n];
            let index = device_index(interface);
            if index == 0 || index == self.devices[n] {
                continue;
            }
            match attach::attach_to(&mut self.ebpf, &self.options, interface, self.gateway) {
                Ok(attachment) => {
                    tracing::info!(interface, "attached to a device that was made anew");
                    self.attachments[n] = attachment;
                    self.devices[n] = index;
                }
                Err(error) => {
                    let error: &dyn std::error::Error = &error;
                    tracing::error!(
                        interface,
                        error,
                        "a new device is not guarded; will try again"
                    );
                }
            }
        }
    }

    /// As [`Self::follow_devices`], for the tunnel.
    fn follow_tunnel(&mut self) {
        let Some((attachment, index)) = &self.tunnel else { return };
        let interface = attachment.interface.clone();
        let now = device_index(&interface);
        if now == 0 || now == *index {
            return;
        }
        if let Err(error) = self.attach_tunnel(&interface) {
            let error: &dyn std::error::Error = &error;
            tracing::error!(interface, error, "a new tunnel is not guarded; will try again");
        }
    }

    fn attach_tunnel(&mut self, interface: &str) -> Result<(), KernelError> {
        let index = device_index(interface);
        let known = self.tunnel.as_ref();
        if known.is_some_and(|(known, at)| known.interface == interface && *at == index) {
            return Ok(());
        }
        let attachment = attach::attach_to(&mut self.ebpf, &self.options, interface, false)?;
        self.tunnel = Some((attachment, index));
        self.set_control(|control| control.tunnel = index);
        Ok(())
    }

    /// Hooks on all devices that there shall be.
    fn attach(&mut self, policy: &Effective, plan: &Plan) -> Result<(), KernelError> {
        // Also where XDP leaves packets to TC for flows that outlive their balancer.
        let leaves = self.control.read(0, 1)[0].switches & switch::LEAVE_TO_TC != 0;
        let gateway = plan.has_gateway() || leaves;
        if self.attachments.is_empty() {
            self.devices = self.options.interfaces.iter().map(|name| device_index(name)).collect();
            self.attachments = attach::attach(&mut self.ebpf, &self.options, gateway)?;
        } else if gateway && !self.gateway {
            for attachment in &self.attachments {
                attach::balance(&mut self.ebpf, &self.options, attachment)?;
            }
        }
        self.gateway |= gateway;
        match &policy.tunnel {
            Some(tunnel) => self.attach_tunnel(&tunnel.device),
            None => Ok(()),
        }
    }

    /// Hooks that shall not be any more.
    fn detach_unwanted(&mut self, policy: &Effective) {
        if policy.tunnel.is_none() {
            self.tunnel = None;
            self.set_control(|control| control.tunnel = 0);
        }
        let mut kept: Vec<&str> = self.options.interfaces.iter().map(String::as_str).collect();
        kept.extend(self.tunnel.iter().map(|(tunnel, _)| tunnel.interface.as_str()));
        attach::detach_others(&self.options.pins, &kept);
    }

    /// Virtual addresses before anything sends to them: first TC judges them, then XDP leaves them to TC.
    fn add_balancers(&mut self, plan: &Plan) -> Result<(), KernelError> {
        let filter = plan.gateway_filter();
        let join = |into: &mut [u64; FILTER_WORDS]| {
            into.iter_mut().zip(filter).for_each(|(word, more)| *word |= more);
        };
        self.set_control(|control| join(&mut control.judged_by_tc));
        self.set_control(|control| join(&mut control.left_to_tc));
        if plan.has_gateway() {
            self.set_control(|control| control.switches |= switch::LEAVE_TO_TC);
        }
        self.balancers.add(plan, &self.grace)?;
        if plan.has_services() {
            self.set_control(|control| control.switches |= switch::SERVICES);
        }
        Ok(())
    }

    /// The other way round. Where XDP leaves packets to TC, it goes on to for a while: see `narrow_filters`.
    fn remove_balancers(&mut self, plan: &Plan) -> Result<(), KernelError> {
        self.balancers.remove(plan)?;
        if !plan.has_services() {
            self.set_control(|control| control.switches &= !switch::SERVICES);
        }
        self.kept_since = [self.flows_v4.rounds, self.flows_v6.rounds];
        Ok(())
    }

    /// Gives addresses that no gateway balancer has any more back to XDP: not before their last flow is over, which TC
    /// alone can rewrite. Called once per sweep; XDP first, TC one sweep later, when no packet is between the two.
    fn narrow_filters(&mut self) {
        let Some(plan) = &self.plan else { return };
        let (filter, has_gateway) = (plan.gateway_filter(), plan.has_gateway());
        let control = self.control.read(0, 1)[0];
        if control.left_to_tc != filter {
            // The round of the removal and the one after: a flow may have become established behind the first.
            let swept = [&self.flows_v4.rounds, &self.flows_v6.rounds]
                .into_iter()
                .zip(self.kept_since)
                .all(|(rounds, since)| *rounds >= since + 2);
            if swept && self.flows_v4.for_clients + self.flows_v6.for_clients == 0 {
                self.set_control(|control| control.left_to_tc = filter);
            }
        } else if control.judged_by_tc != filter {
            self.set_control(|control| control.judged_by_tc = filter);
        } else if !has_gateway && control.switches & switch::LEAVE_TO_TC != 0 {
            self.set_control(|control| control.switches &= !switch::LEAVE_TO_TC);
            for attachment in &self.attachments {
                attach::end_balance(&self.options, attachment);
            }
            self.gateway = false;
        }
    }

    /// Whether addresses that only the tunnel reaches are others than before: flows are judged anew then.
    fn set_network(&mut self, tunnel: Option<&TunnelDevice>) -> bool {
        let before = self.control.read(0, 1)[0];
        let mut next = before;
        write_network(&mut next, tunnel);
        let of = |control: &Control| {
            const PREFIXES: u32 = switch::PREFIX_V4 | switch::PREFIX_V6;
            (control.switches & PREFIXES, control.prefix_v4, control.prefix_v6)
        };
        let changed = of(&before) != of(&next);
        if changed {
            self.set_control(|c| c.switches &= !(switch::PREFIX_V4 | switch::PREFIX_V6));
            self.grace.settle();
        }
        self.set_control(|control| {
            let switches = control.switches;
            write_network(control, tunnel);
            control.switches = switches;
        });
        self.set_control(|control| write_network(control, tunnel));
        changed
    }

    fn set_flow_rules(&self, policy: &Effective) {
        let hz = self.clock.hz;
        self.set_control(|control| {
            control.timeouts = timeouts(policy.timeouts).map(|seconds| seconds * hz);
            control.switches &= !switch::ORPHANS_PASS;
            if policy.orphans_pass {
                control.switches |= switch::ORPHANS_PASS;
            }
        });
    }

    /// Changes all but the live word, each word by one store.
    fn set_control(&self, change: impl FnOnce(&mut Control)) {
        let before = self.control.read(0, 1)[0];
        let mut next = before;
        change(&mut next);
        let (before, next) = (words(&before), words(&next));
        for (n, (before, next)) in before.into_iter().zip(next).enumerate() {
            if before != next {
                self.store(n * size_of::<u64>(), next);
            }
        }
    }

    fn store(&self, offset: usize, word: u64) {
        self.control.store_word(offset, word);
    }

    fn cpus(&self) -> Result<usize, KernelError> {
        aya::util::nr_cpus()
            .map_err(|(path, source)| KernelError::File { path: PathBuf::from(path), source })
    }

    /// Takes over the counts of the half that was live; rules that `next` no longer has are forgotten.
    fn retire(&mut self, next: &Effective) {
        let live = self.live_counts();
        for (name, count) in live {
            let total = self.retired.entry(name).or_default();
            total.packets += count.packets;
            total.bytes += count.bytes;
        }
        let kept: std::collections::BTreeSet<_> = names(next).into_iter().flatten().collect();
        self.retired.retain(|name, _| kept.contains(name));
    }

    fn established_full(&self) -> u64 {
        sum(&self.stat_counts, stat::STAT_ESTABLISHED_FULL).packets
    }

    /// Says so in the log when flows found no room, and again each time that they have become twice as many.
    fn tell_full(&mut self) {
        let packets = self.established_full();
        if packets > self.tell_full_beyond {
            let flows = self.options.flows;
            tracing::warn!(
                packets,
                flows,
                "the table of established flows is full: later ones work, but a flood may cut them; raise --flows"
            );
            self.tell_full_beyond = packets.saturating_mul(2);
        }
    }

    fn live_counts(&self) -> BTreeMap<(Name, Name), Count> {
        let first = self.first_slot(self.live.half);
        let named = (first..).zip(&self.names);
        named
            .filter_map(|(slot, name)| Some((name.clone()?, sum(&self.rule_counts, slot))))
            .collect()
    }

    /// Packets and bytes of the live rules since each is there, by index.
    fn look_at_rules(&mut self) -> Vec<Count> {
        let first = self.first_slot(self.live.half);
        let total = |(slot, name): (u32, &RuleName)| {
            let mut count = sum(&self.rule_counts, slot);
            if let Some(before) = name.as_ref().and_then(|name| self.retired.get(name)) {
                count.packets += before.packets;
                count.bytes += before.bytes;
            }
            count
        };
        let counts: Vec<_> = (first..).zip(&self.names).map(total).collect();
        let packets = counts.iter().map(|count| count.packets);
        self.hits.look(&self.names, packets, SystemTime::now());
        counts
    }

    fn retired_path(&self) -> PathBuf {
        self.options.state.join("counters")
    }
}

/// Words of a control value, in native order.
fn words(control: &Control) -> [u64; size_of::<Control>() / 8] {
    // SAFETY: both are plain data of one size without padding, as the assertions of the type say.
    unsafe { std::mem::transmute(*control) }
}

fn write_network(control: &mut Control, tunnel: Option<&TunnelDevice>) {
    control.switches &= !(switch::PREFIX_V4 | switch::PREFIX_V6);
    (control.prefix_v4, control.prefix_v6) = ([0; 2], [[0; 2]; 2]);
    (control.own_v4, control.own_v6, control.tunnel_mtu) = ([0; 4], [0; 16], 0);
    let Some(tunnel) = tunnel else { return };
    control.tunnel_mtu = tunnel.mtu.into();
    control.own_v4 = tunnel.addresses.v4.map_or([0; 4], |address| address.octets());
    control.own_v6 = tunnel.addresses.v6.map_or([0; 16], |address| address.octets());
    let halves = |bits: u128| [(bits >> 64) as u64, bits as u64];
    for prefix in &tunnel.prefixes {
        match prefix {
            IpNet::V4(net) => {
                let bits = |address: std::net::Ipv4Addr| u64::from(address.to_bits());
                control.prefix_v4 = [bits(net.network()), bits(net.netmask())];
                control.switches |= switch::PREFIX_V4;
            }
            IpNet::V6(net) => {
                control.prefix_v6 =
                    [halves(net.network().to_bits()), halves(net.netmask().to_bits())];
                control.switches |= switch::PREFIX_V6;
            }
        }
    }
}

impl Kernel {
    fn enforce(
        &mut self,
        policy: &Effective,
        compiled: &Compiled,
        plan: &Plan,
    ) -> Result<(), KernelError> {
        let is_live = self.live.generation != 0;
        if is_live {
            self.attach(policy, plan)?;
        }
        self.moved |= self.set_network(policy.tunnel.as_ref());
        self.add_balancers(plan)?;
        // 0 stands for "never".
        let generation = self.live.generation.checked_add(1).unwrap_or(1);
        let next = live(policy, compiled, self.live.half ^ 1, generation);
        if !self.moved && self.is_live(policy, compiled, next) {
            self.set_names(policy);
            self.publish_names(self.live, policy);
        } else {
            self.switch(policy, compiled, next)?;
            self.moved = false;
        }
        self.set_flow_rules(policy);
        if !is_live {
            self.attach(policy, plan)?;
        }
        self.remove_balancers(plan)?;
        self.detach_unwanted(policy);
        Ok(())
    }
}

impl Datapath for Kernel {
    fn apply(&mut self, policy: &Effective) -> Result<(), ApplyError> {
        let compiled = compile(policy, &self.limits())?;
        let plan = self.balancers.plan(&policy.balancers).map_err(ApplyError::BalancersRefused)?;
        if let Err(error) = self.enforce(policy, &compiled, &plan) {
            if let Some(before) = self.plan.take() {
                // The error above is the one to tell; this one would be of the same cause.
                let _ = self.add_balancers(&before);
                let _ = self.remove_balancers(&before);
                self.plan = Some(before);
            }
            return Err(error.into());
        }
        self.plan = Some(plan);
        drop(compiled);
        give_memory_back();
        Ok(())
    }

    fn steer(&mut self, balancers: &[Balancer]) -> Result<(), ApplyError> {
        let plan = self.balancers.plan(balancers).map_err(ApplyError::BalancersRefused)?;
        self.balancers.steer(&plan, &self.grace)?;
        // Where a failed policy goes back to.
        self.plan = Some(plan);
        Ok(())
    }

    fn status(&mut self) -> Status {
        let mut counters: BTreeMap<Name, BTreeMap<Name, Count>> = BTreeMap::new();
        let counts = self.look_at_rules();
        for (name, count) in self.names.iter().zip(counts) {
            let Some((policy, rule)) = name else { continue };
            counters.entry(policy.clone()).or_default().insert(rule.clone(), count);
        }
        let mut last_hits: BTreeMap<Name, BTreeMap<Name, SystemTime>> = BTreeMap::new();
        for ((policy, rule), seen) in self.hits.by_name(&self.names) {
            let Some(last) = seen.last else { continue };
            last_hits.entry(policy.clone()).or_default().insert(rule.clone(), last);
        }
        let mut drops = Vec::new();
        for (direction, number) in [
            (Direction::Ingress, cnsmo_common::Direction::Ingress),
            (Direction::Egress, cnsmo_common::Direction::Egress),
        ] {
            for reason in stat::Reason::ALL {
                let count = sum(&self.stat_counts, reason.at(number));
                if count != Count::default() {
                    drops.push((direction, reason.as_str(), count));
                }
            }
        }
        let tunnel = self.tunnel.iter().map(|(attachment, _)| attachment);
        let interfaces = self.attachments.iter().chain(tunnel);
        let mut backend_flows = BTreeMap::new();
        backend_flows.extend(self.flows_v4.backends().chain(self.flows_v6.backends()));
        Status {
            interfaces: interfaces.cloned().collect(),
            flows: self.flows_v4.live + self.flows_v6.live,
            rules: self.names.len() as u64,
            counters,
            last_hits,
            drops,
            established_full: self.established_full(),
            backend_flows,
            program_ids: self.program_ids(),
        }
    }

    fn explain(
        &mut self,
        question: &Question,
    ) -> Result<Answer, Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.ask(question)?)
    }

    fn flows(&mut self, max: usize) -> Result<LiveFlows, Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.live_flows(max)?)
    }

    fn preview(&mut self, policy: &Effective, max: usize) -> Result<Impact, ApplyError> {
        let compiled = compile(policy, &self.limits())?;
        Ok(self.impact(policy, &compiled, max)?)
    }

    fn sweep(&mut self) {
        self.follow_devices();
        self.follow_tunnel();
        self.log.poll();
        if let Some(records) = &self.records {
            records.refill();
        }
        let control = self.control.read(0, 1)[0];
        let now = self.clock.now() as u32;
        for result in [self.flows_v4.sweep(now, &control), self.flows_v6.sweep(now, &control)] {
            if let Err(error) = result {
                tracing::warn!(%error, "failed to sweep expired flows; will try again");
            }
        }
        let rounds = [self.flows_v4.counted.take(), self.flows_v6.counted.take()];
        for (v6, counted) in [false, true].into_iter().zip(rounds) {
            let Some(counted) = counted else { continue };
            if let Err(error) = self.open_flows.correct(v6, &counted) {
                tracing::warn!(%error, "failed to compare the numbers of open flows; will try again");
            }
        }
        self.narrow_filters();
        self.tell_full();
    }
}

/// Seconds without a packet after which a flow of a state is over, where the policy does not say; RFC 5382 and RFC 4787 ask
/// for 2 h and 2 min at least where a connection may be idle.
fn timeouts(stated: FlowTimeouts) -> [u32; TIMEOUTS] {
    let mut seconds = [10; TIMEOUTS];
    for (state, timeout) in [
        (state::SYN_SENT, stated.tcp_opening.unwrap_or(60)),
        (state::SYN_RECV, stated.tcp_opening.unwrap_or(60)),
        (state::ESTABLISHED, stated.tcp_established.unwrap_or(7_440)),
        (state::FIN_WAIT, stated.tcp_closing.unwrap_or(60)),
        (state::TIME_WAIT, 30),
        (state::CLOSED, 10),
        (state::UNREPLIED, stated.unreplied.unwrap_or(30)),
        (state::REPLIED, stated.replied.unwrap_or(120)),
        (state::ECHOED, stated.echo.unwrap_or(10)),
    ] {
        seconds[usize::from(state)] = timeout;
    }
    seconds
}

fn first_limit(half: u8) -> usize {
    LIMITS_MAX as usize * usize::from(half)
}

/// 0: there is no such device.
fn device_index(interface: &str) -> u32 {
    nix::net::if_::if_nametoindex(interface).unwrap_or(0)
}

fn names(policy: &Effective) -> Vec<Option<(Name, Name)>> {
    let name = |owned: &crate::effective::OwnedRule| {
        owned.policy.clone().map(|policy| (policy, owned.rule.name.clone()))
    };
    policy.rules.iter().map(name).collect()
}

fn sum(counts: &PerCpuArray<MapData, stat::Count>, at: u32) -> Count {
    let mut total = Count::default();
    // A place outside the map counts nothing.
    if let Ok(cpus) = counts.get(&at, 0) {
        for cpu in cpus.iter() {
            total.packets += cpu.packets;
            total.bytes += cpu.bytes;
        }
    }
    total
}

/// Flows by address and port, network order.
type ByBackend<A> = BTreeMap<(A, [u8; 2]), u64>;

/// The established flows of one family.
struct Flows<A> {
    fd: OwnedFd,
    map: HashMap<MapData, FlowKey<A>, Flow<A>>,
    batches: Batches<FlowKey<A>, Flow<A>>,
    /// As of the last whole round. A translated flow is one, though it has two entries.
    live: u64,
    /// Translated flows to each address and port of backends, as of the last whole round.
    backends: ByBackend<A>,
    /// Translated flows of clients at the network cards, as of the last whole round.
    for_clients: u64,
    /// Whole rounds so far.
    rounds: u64,
    /// Of the round that has just ended: flows that count for their sources.
    counted: Option<Numbers>,
    seen: Seen<A>,
}

/// What a round has seen so far.
#[derive(Default)]
struct Seen<A> {
    live: u64,
    backends: ByBackend<A>,
    for_clients: u64,
    counted: Numbers,
}

impl<A: parse::Family + Ord + 'static> Flows<A>
where
    FlowKey<A>: aya::Pod,
    Flow<A>: aya::Pod,
{
    fn new(fd: OwnedFd, map: HashMap<MapData, FlowKey<A>, Flow<A>>) -> Self {
        let (batches, backends) = (Batches::new(BATCH), BTreeMap::new());
        let seen =
            Seen { live: 0, backends: BTreeMap::new(), for_clients: 0, counted: Numbers::new() };
        let counted = None;
        Self { fd, map, batches, live: 0, backends, for_clients: 0, rounds: 0, counted, seen }
    }

    fn backends(&self) -> impl Iterator<Item = (SocketAddr, u64)>
    where
        IpAddr: From<A>,
    {
        self.backends.iter().map(|((address, port), n)| {
            (SocketAddr::new((*address).into(), u16::from_be_bytes(*port)), *n)
        })
    }

    /// The programs take an expired flow for none; this only makes room.
    fn sweep(&mut self, now: u32, control: &Control) -> io::Result<()> {
        let mut looked_at = 0;
        while looked_at < SWEEP_MAX {
            let (entries, done) = self.batches.next(self.fd.as_fd())?;
            for (key, flow) in entries {
                looked_at += 1;
                let conn = flow.conn;
                let timeout = control.timeouts[usize::from(conn.state) & (TIMEOUTS - 1)];
                if now.wrapping_sub(conn.seen) as i32 > timeout as i32 {
                    // Gone already is as good.
                    let _ = self.map.remove(&key);
                    continue;
                }
                if conn.flags & flag::OUTER != 0 {
                    let to = (flow.translation.dst, flow.translation.dport);
                    *self.seen.backends.entry(to).or_default() += 1;
                    self.seen.for_clients += u64::from(conn.flags & flag::EGRESS == 0);
                }
                if conn.flags & (flag::TRANSLATED | flag::OUTER) != flag::TRANSLATED {
                    self.seen.live += 1;
                    if conn.flags & flag::COUNTED != 0 {
                        *self.seen.counted.entry(number_of(&key, &flow)).or_default() += 1;
                    }
                }
            }
            if done {
                let Seen { live, backends, for_clients, counted } = std::mem::take(&mut self.seen);
                (self.live, self.backends, self.for_clients) = (live, backends, for_clients);
                self.counted = Some(counted);
                self.rounds += 1;
                break;
            }
        }
        Ok(())
    }
}

/// The kernel's jiffies counter, as seen from here.
struct Clock {
    hz: u32,
    start: Instant,
    at_start: u64,
}

impl Clock {
    /// Reads the counter twice: no file tells HZ.
    fn learn(ebpf: &Ebpf, results: &Mapped<u32>) -> Result<Self, KernelError> {
        const HZ: [u32; 4] = [100, 250, 300, 1000];
        const SPAN: Duration = Duration::from_millis(100);
        let (first, start) = (load::jiffies(ebpf, results)?, Instant::now());
        #[expect(clippy::disallowed_methods, reason = "set-up, on the data path's own thread")]
        std::thread::sleep(SPAN);
        let (second, took) = (load::jiffies(ebpf, results)?, start.elapsed());
        let seen = f64::from(second.wrapping_sub(first) as u32) / took.as_secs_f64();
        let distance = |hz: &u32| (f64::from(*hz) / seen).ln().abs();
        let nearest = HZ.into_iter().min_by(|a, b| distance(a).total_cmp(&distance(b)));
        Ok(Self { hz: nearest.unwrap_or(HZ[1]), start, at_start: first })
    }

    fn now(&self) -> u64 {
        self.at_start + (self.start.elapsed().as_secs_f64() * f64::from(self.hz)) as u64
    }
}

/// By policy and rule.
type ByRule<T> = BTreeMap<(Name, Name), T>;

/// Counts of retired halves, and when each rule was hit; a missing or damaged file only makes counters start anew.
fn read_retired(path: &Path) -> (ByRule<Count>, ByRule<hits::Seen>) {
    let (mut counts, mut seen) = (ByRule::new(), ByRule::new());
    let Ok(bytes) = fs::read(path) else { return (counts, seen) };
    let Ok(report) = pb::StatusReport::decode(bytes.as_slice()) else {
        tracing::warn!(path = %path.display(), "damaged rule counters; they start anew");
        return (counts, seen);
    };
    for policy in report.policies {
        for rule in policy.rules {
            if let (Ok(policy), Ok(name)) = (Name::new(&policy.policy), Name::new(rule.rule)) {
                let count = Count { packets: rule.packets, bytes: rule.bytes };
                let last = rule.last_hit_time.and_then(|time| SystemTime::try_from(time).ok());
                seen.insert(
                    (policy.clone(), name.clone()),
                    hits::Seen { packets: rule.packets, last },
                );
                counts.insert((policy, name), count);
            }
        }
    }
    (counts, seen)
}

fn write_retired<'a>(
    path: &Path,
    counts: &ByRule<Count>,
    seen: impl Iterator<Item = (&'a (Name, Name), hits::Seen)>,
) {
    let last: BTreeMap<_, _> = seen.filter_map(|(name, seen)| Some((name, seen.last?))).collect();
    let mut policies: BTreeMap<&Name, Vec<RuleCounter>> = BTreeMap::new();
    for (name, count) in counts {
        let (policy, rule) = name;
        policies.entry(policy).or_default().push(RuleCounter {
            rule: rule.to_string(),
            packets: count.packets,
            bytes: count.bytes,
            last_hit_time: last.get(name).copied().map(Into::into),
        });
    }
    let policies = policies
        .into_iter()
        .map(|(policy, rules)| pb::PolicyCounters { policy: policy.to_string(), rules })
        .collect();
    let report = pb::StatusReport { policies, ..Default::default() };
    let new = path.with_extension("new");
    let written = fs::write(&new, report.encode_to_vec()).and_then(|()| fs::rename(&new, path));
    if let Err(error) = written {
        tracing::warn!(path = %path.display(), %error, "failed to keep rule counters");
    }
}
