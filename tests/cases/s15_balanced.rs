//! Instances of a service behind a balancer: they become its backends when they are ready, and leave it without a broken
//! connection.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use cnsmo_tests::{Netns, PinDir, Process, pause, sweep};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use super::{
    programs::{Core, PATIENCE, until},
    switch::Switch,
};

const VIRTUAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(10, 92, 0, 80)), 80);
/// Connections of the load that are open at once.
const CALLERS: usize = 6;
/// Between the two halves of a call: it must outlive most of what happens to its backend's neighbours.
const TALK: Duration = Duration::from_millis(30);

const FILE: &str = "
kind: Network
metadata: {name: shop}
spec: {ipv4: 10.92.0.0/24, addresses: {vm4: {ipv4: 10.92.0.4}}}
---
kind: LoadBalancer
metadata: {name: front}
spec:
  network: shop
  addresses: [10.92.0.80]
  ports: [{protocol: tcp, port: 80}]
  service: web
---
kind: Deployment
metadata: {name: web}
spec:
  replicas: 5
  placement: {selector: {role: web}}
  ports: [{name: main}]
  drainTimeout: 60s
  process:
    user: nobody
    command:
      - /usr/bin/python3
      - -c
      - |
        import socketserver, sys
        class Echo(socketserver.BaseRequestHandler):
          def handle(self):
            self.request.sendall(sys.argv[1].encode() + b'\\n')
            while data := self.request.recv(100):
              self.request.sendall(data)
        class Server(socketserver.ThreadingTCPServer):
          request_queue_size = 100
          allow_reuse_address = True
          daemon_threads = True
        Server(('0.0.0.0', int(sys.argv[2])), Echo).serve_forever()
      - ${INSTANCE}
      - ${PORT_MAIN}
    readiness: {tcp: main, interval: 100ms}
    stopTimeout: 1s
";

/// Three VMs with instances; the fourth has the clients, and is behind no balancer.
struct Fleet {
    agents: Vec<Process>,
    core: Core,
    switch: Switch,
}

impl Fleet {
    fn new() -> Self {
        let switch = Switch::new("s15b", 4);
        let core = switch.core("s15b", &["--heartbeat", "200ms", "--lease", "2s"]);
        let agent = |(n, (netns, pins)): (usize, &(Netns, PinDir))| {
            let role = if n == 4 { "role=client" } else { "role=web" };
            core.agent(netns, pins, &format!("vm{n}"), &["--label", role])
        };
        let agents = (1..).zip(&switch.vms).map(agent).collect();
        Self { agents, core, switch }
    }

    async fn complete(&self, count: u64) -> Vec<Value> {
        until(&format!("{count} instances"), async || {
            let one = self.core.cnsmo_json(&["get", "deployments", "web"]);
            let status = &one["status"];
            let counts = ["desired", "placed", "ready", "updated"].map(|n| status[n].as_u64());
            (counts == [Some(count); 4]).then(|| status["instances"].as_array().unwrap().clone())
        })
        .await
    }

    /// Instances that the clients' VM gives new flows.
    fn active(&self) -> BTreeSet<String> {
        let front = self.core.cnsmo_json(&["get", "lb", "front"]);
        let nodes = front["status"]["nodes"].as_array().unwrap();
        let here = nodes.iter().filter(|node| node["node"] == "vm4");
        let backends = here.flat_map(|node| node["backends"].as_array().unwrap());
        let active = backends.filter(|backend| backend["active"] == true);
        active.map(|backend| backend["instance"].as_str().unwrap().to_owned()).collect()
    }

    async fn active_are(&self, wanted: &[Value]) {
        let wanted = names(wanted);
        until("the backends", async || (self.active() == wanted).then_some(())).await;
    }

    fn open(&self) -> Call {
        self.switch.vms[3].0.run(Call::open).unwrap().unwrap()
    }

    fn pid(&self, instance: &Value) -> Pid {
        let node = instance["node"].as_str().unwrap();
        let all = self.core.cnsmo_json(&["service", "list", "--node", node]);
        let all = all.as_array().unwrap();
        let one = all.iter().find(|one| one["instance"] == instance["name"]).unwrap();
        Pid::from_raw(one["pid"].as_i64().unwrap().try_into().unwrap())
    }
}

fn names(instances: &[Value]) -> BTreeSet<String> {
    instances.iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
}

/// A connection, and the instance at its other end.
struct Call {
    stream: TcpStream,
    instance: String,
}

impl Call {
    fn open() -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&VIRTUAL, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut instance = String::new();
        BufReader::with_capacity(1, &stream).read_line(&mut instance)?;
        match instance.pop() {
            Some('\n') => Ok(Self { stream, instance }),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn talk(&mut self) -> io::Result<()> {
        self.stream.write_all(b"?")?;
        self.stream.read_exact(&mut [0])
    }
}

fn short_call() -> io::Result<String> {
    let mut call = Call::open()?;
    pause(TALK);
    call.talk()?;
    Ok(call.instance)
}

/// Calls without a pause until it is stopped.
struct Load {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<BTreeSet<String>>>,
    callers: Vec<JoinHandle<(u64, Vec<String>)>>,
}

impl Load {
    fn start(from: &Netns) -> Self {
        let (stop, seen) = (Arc::<AtomicBool>::default(), Arc::<Mutex<BTreeSet<_>>>::default());
        let caller = |_| {
            let (stop, seen) = (stop.clone(), seen.clone());
            from.spawn(move || {
                let (mut good, mut bad) = (0, Vec::new());
                while !stop.load(Ordering::Relaxed) {
                    match short_call() {
                        Ok(instance) => {
                            good += 1;
                            seen.lock().unwrap().insert(instance);
                        }
                        Err(error) => bad.push(error.to_string()),
                    }
                }
                (good, bad)
            })
            .unwrap()
        };
        let callers = (0..CALLERS).map(caller).collect();
        Self { stop, seen, callers }
    }

    /// Instances that have answered since the last call.
    fn take_seen(&self) -> BTreeSet<String> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }

    /// Calls that went well, and what the others met.
    fn stop(self) -> (u64, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.callers.into_iter().map(|caller| caller.join().unwrap());
        ended.fold((0, Vec::new()), |mut all, (good, bad)| {
            all.0 += good;
            all.1.extend(bad);
            all
        })
    }
}

#[tokio::test]
async fn s15_instances_are_backends_while_they_are_ready_and_leave_without_a_reset() {
    sweep();
    let mut fleet = Fleet::new();
    let file = fleet.core.folder().join("shop.yaml");
    fs::write(&file, FILE).unwrap();
    fleet.core.cnsmo(&["apply", "-f", file.to_str().unwrap(), "--wait"]);
    let five = fleet.complete(5).await;
    let on: BTreeSet<_> = five.iter().map(|one| one["node"].to_string()).collect();
    assert_eq!(on.len(), 3);
    fleet.active_are(&five).await;
    let shown = fleet.core.cnsmo(&["describe", "lb", "front"]);
    assert!(five.iter().all(|one| shown.contains(one["name"].as_str().unwrap())), "{shown}");

    let load = Load::start(&fleet.switch.vms[3].0);
    until("all five", async || (load.seen.lock().unwrap().len() == 5).then_some(())).await;
    // One call on each instance goes on all the time.
    let mut calls = Vec::<Call>::new();
    while calls.len() < 5 {
        let call = fleet.open();
        if calls.iter().all(|other| other.instance != call.instance) {
            calls.push(call);
        }
    }

    fleet.core.cnsmo(&["scale", "web=2"]);
    let leaving = async || {
        let left = fleet.active();
        (left.len() == 2).then_some(left)
    };
    let left = until("three that leave", leaving).await;
    // What is under way ends by itself: the calls of the load, and then ours.
    load.take_seen();
    until("calls on both", async || (load.seen.lock().unwrap().len() >= 2).then_some(())).await;
    pause(TALK * 2);
    load.take_seen();
    until("calls on both", async || (load.seen.lock().unwrap().len() >= 2).then_some(())).await;
    assert_eq!(load.take_seen(), left);
    calls.iter_mut().for_each(|call| call.talk().unwrap());
    calls.retain(|call| left.contains(&call.instance));
    let two = fleet.complete(2).await;
    assert_eq!(names(&two), left);
    calls.iter_mut().for_each(|call| call.talk().unwrap());

    fleet.core.cnsmo(&["scale", "web=4"]);
    let four = fleet.complete(4).await;
    fleet.active_are(&four).await;
    until("new ones", async || (load.seen.lock().unwrap().len() == 4).then_some(())).await;
    // The core is away: what it knew of the instances stays in force, also when it is back.
    fleet.core.kill();
    calls.iter_mut().for_each(|call| call.talk().unwrap());
    load.take_seen();
    let switch = &fleet.switch.netns;
    let address = fleet.core.address();
    fleet.core.start_again_by(|path| {
        let mut command = switch.command(path).unwrap();
        command.args(["--listen", &address.to_string(), "--heartbeat", "200ms", "--lease", "2s"]);
        command
    });
    fleet.complete(4).await;
    fleet.active_are(&four).await;
    until("the same", async || (load.take_seen().len() == 4).then_some(())).await;
    let (good, bad) = load.stop();
    assert!(good > 100 && bad.is_empty(), "{good} calls were well, the others: {bad:?}");

    // One that is killed breaks its calls, and the load can tell.
    let load = Load::start(&fleet.switch.vms[3].0);
    until("all four", async || (load.take_seen().len() >= 2).then_some(())).await;
    let one = four.iter().find(|one| one["name"] == calls[0].instance.as_str()).unwrap();
    kill(fleet.pid(one), Signal::SIGKILL).unwrap();
    while calls[0].talk().is_ok() {}
    calls[1].talk().unwrap();
    let again = async || {
        let is_ready = |now: &Value| now["phase"] == "ready";
        let now = fleet.complete(4).await;
        now.iter().all(is_ready).then_some(())
    };
    until("it runs again", again).await;
    drop((load.stop(), calls));
    fleet.core.cnsmo(&["delete", "deployment", "web"]);
    until("their end", async || {
        let left = fleet.core.cnsmo_json(&["services", "--service", "web"]);
        left.as_array().unwrap().is_empty().then_some(())
    })
    .await;
    assert!(fleet.switch.vms[3].0.run(Call::open).unwrap().is_err());
    fleet.agents.clear();
}
