use std::{path::PathBuf, time::Duration};

use clap::{ArgGroup, Parser, Subcommand, ValueEnum};
use cnsmo_proto::{
    model::{Labels, Name},
    pb::resource::Kind,
};
use cnsmo_service::channel::CoreAddress;

use crate::{
    audit::AuditArgs,
    bus::BusCommand,
    explain::End,
    identity::{IdentityCommand, LoginArgs, RoleArg},
    import::ImportCommand,
};

/// Steers a set of VMs through the core on this machine.
#[derive(Parser)]
#[command(name = "cnsmo", version, propagate_version = true)]
pub(crate) struct Args {
    /// Socket of the core
    #[arg(
        long,
        global = true,
        env = "CNSMO_SOCKET",
        default_value = "/run/cnsmo/core.sock",
        value_name = "PATH"
    )]
    pub(crate) socket: PathBuf,
    /// A core on another machine, over TLS, instead of the socket
    #[arg(long, global = true, env = "CNSMO_CORE", value_name = "HOST:PORT")]
    pub(crate) core: Option<CoreAddress>,
    /// For --core: folder of key and certificate [default: ~/.config/cnsmo]
    #[arg(long = "identity", global = true, env = "CNSMO_IDENTITY", value_name = "DIR")]
    pub(crate) identity_dir: Option<PathBuf>,
    /// Form of the output
    #[arg(short = 'o', long = "format", global = true, default_value = "table")]
    pub(crate) format: Format,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
    Yaml,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Create or update the resources of files, all of them or none
    Apply(ApplyArgs),
    /// Print a policy made of the rules of another firewall; exit code 4 if rules were left out
    #[command(subcommand)]
    Import(ImportCommand),
    /// Show what apply would change
    Diff(FileArgs),
    /// List resources, or print one
    Get(GetArgs),
    /// Everything about one resource
    Describe { kind: KindArg, name: Name },
    /// Delete a resource, or those that files name
    Delete(DeleteArgs),
    /// Print resources and then each change, until interrupted
    Watch { kind: KindArg, name: Option<Name> },
    /// What was changed, when and by whom; the latest first
    History {
        /// At most so many changes
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
        last: u32,
    },
    /// What happened, in order, with reasons
    Events(EventsArgs),
    /// Packets of one VM that were dropped, rejected, logged or let pass on trial, with the rule that decided
    Flows(FlowsArgs),
    /// What would happen to a packet, from hook to hook; exit code 4 if it would be dropped
    Explain(ExplainArgs),
    /// Make networks, policies and balancers what they were at a revision, as one new revision
    Rollback(RollbackArgs),
    /// Wait until VMs enforce a revision; exit code 3 if they do not in time
    Wait(WaitArgs),
    /// List the VMs
    Nodes {
        /// Labels that a VM must have
        #[arg(
            short = 'l',
            long,
            default_value = "",
            hide_default_value = true,
            value_name = "KEY=VALUE,..."
        )]
        selector: Labels,
    },
    /// List the instances of services: who runs what, where, and in which phase
    Services(ServicesArgs),
    /// List the agents, or with --host the service agents of one VM
    Agents {
        /// Of this VM: what its agent runs
        #[arg(long, visible_alias = "node", value_name = "NAME")]
        host: Option<Name>,
    },
    /// Steer one service of a VM or of the core; with --socket of an agent, of its own VM
    #[command(subcommand)]
    Service(ServiceCommand),
    /// Change how many instances a deployment has
    Scale(ScaleArgs),
    /// Run a program on a VM, as a deployment of one instance
    Spawn(SpawnArgs),
    /// What an instance of a deployment has written
    Logs(LogsArgs),
    /// Set or remove labels
    Label(LabelArgs),
    /// Let balancers give a VM no new flows; those it has go on to their end
    Drain(DrainArgs),
    /// Tokens with which VMs, services and operators join
    #[command(subcommand)]
    Token(TokenCommand),
    /// Get a certificate for --core with a token, so that the other commands work from this machine
    Login(LoginArgs),
    /// Who may do what, and the end of it
    #[command(subcommand)]
    Identity(IdentityCommand),
    /// What was done and refused
    Audit(AuditArgs),
    /// Keys of your own in the core's state
    #[command(subcommand)]
    Kv(KvCommand),
    /// Messages between services
    #[command(subcommand)]
    Bus(BusCommand),
    /// How the core is: store, leases, who is connected
    Status,
    /// Copy the core's whole state to a file; `cnsmo-core restore` puts it back
    Backup {
        /// Replaced if it is there
        file: PathBuf,
    },
    /// Print a completion script
    Completions { shell: clap_complete::Shell },
    /// Print the version
    Version,
}

#[derive(clap::Args)]
pub(crate) struct FileArgs {
    /// YAML or JSON, a folder of such files, or - for standard input; repeatable
    #[arg(short = 'f', long = "file", required = true, value_name = "FILE|DIR|-")]
    pub(crate) files: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) original: OriginalArgs,
}

#[derive(clap::Args)]
pub(crate) struct OriginalArgs {
    /// Rules in the original CNSMO's JSON: the policy that they become [default: the file's name]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<Name>,
    /// Rules in the original CNSMO's JSON: labels of the VMs that they are for [default: all]
    #[arg(long, default_value = "", hide_default_value = true, value_name = "KEY=VALUE,...")]
    pub(crate) target: Labels,
}

#[derive(clap::Args)]
pub(crate) struct ApplyArgs {
    #[command(flatten)]
    pub(crate) files: FileArgs,
    /// Validate and say what would change; commit nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// With --dry-run: which live flows the VMs would cut
    #[arg(long, requires = "dry_run")]
    pub(crate) against_flows: bool,
    /// Return when every VM enforces it and deployments are complete; exit code 3 if not in time
    #[arg(long, conflicts_with = "dry_run")]
    pub(crate) wait: bool,
    /// For --wait, at most 1h
    #[arg(long, default_value = "60s", value_parser = wait_time)]
    pub(crate) timeout: Duration,
}

#[derive(clap::Args)]
pub(crate) struct EventsArgs {
    /// The first revision [default: the last 1,000 revisions]
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "REVISION",
          value_parser = clap::value_parser!(i64).range(0..))]
    pub(crate) from: i64,
    /// Go on with what happens, until interrupted
    #[arg(long)]
    pub(crate) follow: bool,
    /// Only these kinds: deployment, firewall-policy, instance, load-balancer, network, node; repeatable
    #[arg(long = "kind", value_name = "KIND", value_delimiter = ',')]
    pub(crate) kinds: Vec<String>,
    /// Only about this VM, resource, service or instance
    #[arg(default_value = "", hide_default_value = true)]
    pub(crate) name: String,
}

#[derive(clap::Args)]
pub(crate) struct FlowsArgs {
    /// The VM
    #[arg(long, visible_alias = "host", value_name = "NAME")]
    pub(crate) node: Name,
    /// The last N records [default: all that are kept, 4,096]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=500))]
    pub(crate) tail: Option<u32>,
    /// Go on with what happens, until interrupted
    #[arg(long, short = 'f')]
    pub(crate) follow: bool,
    /// Only what was dropped
    #[arg(long)]
    pub(crate) dropped: bool,
    /// The flows that it knows now in place of records, the one with the latest packet first
    #[arg(long, conflicts_with_all = ["tail", "follow", "dropped"])]
    pub(crate) live: bool,
    /// For --live, at most that many
    #[arg(long, value_name = "N", default_value_t = 1_000, requires = "live",
          value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) max: u32,
}

#[derive(clap::Args)]
pub(crate) struct ExplainArgs {
    /// Where it comes from: a VM, or an address outside; with `:PORT` from that port
    #[arg(long, value_name = "NAME[:PORT]")]
    pub(crate) from: End,
    /// Where it goes: a VM, a load balancer or an address, such as vm2:443/tcp, front:80, 10.0.0.7:53/udp, [fd00::7]:22;
    /// without a port an ICMP echo request
    #[arg(long, value_name = "NAME[:PORT[/PROTOCOL]]")]
    pub(crate) to: End,
    /// The gateway by which a client outside reaches a load balancer
    #[arg(long, value_name = "NAME")]
    pub(crate) via: Option<Name>,
    /// Between the network cards, also where both VMs are in a network
    #[arg(long)]
    pub(crate) underlay: bool,
    /// By IPv6, where a name has addresses of both families
    #[arg(short = '6', long)]
    pub(crate) ipv6: bool,
}

#[derive(clap::Args)]
pub(crate) struct RollbackArgs {
    /// As `cnsmo history` shows
    #[arg(value_parser = clap::value_parser!(i64).range(1..))]
    pub(crate) revision: i64,
    /// Say what would change; commit nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Return when every VM enforces it and deployments are complete; exit code 3 if not in time
    #[arg(long, conflicts_with = "dry_run")]
    pub(crate) wait: bool,
    /// For --wait, at most 1h
    #[arg(long, default_value = "60s", value_parser = wait_time)]
    pub(crate) timeout: Duration,
}

#[derive(clap::Args)]
pub(crate) struct GetArgs {
    pub(crate) kind: KindArg,
    pub(crate) name: Option<Name>,
    /// Labels that a resource must have
    #[arg(
        short = 'l',
        long,
        default_value = "",
        hide_default_value = true,
        value_name = "KEY=VALUE,...",
        conflicts_with = "name"
    )]
    pub(crate) selector: Labels,
}

#[derive(clap::Args)]
#[command(group = ArgGroup::new("what").required(true).args(["kind", "files"]))]
pub(crate) struct DeleteArgs {
    #[arg(requires = "name", conflicts_with = "files")]
    pub(crate) kind: Option<KindArg>,
    pub(crate) name: Option<Name>,
    /// Delete the resources that these files name, VMs excepted
    #[arg(short = 'f', long = "file", value_name = "FILE|DIR|-")]
    pub(crate) files: Vec<PathBuf>,
    /// Wait until no instance of a deleted deployment is left
    #[arg(long)]
    pub(crate) wait: bool,
    /// At most 1h
    #[arg(long, default_value = "60s", requires = "wait", value_parser = wait_time)]
    pub(crate) timeout: Duration,
}

#[derive(clap::Args)]
pub(crate) struct ServicesArgs {
    /// Only this service
    #[arg(long, value_name = "NAME")]
    pub(crate) service: Option<Name>,
    /// Only on this VM, or `core`
    #[arg(long, visible_alias = "host", value_name = "NAME")]
    pub(crate) node: Option<Name>,
    /// Attributes that an instance must have
    #[arg(
        short = 'l',
        long,
        default_value = "",
        hide_default_value = true,
        value_name = "KEY=VALUE,..."
    )]
    pub(crate) selector: Labels,
    /// Print each change too, until interrupted
    #[arg(long)]
    pub(crate) watch: bool,
}

#[derive(Subcommand)]
pub(crate) enum ServiceCommand {
    /// List the services of the core and of all VMs that are connected
    #[command(visible_alias = "ls")]
    List {
        /// Only of this VM, or `core`
        #[arg(long, visible_alias = "host", value_name = "NAME")]
        node: Option<Name>,
    },
    /// Phase, since when and why
    Status(ServiceArgs),
    /// What it can do
    Features(ServiceArgs),
    /// Start a service that is stopped or has failed
    Start(ServiceArgs),
    /// Let it finish what it has, then stop it; returns when it is stopped
    Stop(StopArgs),
    /// Stop it so, and start it again
    Restart(StopArgs),
    /// End it as a crash would: it is started again
    Kill(ServiceArgs),
}

#[derive(clap::Args)]
pub(crate) struct ServiceArgs {
    /// Of a VM vpn, firewall or loadbalancer; of the core state, bus, catalogue or identity
    pub(crate) service: Name,
    /// The VM, or `core` [default: whom --socket or --core reaches]
    #[arg(long, visible_alias = "host", value_name = "NAME")]
    pub(crate) node: Option<Name>,
    /// Of several instances of the service there, one
    #[arg(long, value_name = "NAME")]
    pub(crate) instance: Option<Name>,
}

#[derive(clap::Args)]
pub(crate) struct StopArgs {
    #[command(flatten)]
    pub(crate) what: ServiceArgs,
    /// How long it may finish what it has, at most 1h [default: the service's own]
    #[arg(long, value_parser = wait_time)]
    pub(crate) deadline: Option<Duration>,
}

#[derive(clap::Args)]
pub(crate) struct ScaleArgs {
    #[arg(value_name = "NAME=N", value_parser = scaled)]
    pub(crate) to: (Name, u32),
    /// Return when that many are ready and the others are gone
    #[arg(long)]
    pub(crate) wait: bool,
    /// At most 1h
    #[arg(long, default_value = "60s", requires = "wait", value_parser = wait_time)]
    pub(crate) timeout: Duration,
}

#[derive(clap::Args)]
pub(crate) struct LogsArgs {
    /// Of the deployment
    pub(crate) deployment: Name,
    /// Of several instances, one [default: the only one]
    #[arg(long, value_name = "NAME")]
    pub(crate) instance: Option<Name>,
    /// The last lines of each of standard output and error [default: all that are kept, by way of a core the last 256 KiB unless it is followed]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) tail: Option<u32>,
    /// Go on with what is written, until the instance is gone
    #[arg(long, short = 'f')]
    pub(crate) follow: bool,
}

#[derive(clap::Args)]
pub(crate) struct SpawnArgs {
    /// Of the deployment, and of the service in the catalogue
    pub(crate) name: Name,
    /// The VM [default: one that has the least to do]
    #[arg(long, visible_alias = "host", value_name = "NAME")]
    pub(crate) node: Option<Name>,
    /// Whom it runs as [default: the agent's user]
    #[arg(long, value_name = "NAME")]
    pub(crate) user: Option<String>,
    /// A port of its own, which it finds in the variable PORT_<NAME>; repeatable
    #[arg(long = "port", value_name = "NAME")]
    pub(crate) ports: Vec<String>,
    /// How long to wait until it is ready, at most 1h
    #[arg(long, default_value = "60s", value_parser = wait_time)]
    pub(crate) timeout: Duration,
    /// Program, by its absolute path, and arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

#[derive(clap::Args)]
pub(crate) struct WaitArgs {
    /// 0: the current one
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(i64).range(0..))]
    pub(crate) revision: i64,
    /// Labels of the VMs to wait for [default: all]
    #[arg(
        short = 'l',
        long,
        default_value = "",
        hide_default_value = true,
        value_name = "KEY=VALUE,..."
    )]
    pub(crate) selector: Labels,
    /// At most 1h
    #[arg(long, default_value = "60s", value_parser = wait_time)]
    pub(crate) timeout: Duration,
    /// Wait until there are such VMs and all are Ready, instead of for a revision
    #[arg(long, conflicts_with = "revision")]
    pub(crate) ready: bool,
}

#[derive(clap::Args)]
pub(crate) struct LabelArgs {
    pub(crate) kind: KindArg,
    pub(crate) name: Name,
    /// KEY=VALUE sets, KEY- removes
    #[arg(required = true, value_name = "KEY=VALUE|KEY-")]
    pub(crate) changes: Vec<String>,
}

#[derive(clap::Args)]
pub(crate) struct DrainArgs {
    pub(crate) node: Name,
    /// Give it new flows again
    #[arg(long)]
    pub(crate) undo: bool,
    /// Return when no balancer has flows to it; exit code 3 if that takes longer
    #[arg(long, conflicts_with = "undo")]
    pub(crate) wait: bool,
    /// For --wait, at most 1h
    #[arg(long, default_value = "5m", value_parser = wait_time)]
    pub(crate) timeout: Duration,
}

#[derive(Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token; it is printed once and kept nowhere
    Create(TokenArgs),
    /// List the tokens that have not expired; their secrets nobody knows
    #[command(visible_alias = "ls")]
    List,
    /// Withdraw a token; who has joined with it stays
    #[command(visible_alias = "rm")]
    Delete {
        /// As listed; the second part of the token
        #[arg(allow_hyphen_values = true)]
        id: String,
    },
}

#[derive(clap::Args)]
pub(crate) struct TokenArgs {
    /// Of what joins with it
    #[arg(long, default_value = "agent")]
    pub(crate) role: RoleArg,
    /// The only name that can join with it [default: any]
    #[arg(long)]
    pub(crate) name: Option<Name>,
    /// Of a service or editor: how the keys begin that it may use; repeatable [default: NAME/ of a service]
    #[arg(long = "state-prefix", value_name = "PREFIX")]
    pub(crate) state_prefixes: Vec<String>,
    /// Of a service or editor: subjects that it may use; repeatable [default: NAME.> and svc.NAME.> of a service]
    #[arg(long = "subject", value_name = "PATTERN")]
    pub(crate) subjects: Vec<String>,
    /// How long VMs can join with it, at most 30d
    #[arg(long, default_value = "1h", value_parser = token_time)]
    pub(crate) ttl: Duration,
    /// How many VMs can join with it
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) max_uses: u32,
    /// Labels of each VM that joins with it
    #[arg(
        short = 'l',
        long,
        default_value = "",
        hide_default_value = true,
        value_name = "KEY=VALUE,..."
    )]
    pub(crate) labels: Labels,
    /// Write it to a new file that only its owner can read
    #[arg(long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
}

#[derive(Subcommand)]
pub(crate) enum KvCommand {
    /// Print the value of a key
    Get { key: String },
    /// Set a key: to VALUE, to the content of a file, or to standard input
    Put(PutArgs),
    /// Delete a key, or all that begin with it
    Delete(DeleteKeyArgs),
    /// List keys
    List(ListKeysArgs),
    /// Print keys and then each change, until interrupted
    Watch(WatchKeysArgs),
}

#[derive(clap::Args)]
pub(crate) struct PutArgs {
    pub(crate) key: String,
    /// Not for secrets: others on this machine see arguments
    #[arg(conflicts_with = "file")]
    pub(crate) value: Option<String>,
    /// The value; - for standard input
    #[arg(short = 'f', long, value_name = "FILE|-")]
    pub(crate) file: Option<PathBuf>,
    /// How to read the value, for example application/json
    #[arg(long, value_name = "TYPE")]
    pub(crate) content_type: Option<String>,
    /// The lease whose end deletes the key
    #[arg(long, value_name = "ID", value_parser = clap::value_parser!(i64).range(1..))]
    pub(crate) lease: Option<i64>,
    /// Only if the key still has this revision
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..))]
    pub(crate) if_revision: Option<i64>,
    /// Only if there is no such key
    #[arg(long, conflicts_with = "if_revision")]
    pub(crate) if_absent: bool,
}

#[derive(clap::Args)]
pub(crate) struct DeleteKeyArgs {
    pub(crate) key: String,
    /// All keys that begin with it, at most 10,000
    #[arg(long, conflicts_with = "if_revision")]
    pub(crate) prefix: bool,
    /// Only if the key still has this revision
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..))]
    pub(crate) if_revision: Option<i64>,
}

#[derive(clap::Args)]
pub(crate) struct ListKeysArgs {
    /// What the keys begin with [default: all]
    pub(crate) prefix: Option<String>,
    /// Without values: a key per line
    #[arg(long)]
    pub(crate) keys_only: bool,
}

#[derive(clap::Args)]
pub(crate) struct WatchKeysArgs {
    /// What the keys begin with [default: all]
    pub(crate) prefix: Option<String>,
    /// Not the keys as they are, but all changes after this revision
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        hide_default_value = true,
        value_parser = clap::value_parser!(i64).range(0..)
    )]
    pub(crate) from: i64,
    /// Epoch of that revision, as in `cnsmo status`; if it is past, the keys as they are come after all
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        hide_default_value = true,
        requires = "from"
    )]
    pub(crate) epoch: u64,
    /// With the value before, where the history has it
    #[arg(long)]
    pub(crate) prev: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum KindArg {
    #[value(
        name = "deployments",
        aliases = ["deployment", "deploy", "Deployment", "Deployments"]
    )]
    Deployments,
    #[value(
        name = "firewallpolicies",
        aliases = ["firewallpolicy", "fw", "FirewallPolicy", "FirewallPolicies"]
    )]
    FirewallPolicies,
    #[value(
        name = "loadbalancers",
        aliases = ["loadbalancer", "lb", "LoadBalancer", "LoadBalancers"]
    )]
    LoadBalancers,
    #[value(name = "networks", aliases = ["network", "net", "Network", "Networks"])]
    Networks,
    #[value(name = "nodes", aliases = ["node", "Node", "Nodes"])]
    Nodes,
}

impl From<KindArg> for Kind {
    fn from(kind: KindArg) -> Self {
        match kind {
            KindArg::Deployments => Self::Deployment,
            KindArg::FirewallPolicies => Self::FirewallPolicy,
            KindArg::LoadBalancers => Self::LoadBalancer,
            KindArg::Networks => Self::Network,
            KindArg::Nodes => Self::Node,
        }
    }
}

fn scaled(text: &str) -> Result<(Name, u32), String> {
    let (name, number) = text.split_once('=').ok_or("not of the form NAME=N, such as web=3")?;
    let name = Name::new(name).map_err(|invalid| invalid.to_string())?;
    let number = number.parse().map_err(|_| format!("`{number}` is not a number"))?;
    Ok((name, number))
}

pub(crate) fn wait_time(text: &str) -> Result<Duration, String> {
    at_most(text, "1h")
}

fn token_time(text: &str) -> Result<Duration, String> {
    at_most(text, "30d")
}

/// Zero would ask the core for its default, and more than its limit be refused there.
fn at_most(text: &str, max: &str) -> Result<Duration, String> {
    let time = duration(text)?;
    if time.is_zero() || time > duration(max)? {
        return Err(format!("give more than 0s and at most {max}"));
    }
    Ok(time)
}

/// A whole number with its unit: ms, s, m, h or d.
fn duration(text: &str) -> Result<Duration, String> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let wrong = || format!("`{text}` is not a time such as 500ms, 60s, 5m, 1h or 7d");
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let milliseconds: u64 = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60 * 1000,
        "h" => 3600 * 1000,
        "d" => 24 * 3600 * 1000,
        _ => return Err(wrong()),
    };
    number.checked_mul(milliseconds).map(Duration::from_millis).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Args::command().debug_assert();
    }

    /// A global option and an argument of one name would be found out only when used.
    #[test]
    fn global_options_go_with_each_command() {
        let global = ["cnsmo", "--core", "core.example:7443", "--identity", "/etc/cnsmo/me"];
        for command in [
            &["identity", "revoke", "agent/web1"][..],
            &["login", "--name", "alice", "token"],
            &["token", "create", "--name", "alice"],
            &["audit", "--verify"],
        ] {
            let args = Args::parse_from(global.iter().chain(command));
            assert_eq!(args.core.unwrap().port(), 7443);
            assert_eq!(args.identity_dir.unwrap(), PathBuf::from("/etc/cnsmo/me"));
            let Command::Identity(IdentityCommand::Revoke { identity, .. }) = args.command else {
                continue;
            };
            assert_eq!(identity, "agent/web1");
        }
    }

    #[test]
    fn times_need_a_unit() {
        for (text, milliseconds) in [
            ("500ms", 500),
            ("60s", 60_000),
            ("5m", 300_000),
            ("1h", 3_600_000),
            ("2d", 172_800_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for bad in [
            "",
            "s",
            "60",
            "-1s",
            "1.5h",
            "1h30m",
            "1y",
            "99999999999999999999d",
            "9999999999999999d",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        assert!(wait_time("0s").is_err() && wait_time("61m").is_err() && wait_time("1h").is_ok());
        assert!(token_time("31d").is_err() && token_time("30d").is_ok());
    }
}
