//! Ends a test whose case hangs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// How long a case may take before it counts as a hang.
const PATIENCE: Duration = Duration::from_secs(120);

/// Aborts the process, with the case's number, when one takes too long.
pub struct Watchdog {
    case: Arc<AtomicU64>,
    _alive: mpsc::Sender<()>,
}

impl Watchdog {
    /// Watches the cases of `what` until it is dropped.
    pub fn new(what: &str) -> Watchdog {
        let (alive, over) = mpsc::channel::<()>();
        let case = Arc::new(AtomicU64::new(0));
        let (seen, what) = (case.clone(), what.to_string());
        std::thread::spawn(move || {
            let mut last = u64::MAX;
            while let Err(mpsc::RecvTimeoutError::Timeout) = over.recv_timeout(PATIENCE) {
                let now = seen.load(Ordering::Relaxed);
                if now == last {
                    eprintln!("{what}: case {now} hangs");
                    std::process::abort();
                }
                last = now;
            }
        });
        Watchdog { case, _alive: alive }
    }

    /// Case `n` begins.
    pub fn case(&self, n: u64) {
        self.case.store(n, Ordering::Relaxed);
    }
}
