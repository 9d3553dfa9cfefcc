//! `cnsmo`, the operator's command line. Every command is described in docs/cli.md.

mod apply;
mod args;
mod audit;
mod backends;
mod backup;
mod bus;
mod client;
mod deployment;
mod describe;
mod diff;
mod drain;
mod events;
mod explain;
mod flows;
mod get;
mod history;
mod identity;
mod import;
mod kv;
mod label;
mod live;
mod load;
mod output;
mod service;
mod services;
mod status;
mod token;
mod wait;
mod watch;

use std::{
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Result, bail};
use clap::{CommandFactory as _, Parser as _};
use cnsmo_service::channel::CoreAddress;

use args::{Args, Command, TokenCommand};
use client::{Client, Target};

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
    let format = args.format;
    let target = target(args.socket, args.core, args.identity_dir)?;
    if let Command::Login(login) = args.command {
        let Target::Remote { core, dir } = target else {
            bail!("--core: missing: where to log in?");
        };
        identity::login(&core, &dir, login).await?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Command::Import(command) = &args.command {
        return import::import(format, command);
    }
    let client = Client::new(target);
    match args.command {
        Command::Apply(apply) => return apply::apply(&client, format, apply).await,
        Command::Diff(files) => apply::diff(&client, files).await?,
        Command::Get(get) => get::get(&client, format, get).await?,
        Command::Describe { kind, name } => {
            describe::describe(&client, format, kind.into(), name).await?;
        }
        Command::Delete(delete) => return apply::delete(&client, delete).await,
        Command::Watch { kind, name } => {
            watch::watch(
                &client,
                format,
                kind.into(),
                name.map(|name| name.to_string()).unwrap_or_default(),
            )
            .await?;
        }
        Command::Events(args) => events::events(&client, format, args).await?,
        Command::Flows(args) => flows::flows(&client, format, args).await?,
        Command::Explain(args) => return explain::explain(&client, format, args).await,
        Command::History { last } => history::history(&client, format, last).await?,
        Command::Rollback(args) => return history::rollback(&client, format, args).await,
        Command::Wait(wait) => return wait::wait(&client, wait).await,
        Command::Nodes { selector } => get::nodes(&client, format, selector).await?,
        Command::Agents { host } => services::agents(&client, format, host).await?,
        Command::Service(command) => service::service(&client, format, command).await?,
        Command::Services(args) => services::services(&client, format, args).await?,
        Command::Scale(args) => return deployment::scale(&client, args).await,
        Command::Logs(args) => deployment::logs(&client, format, args).await?,
        Command::Spawn(args) => return deployment::spawn(&client, args).await,
        Command::Label(label) => label::label(&client, label).await?,
        Command::Drain(drain) => return drain::drain(&client, drain).await,
        Command::Token(TokenCommand::Create(create)) => token::create(&client, create).await?,
        Command::Token(TokenCommand::List) => token::list(&client, format).await?,
        Command::Token(TokenCommand::Delete { id }) => token::delete(&client, id).await?,
        Command::Identity(command) => identity::identity(&client, format, command).await?,
        Command::Audit(args) => audit::audit(&client, format, args).await?,
        Command::Login(_) | Command::Import(_) => unreachable!("handled above"),
        Command::Bus(command) => bus::bus(&client, format, command).await?,
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

/// The socket, unless another machine is named.
fn target(socket: PathBuf, core: Option<CoreAddress>, identity: Option<PathBuf>) -> Result<Target> {
    let Some(core) = core else { return Ok(Target::Socket(socket)) };
    let dir = identity.map_or_else(identity::default_dir, Ok)?;
    Ok(Target::Remote { core, dir })
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
