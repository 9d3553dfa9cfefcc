//! How identities come and go: join tokens, enrolment, renewal, revocation.

use std::{
    collections::BTreeSet,
    ops::Bound,
    time::{Duration, SystemTime},
};

use cnsmo_proto::{
    model::{Labels, Name},
    pb::resource::Kind as ResourceKind,
};

use super::{Announcement, NODES_MAX, Node, Plan, State, Write, created, node::rewritten};
use crate::{
    error::Error,
    identity::{Enrolled, Grants, Issued, Kind, Revoked, Role, Subject},
};

/// Join tokens that have not expired.
pub const TOKENS_MAX: usize = 10_000;
/// Names that one join token may admit.
pub const TOKEN_USES_MAX: u32 = 10_000;
/// Longest life of a join token.
pub const TOKEN_TTL_MAX: Duration = Duration::from_secs(30 * 24 * 3_600);
/// Identities: one for each node, and as many of services and operators.
pub const IDENTITIES_MAX: usize = 2 * NODES_MAX;
/// A certificate younger than this part of its life is given again: renewals without end cost no commits.
const YOUNG: u32 = 10;

/// Whom a join token admits.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenGrant {
    /// As what.
    pub role: Role,
    /// The only name; none: any.
    pub name: Option<Name>,
    /// What the identity may do beyond its role.
    pub grants: Grants,
}

impl Default for TokenGrant {
    /// Any agent.
    fn default() -> Self {
        Self { role: Role::Agent, name: None, grants: Grants::default() }
    }
}

/// What is kept of a join token. Its secret is not.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenRecord {
    /// SHA-256 of the secret.
    pub secret_sha256: [u8; 32],
    /// When it was made.
    pub create_time: SystemTime,
    /// End of its life.
    pub expire_time: SystemTime,
    /// Names that it may admit.
    pub uses_max: u32,
    /// SHA-256 of the public key info of each one that it has admitted. Each is kept under a key of its own: the next one
    /// costs as much as the first.
    pub used_by: BTreeSet<[u8; 32]>,
    /// Labels for each node that joins with it.
    pub labels: Labels,
    /// Whom it admits.
    pub grant: TokenGrant,
}

/// What is told of a join token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenSummary {
    /// Its public part.
    pub id: String,
    /// When it was made.
    pub create_time: SystemTime,
    /// End of its life.
    pub expire_time: SystemTime,
    /// Names that it may admit.
    pub uses_max: u32,
    /// How many it has admitted.
    pub uses: usize,
    /// Labels for each node that joins with it.
    pub labels: Labels,
    /// Whom it admits.
    pub grant: TokenGrant,
}

/// A request to join.
#[derive(Clone, Debug)]
pub struct Enrolment {
    /// Public part of the token.
    pub token_id: String,
    /// SHA-256 of the presented secret.
    pub secret_sha256: [u8; 32],
    /// Name of the VM, service or operator.
    pub name: Name,
    /// The agent's own labels.
    pub labels: Labels,
    /// SHA-256 of the public key info in the signing request.
    pub spki_sha256: [u8; 32],
}

/// What a request to join, which may be granted, gets.
#[derive(Clone, Debug, PartialEq)]
pub enum Admission {
    /// The certificate that it got before.
    Known(Issued),
    /// A new certificate.
    New(Subject),
}

impl State {
    /// A new join token. Tokens that have expired are removed with it, and evicted identities that no token remembers.
    pub fn plan_token(
        &self,
        id: String,
        token: TokenRecord,
        now: SystemTime,
    ) -> Result<Plan, Error> {
        let expired: Vec<_> =
            self.tokens.iter().filter(|(_, token)| token.expire_time <= now).collect();
        if self.tokens.len() - expired.len() >= TOKENS_MAX {
            return Err(Error::Exhausted(format!("{TOKENS_MAX} join tokens are alive already")));
        }
        let mut writes = Vec::new();
        for (id, token) in expired {
            writes.extend(token_removal(id, token));
        }
        let forgotten = |enrolled: &Enrolled| {
            let evicted = enrolled.revoked.filter(|revoked| !revoked.banned);
            let since = evicted.and_then(|evicted| now.duration_since(evicted.time).ok());
            since.is_some_and(|since| since > TOKEN_TTL_MAX)
        };
        let forgotten = self.identities.iter().filter(|(_, enrolled)| forgotten(enrolled));
        writes.extend(forgotten.map(|(identity, _)| Write::DeleteIdentity(identity.clone())));
        writes.push(Write::Token(id, token));
        Ok(Plan { changes: Vec::new(), writes })
    }

    /// From now on this join token admits nobody.
    pub fn plan_token_removal(&self, id: &str) -> Result<Plan, Error> {
        let Some(token) = self.tokens.get(id) else {
            return Err(Error::NotFound(format!("id: there is no join token {id}")));
        };
        Ok(Plan { changes: Vec::new(), writes: token_removal(id, token).collect() })
    }

    /// Join tokens that have not expired, by id, behind `after`.
    pub fn tokens(&self, after: &str, now: SystemTime) -> impl Iterator<Item = TokenSummary> {
        let behind = (Bound::Excluded(after), Bound::Unbounded);
        let all = self.tokens.range::<str, _>(behind);
        all.filter(move |(_, token)| token.expire_time > now).map(|(id, token)| TokenSummary {
            id: id.clone(),
            create_time: token.create_time,
            expire_time: token.expire_time,
            uses_max: token.uses_max,
            uses: token.used_by.len(),
            labels: token.labels.clone(),
            grant: token.grant.clone(),
        })
    }

    /// Whether a request to join may be granted. The same key may come again while the token lives: a lost answer locks
    /// nobody out.
    pub fn admit(&self, enrolment: &Enrolment, now: SystemTime) -> Result<Admission, Error> {
        let Enrolment { spki_sha256, .. } = enrolment;
        let (token, subject) = self.check_token(enrolment, now)?;
        let identity = subject.to_string();
        let old = self.identities.get(&identity);
        if let Some(old) = old {
            check_old(old, &subject, token, spki_sha256)?;
        }
        let standing = old.filter(|old| old.revoked.is_none());
        // What was deleted is not let in again by a used token.
        if let Some(old) = standing.filter(|_| token.used_by.contains(spki_sha256)) {
            return Ok(match &old.certificate {
                certificate if certificate.not_after > now => Admission::Known(certificate.clone()),
                _ => Admission::New(subject),
            });
        }
        if token.used_by.len() >= token.uses_max as usize {
            return Err(Error::Denied(format!(
                "the join token is used up ({} of {} uses): create another with `cnsmo token create`",
                token.used_by.len(),
                token.uses_max
            )));
        }
        let is_new_node = subject.kind == Kind::Agent && standing.is_none();
        if is_new_node && self.nodes.len() >= NODES_MAX {
            return Err(Error::Exhausted(format!("{NODES_MAX} nodes have joined already")));
        }
        if old.is_none() && self.identities.len() >= IDENTITIES_MAX {
            return Err(Error::Exhausted(format!("{IDENTITIES_MAX} identities exist already")));
        }
        Ok(Admission::New(subject))
    }

    /// Lets an identity in with `certificate`, unless it has one already: see [`Self::admit`].
    pub fn plan_enrolment(
        &self,
        enrolment: &Enrolment,
        certificate: Issued,
        now: SystemTime,
    ) -> Result<Plan, Error> {
        let Admission::New(subject) = self.admit(enrolment, now)? else {
            return Ok(Plan::default());
        };
        let (token, _) = self.check_token(enrolment, now)?;
        let enrolled = Enrolled {
            role: token.grant.role,
            spki_sha256: enrolment.spki_sha256,
            certificate,
            grants: token.grant.grants.clone(),
            revoked: None,
        };
        let mut writes = vec![Write::Identity(subject.to_string(), Box::new(enrolled))];
        if !token.used_by.contains(&enrolment.spki_sha256) {
            writes.push(Write::TokenUse(enrolment.token_id.clone(), enrolment.spki_sha256));
        }
        if subject.kind == Kind::Agent {
            writes.push(Write::Node(Box::new(self.enrolled_node(enrolment, token, now)?)));
        }
        self.finish(Plan { changes: Vec::new(), writes })
    }

    /// Gives an identity another certificate for the same key, unless the one it has is still young.
    pub fn plan_renewal(
        &self,
        identity: &str,
        spki_sha256: &[u8; 32],
        certificate: Issued,
        now: SystemTime,
    ) -> Result<Plan, Error> {
        let old = self.identities.get(identity);
        let old = old.filter(|old| old.spki_sha256 == *spki_sha256 && old.revoked.is_none());
        let Some(old) = old else {
            return Err(Error::Denied(format!("{identity}: is not known to this core any more")));
        };
        let Issued { time, not_after, .. } = old.certificate;
        let life = not_after.duration_since(time).unwrap_or_default();
        if now >= time && now < time + life / YOUNG {
            return Ok(Plan::default());
        }
        let enrolled = Box::new(Enrolled { certificate, ..old.clone() });
        let writes = vec![Write::Identity(identity.to_owned(), enrolled)];
        Ok(Plan { changes: Vec::new(), writes })
    }

    /// Takes from an identity what it may do. A node goes with its agent's: it leaves its network in the same revision.
    pub fn plan_revocation(
        &self,
        identity: &str,
        banned: bool,
        now: SystemTime,
    ) -> Result<Plan, Error> {
        let Some(old) = self.identities.get(identity) else {
            return Err(Error::NotFound(format!("{identity}: there is no such identity")));
        };
        if old.revoked.is_some_and(|revoked| revoked.banned == banned) {
            return Ok(Plan::default());
        }
        let enrolled = Enrolled { revoked: Some(Revoked { banned, time: now }), ..old.clone() };
        let mut writes = vec![Write::Identity(identity.to_owned(), Box::new(enrolled))];
        if let Some(Subject { kind: Kind::Agent, name }) = Subject::parse(identity)
            && self.nodes.contains_key(name.as_str())
        {
            writes.push(Write::Delete(ResourceKind::Node, name.to_string()));
        }
        self.finish(Plan { changes: Vec::new(), writes })
    }

    /// The identity of a node that an operator deletes: its name is free then.
    pub(super) fn plan_forgetting(&self, node: &str) -> Option<Write> {
        let identity = format!("{}/{node}", Kind::Agent.as_str());
        self.identities.contains_key(&identity).then_some(Write::DeleteIdentity(identity))
    }

    fn check_token(
        &self,
        enrolment: &Enrolment,
        now: SystemTime,
    ) -> Result<(&TokenRecord, Subject), Error> {
        let Enrolment { token_id, secret_sha256, name, .. } = enrolment;
        let known =
            self.tokens.get(token_id).filter(|token| equal(&token.secret_sha256, secret_sha256));
        let Some(token) = known else {
            return Err(Error::Denied("this core does not know the join token".into()));
        };
        if token.expire_time <= now {
            return Err(Error::Denied(
                "the join token has expired: create another with `cnsmo token create`".into(),
            ));
        }
        if let Some(bound) = token.grant.name.as_ref().filter(|bound| *bound != name) {
            return Err(Error::Denied(format!("the join token is for the name {bound}")));
        }
        let kind = token.grant.role.kind().ok_or(Error::Internal)?;
        Ok((token, Subject { kind, name: name.clone() }))
    }

    fn enrolled_node(
        &self,
        enrolment: &Enrolment,
        token: &TokenRecord,
        now: SystemTime,
    ) -> Result<Node, Error> {
        let Enrolment { name, labels, spki_sha256, .. } = enrolment;
        let both = super::node::joined(labels, &token.labels)?;
        let fresh = || Node {
            metadata: created(name.as_str(), now),
            labels: Labels::default(),
            token_labels: Labels::default(),
            labels_by_operator: false,
            spki_sha256: *spki_sha256,
            connected: false,
            draining: false,
            announcement: Announcement::default(),
            membership: None,
        };
        let old = self.nodes.get(name.as_str()).cloned().unwrap_or_else(fresh);
        let labels = if old.labels_by_operator { old.labels.clone() } else { both };
        let draining = old.draining;
        let node = rewritten(&old, labels, draining, now);
        Ok(Node { token_labels: token.labels.clone(), ..node })
    }
}

/// A token goes with its uses.
fn token_removal(id: &str, token: &TokenRecord) -> impl Iterator<Item = Write> {
    let uses = token.used_by.iter().map(|spki| Write::DeleteTokenUse(id.to_owned(), *spki));
    uses.chain([Write::DeleteToken(id.to_owned())])
}

/// Whether a name that somebody has, or had, may be given to this key by this token.
fn check_old(
    old: &Enrolled,
    subject: &Subject,
    token: &TokenRecord,
    spki_sha256: &[u8; 32],
) -> Result<(), Error> {
    match old.revoked {
        Some(Revoked { banned: true, .. }) => {
            Err(Error::Denied(format!("{subject}: is banned from joining")))
        }
        Some(Revoked { time, .. }) if token.create_time < time => Err(Error::Denied(format!(
            "{subject}: has been evicted since the join token was made: create another with `cnsmo token create`"
        ))),
        Some(_) => Ok(()),
        None if old.spki_sha256 == *spki_sha256 => Ok(()),
        None if subject.kind == Kind::Agent => Err(Error::Exists(format!(
            "Node {name}: has joined with another key: if this VM takes its place, run `cnsmo delete node {name}` first",
            name = subject.name
        ))),
        None => Err(Error::Exists(format!(
            "{subject}: has joined with another key: if this one takes its place, run `cnsmo identity revoke {subject}` first"
        ))),
    }
}

/// Compares hashes of secrets without telling by time where they differ.
fn equal(stored: &[u8; 32], presented: &[u8; 32]) -> bool {
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, b"cnsmo join token");
    ring::hmac::verify(&key, presented, ring::hmac::sign(&key, stored).as_ref()).is_ok()
}
