//! Output of units: what the VM's journal has of them, read by journalctl(1).

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, SystemTime},
};

use serde_json::Value;
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    process::Command,
    sync::mpsc,
};

use super::{
    log::{LINE_BYTES_MAX, LINES_WAITING, Line},
    systemd::Systemd,
};

/// An entry as JSON: journald takes lines of 48 KiB, of which each byte may become four.
const ENTRY_BYTES_MAX: u64 = 256 << 10;
/// Of what journalctl has to complain about.
const COMPLAINT_BYTES_MAX: u64 = 4096;

/// The last `tail` entries of a unit (0: all that are kept), and with `follow` those from now on, until the receiver is
/// dropped. In a runtime.
pub(super) fn read(
    systemd: &Systemd,
    unit: &str,
    tail: usize,
    follow: bool,
) -> mpsc::Receiver<io::Result<Line>> {
    let (lines, receiver) = mpsc::channel(LINES_WAITING);
    let command = command(systemd, unit, tail, follow);
    let (program, journals) = (systemd.journalctl.display().to_string(), systemd.journals.clone());
    tokio::spawn(async move {
        let closed = lines.clone();
        let read = async {
            if let Err(error) = tell(command, &journals, &lines).await {
                let why = format!("the journal cannot be read by {program}: {error}");
                let _ = lines.send(Err(io::Error::new(error.kind(), why))).await;
            }
        };
        // Dropped with it, journalctl is killed.
        tokio::select! {
            () = closed.closed() => {}
            () = read => {}
        }
    });
    receiver
}

fn command(systemd: &Systemd, unit: &str, tail: usize, follow: bool) -> Command {
    let mut command = Command::new(&systemd.journalctl);
    // A bus that is named is that of a user's systemd: the VM's own is on the system bus.
    let scope = if systemd.bus.is_some() { "user-unit" } else { "unit" };
    command.arg(format!("--{scope}={unit}"));
    command.args(["--no-pager", "--all", "--output=json", "--output-fields=MESSAGE"]);
    command.arg(match tail {
        0 => "--lines=all".to_owned(),
        some => format!("--lines={some}"),
    });
    if follow {
        command.arg("--follow");
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.kill_on_drop(true);
    command
}

async fn tell(
    mut command: Command,
    journals: &[PathBuf],
    lines: &mpsc::Sender<io::Result<Line>>,
) -> io::Result<()> {
    // journalctl says nothing of that, and ends well.
    if !journals.iter().any(|journal| is_filled(journal)) {
        let folders: Vec<_> = journals.iter().map(|one| one.display().to_string()).collect();
        let why = format!("this VM keeps none: nothing is in {}", folders.join(" and "));
        return Err(io::Error::new(io::ErrorKind::NotFound, why));
    }
    let mut child = command.spawn()?;
    let (Some(output), Some(errors)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(io::ErrorKind::BrokenPipe.into());
    };
    let mut complaint = Vec::new();
    let mut errors = errors.take(COMPLAINT_BYTES_MAX);
    let (told, complained) = tokio::join!(entries(BufReader::new(output), lines), async {
        let read = errors.read_to_end(&mut complaint).await;
        drop(errors);
        read
    });
    told?;
    complained?;
    let status = child.wait().await?;
    if status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&complaint);
    Err(io::Error::other(format!("it ended with {status}: {}", complaint.trim())))
}

fn is_filled(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut all| all.next().is_some())
}

async fn entries(
    mut output: impl AsyncBufRead + Unpin,
    lines: &mpsc::Sender<io::Result<Line>>,
) -> io::Result<()> {
    loop {
        let mut entry = Vec::new();
        (&mut output).take(ENTRY_BYTES_MAX).read_until(b'\n', &mut entry).await?;
        if entry.is_empty() {
            return Ok(());
        }
        // What is no entry, such as `-- No entries --`, is nothing that the unit said.
        let Ok(entry) = serde_json::from_slice(&entry) else { continue };
        for line in parts(&entry) {
            if lines.send(Ok(line)).await.is_err() {
                return Ok(());
            }
        }
    }
}

fn parts(entry: &Value) -> Vec<Line> {
    let micros = entry["__REALTIME_TIMESTAMP"].as_str().and_then(|text| text.parse().ok());
    let time = SystemTime::UNIX_EPOCH + Duration::from_micros(micros.unwrap_or_default());
    let message = match &entry["MESSAGE"] {
        Value::String(text) => text.clone(),
        // Of what is not text, its bytes.
        Value::Array(bytes) => {
            let bytes = bytes.iter().filter_map(|byte| u8::try_from(byte.as_u64()?).ok());
            String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).into_owned()
        }
        _ => return Vec::new(),
    };
    let mut texts = Vec::new();
    for mut rest in message.split('\n') {
        while rest.len() > LINE_BYTES_MAX {
            let (text, more) = rest.split_at(rest.floor_char_boundary(LINE_BYTES_MAX));
            texts.push(text.to_owned());
            rest = more;
        }
        texts.push(rest.to_owned());
    }
    texts.into_iter().map(|text| Line { time, stream: "journal", text }).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// In place of journalctl: what it writes and how it ends.
    fn journalctl(folder: &Path, script: &str) -> Systemd {
        let program = folder.join("journalctl");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Systemd { bus: None, journalctl: program, journals: vec![folder.to_owned()] }
    }

    async fn all(systemd: &Systemd) -> Result<Vec<String>, String> {
        let mut lines = read(systemd, "a@b.service", 7, false);
        let mut texts = Vec::new();
        while let Some(line) = lines.recv().await {
            texts.push(line.map_err(|error| error.to_string())?.text);
        }
        Ok(texts)
    }

    #[tokio::test]
    async fn entries_come_as_lines_of_bounded_length() {
        let folder = tempfile::tempdir().unwrap();
        let long = "ä".repeat(LINE_BYTES_MAX);
        let entries = format!(
            r#"{{"__REALTIME_TIMESTAMP":"1500000","MESSAGE":"one\ntwo"}}
{{"__REALTIME_TIMESTAMP":"1600000","MESSAGE":[255,104,105]}}
{{"__REALTIME_TIMESTAMP":"1600000","MESSAGE":null}}
{{"__REALTIME_TIMESTAMP":"1700000","MESSAGE":"{long}"}}
"#
        );
        fs::write(folder.path().join("entries"), entries).unwrap();
        let script =
            format!("echo \"$@\" > {0}/arguments; cat {0}/entries", folder.path().display());
        let texts = all(&journalctl(folder.path(), &script)).await.unwrap();
        assert_eq!(texts[..3], ["one", "two", "\u{fffd}hi"]);
        assert_eq!(texts[3..].concat(), long);
        assert!(texts.iter().all(|text| text.len() <= LINE_BYTES_MAX));
        let arguments = fs::read_to_string(folder.path().join("arguments")).unwrap();
        assert!(arguments.starts_with("--unit=a@b.service ") && arguments.contains("--lines=7"));
        let line = parts(&serde_json::json!({"__REALTIME_TIMESTAMP": "1500000", "MESSAGE": ""}));
        assert_eq!(line[0].time, SystemTime::UNIX_EPOCH + Duration::from_millis(1500));
    }

    #[tokio::test]
    async fn a_vm_without_a_journal_says_so() {
        let folder = tempfile::tempdir().unwrap();
        // Nothing said, nothing wrong.
        let there = journalctl(folder.path(), "echo '-- No entries --'");
        assert!(all(&there).await.unwrap().is_empty());
        let empty = folder.path().join("empty");
        fs::create_dir(&empty).unwrap();
        let none = Systemd { journals: vec![empty, "/no/such".into()], ..there.clone() };
        let why = all(&none).await.unwrap_err();
        assert!(why.contains("this VM keeps none: nothing is in /") && why.contains("/no/such"));
        let broken = journalctl(folder.path(), "echo 'bad option' >&2; exit 3");
        let why = all(&broken).await.unwrap_err();
        assert!(why.ends_with("it ended with exit status: 3: bad option"), "{why}");
        let missing = Systemd { journalctl: "/no/such".into(), ..there };
        let why = all(&missing).await.unwrap_err();
        assert!(why.starts_with("the journal cannot be read by /no/such: No such file"), "{why}");
    }

    #[tokio::test]
    async fn whoever_follows_and_goes_ends_the_reader() {
        let folder = tempfile::tempdir().unwrap();
        let pid = folder.path().join("pid");
        let script =
            format!("echo $$ > {}; echo '{{\"MESSAGE\":\"a\"}}'; exec sleep 1000", pid.display());
        let mut lines = read(&journalctl(folder.path(), &script), "a.service", 0, true);
        assert_eq!(lines.recv().await.unwrap().unwrap().text, "a");
        let pid = fs::read_to_string(pid).unwrap();
        let process = format!("/proc/{}", pid.trim());
        assert!(Path::new(&process).exists());
        drop(lines);
        for _ in 0..500 {
            let stat = fs::read_to_string(format!("{process}/stat")).unwrap_or_default();
            if stat.is_empty() || stat.contains(") Z ") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the reader {} goes on", pid.trim());
    }
}
