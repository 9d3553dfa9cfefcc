//! The policies of this VM as the core last sent them, and the rules by which an update becomes the next set.
//!
//! Pure: nothing here touches disk, kernel or network.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use cnsmo_proto::{
    digest::Digest,
    model::{FirewallPolicy, Invalid, Name, Rule},
    pb::agent::{Resource, ResourceError, TypeState, Update, resource::Spec, update::Kind},
};

use crate::{effective::Effective, ledger::Record};

/// The resource type of [`PolicySet`].
pub const FIREWALL_POLICY: &str = "cnsmo.policy.v1.FirewallPolicy";
/// Policies on one VM, those refused included. An update beyond it is refused as a whole.
pub const POLICIES_MAX: usize = 4_096;

/// What one VM runs, and what it was sent but cannot run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicySet {
    store_epoch: u64,
    revision: i64,
    running: BTreeMap<Name, Running>,
    /// Latest version sent, where it is refused. An older one may still be running under the same name.
    rejected: BTreeMap<String, Rejected>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Running {
    revision: i64,
    policy: Arc<FirewallPolicy>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rejected {
    revision: i64,
    message: String,
}

/// Why a whole update is refused. The set stays what it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not a resource type of this agent.
    #[error("unknown resource type `{0}`")]
    UnknownType(String),
    /// Not a kind of update of this protocol version.
    #[error("unknown kind of update {0}")]
    UnknownKind(i32),
    /// A delta or bookmark on a set that this agent does not have.
    #[error("the update is based on revision {base}, this agent has {have}")]
    OtherBase {
        /// Revision the update is based on.
        base: i64,
        /// Revision of the set.
        have: i64,
    },
    /// The store was restored, or this agent comes from another one: only a snapshot says what is meant.
    #[error("store epoch {core} needs a snapshot, this agent has epoch {have}")]
    OtherEpoch {
        /// Epoch of the stream.
        core: u64,
        /// Epoch of the set.
        have: u64,
    },
    /// Nothing is known, so nothing can be based on it.
    #[error("this agent has no set and needs a snapshot")]
    NoSet,
    /// Time runs backwards within one epoch.
    #[error("revision {revision} is below {have} of the same store epoch")]
    LowerRevision {
        /// Revision of the update.
        revision: i64,
        /// Revision of the set.
        have: i64,
    },
    /// The same name twice.
    #[error("`{0}` is in the update twice")]
    Twice(String),
    /// A bookmark with resources.
    #[error("a bookmark changes no resource")]
    BookmarkWithChanges,
    /// More than [`POLICIES_MAX`].
    #[error("{0} policies; at most {POLICIES_MAX} are allowed")]
    TooMany(usize),
    /// Sender and receiver do not mean the same set.
    #[error("the set has digest {have}, the update says {update}")]
    OtherDigest {
        /// Of the set that the update leads to.
        have: Digest,
        /// In the update, hexadecimal.
        update: String,
    },
}

/// The next set, not in force yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Staged {
    set: PolicySet,
    /// Policies that the update has changed: what the data path may refuse without touching what was there.
    changed: BTreeSet<Name>,
}

impl PolicySet {
    /// The set that `update` leads to. Resources that are not valid are rejected alone: the version that runs stays,
    /// and so does everything else.
    ///
    /// # Errors
    /// The update as a whole cannot be used; `self` stays right.
    pub fn stage(&self, store_epoch: u64, update: Update) -> Result<Staged, Refusal> {
        if update.r#type != FIREWALL_POLICY {
            return Err(Refusal::UnknownType(update.r#type));
        }
        let kind = match Kind::try_from(update.kind) {
            Ok(kind) if kind != Kind::Unspecified => kind,
            _ => return Err(Refusal::UnknownKind(update.kind)),
        };
        self.check_base(store_epoch, kind, &update)?;
        no_name_twice(&update)?;
        let mut staged = match kind {
            Kind::Snapshot => self.snapshot(update.upserts),
            Kind::Bookmark => self.bookmark(&update)?,
            _ => self.delta(update.upserts, &update.removals),
        };
        staged.set.store_epoch = store_epoch;
        staged.set.revision = update.revision;
        let policies = staged.set.sent().count();
        if policies > POLICIES_MAX {
            return Err(Refusal::TooMany(policies));
        }
        let have = staged.set.sent_digest();
        let meant = |digest: Digest| digest.as_bytes() == update.digest.as_slice();
        // A core that was told of a rejection may count what runs in place of what it sent.
        if !meant(have) && !meant(staged.set.acknowledged_digest(self)) {
            return Err(Refusal::OtherDigest { have, update: hex(&update.digest) });
        }
        Ok(staged)
    }

    /// Revision and digest of what runs: rejected versions are not in the digest.
    pub fn running_state(&self) -> TypeState {
        let running = self.running.iter().map(|(name, r)| (name.as_str(), r.revision));
        let digest: Digest = running.collect();
        TypeState { revision: self.revision, digest: digest.to_vec() }
    }

    /// Every version that is refused, with the reason.
    pub fn rejections(&self) -> Vec<ResourceError> {
        let wire = |(name, r): (&String, &Rejected)| ResourceError {
            name: name.clone(),
            version: r.revision,
            message: r.message.clone(),
        };
        self.rejected.iter().map(wire).collect()
    }

    /// What the data path is to enforce.
    pub fn effective(&self, built_in: Vec<Rule>) -> Effective {
        Effective::merge(built_in, self.running.iter().map(|(name, r)| (name, &*r.policy)))
    }

    /// Whether both lead to the same rules, whatever their revisions.
    pub fn enforces_the_same_as(&self, other: &Self) -> bool {
        let policies = |set: &Self| set.running.len();
        policies(self) == policies(other)
            && self.running.iter().zip(&other.running).all(
                |((name, mine), (other_name, theirs))| {
                    name == other_name
                        && (Arc::ptr_eq(&mine.policy, &theirs.policy)
                            || mine.policy == theirs.policy)
                },
            )
    }

    /// Takes policies out that the data path refuses and that have no earlier version to go back to.
    /// `false`: none of them was there.
    pub fn drop_refused(&mut self, refused: &BTreeMap<Name, String>) -> bool {
        let mut any = false;
        for (name, message) in refused {
            if let Some(Running { revision, .. }) = self.running.remove(name) {
                self.reject(name.to_string(), revision, message.clone());
                any = true;
            }
        }
        any
    }

    /// For the ledger.
    pub fn to_record(&self, core_addresses: Vec<String>) -> Record {
        let resource = |(name, r): (&Name, &Running)| Resource {
            name: name.to_string(),
            version: r.revision,
            spec: Some(Spec::FirewallPolicy((&*r.policy).into())),
        };
        Record {
            store_epoch: self.store_epoch,
            revision: self.revision,
            resources: self.running.iter().map(resource).collect(),
            rejected: self.rejections(),
            core_addresses,
        }
    }

    /// From the ledger. A resource that this version of the agent does not take is rejected alone.
    pub fn from_record(record: Record) -> Self {
        let mut set =
            Self { store_epoch: record.store_epoch, revision: record.revision, ..Self::default() };
        for ResourceError { name, version: revision, message } in record.rejected {
            set.reject(name, revision, message);
        }
        for resource in record.resources {
            let (name, revision) = (resource.name.clone(), resource.version);
            match convert(resource) {
                Ok((name, policy)) => {
                    set.running.insert(name, Running { revision, policy: Arc::new(policy) });
                }
                Err(invalid) => set.reject(name, revision, invalid.to_string()),
            }
        }
        set
    }

    fn check_base(&self, store_epoch: u64, kind: Kind, update: &Update) -> Result<(), Refusal> {
        // A set that never was anything is the same in every epoch.
        let same_epoch = store_epoch == self.store_epoch || *self == Self::default();
        if !same_epoch && kind != Kind::Snapshot {
            return Err(Refusal::OtherEpoch { core: store_epoch, have: self.store_epoch });
        }
        if same_epoch && update.revision < self.revision {
            let (revision, have) = (update.revision, self.revision);
            return Err(Refusal::LowerRevision { revision, have });
        }
        if kind == Kind::Delta && update.base_revision != self.revision {
            return Err(Refusal::OtherBase { base: update.base_revision, have: self.revision });
        }
        Ok(())
    }

    fn snapshot(&self, upserts: Vec<Resource>) -> Staged {
        let mut staged = Staged { set: Self::default(), changed: BTreeSet::new() };
        for resource in upserts {
            staged.upsert(self, resource);
        }
        staged
    }

    fn delta(&self, upserts: Vec<Resource>, removals: &[String]) -> Staged {
        let mut staged = Staged { set: self.clone(), changed: BTreeSet::new() };
        for name in removals {
            staged.set.rejected.remove(name);
            if let Ok(name) = Name::new(name.as_str()) {
                staged.set.running.remove(&name);
            }
        }
        for resource in upserts {
            staged.upsert(self, resource);
        }
        staged
    }

    fn bookmark(&self, update: &Update) -> Result<Staged, Refusal> {
        if !update.upserts.is_empty() || !update.removals.is_empty() {
            return Err(Refusal::BookmarkWithChanges);
        }
        Ok(Staged { set: self.clone(), changed: BTreeSet::new() })
    }

    /// Each name with the version last sent.
    fn sent(&self) -> impl Iterator<Item = (&str, i64)> {
        let running = self.running.iter().map(|(name, r)| (name.as_str(), r.revision));
        let running = running.filter(|(name, _)| !self.rejected.contains_key(*name));
        running.chain(self.rejected.iter().map(|(name, r)| (name.as_str(), r.revision)))
    }

    fn sent_digest(&self) -> Digest {
        self.sent().collect()
    }

    /// Each name with the version last sent, but with what runs where `before` had rejected that version already.
    fn acknowledged_digest(&self, before: &Self) -> Digest {
        let known = |name: &str| {
            let revision = |set: &Self| set.rejected.get(name).map(|rejected| rejected.revision);
            revision(before).is_some() && revision(before) == revision(self)
        };
        let running = self.running.iter().map(|(name, r)| (name.as_str(), r.revision));
        let running = running.filter(|(name, _)| known(name));
        self.sent().filter(|(name, _)| !known(name)).chain(running).collect()
    }

    fn reject(&mut self, name: String, revision: i64, message: String) {
        self.rejected.insert(name, Rejected { revision, message });
    }
}

impl Staged {
    /// The set, to be tried.
    pub fn set(&self) -> &PolicySet {
        &self.set
    }

    /// The set, now in force.
    pub fn into_set(self) -> PolicySet {
        self.set
    }

    /// Goes back to the version in `before` for each refused policy that the update has changed. `false`: it has changed
    /// none of them, so the update cannot be saved.
    pub fn fall_back(&mut self, before: &PolicySet, refused: &BTreeMap<Name, String>) -> bool {
        let mut any = false;
        for (name, message) in refused {
            if !self.changed.remove(name) {
                continue;
            }
            any = true;
            if let Some(Running { revision, .. }) = self.set.running.remove(name) {
                self.set.reject(name.to_string(), revision, message.clone());
            }
            if let Some(last_good) = before.running.get(name) {
                self.set.running.insert(name.clone(), last_good.clone());
            }
        }
        any
    }

    fn upsert(&mut self, before: &PolicySet, resource: Resource) {
        let (name, revision) = (resource.name.clone(), resource.version);
        self.set.rejected.remove(&name);
        match convert(resource) {
            Ok((name, policy)) => {
                let policy = Arc::new(policy);
                if before.running.get(&name).is_none_or(|old| old.policy != policy) {
                    self.changed.insert(name.clone());
                }
                self.set.running.insert(name, Running { revision, policy });
            }
            Err(invalid) => {
                self.set.reject(name.clone(), revision, invalid.to_string());
                let Ok(name) = Name::new(name) else { return };
                if let Some(last_good) = before.running.get(&name) {
                    self.set.running.insert(name, last_good.clone());
                }
            }
        }
    }
}

fn convert(resource: Resource) -> Result<(Name, FirewallPolicy), Invalid> {
    let name = Name::new(resource.name).map_err(|e| e.at("name"))?;
    match resource.spec {
        Some(Spec::FirewallPolicy(spec)) => {
            Ok((name, FirewallPolicy::try_from(spec).map_err(|e| e.at("spec"))?))
        }
        _ => Err(Invalid::new("missing, or of a kind this agent does not know").at("spec")),
    }
}

fn no_name_twice(update: &Update) -> Result<(), Refusal> {
    let mut seen = BTreeSet::new();
    let upserts = update.upserts.iter().map(|resource| &resource.name);
    match upserts.chain(&update.removals).find(|name| !seen.insert(*name)) {
        Some(name) => Err(Refusal::Twice(name.clone())),
        None => Ok(()),
    }
}

/// Of at most the length of a digest: the bytes come from outside.
fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    for byte in bytes.iter().take(Digest::BYTES) {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests;
