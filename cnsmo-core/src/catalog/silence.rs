//! How long each instance has been silent. No I/O.
//!
//! Time in which the core itself was paused counts for nobody, and of many instances that fall silent at once only some
//! become lost at a time: that is more likely the network's fault than theirs.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use cnsmo_proto::pb::catalog::Phase;

use super::record::Record;
use crate::store::Revision;

/// How often silence is looked at: well below the shortest TTL.
pub(super) const TICK: Duration = Duration::from_millis(200);
/// A tick that comes later than this means that the core was paused.
const PAUSE_MIN: Duration = Duration::from_secs(2);
/// Instances become lost at most in this share, or this number if it is more, per window.
const BRAKE_SHARE: usize = 20;
const BRAKE_MIN: usize = 20;
const BRAKE_WINDOW: Duration = Duration::from_secs(10);
/// A judgement that could not be committed is tried again after this time.
const RETRY: Duration = Duration::from_secs(5);

/// An instance that has been silent for too long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) key: Arc<str>,
    /// Judged as of this revision: if it has another one by now, somebody has heard of it.
    pub(super) revision: Revision,
    /// Unreachable or lost.
    pub(super) becomes: Phase,
}

#[derive(Debug)]
struct Heard {
    revision: Revision,
    becomes: Phase,
    /// Silence up to here is in order.
    deadline: Instant,
    /// Its place in [`Silence::queue`], not later than the deadline.
    queued: Instant,
    /// A judgement is on its way.
    is_judged: bool,
}

/// The instances that this core counts down. Times in it are of a clock that stands still while the core is paused.
#[derive(Debug)]
pub(super) struct Silence {
    heard: HashMap<Arc<str>, Heard>,
    /// Each instance once. A renewal leaves it where it is: that it was heard of is found when its turn comes.
    queue: BTreeSet<(Instant, Arc<str>)>,
    paused: Duration,
    ticked: Instant,
    /// When instances became lost, within the brake's window.
    lost: VecDeque<Instant>,
    is_braked: bool,
}

impl Silence {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            heard: HashMap::new(),
            queue: BTreeSet::new(),
            paused: Duration::ZERO,
            ticked: now,
            lost: VecDeque::new(),
            is_braked: false,
        }
    }

    /// Begins to count with the full time: what was announced was heard of now.
    pub(super) fn begin(&mut self, key: &str, record: &Record, now: Instant) {
        self.end(key);
        let (becomes, time) = match record.phase() {
            Phase::Unreachable => (Phase::Lost, record.grace),
            _ => (Phase::Unreachable, record.ttl),
        };
        let deadline = self.clock(now) + time;
        let key: Arc<str> = key.into();
        self.queue.insert((deadline, key.clone()));
        let revision = record.instance.revision;
        let heard = Heard { revision, becomes, deadline, queued: deadline, is_judged: false };
        self.heard.insert(key, heard);
    }

    /// Counts no more.
    pub(super) fn end(&mut self, key: &str) {
        if let Some((key, heard)) = self.heard.remove_entry(key) {
            self.queue.remove(&(heard.queued, key));
        }
    }

    /// Whether it is counted since this revision.
    pub(super) fn counts(&self, key: &str, revision: Revision) -> bool {
        self.heard.get(key).is_some_and(|heard| heard.revision == revision)
    }

    /// It was heard of. False: it is not counted here, or is being judged, so that only a commit can tell.
    pub(super) fn renew(&mut self, key: &str, ttl: Duration, now: Instant) -> bool {
        let clock = self.clock(now);
        match self.heard.get_mut(key) {
            Some(heard) if !heard.is_judged => {
                heard.deadline = clock + ttl;
                true
            }
            _ => false,
        }
    }

    /// What is to be judged now. Each is given once, until it begins anew or is put back.
    pub(super) fn due(&mut self, now: Instant) -> Vec<Due> {
        let clock = self.clock(now);
        self.ticked = now;
        while self.lost.front().is_some_and(|at| now.duration_since(*at) >= BRAKE_WINDOW) {
            self.lost.pop_front();
        }
        let population = self.heard.len() + self.lost.len();
        let mut room = (population / BRAKE_SHARE).max(BRAKE_MIN).saturating_sub(self.lost.len());
        let (mut due, mut held_back) = (Vec::new(), Vec::new());
        while let Some((at, _)) = self.queue.first()
            && *at <= clock
            && let Some((_, key)) = self.queue.pop_first()
        {
            let Some(heard) = self.heard.get_mut(&key) else { continue };
            if heard.deadline > clock {
                heard.queued = heard.deadline;
                self.queue.insert((heard.queued, key));
                continue;
            }
            if heard.becomes == Phase::Lost {
                if room == 0 {
                    held_back.push((heard.queued, key));
                    continue;
                }
                room -= 1;
                self.lost.push_back(now);
            }
            heard.is_judged = true;
            due.push(Due { key, revision: heard.revision, becomes: heard.becomes });
        }
        self.brake(held_back.len());
        self.queue.extend(held_back);
        due
    }

    /// What was being judged when the judging stopped has to be judged anew.
    pub(super) fn take_up(&mut self, now: Instant) {
        let clock = self.clock(now);
        for (key, heard) in self.heard.iter_mut().filter(|(_, heard)| heard.is_judged) {
            (heard.is_judged, heard.queued) = (false, clock);
            self.queue.insert((clock, key.clone()));
        }
    }

    /// Its judgement could not be committed.
    pub(super) fn put_back(&mut self, due: &Due, now: Instant) {
        let retry = self.clock(now) + RETRY;
        if let Some(heard) = self.heard.get_mut(&due.key)
            && heard.revision == due.revision
            && heard.is_judged
        {
            (heard.is_judged, heard.deadline, heard.queued) = (false, retry, retry);
            self.queue.insert((retry, due.key.clone()));
        }
    }

    /// The time of silence. Whoever comes first after a pause takes the pause out of it.
    fn clock(&mut self, now: Instant) -> Instant {
        let gap = now.saturating_duration_since(self.ticked);
        if gap > PAUSE_MIN {
            tracing::warn!(?gap, "the core was paused: no instance was silent for that time");
            self.paused += gap;
            self.ticked = now;
        }
        // The monotonic clock begins with the machine: a core cannot have been paused for longer than it counts.
        now.checked_sub(self.paused).unwrap_or(now)
    }

    fn brake(&mut self, held_back: usize) {
        let is_braked = held_back > 0;
        if is_braked && !self.is_braked {
            tracing::error!(
                held_back,
                instances = self.heard.len(),
                "many instances are silent: they become lost slowly, in case it is the network's fault"
            );
        } else if self.is_braked && !is_braked {
            tracing::info!("no instance is kept from becoming lost any more");
        }
        self.is_braked = is_braked;
    }
}

#[cfg(test)]
mod tests {
    use super::{super::record::check, super::record::tests::request, *};

    const TTL: Duration = Duration::from_secs(3);
    const GRACE: Duration = Duration::from_secs(60);

    struct World {
        silence: Silence,
        now: Instant,
        records: HashMap<String, Record>,
    }

    impl World {
        fn with(instances: usize) -> Self {
            let now = Instant::now();
            let mut world = Self { silence: Silence::new(now), now, records: HashMap::new() };
            for n in 0..instances {
                let record =
                    check(request(&format!("i{n}"), Phase::Ready), "service/db", "core").unwrap();
                world.silence.begin(&record.key(), &record, now);
                world.records.insert(record.key(), record);
            }
            world
        }

        /// Time passes tick by tick, and judgements are committed.
        fn pass(&mut self, time: Duration) -> Vec<(String, Phase)> {
            let until = self.now + time;
            let mut judged = Vec::new();
            while self.now < until {
                self.now += TICK;
                for due in self.silence.due(self.now) {
                    let key = due.key.to_string();
                    let record =
                        self.records.get(&key).unwrap().judged(due.becomes, "", String::new());
                    if record.is_counted() {
                        self.silence.begin(&key, &record, self.now);
                    } else {
                        self.silence.end(&key);
                    }
                    self.records.insert(key.clone(), record);
                    judged.push((key, due.becomes));
                }
            }
            judged
        }

        fn renew(&mut self, n: usize) -> bool {
            self.silence.renew(&key(n), TTL, self.now)
        }
    }

    fn key(n: usize) -> String {
        super::super::record::key("db", &format!("i{n}"))
    }

    #[test]
    fn silence_makes_unreachable_then_lost() {
        let mut world = World::with(2);
        for _ in 0..5 {
            assert!(world.pass(TTL * 2 / 3).is_empty());
            assert!(world.renew(0) && world.renew(1));
        }
        assert!(world.pass(TTL - TICK).is_empty());
        assert!(world.renew(0));
        assert_eq!(world.pass(TTL / 2), [(key(1), Phase::Unreachable)]);
        assert!(world.renew(0));
        let half = world.now + GRACE / 2;
        while world.now < half {
            assert!(world.pass(TTL / 2).is_empty());
            assert!(world.renew(0));
        }
        let mut judged = Vec::new();
        for _ in 0..40 {
            judged.extend(world.pass(TTL / 2));
            assert!(world.renew(0));
        }
        assert_eq!(judged, [(key(1), Phase::Lost)]);
        assert!(!world.renew(1), "what is lost comes back by a commit");
    }

    #[test]
    fn a_pause_of_the_core_is_nobodys_silence() {
        let mut world = World::with(1);
        assert!(world.pass(TTL * 2 / 3).is_empty());
        world.now += Duration::from_secs(30);
        // What was left of the TTL is left after the pause.
        assert!(world.pass(TTL / 4).is_empty());
        assert_eq!(world.pass(TTL / 3).len(), 1);
    }

    #[test]
    fn of_many_that_fall_silent_few_become_lost_at_a_time() {
        let mut world = World::with(1_000);
        assert_eq!(world.pass(TTL + TICK).len(), 1_000, "unreachable is not braked");
        let lost = world.pass(GRACE + BRAKE_WINDOW / 2);
        assert_eq!(lost.len(), 50);
        assert!(world.silence.is_braked);
        // The network heals.
        let rest: Vec<_> = world.silence.heard.keys().cloned().collect();
        assert_eq!(rest.len(), 950);
        for key in rest {
            assert!(world.silence.renew(&key, TTL, world.now));
        }
        assert!(world.pass(TTL - TICK).is_empty() && !world.silence.is_braked);
    }

    #[test]
    fn what_is_judged_is_given_once_and_no_renewal_hides_it() {
        let mut world = World::with(1);
        world.now += TICK;
        let mut due = Vec::new();
        while due.is_empty() {
            world.now += TICK;
            due = world.silence.due(world.now);
        }
        assert!(!world.renew(0), "the renewal must be a commit");
        world.now += TICK;
        assert!(world.silence.due(world.now).is_empty());
        world.silence.put_back(&due[0], world.now);
        assert!(world.renew(0));
        for _ in 0..2 {
            assert!(world.pass(TTL - TICK).is_empty());
            assert!(world.renew(0));
        }
    }
}
