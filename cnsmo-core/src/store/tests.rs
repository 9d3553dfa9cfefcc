use std::collections::BTreeMap;

use super::*;

fn put(key: &str, value: &str) -> Txn {
    Txn::of(vec![Op::put(key, value.to_owned())])
}

fn delete(key: &str) -> Op {
    Op::Delete { key: key.into() }
}

fn config(folder: &tempfile::TempDir) -> StoreConfig {
    StoreConfig::sqlite(folder.path().join("state.db"))
}

async fn open(folder: &tempfile::TempDir) -> Store {
    Store::open(&config(folder)).await.unwrap()
}

fn text(value: &[u8]) -> String {
    String::from_utf8(value.to_vec()).unwrap()
}

async fn values(store: &Store, prefix: &str) -> Vec<(String, String, i64)> {
    let slice = store.range(Range::prefix(prefix)).await.unwrap();
    slice.entries.into_iter().map(|e| (e.key, text(&e.value), e.mod_revision)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_puts_get_gapless_revisions_and_survive_a_reopen() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..500 {
        let store = store.clone();
        tasks.spawn(
            async move { store.commit(put(&format!("k/{:03}", n % 50), &n.to_string())).await },
        );
    }
    let mut revisions = Vec::new();
    while let Some(outcome) = tasks.join_next().await {
        revisions.push(outcome.unwrap().unwrap().revision);
    }
    revisions.sort_unstable();
    assert_eq!(revisions, (1..=500).collect::<Vec<_>>());
    let before = values(&store, "k/").await;
    assert_eq!(before.len(), 50);
    store.close().await;

    let store = open(&folder).await;
    assert_eq!(values(&store, "k/").await, before);
    let status = store.status().await.unwrap();
    assert_eq!((status.revision, status.compacted, status.epoch, status.keys), (500, 0, 1, 50));
    assert_eq!(store.commit(put("k/new", "x")).await.unwrap().revision, 501);
}
