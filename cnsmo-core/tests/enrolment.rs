//! Joining.

use cnsmo_proto::pb::resource::Kind;
use rcgen::KeyPair;
use tonic::Code;

use crate::harness::{Joined, TestCore};

#[tokio::test]
async fn a_token_joins_one_vm_and_a_lost_answer_locks_nobody_out() {
    let mut core = TestCore::start().await;
    let token = core.admin.token(1, "role=web").await;
    let [first, second] = [(); 2].map(|()| KeyPair::generate().unwrap());
    core.enrol(&token, "web-1", &first).await.unwrap();
    let node = core.admin.node("web-1").await.unwrap();
    assert_eq!(node.metadata.unwrap().labels["role"], "web");
    let again = core.enrol(&token, "web-1", &first).await.unwrap();
    let joined = Joined { certificate: again.certificate_chain, key: first.serialize_pem() };
    core.agent(&joined, None).await.unwrap();

    let error = core.enrol(&token, "web-2", &second).await.unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied);
    assert!(error.message().contains("used up"), "{}", error.message());
    core.stop().await;
}

#[tokio::test]
async fn what_proves_nothing_is_refused_with_the_reason() {
    let mut core = TestCore::start().await;
    let token = core.admin.token(5, "").await;
    let [first, second] = [(); 2].map(|()| KeyPair::generate().unwrap());
    core.enrol(&token, "web-1", &first).await.unwrap();
    let other = core.admin.token(5, "").await;
    let mut parts: Vec<&str> = token.split('.').collect();
    parts[2] = other.split('.').nth(2).unwrap();
    let wrong_secret = parts.join(".");
    let cases = [
        (token.as_str(), "web-1", &second, Code::AlreadyExists, "cnsmo delete node web-1"),
        (wrong_secret.as_str(), "web-2", &second, Code::PermissionDenied, "does not know"),
        ("cnsmo1.x", "web-2", &second, Code::InvalidArgument, "token"),
        (token.as_str(), "Web_2", &second, Code::InvalidArgument, "name"),
    ];
    for (token, node, key, code, text) in cases {
        let error = core.enrol(token, node, key).await.unwrap_err();
        assert_eq!(error.code(), code, "{}", error.message());
        assert!(error.message().contains(text), "{}", error.message());
        assert!(!error.message().contains(token), "a secret in an error");
    }
    assert_eq!(core.admin.names(Kind::Node).await, ["web-1"]);
    core.stop().await;
}

#[tokio::test]
async fn a_deleted_node_is_cut_and_its_certificate_opens_nothing() {
    let mut core = TestCore::start().await;
    let joined = core.join("web-1", "").await;
    let mut agent = core.agent(&joined, None).await.unwrap();
    core.admin.delete(Kind::Node, "web-1").await.unwrap();
    let update = agent.update().await;
    assert!(update.upserts.is_empty());
    assert_eq!(agent.ended().await.code(), Code::PermissionDenied);
    let Err(error) = core.agent(&joined, None).await else { panic!("a deleted node connected") };
    assert_eq!(error.code(), Code::PermissionDenied);

    // The name is free for another VM, and the first one's key stays out.
    let next = core.join("web-1", "").await;
    core.agent(&next, None).await.unwrap();
    let Err(error) = core.agent(&joined, None).await else { panic!("an old key connected") };
    assert_eq!(error.code(), Code::PermissionDenied);
    core.stop().await;
}

#[tokio::test]
async fn nodes_and_tokens_survive_a_restart() {
    let mut core = TestCore::start().await;
    let token = core.admin.token(2, "").await;
    let joined = core.join("a", "").await;
    let core = core.restart().await;
    core.agent(&joined, None).await.unwrap();
    core.enrol(&token, "b", &KeyPair::generate().unwrap()).await.unwrap();
    core.stop().await;
}
