//! All identities of the deployment in memory: looked up at each request, fed by what the store commits.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use cnsmo_proto::model::Invalid;
use tokio_util::sync::CancellationToken;

use super::{Enrolled, Grants, Peer, RENEWAL_GRACE, Role};
use crate::store::{Change, Range, Store};

/// Where identities are kept, below it `<kind>/<name>`.
pub const IDENTITIES: &str = "cnsmo/identities/";
/// How often streams whose certificate has run out are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_millis(500);
/// After the store failed, or its history no longer reached.
const FOLLOW_RETRY: Duration = Duration::from_secs(1);

/// What an identity is worth now.
#[derive(Clone, Debug)]
pub struct Standing {
    /// Its role.
    pub role: Role,
    /// What it may do.
    pub grants: Arc<Grants>,
    /// Cancelled when it is revoked, gets another key, or its newest certificate ends: whatever lives by it ends then.
    pub cut: CancellationToken,
}

/// Why a certificate opens nothing. The text is for its holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It never was, or was deleted.
    #[error("this core does not know the identity: has it been deleted? enrol it again")]
    Unknown,
    /// The name belongs to another key now.
    #[error("the identity has another key by now: enrol it again")]
    OtherKey,
    /// An operator has revoked it.
    #[error("the identity has been revoked")]
    Revoked,
    /// Its newest certificate has run out. It may renew.
    #[error("the certificate has expired: renew it")]
    Expired,
    /// It ran out so long ago that it may not renew.
    #[error("the certificate has expired for more than 30 days: enrol it again")]
    Outlived,
}

#[derive(Debug)]
struct Entry {
    role: Role,
    spki_sha256: [u8; 32],
    not_after: SystemTime,
    revoked: bool,
    grants: Arc<Grants>,
    cut: CancellationToken,
}

impl Entry {
    fn new(enrolled: &Enrolled) -> Self {
        Self {
            role: enrolled.role,
            spki_sha256: enrolled.spki_sha256,
            not_after: enrolled.certificate.not_after,
            revoked: enrolled.revoked.is_some(),
            grants: Arc::new(enrolled.grants.clone()),
            cut: CancellationToken::new(),
        }
    }

    /// What lives by the old one may live on by the new one.
    fn succeeds(&self, old: &Self) -> bool {
        let same = (self.role, self.spki_sha256) == (old.role, old.spki_sha256);
        same && self.grants == old.grants && !self.revoked && !old.cut.is_cancelled()
    }
}

/// The registry. One per core; cheap to look up.
#[derive(Debug, Default)]
pub struct Registry {
    entries: RwLock<HashMap<String, Entry>>,
}

impl Registry {
    /// Takes over one identity as it is now; none: it is gone.
    pub fn set(&self, identity: &str, enrolled: Option<&Enrolled>) {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let Some(enrolled) = enrolled else {
            if let Some(old) = entries.remove(identity) {
                old.cut.cancel();
            }
            return;
        };
        let mut new = Entry::new(enrolled);
        if let Some(old) = entries.remove(identity) {
            if new.succeeds(&old) {
                new.cut = old.cut;
            } else {
                old.cut.cancel();
            }
        }
        entries.insert(identity.to_owned(), new);
    }

    /// Forgets all other identities.
    fn keep<'a>(&self, present: impl Iterator<Item = &'a str>) {
        let present: HashSet<&str> = present.collect();
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        for (_, gone) in entries.extract_if(|identity, _| !present.contains(identity.as_str())) {
            gone.cut.cancel();
        }
    }

    /// Takes over a change of a key of the store; none: it was deleted. Keys of other things are ignored.
    fn observe(&self, key: &str, value: Option<&[u8]>) -> Result<(), Invalid> {
        let Some(identity) = key.strip_prefix(IDENTITIES) else { return Ok(()) };
        let enrolled = value.map(Enrolled::decode).transpose()?;
        self.set(identity, enrolled.as_ref());
        Ok(())
    }

    /// What the holder of a verified certificate is worth.
    pub fn standing(&self, peer: &Peer, now: SystemTime) -> Result<Standing, Refusal> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let entry = entries.get(&peer.identity).ok_or(Refusal::Unknown)?;
        if entry.spki_sha256 != peer.spki_sha256 {
            return Err(Refusal::OtherKey);
        }
        if entry.revoked {
            return Err(Refusal::Revoked);
        }
        match now.duration_since(entry.not_after) {
            Ok(late) if late > RENEWAL_GRACE => return Err(Refusal::Outlived),
            Ok(late) if !late.is_zero() => return Err(Refusal::Expired),
            _ => {}
        }
        Ok(Standing { role: entry.role, grants: entry.grants.clone(), cut: entry.cut.clone() })
    }

    /// The role of the holder of a certificate that may have expired: enough to renew it.
    pub fn renewable(&self, peer: &Peer, now: SystemTime) -> Result<Role, Refusal> {
        match self.standing(peer, now) {
            Ok(standing) => Ok(standing.role),
            Err(Refusal::Expired) => {
                let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
                entries.get(&peer.identity).map(|entry| entry.role).ok_or(Refusal::Unknown)
            }
            Err(refusal) => Err(refusal),
        }
    }

    /// Cuts what lives by certificates that have run out.
    fn sweep(&self, now: SystemTime) {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        for entry in entries.values().filter(|entry| entry.not_after < now) {
            entry.cut.cancel();
        }
    }
}

/// Keeps the registry as the store is, for a core that does not change identities itself. Runs until it is dropped.
pub async fn follow(registry: Arc<Registry>, store: Store) {
    loop {
        if let Err(error) = follow_from_now(&registry, &store).await {
            tracing::warn!(error = &*error, "cannot follow the identities");
        }
        tokio::time::sleep(FOLLOW_RETRY).await;
    }
}

async fn follow_from_now(
    registry: &Registry,
    store: &Store,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let present = store.range(Range::prefix(IDENTITIES)).await?;
    let mut commits = store.follow(present.revision);
    registry.keep(present.entries.iter().filter_map(|entry| entry.key.strip_prefix(IDENTITIES)));
    for entry in &present.entries {
        registry.observe(&entry.key, Some(&entry.value))?;
    }
    loop {
        for commit in commits.next().await? {
            for event in &commit.events {
                let value = (event.change == Change::Put).then_some(&*event.entry.value);
                registry.observe(&event.entry.key, value)?;
            }
        }
    }
}

/// Cuts streams whose certificate runs out, for ever.
pub async fn sweep(registry: Arc<Registry>) {
    let mut ticks = tokio::time::interval(SWEEP_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        registry.sweep(SystemTime::now());
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Issued, Revoked, Subject},
        *,
    };

    fn enrolled(key: u8, ends: SystemTime) -> Enrolled {
        Enrolled {
            role: Role::Agent,
            spki_sha256: [key; 32],
            certificate: Issued { der: Vec::new(), time: SystemTime::UNIX_EPOCH, not_after: ends },
            grants: Grants::default(),
            revoked: None,
        }
    }

    fn peer(key: u8) -> Peer {
        let subject = Subject::parse("agent/a").unwrap();
        Peer { identity: subject.to_string(), subject, spki_sha256: [key; 32] }
    }

    #[test]
    fn a_renewal_keeps_what_lives_and_everything_else_cuts_it() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let later = now + Duration::from_secs(60);
        let changes: [(&str, Option<Enrolled>); 3] = [
            ("deleted", None),
            ("another key", Some(enrolled(2, later))),
            (
                "revoked",
                Some(Enrolled {
                    revoked: Some(Revoked { banned: false, time: now }),
                    ..enrolled(1, later)
                }),
            ),
        ];
        for (what, change) in changes {
            let registry = Registry::default();
            let key = format!("{IDENTITIES}agent/a");
            registry.observe(&key, Some(&enrolled(1, now).encode())).unwrap();
            let cut = registry.standing(&peer(1), now).unwrap().cut;
            registry.set("agent/a", Some(&enrolled(1, later)));
            registry.sweep(now + Duration::from_secs(1));
            assert!(!cut.is_cancelled(), "{what}: a renewal cut it");
            registry.observe(&key, change.map(|one| one.encode()).as_deref()).unwrap();
            assert!(cut.is_cancelled(), "{what}: it lives on");
            assert!(registry.standing(&peer(1), now).is_err(), "{what}");
        }
    }

    #[test]
    fn an_expired_certificate_may_renew_for_thirty_days_and_lives_again() {
        let ends = SystemTime::now();
        let registry = Registry::default();
        registry.set("agent/a", Some(&enrolled(1, ends)));
        let cut = registry.standing(&peer(1), ends).unwrap().cut;
        let after = ends + Duration::from_secs(1);
        registry.sweep(after);
        assert!(cut.is_cancelled());
        assert_eq!(registry.standing(&peer(1), after).unwrap_err(), Refusal::Expired);
        assert_eq!(registry.renewable(&peer(1), after), Ok(Role::Agent));
        assert_eq!(registry.renewable(&peer(2), after), Err(Refusal::OtherKey));
        let outlived = after + RENEWAL_GRACE;
        assert_eq!(registry.renewable(&peer(1), outlived), Err(Refusal::Outlived));
        registry.set("agent/a", Some(&enrolled(1, after + Duration::from_secs(60))));
        assert!(!registry.standing(&peer(1), after).unwrap().cut.is_cancelled());
    }
}
