//! A child process: made or taken up, waited for, ended.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::{
            fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _, chown},
            process::CommandExt as _,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use cnsmo_proto::model::{Instance, Process, port_variable};
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, killpg},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Gid, Group, Pid, Uid, User, getgrouplist, setgid, setgroups, setsid, setuid},
};
use tokio::io::unix::AsyncFd;

use super::record::MARK;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Of what is written to standard output or error. Twice as much is kept, the older half beside it as `.1`.
const LOG_BYTES_MAX: u64 = 8 << 20;
const LOGS: [&str; 2] = ["stdout.log", "stderr.log"];

/// How an instance is started: names are numbers, variables have values.
#[derive(Clone, Debug)]
pub(super) struct Launch {
    command: Vec<String>,
    environment: BTreeMap<String, String>,
    account: Option<Account>,
    directory: Option<PathBuf>,
}

#[derive(Clone, Debug)]
struct Account {
    user: Option<Uid>,
    group: Gid,
    groups: Vec<Gid>,
}

impl Launch {
    /// Looks names up on this VM.
    pub(super) fn new(instance: &Instance, process: &Process) -> Result<Self, String> {
        let mut variables = BTreeMap::from([
            ("INSTANCE".to_owned(), instance.name.to_string()),
            ("DEPLOYMENT".to_owned(), instance.deployment.to_string()),
            ("NODE".to_owned(), instance.node.to_string()),
        ]);
        let ports = instance.template.ports.iter();
        variables.extend(ports.map(|port| (port_variable(&port.name), port.port.to_string())));
        let command = process.command.iter().map(|text| expand(text, &variables)).collect();
        let given = process.environment.iter();
        let given: Vec<_> =
            given.map(|(key, text)| (key.clone(), expand(text, &variables))).collect();
        let mut environment = variables;
        environment.insert("PATH".to_owned(), PATH.to_owned());
        environment.extend(given);
        environment.insert(MARK.to_owned(), format!("{}/{}", instance.deployment, instance.name));
        let account = account(process.user.as_deref(), process.group.as_deref())?;
        let directory = process.directory.as_ref().map(PathBuf::from);
        Ok(Self { command, environment, account, directory })
    }

    fn command(&self, folder: &Path, command: &[String]) -> io::Result<Command> {
        let Some((program, arguments)) = command.split_first() else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let directory = match &self.directory {
            Some(directory) => directory.clone(),
            None => self.own_directory(folder)?,
        };
        let mut command = Command::new(program);
        command.args(arguments).env_clear().envs(&self.environment).current_dir(directory);
        command.stdin(Stdio::null());
        let account = self.account.clone();
        let become_it = move || {
            // A signal for the agent's session is not for it.
            setsid()?;
            let Some(Account { user, group, groups }) = &account else { return Ok(()) };
            setgroups(groups)?;
            setgid(*group)?;
            if let Some(user) = user {
                setuid(*user)?;
                nix::sys::prctl::set_no_new_privs()?;
            }
            Ok(())
        };
        // SAFETY: between fork and exec it makes system calls only, on memory that was allocated before.
        unsafe { command.pre_exec(become_it) };
        Ok(command)
    }

    /// Its own, which is removed with it.
    fn own_directory(&self, folder: &Path) -> io::Result<PathBuf> {
        let directory = folder.join("work");
        match DirBuilder::new().mode(0o700).create(&directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        if let Some(Account { user, group, .. }) = &self.account {
            // The way to it is the agent's own, which others may pass and not read.
            chown(&directory, user.map(Uid::as_raw), Some(group.as_raw()))?;
        }
        Ok(directory)
    }

    /// Makes the child. Returns its id.
    pub(super) fn start(&self, folder: &Path) -> io::Result<i32> {
        let mut command = self.command(folder, &self.command)?;
        let [out, err] = LOGS.map(|name| log(&folder.join(name)));
        let child = command.stdout(out?).stderr(err?).spawn()?;
        Ok(child.id().cast_signed())
    }

    /// To find out whether the instance is ready.
    pub(super) fn check(
        &self,
        folder: &Path,
        check: &[String],
    ) -> io::Result<tokio::process::Command> {
        let mut command = self.command(folder, check)?;
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut command = tokio::process::Command::from(command);
        command.kill_on_drop(true);
        Ok(command)
    }
}

fn expand(text: &str, variables: &BTreeMap<String, String>) -> String {
    let mut expanded = text.to_owned();
    for (name, value) in variables {
        expanded = expanded.replace(&format!("${{{name}}}"), value);
    }
    expanded
}

fn account(user: Option<&str>, group: Option<&str>) -> Result<Option<Account>, String> {
    let group = group.map(group_id).transpose()?;
    let Some(user) = user else {
        let only = |group| Account { user: None, group, groups: vec![group] };
        return Ok(group.map(only));
    };
    let known = match user.parse() {
        Ok(number) => User::from_uid(Uid::from_raw(number)),
        Err(_) => User::from_name(user),
    };
    let known = known.map_err(|error| format!("user {user}: {error}"))?;
    let (uid, own) = match (&known, user.parse()) {
        (Some(known), _) => (known.uid, Some(known.gid)),
        (None, Ok(number)) => (Uid::from_raw(number), None),
        (None, Err(_)) => return Err(format!("user {user}: this VM does not know it")),
    };
    let Some(group) = group.or(own) else {
        return Err(format!("user {user}: this VM does not know it, so its group must be named"));
    };
    let groups = known.and_then(|known| {
        let name = CString::new(known.name).ok()?;
        getgrouplist(&name, group).ok()
    });
    Ok(Some(Account { user: Some(uid), group, groups: groups.unwrap_or_else(|| vec![group]) }))
}

fn group_id(group: &str) -> Result<Gid, String> {
    if let Ok(number) = group.parse() {
        return Ok(Gid::from_raw(number));
    }
    let known = Group::from_name(group).map_err(|error| format!("group {group}: {error}"))?;
    known.map(|known| known.gid).ok_or_else(|| format!("group {group}: this VM does not know it"))
}

fn log(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(file)
}

/// Keeps the end of what was written. The child goes on writing to the same file, at its end: it appends.
pub(super) fn rotate_logs(folder: &Path) -> io::Result<()> {
    for name in LOGS {
        let path = folder.join(name);
        match fs::metadata(&path) {
            Ok(metadata) if metadata.len() > LOG_BYTES_MAX => {
                let older = folder.join(format!("{name}.1"));
                fs::copy(&path, older)?;
                OpenOptions::new().write(true).open(&path)?.set_len(0)?;
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A process, whoever has made it.
#[derive(Debug)]
pub(super) struct Child {
    pid: i32,
    ended: AsyncFd<OwnedFd>,
}

impl Child {
    /// Takes up a process that runs.
    pub(super) fn of(pid: i32) -> io::Result<Self> {
        let flags = 0;
        // SAFETY: pidfd_open(2) takes two integers and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, flags) };
        let fd = RawFd::try_from(Errno::result(fd)?).map_err(io::Error::other)?;
        // SAFETY: the descriptor is new, and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        debug_assert!(fd.as_raw_fd() >= 0);
        // SAFETY: the descriptor is owned, and stays open as long as the registration.
        Ok(Self { pid, ended: unsafe { AsyncFd::register(fd) }? })
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid.cast_unsigned()
    }

    /// Waits for its end, and says how it ended as far as it can be known: of one that another agent has made it cannot.
    pub(super) async fn exited(&self) -> String {
        if let Err(error) = self.ended.readable().await {
            tracing::warn!(%error, pid = self.pid, "cannot wait for a process");
        }
        match waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => format!("exited with {code}"),
            Ok(WaitStatus::Signaled(_, signal, _)) => format!("killed by {signal}"),
            _ => "ended".to_owned(),
        }
    }

    /// To all of its group, which is its session's unless some of them left it.
    pub(super) fn signal(&self, signal: Signal) {
        match killpg(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => tracing::warn!(%error, pid = self.pid, "cannot be signalled"),
        }
    }
}
