//! The agent's side of the engine: starts it, takes over one that runs, starts it again when it has died.

use std::{
    collections::BTreeMap,
    io,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, bail};
use cnsmo_proto::model::PublicKey;

use super::{
    Backend, PeerStatus,
    control::{self, Configure, ControlError, PeerConfig, PeerReport, Report, Request},
    wireguard::{Mover, Settings},
};

/// From its start to its first answer, and from the request to stop to its end.
const ANSWER_MAX: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(10);

/// See the module.
#[derive(Debug)]
pub(super) struct Process {
    state_dir: PathBuf,
    program: PathBuf,
    /// `None`: not started by us, or gone.
    child: Option<Child>,
    /// What the running engine was told last.
    applied: Option<Settings>,
    /// What it shall be told if it has to be started again.
    wanted: Option<Settings>,
}

impl Process {
    pub(super) fn new(state_dir: PathBuf, program: PathBuf) -> Self {
        Self { state_dir, program, child: None, applied: None, wanted: None }
    }

    fn ask(&self, request: Request) -> Result<Report, ControlError> {
        control::ask(&self.state_dir, request)
    }

    /// An engine that answers and is of our build, whoever started it.
    fn ensure(&mut self) -> anyhow::Result<()> {
        if let Some(child) = &mut self.child
            && let Some(status) = child.try_wait()?
        {
            tracing::warn!(%status, "the engine has ended");
            self.child = None;
        }
        match self.ask(Request::Report(())) {
            Ok(report) if report.build == control::build_of(&self.program)? => Ok(()),
            Ok(_) => {
                tracing::info!("replacing the engine of another build");
                self.end()?;
                self.start()
            }
            Err(ControlError::Unreachable(e)) if is_absent(&e) => self.start(),
            Err(e) => {
                // One of ours that is stuck is replaced; another's is not ours to kill.
                match self.child.take() {
                    Some(mut child) => {
                        tracing::warn!(error = %e, "the engine does not answer, replacing it");
                        child.kill()?;
                        child.wait()?;
                        self.start()
                    }
                    None => Err(e.into()),
                }
            }
        }
    }

    /// The engine gets a session of its own, so that what ends the agent does not end it.
    fn start(&mut self) -> anyhow::Result<()> {
        self.applied = None;
        let mut command = Command::new(&self.program);
        command.arg0("cnsmo-agent").arg("tunnel").arg("--state-dir").arg(&self.state_dir);
        command.stdin(Stdio::null()).stdout(Stdio::null()).current_dir("/");
        // SAFETY: one system call between fork and exec, which neither allocates nor takes a lock.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                Ok(())
            });
        }
        let mut child =
            command.spawn().with_context(|| format!("cannot start {}", self.program.display()))?;
        let end = Instant::now() + ANSWER_MAX;
        loop {
            if self.ask(Request::Report(())).is_ok() {
                tracing::info!(pid = child.id(), "the engine runs");
                self.child = Some(child);
                return Ok(());
            }
            if let Some(status) = child.try_wait()? {
                bail!("the engine ended with {status}; its log says why");
            }
            if Instant::now() > end {
                child.kill()?;
                child.wait()?;
                bail!("the engine does not answer after {ANSWER_MAX:?}");
            }
            pause(POLL);
        }
    }

    fn end(&mut self) -> anyhow::Result<()> {
        self.applied = None;
        match self.ask(Request::Stop(())) {
            Ok(_) => {}
            Err(ControlError::Unreachable(e)) if is_absent(&e) => {}
            Err(e) => return Err(e.into()),
        }
        let end = Instant::now() + ANSWER_MAX;
        loop {
            let ended = match &mut self.child {
                Some(child) => child.try_wait()?.is_some(),
                None => {
                    let answer = self.ask(Request::Report(()));
                    matches!(answer, Err(ControlError::Unreachable(e)) if is_absent(&e))
                }
            };
            if ended {
                self.child = None;
                return Ok(());
            }
            if Instant::now() > end {
                bail!("the engine has not ended after {ANSWER_MAX:?}");
            }
            pause(POLL);
        }
    }
}

impl Mover for Process {
    fn backend(&self) -> Backend {
        Backend::Engine
    }

    fn set(&mut self, wanted: &Settings) -> anyhow::Result<()> {
        self.wanted = Some(wanted.clone());
        self.ensure()?;
        if self.applied.as_ref() != Some(wanted) {
            self.ask(Request::Configure(Configure::from(wanted)))?;
            self.applied = Some(wanted.clone());
        }
        Ok(())
    }

    fn peers(&mut self) -> anyhow::Result<BTreeMap<PublicKey, PeerStatus>> {
        let report = self.ask(Request::Report(()))?;
        let peer = |peer: PeerReport| -> anyhow::Result<_> {
            let key = PublicKey::try_from(&*peer.public_key)?;
            let status = PeerStatus {
                endpoint: peer.endpoint.parse().ok(),
                last_handshake: peer.last_handshake.map(SystemTime::try_from).transpose()?,
                received_bytes: peer.received_bytes,
                sent_bytes: peer.sent_bytes,
            };
            Ok((key, status))
        };
        report.peers.into_iter().map(peer).collect()
    }

    fn revive(&mut self) -> anyhow::Result<()> {
        match self.wanted.clone() {
            Some(wanted) => self.set(&wanted),
            None => Ok(()),
        }
    }

    fn stop(&mut self) -> anyhow::Result<()> {
        self.wanted = None;
        self.end()
    }
}

impl From<&Settings> for Configure {
    fn from(settings: &Settings) -> Self {
        let peers = settings.peers.iter().map(|(key, peer)| PeerConfig {
            public_key: key.0.to_vec(),
            allowed_ips: peer.allowed.iter().map(ToString::to_string).collect(),
            endpoint: peer.endpoint.map(|e| e.to_string()).unwrap_or_default(),
        });
        Self {
            listen_port: settings.listen_port.into(),
            mtu: settings.mtu.into(),
            peers: peers.collect(),
        }
    }
}

/// No socket, or nobody behind it.
fn is_absent(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof};
    matches!(error.kind(), ConnectionRefused | ConnectionReset | NotFound | UnexpectedEof)
}

#[expect(clippy::disallowed_methods, reason = "the tunnel is used off the runtime's threads")]
fn pause(time: Duration) {
    thread::sleep(time);
}
