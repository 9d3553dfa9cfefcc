//! Calls of cargo, asked where it puts things instead of guessing.

use std::{
    collections::BTreeMap,
    env,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};
use serde::Deserialize;

use crate::{interrupt, shell};

/// What a build made.
#[derive(Debug, Default)]
pub(crate) struct Built {
    /// Executables by target name.
    executables: BTreeMap<String, PathBuf>,
    /// Output folders of build scripts, by package name.
    out_dirs: BTreeMap<String, PathBuf>,
}

impl Built {
    /// The executable of a binary or test target.
    pub(crate) fn executable(&self, target: &str) -> anyhow::Result<PathBuf> {
        self.executables
            .get(target)
            .cloned()
            .with_context(|| format!("cargo built no executable `{target}`"))
    }

    /// The folder a package's build script wrote to.
    pub(crate) fn out_dir(&self, package: &str) -> anyhow::Result<PathBuf> {
        self.out_dirs
            .get(package)
            .cloned()
            .with_context(|| format!("cargo ran no build script of `{package}`"))
    }
}

/// One package of the workspace.
#[derive(Debug, Deserialize)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) manifest_path: PathBuf,
    pub(crate) dependencies: Vec<Dependency>,
}

/// One entry of a manifest's dependencies.
#[derive(Debug, Deserialize)]
pub(crate) struct Dependency {
    pub(crate) name: String,
}

/// What `cargo metadata --no-deps` says.
#[derive(Debug, Deserialize)]
pub(crate) struct Metadata {
    pub(crate) packages: Vec<Package>,
    pub(crate) target_directory: PathBuf,
}

/// The cargo that runs this program.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(shell::root());
    // `cargo run` sets these for this package; a build script that reads them must not see them.
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_")) {
            command.env_remove(name);
        }
    }
    command.env_remove("CARGO_MANIFEST_DIR").env_remove("CARGO_MANIFEST_PATH");
    command
}

/// The workspace.
pub(crate) fn metadata() -> anyhow::Result<Metadata> {
    let text =
        shell::read(cargo().args(["metadata", "--locked", "--no-deps", "--format-version=1"]))?;
    serde_json::from_str(&text).context("reading the output of cargo metadata")
}

/// Runs `cargo build` or `cargo test --no-run` with cargo's progress on the terminal.
pub(crate) fn build(command: &mut Command) -> anyhow::Result<Built> {
    command.args(["--locked", "--message-format=json-render-diagnostics"]);
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting {}", shell::show(command)))?;
    interrupt::check()?;
    if !output.status.success() {
        bail!("{} failed ({})", shell::show(command), output.status);
    }
    parse(&String::from_utf8_lossy(&output.stdout))
}

#[derive(Deserialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
enum Message {
    CompilerArtifact {
        target: Target,
        executable: Option<PathBuf>,
    },
    BuildScriptExecuted {
        package_id: String,
        out_dir: PathBuf,
    },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

fn parse(messages: &str) -> anyhow::Result<Built> {
    let mut built = Built::default();
    // Build scripts' own lines may be between; all of cargo's are objects.
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        match serde_json::from_str(line).context("reading a message of cargo")? {
            Message::CompilerArtifact { target, executable: Some(path) } => {
                built.executables.insert(target.name, path);
            }
            Message::BuildScriptExecuted { package_id, out_dir } => {
                built.out_dirs.insert(package_name(&package_id).to_owned(), out_dir);
            }
            Message::CompilerArtifact { executable: None, .. } | Message::Other => {}
        }
    }
    Ok(built)
}

/// The name in a package id: `path+file:///x/name#1.0.0` or `...#name@1.0.0`.
fn package_name(id: &str) -> &str {
    let (source, fragment) = id.split_once('#').unwrap_or((id, ""));
    match fragment.split_once('@') {
        Some((name, _)) => name,
        None => source.rsplit('/').next().unwrap_or(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_ids_of_both_forms_give_the_name() {
        assert_eq!(package_name("path+file:///src/cnsmo-agent#0.1.0"), "cnsmo-agent");
        assert_eq!(package_name("path+file:///src/tests#cnsmo-tests@0.1.0"), "cnsmo-tests");
        assert_eq!(package_name("registry+https://index#libc@0.2.1"), "libc");
    }

    #[test]
    fn messages_give_executables_and_folders() {
        let built = parse(concat!(
            r#"{"reason":"compiler-artifact","target":{"name":"cnsmo"},"executable":"/t/cnsmo"}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"lib"},"executable":null}"#,
            "\nnoise\n",
            r#"{"reason":"build-script-executed","package_id":"path+file:///w/agent#0.1.0","out_dir":"/t/out"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        ))
        .unwrap();
        assert_eq!(built.executable("cnsmo").unwrap(), PathBuf::from("/t/cnsmo"));
        assert_eq!(built.out_dir("agent").unwrap(), PathBuf::from("/t/out"));
        assert!(built.executable("lib").is_err());
    }
}
