//! The certificate authority of this core.

use std::{
    fs,
    io::{self, Write as _},
    net::IpAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use cnsmo_service::identity::CLOCK_SKEW;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PublicKeyData as _, SanType,
};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{
        CertificateDer, CertificateSigningRequestDer, PrivatePkcs8KeyDer, pem::PemObject as _,
    },
    server::WebPkiClientVerifier,
};

use uuid::Uuid;

use super::{Issued, Subject, registry::Registry, sha256, verifier::Verifier};

/// Name by which agents know the server, whatever its address is.
pub const SERVER_NAME: &str = "core.cnsmo";

const DAY: Duration = Duration::from_secs(24 * 3_600);
const CA_LIFE: Duration = DAY.saturating_mul(3_653);
/// Of the core's own certificate, which is made anew at each start.
const SERVER_LIFE: Duration = DAY.saturating_mul(365);
/// Largest signing request; one with a P-256 key takes some 300 bytes.
const CSR_BYTES_MAX: usize = 16 << 10;

/// Why the CA cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file cannot be read or written.
    #[error("cannot use {}", path.display())]
    File {
        /// File.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The certificate is there and its key is not.
    #[error("{} is missing although {} exists: restore it from a backup", key.display(), certificate.display())]
    KeyMissing {
        /// Private key.
        key: PathBuf,
        /// Certificate.
        certificate: PathBuf,
    },
    /// A file does not hold what it should.
    #[error("{} is damaged", path.display())]
    Damaged {
        /// File.
        path: PathBuf,
        /// Cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A certificate cannot be made.
    #[error("cannot make a certificate")]
    Make(#[from] rcgen::Error),
    /// The TLS library does not take the certificate.
    #[error("cannot set up TLS")]
    Tls(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A signing request whose sender has proved to hold the key.
#[derive(Debug)]
pub struct SigningRequest(CertificateSigningRequestParams);

impl SigningRequest {
    /// Checks form, signature and kind of key. The error is for the sender.
    pub fn parse(der: &[u8]) -> Result<Self, String> {
        if der.len() > CSR_BYTES_MAX {
            return Err(format!("{} bytes; at most {CSR_BYTES_MAX} are allowed", der.len()));
        }
        let request =
            CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(der))
                .map_err(|e| e.to_string())?;
        if request.public_key.algorithm() != &PKCS_ECDSA_P256_SHA256 {
            return Err("the key is not of the kind ECDSA P-256".into());
        }
        Ok(Self(request))
    }

    /// SHA-256 of the public key info.
    pub fn spki_sha256(&self) -> [u8; 32] {
        sha256(&self.0.public_key.subject_public_key_info())
    }
}

/// The certificate authority.
#[derive(Debug)]
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    spki_sha256: [u8; 32],
}

impl Ca {
    /// Loads `ca.key` and `ca.crt`, or makes them if neither is there.
    pub fn open(folder: &Path) -> Result<Self, IdentityError> {
        let (key_path, path) = (folder.join("ca.key"), folder.join("ca.crt"));
        let (key_pem, pem) = (read(&key_path)?, read(&path)?);
        let key = match key_pem {
            Some(pem) => KeyPair::from_pem(&pem)
                .map_err(|e| IdentityError::Damaged { path: key_path, source: e.into() })?,
            None if pem.is_some() => {
                return Err(IdentityError::KeyMissing { key: key_path, certificate: path });
            }
            None => {
                let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
                write_atomically(&key_path, key.serialize_pem().as_bytes(), 0o600)
                    .map_err(|source| IdentityError::File { path: key_path, source })?;
                key
            }
        };
        // A crash between the two files leaves the key: its certificate is made then.
        let pem = match pem {
            Some(pem) => pem,
            None => {
                let pem = ca_params().self_signed(&key)?.pem();
                write_atomically(&path, pem.as_bytes(), 0o644)
                    .map_err(|source| IdentityError::File { path: path.clone(), source })?;
                pem
            }
        };
        let damaged = |source| IdentityError::Damaged { path: path.clone(), source };
        let certificate =
            CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| damaged(e.into()))?;
        let spki = key.subject_public_key_info();
        let (_, parsed) =
            x509_parser::parse_x509_certificate(&certificate).map_err(|e| damaged(e.into()))?;
        if parsed.public_key().raw != spki {
            return Err(damaged("its key is not the one in ca.key".into()));
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(|e| damaged(e.into()))?;
        Ok(Self { issuer, certificate, certificate_pem: pem, spki_sha256: sha256(&spki) })
    }

    /// The certificate, PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// SHA-256 of its public key info: what a join token pins.
    pub fn spki_sha256(&self) -> [u8; 32] {
        self.spki_sha256
    }

    /// A certificate for `subject`, which lives from `now` for `life`.
    pub fn issue(
        &self,
        subject: &Subject,
        request: &SigningRequest,
        now: SystemTime,
        life: Duration,
    ) -> Result<Issued, IdentityError> {
        let time = whole_seconds(now);
        let usage = ExtendedKeyUsagePurpose::ClientAuth;
        let mut params = leaf_params(subject.name.as_str(), usage, time, life);
        params.serial_number = Some(Uuid::now_v7().as_bytes().to_vec().into());
        let uri = subject.uri().as_str().try_into()?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        let leaf = params.signed_by(&request.0.public_key, &self.issuer)?;
        Ok(Issued { der: leaf.der().to_vec(), time, not_after: time + life })
    }

    /// The certificate and what leads to the CA, PEM, leaf first.
    pub fn chain_pem(&self, certificate: &Issued) -> String {
        pem("CERTIFICATE", &certificate.der) + &self.certificate_pem
    }

    /// TLS with a fresh server certificate for `addresses`, which clients may answer with a certificate of this CA that
    /// `registry` has not revoked.
    pub fn server_config(
        &self,
        addresses: &[IpAddr],
        registry: &Arc<Registry>,
    ) -> Result<ServerConfig, IdentityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let now = whole_seconds(SystemTime::now());
        let usage = ExtendedKeyUsagePurpose::ServerAuth;
        let mut params = leaf_params(SERVER_NAME, usage, now, SERVER_LIFE);
        for name in [SERVER_NAME, "localhost"] {
            params.subject_alt_names.push(SanType::DnsName(name.try_into()?));
        }
        params.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
        let leaf = params.signed_by(&key, &self.issuer)?;

        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).map_err(|e| IdentityError::Tls(e.into()))?;
        let verifier = WebPkiClientVerifier::builder(Arc::new(roots))
            .allow_unauthenticated()
            .build()
            .map_err(|e| IdentityError::Tls(e.into()))?;
        // The chain includes the CA, so that clients can pin its key.
        let chain = vec![leaf.der().clone(), self.certificate.clone()];
        let mut config = ServerConfig::builder()
            .with_client_cert_verifier(Arc::new(Verifier::new(verifier, registry.clone())))
            .with_single_cert(chain, PrivatePkcs8KeyDer::from(key.serialize_der()).into())
            .map_err(|e| IdentityError::Tls(e.into()))?;
        // A resumed session would not ask the verifier again, and agents come back after hours.
        config.send_tls13_tickets = 0;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }
}

fn ca_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name("CNSMO CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid_for(&mut params, whole_seconds(SystemTime::now()), CA_LIFE);
    params
}

fn leaf_params(
    name: &str,
    usage: ExtendedKeyUsagePurpose,
    now: SystemTime,
    life: Duration,
) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(name);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    params.use_authority_key_identifier_extension = true;
    valid_for(&mut params, now, life);
    params
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn valid_for(params: &mut CertificateParams, now: SystemTime, life: Duration) {
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = rcgen::date_time_ymd(1970, 1, 1) + now;
    // Certificates start in the past, for clocks that lag behind.
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + life;
}

/// X.509 has no smaller unit.
fn whole_seconds(time: SystemTime) -> SystemTime {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    UNIX_EPOCH + Duration::from_secs(since.as_secs())
}

/// RFC 7468.
fn pem(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.extend(line.iter().copied().map(char::from));
        pem.push('\n');
    }
    pem + &format!("-----END {label}-----\n")
}

fn read(path: &Path) -> Result<Option<String>, IdentityError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(IdentityError::File { path: path.to_owned(), source }),
    }
}

/// The file is there whole or not at all, also after a power cut.
fn write_atomically(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    // Left by a crash; its mode would be kept.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    match path.parent() {
        Some(folder) => fs::File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use proptest::prelude::*;

    use super::{super::Peer, *};

    fn request(key: &KeyPair) -> Vec<u8> {
        CertificateParams::default().serialize_request(key).unwrap().der().to_vec()
    }

    #[test]
    fn the_ca_is_made_once_and_its_key_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let first = Ca::open(folder.path()).unwrap();
        let mode = fs::metadata(folder.path().join("ca.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let again = Ca::open(folder.path()).unwrap();
        assert_eq!(first.spki_sha256(), again.spki_sha256());
        assert_eq!(first.certificate_pem(), again.certificate_pem());

        fs::remove_file(folder.path().join("ca.crt")).unwrap();
        assert_eq!(Ca::open(folder.path()).unwrap().spki_sha256(), first.spki_sha256());
        fs::remove_file(folder.path().join("ca.key")).unwrap();
        let error = Ca::open(folder.path()).unwrap_err();
        assert!(matches!(error, IdentityError::KeyMissing { .. }), "{error}");
    }

    #[test]
    fn a_key_of_another_ca_is_found_out() {
        let [a, b] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        Ca::open(a.path()).unwrap();
        Ca::open(b.path()).unwrap();
        fs::copy(b.path().join("ca.key"), a.path().join("ca.key")).unwrap();
        let error = Ca::open(a.path()).unwrap_err();
        assert!(matches!(error, IdentityError::Damaged { .. }), "{error}");
    }

    #[test]
    fn an_agents_certificate_names_the_node_whatever_the_request_says() {
        let folder = tempfile::tempdir().unwrap();
        let ca = Ca::open(folder.path()).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["core.cnsmo".to_owned()]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let csr = params.serialize_request(&key).unwrap();
        let request = SigningRequest::parse(csr.der()).unwrap();
        let subject = Subject::parse("agent/web-1").unwrap();
        let issued = ca.issue(&subject, &request, SystemTime::now(), DAY).unwrap();
        let pem = ca.chain_pem(&issued);
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        assert_eq!(*der, *issued.der);
        let peer = Peer::from_certificate(&der).unwrap();
        assert_eq!(peer.subject, subject);
        assert_eq!(peer.spki_sha256, request.spki_sha256());
        let (_, parsed) = x509_parser::parse_x509_certificate(&der).unwrap();
        assert!(!parsed.is_ca());
        assert_eq!(parsed.subject().to_string(), "CN=web-1");
        let usage = parsed.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && !usage.server_auth);
        assert_eq!(Peer::from_certificate(&ca.certificate), None);
    }

    #[test]
    fn requests_that_prove_nothing_are_refused() {
        let good = request(&KeyPair::generate().unwrap());
        SigningRequest::parse(&good).unwrap();
        let mut forged = good.clone();
        *forged.last_mut().unwrap() ^= 1;
        assert!(SigningRequest::parse(&forged).is_err());
        let other = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        assert!(SigningRequest::parse(&request(&other)).is_err());
        assert!(SigningRequest::parse(b"").is_err());
        assert!(SigningRequest::parse(&[0; CSR_BYTES_MAX + 1]).is_err());
    }
    /// A certificate, a signing request, and the CA that they belong to, made once.
    fn samples() -> &'static (Ca, Vec<u8>, Vec<u8>) {
        static SAMPLES: std::sync::OnceLock<(Ca, Vec<u8>, Vec<u8>)> = std::sync::OnceLock::new();
        SAMPLES.get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            let ca = Ca::open(folder.path()).unwrap();
            let csr = request(&KeyPair::generate().unwrap());
            let subject = Subject::parse("agent/web-1").unwrap();
            let parsed = SigningRequest::parse(&csr).unwrap();
            let issued = ca.issue(&subject, &parsed, SystemTime::now(), DAY).unwrap();
            (ca, csr, issued.der)
        })
    }

    proptest! {
        /// Whatever is done to a certificate, it is refused: its signature covers all of it.
        #[test]
        fn a_mutated_certificate_opens_nothing(at in any::<prop::sample::Index>(), with in 1..=255_u8) {
            let (ca, _, certificate) = samples();
            let mut mutated = certificate.clone();
            mutated[at.index(certificate.len())] ^= with;
            let mut roots = RootCertStore::empty();
            roots.add(ca.certificate.clone()).unwrap();
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let inner = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            let verifier = Verifier::new(inner.build().unwrap(), Arc::default());
            let verify = |der: &[u8]| {
                let now = rustls::pki_types::UnixTime::now();
                rustls::server::danger::ClientCertVerifier::verify_client_cert(
                    &verifier, &CertificateDer::from(der), &[], now,
                )
            };
            prop_assert!(verify(certificate).is_ok());
            prop_assert!(verify(&mutated).is_err());
            // No panic, and no other name.
            let peer = Peer::from_certificate(&mutated);
            prop_assert!(peer.is_none_or(|peer| peer.identity.len() <= 300));
        }

        #[test]
        fn a_mutated_request_is_refused_or_the_same_key(
            at in any::<prop::sample::Index>(), with in 1..=255_u8, cut in any::<prop::sample::Index>(),
        ) {
            let (_, csr, _) = samples();
            let key = SigningRequest::parse(csr).unwrap().spki_sha256();
            let mut mutated = csr.clone();
            mutated[at.index(csr.len())] ^= with;
            if let Ok(parsed) = SigningRequest::parse(&mutated) {
                prop_assert_eq!(parsed.spki_sha256(), key);
            }
            prop_assert!(SigningRequest::parse(&csr[..cut.index(csr.len())]).is_err());
        }

        #[test]
        fn no_bytes_make_the_parsers_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            prop_assert!(SigningRequest::parse(&bytes).is_err());
            prop_assert!(Peer::from_certificate(&bytes).is_none());
        }
    }
}
