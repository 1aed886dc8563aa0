//! The io_uring engine: one thread that pulls requests, submits them together, and gives them back
//! as they complete.
//!
//! It serves reads and writes that lie in a file in one piece: all of a raw image, and of a qcow2 image
//! what is data by tables in memory. Everything else (new clusters, ranges to zero, requests that came
//! back short, write-through, flushes with tables to write) goes to threads.

use super::Placed;
use super::drive::{Drive, Op};
use super::engine::{Engine, Request, Requester, Threads};
use super::error::{Error, Result};
use super::file::HostFile;
use super::gate::Pass;
use io_uring::{IoUring, opcode, squeue, types};
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;
use vmm_sys_util::eventfd::EventFd;

/// Requests in flight.
const DEPTH: usize = 128;
/// iovecs of one request.
const MAX_IOV: usize = 1024;
/// User data of the read that waits for kicks.
const KICK: u64 = u64::MAX;

/// Requests on their way to the threads.
struct Handoff {
    queue: Mutex<VecDeque<Request>>,
    to: Arc<dyn Requester>,
}

impl Requester for Handoff {
    fn next(&self) -> Option<Request> {
        self.queue.lock().unwrap().pop_front()
    }
    fn has_more(&self) -> bool {
        !self.queue.lock().unwrap().is_empty()
    }
    fn complete(&self, request: Request, result: Result<()>) {
        self.to.complete(request, result);
    }
    fn hurried(&self) -> bool {
        self.to.hurried()
    }
}

/// The engine.
pub struct Uring {
    bell: EventFd,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// What keeps the place of a request where it is.
struct Keep {
    /// Where the kernel works.
    file: Arc<HostFile>,
    _placed: Option<Placed>,
    _pass: Pass,
}

/// What the kernel is to do.
struct Aim {
    entry: squeue::Entry,
    keep: Keep,
}

/// A request that the kernel works on.
struct Flight {
    request: Request,
    begun: Instant,
    keep: Keep,
}

/// What the thread has.
struct Ring {
    ring: IoUring,
    drive: Arc<Drive>,
    requester: Arc<dyn Requester>,
    bell: EventFd,
    /// Where the bell's count is read to; the kernel writes here.
    rung: Box<u64>,
    stop: Arc<AtomicBool>,
    /// What the kernel works on, and since when.
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    handoff: Arc<Handoff>,
    threads: Threads,
}

impl Uring {
    /// Starts it; fails with the reason if host or drive do not allow it.
    pub fn start(
        drive: Arc<Drive>,
        requester: Arc<dyn Requester>,
    ) -> std::result::Result<Arc<dyn Engine>, String> {
        if drive.throttle().is_some() {
            return Err("the drive has limits".into());
        }
        let ring = IoUring::builder()
            .setup_clamp()
            .build(DEPTH as u32)
            .map_err(|e| format!("this host has no io_uring for us: {e}"))?;
        let bell = EventFd::new(libc::EFD_CLOEXEC).map_err(|e| e.to_string())?;
        let mine = bell.try_clone().map_err(|e| e.to_string())?;
        let stop = Arc::new(AtomicBool::new(false));
        let handoff = Arc::new(Handoff { queue: Mutex::default(), to: requester.clone() });
        let mut r = Ring {
            ring,
            requester,
            bell: mine,
            rung: Box::new(0),
            stop: stop.clone(),
            flights: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH).collect(),
            threads: Threads::new(drive.clone(), handoff.clone()),
            handoff,
            drive,
        };
        let thread = std::thread::Builder::new().name("block-uring".into()).spawn(move || {
            if let Err(e) = r.run() {
                // Nothing can be submitted any more; what waits is left to threads.
                log::error!("io_uring does not work any more: {e}");
                r.surrender();
            }
        });
        let thread = thread.map_err(|e| format!("cannot start a thread: {e}"))?;
        Ok(Arc::new(Uring { bell, stop, thread: Some(thread) }))
    }
}

impl Engine for Uring {
    fn kick(&self) {
        // Fails only when the count would overflow, and then it is rung already.
        let _ = self.bell.write(1);
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.kick();
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

impl Ring {
    fn run(&mut self) -> io::Result<()> {
        self.listen()?;
        loop {
            while let Some(request) =
                if self.free.is_empty() { None } else { self.requester.next() }
            {
                self.begin(request)?;
            }
            let idle = self.free.len() == DEPTH;
            if idle && self.stop.load(Ordering::Acquire) {
                return Ok(());
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                // The completion queue is full: reap first.
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
                Err(e) => return Err(e),
            }
            self.reap()?;
        }
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: what the entry points to (iovecs and their memory in flights, the bell's
            // count) lives until its completion is reaped: a Ring is dropped only after that.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.ring.submit()?;
        }
    }

    /// Asks to be told of the next kick.
    fn listen(&mut self) -> io::Result<()> {
        let to: *mut u64 = &mut *self.rung;
        let read = opcode::Read::new(types::Fd(self.bell.as_raw_fd()), to.cast(), 8);
        self.push(&read.build().user_data(KICK))
    }

    /// Starts a request, or hands it on.
    fn begin(&mut self, request: Request) -> io::Result<()> {
        // What does not lie in a file in one piece, or is seen or limited by somebody, is for
        // threads.
        let Some(Aim { entry, keep }) = self.aim(&request.op) else {
            self.hand_on(request);
            return Ok(());
        };
        let Some(slot) = self.free.pop() else {
            self.hand_on(request);
            return Ok(());
        };
        // The iovecs stay where they are on the heap when the request moves.
        self.flights[slot] = Some(Flight { request, begun: Instant::now(), keep });
        self.push(&entry.user_data(slot as u64))
    }

    /// What the kernel can do for `op`, if it can.
    fn aim(&self, op: &Op) -> Option<Aim> {
        let fits = |at: u64, len: u64, pieces: usize, write: bool| {
            let (placed, pass) = self.drive.place(at, len, write)?;
            let aligned = placed.offset & (placed.file.alignment() - 1) == 0;
            (aligned && pieces <= MAX_IOV).then_some((placed, pass))
        };
        let (entry, placed, pass) = match op {
            Op::Read(at, to) => {
                let (placed, pass) = fits(*at, to.len(), to.iov().len(), false)?;
                if !to.is_aligned(placed.file.alignment() as usize) {
                    return None;
                }
                let fd = types::Fd(placed.file.raw_fd());
                let read = opcode::Readv::new(fd, to.iov().as_ptr(), to.iov().len() as u32);
                (read.offset(placed.offset).build(), placed, pass)
            }
            Op::Write(at, from) => {
                let (placed, pass) = fits(*at, from.len(), from.iov().len(), true)?;
                if !from.is_aligned(placed.file.alignment() as usize) {
                    return None;
                }
                let fd = types::Fd(placed.file.raw_fd());
                let write = opcode::Writev::new(fd, from.iov().as_ptr(), from.iov().len() as u32);
                (write.offset(placed.offset).build(), placed, pass)
            }
            Op::Flush if !self.drive.options().cache.no_flush && !self.drive.read_only() => {
                let (direct, pass) = self.drive.direct_pass()?;
                let fd = types::Fd(direct.file.raw_fd());
                let entry = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build();
                let keep = Keep { file: direct.file, _placed: None, _pass: pass };
                return Some(Aim { entry, keep });
            }
            _ => return None,
        };
        let keep = Keep { file: placed.file.clone(), _placed: Some(placed), _pass: pass };
        Some(Aim { entry, keep })
    }

    fn hand_on(&self, request: Request) {
        self.handoff.queue.lock().unwrap().push_back(request);
        self.threads.kick();
    }

    fn reap(&mut self) -> io::Result<()> {
        let done: Vec<(u64, i32)> =
            self.ring.completion().map(|c| (c.user_data(), c.result())).collect();
        for (tag, result) in done {
            if tag == KICK {
                self.listen()?;
                continue;
            }
            let slot = tag as usize;
            let Some(flight) = self.flights.get_mut(slot).and_then(Option::take) else { continue };
            self.free.push(slot);
            self.finish(flight, result);
        }
        Ok(())
    }

    fn finish(&self, flight: Flight, result: i32) {
        // The pass goes first: a requester may be the one for whom somebody wants to be alone.
        let Flight { request, begun, keep } = flight;
        let file = keep.file.clone();
        drop(keep);
        let enter = |ok| self.drive.accounting().enter(&request.op, begun.elapsed(), ok);
        let whole = match &request.op {
            Op::Read(_, to) => to.len(),
            Op::Write(_, from) => from.len(),
            _ => 0,
        };
        match u64::try_from(result) {
            Ok(n) if n >= whole => {
                enter(true);
                self.requester.complete(request, Ok(()));
            }
            // Short: at the end of the file, or for reasons of the host's. Doing it again from the
            // start is as good as going on.
            Ok(_) => self.hand_on(request),
            Err(_) if matches!(-result, libc::EAGAIN | libc::EINTR) => self.hand_on(request),
            Err(_) => {
                enter(false);
                let e = io::Error::from_raw_os_error(-result);
                let what = format!("work on '{}'", file.path().display());
                self.requester.complete(request, Err(Error::io(what, e)));
            }
        }
    }

    /// Passes everything to the threads until told to stop. Requests that the kernel still has are
    /// given back when it is done with them.
    fn surrender(&mut self) {
        while self.free.len() < DEPTH {
            if self.ring.submit_and_wait(1).is_err() {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            let _ = self.reap();
        }
        while !self.stop.load(Ordering::Acquire) {
            while let Some(request) = self.requester.next() {
                self.hand_on(request);
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The read of the bell may be in flight; its target must outlive the ring. Ringing ends it.
        let _ = self.bell.write(1);
        let _ = self.ring.submit_and_wait(1);
    }
}
