//! The store's writer is killed at any moment.

use std::{
    collections::BTreeMap,
    io::Read as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cnsmo_core::store::{Range, Revision, Store, StoreConfig};

const KILLS: u32 = 200;
/// After it is ready; from while it opens the database to many commits.
const LIFE_MAX: Duration = Duration::from_millis(80);

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_when_the_writer_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("state.db");
    let config = StoreConfig::sqlite(&file);
    let mut seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let (mut before, mut first, mut acknowledged) = (0, 1, 0);
    for round in 1..=KILLS {
        let life = LIFE_MAX.mul_f64(f64::from(random(&mut seed)) / f64::from(u32::MAX));
        let lines = killed_after(&file, first, life).await;
        let store = Store::open(&config).await.unwrap();
        let revision = check(&store, before, &lines).await;
        if round % 20 == 0 {
            store.compact(revision - 100).await.unwrap();
        }
        store.close().await;
        acknowledged += lines.len();
        (before, first) = (revision, u64::try_from(revision).unwrap() + 1);
    }
    assert!(acknowledged > 2_000, "only {acknowledged} transactions were acknowledged");
    let database = rusqlite::Connection::open(&file).unwrap();
    let verdict: String =
        database.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(verdict, "ok");
}

/// What the writer acknowledged before it was killed: writer, number, revision.
async fn killed_after(file: &Path, first: u64, life: Duration) -> Vec<(u64, u64, Revision)> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_cnsmo-bench-state"))
        .arg("write")
        .arg(file)
        .arg(first.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).unwrap();
        text
    });
    tokio::time::sleep(Duration::from_millis(20) + life).await;
    child.kill().unwrap();
    child.wait().unwrap();
    let text = reader.join().unwrap();
    // A line without its end was not said.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let number = |word: Option<&str>| word.unwrap().parse().unwrap();
    let lines = whole.lines().filter(|line| *line != "ready").map(|line| {
        let mut words = line.split(' ');
        (number(words.next()), number(words.next()), number(words.next()) as Revision)
    });
    lines.collect()
}

/// The log is gapless and whole, holds what was acknowledged, and leads to the keys as they are.
async fn check(store: &Store, before: Revision, lines: &[(u64, u64, Revision)]) -> Revision {
    let (mut last, mut transactions) = (before, BTreeMap::new());
    loop {
        let commits = store.log_after(last, 1_000).await.unwrap();
        if commits.is_empty() {
            break;
        }
        for commit in commits {
            assert_eq!(commit.revision, last + 1, "a gap");
            last = commit.revision;
            let [a, b] = &commit.events[..] else { panic!("half-written: {commit:?}") };
            assert_eq!(a.entry.key.replace("a/", "b/"), b.entry.key);
            assert_eq!(a.entry.value, b.entry.value);
            transactions.insert(commit.revision, (a.entry.key.clone(), a.entry.value.clone()));
        }
    }
    for (writer, number, revision) in lines {
        let expected = (format!("a/{writer:02}"), number.to_string().into());
        assert_eq!(transactions.get(revision), Some(&expected), "acknowledged");
    }
    let now = store.range(Range::prefix("")).await.unwrap();
    assert_eq!(now.revision, last);
    let of = |half: &str| {
        let entries = now.entries.iter().filter(|e| e.key.starts_with(half));
        entries.map(|e| (e.key[1..].to_owned(), e.value.clone())).collect::<Vec<_>>()
    };
    assert_eq!(of("a"), of("b"));
    let newest: BTreeMap<_, _> = transactions.into_values().collect();
    for (key, value) in newest {
        let entry = now.entries.iter().find(|e| e.key == key).unwrap();
        assert_eq!(entry.value, value, "{key}");
    }
    last
}

/// Xorshift: enough to spread moments.
fn random(seed: &mut u64) -> u32 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    (*seed >> 32) as u32
}
