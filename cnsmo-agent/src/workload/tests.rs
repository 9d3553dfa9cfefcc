//! Real children of this process.

mod units;
mod user;

use std::{
    net::TcpListener,
    os::{linux::net::SocketAddrExt as _, unix::net},
    time::Instant,
};

use cnsmo_proto::pb::deployment as pb;
use cnsmo_service::{
    host::Status,
    lifecycle::State,
    supervise::{Limits, Stopper, stop_pair},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::task::JoinHandle;

use super::*;

const PATIENCE: Duration = Duration::from_secs(30);
/// A server with one connection after the other, and nothing else; the port is its first argument.
const SERVER: &str = "
import socket, sys, os
s = socket.create_server(('127.0.0.1', int(sys.argv[1])))
print('listening as', os.getuid(), os.environ['NODE'], os.getcwd(), flush=True)
while True:
    c, _ = s.accept()
    while c.recv(100): pass
    c.close()
";

fn instance(name: &str, process: pb::Process, port: u16) -> pb::Instance {
    pb::Instance {
        name: name.into(),
        deployment: "test".into(),
        node: "vm1".into(),
        goal: pb::instance::Goal::Run.into(),
        driver: Some(pb::instance::Driver::Process(process)),
        ports: vec![pb::Port { name: "main".into(), protocol: 6, port: port.into() }],
        drain_timeout: Some(prost_types::Duration { seconds: 20, nanos: 0 }),
        ..pb::Instance::default()
    }
}

fn server() -> pb::Process {
    let command = ["/usr/bin/python3", "-c", SERVER, "${PORT_MAIN}"];
    pb::Process {
        command: command.map(ToOwned::to_owned).to_vec(),
        readiness: Some(pb::Probe {
            probe: Some(pb::probe::Probe::TcpPort("main".into())),
            interval: Some(prost_types::Duration { seconds: 0, nanos: 100_000_000 }),
            ..pb::Probe::default()
        }),
        ..pb::Process::default()
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// An agent, as far as instances are concerned.
struct Agent {
    host: Host,
    wanted: watch::Sender<Option<Arc<Instances>>>,
    stopper: Stopper,
    running: JoinHandle<io::Result<()>>,
}

impl Agent {
    fn start(folder: &Path, wanted: &[pb::Instance]) -> Self {
        Self::with(Systemd::new(Some("unix:path=/no/such/bus".into())), folder, wanted)
    }

    fn with(systemd: Systemd, folder: &Path, wanted: &[pb::Instance]) -> Self {
        let second = Duration::from_secs(1);
        let host = Host::new(Limits {
            first_delay: second,
            longest_delay: second,
            restarts_max: 1,
            window: second,
            stop_deadline: second,
        });
        let (sender, receiver) = watch::channel(None);
        let (stopper, stop) = stop_pair();
        let workloads = Workloads::new(host.clone(), folder, systemd);
        let running = tokio::spawn(workloads.run(receiver, stop));
        let agent = Self { host, wanted: sender, stopper, running };
        agent.want(wanted);
        agent
    }

    fn want(&self, wanted: &[pb::Instance]) {
        let typed = wanted.iter().map(|one| Instance::try_from(one.clone()).unwrap());
        let all = typed.map(|one| ((one.deployment.clone(), one.name.clone()), one));
        self.wanted.send_replace(Some(Arc::new(all.collect())));
    }

    /// The agent ends; what it runs goes on.
    async fn leave(self) {
        self.stopper.stop();
        self.running.await.unwrap().unwrap();
        self.host.shut_down().await;
    }

    async fn until(&self, what: &str, is: impl Fn(&[Status]) -> bool) -> Vec<Status> {
        let end = Instant::now() + PATIENCE;
        loop {
            let all = self.host.list();
            if is(&all) {
                return all;
            }
            assert!(Instant::now() < end, "{what}: {all:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn told(&self, name: &str, phase: Phase, text: &str) {
        let is = |all: &[Status]| {
            all.iter().any(|one| {
                let State { phase: now, message, .. } = &one.state;
                one.about.instance == name && *now == phase && message.contains(text)
            })
        };
        self.until(&format!("{name}: {phase}, {text}"), is).await;
    }

    async fn ready(&self) -> u32 {
        let is_ready = |all: &[Status]| all.len() == 1 && all[0].state.phase == Phase::Ready;
        self.until("ready", is_ready).await[0].pid
    }
}

/// One that has ended and whose parent, this process, does not ask for its status counts as gone.
fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn drained(instance: &pb::Instance) -> pb::Instance {
    pb::Instance { goal: pb::instance::Goal::Drain.into(), ..instance.clone() }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_outlives_the_agent_and_ends_when_its_connections_have() {
    let folder = tempfile::tempdir().unwrap();
    let port = free_port();
    let one = instance("test-1", pb::Process { user: "nobody".into(), ..server() }, port);
    let agent = Agent::start(folder.path(), std::slice::from_ref(&one));
    let pid = agent.ready().await;
    let own = folder.path().join("instances/test.test-1");
    let log = fs::read_to_string(own.join("stdout.log")).unwrap();
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap().uid;
    assert_eq!(log, format!("listening as {nobody} vm1 {}\n", own.join("work").display()));

    // The next agent takes it up as it is.
    agent.leave().await;
    assert!(lives(pid));
    let agent = Agent::start(folder.path(), std::slice::from_ref(&one));
    assert_eq!(agent.ready().await, pid);

    // It is killed as by a crash: another one takes its place.
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
    agent.until("failed", |all| all[0].state.phase == Phase::Failed).await;
    let again = agent.ready().await;
    assert!(again != pid && lives(again));

    // Somebody talks with it: it goes on until he has said all.
    let client = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    agent.want(&[drained(&one)]);
    agent.until("draining", |all| all[0].state.phase == Phase::Draining).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(lives(again), "it was ended under its client");
    drop(client);
    agent.until("stopped", |all| all[0].state.phase == Phase::Stopped).await;
    assert!(!lives(again));
    assert!(own.exists());
    agent.want(&[]);
    agent.until("nothing", <[Status]>::is_empty).await;
    assert!(!own.exists());
    agent.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_wanted_any_more_is_ended_also_by_an_agent_that_comes_later() {
    let folder = tempfile::tempdir().unwrap();
    let one = instance("test-1", server(), free_port());
    let agent = Agent::start(folder.path(), std::slice::from_ref(&one));
    let pid = agent.ready().await;
    agent.leave().await;

    // As long as nothing is known, nothing is done.
    let agent = Agent::start(folder.path(), &[]);
    agent.until("draining", |all| !all.is_empty()).await;
    agent.until("gone", <[Status]>::is_empty).await;
    assert!(!lives(pid));
    agent.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_run_says_why_and_what_hears_no_signal_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let sh = |script: &str| pb::Process {
        command: ["/bin/sh", "-c", script].map(ToOwned::to_owned).to_vec(),
        stop_timeout: Some(prost_types::Duration { seconds: 0, nanos: 300_000_000 }),
        ..pb::Process::default()
    };
    let all = [
        instance("missing", pb::Process { command: vec!["/no/such".into()], ..sh("") }, 1),
        instance("stranger", pb::Process { user: "nosuchuser".into(), ..sh("exit 0") }, 2),
        instance("failing", sh("exit 7"), 3),
        instance(
            "never",
            pb::Process {
                readiness: server().readiness,
                start_timeout: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
                ..sh("sleep 1000")
            },
            free_port(),
        ),
        instance("deaf", sh("trap '' TERM; while :; do sleep 0.1; done"), 5),
    ];
    let agent = Agent::start(folder.path(), &all);
    for (name, reason) in [
        ("missing", "cannot be started: No such file"),
        ("stranger", "user nosuchuser: this VM does not know it"),
        ("failing", "ended with exit code 7"),
        ("never", "not ready within 1s: port"),
    ] {
        let told = |all: &[Status]| {
            all.iter().any(|one| {
                one.about.instance == name
                    && one.state.phase == Phase::Failed
                    && one.state.message.starts_with(reason)
            })
        };
        agent.until(reason, told).await;
    }
    let deaf = |all: &[Status]| all.iter().any(|one| one.about.instance == "deaf" && one.pid > 0);
    let pid = agent.until("deaf", deaf).await;
    let pid = pid.iter().find(|one| one.about.instance == "deaf").unwrap().pid;
    assert!(lives(pid));
    agent.want(&[]);
    agent.until("nothing", <[Status]>::is_empty).await;
    assert!(!lives(pid));
    agent.leave().await;
}

/// Says what it finds in the file `say` of its folder.
const SAYS: &str = "
import os, socket, time
to = '\\0' + os.environ['NOTIFY_SOCKET'][1:]
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
    while True:
        try:
            text = open('say').read()
            os.remove('say')
            s.sendto(text.encode(), to)
        except FileNotFoundError:
            time.sleep(0.02)
";

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_announces_itself_and_the_next_agent_knows_and_hears_it() {
    let folder = tempfile::tempdir().unwrap();
    let announced = Some(pb::probe::Probe::Announced(true));
    let process = pb::Process {
        command: ["/usr/bin/python3", "-c", SAYS].map(ToOwned::to_owned).to_vec(),
        user: "nobody".into(),
        readiness: Some(pb::Probe { probe: announced, ..pb::Probe::default() }),
        ..pb::Process::default()
    };
    let one = instance("test-1", process, free_port());
    let own = folder.path().join("instances/test.test-1");
    let say = |text: &str| {
        let file = own.join("work/say");
        fs::write(file.with_extension("new"), text).unwrap();
        fs::rename(file.with_extension("new"), file).unwrap();
    };
    let is = |phase: Phase, text: &'static str| {
        move |all: &[Status]| all[0].state.phase == phase && all[0].state.message == text
    };
    let agent = Agent::start(folder.path(), std::slice::from_ref(&one));
    agent.until("running", |all| !all.is_empty() && all[0].pid != 0).await;
    // Somebody else says so: this process, though it knows the name of the socket.
    let kept = fs::read_to_string(own.join("notify")).unwrap();
    let name = kept.split(' ').next().unwrap();
    let address = net::SocketAddr::from_abstract_name(name).unwrap();
    let other = net::UnixDatagram::unbound().unwrap();
    other.send_to_addr(b"READY=1", &address).unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(agent.host.list()[0].state.phase, Phase::Starting);

    say("STATUS=warm\nREADY=1");
    agent.until("announced", is(Phase::Ready, "warm")).await;
    let pid = agent.host.list()[0].pid;
    agent.leave().await;
    // It does not say so again, and need not.
    let agent = Agent::start(folder.path(), std::slice::from_ref(&one));
    assert_eq!(agent.ready().await, pid);
    say("STOPPING=1\nSTATUS=no more");
    agent.until("stopping", is(Phase::Degraded, "it says: no more")).await;
    say("READY=1\nSTATUS=");
    agent.until("again", is(Phase::Ready, "")).await;
    assert_eq!(agent.host.list()[0].pid, pid);
    agent.want(&[]);
    agent.until("nothing", <[Status]>::is_empty).await;
    agent.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_announces_nothing_fails_and_an_exec_probe_knows_the_variables() {
    let folder = tempfile::tempdir().unwrap();
    let sleeps = |probe, start_timeout| pb::Process {
        command: ["/bin/sleep", "1000"].map(ToOwned::to_owned).to_vec(),
        readiness: Some(pb::Probe { probe: Some(probe), ..pb::Probe::default() }),
        start_timeout: Some(start_timeout),
        ..pb::Process::default()
    };
    let second = |seconds| prost_types::Duration { seconds, nanos: 0 };
    let port = free_port();
    let command = ["/usr/bin/test", "${PORT_MAIN}.${NODE}", "=", &format!("{port}.vm1")];
    let command = command.map(ToOwned::to_owned).to_vec();
    let exec = pb::probe::Probe::Exec(pb::ExecProbe { command });
    let all = [
        instance("mute", sleeps(pb::probe::Probe::Announced(true), second(1)), free_port()),
        instance("asked", sleeps(exec, second(60)), port),
    ];
    let agent = Agent::start(folder.path(), &all);
    let why = "not ready within 1s: it has not announced that it is ready";
    agent.told("mute", Phase::Failed, why).await;
    agent.told("asked", Phase::Ready, "").await;
    agent.want(&[]);
    agent.until("nothing", <[Status]>::is_empty).await;
    agent.leave().await;
}
