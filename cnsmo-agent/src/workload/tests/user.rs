//! A systemd of the test's own: a user's, with folders, bus, mounts and control groups that nothing else has.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use tempfile::TempDir;

use super::super::systemd::{Activity, Systemd};

const PROGRAMS: [&str; 4] =
    ["/lib/systemd/systemd", "/usr/bin/dbus-daemon", "/usr/bin/systemd-notify", "/usr/bin/unshare"];
const PATIENCE: Duration = Duration::from_secs(30);
/// Where control groups may be: version 2 alone, beside version 1, and systemd's own hierarchy of version 1.
const HIERARCHIES: [&str; 3] =
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd"];
static MADE: AtomicUsize = AtomicUsize::new(0);

/// What every systemd wants to have, and the bus, which comes back when it is killed.
const UNITS: [(&str, &str); 6] = [
    ("basic.target", "[Unit]\nDefaultDependencies=no\n"),
    ("shutdown.target", "[Unit]\nDefaultDependencies=no\n"),
    ("exit.target", "[Unit]\nDefaultDependencies=no\n"),
    ("start.target", "[Unit]\nDefaultDependencies=no\nWants=dbus.service\n"),
    ("dbus.socket", "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=%t/bus\n"),
    (
        "dbus.service",
        "[Unit]\nDefaultDependencies=no\nRequires=dbus.socket\nStartLimitIntervalSec=0\n[Service]\n\
         Type=notify\nRestart=always\nRestartSec=100ms\nExecStart=/usr/bin/dbus-daemon \
         --config-file=%t/bus.conf --address=systemd: --nofork --nopidfile --systemd-activation\n",
    ),
];
const BUS: &str = "<busconfig><type>session</type><listen>unix:path=/nowhere</listen>
<policy context=\"default\"><allow send_destination=\"*\" eavesdrop=\"true\"/>
<allow eavesdrop=\"true\"/><allow own=\"*\"/></policy></busconfig>";
/// In a mount namespace: systemd wants to see that the machine was booted by one, which need not be so.
const START: &str =
    "mount --make-rprivate / && mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system
for group in $GROUPS_OF_TEST; do echo $$ > $group/cgroup.procs || exit; done
exec /lib/systemd/systemd --user --unit=start.target";

pub(super) struct User {
    folder: TempDir,
    manager: Child,
    groups: Vec<PathBuf>,
}

impl User {
    pub(super) async fn start(units: &[(&str, &str)]) -> Self {
        for program in PROGRAMS {
            assert!(Path::new(program).exists(), "{program} is missing: run `cargo xtask setup`");
        }
        let folder = tempfile::tempdir().unwrap();
        for name in ["home", "run", "tmp", "units", "none"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        for (name, content) in UNITS.iter().chain(units) {
            fs::write(folder.path().join("units").join(name), content).unwrap();
        }
        fs::write(folder.path().join("run/bus.conf"), BUS).unwrap();
        let groups = groups();
        let path = |name: &str| folder.path().join(name);
        let joined: Vec<_> = groups.iter().map(|group| group.to_str().unwrap()).collect();
        let log = File::create(path("log")).unwrap();
        let mut command = Command::new("/usr/bin/unshare");
        command.args(["--mount", "/bin/sh", "-c", START]).env_clear();
        command.env("PATH", "/usr/bin:/bin").env("GROUPS_OF_TEST", joined.join(" "));
        command.env("HOME", path("home")).env("TMPDIR", path("tmp"));
        command.env("XDG_RUNTIME_DIR", path("run")).env("SYSTEMD_UNIT_PATH", path("units"));
        for generators in ["SYSTEMD_GENERATOR_PATH", "SYSTEMD_ENVIRONMENT_GENERATOR_PATH"] {
            command.env(generators, path("none"));
        }
        command.env("DBUS_SESSION_BUS_ADDRESS", format!("unix:path={}", path("run/bus").display()));
        command.env("SYSTEMD_LOG_TARGET", "console").stdin(Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log);
        let user = Self { manager: command.spawn().unwrap(), folder, groups };
        let end = Instant::now() + PATIENCE;
        while let Err(error) = user.activity_of("dbus.service").await {
            let log = fs::read_to_string(user.folder.path().join("log")).unwrap();
            assert!(Instant::now() < end, "no systemd: {error}\n{log}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        user
    }

    pub(super) fn systemd(&self) -> Systemd {
        let bus = self.folder.path().join("run/bus");
        Systemd::new(Some(format!("unix:path={}", bus.display())))
    }

    pub(super) async fn activity(&self, unit: &str) -> Activity {
        self.activity_of(unit).await.unwrap()
    }

    /// Waits until it is inactive, or has failed.
    pub(super) async fn until_over(&self, unit: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let Activity { active, .. } = self.activity(unit).await;
            if matches!(&*active, "inactive" | "failed") {
                return active;
            }
            assert!(Instant::now() < end, "{unit} is {active}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn activity_of(&self, unit: &str) -> Result<Activity, String> {
        let manager = self.systemd().connect().await?;
        let loaded = manager.load(unit).await.map_err(|error| error.to_string())?;
        loaded.activity().await.map_err(|error| error.to_string())
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let _ = self.manager.kill();
        let _ = self.manager.wait();
        for group in &self.groups {
            remove(group);
        }
    }
}

fn groups() -> Vec<PathBuf> {
    let name =
        format!("cnsmo-test-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
    let usable = HIERARCHIES.iter().map(Path::new);
    let usable = usable.filter(|root| root.join("cgroup.procs").exists());
    let groups: Vec<_> = usable.map(|root| root.join(&name)).collect();
    for group in &groups {
        fs::create_dir(group).unwrap();
    }
    groups
}

/// With all that is in it.
#[expect(clippy::disallowed_methods, reason = "in a destructor, where nothing can be awaited")]
fn remove(group: &Path) {
    let end = Instant::now() + PATIENCE;
    // What is killed takes its time.
    loop {
        let _ = fs::write(group.join("cgroup.kill"), "1");
        let folders = fs::read_dir(group).into_iter().flatten().flatten();
        for folder in folders.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            remove(&folder.path());
        }
        match fs::remove_dir(group) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(()) | Err(_) => return,
        }
    }
}
