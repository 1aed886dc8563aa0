//! User mode: one program instead of a machine. Guest addresses are host addresses, system calls and
//! exceptions go to whoever runs the program, and there is no kernel mode.
//!
//! ```text
//!   Process ── Space   what is mapped where; which pages with code are protected
//!      │   └── the block table and the compiler, as in a machine
//!      └── Thread ×n   run() ─► Event: system call · exception · a signal to look at
//! ```
//! What always holds:
//!
//! * Generated code accesses guest memory directly; what the host refuses there comes back as a page
//!   fault with exact registers. Helpers look into [`Space`] first, through their software TLB.
//! * Whoever maps, unmaps or protects guest memory tells [`Process`], after the host has done it.

mod space;
mod thread;

pub use space::{NO_OBJECT, Prot, REFUSED, Space};
pub(crate) use thread::UserEvent;
pub use thread::{Bell, Event, Thread};

use crate::accel::{BackendKind, backend, linear_target};
use crate::exec::Shared;
use crate::log;
use crate::perfmap::PerfMap;
use crate::softmmu::{PAGE_MASK, PAGE_SIZE};
use crate::tb::TbCache;
use crate::x86;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use tandem_accel::Result;
use tandem_accel::clock::Clock;
use tandem_accel::x86::cpuid::CpuidTable;
use tandem_jit::target::Target;

/// Options of a process.
#[derive(Clone, Debug)]
pub struct UserOptions {
    /// One guest instruction per block.
    pub one_insn_per_tb: bool,
    /// Size of the code memory in bytes.
    pub code_bytes: usize,
    /// What to log.
    pub log: log::Options,
    /// Writes a map of the translated code for `perf`.
    pub perf_map: bool,
}

/// What the threads of a program share.
pub struct Process {
    options: UserOptions,
    cpuid: Arc<CpuidTable>,
    clock: Arc<Clock>,
    target: Arc<Target>,
    shared: Arc<Shared>,
    tbs: Arc<TbCache>,
    space: Arc<Space>,
    threads: AtomicU32,
}

impl Process {
    /// What a processor model may be made of here.
    pub fn supported_cpuid() -> CpuidTable {
        x86::cpuid::supported()
    }

    /// An empty process on processors that answer CPUID with `cpuid`.
    ///
    /// # Errors
    /// There is no memory for generated code, or the log cannot be opened.
    pub fn new(options: UserOptions, cpuid: CpuidTable) -> Result<Arc<Process>> {
        log::init(&options.log)?;
        let target = Arc::new(linear_target());
        let backend = backend(BackendKind::Jit, &target, options.code_bytes)?;
        let space = Arc::new(Space::default());
        let perf_map = options.perf_map.then(PerfMap::create).transpose()?;
        Ok(Arc::new(Process {
            cpuid: Arc::new(cpuid),
            clock: Clock::new(),
            target,
            shared: Arc::new(Shared::default()),
            tbs: TbCache::new(backend, perf_map, space.clone()),
            space,
            threads: AtomicU32::new(0),
            options,
        }))
    }

    /// What is mapped where.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// The host has mapped `[start, start + len)`, or changed what it allows; `None`: has unmapped it.
    pub fn mapped(&self, start: u64, len: u64, prot: Option<Prot>) {
        let first = start & !PAGE_MASK;
        let len = (start.saturating_add(len)).next_multiple_of(PAGE_SIZE).saturating_sub(first);
        let known =
            self.space.next_area(first).is_some_and(|(s, ..)| s < first.saturating_add(len));
        self.space.set(first, len, prot);
        if known {
            self.space.renewed(first, len);
            self.tbs.forget(first, len);
            self.shared.phys.changed();
            self.shared.memory_changed();
        }
    }

    /// The host has put other content into `[start, start + len)`; what it allows is as before.
    pub fn rewritten(&self, start: u64, len: u64) {
        let first = start & !PAGE_MASK;
        let end = start.saturating_add(len).next_multiple_of(PAGE_SIZE);
        self.tbs.forget(first, end.saturating_sub(first));
    }

    /// The guest, or the kernel for it, is about to write to a page: if it is only protected because
    /// code was translated from it, the host allows the write from now on. Returns whether that was so.
    pub fn open(&self, addr: u64) -> bool {
        let page = addr & !PAGE_MASK;
        let was = self.space.is_protected(page);
        if was {
            self.tbs.forget(page, PAGE_SIZE);
        }
        was
    }

    fn next_index(&self) -> u32 {
        self.threads.fetch_add(1, Ordering::Relaxed)
    }
}
