//! Who calls, and what that one may do: certificates, roles, and the registry in which both are looked up.
//!
//! A certificate proves a name and a key. What they are worth is decided by the [`registry::Registry`] at each request:
//! role, revocation and the end of the newest certificate.

pub mod ca;
pub mod caller;
pub mod registry;
pub mod verifier;

use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cnsmo_proto::{
    model::{Invalid, Name},
    pb::identity as pb,
};
use prost::Message;
use ring::digest::{SHA256, digest};
use x509_parser::{extensions::GeneralName, prelude::X509Certificate};

/// How long a certificate lives, unless it is said otherwise.
pub const CERTIFICATE_LIFE: Duration = Duration::from_secs(24 * 3_600);
/// After its end a certificate still opens `Renew`, for a VM that was off over the holidays.
pub const RENEWAL_GRACE: Duration = Duration::from_secs(30 * 24 * 3_600);
/// What all URI SANs of ours begin with (SPIFFE ID, section 2).
const TRUST_DOMAIN: &str = "spiffe://cnsmo/";

/// What a caller is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Came over TLS without a certificate.
    Anonymous,
    /// The agent of a VM.
    Agent,
    /// A program that uses state, bus and catalogue.
    Service,
    /// Reads everything but secrets.
    Viewer,
    /// Also writes resources, keys and messages.
    Editor,
    /// Also decides who else may. Whoever comes over the unix socket as root or as the core's own user.
    Admin,
    /// Another core.
    Core,
}

impl Role {
    /// As in logs, errors and the audit.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Anonymous => "anonymous",
            Self::Agent => "agent",
            Self::Service => "service",
            Self::Viewer => "viewer",
            Self::Editor => "editor",
            Self::Admin => "admin",
            Self::Core => "core",
        }
    }

    /// What names of this role are names of; none: it has no certificate.
    pub fn kind(self) -> Option<Kind> {
        match self {
            Self::Anonymous => None,
            Self::Agent => Some(Kind::Agent),
            Self::Service => Some(Kind::Service),
            Self::Viewer | Self::Editor | Self::Admin => Some(Kind::Operator),
            Self::Core => Some(Kind::Core),
        }
    }
}

impl From<Role> for pb::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::Anonymous => Self::Unspecified,
            Role::Agent => Self::Agent,
            Role::Service => Self::Service,
            Role::Viewer => Self::Viewer,
            Role::Editor => Self::Editor,
            Role::Admin => Self::Admin,
            Role::Core => Self::Core,
        }
    }
}

/// [`pb::Role::Unspecified`] is none.
impl TryFrom<pb::Role> for Role {
    type Error = Invalid;

    fn try_from(role: pb::Role) -> Result<Self, Invalid> {
        Ok(match role {
            pb::Role::Unspecified => return Err(Invalid::new("missing")),
            pb::Role::Agent => Self::Agent,
            pb::Role::Service => Self::Service,
            pb::Role::Viewer => Self::Viewer,
            pb::Role::Editor => Self::Editor,
            pb::Role::Admin => Self::Admin,
            pb::Role::Core => Self::Core,
        })
    }
}

/// Kinds of names: one namespace each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// VMs.
    Agent,
    /// Programs.
    Service,
    /// People and their tools.
    Operator,
    /// Cores.
    Core,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Agent, Self::Service, Self::Operator, Self::Core];

    /// As in an identity.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Service => "service",
            Self::Operator => "operator",
            Self::Core => "core",
        }
    }
}

/// A name that a certificate can be for. Written `<kind>/<name>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Kind.
    pub kind: Kind,
    /// Name.
    pub name: Name,
}

impl Subject {
    /// Reads what [`fmt::Display`] writes.
    pub fn parse(text: &str) -> Option<Self> {
        let (kind, name) = text.split_once('/')?;
        let kind = Kind::ALL.into_iter().find(|one| one.as_str() == kind)?;
        Some(Self { kind, name: Name::new(name).ok()? })
    }

    /// The URI SAN of its certificates.
    pub fn uri(&self) -> String {
        format!("{TRUST_DOMAIN}{self}")
    }

    /// A certificate of two identities is none (SPIFFE X.509-SVID, section 2).
    fn of(certificate: &X509Certificate<'_>) -> Option<Self> {
        let names = certificate.subject_alternative_name().ok()??;
        let [GeneralName::URI(uri)] = names.value.general_names[..] else { return None };
        Self::parse(uri.strip_prefix(TRUST_DOMAIN)?)
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind.as_str(), self.name)
    }
}

/// What a client's certificate says. Whether it is true, TLS has verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Whom it is for.
    pub subject: Subject,
    /// The same as a text.
    pub identity: String,
    /// SHA-256 of the public key info.
    pub spki_sha256: [u8; 32],
}

impl Peer {
    /// None: not a certificate of an identity.
    pub fn from_certificate(der: &[u8]) -> Option<Self> {
        let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
        let subject = Subject::of(&certificate)?;
        let spki_sha256 = sha256(certificate.public_key().raw);
        Some(Self { identity: subject.to_string(), subject, spki_sha256 })
    }
}

/// What an identity may do beyond its role: key prefixes and patterns of subjects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grants {
    /// How keys begin that it may read and write.
    pub state_prefixes: Vec<String>,
    /// Patterns of subjects that it may publish to and subscribe to.
    pub subjects: Vec<String>,
}

/// Why an identity opens nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Revoked {
    /// The name may not join again.
    pub banned: bool,
    /// Tokens made before this do not let the name in again.
    pub time: SystemTime,
}

/// A certificate that was issued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// X.509, DER.
    pub der: Vec<u8>,
    /// When.
    pub time: SystemTime,
    /// Its end.
    pub not_after: SystemTime,
}

#[cfg(test)]
impl Issued {
    /// For tests of what does not look into it.
    pub(crate) fn sample() -> Self {
        let time = SystemTime::now();
        Self { der: Vec::new(), time, not_after: time + CERTIFICATE_LIFE }
    }
}

/// What is durable about an identity.
#[derive(Clone, Debug, PartialEq)]
pub struct Enrolled {
    /// What it is.
    pub role: Role,
    /// SHA-256 of the public key info.
    pub spki_sha256: [u8; 32],
    /// Its newest certificate.
    pub certificate: Issued,
    /// What it may do.
    pub grants: Grants,
    /// None: it is in force.
    pub revoked: Option<Revoked>,
}

/// Times in ms since the epoch.
#[derive(Clone, PartialEq, Message)]
struct Record {
    #[prost(enumeration = "pb::Role", tag = "1")]
    role: i32,
    #[prost(bytes = "vec", tag = "2")]
    spki_sha256: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    certificate: Vec<u8>,
    #[prost(uint64, tag = "4")]
    issued_ms: u64,
    #[prost(uint64, tag = "5")]
    not_after_ms: u64,
    #[prost(string, repeated, tag = "6")]
    state_prefixes: Vec<String>,
    #[prost(string, repeated, tag = "7")]
    subjects: Vec<String>,
    #[prost(enumeration = "pb::Revocation", tag = "8")]
    revocation: i32,
    #[prost(uint64, tag = "9")]
    revoked_ms: u64,
}

impl Enrolled {
    /// As it is kept.
    pub fn encode(&self) -> Vec<u8> {
        let revocation = match self.revoked {
            None => pb::Revocation::Unspecified,
            Some(Revoked { banned: false, .. }) => pb::Revocation::Evict,
            Some(Revoked { banned: true, .. }) => pb::Revocation::Ban,
        };
        Record {
            role: pb::Role::from(self.role).into(),
            spki_sha256: self.spki_sha256.to_vec(),
            certificate: self.certificate.der.clone(),
            issued_ms: to_ms(self.certificate.time),
            not_after_ms: to_ms(self.certificate.not_after),
            state_prefixes: self.grants.state_prefixes.clone(),
            subjects: self.grants.subjects.clone(),
            revocation: revocation.into(),
            revoked_ms: self.revoked.map_or(0, |revoked| to_ms(revoked.time)),
        }
        .encode_to_vec()
    }

    /// Reads what [`Self::encode`] gives.
    pub fn decode(bytes: &[u8]) -> Result<Self, Invalid> {
        let record = Record::decode(bytes).map_err(|e| Invalid::new(e.to_string()))?;
        let spki = record.spki_sha256.as_slice().try_into();
        let revoked = match record.revocation() {
            pb::Revocation::Unspecified => None,
            kind => Some(Revoked {
                banned: kind == pb::Revocation::Ban,
                time: from_ms(record.revoked_ms)?,
            }),
        };
        Ok(Self {
            role: Role::try_from(record.role()).map_err(|e| e.at("role"))?,
            spki_sha256: spki.map_err(|_| Invalid::new("a hash is not 32 bytes long"))?,
            certificate: Issued {
                time: from_ms(record.issued_ms)?,
                not_after: from_ms(record.not_after_ms)?,
                der: record.certificate,
            },
            grants: Grants { state_prefixes: record.state_prefixes, subjects: record.subjects },
            revoked,
        })
    }
}

/// Milliseconds since the epoch, as records keep times.
pub fn to_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The time of [`to_ms`].
pub fn from_ms(ms: u64) -> Result<SystemTime, Invalid> {
    let time = UNIX_EPOCH.checked_add(Duration::from_millis(ms));
    time.ok_or_else(|| Invalid::new("a time is too late"))
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_the_store() {
        let enrolled = Enrolled {
            role: Role::Service,
            spki_sha256: [3; 32],
            certificate: Issued {
                der: vec![1, 2],
                time: from_ms(5).unwrap(),
                not_after: from_ms(9).unwrap(),
            },
            grants: Grants { state_prefixes: vec!["a/".into()], subjects: vec!["a.>".into()] },
            revoked: Some(Revoked { banned: true, time: from_ms(7).unwrap() }),
        };
        assert_eq!(Enrolled::decode(&enrolled.encode()).unwrap(), enrolled);
        assert!(Enrolled::decode(&[]).is_err() && Enrolled::decode(&[0xff]).is_err());
    }

    #[test]
    fn subjects_are_read_as_they_are_written() {
        for text in ["agent/web-1", "operator/alice", "service/db", "core/a"] {
            assert_eq!(Subject::parse(text).unwrap().to_string(), text);
        }
        for bad in ["", "agent", "agent/", "Agent/a", "robot/a", "agent/A_", "agent/a/b"] {
            assert_eq!(Subject::parse(bad), None, "{bad}");
        }
    }
}
