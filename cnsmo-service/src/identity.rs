//! Who a service is: a key that never leaves the VM and a certificate that the core's CA issued for it.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cnsmo_proto::{
    model::Name,
    pb::identity::{
        EnrollRequest, RenewRequest, enrollment_service_client::EnrollmentServiceClient,
        identity_service_client::IdentityServiceClient,
    },
};
use rcgen::{CertificateParams, DnType, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData as _};
use ring::digest::{SHA256, digest};
use rustls::{
    CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use tonic::transport::{Channel, ClientTlsConfig};
use x509_parser::prelude::{ASN1Time, FromDer as _, GeneralName, X509Certificate};
use zeroize::Zeroizing;

use crate::{
    channel::{self, CORE_DNS_NAME, ConnectError, CoreAddress},
    durable,
    token::Token,
};

/// Certificates start this much before they are issued, for clocks that lag behind.
pub const CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);

const KEY_FILE: &str = "identity.key";
const CERTIFICATE_FILE: &str = "identity.crt";
const CA_FILE: &str = "ca.crt";
/// URI SAN of each certificate, before its kind and name.
const ID_PREFIX: &str = "spiffe://cnsmo/";
/// Certificates in a chain that is read: leaf, intermediates, root. More is not ours.
const CHAIN_MAX: usize = 8;

/// Key, certificate and CA of this service, checked against each other.
#[derive(Clone)]
pub struct Identity {
    facts: Facts,
    key_pem: Zeroizing<String>,
    chain_pem: String,
    trust_pem: String,
}

/// What a certificate says.
#[derive(Clone, Debug)]
struct Facts {
    kind: String,
    name: Name,
    not_after: SystemTime,
    life: Duration,
}

impl Identity {
    /// Reads the identity in `dir`; `None`: not enrolled yet.
    ///
    /// # Errors
    /// A file cannot be read, or the files do not belong together.
    pub fn load(dir: &Path) -> Result<Option<Self>, IdentityError> {
        // Written last: without it an enrolment is under way.
        let Some(chain_pem) = read(&dir.join(CERTIFICATE_FILE))? else { return Ok(None) };
        let missing = |path: PathBuf| IdentityError::Unusable {
            path,
            reason: "missing, although there is a certificate".to_owned(),
        };
        let (key, ca) = (dir.join(KEY_FILE), dir.join(CA_FILE));
        let key_pem = Zeroizing::new(read(&key)?.ok_or_else(|| missing(key))?);
        let trust_pem = read(&ca)?.ok_or_else(|| missing(ca))?;
        let unusable =
            |reason| IdentityError::Unusable { path: dir.join(CERTIFICATE_FILE), reason };
        let key = KeyPair::from_pem(&key_pem).map_err(|e| unusable(e.to_string()))?;
        let facts = check_certificate(&chain_pem, &trust_pem, &key).map_err(unusable)?;
        Ok(Some(Self { facts, key_pem, chain_pem, trust_pem }))
    }

    /// The name in the certificate.
    pub fn name(&self) -> &Name {
        &self.facts.name
    }

    /// What the name is one of: `agent`, `service`, `operator` or `core`.
    pub fn kind(&self) -> &str {
        &self.facts.kind
    }

    /// End of the certificate.
    pub fn not_after(&self) -> SystemTime {
        self.facts.not_after
    }

    /// From the issue of the certificate to its end.
    pub fn life(&self) -> Duration {
        self.facts.life
    }

    /// How long until the certificate should be renewed: its half-life, give or take 20 %, so that a fleet that began
    /// together does not renew together. Zero: now.
    pub fn renew_in(&self, now: SystemTime) -> Duration {
        let life = self.facts.life;
        let left = self.not_after().duration_since(now).unwrap_or_default();
        left.saturating_sub(life - life.mul_f64(renewal_point(&self.chain_pem)))
    }

    /// Certificates of the CA, PEM.
    pub fn trust_bundle(&self) -> &str {
        &self.trust_pem
    }

    pub(crate) fn to_tls(&self) -> tonic::transport::Identity {
        tonic::transport::Identity::from_pem(&self.chain_pem, self.key_pem.as_bytes())
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({}/{})", self.kind(), self.name())
    }
}

/// Gets a certificate for `name` and keeps it in `dir`.
///
/// Trusts only a core whose CA the token pins. Safe to repeat: the key is kept before it is used, and the core answers
/// the same token with the same key again.
///
/// # Errors
/// See [`EnrollError`].
pub async fn enroll(
    core: &CoreAddress,
    token: &Token,
    name: &Name,
    labels: &BTreeMap<String, String>,
    dir: &Path,
) -> Result<Identity, EnrollError> {
    let key = key_in(dir)?;
    let pin = Arc::new(PinnedCa { spki_sha256: *token.ca_spki_sha256(), provider: provider() });
    let tls = ClientTlsConfig::new().domain_name(CORE_DNS_NAME);
    let endpoint = channel::endpoint(core)
        .and_then(|endpoint| endpoint.tls_config_with_verifier(tls, pin.clone()))
        .map_err(ConnectError::new)?;
    let channel = endpoint.connect().await.map_err(ConnectError::new)?;
    let request = EnrollRequest {
        token: token.to_string(),
        csr: certificate_request(&key, name)?,
        name: name.to_string(),
        labels: labels.clone(),
    };
    let answer = EnrollmentServiceClient::new(channel).enroll(request).await;
    let answer = answer.map_err(refusal)?.into_inner();
    let (chain, trust) = (answer.certificate_chain, answer.trust_bundle);

    let bad = EnrollError::BadAnswer;
    let certified = check_certificate(&chain, &trust, &key).map_err(bad)?;
    if certified.name != *name {
        let certified = certified.name;
        return Err(bad(format!("the certificate is for `{certified}`, not `{name}`")));
    }
    let bundle = certificates(&trust).map_err(bad)?;
    if !bundle.iter().any(|ca| pin.is(ca)) {
        return Err(bad("the trust bundle lacks the CA that the token pins".to_owned()));
    }
    keep(dir, &chain, &trust)?;
    Identity::load(dir)?.ok_or_else(|| bad("the certificate was not kept".to_owned()))
}

/// An identity that is renewed in place: who clones it sees the newest certificate. One per directory.
#[derive(Clone, Debug)]
pub struct Credentials {
    dir: PathBuf,
    current: Arc<Mutex<Identity>>,
}

impl Credentials {
    /// Those in `dir`, of which `identity` was loaded.
    pub fn new(dir: &Path, identity: Identity) -> Self {
        Self { dir: dir.to_owned(), current: Arc::new(Mutex::new(identity)) }
    }

    /// With the newest certificate.
    pub fn identity(&self) -> Identity {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gets a new certificate for the same key over `channel`, which [`channel::connect`] made with these, and keeps it on
    /// disk. Streams on the channel are not touched. A certificate that has expired can still be renewed for 30 days.
    ///
    /// # Errors
    /// See [`EnrollError`].
    pub async fn renew(&self, channel: Channel) -> Result<(), EnrollError> {
        let old = self.identity();
        let key = KeyPair::from_pem(&old.key_pem)?;
        let request = RenewRequest { csr: certificate_request(&key, old.name())? };
        let answer = IdentityServiceClient::new(channel).renew(request).await;
        let answer = answer.map_err(refusal)?.into_inner();
        let bad = EnrollError::BadAnswer;
        // Only who the old bundle trusts may name a new one.
        let facts =
            check_certificate(&answer.certificate_chain, &old.trust_pem, &key).map_err(bad)?;
        if (facts.kind.as_str(), &facts.name) != (old.kind(), old.name()) {
            return Err(bad("the certificate is for another identity".to_owned()));
        }
        keep(&self.dir, &answer.certificate_chain, &answer.trust_bundle)?;
        let new = Identity::load(&self.dir)?;
        let new = new.ok_or_else(|| bad("the certificate was not kept".to_owned()))?;
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }
}

/// A file of an identity is at fault.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// It cannot be read or written.
    #[error("cannot use {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its content is of no use.
    #[error("{path}: {reason}")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// No certificate was gained.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// The core was not reached, or is not the one that the token pins.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The core refuses the token or the name; the text is the core's.
    #[error("the core refuses the enrolment: {0}")]
    Refused(String),
    /// The answer cannot be used.
    #[error("the core's answer to the enrolment cannot be used: {0}")]
    BadAnswer(String),
    /// The key cannot make a request.
    #[error("cannot make a certificate request")]
    Request(#[from] rcgen::Error),
    /// The state directory is at fault.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

impl EnrollError {
    /// Whether the same attempt may succeed later.
    pub fn is_temporary(&self) -> bool {
        matches!(self, Self::Connect(ConnectError::Unreachable(_) | ConnectError::Follower(_)))
    }
}

fn refusal(status: tonic::Status) -> EnrollError {
    use tonic::Code;
    match status.code() {
        Code::Unauthenticated
        | Code::PermissionDenied
        | Code::InvalidArgument
        | Code::AlreadyExists
        | Code::FailedPrecondition
        | Code::NotFound
        | Code::Unimplemented => EnrollError::Refused(status.message().to_owned()),
        _ => ConnectError::of_call(status).into(),
    }
}

/// The certificate last: without it there is no identity.
fn keep(dir: &Path, chain: &str, trust: &str) -> Result<(), IdentityError> {
    for (file, content) in [(CA_FILE, trust), (CERTIFICATE_FILE, chain)] {
        let path = dir.join(file);
        durable::write(&path, content.as_bytes(), 0o644)
            .map_err(|source| IdentityError::File { path, source })?;
    }
    Ok(())
}

/// The part of its life after which a certificate is renewed, 0.4 to 0.6: random between certificates, and the same for
/// one however often it is asked.
fn renewal_point(chain_pem: &str) -> f64 {
    let hash = digest(&SHA256, chain_pem.as_bytes());
    let byte = hash.as_ref().first().copied().unwrap_or_default();
    0.4 + 0.2 * f64::from(byte) / f64::from(u8::MAX)
}

fn read(path: &Path) -> Result<Option<String>, IdentityError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(IdentityError::File { path: path.to_owned(), source }),
    }
}

/// The key in `dir`, made and kept if there is none.
fn key_in(dir: &Path) -> Result<KeyPair, EnrollError> {
    let path = dir.join(KEY_FILE);
    if let Some(pem) = read(&path)? {
        return KeyPair::from_pem(&pem)
            .map_err(|e| IdentityError::Unusable { path, reason: e.to_string() }.into());
    }
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    durable::write(&path, key.serialize_pem().as_bytes(), 0o600)
        .map_err(|source| IdentityError::File { path, source })?;
    Ok(key)
}

/// PKCS#10 (RFC 2986), DER.
fn certificate_request(key: &KeyPair, name: &Name) -> Result<Vec<u8>, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name.as_str());
    Ok(params.serialize_request(key)?.der().to_vec())
}

/// Checks that the chain's leaf is for `key` and one identity, and that it leads to the bundle; returns what it says.
/// An expired certificate passes: the core says so when it is used, and only then is the clock in question.
fn check_certificate(chain: &str, trust: &str, key: &KeyPair) -> Result<Facts, String> {
    let chain = certificates(chain)?;
    let (leaf, rest) = chain.split_first().ok_or("no certificate in the chain")?;
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|e| e.to_string())?;
    if parsed.public_key().raw != key.subject_public_key_info() {
        return Err("the certificate is for another key".to_owned());
    }
    let mut roots = RootCertStore::empty();
    for ca in certificates(trust)? {
        roots.add(ca).map_err(|e| format!("a certificate of the CA: {e}"))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|e| format!("the trust bundle: {e}"))?;
    let seconds =
        |time: ASN1Time| Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or_default());
    let (begin, end) =
        (seconds(parsed.validity().not_before), seconds(parsed.validity().not_after));
    let when = UnixTime::since_unix_epoch(begin);
    verifier.verify_client_cert(leaf, rest, when).map_err(|e| e.to_string())?;
    let (kind, name) = kind_and_name(&parsed)?;
    let not_after = UNIX_EPOCH.checked_add(end).ok_or("its end is no time")?;
    Ok(Facts { kind, name, not_after, life: end.saturating_sub(begin + CLOCK_SKEW) })
}

fn kind_and_name(certificate: &X509Certificate<'_>) -> Result<(String, Name), String> {
    let names = certificate.subject_alternative_name().map_err(|e| e.to_string())?;
    let uris =
        names.iter().flat_map(|san| &san.value.general_names).filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
    // A certificate of two identities is none (SPIFFE X.509-SVID, section 2).
    let uris: Vec<_> = uris.collect();
    let [uri] = uris.as_slice() else { return Err(format!("{} URI names, not one", uris.len())) };
    let (kind, name) = uri
        .strip_prefix(ID_PREFIX)
        .and_then(|id| id.split_once('/'))
        .ok_or_else(|| format!("`{uri}` is not of the form {ID_PREFIX}KIND/NAME"))?;
    Ok((kind.to_owned(), Name::new(name).map_err(|e| e.to_string())?))
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> =
        CertificateDer::pem_slice_iter(pem.as_bytes()).take(CHAIN_MAX + 1).collect();
    let all = all.map_err(|e| format!("not PEM: {e}"))?;
    if all.len() > CHAIN_MAX {
        return Err(format!("more than {CHAIN_MAX} certificates"));
    }
    Ok(all)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Accepts a server whose chain contains the pinned CA and leads to it.
#[derive(Debug)]
struct PinnedCa {
    spki_sha256: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl PinnedCa {
    fn is(&self, certificate: &CertificateDer<'_>) -> bool {
        X509Certificate::from_der(certificate).is_ok_and(|(_, parsed)| {
            digest(&SHA256, parsed.public_key().raw).as_ref() == self.spki_sha256
        })
    }
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let pinned = intermediates.iter().take(CHAIN_MAX).find(|ca| self.is(ca));
        let ca = pinned.ok_or(CertificateError::UnknownIssuer)?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
                .build()
                .map_err(|e| rustls::Error::General(e.to_string()))?;
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
