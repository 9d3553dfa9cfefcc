//! Child processes that end when their value does.

use std::{
    fs::{self, File, OpenOptions},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};

const POLL: Duration = Duration::from_millis(20);

/// A child with its output in a file. Dropping it kills and reaps it.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    /// Length of the log when this child began: a restarted one appends.
    log_from: usize,
}

impl Process {
    /// Starts `command` with no input; both outputs are appended to `log`.
    pub fn spawn(name: &str, command: &mut Command, log: &Path) -> anyhow::Result<Self> {
        let file = append(log)?;
        let log_from = usize::try_from(file.metadata()?.len())?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("starting {name} ({})", command.get_program().display()))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned(), log_from })
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// SIGKILL, then waits for the end.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().with_context(|| format!("killing {}", self.name))?;
        self.child.wait().with_context(|| format!("waiting for {}", self.name))?;
        Ok(())
    }

    /// SIGTERM, then waits for the end; an error if there is none in time.
    pub fn terminate(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        signal::kill(pid, Signal::SIGTERM).with_context(|| format!("stopping {}", self.name))?;
        self.wait(limit).context("after SIGTERM")
    }

    /// Waits for its end; an error if there is none in time.
    pub fn wait(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > end {
                bail!("{} still runs after {limit:?}", self.name);
            }
            pause(POLL);
        }
    }

    /// Waits until the output since the start contains `text`. An error, with the end of the log, if the process
    /// ends first or the time is up.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + limit;
        loop {
            let ended = self.child.try_wait()?;
            if self.output()?.contains(text) {
                return Ok(());
            }
            if let Some(status) = ended {
                bail!("{} ended with {status} before it said `{text}`\n{}", self.name, self.tail());
            }
            if Instant::now() > end {
                bail!("{} has not said `{text}` within {limit:?}\n{}", self.name, self.tail());
            }
            pause(POLL);
        }
    }

    /// What it has written since it started.
    pub fn output(&self) -> anyhow::Result<String> {
        let bytes = fs::read(&self.log)?;
        Ok(String::from_utf8_lossy(bytes.get(self.log_from..).unwrap_or_default()).into_owned())
    }

    /// The last lines of the log, indented, for an error message.
    pub fn tail(&self) -> String {
        let text = self.output().unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        let last = lines.len().saturating_sub(15);
        lines[last..].iter().map(|line| format!("    {line}\n")).collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sleeps: synchronous code only.
#[expect(clippy::disallowed_methods, reason = "no async runtime is here to be blocked")]
pub fn pause(time: Duration) {
    thread::sleep(time);
}

fn append(path: &Path) -> anyhow::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("opening {}", path.display()))
}
