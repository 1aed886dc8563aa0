//! A QMP client: one request after another, events kept for whoever asks.

use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A session with a machine.
pub struct Client {
    out: UnixStream,
    lines: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

/// Why a request failed.
#[derive(Debug)]
pub enum Failure {
    /// The machine said no.
    Refused(String),
    /// It cannot be talked to (any more).
    Lost(io::Error),
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Failure {
        Failure::Lost(e)
    }
}

impl Client {
    /// Connects to the socket at `path` and negotiates.
    pub fn connect(path: &Path) -> Result<Client, Failure> {
        let out = UnixStream::connect(path)?;
        let lines = BufReader::new(out.try_clone()?);
        let mut c = Client { out, lines, events: VecDeque::new() };
        c.line()?;
        c.execute("qmp_capabilities", json!({}))?;
        Ok(c)
    }

    fn line(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        serde_json::from_str(&line).map_err(io::Error::other)
    }

    /// Sends a message as it is; returns the reply to it.
    pub fn raw(&mut self, message: &Value) -> Result<Value, Failure> {
        self.out.write_all(message.to_string().as_bytes())?;
        loop {
            let v = self.line()?;
            match v.get("event") {
                Some(_) => self.events.push_back(v),
                None => return Ok(v),
            }
        }
    }

    /// Runs a command.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Failure> {
        let mut reply = self.raw(&json!({ "execute": command, "arguments": arguments }))?;
        match reply.get_mut("return") {
            Some(v) => Ok(v.take()),
            None => {
                let text = reply["error"]["desc"].as_str().unwrap_or("it gave no reason");
                Err(Failure::Refused(text.to_string()))
            }
        }
    }

    /// The next event until `end`; `None` when time is up.
    pub fn event(&mut self, end: Option<Instant>) -> Result<Option<Value>, Failure> {
        if let Some(e) = self.events.pop_front() {
            return Ok(Some(e));
        }
        let left = end.map(|e| e.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Ok(None);
        }
        self.out.set_read_timeout(left)?;
        let line = self.line();
        self.out.set_read_timeout(None)?;
        match line {
            Ok(v) => Ok(Some(v)),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                Ok(None)
            }
            Err(e) => Err(e.into()),
        }
    }
}
