//! Hears a process say of itself that it is ready: the protocol of sd_notify(3).
//!
//! The socket has a name that nobody can guess and no file: the user of an instance need not reach the agent's folder. The
//! name and what was heard are kept beside the instance, so that the next agent listens under the same name.

use std::{
    fs,
    io::{self, IoSliceMut},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use cnsmo_service::durable;
use nix::{
    cmsg_space,
    sys::socket::{
        ControlMessageOwned, MsgFlags, UnixAddr, UnixCredentials, recvmsg, setsockopt, sockopt,
    },
};
use ring::rand::{SecureRandom as _, SystemRandom};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
    time::sleep,
};

use super::runner::Report;

/// The variable in which an instance finds the socket.
pub(super) const VARIABLE: &str = "NOTIFY_SOCKET";
/// As systemd takes them. A longer message is dropped: it has no beginning that can be trusted.
const MESSAGE_BYTES_MAX: usize = 4096;
/// Of a status, in characters: it becomes part of a phase's message.
const STATUS_MAX: usize = 256;
/// After each message: one that floods waits for its own.
const PAUSE: Duration = Duration::from_millis(10);
/// Descriptors in one message; the kernel takes no more (SCM_MAX_FD).
const DESCRIPTORS_MAX: usize = 253;
/// Parents that are looked at to find whose process a sender is.
const ANCESTORS_MAX: usize = 64;
const NAME_BYTES: usize = 16;
/// A process that was forked when the name was in use holds it until it has executed its program.
const RETRY: Duration = Duration::from_millis(100);
const RETRIES: usize = 50;

/// Where the announcements of one instance arrive.
#[derive(Debug)]
pub(super) struct Mailbox {
    socket: AsyncFd<UnixDatagram>,
    name: String,
    path: PathBuf,
    is_ready: bool,
}

/// What one message says; what is absent has not changed.
#[derive(Debug, Default, PartialEq, Eq)]
struct Said {
    is_ready: Option<bool>,
    status: Option<String>,
}

impl Mailbox {
    /// One of a new name for a process that is about to be started. In a runtime.
    ///
    /// # Errors
    /// Of the file system or the socket.
    pub(super) fn new(path: &Path) -> io::Result<Self> {
        let mut bytes = [0; NAME_BYTES];
        SystemRandom::new().fill(&mut bytes).map_err(|_| io::Error::other("no random numbers"))?;
        let name = bytes.iter().fold("cnsmo-".to_owned(), |name, byte| format!("{name}{byte:02x}"));
        let mailbox = Self::listen(name, path.to_owned(), false)?;
        mailbox.keep()?;
        Ok(mailbox)
    }

    /// That of a process which runs already. In a runtime.
    ///
    /// # Errors
    /// As [`Self::new`]; also where none was made.
    pub(super) async fn again(path: &Path) -> io::Result<Self> {
        let kept = fs::read_to_string(path)?;
        let (name, is_ready) = kept.trim().split_once(' ').ok_or(io::ErrorKind::InvalidData)?;
        let listen = || Self::listen(name.to_owned(), path.to_owned(), is_ready == "true");
        for _ in 0..RETRIES {
            match listen() {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => sleep(RETRY).await,
                mailbox => return mailbox,
            }
        }
        listen()
    }

    fn listen(name: String, path: PathBuf, is_ready: bool) -> io::Result<Self> {
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
        setsockopt(&socket, sockopt::PassCred, &true)?;
        socket.set_nonblocking(true)?;
        // SAFETY: an owned socket stays the same open file until it is dropped.
        let socket = unsafe { AsyncFd::register(socket) }?;
        Ok(Self { socket, name, path, is_ready })
    }

    fn keep(&self) -> io::Result<()> {
        let content = format!("{} {}\n", self.name, self.is_ready);
        durable::write(&self.path, content.as_bytes(), 0o600)
    }

    /// The content of [`VARIABLE`].
    pub(super) fn address(&self) -> String {
        format!("@{}", self.name)
    }

    /// Tells what is heard, and what was before. `is_own`: of the number of a process, whether it is one of the instance.
    ///
    /// # Errors
    /// Of the socket or the file system.
    pub(super) async fn hear(
        mut self,
        is_own: impl Fn(i32) -> bool,
        told: watch::Sender<Report>,
    ) -> io::Result<()> {
        let mut status = String::new();
        loop {
            told.send_replace(match (self.is_ready, &*status) {
                (true, status) => Report::Good(status.to_owned()),
                (false, "") => Report::Bad("it has not announced that it is ready".to_owned()),
                (false, status) => Report::Bad(format!("it says: {status}")),
            });
            let said = loop {
                sleep(PAUSE).await;
                let received = self.socket.async_io(Interest::READABLE, receive).await;
                // The descriptors are closed with it: a sender that waits for that may then end.
                let Some(Message { text, sender, _descriptors }) = received? else { continue };
                if is_own(sender) {
                    break Said::of(&text);
                }
                tracing::warn!(sender, "a process that is none of the instance's announces for it");
            };
            if let Some(said) = said.status {
                status = said;
            }
            if let Some(is_ready) = said.is_ready.filter(|now| *now != self.is_ready) {
                self.is_ready = is_ready;
                self.keep()?;
            }
        }
    }
}

struct Message {
    text: String,
    sender: i32,
    _descriptors: Vec<OwnedFd>,
}

/// None: one that says nothing here.
fn receive(socket: &UnixDatagram) -> io::Result<Option<Message>> {
    let mut bytes = [0; MESSAGE_BYTES_MAX];
    let mut control = cmsg_space!(UnixCredentials, [RawFd; DESCRIPTORS_MAX]);
    let (length, sender, descriptors, is_whole) = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let fd = socket.as_raw_fd();
        let received = recvmsg::<UnixAddr>(fd, &mut parts, Some(&mut control), flags)?;
        let (mut sender, mut descriptors) = (None, Vec::new());
        for message in received.cmsgs()? {
            match message {
                ControlMessageOwned::ScmCredentials(credentials) => {
                    sender = Some(credentials.pid());
                }
                ControlMessageOwned::ScmRights(fds) => {
                    // SAFETY: descriptors that have just been received are new and nobody else's.
                    descriptors
                        .extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
                _ => {}
            }
        }
        let is_whole = !received.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
        (received.bytes, sender, descriptors, is_whole)
    };
    let text = String::from_utf8_lossy(&bytes[..length]).into_owned();
    let whole = sender.filter(|_| is_whole);
    Ok(whole.map(|sender| Message { text, sender, _descriptors: descriptors }))
}

impl Said {
    fn of(message: &str) -> Self {
        let mut said = Self::default();
        for line in message.lines() {
            match line.split_once('=') {
                Some(("READY", "1")) => said.is_ready = Some(true),
                Some(("STOPPING" | "RELOADING", "1")) => said.is_ready = Some(false),
                Some(("STATUS", text)) => {
                    said.status = Some(text.chars().take(STATUS_MAX).collect());
                }
                _ => {}
            }
        }
        said
    }
}

/// Whether process `pid` descends from `root`, or is in its session: a descendant whose parent has ended.
pub(super) fn descends(pid: i32, root: i32) -> bool {
    let mut at = pid;
    for _ in 0..ANCESTORS_MAX {
        if at == root {
            return true;
        }
        let Some((parent, session)) = parent_and_session(at) else { return false };
        if session == root {
            return true;
        }
        at = parent;
    }
    false
}

/// Of /proc/PID/stat, fields 4 and 6 (proc(5)). The name before them may hold anything, parentheses too.
fn parent_and_session(pid: i32) -> Option<(i32, i32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace().skip(1);
    Some((fields.next()?.parse().ok()?, fields.nth(1)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::CommandExt as _, process::Command};

    use nix::sys::socket::{ControlMessage, sendmsg};

    use super::*;

    #[test]
    fn of_what_is_said_only_what_is_known_counts() {
        let said = |is_ready, status: Option<&str>| Said {
            is_ready,
            status: status.map(ToOwned::to_owned),
        };
        assert_eq!(Said::of("READY=1\nSTATUS=all is well"), said(Some(true), Some("all is well")));
        assert_eq!(Said::of("STOPPING=1\n"), said(Some(false), None));
        assert_eq!(Said::of("READY=0\nMAINPID=1\nBARRIER=1"), said(None, None));
        let long = Said::of(&format!("STATUS={}", "ä".repeat(4000))).status.unwrap();
        assert_eq!(long.chars().count(), STATUS_MAX);
    }

    #[test]
    fn a_process_is_of_the_instance_by_its_parents_or_its_session() {
        let own = std::process::id().cast_signed();
        assert!(descends(own, own));
        let mut child = Command::new("/bin/sleep").arg("100").process_group(0).spawn().unwrap();
        let pid = child.id().cast_signed();
        assert!(descends(pid, own) && !descends(own, pid) && !descends(1, own));
        child.kill().unwrap();
        child.wait().unwrap();
        // Its parent ends at once; its session tells.
        let orphan = "import os, time
os.setsid()
print(os.getpid(), flush=True)
pid = os.fork()
if pid == 0:
    time.sleep(100)
print(pid, flush=True)";
        let mut python = Command::new("python3");
        python.args(["-c", orphan]).stdout(std::process::Stdio::piped());
        let mut parent = python.spawn().unwrap();
        let mut lines = io::BufRead::lines(io::BufReader::new(parent.stdout.take().unwrap()));
        let mut number = || lines.next().unwrap().unwrap().parse::<i32>().unwrap();
        let (leader, orphan) = (number(), number());
        parent.wait().unwrap();
        let is_own = descends(orphan, leader);
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(orphan), nix::sys::signal::SIGKILL)
            .unwrap();
        assert!(is_own);
    }

    #[tokio::test]
    async fn the_next_one_listens_under_the_same_name_and_knows_what_was_heard() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let own = std::process::id().cast_signed();
        let mailbox = Mailbox::new(&path).unwrap();
        let address = mailbox.address();
        let name = address.strip_prefix('@').unwrap().to_owned();
        let to = UnixAddr::new_abstract(name.as_bytes()).unwrap();
        let sender = UnixDatagram::unbound().unwrap();
        let send = |text: &str, attached: &[ControlMessage<'_>]| {
            let part = [io::IoSlice::new(text.as_bytes())];
            sendmsg(sender.as_raw_fd(), &part, attached, MsgFlags::empty(), Some(&to)).unwrap();
        };
        let (told, mut hears) = watch::channel(Report::Bad(String::new()));
        let hearing = tokio::spawn(mailbox.hear(move |pid| pid == own, told));
        // A barrier, as systemd-notify sends it: the other end of a pipe is closed when it was heard.
        let (read, write) = nix::unistd::pipe().unwrap();
        send(&"x".repeat(MESSAGE_BYTES_MAX + 1), &[]);
        send("READY=1\nSTATUS=serving", &[]);
        send("BARRIER=1", &[ControlMessage::ScmRights(&[write.as_raw_fd()])]);
        drop(write);
        hears.wait_for(|heard| *heard == Report::Good("serving".into())).await.unwrap();
        let closed = tokio::task::spawn_blocking(move || {
            io::Read::read(&mut fs::File::from(read), &mut [0; 1]).unwrap()
        });
        assert_eq!(closed.await.unwrap(), 0);
        hearing.abort();
        assert!(hearing.await.unwrap_err().is_cancelled());

        let again = Mailbox::again(&path).await.unwrap();
        assert_eq!(again.address(), address);
        let (told, mut hears) = watch::channel(Report::Bad(String::new()));
        // Nobody's, this time.
        let hearing = tokio::spawn(again.hear(|_| false, told));
        hears.wait_for(|heard| *heard == Report::Good(String::new())).await.unwrap();
        send("STOPPING=1", &[]);
        sleep(20 * PAUSE).await;
        assert_eq!(*hears.borrow(), Report::Good(String::new()));
        hearing.abort();
    }
}
