//! Output of instances: files that the child appends to itself, so that it needs no agent.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use tokio::{sync::mpsc, time::sleep};

use super::child::Folder;

/// The streams of a child.
pub(super) const STREAMS: [&str; 2] = ["stdout", "stderr"];
/// Longer lines are told in parts.
pub(super) const LINE_BYTES_MAX: usize = 16 << 10;
/// Lines that a slow reader has not taken yet: then reading waits.
pub(super) const LINES_WAITING: usize = 256;
/// Between two looks for more, while somebody follows.
const FOLLOW_EVERY: Duration = Duration::from_millis(200);

/// A line of output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    /// Of a line of the past: no earlier than it was written. Of one that is followed: when it was seen.
    pub(super) time: SystemTime,
    /// stdout, stderr or journal.
    pub(super) stream: &'static str,
    /// Without its end; what is not UTF-8 is replaced.
    pub(super) text: String,
}

/// Keeps the output of a stream under `bytes_max`, and as much of the past beside it. The child writes on to the same
/// file: what it writes during this is lost.
pub(super) fn rotate(folder: &Folder, bytes_max: u64) -> io::Result<()> {
    for stream in STREAMS {
        let path = folder.log(stream);
        if fs::metadata(&path).is_ok_and(|file| file.len() >= bytes_max) {
            // The last part only: of a child that writes faster than is looked.
            let mut file = File::open(&path)?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(bytes_max)))?;
            let past = past(&path);
            fs::remove_file(&past)
                .or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) })?;
            let mut kept = File::options().write(true).create_new(true).open(past)?;
            io::copy(&mut file.take(bytes_max), &mut kept)?;
            File::options().write(true).open(&path)?.set_len(0)?;
        }
    }
    Ok(())
}

/// The last `tail` lines of each stream (0: all that are kept), and with `follow` those from now on, until the receiver
/// is dropped or the folder is gone. In a runtime.
pub(super) fn read(folder: Folder, tail: usize, follow: bool) -> mpsc::Receiver<io::Result<Line>> {
    let (lines, receiver) = mpsc::channel(LINES_WAITING);
    tokio::spawn(async move {
        let mut cursors = Vec::new();
        for stream in STREAMS {
            let cursor =
                Cursor { path: folder.log(stream), stream, offset: 0, inode: 0, rest: Vec::new() };
            let told = lines.clone();
            let read = tokio::task::spawn_blocking(move || cursor.catch_up(tail, &told));
            let Ok(Some(cursor)) = read.await else { return };
            cursors.push(cursor);
        }
        if !follow {
            return;
        }
        loop {
            tokio::select! {
                () = lines.closed() => return,
                () = sleep(FOLLOW_EVERY) => {}
            }
            for cursor in &mut cursors {
                match cursor.more() {
                    Ok(more) => {
                        for line in more {
                            if lines.send(Ok(line)).await.is_err() {
                                return;
                            }
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return,
                    Err(error) => {
                        let _ = lines.send(Err(error)).await;
                        return;
                    }
                }
            }
        }
    });
    receiver
}

/// How far a file has been read.
struct Cursor {
    path: PathBuf,
    stream: &'static str,
    offset: u64,
    inode: u64,
    /// A line that is not whole yet.
    rest: Vec<u8>,
}

impl Cursor {
    /// Tells the past. None: nobody listens, or it cannot be read, which has been told.
    fn catch_up(mut self, tail: usize, lines: &mpsc::Sender<io::Result<Line>>) -> Option<Self> {
        match self.past_lines(tail, lines) {
            Ok(true) => Some(self),
            Ok(false) => None,
            Err(error) => {
                let _ = lines.blocking_send(Err(error));
                None
            }
        }
    }

    fn past_lines(
        &mut self,
        tail: usize,
        lines: &mpsc::Sender<io::Result<Line>>,
    ) -> io::Result<bool> {
        let mut files = Vec::new();
        for path in [past(&self.path), self.path.clone()] {
            match File::open(&path) {
                Ok(file) => files.push(file),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        // Counted first, so that no more than one line is held.
        let mut count = 0;
        for file in &mut files {
            let length = file.metadata()?.len();
            let mut reader = BufReader::new(file.take(length));
            while !next_line(&mut reader)?.is_empty() {
                count += 1;
            }
            file.rewind()?;
        }
        let mut skip = if tail == 0 { 0 } else { count - tail.min(count) };
        for file in &mut files {
            let (length, inode) = (file.metadata()?.len(), file.metadata()?.ino());
            let time = file.metadata()?.modified()?;
            (self.offset, self.inode) = (length, inode);
            let mut reader = BufReader::new(file.take(length));
            loop {
                let line = next_line(&mut reader)?;
                if line.is_empty() {
                    break;
                }
                if skip > 0 {
                    skip -= 1;
                } else if lines.blocking_send(Ok(self.line(time, &line))).is_err() {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// What has been written since.
    fn more(&mut self) -> io::Result<Vec<Line>> {
        let mut file = File::open(&self.path)?;
        let data = file.metadata()?;
        if data.ino() != self.inode || data.len() < self.offset {
            (self.offset, self.inode) = (0, data.ino());
        }
        if data.len() == self.offset {
            return Ok(Vec::new());
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let mut reader = BufReader::new(file.take((LINES_WAITING * LINE_BYTES_MAX) as u64));
        let mut lines = Vec::new();
        loop {
            let part = next_line(&mut reader)?;
            if part.is_empty() {
                return Ok(lines);
            }
            self.offset += part.len() as u64;
            self.rest.extend(part);
            if self.rest.ends_with(b"\n") || self.rest.len() >= LINE_BYTES_MAX {
                let whole = std::mem::take(&mut self.rest);
                lines.push(self.line(SystemTime::now(), &whole));
            }
        }
    }

    fn line(&self, time: SystemTime, bytes: &[u8]) -> Line {
        let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        Line { time, stream: self.stream, text: String::from_utf8_lossy(bytes).into_owned() }
    }
}

/// With its end, or as much as is told at once. Empty: there is no more.
fn next_line(reader: &mut impl io::BufRead) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    reader.take(LINE_BYTES_MAX as u64).read_until(b'\n', &mut line)?;
    Ok(line)
}

fn past(path: &Path) -> PathBuf {
    path.with_extension("log.1")
}
