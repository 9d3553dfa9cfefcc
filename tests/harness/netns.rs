//! Network namespaces that are gone when their value is.
//!
//! Everything a run leaves on the host carries the id of its process (`cnsmo-<pid>-<n>-<label>`), so that several
//! runs share one host and [`sweep`] finds what a killed one left behind.

use std::{
    fs::{self, File},
    io,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{self, Command},
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use anyhow::{Context as _, ensure};
use nix::{
    sched::{CloneFlags, setns},
    sys::{
        prctl::set_pdeathsig,
        signal::{Signal, kill},
    },
    unistd::Pid,
};

/// Where the kernel's BPF file system is mounted: pins of a run are in folders with its unique names.
pub const BPFFS: &str = "/sys/fs/bpf";

const NAMESPACES: &str = "/run/netns";
const PREFIX: &str = "cnsmo-";

/// A network namespace. Dropping it ends the processes in it, those that left their parents too, and removes it with its
/// devices.
#[derive(Debug)]
pub struct Netns {
    name: String,
    handle: File,
}

impl Netns {
    /// Makes a namespace with its loopback up. Needs root and iproute2.
    pub fn new(label: &str) -> anyhow::Result<Self> {
        let name = unique(label);
        run(Command::new("ip").args(["netns", "add", &name]))?;
        let path = Path::new(NAMESPACES).join(&name);
        let opened = File::open(&path).with_context(|| format!("opening {}", path.display()));
        let handle = match opened {
            Ok(handle) => handle,
            Err(error) => {
                remove(&name);
                return Err(error);
            }
        };
        let netns = Self { name, handle };
        // Before any device is there: they inherit it, so that addresses are usable at once.
        netns.sysctl("net/ipv6/conf/default/accept_dad", "0")?;
        netns.sysctl("net/ipv6/conf/default/accept_ra", "0")?;
        netns.ip(&["link", "set", "lo", "up"])?;
        Ok(netns)
    }

    /// Name below `/run/netns`, for `ip -n` and `nsenter --net=`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The processes that are inside, whoever started them.
    pub fn processes(&self) -> anyhow::Result<Vec<Pid>> {
        processes(&self.name)
    }

    /// Runs iproute2's `ip` on this namespace.
    pub fn ip(&self, args: &[&str]) -> anyhow::Result<()> {
        run(Command::new("ip").args(["-n", &self.name]).args(args))
    }

    /// Writes a sysctl, named by its path below `/proc/sys`.
    pub fn sysctl(&self, key: &str, value: &str) -> anyhow::Result<()> {
        self.run(|| fs::write(Path::new("/proc/sys").join(key), value))?
            .with_context(|| format!("setting {key} in {}", self.name))
    }

    /// Joins two namespaces by a pair of devices, `(namespace, device)` each. Names are at most 15 bytes, and have
    /// meaning inside their namespace only.
    pub fn veth(a: (&Self, &str), b: (&Self, &str)) -> anyhow::Result<()> {
        let (left, right) = (&a.0.name, &b.0.name);
        run(Command::new("ip").args([
            "link", "add", a.1, "netns", left, "type", "veth", "peer", "name", b.1, "netns", right,
        ]))?;
        a.0.ip(&["link", "set", a.1, "up"])?;
        b.0.ip(&["link", "set", b.1, "up"])
    }

    /// A command that will run inside. It dies with the thread that starts it, and Ctrl-C at the terminal does not
    /// reach it. The mount namespace stays: pins in `/sys/fs/bpf` are visible, which `ip netns exec` would hide.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> anyhow::Result<Command> {
        let handle = self.handle.try_clone()?;
        let mut command = Command::new(program);
        command.process_group(0);
        // SAFETY: between fork and exec only two system calls are made; neither allocates nor takes a lock.
        unsafe {
            command.pre_exec(move || {
                set_pdeathsig(Signal::SIGKILL)?;
                setns(&handle, CloneFlags::CLONE_NEWNET)?;
                Ok(())
            });
        }
        Ok(command)
    }

    /// Runs `work` in a thread inside and returns what it returns; sockets it opens stay inside.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| -> anyhow::Result<T> {
                self.enter()?;
                Ok(work())
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// As [`Netns::run`], without waiting for the thread to end.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> anyhow::Result<thread::JoinHandle<T>> {
        let (entered, wait) = std::sync::mpsc::channel();
        let handle = self.handle.try_clone()?;
        let thread = thread::spawn(move || {
            let result = setns(handle, CloneFlags::CLONE_NEWNET);
            let failed = result.is_err();
            // The receiver is below, waiting.
            let _ = entered.send(result);
            assert!(!failed, "the thread is outside of its namespace");
            work()
        });
        wait.recv()?.with_context(|| format!("entering {}", self.name))?;
        Ok(thread)
    }

    fn enter(&self) -> anyhow::Result<()> {
        setns(&self.handle, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("entering {}", self.name))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// A name for something on this host that no other run has and [`sweep`] recognises.
pub fn unique(label: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{PREFIX}{}-{}-{label}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A folder under the system's temporary one with a [`unique`] name. Dropping it removes it.
#[derive(Debug)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// Makes the folder, readable by its owner only: it will hold tokens and keys.
    pub fn new(label: &str) -> anyhow::Result<Self> {
        use std::os::unix::fs::DirBuilderExt as _;
        let path = std::env::temp_dir().join(unique(label));
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("making {}", path.display()))?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A folder for pins in the BPF file system, which must be mounted. Dropping it removes the pins, which detaches
/// what only they held.
#[derive(Debug)]
pub struct PinDir(PathBuf);

impl PinDir {
    /// Chooses the folder's name; whoever pins makes it.
    pub fn new(label: &str) -> Self {
        Self(Path::new(BPFFS).join(unique(label)))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for PinDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Removes the namespaces, folders and pins of runs whose process is gone. Returns how many things it removed.
pub fn sweep() -> usize {
    let mut swept = 0;
    for name in left_in(Path::new(NAMESPACES)) {
        remove(&name);
        swept += 1;
    }
    for folder in [Path::new(BPFFS), &std::env::temp_dir()] {
        for name in left_in(folder) {
            swept += usize::from(fs::remove_dir_all(folder.join(name)).is_ok());
        }
    }
    swept
}

fn left_in(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| maker(name).is_some_and(is_gone)).collect()
}

/// The process id in a name that [`unique`] made.
fn maker(name: &str) -> Option<u32> {
    let (pid, rest) = name.strip_prefix(PREFIX)?.split_once('-')?;
    rest.starts_with(|c: char| c.is_ascii_digit()).then_some(())?;
    pid.parse().ok()
}

fn is_gone(pid: u32) -> bool {
    !Path::new("/proc").join(pid.to_string()).exists()
}

fn processes(name: &str) -> anyhow::Result<Vec<Pid>> {
    let pids = read(Command::new("ip").args(["netns", "pids", name]))?;
    pids.lines().map(|pid| Ok(Pid::from_raw(pid.trim().parse()?))).collect()
}

fn remove(name: &str) {
    // Also called while unwinding; what stays is swept by the next run.
    for pid in processes(name).unwrap_or_default() {
        if pid != Pid::this() {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
    let _ = Command::new("ip").args(["netns", "del", name]).output();
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    read(command).map(drop)
}

fn read(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => anyhow::anyhow!("`ip` is missing: apt-get install iproute2"),
        _ => error.into(),
    })?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}", said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
