//! Loading the object over pinned maps.

use std::{
    fs,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader, TestRunOptions,
    maps::{HashMap, Map, MapData, PerCpuArray, RingBuf},
    programs::{Program, ProgramError, SchedClassifier, TestRun as _},
};
use cnsmo_common::{
    ABI_VERSION,
    balance::{BALANCERS_MAX, RINGS_LEN},
    control::{LIMITS_MAX, Live, LiveParts, SLOT_FIRST},
    probe::TRACE_LEN,
};

use super::{
    Balancers, Clock, Flows, GracePeriod, Halves, Kernel, KernelError, Mapped, OBJECT, Options,
    log::{ProgramLog, RING_BYTES},
    open::OpenFlows,
    sys::{create_large_array, open_pinned, pin},
};

/// Maps that are pinned: everything a packet's fate depends on.
const PINNED: [&str; 19] = [
    "CONTROL",
    "BLOB_V4",
    "BLOB_V6",
    "RULES",
    "LIMITS",
    "BUCKETS",
    "OPEN_FLOWS",
    "RULE_COUNTS",
    "STAT_COUNTS",
    "ESTABLISHED_V4",
    "ESTABLISHED_V6",
    "HALF_OPEN_V4",
    "HALF_OPEN_V6",
    "FRAGMENTS",
    "SERVICES",
    "BALANCERS",
    "RINGS",
    "BACKENDS",
    "TURNS",
];

pub(super) struct Loaded {
    pub(super) ebpf: Ebpf,
    /// No pinned maps were found.
    pub(super) fresh: bool,
    maps: PathBuf,
}

/// Words of one half of one blob.
pub(super) fn half_words(options: &Options) -> usize {
    const WORDS_MIN: usize = 512;
    (options.policy_bytes / 8).max(WORDS_MIN).next_power_of_two()
}

/// Creates or reuses the maps, and loads what no hook runs. The verifier takes about half a second per program: the
/// others are loaded when a hook needs them.
pub(super) fn load(options: &Options) -> Result<Loaded, KernelError> {
    ensure_bpffs(&options.pins)?;
    // Maps of another layout or size are left alone: the programs in place use them until they are replaced.
    let words = half_words(options);
    let (flows, rules) = (options.flows, options.rules_max);
    let maps = options.pins.join(format!("maps-{ABI_VERSION}-{flows}-{rules}-{words}"));
    let fresh = !maps.join("CONTROL").exists();
    fs::create_dir_all(&maps).map_err(KernelError::file(&maps))?;
    for (name, bytes) in
        [("BLOB_V4", words * 2 * 8), ("BLOB_V6", words * 2 * 8), ("RINGS", RINGS_LEN * 2)]
    {
        // aya cannot give a value its size; it takes a pinned map as it is.
        let path = maps.join(name);
        if !path.exists() {
            let bytes =
                u32::try_from(bytes).map_err(KernelError::kernel("size the policy memory"))?;
            let map =
                create_large_array(bytes).map_err(KernelError::kernel("create the policy map"))?;
            pin(map.as_fd(), &path).map_err(KernelError::file(&path))?;
        }
    }
    let (words, slots) = (words as u32, rules * 2 + SLOT_FIRST);
    let mut loader = EbpfLoader::new();
    loader
        .override_global("HALF_WORDS", &words, true)
        .override_global("RULES_MAX", &options.rules_max, true)
        .map_max_entries("RULES", options.rules_max * 2)
        .map_max_entries("RULE_COUNTS", slots)
        .map_max_entries("AYA_LOGS", RING_BYTES);
    for name in ["ESTABLISHED_V4", "ESTABLISHED_V6", "HALF_OPEN_V4", "HALF_OPEN_V6"] {
        loader.map_max_entries(name, options.flows);
    }
    for name in PINNED {
        loader.map_pin_path(name, maps.join(name));
    }
    let mut ebpf = loader.load(OBJECT).map_err(KernelError::kernel("create the maps"))?;
    for name in ["clock", "probe"] {
        ensure_loaded(&mut ebpf, name)?;
    }
    Ok(Loaded { ebpf, fresh, maps })
}

/// Has the program verified, once.
pub(super) fn ensure_loaded(ebpf: &mut Ebpf, name: &str) -> Result<(), KernelError> {
    let program = ebpf.program_mut(name);
    let program =
        program.ok_or_else(|| KernelError::Refused(format!("the object has no program {name}")))?;
    let loaded = match program {
        Program::Xdp(program) if program.fd().is_err() => program.load(),
        Program::SchedClassifier(program) if program.fd().is_err() => program.load(),
        _ => Ok(()),
    };
    loaded.map_err(|error| refused_by_verifier(name, &error))
}

/// The last lines of the verifier's log say what it missed.
fn refused_by_verifier(program: &str, error: &ProgramError) -> KernelError {
    const SHOWN: usize = 12;
    let ProgramError::LoadError { io_error, verifier_log } = error else {
        return KernelError::Refused(format!("failed to load program {program}: {error}"));
    };
    let log = verifier_log.to_string();
    let lines: Vec<&str> = log.lines().collect();
    let tail = lines[lines.len().saturating_sub(SHOWN)..].join("\n");
    KernelError::Refused(format!("this kernel refuses program {program}: {io_error}\n{tail}"))
}

impl Loaded {
    pub(super) fn into_kernel(mut self, options: Options) -> Result<Kernel, KernelError> {
        let words = half_words(&options);
        let rules = options.rules_max as usize * 2;
        let control = Mapped::new(self.pinned("CONTROL")?.as_fd(), 1)
            .map_err(KernelError::kernel("map CONTROL"))?;
        let live = LiveParts::unpack(Live(read_control(&control).live));
        let results = self.map_own("RESULTS", TRACE_LEN as usize)?;
        let clock = Clock::learn(&self.ebpf, &results)?;
        let explanation = self.map_own("EXPLANATION", 1)?;
        let reports_left = self.map_own("REPORTS_LEFT", 1)?;
        let log = ProgramLog::open(&mut self.ebpf, reports_left)?;
        Ok(Kernel {
            blobs: [self.map_pinned("BLOB_V4", words * 2)?, self.map_pinned("BLOB_V6", words * 2)?],
            rules: self.map_pinned("RULES", rules)?,
            limits: self.map_pinned("LIMITS", 2 * LIMITS_MAX as usize)?,
            trace: self.map_own("TRACE", TRACE_LEN as usize)?,
            position: self.map_own("POSITION", 2)?,
            rule_counts: self.per_cpu("RULE_COUNTS")?,
            rule_counts_fd: self.pinned("RULE_COUNTS")?,
            stat_counts: self.per_cpu("STAT_COUNTS")?,
            flows_v4: self.flows("ESTABLISHED_V4")?,
            flows_v6: self.flows("ESTABLISHED_V6")?,
            open_flows: self.open_flows()?,
            balancers: self.balancers()?,
            grace: GracePeriod::new().map_err(KernelError::kernel("create a map of maps"))?,
            ebpf: self.ebpf,
            log,
            tell_full_beyond: 0,
            control,
            results,
            explanation,
            clock,
            live,
            live_since: std::time::Instant::now(),
            names: Vec::new(),
            rules_in_force: Vec::new(),
            halves: Halves::default(),
            records: None,
            retired: std::collections::BTreeMap::new(),
            hits: super::hits::Hits::default(),
            attachments: Vec::new(),
            devices: Vec::new(),
            tunnel: None,
            gateway: false,
            kept_since: [0; 2],
            moved: false,
            plan: None,
            options,
        })
    }

    fn pinned(&self, name: &str) -> Result<OwnedFd, KernelError> {
        let path = self.maps.join(name);
        open_pinned(&path).map_err(KernelError::file(&path))
    }

    fn map_pinned<T: aya::Pod>(&self, name: &str, length: usize) -> Result<Mapped<T>, KernelError> {
        Mapped::new(self.pinned(name)?.as_fd(), length)
            .map_err(KernelError::kernel(format!("map {name}")))
    }

    fn map_own<T: aya::Pod>(&self, name: &str, length: usize) -> Result<Mapped<T>, KernelError> {
        map_own(&self.ebpf, name, length)
    }

    fn take(&mut self, name: &str) -> Result<Map, KernelError> {
        take(&mut self.ebpf, name)
    }

    fn per_cpu<T: aya::Pod>(&mut self, name: &str) -> Result<PerCpuArray<MapData, T>, KernelError> {
        self.take(name)?.try_into().map_err(KernelError::kernel(format!("use {name}")))
    }

    fn balancers(&mut self) -> Result<Balancers, KernelError> {
        let words = self.map_pinned("BALANCERS", BALANCERS_MAX)?;
        let rings = self.map_pinned("RINGS", RINGS_LEN)?;
        let services =
            self.take("SERVICES")?.try_into().map_err(KernelError::kernel("use SERVICES"))?;
        let backends =
            self.take("BACKENDS")?.try_into().map_err(KernelError::kernel("use BACKENDS"))?;
        Balancers::new(services, words, rings, backends)
    }

    fn open_flows(&mut self) -> Result<OpenFlows, KernelError> {
        const NAME: &str = "OPEN_FLOWS";
        let fd = self.pinned(NAME)?;
        let map =
            self.take(NAME)?.try_into().map_err(KernelError::kernel(format!("use {NAME}")))?;
        Ok(OpenFlows::new(fd, map))
    }

    fn flows<A: cnsmo_ebpf::parse::Family + Ord + 'static>(
        &mut self,
        name: &str,
    ) -> Result<Flows<A>, KernelError>
    where
        cnsmo_common::flow::FlowKey<A>: aya::Pod,
        cnsmo_common::flow::Flow<A>: aya::Pod,
    {
        let fd = self.pinned(name)?;
        let map: HashMap<MapData, _, _> =
            self.take(name)?.try_into().map_err(KernelError::kernel(format!("use {name}")))?;
        Ok(Flows::new(fd, map))
    }
}

fn take(ebpf: &mut Ebpf, name: &str) -> Result<Map, KernelError> {
    let map = ebpf.take_map(name);
    map.ok_or_else(|| KernelError::Refused(format!("the object has no map {name}")))
}

/// The memory of an array that is not pinned.
pub(super) fn map_own<T: aya::Pod>(
    ebpf: &Ebpf,
    name: &str,
    length: usize,
) -> Result<Mapped<T>, KernelError> {
    let Some(Map::Array(map)) = ebpf.map(name) else {
        return Err(KernelError::Refused(format!("the object has no array {name}")));
    };
    Mapped::new(map.fd().as_fd(), length).map_err(KernelError::kernel(format!("map {name}")))
}

/// What the data path tells of single packets; to be taken once.
pub(super) fn records(ebpf: &mut Ebpf) -> Result<RingBuf<MapData>, KernelError> {
    take(ebpf, "RECORDS")?.try_into().map_err(KernelError::kernel("use RECORDS"))
}

fn read_control(control: &Mapped<super::Control>) -> super::Control {
    control.read(0, 1)[0]
}

/// The kernel's jiffies counter.
pub(super) fn jiffies(ebpf: &Ebpf, results: &Mapped<u32>) -> Result<u64, KernelError> {
    let clock = classifier(ebpf, "clock")?;
    let frame = [0; 64];
    let options = TestRunOptions { data_in: Some(&frame), ..Default::default() };
    clock.test_run(options).map_err(KernelError::kernel("run program clock"))?;
    let halves = results.read(0, 2);
    Ok(u64::from(halves[0]) | u64::from(halves[1]) << 32)
}

/// A loaded TC program by its name.
pub(super) fn classifier<'a>(
    ebpf: &'a Ebpf,
    name: &str,
) -> Result<&'a SchedClassifier, KernelError> {
    let program = ebpf
        .program(name)
        .ok_or_else(|| KernelError::Refused(format!("the object has no program {name}")))?;
    program.try_into().map_err(KernelError::kernel(format!("use program {name}")))
}

/// Mounts bpffs where it is missing.
fn ensure_bpffs(pins: &Path) -> Result<(), KernelError> {
    use nix::{
        mount::{MsFlags, mount},
        sys::statfs::{BPF_FS_MAGIC, statfs},
    };
    const MOUNT: &str = "/sys/fs/bpf";
    if !pins.starts_with(MOUNT) {
        return Err(KernelError::Refused(format!(
            "{} is not below {MOUNT}: pins must be on bpffs",
            pins.display()
        )));
    }
    let is_mounted = || statfs(MOUNT).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC);
    if !is_mounted() {
        mount(Some("bpf"), MOUNT, Some("bpf"), MsFlags::empty(), None::<&str>)
            .map_err(KernelError::kernel(format!("mount bpffs on {MOUNT}")))?;
    }
    fs::create_dir_all(pins).map_err(KernelError::file(pins))
}
