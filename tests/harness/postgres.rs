//! A real PostgreSQL in a temporary folder, gone when its value is.
//!
//! A shell guards it: it waits for the end of a pipe that this process holds, so the server stops and its folder goes
//! however this process ends, SIGKILL included.

use std::{
    env, fs,
    io::{BufRead as _, BufReader, Read as _},
    net::TcpListener,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, bail, ensure};
use nix::unistd::Uid;

/// Where Debian's package postgresql-15 puts the server's programs.
pub const PROGRAMS: &str = "/usr/lib/postgresql/15/bin";
/// The default one of PostgreSQL: it is part of the socket's name.
const PORT: u16 = 5432;
/// PostgreSQL refuses to run as root; the package makes this user.
const USER: &str = "postgres";
/// Arguments: folder, programs, options of the server, then what makes a command run as another user.
const GUARD: &str = r#"
folder=$1 programs=$2 options=$3
shift 3
finish() {
  "$@" "$programs/pg_ctl" --pgdata="$folder/data" --mode=immediate stop >"$folder/stop.log" 2>&1
  rm -rf "$folder"
}
trap 'finish "$@"' EXIT
trap 'exit 1' HUP INT TERM
set -e
"$@" "$programs/initdb" --pgdata="$folder/data" --auth=trust --username=cnsmo --encoding=UTF8 --locale=C \
  --no-instructions --no-sync >"$folder/initdb.log"
"$@" "$programs/pg_ctl" --pgdata="$folder/data" --options="$options" --log="$folder/log" start >"$folder/start.log"
echo ready
set +e
cat >/dev/null
"#;

/// What a commit waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// The disk, as in production.
    Disk,
    /// Nothing: for tests in which no machine fails.
    None,
}

/// With what a server proves who it is.
#[derive(Debug)]
pub struct Tls {
    /// PEM.
    pub certificate: String,
    /// PEM.
    pub key: String,
}

/// A server with databases of its own, reached by a unix socket. Dropping it stops it and removes its folder.
#[derive(Debug)]
pub struct Postgres {
    guard: Child,
    folder: PathBuf,
    port: u16,
    databases: AtomicU32,
}

impl Postgres {
    /// Returns once it takes connections.
    ///
    /// # Errors
    /// The programs are not installed, or the server does not start.
    pub fn start(sync: Sync) -> anyhow::Result<Self> {
        Self::start_with(sync, None)
    }

    /// As [`Self::start`]; with `tls` it is also reached at a port of 127.0.0.1, by TLS and with a password alone.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(sync: Sync, tls: Option<&Tls>) -> anyhow::Result<Self> {
        ensure!(
            Path::new(PROGRAMS).join("postgres").exists(),
            "there is no PostgreSQL in {PROGRAMS}: `cargo xtask setup` as root installs it"
        );
        let folder = unique();
        // The server's user must be able to make its folder in it.
        fs::create_dir(&folder).with_context(|| format!("making {}", folder.display()))?;
        let as_user: Vec<String> = if Uid::effective().is_root() {
            std::os::unix::fs::chown(&folder, Some(user_id()?), None)?;
            let (user, group) = (format!("--reuid={USER}"), format!("--regid={USER}"));
            vec!["setpriv".into(), user, group, "--clear-groups".into()]
        } else {
            vec!["env".into()]
        };
        let fsync = if sync == Sync::Disk { "on" } else { "off" };
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let network = match tls {
            None => "-c listen_addresses=".to_owned(),
            Some(tls) => tls_options(&folder, port, tls)?,
        };
        let options = format!(
            "{network} -c unix_socket_directories={0} -c fsync={fsync} -c max_connections=100",
            folder.display()
        );
        let guard = Command::new("sh")
            .args(["-c", GUARD, "guard"])
            .arg(&folder)
            .args([PROGRAMS, &options])
            .args(as_user)
            .current_dir(&folder)
            // Ctrl-C is for its owner.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting a shell for PostgreSQL")?;
        let port = if tls.is_some() { port } else { PORT };
        let mut postgres = Self { guard, folder, port, databases: AtomicU32::new(0) };
        postgres.wait_until_ready()?;
        Ok(postgres)
    }

    /// Makes an empty database and returns its URL.
    ///
    /// # Errors
    /// The server refuses.
    pub fn create_database(&self) -> anyhow::Result<String> {
        let name = format!("test{}", self.databases.fetch_add(1, Ordering::Relaxed));
        self.sql("postgres", &format!("CREATE DATABASE {name}"))?;
        Ok(self.url(&name))
    }

    /// For sqlx and for `cnsmo-core --store`.
    pub fn url(&self, database: &str) -> String {
        let (folder, port) = (self.folder.display(), self.port);
        format!("postgres:///{database}?host={folder}&port={port}&user=cnsmo")
    }

    /// Runs a statement by psql, and returns the rows, one a line.
    ///
    /// # Errors
    /// The server refuses; the text is its own.
    pub fn sql(&self, database: &str, statement: &str) -> anyhow::Result<String> {
        let output = Command::new(Path::new(PROGRAMS).join("psql"))
            .args(["--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--username=cnsmo"])
            .arg(format!("--host={}", self.folder.display()))
            .arg(format!("--port={}", self.port))
            .args(["--dbname", database, "--command", statement])
            .output()
            .context("starting psql")?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "`{statement}` on {database}: {}", error.trim());
        Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
    }

    fn wait_until_ready(&mut self) -> anyhow::Result<()> {
        let mut said = String::new();
        let stdout = self.guard.stdout.take().context("the shell has no output")?;
        BufReader::new(stdout).read_line(&mut said)?;
        if said.trim() == "ready" {
            return Ok(());
        }
        let mut error = String::new();
        if let Some(mut stderr) = self.guard.stderr.take() {
            stderr.read_to_string(&mut error)?;
        }
        bail!("PostgreSQL does not start: {}", error.trim())
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        // The folder is gone when the shell is.
        let _ = self.guard.wait();
    }
}

/// Writes what the server reads of TLS, as its user, and says so.
fn tls_options(folder: &Path, port: u16, tls: &Tls) -> anyhow::Result<String> {
    const RULES: &str = "local all all trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n";
    for (name, text) in [("tls.crt", &*tls.certificate), ("tls.key", &*tls.key), ("hba", RULES)] {
        let path = folder.join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        if Uid::effective().is_root() {
            std::os::unix::fs::chown(&path, Some(user_id()?), None)?;
        }
    }
    let folder = folder.display();
    Ok(format!(
        "-c listen_addresses=127.0.0.1 -c port={port} -c ssl=on -c ssl_cert_file={folder}/tls.crt \
         -c ssl_key_file={folder}/tls.key -c hba_file={folder}/hba"
    ))
}

/// Short: a socket's path has at most 107 bytes.
fn unique() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    env::temp_dir().join(format!("cnsmo-pg-{}-{n}", process::id()))
}

fn user_id() -> anyhow::Result<u32> {
    let user = nix::unistd::User::from_name(USER)?;
    let user =
        user.with_context(|| format!("there is no user {USER}: is postgresql-15 installed?"))?;
    Ok(user.uid.as_raw())
}
