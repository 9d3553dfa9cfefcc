//! Rules of nftables and iptables, and the policies that `cnsmo import` makes of them: both let in and out the same.

use std::{
    collections::BTreeMap,
    io::Write as _,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::{Command, Stdio},
};

use cnsmo_agent::effective::Effective;
use cnsmo_proto::{
    manifest::{self, Original},
    model::FirewallPolicy,
    pb::resource::resource::Resource as Kind,
};
use cnsmo_tests::Netns;
use tempfile::TempDir;

use super::{
    lab::{FAMILIES, Lab, SILENCE, arrives, name},
    programs::program,
};

/// Further addresses of the peer, beside those of the lab.
const OTHERS: [&str; 4] = ["10.7.0.3", "10.7.0.66", "fd07::3", "fd07::42"];
const TCP: [u16; 7] = [22, 53, 80, 443, 5432, 8005, 8443];
const UDP: [u16; 2] = [53, 123];
/// Of the peer, for what the VM begins.
const OUTWARDS: [u16; 2] = [25, 80];

const NFT: &str = r#"
table inet filter {
    set trusted { type ipv4_addr; flags interval; elements = { 10.7.0.64/26 } }
    set pairs { type ipv6_addr . inet_service; elements = { fd07::3 . 443, fd07::42 . 80 } }
    chain web {
        ip saddr 10.7.0.3 return
        ip6 saddr fd07::3 drop
        tcp dport { 80, 8000-8010 } accept comment "web"
    }
    chain input {
        type filter hook input priority filter; policy drop;
        ct state vmap { established : accept, related : accept, invalid : drop }
        iif lo accept
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert } accept
        ip6 saddr . tcp dport @pairs accept
        ip saddr @trusted tcp dport 5432 accept
        tcp dport 22 ip saddr != 10.7.0.3 accept
        meta l4proto { tcp, udp } th dport 53 accept
        jump web
        icmp type echo-request ip saddr 10.7.0.2 accept
        icmpv6 type echo-request ip6 saddr != fd07::42 accept
        tcp dport vmap { 443 : accept, 8443 : drop }
        reject with icmpx port-unreachable
    }
    chain output {
        type filter hook output priority filter; policy accept;
        ct state established,related accept
        tcp dport 25 drop
    }
}
table ip early {
    chain input {
        type filter hook input priority -10; policy accept;
        ct state established,related accept
        ip saddr 10.7.0.66 tcp dport 80 drop
    }
}
"#;

const IPTABLES: &str = "\
*filter
:INPUT DROP [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:web - [0:0]
-A INPUT -i lo -j ACCEPT
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -m conntrack --ctstate INVALID -j DROP
-A INPUT -p tcp -m multiport --dports 80,443,8000:8010 -g web
-A INPUT ! -s 10.7.0.3/32 -p tcp -m tcp --dport 22 -m comment --comment \"not from there\" -j ACCEPT
-A INPUT -m iprange --src-range 10.7.0.60-10.7.0.70 -j ACCEPT
-A INPUT -p udp -m udp ! --dport 123 -j ACCEPT
-A INPUT -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A INPUT -p tcp -m tcp --dport 5432 -j REJECT --reject-with icmp-host-prohibited
-A OUTPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A OUTPUT -p tcp -m tcp --dport 25 -j DROP
-A web -s 10.7.0.66/32 -j RETURN
-A web -p tcp -m tcp --dport 443 -j DROP
-A web -j ACCEPT
COMMIT
";

const IP6TABLES: &str = "\
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -s fd07::42/128 -p tcp -m tcp --dport 22 -j DROP
-A INPUT -s fd07::3/128 -p ipv6-icmp -m icmp6 --icmpv6-type 128 -j DROP
COMMIT
";

struct Machine(Lab);

impl Machine {
    fn new(label: &str) -> Self {
        let lab = Lab::new(label);
        for address in OTHERS {
            let length = if address.contains(':') { 64 } else { 24 };
            let address = format!("{address}/{length}");
            lab.peer.ip(&["addr", "add", &address, "dev", "eth0"]).unwrap();
        }
        Self(lab)
    }

    /// What passes, each probe with its name.
    fn passes(&self) -> BTreeMap<String, bool> {
        let lab = &self.0;
        let others = OTHERS.map(|address| address.parse::<IpAddr>().unwrap());
        let mut passes = BTreeMap::new();
        for (vm, peer) in FAMILIES {
            let sources = others.iter().filter(|other| other.is_ipv6() == vm.is_ipv6());
            let sources: Vec<_> = [peer].into_iter().chain(sources.copied()).collect();
            for port in TCP {
                let _listener = lab.listen(&lab.vm, vm, port);
                for source in &sources {
                    let opens = opens(&lab.peer, *source, SocketAddr::new(vm, port));
                    passes.insert(format!("tcp {source} > {vm} {port}"), opens);
                }
            }
            for port in UDP {
                let socket = lab.udp(&lab.vm, vm, port);
                for source in &sources {
                    let sender = lab.udp(&lab.peer, *source, 0);
                    sender.send_to(b"knock", (vm, port)).unwrap();
                    passes.insert(format!("udp {source} > {vm} {port}"), arrives(&socket));
                }
            }
            for source in &sources {
                passes.insert(format!("ping {source} > {vm}"), pings(&lab.peer, *source, vm));
            }
            for port in OUTWARDS {
                let _listener = lab.listen(&lab.peer, peer, port);
                let opens = opens(&lab.vm, vm, SocketAddr::new(peer, port));
                passes.insert(format!("tcp {vm} > {peer} {port}"), opens);
            }
        }
        passes
    }

    /// Runs a program in the VM with this input; what it prints.
    fn run(&self, words: &[&str], input: &str) -> String {
        let mut command = self.0.vm.command(words[0]).unwrap();
        command.args(&words[1..]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| {
            panic!("{}: {error}: apt-get install nftables iptables", words[0])
        });
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", output.status);
        String::from_utf8(output.stdout).unwrap()
    }
}

/// A connection from a certain address. A refusal is no connection, however it was said.
fn opens(netns: &Netns, source: IpAddr, to: SocketAddr) -> bool {
    // What connects is nc: the standard library cannot choose the source of a connection.
    let mut command = netns.command("nc").unwrap();
    command.args(["-n", "-z", "-w", "1", "-s", &source.to_string()]);
    command.args([to.ip().to_string(), to.port().to_string()]);
    let output = command.output().expect("nc starts: apt-get install netcat-openbsd");
    output.status.success()
}

fn pings(netns: &Netns, source: IpAddr, to: IpAddr) -> bool {
    let mut command = netns.command("ping").unwrap();
    let wait = format!("{:.1}", 2.0 * SILENCE.as_secs_f64());
    command.args(["-n", "-c", "1", "-W", &wait, "-I", &source.to_string(), &to.to_string()]);
    command.output().expect("ping starts: apt-get install iputils-ping").status.success()
}

/// What `cnsmo import` prints, as `cnsmo apply` reads it. Nothing may be left out.
fn import(arguments: &[&str]) -> FirewallPolicy {
    let output = Command::new(program("cnsmo")).arg("import").args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {}: {said}", output.status);
    let text = String::from_utf8(output.stdout).unwrap();
    let parsed = manifest::parse("imported.yaml", &text, &Original::default()).unwrap();
    let resource = parsed.resources.into_iter().next().unwrap();
    let Some(Kind::FirewallPolicy(policy)) = resource.resource else { panic!("no policy: {text}") };
    FirewallPolicy::try_from(policy.spec.unwrap()).unwrap()
}

fn write(folder: &TempDir, name: &str, text: &str) -> String {
    let path = folder.path().join(name);
    std::fs::write(&path, text).unwrap();
    shown(&path)
}

fn shown(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Of a VM that the data path guards by this policy.
fn guarded(label: &str, policy: &FirewallPolicy) -> BTreeMap<String, bool> {
    let machine = Machine::new(label);
    assert!(machine.passes().values().all(|passes| *passes), "a probe fails without any rules");
    let _kernel = machine.0.guard(&Effective::merge(vec![], [(&name("imported"), policy)]));
    machine.passes()
}

fn assert_alike(by_rules: &BTreeMap<String, bool>, by_policy: &BTreeMap<String, bool>) {
    let differ: Vec<_> =
        by_rules.iter().filter(|(probe, old)| by_policy[*probe] != **old).collect();
    assert!(
        differ.is_empty(),
        "the rules let pass, or not, and the policy the contrary: {differ:?}"
    );
    let passed = by_rules.values().filter(|passes| **passes).count();
    assert!(passed > 5 && by_rules.len() - passed > 5, "{by_rules:?}");
}

#[test]
fn a_policy_imported_from_nftables_lets_pass_what_the_rules_did() {
    let machine = Machine::new("import-nft");
    machine.run(&["nft", "-f", "-"], NFT);
    let folder = TempDir::new().unwrap();
    let listed = machine.run(&["nft", "-j", "list", "ruleset"], "");
    let policy = import(&["nftables", &write(&folder, "rules.json", &listed)]);
    let by_policy = guarded("import-nftp", &policy);
    assert_alike(&machine.passes(), &by_policy);
    // The control: with one rule less the comparison sees it.
    machine.run(&["nft", "flush ruleset"], "");
    machine.run(&["nft", "-f", "-"], &NFT.replace("ip6 saddr fd07::3 drop", ""));
    let changed = machine.passes();
    let differ: Vec<_> = changed.iter().filter(|(probe, old)| by_policy[*probe] != **old).collect();
    assert_eq!(
        differ,
        [
            (&"ping fd07::3 > fd07::1".to_owned(), &true),
            (&"tcp fd07::3 > fd07::1 80".to_owned(), &true),
            (&"tcp fd07::3 > fd07::1 8005".to_owned(), &true)
        ]
    );
}

#[test]
fn a_policy_imported_from_iptables_lets_pass_what_the_rules_did() {
    let machine = Machine::new("import-ipt");
    machine.run(&["iptables-restore"], IPTABLES);
    machine.run(&["ip6tables-restore"], IP6TABLES);
    let folder = TempDir::new().unwrap();
    let v4 = write(&folder, "rules.v4", &machine.run(&["iptables-save"], ""));
    let v6 = write(&folder, "rules.v6", &machine.run(&["ip6tables-save"], ""));
    let by_policy = guarded("import-iptp", &import(&["iptables-save", &v4, "--ipv6", &v6]));
    assert_alike(&machine.passes(), &by_policy);
    // The control: with one rule changed the comparison sees it.
    machine.run(&["iptables-restore"], &IPTABLES.replace("-A web -s 10.7.0.66/32 -j RETURN\n", ""));
    let changed = machine.passes();
    let differ: Vec<_> = changed.iter().filter(|(probe, old)| by_policy[*probe] != **old).collect();
    assert_eq!(
        differ,
        [
            (&"tcp 10.7.0.66 > 10.7.0.1 80".to_owned(), &true),
            (&"tcp 10.7.0.66 > 10.7.0.1 8005".to_owned(), &true)
        ]
    );
}
