//! The control group of an instance (cgroups version 2; Linux, Documentation/admin-guide/cgroup-v2.rst).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use cnsmo_proto::model::Limits;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

/// Of cpu.max, microseconds; the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;

/// A group by its folder, which need not be there.
#[derive(Clone, Debug)]
pub(super) struct Group(PathBuf);

impl Group {
    pub(super) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// Makes it, with these limits. What is told are the limits that are not in force, and why.
    pub(super) fn limit(&self, limits: &Limits) -> Option<String> {
        let wanted = wanted(limits);
        if let Err(error) = self.make() {
            let names = wanted.iter().filter(|(.., set)| *set).map(|(name, ..)| *name);
            let names = names.collect::<Vec<_>>().join(", ");
            let why = format!("limits: there is no control group: {error}; not in force: {names}");
            return (!names.is_empty()).then_some(why);
        }
        let mut missing = Vec::new();
        for (name, file, value, is_set) in wanted {
            if let Err(error) = fs::write(self.0.join(file), value)
                && is_set
            {
                missing.push(format!("{name} ({file}: {error})"));
            }
        }
        let why = format!("limits: not in force for the whole group: {}", missing.join(", "));
        (!missing.is_empty()).then_some(why)
    }

    /// Whoever writes 0 there joins it. None: there is no such group.
    pub(super) fn door(&self) -> Option<fs::File> {
        fs::File::options().write(true).open(self.0.join("cgroup.procs")).ok()
    }

    /// Whether a process is in it.
    pub(super) fn holds(&self, pid: i32) -> bool {
        let all = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        all.lines().any(|one| one.parse() == Ok(pid))
    }

    /// Ends all that is in it. Before Linux 5.14 this does nothing.
    pub(super) fn kill(&self) {
        if let Err(error) = fs::write(self.0.join("cgroup.kill"), "1") {
            tracing::debug!(group = %self.0.display(), %error, "not ended as a group");
        }
    }

    /// Removes it, once it is empty.
    pub(super) fn remove(&self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            tracing::debug!(group = %self.0.display(), %error, "not removed");
        }
    }

    fn make(&self) -> io::Result<()> {
        let root = self.0.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let mount = root.parent().ok_or(io::ErrorKind::InvalidInput)?;
        if statfs(mount)?.filesystem_type() != CGROUP2_SUPER_MAGIC {
            let text = format!("{} is not in a cgroup2 file system", root.display());
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        fs::create_dir_all(root)?;
        delegate(mount);
        delegate(root);
        fs::create_dir_all(&self.0)
    }
}

/// Gives the controllers that there are to the groups below.
fn delegate(group: &Path) {
    for controller in ["memory", "cpu", "pids"] {
        // Not there, or used by version 1: the files of the limit are then missing, which is told.
        let _ = fs::write(group.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

/// Of each limit: field, file, its content, and whether it is one.
fn wanted(limits: &Limits) -> [(&'static str, &'static str, String, bool); 3] {
    let or_max = |value: u64| if value == 0 { "max".to_owned() } else { value.to_string() };
    let cpu = u64::from(limits.cpu_millis);
    let quota = or_max(cpu * CPU_PERIOD_US / 1000);
    let processes = u64::from(limits.processes);
    [
        ("memory", "memory.max", or_max(limits.memory), limits.memory != 0),
        ("cpuMillis", "cpu.max", format!("{quota} {CPU_PERIOD_US}"), cpu != 0),
        ("processes", "pids.max", or_max(processes), processes != 0),
    ]
}
