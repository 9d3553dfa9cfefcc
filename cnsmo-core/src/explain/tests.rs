use std::sync::Mutex;

use cnsmo_proto::pb::{
    balancer::{Backend, LoadBalancerSpec, LoadBalancerStatus, Selector},
    flow::Translated,
    meta::Metadata,
    network::{NetworkSpec, NetworkStatus},
    node::{NodeStatus, OverlayStatus, PeerStatus},
};

use super::*;

fn metadata(name: &str, labels: &[(&str, &str)]) -> Option<Metadata> {
    let labels = labels.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
    Some(Metadata { name: name.into(), labels, ..Metadata::default() })
}

/// vm1 to vm3 in network `shop`, vm1 a gateway; vm4 in none. A balancer `front` with an address inside and one outside.
fn map() -> Map {
    let node = |n: u8| {
        let peers = (1..=3)
            .filter(|peer| *peer != n)
            .map(|peer| PeerStatus {
                node: format!("vm{peer}"),
                endpoint: format!("198.51.100.{peer}:51820"),
                ..PeerStatus::default()
            })
            .collect();
        let status = NodeStatus {
            addresses: [
                (n < 4).then(|| format!("10.70.0.{n}")),
                Some("fe80::1".into()),
                Some(format!("198.51.100.{n}")),
                Some(format!("2001:db8::{n}")),
            ]
            .into_iter()
            .flatten()
            .collect(),
            overlay: Some(OverlayStatus { peers, ..OverlayStatus::default() }),
            ..NodeStatus::default()
        };
        let labels: &[_] = if n == 1 { &[("edge", "yes")] } else { &[] };
        let metadata = metadata(&format!("vm{n}"), labels);
        Node { metadata, status: Some(status), ..Node::default() }
    };
    let member = |n: u8| Member {
        network: "shop".into(),
        node: format!("vm{n}"),
        ipv4: format!("10.70.0.{n}"),
        ..Member::default()
    };
    let network = Network {
        metadata: metadata("shop", &[]),
        spec: Some(NetworkSpec { ipv4_prefix: "10.70.0.0/16".into(), ..NetworkSpec::default() }),
        status: Some(NetworkStatus {
            members: (1..=3).map(member).collect(),
            ..NetworkStatus::default()
        }),
    };
    let backend = |n: u8| Backend {
        node: format!("vm{n}"),
        ipv4: format!("10.70.0.{n}"),
        instance: format!("web-{n}"),
        port: 8_080,
        ..Backend::default()
    };
    let balancer = LoadBalancer {
        metadata: metadata("front", &[]),
        spec: Some(LoadBalancerSpec {
            network: "shop".into(),
            addresses: vec!["10.70.9.9".into(), "203.0.113.9".into()],
            gateways: Some(Selector { labels: [("edge".into(), "yes".into())].into() }),
            ..LoadBalancerSpec::default()
        }),
        status: Some(LoadBalancerStatus {
            backends: vec![backend(2), backend(3)],
            ..LoadBalancerStatus::default()
        }),
    };
    Map { nodes: (1..=4).map(node).collect(), networks: vec![network], balancers: vec![balancer] }
}

fn request(from: &str, to: &str) -> ExplainRequest {
    ExplainRequest {
        from: from.into(),
        to: to.into(),
        protocol: 6,
        port: 443,
        ..ExplainRequest::default()
    }
}

/// Who was asked what: VM, direction, overlay, packet.
type Asked = Vec<(String, Direction, bool, String)>;

/// Virtual addresses are balanced to vm3; `drops` is where packets are dropped.
async fn follow(request: &ExplainRequest, drops: &'static str) -> (Asked, ExplainResponse) {
    let agents = Agents { asked: Mutex::default(), drops };
    let told = explain(&map(), request, &agents).await.unwrap();
    (agents.asked.into_inner().unwrap(), told)
}

struct Agents {
    asked: Mutex<Asked>,
    drops: &'static str,
}

#[tonic::async_trait]
impl Judges for Agents {
    async fn judge(&self, node: &str, query: PacketQuery) -> Result<Judgement, Status> {
        let PacketQuery { source, destination, source_port, destination_port, .. } = &query;
        let packet = format!("{source}:{source_port} > {destination}:{destination_port}");
        let at = (node.to_owned(), query.direction(), query.overlay, packet);
        self.asked.lock().unwrap().push(at);
        let is_virtual = ["10.70.9.9", "203.0.113.9"].contains(&destination.as_str());
        let translated = is_virtual.then(|| Translated {
            source: if query.overlay { source.clone() } else { "10.70.0.1".into() },
            destination: "10.70.0.3".into(),
            source_port: *source_port,
            destination_port: 8_080,
        });
        Ok(Judgement {
            drop_reason: if node == self.drops { "denied".into() } else { String::new() },
            load_balancer: if is_virtual { "front".into() } else { String::new() },
            translated,
            ..Judgement::default()
        })
    }
}

fn at(
    node: &str,
    direction: Direction,
    overlay: bool,
    packet: &str,
) -> (String, Direction, bool, String) {
    (node.into(), direction, overlay, packet.into())
}

use Direction::{Egress, Ingress};

#[tokio::test]
async fn between_members_it_goes_through_the_tunnel() {
    let (asked, told) = follow(&request("vm1", "vm2"), "").await;
    let packet = "10.70.0.1:61000 > 10.70.0.2:443";
    assert_eq!(asked, [at("vm1", Egress, true, packet), at("vm2", Ingress, true, packet)]);
    assert!(told.passes && told.notes.is_empty(), "{told:?}");
    assert_eq!(
        (&*told.steps[0].tunnel_peer, &*told.steps[0].endpoint),
        ("vm2", "198.51.100.2:51820")
    );
    assert_eq!(told.steps[1].tunnel_peer, "");
}

#[tokio::test]
async fn otherwise_or_if_asked_by_the_network_cards() {
    let mut asks = request("vm1", "vm2");
    asks.underlay = true;
    asks.source_port = 5;
    let (asked, _) = follow(&asks, "").await;
    let packet = "198.51.100.1:5 > 198.51.100.2:443";
    assert_eq!(asked, [at("vm1", Egress, false, packet), at("vm2", Ingress, false, packet)]);
    let (asked, _) = follow(&request("vm4", "vm2"), "").await;
    assert_eq!(asked[0], at("vm4", Egress, false, "198.51.100.4:61000 > 198.51.100.2:443"));
    let mut asks = request("vm4", "vm2");
    asks.ipv6 = true;
    let (asked, _) = follow(&asks, "").await;
    assert_eq!(asked[1].3, "2001:db8::4:61000 > 2001:db8::2:443");
}

#[tokio::test]
async fn a_drop_ends_the_way() {
    let (asked, told) = follow(&request("vm1", "vm2"), "vm1").await;
    assert_eq!((asked.len(), told.passes), (1, false));
    assert_eq!(told.steps[0].tunnel_peer, "", "it goes nowhere");
    let (asked, told) = follow(&request("vm1", "vm2"), "vm2").await;
    assert_eq!((asked.len(), told.passes), (2, false));
}

#[tokio::test]
async fn a_member_balances_for_itself() {
    for to in ["10.70.9.9", "front"] {
        let (asked, told) = follow(&request("vm2", to), "").await;
        let sent = at("vm2", Egress, true, "10.70.0.2:61000 > 10.70.9.9:443");
        let arrives = at("vm3", Ingress, true, "10.70.0.2:61000 > 10.70.0.3:8080");
        assert_eq!(asked, [sent, arrives]);
        let step = &told.steps[0];
        assert_eq!((&*step.backend, &*step.backend_instance), ("vm3", "web-3"));
        assert_eq!(step.tunnel_peer, "vm3");
    }
}

#[tokio::test]
async fn a_client_outside_comes_by_a_gateway() {
    let (asked, told) = follow(&request("192.0.2.7", "203.0.113.9"), "").await;
    let comes = at("vm1", Ingress, false, "192.0.2.7:61000 > 203.0.113.9:443");
    let arrives = at("vm3", Ingress, true, "10.70.0.1:61000 > 10.70.0.3:8080");
    assert_eq!(asked, [comes, arrives]);
    assert_eq!(told.steps[0].tunnel_peer, "vm3");
    // To one VM without a balancer.
    let (asked, _) = follow(&request("192.0.2.7", "vm4"), "").await;
    assert_eq!(asked, [at("vm4", Ingress, false, "192.0.2.7:61000 > 198.51.100.4:443")]);
}

#[tokio::test]
async fn a_way_that_leaves_all_vms_says_so() {
    let (asked, told) = follow(&request("vm1", "192.0.2.7"), "").await;
    assert_eq!(asked, [at("vm1", Egress, false, "198.51.100.1:61000 > 192.0.2.7:443")]);
    assert_eq!(told.notes, ["no VM has 192.0.2.7: the way ends here"]);
    let (_, told) = follow(&request("vm1", "198.51.100.1"), "").await;
    assert_eq!(told.notes, ["the packet stays on its VM, where nothing judges it"]);
}

#[test]
fn what_cannot_be_found_is_refused_with_the_field() {
    type Break = fn(&mut ExplainRequest);
    let cases: [(&str, Break); 8] = [
        ("from: `nobody`", |r| r.from = "nobody".into()),
        ("to: `nobody`", |r| r.to = "nobody".into()),
        ("from: 192.0.2.7 and", |r| {
            r.from = "192.0.2.7".into();
            r.to = "2001:db8::1".into();
        }),
        ("protocol: 0", |r| r.protocol = 0),
        ("port: 70000", |r| r.port = 70_000),
        ("source_port: 70000", |r| r.source_port = 70_000),
        ("to: load balancer `front` has no IPv6", |r| {
            r.to = "front".into();
            r.ipv6 = true;
        }),
        ("via: `vm4` is no gateway", |r| {
            r.from = "192.0.2.7".into();
            r.to = "front".into();
            r.via = "vm4".into();
        }),
    ];
    for (beginning, break_it) in cases {
        let mut bad = request("vm1", "vm2");
        break_it(&mut bad);
        let Err(Error::Invalid(why)) = map().start(&bad) else { panic!("{bad:?} is taken") };
        assert!(why.starts_with(beginning), "{why}");
    }
}
