//! The store on PostgreSQL: several cores at once, and what may break.

use std::{
    fs,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cnsmo_core::store::{Fence, Op, PostgresConfig, Range, Store, StoreConfig, StoreError, Txn};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use crate::{
    cluster::Member,
    harness::PATIENCE,
    server::{Postgres, Sync, Tls},
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

/// A CA, and what a server with a certificate of it needs.
fn authority() -> (String, Tls) {
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let ca_pem = ca.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(ca, key);
    let key = KeyPair::generate().unwrap();
    let server = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let certificate = server.signed_by(&key, &issuer).unwrap().pem();
    (ca_pem, Tls { certificate, key: key.serialize_pem() })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_network_is_crossed_by_tls_and_each_wrong_setting_is_named() {
    const PASSWORD: &str = "correct-horse";
    let (ca, tls) = authority();
    let server = Postgres::start_with(Sync::None, Some(&tls)).unwrap();
    let url = server.create_database().unwrap();
    let name = url.split(['/', '?']).nth(3).unwrap().to_owned();
    let port = url.split("port=").nth(1).unwrap().split('&').next().unwrap();
    server.sql(&name, &format!("CREATE ROLE app LOGIN SUPERUSER PASSWORD '{PASSWORD}'")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let (right_ca, other_ca) = (file("ca", &ca), file("other-ca", &authority().0));
    let (right, wrong) = (file("password", PASSWORD), file("wrong", "battery-staple"));
    let none = "/none".to_owned();
    let url = |host: &str, mode: &str, ca: &str| {
        format!("postgres://app@{host}:{port}/{name}?sslmode={mode}&sslrootcert={ca}")
    };
    let with = |url: &str, password: &str| {
        let mut command = Member::command(folder.path(), url);
        command.args(["--store-password-file", password]);
        command
    };
    for (url, password, why) in [
        (url("localhost", "verify-full", &other_ca), &right, "invalid peer certificate"),
        (url("127.0.0.1", "verify-full", &right_ca), &right, "not valid for name"),
        (url("localhost", "verify-full", "/none"), &right, "cannot read the file of sslrootcert"),
        (url("localhost", "disable", &right_ca), &right, "no encryption"),
        (url("localhost", "always", &right_ca), &right, "always"),
        (url("localhost", "verify-full", &right_ca), &wrong, "password authentication failed"),
        (url("localhost", "verify-full", &right_ca), &none, "cannot read the password file"),
        (format!("postgres://app:{PASSWORD}@localhost/x"), &right, "must not contain the password"),
    ] {
        let refused = with(&url, password).output().unwrap();
        let log = String::from_utf8(refused.stderr).unwrap();
        assert!(refused.status.code() == Some(1) && log.contains(why), "{url}: {why}: {log}");
        for secret in [PASSWORD, "battery-staple"] {
            assert!(!log.contains(secret), "{log}");
        }
    }
    let url = url("localhost", "verify-full", &right_ca);
    let config = PostgresConfig::new(&url, Some(right.as_ref())).unwrap();
    let store = Store::open(&StoreConfig::postgres(config)).await.unwrap();
    store.commit(put("over TLS".into())).await.unwrap();
    let encrypted = "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
        WHERE application_name = 'cnsmo-core'";
    assert_eq!(server.sql(&name, encrypted).unwrap(), "t");
}
