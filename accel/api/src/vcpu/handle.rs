//! The machine's end of a vCPU thread.

use super::{RunState, VcpuRunner};
use crate::irq::Kick;
use crate::x86::X86State;
use crate::{Error, Result};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread::{JoinHandle, Thread};

/// A request that runs on the vCPU's thread between two runs.
pub(super) type Request = Box<dyn FnOnce(&mut dyn VcpuRunner) + Send>;

pub(super) struct Desired {
    pub state: RunState,
    pub target: RunState,
    pub requests: Vec<Request>,
    /// A kick since the last look: an idle vCPU looks at its interrupts again.
    pub woken: bool,
}

/// Shared between a vCPU's thread and everybody else: what it does and what it shall do.
pub struct VcpuControl {
    pub(super) inner: Mutex<Desired>,
    pub(super) changed: Condvar,
    /// Whom to wake when something is asked.
    pub(super) thread: OnceLock<Thread>,
}

impl VcpuControl {
    /// A vCPU that is `Paused`.
    pub fn new() -> Arc<VcpuControl> {
        Arc::new(VcpuControl {
            inner: Mutex::new(Desired {
                state: RunState::Paused,
                target: RunState::Paused,
                requests: Vec::new(),
                woken: false,
            }),
            changed: Condvar::new(),
            thread: OnceLock::new(),
        })
    }

    /// Something has changed: everybody who waits for it looks.
    pub(super) fn notify(&self) {
        self.changed.notify_all();
        if let Some(t) = self.thread.get() {
            t.unpark();
        }
    }

    /// Ends an idle sleep of the loop. An accelerator's [`Kick`] calls this after it has made its
    /// `run` return.
    pub fn wake(&self) {
        self.inner.lock().unwrap().woken = true;
        self.notify();
    }
}

/// A running vCPU thread, held by the machine. Dropping it stops the vCPU and joins the thread.
pub struct VcpuHandle {
    index: u32,
    control: Arc<VcpuControl>,
    kick: Arc<dyn Kick>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuHandle {
    /// Joins the ends; `thread` is the vCPU's own, if it has one. `kick` makes `run` return and calls [`VcpuControl::wake`].
    pub fn new(
        index: u32,
        control: Arc<VcpuControl>,
        kick: Arc<dyn Kick>,
        thread: Option<JoinHandle<()>>,
    ) -> VcpuHandle {
        VcpuHandle { index, control, kick, thread }
    }

    /// Index of the vCPU.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Its present state.
    pub fn run_state(&self) -> RunState {
        self.control.inner.lock().unwrap().state
    }

    /// Wakes it, so that it looks at its interrupts.
    pub fn kick(&self) {
        self.kick.kick();
    }

    /// The kick, to be handed to whoever must wake this vCPU.
    pub fn kicker(&self) -> Arc<dyn Kick> {
        self.kick.clone()
    }

    fn want(&self, target: RunState) {
        {
            let mut d = self.control.inner.lock().unwrap();
            if d.target != RunState::Stopped {
                d.target = target;
            }
        }
        self.control.notify();
        self.kick.kick();
    }

    /// Lets it run.
    pub fn resume(&self) {
        self.want(RunState::Running);
    }

    /// Asks it to pause; [`VcpuHandle::wait_not_running`] waits for it.
    pub fn pause(&self) {
        self.want(RunState::Paused);
    }

    /// Waits until it is not running. Must not be called on the vCPU's own thread.
    pub fn wait_not_running(&self) {
        let mut d = self.control.inner.lock().unwrap();
        while d.state == RunState::Running {
            d = self.control.changed.wait(d).unwrap();
        }
    }

    /// Runs `f` on the vCPU's thread, between two runs, and returns its result. Must not be called
    /// on the vCPU's own thread.
    pub fn with_runner<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut dyn VcpuRunner) -> R + Send + 'static,
    ) -> Result<R> {
        let (tx, rx) = mpsc::sync_channel(1);
        {
            let mut d = self.control.inner.lock().unwrap();
            if d.state == RunState::Stopped {
                return Err(Error::new(format!("vCPU {} has been stopped", self.index)));
            }
            d.requests.push(Box::new(move |r| {
                let _ = tx.send(f(r));
            }));
        }
        self.control.notify();
        self.kick.kick();
        rx.recv().map_err(|_| Error::new(format!("vCPU {} ended", self.index)))
    }

    /// Reads its architectural state.
    pub fn state(&self) -> Result<X86State> {
        self.with_runner(|r| r.state())?
    }

    /// Writes its architectural state.
    pub fn set_state(&self, state: X86State) -> Result<()> {
        self.with_runner(move |r| r.set_state(&state))?
    }

    /// Stops it for good, and joins its thread if it has one of its own.
    pub fn stop(&mut self) {
        self.want(RunState::Stopped);
        let joined = self.thread.take().map(|t| t.join());
        let mut d = self.control.inner.lock().unwrap();
        if joined.is_some() {
            // Also if it panicked.
            d.state = RunState::Stopped;
        }
        while d.state != RunState::Stopped {
            d = self.control.changed.wait(d).unwrap();
        }
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        self.stop();
    }
}
