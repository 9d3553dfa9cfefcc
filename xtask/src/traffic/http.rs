//! As much of HTTP/1.1 as it takes to see what curl does not show: one connection that is kept, and when bytes come.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt};

/// In bytes.
const RECEIVE_BUFFER: usize = 128 << 10;
/// Of one line of an answer's head.
const LINE_MAX: u64 = 8 << 10;

/// A kept connection to a web server.
#[derive(Debug)]
pub(crate) struct Client(BufReader<TcpStream>);

impl Client {
    /// Connects; `limit` is for this and for each wait for bytes after it. What comes faster than it is read waits with the
    /// sender: only little of it is kept here, so that a pause on the way is soon seen.
    pub(crate) fn connect(to: SocketAddr, limit: Duration) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&to, limit)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        stream.set_nodelay(true)?;
        setsockopt(&stream, sockopt::RcvBuf, &RECEIVE_BUFFER)?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Asks for a path and returns the length of the body, which is then to be read from [`Client::body`].
    pub(crate) fn get(&mut self, path: &str) -> io::Result<u64> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: shop\r\n\r\n");
        self.0.get_mut().write_all(request.as_bytes())?;
        let status = self.line()?;
        if !status.starts_with("HTTP/1.1 200 ") {
            return Err(io::Error::other(format!("the server answered `{status}`")));
        }
        let mut length = None;
        loop {
            let line = self.line()?;
            if line.is_empty() {
                return length.ok_or_else(|| io::Error::other("an answer without a length"));
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().ok();
            }
        }
    }

    /// Where the body comes from.
    pub(crate) fn body(&mut self) -> &mut impl io::Read {
        &mut self.0
    }

    /// A short text.
    pub(crate) fn text(&mut self, path: &str) -> io::Result<String> {
        let length = self.get(path)?.min(LINE_MAX);
        let mut body = String::new();
        (&mut self.0).take(length).read_to_string(&mut body)?;
        Ok(body.trim().to_owned())
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        (&mut self.0).take(LINE_MAX).read_line(&mut line)?;
        if line.ends_with('\n') {
            Ok(line.trim_end().to_owned())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }
}
