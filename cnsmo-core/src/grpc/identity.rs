//! `EnrollmentService` and `JoinTokenService`.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use cnsmo_proto::{
    model::{Labels, Name},
    pb::identity::{
        CreateJoinTokenRequest, CreateJoinTokenResponse, EnrollRequest, EnrollResponse,
        enrollment_service_server::EnrollmentService, join_token_service_server::JoinTokenService,
    },
};
use cnsmo_service::token::Token;
use tonic::{Request, Response, Status};

use crate::{
    actor::Core,
    error::Error,
    identity::{Ca, SigningRequest},
    state::{Enrolment, TOKEN_TTL_MAX, TOKEN_USES_MAX, TokenRecord},
};

const TOKEN_TTL_DEFAULT: Duration = Duration::from_secs(3_600);
/// Attempts to enrol that may come at once: a whole fleet that starts.
const ENROLS_BURST: f64 = 1_000.0;
/// Attempts to enrol per second in the long run. A secret of 256 bits is not guessed; this bounds the work.
const ENROLS_PER_SECOND: f64 = 500.0;

#[derive(Debug)]
pub(super) struct Service {
    core: Core,
    ca: Arc<Ca>,
    rate: Mutex<TokenBucket>,
}

impl Service {
    pub(super) fn new(core: Core, ca: Arc<Ca>) -> Self {
        let rate = TokenBucket::new(ENROLS_BURST, ENROLS_PER_SECOND, Instant::now());
        Self { core, ca, rate: Mutex::new(rate) }
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
        let invalid = |text: String| Status::from(Error::Invalid(text));
        let request = request.into_inner();
        let token: Token = request.token.parse().map_err(|e| invalid(format!("token: {e}")))?;
        let node = Name::new(request.node).map_err(|e| invalid(e.at("node").to_string()))?;
        let labels =
            Labels::new(request.labels).map_err(|e| invalid(e.at("labels").to_string()))?;
        let csr = SigningRequest::parse(&request.csr).map_err(|e| invalid(format!("csr: {e}")))?;
        let enrolment = Enrolment {
            token_id: token.id(),
            secret_sha256: token.secret_sha256(),
            node: node.clone(),
            labels,
            spki_sha256: csr.spki_sha256(),
        };
        self.core.enrol(enrolment).await?;
        let certificate = self.ca.issue_agent(&node, &csr).map_err(|error| {
            tracing::error!(error = &error as &dyn std::error::Error, "cannot issue");
            Error::Internal
        })?;
        tracing::info!(%node, token = token.id(), "enrolled");
        Ok(Response::new(EnrollResponse {
            certificate_chain: certificate + self.ca.certificate_pem(),
            trust_bundle: self.ca.certificate_pem().to_owned(),
        }))
    }
}

#[tonic::async_trait]
impl JoinTokenService for Service {
    async fn create_join_token(
        &self,
        request: Request<CreateJoinTokenRequest>,
    ) -> Result<Response<CreateJoinTokenResponse>, Status> {
        let request = request.into_inner();
        let invalid = |text: String| Status::from(Error::Invalid(text));
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
        let labels =
            Labels::new(request.labels).map_err(|e| invalid(e.at("labels").to_string()))?;
        let token = Token::generate(self.ca.spki_sha256()).map_err(|_| Error::Internal)?;
        let expire_time = SystemTime::now() + ttl;
        let record = TokenRecord {
            secret_sha256: token.secret_sha256(),
            expire_time,
            uses_max,
            used_by: Vec::new(),
            labels,
        };
        self.core.create_token(token.id(), record).await?;
        Ok(Response::new(CreateJoinTokenResponse {
            token: token.to_string(),
            expire_time: Some(expire_time.into()),
        }))
    }
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
