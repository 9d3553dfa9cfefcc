//! Which client certificates a TLS handshake lets through.

use std::{sync::Arc, time::SystemTime};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    pki_types::{CertificateDer, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};

use super::{
    Peer, RENEWAL_GRACE,
    registry::{Refusal, Registry},
};

/// Takes certificates of our CA, and none: whoever comes without may enrol. One that has expired passes if all else about
/// it is right: what it opens, each request decides. One that was revoked does not.
#[derive(Debug)]
pub struct Verifier {
    inner: Arc<dyn ClientCertVerifier>,
    registry: Arc<Registry>,
}

impl Verifier {
    /// `inner` checks chain and times.
    pub fn new(inner: Arc<dyn ClientCertVerifier>, registry: Arc<Registry>) -> Self {
        Self { inner, registry }
    }

    fn verify_expired(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let (_, parsed) =
            x509_parser::parse_x509_certificate(leaf).map_err(|_| CertificateError::BadEncoding)?;
        let end = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
        if now.as_secs().saturating_sub(end) > RENEWAL_GRACE.as_secs() {
            return Err(CertificateError::Expired.into());
        }
        let then = UnixTime::since_unix_epoch(std::time::Duration::from_secs(end));
        self.inner.verify_client_cert(leaf, chain, then)
    }
}

impl ClientCertVerifier for Verifier {
    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = match self.inner.verify_client_cert(leaf, chain, now) {
            Err(Error::InvalidCertificate(
                CertificateError::Expired | CertificateError::ExpiredContext { .. },
            )) => self.verify_expired(leaf, chain, now)?,
            result => result?,
        };
        let peer =
            Peer::from_certificate(leaf).ok_or(CertificateError::ApplicationVerificationFailure)?;
        match self.registry.standing(&peer, SystemTime::now()) {
            Err(Refusal::Revoked) => Err(CertificateError::Revoked.into()),
            // Its holder is told more by the answer to its request.
            _ => Ok(verified),
        }
    }

    fn offer_client_auth(&self) -> bool {
        self.inner.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.inner.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
