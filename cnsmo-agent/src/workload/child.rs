//! A child that outlives the agent, and is found again by the next one.
//!
//! Its record is written by the child itself, between fork and exec, under a lock that exec lets go: whoever gets the lock
//! sees either a record with the child's identity, or that there is no child. So no crash of the agent starts one twice.
//! An identity is of one boot; nothing of it must survive a loss of power.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::{
            fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
            process::{CommandExt as _, ExitStatusExt as _},
        },
    },
    path::PathBuf,
    process::{Command, ExitStatus, Stdio},
};

use cnsmo_proto::model::Limits;
use nix::{
    errno::Errno,
    sys::signal::{Signal, killpg},
    unistd::{Gid, Pid, Uid, User, chown, getgrouplist},
};
use tokio::io::unix::AsyncFd;

use super::{cgroup::Group, launch::Launch, notify::descends};

const RECORD: &str = "process";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// /proc/PID/stat has 52 numbers and a name of at most 64 bytes.
const STAT_BYTES: usize = 2048;
/// Larger records are not ours.
const RECORD_BYTES_MAX: u64 = 4096;

/// The folder of one instance.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    path: PathBuf,
    group: Option<Group>,
}

impl Folder {
    pub(super) fn new(path: PathBuf, group: Option<Group>) -> Self {
        Self { path, group }
    }

    /// Puts limits in force. What is told are those that are not, and why.
    pub(super) fn limit(&self, limits: &Limits) -> Option<String> {
        match &self.group {
            Some(group) => group.limit(limits),
            None if *limits == Limits::default() => None,
            None => Some("limits: not in force: this agent makes no control groups".into()),
        }
    }

    /// Whether it was made and not removed.
    pub(super) fn exists(&self) -> bool {
        self.path.exists()
    }

    /// Output of a stream.
    pub(super) fn log(&self, stream: &str) -> PathBuf {
        self.path.join(format!("{stream}.log"))
    }

    /// What the child was made of, as it was sent.
    pub(super) fn message(&self) -> PathBuf {
        self.path.join("instance")
    }

    /// That a unit is the instance's.
    pub(super) fn unit(&self) -> PathBuf {
        self.path.join("unit")
    }

    /// Where the announcements of the child arrive.
    pub(super) fn mailbox(&self) -> PathBuf {
        self.path.join("notify")
    }

    /// Whether a process is one of the instance's, whose first one is `root`.
    pub(super) fn holds(&self, pid: i32, root: i32) -> bool {
        self.group.as_ref().is_some_and(|group| group.holds(pid)) || descends(pid, root)
    }

    pub(super) fn remove(&self) -> io::Result<()> {
        if let Some(group) = &self.group {
            group.remove();
        }
        match fs::remove_dir_all(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    fn record(&self) -> PathBuf {
        self.path.join(RECORD)
    }

    fn work(&self) -> PathBuf {
        self.path.join("work")
    }

    /// The user of the instance passes through to its working folder; only root lists what is in between.
    pub(super) fn make(&self) -> io::Result<()> {
        fs::create_dir_all(&self.path)?;
        // Whatever the agent's umask is.
        for folder in self.path.ancestors().take(2) {
            fs::set_permissions(folder, fs::Permissions::from_mode(0o711))?;
        }
        Ok(())
    }
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    Code(i32),
    Signal(i32),
    /// Another agent launched it: only the kernel knows.
    Unknown,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "ended with exit code {code}"),
            Self::Signal(signal) => write!(f, "ended by signal {signal}"),
            Self::Unknown => {
                write!(f, "ended; an agent before this one launched it and had its exit code")
            }
        }
    }
}

impl From<ExitStatus> for Exit {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(code),
            (None, Some(signal)) => Self::Signal(signal),
            (None, None) => Self::Unknown,
        }
    }
}

/// A process with its group. Dropping it leaves it running.
#[derive(Debug)]
pub(super) struct Child {
    pid: i32,
    pidfd: AsyncFd<OwnedFd>,
    group: Option<Group>,
    own: Option<std::process::Child>,
}

impl Child {
    /// Launches `process`. Blocks until it is executed. In a runtime.
    ///
    /// # Errors
    /// Of the file system, or of the system calls on the way to exec.
    pub(super) fn launch(folder: &Folder, launch: &Launch) -> io::Result<Self> {
        folder.make()?;
        let mut record = open_record(folder)?;
        record.set_len(0)?;
        let boot = boot_id()?;
        writeln!(record, "{boot}")?;
        let child = command(folder, launch, &record)?.spawn()?;
        let pid = child.id().cast_signed();
        let (pidfd, group) = (watched(pidfd(pid)?)?, folder.group.clone());
        Ok(Self { pid, pidfd, group, own: Some(child) })
    }

    /// The child that an agent before this one launched, if it still runs. In a runtime.
    ///
    /// # Errors
    /// Of the file system. It is then not known whether one runs, and none must be launched.
    pub(super) fn adopt(folder: &Folder) -> io::Result<Option<Self>> {
        if !folder.record().exists() {
            return Ok(None);
        }
        let mut text = String::new();
        open_record(folder)?.take(RECORD_BYTES_MAX).read_to_string(&mut text)?;
        let Some(identity) =
            Identity::of(&text).filter(|found| boot_id().is_ok_and(|id| id == found.boot))
        else {
            return Ok(None);
        };
        let pidfd = match pidfd(identity.pid) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            pidfd => watched(pidfd?)?,
        };
        // After the pidfd: the process that it stands for is the one looked at.
        let now = fs::read_to_string(format!("/proc/{}/stat", identity.pid)).unwrap_or_default();
        if stat(&now).is_none_or(|(_, started, ended)| ended || started != identity.started) {
            return Ok(None);
        }
        Ok(Some(Self { pid: identity.pid, pidfd, group: folder.group.clone(), own: None }))
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits for the end, and ends what is left of its group. Can be cancelled.
    pub(super) async fn ended(&mut self) -> Exit {
        // An error of the runtime's driver: it ends with the runtime.
        if self.pidfd.readable().await.is_err() {
            std::future::pending::<()>().await;
        }
        // Not reaped yet: its number is still its own.
        self.kill();
        match &mut self.own {
            Some(child) => child.wait().map_or(Exit::Unknown, Exit::from),
            None => Exit::Unknown,
        }
    }

    /// Sends a signal to the process itself.
    pub(super) fn signal(&self, signal: i32) {
        // SAFETY: pidfd_send_signal(2) reads no memory when the info is null.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            );
        }
    }

    /// Ends the whole group.
    pub(super) fn kill(&self) {
        self.signal(libc::SIGKILL);
        if let Some(group) = &self.group {
            group.kill();
        }
        match killpg(Pid::from_raw(self.pid), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => tracing::warn!(pid = self.pid, %error, "cannot end a group of processes"),
        }
    }
}

struct Identity {
    boot: String,
    pid: i32,
    started: u64,
}

impl Identity {
    fn of(record: &str) -> Option<Self> {
        let (boot, rest) = record.split_once('\n')?;
        let (pid, started, _) = stat(rest)?;
        Some(Self { boot: boot.into(), pid, started })
    }
}

/// Of a line of /proc/PID/stat: number, start in ticks since boot (field 22), and whether it has ended.
fn stat(line: &str) -> Option<(i32, u64, bool)> {
    let pid = line.split_once(' ')?.0.parse().ok()?;
    // The name may hold anything, parentheses too.
    let fields = line[line.rfind(')')? + 1..].split_ascii_whitespace().collect::<Vec<_>>();
    let ended = matches!(*fields.first()?, "Z" | "X");
    Some((pid, fields.get(19)?.parse().ok()?, ended))
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string(BOOT_ID)?.trim().to_owned())
}

/// Locked. A child between fork and exec holds the lock.
fn open_record(folder: &Folder) -> io::Result<File> {
    let path = folder.record();
    let mut file = File::options().read(true).append(true).create(true).mode(0o600).open(path)?;
    file.lock()?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

/// The program of an exec probe, run as the instance is, in its folder, without a record and output.
pub(super) fn beside(folder: &Folder, launch: &Launch) -> io::Result<Command> {
    let (program, arguments) = launch.check.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir(directory(folder, launch)?);
    command.env_clear().envs(&launch.environment);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    before_exec(&mut command, folder, launch, None)?;
    Ok(command)
}

fn command(folder: &Folder, launch: &Launch, record: &File) -> io::Result<Command> {
    let output = |stream| {
        let path = folder.log(stream);
        File::options().append(true).create(true).mode(0o600).open(path).map(Stdio::from)
    };
    let (program, arguments) = launch.command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir(directory(folder, launch)?);
    command.env_clear().envs(&launch.environment);
    command.stdin(Stdio::null()).stdout(output("stdout")?).stderr(output("stderr")?);
    before_exec(&mut command, folder, launch, Some(record.as_raw_fd()))?;
    Ok(command)
}

/// Where it runs; a folder of its own is made.
pub(super) fn directory(folder: &Folder, launch: &Launch) -> io::Result<PathBuf> {
    if let Some(directory) = &launch.directory {
        return Ok(directory.clone());
    }
    let work = folder.work();
    fs::DirBuilder::new().mode(0o700).recursive(true).create(&work)?;
    chown(&work, launch.user, launch.group)?;
    Ok(work)
}

fn before_exec(
    command: &mut Command,
    folder: &Folder,
    launch: &Launch,
    record: Option<RawFd>,
) -> io::Result<()> {
    let door = folder.group.as_ref().and_then(Group::door);
    let privileges = Privileges::of(launch)?;
    let steps = move || {
        if let Some(record) = record {
            record_self(record)?;
        }
        // SAFETY: setsid(2) and close_range(2) touch no memory.
        unsafe {
            done(libc::setsid())?;
            // Marked, not closed: the pipe that tells a failed exec is among them.
            let (first, last) = (3, libc::c_uint::MAX);
            done(libc::syscall(libc::SYS_close_range, first, last, libc::CLOSE_RANGE_CLOEXEC))?;
        }
        if let Some(door) = &door {
            // SAFETY: one byte of a constant is read.
            done(unsafe { libc::write(door.as_raw_fd(), c"0".as_ptr().cast(), 1) } as i64)?;
        }
        privileges.drop_to()
    };
    // SAFETY: only system calls, with memory that was made before the fork.
    unsafe { command.pre_exec(steps) };
    Ok(())
}

/// Whom the child becomes.
struct Privileges {
    user: Option<Uid>,
    group: Option<Gid>,
    groups: Vec<libc::gid_t>,
}

impl Privileges {
    fn of(launch: &Launch) -> io::Result<Self> {
        let (user, group) = (launch.user, launch.group);
        let mut groups = group.iter().map(|gid| gid.as_raw()).collect::<Vec<_>>();
        if let Some(known) = user.map(User::from_uid).transpose()?.flatten() {
            let name = std::ffi::CString::new(known.name)?;
            let all = getgrouplist(&name, group.unwrap_or(known.gid))?;
            groups = all.into_iter().map(Gid::as_raw).collect();
        }
        Ok(Self { user, group, groups })
    }

    /// Async-signal-safe.
    fn drop_to(&self) -> io::Result<()> {
        if self.user.is_none() && self.group.is_none() {
            return Ok(());
        }
        // SAFETY: `groups` is as long as is told; the other calls touch no memory.
        unsafe {
            done(libc::setgroups(self.groups.len(), self.groups.as_ptr()))?;
            if let Some(group) = self.group {
                let gid = group.as_raw();
                done(libc::setresgid(gid, gid, gid))?;
            }
            if let Some(user) = self.user {
                let uid = user.as_raw();
                done(libc::setresuid(uid, uid, uid))?;
            }
            done(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        }
    }
}

/// Appends the caller's line of /proc to the record. Async-signal-safe.
fn record_self(record: RawFd) -> io::Result<()> {
    let mut line = [0u8; STAT_BYTES];
    // SAFETY: the path ends with NUL; the buffer is as long as is told; the descriptor is closed once.
    unsafe {
        let stat = libc::open(c"/proc/self/stat".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
        done(stat)?;
        let length = libc::read(stat, line.as_mut_ptr().cast(), line.len());
        libc::close(stat);
        let written = libc::write(record, line.as_ptr().cast(), length.max(0).unsigned_abs());
        if length <= 0 || written != length {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn done(result: impl Into<i64>) -> io::Result<()> {
    if result.into() < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn watched(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor stays the same open file until it is dropped.
    Ok(unsafe { AsyncFd::register(pidfd) }?)
}

fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) touches no memory; a descriptor that is not negative is new and the caller's.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        done(fd)?;
        Ok(OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_forge_a_line() {
        let line = "7 (a) Z 1 (x) S 1 7 7 0 -1 4 1 0 0 0 0 0 0 0 20 0 1 0 4711 1 1";
        assert_eq!(stat(line), Some((7, 4711, false)));
        assert_eq!(stat("7 (a) S 1"), None);
        assert_eq!(
            stat(&fs::read_to_string("/proc/self/stat").unwrap()).unwrap().0,
            std::process::id().cast_signed()
        );
    }

    #[test]
    fn a_record_without_a_child_is_no_child() {
        assert!(Identity::of("boot\n").is_none());
        assert!(Identity::of("").is_none());
    }
}
