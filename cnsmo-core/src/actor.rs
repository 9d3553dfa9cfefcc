//! The one task that owns resources and agents: it makes each change durable before anybody sees it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use cnsmo_proto::{
    model::{Labels, NAME_BYTES_MAX},
    pb::{
        agent::{Hello, connect_request},
        resource::{
            ApplyResponse, HistoryEntry, Kind, Resource, WaitAppliedResponse, WatchResponse,
            apply_request::Mode, watch_response,
        },
    },
};
use tokio::{
    sync::{Notify, broadcast, mpsc, oneshot, watch},
    task::JoinHandle,
};
use tonic::Status;
use uuid::Uuid;

use crate::{
    error::Error,
    fleet::{DownSender, Fleet, Timing},
    identity::{Enrolled, Issued, Peer, Subject, registry::Registry, to_ms},
    orchestrator::{self, Observed},
    state::{
        Admission, Announcement, Enrolment, Event, FOLDERS, Note, Plan, PolicyChange, State, Step,
        TokenRecord, TokenSummary, Wanted,
    },
    store::{Entry, Fence, Range, Revision, Store, StoreError, Txn},
};

/// Requests and agents' messages that wait. Operators are refused beyond it, agents wait.
const INBOX_MAX: usize = 4_096;
/// Inputs taken between two looks at waiting callers.
const BATCH_MAX: usize = 256;
/// Changes that a watcher may lag behind; one that lags further is brought up to date with the difference.
const WATCH_RING: usize = 1_024;
/// Callers of `WaitApplied` at a time.
const WAITERS_MAX: usize = 1_024;
/// Progress messages that wait for one caller; newer ones replace what does not fit.
pub const PROGRESS_MAX: usize = 16;
/// Leases and status are looked at this often: far below a lease.
const TICK: Duration = Duration::from_millis(100);

/// Steps of deployments in one transaction; the others come with the next look.
const STEPS_MAX: usize = 1_000;
/// Random hexadecimal digits at the end of an instance's name: 2^32 of one deployment.
const NAME_RANDOM: usize = 8;

type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// A change for watchers.
#[derive(Debug)]
pub struct Change {
    /// Name of the resource.
    pub name: String,
    /// What the watcher is sent.
    pub message: WatchResponse,
}

/// The set at one moment, and all changes since.
#[derive(Debug)]
pub struct View {
    /// By name.
    pub resources: Vec<Resource>,
    /// Of the set.
    pub revision: Revision,
    /// Changes since.
    pub changes: broadcast::Receiver<Arc<Change>>,
}

/// A caller of `WaitApplied`.
#[derive(Debug)]
pub struct Wait {
    /// 0: the current one.
    pub revision: Revision,
    /// Nodes to wait for.
    pub selector: Labels,
    /// How long.
    pub timeout: Duration,
}

#[derive(Debug)]
struct Waiter {
    revision: Revision,
    selector: Labels,
    deadline: Instant,
    last: Option<WaitAppliedResponse>,
    /// A node that was not there yet when it was last looked.
    witness: Option<String>,
    to: mpsc::Sender<Result<WaitAppliedResponse, Status>>,
}

/// A message of an agent.
#[derive(Debug)]
pub struct FromAgent {
    /// Name of its node.
    pub node: String,
    /// As given by [`Core::connect`].
    pub session: u64,
    /// When it came from the socket: a busy core makes no agent late.
    pub received: Instant,
    /// The message; none: the stream is gone.
    pub message: Option<connect_request::Message>,
}

#[derive(Debug)]
enum Input {
    Apply {
        wanted: Vec<Wanted>,
        mode: Mode,
        dry_run: bool,
        note: Note,
        reply: Reply<ApplyResponse>,
    },
    Preview {
        wanted: Vec<Wanted>,
        mode: Mode,
        reply: Reply<(ApplyResponse, BTreeMap<String, PolicyChange>)>,
    },
    Rollback {
        entries: Vec<Entry>,
        dry_run: bool,
        note: Note,
        reply: Reply<ApplyResponse>,
    },
    History {
        before: Revision,
        limit: usize,
        kept: Revision,
        reply: Reply<Vec<HistoryEntry>>,
    },
    Delete {
        kind: Kind,
        name: String,
        note: Note,
        reply: Reply<Revision>,
    },
    Scale {
        name: String,
        replicas: u32,
        note: Note,
        reply: Reply<(Revision, u32)>,
    },
    /// Which services the orchestrator has to know of.
    Observed {
        reply: Reply<BTreeSet<String>>,
    },
    Orchestrate {
        observed: Observed,
        reply: Reply<()>,
    },
    List {
        kind: Kind,
        name: Option<String>,
        labels: Labels,
        reply: Reply<(Vec<Resource>, Revision)>,
    },
    Watch {
        kind: Kind,
        name: Option<String>,
        reply: Reply<View>,
    },
    Wait {
        wait: Wait,
        reply: Reply<mpsc::Receiver<Result<WaitAppliedResponse, Status>>>,
    },
    Token {
        id: String,
        token: TokenRecord,
        reply: Reply<Revision>,
    },
    Tokens {
        after: String,
        count: usize,
        reply: Reply<Vec<TokenSummary>>,
    },
    DeleteToken {
        id: String,
        reply: Reply<Revision>,
    },
    Admit {
        enrolment: Enrolment,
        reply: Reply<Admission>,
    },
    Enrol {
        enrolment: Enrolment,
        subject: Subject,
        certificate: Issued,
        reply: Reply<Issued>,
    },
    Renew {
        peer: Peer,
        certificate: Issued,
        reply: Reply<Issued>,
    },
    Revoke {
        identity: String,
        banned: bool,
        reply: Reply<Revision>,
    },
    Identities {
        reply: Reply<Vec<(String, Enrolled)>>,
    },
    Connect {
        node: String,
        spki_sha256: [u8; 32],
        hello: Box<Hello>,
        down: DownSender,
        reply: Reply<u64>,
    },
    Agent(FromAgent),
    Shutdown,
}

/// The way to the task, as long as it runs in this core. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Core {
    seat: watch::Receiver<Seat>,
}

#[derive(Clone, Debug)]
enum Seat {
    /// What this core writes as the leader carries the fence; none: it has the store for itself.
    Here {
        inbox: mpsc::Sender<Input>,
        fence: Option<Fence>,
        /// Something has changed that the orchestrator looks at.
        deployments: Arc<Notify>,
    },
    /// Address of the core that leads, if one does.
    Elsewhere(Option<String>),
}

/// Where the task runs. Of several cores on one database one leads: it alone has the task.
#[derive(Debug)]
pub struct Seats {
    seat: watch::Sender<Seat>,
    registry: Arc<Registry>,
}

impl Seats {
    /// Nobody leads yet.
    pub fn new(registry: Arc<Registry>) -> (Self, Core) {
        let (sender, seat) = watch::channel(Seat::Elsewhere(None));
        (Self { seat: sender, registry }, Core { seat })
    }

    /// Loads the resources and starts the task, which keeps the registry as the store is. Agents have their full lease from now on. It ends after
    /// [`Core::shut_down`], and when it finds that another core leads: `fence` is of the lease by which this one does.
    pub async fn lead(
        &self,
        store: Store,
        timing: Timing,
        fence: Option<Fence>,
    ) -> anyhow::Result<JoinHandle<()>> {
        let status = store.status().await?;
        let mut entries = Vec::new();
        for folder in FOLDERS {
            entries.extend(store.range(Range::prefix(folder)).await?.entries);
        }
        let state = State::load(status.revision, entries)?;
        for (identity, enrolled) in state.identities() {
            self.registry.set(identity, Some(enrolled));
        }
        let (inbox, inputs) = mpsc::channel(INBOX_MAX);
        let deployments = Arc::new(Notify::new());
        let now = Instant::now();
        let actor = Actor {
            fleet: Fleet::new(&state, timing, now),
            state,
            store,
            registry: self.registry.clone(),
            fence,
            deposed: false,
            epoch: status.epoch,
            rings: BTreeMap::new(),
            waiters: Vec::new(),
            deployments: deployments.clone(),
            last_tick: now,
        };
        self.seat.send_replace(Seat::Here { inbox, fence, deployments });
        Ok(tokio::spawn(actor.run(inputs)))
    }

    /// From now on callers are sent to `leader`. A task that runs here ends all sessions and then itself.
    pub fn follow(&self, leader: Option<String>) {
        self.seat.send_replace(Seat::Elsewhere(leader));
    }
}

impl Core {
    /// Commits all of `wanted`, or says what that would change.
    pub async fn apply(
        &self,
        wanted: Vec<Wanted>,
        mode: Mode,
        dry_run: bool,
        note: Note,
    ) -> Result<ApplyResponse, Error> {
        self.ask(|reply| Input::Apply { wanted, mode, dry_run, note, reply }).await
    }

    /// What committing all of `wanted` would change, and which VMs it would give other policies.
    pub async fn preview(
        &self,
        wanted: Vec<Wanted>,
        mode: Mode,
    ) -> Result<(ApplyResponse, BTreeMap<String, PolicyChange>), Error> {
        self.ask(|reply| Input::Preview { wanted, mode, reply }).await
    }

    /// Makes the resources what they were at a revision: `entries`, of [`crate::state::ROLLBACK_FOLDERS`]. Or says what
    /// that would change.
    pub async fn roll_back(
        &self,
        entries: Vec<Entry>,
        dry_run: bool,
        note: Note,
    ) -> Result<ApplyResponse, Error> {
        self.ask(|reply| Input::Rollback { entries, dry_run, note, reply }).await
    }

    /// The latest changes before a revision, see [`State::history`].
    pub async fn history(
        &self,
        before: Revision,
        limit: usize,
        kept: Revision,
    ) -> Result<Vec<HistoryEntry>, Error> {
        self.ask(|reply| Input::History { before, limit, kept, reply }).await
    }

    /// Removes one resource.
    pub async fn delete(&self, kind: Kind, name: String, note: Note) -> Result<Revision, Error> {
        self.ask(|reply| Input::Delete { kind, name, note, reply }).await
    }

    /// Changes the number of instances of a deployment. Returns the revision, and the number before.
    pub async fn scale(
        &self,
        name: String,
        replicas: u32,
        note: Note,
    ) -> Result<(Revision, u32), Error> {
        self.ask(|reply| Input::Scale { name, replicas, note, reply }).await
    }

    /// Services of which the orchestrator has to know the instances: [`State::observed_services`].
    pub async fn observed_services(&self) -> Result<BTreeSet<String>, Error> {
        self.ask(|reply| Input::Observed { reply }).await
    }

    /// Takes the next steps of all deployments: [`crate::orchestrator::plan`].
    pub async fn orchestrate(&self, observed: Observed) -> Result<(), Error> {
        self.ask(|reply| Input::Orchestrate { observed, reply }).await
    }

    /// Waits for a change of deployments or VMs; one that is missed is told of at the next call. While another core has
    /// them there is none.
    pub async fn deployments_changed(&self) {
        let changed = match &*self.seat.borrow() {
            Seat::Here { deployments, .. } => Some(deployments.clone()),
            Seat::Elsewhere(_) => None,
        };
        match changed {
            Some(changed) => changed.notified().await,
            None => std::future::pending().await,
        }
    }

    /// Resources by name, and the revision they are at.
    pub async fn list(
        &self,
        kind: Kind,
        name: Option<String>,
        labels: Labels,
    ) -> Result<(Vec<Resource>, Revision), Error> {
        self.ask(|reply| Input::List { kind, name, labels, reply }).await
    }

    /// The current set and what changes after it.
    pub async fn watch(&self, kind: Kind, name: Option<String>) -> Result<View, Error> {
        self.ask(|reply| Input::Watch { kind, name, reply }).await
    }

    /// Progress until all selected nodes enforce a revision.
    pub async fn wait(
        &self,
        wait: Wait,
    ) -> Result<mpsc::Receiver<Result<WaitAppliedResponse, Status>>, Error> {
        self.ask(|reply| Input::Wait { wait, reply }).await
    }

    /// Keeps a new join token.
    pub async fn create_token(&self, id: String, token: TokenRecord) -> Result<Revision, Error> {
        self.ask(|reply| Input::Token { id, token, reply }).await
    }

    /// At most `count` of the join tokens that have not expired, by id, behind `after`.
    pub async fn tokens(&self, after: String, count: usize) -> Result<Vec<TokenSummary>, Error> {
        self.ask(|reply| Input::Tokens { after, count, reply }).await
    }

    /// Ends a join token.
    pub async fn delete_token(&self, id: String) -> Result<Revision, Error> {
        self.ask(|reply| Input::DeleteToken { id, reply }).await
    }

    /// Whether a request to join may be granted.
    pub async fn admit(&self, enrolment: Enrolment) -> Result<Admission, Error> {
        self.ask(|reply| Input::Admit { enrolment, reply }).await
    }

    /// Grants a request to join. Returns the certificate in force: that of another request with the same key, if it came
    /// first.
    pub async fn enrol(
        &self,
        enrolment: Enrolment,
        subject: Subject,
        certificate: Issued,
    ) -> Result<Issued, Error> {
        self.ask(|reply| Input::Enrol { enrolment, subject, certificate, reply }).await
    }

    /// Takes over a new certificate. Returns the one in force: a young one is not replaced.
    pub async fn renew(&self, peer: Peer, certificate: Issued) -> Result<Issued, Error> {
        self.ask(|reply| Input::Renew { peer, certificate, reply }).await
    }

    /// Revokes an identity, `<kind>/<name>`.
    pub async fn revoke(&self, identity: String, banned: bool) -> Result<Revision, Error> {
        self.ask(|reply| Input::Revoke { identity, banned, reply }).await
    }

    /// All identities, by name.
    pub async fn identities(&self) -> Result<Vec<(String, Enrolled)>, Error> {
        self.ask(|reply| Input::Identities { reply }).await
    }

    /// Begins a session of the agent with this key. Returns the session's number.
    pub async fn connect(
        &self,
        node: String,
        spki_sha256: [u8; 32],
        hello: Hello,
        down: DownSender,
    ) -> Result<u64, Error> {
        let hello = Box::new(hello);
        self.ask(|reply| Input::Connect { node, spki_sha256, hello, down, reply }).await
    }

    /// Hands over a message of an agent; waits while the core is behind. False: the core is stopping or leads no more.
    pub async fn from_agent(&self, message: FromAgent) -> bool {
        match self.inbox() {
            Ok(inbox) => inbox.send(Input::Agent(message)).await.is_ok(),
            Err(_) => false,
        }
    }

    /// Ends all streams, and the task.
    pub async fn shut_down(&self) {
        if let Ok(inbox) = self.inbox() {
            // Already stopped is as good.
            let _ = inbox.send(Input::Shutdown).await;
        }
    }

    async fn ask<T>(&self, input: impl FnOnce(Reply<T>) -> Input) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.inbox()?.try_send(input(reply)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => {
                Error::Exhausted("the core is overloaded: try again".into())
            }
            mpsc::error::TrySendError::Closed(_) => Error::Stopped,
        })?;
        answer.await.map_err(|_| Error::Stopped)?
    }

    /// The core that leads. None: this one; an address, if one is known.
    pub fn leader(&self) -> Option<Option<String>> {
        match &*self.seat.borrow() {
            Seat::Here { .. } => None,
            Seat::Elsewhere(leader) => Some(leader.clone()),
        }
    }

    /// What every write of the leader carries.
    pub fn fence(&self) -> Result<Option<Fence>, Error> {
        match &*self.seat.borrow() {
            Seat::Here { fence, .. } => Ok(*fence),
            Seat::Elsewhere(leader) => Err(Error::NotLeader(leader.clone())),
        }
    }

    fn inbox(&self) -> Result<mpsc::Sender<Input>, Error> {
        match &*self.seat.borrow() {
            Seat::Here { inbox, .. } => Ok(inbox.clone()),
            Seat::Elsewhere(leader) => Err(Error::NotLeader(leader.clone())),
        }
    }
}

struct Actor {
    state: State,
    fleet: Fleet,
    store: Store,
    registry: Arc<Registry>,
    fence: Option<Fence>,
    /// Another core leads, or what was committed is not known: this state is not the true one.
    deposed: bool,
    epoch: u64,
    rings: BTreeMap<Kind, broadcast::Sender<Arc<Change>>>,
    waiters: Vec<Waiter>,
    deployments: Arc<Notify>,
    last_tick: Instant,
}

impl Actor {
    async fn run(mut self, mut inputs: mpsc::Receiver<Input>) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut batch = Vec::with_capacity(BATCH_MAX);
        loop {
            let ticked = tokio::select! {
                n = inputs.recv_many(&mut batch, BATCH_MAX) => {
                    if n == 0 { break }
                    false
                }
                _ = ticks.tick() => {
                    // What has arrived counts before a lease ends.
                    while batch.len() < INBOX_MAX && let Ok(input) = inputs.try_recv() {
                        batch.push(input);
                    }
                    true
                }
            };
            let mut stop = false;
            for input in batch.drain(..) {
                stop |= matches!(input, Input::Shutdown);
                self.handle(input).await;
                if self.deposed {
                    // What is left finds that this core is no more to be asked.
                    break;
                }
            }
            if ticked {
                let now = Instant::now();
                self.fleet.tick(now, now.saturating_duration_since(self.last_tick));
                self.fleet.let_go(&self.state, now);
                self.last_tick = now;
            }
            self.fleet.flush(&self.state);
            if ticked || self.fleet.has_changed() {
                self.report_progress(ticked);
            }
            if ticked {
                self.publish_status();
            }
            if stop || self.deposed {
                break;
            }
        }
        self.fleet.shut_down();
    }

    async fn handle(&mut self, input: Input) {
        // A caller that went away needs no answer.
        match input {
            Input::Apply { wanted, mode, dry_run, note, reply } => {
                let plan = self.state.plan_apply(wanted, mode, SystemTime::now());
                let _ = reply.send(self.change(plan, dry_run, &note).await);
            }
            Input::Preview { wanted, mode, reply } => {
                let plan = self.state.plan_apply(wanted, mode, SystemTime::now());
                let _ = reply.send(plan.map(|plan| {
                    let mut changed = self.state.policy_changes(&plan);
                    // Each policy once, however many VMs it is for.
                    let mut sent = BTreeMap::new();
                    for (name, spec) in changed.values_mut().flat_map(|change| &mut change.upserts)
                    {
                        let sent = sent.entry(name.clone());
                        let as_sent = || self.fleet.as_sent(Arc::clone(spec), &self.state);
                        *spec = Arc::clone(sent.or_insert_with(as_sent));
                    }
                    let (revision, changes) = (self.state.revision(), plan.changes);
                    (ApplyResponse { revision, changes, ..ApplyResponse::default() }, changed)
                }));
            }
            Input::Rollback { entries, dry_run, note, reply } => {
                let plan = self.state.plan_rollback(&entries, SystemTime::now());
                let _ = reply.send(self.change(plan, dry_run, &note).await);
            }
            Input::History { before, limit, kept, reply } => {
                let _ = reply.send(Ok(self.state.history(before, limit, kept)));
            }
            Input::Delete { kind, name, note, reply } => {
                let plan = self.state.plan_delete(kind, &name);
                let changed = self.change(plan, false, &note).await;
                let _ = reply.send(changed.map(|answer| answer.revision));
            }
            Input::Scale { name, replicas, note, reply } => {
                let _ = reply.send(self.scale(&name, replicas, &note).await);
            }
            Input::Observed { reply } => {
                let _ = reply.send(Ok(self.state.observed_services()));
            }
            Input::Orchestrate { observed, reply } => {
                let _ = reply.send(self.orchestrate(observed).await);
            }
            Input::List { kind, name, labels, reply } => {
                let resources = self.list(kind, name.as_deref(), &labels);
                let _ = reply.send(resources.map(|list| (list, self.state.revision())));
            }
            Input::Watch { kind, name, reply } => {
                let _ = reply.send(self.view(kind, name.as_deref()));
            }
            Input::Wait { wait, reply } => {
                let _ = reply.send(self.wait(wait));
            }
            Input::Token { id, token, reply } => {
                let plan = self.state.plan_token(id, token, SystemTime::now());
                let _ = reply.send(self.commit_plan(plan).await);
            }
            Input::Tokens { after, count, reply } => {
                let tokens = self.state.tokens(&after, SystemTime::now()).take(count);
                let _ = reply.send(Ok(tokens.collect()));
            }
            Input::DeleteToken { id, reply } => {
                let plan = self.state.plan_token_removal(&id);
                let _ = reply.send(self.commit_plan(plan).await);
            }
            Input::Admit { enrolment, reply } => {
                let _ = reply.send(self.state.admit(&enrolment, SystemTime::now()));
            }
            Input::Enrol { enrolment, subject, certificate, reply } => {
                let plan = self.state.plan_enrolment(&enrolment, certificate, SystemTime::now());
                let _ = reply.send(self.commit_certificate(plan, &subject.to_string()).await);
            }
            Input::Renew { peer, certificate, reply } => {
                let Peer { identity, spki_sha256, .. } = &peer;
                let now = SystemTime::now();
                let plan = self.state.plan_renewal(identity, spki_sha256, certificate, now);
                let _ = reply.send(self.commit_certificate(plan, identity).await);
            }
            Input::Revoke { identity, banned, reply } => {
                let plan = self.state.plan_revocation(&identity, banned, SystemTime::now());
                let _ = reply.send(self.commit_plan(plan).await);
            }
            Input::Identities { reply } => {
                let all = self.state.identities().iter();
                let all = all.map(|(identity, enrolled)| (identity.clone(), enrolled.clone()));
                let _ = reply.send(Ok(all.collect()));
            }
            Input::Connect { node, spki_sha256, hello, down, reply } => {
                let _ = reply.send(self.connect(&node, &spki_sha256, &hello, down).await);
            }
            Input::Agent(from) => self.take(from).await,
            Input::Shutdown => {}
        }
    }

    /// What an operator asks for.
    async fn change(
        &mut self,
        plan: Result<Plan, Error>,
        dry_run: bool,
        note: &Note,
    ) -> Result<ApplyResponse, Error> {
        let plan = plan?;
        let changes = plan.changes.clone();
        if !dry_run {
            self.commit(self.state.noted(plan, note, SystemTime::now())).await?;
        }
        let revision = self.state.revision();
        Ok(ApplyResponse { revision, changes, ..ApplyResponse::default() })
    }

    async fn scale(
        &mut self,
        name: &str,
        replicas: u32,
        note: &Note,
    ) -> Result<(Revision, u32), Error> {
        let (plan, before) = self.state.plan_scale(name, replicas, SystemTime::now())?;
        self.commit(self.state.noted(plan, note, SystemTime::now())).await?;
        Ok((self.state.revision(), before))
    }

    async fn orchestrate(&mut self, observed: Observed) -> Result<(), Error> {
        self.fleet.observe(observed, &self.state);
        if self.state.deployments().is_empty() && self.state.placements().is_empty() {
            return Ok(());
        }
        let now = SystemTime::now();
        let world = self.fleet.world(&self.state, to_ms(now));
        let mut steps = orchestrator::plan(&world, instance_name);
        steps.truncate(STEPS_MAX);
        for step in &steps {
            if let Step::Avoid { deployment, node, .. } = step {
                tracing::warn!(
                    deployment,
                    node,
                    "an instance keeps failing: it goes to another VM"
                );
            }
        }
        self.commit(self.state.plan_steps(steps, now)).await
    }

    async fn connect(
        &mut self,
        node: &str,
        spki_sha256: &[u8; 32],
        hello: &Hello,
        down: DownSender,
    ) -> Result<u64, Error> {
        let known = self.state.nodes().get(node);
        if known.is_none_or(|known| known.spki_sha256 != *spki_sha256) {
            return Err(Error::Denied(format!(
                "Node {node}: this core does not know the node with this key: has it been deleted? enrol it again"
            )));
        }
        let labels = Labels::new(hello.labels.clone())
            .map_err(|e| Error::Invalid(format!("hello: {}", e.at("labels"))))?;
        let announcement = hello.announcement.clone().map(Announcement::try_from).transpose();
        let announcement =
            announcement.map_err(|e| Error::Invalid(format!("hello: {}", e.at("announcement"))))?;
        let plan = self.state.plan_connect(node, &labels, announcement, SystemTime::now())?;
        self.commit_for_agent(node, plan).await?;
        Ok(self.fleet.connect(node, hello, down, self.epoch, Instant::now()))
    }

    async fn take(&mut self, from: FromAgent) {
        let FromAgent { node, session, received, message } = from;
        let Some(message) = message else {
            return self.fleet.end(&node, session, Status::ok(""));
        };
        let announced = self.fleet.on_message(&node, session, received, message);
        let Some(announcement) = announced else { return };
        let announcement = Announcement::try_from(announcement)
            .map_err(|e| Error::Invalid(e.at("announcement").to_string()));
        let result = match announcement.and_then(|new| self.state.plan_announcement(&node, new)) {
            Ok(plan) => self.commit_for_agent(&node, plan).await,
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            self.fleet.end(&node, session, error.into());
        }
    }

    /// What changes nothing is free.
    async fn commit_for_agent(&mut self, node: &str, plan: Plan) -> Result<(), Error> {
        if !plan.is_empty() {
            self.fleet.admit_change(node, Instant::now())?;
        }
        self.commit(plan).await
    }

    async fn commit_plan(&mut self, plan: Result<Plan, Error>) -> Result<Revision, Error> {
        self.commit(plan?).await?;
        Ok(self.state.revision())
    }

    /// Returns the certificate that is in force afterwards.
    async fn commit_certificate(
        &mut self,
        plan: Result<Plan, Error>,
        identity: &str,
    ) -> Result<Issued, Error> {
        self.commit(plan?).await?;
        let enrolled = self.state.identities().get(identity).ok_or(Error::Internal)?;
        Ok(enrolled.certificate.clone())
    }

    /// Makes a plan durable, then takes it over and tells watchers and agents.
    async fn commit(&mut self, plan: Plan) -> Result<(), Error> {
        if plan.is_empty() {
            return Ok(());
        }
        let before = self.state.revision();
        let identities: Vec<_> = plan
            .identities()
            .map(|(identity, enrolled)| (identity.to_owned(), enrolled.cloned()))
            .collect();
        let txn = Txn { fence: self.fence, ..plan.txn() };
        let revision = match self.store.commit(txn).await {
            Ok(outcome) => outcome.revision,
            Err(StoreError::Fenced) => {
                self.deposed = true;
                return Err(Error::NotLeader(None));
            }
            Err(error) => {
                self.deposed = matches!(error, StoreError::Unknown(_));
                return Err(error.into());
            }
        };
        let events = self.state.commit(plan, revision);
        let now = Instant::now();
        self.fleet.on_commit(&events, &self.state, before, now);
        self.fleet.flush(&self.state);
        // After the fleet: an agent that is cut has been told why.
        for (identity, enrolled) in identities {
            self.registry.set(&identity, enrolled.as_ref());
        }
        let is_for_look = |event: &Event| {
            let kind = event.kind;
            matches!(
                kind,
                Kind::Deployment | Kind::Node | Kind::LoadBalancer | Kind::FirewallPolicy
            )
        };
        if events.iter().any(is_for_look) {
            self.deployments.notify_one();
        }
        for event in events {
            self.publish(event);
        }
        Ok(())
    }

    fn list(
        &mut self,
        kind: Kind,
        name: Option<&str>,
        labels: &Labels,
    ) -> Result<Vec<Resource>, Error> {
        let names = match name {
            _ if kind == Kind::Unspecified => return Err(Error::Invalid("kind: missing".into())),
            Some(name) => vec![name.to_owned()],
            None => self.state.names(kind),
        };
        let (state, fleet) = (&self.state, &mut self.fleet);
        let has = |name: &&String| {
            let metadata = state.metadata(kind, name);
            metadata.is_some_and(|metadata| {
                labels.as_map().iter().all(|(key, value)| metadata.labels.get(key) == Some(value))
            })
        };
        let names = names.iter().filter(has);
        Ok(names.filter_map(|name| fleet.resource(kind, name, state)).collect())
    }

    fn view(&mut self, kind: Kind, name: Option<&str>) -> Result<View, Error> {
        let resources = self.list(kind, name, &Labels::default())?;
        let changes = self.ring(kind).subscribe();
        Ok(View { resources, revision: self.state.revision(), changes })
    }

    fn publish(&mut self, event: Event) {
        let Event { kind, name, deleted } = event;
        match deleted {
            None => self.publish_upsert(kind, name),
            Some(resource) => {
                let resource = Resource { resource: Some(resource) };
                self.send(kind, name, watch_response::Event::Delete, resource);
            }
        }
    }

    fn publish_upsert(&mut self, kind: Kind, name: String) {
        if self.ring(kind).receiver_count() == 0 {
            return;
        }
        let Some(resource) = self.fleet.resource(kind, &name, &self.state) else { return };
        self.send(kind, name, watch_response::Event::Upsert, resource);
    }

    fn send(&mut self, kind: Kind, name: String, event: watch_response::Event, resource: Resource) {
        let message = WatchResponse {
            event: event.into(),
            revision: self.state.revision(),
            resource: Some(resource),
        };
        // No watcher is no error.
        let _ = self.ring(kind).send(Arc::new(Change { name, message }));
    }

    fn ring(&mut self, kind: Kind) -> &broadcast::Sender<Arc<Change>> {
        self.rings.entry(kind).or_insert_with(|| broadcast::channel(WATCH_RING).0)
    }

    /// Status of agents changes often and matters little in between: once per tick is enough.
    fn publish_status(&mut self) {
        for (kind, name) in self.fleet.take_changed() {
            self.publish_upsert(kind, name);
        }
    }

    fn wait(
        &mut self,
        wait: Wait,
    ) -> Result<mpsc::Receiver<Result<WaitAppliedResponse, Status>>, Error> {
        let current = self.state.revision();
        if wait.revision > current {
            return Err(Error::OutOfRange(format!(
                "revision {} is not there yet: the current one is {current}",
                wait.revision
            )));
        }
        if self.waiters.len() >= WAITERS_MAX {
            return Err(Error::Exhausted(format!("{WAITERS_MAX} callers wait already")));
        }
        let (to, progress) = mpsc::channel(PROGRESS_MAX);
        let mut waiter = Waiter {
            revision: if wait.revision == 0 { current } else { wait.revision },
            selector: wait.selector,
            deadline: Instant::now() + wait.timeout,
            last: None,
            witness: None,
            to,
        };
        if waiter.look(&self.state, &self.fleet, Instant::now()) {
            self.waiters.push(waiter);
        }
        Ok(progress)
    }

    /// In between ticks only to those who have nothing left to wait for: progress counts all nodes.
    fn report_progress(&mut self, ticked: bool) {
        let now = Instant::now();
        let (state, fleet) = (&self.state, &self.fleet);
        self.waiters.retain_mut(|waiter| {
            (!ticked && waiter.is_early(state, fleet)) || waiter.look(state, fleet, now)
        });
    }
}

/// A name that no instance ever had.
fn instance_name(deployment: &str) -> String {
    let id = Uuid::now_v7().simple().to_string();
    let (random, stem) = (&id[id.len() - NAME_RANDOM..], deployment);
    let stem = &stem[..stem.len().min(NAME_BYTES_MAX - NAME_RANDOM - 1)];
    format!("{}-{random}", stem.trim_end_matches('-'))
}

impl Waiter {
    /// Whether some node is missing. Each call goes on where the last one stopped, so all of them together look at each
    /// node once.
    fn is_early(&mut self, state: &State, fleet: &Fleet) -> bool {
        let from = self.witness.take().unwrap_or_default();
        self.witness = fleet.first_pending(state, self.revision, &self.selector, &from);
        self.witness.is_some()
    }

    /// Sends what is new. Returns whether it goes on waiting.
    fn look(&mut self, state: &State, fleet: &Fleet, now: Instant) -> bool {
        let mut progress = fleet.progress(state, self.revision, &self.selector);
        progress.done = progress.applied || now >= self.deadline;
        progress.applied &= progress.done;
        if self.last.as_ref() == Some(&progress) {
            return !self.to.is_closed();
        }
        match self.to.try_send(Ok(progress.clone())) {
            Ok(()) => {
                let goes_on = !progress.done;
                self.last = Some(progress);
                goes_on
            }
            Err(mpsc::error::TrySendError::Full(_)) => true,
            Err(mpsc::error::TrySendError::Closed(_)) => false,
        }
    }
}
