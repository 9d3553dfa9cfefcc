//! The resources of this VM as the core last sent them, and the rules by which an update becomes the next set.
//!
//! Pure: nothing here touches disk, kernel or network.

mod key;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use cnsmo_proto::{
    digest::Digest,
    model::{
        Backend, FirewallPolicy, Instance, Invalid, LoadBalancer, Member, Name, Network, Peer, Rule,
    },
    pb::agent::{Resource, ResourceError, TypeState, Update, resource, update::Kind},
};

pub use self::key::Key;
use crate::ledger::Record;

/// The resource type of [`DesiredSet`].
pub const RESOURCE_TYPE: &str = "cnsmo.agent.v1.Resource";
/// Resources on one VM, those refused included: four times the members of the largest sensible network. An update beyond
/// it is refused as a whole.
pub const RESOURCES_MAX: usize = 65_536;

/// What one VM runs, and what it was sent but cannot run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DesiredSet {
    store_epoch: u64,
    revision: i64,
    running: BTreeMap<Key, Running>,
    /// Latest version sent, where it is refused. An older one may still be running under the same name.
    rejected: BTreeMap<String, Rejected>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Running {
    version: i64,
    spec: Arc<Spec>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Spec {
    FirewallPolicy(FirewallPolicy),
    Network(Network),
    Member(Member),
    LoadBalancer(LoadBalancer),
    Backend(Backend),
    Instance(Box<Instance>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rejected {
    version: i64,
    message: String,
}

/// What makes one set out of another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    upserts: BTreeMap<Key, i64>,
    removals: BTreeSet<Key>,
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
    /// More than [`RESOURCES_MAX`].
    #[error("{0} resources; at most {RESOURCES_MAX} are allowed")]
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
    set: DesiredSet,
    /// What the update has changed: what may be refused without touching what was there.
    changed: BTreeSet<Key>,
}

impl DesiredSet {
    /// The set that `update` leads to. Resources that are not valid are rejected alone: the version that runs stays,
    /// and so does everything else.
    ///
    /// # Errors
    /// The update as a whole cannot be used; `self` stays right.
    pub fn stage(&self, store_epoch: u64, update: Update) -> Result<Staged, Refusal> {
        if update.r#type != RESOURCE_TYPE {
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
        let resources = staged.set.sent().count();
        if resources > RESOURCES_MAX {
            return Err(Refusal::TooMany(resources));
        }
        let have = staged.set.sent_digest();
        let meant = |digest: Digest| digest.as_bytes() == update.digest.as_slice();
        // A core that was told of a rejection may count what runs in place of what it sent.
        if !meant(have) && !meant(staged.set.acknowledged_digest(self)) {
            return Err(Refusal::OtherDigest { have, update: hex(&update.digest) });
        }
        Ok(staged)
    }

    /// Revision and digest of what runs: neither rejected versions nor what is `blocked` are in the digest.
    pub fn running_state(&self, blocked: &BTreeMap<Key, String>) -> TypeState {
        let running = self.running.iter().filter(|(key, _)| !blocked.contains_key(key));
        let digest = digest_of(running.map(|(key, r)| (key.to_string(), r.version)));
        TypeState { revision: self.revision, digest: digest.to_vec() }
    }

    /// Every version that does not run, with the reason.
    pub fn errors(&self, blocked: &BTreeMap<Key, String>) -> Vec<ResourceError> {
        let blocked = blocked.iter().filter_map(|(key, message)| {
            let (name, version) = (key.to_string(), self.running.get(key)?.version);
            Some(ResourceError { name, version, message: message.clone() })
        });
        self.rejections().into_iter().chain(blocked).collect()
    }

    /// By name.
    pub fn policies(&self) -> impl Iterator<Item = (&Name, &FirewallPolicy)> {
        self.running.iter().filter_map(|(key, r)| match (key, &*r.spec) {
            (Key::FirewallPolicy(name), Spec::FirewallPolicy(policy)) => Some((name, policy)),
            _ => None,
        })
    }

    /// By name.
    pub fn networks(&self) -> impl Iterator<Item = (&Name, &Network)> {
        self.running.iter().filter_map(|(key, r)| match (key, &*r.spec) {
            (Key::Network(name), Spec::Network(network)) => Some((name, network)),
            _ => None,
        })
    }

    /// Of all networks, by network and VM.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.running.values().filter_map(|r| match &*r.spec {
            Spec::Member(member) => Some(member),
            _ => None,
        })
    }

    /// The record of a VM in a network.
    pub fn member(&self, network: &Name, node: &Name) -> Option<&Member> {
        match &*self.running.get(&Key::Member(network.clone(), node.clone()))?.spec {
            Spec::Member(member) => Some(member),
            _ => None,
        }
    }

    /// By name.
    pub fn balancers(&self) -> impl Iterator<Item = (&Name, &LoadBalancer)> {
        self.running.iter().filter_map(|(key, r)| match (key, &*r.spec) {
            (Key::LoadBalancer(name), Spec::LoadBalancer(balancer)) => Some((name, balancer)),
            _ => None,
        })
    }

    /// Of all balancers, by balancer and VM.
    pub fn backends(&self) -> impl Iterator<Item = &Backend> {
        self.running.values().filter_map(|r| match &*r.spec {
            Spec::Backend(backend) => Some(backend),
            _ => None,
        })
    }

    /// Instances of services that this VM is to run, by deployment and name.
    pub fn instances(&self) -> impl Iterator<Item = &Instance> {
        self.running.values().filter_map(|r| match &*r.spec {
            Spec::Instance(instance) => Some(&**instance),
            _ => None,
        })
    }

    /// The set that it would be with other policies. Nothing is staged.
    ///
    /// # Errors
    /// Those that are no valid policies, by name.
    pub fn with_policies(
        &self,
        upserts: Vec<Resource>,
        removals: &[String],
    ) -> Result<Self, Vec<ResourceError>> {
        let names: BTreeSet<_> = upserts.iter().map(|resource| resource.name.clone()).collect();
        let set = self.delta(upserts, removals).into_set();
        let rejected = set.rejections().into_iter().filter(|error| names.contains(&error.name));
        let rejected: Vec<_> = rejected.collect();
        if rejected.is_empty() { Ok(set) } else { Err(rejected) }
    }

    /// Takes resources out that are refused and that have no earlier version to go back to.
    /// `false`: none of them was there.
    pub fn drop_refused(&mut self, refused: &BTreeMap<Key, String>) -> bool {
        let mut any = false;
        for (key, message) in refused {
            if let Some(Running { version, .. }) = self.running.remove(key) {
                self.reject(key.to_string(), version, message.clone());
                any = true;
            }
        }
        any
    }

    /// This set with what `other` has of some resources, whatever this one has of them.
    pub fn with_those_of(&self, other: &Self, are_those: impl Fn(&Key) -> bool) -> Self {
        let mut set = self.clone();
        set.running.retain(|key, _| !are_those(key));
        let others = other.running.iter().filter(|(key, _)| are_those(key));
        set.running.extend(others.map(|(key, running)| (key.clone(), running.clone())));
        set
    }

    /// What runs here and, if at all, otherwise in `other`.
    pub fn missing_in(&self, other: &Self) -> impl Iterator<Item = &Key> {
        let is_there = |key: &Key, running: &Running| {
            other.running.get(key).is_some_and(|there| there.spec == running.spec)
        };
        self.running.iter().filter(move |(key, r)| !is_there(key, r)).map(|(key, _)| key)
    }

    /// Of the store.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// What has made this set out of `before`.
    pub fn difference(&self, before: &Self) -> Difference {
        let is_new = |key: &Key, running: &Running| {
            before.running.get(key).is_none_or(|old| old.spec != running.spec)
        };
        let upserts = self.running.iter().filter(|(key, running)| is_new(key, running));
        let removals = before.running.keys().filter(|key| !self.running.contains_key(key));
        Difference {
            upserts: upserts.map(|(key, running)| (key.clone(), running.version)).collect(),
            removals: removals.cloned().collect(),
        }
    }

    /// Whether all of `difference` is so in this set.
    pub fn has(&self, difference: &Difference) -> bool {
        let Difference { upserts, removals } = difference;
        let is_there = |(key, version): (&Key, &i64)| {
            self.running.get(key).is_some_and(|running| running.version == *version)
        };
        upserts.iter().all(is_there) && !removals.iter().any(|key| self.running.contains_key(key))
    }

    /// For the ledger.
    pub fn to_record(&self, core_addresses: Vec<String>) -> Record {
        let resource = |(key, r): (&Key, &Running)| Resource {
            name: key.to_string(),
            version: r.version,
            spec: Some((&*r.spec).into()),
        };
        Record {
            store_epoch: self.store_epoch,
            revision: self.revision,
            resources: self.running.iter().map(resource).collect(),
            rejected: self.rejections(),
            core_addresses,
            ..Record::default()
        }
    }

    /// From the ledger. A resource that this version of the agent does not take is rejected alone.
    pub fn from_record(record: Record) -> Self {
        let mut set =
            Self { store_epoch: record.store_epoch, revision: record.revision, ..Self::default() };
        for ResourceError { name, version, message } in record.rejected {
            set.reject(name, version, message);
        }
        for resource in record.resources {
            let (name, version) = (resource.name.clone(), resource.version);
            match convert(resource) {
                Ok((key, spec)) => {
                    set.running.insert(key, Running { version, spec: Arc::new(spec) });
                }
                Err(invalid) => set.reject(name, version, invalid.to_string()),
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
            if let Ok(key) = name.parse() {
                staged.set.running.remove(&key);
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
    fn sent(&self) -> impl Iterator<Item = (String, i64)> {
        let running = self.running.iter().map(|(key, r)| (key.to_string(), r.version));
        let running = running.filter(|(name, _)| !self.rejected.contains_key(name));
        running.chain(self.rejected.iter().map(|(name, r)| (name.clone(), r.version)))
    }

    fn sent_digest(&self) -> Digest {
        digest_of(self.sent())
    }

    /// Each name with the version last sent, but with what runs where `before` had rejected that version already.
    fn acknowledged_digest(&self, before: &Self) -> Digest {
        let known = |name: &str| {
            let version = |set: &Self| set.rejected.get(name).map(|rejected| rejected.version);
            version(before).is_some() && version(before) == version(self)
        };
        let running = self.running.iter().map(|(key, r)| (key.to_string(), r.version));
        let running = running.filter(|(name, _)| known(name));
        digest_of(self.sent().filter(|(name, _)| !known(name)).chain(running))
    }

    fn rejections(&self) -> Vec<ResourceError> {
        let wire = |(name, r): (&String, &Rejected)| ResourceError {
            name: name.clone(),
            version: r.version,
            message: r.message.clone(),
        };
        self.rejected.iter().map(wire).collect()
    }

    fn reject(&mut self, name: String, version: i64, message: String) {
        self.rejected.insert(name, Rejected { version, message });
    }
}

impl Staged {
    /// The set, to be tried.
    pub fn set(&self) -> &DesiredSet {
        &self.set
    }

    /// Whether the update changes anything that packets go by.
    pub fn alters(&self, before: &DesiredSet) -> bool {
        let count = |set: &DesiredSet| set.running.keys().filter(|key| !key.is_instance()).count();
        self.changed.iter().any(|key| !key.is_instance()) || count(&self.set) != count(before)
    }

    /// The set, now in force.
    pub fn into_set(self) -> DesiredSet {
        self.set
    }

    /// Goes back to the versions in `before` of each refused resource and the records derived for it, as far as the update
    /// has changed them. `false`: it has changed none of them, so the update cannot be saved.
    pub fn fall_back(&mut self, before: &DesiredSet, refused: &BTreeMap<Key, String>) -> bool {
        let mut any = false;
        for (whole, message) in refused {
            let at_fault: Vec<_> =
                self.changed.extract_if(.., |key| key.is_part_of(whole)).collect();
            for key in at_fault {
                any = true;
                if let Some(Running { version, .. }) = self.set.running.remove(&key) {
                    self.set.reject(key.to_string(), version, message.clone());
                }
                if let Some(last_good) = before.running.get(&key) {
                    self.set.running.insert(key, last_good.clone());
                }
            }
        }
        any
    }

    fn upsert(&mut self, before: &DesiredSet, resource: Resource) {
        let (name, version) = (resource.name.clone(), resource.version);
        self.set.rejected.remove(&name);
        match convert(resource) {
            Ok((key, spec)) => {
                let spec = Arc::new(spec);
                if before.running.get(&key).is_none_or(|old| old.spec != spec) {
                    self.changed.insert(key.clone());
                }
                self.set.running.insert(key, Running { version, spec });
            }
            Err(invalid) => {
                self.set.reject(name.clone(), version, invalid.to_string());
                let Ok(key) = name.parse() else { return };
                if let Some(last_good) = before.running.get(&key) {
                    self.set.running.insert(key, last_good.clone());
                }
            }
        }
    }
}

fn convert(resource: Resource) -> Result<(Key, Spec), Invalid> {
    use resource::Spec as Wire;
    let key: Key = resource.name.parse().map_err(|e: Invalid| e.at("name"))?;
    let wire = resource.spec.ok_or_else(|| Invalid::new("missing").at("spec"))?;
    let spec = match (&key, wire) {
        (Key::FirewallPolicy(_), Wire::FirewallPolicy(spec)) => {
            FirewallPolicy::try_from(spec).and_then(resolved).map(Spec::FirewallPolicy)
        }
        (Key::Network(_), Wire::Network(spec)) => Network::try_from(spec).map(Spec::Network),
        (Key::LoadBalancer(_), Wire::LoadBalancer(spec)) => {
            LoadBalancer::try_from(spec).map(Spec::LoadBalancer)
        }
        (Key::Member(network, node), Wire::Member(spec)) => Member::try_from(spec)
            .and_then(|member| named(&member.network, network, "network").map(|()| member))
            .and_then(|member| named(&member.node, node, "node").map(|()| member))
            .map(Spec::Member),
        (Key::Backend(balancer, node, instance), Wire::Backend(spec)) => Backend::try_from(spec)
            .and_then(|b| named(&b.load_balancer, balancer, "loadBalancer").map(|()| b))
            .and_then(|backend| named(&backend.node, node, "node").map(|()| backend))
            .and_then(|backend| match backend.instance == *instance {
                true => Ok(backend),
                false => Err(Invalid::new("is not the one in the name").at("instance")),
            })
            .map(Spec::Backend),
        (Key::Instance(deployment, name), Wire::Instance(spec)) => Instance::try_from(*spec)
            .and_then(|one| named(&one.deployment, deployment, "deployment").map(|()| one))
            .and_then(|one| named(&one.name, name, "name").map(|()| one))
            .map(|instance| Spec::Instance(Box::new(instance))),
        _ => Err(Invalid::new("is not of the kind that the name says")),
    };
    Ok((key, spec.map_err(|e| e.at("spec"))?))
}

/// A peer would match any address here.
fn resolved(policy: FirewallPolicy) -> Result<FirewallPolicy, Invalid> {
    let is_open = |rule: &Rule| !matches!(rule.peer, None | Some(Peer::Nobody));
    let Some(n) = policy.rules.iter().position(is_open) else { return Ok(policy) };
    let side = policy.rules[n].direction.far_side();
    let why = "the core has not resolved it to CIDRs: the conditions of the policy say why";
    Err(Invalid::new(why).at(side).at_index(n).at("rules"))
}

/// Name and content of a derived record must agree.
fn named(content: &Name, key: &Name, field: &str) -> Result<(), Invalid> {
    if content == key {
        return Ok(());
    }
    Err(Invalid::new(format!("is `{content}`, the name says `{key}`")).at(field))
}

impl From<&Spec> for resource::Spec {
    fn from(spec: &Spec) -> Self {
        match spec {
            Spec::FirewallPolicy(spec) => Self::FirewallPolicy(spec.into()),
            Spec::Network(spec) => Self::Network(spec.into()),
            Spec::Member(spec) => Self::Member(spec.into()),
            Spec::LoadBalancer(spec) => Self::LoadBalancer(spec.into()),
            Spec::Backend(spec) => Self::Backend(spec.into()),
            Spec::Instance(spec) => Self::Instance(Box::new((&**spec).into())),
        }
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

fn digest_of(set: impl Iterator<Item = (String, i64)>) -> Digest {
    let mut digest = Digest::default();
    set.for_each(|(name, version)| digest.add(&name, version));
    digest
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
