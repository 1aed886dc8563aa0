//! One client's session in the control protocol: negotiation, requests, replies, events.

use super::Hub;
use super::framer::Frame;
use crate::machine::Machine;
use crate::qapi::{self, Context, Error, Members};
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Requests of one session that may await their replies; input is not read beyond.
pub const MAX_PENDING: usize = 8;
/// Bytes that may wait for a client to read them. A client that lets more wait is hung up on.
pub const MAX_OUTPUT: usize = 16 << 20;
/// Bytes of output above which no further requests are read.
const SLOW_OUTPUT: usize = 1 << 20;

/// What people are prompted with.
const PROMPT: &str = "(tandem) ";

/// What waits for the client.
#[derive(Default)]
struct Outbox {
    bytes: VecDeque<u8>,
    /// More came than may wait.
    overflow: bool,
}

/// A session.
pub struct Session {
    hub: Arc<Hub>,
    pretty: bool,
    negotiated: AtomicBool,
    pending: AtomicUsize,
    outbox: Mutex<Outbox>,
    /// Descriptors that came with the client's messages, oldest first.
    received: Mutex<VecDeque<OwnedFd>>,
    /// Descriptors that the client has named (`getfd`).
    named: Mutex<BTreeMap<String, OwnedFd>>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One JSON value as a line.
pub fn line(v: &Value) -> Vec<u8> {
    let mut text = v.to_string().into_bytes();
    text.extend(b"\r\n");
    text
}

impl Session {
    fn new(hub: &Arc<Hub>, pretty: bool) -> Arc<Session> {
        let session = Arc::new(Session {
            hub: hub.clone(),
            pretty,
            negotiated: AtomicBool::new(false),
            pending: AtomicUsize::new(0),
            outbox: Mutex::default(),
            received: Mutex::default(),
            named: Mutex::default(),
        });
        hub.add(&session);
        session
    }

    /// A session with a person, who is prompted and never told of events.
    pub fn human(hub: &Arc<Hub>) -> Arc<Session> {
        let session = Session::new(hub, false);
        let package = crate::commands::machine::version().package;
        session.write(format!("{package} monitor; help lists the commands\r\n{PROMPT}").as_bytes());
        session
    }

    /// A session with a program, which is greeted.
    pub fn control(hub: &Arc<Hub>, pretty: bool) -> Arc<Session> {
        let session = Session::new(hub, pretty);
        let version = qapi::Type::write(crate::commands::machine::version());
        session.send(&json!({ "QMP": { "version": version, "capabilities": [] } }));
        session
    }

    /// Sends one message.
    fn send(&self, message: &Value) {
        if self.pretty {
            let mut text = serde_json::to_vec_pretty(message).unwrap_or_default();
            text.extend(b"\r\n");
            self.write(&text);
        } else {
            self.write(&line(message));
        }
    }

    /// Sends an event, if the client has negotiated.
    pub fn send_event(&self, line: &[u8]) {
        if self.negotiated.load(Ordering::Acquire) {
            self.write(line);
        }
    }

    fn write(&self, bytes: &[u8]) {
        let mut out = lock(&self.outbox);
        if out.bytes.len() + bytes.len() > MAX_OUTPUT {
            out.overflow = true;
        }
        if !out.overflow {
            out.bytes.extend(bytes);
        }
    }

    /// Hands waiting output to `write`, which takes a number of bytes from the front.
    pub fn flush(
        &self,
        mut write: impl FnMut(&[u8]) -> std::io::Result<usize>,
    ) -> std::io::Result<()> {
        let mut out = lock(&self.outbox);
        while !out.bytes.is_empty() {
            match write(out.bytes.as_slices().0) {
                Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
                Ok(n) => drop(out.bytes.drain(..n)),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Whether output waits.
    pub fn has_output(&self) -> bool {
        !lock(&self.outbox).bytes.is_empty()
    }

    /// Whether the client lets too much output wait.
    pub fn overflowed(&self) -> bool {
        lock(&self.outbox).overflow
    }

    /// Whether a further request may be worked on.
    pub fn may_ask(&self) -> bool {
        self.pending.load(Ordering::Acquire) < MAX_PENDING
    }

    /// Whether further input may be read.
    pub fn wants_input(&self) -> bool {
        self.may_ask() && lock(&self.outbox).bytes.len() < SLOW_OUTPUT
    }

    /// Whether every request has its reply and all output is taken.
    pub fn is_idle(&self) -> bool {
        self.pending.load(Ordering::Acquire) == 0 && !self.has_output()
    }

    /// Keeps descriptors that came with input.
    pub fn receive_fds(&self, fds: impl IntoIterator<Item = OwnedFd>) {
        let mut all = lock(&self.received);
        all.extend(fds);
        // A client names each before it sends the next; what it does not name is closed.
        while all.len() > MAX_PENDING {
            all.pop_front();
        }
    }

    /// The oldest descriptor that came and has no name.
    pub fn take_received(&self) -> Option<OwnedFd> {
        lock(&self.received).pop_front()
    }

    /// Descriptors by name.
    pub fn named_fds(&self) -> MutexGuard<'_, BTreeMap<String, OwnedFd>> {
        lock(&self.named)
    }

    /// Takes one frame of input; the result is work for the main loop's thread.
    pub fn request(self: &Arc<Self>, frame: Frame) -> impl FnOnce(&mut Machine) + Send + 'static {
        self.pending.fetch_add(1, Ordering::AcqRel);
        let session = self.clone();
        let parsed = match frame {
            Frame::Line(line) => Ok(Asked::Line(line)),
            Frame::Bad(why) => Err(Error::new(format!("JSON parse error: {why}"))),
            Frame::Message(bytes) => serde_json::from_slice::<Value>(&bytes)
                .map(Asked::Message)
                .map_err(|e| Error::new(format!("JSON parse error: {e}"))),
        };
        move |vm: &mut Machine| {
            match parsed {
                Ok(Asked::Line(line)) => {
                    let text = super::human::execute(vm, &line).replace('\n', "\r\n");
                    session.write(format!("{text}{PROMPT}").as_bytes());
                }
                Ok(Asked::Message(m)) => session.send(&session.execute(vm, Ok(m))),
                Err(e) => session.send(&session.execute(vm, Err(e))),
            }
            session.pending.fetch_sub(1, Ordering::AcqRel);
            session.hub.ring();
        }
    }

    fn execute(self: &Arc<Self>, vm: &mut Machine, parsed: qapi::Result<Value>) -> Value {
        let mut id = None;
        let result = parsed.and_then(|v| {
            let request = Request::read(v, &mut id)?;
            self.dispatch(vm, request)
        });
        let mut reply = match result {
            Ok(v) => json!({ "return": v }),
            Err(e) => json!({ "error": e.to_json() }),
        };
        if let Some(id) = id {
            reply["id"] = id;
        }
        reply
    }

    fn dispatch(self: &Arc<Self>, vm: &mut Machine, request: Request) -> qapi::Result<Value> {
        let negotiates = request.command == "qmp_capabilities";
        match (self.negotiated.load(Ordering::Acquire), negotiates) {
            (false, false) => {
                let text = "Expecting capabilities negotiation with 'qmp_capabilities'";
                return Err(Error::no_command(text));
            }
            (true, true) => {
                let text = "Capabilities negotiation is already complete, command ignored";
                return Err(Error::no_command(text));
            }
            _ => {}
        }
        let command = qapi::command(&request.command)?;
        let result = (command.run)(&mut Context { vm, session: Some(self) }, request.arguments);
        if negotiates && result.is_ok() {
            self.negotiated.store(true, Ordering::Release);
        }
        result
    }
}

/// What a client asks.
enum Asked {
    Message(Value),
    Line(String),
}

/// A request, taken apart.
struct Request {
    command: String,
    arguments: Members,
}

impl Request {
    /// Takes a message apart; `id` is set as soon as it is known, so that errors carry it.
    fn read(v: Value, id: &mut Option<Value>) -> qapi::Result<Request> {
        let Value::Object(mut members) = v else {
            return Err(Error::new("QMP input must be a JSON object"));
        };
        *id = members.remove("id");
        let command = members.remove("execute");
        let arguments = members.remove("arguments");
        if let Some(name) = members.keys().next() {
            return Err(Error::new(format!("QMP input member '{name}' is unexpected")));
        }
        let command = match command {
            Some(Value::String(s)) => s,
            Some(_) => return Err(Error::new("QMP input member 'execute' must be a string")),
            None => return Err(Error::new("QMP input lacks member 'execute'")),
        };
        let arguments = match arguments {
            None => Members::new(),
            Some(Value::Object(m)) => m,
            Some(_) => return Err(Error::new("QMP input member 'arguments' must be an object")),
        };
        Ok(Request { command, arguments })
    }
}
