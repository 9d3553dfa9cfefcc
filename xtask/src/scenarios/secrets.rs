//! The private keys of the tunnels stay on their VMs.

use std::{fs, path::Path};

use anyhow::{Context as _, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use memchr::memmem::Finder;

use super::get;
use crate::{
    capture::Recording,
    checks::Report,
    fleet::{Fleet, vms},
    shell,
};

/// Of X25519.
const KEY_BYTES: usize = 32;

/// Neither the core's files nor the network nor any process's arguments and environment have them.
pub(crate) fn keys(
    fleet: &Fleet,
    traffic: &[Recording],
    report: &mut Report,
) -> anyhow::Result<()> {
    let mut private = Vec::new();
    for vm in vms() {
        private.extend(forms(&private_key(fleet, vm)?));
    }
    let mut files = Vec::new();
    for file in shell::files(&fleet.core_state())? {
        files.push(fs::read(&file).with_context(|| format!("reading {}", file.display()))?);
    }
    report.add("private keys in the core's files", "0", &count(&files, &private).to_string());
    let mut seen = 0;
    for recording in traffic {
        for key in &private {
            seen += recording.count(key)?;
        }
    }
    report.add("private keys in captured traffic", "0", &seen.to_string());
    let processes = processes(fleet)?;
    let seen = count(&processes, &private).to_string();
    report.add("private keys in arguments and environments", "0", &seen);

    // That something can be found there at all.
    let public = forms(&public_key(fleet, "web1")?);
    let found = if count(&files, &public) > 0 { "found" } else { "not found" };
    report.add("the public key of web1 in the core's files", "found", found);
    let state = vec![fleet.agent_state("web1").display().to_string().into_bytes()];
    let found = if count(&processes, &state) > 0 { "found" } else { "not found" };
    report.add("the state folder of web1 in arguments", "found", found);
    Ok(())
}

/// How many of `texts` contain one of `needles`.
fn count(texts: &[Vec<u8>], needles: &[Vec<u8>]) -> usize {
    let finders: Vec<_> = needles.iter().map(Finder::new).collect();
    let has = |text: &&Vec<u8>| finders.iter().any(|finder| finder.find(text).is_some());
    texts.iter().filter(has).count()
}

/// A key as programs may write it.
fn forms(key: &[u8]) -> Vec<Vec<u8>> {
    let hex: String = shell::hex(key);
    let base64 = STANDARD.encode(key);
    vec![
        key.to_vec(),
        hex.to_uppercase().into_bytes(),
        hex.into_bytes(),
        base64.trim_end_matches('=').as_bytes().to_vec(),
    ]
}

/// Reads the key of a VM's tunnel: its name says what moves the packets.
fn private_key(fleet: &Fleet, vm: &str) -> anyhow::Result<Vec<u8>> {
    let files = shell::files(&fleet.agent_state(vm))?;
    let is_key = |path: &Path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("tunnel") && name.ends_with(".key")
    };
    let path = files.into_iter().find(|path| is_key(path));
    let path = path.with_context(|| format!("{vm} has no key for its tunnel"))?;
    let key = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    ensure!(key.len() == KEY_BYTES, "{} has {} bytes", path.display(), key.len());
    Ok(key)
}

fn public_key(fleet: &Fleet, vm: &str) -> anyhow::Result<Vec<u8>> {
    let node = get(fleet, &["node", vm])?;
    let text = node["status"]["overlay"]["publicKey"].as_str();
    let text = text.with_context(|| format!("{vm} shows no public key"))?;
    let key = STANDARD.decode(text);
    key.with_context(|| format!("the public key `{text}` is not understood"))
}

/// Arguments and environment of each process of the fleet.
fn processes(fleet: &Fleet) -> anyhow::Result<Vec<Vec<u8>>> {
    let mut texts = Vec::new();
    for process in fleet.processes()? {
        for file in ["cmdline", "environ"] {
            // One that has ended meanwhile has neither.
            texts.extend(fs::read(format!("/proc/{process}/{file}")));
        }
    }
    ensure!(!texts.is_empty(), "the fleet has no processes");
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_in_each_form() {
        let key = [0xa7; KEY_BYTES];
        for form in forms(&key) {
            let text = [b"before ".as_slice(), &form, b" behind"].concat();
            assert_eq!(count(&[text], &forms(&key)), 1);
        }
        assert_eq!(count(&[vec![0xa7; KEY_BYTES - 1]], &forms(&key)), 0);
    }
}
