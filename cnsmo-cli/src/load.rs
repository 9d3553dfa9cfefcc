//! Reads the files that a command names.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use cnsmo_proto::{
    manifest::{self, FILE_BYTES_MAX, Original},
    pb::resource::Resource,
};

use crate::{
    args::OriginalArgs,
    output::{kind_of, kind_word, name_of},
};

/// The resources of all files, each resource once; or all that is wrong with any of them.
pub(crate) fn resources(paths: &[PathBuf], original: OriginalArgs) -> Result<Vec<Resource>> {
    let original = Original { name: original.name, target: original.target };
    let mut resources = Vec::new();
    let mut first_of: BTreeMap<_, String> = BTreeMap::new();
    let mut errors = Vec::new();
    for path in files(paths)? {
        let (file, text) = read(&path)?;
        match manifest::parse(&file, &text, &original) {
            Err(bad) => errors.push(bad.to_string()),
            Ok(parsed) => {
                for note in parsed.notes {
                    writeln!(io::stderr(), "note: {note}")?;
                }
                for resource in parsed.resources {
                    let kind = kind_word(kind_of(&resource));
                    let name = name_of(&resource).to_owned();
                    if let Some(first) = first_of.insert((kind, name.clone()), file.clone()) {
                        errors.push(format!("{file}: {kind} {name}: is in {first} too"));
                    }
                    resources.push(resource);
                }
            }
        }
    }
    if !errors.is_empty() {
        bail!("nothing was sent\n{}", errors.join("\n"));
    }
    Ok(resources)
}

/// Folders stand for the manifests directly in them, by name.
fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let here = || format!("failed to read {}", path.display());
        let mut inside = Vec::new();
        for entry in fs::read_dir(path).with_context(here)? {
            let file = entry.with_context(here)?.path();
            let ending = file.extension().and_then(|ending| ending.to_str());
            if matches!(ending, Some("yaml" | "yml" | "json")) && file.is_file() {
                inside.push(file);
            }
        }
        if inside.is_empty() {
            bail!("{}: no .yaml, .yml or .json file in this folder", path.display());
        }
        inside.sort();
        files.append(&mut inside);
    }
    Ok(files)
}

/// The name for messages, and the text.
pub(crate) fn read(path: &Path) -> Result<(String, String)> {
    if path == Path::new("-") {
        return Ok(("-".to_owned(), bounded(io::stdin().lock(), "standard input")?));
    }
    let name = path.display().to_string();
    let file = File::open(path).with_context(|| format!("failed to open {name}"))?;
    let text = bounded(file, &name)?;
    Ok((name, text))
}

fn bounded(from: impl Read, name: &str) -> Result<String> {
    let mut bytes = Vec::new();
    // One byte more shows that there is more.
    from.take(FILE_BYTES_MAX as u64 + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("failed to read {name}"))?;
    if bytes.len() > FILE_BYTES_MAX {
        bail!("{name}: longer than {} MiB", FILE_BYTES_MAX >> 20);
    }
    String::from_utf8(bytes).map_err(|error| {
        anyhow::anyhow!("{name}: byte {} is not UTF-8", error.utf8_error().valid_up_to())
    })
}
