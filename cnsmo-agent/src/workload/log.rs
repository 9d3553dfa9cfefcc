//! Output of instances: files that the child appends to itself, so that it needs no agent.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
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
/// What is read of a stream at a time.
const READ_BYTES: u64 = 256 << 10;
/// Between two looks for more, while somebody follows.
const FOLLOW_EVERY: Duration = Duration::from_millis(200);

/// A line of output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    /// When its file was last written to, or a little later: no earlier than the line was.
    pub(super) time: SystemTime,
    /// stdout, stderr or journal.
    pub(super) stream: &'static str,
    /// Without its end; what is not UTF-8 is replaced.
    pub(super) text: String,
}

/// The output of one instance, of which the newest part is kept. Places in a stream count from the oldest byte that was there
/// when this value was made, so that they stay when the file is cut.
#[derive(Debug)]
pub(super) struct Output {
    folder: Folder,
    /// Where the file of each stream begins; what is before is in the past. Locked while files are cut or read.
    begin: Mutex<[u64; STREAMS.len()]>,
}

impl Output {
    pub(super) fn new(folder: Folder) -> Self {
        let length = |stream| fs::metadata(past(&folder.log(stream))).map_or(0, |file| file.len());
        let begin = Mutex::new(STREAMS.map(length));
        Self { folder, begin }
    }

    /// Keeps each stream under `bytes_max`, and as much of the past beside it. The child writes on to the same file: what
    /// it writes during this is lost.
    pub(super) fn rotate(&self, bytes_max: u64) -> io::Result<()> {
        let mut begin = self.begin();
        for (stream, begin) in STREAMS.into_iter().zip(begin.iter_mut()) {
            let path = self.folder.log(stream);
            if fs::metadata(&path).is_ok_and(|file| file.len() >= bytes_max) {
                // The last part only: of a child that writes faster than is looked.
                let mut file = File::open(&path)?;
                let length = file.metadata()?.len();
                file.seek(SeekFrom::Start(length.saturating_sub(bytes_max)))?;
                let past = past(&path);
                fs::remove_file(&past).or_else(unless_missing)?;
                let mut kept = File::options().write(true).create_new(true).open(past)?;
                io::copy(&mut file.take(bytes_max), &mut kept)?;
                File::options().write(true).open(&path)?.set_len(0)?;
                *begin += length;
            }
        }
        Ok(())
    }

    fn begin(&self) -> MutexGuard<'_, [u64; STREAMS.len()]> {
        // What a panic could leave behind is a place that is found to be cut.
        self.begin.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_gone(&self) -> bool {
        !self.folder.exists()
    }
}

/// The last `tail` lines of each stream (0: all that are kept), and with `follow` those from now on, until the receiver
/// is dropped or the folder is gone. In a runtime.
pub(super) fn read(
    output: Arc<Output>,
    tail: usize,
    follow: bool,
) -> mpsc::Receiver<io::Result<Line>> {
    let (lines, receiver) = mpsc::channel(LINES_WAITING);
    tokio::spawn(async move {
        if let Err(error) = tell(output, tail, follow, &lines).await {
            // Nobody may listen any more.
            let _ = lines.send(Err(error)).await;
        }
    });
    receiver
}

async fn tell(
    output: Arc<Output>,
    tail: usize,
    follow: bool,
    lines: &mpsc::Sender<io::Result<Line>>,
) -> io::Result<()> {
    let counted = output.clone();
    let count = move || -> io::Result<Vec<Cursor>> {
        (0..STREAMS.len()).map(|stream| Cursor::new(&counted, stream, tail)).collect()
    };
    let mut cursors = tokio::task::spawn_blocking(count).await??;
    loop {
        // Asked first: what it wrote before its end is still read.
        let is_last = output.is_gone();
        let mut is_still = true;
        for cursor in &mut cursors {
            let more = cursor.more(&output)?;
            is_still &= more.is_empty();
            for line in more {
                if lines.send(Ok(line)).await.is_err() {
                    return Ok(());
                }
            }
        }
        if is_still && (is_last || !follow) {
            break;
        }
        if is_still {
            tokio::select! {
                () = lines.closed() => return Ok(()),
                () = sleep(FOLLOW_EVERY) => {}
            }
        }
    }
    for line in cursors.iter_mut().filter_map(Cursor::unfinished) {
        if lines.send(Ok(line)).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// How far a stream has been read.
struct Cursor {
    stream: usize,
    path: PathBuf,
    next: u64,
    /// A line that is not whole yet.
    rest: Vec<u8>,
}

impl Cursor {
    /// Before the last `tail` lines of what is kept.
    fn new(output: &Output, stream: usize, tail: usize) -> io::Result<Self> {
        let path = output.folder.log(STREAMS[stream]);
        let begin = output.begin()[stream];
        // Counted first, so that no more than one line is held.
        let mut files = [past(&path), path.clone()].map(|path| open(&path));
        let mut count = 0;
        for file in files.iter_mut().filter_map(|file| file.as_mut().ok()?.as_mut()) {
            let mut reader = BufReader::new(&mut *file);
            while !next_line(&mut reader)?.is_empty() {
                count += 1;
            }
            file.rewind()?;
        }
        let mut skip = if tail == 0 { 0 } else { count - tail.min(count) };
        let [past, now] = files;
        let (past, now) = (past?, now?);
        let length = past.as_ref().map_or(Ok(0), |file| file.metadata().map(|data| data.len()))?;
        let mut next = begin.saturating_sub(length);
        for file in past.into_iter().chain(now) {
            let mut reader = BufReader::new(file);
            while skip > 0 {
                let line = next_line(&mut reader)?;
                if line.is_empty() {
                    break;
                }
                (skip, next) = (skip - 1, next + line.len() as u64);
            }
        }
        Ok(Self { stream, path, next, rest: Vec::new() })
    }

    /// What has been written since, up to a limit; nothing: that was all.
    fn more(&mut self, output: &Output) -> io::Result<Vec<Line>> {
        let begin = output.begin();
        let begin = begin[self.stream];
        let mut lines = Vec::new();
        if self.next < begin {
            match open(&past(&self.path))? {
                Some(file) => self.read(file, begin, &mut lines)?,
                None => self.next = begin,
            }
        }
        if self.next >= begin
            && lines.is_empty()
            && let Some(file) = open(&self.path)?
        {
            let end = begin + file.metadata()?.len();
            // Somebody else has emptied it.
            self.next = if self.next > end { begin } else { self.next };
            self.read(file, end, &mut lines)?;
        }
        Ok(lines)
    }

    /// From a file that ends at the place `end`.
    fn read(&mut self, mut file: File, end: u64, lines: &mut Vec<Line>) -> io::Result<()> {
        let data = file.metadata()?;
        let begin = end.saturating_sub(data.len());
        if self.next < begin {
            // So far behind that it is not kept any more.
            self.next = begin;
            lines.extend(self.unfinished());
        }
        if self.next >= end {
            return Ok(());
        }
        let time = data.modified()?;
        file.seek(SeekFrom::Start(self.next - begin))?;
        let mut reader = BufReader::new(file.take(READ_BYTES.min(end - self.next)));
        loop {
            let part = next_line(&mut reader)?;
            if part.is_empty() {
                return Ok(());
            }
            self.next += part.len() as u64;
            self.rest.extend(part);
            if self.rest.ends_with(b"\n") || self.rest.len() >= LINE_BYTES_MAX {
                let whole = std::mem::take(&mut self.rest);
                lines.push(self.line(time, &whole));
            }
        }
    }

    /// What there is of a line whose end does not come.
    fn unfinished(&mut self) -> Option<Line> {
        let rest = std::mem::take(&mut self.rest);
        (!rest.is_empty()).then(|| self.line(SystemTime::now(), &rest))
    }

    fn line(&self, time: SystemTime, bytes: &[u8]) -> Line {
        let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        let text = String::from_utf8_lossy(bytes).into_owned();
        Line { time, stream: STREAMS[self.stream], text }
    }
}

/// With its end, or as much as is told at once. Empty: there is no more.
fn next_line(reader: &mut impl io::BufRead) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    reader.take(LINE_BYTES_MAX as u64).read_until(b'\n', &mut line)?;
    Ok(line)
}

fn open(path: &Path) -> io::Result<Option<File>> {
    File::open(path).map(Some).or_else(unless_missing)
}

fn unless_missing<T: Default>(error: io::Error) -> io::Result<T> {
    if error.kind() == io::ErrorKind::NotFound { Ok(T::default()) } else { Err(error) }
}

fn past(path: &Path) -> PathBuf {
    path.with_extension("log.1")
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    struct Child {
        output: Arc<Output>,
        path: PathBuf,
        _folder: tempfile::TempDir,
    }

    impl Child {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let own = folder.path().join("one");
            fs::create_dir(&own).unwrap();
            let own = Folder::new(own, None);
            let path = own.log("stdout");
            Self { output: Arc::new(Output::new(own)), path, _folder: folder }
        }

        fn write(&self, text: &str) {
            let file = File::options().append(true).create(true).open(&self.path);
            file.unwrap().write_all(text.as_bytes()).unwrap();
        }
    }

    async fn next(lines: &mut mpsc::Receiver<io::Result<Line>>) -> Option<String> {
        let line = tokio::time::timeout(PATIENCE, lines.recv()).await.expect("a line or the end");
        line.map(|line| line.unwrap().text)
    }

    async fn all(mut lines: mpsc::Receiver<io::Result<Line>>) -> Vec<String> {
        let mut told = Vec::new();
        while let Some(text) = next(&mut lines).await {
            told.push(text);
        }
        told
    }

    #[tokio::test]
    async fn the_last_lines_are_told_those_of_the_past_too() {
        let child = Child::new();
        assert!(all(read(child.output.clone(), 0, false)).await.is_empty());
        child.write("1\n2\n3\n");
        child.output.rotate(1).unwrap();
        child.output.rotate(1).unwrap();
        child.write("4\n5");
        assert_eq!(all(read(child.output.clone(), 0, false)).await, ["", "4", "5"]);
        child.output.rotate(100).unwrap();
        child.write("\n6\n");
        assert_eq!(all(read(child.output.clone(), 2, false)).await, ["5", "6"]);
        // As the next agent finds it.
        let next = Arc::new(Output::new(child.output.folder.clone()));
        assert_eq!(all(read(next, 0, false)).await, ["", "4", "5", "6"]);
    }

    #[tokio::test]
    async fn who_follows_misses_nothing_when_files_are_cut_and_is_told_of_the_end() {
        let child = Child::new();
        child.write("0\n");
        let mut lines = read(child.output.clone(), 1, true);
        assert_eq!(next(&mut lines).await.unwrap(), "0");
        // Cut right after it was written, before the next look, more than once.
        for n in 1..100_u32 {
            child.write(&format!("{n} half"));
            child.output.rotate(7).unwrap();
            child.write(" whole\n");
            assert_eq!(next(&mut lines).await.unwrap(), format!("{n} half whole"));
        }
        child.write("last");
        // Looked at, and not told before its end.
        tokio::time::sleep(FOLLOW_EVERY * 2).await;
        assert!(lines.try_recv().is_err());
        fs::remove_dir_all(child.path.parent().unwrap()).unwrap();
        assert_eq!(next(&mut lines).await.unwrap(), "last");
        assert_eq!(next(&mut lines).await, None);
    }

    #[tokio::test]
    async fn who_is_too_far_behind_goes_on_where_it_is_kept() {
        let child = Child::new();
        let mut cursor = Cursor::new(&child.output, 0, 0).unwrap();
        child.write("aaaa\nbb");
        let texts = |lines: Vec<Line>| lines.into_iter().map(|line| line.text).collect::<Vec<_>>();
        assert_eq!(texts(cursor.more(&child.output).unwrap()), ["aaaa"]);
        child.write("bb\ncccc\n");
        child.output.rotate(5).unwrap();
        child.write("dddd\n");
        assert_eq!(texts(cursor.more(&child.output).unwrap()), ["bb", "cccc"]);
        assert_eq!(texts(cursor.more(&child.output).unwrap()), ["dddd"]);
        assert!(cursor.more(&child.output).unwrap().is_empty());
        // Emptied by somebody else.
        File::options().write(true).open(&child.path).unwrap().set_len(0).unwrap();
        child.write("e\n");
        assert_eq!(texts(cursor.more(&child.output).unwrap()), ["e"]);
    }
}
