//! A QMP client that sees every line.

use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A session.
pub struct Qmp {
    out: UnixStream,
    lines: BufReader<UnixStream>,
    /// Events that came and nobody has looked at.
    pub events: VecDeque<Value>,
    /// What the server said first.
    pub greeting: Value,
}

impl Qmp {
    /// Connects, as soon as somebody listens at `path`.
    pub fn connect(path: &Path) -> Qmp {
        let end = Instant::now() + Duration::from_secs(60);
        let out = loop {
            match UnixStream::connect(path) {
                Ok(s) => break s,
                Err(e) if Instant::now() > end => panic!("{}: {e}", path.display()),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        out.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let lines = BufReader::new(out.try_clone().unwrap());
        let mut q = Qmp { out, lines, events: VecDeque::new(), greeting: Value::Null };
        q.greeting = q.line().expect("a greeting");
        q
    }

    /// Connects and negotiates.
    pub fn negotiated(path: &Path) -> Qmp {
        let mut q = Qmp::connect(path);
        q.ok("qmp_capabilities", json!({}));
        q
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.out.write_all(bytes.as_ref()).expect("the server reads");
    }

    /// The next message; `None` at the end.
    pub fn line(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.lines.read_line(&mut line).expect("the server answers") {
            0 => None,
            _ => Some(serde_json::from_str(&line).expect("each line is JSON")),
        }
    }

    /// The next message that is no event; events before it are kept.
    pub fn reply(&mut self) -> Value {
        loop {
            let line = self.line().expect("a reply");
            match line.get("event") {
                Some(_) => self.events.push_back(line),
                None => return line,
            }
        }
    }

    /// Executes a command and waits for its reply.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        self.send(json!({ "execute": command, "arguments": arguments }).to_string());
        self.reply()
    }

    /// Executes a command that succeeds.
    pub fn ok(&mut self, command: &str, arguments: Value) -> Value {
        let reply = self.execute(command, arguments);
        match reply.get("return") {
            Some(v) => v.clone(),
            None => panic!("{command}: {reply}"),
        }
    }

    /// Executes a command that fails; returns class and description.
    pub fn err(&mut self, command: &str, arguments: Value) -> (String, String) {
        let reply = self.execute(command, arguments);
        error(&reply)
    }

    /// The next event called `name`; others before it are dropped.
    pub fn event(&mut self, name: &str) -> Value {
        loop {
            let event = self.events.pop_front().or_else(|| self.line());
            let event = event.unwrap_or_else(|| panic!("the session ended before {name}"));
            if event["event"] == name {
                return event;
            }
        }
    }

    /// Names of the events so far.
    pub fn event_names(&mut self) -> Vec<String> {
        self.events.drain(..).map(|e| e["event"].as_str().unwrap().to_string()).collect()
    }
}

/// Class and description of an error reply.
pub fn error(reply: &Value) -> (String, String) {
    let text = |k: &str| reply["error"][k].as_str().unwrap_or_else(|| panic!("{reply}")).into();
    (text("class"), text("desc"))
}
