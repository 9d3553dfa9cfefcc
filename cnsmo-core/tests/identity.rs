//! Roles, renewal, revocation.

use std::time::Duration;

use cnsmo_core::fleet::Timing;
use cnsmo_proto::pb::{
    identity::{
        CreateJoinTokenRequest, DeleteJoinTokenRequest, ListAuditRequest, ListIdentitiesRequest,
        ListJoinTokensRequest, RenewRequest, Revocation, RevokeIdentityRequest, Role,
        identity_service_client::IdentityServiceClient,
        join_token_service_client::JoinTokenServiceClient,
    },
    resource::{
        ApplyRequest, Kind, ListRequest, WatchRequest,
        resource_service_client::ResourceServiceClient,
    },
};
use rcgen::KeyPair;
use tonic::{Code, transport::Channel};

use crate::harness::{Joined, PATIENCE, TestCore, csr, network, policy};

/// Short enough to be waited for, and long enough for a busy machine to renew in.
const LIFE: Duration = Duration::from_secs(8);

impl TestCore {
    async fn short_lived() -> Self {
        Self::start_as(tempfile::tempdir().unwrap(), Timing::default(), LIFE).await
    }

    async fn token_for(&mut self, role: Role, name: &str) -> String {
        let request = CreateJoinTokenRequest {
            role: role.into(),
            name: name.into(),
            ..CreateJoinTokenRequest::default()
        };
        self.admin.tokens.create_join_token(request).await.unwrap().into_inner().token
    }

    pub(crate) async fn join_as(&mut self, role: Role, name: &str) -> Joined {
        let token = self.token_for(role, name).await;
        let key = KeyPair::generate().unwrap();
        let answer = self.enrol(&token, name, &key).await.unwrap();
        Joined { certificate: answer.certificate_chain, key: key.serialize_pem() }
    }

    async fn channel(&self, joined: &Joined) -> Channel {
        self.tls(Some((&joined.certificate, &joined.key))).await
    }

    async fn identities(&self) -> IdentityServiceClient<Channel> {
        let socket = self.folder.path().join("core.sock");
        IdentityServiceClient::new(crate::harness::unix(&socket).await.unwrap())
    }

    async fn revoke(&self, identity: &str, revocation: Revocation) -> i64 {
        let request =
            RevokeIdentityRequest { identity: identity.into(), revocation: revocation.into() };
        let answer = self.identities().await.revoke_identity(request).await.unwrap();
        answer.into_inner().revision
    }
}

async fn renew(channel: Channel, key: &str) -> Result<String, tonic::Status> {
    let csr = csr(&KeyPair::from_pem(key).unwrap());
    let answer = IdentityServiceClient::new(channel).renew(RenewRequest { csr }).await?;
    Ok(answer.into_inner().certificate_chain)
}

#[tokio::test]
async fn each_role_may_what_the_table_says() {
    let mut core = TestCore::start().await;
    for (role, name, reads, writes, admits) in [
        (Role::Viewer, "eve", Code::Ok, Code::PermissionDenied, Code::PermissionDenied),
        (Role::Editor, "ed", Code::Ok, Code::Ok, Code::PermissionDenied),
        (Role::Admin, "ada", Code::Ok, Code::Ok, Code::Ok),
        (
            Role::Service,
            "shop",
            Code::PermissionDenied,
            Code::PermissionDenied,
            Code::PermissionDenied,
        ),
        (
            Role::Agent,
            "web-1",
            Code::PermissionDenied,
            Code::PermissionDenied,
            Code::PermissionDenied,
        ),
    ] {
        let joined = core.join_as(role, name).await;
        let channel = core.channel(&joined).await;
        let mut resources = ResourceServiceClient::new(channel.clone());
        let code =
            |result: Result<(), tonic::Status>| result.map_or_else(|e| e.code(), |()| Code::Ok);
        let list = ListRequest { kind: Kind::Node.into(), ..ListRequest::default() };
        assert_eq!(code(resources.list(list).await.map(drop)), reads, "{name} reads");
        let apply =
            ApplyRequest { resources: vec![policy(name, "", 1)], ..ApplyRequest::default() };
        assert_eq!(code(resources.apply(apply).await.map(drop)), writes, "{name} writes");
        let mut tokens = JoinTokenServiceClient::new(channel);
        let token = tokens.create_join_token(CreateJoinTokenRequest::default()).await;
        assert_eq!(code(token.map(drop)), admits, "{name} admits");
    }
    assert_eq!(core.admin.names(Kind::FirewallPolicy).await, ["ada", "ed"]);
    // Operators and services are no nodes.
    assert_eq!(core.admin.names(Kind::Node).await, ["web-1"]);

    let joined = core.join_as(Role::Viewer, "again").await;
    let Err(error) = core.agent(&joined, None).await else { panic!("an operator is an agent") };
    assert_eq!(error.code(), Code::PermissionDenied);
    core.stop().await;
}

#[tokio::test]
async fn tokens_are_listed_without_their_secrets_and_can_be_withdrawn() {
    let mut core = TestCore::start().await;
    let request = CreateJoinTokenRequest {
        max_uses: 2,
        labels: [("role".to_owned(), "web".to_owned())].into(),
        ..CreateJoinTokenRequest::default()
    };
    let made = core.admin.tokens.create_join_token(request).await.unwrap().into_inner();
    core.token_for(Role::Viewer, "alice").await;
    let key = KeyPair::generate().unwrap();
    core.enrol(&made.token, "web-1", &key).await.unwrap();

    let mut listed = Vec::new();
    let mut request = ListJoinTokensRequest { page_size: 1, ..ListJoinTokensRequest::default() };
    loop {
        let page = core.admin.tokens.list_join_tokens(request.clone()).await.unwrap().into_inner();
        assert_eq!(page.tokens.len(), 1);
        request.after.clone_from(&page.tokens[0].id);
        listed.extend(page.tokens);
        if !page.more {
            break;
        }
    }
    assert_eq!(listed.len(), 2);
    assert!(listed.is_sorted_by(|a, b| a.id < b.id));
    let one = listed.iter().find(|token| token.id == made.id).unwrap();
    assert_eq!((one.uses, one.max_uses, one.role(), &*one.name), (1, 2, Role::Agent, ""));
    assert_eq!((one.labels["role"].as_str(), one.expire_time), ("web", made.expire_time));
    let alice = listed.iter().find(|token| token.id != made.id).unwrap();
    assert_eq!((alice.role(), alice.name.as_str(), alice.uses), (Role::Viewer, "alice", 0));
    let secret = made.token.split('.').nth(2).unwrap();
    assert!(!format!("{listed:?}").contains(secret));

    let id = made.id.clone();
    let delete = DeleteJoinTokenRequest { id: id.clone() };
    let gone = core.admin.tokens.delete_join_token(delete.clone()).await.unwrap().into_inner();
    assert!(gone.revision > 0);
    let refused = core.enrol(&made.token, "web-2", &KeyPair::generate().unwrap()).await;
    assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(core.admin.names(Kind::Node).await, ["web-1"], "who has joined stays");
    let again = core.admin.tokens.delete_join_token(delete).await.unwrap_err();
    assert_eq!(again.code(), Code::NotFound);
    let audit = core.identities().await.list_audit(ListAuditRequest::default()).await.unwrap();
    let records = audit.into_inner().records;
    let detail = format!("token {id} deleted");
    assert!(records.iter().any(|r| r.detail == detail && r.revision == gone.revision));
    core.stop().await;
}

#[tokio::test]
async fn a_token_is_for_its_name_and_gives_the_same_certificate_again() {
    let mut core = TestCore::start().await;
    let token = core.token_for(Role::Viewer, "alice").await;
    let key = KeyPair::generate().unwrap();
    let error = core.enrol(&token, "bob", &key).await.unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied);
    assert!(error.message().contains("for the name alice"), "{}", error.message());
    let first = core.enrol(&token, "alice", &key).await.unwrap();
    let core = core.restart().await;
    let again = core.enrol(&token, "alice", &key).await.unwrap();
    assert_eq!(first, again);
    // Nor does a renewal replace what is young.
    let joined = Joined { certificate: first.certificate_chain, key: key.serialize_pem() };
    let renewed = renew(core.channel(&joined).await, &joined.key).await.unwrap();
    assert_eq!(renewed, joined.certificate);
    let other = core.enrol(&token, "alice", &KeyPair::generate().unwrap()).await.unwrap_err();
    assert_eq!(other.code(), Code::AlreadyExists);
    core.stop().await;
}

#[tokio::test]
async fn the_audit_has_what_was_done_and_refused_as_a_chain() {
    let mut core = TestCore::start().await;
    let joined = core.join_as(Role::Viewer, "eve").await;
    let mut eve = ResourceServiceClient::new(core.channel(&joined).await);
    let apply = || ApplyRequest { resources: vec![policy("p", "", 1)], ..ApplyRequest::default() };
    eve.apply(apply()).await.unwrap_err();
    let revision = core.admin.apply(apply().resources).await.unwrap().revision;
    // A certificate of another CA is refused in the handshake, and leaves nothing but its record.
    let stranger = TestCore::start().await.join_as(Role::Admin, "eve").await;
    let list = ListRequest { kind: Kind::Node.into(), ..ListRequest::default() };
    core.try_list(&stranger, list).await.unwrap_err();
    core.revoke("operator/eve", Revocation::Ban).await;
    let mut core = core.restart().await;
    core.token_for(Role::Agent, "").await;

    let wanted = [
        ("CreateJoinToken", "local/uid-0", "allowed", "OK"),
        ("Enroll", "anonymous", "allowed", "OK"),
        ("Apply", "operator/eve", "refused", "PERMISSION_DENIED"),
        ("Apply", "local/uid-0", "allowed", "OK"),
        ("tls", "", "refused", "UNAUTHENTICATED"),
        ("RevokeIdentity", "local/uid-0", "allowed", "OK"),
        ("CreateJoinToken", "local/uid-0", "allowed", "OK"),
    ];
    let all = async {
        loop {
            let request = ListAuditRequest::default();
            let answer = core.identities().await.list_audit(request).await.unwrap().into_inner();
            if answer.records.len() >= wanted.len() {
                return answer.records;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let records = tokio::time::timeout(PATIENCE, all).await.unwrap();
    for (n, record) in records.iter().enumerate() {
        let previous = n.checked_sub(1).map(|n| &records[n]);
        assert!(cnsmo_service::audit::follows(record, previous), "{record:?}");
    }
    // Refusals are written behind.
    let mut seen: Vec<_> = records
        .iter()
        .map(|one| {
            let rpc = one.rpc.rsplit('/').next().unwrap();
            (rpc, one.identity.as_str(), one.decision.as_str(), one.status.as_str())
        })
        .collect();
    let mut wanted = wanted.to_vec();
    seen.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(seen, wanted);
    let applied = records.iter().find(|one| one.rpc.ends_with("Apply") && one.status == "OK");
    assert_eq!(applied.unwrap().revision, revision);
    let pages = ListAuditRequest { after: 2, page_size: 2 };
    let page = core.identities().await.list_audit(pages).await.unwrap().into_inner();
    assert_eq!((page.records.as_slice(), page.more), (&records[2..4], true));
    core.stop().await;
}

#[tokio::test]
async fn bad_tokens_are_refused_with_the_field() {
    let mut core = TestCore::start().await;
    let request = CreateJoinTokenRequest::default;
    let service = || CreateJoinTokenRequest { role: Role::Service.into(), ..request() };
    let cases = [
        (CreateJoinTokenRequest { role: Role::Core.into(), ..request() }, "role"),
        (CreateJoinTokenRequest { role: 99, ..request() }, "role"),
        (CreateJoinTokenRequest { name: "A_".into(), ..request() }, "name"),
        (
            CreateJoinTokenRequest { subjects: vec!["a".into()], ..request() },
            "statePrefixes, subjects",
        ),
        (CreateJoinTokenRequest { subjects: vec!["a.>.b".into()], ..service() }, "subjects[0]"),
        (
            CreateJoinTokenRequest { state_prefixes: vec!["a".into(), "cns".into()], ..service() },
            "statePrefixes[1]",
        ),
        (
            CreateJoinTokenRequest { state_prefixes: vec!["a".into(); 17], ..service() },
            "statePrefixes",
        ),
        (
            CreateJoinTokenRequest { labels: [("a".into(), "b".into())].into(), ..service() },
            "labels",
        ),
    ];
    for (request, field) in cases {
        let error = core.admin.tokens.create_join_token(request).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{field}");
        assert!(error.message().starts_with(field), "{}", error.message());
    }
    core.stop().await;
}

#[tokio::test]
async fn a_live_stream_survives_renewal_and_ends_with_a_certificate_that_was_not_renewed() {
    let mut core = TestCore::short_lived().await;
    let joined = core.join("web-1", "").await;
    let channel = core.channel(&joined).await;
    let mut agent = core.agent_on(channel.clone()).await.unwrap();
    let bookmark = agent.update().await;
    agent.ack(&bookmark).await;

    tokio::time::sleep(LIFE / 2).await;
    let renewed = renew(channel.clone(), &joined.key).await.unwrap();
    assert_ne!(renewed, joined.certificate);
    // Past the end of the first certificate the stream lives, and its connection opens more.
    tokio::time::sleep(LIFE / 2 + Duration::from_millis(200)).await;
    core.admin.apply(vec![policy("p", "", 1)]).await.unwrap();
    let update = agent.update().await;
    assert_eq!(update.upserts.len(), 1);
    agent.ack(&update).await;

    let ended = tokio::time::timeout(PATIENCE, agent.ended()).await.unwrap();
    assert_eq!(ended.code(), Code::Unauthenticated, "{ended}");
    // Expired: it opens nothing but Renew, on a new connection too.
    let joined = Joined { certificate: renewed, ..joined };
    let Err(error) = core.agent(&joined, None).await else { panic!("an expired agent connected") };
    assert_eq!(error.code(), Code::Unauthenticated);
    assert!(error.message().contains("renew"), "{}", error.message());
    let other = KeyPair::generate().unwrap().serialize_pem();
    let error = renew(core.channel(&joined).await, &other).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "another key was certified");
    let certificate = renew(core.channel(&joined).await, &joined.key).await.unwrap();
    let joined = Joined { certificate, ..joined };
    core.agent(&joined, None).await.unwrap();
    core.stop().await;
}

#[tokio::test]
async fn revocation_cuts_streams_and_takes_the_node_out_in_one_revision() {
    let mut core = TestCore::start().await;
    core.admin.apply(vec![network("n")]).await.unwrap();
    let joined = core.join("web-1", "").await;
    let viewer = core.join_as(Role::Viewer, "eve").await;
    let mut agent = core.agent(&joined, None).await.unwrap();
    let mut resources = ResourceServiceClient::new(core.channel(&viewer).await);
    let watch = WatchRequest { kind: Kind::Network.into(), ..WatchRequest::default() };
    let mut watch = resources.watch(watch).await.unwrap().into_inner();
    watch.message().await.unwrap().unwrap();

    let revision = core.revoke("agent/web-1", Revocation::Evict).await;
    let ended = async {
        loop {
            if let Err(status) = agent.message().await {
                return status;
            }
        }
    };
    let ended = tokio::time::timeout(PATIENCE, ended).await.unwrap();
    assert_eq!(ended.code(), Code::PermissionDenied, "{ended}");
    assert!(core.admin.names(Kind::Node).await.is_empty());
    let list = ListRequest { kind: Kind::Network.into(), ..ListRequest::default() };
    let list = core.admin.resources.list(list).await.unwrap().into_inner();
    assert_eq!(list.revision, revision, "one revision");

    core.revoke("operator/eve", Revocation::Ban).await;
    let ended = async {
        loop {
            match watch.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("ended without a status"),
                Err(status) => return status,
            }
        }
    };
    let ended = tokio::time::timeout(PATIENCE, ended).await.unwrap();
    assert_eq!(ended.code(), Code::Unauthenticated, "{ended}");
    // Neither the connection that is open nor a new one is of use.
    let list = ListRequest { kind: Kind::Node.into(), ..ListRequest::default() };
    let error = resources.list(list.clone()).await.unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied);
    assert!(core.try_list(&viewer, list).await.is_err());
    let error = renew(core.channel(&joined).await, &joined.key).await.unwrap_err();
    assert!(!error.message().is_empty());
    core.stop().await;
}

#[tokio::test]
async fn who_is_evicted_may_come_again_and_who_is_banned_may_not() {
    let mut core = TestCore::start().await;
    let old = core.admin.token(5, "").await;
    let key = KeyPair::generate().unwrap();
    core.enrol(&old, "web-1", &key).await.unwrap();
    core.revoke("agent/web-1", Revocation::Evict).await;
    let core = core.restart().await;
    for key in [&key, &KeyPair::generate().unwrap()] {
        let error = core.enrol(&old, "web-1", key).await.unwrap_err();
        assert_eq!(error.code(), Code::PermissionDenied);
        assert!(error.message().contains("evicted"), "{}", error.message());
    }
    let mut core = core;
    let joined = core.join("web-1", "").await;
    core.agent(&joined, None).await.unwrap();

    core.revoke("agent/web-1", Revocation::Ban).await;
    let token = core.admin.token(1, "").await;
    let error = core.enrol(&token, "web-1", &key).await.unwrap_err();
    assert!(error.message().contains("banned"), "{}", error.message());
    let list = core.identities().await.list_identities(ListIdentitiesRequest::default()).await;
    let list = list.unwrap().into_inner().identities;
    assert_eq!((list[0].identity.as_str(), list[0].revocation()), ("agent/web-1", Revocation::Ban));
    // EVICT lifts it.
    core.revoke("agent/web-1", Revocation::Evict).await;
    core.join("web-1", "").await;
    let unknown = RevokeIdentityRequest { identity: "agent/x".into(), revocation: 0 };
    let error = core.identities().await.revoke_identity(unknown).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    core.stop().await;
}
