//! The committed code that the .proto files give.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, bail};

use crate::{cargo::cargo, netns::RunDir, progress, shell};

const GENERATED: &str = "cnsmo-proto/src/generated";

/// Writes the generated code, or with `check` fails if the committed one differs.
pub(crate) fn main(check: bool) -> anyhow::Result<()> {
    let target = shell::root().join(GENERATED);
    if !check {
        return generate(&target);
    }
    let fresh = RunDir::new("codegen")?;
    generate(fresh.path())?;
    let differing = differing(fresh.path(), &target)?;
    if !differing.is_empty() {
        bail!("{} in {GENERATED}: run `cargo xtask codegen` and commit", differing.join(", "));
    }
    progress::say("  ok    generated code is what the .proto files give");
    Ok(())
}

fn generate(folder: &Path) -> anyhow::Result<()> {
    let mut command = cargo();
    command.args(["run", "--quiet", "--locked", "--package=cnsmo-proto", "--features=codegen"]);
    shell::run(command.args(["--bin=codegen", "--"]).arg(folder))?;
    let mut rustfmt = Command::new("rustfmt");
    rustfmt.args(["--edition=2024", "--config-path"]).arg(shell::root().join("rustfmt.toml"));
    shell::run(rustfmt.args(shell::files(folder)?))
}

/// What is other in the second folder than in the first, one text for each file.
fn differing(fresh: &Path, committed: &Path) -> anyhow::Result<Vec<String>> {
    let mut differing = Vec::new();
    let fresh_files = shell::files(fresh)?;
    for file in &fresh_files {
        let name = file.strip_prefix(fresh).context("a file outside of its folder")?;
        let old = committed.join(name);
        if !old.exists() {
            differing.push(format!("{} is missing", name.display()));
        } else if fs::read(file)? != fs::read(old)? {
            differing.push(format!("{} is stale", name.display()));
        }
    }
    for file in shell::files(committed)? {
        let name = file.strip_prefix(committed).context("a file outside of its folder")?;
        if !fresh.join(name).exists() {
            differing.push(format!("{} is of no .proto file", name.display()));
        }
    }
    Ok(differing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_missing_and_left_over_files_are_named() {
        let (fresh, committed) = (RunDir::new("fresh").unwrap(), RunDir::new("old").unwrap());
        for (folder, name, text) in [
            (&fresh, "same.rs", "a"),
            (&fresh, "stale.rs", "a"),
            (&fresh, "new.rs", "a"),
            (&committed, "same.rs", "a"),
            (&committed, "stale.rs", "b"),
            (&committed, "old.rs", "a"),
        ] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        assert_eq!(
            differing(fresh.path(), committed.path()).unwrap(),
            ["new.rs is missing", "stale.rs is stale", "old.rs is of no .proto file"]
        );
    }
}
