//! `cargo xtask test`: every layer of tests, one after the other.

use std::time::Instant;

use crate::{acceptance, cargo::cargo, progress, setup, shell, tidy, vm};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Leave out the kernel under QEMU
    #[arg(long)]
    no_vm: bool,
    /// Run the acceptance checks instead, all or those named
    #[arg(long, value_name = "CHECK", num_args = 0.., value_parser = acceptance::parse)]
    acceptance: Option<Vec<u8>>,
}

pub(crate) fn main(options: &Options) -> anyhow::Result<()> {
    setup::need_root("test")?;
    match &options.acceptance {
        Some(checks) => {
            setup::setup(setup::Scope::Test)?;
            acceptance::run(checks)
        }
        None => {
            let scope = if options.no_vm { setup::Scope::Test } else { setup::Scope::All };
            setup::setup(scope)?;
            progress::heading("Tidy");
            tidy::main(false)?;
            everything(!options.no_vm)
        }
    }
}

/// All layers: pure tests, tests on namespaces and real processes, a kernel under QEMU.
pub(crate) fn everything(with_vm: bool) -> anyhow::Result<()> {
    let start = Instant::now();
    progress::heading("Unit and property tests");
    shell::run(cargo().args(["test", "--locked", "--workspace", "--exclude=cnsmo-tests"]))?;
    // The tests start these as processes.
    progress::heading("Tests on namespaces, real kernels and real processes");
    shell::run(cargo().args([
        "build",
        "--locked",
        "--package=cnsmo-core",
        "--package=cnsmo-agent",
        "--package=cnsmo-cli",
    ]))?;
    shell::run(cargo().args(["test", "--locked", "--package=cnsmo-tests"]))?;
    if with_vm {
        vm::run(vm::Kernel::V6_1)?;
        vm::run(vm::Kernel::V6_12)?;
    }
    let layers = if with_vm { "unit, namespaces, Debian 6.1 and 6.12" } else { "unit, namespaces" };
    println!("\nall tests pass: {layers} ({:.0} s)", start.elapsed().as_secs_f32());
    Ok(())
}
