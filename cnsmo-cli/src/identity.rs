//! Who may do what: `cnsmo login`, `cnsmo identity`.

use std::{
    env,
    fs::DirBuilder,
    io::{self, Read as _, Write as _},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Subcommand, ValueEnum};
use cnsmo_proto::{
    model::Name,
    pb::identity::{
        Identity as IdentityMessage, ListIdentitiesRequest, Revocation, RevokeIdentityRequest, Role,
    },
};
use cnsmo_service::{
    channel::CoreAddress,
    identity::{Identity, enroll},
    token::Token,
};
use serde::Serialize;

use crate::{
    args::Format,
    client::{Client, refused},
    output,
};

/// A token takes 110 bytes; what is much longer is another file.
const TOKEN_BYTES_MAX: u64 = 4_096;

#[derive(clap::Args)]
pub(crate) struct LoginArgs {
    /// File with the token; - for standard input
    #[arg(default_value = "-", value_name = "FILE|-")]
    pub(crate) token: PathBuf,
    /// Your name, or that of the service [default: $USER]
    #[arg(long)]
    pub(crate) name: Option<Name>,
}

#[derive(Subcommand)]
pub(crate) enum IdentityCommand {
    /// List the identities
    List {
        /// Of this role only
        #[arg(long)]
        role: Option<RoleArg>,
    },
    /// End all that an identity may do, at once; a VM leaves its network
    Revoke {
        /// KIND/NAME, for example agent/web1 or operator/alice
        identity: String,
        /// Also refuse the name when it comes with a new token; without it, lift that
        #[arg(long)]
        ban: bool,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RoleArg {
    /// A VM
    Agent,
    /// A program that uses state, bus and catalogue
    Service,
    /// Reads everything but secrets
    Viewer,
    /// Also writes resources, keys and messages
    Editor,
    /// Also decides who else may
    Admin,
}

impl From<RoleArg> for Role {
    fn from(role: RoleArg) -> Self {
        match role {
            RoleArg::Agent => Self::Agent,
            RoleArg::Service => Self::Service,
            RoleArg::Viewer => Self::Viewer,
            RoleArg::Editor => Self::Editor,
            RoleArg::Admin => Self::Admin,
        }
    }
}

/// Makes a key and gets a certificate for it.
pub(crate) async fn login(core: &CoreAddress, dir: &Path, args: LoginArgs) -> Result<()> {
    let token = read_token(&args.token)?;
    let name = match args.name {
        Some(name) => name,
        None => user().context("give a name with --name")?,
    };
    if let Some(identity) = Identity::load(dir)?
        && (identity.not_after() > SystemTime::now() || *identity.name() != name)
    {
        let (kind, old) = (identity.kind(), identity.name());
        bail!(
            "{} holds the identity {kind}/{old}: name another folder with --identity",
            dir.display()
        );
    }
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder.create(dir).with_context(|| format!("failed to create {}", dir.display()))?;
    let identity = enroll(core, &token, &name, &[].into(), dir).await?;
    let (kind, name, dir) = (identity.kind(), identity.name(), dir.display());
    writeln!(io::stderr(), "{kind}/{name} with key and certificate in {dir}")?;
    Ok(())
}

/// Where the identity is, unless it is said.
pub(crate) fn default_dir() -> Result<PathBuf> {
    let config = env::var_os("XDG_CONFIG_HOME").filter(|dir| !dir.is_empty()).map(PathBuf::from);
    let home = || env::var_os("HOME").map(|home| Path::new(&home).join(".config"));
    let config = config.or_else(home).context("give the folder of the identity with --identity")?;
    Ok(config.join("cnsmo"))
}

pub(crate) async fn identity(
    client: &Client,
    format: Format,
    command: IdentityCommand,
) -> Result<()> {
    match command {
        IdentityCommand::List { role } => list(client, format, role).await,
        IdentityCommand::Revoke { identity, ban } => revoke(client, identity, ban).await,
    }
}

async fn list(client: &Client, format: Format, role: Option<RoleArg>) -> Result<()> {
    let role = role.map_or(Role::Unspecified, Role::from).into();
    let answer = client.identities().await?.list_identities(ListIdentitiesRequest { role }).await;
    let all: Vec<_> =
        answer.map_err(refused)?.into_inner().identities.iter().map(Shown::new).collect();
    match format {
        Format::Json => output::print_json(&all),
        Format::Yaml => output::print_yaml(&all),
        Format::Table => {
            let row = |one: &Shown| {
                [&one.identity, one.role, &one.expires, one.revoked].map(output::or_none).to_vec()
            };
            let heads = ["IDENTITY", "ROLE", "EXPIRES", "REVOKED"];
            let table = output::table(&heads, all.iter().map(row).collect(), "");
            writeln!(io::stdout(), "{table}")?;
            Ok(())
        }
    }
}

async fn revoke(client: &Client, identity: String, ban: bool) -> Result<()> {
    let revocation = if ban { Revocation::Ban } else { Revocation::Evict }.into();
    let request = RevokeIdentityRequest { identity: identity.clone(), revocation };
    let answer = client.identities().await?.revoke_identity(request).await.map_err(refused)?;
    let (word, revision) = (if ban { "banned" } else { "evicted" }, answer.into_inner().revision);
    writeln!(io::stdout(), "{identity} {word} (revision {revision})")?;
    Ok(())
}

/// An identity as it is printed.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown {
    identity: String,
    role: &'static str,
    expires: String,
    revoked: &'static str,
    spki_sha256: String,
    state_prefixes: Vec<String>,
    subjects: Vec<String>,
}

impl Shown {
    fn new(identity: &IdentityMessage) -> Self {
        Self {
            identity: identity.identity.clone(),
            role: role_word(identity.role()),
            expires: identity.expire_time.map(|time| time.to_string()).unwrap_or_default(),
            revoked: match identity.revocation() {
                Revocation::Unspecified => "",
                Revocation::Evict => "evicted",
                Revocation::Ban => "banned",
            },
            spki_sha256: output::hex(&identity.spki_sha256),
            state_prefixes: identity.state_prefixes.clone(),
            subjects: identity.subjects.clone(),
        }
    }
}

pub(crate) fn role_word(role: Role) -> &'static str {
    match role {
        Role::Unspecified => output::NONE,
        Role::Agent => "agent",
        Role::Service => "service",
        Role::Viewer => "viewer",
        Role::Editor => "editor",
        Role::Admin => "admin",
        Role::Core => "core",
    }
}

/// Never quotes what it reads: it may be a damaged secret.
fn read_token(path: &Path) -> Result<Token> {
    let mut text = String::new();
    let read = if path == Path::new("-") {
        io::stdin().lock().take(TOKEN_BYTES_MAX + 1).read_to_string(&mut text)
    } else {
        std::fs::File::open(path)
            .and_then(|file| file.take(TOKEN_BYTES_MAX + 1).read_to_string(&mut text))
    };
    let shown = path.display();
    let bytes = read.with_context(|| format!("failed to read the token from {shown}"))?;
    ensure!(bytes as u64 <= TOKEN_BYTES_MAX, "{shown}: is too long for a token");
    text.trim().parse().with_context(|| format!("{shown}: is no token"))
}

fn user() -> Option<Name> {
    let user = env::var("USER").or_else(|_| env::var("LOGNAME")).ok()?;
    Name::new(user.to_ascii_lowercase()).ok()
}
