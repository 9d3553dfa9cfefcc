//! An instance as it is kept, and the rules by which an announcement changes it. No I/O.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use cnsmo_proto::{
    model::{Labels, Name},
    pb::catalog::{AnnounceRequest, Instance, Phase},
};
use cnsmo_service::lifecycle;
use prost::Message as _;

use crate::{
    error::Error,
    events::Seen,
    store::{Entry, Revision},
};

/// How the keys of instances begin.
pub const INSTANCES: &str = "cnsmo/instances/";
/// The service of which each node's agent is an instance; the core announces it from what it sees of the agent.
pub const AGENT: &str = "agent";

/// Services that nobody else may announce instances of: those of the core, and those that agents report to it.
const RESERVED: [&str; 10] = [
    AGENT,
    "bus",
    "catalogue",
    "firewall",
    "identity",
    "loadbalancer",
    "orchestrator",
    "process",
    "state",
    "vpn",
];
/// Those of them that an agent may report.
const OF_AGENTS: [&str; 4] = ["firewall", "loadbalancer", "process", "vpn"];

/// The owner of what the core itself announces.
const OWN: &str = "core";

const TTL_DEFAULT: Duration = Duration::from_secs(3);
const TTL_MIN: Duration = Duration::from_secs(1);
const TTL_MAX: Duration = Duration::from_secs(600);
const GRACE_DEFAULT: Duration = Duration::from_secs(60);
const GRACE_MAX: Duration = Duration::from_secs(24 * 3_600);
/// All subscribers get all of an instance, so it stays small.
const ENDPOINTS_MAX: usize = 16;
const ATTRIBUTES_MAX: usize = 32;
const INCARNATION_BYTES_MAX: usize = 64;
const REASON_BYTES_MAX: usize = 64;
const MESSAGE_BYTES_MAX: usize = 1_024;
const PROTOCOL_BYTES_MAX: usize = 32;
/// A host name (RFC 1035, section 2.3.4) or a subject of the bus.
const ADDRESS_BYTES_MAX: usize = 255;

/// The value of a key: an [`AnnounceRequest`] with some fields more, so that a reader needs no other message.
#[derive(Clone, PartialEq, prost::Message)]
struct Kept {
    #[prost(message, optional, tag = "1")]
    instance: Option<Instance>,
    #[prost(message, optional, tag = "2")]
    ttl: Option<prost_types::Duration>,
    #[prost(message, optional, tag = "3")]
    grace: Option<prost_types::Duration>,
    #[prost(string, tag = "15")]
    holder: String,
    #[prost(bool, tag = "16")]
    followed: bool,
}

/// A valid instance, and what the core keeps beside it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Record {
    /// With the revision of its last change; 0 in one that is not committed yet.
    pub(super) instance: Arc<Instance>,
    pub(super) ttl: Duration,
    pub(super) grace: Duration,
    /// The core that received the last announcement that changed something.
    pub(super) holder: Arc<str>,
    /// It lives as long as the agent that reports it: its own silence means nothing.
    pub(super) followed: bool,
}

impl Record {
    /// None: not a record.
    pub(super) fn decode(value: &[u8], revision: Revision) -> Option<Self> {
        let Kept { instance, ttl, grace, holder, followed } = Kept::decode(value).ok()?;
        let mut instance = instance?;
        instance.revision = revision;
        let time = |time: Option<prost_types::Duration>| time?.try_into().ok();
        Some(Self {
            instance: Arc::new(instance),
            ttl: time(ttl).unwrap_or_default(),
            grace: time(grace).unwrap_or_default(),
            holder: holder.into(),
            followed,
        })
    }

    pub(super) fn encode(&self) -> Bytes {
        let time = |time: Duration| prost_types::Duration::try_from(time).ok();
        let kept = Kept {
            instance: Some(Instance { revision: 0, ..(*self.instance).clone() }),
            ttl: time(self.ttl),
            grace: time(self.grace),
            holder: self.holder.to_string(),
            followed: self.followed,
        };
        kept.encode_to_vec().into()
    }

    pub(super) fn key(&self) -> String {
        key(&self.instance.service, &self.instance.name)
    }

    pub(super) fn phase(&self) -> Phase {
        self.instance.phase()
    }

    /// Whether its silence means something.
    pub(super) fn is_counted(&self) -> bool {
        match self.phase() {
            Phase::Stopped | Phase::Lost => false,
            Phase::Unreachable => true,
            // The fleet counts the heartbeats of agents.
            _ => !self.followed && self.instance.service != AGENT,
        }
    }

    /// The same in another phase, by the core's own judgement.
    pub(super) fn judged(&self, phase: Phase, reason: &str, message: String) -> Self {
        let mut instance = (*self.instance).clone();
        instance.set_phase(phase);
        reason.clone_into(&mut instance.reason);
        instance.message = message;
        instance.phase_time = Some(SystemTime::now().into());
        instance.revision = 0;
        Self { instance: Arc::new(instance), ..self.clone() }
    }
}

/// What an entry of the store, or of a deleted key, is about. None: no instance.
pub(crate) fn seen(entry: &Entry) -> Option<Seen> {
    let name = entry.key.strip_prefix(INSTANCES)?.to_owned();
    let seen = Seen { kind: "instance", name, ..Seen::default() };
    let Some(record) = Record::decode(&entry.value, entry.mod_revision) else { return Some(seen) };
    let Instance { phase_time, reason, message, node, .. } = (*record.instance).clone();
    let word = record.phase().as_str_name().trim_start_matches("PHASE_").to_lowercase();
    let what = word.get(..1).map(str::to_uppercase).unwrap_or_default() + word.get(1..)?;
    Some(Seen { what: Some(what), time: phase_time, reason, message, node, ..seen })
}

/// Of an instance.
pub(super) fn key(service: &str, name: &str) -> String {
    format!("{INSTANCES}{service}/{name}")
}

/// An agent, as the fleet sees it.
pub(super) fn of_agent(instance: Instance, core: &str) -> Record {
    let instance = Arc::new(Instance { service: AGENT.into(), owner: OWN.into(), ..instance });
    let (ttl, grace) = (TTL_DEFAULT, GRACE_DEFAULT);
    Record { instance, ttl, grace, holder: core.into(), followed: true }
}

/// Of one of this core's own services.
pub(super) fn own(instance: Instance, core: &str) -> Result<Record, Error> {
    let request = AnnounceRequest { instance: Some(instance), ttl: None, grace: None };
    check_any(request, OWN, core)
}

/// What an agent reports of its VM. It says what is, whatever the last report was.
pub(super) fn reported(instance: Instance, node: &str, core: &str) -> Result<Record, Error> {
    let service = &instance.service;
    if RESERVED.contains(&&**service) && !OF_AGENTS.contains(&&**service) {
        return Err(Error::Denied(format!("instance.service: {service} is not run by agents")));
    }
    let instance = Some(Instance { node: node.into(), ..instance });
    let request = AnnounceRequest { instance, ttl: None, grace: None };
    let record = check_any(request, &agent_identity(node), core)?;
    Ok(Record { followed: true, ..record })
}

/// The owner of what the agent of a node reports.
pub(super) fn agent_identity(node: &str) -> String {
    format!("{AGENT}/{node}")
}

/// What a client announces, checked, with the defaults filled in.
pub(super) fn check(request: AnnounceRequest, owner: &str, core: &str) -> Result<Record, Error> {
    if let Some(Instance { service, .. }) = &request.instance
        && RESERVED.contains(&&**service)
    {
        return Err(Error::Denied(format!(
            "instance.service: instances of {service} are announced by the core alone"
        )));
    }
    check_any(request, owner, core)
}

fn check_any(request: AnnounceRequest, owner: &str, core: &str) -> Result<Record, Error> {
    let AnnounceRequest { instance, ttl, grace } = request;
    let mut instance = instance.ok_or_else(|| Error::Invalid("instance: missing".into()))?;
    check_name("instance.service", &instance.service)?;
    check_name("instance.name", &instance.name)?;
    if !instance.node.is_empty() {
        check_name("instance.node", &instance.node)?;
    }
    match Phase::try_from(instance.phase) {
        Err(_) | Ok(Phase::Unspecified) => {
            return Err(Error::Invalid("instance.phase: missing or unknown".into()));
        }
        Ok(Phase::Unreachable | Phase::Lost) => {
            return Err(Error::Invalid(
                "instance.phase: whether an instance is unreachable or lost is for the core to say"
                    .into(),
            ));
        }
        Ok(_) => {}
    }
    if !instance.reason.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return Err(Error::Invalid("instance.reason: not one word of A-Z, a-z and 0-9".into()));
    }
    for (field, text, max) in [
        ("instance.reason", &instance.reason, REASON_BYTES_MAX),
        ("instance.message", &instance.message, MESSAGE_BYTES_MAX),
        ("instance.incarnation", &instance.incarnation, INCARNATION_BYTES_MAX),
    ] {
        check_length(field, text, max)?;
    }
    check_endpoints(&instance)?;
    let attributes = std::mem::take(&mut instance.attributes);
    instance.attributes = check_attributes("instance.attributes", attributes)?.as_map().clone();
    owner.clone_into(&mut instance.owner);
    instance.phase_time = None;
    instance.revision = 0;
    Ok(Record {
        instance: Arc::new(instance),
        ttl: check_time("ttl", ttl, TTL_MIN, TTL_MAX)?.unwrap_or(TTL_DEFAULT),
        grace: check_time("grace", grace, Duration::ZERO, GRACE_MAX)?.unwrap_or(GRACE_DEFAULT),
        holder: core.into(),
        followed: false,
    })
}

pub(super) fn check_name(field: &str, name: &str) -> Result<(), Error> {
    Name::new(name).map_err(|error| Error::Invalid(format!("{field}: {error}")))?;
    Ok(())
}

/// Of an instance, or those that one must have.
pub(super) fn check_attributes(
    field: &str,
    attributes: std::collections::BTreeMap<String, String>,
) -> Result<Labels, Error> {
    if attributes.len() > ATTRIBUTES_MAX {
        return Err(Error::Invalid(format!(
            "{field}: {} of them; at most {ATTRIBUTES_MAX} are allowed",
            attributes.len()
        )));
    }
    Labels::new(attributes).map_err(|error| Error::Invalid(format!("{field}: {error}")))
}

fn check_endpoints(instance: &Instance) -> Result<(), Error> {
    let endpoints = &instance.endpoints;
    if endpoints.len() > ENDPOINTS_MAX {
        return Err(Error::Invalid(format!(
            "instance.endpoints: {} of them; at most {ENDPOINTS_MAX} are allowed",
            endpoints.len()
        )));
    }
    for (index, endpoint) in endpoints.iter().enumerate() {
        let field = |name: &str| format!("instance.endpoints[{index}].{name}");
        for (name, text, max) in [
            ("protocol", &endpoint.protocol, PROTOCOL_BYTES_MAX),
            ("address", &endpoint.address, ADDRESS_BYTES_MAX),
        ] {
            if text.is_empty() {
                return Err(Error::Invalid(format!("{}: empty", field(name))));
            }
            check_length(&field(name), text, max)?;
        }
        if endpoint.port > u32::from(u16::MAX) {
            return Err(Error::Invalid(format!(
                "{}: {} is above 65535",
                field("port"),
                endpoint.port
            )));
        }
    }
    Ok(())
}

fn check_length(field: &str, text: &str, max: usize) -> Result<(), Error> {
    if text.len() > max {
        return Err(Error::Invalid(format!("{field}: longer than {max} bytes")));
    }
    Ok(())
}

/// None: zero or missing.
fn check_time(
    field: &str,
    time: Option<prost_types::Duration>,
    min: Duration,
    max: Duration,
) -> Result<Option<Duration>, Error> {
    let Some(time) = time else { return Ok(None) };
    let time = Duration::try_from(time).ok().filter(|time| *time <= max);
    let time = time.filter(|time| time.is_zero() || *time >= min);
    let time = time.ok_or_else(|| {
        Error::Invalid(format!("{field}: is not within {} to {} s", min.as_secs(), max.as_secs()))
    })?;
    Ok((!time.is_zero()).then_some(time))
}

/// What an announcement comes to.
#[derive(Debug, PartialEq)]
pub(super) enum Decision {
    /// Nothing has changed but the time it was heard of.
    Renew,
    /// This is to be kept.
    Write(Record),
}

/// Compares an announcement with what is kept. `now`: for the time of a new phase.
///
/// # Errors
/// Another identity has the instance, or the step of its life is not legal. Nothing shall change.
pub(super) fn decide(
    known: Option<&Record>,
    mut announced: Record,
    now: SystemTime,
) -> Result<Decision, Error> {
    let Some(known) = known else { return Ok(Decision::Write(entered(announced, now))) };
    let (old, new) = (&*known.instance, &*announced.instance);
    let is_over = matches!(old.phase(), Phase::Lost | Phase::Stopped);
    if old.owner != new.owner && !is_over {
        return Err(Error::Exists(format!(
            "instance {} of {}: is announced by {} and is {}",
            old.name,
            old.service,
            old.owner,
            word(old.phase())
        )));
    }
    let is_same_life = old.owner == new.owner && old.incarnation == new.incarnation;
    if is_same_life && !announced.followed {
        check_step(old, new)?;
    }
    if !is_same_life || old.phase() != new.phase() {
        return Ok(Decision::Write(entered(announced, now)));
    }
    let revision = old.revision;
    let instance = Arc::make_mut(&mut announced.instance);
    instance.phase_time = old.phase_time;
    instance.revision = revision;
    if announced == *known {
        return Ok(Decision::Renew);
    }
    Arc::make_mut(&mut announced.instance).revision = 0;
    Ok(Decision::Write(announced))
}

fn entered(mut record: Record, now: SystemTime) -> Record {
    Arc::make_mut(&mut record.instance).phase_time = Some(now.into());
    record
}

fn check_step(old: &Instance, new: &Instance) -> Result<(), Error> {
    // After silence any phase is news: what happened meanwhile nobody has seen.
    let (Some(from), Some(to)) = (of_life(old.phase()), of_life(new.phase())) else {
        return Ok(());
    };
    if from == to || from.may_become(to) {
        return Ok(());
    }
    Err(Error::Precondition(format!(
        "instance {} of {}: cannot go from {from} to {to}",
        old.name, old.service
    )))
}

/// None: a phase that only the core sees.
fn of_life(phase: Phase) -> Option<lifecycle::Phase> {
    Some(match phase {
        Phase::Installing => lifecycle::Phase::Installing,
        Phase::Starting => lifecycle::Phase::Starting,
        Phase::Ready => lifecycle::Phase::Ready,
        Phase::Degraded => lifecycle::Phase::Degraded,
        Phase::Draining => lifecycle::Phase::Draining,
        Phase::Stopped => lifecycle::Phase::Stopped,
        Phase::Failed => lifecycle::Phase::Failed,
        Phase::Unspecified | Phase::Unreachable | Phase::Lost => return None,
    })
}

fn word(phase: Phase) -> &'static str {
    match phase {
        Phase::Unspecified => "unknown",
        Phase::Installing => "installing",
        Phase::Starting => "starting",
        Phase::Ready => "ready",
        Phase::Degraded => "degraded",
        Phase::Draining => "draining",
        Phase::Stopped => "stopped",
        Phase::Failed => "failed",
        Phase::Unreachable => "unreachable",
        Phase::Lost => "lost",
    }
}

#[cfg(test)]
pub(super) mod tests {
    use cnsmo_proto::pb::catalog::Endpoint;

    use super::*;

    pub(in crate::catalog) fn request(name: &str, phase: Phase) -> AnnounceRequest {
        let instance = Instance {
            name: name.into(),
            service: "db".into(),
            node: "n1".into(),
            phase: phase.into(),
            incarnation: "1".into(),
            ..Instance::default()
        };
        AnnounceRequest { instance: Some(instance), ttl: None, grace: None }
    }

    fn record(phase: Phase) -> Record {
        check(request("a", phase), "service/db", "core").unwrap()
    }

    fn kept(phase: Phase) -> Record {
        let mut kept = record(Phase::Ready);
        let instance = Arc::make_mut(&mut kept.instance);
        instance.set_phase(phase);
        instance.revision = 7;
        instance.phase_time = Some(SystemTime::UNIX_EPOCH.into());
        kept
    }

    fn of(record: &Record, change: impl FnOnce(&mut Instance)) -> Record {
        let mut record = record.clone();
        change(Arc::make_mut(&mut record.instance));
        record
    }

    const REPORTED: [Phase; 7] = [
        Phase::Installing,
        Phase::Starting,
        Phase::Ready,
        Phase::Degraded,
        Phase::Draining,
        Phase::Stopped,
        Phase::Failed,
    ];

    #[test]
    fn what_is_kept_is_what_was_announced() {
        let record = record(Phase::Ready);
        let decoded = Record::decode(&record.encode(), 9).unwrap();
        assert_eq!(decoded.instance.revision, 9);
        assert_eq!(of(&decoded, |instance| instance.revision = 0), record);
        let seen_by_clients = AnnounceRequest::decode(&*record.encode()).unwrap();
        assert_eq!(seen_by_clients.instance.as_ref(), Some(&*record.instance));
        assert_eq!(Record::decode(b"\xff", 1), None);
    }

    #[test]
    fn the_life_cycle_has_one_table() {
        for from in REPORTED {
            for to in REPORTED {
                let decided = decide(Some(&kept(from)), record(to), SystemTime::now());
                let legal = of_life(from).unwrap().may_become(of_life(to).unwrap());
                match decided {
                    Ok(Decision::Renew) => assert_eq!(from, to),
                    Ok(Decision::Write(_)) => assert!(legal, "{from:?} {to:?}"),
                    Err(Error::Precondition(text)) => {
                        assert!(!legal && from != to, "{from:?} {to:?}");
                        let steps = format!("cannot go from {} to {}", word(from), word(to));
                        assert_eq!(text, format!("instance a of db: {steps}"));
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }

    #[test]
    fn silence_ends_with_whatever_is_reported_and_a_new_life_begins_anywhere() {
        for to in REPORTED {
            for from in [Phase::Unreachable, Phase::Lost] {
                let decided = decide(Some(&kept(from)), record(to), SystemTime::now()).unwrap();
                assert!(matches!(decided, Decision::Write(_)), "{from:?} {to:?}");
            }
            let reborn = of(&record(to), |instance| instance.incarnation = "2".into());
            let decided = decide(Some(&kept(Phase::Draining)), reborn, SystemTime::now()).unwrap();
            let Decision::Write(written) = decided else { panic!("a new life is a change") };
            assert_ne!(written.instance.phase_time, kept(to).instance.phase_time);
        }
    }

    #[test]
    fn another_owner_is_refused_while_the_instance_lives() {
        let other = of(&record(Phase::Starting), |instance| instance.owner = "service/x".into());
        for from in REPORTED.into_iter().chain([Phase::Unreachable, Phase::Lost]) {
            let decided = decide(Some(&kept(from)), other.clone(), SystemTime::now());
            if matches!(from, Phase::Stopped | Phase::Lost) {
                assert!(matches!(decided, Ok(Decision::Write(_))), "{from:?}");
            } else {
                let Err(Error::Exists(text)) = decided else { panic!("{from:?}") };
                assert!(text.contains("announced by service/db"), "{text}");
            }
        }
    }

    #[test]
    fn a_change_of_content_keeps_the_time_of_the_phase() {
        let changed = of(&record(Phase::Ready), |instance| instance.message = "x".into());
        let decided = decide(Some(&kept(Phase::Ready)), changed, SystemTime::now()).unwrap();
        let Decision::Write(written) = decided else { panic!("a message is content") };
        assert_eq!(written.instance.phase_time, kept(Phase::Ready).instance.phase_time);
        let elsewhere = Record { holder: "other".into(), ..record(Phase::Ready) };
        let decided = decide(Some(&kept(Phase::Ready)), elsewhere, SystemTime::now()).unwrap();
        assert!(matches!(decided, Decision::Write(_)), "the core that counts is content");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let endpoint = || Endpoint { protocol: "tcp".into(), address: "a".into(), port: 1 };
        type Spoil<'a> = &'a dyn Fn(&mut AnnounceRequest, &mut Instance);
        let cases: [(&str, Spoil); 12] = [
            ("instance.service: ", &|_, i| i.service = "A".into()),
            ("instance.service: instances of agent", &|_, i| i.service = AGENT.into()),
            ("instance.name: ", &|_, i| i.name = "a/b".into()),
            ("instance.node: ", &|_, i| i.node = "-".into()),
            ("instance.phase: missing", &|_, i| i.phase = 0),
            ("instance.phase: missing or unknown", &|_, i| i.phase = 77),
            ("instance.phase: whether", &|_, i| i.set_phase(Phase::Lost)),
            ("instance.reason: not one word", &|_, i| i.reason = "a b".into()),
            ("instance.endpoints: 17", &|_, i| i.endpoints = vec![endpoint(); 17]),
            ("instance.endpoints[0].port: 65536", &|_, i| {
                i.endpoints = vec![Endpoint { port: 65_536, ..endpoint() }];
            }),
            ("ttl: is not within 1 to 600 s", &|r, _| {
                r.ttl = Some(prost_types::Duration { seconds: 0, nanos: 1 });
            }),
            ("grace: ", &|r, _| r.grace = Some(prost_types::Duration { seconds: -1, nanos: 0 })),
        ];
        for (text, spoil) in cases {
            let mut request = request("a", Phase::Ready);
            let mut instance = request.instance.take().unwrap();
            spoil(&mut request, &mut instance);
            request.instance = Some(instance);
            let error = check(request, "service/db", "core").unwrap_err().to_string();
            assert!(error.starts_with(text), "{error}");
        }
        let none = AnnounceRequest::default();
        assert_eq!(check(none, "", "").unwrap_err().to_string(), "instance: missing");
    }
}
