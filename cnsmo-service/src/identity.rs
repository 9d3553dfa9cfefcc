//! Who a service is: a key that never leaves the VM and a certificate that the core's CA issued for it.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use cnsmo_proto::{
    model::Name,
    pb::identity::{EnrollRequest, enrollment_service_client::EnrollmentServiceClient},
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
use tonic::transport::ClientTlsConfig;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::{
    channel::{self, CORE_DNS_NAME, ConnectError, CoreAddress},
    durable,
    token::Token,
};

const KEY_FILE: &str = "identity.key";
const CERTIFICATE_FILE: &str = "identity.crt";
const CA_FILE: &str = "ca.crt";
/// URI SAN of an agent's certificate, before its name.
const AGENT_ID_PREFIX: &str = "spiffe://cnsmo/agent/";
/// Certificates in a chain that is read: leaf, intermediates, root. More is not ours.
const CHAIN_MAX: usize = 8;

/// Key, certificate and CA of this service, checked against each other.
#[derive(Clone)]
pub struct Identity {
    name: Name,
    key_pem: String,
    chain_pem: String,
    trust_pem: String,
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
        let key_pem = read(&key)?.ok_or_else(|| missing(key))?;
        let trust_pem = read(&ca)?.ok_or_else(|| missing(ca))?;
        let unusable =
            |reason| IdentityError::Unusable { path: dir.join(CERTIFICATE_FILE), reason };
        let key = KeyPair::from_pem(&key_pem).map_err(|e| unusable(e.to_string()))?;
        let name = check_certificate(&chain_pem, &trust_pem, &key).map_err(unusable)?;
        Ok(Some(Self { name, key_pem, chain_pem, trust_pem }))
    }

    /// The name in the certificate.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Certificates of the CA, PEM.
    pub fn trust_bundle(&self) -> &str {
        &self.trust_pem
    }

    pub(crate) fn to_tls(&self) -> tonic::transport::Identity {
        tonic::transport::Identity::from_pem(&self.chain_pem, &self.key_pem)
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({})", self.name)
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
        node: name.to_string(),
        labels: labels.clone(),
    };
    let answer = EnrollmentServiceClient::new(channel).enroll(request).await;
    let answer = answer.map_err(refusal)?.into_inner();
    let (chain, trust) = (answer.certificate_chain, answer.trust_bundle);

    let bad = EnrollError::BadAnswer;
    let certified = check_certificate(&chain, &trust, &key).map_err(bad)?;
    if certified != *name {
        return Err(bad(format!("the certificate is for `{certified}`, not `{name}`")));
    }
    let bundle = certificates(&trust).map_err(bad)?;
    if !bundle.iter().any(|ca| pin.is(ca)) {
        return Err(bad("the trust bundle lacks the CA that the token pins".to_owned()));
    }
    for (file, content) in [(CA_FILE, &trust), (CERTIFICATE_FILE, &chain)] {
        let path = dir.join(file);
        durable::write(&path, content.as_bytes(), 0o644)
            .map_err(|source| IdentityError::File { path, source })?;
    }
    Identity::load(dir)?.ok_or_else(|| bad("the certificate was not kept".to_owned()))
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

/// Checks that the chain's leaf is for `key` and an agent, and that it leads to the bundle; returns the agent's name.
/// An expired certificate passes: the core says so when it is used, and only then is the clock in question.
fn check_certificate(chain: &str, trust: &str, key: &KeyPair) -> Result<Name, String> {
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
    let valid_from = u64::try_from(parsed.validity().not_before.timestamp()).unwrap_or(0);
    let when = UnixTime::since_unix_epoch(std::time::Duration::from_secs(valid_from));
    verifier.verify_client_cert(leaf, rest, when).map_err(|e| e.to_string())?;
    agent_name(&parsed)
}

fn agent_name(certificate: &X509Certificate<'_>) -> Result<Name, String> {
    let names = certificate.subject_alternative_name().map_err(|e| e.to_string())?;
    let uris =
        names.iter().flat_map(|san| &san.value.general_names).filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
    // A certificate of two identities is none (SPIFFE X.509-SVID, section 2).
    let uris: Vec<_> = uris.collect();
    let [uri] = uris.as_slice() else { return Err(format!("{} URI names, not one", uris.len())) };
    let name = uri
        .strip_prefix(AGENT_ID_PREFIX)
        .ok_or_else(|| format!("`{uri}` does not start with {AGENT_ID_PREFIX}"))?;
    Name::new(name).map_err(|e| e.to_string())
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
