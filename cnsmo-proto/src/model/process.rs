use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{
    Invalid, Name,
    deployment::{Port, port_variable, time, times},
    error::shorten,
};
use crate::pb::deployment as pb;

/// Program and arguments.
pub const COMMAND_MAX: usize = 256;
/// Bytes of all arguments, or of the whole environment: a program can be started with about 128 KiB of both on any Linux.
pub const TEXT_BYTES_MAX: usize = 48 << 10;
/// Variables that a process is given.
pub const VARIABLES_MAX: usize = 256;
/// The last of Linux' signals (signal(7)).
const SIGNAL_MAX: u32 = 64;
const SIGTERM: u8 = 15;
const START_TIMEOUT: Duration = Duration::from_secs(60);
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// For a unit to start, and for it to end: systemd's own limit for those that set none (systemd-system.conf(5)).
pub const UNIT_TIMEOUT: Duration = Duration::from_secs(90);
const HOUR: Duration = Duration::from_secs(3_600);
/// Less than this no program starts with.
const MEMORY_MIN: u64 = 1 << 20;
/// The only type of units that is run.
const SERVICE: &str = ".service";

/// What runs an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Driver {
    /// A child of the VM's agent.
    Process(Process),
    /// A unit of the VM's systemd that is there.
    Unit(Unit),
    /// A transient unit of the VM's systemd.
    Transient(Process),
}

/// A program, and how it is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Program, by its absolute path, and arguments.
    pub command: Vec<String>,
    /// Variables.
    pub environment: BTreeMap<String, String>,
    /// Name or number; `None`: the agent's.
    pub user: Option<String>,
    /// Name or number; `None`: the user's.
    pub group: Option<String>,
    /// `None`: a folder of the instance's own.
    pub directory: Option<String>,
    /// Of the group of processes.
    pub limits: Limits,
    /// `None`: it is ready as soon as it runs.
    pub readiness: Option<Probe>,
    /// For the way to ready.
    pub start_timeout: Duration,
    /// By number.
    pub stop_signal: u8,
    /// From the signal to SIGKILL.
    pub stop_timeout: Duration,
}

/// 0: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    pub memory: u64,
    /// Thousandths of a CPU.
    pub cpu_millis: u32,
    /// Processes and threads.
    pub processes: u32,
}

/// A unit that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// With its type, as `nginx.service`, or a template's, as `shop@.service`.
    pub name: String,
    /// `None`: it is ready when systemd says active.
    pub readiness: Option<Probe>,
}

/// How it is found out that an instance is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// What is asked.
    pub check: Check,
    /// From one to the next.
    pub interval: Duration,
    /// For one.
    pub timeout: Duration,
    /// Failures in a row.
    pub fall: u8,
}

/// What a probe asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    /// A connection is accepted: name of a port, or its number.
    Tcp(String),
    /// A GET is answered with 200 to 399.
    Http {
        /// Name of a port, or its number.
        port: String,
        /// From the slash on.
        path: String,
    },
    /// This ends with 0.
    Exec(Vec<String>),
    /// It announces itself by sd_notify(3).
    Announced,
}

impl Driver {
    /// How an instance is made, unless it is a unit that is there.
    pub fn process(&self) -> Option<&Process> {
        match self {
            Self::Process(process) | Self::Transient(process) => Some(process),
            Self::Unit(_) => None,
        }
    }

    /// How it is found out that an instance is ready.
    pub fn readiness(&self) -> Option<&Probe> {
        match self {
            Self::Process(process) | Self::Transient(process) => process.readiness.as_ref(),
            Self::Unit(unit) => unit.readiness.as_ref(),
        }
    }

    /// For the way to ready.
    pub fn start_timeout(&self) -> Duration {
        self.process().map_or(UNIT_TIMEOUT, |process| process.start_timeout)
    }

    /// For an instance that was asked to end; then it is killed.
    pub fn stop_timeout(&self) -> Duration {
        self.process().map_or(UNIT_TIMEOUT, |process| process.stop_timeout)
    }

    /// Checks what runs an instance with these ports.
    pub(super) fn new(
        wire: Option<pb::deployment_spec::Driver>,
        ports: &[Port],
    ) -> Result<Self, Invalid> {
        use pb::{deployment_spec::Driver as Wire, systemd::Unit as WireUnit};
        match wire {
            Some(Wire::Process(process)) => {
                Process::new(process, ports).map(Self::Process).map_err(|e| e.at("process"))
            }
            Some(Wire::Systemd(systemd)) => match systemd.unit {
                Some(WireUnit::Name(name)) => {
                    let readiness = systemd.readiness.map(|probe| Probe::new(probe, ports));
                    let readiness = readiness.transpose().map_err(|e| e.at("readiness"));
                    unit_name(&name)
                        .map_err(|e| e.at("unit"))
                        .and_then(|()| Ok(Self::Unit(Unit { name, readiness: readiness? })))
                }
                Some(WireUnit::Process(_)) if systemd.readiness.is_some() => {
                    Err(Invalid::new("belongs into the process").at("readiness"))
                }
                Some(WireUnit::Process(process)) => {
                    Process::new(*process, ports).map(Self::Transient).map_err(|e| e.at("process"))
                }
                None => Err(Invalid::new("missing: a unit's name, or a process").at("unit")),
            }
            .map_err(|e| e.at("systemd")),
            None => Err(Invalid::new("missing: say what runs, by `process` or `systemd`")),
        }
    }
}

impl Unit {
    /// The full name of the instance's unit: a template has one for each.
    pub fn of(&self, instance: &Name) -> String {
        match self.name.strip_suffix(SERVICE) {
            Some(prefix) if Self::is_template(&self.name) => format!("{prefix}{instance}{SERVICE}"),
            _ => self.name.clone(),
        }
    }

    /// Whether this is the name of a template.
    pub fn is_template(name: &str) -> bool {
        name.strip_suffix(SERVICE).is_some_and(|prefix| prefix.ends_with('@'))
    }
}

fn unit_name(name: &str) -> Result<(), Invalid> {
    let is_text = |b: u8| b.is_ascii_alphanumeric() || b":-_.\\@".contains(&b);
    let fits = name.len() <= 255 && name.bytes().all(is_text) && name.ends_with(SERVICE);
    fits.then_some(()).ok_or_else(|| {
        let name = shorten(name);
        Invalid::new(format!("`{name}` is not the name of a unit, such as nginx.service"))
    })
}

impl Process {
    fn new(wire: pb::Process, ports: &[Port]) -> Result<Self, Invalid> {
        let directory = some(wire.directory);
        if let Some(directory) = &directory {
            absolute(directory).map_err(|e| e.at("directory"))?;
        }
        let (user, group) = (some(wire.user), some(wire.group));
        for (field, name) in [("user", &user), ("group", &group)] {
            name.as_deref().map_or(Ok(()), account).map_err(|e| e.at(field))?;
        }
        if user.as_deref().is_some_and(|user| user.parse::<u32>().is_ok()) && group.is_none() {
            return Err(
                Invalid::new("missing: a user's number says nothing of its group").at("group")
            );
        }
        let stop_signal = match wire.stop_signal {
            0 => SIGTERM,
            n @ 1..=SIGNAL_MAX => n as u8,
            n => {
                return Err(Invalid::new(format!("{n} is not a signal: 1 to {SIGNAL_MAX}"))
                    .at("stopSignal"));
            }
        };
        let start = Duration::from_millis(100)..=HOUR;
        let stop = Duration::ZERO..=Duration::from_secs(600);
        let readiness = wire.readiness.map(|probe| Probe::new(probe, ports)).transpose();
        Ok(Self {
            command: command(wire.command, ports).map_err(|e| e.at("command"))?,
            environment: environment(wire.environment, ports).map_err(|e| e.at("environment"))?,
            user,
            group,
            directory,
            limits: limits(wire.limits.unwrap_or_default()).map_err(|e| e.at("limits"))?,
            readiness: readiness.map_err(|e| e.at("readiness"))?,
            start_timeout: time(wire.start_timeout, START_TIMEOUT, start)
                .map_err(|e| e.at("startTimeout"))?,
            stop_signal,
            stop_timeout: time(wire.stop_timeout, STOP_TIMEOUT, stop)
                .map_err(|e| e.at("stopTimeout"))?,
        })
    }
}

fn some(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

fn absolute(path: &str) -> Result<(), Invalid> {
    let is_plain = path.starts_with('/') && !path.contains('\0') && path.len() < 4_096;
    is_plain
        .then_some(())
        .ok_or_else(|| Invalid::new(format!("`{}` is not an absolute path", shorten(path))))
}

fn account(name: &str) -> Result<(), Invalid> {
    let is_text = |b: u8| b.is_ascii_alphanumeric() || b"-_.$".contains(&b);
    let fits = name.len() <= 64 && name.bytes().all(is_text) && !name.starts_with('-');
    fits.then_some(())
        .ok_or_else(|| Invalid::new(format!("`{}` is not a name or number", shorten(name))))
}

fn command(command: Vec<String>, ports: &[Port]) -> Result<Vec<String>, Invalid> {
    let Some(program) = command.first() else {
        return Err(Invalid::new("missing: the program"));
    };
    absolute(program).map_err(|e| e.at_index(0))?;
    if command.len() > COMMAND_MAX {
        let n = command.len();
        return Err(Invalid::new(format!("{n} arguments; at most {COMMAND_MAX} are allowed")));
    }
    size(command.iter().map(String::len).sum())?;
    for (n, argument) in command.iter().enumerate() {
        text(argument, ports).map_err(|e| e.at_index(n))?;
    }
    Ok(command)
}

fn environment(
    variables: BTreeMap<String, String>,
    ports: &[Port],
) -> Result<BTreeMap<String, String>, Invalid> {
    let n = variables.len();
    if n > VARIABLES_MAX {
        return Err(Invalid::new(format!("{n} variables; at most {VARIABLES_MAX} are allowed")));
    }
    size(variables.iter().map(|(key, value)| key.len() + value.len()).sum())?;
    for (key, value) in &variables {
        let is_text = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        let starts = key.bytes().next().is_some_and(|b| !b.is_ascii_digit());
        if !starts || !key.bytes().all(is_text) {
            let why = format!("`{}` is not the name of a variable", shorten(key));
            return Err(Invalid::new(why));
        }
        text(value, ports).map_err(|e| e.at(key))?;
    }
    Ok(variables)
}

fn size(bytes: usize) -> Result<(), Invalid> {
    let fits = bytes <= TEXT_BYTES_MAX;
    fits.then_some(())
        .ok_or_else(|| Invalid::new(format!("{bytes} bytes; at most {TEXT_BYTES_MAX} are allowed")))
}

/// Each `${NAME}` in it must be a variable of the instance.
fn text(text: &str, ports: &[Port]) -> Result<(), Invalid> {
    if text.contains('\0') {
        return Err(Invalid::new("has a NUL byte in it"));
    }
    let known: BTreeSet<String> = ["INSTANCE", "DEPLOYMENT", "NODE"]
        .map(ToOwned::to_owned)
        .into_iter()
        .chain(ports.iter().map(|port| port_variable(&port.name)))
        .collect();
    for rest in text.split("${").skip(1) {
        let name = rest.split_once('}').map(|(name, _)| name).unwrap_or(rest);
        if !known.contains(name) {
            let known = known.into_iter().collect::<Vec<_>>().join(", ");
            let why = format!("`${{{}}}` is not known; there are: {known}", shorten(name));
            return Err(Invalid::new(why));
        }
    }
    Ok(())
}

fn limits(wire: pb::Limits) -> Result<Limits, Invalid> {
    let pb::Limits { memory_bytes: memory, cpu_millis, processes } = wire;
    if (1..MEMORY_MIN).contains(&memory) {
        let why = format!("{memory} bytes; at least {MEMORY_MIN} are needed");
        return Err(Invalid::new(why).at("memory"));
    }
    if (1..10).contains(&cpu_millis) {
        return Err(Invalid::new("at least 10 thousandths of a CPU are needed").at("cpuMillis"));
    }
    Ok(Limits { memory, cpu_millis, processes })
}

impl Probe {
    fn new(wire: pb::Probe, ports: &[Port]) -> Result<Self, Invalid> {
        use pb::probe::Probe as Wire;
        let check = match wire.probe {
            Some(Wire::TcpPort(port)) => {
                known_port(&port, ports).map_err(|e| e.at("tcp"))?;
                Check::Tcp(port)
            }
            Some(Wire::Http(http)) => {
                known_port(&http.port, ports).map_err(|e| e.at("port").at("http"))?;
                let path = some(http.path).unwrap_or_else(|| "/".into());
                // Of a request line (RFC 9112, section 3).
                if !path.starts_with('/') || !path.bytes().all(|b| b.is_ascii_graphic()) {
                    let why = format!("`{}` is not a path", shorten(&path));
                    return Err(Invalid::new(why).at("path").at("http"));
                }
                Check::Http { port: http.port, path }
            }
            Some(Wire::Exec(exec)) => {
                Check::Exec(command(exec.command, ports).map_err(|e| e.at("exec"))?)
            }
            Some(Wire::Announced(true)) => Check::Announced,
            Some(Wire::Announced(false)) | None => {
                return Err(Invalid::new("missing: one of tcp, http, exec and announced"));
            }
        };
        let minute = Duration::from_secs(60);
        let (interval, timeout) =
            (Duration::from_millis(100)..=minute, Duration::from_millis(50)..=minute);
        Ok(Self {
            check,
            interval: time(wire.interval, PROBE_INTERVAL, interval)
                .map_err(|e| e.at("interval"))?,
            timeout: time(wire.timeout, PROBE_INTERVAL, timeout).map_err(|e| e.at("timeout"))?,
            fall: times(wire.fall, 3, 10).map_err(|e| e.at("fall"))?,
        })
    }
}

fn known_port(text: &str, ports: &[Port]) -> Result<(), Invalid> {
    let is_number = text.parse::<u16>().is_ok_and(|port| port != 0);
    if is_number || ports.iter().any(|port| port.name.as_str() == text) {
        return Ok(());
    }
    let why = format!("`{}` is neither a port of the deployment nor a number", shorten(text));
    Err(Invalid::new(why))
}

impl From<&Driver> for pb::deployment_spec::Driver {
    fn from(driver: &Driver) -> Self {
        use pb::systemd::Unit as Wire;
        let systemd = |unit, readiness: Option<&Probe>| {
            Self::Systemd(pb::Systemd { unit: Some(unit), readiness: readiness.map(Into::into) })
        };
        match driver {
            Driver::Process(process) => Self::Process(process.into()),
            Driver::Unit(unit) => systemd(Wire::Name(unit.name.clone()), unit.readiness.as_ref()),
            Driver::Transient(process) => systemd(Wire::Process(Box::new(process.into())), None),
        }
    }
}

impl From<&Process> for pb::Process {
    fn from(process: &Process) -> Self {
        let Limits { memory, cpu_millis, processes } = process.limits;
        let limits = pb::Limits { memory_bytes: memory, cpu_millis, processes };
        Self {
            command: process.command.clone(),
            environment: process.environment.clone(),
            user: process.user.clone().unwrap_or_default(),
            group: process.group.clone().unwrap_or_default(),
            directory: process.directory.clone().unwrap_or_default(),
            limits: (process.limits != Limits::default()).then_some(limits),
            readiness: process.readiness.as_ref().map(Into::into),
            start_timeout: process.start_timeout.try_into().ok(),
            stop_signal: process.stop_signal.into(),
            stop_timeout: process.stop_timeout.try_into().ok(),
        }
    }
}

impl From<&Probe> for pb::Probe {
    fn from(probe: &Probe) -> Self {
        use pb::probe::Probe as Wire;
        let check = match &probe.check {
            Check::Tcp(port) => Wire::TcpPort(port.clone()),
            Check::Http { port, path } => {
                Wire::Http(pb::HttpProbe { port: port.clone(), path: path.clone() })
            }
            Check::Exec(command) => Wire::Exec(pb::ExecProbe { command: command.clone() }),
            Check::Announced => Wire::Announced(true),
        };
        Self {
            probe: Some(check),
            interval: probe.interval.try_into().ok(),
            timeout: probe.timeout.try_into().ok(),
            fall: probe.fall.into(),
        }
    }
}

/// A process as it may be written, for tests of other modules.
#[cfg(test)]
pub(super) fn sleep() -> pb::Process {
    pb::Process { command: vec!["/bin/sleep".into(), "1000".into()], ..pb::Process::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(name: &str) -> Port {
        Port { name: Name::new(name).unwrap(), protocol: 6, port: 0 }
    }

    fn refused(change: impl FnOnce(&mut pb::Process)) -> String {
        let mut process = sleep();
        change(&mut process);
        Process::new(process, &[port("http")]).unwrap_err().to_string()
    }

    #[test]
    fn a_process_that_cannot_be_run_is_refused_by_field() {
        let set = |command: &[&str]| command.iter().map(ToString::to_string).collect::<Vec<_>>();
        let cases = [
            (refused(|p| p.command.clear()), "command: missing"),
            (refused(|p| p.command = set(&["sleep"])), "command[0]: `sleep` is not an absolute"),
            (
                refused(|p| p.command.push("${POT}".into())),
                "command[2]: `${POT}` is not known; there are: DEPLOYMENT, INSTANCE, NODE, PORT_HTTP",
            ),
            (refused(|p| p.command.push("a\0".into())), "command[2]: has a NUL"),
            (
                refused(|p| drop(p.environment.insert("1A".into(), String::new()))),
                "environment: `1A` is not",
            ),
            (refused(|p| p.user = "a b".into()), "user: `a b` is not"),
            (refused(|p| p.user = "1000".into()), "group: missing"),
            (refused(|p| p.directory = "tmp".into()), "directory: `tmp` is not an absolute"),
            (refused(|p| p.stop_signal = 65), "stopSignal: 65 is not"),
            (
                refused(|p| p.limits = Some(pb::Limits { memory_bytes: 9, ..Default::default() })),
                "limits.memory: 9 bytes",
            ),
            (refused(|p| p.readiness = Some(pb::Probe::default())), "readiness: missing: one of"),
            (
                refused(|p| {
                    let probe = Some(pb::probe::Probe::TcpPort("htp".into()));
                    p.readiness = Some(pb::Probe { probe, ..Default::default() });
                }),
                "readiness.tcp: `htp` is neither",
            ),
        ];
        for (error, expected) in cases {
            assert!(error.starts_with(expected), "{error}: {expected}");
        }
    }

    #[test]
    fn a_template_has_a_unit_for_each_instance() {
        let unit = |name: &str| Unit { name: name.into(), readiness: None };
        let instance = Name::new("shop-1").unwrap();
        assert_eq!(unit("shop@.service").of(&instance), "shop@shop-1.service");
        assert_eq!(unit("shop@a.service").of(&instance), "shop@a.service");
        assert_eq!(unit("nginx.service").of(&instance), "nginx.service");
    }

    #[test]
    fn variables_of_the_instance_may_be_used() {
        let mut process = sleep();
        process.command.push("--listen=[::]:${PORT_HTTP}/${INSTANCE}".into());
        assert!(Process::new(process, &[port("http")]).is_ok());
    }
}
