//! The firewall of each VM, from the operator's file to packets: with a core, an agent per VM, and traffic from outside.

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use cnsmo_tests::{Netns, PinDir, Process, pause, sweep};

use super::{
    firewall::carries,
    lab::{PATIENCE as PACKETS, SILENCE, arrives, connect, listen, socket},
    programs::{Core, PATIENCE, program, root, until},
    swap::{self, Traffic},
    switch::{HERE4, HERE6, Switch, of_vm},
};

/// So that reports of the agents come soon.
const FAST: [&str; 4] = ["--heartbeat", "200ms", "--lease", "3s"];
const BURST: u64 = 300;
/// A datagram of eight bytes in an Ethernet frame.
const DATAGRAM_BYTES: u64 = 14 + 20 + 8 + 8;
const RULES: u16 = 10_000;
const REPLACEMENTS: usize = 6;
/// Flows that must have been judged for the replacements to show anything.
const FLOWS_MIN: usize = 1_000;

/// VMs under one core; the first has the label `role=guarded`.
struct Fleet {
    agents: Vec<Process>,
    core: Core,
    switch: Switch,
}

impl Fleet {
    fn new(label: &str, vms: u8, core: &[&str], agent: &[&str]) -> Self {
        sweep();
        let switch = Switch::new(label, vms);
        let core = switch.core(label, core);
        let start = |(n, (netns, pins)): (u8, &(Netns, PinDir))| {
            let role = if n == 1 { "role=guarded" } else { "role=other" };
            core.agent(netns, pins, &format!("vm{n}"), &[&["--label", role], agent].concat())
        };
        let agents = (1..).zip(&switch.vms).map(start).collect();
        Self { agents, core, switch }
    }

    fn vm(&self, n: u8) -> &Netns {
        &self.switch.vms[usize::from(n) - 1].0
    }

    fn listen(&self, vm: u8, port: u16) -> [TcpListener; 2] {
        of_vm(vm).map(|address| listen(self.vm(vm), address, port))
    }

    /// Whether the switch's namespace gets a connection to `to`.
    fn opens(&self, to: IpAddr, port: u16, limit: Duration) -> bool {
        connect(&self.switch.netns, SocketAddr::new(to, port), limit).is_ok()
    }

    fn opens_at(&self, vm: u8, port: u16) -> [bool; 2] {
        of_vm(vm).map(|to| self.opens(to, port, 2 * SILENCE))
    }

    /// Applies a manifest and waits for the kernels.
    fn apply(&self, text: &str) {
        self.core.cnsmo(&["apply", "-f", self.write(text).to_str().unwrap(), "--wait"]);
    }

    fn write(&self, text: &str) -> std::path::PathBuf {
        let file = self.core.folder().join("policy.yaml");
        fs::write(&file, text).unwrap();
        file
    }

    /// Packets and bytes that a rule has counted on a VM.
    fn counted(&self, policy: &str, vm: &str, rule: &str) -> [u64; 2] {
        let policy = self.core.cnsmo_json(&["get", "fw", policy]);
        let nodes = policy["status"]["nodes"].as_array().unwrap();
        let node = nodes.iter().find(|node| node["node"] == vm).unwrap();
        let rules = node["rules"].as_array();
        let rule = rules.and_then(|rules| rules.iter().find(|one| one["rule"] == rule));
        // JSON of protobuf has 64-bit numbers as text.
        let number = |name: &str| match &rule.unwrap()[name] {
            serde_json::Value::String(text) => text.parse().unwrap(),
            other => other.as_u64().unwrap_or(0),
        };
        if rule.is_some() { ["packets", "bytes"].map(number) } else { [0, 0] }
    }
}

fn allow(name: &str, protocol: &str, port: u16) -> String {
    format!(
        "    - {{name: {name}, action: allow, direction: ingress, protocol: {protocol}, ports: [{port}]}}\n"
    )
}

/// A policy called `web` for the guarded VM, which lets in what `rules` say.
fn web(rules: &[String]) -> String {
    format!(
        "kind: FirewallPolicy\nmetadata: {{name: web}}\nspec:\n  target: {{role: guarded}}\n  \
         defaults: {{ingress: deny, egress: allow}}\n  rules:\n{}",
        rules.concat()
    )
}

fn original(file: &str) -> String {
    root().join("examples/original").join(file).to_str().unwrap().to_owned()
}

#[tokio::test]
async fn s19_rules_of_the_original_load_verbatim_for_one_vm_and_not_for_another() {
    let fleet = Fleet::new("s19o", 2, &FAST, &[]);
    let ports = [80, 443, 8081, 8082];
    let listeners = ports.map(|port| [1, 2].map(|vm| fleet.listen(vm, port)));
    for port in ports {
        assert_eq!((fleet.opens_at(1, port), fleet.opens_at(2, port)), ([true; 2], [true; 2]));
    }
    let load = |file: &str| {
        let file = original(file);
        let target = ["--name", "original", "--target", "role=guarded", "--wait"];
        fleet.core.cnsmo(&[&["apply", "-f", &file], &target[..]].concat());
    };

    load("rules.json");
    // IPv4 and IPv6, which the rules for one family leave alone.
    let expected =
        [(80, [true, true]), (443, [true, false]), (8081, [true; 2]), (8082, [false, true])];
    for (port, opens) in expected {
        assert_eq!(fleet.opens_at(1, port), opens, "port {port} of vm1");
        assert_eq!(fleet.opens_at(2, port), [true; 2], "port {port} of vm2");
    }
    // The rule for what goes out, by its counter: the default lets it out too.
    fleet.vm(1).ip(&["route", "add", "10.77.2.0/24", "via", &HERE4.to_string()]).unwrap();
    let question = socket(fleet.vm(1), of_vm(1)[0], 0);
    question.send_to(b"question", "10.77.2.9:53").unwrap();
    for rule in ["rule-1", "rule-2", "rule-3", "rule-4"] {
        until(rule, async || (fleet.counted("original", "vm1", rule)[0] > 0).then_some(())).await;
    }

    // Answers to what the VM began come in; what comes unasked does not, nor what no rule names.
    load("denyall.json");
    assert_eq!(fleet.opens_at(1, 80), [true, false]);
    assert_eq!(fleet.opens_at(1, 8081), [false; 2]);
    for (own, here) in of_vm(1).into_iter().zip([HERE4, HERE6]) {
        let server = listen(&fleet.switch.netns, here, 7000);
        let to = server.local_addr().unwrap();
        let mut client = connect(fleet.vm(1), to, PACKETS).unwrap();
        let (mut served, _) = server.accept().unwrap();
        assert!(carries(&mut client, &mut served, PACKETS));
        assert!(carries(&mut served, &mut client, PACKETS));
        let (inside, outside) =
            (socket(fleet.vm(1), own, 5000), socket(&fleet.switch.netns, here, 53));
        outside.send_to(b"unasked", (own, 5000)).unwrap();
        assert!(!arrives(&inside), "{own}");
        inside.send_to(b"question", (here, 53)).unwrap();
        let from = outside.recv_from(&mut [0; 16]).unwrap().1;
        outside.send_to(b"answer", from).unwrap();
        assert!(arrives(&inside), "{own}");
    }
    drop((listeners, fleet));
}

#[tokio::test]
async fn s19_bad_rules_of_the_original_are_refused_by_field() {
    let core = Core::start("s19b");
    let apply = |file: &str| {
        let mut command = Command::new(program("cnsmo"));
        command.env("CNSMO_SOCKET", core.socket()).args(["apply", "-f", &original(file)]);
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let cases = [
        ("missing-field", "ip_range"),
        ("port-above-65535", "dst_port"),
        ("mask-33", "ip_range"),
        ("bad-address", "ip_range"),
        ("no-mask", "ip_range"),
        ("bad-action", "action"),
        ("port-not-a-number", "dst_port"),
        ("bad-dst-src", "dst_src"),
    ];
    let files = fs::read_dir(Path::new(&original("bad"))).unwrap().count();
    assert_eq!(files, cases.len(), "each bad file is a case");
    for (file, field) in cases {
        let (code, said) = apply(&format!("bad/{file}.json"));
        assert!(code == Some(1) && said.contains(&format!("{field}:")), "{file}: {said}");
        assert!(said.contains(file), "{said}");
    }
    assert_eq!(core.cnsmo_json(&["get", "fw"]).as_array().unwrap().len(), 0);
    assert_eq!(apply("one-rule.json").0, Some(0));
    assert_eq!(core.cnsmo_json(&["get", "fw"]).as_array().unwrap().len(), 1);
}

/// From the beginning of the operator's command to the first datagram that the rule lets in.
fn time_to_open(fleet: &Fleet, text: &str, port: u16) -> Duration {
    let [to, _] = of_vm(1);
    let inside = socket(fleet.vm(1), to, port);
    let file = fleet.write(text);
    let mut apply = Command::new(program("cnsmo"));
    apply.env("CNSMO_SOCKET", fleet.core.socket()).arg("apply").arg("-f").arg(file);
    let knock = |to: SocketAddr| {
        // A new flow each time: a known one would not be asked about.
        let sender = UdpSocket::bind((HERE4, 0)).unwrap();
        sender.send_to(b"knock", to).unwrap();
    };
    let to = inside.local_addr().unwrap();
    fleet.switch.netns.run(|| knock(to)).unwrap();
    assert!(!arrives(&inside), "before there is a rule");
    inside.set_nonblocking(true).unwrap();
    let start = Instant::now();
    let mut apply = apply.stdout(std::process::Stdio::null()).spawn().unwrap();
    let took = fleet.switch.netns.run(|| {
        while start.elapsed() < PACKETS {
            knock(to);
            pause(Duration::from_millis(1));
            if inside.recv_from(&mut [0; 16]).is_ok() {
                return Some(start.elapsed());
            }
        }
        None
    });
    assert!(apply.wait().unwrap().success());
    took.unwrap().expect("the rule is in force")
}

#[tokio::test]
async fn s19_a_rule_counts_opens_at_once_and_cuts_when_it_goes() {
    let fleet = Fleet::new("s19c", 1, &FAST, &[]);
    let [vm, _] = of_vm(1);
    let base = || vec![allow("ssh", "tcp", 22), allow("kept", "tcp", 8022)];
    fleet.apply(&web(&base()));

    let mut rules = base();
    rules.push(allow("new", "udp", 5000));
    let took = time_to_open(&fleet, &web(&rules), 5000);
    println!("a new rule lets a packet in {} ms after the command began", took.as_millis());

    // What one rule let in and another refused, to the packet.
    rules.push(allow("counted", "udp", 5001));
    rules.push(allow("refused", "udp", 5002).replace("allow", "deny"));
    fleet.apply(&web(&rules));
    let inside = socket(fleet.vm(1), vm, 5001);
    let outside = socket(&fleet.switch.netns, HERE4, 0);
    for port in [5001, 5002] {
        for _ in 0..BURST {
            outside.send_to(b"12345678", (vm, port)).unwrap();
        }
    }
    let wanted = [BURST, BURST * DATAGRAM_BYTES];
    for rule in ["counted", "refused"] {
        let all = async || (fleet.counted("web", "vm1", rule) == wanted).then_some(());
        until(&format!("{wanted:?} counted by `{rule}`"), all).await;
    }
    assert!(arrives(&inside));
    assert_eq!(fleet.counted("web", "vm1", "kept"), [0, 0], "nothing was sent to it");

    // Long connections: one loses its rule, the other keeps it.
    let mut streams = [22, 8022].map(|port| {
        let listener = listen(fleet.vm(1), vm, port);
        let to = listener.local_addr().unwrap();
        let client = connect(&fleet.switch.netns, to, PACKETS).unwrap();
        (client, listener.accept().unwrap().0)
    });
    for (client, server) in &mut streams {
        assert!(carries(client, server, PACKETS) && carries(server, client, PACKETS));
    }
    // Port 22 is named: no failsafe keeps it open.
    let rules = [allow("ssh", "tcp", 22).replace("allow", "deny"), allow("kept", "tcp", 8022)];
    fleet.apply(&web(&rules));
    let [(ssh, sshd), (client, server)] = &mut streams;
    assert!(carries(client, server, PACKETS) && carries(server, client, PACKETS));
    // Longer than segments take that are sent again.
    assert!(!carries(ssh, sshd, 4 * SILENCE) && !carries(sshd, ssh, 4 * SILENCE));
    assert!(!fleet.opens(vm, 22, SILENCE));
}

/// [`RULES`] rules, of which those about the ports of the traffic are the first or the last.
fn many(only: (&str, u16), at_front: bool) -> String {
    let from = format!("{HERE4}/32");
    let rule = |name: &str, action: &str, port: u16| {
        format!(
            "    - {{name: {name}, action: {action}, direction: ingress, from: [{from}], protocol: udp, ports: [{port}]}}\n"
        )
    };
    let asked = [
        rule("both", "allow", swap::BOTH),
        rule("none", "deny", swap::NONE),
        rule(only.0, "allow", only.1),
    ];
    let others = (0..RULES - asked.len() as u16).fold(String::new(), |mut text, n| {
        // The same index has the opposite action in the other policy.
        let action = if n % 2 == u16::from(at_front) { "allow" } else { "deny" };
        let _ = write!(text, "{}", rule(&format!("r{n}"), action, 20_000 + n));
        text
    });
    let asked = asked.concat();
    web(&if at_front { [asked, others] } else { [others, asked] })
}

#[tokio::test]
async fn s19_ten_thousand_rules_are_replaced_without_a_wrong_verdict() {
    let fleet = Fleet::new("s19m", 1, &FAST, &["--policy-memory", "4194304"]);
    let [a, b] = [many(("a", swap::ONLY_A), true), many(("b", swap::ONLY_B), false)];
    let [a, b] = [a, b].map(|policy| {
        fleet.apply(&policy);
        fleet.core.cnsmo_json(&["history"])[0]["revision"].to_string()
    });
    let [vm, _] = of_vm(1);
    let traffic = Traffic::start((&fleet.switch.netns, HERE4), (fleet.vm(1), vm));
    let mut replaced = 0;
    while replaced < REPLACEMENTS || traffic.sent() < FLOWS_MIN {
        // To and fro between the two revisions: a file of so many rules takes longer to read than to enforce.
        let revision = if replaced % 2 == 0 { &a } else { &b };
        fleet.core.cnsmo(&["rollback", revision, "--wait"]);
        replaced += 1;
    }
    let heard = traffic.stop();
    heard.is_of_one_policy_each();
}

#[tokio::test]
async fn s19_what_blocks_the_core_is_undone_and_a_rule_against_it_has_no_effect() {
    const UNDONE: &str = "is in force again";
    const WINDOW: Duration = Duration::from_secs(5);
    let options = ["--heartbeat", "1s", "--lease", "2s", "--confirm-window", "5s"];
    let mut fleet = Fleet::new("s19u", 1, &options, &[]);
    let core = fleet.core.address();
    let beside = listen(&fleet.switch.netns, HERE4, 7001);
    let beside = beside.local_addr().map(|to| (beside, to)).unwrap();
    let reaches = |fleet: &Fleet, to| connect(fleet.vm(1), to, 2 * SILENCE).is_ok();
    assert!(reaches(&fleet, core) && reaches(&fleet, beside.1));

    // It closes what is beside the core, and the VM goes on to hear of the core: this is how the change came to be confirmed.
    fleet.apply(&format!(
        "kind: FirewallPolicy\nmetadata: {{name: against}}\nspec:\n  priority: 0\n  \
         defaults: {{ingress: deny, egress: deny}}\n  rules:\n    \
         - {{name: out, action: deny, direction: egress, to: [{HERE4}/32]}}\n    \
         - {{name: in, action: deny, direction: ingress, from: [{HERE4}/32]}}\n"
    ));
    assert!(reaches(&fleet, core) && !reaches(&fleet, beside.1));
    tokio::time::sleep(WINDOW * 2).await;
    assert!(!fleet.agents[0].output().unwrap().contains(UNDONE));
    fleet.core.cnsmo(&["delete", "fw", "against"]);
    fleet.core.cnsmo(&["wait"]);
    assert!(reaches(&fleet, beside.1));

    // A network that takes the core's address for its own: what the VM sends there goes into the tunnel.
    let file = fleet.write(
        "kind: Network\nmetadata: {name: greedy}\n\
         spec: {ipv4: 10.77.1.0/29, addresses: {vm1: {ipv4: 10.77.1.2}}}\n",
    );
    fleet.core.cnsmo(&["apply", "-f", file.to_str().unwrap()]);
    fleet.agents[0].wait_for(UNDONE, PATIENCE).unwrap();
    // The core is there again, and sends the change once more; then it is held back.
    let undone = async || {
        let twice = fleet.agents[0].output().unwrap().matches(UNDONE).count() == 2;
        (twice && reaches(&fleet, core) && reaches(&fleet, beside.1)).then_some(())
    };
    until("the VM, as before the change", undone).await;
    tokio::time::sleep(WINDOW * 2).await;
    assert!(reaches(&fleet, core) && reaches(&fleet, beside.1));
    assert_eq!(fleet.agents[0].output().unwrap().matches(UNDONE).count(), 2);
}
