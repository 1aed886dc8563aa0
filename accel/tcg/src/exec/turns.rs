//! All vCPUs of a machine in turn on one thread.
//!
//! ```text
//!   ┌─► timers due? fire ─► who is next and has something to run? ─► run until its turn is over ─┐
//!   │                         │ nobody                                                            │
//!   └──────── wait for a timer or a call, let guest time pass ◄───────────────────────────────────┘
//! ```

use super::pace::Pace;
use super::run::Runner;
use std::sync::{Arc, Mutex};
use std::thread::Thread;
use std::time::Instant;
use tandem_accel::vcpu::{Duty, Seat, VcpuControl, VcpuEvents};
use tandem_accel::{Error, Result};

/// A vCPU that has not come to the thread yet.
struct Newcomer {
    index: u32,
    runner: Runner,
    control: Arc<VcpuControl>,
    events: Arc<dyn VcpuEvents>,
}

/// The thread, for those who bring vCPUs.
#[derive(Default)]
pub struct Turns {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    newcomers: Vec<Newcomer>,
    thread: Option<Thread>,
}

impl Turns {
    /// Brings a vCPU; the first one starts the thread.
    ///
    /// # Errors
    /// The host has no thread for us.
    pub fn bring(
        self: &Arc<Self>,
        pace: &Arc<Pace>,
        index: u32,
        runner: Runner,
        control: Arc<VcpuControl>,
        events: Arc<dyn VcpuEvents>,
    ) -> Result<()> {
        let mut s = self.state.lock().unwrap();
        s.newcomers.push(Newcomer { index, runner, control, events });
        match &s.thread {
            Some(t) => t.unpark(),
            None => {
                let (turns, pace) = (self.clone(), pace.clone());
                let thread = std::thread::Builder::new()
                    .name("tcg-vcpus".into())
                    .spawn(move || turns.take(&pace))
                    .map_err(|e| Error::new("cannot start the vCPUs' thread").caused_by(e))?;
                s.thread = Some(thread.thread().clone());
            }
        }
        Ok(())
    }

    /// Takes newcomers in; `false`: there is nobody left, and the thread ends.
    fn admit(&self, seats: &mut Vec<Seat<Runner>>) -> bool {
        let mut s = self.state.lock().unwrap();
        for n in s.newcomers.drain(..) {
            seats.push(Seat::take(n.index, n.runner, n.control, n.events));
        }
        if seats.is_empty() {
            s.thread = None;
        }
        !seats.is_empty()
    }

    fn take(&self, pace: &Pace) {
        let mut seats = Vec::new();
        let mut next = 0;
        let mut idle_since = None;
        while self.admit(&mut seats) {
            if !pace.is_held() {
                pace.run_timers();
            }
            let mut duties: Vec<Duty> = seats.iter_mut().map(Seat::attend).collect();
            if duties.iter().any(|d| matches!(d, Duty::Wait | Duty::End)) {
                pace.release();
            }
            let mut ended = duties.iter().map(|d| *d == Duty::End);
            seats.retain(|_| ended.next() != Some(true));
            duties.retain(|d| *d != Duty::End);
            // What is counted must not depend on who has been told first to run.
            let told = pace.makes_time() && duties.contains(&Duty::Wait);
            let held = told || pace.is_held();
            let n = seats.len();
            let who = (0..n).map(|i| (next + i) % n).find(|&i| duties[i] == Duty::Run);
            match who.filter(|_| !held) {
                Some(i) => {
                    if let Some(since) = idle_since.take() {
                        pace.wake(since);
                    }
                    let done = seats[i].run();
                    pace.settle();
                    next = if pace.end_turn(done) { (i + 1) % n } else { i };
                }
                None if n == 0 => {}
                None if held || duties.contains(&Duty::Wait) => {
                    idle_since = None;
                    std::thread::park();
                }
                None => {
                    if pace.idle(*idle_since.get_or_insert_with(Instant::now)) {
                        idle_since = None;
                    }
                }
            }
        }
    }
}
