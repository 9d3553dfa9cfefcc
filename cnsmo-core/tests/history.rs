//! What operators have changed, and the way back.

use cnsmo_proto::pb::{
    admin::{CompactRequest, admin_service_client::AdminServiceClient},
    resource::{
        Change, Kind, ListHistoryRequest, ListHistoryResponse, RollbackRequest, RollbackResponse,
        change::Outcome,
    },
};
use tonic::{Code, Status};

use crate::harness::{Admin, TestCore, policy, unix};

async fn roll_back(
    admin: &mut Admin,
    revision: i64,
    dry_run: bool,
) -> Result<RollbackResponse, Status> {
    let request = RollbackRequest { revision, dry_run };
    admin.resources.rollback(request).await.map(tonic::Response::into_inner)
}

async fn history(admin: &mut Admin, limit: u32, before_revision: i64) -> ListHistoryResponse {
    let request = ListHistoryRequest { limit, before_revision };
    admin.resources.list_history(request).await.unwrap().into_inner()
}

fn shown(changes: &[Change]) -> Vec<(String, Outcome)> {
    changes.iter().map(|change| (change.name.clone(), change.outcome())).collect()
}

async fn port_of(admin: &mut Admin, name: &str) -> u32 {
    admin.policy(name).await.unwrap().spec.unwrap().rules[0].ports[0].first
}

#[tokio::test]
async fn a_rollback_is_one_new_revision_with_all_that_was() {
    let mut core = TestCore::start().await;
    let admin = &mut core.admin;
    let first = admin.apply(vec![policy("a", "", 80), policy("b", "", 81)]).await.unwrap().revision;
    admin.apply(vec![policy("a", "", 8080), policy("c", "", 82)]).await.unwrap();
    let before = admin.delete(Kind::FirewallPolicy, "b").await.unwrap();

    let would = roll_back(admin, first, true).await.unwrap();
    let expected = [
        ("a".to_owned(), Outcome::Updated),
        ("b".to_owned(), Outcome::Created),
        ("c".to_owned(), Outcome::Deleted),
    ];
    assert_eq!(shown(&would.changes), expected);
    assert_eq!(would.revision, before);
    assert_eq!(admin.names(Kind::FirewallPolicy).await, ["a", "c"], "a dry run changes nothing");

    let back = roll_back(admin, first, false).await.unwrap();
    assert_eq!((shown(&back.changes), back.revision), (expected.to_vec(), before + 1));
    assert_eq!(admin.names(Kind::FirewallPolicy).await, ["a", "b"]);
    assert_eq!((port_of(admin, "a").await, port_of(admin, "b").await), (80, 81));
    assert_eq!(admin.policy("a").await.unwrap().metadata.unwrap().generation, 3);

    let again = roll_back(admin, first, false).await.unwrap();
    assert_eq!((again.changes.len(), again.revision), (0, before + 1), "nothing is left to change");
    // What was rolled back is itself in the past now.
    roll_back(admin, before, false).await.unwrap();
    assert_eq!(admin.names(Kind::FirewallPolicy).await, ["a", "c"]);
    core.stop().await;
}

#[tokio::test]
async fn history_tells_who_changed_what_and_outlives_the_core() {
    let mut core = TestCore::start().await;
    let admin = &mut core.admin;
    let first = admin.apply(vec![policy("a", "", 80), policy("b", "", 80)]).await.unwrap().revision;
    admin.apply(vec![policy("a", "", 80)]).await.unwrap();
    let second = admin.delete(Kind::FirewallPolicy, "b").await.unwrap();
    let third = roll_back(admin, first, false).await.unwrap().revision;

    let told = history(admin, 0, 0).await.entries;
    let calls: Vec<_> =
        told.iter().map(|e| (e.revision, e.call.as_str(), e.to_revision, e.available)).collect();
    let expected =
        [(third, "Rollback", first, true), (second, "Delete", 0, true), (first, "Apply", 0, true)];
    assert_eq!(calls, expected, "what changed nothing is not history");
    assert!(told.iter().all(|entry| entry.by.starts_with("local/uid-") && entry.time.is_some()));
    assert_eq!(shown(&told[0].changes), [("b".to_owned(), Outcome::Created)]);
    assert_eq!(history(admin, 1, third).await.entries, told[1..2]);

    let mut core = core.restart().await;
    assert_eq!(history(&mut core.admin, 0, 0).await.entries, told);
    core.stop().await;
}

#[tokio::test]
async fn there_is_no_way_back_behind_compaction_nor_to_what_is_still_to_come() {
    let mut core = TestCore::start().await;
    let admin = &mut core.admin;
    let first = admin.apply(vec![policy("a", "", 80)]).await.unwrap().revision;
    let second = admin.apply(vec![policy("a", "", 81)]).await.unwrap().revision;
    for (revision, code) in [
        (0, Code::InvalidArgument),
        (-1, Code::InvalidArgument),
        (second + 1, Code::OutOfRange),
        (i64::MAX, Code::OutOfRange),
    ] {
        assert_eq!(roll_back(admin, revision, false).await.unwrap_err().code(), code, "{revision}");
    }
    let socket = core.folder.path().join("core.sock");
    let mut compactor = AdminServiceClient::new(unix(&socket).await.unwrap());
    compactor.compact(CompactRequest { revision: second }).await.unwrap();
    let error = roll_back(admin, first, false).await.unwrap_err();
    assert_eq!(error.code(), Code::OutOfRange);
    let available: Vec<_> =
        history(admin, 0, 0).await.entries.iter().map(|e| (e.revision, e.available)).collect();
    assert_eq!(available, [(second, true), (first, false)]);
    assert_eq!(port_of(admin, "a").await, 81, "a refused rollback changes nothing");
    let request = ListHistoryRequest { limit: 1_001, before_revision: 0 };
    let error = admin.resources.list_history(request).await.unwrap_err();
    assert_eq!(
        (error.code(), error.message()),
        (Code::InvalidArgument, "limit: 1001 is above 1000")
    );
    core.stop().await;
}
