//! What this machine needs to build, run and test: `setup` installs what is missing, `doctor` only says so.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context as _, bail, ensure};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::Uid,
};

use crate::{
    cargo::{self, cargo},
    interrupt,
    netns::BPFFS,
    progress, shell,
};

/// The oldest kernel the data path is tested on.
const KERNEL_MIN: (u32, u32) = (6, 1);
const BPF_LINKER: &str = "0.13.0";
/// bpf-linker's LLVM must not be older than the compiler's.
const LLVM: &str = "/usr/lib/llvm-22";
/// What the example in Python is made of.
const PYTHON_REQUIREMENTS: &str = "examples/python/requirements.txt";
/// Debian puts it beside other versions, not on the PATH.
const POSTGRES: &str = "/usr/lib/postgresql/15/bin/postgres";
/// Read by the package's scripts: tests start servers of their own, and the machine needs none.
const POSTGRES_CLUSTERS: &str = "/etc/postgresql-common/createcluster.d";
/// Not on the PATH. Its package does not make it the machine's own.
const SYSTEMD: &str = "/lib/systemd/systemd";
const BTF: &str = "/sys/kernel/btf/vmlinux";

/// How much of the project is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Scope {
    /// Build everything and run a fleet.
    Run,
    /// Also what the tests and benchmarks compare with.
    Test,
    /// Also kernels under QEMU.
    All,
}

/// A program, the Debian package it is in, and what it is for.
struct Tool {
    program: &'static str,
    package: &'static str,
    purpose: &'static str,
    scope: Scope,
}

const fn tool(
    scope: Scope,
    program: &'static str,
    package: &'static str,
    purpose: &'static str,
) -> Tool {
    Tool { program, package, purpose, scope }
}

const TOOLS: &[Tool] = &[
    tool(Scope::Run, "cc", "build-essential", "C compiler and linker"),
    tool(Scope::Run, "ip", "iproute2", "network namespaces"),
    tool(Scope::Run, "curl", "curl", "HTTP client of the checks"),
    tool(Scope::Run, "nmap", "nmap", "port scanner of the checks"),
    tool(Scope::Run, "ping", "iputils-ping", "ICMP client of the checks"),
    tool(Scope::Run, "python3", "python3", "HTTP server of the checks"),
    tool(Scope::Run, "tcpdump", "tcpdump", "witness of the checks"),
    tool(Scope::Test, "nft", "nftables", "peer of the tests and benchmarks"),
    tool(Scope::Test, "iptables-restore", "iptables", "peer of the tests"),
    tool(Scope::Test, "ethtool", "ethtool", "switches of devices in the benchmarks"),
    tool(Scope::Test, "etcd", "etcd-server", "peer of the benchmarks"),
    tool(Scope::Test, "haproxy", "haproxy", "peer of the benchmarks"),
    tool(Scope::Test, "iperf3", "iperf3", "load of the tests"),
    tool(Scope::Test, "nc", "netcat-openbsd", "client of the tests"),
    tool(Scope::Test, POSTGRES, "postgresql-15", "second engine of the core's state"),
    tool(Scope::Test, SYSTEMD, "systemd", "runs units in the tests"),
    tool(Scope::Test, "dbus-daemon", "dbus-daemon", "bus of the tests' systemd"),
    tool(Scope::Test, "wireguard-go", "wireguard-go", "peer of the tests and benchmarks"),
    tool(Scope::All, "qemu-system-x86_64", "qemu-system-x86", "other kernels"),
    tool(Scope::All, "dpkg-deb", "dpkg", "unpacking kernels"),
    tool(Scope::All, "xz", "xz-utils", "unpacking their modules"),
];

/// Compiler of the eBPF programs, where rustup has no nightly with the source of `core`.
const BPF_COMPILER: &[&str] = &["rustc-web", "cargo-web", "rust-web-src"];
const BPF_LINKER_LLVM: &[&str] = &["llvm-22-dev", "libpolly-22-dev"];

/// One thing that is missing: said by both commands.
struct Missing {
    what: String,
    /// Installed by `setup` with apt.
    packages: Vec<&'static str>,
}

/// Installs what is missing for `scope`; says first what and why. Safe to repeat.
///
/// # Errors
/// One sentence and its remedy when this machine cannot go on.
pub(crate) fn setup(scope: Scope) -> anyhow::Result<()> {
    for check in machine() {
        check.map_err(|remedy| anyhow::anyhow!(remedy))?;
    }
    let missing = missing(scope);
    let linker = bpf_linker_missing();
    if missing.is_empty() && !linker && bpffs_mounted()? {
        return python(scope);
    }
    progress::heading("Setting up this machine");
    for missing in &missing {
        progress::say(&format!(
            "  needs {} (package {})",
            missing.what,
            missing.packages.join(" ")
        ));
    }
    if linker {
        progress::say(&format!(
            "  needs bpf-linker {BPF_LINKER}: links the eBPF programs (cargo install)"
        ));
    }
    let packages: Vec<_> = missing.iter().flat_map(|missing| missing.packages.clone()).collect();
    if !packages.is_empty() {
        if packages.contains(&"postgresql-15") {
            keep_postgres_from_starting()?;
        }
        apt_install(&packages)?;
    }
    if linker {
        install_bpf_linker()?;
    }
    mount_bpffs()?;
    python(scope)
}

/// The program of a crate that nothing packages, built once below the target folder.
///
/// # Errors
/// The crate cannot be fetched or built.
pub(crate) fn cargo_program(krate: &str, version: &str, program: &str) -> anyhow::Result<PathBuf> {
    let target = cargo::metadata()?.target_directory;
    let folder = target.join("peers").join(format!("{krate}-{version}"));
    let path = folder.join("bin").join(program);
    if path.exists() {
        return Ok(path);
    }
    progress::heading(&format!("Building {krate} {version} to compare with, once"));
    let mut install = cargo();
    install
        .args(["install", krate, "--locked", "--version", &format!("={version}"), "--root"])
        .arg(&folder);
    shell::run(&mut install).with_context(|| format!("installing {krate}"))?;
    ensure!(path.exists(), "cargo installed {krate}, but there is no {}", path.display());
    Ok(path)
}

/// Prints one line for each requirement, with the remedy where it is not met, and changes nothing.
pub(crate) fn doctor() -> anyhow::Result<()> {
    let mut bad = 0;
    let mut line = |what: &str, remedy: Option<String>| match remedy {
        None => println!("ok       {what}"),
        Some(remedy) => {
            bad += 1;
            println!("missing  {what}: {remedy}");
        }
    };
    for check in machine() {
        match check {
            Ok(fact) => line(&fact, None),
            Err(remedy) => line("machine", Some(remedy)),
        }
    }
    let compiler = (!has_bpf_compiler()).then(|| {
        format!(
            "rustup toolchain install nightly --component rust-src, or apt-get install {}",
            BPF_COMPILER.join(" ")
        )
    });
    line("compiler with the source of `core`, for eBPF", compiler);
    line(
        &format!("bpf-linker {BPF_LINKER}"),
        bpf_linker_missing().then(|| "cargo xtask setup".to_owned()),
    );
    for tool in TOOLS {
        let remedy = shell::find(tool.program).is_none();
        line(
            &format!("{} ({})", tool.program, tool.purpose),
            remedy.then(|| format!("apt-get install {}", tool.package)),
        );
    }
    line(
        "static busybox (other kernels)",
        (!has_static_busybox()).then(|| "apt-get install busybox-static".to_owned()),
    );
    let unmounted = !bpffs_mounted()?;
    line(
        &format!("BPF file system at {BPFFS}"),
        unmounted.then(|| format!("mount -t bpf bpf {BPFFS}")),
    );
    ensure!(bad == 0, "{bad} of the requirements are not met; `cargo xtask setup` as root helps");
    Ok(())
}

/// An error with the command that would work, unless this is root.
pub(crate) fn need_root(command: &str) -> anyhow::Result<()> {
    ensure!(
        Uid::effective().is_root(),
        "`cargo xtask {command}` makes network namespaces and loads eBPF programs, which needs root: \
         run it in a root shell (`sudo -s`)"
    );
    Ok(())
}

/// What no package can change: a fact each, or the remedy.
fn machine() -> Vec<Result<String, String>> {
    let mut checks = vec![kernel_version()];
    checks.push(if Path::new(BTF).exists() {
        Ok("type information of the kernel (BTF)".to_owned())
    } else {
        Err(format!(
            "{BTF} is not there: boot a kernel with CONFIG_DEBUG_INFO_BTF=y, as Debian's are"
        ))
    });
    checks.push(if Uid::effective().is_root() {
        namespaces()
    } else {
        Err("not root: run it in a root shell (`sudo -s`)".to_owned())
    });
    checks
}

fn kernel_version() -> Result<String, String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let (major, minor) = KERNEL_MIN;
    if parse_release(release).is_some_and(|version| version >= KERNEL_MIN) {
        return Ok(format!("Linux {release} ({major}.{minor} or newer)"));
    }
    Err(format!("Linux {release} is too old: boot {major}.{minor} or newer"))
}

fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn namespaces() -> Result<String, String> {
    let tried = thread::spawn(|| unshare(CloneFlags::CLONE_NEWNET)).join();
    match tried {
        Ok(Ok(())) => Ok("network namespaces".to_owned()),
        Ok(Err(error)) => Err(format!(
            "this root may not make network namespaces ({error}): in a container, run it with --privileged"
        )),
        Err(_) => Err("the test for network namespaces panicked".to_owned()),
    }
}

fn missing(scope: Scope) -> Vec<Missing> {
    let mut missing = Vec::new();
    let mut need = |what: String, packages: &[&'static str]| {
        missing.push(Missing { what, packages: packages.to_vec() });
    };
    for tool in TOOLS.iter().filter(|tool| tool.scope <= scope) {
        if shell::find(tool.program).is_none() {
            need(format!("{}: {}", tool.program, tool.purpose), &[tool.package]);
        }
    }
    if scope == Scope::All && !has_static_busybox() {
        need(
            "busybox, static: user space of the kernels under test".to_owned(),
            &["busybox-static"],
        );
    }
    if !has_bpf_compiler() {
        need(
            "a compiler with the source of `core`: builds the eBPF programs".to_owned(),
            BPF_COMPILER,
        );
    }
    if bpf_linker_missing() && !Path::new(LLVM).join("lib/libPolly.a").exists() {
        need("LLVM 22 to build bpf-linker with".to_owned(), BPF_LINKER_LLVM);
    }
    missing
}

fn apt_install(packages: &[&str]) -> anyhow::Result<()> {
    ensure!(
        shell::find("apt-get").is_some(),
        "this is no Debian (apt-get is missing): install the equivalents of `{}` yourself, \
         then `cargo xtask doctor` must be content",
        packages.join(" ")
    );
    let install = || {
        let mut apt = Command::new("apt-get");
        apt.args(["install", "--yes", "--no-install-recommends"]).args(packages);
        shell::read(apt.env("DEBIAN_FRONTEND", "noninteractive"))
    };
    let known = shell::capture(Command::new("apt-cache").arg("show").args(packages))?;
    if !known.status.success() {
        update()?;
    }
    let text = format!("apt-get install {}", packages.join(" "));
    let result = progress::step(&text, || {
        install().or_else(|first| {
            interrupt::check()?;
            // The usual reason: lists older than the archive.
            shell::read(Command::new("apt-get").arg("update")).map_err(|_| first)?;
            install()
        })
    });
    result
        .map(drop)
        .context("installing packages: is the network there, and `apt-get update` content?")
}

/// Debian's package makes a server's folder and starts it, unless it is told otherwise before.
fn keep_postgres_from_starting() -> anyhow::Result<()> {
    let folder = Path::new(POSTGRES_CLUSTERS);
    let write = || {
        fs::create_dir_all(folder)?;
        fs::write(folder.join("cnsmo.conf"), "create_main_cluster = false\n")
    };
    write().with_context(|| format!("writing to {POSTGRES_CLUSTERS}"))
}

fn update() -> anyhow::Result<()> {
    progress::step("apt-get update", || shell::read(Command::new("apt-get").arg("update")))
        .map(drop)
        .context("refreshing the package lists: is the network there?")
}

/// The Python of the example with its packages, made once below the target folder, and again when other ones are asked for.
fn python(scope: Scope) -> anyhow::Result<()> {
    if scope < Scope::Test {
        return Ok(());
    }
    let folder = cargo::metadata()?.target_directory.join("python");
    let requirements = shell::root().join(PYTHON_REQUIREMENTS);
    let wanted = shell::text(&requirements)?;
    let made_of = folder.join("requirements.txt");
    if fs::read_to_string(&made_of).is_ok_and(|made_of| made_of == wanted) {
        return Ok(());
    }
    let mut can_make = Command::new("python3");
    if shell::read(can_make.args(["-c", "import ensurepip"])).is_err() {
        apt_install(&["python3-venv"])?;
    }
    progress::step("Python packages of the example", || {
        shell::read(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
        let mut pip = Command::new(folder.join("bin/pip"));
        shell::read(pip.args(["install", "--quiet", "--requirement"]).arg(&requirements))
    })
    .context("installing Python packages: is the network there?")?;
    shell::write(&made_of, wanted)
}

fn has_bpf_compiler() -> bool {
    // The same search as cnsmo-agent/build.rs.
    let mut nightly = Command::new("rustup");
    nightly.args(["run", "nightly", "rustc"]);
    has_core_source(nightly) || has_core_source(Command::new("/usr/bin/rustc"))
}

fn has_core_source(mut rustc: Command) -> bool {
    let rustc = rustc.args(["--print", "sysroot"]).env_remove("RUSTUP_TOOLCHAIN");
    let Ok(output) = rustc.stderr(Stdio::null()).output() else { return false };
    let sysroot = String::from_utf8_lossy(&output.stdout);
    let source = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml");
    output.status.success() && source.exists()
}

fn bpf_linker_missing() -> bool {
    let output = Command::new("bpf-linker").arg("--version").stderr(Stdio::null()).output();
    let Ok(output) = output else { return true };
    let version = String::from_utf8_lossy(&output.stdout);
    version.split_whitespace().nth(1) != Some(BPF_LINKER)
}

fn install_bpf_linker() -> anyhow::Result<()> {
    progress::say(&format!("  ...   cargo install bpf-linker {BPF_LINKER}"));
    let mut install = cargo();
    install
        .args(["install", "bpf-linker", "--locked", "--version", &format!("={BPF_LINKER}")])
        .args(["--no-default-features", "--features", "llvm-22"])
        // Without it the wrong LLVM's folder is searched.
        .env("LLVM_PREFIX", LLVM);
    shell::run(&mut install).context("installing bpf-linker")?;
    if bpf_linker_missing() {
        bail!("bpf-linker was installed but PATH does not find it: add ~/.cargo/bin to PATH");
    }
    Ok(())
}

fn has_static_busybox() -> bool {
    let Some(path) = shell::find("busybox") else { return false };
    let Ok(bytes) = fs::read(path) else { return false };
    // A dynamic program names its loader.
    !bytes.windows(10).any(|window| window == b"/ld-linux-")
}

fn bpffs_mounted() -> anyhow::Result<bool> {
    let mounts = shell::text(Path::new("/proc/self/mounts"))?;
    Ok(mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some(BPFFS) && fields.next() == Some("bpf")
    }))
}

fn mount_bpffs() -> anyhow::Result<()> {
    if bpffs_mounted()? {
        return Ok(());
    }
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>)
        .map_err(io::Error::from)
        .with_context(|| format!("mounting the BPF file system at {BPFFS}"))?;
    progress::say(&format!("  ok    mounted the BPF file system at {BPFFS}"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_compare_by_number() {
        assert_eq!(parse_release("6.1.0-56-cloud-amd64"), Some((6, 1)));
        assert_eq!(parse_release("5.10.0"), Some((5, 10)));
        assert_eq!(parse_release("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(parse_release("unknown"), None);
        assert!(parse_release("6.12.1").unwrap() > KERNEL_MIN);
        assert!(parse_release("5.15.1").unwrap() < KERNEL_MIN);
    }
}
