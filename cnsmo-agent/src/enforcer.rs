//! The one owner of ledger, tunnel and data path: everything that changes what this VM enforces goes through its mailbox,
//! one message at a time.

mod confirm;
mod memory;
mod plane;
mod worker;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use cnsmo_proto::{
    model::{Instance, Name, PublicKey},
    pb::agent::{Ack, PolicyPreview, TypeState, Update},
};
use cnsmo_service::supervise::Stop;
use tokio::sync::{Mutex, mpsc, oneshot, watch};

pub use self::{memory::MemoryEnforcer, worker::Enforcer};
use crate::{
    datapath::{Datapath, Status},
    explain::{Answer, Question},
    health::{Checks, View},
    ledger::Ledger,
    live::{Impact, LiveFlows},
    parts::{Part, Parts},
    plan::BackendState,
    tunnel::{Tunnel, TunnelStatus},
};

/// Messages that wait. The session has one update and one question under way, health checks one view and each service one
/// sweep; the rest is room. A sender waits, a sweep is left out.
const MAILBOX_MAX: usize = 16;

/// The reason of a VM whose tunnel does not work.
pub const TUNNEL_DOWN: &str = "TunnelDown";

/// Takes over, or sets up, the data path of this VM. Called at the start and again after a crash of the enforcer.
pub type OpenDatapath = Arc<dyn Fn() -> anyhow::Result<Box<dyn Datapath>> + Send + Sync>;

/// Takes over, or gets ready to make, the tunnel of this VM. Called as [`OpenDatapath`], and again and again where it fails:
/// a VM without a tunnel is still guarded.
pub type OpenTunnel = Arc<dyn Fn() -> anyhow::Result<Box<dyn Tunnel>> + Send + Sync>;

/// What is in force, for heartbeats and reports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InForce {
    /// Per resource type. Empty: no set is known, and the VM is closed.
    pub types: BTreeMap<String, TypeState>,
    /// Stable word and text, if something is wrong on this VM.
    pub trouble: Option<(&'static str, String)>,
    /// Of this VM's tunnel; `None`: it has none.
    pub public_key: Option<PublicKey>,
    /// The core is not known to have outlived the last change: if it stays unknown until then, the change is undone.
    pub confirm_by: Option<Instant>,
    /// Counts changes of backends and peers, which a report should tell soon.
    pub events: u64,
}

/// What tunnel and data path do now.
#[derive(Clone, Debug, Default)]
pub struct VmStatus {
    /// Of the data path.
    pub datapath: Status,
    /// `None`: there is no tunnel.
    pub tunnel: Option<TunnelStatus>,
    /// Of this VM's tunnel.
    pub public_key: Option<PublicKey>,
    /// Backends of each balancer in force.
    pub balancers: BTreeMap<Name, Vec<BackendState>>,
}

/// Where to send messages, and what is in force. Clones reach the same enforcer.
#[derive(Clone, Debug)]
pub struct EnforcerHandle {
    mailbox: mpsc::Sender<Message>,
    in_force: watch::Receiver<InForce>,
    checks: watch::Receiver<Arc<Checks>>,
    instances: watch::Receiver<Option<Arc<Instances>>>,
    parts: Parts,
}

/// What this VM is to run, by deployment and name.
pub type Instances = BTreeMap<(Name, Name), Instance>;

/// A service runs. Dropped with it: then its part is held as it is.
#[derive(Debug)]
pub struct AtWork {
    enforcer: EnforcerHandle,
    part: Part,
}

impl Drop for AtWork {
    fn drop(&mut self) {
        self.enforcer.parts.hold(self.part);
        // If there is no room, the next message shows it.
        let _ = self.enforcer.mailbox.try_send(Message::Held);
    }
}

/// The enforcer is gone, or crashed over this message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the enforcer does not answer")]
pub struct Gone;

/// Tunnel or data path panicked: they have to be opened anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the data path crashed")]
pub struct Crashed;

#[derive(Debug)]
enum Message {
    Update { store_epoch: u64, update: Box<Update>, reply: oneshot::Sender<Ack> },
    ConfirmWithin { window: Duration, reply: oneshot::Sender<()> },
    Confirm { revision: i64, reply: oneshot::Sender<()> },
    Undo { reply: oneshot::Sender<()> },
    CoreAt { addresses: Vec<SocketAddr>, reply: oneshot::Sender<()> },
    Named { node: Name, reply: oneshot::Sender<()> },
    Health { view: View, reply: oneshot::Sender<()> },
    Status { reply: oneshot::Sender<VmStatus> },
    Explain { question: Question, reply: oneshot::Sender<Result<Answer, String>> },
    Flows { max: usize, reply: oneshot::Sender<Result<LiveFlows, String>> },
    Preview { preview: Box<PolicyPreview>, reply: oneshot::Sender<Result<Impact, String>> },
    Followed { reply: oneshot::Sender<()> },
    Held,
    Sweep { part: Part },
}

impl EnforcerHandle {
    /// Carries out an update; the answer comes when the kernel enforces it, or tells why not.
    ///
    /// # Errors
    /// See [`Gone`].
    pub async fn update(&self, store_epoch: u64, update: Update) -> Result<Ack, Gone> {
        let update = Box::new(update);
        self.ask(|reply| Message::Update { store_epoch, update, reply }).await
    }

    /// From now on each change has to be confirmed within this time; zero: none has to.
    ///
    /// # Errors
    /// See [`Gone`].
    pub async fn confirm_within(&self, window: Duration) -> Result<(), Gone> {
        self.ask(|reply| Message::ConfirmWithin { window, reply }).await
    }

    /// The core knows that this revision is in force.
    ///
    /// # Errors
    /// See [`Gone`].
    pub async fn confirm(&self, revision: i64) -> Result<(), Gone> {
        self.ask(|reply| Message::Confirm { revision, reply }).await
    }

    /// Goes back to what was in force before a change that nobody has confirmed in time, if there is one.
    ///
    /// # Errors
    /// See [`Gone`].
    pub async fn undo(&self) -> Result<(), Gone> {
        self.ask(|reply| Message::Undo { reply }).await
    }

    /// Lets this VM reach its core at these addresses whatever the policies say.
    ///
    /// # Errors
    /// See [`Gone`].
    pub async fn core_at(&self, addresses: Vec<SocketAddr>) -> Result<(), Gone> {
        self.ask(|reply| Message::CoreAt { addresses, reply }).await
    }

    /// This VM has enrolled under this name, which it keeps.
    ///
    /// # Errors
    /// See [`Gone`].
    pub async fn named(&self, node: Name) -> Result<(), Gone> {
        self.ask(|reply| Message::Named { node, reply }).await
    }

    /// Steers new flows by what the health checks say now.
    ///
    /// # Errors
    /// See [`Gone`].
    pub async fn health(&self, view: View) -> Result<(), Gone> {
        self.ask(|reply| Message::Health { view, reply }).await
    }

    /// What tunnel and data path do now.
    ///
    /// # Errors
    /// See [`Gone`].
    pub async fn status(&self) -> Result<VmStatus, Gone> {
        self.ask(|reply| Message::Status { reply }).await
    }

    /// What the data path would do with a packet, or why it cannot tell.
    ///
    /// # Errors
    /// See [`Gone`].
    pub async fn explain(&self, question: Question) -> Result<Result<Answer, String>, Gone> {
        self.ask(|reply| Message::Explain { question, reply }).await
    }

    /// At most `max` of the flows there are, or why they cannot be read.
    ///
    /// # Errors
    /// See [`Gone`].
    pub async fn flows(&self, max: usize) -> Result<Result<LiveFlows, String>, Gone> {
        self.ask(|reply| Message::Flows { max, reply }).await
    }

    /// What other policies would do to the flows there are, or why that cannot be told.
    ///
    /// # Errors
    /// See [`Gone`].
    pub async fn preview(&self, preview: PolicyPreview) -> Result<Result<Impact, String>, Gone> {
        let preview = Box::new(preview);
        self.ask(|reply| Message::Preview { preview, reply }).await
    }

    /// A service runs from now on: returns when its part is what the core has sent last.
    ///
    /// # Errors
    /// See [`Gone`].
    pub async fn begin(&self, part: Part) -> Result<AtWork, Gone> {
        self.parts.follow(part);
        let at_work = AtWork { enforcer: self.clone(), part };
        self.ask(|reply| Message::Followed { reply }).await?;
        Ok(at_work)
    }

    /// Has done what a part needs from time to time, as removing expired flows or tending the tunnel, unless the enforcer is
    /// busy.
    pub fn sweep(&self, part: Part) {
        // It can wait: the data path itself ignores expired flows.
        let _ = self.mailbox.try_send(Message::Sweep { part });
    }

    /// What this VM is to run, now and after each change; none: it is not known, and whatever runs goes on.
    pub fn instances(&self) -> watch::Receiver<Option<Arc<Instances>>> {
        self.instances.clone()
    }

    /// What is in force now and after each change.
    pub fn in_force(&self) -> watch::Receiver<InForce> {
        self.in_force.clone()
    }

    /// What is to be checked now and after each change; also whenever an enforcer has started, which then knows no view.
    pub fn checks(&self) -> watch::Receiver<Arc<Checks>> {
        self.checks.clone()
    }

    async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Result<T, Gone> {
        let (reply, answer) = oneshot::channel();
        self.mailbox.send(message(reply)).await.map_err(|_| Gone)?;
        answer.await.map_err(|_| Gone)
    }
}

/// What outlives a crash of the enforcer: its mailbox, and what it needs to start again.
#[derive(Clone)]
pub struct Seat {
    datapath: OpenDatapath,
    tunnel: OpenTunnel,
    state_dir: PathBuf,
    node: Arc<OnceLock<Name>>,
    mailbox: Arc<Mutex<mpsc::Receiver<Message>>>,
    outlets: Outlets,
    parts: Parts,
    failsafe: Vec<u16>,
}

/// Where the enforcer tells what others follow.
#[derive(Clone)]
struct Outlets {
    in_force: watch::Sender<InForce>,
    checks: watch::Sender<Arc<Checks>>,
    instances: watch::Sender<Option<Arc<Instances>>>,
}

impl Seat {
    /// A seat for the one enforcer of `state_dir`, which the caller has locked, and the handle to it. `node`: the name
    /// under which this VM has enrolled; `parts`: of the services that it runs; `failsafe`: TCP ports that stay open unless a
    /// rule names them.
    pub fn new(
        datapath: OpenDatapath,
        tunnel: OpenTunnel,
        state_dir: &Path,
        node: Option<Name>,
        parts: Parts,
        failsafe: Vec<u16>,
    ) -> (Self, EnforcerHandle) {
        let (sender, mailbox) = mpsc::channel(MAILBOX_MAX);
        let (in_force, in_force_watch) = watch::channel(InForce::default());
        let (checks, checks_watch) = watch::channel(Arc::default());
        let (instances, instances_watch) = watch::channel(None);
        let seat = Self {
            datapath,
            tunnel,
            state_dir: state_dir.to_owned(),
            node: Arc::new(node.map_or_else(OnceLock::new, OnceLock::from)),
            mailbox: Arc::new(Mutex::new(mailbox)),
            outlets: Outlets { in_force, checks, instances },
            parts: parts.clone(),
            failsafe,
        };
        let (in_force, checks) = (in_force_watch, checks_watch);
        (
            seat,
            EnforcerHandle { mailbox: sender, in_force, checks, instances: instances_watch, parts },
        )
    }

    /// Opens tunnel and data path and enforces what the ledger holds. Returns the enforcer and where the core was last.
    ///
    /// # Errors
    /// The data path cannot be opened, or does not take any policy.
    pub fn start(&self) -> anyhow::Result<(Enforcer, Vec<SocketAddr>)> {
        let (ledger, loaded) = Ledger::open(&self.state_dir);
        let plane = plane::Plane::new((self.datapath)()?, self.tunnel.clone());
        Enforcer::start(plane, ledger, loaded, self)
    }

    /// Serves the mailbox until `stop`; tunnel and data path stay as they are then.
    ///
    /// # Errors
    /// See [`Crashed`]; start a new enforcer then.
    pub async fn serve(&self, mut enforcer: Enforcer, mut stop: Stop) -> Result<(), Crashed> {
        let mut mailbox = self.mailbox.lock().await;
        loop {
            let message = tokio::select! {
                () = stop.asked() => return Ok(()),
                message = mailbox.recv() => message,
            };
            // Without a message nobody is left to send one.
            let Some(message) = message else { return Ok(()) };
            // Compiling and system calls take long: off the threads that serve the network.
            let work = move || {
                enforcer.handle(message);
                enforcer
            };
            enforcer = tokio::task::spawn_blocking(work).await.map_err(|_| Crashed)?;
            if enforcer.has_crashed() {
                return Err(Crashed);
            }
        }
    }
}

#[cfg(test)]
mod tests;
