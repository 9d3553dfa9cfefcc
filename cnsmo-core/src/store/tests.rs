use super::*;

fn put(key: &str, value: &str) -> Txn {
    Txn { ops: vec![Op::Put { key: key.into(), value: value.into() }], ..Txn::default() }
}

fn delete(key: &str) -> Op {
    Op::Delete { key: key.into() }
}

async fn open(folder: &tempfile::TempDir) -> Store {
    Store::open(&folder.path().join("state.db")).await.unwrap()
}

async fn values(store: &Store, prefix: &str) -> Vec<(String, String, i64)> {
    let text = |value| String::from_utf8(value).unwrap();
    let entries = store.range(prefix).await.unwrap();
    entries.into_iter().map(|e| (e.key, text(e.value), e.mod_rev)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_puts_get_gapless_revisions_and_survive_a_reopen() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(open(&folder).await);
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..500 {
        let store = store.clone();
        tasks.spawn(
            async move { store.commit(put(&format!("k/{:03}", n % 50), &n.to_string())).await },
        );
    }
    let mut revisions = Vec::new();
    while let Some(outcome) = tasks.join_next().await {
        let Outcome::Committed(revision) = outcome.unwrap().unwrap() else { panic!("no compare") };
        revisions.push(revision);
    }
    revisions.sort_unstable();
    assert_eq!(revisions, (1..=500).collect::<Vec<_>>());
    let before = values(&store, "k/").await;
    assert_eq!(before.len(), 50);
    Arc::into_inner(store).unwrap().close().await;

    let store = open(&folder).await;
    assert_eq!(values(&store, "k/").await, before);
    assert_eq!(store.meta().await.unwrap(), Meta { revision: 500, compacted: 0, epoch: 1 });
    assert_eq!(store.commit(put("k/new", "x")).await.unwrap(), Outcome::Committed(501));
}

#[tokio::test]
async fn a_failed_compare_changes_nothing_and_takes_no_revision() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let expect = |key: &str, mod_rev| vec![Compare { key: key.into(), mod_rev }];
    let create = Txn { compares: expect("a", 0), ..put("a", "1") };
    assert_eq!(store.commit(create.clone()).await.unwrap(), Outcome::Committed(1));
    assert_eq!(
        store.commit(create).await.unwrap(),
        Outcome::CompareFailed(Compare { key: "a".into(), mod_rev: 1 })
    );
    let two = Txn {
        compares: expect("b", 7),
        ops: vec![delete("a"), Op::Put { key: "c".into(), value: vec![] }],
    };
    assert!(matches!(store.commit(two).await.unwrap(), Outcome::CompareFailed(_)));
    assert_eq!(values(&store, "").await, [("a".into(), "1".into(), 1)]);
    let update = Txn { compares: expect("a", 1), ..put("a", "2") };
    assert_eq!(store.commit(update).await.unwrap(), Outcome::Committed(2));
    assert_eq!(store.commit(Txn::default()).await.unwrap(), Outcome::Committed(2));
}

/// All in one queue, so that they end up in few groups whose parts depend on each other.
#[tokio::test]
async fn transactions_of_one_group_see_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let absent = vec![Compare { key: "a".into(), mod_rev: 0 }];
    let (first, again, gone, back, both) = tokio::join!(
        store.commit(Txn { compares: absent.clone(), ..put("a", "1") }),
        store.commit(Txn { compares: absent.clone(), ..put("a", "2") }),
        store.commit(Txn { ops: vec![delete("a")], ..Txn::default() }),
        store.commit(Txn { compares: absent, ..put("a", "3") }),
        store
            .commit(Txn { ops: [put("b", "1").ops, vec![delete("b")]].concat(), ..Txn::default() }),
    );
    assert_eq!(first.unwrap(), Outcome::Committed(1));
    assert!(matches!(again.unwrap(), Outcome::CompareFailed(c) if c.mod_rev == 1));
    assert_eq!(gone.unwrap(), Outcome::Committed(2));
    assert_eq!(back.unwrap(), Outcome::Committed(3));
    assert_eq!(both.unwrap(), Outcome::Committed(4));
    assert_eq!(values(&store, "").await, [("a".into(), "3".into(), 3)]);
}

#[tokio::test]
async fn more_ops_than_one_statement_takes_are_one_revision() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let ops = (0..2_500).map(|n| put(&format!("k/{n:04}"), "x").ops.remove(0)).collect();
    assert_eq!(store.commit(Txn { ops, ..Txn::default() }).await.unwrap(), Outcome::Committed(1));
    assert_eq!(store.range("k/").await.unwrap().len(), 2_500);
}

#[tokio::test]
async fn a_prefix_is_taken_literally() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    for key in ["a", "a/1", "a/ö", "a0", "b%", "b_c"] {
        store.commit(put(key, key)).await.unwrap();
    }
    let keys = async |prefix| {
        let entries = store.range(prefix).await.unwrap();
        entries.into_iter().map(|e| e.key).collect::<Vec<_>>()
    };
    assert_eq!(keys("a/").await, ["a/1", "a/ö"]);
    assert_eq!(keys("a/ö").await, ["a/ö"]);
    assert_eq!(keys("b%").await, ["b%"]);
    assert_eq!(keys("").await.len(), 6);
}

#[tokio::test]
async fn a_damaged_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.db");
    std::fs::write(&path, "this is no database, but long enough to look like one".repeat(100))
        .unwrap();
    let error = Store::open(&path).await.unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error:?}");
    assert!(error.to_string().contains("state.db"), "{error}");
}

#[tokio::test]
async fn compaction_keeps_the_newest_put_of_each_key_and_all_above_the_cut() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    for n in 0..1_500 {
        store.commit(put(&format!("k/{}", n % 2), &n.to_string())).await.unwrap();
    }
    store.commit(Txn { ops: vec![delete("k/0")], ..Txn::default() }).await.unwrap();
    let before = values(&store, "").await;
    let keep = Retention { rows: 10, ..Retention::default() };
    let upto = cut(&store.readers, keep).await.unwrap().unwrap();
    assert_eq!(upto, 1_501 - 10);
    store.queue.send(Job::Compact { upto: 1_501 }).await.unwrap();
    // The writer compacts after the group that the request came in; slices end before `close` returns an answer.
    let path = folder.path().join("state.db");
    loop {
        let rows: Vec<(i64, String)> = sqlx::query_as("SELECT rev, key FROM log ORDER BY rev")
            .fetch_all(&store.readers)
            .await
            .unwrap();
        if rows.len() == 1 {
            assert_eq!(rows, [(1_500, "k/1".into())]);
            break;
        }
        tokio::task::yield_now().await;
    }
    assert_eq!(values(&store, "").await, before);
    assert_eq!(cut(&store.readers, keep).await.unwrap(), None);
    store.close().await;
    let store = Store::open(&path).await.unwrap();
    assert_eq!(store.meta().await.unwrap().compacted, 1_501);
}

#[tokio::test]
async fn a_full_disk_is_an_error_and_passes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.db");
    let store = open(&folder).await;
    store.commit(put("a", "1")).await.unwrap();
    let pages: i64 =
        sqlx::query_scalar("PRAGMA page_count").fetch_one(&store.readers).await.unwrap();
    store.close().await;

    // A database at its largest size fails with the same code as a full disk does.
    let options = SqliteConnectOptions::new().filename(&path);
    let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
    let limit = |pages: i64| sqlx::AssertSqlSafe(format!("PRAGMA max_page_count = {pages}"));
    sqlx::query(limit(pages + 16)).execute(&mut connection).await.unwrap();
    let (queue, jobs) = mpsc::channel(1);
    let task = tokio::spawn(writer::run(connection, jobs));
    let commit = async |txn| {
        let (answer, outcome) = oneshot::channel();
        queue.send(Job::Commit { txn, answer }).await.unwrap();
        outcome.await.unwrap()
    };
    let large = put("large", &"x".repeat(1 << 20));
    assert!(matches!(commit(large).await, Err(StoreError::Full)));
    assert_eq!(commit(put("a", "2")).await.unwrap(), Outcome::Committed(2));
    drop(queue);
    task.await.unwrap();
    assert_eq!(values(&open(&folder).await, "").await, [("a".into(), "2".into(), 2)]);
}
