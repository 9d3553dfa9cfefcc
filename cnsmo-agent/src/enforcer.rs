//! The one owner of ledger and data path: everything that changes what this VM enforces goes through its mailbox, one
//! message at a time.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use anyhow::{Context as _, bail};
use cnsmo_proto::{
    digest::Digest,
    model::{Action, Direction, Name, PortRange, Protocol, Rule, protocol},
    pb::agent::{Ack, TypeState, Update, update::Kind},
};
use cnsmo_service::supervise::{Chain, Stop};
use ipnet::IpNet;
use tokio::sync::{Mutex, mpsc, oneshot, watch};

use crate::{
    datapath::{ApplyError, Datapath, Status},
    effective::Effective,
    ledger::{Ledger, Loaded},
    policy_set::{FIREWALL_POLICY, PolicySet, Refusal, Staged},
};

/// Messages that wait. The session has one update and one question under way and the sweeper one sweep; the rest is
/// room. A sender waits, the sweeper leaves its turn out.
const MAILBOX_MAX: usize = 16;
/// Stands for "no known set" in an answer, which must have a digest: that of the empty set would be a lie.
const NO_SET_DIGEST: [u8; Digest::BYTES] = [0xff; Digest::BYTES];
/// Name of the built-in rule that keeps the way to the core open.
const CORE_RULE: &str = "core";

/// Takes over, or sets up, the data path of this VM. Called at the start and again after a crash of the enforcer.
pub type OpenDatapath = Arc<dyn Fn() -> anyhow::Result<Box<dyn Datapath>> + Send + Sync>;

/// What is in force, for heartbeats and reports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InForce {
    /// Per resource type. Empty: no set is known, and the VM is closed.
    pub types: BTreeMap<String, TypeState>,
    /// Stable word and text, if something is wrong on this VM.
    pub trouble: Option<(&'static str, String)>,
}

/// Where to send messages, and what is in force. Clones reach the same enforcer.
#[derive(Clone, Debug)]
pub struct EnforcerHandle {
    mailbox: mpsc::Sender<Message>,
    in_force: watch::Receiver<InForce>,
}

/// The enforcer is gone, or crashed over this message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the enforcer does not answer")]
pub struct Gone;

/// The data path panicked: it has to be opened anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the data path crashed")]
pub struct Crashed;

#[derive(Debug)]
enum Message {
    Update { store_epoch: u64, update: Box<Update>, reply: oneshot::Sender<Ack> },
    CoreAt { addresses: Vec<SocketAddr>, reply: oneshot::Sender<()> },
    Status { reply: oneshot::Sender<Status> },
    Sweep,
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

    /// Lets this VM reach its core at these addresses whatever the policies say.
    ///
    /// # Errors
    /// See [`Gone`].
    pub async fn core_at(&self, addresses: Vec<SocketAddr>) -> Result<(), Gone> {
        self.ask(|reply| Message::CoreAt { addresses, reply }).await
    }

    /// What the data path does now.
    ///
    /// # Errors
    /// See [`Gone`].
    pub async fn status(&self) -> Result<Status, Gone> {
        self.ask(|reply| Message::Status { reply }).await
    }

    /// Has expired flows removed, unless the enforcer is busy.
    pub fn sweep(&self) {
        // Expired flows can wait: the data path itself ignores them.
        let _ = self.mailbox.try_send(Message::Sweep);
    }

    /// What is in force now and after each change.
    pub fn in_force(&self) -> watch::Receiver<InForce> {
        self.in_force.clone()
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
    open: OpenDatapath,
    state_dir: PathBuf,
    mailbox: Arc<Mutex<mpsc::Receiver<Message>>>,
    in_force: watch::Sender<InForce>,
}

impl Seat {
    /// A seat for the one enforcer of `state_dir`, which the caller has locked, and the handle to it.
    pub fn new(open: OpenDatapath, state_dir: &Path) -> (Self, EnforcerHandle) {
        let (sender, mailbox) = mpsc::channel(MAILBOX_MAX);
        let (in_force, watch) = watch::channel(InForce::default());
        let mailbox = Arc::new(Mutex::new(mailbox));
        let seat = Self { open, state_dir: state_dir.to_owned(), mailbox, in_force };
        (seat, EnforcerHandle { mailbox: sender, in_force: watch })
    }

    /// Opens the data path and enforces what the ledger holds. Returns the enforcer and where the core was last.
    ///
    /// # Errors
    /// The data path cannot be opened, or does not take any policy.
    pub fn start(&self) -> anyhow::Result<(Enforcer, Vec<SocketAddr>)> {
        let (ledger, loaded) = Ledger::open(&self.state_dir);
        let datapath = (self.open)()?;
        Enforcer::start(datapath, ledger, loaded, self.in_force.clone())
    }

    /// Serves the mailbox until `stop`; the data path stays as it is then.
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
            if enforcer.crashed {
                return Err(Crashed);
            }
        }
    }
}

/// See the module.
pub struct Enforcer {
    datapath: Box<dyn Datapath>,
    ledger: Ledger,
    /// `None`: every ledger is damaged. The VM is closed until the core sends a snapshot.
    set: Option<PolicySet>,
    core: Vec<SocketAddr>,
    trouble: Option<(&'static str, String)>,
    in_force: watch::Sender<InForce>,
    /// The data path panicked and must not be asked for anything.
    crashed: bool,
}

impl Enforcer {
    fn start(
        datapath: Box<dyn Datapath>,
        ledger: Ledger,
        loaded: Loaded,
        in_force: watch::Sender<InForce>,
    ) -> anyhow::Result<(Self, Vec<SocketAddr>)> {
        let (record, trouble) = match loaded {
            Loaded::Nothing => (Some(Default::default()), None),
            Loaded::Current(record) => (Some(record), None),
            Loaded::Previous(record, damage) => {
                tracing::warn!(%damage, "newest policies are damaged, using the ones before");
                (Some(record), Some(("LedgerDamaged", format!("{damage}; using the one before"))))
            }
            Loaded::Damaged(damage) => {
                tracing::error!(%damage, "no policies can be read, closing this VM to new flows");
                (None, Some(("LedgerLost", format!("{damage}; closed until the core answers"))))
            }
        };
        let core: Vec<SocketAddr> =
            record.iter().flat_map(|r| &r.core_addresses).flat_map(|a| a.parse()).collect();
        let set = record.map(PolicySet::from_record);
        let mut this = Self { datapath, ledger, set, core, trouble, in_force, crashed: false };
        this.apply_at_start()?;
        this.publish();
        let core = this.core.clone();
        Ok((this, core))
    }

    /// There is no version to go back to: what the data path refuses is left out.
    fn apply_at_start(&mut self) -> anyhow::Result<()> {
        loop {
            let refused = match self.apply(self.set.clone().as_ref()) {
                Ok(()) => return Ok(()),
                Err(ApplyError::Refused(refused)) => refused,
                Err(failed) => {
                    return Err(failed).context("cannot enforce the policies of the ledger");
                }
            };
            tracing::warn!(?refused, "policies of the ledger are refused");
            if !self.set.as_mut().is_some_and(|set| set.drop_refused(&refused)) {
                bail!("the data path refuses the policies of the ledger: {refused:?}");
            }
        }
    }

    fn handle(&mut self, message: Message) {
        // An asker that is gone needs no answer.
        match message {
            Message::Update { store_epoch, update, reply } => {
                let _ = reply.send(self.update(store_epoch, *update));
            }
            Message::CoreAt { addresses, reply } => {
                self.core_at(addresses);
                let _ = reply.send(());
            }
            Message::Status { reply } => {
                let _ = reply.send(self.datapath.status());
            }
            Message::Sweep => self.datapath.sweep(),
        }
    }

    fn update(&mut self, store_epoch: u64, update: Update) -> Ack {
        let received = Instant::now();
        let (nonce, r#type, revision) = (update.nonce, update.r#type.clone(), update.revision);
        let error = match self.try_update(store_epoch, update) {
            Ok(()) => {
                tracing::info!(revision, "policies are in force");
                String::new()
            }
            Err(error) => {
                tracing::warn!(revision, %error, "update refused");
                error
            }
        };
        let ours = r#type == FIREWALL_POLICY;
        let set = self.set.as_ref().filter(|_| ours);
        let no_set = || TypeState { revision: 0, digest: NO_SET_DIGEST.to_vec() };
        Ack {
            nonce,
            r#type,
            applied: Some(set.map_or_else(no_set, PolicySet::running_state)),
            error,
            resource_errors: set.map(PolicySet::rejections).unwrap_or_default(),
            apply_duration: received.elapsed().try_into().ok(),
        }
    }

    /// On an error, shown to the core, what was in force still is.
    fn try_update(&mut self, store_epoch: u64, update: Update) -> Result<(), String> {
        let nothing = PolicySet::default();
        if self.set.is_none() && update.kind() != Kind::Snapshot {
            return Err(Refusal::NoSet.to_string());
        }
        let before = self.set.as_ref().unwrap_or(&nothing).clone();
        let mut staged =
            before.stage(store_epoch, update).map_err(|refusal| refusal.to_string())?;
        let mut kept = false;
        let error = loop {
            if let Err(disk) = keep(&mut self.ledger, staged.set(), &self.core) {
                break disk;
            }
            kept = true;
            if self.set.is_some() && staged.set().enforces_the_same_as(&before) {
                self.accept(staged);
                return Ok(());
            }
            match self.apply(Some(staged.set())) {
                Ok(()) => {
                    self.accept(staged);
                    return Ok(());
                }
                Err(ApplyError::Refused(refused)) if staged.fall_back(&before, &refused) => {
                    tracing::warn!(?refused, "policies are refused, keeping their last versions");
                }
                Err(ApplyError::Refused(refused)) => {
                    break format!("refused together with policies that are in force: {refused:?}");
                }
                Err(failed) => break Chain(&failed).to_string(),
            }
        };
        if let (true, Some(before)) = (kept, &self.set)
            && let Err(disk) = keep(&mut self.ledger, before, &self.core)
        {
            tracing::error!(error = disk, "the ledger holds policies that are not in force");
        }
        Err(error)
    }

    fn accept(&mut self, staged: Staged) {
        self.set = Some(staged.into_set());
        self.trouble = None;
        self.publish();
    }

    fn core_at(&mut self, mut addresses: Vec<SocketAddr>) {
        addresses.sort_unstable();
        addresses.dedup();
        if addresses == self.core {
            return;
        }
        let before = std::mem::replace(&mut self.core, addresses);
        if let Err(error) = self.apply(self.set.clone().as_ref()) {
            tracing::error!(error = %Chain(&error), "the way to the core is not kept open");
            self.core = before;
            return;
        }
        let Some(set) = &self.set else { return };
        if let Err(error) = keep(&mut self.ledger, set, &self.core) {
            tracing::warn!(error, "the addresses of the core are not kept");
        }
    }

    /// A panic is an error like others for this update, so that a policy which makes the data path crash is refused and
    /// does not stay in the ledger to crash it again.
    fn apply(&mut self, set: Option<&PolicySet>) -> Result<(), ApplyError> {
        let effective = self.effective(set);
        let apply = AssertUnwindSafe(|| self.datapath.apply(&effective));
        catch_unwind(apply).unwrap_or_else(|_| {
            self.crashed = true;
            Err(ApplyError::Failed(Crashed.into()))
        })
    }

    fn effective(&self, set: Option<&PolicySet>) -> Effective {
        let built_in = core_rule(&self.core).into_iter().collect();
        match set {
            Some(set) => set.effective(built_in),
            None => {
                let closed = Effective::merge(built_in, []);
                Effective { open: false, ingress: Action::Deny, egress: Action::Deny, ..closed }
            }
        }
    }

    fn publish(&self) {
        let types = self.set.iter().map(|set| (FIREWALL_POLICY.to_owned(), set.running_state()));
        let now = InForce { types: types.collect(), trouble: self.trouble.clone() };
        self.in_force.send_if_modified(|then| {
            let changed = *then != now;
            *then = now;
            changed
        });
    }
}

/// The error is for the core.
fn keep(ledger: &mut Ledger, set: &PolicySet, core: &[SocketAddr]) -> Result<(), String> {
    let core = core.iter().map(ToString::to_string).collect();
    ledger.write(&set.to_record(core)).map_err(|e| format!("cannot keep the policies on disk: {e}"))
}

/// A rule without networks would match any, so there is none without addresses.
fn core_rule(core: &[SocketAddr]) -> Option<Rule> {
    let name = Name::new(CORE_RULE).ok()?;
    let port = |address: &SocketAddr| PortRange::new(address.port(), address.port()).ok();
    let destination = vec![core.first().and_then(port)?];
    Some(Rule {
        name,
        action: Action::Allow,
        direction: Direction::Egress,
        from: Vec::new(),
        to: core.iter().map(|address| IpNet::from(address.ip())).collect(),
        protocol: Protocol::Ports { number: protocol::TCP, source: Vec::new(), destination },
    })
}

#[cfg(test)]
mod tests;
