use tempfile::TempDir;
use tokio::task::JoinHandle;

use super::{record::tests::request, *};
use crate::store::StoreConfig;

const OWNER: &str = "service/db";

struct World {
    store: Store,
    catalog: Catalog,
    task: JoinHandle<()>,
    /// Of the store; shared by the cores on it.
    folder: Arc<TempDir>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl World {
    async fn new() -> Self {
        let folder = Arc::new(tempfile::tempdir().unwrap());
        let config = StoreConfig::sqlite(folder.path().join("state.db"));
        Self::on(Store::open(&config).await.unwrap(), folder, "core", true).await
    }

    async fn on(store: Store, folder: Arc<TempDir>, core: &str, alone: bool) -> Self {
        let catalog = Catalog::start(store.clone(), core, alone).await.unwrap();
        let task = tokio::spawn(catalog.clone().run());
        Self { store, catalog, task, folder }
    }

    async fn announce(&self, name: &str, phase: Phase) -> Arc<Instance> {
        self.catalog.announce(OWNER, request(name, phase)).await.unwrap().0
    }

    /// Announces with the shortest TTL and no grace to speak of.
    async fn announce_briefly(&self, name: &str) {
        let second = Some(prost_types::Duration { seconds: 1, nanos: 0 });
        let grace = Some(prost_types::Duration { seconds: 0, nanos: 1 });
        let request = AnnounceRequest { ttl: second, grace, ..request(name, Phase::Ready) };
        self.catalog.announce(OWNER, request).await.unwrap();
    }
}

fn upsert(instance: &Arc<Instance>) -> Event {
    Event::Upsert(instance.revision, instance.clone())
}

#[tokio::test]
async fn an_announcement_is_a_commit_if_it_changes_something() {
    let world = World::new().await;
    let first = world.announce("a", Phase::Starting).await;
    assert_eq!((first.revision, &*first.owner), (1, OWNER));
    for _ in 0..10 {
        assert_eq!(world.announce("a", Phase::Starting).await, first);
    }
    assert_eq!(world.store.revision(), 1, "renewals are in memory");
    let ready = world.announce("a", Phase::Ready).await;
    assert_eq!(ready.revision, 2);
    assert_eq!(world.catalog.get("db", "a").unwrap(), ready);
    let refused = world.catalog.announce(OWNER, request("a", Phase::Installing)).await.unwrap_err();
    assert!(matches!(refused, Error::Precondition(_)), "{refused}");
    let other = world.catalog.announce("service/x", request("a", Phase::Ready)).await;
    assert!(matches!(other, Err(Error::Exists(_))));
    assert_eq!(world.store.revision(), 2, "what is refused changes nothing");

    let denied = world.catalog.withdraw("db", "a", Some("service/x")).await;
    assert!(matches!(denied, Err(Error::Denied(_))));
    assert_eq!(world.catalog.withdraw("db", "a", Some(OWNER)).await.unwrap(), 3);
    let gone = world.catalog.withdraw("db", "a", Some(OWNER)).await;
    assert!(matches!(gone, Err(Error::NotFound(_))));
}

#[tokio::test]
async fn a_late_watcher_gets_the_set_then_changes_and_only_what_it_asked_for() {
    let world = World::new().await;
    let a = world.announce("a", Phase::Ready).await;
    let filter = |attributes: &str| Filter {
        service: "db".into(),
        attributes: attributes.parse().unwrap(),
        ..Filter::default()
    };
    let mut all = world.catalog.watch(filter(""));
    let mut tagged = world.catalog.watch(filter("x=1"));
    assert_eq!(all.next().await, Some(upsert(&a)));
    assert_eq!(all.next().await, Some(Event::Synced(1)));
    assert_eq!(tagged.next().await, Some(Event::Synced(1)));

    let with = |attributes: &[(&str, &str)]| {
        let mut request = request("b", Phase::Ready);
        let pairs = attributes.iter().map(|(key, value)| ((*key).into(), (*value).into()));
        request.instance.as_mut().unwrap().attributes = pairs.collect();
        world.catalog.announce(OWNER, request)
    };
    let b = with(&[("x", "1")]).await.unwrap().0;
    assert_eq!(all.next().await, Some(upsert(&b)));
    assert_eq!(tagged.next().await, Some(upsert(&b)));
    let untagged = with(&[]).await.unwrap().0;
    assert_eq!(all.next().await, Some(upsert(&untagged)));
    assert_eq!(tagged.next().await, Some(Event::Delete(3, b)), "it is not meant any more");
    world.catalog.withdraw("db", "b", None).await.unwrap();
    assert_eq!(all.next().await, Some(Event::Delete(4, untagged)));
    assert_eq!(world.catalog.list(&filter("")), (vec![a], 4));
}

#[tokio::test]
async fn a_watcher_that_falls_behind_is_told_and_gets_the_set_anew() {
    let world = World::new().await;
    let mut watcher = world.catalog.watch(Filter::default());
    assert_eq!(watcher.next().await, Some(Event::Synced(0)));
    let mut last = world.announce("a", Phase::Ready).await;
    for n in 0..=RING {
        let phase = if n % 2 == 0 { Phase::Degraded } else { Phase::Ready };
        last = world.announce("a", phase).await;
    }
    assert_eq!(watcher.next().await, Some(Event::Reset(last.revision)));
    assert_eq!(watcher.next().await, Some(upsert(&last)));
    assert_eq!(watcher.next().await, Some(Event::Synced(last.revision)));
}

#[tokio::test]
async fn silence_makes_unreachable_then_lost_and_a_word_brings_it_back() {
    let world = World::new().await;
    let mut watcher = world.catalog.watch(Filter::default());
    assert_eq!(watcher.next().await, Some(Event::Synced(0)));
    world.announce_briefly("a").await;
    let mut phases = Vec::new();
    for _ in 0..3 {
        let Some(Event::Upsert(_, instance)) = watcher.next().await else { panic!("no event") };
        phases.push((instance.phase(), instance.reason.clone()));
    }
    let words = |reason: &str| reason.to_owned();
    assert_eq!(
        phases,
        [
            (Phase::Ready, words("")),
            (Phase::Unreachable, words("LeaseLate")),
            (Phase::Lost, words("GraceOver"))
        ]
    );
    let back = world.announce("a", Phase::Degraded).await;
    assert_eq!(watcher.next().await, Some(upsert(&back)));
}

#[tokio::test]
async fn only_the_core_that_heard_the_instance_last_judges_its_silence() {
    let first = World::new().await;
    let on = |core| World::on(first.store.clone(), first.folder.clone(), core, false);
    let (one, two) = (on("one").await, on("two").await);
    first.task.abort();
    one.announce_briefly("a").await;
    let counts = |world: &World| {
        let state = world.catalog.inner.state();
        let key = record::key("db", "a");
        let revision = state.set.get(&key).map_or(0, |record| record.instance.revision);
        state.silence.counts(&key, revision)
    };
    assert!(counts(&one));
    // The client comes back at the other core.
    while two.catalog.get("db", "a").is_err() {
        tokio::task::yield_now().await;
    }
    two.announce_briefly("a").await;
    while one.catalog.get("db", "a").unwrap().revision < 2 {
        tokio::task::yield_now().await;
    }
    assert!(counts(&two) && !counts(&one));
    // That one dies, and the first is the leader.
    two.task.abort();
    assert_eq!(one.catalog.holders(), HashSet::from(["two".into()]));
    one.catalog.judge_for(["two".into()].into());
    assert!(counts(&one));
    one.catalog.judge_for(HashSet::new());
    assert!(!counts(&one), "it has come back");
    one.catalog.judge_for(["two".into()].into());
    let mut watcher = one.catalog.watch(Filter::default());
    loop {
        if let Some(Event::Upsert(_, instance)) = watcher.next().await
            && instance.phase() == Phase::Lost
        {
            break;
        }
    }
}

#[tokio::test]
async fn a_leader_that_leads_no_more_changes_no_agent() {
    let world = World::new().await;
    let lease = world.store.grant("leader", Duration::from_secs(1), "core").await.unwrap();
    let fence = Some(Fence { lease: lease.id, token: lease.token });
    let agent = |phase: Phase| {
        let name = "vm".to_owned();
        let instance = Instance { name, phase: phase.into(), ..Instance::default() };
        world.catalog.inner.keep(record::of_agent(instance, "core"), fence)
    };
    agent(Phase::Ready).await.unwrap();
    world.store.end_lease(lease.id, true, None).await.unwrap();
    let late = agent(Phase::Unreachable).await;
    assert!(matches!(late, Err(Error::Store(StoreError::Fenced))), "{late:?}");
    let late = world.catalog.remove(AGENT, "vm", None, fence).await;
    assert!(matches!(late, Err(Error::Store(StoreError::Fenced))), "{late:?}");
    assert_eq!(world.catalog.get(AGENT, "vm").unwrap().phase(), Phase::Ready);
}

#[tokio::test]
async fn a_core_that_starts_again_gives_each_its_full_time() {
    let world = World::new().await;
    let a = world.announce("a", Phase::Ready).await;
    let (store, folder) = (world.store.clone(), world.folder.clone());
    drop(world);
    let again = World::on(store, folder, "core", true).await;
    assert_eq!(again.catalog.get("db", "a").unwrap(), a);
    assert!(again.catalog.inner.state().silence.counts(&record::key("db", "a"), 1));
    assert_eq!(again.announce("a", Phase::Ready).await, a, "it is known: nothing is committed");
}

#[tokio::test]
async fn what_ended_long_ago_is_forgotten() {
    let world = World::new().await;
    world.announce("a", Phase::Stopped).await;
    world.announce("b", Phase::Ready).await;
    let now = SystemTime::now();
    world.catalog.inner.forget(now + FORGET_AFTER / 2).await;
    assert_eq!(world.catalog.list(&Filter::default()).0.len(), 2);
    world.catalog.inner.forget(now + FORGET_AFTER * 2).await;
    let left = world.catalog.list(&Filter::default()).0;
    assert_eq!(left.iter().map(|instance| &*instance.name).collect::<Vec<_>>(), ["b"]);
}
