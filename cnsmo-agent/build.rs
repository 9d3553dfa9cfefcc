//! Builds the eBPF programs and leaves the object in `OUT_DIR` for `include_bytes_aligned!`.

use std::{env, path::Path, process::Command};

use anyhow::{Context as _, bail};
use aya_build::{Package, Toolchain, build_ebpf};

const TOOLCHAIN: &str = "CNSMO_BPF_TOOLCHAIN";

fn main() -> anyhow::Result<()> {
    println!("cargo::rerun-if-env-changed={TOOLCHAIN}");
    let toolchain = toolchain()?;
    if Path::new(&toolchain).is_absolute() {
        // A distribution's stable compiler refuses `-Z build-std` without this.
        // SAFETY: no other thread exists yet.
        unsafe { env::set_var("RUSTC_BOOTSTRAP", "1") };
    }
    // aya-build shows each line of this cargo as a warning: only real ones shall be seen.
    // SAFETY: no other thread exists yet.
    unsafe { env::set_var("CARGO_TERM_QUIET", "true") };
    let root = format!("{}/../cnsmo-ebpf", env!("CARGO_MANIFEST_DIR"));
    let package = Package { name: "cnsmo-ebpf", root_dir: &root, ..Default::default() };
    build_ebpf([package], Toolchain::Custom(&toolchain))
        .with_context(|| format!("building cnsmo-ebpf with toolchain `{toolchain}`"))
}

/// Returns the first toolchain that has the source of `core`: the one asked for, rustup's nightly,
/// the distribution's.
fn toolchain() -> anyhow::Result<String> {
    if let Ok(asked) = env::var(TOOLCHAIN) {
        return Ok(asked);
    }
    for candidate in ["nightly", "/usr"] {
        if has_core_source(candidate) {
            return Ok(candidate.to_owned());
        }
    }
    bail!(
        "no compiler here can build eBPF: none has the source of `core`\n\
         with rustup: rustup toolchain install nightly --component rust-src\n\
         on Debian:   apt install rustc-web cargo-web rust-web-src\n\
         or name one: {TOOLCHAIN}=<rustup toolchain, or a path such as /usr>"
    )
}

fn has_core_source(toolchain: &str) -> bool {
    let mut rustc = if toolchain.starts_with('/') {
        Command::new(format!("{toolchain}/bin/rustc"))
    } else {
        let mut rustup = Command::new("rustup");
        rustup.args(["run", toolchain, "rustc"]);
        rustup
    };
    let Ok(out) = rustc.args(["--print", "sysroot"]).env_remove("RUSTUP_TOOLCHAIN").output() else {
        return false;
    };
    let sysroot = String::from_utf8_lossy(&out.stdout);
    out.status.success()
        && Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml").exists()
}
