//! One commit of the database: what several callers asked for, decided in the order in which they asked.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use prost::Message;

use super::{
    AuditRecord, Change, Commit, Compare, DELETE_KEYS_MAX, Entry, Event, LEASE_KEYS_MAX, Lease,
    LeaseId, Op, Outcome, READ_BYTES_MAX, REQUEST_TTL, Read, Revision, StoreError, Target, Txn,
    audit,
    engine::{Connection, EngineError, Head, Repeated, Row, Sql, Value, select_in},
    message,
    read::prefix_end,
    writer::now_ms,
};

static KEYS: Repeated = Repeated::new(
    "SELECT key, create_rev, mod_rev, version, lease_id FROM kv WHERE key IN (",
    0,
    ")",
);
const KEYS_OF_PREFIX: Sql = Sql::Fixed(
    "SELECT key, create_rev, mod_rev, version, lease_id FROM kv WHERE key >= $1 AND key < $2 ORDER BY key LIMIT $3",
);
const KEYS_OF_LEASE: Sql = Sql::Fixed(
    "SELECT key, create_rev, mod_rev, version, lease_id FROM kv WHERE lease_id = $1 AND lease_id <> 0",
);
/// The end of the text lets it use the index of keys with a lease.
static BOUND: Repeated = Repeated::new(
    "SELECT lease_id, count(*) FROM kv WHERE lease_id IN (",
    0,
    ") AND lease_id <> 0 GROUP BY lease_id",
);
static CONTENTS: Repeated =
    Repeated::new("SELECT key, value, content_type FROM kv WHERE key IN (", 0, ")");
static LEASES: Repeated = Repeated::new(
    "SELECT lease_id, owner, ttl_ms, fence, holder, holder_epoch FROM lease WHERE lease_id IN (",
    0,
    ")",
);
const REQUEST: Sql = Sql::Fixed(
    "SELECT reply FROM request WHERE identity = $1 AND request_id = $2 AND expire_ms > $3",
);
static PUT_REQUESTS: Repeated = Repeated::new(
    "INSERT INTO request (identity, request_id, reply, expire_ms) VALUES ",
    4,
    " ON CONFLICT (identity, request_id) DO UPDATE SET reply = excluded.reply, expire_ms = excluded.expire_ms",
);
static PUT_LOG: Repeated = Repeated::new(
    "INSERT INTO log (rev, sub, op, key, value, content_type, create_rev, version, lease_id, prev_rev, identity, time_ms) VALUES ",
    12,
    "",
);
static PUT_KEYS: Repeated = Repeated::new(
    "INSERT INTO kv (key, value, content_type, create_rev, mod_rev, version, lease_id) VALUES ",
    7,
    " ON CONFLICT (key) DO UPDATE SET value = excluded.value, content_type = excluded.content_type, \
     create_rev = excluded.create_rev, mod_rev = excluded.mod_rev, version = excluded.version, lease_id = excluded.lease_id",
);
static DELETE_KEYS: Repeated = Repeated::new("DELETE FROM kv WHERE key IN (", 0, ")");
static PUT_LEASES: Repeated = Repeated::new(
    "INSERT INTO lease (lease_id, owner, ttl_ms, fence, holder, holder_epoch) VALUES ",
    6,
    " ON CONFLICT (lease_id) DO UPDATE SET holder = excluded.holder, holder_epoch = excluded.holder_epoch",
);
static DELETE_LEASES: Repeated = Repeated::new("DELETE FROM lease WHERE lease_id IN (", 0, ")");

/// What a caller asks of the writer. Each kind has its part in [`Group::load`], [`Group::settle`] and [`Group::write`].
#[derive(Clone, Debug)]
pub(super) enum Work {
    Commit(Txn),
    Grant { owner: String, ttl: Duration, holder: String },
    TakeLease { id: LeaseId, holder: String, from: Option<(String, i64)> },
    EndLease { id: LeaseId, expired: bool, guard: Option<(String, i64)> },
    Audit(AuditRecord),
    Message(message::Ask),
}

impl Work {
    /// Bytes in memory, about.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Commit(txn) => txn.bytes(),
            Self::Grant { .. } | Self::TakeLease { .. } | Self::EndLease { .. } => {
                size_of::<Self>()
            }
            Self::Audit(record) => record.bytes(),
            Self::Message(ask) => ask.bytes(),
        }
    }
}

/// What became of it.
#[derive(Debug)]
pub(super) enum Done {
    Outcome(Outcome),
    Lease(Option<Lease>),
    Ended(Option<Revision>),
    Appended,
    Told(message::Told),
}

/// What a group has done.
#[derive(Debug)]
pub(super) struct Committed {
    /// One for each [`Work`].
    pub(super) results: Vec<Result<Done, StoreError>>,
    /// In order.
    pub(super) commits: Vec<Arc<Commit>>,
    /// Numbers were given out, up to these.
    pub(super) head: Option<Head>,
    /// Other cores are told of this revision; none: there is nothing for them.
    pub(super) newest: Option<Revision>,
    /// There is nothing to make durable.
    pub(super) unchanged: bool,
}

/// Does all of `work` within the connection's transaction, which has locked the head.
pub(super) async fn run(
    connection: &mut dyn Connection,
    head: Head,
    work: &[Work],
) -> Result<Committed, EngineError> {
    let mut group = Group { head, ..Group::default() };
    group.load(connection, work).await?;
    let mut results = Vec::with_capacity(work.len());
    for one in work {
        results.push(group.settle(connection, one).await?);
    }
    let unchanged = group.is_unchanged();
    let is_news = !group.commits.is_empty() || !group.messages.is_unchanged();
    let newest = is_news.then_some(group.head.revision);
    let head = (group.head != head).then_some(group.head);
    let commits = group.write(connection).await?;
    Ok(Committed { results, commits, head, newest, unchanged })
}

/// A key as it is after what was settled.
#[derive(Clone, Debug)]
struct Present {
    create: Revision,
    modified: Revision,
    version: i64,
    lease: LeaseId,
    /// None: as it is in the database.
    content: Option<(Bytes, String)>,
}

/// As a message, in the table of requests.
#[derive(Clone, PartialEq, Message)]
struct Reply {
    #[prost(bool, tag = "1")]
    succeeded: bool,
    #[prost(int64, tag = "2")]
    revision: i64,
    #[prost(message, repeated, tag = "3")]
    reads: Vec<ReplyRead>,
}

#[derive(Clone, PartialEq, Message)]
struct ReplyRead {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    entry: Option<ReplyEntry>,
}

#[derive(Clone, PartialEq, Message)]
struct ReplyEntry {
    #[prost(bytes = "bytes", tag = "1")]
    value: Bytes,
    #[prost(string, tag = "2")]
    content_type: String,
    #[prost(int64, tag = "3")]
    create_revision: i64,
    #[prost(int64, tag = "4")]
    mod_revision: i64,
    #[prost(int64, tag = "5")]
    version: i64,
    #[prost(int64, tag = "6")]
    lease: i64,
}

/// The state that the group sees, and what it will write.
#[derive(Default)]
struct Group {
    head: Head,
    /// All keys that the group may touch; none: absent.
    keys: BTreeMap<String, Option<Present>>,
    /// Prefixes with more keys than may be deleted.
    large: BTreeSet<String>,
    /// All leases that the group may touch, and those it made; none: it ended.
    leases: BTreeMap<LeaseId, Option<Lease>>,
    changed_leases: BTreeSet<LeaseId>,
    /// Keys of each lease with which the group puts one.
    bound: BTreeMap<LeaseId, i64>,
    /// Answers to the requests of this group, by caller and id.
    replies: HashMap<(String, String), Reply>,
    commits: Vec<(Commit, String)>,
    audit: Vec<AuditRecord>,
    messages: message::Batch,
}

impl Group {
    fn is_unchanged(&self) -> bool {
        self.commits.is_empty()
            && self.changed_leases.is_empty()
            && self.replies.is_empty()
            && self.audit.is_empty()
            && self.messages.is_unchanged()
    }

    async fn load(
        &mut self,
        connection: &mut dyn Connection,
        work: &[Work],
    ) -> Result<(), EngineError> {
        let (mut keys, mut prefixes) = (BTreeSet::new(), BTreeSet::new());
        let (mut leases, mut ending) = (BTreeSet::new(), BTreeSet::new());
        let mut binding = BTreeSet::new();
        for work in work {
            match work {
                Work::Commit(txn) => {
                    keys.extend(txn.compares.iter().map(|c| c.key.as_str()));
                    leases.extend(txn.fence.map(|fence| fence.lease));
                    for op in txn.ops() {
                        match op {
                            Op::Put { key, lease, .. } => {
                                keys.insert(key);
                                binding.extend((*lease != 0).then_some(*lease));
                            }
                            Op::Delete { key } | Op::Get { key } => drop(keys.insert(key)),
                            Op::DeletePrefix { prefix } => drop(prefixes.insert(prefix)),
                        }
                    }
                }
                Work::TakeLease { id, .. } => drop(leases.insert(*id)),
                Work::EndLease { id, .. } => {
                    leases.insert(*id);
                    ending.insert(*id);
                }
                Work::Grant { .. } | Work::Audit(_) | Work::Message(_) => {}
            }
        }
        for row in select_keys(connection, &keys).await? {
            self.know(row)?;
        }
        for key in keys {
            self.keys.entry(key.to_owned()).or_insert(None);
        }
        let most = DELETE_KEYS_MAX + 1;
        for prefix in prefixes {
            let limit = i64::try_from(most).unwrap_or(i64::MAX);
            let args = vec![prefix.as_str().into(), prefix_end(prefix).into(), limit.into()];
            let rows = connection.fetch(&KEYS_OF_PREFIX, args, usize::MAX).await?.rows;
            if rows.len() == most {
                self.large.insert(prefix.clone());
            }
            rows.into_iter().try_for_each(|row| self.know(row))?;
        }
        for lease in ending {
            let rows = connection.fetch(&KEYS_OF_LEASE, vec![lease.into()], usize::MAX).await?.rows;
            rows.into_iter().try_for_each(|row| self.know(row))?;
        }
        let ids: Vec<Value> = binding.iter().copied().map(Value::Int).collect();
        for mut row in select_in(connection, &BOUND, &ids).await? {
            self.bound.insert(row.int()?, row.int()?);
        }
        leases.extend(binding);
        let ids: Vec<Value> = leases.iter().copied().map(Value::Int).collect();
        self.leases.extend(leases.into_iter().map(|id| (id, None)));
        for row in select_in(connection, &LEASES, &ids).await? {
            let lease = lease(row)?;
            self.leases.insert(lease.id, Some(lease));
        }
        let asks = work.iter().filter_map(|work| match work {
            Work::Message(ask) => Some(ask),
            _ => None,
        });
        self.messages.load(connection, asks).await
    }

    fn know(&mut self, mut row: Row) -> Result<(), EngineError> {
        let key = row.text()?;
        let present = Present {
            create: row.int()?,
            modified: row.int()?,
            version: row.int()?,
            lease: row.int()?,
            content: None,
        };
        self.keys.insert(key, Some(present));
        Ok(())
    }

    /// The outer error fails the whole group.
    async fn settle(
        &mut self,
        connection: &mut dyn Connection,
        work: &Work,
    ) -> Result<Result<Done, StoreError>, EngineError> {
        Ok(match work {
            Work::Commit(txn) => self.commit(connection, txn).await?.map(Done::Outcome),
            Work::Grant { owner, ttl, holder } => {
                self.head.fence += 1;
                let lease = Lease {
                    id: self.head.fence,
                    owner: owner.clone(),
                    ttl: *ttl,
                    token: self.head.fence.cast_unsigned(),
                    holder: holder.clone(),
                    holder_epoch: 1,
                };
                self.change_lease(lease.id, Some(lease.clone()));
                Ok(Done::Lease(Some(lease)))
            }
            Work::TakeLease { id, holder, from } => {
                let known = self.leases.get(id).cloned().flatten();
                let known = known.filter(|lease| is_held_by(lease, from.as_ref()));
                let taken = known.map(|mut lease| {
                    lease.holder.clone_from(holder);
                    lease.holder_epoch += 1;
                    lease
                });
                if let Some(lease) = &taken {
                    self.change_lease(*id, Some(lease.clone()));
                }
                Ok(Done::Lease(taken))
            }
            Work::EndLease { id, expired, guard } => {
                Ok(Done::Ended(self.end_lease(*id, *expired, guard.as_ref())))
            }
            Work::Audit(record) => {
                self.audit.push(record.clone());
                Ok(Done::Appended)
            }
            Work::Message(ask) => Ok(Done::Told(self.messages.settle(connection, ask).await?)),
        })
    }

    fn change_lease(&mut self, id: LeaseId, lease: Option<Lease>) {
        self.leases.insert(id, lease);
        self.changed_leases.insert(id);
    }

    fn end_lease(
        &mut self,
        id: LeaseId,
        expired: bool,
        guard: Option<&(String, i64)>,
    ) -> Option<Revision> {
        let lease = self.leases.get(&id)?.as_ref()?;
        if !is_held_by(lease, guard) {
            return None;
        }
        self.change_lease(id, None);
        let bound = |present: &Option<Present>| present.as_ref().is_some_and(|p| p.lease == id);
        let keys: Vec<String> =
            self.keys.iter().filter(|(_, p)| bound(p)).map(|(key, _)| key.clone()).collect();
        let change = if expired { Change::Expire } else { Change::Delete };
        let mut step = Step::new(self.head.revision + 1);
        for key in &keys {
            step.delete(&mut self.keys, key, change);
        }
        self.take_over(step, "");
        Some(self.head.revision)
    }

    /// What a transaction has done becomes a revision, unless it has done nothing.
    fn take_over(&mut self, step: Step, by: &str) {
        if !step.events.is_empty() {
            self.head.revision = step.revision;
            self.commits
                .push((Commit { revision: step.revision, events: step.events }, by.to_owned()));
        }
    }

    async fn commit(
        &mut self,
        connection: &mut dyn Connection,
        txn: &Txn,
    ) -> Result<Result<Outcome, StoreError>, EngineError> {
        if let Some(id) = &txn.request_id
            && let Some(reply) = self.reply(connection, &txn.by, id).await?
        {
            return Ok(Ok(reply.into()));
        }
        if let Some(fence) = txn.fence {
            let lease = self.leases.get(&fence.lease).and_then(Option::as_ref);
            if lease.is_none_or(|lease| lease.token != fence.token) {
                return Ok(Err(StoreError::Fenced));
            }
        }
        let Some(contents) = self.contents(connection, txn).await? else {
            return Ok(Err(StoreError::TooMany { what: "bytes read", limit: READ_BYTES_MAX }));
        };
        let succeeded = txn.compares.iter().all(|compare| self.holds(compare, &contents));
        let ops = if succeeded { &txn.success } else { &txn.failure };
        let mut step = Step::new(self.head.revision + 1);
        let mut reads = Vec::new();
        for op in ops {
            if let Err(error) = self.step(op, &contents, &mut step, &mut reads) {
                step.undo(&mut self.keys);
                return Ok(Err(error));
            }
        }
        if let Err(error) = self.bind(&step) {
            step.undo(&mut self.keys);
            return Ok(Err(error));
        }
        self.take_over(step, &txn.by);
        let outcome = Outcome { succeeded, revision: self.head.revision, reads };
        if let Some(id) = &txn.request_id {
            self.replies.insert((txn.by.clone(), id.clone()), outcome.clone().into());
        }
        Ok(Ok(outcome))
    }

    /// Counts the keys that a transaction has given to leases and taken from them, unless one has too many then.
    fn bind(&mut self, step: &Step) -> Result<(), StoreError> {
        let puts = step.events.iter().any(|event| event.entry.lease != 0);
        if !puts && self.bound.is_empty() {
            return Ok(());
        }
        let (mut changed, mut seen) = (BTreeMap::<LeaseId, i64>::new(), BTreeSet::new());
        for (key, before) in &step.before {
            if seen.insert(key) {
                let after = self.keys.get(key).and_then(Option::as_ref);
                *changed.entry(before.as_ref().map_or(0, |p| p.lease)).or_default() -= 1;
                *changed.entry(after.map_or(0, |p| p.lease)).or_default() += 1;
            }
        }
        let known = |lease: &LeaseId| self.bound.get(lease).copied().unwrap_or_default();
        let is_full = |(lease, more): &(&LeaseId, &i64)| {
            **lease != 0 && **more > 0 && known(lease) + **more > LEASE_KEYS_MAX
        };
        if let Some((lease, _)) = changed.iter().find(is_full) {
            return Err(StoreError::LeaseFull(*lease));
        }
        for (lease, more) in changed {
            *self.bound.entry(lease).or_default() += more;
        }
        Ok(())
    }

    fn step(
        &mut self,
        op: &Op,
        contents: &HashMap<String, (Bytes, String)>,
        step: &mut Step,
        reads: &mut Vec<Read>,
    ) -> Result<(), StoreError> {
        match op {
            Op::Put { key, value, content_type, lease } => {
                if *lease != 0 && self.leases.get(lease).is_none_or(Option::is_none) {
                    return Err(StoreError::LeaseGone(*lease));
                }
                step.put(&mut self.keys, key, (value.clone(), content_type.clone()), *lease);
            }
            Op::Delete { key } => step.delete(&mut self.keys, key, Change::Delete),
            Op::DeletePrefix { prefix } => {
                let from_prefix = self.keys.range(prefix.clone()..);
                let keys: Vec<String> = from_prefix
                    .take_while(|(key, _)| key.starts_with(prefix))
                    .filter(|(_, present)| present.is_some())
                    .map(|(key, _)| key.clone())
                    .collect();
                if keys.len() > DELETE_KEYS_MAX || self.large.contains(prefix) {
                    return Err(StoreError::TooMany {
                        what: "keys deleted",
                        limit: DELETE_KEYS_MAX,
                    });
                }
                for key in &keys {
                    step.delete(&mut self.keys, key, Change::Delete);
                }
            }
            Op::Get { key } => {
                let entry = self.keys.get(key).and_then(Option::as_ref).map(|present| {
                    let content = present.content.as_ref().or_else(|| contents.get(key));
                    present.entry(key, content.cloned().unwrap_or_default())
                });
                reads.push(Read { key: key.clone(), entry });
            }
        }
        Ok(())
    }

    fn holds(&self, compare: &Compare, contents: &HashMap<String, (Bytes, String)>) -> bool {
        let present = self.keys.get(&compare.key).and_then(Option::as_ref);
        match &compare.target {
            Target::ModRevision(revision) => present.map_or(0, |p| p.modified) == *revision,
            Target::Version(version) => present.map_or(0, |p| p.version) == *version,
            Target::Lease(lease) => present.map_or(0, |p| p.lease) == *lease,
            Target::Value(value) => present.is_some_and(|present| {
                let content = present.content.as_ref().or_else(|| contents.get(&compare.key));
                content.is_some_and(|(content, _)| content == value)
            }),
        }
    }

    /// Values that the transaction looks at and that only the database has. None: they are too large.
    async fn contents(
        &self,
        connection: &mut dyn Connection,
        txn: &Txn,
    ) -> Result<Option<HashMap<String, (Bytes, String)>>, EngineError> {
        let compared = txn.compares.iter().filter(|c| matches!(c.target, Target::Value(_)));
        let got = txn.ops().filter_map(|op| match op {
            Op::Get { key } => Some(key),
            Op::Put { .. } | Op::Delete { .. } | Op::DeletePrefix { .. } => None,
        });
        let wanted: BTreeSet<&String> = compared.map(|c| &c.key).chain(got).collect();
        let missing = |key: &&String| {
            let present = self.keys.get(*key).and_then(Option::as_ref);
            present.is_some_and(|present| present.content.is_none())
        };
        let (mut contents, mut bytes) = (HashMap::new(), 0);
        for key in wanted.into_iter().filter(missing) {
            let (sql, _) = CONTENTS.atleast(1);
            let rows = connection.fetch(&sql, vec![key.as_str().into()], usize::MAX).await?.rows;
            for mut row in rows {
                let (key, value, content_type) = (row.text()?, row.blob()?, row.text()?);
                bytes += value.len();
                contents.insert(key, (value, content_type));
            }
            if bytes > READ_BYTES_MAX {
                return Ok(None);
            }
        }
        Ok(Some(contents))
    }

    async fn reply(
        &self,
        connection: &mut dyn Connection,
        by: &str,
        id: &str,
    ) -> Result<Option<Reply>, EngineError> {
        if let Some(reply) = self.replies.get(&(by.to_owned(), id.to_owned())) {
            return Ok(Some(reply.clone()));
        }
        let args = vec![by.into(), id.into(), now_ms().into()];
        let rows = connection.fetch(&REQUEST, args, usize::MAX).await?.rows;
        let Some(mut row) = rows.into_iter().next() else { return Ok(None) };
        Reply::decode(row.blob()?).map(Some).map_err(|e| EngineError::Failed(e.into()))
    }

    async fn write(self, connection: &mut dyn Connection) -> Result<Vec<Arc<Commit>>, EngineError> {
        connection.insert(&PUT_LOG, self.log_rows()).await?;
        let (puts, deletes) = self.key_rows();
        select_in(connection, &DELETE_KEYS, &deletes).await?;
        connection.insert(&PUT_KEYS, puts).await?;
        let (mut leases, mut ended) = (Vec::new(), Vec::new());
        for id in &self.changed_leases {
            match self.leases.get(id).and_then(Option::as_ref) {
                Some(lease) => leases.extend(lease_row(lease)),
                None => ended.push(Value::Int(*id)),
            }
        }
        select_in(connection, &DELETE_LEASES, &ended).await?;
        connection.insert(&PUT_LEASES, leases).await?;
        let ttl = i64::try_from(REQUEST_TTL.as_millis()).unwrap_or(i64::MAX);
        let expire = now_ms().saturating_add(ttl);
        let mut replies = Vec::with_capacity(self.replies.len() * 4);
        for ((by, id), reply) in self.replies {
            let reply = Bytes::from(reply.encode_to_vec());
            replies.extend([by.into(), id.into(), reply.into(), expire.into()]);
        }
        connection.insert(&PUT_REQUESTS, replies).await?;
        audit::append(connection, self.audit).await?;
        self.messages.write(connection).await?;
        Ok(self.commits.into_iter().map(|(commit, _)| Arc::new(commit)).collect())
    }

    fn log_rows(&self) -> Vec<Value> {
        let now = now_ms();
        let events: usize = self.commits.iter().map(|(commit, _)| commit.events.len()).sum();
        let mut rows = Vec::with_capacity(events * 12);
        for (commit, by) in &self.commits {
            for (sub, event) in (0_i64..).zip(&commit.events) {
                let entry = &event.entry;
                let (op, value) = match event.change {
                    Change::Put => (1, Value::Blob(entry.value.clone())),
                    Change::Delete => (2, Value::Null),
                    Change::Expire => (3, Value::Null),
                };
                rows.extend([event.revision.into(), sub.into(), Value::Int(op)]);
                rows.extend([entry.key.as_str().into(), value, entry.content_type.as_str().into()]);
                rows.extend([entry.create_revision.into(), entry.version.into()]);
                rows.extend([entry.lease.into(), event.prev_revision.into()]);
                rows.extend([by.as_str().into(), now.into()]);
            }
        }
        rows
    }

    /// The keys that were changed, as they are in the end.
    fn key_rows(&self) -> (Vec<Value>, Vec<Value>) {
        let events = self.commits.iter().flat_map(|(commit, _)| &commit.events);
        let changed: BTreeSet<&str> = events.map(|event| event.entry.key.as_str()).collect();
        let (mut puts, mut deletes) = (Vec::with_capacity(changed.len() * 7), Vec::new());
        for key in changed {
            match self.keys.get(key).and_then(Option::as_ref) {
                Some(Present { create, modified, version, lease, content: Some(content) }) => {
                    let (value, content_type) = content.clone();
                    puts.extend([key.into(), value.into(), content_type.into()]);
                    puts.extend([*create, *modified, *version, *lease].map(Value::Int));
                }
                _ => deletes.push(key.into()),
            }
        }
        (puts, deletes)
    }
}

/// The changes of one transaction, and how to undo them.
struct Step {
    revision: Revision,
    events: Vec<Event>,
    before: Vec<(String, Option<Present>)>,
}

impl Step {
    fn new(revision: Revision) -> Self {
        Self { revision, events: Vec::new(), before: Vec::new() }
    }

    fn put(
        &mut self,
        keys: &mut BTreeMap<String, Option<Present>>,
        key: &str,
        content: (Bytes, String),
        lease: LeaseId,
    ) {
        let before = keys.get(key).cloned().flatten();
        let present = Present {
            create: before.as_ref().map_or(self.revision, |p| p.create),
            modified: self.revision,
            version: before.as_ref().map_or(0, |p| p.version) + 1,
            lease,
            content: Some(content.clone()),
        };
        self.events.push(Event {
            revision: self.revision,
            change: Change::Put,
            entry: present.entry(key, content),
            prev_revision: before.as_ref().map_or(0, |p| p.modified),
        });
        keys.insert(key.to_owned(), Some(present));
        self.before.push((key.to_owned(), before));
    }

    /// Of an absent key: no change.
    fn delete(&mut self, keys: &mut BTreeMap<String, Option<Present>>, key: &str, change: Change) {
        let Some(before) = keys.get_mut(key).and_then(Option::take) else { return };
        let entry = Entry { key: key.to_owned(), mod_revision: self.revision, ..Entry::default() };
        let prev_revision = before.modified;
        self.events.push(Event { revision: self.revision, change, entry, prev_revision });
        self.before.push((key.to_owned(), Some(before)));
    }

    fn undo(self, keys: &mut BTreeMap<String, Option<Present>>) {
        keys.extend(self.before.into_iter().rev());
    }
}

impl Present {
    fn entry(&self, key: &str, (value, content_type): (Bytes, String)) -> Entry {
        Entry {
            key: key.to_owned(),
            value,
            content_type,
            create_revision: self.create,
            mod_revision: self.modified,
            version: self.version,
            lease: self.lease,
        }
    }
}

async fn select_keys(
    connection: &mut dyn Connection,
    keys: &BTreeSet<&str>,
) -> Result<Vec<Row>, EngineError> {
    let keys: Vec<Value> = keys.iter().map(|key| Value::from(*key)).collect();
    select_in(connection, &KEYS, &keys).await
}

/// None: whoever holds it.
fn is_held_by(lease: &Lease, guard: Option<&(String, i64)>) -> bool {
    guard.is_none_or(|(holder, epoch)| lease.holder == *holder && lease.holder_epoch == *epoch)
}

/// Of the columns in their order.
pub(super) fn lease(mut row: Row) -> Result<Lease, EngineError> {
    Ok(Lease {
        id: row.int()?,
        owner: row.text()?,
        ttl: Duration::from_millis(row.int()?.cast_unsigned()),
        token: row.int()?.cast_unsigned(),
        holder: row.text()?,
        holder_epoch: row.int()?,
    })
}

fn lease_row(lease: &Lease) -> [Value; 6] {
    let ttl = i64::try_from(lease.ttl.as_millis()).unwrap_or(i64::MAX);
    [
        lease.id.into(),
        lease.owner.as_str().into(),
        ttl.into(),
        lease.token.cast_signed().into(),
        lease.holder.as_str().into(),
        lease.holder_epoch.into(),
    ]
}

impl From<Outcome> for Reply {
    fn from(outcome: Outcome) -> Self {
        let Outcome { succeeded, revision, reads } = outcome;
        let read = |Read { key, entry }| ReplyRead { key, entry: entry.map(Into::into) };
        Self { succeeded, revision, reads: reads.into_iter().map(read).collect() }
    }
}

impl From<Entry> for ReplyEntry {
    fn from(entry: Entry) -> Self {
        let Entry { key: _, value, content_type, create_revision, mod_revision, version, lease } =
            entry;
        Self { value, content_type, create_revision, mod_revision, version, lease }
    }
}

impl From<Reply> for Outcome {
    fn from(reply: Reply) -> Self {
        let Reply { succeeded, revision, reads } = reply;
        let read = |ReplyRead { key, entry }| {
            let entry = entry.map(|entry| {
                let ReplyEntry {
                    value,
                    content_type,
                    create_revision,
                    mod_revision,
                    version,
                    lease,
                } = entry;
                Entry {
                    key: key.clone(),
                    value,
                    content_type,
                    create_revision,
                    mod_revision,
                    version,
                    lease,
                }
            });
            Read { key, entry }
        };
        Self { succeeded, revision, reads: reads.into_iter().map(read).collect() }
    }
}
