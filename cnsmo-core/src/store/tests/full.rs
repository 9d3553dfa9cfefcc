//! The disk is full.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::*;

/// A file system of a few megabytes.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path) -> Self {
        fs::create_dir(at).unwrap();
        let (none, size) = (MsFlags::empty(), Some("size=12m"));
        mount(Some("tmpfs"), at, Some("tmpfs"), none, size).unwrap();
        Self(at.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Detached: a connection that is being closed on another thread must not keep it.
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_writes_until_there_is_space_again() {
    let folder = tempfile::tempdir().unwrap();
    let disk = SmallDisk::mount(&folder.path().join("disk"));
    let config = StoreConfig::sqlite(disk.0.join("state.db"));
    let store = Store::open(&config).await.unwrap();
    let ballast = disk.0.join("ballast");
    fs::write(&ballast, vec![1; 5 << 20]).unwrap();
    let (mut kept, value) = (0, vec![7_u8; 20_000]);
    let refused = loop {
        let ops = vec![
            Op::put(format!("a/{kept:05}"), value.clone()),
            Op::put("count", kept.to_string()),
        ];
        match store.commit(Txn::of(ops)).await {
            Ok(_) => kept += 1,
            Err(error) => break error,
        }
        assert!(kept < 10_000, "the disk is never full");
    };
    assert!(matches!(refused, StoreError::Full), "{refused:?}");
    assert!(kept > 20, "{kept}");
    for _ in 0..20 {
        let again = store.commit(put("large", &"x".repeat(100_000))).await;
        assert!(matches!(again, Err(StoreError::Full)), "{again:?}");
        assert_eq!(keys(&store, "a/").await.len(), kept, "reads go on");
    }
    let mut feed = store.follow(0);
    while feed.revision() < store.revision() {
        feed.next().await.unwrap();
    }
    fs::remove_file(&ballast).unwrap();
    let next = Revision::try_from(kept).unwrap() + 1;
    assert_eq!(revision(&store, put("large", &"x".repeat(100_000))).await, next);
    store.close().await;

    let database = rusqlite::Connection::open(disk.0.join("state.db")).unwrap();
    let verdict: String =
        database.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(verdict, "ok");
    drop(database);
    let store = Store::open(&config).await.unwrap();
    let count = store.get("count").await.unwrap().0.unwrap();
    assert_eq!(text(&count.value), (kept - 1).to_string());
    assert_eq!(keys(&store, "a/").await.len(), kept);
    store.close().await;
}
