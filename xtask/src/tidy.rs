//! Rules of the repository that no compiler knows. Each is a decision of ARCHITECTURE.md that must not erode.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use object::{Object as _, ObjectSymbol as _};
use ring::digest::{SHA256, digest};

use crate::{
    cargo::{self, Package, cargo},
    codegen, progress,
    shell::{self, root},
};

/// Which crates of ours each one may depend on.
const ARROWS: &[(&str, &[&str])] = &[
    ("cnsmo-common", &[]),
    ("cnsmo-ebpf", &["cnsmo-common"]),
    ("cnsmo-proto", &[]),
    ("cnsmo-service", &["cnsmo-proto"]),
    ("cnsmo-agent", &["cnsmo-common", "cnsmo-ebpf", "cnsmo-proto", "cnsmo-service"]),
    ("cnsmo-core", &["cnsmo-proto", "cnsmo-service"]),
    ("cnsmo-cli", &["cnsmo-proto", "cnsmo-service"]),
    (
        "cnsmo-tests",
        &[
            "cnsmo-agent",
            "cnsmo-common",
            "cnsmo-core",
            "cnsmo-ebpf",
            "cnsmo-proto",
            "cnsmo-service",
        ],
    ),
    ("cnsmo-fuzz", &["cnsmo-agent", "cnsmo-common", "cnsmo-ebpf", "cnsmo-proto", "cnsmo-tests"]),
    ("xtask", &[]),
];

/// Crates of others that only some of ours may know.
const OUTSIDERS: &[(&str, &[&str])] = &[
    ("aya", &["cnsmo-agent", "cnsmo-common", "cnsmo-tests"]),
    ("aya-ebpf", &["cnsmo-ebpf"]),
    ("aya-log", &["cnsmo-agent"]),
    ("aya-log-ebpf", &["cnsmo-ebpf"]),
    ("tokio", &["cnsmo-agent", "cnsmo-cli", "cnsmo-core", "cnsmo-service", "cnsmo-tests"]),
    ("rusqlite", &["cnsmo-core"]),
    ("sqlx", &["cnsmo-core"]),
];

/// Where the loader's library may be named: one part of the agent, the marks on the map types, tests, this rule.
const AYA_NAMED_IN: &[&str] =
    &["cnsmo-agent/src/datapath/kernel", "cnsmo-common/src/pod.rs", "tests/", "xtask/src/tidy.rs"];

/// What no source may contain, and why. Split, or this file would.
const BANNED: &[(&str, &str)] = &[
    (
        concat!("#[", "ignore"),
        "a test that cannot run must fail and say which command makes it run",
    ),
    (concat!("todo", "!("), "what does not work is not merged"),
    (concat!("dbg", "!("), "left over from debugging"),
];

const ABI_SOURCES: &str = "cnsmo-common/src";
const ABI_LOCK: &str = "cnsmo-common/abi.lock";

/// Checks all rules; with `bless`, accepts the kernel/user layouts and the API of now first.
pub(crate) fn main(bless: bool) -> anyhow::Result<()> {
    if bless {
        bless_abi(&root().join(ABI_LOCK), &Abi::of_sources()?)?;
        bless_api()?;
    }
    let mut broken = sources()?;
    broken.extend(abi(&root().join(ABI_LOCK), &Abi::of_sources()?));
    report(&broken)?;
    progress::say("  ok    crate arrows, lints, sources, kernel/user layouts");
    codegen::main(true)?;
    object()
}

/// The rules that need no build.
fn sources() -> anyhow::Result<Vec<String>> {
    let packages = cargo::metadata()?.packages;
    let mut broken = arrows(&packages);
    for package in &packages {
        let manifest = shell::text(&package.manifest_path)?;
        if !opts_into_lints(&manifest) {
            broken.push(format!(
                "{}: no `[lints] workspace = true`, so the lints do not reach it",
                package.manifest_path.display()
            ));
        }
    }
    for path in rust_sources()? {
        let name = path.strip_prefix(root())?.to_string_lossy().into_owned();
        broken.extend(source(&name, &shell::text(&path)?));
    }
    Ok(broken)
}

fn report(broken: &[String]) -> anyhow::Result<()> {
    if !broken.is_empty() {
        bail!("{} rules of the repository are broken:\n  {}", broken.len(), broken.join("\n  "));
    }
    Ok(())
}

fn arrows(packages: &[Package]) -> Vec<String> {
    let ours = |name: &str| ARROWS.iter().find(|(crate_, _)| *crate_ == name);
    let mut broken = Vec::new();
    for package in packages {
        let name = package.name.as_str();
        let Some((_, may)) = ours(name) else {
            broken.push(format!("{name} is not in the list of crates in xtask/src/tidy.rs"));
            continue;
        };
        for dependency in &package.dependencies {
            let on = dependency.name.as_str();
            if ours(on).is_some() && !may.contains(&on) {
                broken.push(format!("{name} must not depend on {on}"));
            }
            let outsider = OUTSIDERS.iter().find(|(crate_, _)| *crate_ == on);
            if outsider.is_some_and(|(_, may)| !may.contains(&name)) {
                broken.push(format!("{name} must not know {on}"));
            }
        }
    }
    broken
}

fn opts_into_lints(manifest: &str) -> bool {
    let mut lines = manifest.lines().skip_while(|line| line.trim() != "[lints]").skip(1);
    lines.next().is_some_and(|line| line.trim() == "workspace = true")
}

/// What is wrong with one file.
fn source(name: &str, text: &str) -> Vec<String> {
    let mut broken = Vec::new();
    let may_name_aya = AYA_NAMED_IN.iter().any(|place| name.starts_with(place));
    for (n, line) in text.lines().enumerate() {
        let place = format!("{name}:{}", n + 1);
        for (word, reason) in BANNED {
            if line.contains(word) {
                broken.push(format!("{place}: `{word}`: {reason}"));
            }
        }
        if !may_name_aya && names_aya(line) {
            broken.push(format!("{place}: only {} name aya", AYA_NAMED_IN.join(", ")));
        }
    }
    broken
}

/// A path into the crate `aya`, not into `aya_build` or a module that ends so.
fn names_aya(line: &str) -> bool {
    let path = concat!("aya", "::");
    line.match_indices(path).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_')
    })
}

fn rust_sources() -> anyhow::Result<Vec<PathBuf>> {
    let mut sources = Vec::new();
    for (package, _) in ARROWS {
        let folder = root().join(match *package {
            "cnsmo-tests" => "tests",
            "cnsmo-fuzz" => "tests/fuzz",
            package => package,
        });
        sources.extend(shell::files(&folder)?);
    }
    sources.retain(|path| {
        let generated = path.components().any(|part| part.as_os_str() == "generated");
        path.extension().is_some_and(|extension| extension == "rs") && !generated
    });
    ensure!(!sources.is_empty(), "no sources below {}", root().display());
    Ok(sources)
}

/// The kernel/user ABI: its number, and a fingerprint of what it numbers.
#[derive(Debug, PartialEq, Eq)]
struct Abi {
    version: u32,
    fingerprint: String,
}

impl Abi {
    fn of_sources() -> anyhow::Result<Self> {
        let mut version = None;
        let mut all = String::new();
        for path in shell::files(&root().join(ABI_SOURCES))? {
            let text = shell::text(&path)?;
            version = version.or_else(|| abi_version(&text));
            let name = path.strip_prefix(root())?.display();
            let _ = writeln!(all, "{name}\n{}", code(&text));
        }
        let version = version.with_context(|| format!("no ABI_VERSION in {ABI_SOURCES}"))?;
        Ok(Self { version, fingerprint: hex(digest(&SHA256, all.as_bytes()).as_ref()) })
    }

    fn read(path: &Path) -> anyhow::Result<Self> {
        let text = shell::text(path)?;
        let parsed = text.trim().split_once(' ').and_then(|(version, fingerprint)| {
            Some(Self { version: version.parse().ok()?, fingerprint: fingerprint.to_owned() })
        });
        parsed.with_context(|| format!("{} is not `version fingerprint`", path.display()))
    }
}

/// The lines that can change a layout: neither comments nor tests, which come last in a file.
fn code(text: &str) -> String {
    let lines = text.lines().take_while(|line| line.trim() != "#[cfg(test)]").map(str::trim);
    lines.filter(|line| !line.is_empty() && !line.starts_with("//")).collect::<Vec<_>>().join("\n")
}

fn abi_version(text: &str) -> Option<u32> {
    let (_, rest) = text.split_once("pub const ABI_VERSION: u32 = ")?;
    rest.split_once(';')?.0.parse().ok()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn abi(lock: &Path, now: &Abi) -> Vec<String> {
    match Abi::read(lock) {
        Err(error) => vec![format!("{error:#}: run `cargo xtask tidy --bless`")],
        Ok(locked) if locked == *now => Vec::new(),
        Ok(locked) if locked.version == now.version => vec![format!(
            "{ABI_SOURCES} changed: raise ABI_VERSION from {}, then run `cargo xtask tidy --bless`",
            locked.version
        )],
        Ok(_) => vec![format!("ABI_VERSION is {}: run `cargo xtask tidy --bless`", now.version)],
    }
}

/// The test that compares the API with its lock file writes it when asked so.
fn bless_api() -> anyhow::Result<()> {
    let mut test = cargo();
    test.args(["test", "--quiet", "--package", "cnsmo-proto", "--test", "api_lock"]);
    shell::run(test.env("CNSMO_BLESS", "1"))
}

fn bless_abi(lock: &Path, now: &Abi) -> anyhow::Result<()> {
    if lock.exists() {
        let locked = Abi::read(lock)?;
        if locked == *now {
            return Ok(());
        }
        ensure!(
            now.version > locked.version,
            "{ABI_SOURCES} changed and ABI_VERSION is {}, not above the {} that has the old layouts: \
             raise it, or pins of the old ones would be taken for new ones",
            now.version,
            locked.version
        );
    }
    shell::write(lock, format!("{} {}\n", now.version, now.fingerprint))
}

/// The embedded object must hold no path to a panic: it would link, and be refused by every kernel at load.
fn object() -> anyhow::Result<()> {
    progress::heading("Building the agent, for its eBPF object");
    let built = cargo::build(cargo().args(["build", "--package=cnsmo-agent"]))?;
    let path = built.out_dir("cnsmo-agent")?.join("cnsmo");
    let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let symbols = symbols(&bytes).with_context(|| format!("reading {}", path.display()))?;
    ensure!(!symbols.is_empty(), "{} has no symbols: nothing was checked", path.display());
    let panics: Vec<_> = symbols.iter().filter(|name| name.contains("panicking")).collect();
    ensure!(panics.is_empty(), "{} can panic: it has the symbols {panics:?}", path.display());
    progress::say("  ok    no path to a panic in the eBPF object");
    Ok(())
}

fn symbols(object: &[u8]) -> anyhow::Result<Vec<String>> {
    let file = object::File::parse(object)?;
    let names = file.symbols().map(|symbol| symbol.name().map(str::to_owned));
    let names = names.collect::<Result<Vec<_>, _>>()?;
    Ok(names.into_iter().filter(|name| !name.is_empty()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cargo::Dependency, netns::RunDir};

    #[test]
    fn the_repository_keeps_its_rules() {
        let mut broken = sources().unwrap();
        broken.extend(abi(&root().join(ABI_LOCK), &Abi::of_sources().unwrap()));
        assert!(broken.is_empty(), "{}", broken.join("\n"));
    }

    #[test]
    fn forbidden_arrows_are_found() {
        let package = |name: &str, on: &str| Package {
            name: name.to_owned(),
            manifest_path: PathBuf::new(),
            dependencies: vec![Dependency { name: on.to_owned() }],
        };
        for (name, on) in [
            ("cnsmo-core", "cnsmo-common"),
            ("cnsmo-core", "aya"),
            ("cnsmo-ebpf", "tokio"),
            ("cnsmo-common", "cnsmo-proto"),
            ("cnsmo-cli", "xtask"),
            ("new-crate", "libc"),
        ] {
            assert_eq!(arrows(&[package(name, on)]).len(), 1, "{name} -> {on}");
        }
        assert!(arrows(&[package("cnsmo-agent", "cnsmo-ebpf")]).is_empty());
    }

    #[test]
    fn aya_is_found_where_it_must_not_be() {
        assert!(names_aya("use aya::Ebpf;"));
        assert!(names_aya("let map: aya::maps::Array<u32> = x;"));
        assert!(!names_aya("use aya_ebpf::programs::XdpContext;"));
        assert!(!names_aya("papaya::eat()"));
        assert_eq!(source("cnsmo-core/src/main.rs", "use aya::Ebpf;").len(), 1);
        assert!(source("cnsmo-agent/src/datapath/kernel/load.rs", "use aya::Ebpf;").is_empty());
    }

    #[test]
    fn banned_words_are_found() {
        for (word, _) in BANNED {
            assert_eq!(source("tests/x.rs", &format!("    {word}")).len(), 1, "{word}");
        }
    }

    #[test]
    fn lints_must_be_the_workspaces() {
        assert!(opts_into_lints("[package]\n\n[lints]\nworkspace = true\n"));
        assert!(!opts_into_lints("[package]\nname = \"x\"\n"));
        assert!(!opts_into_lints("[dependencies]\nx.workspace = true\n[lints.rust]\n"));
    }

    #[test]
    fn comments_and_tests_are_no_layout() {
        let layout = "/// Old.\npub struct A {\n    x: u32,\n}\n";
        let commented = "// New.\n\npub struct A {\n  x: u32,\n}\n#[cfg(test)]\nmod tests {}\n";
        assert_eq!(code(layout), code(commented));
        assert_ne!(code(layout), code("pub struct A {\n    x: u64,\n}\n"));
    }

    #[test]
    fn a_changed_layout_needs_a_new_version() {
        let folder = RunDir::new("abi").unwrap();
        let lock = folder.path().join("abi.lock");
        let abi_of =
            |version, fingerprint: &str| Abi { version, fingerprint: fingerprint.to_owned() };
        assert_eq!(abi(&lock, &abi_of(1, "a")).len(), 1, "no lock");
        bless_abi(&lock, &abi_of(1, "a")).unwrap();
        assert!(abi(&lock, &abi_of(1, "a")).is_empty());
        assert_eq!(abi(&lock, &abi_of(1, "b")).len(), 1, "changed");
        assert!(bless_abi(&lock, &abi_of(1, "b")).is_err(), "changed under the old number");
        bless_abi(&lock, &abi_of(2, "b")).unwrap();
        assert!(abi(&lock, &abi_of(2, "b")).is_empty());
    }
}
