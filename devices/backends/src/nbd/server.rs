//! Who listens, which exports there are, and who is connected.

use super::Export;
use super::handshake::{self, Agreed};
use super::stream::{Stream, Timed};
use super::transfer;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{TcpListener, ToSocketAddrs};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, RwLock};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::EventFd;

/// Where clients connect.
#[derive(Debug)]
pub enum Listener {
    /// A TCP port.
    Tcp(TcpListener),
    /// A socket in the file system, removed with the listener.
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Listens at a TCP address.
    pub fn tcp(at: impl ToSocketAddrs) -> io::Result<Listener> {
        Ok(Listener::Tcp(TcpListener::bind(at)?))
    }

    /// Listens at a path. A socket that is there and that nobody listens at is replaced.
    pub fn unix(path: &Path) -> io::Result<Listener> {
        let stale = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
            && std::os::unix::net::UnixStream::connect(path)
                .is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
        if stale {
            std::fs::remove_file(path)?;
        }
        Ok(Listener::Unix(UnixListener::bind(path)?, path.into()))
    }

    fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Tcp(l) => {
                let (s, _) = l.accept()?;
                // Replies are whole; waiting for more only delays them.
                s.set_nodelay(true)?;
                s.set_nonblocking(false)?;
                Ok(Stream::Tcp(s))
            }
            Listener::Unix(l, _) => {
                let (s, _) = l.accept()?;
                s.set_nonblocking(false)?;
                Ok(Stream::Unix(s))
            }
        }
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Listener::Tcp(l) => l.set_nonblocking(true),
            Listener::Unix(l, _) => l.set_nonblocking(true),
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Listener::Tcp(l) => l.as_raw_fd(),
            Listener::Unix(l, _) => l.as_raw_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listener::Unix(_, path) = self {
            // Somebody may have removed it.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The exports by name.
#[derive(Debug, Default)]
pub struct Exports(RwLock<BTreeMap<String, Arc<Export>>>);

impl Exports {
    /// The export called `name`.
    pub fn find(&self, name: &str) -> Option<Arc<Export>> {
        self.0.read().unwrap().get(name).cloned()
    }
    /// All, by name.
    pub fn all(&self) -> Vec<Arc<Export>> {
        self.0.read().unwrap().values().cloned().collect()
    }
}

/// A connection, seen from the server.
#[derive(Debug)]
struct Client {
    stream: Stream,
    thread: Option<JoinHandle<()>>,
    /// The export it uses, once it has chosen.
    export: Option<Arc<Export>>,
}

#[derive(Debug, Default)]
struct Clients {
    now: HashMap<u64, Client>,
    next: u64,
    /// Threads to be joined.
    over: Vec<JoinHandle<()>>,
}

/// Told, on any thread, when a client comes or goes.
pub type OnChange = Box<dyn Fn() + Send + Sync>;

struct Shared {
    exports: Exports,
    clients: Mutex<Clients>,
    /// Clients have gone.
    fewer: Condvar,
    /// At most so many clients.
    limit: usize,
    /// Wakes the accepting thread: a place is free, or the end.
    bell: EventFd,
    stop: std::sync::atomic::AtomicBool,
    on_change: OnChange,
}

/// A server. Dropping it ends all connections.
pub struct Server {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `exports` at `listener` to at most `limit` clients at once. They are there for the
    /// first client already.
    pub fn start(
        listener: Listener,
        limit: usize,
        exports: impl IntoIterator<Item = Export>,
        on_change: OnChange,
    ) -> io::Result<Server> {
        listener.set_nonblocking()?;
        let exports = exports.into_iter().map(|e| (e.name.clone(), Arc::new(e)));
        let shared = Arc::new(Shared {
            exports: Exports(RwLock::new(exports.collect())),
            clients: Mutex::default(),
            fewer: Condvar::new(),
            limit,
            bell: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            stop: false.into(),
            on_change,
        });
        let mine = shared.clone();
        let thread = std::thread::Builder::new()
            .name("nbd".into())
            .spawn(move || Shared::listen(&mine, &listener))?;
        Ok(Server { shared, thread: Some(thread) })
    }

    /// Adds an export; returns whether its name was free.
    pub fn add(&self, export: Export) -> bool {
        let mut all = self.shared.exports.0.write().unwrap();
        if all.contains_key(&export.name) {
            return false;
        }
        all.insert(export.name.clone(), Arc::new(export));
        true
    }

    /// Removes an export for those who come later; returns whether it was there. With `hang_up`
    /// those who use it are disconnected, too.
    pub fn remove(&self, name: &str, hang_up: bool) -> bool {
        let gone = self.shared.exports.0.write().unwrap().remove(name);
        if let (true, Some(gone)) = (hang_up, &gone) {
            let clients = self.shared.clients.lock().unwrap();
            let users = clients.now.values();
            users
                .filter(|c| c.export.as_ref().is_some_and(|e| Arc::ptr_eq(e, gone)))
                .for_each(|c| c.stream.shutdown());
        }
        gone.is_some()
    }

    /// Names of the exports.
    pub fn names(&self) -> Vec<String> {
        self.shared.exports.all().iter().map(|e| e.name.clone()).collect()
    }

    /// Clients that are connected, and how many there have been.
    pub fn clients(&self) -> (usize, u64) {
        let c = self.shared.clients.lock().unwrap();
        (c.now.len(), c.next)
    }

    /// Clients that use the export called `name`.
    pub fn users(&self, name: &str) -> usize {
        let Some(export) = self.shared.exports.find(name) else { return 0 };
        let c = self.shared.clients.lock().unwrap();
        let uses = |c: &&Client| c.export.as_ref().is_some_and(|e| Arc::ptr_eq(e, &export));
        c.now.values().filter(uses).count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.store(true, std::sync::atomic::Ordering::Release);
        let _ = self.shared.bell.write(1);
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
        let mut clients = self.shared.clients.lock().unwrap();
        clients.now.values().for_each(|c| c.stream.shutdown());
        clients = self.shared.fewer.wait_while(clients, |c| !c.now.is_empty()).unwrap();
        let over = std::mem::take(&mut clients.over);
        drop(clients);
        for t in over {
            let _ = t.join();
        }
    }
}

impl Shared {
    fn listen(self: &Arc<Shared>, listener: &Listener) {
        while !self.stop.load(std::sync::atomic::Ordering::Acquire) {
            let room = self.clients.lock().unwrap().now.len() < self.limit;
            let mut fds = [self.bell.as_raw_fd(), listener.as_raw_fd()].map(|fd| libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            });
            let n = if room { 2 } else { 1 };
            // SAFETY: the array is live and holds at least n entries.
            let ready = unsafe { libc::poll(fds.as_mut_ptr(), n, -1) };
            if ready < 0 {
                continue;
            }
            let _ = self.bell.read();
            if !room || fds[1].revents == 0 {
                continue;
            }
            match listener.accept() {
                Ok(stream) => self.welcome(stream),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => {
                    // Often too many open files: that passes, but not by trying at once.
                    log::warn!("cannot accept an NBD client: {e}");
                    std::thread::sleep(std::time::Duration::from_millis(100));
                }
            }
        }
    }

    fn welcome(self: &Arc<Shared>, stream: Stream) {
        let mut clients = self.clients.lock().unwrap();
        clients.over.drain(..).for_each(|t| drop(t.join()));
        let id = clients.next;
        clients.next += 1;
        let started = stream.try_clone().and_then(|mine| {
            let shared = self.clone();
            let serve = move || {
                shared.serve(id, &mine);
                shared.farewell(id);
            };
            std::thread::Builder::new().name("nbd-client".into()).spawn(serve)
        });
        match started {
            Ok(thread) => {
                clients.now.insert(id, Client { stream, thread: Some(thread), export: None });
            }
            Err(e) => log::warn!("cannot serve an NBD client: {e}"),
        }
        drop(clients);
        (self.on_change)();
    }

    fn serve(&self, id: u64, stream: &Stream) {
        let agreed = {
            let mut timed = Timed::new(stream, handshake::PATIENCE);
            handshake::negotiate(&mut timed, &self.exports)
        };
        let outcome = match agreed {
            Ok(Some(agreed)) => self.transfer(id, stream, agreed),
            Ok(None) => Ok(()),
            Err(e) => Err(e),
        };
        stream.shutdown();
        match outcome {
            // How most clients leave that do not say so.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(e) => log::info!("an NBD client is sent away: {e}"),
            Ok(()) => {}
        }
    }

    fn transfer(&self, id: u64, stream: &Stream, agreed: Agreed) -> io::Result<()> {
        if let Some(c) = self.clients.lock().unwrap().now.get_mut(&id) {
            c.export = Some(agreed.export.clone());
        }
        transfer::run(stream, agreed)
    }

    fn farewell(&self, id: u64) {
        let mut clients = self.clients.lock().unwrap();
        let thread = clients.now.remove(&id).and_then(|mut c| c.thread.take());
        clients.over.extend(thread);
        drop(clients);
        self.fewer.notify_all();
        let _ = self.bell.write(1);
        (self.on_change)();
    }
}
