//! What the store promises, on each engine.

mod full;
mod model;
mod statements;

use std::collections::BTreeMap;

use self::statements::every_statement_is_understood;
use super::{engine::Sql, *};

/// A database of a test's own.
struct Place {
    config: StoreConfig,
    folder: tempfile::TempDir,
}

impl Place {
    fn sqlite() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = StoreConfig::sqlite(folder.path().join("state.db"));
        Self { config, folder }
    }

    fn postgres() -> Self {
        let (_, database) = crate::store::postgres::tests::database();
        let folder = tempfile::tempdir().unwrap();
        Self { config: StoreConfig::postgres(database), folder }
    }

    async fn open(&self) -> Store {
        Store::open(&self.config).await.unwrap()
    }
}

/// Each of these functions is a test on each engine.
macro_rules! on_each_engine {
    ($($name:ident)*) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name(&super::Place::sqlite()).await;
            })*
        }

        mod postgres {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name(&super::Place::postgres()).await;
            })*
        }
    };
}

on_each_engine! {
    concurrent_puts_get_gapless_revisions_and_survive_a_reopen
    a_failed_compare_runs_the_other_branch_and_takes_no_revision
    transactions_of_one_group_see_each_other
    more_ops_than_one_statement_takes_are_one_revision
    a_prefix_is_taken_literally
    pages_are_of_one_revision
    a_repeated_request_is_answered_with_the_first_outcome
    a_lease_ends_with_its_keys_as_one_revision
    a_lease_takes_so_many_keys_and_no_more
    a_fence_of_an_ended_lease_is_refused
    what_no_database_takes_is_refused_before
    compaction_keeps_the_newest_put_of_each_key_and_all_above_the_cut
    feeds_get_every_commit_once_from_memory_or_from_the_log
    the_audit_is_a_chain
    a_backup_taken_while_writing_is_one_state_and_can_be_restored
    every_statement_is_understood
}

fn put(key: &str, value: &str) -> Txn {
    Txn::of(vec![Op::put(key, value.to_owned())])
}

fn delete(key: &str) -> Op {
    Op::Delete { key: key.into() }
}

fn leased(key: &str, lease: LeaseId) -> Op {
    Op::Put { key: key.into(), value: "x".into(), content_type: "text/plain".into(), lease }
}

fn expect(key: &str, target: Target) -> Vec<Compare> {
    vec![Compare { key: key.into(), target }]
}

fn text(value: &[u8]) -> String {
    String::from_utf8(value.to_vec()).unwrap()
}

async fn values(store: &Store, prefix: &str) -> Vec<(String, String, i64)> {
    let slice = store.range(Range::prefix(prefix)).await.unwrap();
    slice.entries.into_iter().map(|e| (e.key, text(&e.value), e.mod_revision)).collect()
}

async fn keys(store: &Store, prefix: &str) -> Vec<String> {
    values(store, prefix).await.into_iter().map(|(key, ..)| key).collect()
}

async fn revision(store: &Store, txn: Txn) -> Revision {
    let outcome = store.commit(txn).await.unwrap();
    assert!(outcome.succeeded);
    outcome.revision
}

async fn concurrent_puts_get_gapless_revisions_and_survive_a_reopen(place: &Place) {
    let store = place.open().await;
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..500 {
        let store = store.clone();
        let txn = put(&format!("k/{:03}", n % 50), &n.to_string());
        tasks.spawn(async move { revision(&store, txn).await });
    }
    let mut revisions = tasks.join_all().await;
    revisions.sort_unstable();
    assert_eq!(revisions, (1..=500).collect::<Vec<_>>());
    assert_eq!(store.revision(), 500);
    let before = values(&store, "k/").await;
    assert_eq!(before.len(), 50);
    store.close().await;

    let store = place.open().await;
    assert_eq!(values(&store, "k/").await, before);
    let status = store.status().await.unwrap();
    assert_eq!((status.revision, status.compacted, status.epoch, status.keys), (500, 0, 1, 50));
    assert_eq!(revision(&store, put("k/new", "x")).await, 501);
}

async fn a_failed_compare_runs_the_other_branch_and_takes_no_revision(place: &Place) {
    let store = place.open().await;
    let create = Txn { compares: expect("a", Target::ModRevision(0)), ..put("a", "1") };
    assert_eq!(revision(&store, create.clone()).await, 1);
    let failed = Outcome { succeeded: false, revision: 1, reads: vec![] };
    assert_eq!(store.commit(create.clone()).await.unwrap(), failed);
    for target in
        [Target::ModRevision(7), Target::Version(2), Target::Lease(1), Target::Value("2".into())]
    {
        let txn = Txn { compares: expect("a", target), ..put("a", "2") };
        assert_eq!(store.commit(txn).await.unwrap(), failed);
    }
    for target in
        [Target::ModRevision(1), Target::Version(1), Target::Lease(0), Target::Value("1".into())]
    {
        let txn = Txn { compares: expect("a", target), ..Txn::default() };
        assert!(store.commit(txn).await.unwrap().succeeded);
    }
    assert_eq!(values(&store, "").await, [("a".into(), "1".into(), 1)]);

    let get = Op::Get { key: "a".into() };
    let failure = vec![get.clone(), Op::put("a", "3"), get, Op::Get { key: "none".into() }];
    let outcome = store.commit(Txn { failure, ..create }).await.unwrap();
    assert_eq!((outcome.succeeded, outcome.revision), (false, 2));
    let read = |read: &Read| read.entry.as_ref().map(|e| (text(&e.value), e.version));
    let reads: Vec<_> = outcome.reads.iter().map(read).collect();
    assert_eq!(reads, [Some(("1".into(), 1)), Some(("3".into(), 2)), None]);
}

/// All in one queue, so that they end up in few groups whose parts depend on each other.
async fn transactions_of_one_group_see_each_other(place: &Place) {
    let store = place.open().await;
    let absent = expect("a", Target::ModRevision(0));
    let both = Txn::of(vec![Op::put("b", "1"), delete("b")]);
    let (first, again, gone, back, both, nothing) = tokio::join!(
        store.commit(Txn { compares: absent.clone(), ..put("a", "1") }),
        store.commit(Txn { compares: absent.clone(), ..put("a", "2") }),
        store.commit(Txn::of(vec![delete("a")])),
        store.commit(Txn { compares: absent, ..put("a", "3") }),
        store.commit(both),
        store.commit(Txn::of(vec![delete("b")])),
    );
    assert_eq!(first.unwrap().revision, 1);
    assert!(!again.unwrap().succeeded);
    assert_eq!(gone.unwrap().revision, 2);
    assert_eq!(back.unwrap().revision, 3);
    assert_eq!(both.unwrap().revision, 4);
    assert_eq!(nothing.unwrap().revision, 4, "an absent key was deleted: no change");
    assert_eq!(values(&store, "").await, [("a".into(), "3".into(), 3)]);
    let log = store.log_after(0, 100).await.unwrap();
    assert_eq!(
        log.iter().map(|c| (c.revision, c.events.len())).collect::<Vec<_>>(),
        [(1, 1), (2, 1), (3, 1), (4, 2)]
    );
}

async fn more_ops_than_one_statement_takes_are_one_revision(place: &Place) {
    let store = place.open().await;
    let ops = (0..2_500).map(|n| Op::put(format!("k/{n:04}"), "x")).collect();
    assert_eq!(revision(&store, Txn::of(ops)).await, 1);
    assert_eq!(keys(&store, "k/").await.len(), 2_500);
    let log = store.log_after(0, 10).await.unwrap();
    assert_eq!((log.len(), log[0].events.len()), (1, 2_500), "a commit is never cut");
    let prefix = |prefix: &str| Op::DeletePrefix { prefix: prefix.into() };
    assert_eq!(revision(&store, Txn::of(vec![prefix("k/1"), Op::put("k/1", "y")])).await, 2);
    assert_eq!(keys(&store, "k/").await.len(), 1_501);
    for some in 0..10 {
        let ops = (0..1_000).map(|n| Op::put(format!("m/{some}/{n}"), "x")).collect();
        revision(&store, Txn::of(ops)).await;
    }
    revision(&store, put("m/x", "")).await;
    let all = store.commit(Txn::of(vec![delete("k/1"), prefix("m/")])).await;
    assert!(matches!(all, Err(StoreError::TooMany { .. })), "{all:?}");
    assert_eq!(keys(&store, "k/1").await, ["k/1"], "nothing of it was done");
}

async fn a_prefix_is_taken_literally(place: &Place) {
    let store = place.open().await;
    for key in ["a", "a/1", "a/ö", "a0", "b%", "b_c", "\u{10ffff}z"] {
        revision(&store, put(key, key)).await;
    }
    assert_eq!(keys(&store, "a/").await, ["a/1", "a/ö"]);
    assert_eq!(keys(&store, "a/ö").await, ["a/ö"]);
    assert_eq!(keys(&store, "b%").await, ["b%"]);
    assert_eq!(keys(&store, "\u{10ffff}").await, ["\u{10ffff}z"]);
    assert_eq!(keys(&store, "").await.len(), 7);
}

async fn pages_are_of_one_revision(place: &Place) {
    let store = place.open().await;
    let ops = (0..100).map(|n| Op::put(format!("k/{n:02}"), vec![b'x'; 100])).collect();
    revision(&store, Txn::of(ops)).await;
    let (mut after, mut at, mut found) = (None, None, Vec::new());
    loop {
        let query = Range { after, at, rows: 7, ..Range::prefix("k/") };
        let slice = store.range(query).await.unwrap();
        after = slice.entries.last().map(|e| e.key.clone());
        at = Some(slice.revision);
        found.extend(slice.entries.into_iter().map(|e| e.key));
        if !slice.more {
            break;
        }
        // Behind and before the page.
        let n = found.len();
        let ops = vec![delete("k/99"), Op::put(format!("k/{n:02}x"), ""), delete("k/00")];
        revision(&store, Txn::of(ops)).await;
    }
    assert_eq!(found, (0..100).map(|n| format!("k/{n:02}")).collect::<Vec<_>>());

    let small = Range { bytes: 250, keys_only: false, ..Range::prefix("k/") };
    let slice = store.range(small.clone()).await.unwrap();
    assert!(slice.more && slice.entries.len() == 2, "{}", slice.entries.len());
    let slice = store.range(Range { keys_only: true, ..small }).await.unwrap();
    assert!(slice.entries.len() > 2 && slice.entries[0].value.is_empty());
    let ahead = store.range(Range { at: Some(1_000), ..Range::prefix("") }).await;
    assert!(matches!(ahead, Err(StoreError::Ahead { .. })), "{ahead:?}");
}

async fn a_repeated_request_is_answered_with_the_first_outcome(place: &Place) {
    let store = place.open().await;
    let txn = |by: &str| Txn {
        request_id: Some("r".into()),
        by: by.into(),
        ..Txn::of(vec![leased("a", 0), Op::Get { key: "a".into() }])
    };
    let (first, second) = tokio::join!(store.commit(txn("me")), store.commit(txn("me")));
    let first = first.unwrap();
    assert_eq!(second.unwrap(), first, "in one group");
    revision(&store, put("a", "2")).await;
    assert_eq!(store.commit(txn("me")).await.unwrap(), first, "in a later group");
    assert_eq!(store.commit(txn("you")).await.unwrap().revision, 3, "of another caller");
    assert_eq!(store.revision(), 3);
}

async fn a_lease_ends_with_its_keys_as_one_revision(place: &Place) {
    let store = place.open().await;
    let ttl = Duration::from_millis(1_500);
    let lease = store.grant("me", ttl, "core-1").await.unwrap();
    assert_eq!((lease.ttl, lease.owner.as_str(), lease.holder_epoch), (ttl, "me", 1));
    assert_eq!(store.revision(), 0, "nobody can see it");
    let other = store.grant("me", ttl, "core-1").await.unwrap();
    assert!(other.token > lease.token);
    let ops = vec![leased("a", lease.id), leased("b", lease.id), leased("c", other.id)];
    revision(&store, Txn::of(ops)).await;
    revision(&store, put("b", "without")).await;
    let gone = store.commit(Txn::of(vec![Op::put("z", ""), leased("a", 77)])).await;
    assert!(matches!(gone, Err(StoreError::LeaseGone(77))), "{gone:?}");

    let other_epoch = store.take_lease(lease.id, "core-3", Some(("core-1", 2))).await.unwrap();
    assert_eq!(other_epoch, None, "it is not of that epoch");
    let taken = store.take_lease(lease.id, "core-2", Some(("core-1", 1))).await.unwrap().unwrap();
    assert_eq!(
        (taken.holder.as_str(), taken.holder_epoch, taken.token),
        ("core-2", 2, lease.token)
    );
    let late = store.end_lease(lease.id, true, Some(("core-1", 1))).await.unwrap();
    assert_eq!(late, None, "another core holds it");
    let ended = store.end_lease(lease.id, true, Some(("core-2", 2))).await.unwrap();
    assert_eq!(ended, Some(3));
    assert_eq!(keys(&store, "").await, ["b", "c"]);
    let log = store.log_after(2, 10).await.unwrap();
    assert_eq!(log[0].events.len(), 1);
    assert_eq!((log[0].events[0].change, log[0].events[0].prev_revision), (Change::Expire, 1));
    assert_eq!(store.end_lease(lease.id, true, None).await.unwrap(), None);
    assert_eq!(store.take_lease(lease.id, "core-1", None).await.unwrap(), None);
    assert_eq!(store.leases().await.unwrap(), std::slice::from_ref(&other));
    revision(&store, Txn::of(vec![delete("c")])).await;
    assert_eq!(store.end_lease(other.id, false, None).await.unwrap(), Some(4), "no keys");
}

async fn a_lease_takes_so_many_keys_and_no_more(place: &Place) {
    let store = place.open().await;
    let lease = store.grant("me", Duration::from_secs(9), "core").await.unwrap().id;
    let other = store.grant("me", Duration::from_secs(9), "core").await.unwrap().id;
    let puts = |numbers: std::ops::Range<i64>| {
        Txn::of(numbers.map(|n| leased(&format!("k/{n:05}"), lease)).collect())
    };
    for start in (0..LEASE_KEYS_MAX).step_by(1_000) {
        revision(&store, puts(start..start + 1_000)).await;
    }
    let last = revision(&store, puts(0..2)).await;
    let full = |refused: Result<Outcome, StoreError>| {
        assert!(matches!(refused, Err(StoreError::LeaseFull(id)) if id == lease), "{refused:?}");
    };
    full(store.commit(puts(LEASE_KEYS_MAX..LEASE_KEYS_MAX + 1)).await);
    full(store.commit(Txn::of(vec![leased("x", lease), delete("k/none"), leased("y", 0)])).await);
    assert_eq!((store.revision(), keys(&store, "x").await.len()), (last, 0), "nothing was done");

    // A key that goes makes room, also in the same transaction, and so does one that changes its lease.
    revision(&store, Txn::of(vec![leased("x", lease), delete("k/00000")])).await;
    revision(&store, Txn::of(vec![leased("k/00001", other), leased("y", lease)])).await;
    let (first, second) = tokio::join!(
        store.commit(Txn::of(vec![delete("k/00002"), leased("z", lease)])),
        store.commit(Txn::of(vec![leased("w", lease)]))
    );
    first.unwrap();
    full(second);
    let ended = store.end_lease(lease, true, None).await.unwrap().unwrap();
    let left = store.range(Range::prefix("")).await.unwrap();
    assert_eq!((left.revision, left.entries.len()), (ended, 1));
}

async fn a_fence_of_an_ended_lease_is_refused(place: &Place) {
    let store = place.open().await;
    let lease = store.grant("me", Duration::from_secs(1), "core").await.unwrap();
    let fenced = |token| {
        let fence = Some(Fence { lease: lease.id, token });
        store.commit(Txn { fence, ..put("a", "1") })
    };
    assert!(fenced(lease.token).await.unwrap().succeeded);
    assert!(matches!(fenced(lease.token + 1).await, Err(StoreError::Fenced)));
    let (ended, late) = tokio::join!(store.end_lease(lease.id, false, None), fenced(lease.token));
    assert_eq!(ended.unwrap(), Some(1));
    assert!(matches!(late, Err(StoreError::Fenced)), "{late:?}");
    assert_eq!(store.revision(), 1);
}

async fn what_no_database_takes_is_refused_before(place: &Place) {
    let store = place.open().await;
    for key in ["", "a\0", "a\n", &"x".repeat(KEY_BYTES_MAX + 1)] {
        let refused = store.commit(put(key, "")).await;
        assert!(matches!(refused, Err(StoreError::Invalid(_))), "{key:?}: {refused:?}");
    }
    revision(&store, put(&"x".repeat(KEY_BYTES_MAX), "")).await;
    let large = Txn::of(vec![Op::put("a", vec![0; QUEUE_BYTES_MAX])]);
    assert!(matches!(store.commit(large).await, Err(StoreError::Busy)));
    revision(&store, put("a", "1")).await;
}

async fn compaction_keeps_the_newest_put_of_each_key_and_all_above_the_cut(place: &Place) {
    let store = place.open().await;
    let (a, b) = tokio::join!(
        async {
            for n in 0..1_500 {
                revision(&store, put("a", &n.to_string())).await;
            }
        },
        async {
            for n in 0..1_500 {
                revision(&store, put("b", &n.to_string())).await;
            }
        }
    );
    let ((), ()) = (a, b);
    revision(&store, Txn::of(vec![delete("a")])).await;
    revision(&store, put("b", "last")).await;
    let before = values(&store, "").await;
    let keep = Retention { rows: 10, ..Retention::default() };
    assert_eq!(store.inner.readers.cut(keep).await.unwrap(), Some(3_002 - 10));
    let mut feed = store.follow(0);
    assert_eq!(store.compact(3_001).await.unwrap(), 3_001);
    assert_eq!(store.inner.readers.cut(keep).await.unwrap(), None);
    assert_eq!(values(&store, "").await, before);
    let at = |at| store.range(Range { at: Some(at), ..Range::prefix("") });
    assert_eq!(at(3_001).await.unwrap().entries[0].key, "b");
    assert!(matches!(at(3_000).await, Err(StoreError::Compacted { at: 3_001 })));
    assert!(matches!(store.value_at("b", 3_000).await, Err(StoreError::Compacted { .. })));
    assert_eq!(store.value_at("a", 3_001).await.unwrap(), None);
    assert_eq!(text(&store.value_at("b", 3_002).await.unwrap().unwrap().value), "last");
    assert!(matches!(store.log_after(3_000, 10).await, Err(StoreError::Compacted { .. })));
    assert_eq!(store.log_after(3_001, 10).await.unwrap().len(), 1);
    // Memory still has what the log has not.
    assert_eq!(feed.next().await.unwrap()[0].revision, 1);
    let mut reader = store.inner.readers.take().await.unwrap();
    let count = Sql::Fixed("SELECT count(*) FROM log");
    let mut rows = reader.fetch(&count, Vec::new(), usize::MAX).await.unwrap().rows;
    assert_eq!(rows[0].int().unwrap(), 2);
    drop(reader);
    store.close().await;
    let store = place.open().await;
    assert_eq!(store.status().await.unwrap().compacted, 3_001);
    assert!(matches!(store.follow(0).next().await, Err(StoreError::Compacted { .. })));
    assert_eq!(store.compact(10).await.unwrap(), 3_001, "never backwards");
}

async fn feeds_get_every_commit_once_from_memory_or_from_the_log(place: &Place) {
    let store = place.open().await;
    for n in 0..50 {
        revision(&store, put("k", &n.to_string())).await;
    }
    store.close().await;
    let store = place.open().await;
    let follow = |store: Store, after: Revision| async move {
        let (mut feed, mut seen) = (store.follow(after), Vec::new());
        while feed.revision() < 3_000 {
            seen.extend(feed.next().await.unwrap().iter().map(|c| c.revision));
        }
        assert_eq!(seen, (after + 1..=3_000).collect::<Vec<_>>());
    };
    let mut followers = tokio::task::JoinSet::new();
    for after in [0, 30, 50, 51, 2_000] {
        followers.spawn(follow(store.clone(), after));
    }
    // Late ones read what is in memory no more.
    let large = "x".repeat(30_000);
    for n in 51..=3_000 {
        let value = if n % 2 == 0 { large.as_str() } else { "" };
        assert_eq!(revision(&store, put("k", value)).await, n);
    }
    followers.spawn(follow(store.clone(), 60));
    followers.join_all().await;
    store.reached(3_000).await;
    let mut feed = store.follow(3_000);
    let (ended, ()) = tokio::join!(feed.next(), store.close());
    assert!(matches!(ended, Err(StoreError::Closed)), "{ended:?}");
}

async fn the_audit_is_a_chain(place: &Place) {
    let store = place.open().await;
    let record = |n: i64| AuditRecord {
        time_ms: n,
        identity: "spiffe://cnsmo/operator/me".into(),
        rpc: "Apply".into(),
        ..AuditRecord::default()
    };
    for n in 0..10 {
        store.append_audit(record(n)).await.unwrap();
    }
    tokio::try_join!(store.append_audit(record(10)), store.append_audit(record(11))).unwrap();
    assert_eq!(store.revision(), 0);
    let rows = store.list_audit(0, 100).await.unwrap();
    assert_eq!(rows.iter().map(|row| row.seq).collect::<Vec<_>>(), (1..=12).collect::<Vec<_>>());
    assert!(rows[0].follows(None));
    assert!(rows.windows(2).all(|two| two[1].follows(Some(&two[0].hash))));
    assert!(!rows[5].follows(Some(&rows[3].hash)), "one was taken out");
    let mut forged = rows[5].clone();
    forged.record.identity.push('x');
    assert!(!forged.follows(Some(&rows[4].hash)));
    assert_eq!(store.list_audit(10, 100).await.unwrap(), rows[10..]);
    assert_eq!(store.list_audit(0, 3).await.unwrap(), rows[..3]);
    store.inner.queue.send(Job::Prune { audit_rows: 5 }).await.unwrap();
    // The second one comes after the slice that removes.
    store.append_audit(record(12)).await.unwrap();
    store.append_audit(record(13)).await.unwrap();
    let kept = store.list_audit(0, 100).await.unwrap();
    assert!(kept.len() <= 7 && kept[0].follows(Some(&rows[kept[0].seq as usize - 2].hash)));
}

async fn a_backup_taken_while_writing_is_one_state_and_can_be_restored(place: &Place) {
    let store = place.open().await;
    let lease = store.grant("me", Duration::from_secs(9), "core").await.unwrap();
    store
        .append_audit(AuditRecord { rpc: "Apply".into(), ..AuditRecord::default() })
        .await
        .unwrap();
    let ops = (0..3_000).map(|n| Op::put(format!("k/{n}"), vec![7; n % 300])).collect();
    revision(&store, Txn::of(ops)).await;
    revision(&store, Txn::of(vec![leased("leased", lease.id)])).await;
    let file = place.folder.path().join("backup");
    let (backup, ()) = tokio::join!(store.backup(&file), async {
        // The same number under both keys, always.
        for n in 0..300 {
            let n = n.to_string();
            revision(&store, Txn::of(vec![Op::put("a", n.clone()), Op::put("b", n)])).await;
        }
    });
    let at = backup.unwrap();
    let expected = store.range(Range { at: Some(at), ..Range::prefix("") }).await.unwrap();
    let log = store.log_after(0, 10_000).await.unwrap();
    let again = store.backup(&file).await;
    assert!(matches!(again, Err(StoreError::Open { .. })), "it exists: {again:?}");
    let epoch = store.status().await.unwrap().epoch;
    store.close().await;

    let refused = restore(&place.config, &file, false).await;
    assert!(matches!(refused, Err(StoreError::NotEmpty { .. })), "{refused:?}");
    let junk = place.folder.path().join("junk");
    std::fs::write(&junk, "no database at all".repeat(1_000)).unwrap();
    let refused = restore(&place.config, &junk, true).await;
    assert!(matches!(refused, Err(StoreError::Damaged { .. })), "{refused:?}");
    assert_eq!(restore(&place.config, &file, true).await.unwrap(), at);
    let store = place.open().await;
    assert_eq!(store.range(Range::prefix("")).await.unwrap(), expected);
    assert_eq!(store.leases().await.unwrap(), [lease]);
    assert_eq!(store.list_audit(0, 10).await.unwrap().len(), 1);
    let length = usize::try_from(at).unwrap();
    assert_eq!(store.log_after(0, 10_000).await.unwrap(), log[..length]);
    assert_eq!(store.status().await.unwrap().epoch, epoch + 1);
    assert_eq!(revision(&store, put("after", "")).await, at + 1);
}

#[tokio::test]
async fn a_damaged_file_is_named() {
    let place = Place::sqlite();
    let path = place.folder.path().join("state.db");
    std::fs::write(&path, "this is no database, but long enough to look like one".repeat(100))
        .unwrap();
    let error = Store::open(&place.config).await.unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error:?}");
    assert!(error.to_string().contains("state.db"), "{error}");
}
