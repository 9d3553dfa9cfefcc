//! `cnsmo`, the operator's command line. Every command is described in docs/cli.md.

mod apply;
mod args;
mod backends;
mod backup;
mod client;
mod describe;
mod diff;
mod drain;
mod get;
mod kv;
mod label;
mod load;
mod output;
mod services;
mod status;
mod token;
mod wait;
mod watch;

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use anyhow::Result;
use clap::{CommandFactory as _, Parser as _};

use args::{Args, Command, TokenCommand};
use client::Client;

/// A VM did not do in time what was waited for.
const EXIT_TIMEOUT: u8 = 3;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Args::parse()).await {
        Ok(code) => code,
        // The reader of the output has what it wanted, as in `cnsmo get fw | head -1`.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // A closed standard error leaves nobody to tell.
            _ = writeln!(io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<ExitCode> {
    let client = Client::new(args.socket);
    let format = args.format;
    match args.command {
        Command::Apply(apply) => return apply::apply(&client, format, apply).await,
        Command::Diff(files) => apply::diff(&client, files).await?,
        Command::Get(get) => get::get(&client, format, get).await?,
        Command::Describe { kind, name } => {
            describe::describe(&client, format, kind.into(), name).await?;
        }
        Command::Delete(delete) => apply::delete(&client, delete).await?,
        Command::Watch { kind, name } => {
            watch::watch(
                &client,
                format,
                kind.into(),
                name.map(|name| name.to_string()).unwrap_or_default(),
            )
            .await?;
        }
        Command::Wait(wait) => return wait::wait(&client, wait).await,
        Command::Nodes { selector } => get::nodes(&client, format, selector).await?,
        Command::Services(args) => services::services(&client, format, args).await?,
        Command::Label(label) => label::label(&client, label).await?,
        Command::Drain(drain) => return drain::drain(&client, drain).await,
        Command::Token(TokenCommand::Create(create)) => token::create(&client, create).await?,
        Command::Kv(command) => kv::kv(&client, format, command).await?,
        Command::Status => status::status(&client, format).await?,
        Command::Backup { file } => backup::backup(&client, format, &file).await?,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "cnsmo", &mut script);
            io::stdout().write_all(&script)?;
        }
        Command::Version => writeln!(io::stdout(), "cnsmo {}", env!("CARGO_PKG_VERSION"))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
