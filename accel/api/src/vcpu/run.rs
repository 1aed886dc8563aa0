//! Running a vCPU as its control asks.

use super::{RunState, VcpuControl, VcpuEvents, VcpuExit, VcpuRunner};
use std::sync::Arc;

/// A vCPU on the thread that runs it.
pub struct Seat<R> {
    index: u32,
    runner: R,
    control: Arc<VcpuControl>,
    events: Arc<dyn VcpuEvents>,
    /// The last run ended in a halt and nothing has woken the vCPU since.
    idle: bool,
}

/// What a vCPU's thread has to do for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Duty {
    /// Run it.
    Run,
    /// It is halted: nothing, until its control changes.
    Idle,
    /// It shall not run: nothing, until its control changes.
    Wait,
    /// It has been stopped: give it up.
    End,
}

impl<R: VcpuRunner> Seat<R> {
    /// For the thread that calls this: it is unparked whenever there may be a new duty.
    pub fn take(
        index: u32,
        runner: R,
        control: Arc<VcpuControl>,
        events: Arc<dyn VcpuEvents>,
    ) -> Seat<R> {
        let _ = control.thread.set(std::thread::current());
        Seat { index, runner, control, events, idle: false }
    }

    /// Follows what has been asked of the vCPU and serves requests; says what is to be done next.
    pub fn attend(&mut self) -> Duty {
        loop {
            let requests = {
                let mut d = self.control.inner.lock().unwrap();
                if std::mem::take(&mut d.woken) {
                    self.idle = false;
                }
                // A parked vCPU leaves only when asked anew: `resume` or `pause` after the machine
                // has dealt with it. The stop itself set the target to Parked.
                if d.state != d.target {
                    d.state = d.target;
                    self.control.notify();
                }
                if d.state == RunState::Stopped {
                    // Requests that nobody will answer: dropping them ends their callers' wait.
                    d.requests.clear();
                    return Duty::End;
                }
                if d.requests.is_empty() {
                    return match (d.state, self.idle) {
                        (RunState::Running, false) => Duty::Run,
                        (RunState::Running, true) => Duty::Idle,
                        _ => Duty::Wait,
                    };
                }
                std::mem::take(&mut d.requests)
            };
            for request in requests {
                request(&mut self.runner);
            }
            self.idle = false;
        }
    }

    /// Runs the vCPU until something needs its thread; returns whether it is another vCPU's turn.
    pub fn run(&mut self) -> bool {
        match self.runner.run() {
            VcpuExit::Kicked => return false,
            VcpuExit::TurnOver => {}
            VcpuExit::Halted => self.idle = true,
            VcpuExit::Stop(reason) => {
                {
                    let mut d = self.control.inner.lock().unwrap();
                    if d.target != RunState::Stopped {
                        d.target = RunState::Parked;
                    }
                    d.state = RunState::Parked;
                }
                self.control.notify();
                self.events.stopped(self.index, reason);
            }
        }
        true
    }
}

/// Runs a vCPU on this thread, which is its own, until it is stopped.
pub fn run_loop<R: VcpuRunner>(mut seat: Seat<R>) {
    loop {
        match seat.attend() {
            Duty::Run => {
                seat.run();
            }
            Duty::Idle | Duty::Wait => std::thread::park(),
            Duty::End => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::*;
    use crate::irq::Kick;
    use crate::x86::X86State;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    struct Fake {
        runs: Arc<AtomicU32>,
        exits: Vec<VcpuExit>,
        state: X86State,
    }
    impl VcpuRunner for Fake {
        fn run(&mut self) -> VcpuExit {
            self.runs.fetch_add(1, Ordering::Relaxed);
            self.exits.pop().unwrap_or(VcpuExit::Halted)
        }
        fn state(&mut self) -> crate::Result<X86State> {
            Ok(self.state.clone())
        }
        fn set_state(&mut self, s: &X86State) -> crate::Result<()> {
            self.state = s.clone();
            Ok(())
        }
    }
    struct K(Arc<VcpuControl>);
    impl Kick for K {
        fn kick(&self) {
            self.0.wake();
        }
    }
    #[derive(Default)]
    struct Ear(Mutex<Vec<u32>>, AtomicBool);
    impl VcpuEvents for Ear {
        fn stopped(&self, i: u32, _: StopReason) {
            self.0.lock().unwrap().push(i);
            self.1.store(true, Ordering::Release);
        }
    }

    fn start(exits: Vec<VcpuExit>) -> (VcpuHandle, Arc<AtomicU32>, Arc<Ear>) {
        let runs = Arc::new(AtomicU32::new(0));
        let ear = Arc::new(Ear::default());
        let control = VcpuControl::new();
        let (r, e, c) = (runs.clone(), ear.clone(), control.clone());
        let t = std::thread::spawn(move || {
            let f = Fake { runs: r, exits, state: X86State::default() };
            run_loop(Seat::take(3, f, c, e));
        });
        let kick = Arc::new(K(control.clone()));
        (VcpuHandle::new(3, control, kick, Some(t)), runs, ear)
    }

    fn until(f: impl Fn() -> bool) {
        for _ in 0..5000 {
            if f() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        panic!("it never happened");
    }

    #[test]
    fn paused_until_resumed_and_idle_sleeps_until_kicked() {
        let (mut h, runs, _) = start(vec![]);
        assert_eq!(h.run_state(), RunState::Paused);
        assert_eq!(runs.load(Ordering::Relaxed), 0);
        h.resume();
        until(|| runs.load(Ordering::Relaxed) >= 1);
        std::thread::sleep(std::time::Duration::from_millis(20));
        let n = runs.load(Ordering::Relaxed);
        assert!(n <= 2, "an idle vCPU must not spin ({n} runs)");
        h.kick();
        until(|| runs.load(Ordering::Relaxed) > n);
        h.stop();
        assert_eq!(h.run_state(), RunState::Stopped);
        assert!(h.state().is_err());
    }

    #[test]
    fn a_stop_parks_and_tells_the_machine() {
        let (h, _, ear) = start(vec![VcpuExit::Stop(StopReason::TripleFault), VcpuExit::Kicked]);
        h.resume();
        until(|| ear.1.load(Ordering::Acquire));
        h.wait_not_running();
        assert_eq!(h.run_state(), RunState::Parked);
        let mut s = h.state().unwrap();
        s.rip = 0x1234;
        h.set_state(s).unwrap();
        assert_eq!(h.state().unwrap().rip, 0x1234);
    }
}
