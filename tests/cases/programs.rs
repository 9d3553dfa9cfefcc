//! The programs themselves: a core on loopback and what calls it.

use std::{
    future::Future,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cnsmo_service::channel;
use cnsmo_tests::{Netns, PinDir, Process, RunDir};
use serde_json::Value;
use tonic::transport::Channel;

/// How long something that must come may take on a busy host.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at something that must come.
pub(super) const POLL: Duration = Duration::from_millis(20);

/// One of our programs, beside this one.
pub(super) fn program(name: &str) -> PathBuf {
    let here = std::env::current_exe().unwrap();
    let path = here.parent().unwrap().parent().unwrap().join(name);
    assert!(path.exists(), "{} is missing: cargo xtask test makes it", path.display());
    path
}

/// The Python with the packages of the example, where `cargo xtask test` makes it.
pub(super) fn python() -> PathBuf {
    let path = program("cnsmo-core").parent().unwrap().parent().unwrap().join("python/bin/python");
    assert!(path.exists(), "{} is missing: cargo xtask test makes it", path.display());
    path
}

/// Of this repository.
pub(super) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// A running core and its folder. Dropping it removes both.
pub(super) struct Core {
    // First: it ends before its folder.
    process: Process,
    address: SocketAddr,
    folder: RunDir,
}

impl Core {
    /// A new one that serves TLS on loopback.
    pub(super) fn start(label: &str) -> Self {
        Self::start_by(label, Command::new)
    }

    /// `command` makes the command of a program, for example in a namespace.
    pub(super) fn start_by(label: &str, command: impl FnOnce(PathBuf) -> Command) -> Self {
        let folder = RunDir::new(label).unwrap();
        let (process, address) = serve(command(program("cnsmo-core")), folder.path());
        Self { process, address, folder }
    }

    /// SIGKILL.
    pub(super) fn kill(&mut self) {
        self.process.kill().unwrap();
    }

    /// After [`Self::kill`]: another process over the same state, at the same address.
    pub(super) fn start_again(&mut self) {
        let mut command = Command::new(program("cnsmo-core"));
        command.args(["--listen", &self.address.to_string()]);
        (self.process, self.address) = serve(command, self.folder.path());
    }

    /// As [`Self::start_again`], by another command.
    pub(super) fn start_again_by(&mut self, command: impl FnOnce(PathBuf) -> Command) {
        (self.process, self.address) = serve(command(program("cnsmo-core")), self.folder.path());
    }

    pub(super) fn process_id(&self) -> u32 {
        self.process.id()
    }

    /// Its own, and whatever a test keeps.
    pub(super) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.folder().join("core.sock")
    }

    /// Where TLS is served.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// By the unix socket; connects again after a loss.
    pub(super) fn channel(&self) -> Channel {
        channel::local(&self.socket()).unwrap()
    }

    /// What `cnsmo` prints; it must succeed.
    pub(super) fn cnsmo(&self, arguments: &[&str]) -> String {
        run(Command::new(program("cnsmo")).env("CNSMO_SOCKET", self.socket()).args(arguments))
    }

    /// The same, as JSON.
    pub(super) fn cnsmo_json(&self, arguments: &[&str]) -> Value {
        json(&self.cnsmo(&[&["-o", "json"], arguments].concat()))
    }

    /// A file with a token of this role that admits this name.
    pub(super) fn token(&self, role: &str, name: &str) -> PathBuf {
        let file = self.folder().join(format!("{role}-{name}.token"));
        let path = file.to_str().unwrap();
        self.cnsmo(&["token", "create", "--role", role, "--name", name, "--output", path]);
        file
    }

    /// The agent of a VM, which guards its `eth0`; connected to this core.
    pub(super) fn agent(&self, vm: &Netns, pins: &PinDir, name: &str, more: &[&str]) -> Process {
        let mut command = vm.command(program("cnsmo-agent")).unwrap();
        command.arg("--core").arg(self.address.to_string());
        command.arg("--token-file").arg(self.token("agent", name));
        command.arg("--state-dir").arg(self.folder().join(name));
        command.arg("--bpffs").arg(pins.path()).env_remove("CNSMO_LOG");
        command.args(["--node", name, "--interface", "eth0", "--flows", "4096"]).args(more);
        let log = self.folder().join(format!("{name}.log"));
        let mut agent = Process::spawn(name, &mut command, &log).unwrap();
        agent.wait_for("connected to the core", PATIENCE).unwrap();
        agent
    }

    /// The folder of an identity that the core has just admitted.
    pub(super) fn identity(&self, role: &str, name: &str) -> PathBuf {
        let token = self.token(role, name);
        let folder = self.folder().join(format!("{role}-{name}"));
        let mut login = Command::new(program("cnsmo"));
        login.arg("--core").arg(self.address.to_string()).arg("--identity").arg(&folder);
        run(login.args(["login", "--name", name]).arg(token));
        folder
    }
}

/// Runs a command that must succeed; its standard output.
pub(super) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{text}{error}", output.status);
    text
}

pub(super) fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Waits until `look` finds something.
pub(super) async fn until<T, F>(what: &str, mut look: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    let found = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(POLL).await;
        }
    };
    in_time(what, found).await
}

/// Panics with `what` if it does not come.
pub(super) async fn in_time<T>(what: &str, coming: impl Future<Output = T>) -> T {
    let Ok(value) = tokio::time::timeout(PATIENCE, coming).await else {
        panic!("within {PATIENCE:?} there was not: {what}");
    };
    value
}

/// Numbers that differ from run to run; print the seed with what fails.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn seeded() -> (u64, Self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let seed = u64::try_from(now.as_nanos() & u128::from(u64::MAX)).unwrap() | 1;
        (seed, Self(seed))
    }

    /// Below `bound`, by xorshift64 (Marsaglia 2003).
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

fn serve(mut command: Command, folder: &Path) -> (Process, SocketAddr) {
    if !command.get_args().any(|argument| argument == "--listen") {
        command.args(["--listen", "127.0.0.1:0"]);
    }
    command.arg("--state-dir").arg(folder.join("state"));
    command.arg("--socket").arg(folder.join("core.sock"));
    command.env_remove("CNSMO_LOG");
    let mut process = Process::spawn("cnsmo-core", &mut command, &folder.join("core.log")).unwrap();
    process.wait_for(" ready ", PATIENCE).unwrap();
    let output = process.output().unwrap();
    let address = output.split_once("listen=").unwrap().1.split_whitespace().next().unwrap();
    let address = address.parse().unwrap_or_else(|error| panic!("{address}: {error}"));
    (process, address)
}
