//! The VM's systemd, by D-Bus (org.freedesktop.systemd1(5)).

use std::{path::PathBuf, time::Duration};

use zbus::{
    Connection,
    connection::Builder,
    fdo::PropertiesProxy,
    zvariant::{OwnedObjectPath, OwnedValue, Value},
};

use super::launch::Launch;

/// Of one call. systemd answers at once, also where the work goes on.
const CALL: Duration = Duration::from_secs(25);
/// Signals that wait to be looked at: those of all jobs of the VM arrive, at boot hundreds at a time.
const SIGNALS_MAX: usize = 1024;
/// systemd-journald.service(8).
const JOURNALS: [&str; 2] = ["/var/log/journal", "/run/log/journal"];
const DESTINATION: &str = "org.freedesktop.systemd1";
const UNIT: &str = "org.freedesktop.systemd1.Unit";
const SERVICE: &str = "org.freedesktop.systemd1.Service";
/// Of a new job: it takes the place of one that contradicts it.
const REPLACE: &str = "replace";
const SIGKILL: i32 = 9;

#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1",
    gen_blocking = false
)]
pub(super) trait Manager {
    fn subscribe(&self) -> zbus::Result<()>;
    fn load_unit(&self, name: &str) -> zbus::Result<OwnedObjectPath>;
    fn ref_unit(&self, name: &str) -> zbus::Result<()>;
    fn start_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn stop_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn kill_unit(&self, name: &str, whom: &str, signal: i32) -> zbus::Result<()>;
    fn reset_failed_unit(&self, name: &str) -> zbus::Result<()>;
    fn start_transient_unit(
        &self,
        name: &str,
        mode: &str,
        properties: &[(&str, Value<'_>)],
        others: &[(&str, Vec<(&str, Value<'_>)>)],
    ) -> zbus::Result<OwnedObjectPath>;

    #[zbus(signal)]
    fn job_removed(&self, id: u32, job: OwnedObjectPath, unit: &str, result: &str);
}

/// How the systemd of this VM is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Systemd {
    /// Address of a D-Bus; `None`: the system bus.
    pub bus: Option<String>,
    /// The program that reads the journal.
    pub journalctl: PathBuf,
    /// Folders of journals. There is none without one of them.
    pub journals: Vec<PathBuf>,
}

impl Systemd {
    /// By this address of a D-Bus; `None`: the system bus.
    pub fn new(bus: Option<String>) -> Self {
        let journals = JOURNALS.map(PathBuf::from).to_vec();
        Self { bus, journalctl: "journalctl".into(), journals }
    }

    /// Opens a connection of its own, which what it holds ends with.
    ///
    /// # Errors
    /// There is no bus, for people.
    pub(super) async fn connect(&self) -> Result<Manager, String> {
        let what = match &self.bus {
            Some(address) => format!("the bus {address}"),
            None => "the system bus".to_owned(),
        };
        let open = async {
            let builder = match &self.bus {
                Some(address) => Builder::address(address.as_str())?,
                None => Builder::system()?,
            };
            let connection = builder.method_timeout(CALL).max_queued(SIGNALS_MAX).build().await?;
            let proxy = ManagerProxy::new(&connection).await?;
            Ok::<_, zbus::Error>(Manager { connection, proxy })
        };
        match tokio::time::timeout(CALL, open).await {
            Ok(opened) => opened.map_err(|error| format!("{what} cannot be used: {error}")),
            Err(_) => Err(format!("{what} does not answer within {CALL:?}")),
        }
    }
}

/// A connection to systemd's manager.
#[derive(Debug)]
pub(super) struct Manager {
    connection: Connection,
    proxy: ManagerProxy<'static>,
}

impl Manager {
    /// From now on signals are sent to this connection.
    pub(super) async fn subscribe(&self) -> zbus::Result<()> {
        self.proxy.subscribe().await
    }

    /// Jobs that are over, those of all units.
    pub(super) async fn jobs(&self) -> zbus::Result<JobRemovedStream> {
        self.proxy.receive_job_removed().await
    }

    /// The unit, which may not be there.
    pub(super) async fn load(&self, name: &str) -> zbus::Result<Loaded> {
        let path = self.proxy.load_unit(name).await?;
        let proxy = PropertiesProxy::builder(&self.connection)
            .destination(DESTINATION)?
            .path(path)?
            .build()
            .await?;
        Ok(Loaded { proxy })
    }

    /// While this connection is there the unit is not forgotten, so that its end can be read.
    pub(super) async fn hold(&self, name: &str) -> zbus::Result<()> {
        self.proxy.ref_unit(name).await
    }

    /// The job that starts it. That it failed before, or too often, is forgotten.
    pub(super) async fn start(&self, name: &str) -> zbus::Result<OwnedObjectPath> {
        if let Err(error) = self.proxy.reset_failed_unit(name).await {
            tracing::debug!(unit = name, %error, "nothing to be forgotten");
        }
        self.proxy.start_unit(name, REPLACE).await
    }

    /// The job that starts a unit that is made for this.
    pub(super) async fn start_transient(
        &self,
        name: &str,
        transient: &Transient,
    ) -> zbus::Result<OwnedObjectPath> {
        self.proxy.start_transient_unit(name, REPLACE, &transient.properties(), &[]).await
    }

    pub(super) async fn stop(&self, name: &str) -> zbus::Result<()> {
        self.proxy.stop_unit(name, REPLACE).await.map(drop)
    }

    /// All of its processes.
    pub(super) async fn kill(&self, name: &str) -> zbus::Result<()> {
        self.proxy.kill_unit(name, "all", SIGKILL).await
    }
}

/// A unit as systemd knows it.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) proxy: PropertiesProxy<'static>,
}

/// Where a unit is in its life.
#[derive(Clone, Debug)]
pub(super) struct Activity {
    /// Such as active, activating, failed.
    pub(super) active: String,
    /// What that is for its type, such as running, auto-restart.
    pub(super) sub: String,
    /// Of this life of it; empty: none.
    pub(super) invocation: Vec<u8>,
    /// 0: none.
    pub(super) pid: u32,
}

impl Loaded {
    async fn property<T>(&self, interface: &'static str, name: &str) -> zbus::Result<T>
    where
        T: TryFrom<OwnedValue>,
        T::Error: Into<zbus::Error>,
    {
        let interface = zbus::names::InterfaceName::from_static_str_unchecked(interface);
        let value = self.proxy.get(interface, name).await?;
        T::try_from(value).map_err(Into::into)
    }

    pub(super) async fn activity(&self) -> zbus::Result<Activity> {
        Ok(Activity {
            active: self.property(UNIT, "ActiveState").await?,
            sub: self.property(UNIT, "SubState").await?,
            invocation: self.property(UNIT, "InvocationID").await?,
            pid: self.property(SERVICE, "MainPID").await?,
        })
    }

    /// loaded, or why it cannot be run, such as not-found or masked.
    pub(super) async fn load_state(&self) -> zbus::Result<String> {
        self.property(UNIT, "LoadState").await
    }

    /// Such as simple, notify.
    pub(super) async fn kind(&self) -> zbus::Result<String> {
        self.property(SERVICE, "Type").await
    }

    /// How it ended, for people.
    pub(super) async fn end(&self, activity: &Activity) -> zbus::Result<String> {
        let result: String = self.property(SERVICE, "Result").await?;
        let code: i32 = self.property(SERVICE, "ExecMainCode").await?;
        let status: i32 = self.property(SERVICE, "ExecMainStatus").await?;
        let how = match code {
            libc::CLD_EXITED => format!(", exit code {status}"),
            libc::CLD_KILLED | libc::CLD_DUMPED => format!(", signal {status}"),
            _ => String::new(),
        };
        let Activity { active, sub, .. } = activity;
        Ok(format!("{active} ({sub}), Result={result}{how}"))
    }
}

/// A unit that is made for one instance.
#[derive(Clone, Debug)]
pub(super) struct Transient {
    pub(super) description: String,
    pub(super) launch: Launch,
    /// An absolute path.
    pub(super) directory: String,
    /// It announces itself by sd_notify(3).
    pub(super) is_announced: bool,
    pub(super) start_timeout: Duration,
    pub(super) stop_signal: u8,
    pub(super) stop_timeout: Duration,
}

impl Transient {
    /// See systemd.service(5), systemd.exec(5), systemd.resource-control(5).
    fn properties(&self) -> Vec<(&'static str, Value<'_>)> {
        let Self { launch, .. } = self;
        let program = launch.command.first().map(String::as_str).unwrap_or_default();
        // Dollars in arguments are the program's own.
        let start = (program, launch.command.clone(), vec!["no-env-expand"]);
        let environment = launch.environment.iter().map(|(key, value)| format!("{key}={value}"));
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let kind = if self.is_announced { "notify" } else { "exec" };
        let mut all = vec![
            ("Description", Value::from(self.description.as_str())),
            ("Type", kind.into()),
            ("NotifyAccess", if self.is_announced { "all" } else { "none" }.into()),
            ("ExecStartEx", vec![start].into()),
            ("Environment", environment.collect::<Vec<_>>().into()),
            ("WorkingDirectory", self.directory.as_str().into()),
            ("KillSignal", i32::from(self.stop_signal).into()),
            ("TimeoutStartUSec", micros(self.start_timeout).into()),
            ("TimeoutStopUSec", micros(self.stop_timeout).into()),
            // Gone with its end, once nobody holds it: its name is free again.
            ("CollectMode", "inactive-or-failed".into()),
            ("AddRef", true.into()),
        ];
        if let Some(user) = launch.user {
            all.push(("User", user.to_string().into()));
        }
        if let Some(group) = launch.group {
            all.push(("Group", group.to_string().into()));
        }
        if launch.user.is_some() || launch.group.is_some() {
            all.push(("NoNewPrivileges", true.into()));
        }
        let limits = launch.limits;
        for (name, value) in [
            ("MemoryMax", limits.memory),
            ("CPUQuotaPerSecUSec", u64::from(limits.cpu_millis) * 1000),
            ("TasksMax", limits.processes.into()),
        ] {
            if value != 0 {
                all.push((name, value.into()));
            }
        }
        all
    }
}
