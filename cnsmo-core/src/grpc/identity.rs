//! `EnrollmentService`, `JoinTokenService` and `IdentityService`.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use cnsmo_proto::{
    model::{Labels, Name},
    pb::identity::{
        CreateJoinTokenRequest, CreateJoinTokenResponse, DeleteJoinTokenRequest,
        DeleteJoinTokenResponse, EnrollRequest, EnrollResponse, Identity as IdentityMessage,
        JoinToken, ListAuditRequest, ListAuditResponse, ListIdentitiesRequest,
        ListIdentitiesResponse, ListJoinTokensRequest, ListJoinTokensResponse, RenewRequest,
        RenewResponse, Revocation, RevokeIdentityRequest, RevokeIdentityResponse,
        Role as RoleMessage, enrollment_service_server::EnrollmentService,
        identity_service_server::IdentityService, join_token_service_server::JoinTokenService,
    },
};
use cnsmo_service::token::Token;
use prost::Message as _;
use tonic::{Request, Response, Status};

use crate::{
    actor::Core,
    audit::{Audit, Note},
    error::Error,
    identity::{
        Enrolled, Grants, Issued, Role, Subject,
        ca::{Ca, SigningRequest},
        caller::{Caller, RESERVED},
    },
    state::{
        Admission, Enrolment, TOKEN_TTL_MAX, TOKEN_USES_MAX, TokenGrant, TokenRecord, TokenSummary,
    },
    store::Revision,
};

const TOKEN_TTL_DEFAULT: Duration = Duration::from_secs(3_600);
/// Attempts to enrol that may come at once: a whole fleet that starts.
const ENROLS_BURST: f64 = 1_000.0;
/// Attempts to enrol per second in the long run. A secret of 256 bits is not guessed; this bounds the work.
const ENROLS_PER_SECOND: f64 = 500.0;
/// Prefixes or subjects of one token: each is looked at in every request.
const GRANTS_MAX: usize = 16;
/// Bytes of one of them.
const GRANT_BYTES_MAX: usize = 255;

/// Tokens in one answer.
const TOKEN_PAGE_MAX: usize = 1_000;
/// A page ends with the token that reaches so many bytes: clients take 4 MiB unless told otherwise.
const TOKEN_PAGE_BYTES: usize = 2 << 20;
/// Records of the audit in one answer: some 300 kB.
const AUDIT_PAGE_MAX: usize = 1_000;

/// Makes certificates.
#[derive(Clone, Debug)]
pub struct Issuer {
    /// With this key.
    pub ca: Arc<Ca>,
    /// They live this long.
    pub life: Duration,
}

impl Issuer {
    /// Signing takes some 100 us: it is done here, and not where all others wait for it.
    fn issue(&self, subject: &Subject, csr: &SigningRequest) -> Result<Issued, Error> {
        self.ca.issue(subject, csr, SystemTime::now(), self.life).map_err(|error| {
            tracing::error!(error = &error as &dyn std::error::Error, "cannot issue");
            Error::Internal
        })
    }
}

#[derive(Debug)]
pub(super) struct Service {
    core: Core,
    issuer: Issuer,
    audit: Audit,
    rate: Mutex<TokenBucket>,
}

impl Service {
    pub(super) fn new(core: Core, issuer: Issuer, audit: Audit) -> Self {
        let rate = TokenBucket::new(ENROLS_BURST, ENROLS_PER_SECOND, Instant::now());
        Self { core, issuer, audit, rate: Mutex::new(rate) }
    }
}

#[tonic::async_trait]
impl EnrollmentService for Service {
    async fn enroll(
        &self,
        request: Request<EnrollRequest>,
    ) -> Result<Response<EnrollResponse>, Status> {
        if !self.rate.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now()) {
            return Err(Error::Exhausted("too many attempts to enrol: try again".into()).into());
        }
        let request = request.into_inner();
        let token: Token = request.token.parse().map_err(|e| invalid(format!("token: {e}")))?;
        let name = Name::new(request.name).map_err(|e| invalid(e.at("name").to_string()))?;
        let labels =
            Labels::new(request.labels).map_err(|e| invalid(e.at("labels").to_string()))?;
        let csr = SigningRequest::parse(&request.csr).map_err(|e| invalid(format!("csr: {e}")))?;
        let about = format!("{name} with token {}", token.id());
        let enrolment = Enrolment {
            token_id: token.id(),
            secret_sha256: token.secret_sha256(),
            name,
            labels,
            spki_sha256: csr.spki_sha256(),
        };
        let certificate = match self.core.admit(enrolment.clone()).await? {
            Admission::Known(certificate) => certificate,
            Admission::New(subject) => {
                let certificate = self.issuer.issue(&subject, &csr)?;
                tracing::info!(identity = %subject, token = token.id(), "enrolled");
                self.core.enrol(enrolment, subject, certificate).await?
            }
        };
        let response = EnrollResponse {
            certificate_chain: self.issuer.ca.chain_pem(&certificate),
            trust_bundle: self.issuer.ca.certificate_pem().to_owned(),
        };
        Ok(noted(response, 0, about))
    }
}

#[tonic::async_trait]
impl JoinTokenService for Service {
    async fn create_join_token(
        &self,
        request: Request<CreateJoinTokenRequest>,
    ) -> Result<Response<CreateJoinTokenResponse>, Status> {
        let request = request.into_inner();
        let ttl = match request.ttl {
            None => TOKEN_TTL_DEFAULT,
            Some(ttl) => Duration::try_from(ttl).map_err(|e| invalid(format!("ttl: {e}")))?,
        };
        let ttl = if ttl.is_zero() { TOKEN_TTL_DEFAULT } else { ttl };
        if ttl > TOKEN_TTL_MAX {
            return Err(invalid(format!(
                "ttl: {ttl:?} is above {TOKEN_TTL_MAX:?}, which is 30 days"
            )));
        }
        let uses_max = request.max_uses.max(1);
        if uses_max > TOKEN_USES_MAX {
            return Err(invalid(format!("maxUses: {uses_max} is above {TOKEN_USES_MAX}")));
        }
        let grant = grant(&request)?;
        let about = grant.role.as_str();
        let labels =
            Labels::new(request.labels).map_err(|e| invalid(e.at("labels").to_string()))?;
        if grant.role != Role::Agent && !labels.as_map().is_empty() {
            return Err(invalid("labels: only agents have labels".into()));
        }
        let token = Token::generate(self.issuer.ca.spki_sha256()).map_err(|_| Error::Internal)?;
        let create_time = SystemTime::now();
        let expire_time = create_time + ttl;
        let record = TokenRecord {
            secret_sha256: token.secret_sha256(),
            create_time,
            expire_time,
            uses_max,
            used_by: BTreeSet::new(),
            labels,
            grant,
        };
        let revision = self.core.create_token(token.id(), record).await?;
        let response = CreateJoinTokenResponse {
            token: token.to_string(),
            expire_time: Some(expire_time.into()),
            id: token.id(),
        };
        Ok(noted(response, revision, format!("token {} for {about}", token.id())))
    }

    async fn list_join_tokens(
        &self,
        request: Request<ListJoinTokensRequest>,
    ) -> Result<Response<ListJoinTokensResponse>, Status> {
        let ListJoinTokensRequest { after, page_size } = request.into_inner();
        let rows = match page_size as usize {
            0 => TOKEN_PAGE_MAX,
            rows if rows <= TOKEN_PAGE_MAX => rows,
            _ => return Err(invalid(format!("pageSize: is not within 0 and {TOKEN_PAGE_MAX}"))),
        };
        let found = self.core.tokens(after, rows + 1).await?;
        let (all, mut bytes) = (found.len(), 0);
        let mut tokens: Vec<_> = found.into_iter().map(join_token).take(rows).collect();
        // The first one always fits.
        let fit = tokens.iter().take_while(|token| {
            let fits = bytes < TOKEN_PAGE_BYTES;
            bytes += token.encoded_len();
            fits
        });
        let fit = fit.count();
        tokens.truncate(fit);
        Ok(Response::new(ListJoinTokensResponse { tokens, more: fit < all }))
    }

    async fn delete_join_token(
        &self,
        request: Request<DeleteJoinTokenRequest>,
    ) -> Result<Response<DeleteJoinTokenResponse>, Status> {
        let DeleteJoinTokenRequest { id } = request.into_inner();
        let revision = self.core.delete_token(id.clone()).await?;
        tracing::info!(token = id, revision, "join token deleted");
        Ok(noted(DeleteJoinTokenResponse { revision }, revision, format!("token {id} deleted")))
    }
}

#[tonic::async_trait]
impl IdentityService for Service {
    async fn renew(
        &self,
        request: Request<RenewRequest>,
    ) -> Result<Response<RenewResponse>, Status> {
        let peer = Caller::of(&request)?.peer().cloned();
        let peer = peer.ok_or_else(|| {
            Status::failed_precondition("only who has a certificate can renew one")
        })?;
        let csr = SigningRequest::parse(&request.into_inner().csr)
            .map_err(|e| invalid(format!("csr: {e}")))?;
        if csr.spki_sha256() != peer.spki_sha256 {
            return Err(invalid("csr: is for another key than that of the certificate".into()));
        }
        let certificate = self.issuer.issue(&peer.subject, &csr)?;
        let certificate = self.core.renew(peer, certificate).await?;
        Ok(Response::new(RenewResponse {
            certificate_chain: self.issuer.ca.chain_pem(&certificate),
            trust_bundle: self.issuer.ca.certificate_pem().to_owned(),
        }))
    }

    async fn list_identities(
        &self,
        request: Request<ListIdentitiesRequest>,
    ) -> Result<Response<ListIdentitiesResponse>, Status> {
        let role = RoleMessage::try_from(request.into_inner().role)
            .map_err(|e| invalid(format!("role: {e}")))?;
        let all = self.core.identities().await?;
        let identities = all.iter().map(|(identity, enrolled)| message(identity, enrolled));
        let wanted = |one: &IdentityMessage| role == RoleMessage::Unspecified || one.role() == role;
        Ok(Response::new(ListIdentitiesResponse {
            identities: identities.filter(wanted).collect(),
        }))
    }

    async fn revoke_identity(
        &self,
        request: Request<RevokeIdentityRequest>,
    ) -> Result<Response<RevokeIdentityResponse>, Status> {
        let request = request.into_inner();
        let banned = match Revocation::try_from(request.revocation) {
            Ok(Revocation::Unspecified | Revocation::Evict) => false,
            Ok(Revocation::Ban) => true,
            Err(unknown) => return Err(invalid(format!("revocation: {unknown}"))),
        };
        let Some(subject) = Subject::parse(&request.identity) else {
            let why = "identity: is not of the form agent/NAME, service/NAME or operator/NAME";
            return Err(invalid(why.into()));
        };
        let revision = self.core.revoke(subject.to_string(), banned).await?;
        tracing::info!(identity = %subject, banned, revision, "revoked");
        let word = if banned { "banned" } else { "evicted" };
        Ok(noted(RevokeIdentityResponse { revision }, revision, format!("{subject} {word}")))
    }

    async fn list_audit(
        &self,
        request: Request<ListAuditRequest>,
    ) -> Result<Response<ListAuditResponse>, Status> {
        let ListAuditRequest { after, page_size } = request.into_inner();
        if after < 0 {
            return Err(invalid("after: is negative".into()));
        }
        let rows = match usize::try_from(page_size) {
            Ok(0) => AUDIT_PAGE_MAX,
            Ok(rows) if rows <= AUDIT_PAGE_MAX => rows,
            _ => return Err(invalid(format!("pageSize: is not within 0 and {AUDIT_PAGE_MAX}"))),
        };
        let mut records = self.audit.list(after, rows + 1).await?;
        let more = records.len() > rows;
        records.truncate(rows);
        Ok(Response::new(ListAuditResponse { records, more }))
    }
}

/// An answer, and what the audit should know of it.
fn noted<T>(response: T, revision: Revision, detail: String) -> Response<T> {
    let mut response = Response::new(response);
    response.extensions_mut().insert(Note { revision, detail });
    response
}

fn invalid(text: String) -> Status {
    Error::Invalid(text).into()
}

fn message(identity: &str, enrolled: &Enrolled) -> IdentityMessage {
    let revocation = match enrolled.revoked {
        None => Revocation::Unspecified,
        Some(revoked) if revoked.banned => Revocation::Ban,
        Some(_) => Revocation::Evict,
    };
    IdentityMessage {
        identity: identity.to_owned(),
        role: RoleMessage::from(enrolled.role).into(),
        spki_sha256: enrolled.spki_sha256.to_vec(),
        expire_time: Some(enrolled.certificate.not_after.into()),
        revocation: revocation.into(),
        state_prefixes: enrolled.grants.state_prefixes.clone(),
        subjects: enrolled.grants.subjects.clone(),
    }
}

/// Nothing in it leads to the secret.
fn join_token(token: TokenSummary) -> JoinToken {
    let TokenGrant { role, name, grants } = token.grant;
    JoinToken {
        id: token.id,
        create_time: Some(token.create_time.into()),
        expire_time: Some(token.expire_time.into()),
        max_uses: token.uses_max,
        // At most TOKEN_USES_MAX.
        uses: u32::try_from(token.uses).unwrap_or(u32::MAX),
        labels: token.labels.as_map().clone(),
        role: RoleMessage::from(role).into(),
        name: name.map(|name| name.to_string()).unwrap_or_default(),
        state_prefixes: grants.state_prefixes,
        subjects: grants.subjects,
    }
}

/// Whom the token is to admit.
fn grant(request: &CreateJoinTokenRequest) -> Result<TokenGrant, Status> {
    let role = match RoleMessage::try_from(request.role) {
        Ok(RoleMessage::Unspecified) => Role::Agent,
        Ok(RoleMessage::Core) => return Err(invalid("role: cores do not join by tokens".into())),
        Ok(role) => Role::try_from(role).map_err(|e| invalid(e.at("role").to_string()))?,
        Err(unknown) => return Err(invalid(format!("role: {unknown}"))),
    };
    let name = (!request.name.is_empty()).then(|| Name::new(request.name.clone())).transpose();
    let name = name.map_err(|e| invalid(e.at("name").to_string()))?;
    let grants = Grants {
        state_prefixes: request.state_prefixes.clone(),
        subjects: request.subjects.clone(),
    };
    if grants != Grants::default() && !matches!(role, Role::Service | Role::Editor) {
        return Err(invalid("statePrefixes, subjects: only of services and editors".into()));
    }
    for (field, all) in [("statePrefixes", &grants.state_prefixes), ("subjects", &grants.subjects)]
    {
        if all.len() > GRANTS_MAX {
            let n = all.len();
            return Err(invalid(format!("{field}: {n}; at most {GRANTS_MAX} are allowed")));
        }
    }
    for (n, prefix) in grants.state_prefixes.iter().enumerate() {
        let is_bad = prefix.is_empty()
            || prefix.len() > GRANT_BYTES_MAX
            || prefix.chars().any(char::is_control);
        if is_bad || RESERVED.starts_with(prefix.as_str()) || prefix.starts_with(RESERVED) {
            return Err(invalid(format!(
                "statePrefixes[{n}]: must be 1 to {GRANT_BYTES_MAX} bytes without control characters, and not lead below {RESERVED}"
            )));
        }
    }
    for (n, pattern) in grants.subjects.iter().enumerate() {
        if !is_pattern(pattern) {
            return Err(invalid(format!(
                "subjects[{n}]: must be tokens of letters, digits, - and _ with dots between them; * stands for one token, > at the end for the rest"
            )));
        }
    }
    Ok(TokenGrant { role, name, grants })
}

fn is_pattern(pattern: &str) -> bool {
    let mut tokens = pattern.split('.').peekable();
    let mut good = pattern.len() <= GRANT_BYTES_MAX;
    while let Some(token) = tokens.next() {
        good &= match token {
            "*" => true,
            ">" => tokens.peek().is_none(),
            "" => false,
            word => word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'),
        };
    }
    good
}

/// Lets a burst through, then a steady rate.
#[derive(Debug)]
struct TokenBucket {
    burst: f64,
    per_second: f64,
    left: f64,
    at: Instant,
}

impl TokenBucket {
    fn new(burst: f64, per_second: f64, now: Instant) -> Self {
        Self { burst, per_second, left: burst, at: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        self.left = since.mul_add(self.per_second, self.left).min(self.burst);
        let some = self.left >= 1.0;
        if some {
            self.left -= 1.0;
        }
        some
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(3.0, 2.0, start);
        let after = |ms| start + Duration::from_millis(ms);
        assert_eq!([(); 4].map(|()| bucket.take(start)), [true, true, true, false]);
        assert_eq!([499, 500, 501].map(|ms| bucket.take(after(ms))), [false, true, false]);
        assert_eq!([(); 4].map(|()| bucket.take(after(1_000_000))), [true, true, true, false]);
    }
}
