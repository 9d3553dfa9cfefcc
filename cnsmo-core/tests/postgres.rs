//! The store on PostgreSQL: several cores at once, and what may break.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cnsmo_core::store::{Fence, Op, PostgresConfig, Range, Store, StoreConfig, StoreError, Txn};

use crate::{
    harness::PATIENCE,
    server::{Postgres, Sync},
};

/// One server for all tests of this process; each has a database of its own.
pub(crate) fn server() -> &'static Postgres {
    static SERVER: OnceLock<Postgres> = OnceLock::new();
    SERVER.get_or_init(|| Postgres::start(Sync::None).unwrap())
}

async fn open(url: &str) -> Store {
    Store::open(&StoreConfig::postgres(PostgresConfig::new(url, None).unwrap())).await.unwrap()
}

fn put(key: String) -> Txn {
    Txn::of(vec![Op::put(key, "value".to_owned())])
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_of_two_cores_reach_a_third_in_order_and_without_a_gap() {
    const PUTS: i64 = 1_000;
    const WRITERS: i64 = 8;
    let url = server().create_database().unwrap();
    // All at once: one of them makes the tables.
    let (first, second, third) = tokio::join!(open(&url), open(&url), open(&url));
    let mut feed = third.follow(0);
    let mut writers = tokio::task::JoinSet::new();
    for (core, store) in [("first", &first), ("second", &second)] {
        for writer in 0..WRITERS {
            let store = store.clone();
            writers.spawn(async move {
                let mut last = 0;
                for n in 0..PUTS / WRITERS {
                    let outcome = store.commit(put(format!("{core}/{writer}/{}", n % 10))).await;
                    let revision = outcome.unwrap().revision;
                    assert!(revision > last);
                    last = revision;
                }
            });
        }
    }
    let mut last = 0;
    let follow = async {
        while last < 2 * PUTS {
            for commit in feed.next().await.unwrap() {
                assert_eq!(commit.revision, last + 1);
                assert_eq!(commit.events.len(), 1);
                last = commit.revision;
            }
        }
    };
    tokio::time::timeout(PATIENCE, follow).await.expect("commits are missing");
    while let Some(ended) = writers.join_next().await {
        ended.unwrap();
    }
    for store in [&first, &second, &third] {
        tokio::time::timeout(PATIENCE, store.reached(2 * PUTS)).await.unwrap();
        let slice = store.range(Range::prefix("")).await.unwrap();
        assert_eq!((slice.revision, slice.entries.len()), (2 * PUTS, 160));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_another_core_ended_fences_its_holder() {
    let url = server().create_database().unwrap();
    let (holder, other) = (open(&url).await, open(&url).await);
    let lease = holder.grant("job", Duration::from_secs(10), "a").await.unwrap();
    let fence = Some(Fence { lease: lease.id, token: lease.token });
    let fenced = |key: &str| Txn { fence, ..put(key.to_owned()) };
    holder.commit(fenced("one")).await.unwrap();
    other.end_lease(lease.id, true, None).await.unwrap().unwrap();
    let refused = holder.commit(fenced("two")).await.unwrap_err();
    assert!(matches!(refused, StoreError::Fenced), "{refused:?}");
    let later = other.grant("job", Duration::from_secs(10), "b").await.unwrap();
    assert!(later.token > lease.token);
    assert!(other.get("two").await.unwrap().0.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_connections_lose_no_acknowledged_put_and_stop_nobody_for_long() {
    let url = server().create_database().unwrap();
    let name = url.split(['/', '?']).nth(3).unwrap().to_owned();
    let store = open(&url).await;
    let stop = Arc::new(AtomicBool::new(false));
    let killer = std::thread::spawn({
        let stop = stop.clone();
        move || {
            let mut killed = 0;
            while !stop.load(Ordering::Relaxed) {
                let kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                    WHERE application_name = 'cnsmo-core' AND datname = current_database()";
                killed += server().sql(&name, kill).unwrap().parse::<u32>().unwrap();
            }
            killed
        }
    });
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..4 {
        let store = store.clone();
        writers.spawn(async move {
            let mut acknowledged = Vec::new();
            for n in 0.. {
                let key = format!("{writer}/{n}");
                if let Ok(outcome) = store.commit(put(key.clone())).await {
                    acknowledged.push((outcome.revision, key));
                }
                if acknowledged.len() == 100 {
                    break;
                }
            }
            acknowledged
        });
    }
    let mut acknowledged = Vec::new();
    while let Some(done) = writers.join_next().await {
        acknowledged.extend(done.unwrap());
    }
    stop.store(true, Ordering::Relaxed);
    assert!(killer.join().unwrap() > 0, "nothing was killed");
    let last = store.commit(put("last".into())).await.unwrap().revision;
    let mut feed = store.follow(0);
    let mut seen = Vec::new();
    while seen.len() < usize::try_from(last).unwrap() {
        let next = tokio::time::timeout(PATIENCE, feed.next()).await.unwrap().unwrap();
        seen.extend(
            next.iter().map(|commit| (commit.revision, commit.events[0].entry.key.clone())),
        );
    }
    assert!(seen.iter().map(|(revision, _)| *revision).eq(1..=last), "a gap");
    for put in &acknowledged {
        assert!(seen.contains(put), "{put:?} is lost");
    }
}
