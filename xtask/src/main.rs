//! Every command of the project's development: `cargo xtask --help`.

#![expect(clippy::print_stdout, reason = "a command line program talks to its user")]

mod acceptance;
mod bench;
mod capture;
mod cargo;
mod checks;
mod ci;
mod codegen;
mod fleet;
mod fuzz;
mod interrupt;
#[path = "../../tests/harness/netns.rs"]
#[expect(unreachable_pub, reason = "shared with the library of the tests, where it is public")]
mod netns;
mod parallel;
#[path = "../../tests/harness/postgres.rs"]
#[expect(
    unreachable_pub,
    dead_code,
    reason = "shared with the library of the tests, where it is public"
)]
mod postgres;
#[path = "../../tests/harness/process.rs"]
#[expect(unreachable_pub, reason = "shared with the library of the tests, where it is public")]
mod process;
mod progress;
mod run;
mod scenarios;
mod setup;
mod shell;
mod swarm;
mod test;
mod tidy;
mod traffic;
#[path = "../../tests/harness/usage.rs"]
#[expect(
    unreachable_pub,
    dead_code,
    reason = "shared with the library of the tests, where it is public"
)]
mod usage;
mod vm;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Builds, runs and proves CNSMO")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build everything, run a fleet of VMs-as-namespaces, apply a policy and check it with real traffic
    Run(run::Options),
    /// Run every test: unit, property, namespaces, and a Debian kernel under QEMU
    Test(test::Options),
    /// Run the kernel tests inside a Debian kernel under QEMU
    Vm(vm::Options),
    /// Look for inputs that break a property, guided by coverage
    Fuzz(fuzz::Options),
    /// Measure ours beside the peers
    Bench(bench::Options),
    /// Have thousands of agents on one core, and show what that costs
    Swarm(swarm::Options),
    /// Install what is missing to build, run and test
    Setup,
    /// Say what is missing to build, run and test, and change nothing
    Doctor,
    /// Check the rules of the repository that the compiler does not know
    Tidy {
        /// Accept the kernel/user layouts as they are now; ABI_VERSION must have been raised
        #[arg(long)]
        bless: bool,
    },
    /// Write the generated code of cnsmo-proto
    Codegen {
        /// Change nothing; fail if the committed code is not what the .proto files give
        #[arg(long)]
        check: bool,
    },
    /// Everything a change must pass: formatting, lints, tidy, licences, then every test
    Ci(ci::Options),
}

/// Where results for programs go.
#[derive(clap::Args)]
struct Json {
    /// Also write the results to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    if let Some(code) = fuzz::as_compiler() {
        return code;
    }
    let arguments = Arguments::parse();
    let result = interrupt::install().and_then(|()| match arguments.command {
        Task::Run(options) => run::main(&options),
        Task::Test(options) => test::main(&options),
        Task::Vm(options) => vm::main(&options),
        Task::Fuzz(options) => fuzz::main(&options),
        Task::Bench(options) => bench::main(&options),
        Task::Swarm(options) => swarm::main(&options),
        Task::Setup => setup::setup(setup::Scope::All),
        Task::Doctor => setup::doctor(),
        Task::Tidy { bless } => tidy::main(bless),
        Task::Codegen { check } => codegen::main(check),
        Task::Ci(options) => ci::main(&options),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            progress::error(&error);
            ExitCode::FAILURE
        }
    }
}
