//! A copy of the core's whole state.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, IsTerminal as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use cnsmo_proto::pb::admin::{BackupRequest, BackupResponse};
use serde::Serialize;
use tonic::Streaming;

use crate::{
    args::Format,
    client::{Client, refused},
    output::{print_json, print_text, print_yaml, size},
};

/// Bytes between two looks at the progress.
const PROGRESS_BYTES: u64 = 4 << 20;

/// The file is there as a whole, or not at all. One that is there already is replaced.
pub(crate) async fn backup(client: &Client, format: Format, path: &Path) -> Result<()> {
    let mut core = client.admin().await?;
    let stream = core.backup(BackupRequest {}).await.map_err(refused)?.into_inner();
    let partial = Partial::create(path)?;
    let (revision, bytes) = receive(stream, &partial.file).await?;
    partial.finish(path).with_context(|| format!("failed to write {}", path.display()))?;
    print(format, path, revision, bytes)
}

async fn receive(mut stream: Streaming<BackupResponse>, mut file: &File) -> Result<(i64, u64)> {
    let (mut revision, mut bytes, mut shown) = (0, 0, 0);
    let progress = io::stderr().is_terminal();
    while let Some(piece) = stream.message().await.map_err(refused)? {
        revision = revision.max(piece.revision);
        file.write_all(&piece.data).context("failed to write the backup")?;
        bytes += piece.data.len() as u64;
        if progress && bytes - shown >= PROGRESS_BYTES {
            write!(io::stderr(), "\r{}", size(bytes))?;
            shown = bytes;
        }
    }
    if shown > 0 {
        writeln!(io::stderr(), "\r{}", size(bytes))?;
    }
    if bytes == 0 {
        bail!("the core sent an empty backup");
    }
    Ok((revision, bytes))
}

fn print(format: Format, path: &Path, revision: i64, bytes: u64) -> Result<()> {
    #[derive(Serialize)]
    struct Taken {
        file: String,
        revision: i64,
        bytes: u64,
    }
    let file = path.display().to_string();
    match format {
        Format::Table => print_text(&format!("{file}: revision {revision}, {}\n", size(bytes))),
        Format::Json => print_json(&Taken { file, revision, bytes }),
        Format::Yaml => print_yaml(&Taken { file, revision, bytes }),
    }
}

/// The file before it is complete, readable for its owner alone; removed unless it is finished.
struct Partial {
    path: PathBuf,
    file: File,
}

impl Partial {
    fn create(target: &Path) -> Result<Self> {
        let Some(name) = target.file_name() else { bail!("{}: no file", target.display()) };
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(".partial");
        let path = target.with_file_name(hidden);
        let failed = || format!("failed to create {}", path.display());
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(failed);
            }
            Ok(()) | Err(_) => {}
        }
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(&path);
        let file = file.with_context(failed)?;
        Ok(Self { path, file })
    }

    fn finish(self, target: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, target)?;
        let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // It has the target's name now, or shall not stay.
        let _ = fs::remove_file(&self.path);
    }
}
