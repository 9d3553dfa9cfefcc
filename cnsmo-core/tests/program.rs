//! The program itself: how it starts, how it dies, and what survives.

use std::{
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cnsmo_proto::pb::resource::Kind;
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::harness::{Admin, OWN_COMMITS, PATIENCE, policy};

/// Killed when dropped, so that a failed test leaves nothing behind.
pub(crate) struct Program {
    child: Child,
    /// Where TLS is served.
    address: SocketAddr,
}

impl Program {
    pub(crate) fn command(folder: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cnsmo-core"));
        command
            .args(["--listen", "127.0.0.1:0", "--state-dir"])
            .arg(folder.join("state"))
            .arg("--socket")
            .arg(folder.join("core.sock"))
            .env_remove("CNSMO_LOG")
            .stderr(Stdio::piped());
        command
    }

    /// Returns when it says that it is ready.
    pub(crate) fn start(folder: &Path) -> Self {
        Self::start_with(&mut Self::command(folder))
    }

    /// As [`Self::start`], with more arguments.
    pub(crate) fn start_with(command: &mut Command) -> Self {
        let mut child = command.spawn().unwrap();
        let log = child.stderr.take().unwrap();
        let unspecified = SocketAddr::from(([0, 0, 0, 0], 0));
        let mut program = Self { child, address: unspecified };
        let mut lines = BufReader::new(log).lines();
        let ready = lines.by_ref().map_while(Result::ok).find(|line| line.contains("ready"));
        let ready = ready.expect("it ended before it was ready");
        let address = ready.split_once("listen=").unwrap().1.split_whitespace().next();
        program.address = address.unwrap().parse().unwrap();
        // A full pipe would stop it.
        std::thread::spawn(move || lines.for_each(drop));
        program
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.child.id().try_into().unwrap())
    }

    pub(crate) fn signal(&self, signal: Signal) {
        nix::sys::signal::kill(self.pid(), signal).unwrap();
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_acknowledged_write_is_lost_when_the_core_is_killed() {
    let folder = TempDir::new().unwrap();
    let (mut last_revision, mut starts) = (0, 0);
    let mut acknowledged = Vec::new();
    for round in 0..5_u64 {
        let program = Program::start(folder.path());
        let stop = Arc::new(AtomicBool::new(false));
        let mut writers = tokio::task::JoinSet::new();
        for writer in 0..4 {
            let mut admin = Admin::connect(&folder.path().join("core.sock")).await;
            let stop = stop.clone();
            writers.spawn(async move {
                let mut done = Vec::new();
                for n in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let name = format!("r{round}-w{writer}-{n}");
                    match admin.apply(vec![policy(&name, "", 1)]).await {
                        Ok(answer) => done.push((name, answer.revision)),
                        Err(_) => break,
                    }
                }
                done
            });
        }
        tokio::time::sleep(Duration::from_millis(50 + 37 * round)).await;
        drop(program);
        stop.store(true, Ordering::Relaxed);
        while let Some(done) = writers.join_next().await {
            acknowledged.extend(done.unwrap());
        }

        let program = Program::start(folder.path());
        let mut admin = Admin::connect(&folder.path().join("core.sock")).await;
        for (name, revision) in &acknowledged {
            let found = admin.policy(name).await.unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(found.metadata.unwrap().revision, *revision, "{name}");
        }
        // Every revision belongs to a policy that is there, or to a service of the core: there are no gaps.
        let count = i64::try_from(admin.names(Kind::FirewallPolicy).await.len()).unwrap();
        let marker = format!("marker-{round}");
        let revision = admin.apply(vec![policy(&marker, "", 1)]).await.unwrap().revision;
        starts += 2;
        assert_eq!(revision, starts * OWN_COMMITS + count + 1);
        assert!(revision > last_revision);
        last_revision = revision;
        drop(program);
    }
    assert!(!acknowledged.is_empty(), "the kills came before any write");
}

#[test]
fn what_keeps_it_from_starting_is_said_once_with_exit_code_1() {
    let folder = TempDir::new().unwrap();
    let program = Program::start(folder.path());
    let listening = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listening.local_addr().unwrap().to_string();
    let other = TempDir::new().unwrap();
    let file = other.path().join("file");
    std::fs::write(&file, "").unwrap();
    let below_file = file.join("state");
    let cases: [(&Path, &[&str], &str); 4] = [
        (folder.path(), &[], "another core runs with this state folder"),
        (other.path(), &["--listen", &taken], "cannot listen on"),
        (
            other.path(),
            &["--state-dir", below_file.to_str().unwrap()],
            "cannot make the state folder",
        ),
        (other.path(), &["--lease", "1s"], "must be longer than --heartbeat"),
    ];
    for (folder, arguments, text) in cases {
        // Given twice, the later one counts.
        let output = Program::command(folder)
            .args(["--log-format", "json"])
            .args(arguments)
            .output()
            .unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{log}");
        let errors: Vec<_> = log.lines().filter(|line| line.contains("\"ERROR\"")).collect();
        assert_eq!(errors.len(), 1, "{log}");
        assert!(errors[0].contains(text), "{log}");
    }
    drop(program);
}

#[tokio::test]
async fn a_signal_ends_it_cleanly() {
    let folder = TempDir::new().unwrap();
    let mut program = Program::start(folder.path());
    let socket = folder.path().join("core.sock");
    Admin::connect(&socket).await.apply(vec![policy("p", "", 1)]).await.unwrap();
    program.signal(Signal::SIGTERM);
    let wait = async {
        loop {
            if let Some(status) = program.child.try_wait().unwrap() {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, wait).await.unwrap().success());
    assert!(!socket.exists());
    // Folded into the file: nothing is left beside it.
    assert!(!folder.path().join("state/state.db-wal").exists());
}
