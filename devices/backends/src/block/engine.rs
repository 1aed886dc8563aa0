//! Engines: who works on the requests of a drive.
//!
//! ```text
//!   vCPU ── kick ──► engine ── next() ──► requester (a device's queues)
//!                      │  executes           ▲
//!                      └──── complete() ─────┘        (on an engine's thread)
//! ```
//!
//! Requests are pulled: a kick only says that there may be some, so that it costs a vCPU a lock and
//! at most one system call, and the queue itself is where requests wait.
//!
//! Always: what `next` gave comes back by `complete` once, on a thread of the engine's; requests
//! are worked on side by side; dropping the engine waits for those in flight.

use super::drive::{Drive, EngineKind, Op};
use super::error::Result;
use super::uring;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Requests worked on side by side by threads.
const THREADS: usize = 8;
/// How long an idle thread stays.
const LINGER: Duration = Duration::from_secs(10);

/// Something to do for a requester.
#[derive(Debug)]
pub struct Request {
    /// What.
    pub op: Op,
    /// The requester's name for it.
    pub tag: u64,
}

/// Who wants something done: a device's queues. Any thread.
pub trait Requester: Send + Sync {
    /// The next request, if there is one.
    fn next(&self) -> Option<Request>;
    /// Whether `next` would give something. May err in both directions for a moment.
    fn has_more(&self) -> bool;
    /// A request is done.
    fn complete(&self, request: Request, result: Result<()>);
    /// Whether requests should not be held back any more, because everything is waiting for them.
    fn hurried(&self) -> bool {
        false
    }
}

/// Works on the requests of one requester.
pub trait Engine: Send + Sync {
    /// There may be requests. Does not block.
    fn kick(&self);
}

/// An engine for `drive` and `requester`, of the kind that the drive's options name where that is
/// possible.
pub fn start(drive: &Arc<Drive>, requester: Arc<dyn Requester>) -> Arc<dyn Engine> {
    if drive.options().engine == EngineKind::IoUring {
        match uring::Uring::start(drive.clone(), requester.clone()) {
            Ok(engine) => return engine,
            Err(why) => log::info!("threads work on requests instead of io_uring: {why}"),
        }
    }
    Arc::new(Threads::new(drive.clone(), requester))
}

/// Executes one request and gives it back.
pub(super) fn work(drive: &Drive, requester: &dyn Requester, request: Request) {
    let begun = Instant::now();
    if let (Some(throttle), Some((write, bytes))) = (drive.throttle(), request.op.cost()) {
        loop {
            match throttle.ask(write, bytes) {
                Duration::ZERO => break,
                // In small pieces, as somebody may become hurried.
                _ if requester.hurried() => break,
                wait => std::thread::sleep(wait.min(Duration::from_millis(20))),
            }
        }
    }
    let result = drive.execute(&request.op);
    drive.accounting().enter(&request.op, begun.elapsed(), result.is_ok());
    requester.complete(request, result);
}

/// Threads that make blocking system calls. They come when there is work and go when there is none.
pub struct Threads(Arc<Shared>);

struct Shared {
    drive: Arc<Drive>,
    requester: Arc<dyn Requester>,
    state: Mutex<State>,
    wake: Condvar,
    handles: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Default)]
struct State {
    /// Somebody should look at the requester.
    wanted: bool,
    /// Threads that wait.
    idle: usize,
    /// Threads that are.
    threads: usize,
    stop: bool,
}

impl Threads {
    /// No thread yet.
    pub fn new(drive: Arc<Drive>, requester: Arc<dyn Requester>) -> Threads {
        Threads(Arc::new(Shared {
            drive,
            requester,
            state: Mutex::default(),
            wake: Condvar::new(),
            handles: Mutex::default(),
        }))
    }
}

impl Engine for Threads {
    fn kick(&self) {
        Shared::call(&self.0);
    }
}

impl Shared {
    /// Makes some thread look: an idle one, else a new one, else a busy one when it is done.
    fn call(shared: &Arc<Shared>) {
        {
            let mut s = shared.state.lock().unwrap();
            s.wanted = true;
            if s.idle > 0 {
                shared.wake.notify_one();
                return;
            }
            if s.stop || s.threads >= THREADS {
                return;
            }
            s.threads += 1;
        }
        let mine = shared.clone();
        let made = std::thread::Builder::new().name("block".into()).spawn(move || mine.run());
        match made {
            Ok(handle) => {
                let mut handles = shared.handles.lock().unwrap();
                handles.retain(|h| !h.is_finished());
                handles.push(handle);
            }
            Err(e) => {
                log::error!("cannot start a thread for block requests: {e}");
                shared.state.lock().unwrap().threads -= 1;
            }
        }
    }

    fn run(self: Arc<Shared>) {
        while self.wait() {
            while let Some(request) = self.requester.next() {
                if self.requester.has_more() {
                    Shared::call(&self);
                }
                work(&self.drive, &*self.requester, request);
            }
        }
    }

    /// Waits until somebody should look; returns whether this thread is to go on.
    fn wait(&self) -> bool {
        let mut s = self.state.lock().unwrap();
        while !s.wanted {
            if s.stop {
                s.threads -= 1;
                return false;
            }
            s.idle += 1;
            let (guard, timeout) = self.wake.wait_timeout(s, LINGER).unwrap();
            s = guard;
            s.idle -= 1;
            if timeout.timed_out() && !s.wanted {
                s.threads -= 1;
                return false;
            }
        }
        s.wanted = false;
        true
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.0.state.lock().unwrap().stop = true;
        self.0.wake.notify_all();
        loop {
            // A thread may still be making another.
            let Some(handle) = self.0.handles.lock().unwrap().pop() else { return };
            let _ = handle.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::drive::DriveOptions;
    use super::super::file::HostFile;
    use super::super::qcow2::{CreateOptions, Options, Qcow2};
    use super::super::raw::Raw;
    use super::super::{Dst, Image, Src};
    use super::*;
    use std::collections::VecDeque;
    use std::path::Path;

    const SIZE: u64 = 8 << 20;

    /// Hands out requests and notes what comes back.
    #[derive(Default)]
    struct Queue {
        waiting: Mutex<VecDeque<Request>>,
        done: Mutex<Vec<(u64, bool)>>,
        changed: Condvar,
    }

    impl Requester for Queue {
        fn next(&self) -> Option<Request> {
            self.waiting.lock().unwrap().pop_front()
        }
        fn has_more(&self) -> bool {
            !self.waiting.lock().unwrap().is_empty()
        }
        fn complete(&self, request: Request, result: Result<()>) {
            self.done.lock().unwrap().push((request.tag, result.is_ok()));
            self.changed.notify_all();
        }
    }

    fn exercise(image: Arc<dyn Image>, engine: EngineKind) {
        let drive = Drive::new(image, DriveOptions { engine, ..DriveOptions::default() });
        let queue = Arc::new(Queue::default());
        let engine = start(&drive, queue.clone());
        let data: Vec<Vec<u8>> =
            (0..200u32).map(|i| vec![i as u8 | 1; 512 * (1 + i as usize % 40)]).collect();
        let at = |i: usize| i as u64 * 40960;
        let wait = |n: usize| {
            let mut done = queue.done.lock().unwrap();
            while done.len() < n {
                done = queue.changed.wait(done).unwrap();
            }
            std::mem::take(&mut *done)
        };
        let submit = |tag: u64, op: Op| {
            queue.waiting.lock().unwrap().push_back(Request { op, tag });
            engine.kick();
        };
        for (i, d) in data.iter().enumerate() {
            let iov = libc::iovec { iov_base: d.as_ptr().cast_mut().cast(), iov_len: d.len() };
            // SAFETY: data lives until all requests are done.
            submit(i as u64, Op::Write(at(i), unsafe { Src::from_raw(vec![iov]) }));
        }
        assert!(wait(200).iter().all(|(_, ok)| *ok));
        submit(7, Op::Flush);
        assert_eq!(wait(1), [(7, true)]);
        let mut back: Vec<Vec<u8>> = data.iter().map(|d| vec![0; d.len()]).collect();
        for (i, d) in back.iter_mut().enumerate() {
            let iov = libc::iovec { iov_base: d.as_mut_ptr().cast(), iov_len: d.len() };
            // SAFETY: back lives until all requests are done.
            submit(i as u64, Op::Read(at(i), unsafe { Dst::from_raw(vec![iov]) }));
        }
        let mut tags: Vec<u64> = wait(200).iter().map(|(t, _)| *t).collect();
        tags.sort_unstable();
        assert_eq!(tags, (0..200).collect::<Vec<_>>());
        assert!(back == data);
        let mut out = [0; 512];
        let iov = libc::iovec { iov_base: out.as_mut_ptr().cast(), iov_len: 512 };
        // SAFETY: out lives until the request is done.
        submit(1, Op::Read(SIZE, unsafe { Dst::from_raw(vec![iov]) }));
        assert_eq!(wait(1), [(1, false)]);
        submit(2, Op::WriteZeroes(vec![(0, 4096, true)]));
        assert_eq!(wait(1), [(2, true)]);
        drop(engine);
        drive.image().read_bytes(0, &mut out).unwrap();
        assert_eq!(out, [0; 512]);
    }

    fn images() -> Vec<Arc<dyn Image>> {
        let temporary = || Arc::new(HostFile::temporary(Path::new("/var/tmp")).unwrap());
        let (raw, q) = (temporary(), temporary());
        raw.set_len(SIZE).unwrap();
        CreateOptions { size: SIZE, ..CreateOptions::default() }.create(&q).unwrap();
        let q = Qcow2::open(q, Options::default()).unwrap();
        vec![Arc::new(Raw::new(raw).unwrap()), Arc::new(q)]
    }

    #[test]
    fn threads_do_everything_once() {
        images().into_iter().for_each(|i| exercise(i, EngineKind::Threads));
    }

    #[test]
    fn io_uring_does_everything_once() {
        images().into_iter().for_each(|i| exercise(i, EngineKind::IoUring));
    }
}
