//! What a kernel unpacks and starts: busybox, modules, programs and a script.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, ensure};
use object::{Object as _, ObjectSection as _};

use crate::shell;

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
const PROGRAM: u32 = 0o100_755;

/// An initramfs that is being put together.
pub(super) struct Initramfs(Archive);

impl Initramfs {
    /// With busybox, and with these modules and all they need from an unpacked kernel.
    pub(super) fn new(tree: &Path, modules: &[&str]) -> anyhow::Result<Self> {
        let busybox = shell::find("busybox").context("busybox is missing")?;
        let mut this = Self(Archive::default());
        for name in ["bin", "mod", "proc", "sys", "dev", "tmp", "run"] {
            this.folder(name);
        }
        let mut order = String::new();
        for (name, bytes) in load_order(&tree.join("lib/modules"), modules)? {
            this.0.add(&format!("mod/{name}.ko"), FILE, &bytes);
            order = order + &name + "\n";
        }
        this.0.add("mod/order", FILE, order.as_bytes());
        this.program("bin/busybox", &busybox)?;
        Ok(this)
    }

    /// Adds a folder, whose parent is there.
    pub(super) fn folder(&mut self, name: &str) {
        self.0.add(name, FOLDER, &[]);
    }

    /// Adds a file of this host.
    pub(super) fn copy(&mut self, name: &str, from: &Path) -> anyhow::Result<()> {
        self.0.add(name, FILE, &read(from)?);
        Ok(())
    }

    /// Adds a static program of this host.
    pub(super) fn program(&mut self, name: &str, from: &Path) -> anyhow::Result<()> {
        self.0.add(name, PROGRAM, &read(from)?);
        Ok(())
    }

    /// The archive as the kernel reads it, uncompressed. `script` runs once the modules are loaded; the machine ends with it.
    pub(super) fn finish(mut self, script: &str) -> Vec<u8> {
        self.0.add("init", PROGRAM, init(script).as_bytes());
        self.0.finish()
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("reading {}", path.display()))
}

fn init(script: &str) -> String {
    format!(
        "#!/bin/busybox sh\n\
         B=/bin/busybox\n\
         $B mount -t proc p /proc; $B mount -t sysfs s /sys; $B mount -t devtmpfs d /dev\n\
         $B mount -t bpf b /sys/fs/bpf\n\
         echo; echo BOOTED $($B uname -r)\n\
         while read m; do $B insmod /mod/$m.ko || echo \"INSMOD FAIL $m\"; done < /mod/order\n\
         $B mkdir -p /dev/net; [ -e /dev/net/tun ] || $B mknod /dev/net/tun c 10 200\n\
         $B --install -s /bin\n\
         export PATH=/bin RUST_BACKTRACE=1\n\
         {script}\n\
         $B poweroff -f\n"
    )
}

/// Names and bytes of modules with all they need, each after what it needs. Names that have no file are built into the
/// kernel.
fn load_order(modules: &Path, wanted: &[&str]) -> anyhow::Result<Vec<(String, Vec<u8>)>> {
    let mut files = BTreeMap::new();
    for path in shell::files(modules)? {
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(stem) = file.strip_suffix(".ko").or_else(|| file.strip_suffix(".ko.xz")) {
            files.insert(stem.replace('-', "_"), path);
        }
    }
    ensure!(!files.is_empty(), "no modules below {}", modules.display());
    let (mut order, mut seen) = (Vec::new(), BTreeSet::new());
    for name in wanted {
        visit(name, &files, &mut seen, &mut order)?;
    }
    Ok(order)
}

fn visit(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    seen: &mut BTreeSet<String>,
    order: &mut Vec<(String, Vec<u8>)>,
) -> anyhow::Result<()> {
    let name = name.replace('-', "_");
    let Some(path) = files.get(&name) else { return Ok(()) };
    if !seen.insert(name.clone()) {
        return Ok(());
    }
    let module = module(path)?;
    for needed in dependencies(&module)? {
        visit(&needed, files, seen, order)?;
    }
    order.push((name, module));
    Ok(())
}

/// A module as the kernel takes it: busybox loads none that is compressed, as those of newer kernels are.
fn module(path: &Path) -> anyhow::Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return read(path);
    }
    let mut xz = Command::new("xz");
    xz.args(["--decompress", "--stdout"]).arg(path).stdin(Stdio::null());
    let output = xz.output().context("starting xz")?;
    ensure!(output.status.success(), "xz does not unpack {}", path.display());
    Ok(output.stdout)
}

/// What a module's `.modinfo` says it depends on.
fn dependencies(module: &[u8]) -> anyhow::Result<Vec<String>> {
    let file = object::File::parse(module)?;
    let section = file.section_by_name(".modinfo").context("a module without .modinfo")?;
    let text = String::from_utf8_lossy(section.data()?).into_owned();
    let depends = text.split('\0').find_map(|entry| entry.strip_prefix("depends="));
    let names = depends.unwrap_or_default().split(',').filter(|name| !name.is_empty());
    Ok(names.map(str::to_owned).collect())
}

/// A cpio archive in the form "newc", which the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.entries += 1;
        // A file of 4 GiB does not fit into the memory of the VM either.
        let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let links = if mode & 0o040_000 == 0 { 1 } else { 2 };
        let name_size = u32::try_from(name.len()).unwrap_or(u32::MAX) + 1;
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(data);
        self.pad();
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_aligned_and_ends_with_its_trailer() {
        let mut archive = Archive::default();
        archive.add("init", 0o100_755, b"#!/bin/sh");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.starts_with(b"070701"));
        // Header 110 bytes, name 5, padding 1; then the data.
        assert_eq!(&bytes[116..125], b"#!/bin/sh");
        assert!(bytes.windows(11).any(|window| window == b"TRAILER!!!\0"));
    }
}
