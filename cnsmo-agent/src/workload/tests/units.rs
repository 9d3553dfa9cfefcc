//! Instances as units of a real systemd.

use super::{user::User, *};

const SLEEPS: &str = "[Service]\nExecStart=/bin/sleep 1000\n";

fn of_systemd(name: &str, systemd: pb::Systemd) -> pb::Instance {
    let driver = Some(pb::instance::Driver::Systemd(systemd));
    pb::Instance { driver, ..instance(name, pb::Process::default(), free_port()) }
}

fn unit(name: &str, unit: &str, readiness: Option<pb::probe::Probe>) -> pb::Instance {
    let readiness = readiness.map(|probe| pb::Probe { probe: Some(probe), ..Default::default() });
    let unit = Some(pb::systemd::Unit::Name(unit.into()));
    of_systemd(name, pb::Systemd { unit, readiness })
}

fn transient(name: &str, process: pb::Process) -> pb::Instance {
    let unit = Some(pb::systemd::Unit::Process(Box::new(process)));
    of_systemd(name, pb::Systemd { unit, readiness: None })
}

fn shell(script: &str) -> pb::Process {
    let command = ["/bin/sh", "-c", script].map(ToOwned::to_owned).to_vec();
    pb::Process { command, ..pb::Process::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unit_outlives_the_agent_tells_how_it_failed_and_is_ended() {
    let user = User::start(&[("keep@.service", SLEEPS)]).await;
    let folder = tempfile::tempdir().unwrap();
    let one = unit("test-1", "keep@.service", None);
    let agent = Agent::with(user.systemd(), folder.path(), std::slice::from_ref(&one));
    let pid = agent.ready().await;
    let begun = user.activity("keep@test-1.service").await;
    assert_eq!((&*begun.active, &*begun.sub, begun.pid), ("active", "running", pid));
    assert_eq!(agent.host.list()[0].about.driver, "systemd");

    // The next agent takes up what runs, and starts nothing.
    agent.leave().await;
    let agent = Agent::with(user.systemd(), folder.path(), std::slice::from_ref(&one));
    assert_eq!(agent.ready().await, pid);
    assert_eq!(user.activity("keep@test-1.service").await.invocation, begun.invocation);

    // A crash is told by its reason.
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
    let why = "unit keep@test-1.service: failed (failed), Result=signal, signal 9";
    agent.told("test-1", Phase::Failed, why).await;
    let again = agent.ready().await;
    assert_ne!(again, pid);
    // So is an end that somebody else asked for.
    user.systemd().connect().await.unwrap().stop("keep@test-1.service").await.unwrap();
    agent.told("test-1", Phase::Failed, "inactive (dead), Result=success, signal 15").await;
    let again = agent.ready().await;

    // The bus goes and comes back: the unit is the same all the while.
    let bus = user.activity("dbus.service").await.pid;
    kill(Pid::from_raw(bus.cast_signed()), Signal::SIGKILL).unwrap();
    agent.told("test-1", Phase::Degraded, "systemd is not heard").await;
    assert_eq!(agent.ready().await, again);

    agent.want(&[drained(&one)]);
    agent.until("stopped", |all| all[0].state.phase == Phase::Stopped).await;
    assert_eq!(user.activity("keep@test-1.service").await.active, "inactive");
    agent.want(&[]);
    agent.until("nothing", <[Status]>::is_empty).await;
    assert!(!folder.path().join("instances/test.test-1").exists());
    agent.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unit_that_cannot_be_run_is_refused_by_its_name_and_the_reason() {
    let deaf = "[Service]\nTimeoutStopSec=1\nExecStart=/bin/sh -c 'trap \"\" TERM; while :; do sleep 1; done'\n";
    let user = User::start(&[
        ("fails.service", "[Service]\nExecStart=/bin/sh -c 'exit 7'\n"),
        ("broken.service", "[Service]\nExecStart=/no/such\n"),
        ("needs.service", "[Unit]\nRequires=broken2.service\nAfter=broken2.service\n[Service]\nExecStart=/bin/sleep 9\n"),
        ("broken2.service", "[Service]\nType=oneshot\nExecStart=/bin/false\n"),
        ("quiet.service", SLEEPS),
        ("deaf.service", deaf),
    ])
    .await;
    let folder = tempfile::tempdir().unwrap();
    let announced = Some(pb::probe::Probe::Announced(true));
    let all = [
        unit("missing", "missing.service", None),
        unit("fails", "fails.service", None),
        unit("broken", "broken.service", None),
        unit("needs", "needs.service", None),
        unit("quiet", "quiet.service", announced),
        unit("deaf", "deaf.service", None),
    ];
    let agent = Agent::with(user.systemd(), folder.path(), &all);
    for (name, reason) in [
        (
            "missing",
            "unit missing.service: cannot be run by the systemd of this VM: it is not-found",
        ),
        ("fails", "unit fails.service: failed (failed), Result=exit-code, exit code 7"),
        ("broken", "unit broken.service: failed (failed), Result=exit-code, exit code 203"),
        ("needs", "unit needs.service: inactive (dead), Result=success; its start: dependency"),
        ("quiet", "unit quiet.service: does not announce itself: its Type is simple, not notify"),
    ] {
        agent.told(name, Phase::Failed, reason).await;
    }
    agent.told("deaf", Phase::Ready, "").await;
    // Nobody else may have it.
    let other = unit("other", "deaf.service", None);
    agent.want(&[all[5].clone(), other]);
    let taken = "unit deaf.service: instance test/deaf has it on this VM";
    agent.told("other", Phase::Failed, taken).await;
    // It does not end when asked: systemd's own limit is kept.
    agent.want(&[]);
    agent.until("nothing", <[Status]>::is_empty).await;
    assert_eq!(user.activity("deaf.service").await.active, "failed");
    agent.leave().await;

    let lost = Agent::start(folder.path(), &[unit("nobus", "quiet.service", None)]);
    let why = "the bus unix:path=/no/such/bus cannot be used: ";
    lost.told("nobus", Phase::Failed, why).await;
    lost.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_is_a_transient_unit_with_its_environment_and_limits() {
    let user = User::start(&[]).await;
    let folder = tempfile::tempdir().unwrap();
    let said = folder.path().join("said");
    let script = format!(
        "echo \"$NODE $PORT_MAIN $0 $(pwd) $EXTRA\" > {0}; while ! test -e {0}.go; do sleep 0.1; done
        systemd-notify --ready; exec sleep 1000",
        said.display()
    );
    let mut process = shell(&script);
    process.command.push("a $HOME ${INSTANCE} %n".into());
    let process = pb::Process {
        environment: [("EXTRA".to_owned(), "of ${DEPLOYMENT} 100%".to_owned())].into(),
        limits: Some(pb::Limits { memory_bytes: 64 << 20, cpu_millis: 250, processes: 20 }),
        readiness: Some(pb::Probe {
            probe: Some(pb::probe::Probe::Announced(true)),
            ..pb::Probe::default()
        }),
        ..process
    };
    let one = transient("test-1", process);
    let agent = Agent::with(user.systemd(), folder.path(), std::slice::from_ref(&one));
    let is_there = |_: &[Status]| fs::read_to_string(&said).is_ok_and(|text| text.ends_with('\n'));
    agent.until("it runs", is_there).await;
    let work = folder.path().join("instances/test.test-1/work");
    let (port, work) = (one.ports[0].port, work.display());
    let text = fs::read_to_string(&said).unwrap();
    assert_eq!(text, format!("vm1 {port} a $HOME test-1 %n {work} of test 100%\n"));
    // It has not announced itself yet.
    assert_eq!(agent.host.list()[0].state.phase, Phase::Starting);
    fs::write(said.with_extension("go"), "").unwrap();
    let pid = agent.ready().await;
    let name = "cnsmo-test.test-1.service";
    let loaded = user.systemd().connect().await.unwrap().load(name).await.unwrap();
    let interface = || "org.freedesktop.systemd1.Service".try_into().unwrap();
    for (limit, expected) in
        [("MemoryMax", 64 << 20), ("CPUQuotaPerSecUSec", 250_000), ("TasksMax", 20)]
    {
        let value = loaded.proxy.get(interface(), limit).await.unwrap();
        assert_eq!(u64::try_from(value).unwrap(), expected, "{limit}");
    }

    agent.leave().await;
    assert!(lives(pid));
    let agent = Agent::with(user.systemd(), folder.path(), std::slice::from_ref(&one));
    assert_eq!(agent.ready().await, pid);
    // It dies; its name is free for the next one.
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
    agent.told("test-1", Phase::Failed, "failed (failed), Result=signal, signal 9").await;
    let again = agent.ready().await;
    assert_ne!(again, pid);
    agent.leave().await;

    // It is taken from the VM while there is no agent.
    let agent = Agent::with(user.systemd(), folder.path(), &[]);
    agent.until("draining", |all| !all.is_empty()).await;
    agent.until("gone", <[Status]>::is_empty).await;
    assert!(!lives(again));
    assert_eq!(user.activity(name).await.active, "inactive");
    agent.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transient_unit_that_never_starts_is_ended_and_tells_why() {
    let user = User::start(&[]).await;
    let folder = tempfile::tempdir().unwrap();
    let second = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    let never = pb::Process {
        readiness: Some(pb::Probe {
            probe: Some(pb::probe::Probe::TcpPort("main".into())),
            ..pb::Probe::default()
        }),
        start_timeout: second,
        ..shell("exec sleep 1000")
    };
    let missing = pb::Process { command: vec!["/no/such".into()], ..pb::Process::default() };
    let all = [transient("never", never), transient("missing", missing)];
    let agent = Agent::with(user.systemd(), folder.path(), &all);
    agent.told("missing", Phase::Failed, "Result=exit-code, exit code 203").await;
    agent.told("never", Phase::Failed, "not ready within 1s: port").await;
    // A crash that is asked for leaves nothing behind either.
    agent.want(&[]);
    agent.until("nothing", <[Status]>::is_empty).await;
    for name in ["never", "missing"] {
        let unit = format!("cnsmo-test.{name}.service");
        assert_eq!(user.until_over(&unit).await, "inactive", "{name}");
    }
    agent.leave().await;
}
