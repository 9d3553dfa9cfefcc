//! `cargo xtask vm`: the kernel tests inside a kernel we promise, under QEMU.
//!
//! A Debian kernel is unpacked from its package, never installed. Its initramfs holds busybox, the modules in the order
//! of their dependencies, and the tests as one static program; the results come back over the serial console. Then the
//! same kernel, with a network card, joins a fleet of this host.

mod initramfs;
mod join;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use clap::ValueEnum;
use ring::digest::{SHA256, digest};

use self::initramfs::Initramfs;
use crate::{
    cargo::{self, cargo},
    interrupt,
    process::Process,
    progress, setup, shell,
};

/// Boot and tests on an emulated CPU that others share.
const LIMIT: Duration = Duration::from_mins(10);
const QEMU: &str = "qemu-system-x86_64";
const MEMORY_MIB: &str = "1024";
/// A panic ends the machine. On a host that is busy the kernel finds its emulated timer too slow, and would give up.
const APPEND: &str = "console=ttyS0 quiet panic=-1 no_timer_check";
/// Modules without which no namespace has devices and no program attaches to them.
const MODULES: &[&str] = &["veth", "tun", "sch_ingress", "cls_bpf", "wireguard"];
/// Tests that are about the kernel, by the module they are in.
const FILTER: &str = "kernel::";
/// Those of them that show that a kernel takes every program.
const VERIFIER_FILTER: &str = "kernel::verifier::";
/// How often a kernel that panics before it has booted is started anew: emulators do not run every one without fault.
const BOOTS_MAX: usize = 3;
/// What the test of the tunnel says if the kernel's WireGuard was on one end.
const TUNNEL: &str = "moved by Kernel and Engine";

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Debian's kernel to boot
    #[arg(long, value_enum, default_value = "6.1")]
    kernel: Kernel,
    /// Boot this static program instead of the tests
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Leave out the tests: only let the kernel join a fleet of this host
    #[arg(long, conflicts_with = "program")]
    join: bool,
}

/// A kernel of a Debian release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kernel {
    /// Debian 12: all tests about the kernel, and a fleet
    #[value(name = "6.1")]
    V6_1,
    /// The newer one of Debian 12: whether it takes every program
    #[value(name = "6.12")]
    V6_12,
}

/// A package, pinned.
struct Pin {
    package: &'static str,
    version: &'static str,
    sha256: &'static str,
    /// Code name of the release that has it.
    release: &'static str,
}

impl Kernel {
    fn pin(self) -> Pin {
        match self {
            Self::V6_1 => Pin {
                package: "linux-image-6.1.0-56-cloud-amd64",
                version: "6.1.192-2",
                sha256: "e7d02b943971edcb8790e256c02cfab3bca6c3d37c1bf25392a57c71300615ee",
                release: "bookworm",
            },
            Self::V6_12 => Pin {
                package: "linux-image-6.12.117+deb12-cloud-amd64",
                version: "6.12.117-1~deb12u1",
                sha256: "5195b288dec79e2981d6b84457f38b7ce7310a2d702930ec7d07209c7f78ce37",
                release: "bookworm",
            },
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        }
    }

    /// QEMU's CPU and their number. With `cmpxchg16b`, or with two CPUs, 6.12 dies of double faults in QEMU 7.2 without
    /// KVM.
    fn cpu(self) -> [&'static str; 2] {
        match self {
            Self::V6_1 => ["max", "2"],
            Self::V6_12 => ["max,cx16=off", "1"],
        }
    }

    fn tests(self) -> &'static str {
        match self {
            Self::V6_1 => FILTER,
            Self::V6_12 => VERIFIER_FILTER,
        }
    }
}

pub(crate) fn main(options: &Options) -> anyhow::Result<()> {
    setup::need_root("vm")?;
    setup::setup(setup::Scope::All)?;
    match &options.program {
        None if options.join => join::run(options.kernel, &build()?.executable("cnsmo-agent")?),
        None => run(options.kernel),
        Some(program) => boot(options.kernel, program).map(drop),
    }
}

/// Runs the tests about the kernel inside `kernel`, and lets that of Debian 12 join a fleet of this host.
pub(crate) fn run(kernel: Kernel) -> anyhow::Result<()> {
    progress::heading(&format!("Kernel tests inside Debian's {}", kernel.name()));
    let built = build()?;
    let console = boot(kernel, &built.executable("main")?)?;
    ensure!(passed(&console) > 0, "no test is in `{}`: nothing was tested", kernel.tests());
    if kernel == Kernel::V6_12 {
        return Ok(());
    }
    ensure!(console.contains(TUNNEL), "the kernel's WireGuard was not tested");
    join::run(kernel, &built.executable("cnsmo-agent")?)
}

/// Tests and agent as static programs.
fn build() -> anyhow::Result<cargo::Built> {
    let folder = cache()?.join("static");
    cargo::build(
        cargo()
            .args(["build", "--package=cnsmo-tests", "--test=main"])
            .args(["--package=cnsmo-agent", "--bin=cnsmo-agent"])
            // Naming the target keeps the flags away from build scripts and procedural macros.
            .args(["--target=x86_64-unknown-linux-gnu", "--target-dir"])
            .arg(folder)
            .env(
                "RUSTFLAGS",
                "-Ctarget-feature=+crt-static -Crelocation-model=static -Cstrip=symbols",
            ),
    )
}

/// How many tests passed, as their summary says.
fn passed(console: &str) -> u32 {
    let summary = console.split("test result: ok. ").nth(1);
    summary.and_then(|text| text.split(' ').next()?.parse().ok()).unwrap_or(0)
}

/// Boots `kernel` with one program and returns what the console said.
fn boot(kernel: Kernel, program: &Path) -> anyhow::Result<String> {
    let tree = unpacked(kernel)?;
    let mut initramfs = Initramfs::new(&tree, MODULES)?;
    initramfs.program("bin/tests", program)?;
    let filter = kernel.tests();
    let script =
        format!("/bin/tests {filter} --nocapture --test-threads=1; R=$?; echo; echo RC=$R");
    let folder = crate::netns::RunDir::new("vm")?;
    let (initrd, console) = (folder.path().join("initrd"), folder.path().join("console.log"));
    shell::write(&initrd, initramfs.finish(&script))?;
    let text = progress::step(&format!("Linux {} under QEMU", kernel.name()), || {
        let mut text = run_qemu(kernel, &tree, &initrd, &console)?;
        for _ in 1..BOOTS_MAX {
            if !is_broken_boot(&text) {
                break;
            }
            progress::say("  the kernel panicked before it had booted: once more");
            text = run_qemu(kernel, &tree, &initrd, &console)?;
        }
        verdict(&text).map(|()| text.clone()).with_context(|| format!("the console says\n{text}"))
    })?;
    for line in text.lines().map(str::trim_end) {
        if line.starts_with("test ") || line.starts_with("test result") || line.contains("BOOTED") {
            println!("  {line}");
        }
    }
    Ok(text)
}

/// What the console said until the machine ended, or for as long as it may take.
fn run_qemu(kernel: Kernel, tree: &Path, initrd: &Path, console: &Path) -> anyhow::Result<String> {
    let mut qemu = Command::new(QEMU);
    configure(&mut qemu, kernel, tree, initrd)?.args(["-nic", "none"]);
    let mut qemu = Process::spawn("qemu", &mut qemu, console)?;
    let end = Instant::now() + LIMIT;
    while qemu.is_running()? && Instant::now() < end {
        interrupt::check()?;
        crate::process::pause(Duration::from_millis(100));
    }
    qemu.output()
}

/// Arguments of QEMU but for the network card.
fn configure<'a>(
    qemu: &'a mut Command,
    kernel: Kernel,
    tree: &Path,
    initrd: &Path,
) -> anyhow::Result<&'a mut Command> {
    let image = find(&tree.join("boot"), "vmlinuz-")?;
    let [cpu, cpus] = kernel.cpu();
    Ok(qemu
        .args(["-accel", "tcg", "-cpu", cpu, "-smp", cpus, "-m", MEMORY_MIB, "-nographic"])
        .args(["-no-reboot", "-append", APPEND])
        .arg("-kernel")
        .arg(image)
        .arg("-initrd")
        .arg(initrd))
}

/// A panic of the kernel before anything of ours ran.
fn is_broken_boot(console: &str) -> bool {
    !console.contains("BOOTED ")
        && ["Kernel panic", "PANIC"].iter().any(|word| console.contains(word))
}

/// Good only if the kernel booted, every module was loaded and the program ended well. QEMU's own exit status is 0 even
/// after a panic.
fn verdict(console: &str) -> anyhow::Result<()> {
    let line = |prefix: &str| console.lines().find(|line| line.trim_end().contains(prefix));
    ensure!(line("BOOTED ").is_some(), "the kernel did not boot");
    if let Some(line) = line("INSMOD FAIL") {
        bail!("a module was not loaded: {line}");
    }
    match line("RC=") {
        Some(line) if line.trim() == "RC=0" => Ok(()),
        Some(line) => bail!("the program failed: {line}"),
        None => bail!("the program did not end within {LIMIT:?}, or the kernel stopped"),
    }
}

/// The kernel's package, downloaded and unpacked once.
fn unpacked(kernel: Kernel) -> anyhow::Result<PathBuf> {
    let pin = kernel.pin();
    let folder = cache()?.join(kernel.name());
    let tree = folder.join(pin.version);
    if tree.exists() {
        return Ok(tree);
    }
    let text = format!("downloading {} {}", pin.package, pin.version);
    let package = progress::step(&text, || download(&pin, &folder))?;
    // Renamed when whole: an interrupted one is done again.
    let partial = folder.join("partial");
    let _ = fs::remove_dir_all(&partial);
    shell::read(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&partial))?;
    fs::rename(&partial, &tree).context("keeping the unpacked kernel")?;
    Ok(tree)
}

/// Lines of a sources.list for `release`, from the mirrors that this machine uses: whichever release it takes from them.
fn sources(release: &str) -> anyhow::Result<String> {
    let mut apt = Command::new("apt-get");
    apt.args(["indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages"]);
    let mirrors = shell::read(&mut apt)?;
    let lines: BTreeSet<String> =
        mirrors.lines().filter_map(|line| source(line, release)).collect();
    ensure!(
        !lines.is_empty(),
        "apt knows no mirror of Debian here: the kernel is a package of Debian"
    );
    Ok(lines.into_iter().collect())
}

/// `mirror`: label and address.
fn source(mirror: &str, release: &str) -> Option<String> {
    match mirror.split_once(' ')? {
        ("Debian", uri) => Some(format!("deb {uri} {release} main\n")),
        ("Debian-Security", uri) => Some(format!("deb {uri} {release}-security main\n")),
        _ => None,
    }
}

/// Asks apt with sources and state of its own: the machine's are not touched, and need not have this release.
fn download(pin: &Pin, folder: &Path) -> anyhow::Result<PathBuf> {
    let lists = folder.join("lists");
    fs::create_dir_all(lists.join("partial")).context("making apt's folder")?;
    shell::write(&folder.join("sources.list"), sources(pin.release)?)?;
    let apt = || {
        let mut apt = Command::new("apt-get");
        apt.current_dir(folder)
            .arg("-o")
            .arg(format!("Dir::Etc::sourcelist={}", folder.join("sources.list").display()))
            .args(["-o", "Dir::Etc::sourceparts=-", "-o", "APT::Sandbox::User=root", "-o"])
            .arg(format!("Dir::State::lists={}", lists.display()));
        apt
    };
    shell::read(apt().arg("update")).context("asking Debian's archive: is the network there?")?;
    let wanted = format!("{}={}", pin.package, pin.version);
    shell::read(apt().args(["download", &wanted])).with_context(|| {
        let has = "apt-cache policy linux-image-cloud-amd64";
        format!(
            "{wanted} has left Debian's archive: put the version that `{has}` names, and the new \
             package's SHA-256, into Kernel::pin in xtask/src/vm.rs"
        )
    })?;
    let package = find(folder, &format!("{}_", pin.package))?;
    let bytes = fs::read(&package)?;
    let seen = shell::hex(digest(&SHA256, &bytes).as_ref());
    if seen != pin.sha256 {
        let _ = fs::remove_file(&package);
        bail!("{wanted} has the SHA-256 {seen}, not the pinned {}", pin.sha256);
    }
    Ok(package)
}

fn cache() -> anyhow::Result<PathBuf> {
    Ok(cargo::metadata()?.target_directory.join("vm"))
}

/// The only file in `folder` whose name starts so.
fn find(folder: &Path, prefix: &str) -> anyhow::Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("listing {}", folder.display()))?;
    let mut names = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let found = names.find(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))
    });
    found.with_context(|| format!("no {prefix}* in {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_of_debian_have_the_release_and_others_do_not() {
        let of = |mirror| source(mirror, "bookworm");
        assert_eq!(
            of("Debian http://mirror/debian/").unwrap(),
            "deb http://mirror/debian/ bookworm main\n"
        );
        assert_eq!(
            of("Debian-Security http://mirror/sec/").unwrap(),
            "deb http://mirror/sec/ bookworm-security main\n"
        );
        assert_eq!(of("Docker CE http://mirror/docker"), None);
    }

    #[test]
    fn only_a_complete_run_is_good() {
        let good = "\x1b[2Jfirmware\r\nBOOTED 6.1.0\r\ntest a ... ok\r\nRC=0\r\n";
        verdict(good).unwrap();
        for bad in [
            "",
            "RC=0\n",
            "BOOTED 6.1.0\n",
            "BOOTED 6.1.0\nRC=101\n",
            "BOOTED 6.1.0\nINSMOD FAIL veth\nRC=0\n",
            "BOOTED 6.1.0\nKernel panic\n",
        ] {
            assert!(verdict(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_a_panic_before_the_boot_is_tried_again() {
        assert!(is_broken_boot("PANIC: double fault, error_code: 0x0"));
        assert!(is_broken_boot("Kernel panic - not syncing"));
        assert!(!is_broken_boot("BOOTED 6.12\nKernel panic - not syncing"));
        assert!(!is_broken_boot("SeaBIOS"));
    }

    #[test]
    fn no_tests_are_no_success() {
        assert_eq!(passed("BOOTED\ntest result: ok. 12 passed; 0 failed; 0 ignored\nRC=0"), 12);
        assert_eq!(passed("test result: ok. 0 passed; 0 failed"), 0);
        assert_eq!(passed("RC=0"), 0);
    }
}
