//! The vCPU loop.

use super::{RunState, VcpuControl, VcpuEvents, VcpuExit, VcpuRunner};

/// Runs `runner` as its control asks until it is stopped. Called by the accelerator on the vCPU's
/// thread.
pub fn run_loop(
    index: u32,
    runner: &mut dyn VcpuRunner,
    control: &VcpuControl,
    events: &dyn VcpuEvents,
) {
    // Whether the last run ended in a halt and nothing has woken the vCPU since.
    let mut idle = false;
    loop {
        let requests;
        {
            let mut d = control.inner.lock().unwrap();
            loop {
                if std::mem::take(&mut d.woken) {
                    idle = false;
                }
                let next = match (d.state, d.target) {
                    (_, RunState::Stopped) => RunState::Stopped,
                    // A parked vCPU leaves only when asked anew: `resume` or `pause` after the
                    // machine has dealt with it. The stop itself set the target to Parked.
                    (_, target) => target,
                };
                if next != d.state {
                    d.state = next;
                    control.changed.notify_all();
                }
                let runnable = d.state == RunState::Running && !idle;
                if d.state == RunState::Stopped || !d.requests.is_empty() || runnable {
                    break;
                }
                d = control.changed.wait(d).unwrap();
            }
            if d.state == RunState::Stopped {
                // Requests that nobody will answer: dropping them ends their callers' wait.
                d.requests.clear();
                return;
            }
            requests = std::mem::take(&mut d.requests);
        }
        if !requests.is_empty() {
            for request in requests {
                request(runner);
            }
            idle = false;
            continue;
        }
        match runner.run() {
            VcpuExit::Kicked => {}
            VcpuExit::Halted => idle = true,
            VcpuExit::Stop(reason) => {
                {
                    let mut d = control.inner.lock().unwrap();
                    if d.target != RunState::Stopped {
                        d.target = RunState::Parked;
                    }
                    d.state = RunState::Parked;
                }
                control.changed.notify_all();
                events.stopped(index, reason);
            }
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
            let mut f = Fake { runs: r, exits, state: X86State::default() };
            run_loop(3, &mut f, &c, &*e);
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
