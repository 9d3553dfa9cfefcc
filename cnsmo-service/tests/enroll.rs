//! Enrolment and connections against a real TLS server on loopback.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::{Arc, Mutex},
};

use cnsmo_proto::{
    model::Name,
    pb::identity::{
        EnrollRequest, EnrollResponse,
        enrollment_service_client::EnrollmentServiceClient,
        enrollment_service_server::{EnrollmentService, EnrollmentServiceServer},
    },
};
use cnsmo_service::{
    channel::{ConnectError, CoreAddress, connect},
    identity::{EnrollError, Identity, enroll},
    token::Token,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, IsCa,
    KeyPair, PublicKeyData as _, SanType,
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Request, Response, Status,
    transport::{Certificate, Identity as TlsIdentity, Server, ServerTlsConfig},
};

type Ca = CertifiedIssuer<'static, KeyPair>;

fn ca() -> Ca {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn token_of(ca: &Ca) -> Token {
    let spki = ca.key().subject_public_key_info();
    let mut pin = [0; 32];
    pin.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, &spki).as_ref());
    Token::generate(pin).unwrap()
}

/// What the core's answer is.
#[derive(Clone, Copy)]
enum Answer {
    Right,
    Lost,
    Refused,
    OtherName,
    TwoNames,
    OtherKey,
    OtherBundle,
}

struct Core {
    ca: Ca,
    answers: Mutex<Vec<Answer>>,
    seen: Arc<Mutex<Vec<EnrollRequest>>>,
}

#[tonic::async_trait]
impl EnrollmentService for Core {
    async fn enroll(
        &self,
        request: Request<EnrollRequest>,
    ) -> Result<Response<EnrollResponse>, Status> {
        let request = request.into_inner();
        let mut csr =
            CertificateSigningRequestParams::from_der(&request.csr.as_slice().into()).unwrap();
        let uri =
            |name: &str| SanType::URI(format!("spiffe://cnsmo/agent/{name}").try_into().unwrap());
        csr.params.subject_alt_names = vec![uri(&request.name)];
        self.seen.lock().unwrap().push(request);
        let mut bundle = self.ca.pem();
        let mut leaf = None;
        match self.answers.lock().unwrap().pop().unwrap_or(Answer::Right) {
            Answer::Right => {}
            Answer::Lost => return Err(Status::unavailable("lost")),
            Answer::Refused => return Err(Status::permission_denied("used up")),
            Answer::OtherName => csr.params.subject_alt_names = vec![uri("other")],
            Answer::TwoNames => csr.params.subject_alt_names.push(uri("other")),
            Answer::OtherKey => {
                let key = KeyPair::generate().unwrap();
                leaf = Some(csr.params.clone().signed_by(&key, &self.ca).unwrap().pem());
            }
            Answer::OtherBundle => bundle = ca().pem(),
        }
        let leaf = leaf.unwrap_or_else(|| csr.signed_by(&self.ca).unwrap().pem());
        Ok(Response::new(EnrollResponse { certificate_chain: leaf, trust_bundle: bundle }))
    }
}

struct Running {
    address: CoreAddress,
    token: Token,
    seen: Arc<Mutex<Vec<EnrollRequest>>>,
}

/// Answers in the order given, then rightly. `clients`: the CA whose clients it takes, besides those without certificate.
async fn serve(answers: &[Answer], dns: &str, clients: Option<&Ca>) -> Running {
    let ca = ca();
    let token = token_of(&ca);
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new([dns.to_owned()]).unwrap().signed_by(&key, &ca).unwrap();
    let chain = leaf.pem() + &ca.pem();
    let tls = ServerTlsConfig::new()
        .identity(TlsIdentity::from_pem(chain, key.serialize_pem()))
        .client_ca_root(Certificate::from_pem(clients.unwrap_or(&ca).pem()))
        .client_auth_optional(true);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let answers = Mutex::new(answers.iter().rev().copied().collect());
    let service = EnrollmentServiceServer::new(Core { ca, answers, seen: seen.clone() });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().into();
    let server = Server::builder().tls_config(tls).unwrap().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    Running { address, token, seen }
}

async fn join(core: &Running, dir: &Path) -> Result<Identity, EnrollError> {
    let labels = BTreeMap::from([("role".to_owned(), "web".to_owned())]);
    enroll(&core.address, &core.token, &Name::new("web-1").unwrap(), &labels, dir).await
}

#[tokio::test]
async fn a_vm_enrols_and_connects_with_what_it_kept() {
    let (core, dir) = (serve(&[], "core.cnsmo", None).await, tempfile::tempdir().unwrap());
    assert!(Identity::load(dir.path()).unwrap().is_none());
    join(&core, dir.path()).await.unwrap();
    let request = core.seen.lock().unwrap()[0].clone();
    assert_eq!((request.name.as_str(), request.labels["role"].as_str()), ("web-1", "web"));
    assert_eq!(request.token, core.token.to_string());

    let identity = Identity::load(dir.path()).unwrap().unwrap();
    assert_eq!(identity.name().as_str(), "web-1");
    let mode = fs::metadata(dir.path().join("identity.key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let channel = connect(&core.address, &identity).await.unwrap();
    let csr = request.csr.clone();
    EnrollmentServiceClient::new(channel).enroll(EnrollRequest { csr, ..request }).await.unwrap();
}

#[tokio::test]
async fn a_lost_answer_is_repeated_with_the_same_key() {
    let core = serve(&[Answer::Lost], "core.cnsmo", None).await;
    let dir = tempfile::tempdir().unwrap();
    assert!(join(&core, dir.path()).await.unwrap_err().is_temporary());
    assert!(Identity::load(dir.path()).unwrap().is_none());
    join(&core, dir.path()).await.unwrap();
    let seen = core.seen.lock().unwrap();
    let key = |n: usize| {
        let csr = seen[n].csr.as_slice().into();
        CertificateSigningRequestParams::from_der(&csr).unwrap().public_key
    };
    assert_eq!(key(0), key(1));
}

#[tokio::test]
async fn a_refusal_is_final_and_keeps_the_words_of_the_core() {
    let core = serve(&[Answer::Refused], "core.cnsmo", None).await;
    let dir = tempfile::tempdir().unwrap();
    let error = join(&core, dir.path()).await.unwrap_err();
    assert!(!error.is_temporary());
    assert_eq!(error.to_string(), "the core refuses the enrolment: used up");
}

#[tokio::test]
async fn a_certificate_that_is_not_ours_is_not_kept() {
    for (answer, word) in [
        (Answer::OtherName, "`other`"),
        (Answer::TwoNames, "2 URI names"),
        (Answer::OtherKey, "another key"),
        (Answer::OtherBundle, "certificate"),
    ] {
        let core = serve(&[answer], "core.cnsmo", None).await;
        let dir = tempfile::tempdir().unwrap();
        let error = join(&core, dir.path()).await.unwrap_err();
        assert!(matches!(error, EnrollError::BadAnswer(_)), "{error}");
        assert!(error.to_string().contains(word), "{error}");
        assert!(Identity::load(dir.path()).unwrap().is_none());
    }
}

#[tokio::test]
async fn only_the_pinned_ca_with_the_right_name_gets_the_token() {
    let other_pin = Running { token: token_of(&ca()), ..serve(&[], "core.cnsmo", None).await };
    for core in [other_pin, serve(&[], "other.cnsmo", None).await] {
        let dir = tempfile::tempdir().unwrap();
        let error = join(&core, dir.path()).await.unwrap_err();
        assert!(matches!(error, EnrollError::Connect(ConnectError::CoreUntrusted(_))), "{error:?}");
        assert!(core.seen.lock().unwrap().is_empty());
    }
}

#[tokio::test]
async fn connections_that_fail_say_why() {
    let (core, dir) = (serve(&[], "core.cnsmo", None).await, tempfile::tempdir().unwrap());
    let identity = join(&core, dir.path()).await.unwrap();

    let other = serve(&[], "core.cnsmo", None).await;
    let error = connect(&other.address, &identity).await.unwrap_err();
    assert!(matches!(error, ConnectError::CoreUntrusted(_)), "{error:?}");

    let closed: SocketAddr = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    let error = connect(&closed.into(), &identity).await.unwrap_err();
    assert!(matches!(error, ConnectError::Unreachable(_)), "{error:?}");
}

#[tokio::test]
async fn a_certificate_that_the_core_does_not_take_shows_at_the_first_call() {
    let (core, dir) = (serve(&[], "core.cnsmo", Some(&ca())).await, tempfile::tempdir().unwrap());
    let identity = join(&core, dir.path()).await.unwrap();
    let error = match connect(&core.address, &identity).await {
        Err(error) => error,
        Ok(channel) => {
            let mut client = EnrollmentServiceClient::new(channel);
            let call = client.enroll(EnrollRequest::default()).await;
            ConnectError::of_call(call.unwrap_err())
        }
    };
    assert!(matches!(error, ConnectError::CertificateRefused(_)), "{error:?}");
}

#[tokio::test]
async fn files_that_do_not_belong_together_are_refused_by_name() {
    let (core, dir) = (serve(&[], "core.cnsmo", None).await, tempfile::tempdir().unwrap());
    join(&core, dir.path()).await.unwrap();
    let key = dir.path().join("identity.key");
    fs::write(&key, KeyPair::generate().unwrap().serialize_pem()).unwrap();
    let error = Identity::load(dir.path()).unwrap_err().to_string();
    assert!(error.ends_with("identity.crt: the certificate is for another key"), "{error}");
    fs::remove_file(&key).unwrap();
    let error = Identity::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("identity.key: missing"), "{error}");
}
