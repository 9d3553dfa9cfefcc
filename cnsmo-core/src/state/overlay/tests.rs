use std::{collections::BTreeSet, time::SystemTime};

use cnsmo_proto::{
    model::{Labels, PublicKey},
    pb::{
        agent,
        balancer::{LoadBalancer, LoadBalancerSpec, Selector, ServicePort},
        meta::Metadata,
        network::{self, NetworkSpec, StaticAddresses},
        node,
        resource::{Resource, apply_request::Mode, resource},
    },
};
use proptest::prelude::*;

use super::*;
use crate::{
    error::Error,
    identity::Issued,
    state::{Announcement, Enrolment, Plan, TokenGrant, TokenRecord, parse_apply},
    store::{Entry, Op},
};

/// A state, and what a store would hold of it.
struct World {
    state: State,
    entries: BTreeMap<String, Entry>,
}

impl World {
    fn new() -> Self {
        let mut world = Self { state: State::default(), entries: BTreeMap::new() };
        let token = TokenRecord {
            secret_sha256: [7; 32],
            create_time: SystemTime::now(),
            expire_time: SystemTime::now() + std::time::Duration::from_secs(600),
            uses_max: 1_000,
            used_by: BTreeSet::new(),
            grant: TokenGrant::default(),
            labels: Labels::default(),
        };
        let plan = world.state.plan_token("t".into(), token, SystemTime::now());
        world.commit(plan).unwrap();
        world
    }

    fn commit(&mut self, plan: Result<Plan, Error>) -> Result<(), Error> {
        let plan = plan?;
        if plan.is_empty() {
            return Ok(());
        }
        let mod_rev = self.state.revision() + 1;
        for op in plan.txn().success {
            match op {
                Op::Put { key, value, .. } => {
                    let entry = Entry {
                        key: key.clone(),
                        value,
                        mod_revision: mod_rev,
                        ..Entry::default()
                    };
                    self.entries.insert(key, entry);
                }
                Op::Delete { key } => drop(self.entries.remove(&key)),
                Op::DeletePrefix { .. } | Op::Get { .. } => unreachable!(),
            }
        }
        self.state.commit(plan, mod_rev);
        Ok(())
    }

    fn join(&mut self, node: &str, labels: &str) {
        let mut key = [0; 32];
        key[..node.len()].copy_from_slice(node.as_bytes());
        let enrolment = Enrolment {
            token_id: "t".into(),
            secret_sha256: [7; 32],
            name: node.parse().unwrap(),
            labels: labels.parse().unwrap(),
            spki_sha256: key,
        };
        let plan = self.state.plan_enrolment(&enrolment, Issued::sample(), SystemTime::now());
        self.commit(plan).unwrap();
    }

    fn apply(&mut self, resources: Vec<Resource>) -> Result<(), Error> {
        let plan =
            self.state.plan_apply(parse_apply(resources)?, Mode::Unspecified, SystemTime::now());
        self.commit(plan)
    }

    fn delete(&mut self, kind: Kind, name: &str) -> Result<(), Error> {
        let plan = self.state.plan_delete(kind, name);
        self.commit(plan)
    }

    fn relabel(&mut self, name: &str, labels: &str) {
        let metadata = metadata(name, labels);
        let node = node::Node { metadata: Some(metadata), ..Default::default() };
        self.apply(vec![Resource { resource: Some(resource::Resource::Node(node)) }]).unwrap();
    }

    fn v4(&self, node: &str) -> Option<String> {
        Some(self.state.member(node)?.2.v4?.to_string())
    }

    fn restart(&mut self) {
        let entries = self.entries.values().cloned().collect();
        let loaded = State::load(self.state.revision(), entries).unwrap();
        assert_eq!(loaded.nodes, self.state.nodes);
        assert_eq!(loaded.networks, self.state.networks);
        assert_eq!(loaded.balancers, self.state.balancers);
        assert_eq!(loaded.rosters, self.state.rosters);
        assert_eq!(loaded.owners, self.state.owners);
        assert_eq!(loaded.keys, self.state.keys);
        self.state = loaded;
    }
}

fn metadata(name: &str, labels: &str) -> Metadata {
    let labels = labels.parse::<Labels>().unwrap().as_map().clone();
    Metadata { name: name.into(), labels, ..Metadata::default() }
}

fn network_of(name: &str, prefix: &str, members: &str, fixed: &[(&str, &str)]) -> Resource {
    let addresses = |(node, ipv4): &(&str, &str)| {
        ((*node).to_owned(), StaticAddresses { ipv4: (*ipv4).into(), ipv6: String::new() })
    };
    let spec = NetworkSpec {
        ipv4_prefix: prefix.into(),
        members: members.parse::<Labels>().unwrap().as_map().clone(),
        addresses: fixed.iter().map(addresses).collect(),
        ..NetworkSpec::default()
    };
    let network =
        network::Network { metadata: Some(metadata(name, "")), spec: Some(spec), status: None };
    Resource { resource: Some(resource::Resource::Network(network)) }
}

fn balancer_of(name: &str, network: &str, address: &str, gateways: bool) -> Resource {
    let spec = LoadBalancerSpec {
        network: network.into(),
        addresses: vec![address.into()],
        ports: vec![ServicePort { protocol: 6, port: 80, target_port: 0 }],
        gateways: gateways.then(Selector::default),
        ..LoadBalancerSpec::default()
    };
    let balancer =
        LoadBalancer { metadata: Some(metadata(name, "")), spec: Some(spec), status: None };
    Resource { resource: Some(resource::Resource::LoadBalancer(balancer)) }
}

#[test]
fn members_keep_their_addresses_and_leavers_free_theirs() {
    let mut world = World::new();
    world.join("a", "net=x");
    world.apply(vec![network_of("office", "10.70.0.0/29", "net=x", &[])]).unwrap();
    for node in ["b", "c"] {
        world.join(node, "net=x");
    }
    let given = |world: &World| ["a", "b", "c"].map(|node| world.v4(node).unwrap_or_default());
    assert_eq!(given(&world), ["10.70.0.1", "10.70.0.2", "10.70.0.3"]);
    world.relabel("a", "");
    assert_eq!(given(&world), ["", "10.70.0.2", "10.70.0.3"]);
    world.join("d", "net=x");
    assert_eq!(world.v4("d").unwrap(), "10.70.0.1", "the lowest that is free");
    world.relabel("a", "net=x");
    assert_eq!(given(&world), ["10.70.0.4", "10.70.0.2", "10.70.0.3"]);
    world.restart();
    // A larger prefix around it moves nobody.
    world.apply(vec![network_of("office", "10.70.0.0/16", "net=x", &[])]).unwrap();
    assert_eq!(given(&world), ["10.70.0.4", "10.70.0.2", "10.70.0.3"]);
    world.delete(Kind::Network, "office").unwrap();
    assert_eq!(given(&world), ["", "", ""]);
    assert!(world.state.owners.is_empty() && world.state.rosters.is_empty());
}

#[test]
fn a_full_network_takes_the_next_in_when_a_place_is_free() {
    let mut world = World::new();
    world.apply(vec![network_of("small", "10.0.0.0/30", "", &[])]).unwrap();
    for node in ["a", "b", "c", "d"] {
        world.join(node, "");
    }
    let waiting = |world: &World| {
        world.state.roster("small").unwrap().waiting.iter().cloned().collect::<Vec<_>>()
    };
    assert_eq!(waiting(&world), ["c", "d"]);
    assert!(world.state.member("c").is_none());
    world.restart();
    world.delete(Kind::Node, "a").unwrap();
    assert_eq!((waiting(&world), world.v4("c").unwrap()), (vec!["d".into()], "10.0.0.1".into()));
    world.relabel("b", "x=y");
    assert_eq!(waiting(&world), ["d"], "it is a member still");
    world.apply(vec![network_of("small", "10.0.0.0/29", "", &[])]).unwrap();
    assert_eq!((waiting(&world), world.v4("d").unwrap()), (vec![], "10.0.0.3".into()));
    assert_eq!(world.v4("c").unwrap(), "10.0.0.1");
}

#[test]
fn static_and_virtual_addresses_win_over_given_ones() {
    let mut world = World::new();
    for node in ["a", "b"] {
        world.join(node, "");
    }
    world.apply(vec![network_of("n", "10.0.0.0/24", "", &[])]).unwrap();
    assert_eq!(world.v4("a").unwrap(), "10.0.0.1");
    // Both ends of a swap, and a node that has not joined.
    let fixed = [("a", "10.0.0.2"), ("b", "10.0.0.1"), ("later", "10.0.0.3")];
    world.apply(vec![network_of("n", "10.0.0.0/24", "", &fixed)]).unwrap();
    assert_eq!([world.v4("a").unwrap(), world.v4("b").unwrap()], ["10.0.0.2", "10.0.0.1"]);
    world.join("c", "");
    assert_eq!(world.v4("c").unwrap(), "10.0.0.4", "what is another's is not given out");
    world.join("later", "");
    assert_eq!(world.v4("later").unwrap(), "10.0.0.3");
    world.apply(vec![balancer_of("front", "n", "10.0.0.4", false)]).unwrap();
    assert_eq!(world.v4("c").unwrap(), "10.0.0.5", "it makes place for the virtual address");
    world.restart();
    let error = world.apply(vec![balancer_of("back", "n", "10.0.0.2", false)]).unwrap_err();
    let text = "LoadBalancer back: spec.addresses[0]: 10.0.0.2 is the static address of Node a";
    assert_eq!(error.to_string(), text);
}

#[test]
fn a_second_family_is_given_to_all_and_taken_from_all() {
    let mut world = World::new();
    for node in ["a", "b"] {
        world.join(node, "");
    }
    let families = |v4: &str, v6: &str| {
        let mut network = network_of("n", v4, "", &[]);
        let Some(resource::Resource::Network(inner)) = &mut network.resource else { panic!() };
        inner.spec.as_mut().unwrap().ipv6_prefix = v6.into();
        vec![network]
    };
    let addresses = |world: &World| {
        let of = |node| world.state.member(node).unwrap().2.iter().collect::<Vec<_>>();
        [of("a"), of("b")].map(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    world.apply(families("10.0.0.0/24", "")).unwrap();
    world.apply(families("10.0.0.0/24", "fd70::/64")).unwrap();
    assert_eq!(addresses(&world), [["10.0.0.1", "fd70::1"], ["10.0.0.2", "fd70::2"]]);
    world.restart();
    world.apply(families("", "fd70::/64")).unwrap();
    assert_eq!(addresses(&world), [["fd70::1"], ["fd70::2"]]);
}

#[test]
fn a_vm_is_in_the_first_network_by_name_that_selects_it() {
    let mut world = World::new();
    world.join("a", "zone=1");
    world.apply(vec![network_of("m", "10.1.0.0/24", "", &[])]).unwrap();
    assert_eq!(world.v4("a").unwrap(), "10.1.0.1");
    world.apply(vec![network_of("b", "10.2.0.0/24", "zone=1", &[])]).unwrap();
    assert_eq!(world.v4("a").unwrap(), "10.2.0.1");
    assert!(world.state.roster("m").is_none());
    world.delete(Kind::Network, "b").unwrap();
    assert_eq!(world.v4("a").unwrap(), "10.1.0.1");
}

#[test]
fn errors_between_resources_name_both_and_the_field() {
    let mut world = World::new();
    let office = || network_of("office", "10.70.0.0/16", "", &[]);
    // In any order within one request.
    world.apply(vec![balancer_of("front", "office", "10.70.0.9", false), office()]).unwrap();
    let cases = [
        (
            vec![network_of("a", "10.70.4.0/24", "", &[])],
            "Network office: spec.ipv4: 10.70.0.0/16 overlaps 10.70.4.0/24 of Network a",
        ),
        (
            vec![balancer_of("x", "none", "10.70.0.8", false)],
            "LoadBalancer x: spec.network: there is no Network none",
        ),
        (
            vec![balancer_of("x", "office", "192.0.2.1", false)],
            "LoadBalancer x: spec.addresses[0]: 192.0.2.1 is not within Network office, and",
        ),
        (
            vec![balancer_of("x", "office", "2001:db8::1", true)],
            "LoadBalancer x: spec.addresses[0]: Network office has no IPv6",
        ),
        (
            vec![balancer_of("x", "office", "10.70.255.255", false)],
            "LoadBalancer x: spec.addresses[0]: 10.70.255.255 is the first or last address",
        ),
        (
            vec![balancer_of("x", "office", "10.70.0.9", true)],
            "LoadBalancer x: spec.addresses[0]: port 80 of 10.70.0.9 is that of LoadBalancer front",
        ),
        (
            vec![
                network_of("z", "10.9.0.0/24", "", &[]),
                balancer_of("x", "office", "10.9.0.1", true),
            ],
            "LoadBalancer x: spec.addresses[0]: 10.9.0.1 is an address of Network z",
        ),
        (
            vec![network_of("office", "10.71.0.0/16", "", &[])],
            "LoadBalancer front: spec.addresses[0]: 10.70.0.9 is not within Network office",
        ),
    ];
    let revision = world.state.revision();
    for (resources, text) in cases {
        let error = world.apply(resources).unwrap_err().to_string();
        assert!(error.starts_with(text), "{error}");
    }
    let error = world.delete(Kind::Network, "office").unwrap_err().to_string();
    assert_eq!(error, "Network office: is used by LoadBalancer front");
    assert_eq!(world.state.revision(), revision);
    world.apply(vec![balancer_of("x", "office", "192.0.2.1", true)]).unwrap();
}

#[test]
fn announcements_are_checked_and_a_key_has_one_owner() {
    let wire = |key: u8, addresses: &[&str]| agent::Announcement {
        tunnel_public_key: vec![key; 32],
        addresses: addresses.iter().map(ToString::to_string).collect(),
    };
    let good = Announcement::try_from(wire(1, &["192.0.2.1", "2001:db8::1", "192.0.2.1"])).unwrap();
    assert_eq!(good.public_key, Some(PublicKey([1; 32])));
    assert_eq!(good.addresses.len(), 2);
    let short = agent::Announcement { tunnel_public_key: vec![1; 31], ..Default::default() };
    for (bad, text) in [
        (short, "tunnelPublicKey: 31 bytes"),
        (wire(0, &[]), "tunnelPublicKey: is zero"),
        (wire(1, &["192.0.2.1"; 17]), "addresses: 17; at most 16"),
        (wire(1, &["192.0.2.1", "home"]), "addresses[1]: is not an IP address"),
        (wire(1, &["127.0.0.1"]), "addresses[0]: leads to no other VM"),
        (wire(1, &["::ffff:127.0.0.1"]), "addresses[0]: leads to no other VM"),
        (wire(1, &["::"]), "addresses[0]: leads to no other VM"),
        (wire(1, &["ff02::1"]), "addresses[0]: leads to no other VM"),
    ] {
        let error = Announcement::try_from(bad).unwrap_err().to_string();
        assert!(error.starts_with(text), "{error}");
    }

    let mut world = World::new();
    for node in ["a", "b"] {
        world.join(node, "");
    }
    let announce = |world: &mut World, node: &str, announcement: &Announcement| {
        let plan = world.state.plan_announcement(node, announcement.clone());
        world.commit(plan)
    };
    announce(&mut world, "a", &good).unwrap();
    let revision = world.state.revision();
    announce(&mut world, "a", &good).unwrap();
    assert_eq!(world.state.revision(), revision, "nothing new, nothing written");
    let error = announce(&mut world, "b", &good).unwrap_err().to_string();
    assert!(error.contains("that of Node a") && error.contains("cnsmo delete node a"), "{error}");
    world.restart();
    assert!(announce(&mut world, "b", &good).is_err());
    let other = Announcement::try_from(wire(2, &[])).unwrap();
    announce(&mut world, "a", &other).unwrap();
    announce(&mut world, "b", &good).unwrap();
    world.delete(Kind::Node, "b").unwrap();
    announce(&mut world, "a", &good).unwrap();
}

#[derive(Clone, Debug)]
enum Step {
    Join(usize, usize),
    Relabel(usize, usize),
    Forget(usize),
    Network(usize, usize, usize, Vec<(usize, u8)>),
    Balancer(usize, u8),
    DeleteNetwork(usize),
    DeleteBalancer,
    Restart,
}

const NODES: [&str; 9] = ["a", "b", "c", "d", "e", "f", "g", "h", "i"];
const LABELS: [&str; 3] = ["", "x=1", "x=2"];
const NETWORKS: [&str; 2] = ["m", "n"];

fn step() -> impl Strategy<Value = Step> {
    let (node, labels) = (0..NODES.len(), 0..LABELS.len());
    let fixed = prop::collection::vec((node.clone(), 1_u8..7), 0..4);
    let network = (0..NETWORKS.len(), 28_usize..31, labels.clone(), fixed);
    prop_oneof![
        6 => (node.clone(), labels.clone()).prop_map(|(n, l)| Step::Join(n, l)),
        3 => (node.clone(), labels).prop_map(|(n, l)| Step::Relabel(n, l)),
        2 => node.prop_map(Step::Forget),
        4 => network.prop_map(|(name, bits, labels, fixed)| Step::Network(name, bits, labels, fixed)),
        2 => (0..NETWORKS.len(), 1_u8..7).prop_map(|(network, host)| Step::Balancer(network, host)),
        1 => (0..NETWORKS.len()).prop_map(Step::DeleteNetwork),
        1 => Just(Step::DeleteBalancer),
        1 => Just(Step::Restart),
    ]
}

/// Requests that a rule refuses change nothing, which is as good as any.
fn take(world: &mut World, step: Step) {
    let known = |world: &World, node: usize| world.state.nodes.contains_key(NODES[node]);
    match step {
        Step::Join(n, l) if !known(world, n) => world.join(NODES[n], LABELS[l]),
        Step::Relabel(n, l) if known(world, n) => world.relabel(NODES[n], LABELS[l]),
        Step::Join(..) | Step::Relabel(..) => {}
        Step::Forget(n) => drop(world.delete(Kind::Node, NODES[n])),
        Step::Network(n, bits, l, fixed) => {
            let fixed: Vec<_> = fixed
                .iter()
                .map(|(node, host)| (NODES[*node], format!("10.0.{n}.{host}")))
                .collect();
            let fixed: Vec<_> = fixed.iter().map(|(node, ipv4)| (*node, ipv4.as_str())).collect();
            let prefix = format!("10.0.{n}.0/{bits}");
            drop(world.apply(vec![network_of(NETWORKS[n], &prefix, LABELS[l], &fixed)]));
        }
        Step::Balancer(n, host) => {
            drop(world.apply(vec![balancer_of(
                "lb",
                NETWORKS[n],
                &format!("10.0.{n}.{host}"),
                false,
            )]));
        }
        Step::DeleteNetwork(n) => drop(world.delete(Kind::Network, NETWORKS[n])),
        Step::DeleteBalancer => drop(world.delete(Kind::LoadBalancer, "lb")),
        Step::Restart => world.restart(),
    }
}

fn holds(world: &World) {
    let state = &world.state;
    let mut owners = BTreeMap::new();
    for (name, node) in &state.nodes {
        let home = state.networks.iter().find(|(_, n)| n.model.members.selects(&node.labels));
        let network = node.membership.as_ref().map(|membership| &membership.network);
        assert_eq!(network, home.map(|(network, _)| network), "{name}");
        let Some((_, network, addresses)) = state.member(name) else { continue };
        let model = &state.networks[network].model;
        assert!(is_complete(addresses, model));
        let fixed = fixed(model, name);
        for address in addresses.iter() {
            assert!(model.usable(address), "{name}: {address}");
            assert_eq!(owners.insert(address, name.clone()), None, "{address} twice");
            let virtual_one =
                state.balancers.values().any(|b| b.model.addresses.contains(&address));
            assert!(!virtual_one, "{name} has the virtual {address}");
            for (other, of_other) in &model.addresses {
                let others = of_other.iter().any(|one| one == address);
                assert!(!others || other.as_str() == name, "{name} has what is {other}'s");
            }
        }
        assert!(fixed.v4.is_none_or(|v4| addresses.v4 == Some(v4)));
    }
    assert_eq!(owners, state.owners.clone().into_iter().collect());
    for (network, roster) in &state.rosters {
        let model = &state.networks[network].model;
        let free = model.ipv4.unwrap().hosts().find(|v4| {
            let address = IpAddr::V4(*v4);
            let fixed = model.addresses.values().any(|of| of.iter().any(|one| one == address));
            let virtual_one =
                state.balancers.values().any(|b| b.model.addresses.contains(&address));
            !owners.contains_key(&address) && !fixed && !virtual_one
        });
        assert!(free.is_none() || roster.waiting.is_empty(), "{network} has place: {free:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever happens: each address has one owner who may have it, nobody waits while there is place, members that no
    /// request concerns keep what they have, and a restart gives back all of it.
    #[test]
    fn addresses_are_unique_and_stay(steps in prop::collection::vec(step(), 0..40)) {
        let mut world = World::new();
        for step in steps {
            let before: Vec<_> =
                NODES.iter().map(|node| world.state.member(node).map(|(_, _, a)| a)).collect();
            let concerns_nodes = matches!(&step, Step::Join(..) | Step::Relabel(..) | Step::Forget(_));
            let own = match &step {
                Step::Join(n, _) | Step::Relabel(n, _) | Step::Forget(n) => *n,
                _ => NODES.len(),
            };
            take(&mut world, step);
            holds(&world);
            for (n, node) in NODES.iter().enumerate().filter(|(n, _)| concerns_nodes && *n != own) {
                let after = world.state.member(node).map(|(_, _, addresses)| addresses);
                prop_assert!(before[n].is_none() || before[n] == after, "{} moved", node);
            }
        }
        world.restart();
        holds(&world);
    }
}
