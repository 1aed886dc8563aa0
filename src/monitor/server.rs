//! The monitors' thread: accepts connections, reads requests, writes replies and events.

use super::Hub;
use super::endpoint::{Listener, Opened, Stream};
use super::framer::{Frame, Framer, Lines};
use super::session::Session;
use crate::config::monitor::{Mode, Monitor};
use crate::machine::inbox::{Event, Inbox};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tandem_accel::{Error, Result};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Connections at once, of all monitors together.
const MAX_CONNECTIONS: usize = 256;
/// How long clients have to take the last output when the machine ends.
const FAREWELL: Duration = Duration::from_secs(1);
/// Reads of what a client that has hung up had sent before.
const LAST_WORDS: usize = 64;
/// Token of the hub's bell in the epoll set.
const BELL: u64 = 0;

/// A place where clients connect, with how to talk to them.
struct Door {
    listener: Listener,
    monitor: Monitor,
}

/// Finds messages in what a client sends.
enum Reader {
    Json(Framer),
    Lines(Lines),
}

/// A client.
struct Connection {
    stream: Stream,
    framer: Reader,
    session: Arc<Session>,
    /// What the epoll set waits for.
    interest: EventSet,
    /// Messages that have been read and are not yet being worked on.
    waiting: VecDeque<Frame>,
    /// The client sends no more.
    ended: bool,
    /// The client is not there any more; what it asked for is done all the same.
    gone: bool,
}

struct State {
    epoll: Epoll,
    hub: Arc<Hub>,
    inbox: Arc<Inbox>,
    doors: BTreeMap<u64, Door>,
    connections: BTreeMap<u64, Connection>,
    next: u64,
}

/// The running server. Dropping it says farewell to all clients.
pub struct Server {
    hub: Arc<Hub>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts to serve opened monitors; their requests become work in `inbox`.
    pub fn start(
        hub: &Arc<Hub>,
        inbox: &Arc<Inbox>,
        opened: Vec<(Monitor, Opened)>,
    ) -> Result<Server> {
        let cannot = |e: io::Error| Error::new("cannot start the monitors").caused_by(e);
        let epoll = Epoll::new().map_err(cannot)?;
        let bell = EpollEvent::new(EventSet::IN, BELL);
        epoll.ctl(ControlOperation::Add, hub.bell().as_raw_fd(), bell).map_err(cannot)?;
        let mut state = State {
            epoll,
            hub: hub.clone(),
            inbox: inbox.clone(),
            doors: BTreeMap::new(),
            connections: BTreeMap::new(),
            next: BELL + 1,
        };
        for (monitor, opened) in opened {
            match opened {
                Opened::Stream(stream) => state.connect(stream, &monitor).map_err(cannot)?,
                Opened::Listener(listener) => {
                    let event = EpollEvent::new(EventSet::IN, state.next);
                    state
                        .epoll
                        .ctl(ControlOperation::Add, listener.as_raw_fd(), event)
                        .map_err(cannot)?;
                    state.doors.insert(state.next, Door { listener, monitor });
                    state.next += 1;
                }
            }
        }
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name("monitor".into())
            .spawn(move || state.serve(&stopped))
            .map_err(cannot)?;
        Ok(Server { hub: hub.clone(), stop, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.hub.ring();
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

impl State {
    fn serve(mut self, stop: &AtomicBool) {
        let mut events = [EpollEvent::default(); 32];
        while !stop.load(Ordering::Acquire) {
            let n = match self.epoll.wait(-1, &mut events) {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    log::error!("the monitors cannot wait for clients any more: {e}");
                    return;
                }
            };
            for e in &events[..n] {
                match e.data() {
                    BELL => {
                        let _ = self.hub.bell().read();
                    }
                    token if self.doors.contains_key(&token) => self.accept(token),
                    token => self.ready(token, e.event_set()),
                }
            }
            self.settle();
        }
        self.doors.clear();
        self.farewell();
    }

    fn accept(&mut self, token: u64) {
        let Some(door) = self.doors.get(&token) else { return };
        let monitor = door.monitor.clone();
        let accepted = door.listener.accept();
        match accepted {
            Ok(_) if self.connections.len() >= MAX_CONNECTIONS => {
                log::warn!("a client is refused: {MAX_CONNECTIONS} are connected already");
            }
            Ok(stream) => {
                if let Err(e) = stream.prepare().and_then(|()| self.connect(stream, &monitor)) {
                    log::warn!("a client cannot be served: {e}");
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => {
                log::warn!("a client cannot connect: {e}");
                // Out of descriptors, most likely: it would be told again at once.
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }

    fn connect(&mut self, stream: Stream, monitor: &Monitor) -> io::Result<()> {
        let token = self.next;
        self.next += 1;
        let interest = EventSet::IN;
        let event = EpollEvent::new(interest, token);
        self.epoll.ctl(ControlOperation::Add, stream.as_raw_fd(), event)?;
        let (session, framer) = match monitor.mode {
            Mode::Control => {
                let session = Session::control(&self.hub, monitor.pretty);
                (session, Reader::Json(Framer::default()))
            }
            Mode::Readline => (Session::human(&self.hub), Reader::Lines(Lines::default())),
        };
        let c = Connection {
            stream,
            framer,
            session,
            interest,
            waiting: VecDeque::new(),
            ended: false,
            gone: false,
        };
        self.connections.insert(token, c);
        Ok(())
    }

    /// Reads from a connection that has something, or is gone.
    fn ready(&mut self, token: u64, what: EventSet) {
        let Some(c) = self.connections.get_mut(&token) else { return };
        if what.contains(EventSet::HANG_UP) || what.contains(EventSet::ERROR) {
            // What it sent before is still there to be read.
            let mut left = LAST_WORDS;
            while !c.ended && left > 0 {
                c.read();
                left -= 1;
            }
            (c.ended, c.gone) = (true, true);
            // A hang-up cannot be masked and would be told all the time.
            let none = EpollEvent::default();
            let _ = self.epoll.ctl(ControlOperation::Delete, c.stream.as_raw_fd(), none);
        } else if what.contains(EventSet::IN) && c.wants_input() {
            c.read();
        }
    }

    /// Writes what can be written, closes what is over, and sets what to wait for next.
    fn settle(&mut self) {
        let mut over = Vec::new();
        for (token, c) in &mut self.connections {
            c.work(&self.inbox);
            let over_now = match c.flush() {
                Err(_) => true,
                Ok(()) if c.session.overflowed() => {
                    log::warn!("a client does not read and is hung up on");
                    true
                }
                Ok(()) => c.ended && c.waiting.is_empty() && c.session.is_idle(),
            };
            if over_now {
                over.push(*token);
                continue;
            }
            let mut want = EventSet::empty();
            want.set(EventSet::IN, c.wants_input());
            let queues = matches!(c.stream, Stream::Chardev(_));
            want.set(EventSet::OUT, c.session.has_output() && !queues);
            if want != c.interest && !c.gone {
                let event = EpollEvent::new(want, *token);
                let set = self.epoll.ctl(ControlOperation::Modify, c.stream.as_raw_fd(), event);
                if set.is_err() {
                    over.push(*token);
                }
                c.interest = want;
            }
        }
        over.into_iter().for_each(|token| self.close(token));
    }

    fn close(&mut self, token: u64) {
        if let Some(c) = self.connections.remove(&token) {
            let gone = EpollEvent::default();
            let _ = self.epoll.ctl(ControlOperation::Delete, c.stream.as_raw_fd(), gone);
        }
    }

    /// Gives clients a moment to take what waits for them.
    fn farewell(&mut self) {
        let end = Instant::now() + FAREWELL;
        let mut events = [EpollEvent::default(); 32];
        self.connections.values_mut().for_each(|c| c.ended = true);
        loop {
            self.settle();
            self.connections.retain(|_, c| c.session.has_output());
            let left = end.saturating_duration_since(Instant::now());
            if self.connections.is_empty() || left.is_zero() {
                break;
            }
            let ms = left.as_millis().clamp(1, 100) as i32;
            for e in self.epoll.wait(ms, &mut events).map_or(&[][..], |n| &events[..n]) {
                match e.data() {
                    BELL => drop(self.hub.bell().read()),
                    token if e.event_set().contains(EventSet::HANG_UP) => self.close(token),
                    _ => {}
                }
            }
        }
        for c in self.connections.values() {
            if let Stream::Chardev(c) = &c.stream {
                c.drain(Duration::ZERO);
            }
        }
    }
}

impl Connection {
    fn wants_input(&self) -> bool {
        !self.ended && self.waiting.is_empty() && self.session.wants_input()
    }

    /// Reads once.
    fn read(&mut self) {
        let mut buf = [0; 16 << 10];
        let session = &self.session;
        match self.stream.read(&mut buf, |fds| session.receive_fds(fds)) {
            Ok(0) => self.ended = true,
            Ok(n) => match &mut self.framer {
                Reader::Json(f) => f.push(&buf[..n], |frame| self.waiting.push_back(frame)),
                Reader::Lines(l) => l.push(&buf[..n], |frame| self.waiting.push_back(frame)),
            },
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => self.ended = true,
        }
    }

    /// Hands messages to the main loop, as many as may be worked on at once.
    fn work(&mut self, inbox: &Inbox) {
        while self.session.may_ask() {
            let Some(frame) = self.waiting.pop_front() else { break };
            inbox.post(Event::Job(Box::new(self.session.request(frame))));
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.gone {
            true => self.session.flush(|bytes| Ok(bytes.len())),
            false => self.session.flush(|bytes| self.stream.write(bytes)),
        }
    }
}
