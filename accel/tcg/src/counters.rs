//! What a vCPU counts about itself, for whoever asks while it runs.
//!
//! What always holds: only the vCPU's own thread counts, so that counting is a plain load and store;
//! any thread may read at any time and sees each counter whole, though not all of one instant. Only
//! slow paths count, never generated code.

use std::sync::atomic::{AtomicU64, Ordering};

/// One counter.
#[derive(Default, Debug)]
pub struct Count(AtomicU64);

impl Count {
    /// Counts one event. Only the owner's thread may call this.
    #[inline]
    pub fn hit(&self) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }
    /// The events so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($( $(#[$doc:meta])* $name:ident; )*) => {
        /// The counters of one vCPU.
        #[derive(Default, Debug)]
        pub struct Counters {
            $( $(#[$doc])* pub $name: Count, )*
        }
        impl Counters {
            /// All of them by name, with their values.
            pub fn list(&self) -> Vec<(&'static str, u64)> {
                vec![ $( (stringify!($name), self.$name.get()), )* ]
            }
        }
    };
}

counters! {
    /// Rounds of the execution loop.
    loops;
    /// Blocks left through an exit that was not linked yet.
    exit_chain;
    /// Blocks refused because the mode or a code page has changed.
    exit_page;
    /// Jump-cache misses that only the loop could serve.
    exit_lookup;
    /// Stops asked for by other threads, timers and devices.
    exit_request;
    /// Stops by instructions that need the loop.
    exit_insn;
    /// Faults that instructions raised.
    exit_fault;
    /// Instructions restarted because they wrote over code.
    exit_restart;
    /// Jump-cache misses.
    jump_cache_misses;
    /// Data accesses that walked the page tables.
    tlb_misses;
    /// Walks of the page tables for code pages.
    code_walks;
    /// Flushes of the TLBs: all translations.
    flushes_all;
    /// Flushes of the TLBs: those that are not global.
    flushes_local;
    /// Flushes of the TLBs: one page.
    flushes_page;
    /// Exceptions delivered.
    exceptions;
    /// Interrupts delivered.
    interrupts;
    /// Writes to pages that hold translated code.
    code_writes;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_count_by_name() {
        let c = Counters::default();
        c.tlb_misses.hit();
        c.tlb_misses.hit();
        let list = c.list();
        assert!(list.contains(&("tlb_misses", 2)) && list.contains(&("loops", 0)));
    }
}
