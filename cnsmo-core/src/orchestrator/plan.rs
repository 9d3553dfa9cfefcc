//! The next steps, from what is wanted and what is there. No I/O and no clock: the same world gives the same steps.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use cnsmo_proto::{
    model::{Deployment, Driver, Labels, Port, UNIT_TIMEOUT, Unit},
    pb::{
        catalog::Phase,
        deployment::{self as pb, Instance, instance::Goal},
    },
};

use super::Observed;
use crate::state::{Avoided, Placed, Step, StoredDeployment, template};

/// Ports given to instances whose deployment names none: below those that Linux gives to connections (32768 on).
const PORTS: std::ops::RangeInclusive<u16> = 20_000..=29_999;
/// A VM that is silent for this long without ever having told of an instance will not run it soon.
const NEVER_SEEN: Duration = Duration::from_secs(60);
/// Beyond all of its own times: after this an instance that shall end is given up.
const END_GRACE: Duration = Duration::from_secs(60);
/// For which a VM is avoided where an instance kept failing; each time in a row for twice as long. So a deployment that fails
/// everywhere does not go round and round.
const AVOID_FIRST: Duration = Duration::from_secs(600);
const AVOID_LONGEST: Duration = Duration::from_secs(4 * 3_600);

/// A VM.
#[derive(Clone, Debug, PartialEq)]
pub struct Host<'a> {
    /// Of the node.
    pub labels: &'a Labels,
    /// Its agent is connected and heard of.
    pub is_seen: bool,
    /// It is being emptied.
    pub is_draining: bool,
}

/// What there is.
#[derive(Debug)]
pub struct World<'a> {
    /// By name.
    pub deployments: &'a BTreeMap<String, StoredDeployment>,
    /// By deployment and name.
    pub placements: &'a BTreeMap<(String, String), Placed>,
    /// By deployment and VM.
    pub avoided: &'a BTreeMap<(String, String), Avoided>,
    /// By name.
    pub hosts: BTreeMap<&'a str, Host<'a>>,
    /// In the catalogue.
    pub observed: &'a Observed,
    /// Milliseconds since 1970.
    pub now_ms: u64,
}

/// What is to be done, in this order.
pub type Steps = Vec<Step>;

/// The next steps. `name` makes names of instances that never were before, for a deployment.
pub fn plan(world: &World<'_>, mut name: impl FnMut(&str) -> String) -> Steps {
    let mut steps = Steps::new();
    let mut taken = Taken::new(world);
    for ((deployment, _), placed) in world.placements {
        if !world.deployments.contains_key(deployment) {
            steps.extend(orphan(world, placed));
        }
    }
    let forgiven = world.avoided.iter().filter(|((deployment, node), avoided)| {
        let stored = world.deployments.get(deployment);
        let is_current = stored.is_some_and(|stored| template(&stored.spec) == avoided.template);
        // Remembered for as long again: then the next time is a first one.
        let end = avoided.until_ms + millis(avoid(avoided.times));
        !is_current || !world.hosts.contains_key(node.as_str()) || world.now_ms > end
    });
    steps.extend(forgiven.map(|((deployment, node), _)| {
        let (deployment, node) = (deployment.clone(), node.clone());
        Step::Forgive { deployment, node }
    }));
    for (deployment, stored) in world.deployments {
        let mut planner = Planner::new(world, deployment, stored, &mut steps);
        planner.end();
        planner.note_failures();
        planner.thin_out();
        planner.replace();
        planner.reschedule(&mut taken, &mut name);
        planner.fill(&mut taken, &mut name);
    }
    steps
}

/// Why fewer instances are placed than shall be, though the needs are met.
pub fn shortage(world: &World<'_>, deployment: &str) -> Option<&'static str> {
    let stored = world.deployments.get(deployment)?;
    let mut steps = Steps::new();
    let planner = Planner::new(world, deployment, stored, &mut steps);
    let mut candidates = world.hosts.iter().filter(|(node, host)| {
        suits(&stored.model, node, host) && !host.is_draining && host.is_seen
    });
    let has_room = Taken::new(world);
    let missing = planner.missing() > 0;
    let is_free = |node: &str| has_room.has_room(node, deployment, &stored.model);
    match (missing, candidates.clone().next().is_some(), candidates.any(|(n, _)| is_free(n))) {
        (true, false, _) => Some("no VM that is reachable and not draining is selected"),
        (true, true, false) => {
            Some("every selected VM has its limit, or its ports or units are in use")
        }
        _ => None,
    }
}

/// Of a deployment that is deleted.
fn orphan(world: &World<'_>, placed: &Placed) -> Option<Step> {
    if has_ended(world, placed) {
        return Some(remove(placed));
    }
    placed.is_wanted().then(|| drain(placed, "Deleted"))
}

fn remove(placed: &Placed) -> Step {
    let (deployment, name) = (placed.instance.deployment.clone(), placed.instance.name.clone());
    Step::Remove { deployment, name }
}

fn drain(placed: &Placed, reason: &'static str) -> Step {
    let (deployment, name) = (placed.instance.deployment.clone(), placed.instance.name.clone());
    Step::Drain { deployment, name, reason }
}

/// How long a VM is avoided for the nth time in a row.
fn avoid(times: u32) -> Duration {
    let doubled = 2_u32.checked_pow(times.saturating_sub(1)).unwrap_or(u32::MAX);
    AVOID_FIRST.saturating_mul(doubled).min(AVOID_LONGEST)
}

fn phase(world: &World<'_>, placed: &Placed) -> Phase {
    world.observed.phase(placed.deployment(), &placed.instance.name)
}

/// It shall end and has, or nothing more will come of it: no end hangs for ever.
fn has_ended(world: &World<'_>, placed: &Placed) -> bool {
    if !world.hosts.contains_key(placed.node()) {
        return true;
    }
    if placed.is_wanted() {
        return false;
    }
    let end = time(placed.instance.drain_timeout) + stop_timeout(&placed.instance) + END_GRACE;
    let is_late = world.now_ms.saturating_sub(placed.drain_ms) > millis(end);
    is_late || matches!(phase(world, placed), Phase::Stopped | Phase::Failed | Phase::Lost)
}

fn stop_timeout(instance: &Instance) -> Duration {
    let process = match &instance.driver {
        Some(pb::instance::Driver::Process(process)) => Some(process),
        Some(pb::instance::Driver::Systemd(systemd)) => match &systemd.unit {
            Some(pb::systemd::Unit::Process(process)) => Some(&**process),
            Some(pb::systemd::Unit::Name(_)) => return UNIT_TIMEOUT,
            None => None,
        },
        None => None,
    };
    time(process.and_then(|process| process.stop_timeout))
}

fn time(wire: Option<prost_types::Duration>) -> Duration {
    wire.and_then(|time| time.try_into().ok()).unwrap_or_default()
}

fn to_ms(time: prost_types::Timestamp) -> u64 {
    u64::try_from(time.seconds * 1_000 + i64::from(time.nanos) / 1_000_000).unwrap_or(0)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn suits(deployment: &Deployment, node: &str, host: &Host<'_>) -> bool {
    match &deployment.placement.node {
        Some(only) => only.as_str() == node,
        None => deployment.placement.selector.selects(host.labels),
    }
}

/// An instance that shall run, and may.
#[derive(Clone, Copy, Debug)]
struct Active<'a> {
    placed: &'a Placed,
    is_ready: bool,
    /// Ready for as long as the rollout asks for.
    is_settled: bool,
    fate: Fate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// As it shall be.
    Stays,
    /// Of another template, or where it may not be any more.
    Outdated,
    /// Its VM is being emptied: another one first.
    Moves,
}

/// One deployment.
struct Planner<'a, 's> {
    world: &'a World<'a>,
    name: &'a str,
    stored: &'a StoredDeployment,
    needs_met: bool,
    active: Vec<Active<'a>>,
    /// VMs where instances of this template kept failing, with those of this look.
    avoided: BTreeSet<&'a str>,
    /// Placed in this look.
    placed: usize,
    steps: &'s mut Steps,
}

impl<'a, 's> Planner<'a, 's> {
    fn new(
        world: &'a World<'a>,
        name: &'a str,
        stored: &'a StoredDeployment,
        steps: &'s mut Steps,
    ) -> Self {
        let current = template(&stored.spec);
        let (active, avoided, placed) = Default::default();
        let needs_met = false;
        let mut planner = Self { world, name, stored, needs_met, active, avoided, placed, steps };
        let observed = world.observed;
        planner.needs_met = stored
            .model
            .needs
            .iter()
            .all(|need| observed.ready(need.service.as_str()) >= need.ready);
        let mine = planner.placements().filter(|placed| placed.is_wanted());
        planner.active = mine.filter_map(|placed| planner.judge(placed, &current)).collect();
        let avoided = world.avoided.range((name.to_owned(), String::new())..);
        let avoided = avoided
            .take_while(|((of, _), _)| of == name)
            .filter(|(_, avoided)| avoided.template == current && avoided.until_ms > world.now_ms);
        planner.avoided = avoided.map(|((_, node), _)| node.as_str()).collect();
        planner
    }

    fn placements(&self) -> impl Iterator<Item = &'a Placed> + use<'a> {
        let name = self.name;
        let from = (name.to_owned(), String::new());
        let mine = self.world.placements.range(from..);
        mine.take_while(move |((of, _), _)| of == name).map(|(_, placed)| placed)
    }

    /// None: it cannot run any more.
    fn judge(&self, placed: &'a Placed, current: &[u8; 32]) -> Option<Active<'a>> {
        let host = self.world.hosts.get(placed.node())?;
        if self.is_lost(placed, host) {
            return None;
        }
        let observed = self.world.observed.instance(self.name, &placed.instance.name);
        let is_ready = observed.is_some_and(|instance| instance.phase() == Phase::Ready);
        let since = observed.and_then(|instance| instance.phase_time).map(to_ms);
        let soaked = since.is_some_and(|since| {
            self.world.now_ms.saturating_sub(since) >= millis(self.stored.model.rollout.soak)
        });
        let fate = if placed.template != *current || !suits(&self.stored.model, placed.node(), host)
        {
            Fate::Outdated
        } else if host.is_draining {
            Fate::Moves
        } else {
            Fate::Stays
        };
        Some(Active { placed, is_ready, is_settled: is_ready && soaked, fate })
    }

    fn is_lost(&self, placed: &Placed, host: &Host<'_>) -> bool {
        match phase(self.world, placed) {
            Phase::Lost => true,
            Phase::Unspecified => {
                let age = self.world.now_ms.saturating_sub(placed.create_ms);
                !host.is_seen && age > millis(NEVER_SEEN)
            }
            _ => false,
        }
    }

    fn desired(&self) -> usize {
        self.stored.model.replicas as usize
    }

    fn max_unavailable(&self) -> usize {
        self.stored.model.rollout.max_unavailable as usize
    }

    fn ready(&self) -> usize {
        self.active.iter().filter(|one| one.is_ready).count()
    }

    /// What has ended goes, what is lost is given up.
    fn end(&mut self) {
        let gone = self.placements().filter(|placed| has_ended(self.world, placed));
        self.steps.extend(gone.map(remove));
        let lost = self.placements().filter(|placed| {
            let host = self.world.hosts.get(placed.node());
            placed.is_wanted() && host.is_some_and(|host| self.is_lost(placed, host))
        });
        let lost: Vec<_> = lost.map(|placed| drain(placed, "NodeLost")).collect();
        self.steps.extend(lost);
    }

    /// Since when each is failing. One that is out of sight may be well, and one that was ready for long enough is.
    fn note_failures(&mut self) {
        let limit = self.stored.model.placement.reschedule_after;
        let since = |placed: &Placed| {
            let seen = self.world.observed.instance(self.name, &placed.instance.name);
            seen.and_then(|seen| seen.phase_time).map(to_ms)
        };
        let news = self.active.iter().filter_map(|Active { placed, .. }| {
            let phase = phase(self.world, placed);
            let is_failing = placed.fail_ms > 0;
            let now = match (phase, limit) {
                (_, None) | (Phase::Unreachable, _) => false,
                (Phase::Failed, Some(_)) => true,
                (Phase::Ready, Some(limit)) => {
                    let for_ms =
                        since(placed).map_or(0, |since| self.world.now_ms.saturating_sub(since));
                    is_failing && for_ms < millis(limit)
                }
                (_, Some(_)) => is_failing,
            };
            let (deployment, name) = (self.name.to_owned(), placed.instance.name.clone());
            (now != is_failing).then_some(Step::Fail { deployment, name, is_failing: now })
        });
        let news: Vec<_> = news.collect();
        self.steps.extend(news);
    }

    /// Those that have been failing for too long go to other VMs, as many at a time as may be missing.
    fn reschedule(&mut self, taken: &mut Taken<'a>, name: &mut impl FnMut(&str) -> String) {
        let Some(limit) = self.stored.model.placement.reschedule_after else { return };
        if !self.needs_met {
            return;
        }
        let coming = |one: &&Active<'_>| !one.is_ready && one.placed.fail_ms == 0;
        let coming = self.active.iter().filter(coming).count();
        for _ in coming..self.max_unavailable() {
            let world = self.world;
            let is_due = |one: &Active<'_>| {
                let failing = one.placed.fail_ms > 0
                    && world.now_ms.saturating_sub(one.placed.fail_ms) >= millis(limit);
                let is_down = matches!(phase(world, one.placed), Phase::Failed | Phase::Starting);
                let host = world.hosts.get(one.placed.node());
                let is_seen = host.is_some_and(|host| host.is_seen);
                one.fate == Fate::Stays && failing && is_down && is_seen
            };
            let Some(index) = self.active.iter().position(is_due) else { return };
            let placed = self.active[index].placed;
            let is_new = self.avoided.insert(placed.node());
            // Where it is, it may recover; nowhere it will not.
            let Some(to) = self.choose(taken).filter(|node| !self.avoided.contains(node)) else {
                if is_new {
                    self.avoided.remove(placed.node());
                }
                return;
            };
            self.active.remove(index);
            let key = (self.name.to_owned(), placed.node().to_owned());
            let before = world.avoided.get(&key).filter(|one| one.template == placed.template);
            let times = before.map_or(0, |before| before.times).saturating_add(1);
            let until_ms = world.now_ms + millis(avoid(times));
            let avoided = Avoided { template: placed.template, until_ms, times };
            let (deployment, node) = key;
            self.steps.push(Step::Avoid { deployment, node, avoided });
            self.steps.push(drain(placed, "Failing"));
            self.place(to, taken, name);
        }
    }

    /// More than shall be: first those that are not ready, then what is to be replaced anyway, then where the most are, then
    /// the youngest. One that is ready only where enough others are.
    fn thin_out(&mut self) {
        while self.active.len() > self.desired() {
            let groups: Vec<_> = self.active.iter().map(|one| self.group(one)).collect();
            let crowd = |one: &Active<'_>| {
                let own = self.group(one);
                groups.iter().filter(|group| **group == own).count()
            };
            let mut active = self.active.clone();
            active.sort_by_cached_key(|one| {
                let stays = one.fate == Fate::Stays;
                (one.is_ready, stays, Reverse(crowd(one)), Reverse(one.placed.create_ms))
            });
            self.active = active;
            // Those that come in place of moving ones are no surplus: then a moving one goes, once it is not missed.
            let is_surplus = self.active.len() > self.desired() + self.surge();
            let moving = self.active.iter().position(|one| one.fate == Fate::Moves);
            let place = if is_surplus { 0 } else { moving.unwrap_or(0) };
            let victim = self.active[place];
            if victim.is_ready && self.ready() <= self.desired() {
                return;
            }
            self.active.remove(place);
            let reason = if victim.fate == Fate::Moves { "NodeDraining" } else { "ScaledDown" };
            self.steps.push(drain(victim.placed, reason));
        }
    }

    /// Outdated ones end, as many as may be missing at a time; those that are not ready are missing already.
    fn replace(&mut self) {
        if !self.needs_met {
            return;
        }
        let floor = self.desired().saturating_sub(self.max_unavailable());
        let counts = |one: &Active<'_>| match one.fate {
            Fate::Stays => one.is_settled,
            Fate::Outdated | Fate::Moves => one.is_ready,
        };
        let mut spare = self.active.iter().filter(|one| counts(one)).count().saturating_sub(floor);
        let mut kept = Vec::new();
        for one in std::mem::take(&mut self.active) {
            let goes = match one.fate {
                Fate::Stays => false,
                Fate::Moves => !one.is_ready,
                Fate::Outdated if !one.is_ready => true,
                Fate::Outdated if spare > 0 => {
                    spare -= 1;
                    true
                }
                Fate::Outdated => false,
            };
            if goes {
                let reason = if one.fate == Fate::Moves { "NodeDraining" } else { "Replaced" };
                self.steps.push(drain(one.placed, reason));
            } else {
                kept.push(one);
            }
        }
        self.active = kept;
    }

    /// Value of the label over which instances are spread.
    fn group(&self, one: &Active<'_>) -> Option<&'a String> {
        let labels = self.world.hosts.get(one.placed.node())?.labels.as_map();
        labels.get(&self.stored.model.placement.spread)
    }

    /// More than there shall be, while some move to other VMs.
    fn surge(&self) -> usize {
        let moving = self.active.iter().filter(|one| one.fate == Fate::Moves).count();
        moving.min(self.max_unavailable())
    }

    /// What is missing, and for each that moves another one first.
    fn missing(&self) -> usize {
        (self.desired() + self.surge()).saturating_sub(self.active.len() + self.placed)
    }

    fn fill(&mut self, taken: &mut Taken<'a>, name: &mut impl FnMut(&str) -> String) {
        if !self.needs_met {
            return;
        }
        for _ in 0..self.missing() {
            let Some(node) = self.choose(taken) else { return };
            self.place(node, taken, name);
        }
    }

    fn place(
        &mut self,
        node: &'a str,
        taken: &mut Taken<'a>,
        name: &mut impl FnMut(&str) -> String,
    ) {
        let ports = taken.give_ports(node, &self.stored.model.template.ports);
        let instance = self.instance(node, name(self.name), ports);
        taken.put(self.world, node, self.name, &self.stored.model);
        self.placed += 1;
        self.steps.push(Step::Place(Box::new(instance)));
    }

    /// Where it did not fail, evenly over the values of the label, then over the VMs, then where the least runs.
    fn choose(&self, taken: &Taken<'a>) -> Option<&'a str> {
        let model = &self.stored.model;
        let group = |host: &Host<'a>| host.labels.as_map().get(&model.placement.spread);
        let fits = self.world.hosts.iter().filter(|(node, host)| {
            suits(model, node, host)
                && host.is_seen
                && !host.is_draining
                && taken.has_room(node, self.name, model)
        });
        let key = |(node, host): &(&&'a str, &Host<'a>)| {
            let in_group = taken.in_group(self.name, group(host).map(String::as_str));
            let counts = (taken.count(node, Some(self.name)), taken.count(node, None));
            (self.avoided.contains(*node), in_group, counts, **node)
        };
        fits.min_by_key(key).map(|(node, _)| *node)
    }

    fn instance(&self, node: &str, name: String, ports: Vec<pb::Port>) -> Instance {
        let spec = &self.stored.spec;
        Instance {
            name,
            deployment: self.name.to_owned(),
            node: node.to_owned(),
            goal: Goal::Run.into(),
            goal_reason: String::new(),
            generation: self.stored.metadata.generation,
            driver: spec.driver.clone().map(|driver| match driver {
                pb::deployment_spec::Driver::Process(one) => pb::instance::Driver::Process(one),
                pb::deployment_spec::Driver::Systemd(one) => pb::instance::Driver::Systemd(one),
            }),
            ports,
            attributes: spec.attributes.clone(),
            drain_timeout: spec.drain_timeout,
        }
    }
}

/// What is in use on each VM.
struct Taken<'a> {
    /// Instances by VM and deployment, ending ones left out.
    counts: BTreeMap<&'a str, BTreeMap<&'a str, u32>>,
    /// By deployment and value of its label.
    groups: BTreeMap<(&'a str, Option<&'a str>), u32>,
    /// Of all instances on the VM, ending ones too.
    ports: BTreeMap<&'a str, BTreeSet<(u32, u16)>>,
    /// Units that are there once on each VM, by VM, of all instances, ending ones too.
    units: BTreeMap<&'a str, BTreeSet<&'a str>>,
}

impl<'a> Taken<'a> {
    fn new(world: &'a World<'a>) -> Self {
        let (counts, groups, ports, units) = Default::default();
        let mut taken = Self { counts, groups, ports, units };
        for ((deployment, _), placed) in world.placements {
            let used = taken.ports.entry(placed.node()).or_default();
            used.extend(placed.instance.ports.iter().map(|port| (port.protocol, port.port as u16)));
            taken.units.entry(placed.node()).or_default().extend(placed_unit(&placed.instance));
            if placed.is_wanted()
                && let Some(stored) = world.deployments.get(deployment)
            {
                taken.put(world, placed.node(), deployment, &stored.model);
            }
        }
        taken
    }

    fn put(
        &mut self,
        world: &'a World<'a>,
        node: &'a str,
        deployment: &'a str,
        model: &'a Deployment,
    ) {
        *self.counts.entry(node).or_default().entry(deployment).or_default() += 1;
        let labels = world.hosts.get(node).map(|host| host.labels.as_map());
        let group = labels.and_then(|labels| labels.get(&model.placement.spread));
        *self.groups.entry((deployment, group.map(String::as_str))).or_default() += 1;
        self.units.entry(node).or_default().extend(single_unit(&model.template.driver));
    }

    fn in_group(&self, deployment: &'a str, group: Option<&'a str>) -> u32 {
        self.groups.get(&(deployment, group)).copied().unwrap_or_default()
    }

    /// None: of all deployments.
    fn count(&self, node: &str, deployment: Option<&str>) -> u32 {
        let Some(counts) = self.counts.get(node) else { return 0 };
        match deployment {
            Some(deployment) => counts.get(deployment).copied().unwrap_or_default(),
            None => counts.values().sum(),
        }
    }

    fn has_room(&self, node: &str, deployment: &str, model: &Deployment) -> bool {
        let limit = model.placement.max_per_node;
        let unit = single_unit(&model.template.driver);
        let is_unit_free =
            unit.is_none_or(|unit| !self.units.get(node).is_some_and(|used| used.contains(unit)));
        let used = self.ports.get(node);
        let is_free = |port: &Port| {
            let wanted = (u32::from(port.protocol), port.port);
            port.port == 0 || used.is_none_or(|used| !used.contains(&wanted))
        };
        (limit == 0 || self.count(node, Some(deployment)) < limit)
            && is_unit_free
            && model.template.ports.iter().all(is_free)
    }

    /// A VM has room for far more instances than it can run: the range is never used up.
    fn give_ports(&mut self, node: &'a str, ports: &[Port]) -> Vec<pb::Port> {
        let used = self.ports.entry(node).or_default();
        let mut give = |port: &Port| {
            let protocol = u32::from(port.protocol);
            let number = match port.port {
                0 => PORTS.into_iter().find(|n| !used.contains(&(protocol, *n))).unwrap_or(0),
                number => number,
            };
            used.insert((protocol, number));
            pb::Port { port: number.into(), ..port.into() }
        };
        ports.iter().map(&mut give).collect()
    }
}

/// The unit that all instances would have to share on a VM.
fn single_unit(driver: &Driver) -> Option<&str> {
    match driver {
        Driver::Unit(unit) if !Unit::is_template(&unit.name) => Some(&unit.name),
        Driver::Unit(_) | Driver::Process(_) | Driver::Transient(_) => None,
    }
}

/// As [`single_unit`], of an instance that is placed.
fn placed_unit(instance: &Instance) -> Option<&str> {
    let Some(pb::instance::Driver::Systemd(systemd)) = &instance.driver else { return None };
    let Some(pb::systemd::Unit::Name(name)) = &systemd.unit else { return None };
    (!Unit::is_template(name)).then_some(name)
}
