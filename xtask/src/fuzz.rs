//! `cargo xtask fuzz`: libFuzzer looks for inputs that break what `tests/fuzz` says must hold.
//!
//! Only the crates of the workspace are instrumented, by this program in the place of their compiler: what they depend on
//! is shared with other builds. The passes are part of the stable compiler.

use std::{
    env, fs,
    os::unix::process::CommandExt as _,
    process::{Command, ExitCode},
};

use anyhow::Context as _;
use clap::ValueEnum;

use crate::{
    cargo::{self, cargo},
    progress, shell,
};

/// Set for the compiler's wrapper.
const INSTRUMENT: &str = "CNSMO_FUZZ_INSTRUMENT";
/// Edges with counters, and the operands of comparisons, which libFuzzer tries as parts of inputs.
const FLAGS: &[&str] = &[
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=3",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
];
/// Longest input, in bytes.
const BYTES_MAX: u32 = 4_096;
/// One input that takes longer, in seconds, is a finding.
const TIMEOUT_SECONDS: u32 = 20;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// What to fuzz [default: all, one after the other]
    #[arg(value_enum)]
    target: Option<Target>,
    /// For each target
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Add inputs that reach new code to tests/fuzz/corpus, which every test run replays
    #[arg(long)]
    keep: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Target {
    /// The compiler of policies against the linear matcher
    Compiler,
    /// Parser and pipeline on sequences of frames
    Pipeline,
    /// Manifests, rules of the original CNSMO, and protobuf
    Policy,
}

impl Target {
    fn name(self) -> &'static str {
        match self {
            Self::Compiler => "compiler",
            Self::Pipeline => "pipeline",
            Self::Policy => "policy",
        }
    }
}

pub(crate) fn main(options: &Options) -> anyhow::Result<()> {
    let targets = options.target.map_or_else(|| Target::value_variants().to_vec(), |one| vec![one]);
    let folder = cargo::metadata()?.target_directory.join("fuzz");
    progress::heading("Building the targets with libFuzzer");
    let mut build = cargo();
    build.args(["build", "--package=cnsmo-fuzz", "--bins", "--features=engine"]);
    build.env(INSTRUMENT, "1");
    build.env("RUSTC_WORKSPACE_WRAPPER", env::current_exe().context("no path of this program")?);
    let built = cargo::build(&mut build)?;
    for target in targets {
        let name = target.name();
        progress::heading(&format!("Fuzzing {name} for {} s", options.seconds));
        let (own, findings) = (folder.join("corpus").join(name), folder.join("findings"));
        for folder in [&own, &findings] {
            fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        }
        let stored = shell::root().join("tests/fuzz/corpus").join(name);
        let program = built.executable(&format!("fuzz-{name}"))?;
        let prefix = findings.join(format!("{name}-"));
        let mut fuzz = Command::new(&program);
        fuzz.arg(&own).arg(&stored).args([
            format!("-max_total_time={}", options.seconds),
            format!("-max_len={BYTES_MAX}"),
            format!("-timeout={TIMEOUT_SECONDS}"),
            format!("-artifact_prefix={}", prefix.display()),
            "-print_final_stats=1".to_owned(),
        ]);
        shell::run(&mut fuzz).with_context(|| {
            format!("{name}: run {} with the file that is named above", program.display())
        })?;
        if options.keep {
            shell::run(Command::new(&program).arg("-merge=1").arg(&stored).arg(&own))?;
        }
    }
    Ok(())
}

/// The compiler, if cargo has started this program in its place.
pub(crate) fn as_compiler() -> Option<ExitCode> {
    env::var_os(INSTRUMENT)?;
    let mut arguments = env::args_os().skip(1);
    let mut rustc = Command::new(arguments.next()?);
    let arguments: Vec<_> = arguments.collect();
    let krate = arguments.iter().position(|argument| argument == "--crate-name");
    let krate = krate.and_then(|at| arguments.get(at + 1));
    // A build script runs without libFuzzer.
    if krate.is_some_and(|name| name != "build_script_build") {
        rustc.args(FLAGS);
    }
    let error = rustc.args(arguments).exec();
    progress::error(&anyhow::Error::new(error).context("starting the compiler"));
    Some(ExitCode::FAILURE)
}
