//! What the agent is told at its start: arguments and environment, checked once.

use std::{
    fmt, fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use cnsmo_proto::model::{Labels, Name};
use cnsmo_service::{
    channel::CoreAddress,
    token::{Token, TokenError},
};

use crate::{node, parts::Part};

const FLOWS_MIN: u32 = 1_024;
/// 16 Mi flows take some GB of kernel memory.
const FLOWS_MAX: u32 = 16 << 20;
const POLICY_MEMORY_MIN: u32 = 64 << 10;
/// References in a compiled policy are 32-bit word numbers, and two halves and two families must fit in memory.
const POLICY_MEMORY_MAX: u32 = 1 << 30;
/// IFNAMSIZ without its zero.
const INTERFACE_BYTES_MAX: usize = 15;
/// Each is a rule of its own, before all others.
const FAILSAFE_PORTS_MAX: usize = 16;
/// A token has 110 bytes; more is another file.
const TOKEN_FILE_BYTES_MAX: u64 = 4_096;

/// Guards this VM: enforces the policies of the CNSMO core in the kernel.
#[derive(Debug, Parser)]
#[command(name = "cnsmo-agent", version, args_conflicts_with_subcommands = true)]
#[command(subcommand_negates_reqs = true)]
pub struct Cli {
    /// Something other than running the agent.
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    run: Option<RunArgs>,
}

/// What else the program does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Take the data path out of the kernel: from then on every packet passes
    Detach {
        /// Where the agent pinned its maps and links
        #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/cnsmo", env = "CNSMO_BPFFS")]
        bpffs: PathBuf,
    },
    /// Move the packets of the tunnel; started by the agent
    #[command(hide = true)]
    Tunnel {
        /// Of the agent
        #[arg(long, value_name = "DIR")]
        state_dir: PathBuf,
    },
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Where the core is; repeat it, or separate with commas, if several share a database
    #[arg(
        long = "core",
        value_name = "HOST:PORT",
        value_delimiter = ',',
        required = true,
        env = "CNSMO_CORE"
    )]
    cores: Vec<CoreAddress>,
    /// File with the join token, `-` for standard input; needed until this VM is enrolled
    #[arg(long, value_name = "FILE", env = "CNSMO_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// Identity and last policies of this VM
    #[arg(
        long,
        value_name = "DIR",
        default_value = "/var/lib/cnsmo/agent",
        env = "CNSMO_STATE_DIR"
    )]
    state_dir: PathBuf,
    /// Name of this VM [default: its host name]
    #[arg(long, value_name = "NAME", env = "CNSMO_NODE")]
    node: Option<Name>,
    /// Label of this VM; repeat it, or separate with commas
    #[arg(long = "label", value_name = "KEY=VALUE", value_delimiter = ',', env = "CNSMO_LABELS")]
    labels: Vec<String>,
    /// Network device to guard; repeatable [default: all that other machines' packets come in by]
    #[arg(
        long = "interface",
        value_name = "IFNAME",
        value_delimiter = ',',
        env = "CNSMO_INTERFACES"
    )]
    interfaces: Vec<String>,
    /// How packets are taken at ingress
    #[arg(long, value_enum, default_value_t = Xdp::Auto, env = "CNSMO_XDP")]
    xdp: Xdp,
    /// Where maps and links are pinned; on a BPF file system
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/cnsmo", env = "CNSMO_BPFFS")]
    bpffs: PathBuf,
    /// Entries of each flow table
    #[arg(long, value_name = "N", default_value_t = 65_536, env = "CNSMO_FLOWS")]
    flows: u32,
    /// Bytes for compiled policies, per half and address family
    #[arg(long, value_name = "BYTES", default_value_t = 1 << 20, env = "CNSMO_POLICY_MEMORY")]
    policy_memory: u32,
    /// Where the services of this VM can be steered, by root [default: agent.sock in the state folder]
    #[arg(long, value_name = "PATH", env = "CNSMO_AGENT_SOCKET")]
    socket: Option<PathBuf>,
    /// TCP port that no default closes, only a rule that names it, such as that of SSH; repeat it, or separate with commas;
    /// `none`: no port
    #[arg(
        long = "failsafe-port",
        value_name = "PORT",
        value_delimiter = ',',
        default_value = "22",
        env = "CNSMO_FAILSAFE_PORTS"
    )]
    failsafe_ports: Vec<FailsafePort>,
    /// Run these services alone; what others left on this VM is taken down
    #[arg(long, value_name = "SERVICE", value_delimiter = ',', env = "CNSMO_ONLY")]
    only: Vec<Part>,
    /// D-Bus of the systemd whose units are instances, such as unix:path=/run/user/0/bus [default: the system bus]
    #[arg(long, value_name = "ADDRESS", env = "CNSMO_SYSTEMD_BUS")]
    systemd_bus: Option<String>,
    /// How log lines look; the variable CNSMO_LOG sets what they tell, for example debug
    #[arg(long, value_enum, default_value_t = LogFormat::Text, env = "CNSMO_LOG_FORMAT")]
    log_format: LogFormat,
}

/// A port, or the word `none`.
#[derive(Clone, Copy, Debug)]
struct FailsafePort(Option<u16>);

impl std::str::FromStr for FailsafePort {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match (text, text.parse()) {
            ("none", _) => Ok(Self(None)),
            (_, Ok(port)) if port > 0 => Ok(Self(Some(port))),
            _ => Err("neither a port, 1 to 65535, nor `none`"),
        }
    }
}

/// Where XDP is used at ingress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Xdp {
    /// In the driver if it can, else behind it by tc
    Auto,
    /// In the driver, or not at all
    Native,
    /// In the kernel's generic hook
    Generic,
    /// Not at all: tc
    Off,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// One object per line
    Json,
}

/// Checked settings of a running agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where cores are, tried in this order; not empty.
    pub cores: Vec<CoreAddress>,
    /// Where the join token is read from, should it be needed.
    pub token: Option<TokenSource>,
    /// Identity and ledger.
    pub state_dir: PathBuf,
    /// Name asked for. `None`: the enrolled one, or the host name.
    pub node: Option<Name>,
    /// Labels of this VM.
    pub labels: Labels,
    /// Devices to guard; never empty.
    pub interfaces: Vec<String>,
    /// How packets are taken at ingress.
    pub xdp: Xdp,
    /// Where maps and links are pinned.
    pub bpffs: PathBuf,
    /// Entries of each flow table.
    pub flows: u32,
    /// Bytes for compiled policies, per half and address family.
    pub policy_memory: u32,
    /// Where the services of this VM can be steered.
    pub socket: PathBuf,
    /// TCP ports that stay open unless a rule names them.
    pub failsafe_ports: Vec<u16>,
    /// The services of this VM; not empty.
    pub parts: Vec<Part>,
    /// D-Bus of the systemd whose units are instances; `None`: the system bus.
    pub systemd_bus: Option<String>,
    /// How log lines look.
    pub log_format: LogFormat,
}

/// A file or standard input; the token itself is never an argument, which every user of the VM can read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenSource {
    /// Standard input.
    Stdin,
    /// A file.
    File(PathBuf),
}

/// A setting that cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{flag}: {reason}")]
pub struct InvalidSetting {
    flag: &'static str,
    reason: String,
}

/// The join token cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    /// Of the file system.
    #[error("--token-file: cannot read {file}")]
    Read {
        /// The file.
        file: TokenSource,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its content is not a token.
    #[error("--token-file: {0}")]
    Token(#[from] TokenError),
}

impl Cli {
    /// The settings of the agent; only when no [`Command`] was given.
    ///
    /// # Errors
    /// See [`InvalidSetting`].
    pub fn into_config(self) -> Result<Config, InvalidSetting> {
        let args = self.run.ok_or_else(|| invalid("--core", "missing"))?;
        let range = |flag, value: u32, min, max| {
            let fits = (min..=max).contains(&value);
            fits.then_some(value)
                .ok_or_else(|| invalid(flag, format!("{value} is not in {min} to {max}")))
        };
        let labels = args.labels.join(",").parse().map_err(|e| invalid("--label", e))?;
        let state_dir = absolute("--state-dir", &args.state_dir)?;
        let socket = match &args.socket {
            Some(path) => absolute("--socket", path)?,
            None => state_dir.join("agent.sock"),
        };
        let mut parts = args.only;
        parts.sort_unstable();
        parts.dedup();
        if parts.is_empty() {
            parts = Part::ALL.to_vec();
        }
        Ok(Config {
            cores: args.cores,
            token: args.token_file.map(TokenSource::from),
            state_dir,
            node: args.node,
            labels,
            interfaces: interfaces(args.interfaces)?,
            xdp: args.xdp,
            bpffs: absolute("--bpffs", &args.bpffs)?,
            flows: range("--flows", args.flows, FLOWS_MIN, FLOWS_MAX)?,
            policy_memory: range(
                "--policy-memory",
                args.policy_memory,
                POLICY_MEMORY_MIN,
                POLICY_MEMORY_MAX,
            )?,
            socket,
            failsafe_ports: failsafe_ports(&args.failsafe_ports)?,
            parts,
            systemd_bus: args.systemd_bus,
            log_format: args.log_format,
        })
    }
}

impl TokenSource {
    /// Reads the token; blanks around it are not part of it.
    ///
    /// # Errors
    /// See [`TokenFileError`].
    pub fn read(&self) -> Result<Token, TokenFileError> {
        let mut text = String::new();
        let read = match self {
            Self::Stdin => io::stdin().take(TOKEN_FILE_BYTES_MAX).read_to_string(&mut text),
            Self::File(path) => fs::File::open(path)
                .and_then(|file| file.take(TOKEN_FILE_BYTES_MAX).read_to_string(&mut text)),
        };
        read.map_err(|source| TokenFileError::Read { file: self.clone(), source })?;
        Ok(text.trim().parse()?)
    }
}

impl From<PathBuf> for TokenSource {
    fn from(path: PathBuf) -> Self {
        if path == Path::new("-") { Self::Stdin } else { Self::File(path) }
    }
}

impl fmt::Display for TokenSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdin => f.write_str("standard input"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

fn invalid(flag: &'static str, reason: impl fmt::Display) -> InvalidSetting {
    InvalidSetting { flag, reason: reason.to_string() }
}

/// The directory of the process may change or vanish; these must not.
fn absolute(flag: &'static str, path: &Path) -> Result<PathBuf, InvalidSetting> {
    std::path::absolute(path).map_err(|e| invalid(flag, e))
}

fn failsafe_ports(asked: &[FailsafePort]) -> Result<Vec<u16>, InvalidSetting> {
    const FLAG: &str = "--failsafe-port";
    let mut ports: Vec<_> = asked.iter().filter_map(|port| port.0).collect();
    if ports.len() < asked.len() && !ports.is_empty() {
        return Err(invalid(FLAG, "`none` stands alone"));
    }
    ports.sort_unstable();
    ports.dedup();
    if ports.len() > FAILSAFE_PORTS_MAX {
        let n = ports.len();
        return Err(invalid(FLAG, format!("{n} ports; at most {FAILSAFE_PORTS_MAX} are allowed")));
    }
    Ok(ports)
}

fn interfaces(mut asked: Vec<String>) -> Result<Vec<String>, InvalidSetting> {
    const FLAG: &str = "--interface";
    if asked.is_empty() {
        let found = node::outer_interfaces().map_err(|e| invalid(FLAG, e.desc()))?;
        if found.is_empty() {
            return Err(invalid(FLAG, "no device is up that could be guarded; name one"));
        }
        return Ok(found);
    }
    asked.sort_unstable();
    asked.dedup();
    for name in &asked {
        let fits = (1..=INTERFACE_BYTES_MAX).contains(&name.len());
        if !fits || nix::net::if_::if_nametoindex(name.as_str()).is_err() {
            return Err(invalid(FLAG, format!("no device is called `{name}`")));
        }
    }
    Ok(asked)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(args: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from([&["cnsmo-agent"], args].concat())
    }

    fn config(args: &[&str]) -> Result<Config, InvalidSetting> {
        let base = ["--core", "core:7400", "--interface", "lo"];
        parse(&[&base, args].concat()).unwrap().into_config()
    }

    #[test]
    fn the_definition_holds() {
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults_are_those_of_the_manual() {
        let config = config(&[]).unwrap();
        assert_eq!(config.state_dir, Path::new("/var/lib/cnsmo/agent"));
        assert_eq!(config.bpffs, Path::new("/sys/fs/bpf/cnsmo"));
        assert_eq!((config.flows, config.policy_memory), (65_536, 1 << 20));
        assert_eq!((config.xdp, config.log_format), (Xdp::Auto, LogFormat::Text));
        assert_eq!((config.token, config.node), (None, None));
        assert_eq!(config.socket, Path::new("/var/lib/cnsmo/agent/agent.sock"));
        assert_eq!(config.parts, Part::ALL);
        assert_eq!(config.failsafe_ports, [22]);
    }

    #[test]
    fn failsafe_ports_repeat_or_are_none() {
        let ports = |args: &[&str]| config(args).map(|config| config.failsafe_ports);
        let asked = ["--failsafe-port", "2222,22", "--failsafe-port", "22"];
        assert_eq!(ports(&asked).unwrap(), [22, 2222]);
        assert_eq!(ports(&["--failsafe-port", "none"]).unwrap(), [0_u16; 0]);
        let error = ports(&["--failsafe-port", "none,22"]).unwrap_err().to_string();
        assert!(error.starts_with("--failsafe-port: "), "{error}");
    }

    #[test]
    fn services_are_run_alone_if_asked_for() {
        let config = config(&["--only", "loadbalancer,vpn", "--only", "vpn"]).unwrap();
        assert_eq!(config.parts, [Part::Vpn, Part::LoadBalancer]);
        let error = parse(&["--core", "a:1", "--only", "dns"]).unwrap_err().to_string();
        assert!(error.contains("[possible values: vpn, firewall, loadbalancer]"), "{error}");
    }

    #[test]
    fn labels_repeat_and_separate() {
        let config = config(&["--label", "a=1,b=2", "--label", "c=3"]).unwrap();
        assert_eq!(config.labels.to_string(), "a=1,b=2,c=3");
    }

    #[test]
    fn cores_repeat_and_separate_and_keep_their_order() {
        let config = config(&["--core", "b:1,[fd00::1]:2", "--core", "a:3"]).unwrap();
        let cores: Vec<_> = config.cores.iter().map(CoreAddress::to_string).collect();
        assert_eq!(cores, ["core:7400", "b:1", "[fd00::1]:2", "a:3"]);
    }

    #[test]
    fn a_bad_value_is_refused_with_the_flag() {
        for (args, flag) in [
            (["--label", "role"], "--label"),
            (["--label", "a=1,a=2"], "--label"),
            (["--interface", "no-such-device"], "--interface"),
            (["--flows", "7"], "--flows"),
            (["--policy-memory", "4294967295"], "--policy-memory"),
        ] {
            let error = config(&args).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{flag}: ")), "{error}");
        }
        for (args, flag) in [
            (["--core", "core"], "--core"),
            (["--node", "Web_1"], "--node"),
            (["--xdp", "fast"], "--xdp"),
            (["--failsafe-port", "0"], "--failsafe-port"),
            (["--failsafe-port", "ssh"], "--failsafe-port"),
        ] {
            let error = parse(&args).unwrap_err().to_string();
            assert!(error.contains(flag), "{error}");
        }
    }

    #[test]
    fn the_core_is_required_to_run_but_not_to_detach() {
        assert!(parse(&[]).unwrap_err().to_string().contains("--core"));
        assert!(parse(&["--flows", "2048"]).is_err());
        let Some(Command::Detach { bpffs }) = parse(&["detach"]).unwrap().command else {
            panic!("not detach")
        };
        assert_eq!(bpffs, Path::new("/sys/fs/bpf/cnsmo"));
        assert!(parse(&["--core", "core:1", "detach"]).is_err());
    }

    #[test]
    fn a_token_file_that_is_none_is_refused_without_quoting_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        fs::write(&path, "cnsmo1.secret").unwrap();
        let error = TokenSource::from(path).read().unwrap_err();
        assert!(!error.to_string().contains("secret"), "{error}");
        assert_eq!(TokenSource::from(PathBuf::from("-")), TokenSource::Stdin);
        let missing = TokenSource::from(dir.path().join("missing")).read();
        assert!(matches!(missing, Err(TokenFileError::Read { .. })));
    }
}
