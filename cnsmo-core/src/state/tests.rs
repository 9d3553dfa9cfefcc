use cnsmo_proto::pb::{
    meta::Metadata,
    node,
    policy::{Action, Direction, FirewallRule, PortRange},
    resource::{Resource, resource},
};

use std::time::Duration;

use crate::identity::Issued;

use super::*;

fn rule(port: u32) -> FirewallRule {
    FirewallRule {
        name: "http".into(),
        action: Action::Allow.into(),
        direction: Direction::Ingress.into(),
        protocol: Some(6),
        ports: vec![PortRange { first: port, last: port }],
        ..FirewallRule::default()
    }
}

fn policy(name: &str, port: u32) -> Resource {
    let metadata = Metadata { name: name.into(), ..Metadata::default() };
    let spec = FirewallPolicySpec { rules: vec![rule(port)], ..FirewallPolicySpec::default() };
    let policy = FirewallPolicy { metadata: Some(metadata), spec: Some(spec), status: None };
    Resource { resource: Some(resource::Resource::FirewallPolicy(policy)) }
}

fn node_labels(name: &str, labels: &str) -> Resource {
    let labels: Labels = labels.parse().unwrap();
    let labels = labels.as_map().clone();
    let metadata = Metadata { name: name.into(), labels, ..Metadata::default() };
    let node = node::Node { metadata: Some(metadata), ..Default::default() };
    Resource { resource: Some(resource::Resource::Node(node)) }
}

fn apply(state: &mut State, resources: Vec<Resource>) -> Result<Vec<Outcome>, Error> {
    apply_as(state, resources, Mode::Unspecified)
}

fn apply_as(
    state: &mut State,
    resources: Vec<Resource>,
    mode: Mode,
) -> Result<Vec<Outcome>, Error> {
    let plan = state.plan_apply(parse_apply(resources)?, mode, SystemTime::now())?;
    let outcomes = plan.changes.iter().map(Change::outcome).collect();
    if !plan.is_empty() {
        state.commit(plan, state.revision() + 1);
    }
    Ok(outcomes)
}

fn enrolment(node: &str, key: u8) -> Enrolment {
    Enrolment {
        token_id: "t".into(),
        secret_sha256: [7; 32],
        name: Name::new(node).unwrap(),
        labels: "role=agent,zone=a".parse().unwrap(),
        spki_sha256: [key; 32],
    }
}

fn token(uses_max: u32) -> TokenRecord {
    TokenRecord {
        secret_sha256: [7; 32],
        create_time: SystemTime::now(),
        expire_time: SystemTime::now() + Duration::from_secs(60),
        uses_max,
        used_by: BTreeSet::new(),
        grant: TokenGrant::default(),
        labels: "role=token".parse().unwrap(),
    }
}

fn with_token(uses_max: u32) -> State {
    let mut state = State::default();
    let plan = state.plan_token("t".into(), token(uses_max), SystemTime::now()).unwrap();
    state.commit(plan, 1);
    state
}

fn enrol(state: &mut State, enrolment: &Enrolment) -> Result<(), Error> {
    let plan = state.plan_enrolment(enrolment, Issued::sample(), SystemTime::now())?;
    if !plan.is_empty() {
        state.commit(plan, state.revision() + 1);
    }
    Ok(())
}

#[test]
fn a_change_of_the_spec_counts_and_an_equal_apply_does_not() {
    let mut state = State::default();
    assert_eq!(apply(&mut state, vec![policy("web", 80)]).unwrap(), [Outcome::Created]);
    let first = state.policies()["web"].metadata.clone();
    assert_eq!((first.revision, first.generation), (1, 1));
    assert_eq!(apply(&mut state, vec![policy("web", 80)]).unwrap(), [Outcome::Unchanged]);
    assert_eq!(state.revision(), 1);
    let both = vec![policy("web", 81), policy("db", 5432)];
    assert_eq!(apply(&mut state, both).unwrap(), [Outcome::Updated, Outcome::Created]);
    let second = &state.policies()["web"].metadata;
    assert_eq!((second.revision, second.generation), (2, 2));
    assert_eq!((&second.uid, &second.create_time), (&first.uid, &first.create_time));
    assert_eq!(state.policies()["db"].metadata.revision, 2);
}

#[test]
fn labels_of_a_policy_change_without_a_new_generation() {
    let mut state = State::default();
    apply(&mut state, vec![policy("web", 80)]).unwrap();
    let mut labelled = policy("web", 80);
    let Some(resource::Resource::FirewallPolicy(inner)) = &mut labelled.resource else { panic!() };
    inner.metadata.as_mut().unwrap().labels = [("team".to_owned(), "a".to_owned())].into();
    assert_eq!(apply(&mut state, vec![labelled]).unwrap(), [Outcome::Updated]);
    let metadata = &state.policies()["web"].metadata;
    assert_eq!((state.revision(), metadata.revision, metadata.generation), (2, 1, 1));
}

#[test]
fn errors_name_resource_and_field() {
    let mut state = State::default();
    apply(&mut state, vec![policy("old", 80)]).unwrap();
    let mut bad = policy("web", 80);
    let Some(resource::Resource::FirewallPolicy(inner)) = &mut bad.resource else { panic!() };
    let mut rules = vec![rule(1), rule(2), rule(70_000)];
    for (n, rule) in rules.iter_mut().enumerate() {
        rule.name = format!("r{n}");
    }
    inner.spec.as_mut().unwrap().rules = rules;
    let cases = [
        (vec![bad], "FirewallPolicy web: spec.rules[2].ports[0]: 70000 is not a port: 0 to 65535"),
        (vec![policy("a", 1), policy("a", 2)], "FirewallPolicy a: appears twice in one request"),
        (
            vec![policy("a", 1), policy("No", 2)],
            "resources[1] (FirewallPolicy): metadata.name: `No` is not",
        ),
        (vec![Resource::default()], "resources[0]: missing"),
        (vec![policy("new", 1), node_labels("ghost", "")], "Node ghost: has not joined"),
    ];
    for (resources, text) in cases {
        let error = apply(&mut state, resources).unwrap_err().to_string();
        assert!(error.starts_with(text), "{error}");
    }
    assert_eq!(state.policies().keys().collect::<Vec<_>>(), ["old"]);
    assert_eq!(state.revision(), 1);
}

#[test]
fn modes_insist() {
    let mut state = State::default();
    let error = apply_as(&mut state, vec![policy("web", 80)], Mode::Update).unwrap_err();
    assert!(matches!(error, Error::NotFound(_)), "{error:?}");
    apply_as(&mut state, vec![policy("web", 80)], Mode::Create).unwrap();
    let error = apply_as(&mut state, vec![policy("web", 80)], Mode::Create).unwrap_err();
    assert!(matches!(error, Error::Exists(_)), "{error:?}");
}

#[test]
fn a_token_admits_its_number_of_nodes_and_a_retry_for_free() {
    let mut state = with_token(1);
    let denied = |result: Result<(), Error>, text: &str| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Denied(_)) && error.to_string().contains(text), "{error}");
    };
    let wrong = Enrolment { secret_sha256: [8; 32], ..enrolment("a", 1) };
    denied(enrol(&mut state, &wrong), "does not know");
    enrol(&mut state, &enrolment("a", 1)).unwrap();
    let revision = state.revision();
    enrol(&mut state, &enrolment("a", 1)).unwrap();
    assert_eq!(state.revision(), revision);
    denied(enrol(&mut state, &enrolment("b", 2)), "used up (1 of 1 uses)");
    let error = enrol(&mut state, &enrolment("a", 2)).unwrap_err();
    assert!(error.to_string().contains("cnsmo delete node a"), "{error}");

    let plan = state.plan_delete(Kind::Node, "a").unwrap();
    state.commit(plan, revision + 1);
    denied(enrol(&mut state, &enrolment("a", 1)), "used up");
    let late = SystemTime::now() + Duration::from_secs(61);
    let error = state.plan_enrolment(&enrolment("a", 1), Issued::sample(), late).unwrap_err();
    assert!(error.to_string().contains("expired"), "{error}");
}

#[test]
fn the_tokens_labels_win_over_the_agents_and_the_operators_over_both() {
    let mut state = with_token(1);
    enrol(&mut state, &enrolment("a", 1)).unwrap();
    assert_eq!(state.nodes()["a"].labels.to_string(), "role=token,zone=a");
    let connect = |state: &mut State, labels: &str| {
        let plan =
            state.plan_connect("a", &labels.parse().unwrap(), None, SystemTime::now()).unwrap();
        if !plan.is_empty() {
            state.commit(plan, state.revision() + 1);
        }
        state.nodes()["a"].labels.to_string()
    };
    assert_eq!(connect(&mut state, "role=agent,zone=b"), "role=token,zone=b");
    let revision = state.revision();
    assert_eq!(connect(&mut state, "role=agent,zone=b"), "role=token,zone=b");
    assert_eq!(state.revision(), revision, "nothing new, nothing written");
    assert_eq!(apply(&mut state, vec![node_labels("a", "role=op")]).unwrap(), [Outcome::Updated]);
    assert_eq!(connect(&mut state, "role=agent,zone=c"), "role=op");
}

#[test]
fn the_store_gives_back_what_was_committed() {
    let mut state = State::default();
    let mut entries = BTreeMap::new();
    let mut keep = |state: &mut State, plan: Plan| {
        let mod_rev = state.revision() + 1;
        for op in plan.txn().success {
            let Op::Put { key, value, .. } = op else { panic!("nothing is deleted here") };
            let mod_revision = mod_rev;
            entries.insert(key.clone(), Entry { key, value, mod_revision, ..Entry::default() });
        }
        state.commit(plan, mod_rev);
    };
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
    let plan = state.plan_token("t".into(), token(2), now).unwrap();
    keep(&mut state, plan);
    for name in ["a", "b"] {
        let key = name.as_bytes()[0];
        let plan = state.plan_enrolment(&enrolment(name, key), Issued::sample(), now).unwrap();
        keep(&mut state, plan);
    }
    for port in [80, 81] {
        let wanted = parse_apply(vec![policy("web", port)]).unwrap();
        let plan = state.plan_apply(wanted, Mode::Unspecified, now).unwrap();
        keep(&mut state, plan);
    }
    let plan = state.plan_connect("a", &"zone=a".parse().unwrap(), None, now).unwrap();
    keep(&mut state, plan);
    let loaded = State::load(state.revision(), entries.into_values().collect()).unwrap();
    assert_eq!(loaded.policies, state.policies);
    assert_eq!(loaded.nodes, state.nodes);
    assert_eq!(loaded.tokens["t"].used_by, state.tokens["t"].used_by);
    assert_eq!(loaded.tokens["t"].used_by.len(), 2);
    assert_eq!(loaded.nodes["a"].metadata.revision, 2, "connecting is no change of the node");

    let broken = Entry {
        key: "cnsmo/nodes/x".into(),
        value: vec![0xff].into(),
        mod_revision: 1,
        ..Entry::default()
    };
    let error = State::load(1, vec![broken]).unwrap_err();
    assert_eq!(error.field(), "cnsmo/nodes/x");
}

#[test]
fn the_history_forgets_the_oldest_changes() {
    let mut state = State::default();
    let note = Note { by: "operator/jo".into(), call: "Apply", to_revision: 0 };
    let changes = HISTORY_MAX + 2;
    for n in 0..changes {
        let wanted = parse_apply(vec![policy("web", 80 + (n % 2) as u32)]).unwrap();
        let plan = state.plan_apply(wanted, Mode::Unspecified, SystemTime::now()).unwrap();
        let plan = state.noted(plan, &note, SystemTime::now());
        assert_eq!(plan.txn().success.len(), if n < HISTORY_MAX { 2 } else { 3 });
        state.commit(plan, state.revision() + 1);
    }
    let told = state.history(0, usize::MAX, 5);
    assert_eq!(told.len(), HISTORY_MAX);
    let ends = |n: usize| (told[n].revision, told[n].available);
    assert_eq!((ends(0), ends(HISTORY_MAX - 1)), ((changes as i64, true), (3, false)));
    assert_eq!(told[0].by, "operator/jo");
}

#[test]
fn which_vms_get_other_policies_by_a_plan() {
    let of = |name: &str, port, target: &str| {
        let mut policy = policy(name, port);
        if let Some(resource::Resource::FirewallPolicy(policy)) = &mut policy.resource {
            let labels: Labels = target.parse().unwrap();
            policy.spec.as_mut().unwrap().target = labels.as_map().clone();
        }
        policy
    };
    let mut state = with_token(3);
    for (node, key) in [("vm1", 1), ("vm2", 2), ("vm3", 3)] {
        enrol(&mut state, &enrolment(node, key)).unwrap();
    }
    let before = vec![
        of("all", 22, ""),
        of("web", 80, "role=web"),
        node_labels("vm1", "role=web"),
        node_labels("vm2", "role=db"),
    ];
    apply(&mut state, before).unwrap();
    let changes = |wanted: Vec<Resource>| {
        let wanted = parse_apply(wanted).unwrap();
        let plan = state.plan_apply(wanted, Mode::Unspecified, SystemTime::now()).unwrap();
        let changes = state.policy_changes(&plan).into_iter();
        let brief = |(node, change): (String, PolicyChange)| {
            (node, change.upserts.into_keys().collect::<Vec<_>>(), change.removals)
        };
        changes.map(brief).collect::<Vec<_>>()
    };
    let change = |node: &str, upserts: &[&str], removals: &[&str]| {
        let owned =
            |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        (node.to_owned(), owned(upserts), owned(removals))
    };
    assert_eq!(changes(vec![of("web", 80, "role=web"), node_labels("vm1", "role=web")]), []);
    assert_eq!(changes(vec![of("web", 81, "role=web")]), [change("vm1", &["web"], &[])]);
    assert_eq!(
        changes(vec![of("web", 80, "role=db")]),
        [change("vm1", &[], &["web"]), change("vm2", &["web"], &[])]
    );
    assert_eq!(
        changes(vec![of("all", 23, ""), node_labels("vm2", "role=web")]),
        [
            change("vm1", &["all"], &[]),
            change("vm2", &["all", "web"], &[]),
            change("vm3", &["all"], &[])
        ]
    );
}
