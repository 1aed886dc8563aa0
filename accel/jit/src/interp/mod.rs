//! The IR interpreter: the portable back end, and the oracle of the others.
//!
//! ```text
//!   compile: verify ──► copy of the block, globals resolved to Env offsets, natives to thunks
//!   run:     enter ──► one Inst after the other ──► exit ──► linked block, or leave
//! ```
//!
//! What always holds: the globals' truth is in `Env` (a `Put` is stored at once, `InsnStart` stores
//! the pc), so any point may leave without a snapshot; vector state never leaves `Env` between
//! instructions; a block that was compiled has been verified, so that running it indexes nothing
//! unchecked. Following links is a loop, not recursion, and every block entry looks at
//! `exit_request`.
//!
//! Pass-through instructions ([`crate::ir::Op::Native`]) run on an x86-64 host through small
//! executable thunks; elsewhere they leave with [`crate::target::LEAVE_ILLEGAL`].

mod exec;
mod mem;
#[cfg(target_arch = "x86_64")]
mod thunk;
#[cfg(not(target_arch = "x86_64"))]
#[path = "thunk_none.rs"]
mod thunk;

use crate::code::{
    Backend, CodeCopy, CodePtr, CompileError, Compiled, Compiler, EnvMem, ExitRef, LinkSite,
};
use crate::ir::{Block, CodePage, Exit, ExitKind, Inst, Native, Op, Verifier};
use crate::target::{LEAVE_PAGE, LEAVE_REQUEST, Target};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use thunk::{Thunk, ThunkPool};

/// Bytes of interpreted blocks before the caller must flush.
const CAPACITY: usize = 256 << 20;

/// Bit of a [`CodePtr`] that selects the entry without the page check.
const LINKED_ENTRY: u64 = 1;

/// A block ready to be interpreted.
///
/// Its address with [`LINKED_ENTRY`] in bit 0 is its [`CodePtr`], hence the alignment.
#[derive(Debug)]
#[repr(align(256))]
struct Code {
    pc: u64,
    mmu_idx: u8,
    tag: u64,
    /// As in the block, but the `imm` of `Get` and `Put` is an `Env` offset.
    insts: Box<[Inst]>,
    natives: Box<[(Native, Option<Thunk>)]>,
    exits: Box<[Exit]>,
    /// By exit: the `CodePtr` it is linked to, or 0.
    links: Box<[AtomicU64]>,
    pages: Box<[CodePage]>,
    poisoned: AtomicBool,
}

impl Code {
    fn bytes(&self) -> usize {
        size_of::<Code>()
            + size_of_val(&*self.insts)
            + size_of_val(&*self.natives)
            + size_of_val(&*self.exits)
            + size_of_val(&*self.links)
            + size_of_val(&*self.pages)
    }
}

/// All blocks by address. Boxed, so that addresses stay; dropped only by [`Backend::reset`].
#[derive(Debug, Default)]
struct Blocks {
    by_addr: HashMap<u64, Box<Code>>,
    bytes: usize,
}

/// The interpreter as a back end.
#[derive(Debug)]
pub struct InterpBackend {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    target: Arc<Target>,
    blocks: Mutex<Blocks>,
    thunks: Mutex<ThunkPool>,
}

impl Shared {
    fn blocks(&self) -> std::sync::MutexGuard<'_, Blocks> {
        // A panic elsewhere leaves the table whole: every change to it is one insertion or clear.
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl InterpBackend {
    /// An interpreter for `target`.
    pub fn new(target: Arc<Target>) -> Arc<InterpBackend> {
        let thunks = Mutex::new(ThunkPool::new(&target));
        let blocks = Mutex::default();
        Arc::new(InterpBackend { shared: Arc::new(Shared { target, blocks, thunks }) })
    }
}

/// Packs block address and exit index; zero is no site because no block is at address 0.
fn link_site(addr: u64, exit: usize) -> LinkSite {
    // Blocks are 256-byte aligned and exits at most 256 in number.
    LinkSite(addr | exit as u64)
}

impl Backend for InterpBackend {
    fn name(&self) -> &'static str {
        "interp"
    }

    fn compiler(&self) -> Box<dyn Compiler> {
        Box::new(InterpCompiler { shared: self.shared.clone(), verifier: Verifier::default() })
    }

    unsafe fn run(&self, env: *mut u8, code: CodePtr) -> u32 {
        let mut vals = exec::take_values();
        let mut next = code.0;
        let leave = loop {
            // SAFETY: the caller vouches for `code`; every other `next` comes from a link (checked
            // against the block table when made), the jump cache or the runtime's lookup, which hold
            // only code of this back end. Blocks are dropped by `reset` alone, which no thread may
            // call while another is in here.
            let block = unsafe { &*((next & !LINKED_ENTRY) as *const Code) };
            // SAFETY: `env` is an Env of this target's layout, used by this thread only.
            let mut state = unsafe { exec::State::new(&self.shared.target, env, &mut vals) };
            let flow = match entry_check(block, &mut state, next & LINKED_ENTRY == 0) {
                Some(leave) => exec::Flow::Leave(leave),
                None => state.run_block(block),
            };
            match flow {
                exec::Flow::Enter(code) => next = code,
                exec::Flow::Leave(code) => break code,
            }
        };
        exec::put_values(vals);
        leave
    }

    fn link(&self, site: LinkSite, to: CodePtr) {
        let blocks = self.shared.blocks();
        // Only addresses of live blocks may end up in a link: `run` trusts them.
        if blocks.by_addr.contains_key(&(to.0 & !LINKED_ENTRY)) {
            set_link(&blocks, site, to.0);
        }
    }

    fn bind(&self, _site: LinkSite, _pc: u64, _to: CodePtr) {
        // No indirect exit has a site.
    }

    fn unlink(&self, site: LinkSite) {
        set_link(&self.shared.blocks(), site, 0);
    }

    fn poison(&self, block: &Compiled) {
        if let Some(code) = self.shared.blocks().by_addr.get(&block.checked.0) {
            code.poisoned.store(true, Ordering::Release);
        }
    }

    fn reset(&self) {
        let mut blocks = self.shared.blocks();
        blocks.by_addr.clear();
        blocks.bytes = 0;
        self.shared.thunks.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn copy(&self) -> std::io::Result<Box<dyn CodeCopy>> {
        // Blocks are ordinary memory, of which a child has a copy in any case.
        struct Nothing;
        impl CodeCopy for Nothing {
            fn adopt(self: Box<Self>) -> std::io::Result<()> {
                Ok(())
            }
        }
        Ok(Box::new(Nothing))
    }

    fn usage(&self) -> (usize, usize) {
        (self.shared.blocks().bytes, CAPACITY)
    }

    fn code_bytes(&self, _range: Range<u64>) -> Vec<u8> {
        Vec::new()
    }

    fn alloc_env(&self) -> std::io::Result<EnvMem> {
        EnvMem::new(0, self.shared.target.env.size as usize)
    }
}

fn set_link(blocks: &Blocks, site: LinkSite, to: u64) {
    let (addr, exit) = (site.0 & !0xff, (site.0 & 0xff) as usize);
    if let Some(slot) = blocks.by_addr.get(&addr).and_then(|b| b.links.get(exit)) {
        slot.store(to, Ordering::Release);
    }
}

/// What happens at the entry of a block before its first instruction: a leave code, or go on.
fn entry_check(block: &Code, state: &mut exec::State<'_>, check_pages: bool) -> Option<u32> {
    let stale = block.poisoned.load(Ordering::Acquire)
        || (check_pages && block.pages.iter().any(|p| state.code_map(p.slot) != p.id));
    let code = if stale {
        LEAVE_PAGE
    } else if state.exit_requested() {
        LEAVE_REQUEST
    } else {
        return None;
    };
    state.set_pc(block.pc);
    Some(code)
}

#[derive(Debug)]
struct InterpCompiler {
    shared: Arc<Shared>,
    verifier: Verifier,
}

impl Compiler for InterpCompiler {
    fn compile(&mut self, block: &Block, tag: u64) -> Result<Compiled, CompileError> {
        let target = &*self.shared.target;
        self.verifier.check(block, target)?;
        let mut insts: Box<[Inst]> = block.insts.as_slice().into();
        for inst in &mut insts {
            if matches!(inst.op, Op::Get | Op::Put) {
                inst.imm = target.globals[inst.imm as usize].offset.into();
            }
        }
        let mut natives = Vec::with_capacity(block.natives.len());
        if !block.natives.is_empty() {
            let mut pool = self.shared.thunks.lock().unwrap_or_else(PoisonError::into_inner);
            for native in &block.natives {
                natives.push((*native, pool.thunk(native)?));
            }
        }
        let code = Box::new(Code {
            pc: block.pc,
            mmu_idx: block.mmu_idx,
            tag,
            insts,
            natives: natives.into(),
            exits: block.exits.as_slice().into(),
            links: block.exits.iter().map(|_| AtomicU64::new(0)).collect(),
            pages: block.pages.as_slice().into(),
            poisoned: AtomicBool::new(false),
        });
        let addr = std::ptr::from_ref(&*code) as u64;
        let bytes = code.bytes();
        let mut blocks = self.shared.blocks();
        if blocks.bytes + bytes > CAPACITY {
            return Err(CompileError::ArenaFull);
        }
        blocks.bytes += bytes;
        blocks.by_addr.insert(addr, code);
        let site = |(i, e): (usize, &Exit)| {
            matches!(e.kind, ExitKind::Goto { .. }).then(|| link_site(addr, i))
        };
        Ok(Compiled {
            checked: CodePtr(addr),
            paged: CodePtr(addr),
            linked: CodePtr(addr | LINKED_ENTRY),
            range: 0..0,
            exits: block.exits.iter().enumerate().map(site).collect(),
        })
    }
}

impl Code {
    fn exit_ref(&self, exit: usize) -> ExitRef {
        // The verifier admits at most 256 exits.
        ExitRef::new(self.tag, exit as u8)
    }
}
