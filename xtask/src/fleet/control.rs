//! Core, agents and command line as processes of this host, with their files in one folder.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::START_LIMIT;
use crate::{
    cargo::Built,
    interrupt,
    netns::{Netns, PinDir, RunDir},
    process::Process,
    shell,
};

/// Built programs.
#[derive(Debug)]
pub(crate) struct Programs {
    pub(crate) core: PathBuf,
    pub(crate) agent: PathBuf,
    pub(crate) cli: PathBuf,
}

impl Programs {
    /// Takes them from a build of the three packages.
    pub(crate) fn of(built: &Built) -> anyhow::Result<Self> {
        Ok(Self {
            core: built.executable("cnsmo-core")?,
            agent: built.executable("cnsmo-agent")?,
            cli: built.executable("cnsmo")?,
        })
    }
}

/// Starts the programs, and knows where their files are. Dropping it removes the files.
#[derive(Debug)]
pub(crate) struct Control {
    pub(crate) programs: Programs,
    dir: RunDir,
}

impl Control {
    /// Nothing runs yet. `label` is part of the folder's name.
    pub(crate) fn new(programs: Programs, label: &str) -> anyhow::Result<Self> {
        Ok(Self { programs, dir: RunDir::new(label)? })
    }

    /// Folder of logs, sockets and state.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The core's socket for operators.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir().join("core.sock")
    }

    /// Folder of the core's state.
    pub(crate) fn core_state(&self) -> PathBuf {
        self.dir().join("core")
    }

    /// Folder of an agent's state.
    pub(crate) fn agent_state(&self, vm: &str) -> PathBuf {
        self.dir().join(format!("agent-{vm}"))
    }

    /// What [`Control::make_token`] made.
    pub(crate) fn token_file(&self) -> PathBuf {
        self.dir().join("token")
    }

    /// Where a process writes to.
    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.dir().join(format!("{name}.log"))
    }

    /// Starts the core inside, or starts it again, and waits until it serves.
    pub(crate) fn start_core(&self, netns: &Netns, listen: SocketAddr) -> anyhow::Result<Process> {
        let mut command = netns.command(&self.programs.core)?;
        command
            .arg("--state-dir")
            .arg(self.core_state())
            .args(["--listen", &listen.to_string()])
            .arg("--socket")
            .arg(self.socket());
        let mut core = Process::spawn("cnsmo-core", &mut command, &self.log("core"))?;
        core.wait_for("ready", START_LIMIT)?;
        Ok(core)
    }

    /// Makes a join token for so many VMs.
    pub(crate) fn make_token(&self, uses: usize) -> anyhow::Result<()> {
        let (uses, file) = (uses.to_string(), self.token_file().display().to_string());
        self.cli_ok(&["token", "create", "--max-uses", &uses, "--ttl", "1h", "--output", &file])
            .map(drop)
    }

    /// Starts the agent of `vm` inside, with the token that was made.
    pub(crate) fn start_agent(
        &self,
        (vm, netns): (&str, &Netns),
        core: SocketAddr,
        labels: &str,
        pins: &PinDir,
    ) -> anyhow::Result<Process> {
        let core = core.to_string();
        let mut command = netns.command(&self.programs.agent)?;
        command
            .args(["--core", &core, "--node", vm, "--interface", "eth0", "--label", labels])
            .arg("--token-file")
            .arg(self.token_file())
            .arg("--state-dir")
            .arg(self.agent_state(vm))
            .arg("--bpffs")
            .arg(pins.path());
        Process::spawn("cnsmo-agent", &mut command, &self.log(vm))
    }

    /// Waits until the core calls these VMs ready. If not all of them are in time, what it says instead is returned.
    pub(crate) fn wait_ready(
        &self,
        wanted: &[&str],
        limit: Duration,
    ) -> anyhow::Result<Option<String>> {
        let mut seen = String::new();
        let all = interrupt::wait_until(limit, || {
            let output = self.cli(&["nodes", "-o", "json"])?;
            seen = said(&output);
            let ready = ready_nodes(&String::from_utf8_lossy(&output.stdout));
            Ok(wanted.iter().all(|vm| ready.iter().any(|name| name == vm)))
        })?;
        Ok((!all).then_some(seen))
    }

    /// Runs the operator's command line.
    pub(crate) fn cli(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let mut command = Command::new(&self.programs.cli);
        command.arg("--socket").arg(self.socket()).args(arguments);
        let output = shell::capture(&mut command)?;
        interrupt::check()?;
        Ok(output)
    }

    /// As [`Control::cli`], and it must succeed. Returns its standard output.
    pub(crate) fn cli_ok(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.cli(arguments)?;
        let command = arguments.join(" ");
        ensure!(output.status.success(), "cnsmo {command} failed\n{}", said(&output).trim_end());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Writes a manifest and returns its path.
    pub(crate) fn manifest(&self, name: &str, text: &str) -> anyhow::Result<String> {
        let path = self.dir().join(name);
        shell::write(&path, text)?;
        Ok(path.display().to_string())
    }

    /// What `cnsmo get KIND [NAME] -o json` prints.
    pub(crate) fn get(&self, what: &[&str]) -> anyhow::Result<Value> {
        let command = [&["get"], what, &["-o", "json"]].concat();
        let text = self.cli_ok(&command)?;
        serde_json::from_str(&text)
            .with_context(|| format!("reading `cnsmo {}`", command.join(" ")))
    }

    /// Copies the logs out of the folder, which will not stay.
    pub(crate) fn keep_logs(&self, to: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(to).with_context(|| format!("making {}", to.display()))?;
        for log in shell::files(self.dir())? {
            if let (Some("log"), Some(name)) =
                (log.extension().and_then(|e| e.to_str()), log.file_name())
            {
                std::fs::copy(&log, to.join(name)).context("keeping a log")?;
            }
        }
        Ok(())
    }
}

/// What a program wrote, errors first.
pub(crate) fn said(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    errors.into_owned() + &String::from_utf8_lossy(&output.stdout)
}

/// Names of the nodes whose phase is READY in `cnsmo nodes -o json`. Empty while the core does not answer.
fn ready_nodes(json: &str) -> Vec<String> {
    let Ok(value) = serde_json::from_str::<Value>(json) else { return Vec::new() };
    let list = value.as_array().or_else(|| value["items"].as_array());
    let nodes = list.into_iter().flatten();
    nodes
        .filter(|node| {
            let phase = node["status"]["phase"].as_str().unwrap_or_default();
            phase.eq_ignore_ascii_case("ready") || phase == "PHASE_READY"
        })
        .filter_map(|node| Some(node["metadata"]["name"].as_str()?.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ready_nodes_count() {
        let json = r#"{"items":[
            {"metadata":{"name":"web1"},"status":{"phase":"READY"}},
            {"metadata":{"name":"web2"},"status":{"phase":"JOINING"}},
            {"metadata":{"name":"db1"}}]}"#;
        assert_eq!(ready_nodes(json), ["web1"]);
        assert!(ready_nodes("connection refused").is_empty());
    }
}
