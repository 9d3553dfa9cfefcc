//! Random work, against plain maps.

use proptest::{collection::vec, prelude::*, sample::select, test_runner::TestRunner};

use super::*;

#[derive(Clone, Debug)]
enum Action {
    Txn { compares: Vec<(&'static str, Guess)>, success: Vec<Step>, failure: Vec<Step> },
    Grant,
    End { lease: usize, expired: bool },
}

/// Of a key's state, right or wrong.
#[derive(Clone, Copy, Debug)]
enum Guess {
    Absent,
    Version(i64),
    Revision(i64),
    Lease(usize),
    Value(u8),
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Put { key: &'static str, value: u8, lease: Option<usize> },
    Delete(&'static str),
    DeletePrefix(&'static str),
    Get(&'static str),
}

fn key() -> impl Strategy<Value = &'static str> {
    select(vec!["a", "a/1", "a/2", "a/ö", "b", "b/1"])
}

fn step() -> impl Strategy<Value = Step> {
    let put = (key(), 0..4_u8, proptest::option::weighted(0.3, 0..4_usize));
    prop_oneof![
        5 => put.prop_map(|(key, value, lease)| Step::Put { key, value, lease }),
        2 => key().prop_map(Step::Delete),
        1 => select(vec!["a", "a/", "b", "c"]).prop_map(Step::DeletePrefix),
        2 => key().prop_map(Step::Get),
    ]
}

fn guess() -> impl Strategy<Value = Guess> {
    prop_oneof![
        Just(Guess::Absent),
        (0..4_i64).prop_map(Guess::Version),
        (0..9_i64).prop_map(Guess::Revision),
        (0..4_usize).prop_map(Guess::Lease),
        (0..4_u8).prop_map(Guess::Value),
    ]
}

fn action() -> impl Strategy<Value = Action> {
    let txn = (vec((key(), guess()), 0..2), vec(step(), 0..5), vec(step(), 0..3));
    prop_oneof![
        8 => txn.prop_map(|(compares, success, failure)| Action::Txn { compares, success, failure }),
        1 => Just(Action::Grant),
        1 => (0..4_usize, any::<bool>()).prop_map(|(lease, expired)| Action::End { lease, expired }),
    ]
}

/// What the store should be.
#[derive(Default)]
struct Model {
    keys: BTreeMap<String, Entry>,
    /// By revision; the first one is empty.
    history: Vec<BTreeMap<String, Entry>>,
    /// By number of the grant; false: ended.
    leases: Vec<(LeaseId, bool)>,
}

impl Model {
    /// One that was never granted has a number as well.
    fn lease(&self, number: usize) -> LeaseId {
        self.leases.get(number).map_or(1_000, |(id, _)| *id)
    }

    fn lives(&self, id: LeaseId) -> bool {
        self.leases.contains(&(id, true))
    }

    fn revision(&self) -> Revision {
        Revision::try_from(self.history.len()).unwrap() - 1
    }

    fn txn(&self, compares: &[(&str, Guess)], success: &[Step], failure: &[Step]) -> Txn {
        let ops = |steps: &[Step]| steps.iter().map(|step| self.op(*step)).collect();
        let compare = |(key, guess): &(&str, Guess)| Compare {
            key: (*key).into(),
            target: match *guess {
                Guess::Absent => Target::ModRevision(0),
                Guess::Version(version) => Target::Version(version),
                Guess::Revision(revision) => Target::ModRevision(revision),
                Guess::Lease(number) => Target::Lease(self.lease(number)),
                Guess::Value(value) => Target::Value(vec![value].into()),
            },
        };
        Txn {
            compares: compares.iter().map(compare).collect(),
            success: ops(success),
            failure: ops(failure),
            ..Txn::default()
        }
    }

    fn op(&self, step: Step) -> Op {
        match step {
            Step::Put { key, value, lease } => Op::Put {
                key: key.into(),
                value: vec![value].into(),
                content_type: format!("type-{value}"),
                lease: lease.map_or(0, |number| self.lease(number)),
            },
            Step::Delete(key) => delete(key),
            Step::DeletePrefix(prefix) => Op::DeletePrefix { prefix: prefix.into() },
            Step::Get(key) => Op::Get { key: key.into() },
        }
    }

    fn holds(&self, compare: &Compare) -> bool {
        let entry = self.keys.get(&compare.key).cloned().unwrap_or_default();
        match &compare.target {
            Target::ModRevision(revision) => entry.mod_revision == *revision,
            Target::Version(version) => entry.version == *version,
            Target::Lease(lease) => entry.lease == *lease,
            Target::Value(value) => entry.version > 0 && entry.value == *value,
        }
    }

    /// None: it names a lease that is gone.
    fn commit(&mut self, txn: Txn) -> Option<Outcome> {
        let succeeded = txn.compares.iter().all(|compare| self.holds(compare));
        let (mut keys, mut reads, mut changed) = (self.keys.clone(), Vec::new(), false);
        let next = self.revision() + 1;
        for op in if succeeded { txn.success } else { txn.failure } {
            match op {
                Op::Put { key, value, content_type, lease } => {
                    if lease != 0 && !self.lives(lease) {
                        return None;
                    }
                    let before = keys.get(&key);
                    let entry = Entry {
                        key: key.clone(),
                        value,
                        content_type,
                        create_revision: before.map_or(next, |e| e.create_revision),
                        mod_revision: next,
                        version: before.map_or(1, |e| e.version + 1),
                        lease,
                    };
                    keys.insert(key, entry);
                    changed = true;
                }
                Op::Delete { key } => changed |= keys.remove(&key).is_some(),
                Op::DeletePrefix { prefix } => {
                    let before = keys.len();
                    keys.retain(|key, _| !key.starts_with(&prefix));
                    changed |= keys.len() < before;
                }
                Op::Get { key } => reads.push(Read { entry: keys.get(&key).cloned(), key }),
            }
        }
        self.keys = keys;
        if changed {
            self.history.push(self.keys.clone());
        }
        Some(Outcome { succeeded, revision: self.revision(), reads })
    }

    fn end(&mut self, id: LeaseId) -> Option<Revision> {
        self.leases.iter_mut().find(|lease| **lease == (id, true))?.1 = false;
        let before = self.keys.len();
        self.keys.retain(|_, entry| entry.lease != id);
        if self.keys.len() < before {
            self.history.push(self.keys.clone());
        }
        Some(self.revision())
    }
}

/// Sent together, so that several end up in one group; the queue keeps their order.
async fn round(store: &Store, model: &mut Model, actions: Vec<Action>) {
    let mut sent = Vec::new();
    for action in &actions {
        match action {
            Action::Txn { compares, success, failure } => {
                sent.push(Work::Commit(model.txn(compares, success, failure)));
            }
            Action::Grant => sent.push(Work::Grant {
                owner: "me".into(),
                ttl: Duration::from_secs(1),
                holder: "core".into(),
            }),
            Action::End { lease, expired } => sent.push(Work::EndLease {
                id: model.lease(*lease),
                expired: *expired,
                guard: None,
            }),
        }
    }
    let done = futures::future::join_all(sent.iter().map(|work| store.ask(work.clone()))).await;
    for (work, done) in sent.into_iter().zip(done) {
        match (work, done) {
            (Work::Commit(txn), Ok(Done::Outcome(outcome))) => {
                assert_eq!(Some(outcome), model.commit(txn.clone()), "{txn:?}");
            }
            (Work::Commit(txn), Err(StoreError::LeaseGone(_))) => {
                assert_eq!(model.commit(txn.clone()), None, "{txn:?}");
            }
            (Work::EndLease { id, .. }, Ok(Done::Ended(revision))) => {
                assert_eq!(revision, model.end(id), "lease {id}");
            }
            (Work::Grant { .. }, Ok(Done::Lease(Some(lease)))) => {
                assert!(model.leases.iter().all(|(id, _)| *id < lease.id));
                model.leases.push((lease.id, true));
            }
            other => panic!("{other:?}"),
        }
    }
}

async fn check(store: &Store, model: &Model) {
    let all = |slice: Slice| slice.entries.into_iter().map(|e| (e.key.clone(), e)).collect();
    assert_eq!(store.status().await.unwrap().revision, model.revision());
    for (at, expected) in (0..).zip(&model.history) {
        let slice = store.range(Range { at: Some(at), ..Range::prefix("") }).await.unwrap();
        assert_eq!(&all(slice) as &BTreeMap<String, Entry>, expected, "at revision {at}");
    }
    let living = model.leases.iter().filter(|(_, lives)| *lives).map(|(id, _)| *id);
    let leases = store.leases().await.unwrap();
    assert_eq!(leases.iter().map(|l| l.id).collect::<Vec<_>>(), living.collect::<Vec<_>>());
    // Replaying the feed gives the same states.
    let (mut feed, mut replayed) = (store.follow(0), BTreeMap::new());
    while feed.revision() < model.revision() {
        for commit in feed.next().await.unwrap() {
            for event in &commit.events {
                let before = replayed.get(&event.entry.key).map_or(0, |e: &Entry| e.mod_revision);
                assert_eq!(event.prev_revision, before, "{event:?}");
                match event.change {
                    Change::Put => {
                        replayed.insert(event.entry.key.clone(), event.entry.clone());
                    }
                    Change::Delete | Change::Expire => drop(replayed.remove(&event.entry.key)),
                }
            }
            let at = usize::try_from(commit.revision).unwrap();
            assert_eq!(replayed, model.history[at], "at revision {at}");
        }
    }
}

/// The same for any engine: `place` makes an empty database.
fn random_transactions(place: impl Fn() -> Place, cases: u32) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut runner = TestRunner::new(ProptestConfig { cases, ..ProptestConfig::default() });
    let rounds = vec(vec(action(), 1..8), 1..12);
    let result = runner.run(&rounds, |rounds| {
        runtime.block_on(async {
            let place = place();
            let store = place.open().await;
            let mut model = Model { history: vec![BTreeMap::new()], ..Model::default() };
            for actions in rounds {
                round(&store, &mut model, actions).await;
            }
            check(&store, &model).await;
            store.close().await;
            let store = place.open().await;
            check(&store, &model).await;
            let cut = model.revision() / 2;
            store.compact(cut).await.unwrap();
            let kept = store.range(Range { at: Some(cut), ..Range::prefix("") }).await.unwrap();
            let expected = &model.history[usize::try_from(cut).unwrap()];
            assert!(kept.entries.iter().eq(expected.values()), "{kept:?}");
            store.close().await;
        });
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn random_transactions_on_sqlite() {
    random_transactions(Place::sqlite, 64);
}

#[test]
fn random_transactions_on_postgres() {
    random_transactions(Place::postgres, 16);
}
