//! From a guest pc to runnable code: the physical address of the code, the block table, translation.

use super::Vcpu;
use crate::log;
use crate::softmmu::access::code_map_slot;
use crate::softmmu::{PAGE_MASK, PAGE_SIZE, phys};
use crate::tb::{Found, NewTb, Range, TbKey, Watched};
use crate::user::Space;
use crate::x86::Env;
use crate::x86::exception::Exception;
use crate::x86::mode::{MMU_KERNEL_SMAP, MMU_USER, Mode};
use crate::x86::paging::{self, Access};
use crate::x86::translate::{self, CodeFetch, CodeRange, Limits};
use std::cell::RefCell;
use tandem_accel::x86::cpuid::CpuidTable;
use tandem_jit::code::{CompileError, Compiler, ExitRef};
use tandem_jit::ir::{Block, CodePage};
use tandem_jit::opt;

/// Most guest instructions in a block.
const MAX_INSNS: u32 = 64;
/// Entries of the code TLB.
const CODE_TLB: usize = 256;

/// A translation of a code page, valid while the code map holds `id` in its slot.
#[derive(Clone, Copy, Default)]
struct CodeTlbEntry {
    /// Virtual page, with bit 0 set for user mode.
    vpage: u64,
    ppage: u64,
    id: u32,
}

/// What a vCPU needs to translate: the compiler with its reused allocations, and the code TLB.
pub struct Engine {
    compiler: Box<dyn Compiler>,
    block: Block,
    front: translate::FrontEnd,
    passes: opt::Passes,
    code_tlb: [CodeTlbEntry; CODE_TLB],
    /// Pages of the translation in progress.
    pages: Vec<Page>,
}

/// A page that code is being translated from.
struct Page {
    vpage: u64,
    ppage: u64,
    watched: Watched,
    /// What it held, taken at once; `None` if all its writers are watched.
    bytes: Option<Box<[u8; PAGE_SIZE as usize]>>,
}

impl Engine {
    /// An engine around a compiler, for the processor that `cpuid` describes.
    pub fn new(compiler: Box<dyn Compiler>, cpuid: &CpuidTable) -> RefCell<Engine> {
        RefCell::new(Engine {
            compiler,
            block: Block::default(),
            front: translate::FrontEnd::new(translate::Gate::of(cpuid)),
            passes: opt::Passes::default(),
            code_tlb: [CodeTlbEntry::default(); CODE_TLB],
            pages: Vec::new(),
        })
    }
}

/// Why no code was found.
pub enum NoCode {
    /// Fetching faults; deliver this.
    Fault(Exception),
    /// Code memory is full: flush everything first.
    Full,
}

fn mode_of(env: &Env) -> Mode {
    Mode::from_bits_retain(env.core.mode)
}

/// The linear address of `rip`.
fn linear(env: &Env, rip: u64) -> u64 {
    if mode_of(env).contains(Mode::CODE64) {
        rip
    } else {
        env.cpu.seg_base[tandem_accel::x86::seg::CS].wrapping_add(rip) & 0xffff_ffff
    }
}

/// The physical page of a code page; afterwards the code map says that this translation is valid.
fn code_page(env: &mut Env, engine: &mut Engine, addr: u64) -> Result<(u64, u32), Exception> {
    let user = mode_of(env).cpl() == 3;
    let vpage = addr & !PAGE_MASK | u64::from(user);
    let slot = code_map_slot(addr);
    let e = engine.code_tlb[slot % CODE_TLB];
    if e.vpage == vpage && e.id != 0 && env.core.code_map[slot] == e.id {
        return Ok((e.ppage, e.id));
    }
    let mmu = if user { MMU_USER } else { MMU_KERNEL_SMAP };
    env.vcpu().counters.code_walks.hit();
    let t = match &env.vcpu().space {
        Some(space) => space.code_page(addr)?,
        None => paging::walk(env, addr, Access::Fetch, mmu)?,
    };
    let ppage = t.phys & !PAGE_MASK;
    let id = env.vcpu().tbs.page_id(vpage, ppage);
    engine.code_tlb[slot % CODE_TLB] = CodeTlbEntry { vpage, ppage, id };
    env.enter_code_map(slot, id, t.global);
    Ok((ppage, id))
}

/// Finds or makes the block at `rip` in the present mode. `limit` bounds its guest instructions.
pub fn find(env: &mut Env, engine: &mut Engine, rip: u64, one: bool) -> Result<Found, NoCode> {
    let key = TbKey {
        rip,
        cs_base: env.cpu.seg_base[tandem_accel::x86::seg::CS],
        mode: env.core.mode | if one { Mode::ONE_INSN.bits() } else { 0 },
    };
    let addr = linear(env, rip);
    let (ppage, _) = code_page(env, engine, addr).map_err(NoCode::Fault)?;
    let phys = ppage | addr & PAGE_MASK;
    if let Some(f) = env.vcpu().tbs.find(key, phys).and_then(|f| confirmed(env, f)) {
        match f.page2 {
            None => return Ok(f),
            Some((vpage, ppage)) => {
                // A fault on the second page is none yet: the block may end before it.
                if code_page(env, engine, vpage).is_ok_and(|(p, _)| p == ppage) {
                    return Ok(f);
                }
            }
        }
    }
    translate(env, engine, key, phys)
}

struct Fetch<'a> {
    env: &'a mut Env,
    pages: &'a mut Vec<Page>,
    walk: &'a mut dyn FnMut(&mut Env, u64) -> Result<u64, Exception>,
}

impl CodeFetch for Fetch<'_> {
    fn fetch(&mut self, linear: u64, buf: &mut [u8]) -> Result<usize, Exception> {
        let vpage = linear & !PAGE_MASK;
        let i = match self.pages.iter().position(|p| p.vpage == vpage) {
            Some(i) => i,
            None => {
                let ppage = (self.walk)(self.env, linear)?;
                let page = open_page(self.env, vpage, ppage);
                self.pages.push(page);
                self.pages.len() - 1
            }
        };
        let page = &self.pages[i];
        let at = (linear & PAGE_MASK) as usize;
        let n = (PAGE_SIZE as usize - at).min(buf.len());
        match &page.bytes {
            Some(bytes) => buf[..n].copy_from_slice(&bytes[at..at + n]),
            None => read_code(self.env, page.ppage | at as u64, &mut buf[..n]),
        }
        Ok(n)
    }
}

/// Watches a page before its bytes are read.
fn open_page(env: &mut Env, vpage: u64, ppage: u64) -> Page {
    let watched = env.vcpu().tbs.watch_page(ppage);
    env.process_mail();
    let settled = env.vcpu().tbs.is_settled(watched) || !is_ram(env, ppage);
    let bytes = (!settled).then(|| {
        let mut bytes = Box::new([0; PAGE_SIZE as usize]);
        read_code(env, ppage, &mut *bytes);
        bytes
    });
    Page { vpage, ppage, watched, bytes }
}

fn is_ram(env: &Env, gpa: u64) -> bool {
    env.vcpu().space.is_some() || phys::find(&env.vcpu().ram(), gpa).is_some()
}

/// Reads code bytes inside one page.
fn read_code(env: &Env, gpa: u64, buf: &mut [u8]) {
    if env.vcpu().space.is_some() {
        return Space::read(gpa, buf);
    }
    match phys::find(&env.vcpu().ram(), gpa) {
        // SAFETY: the bytes lie inside the page and so inside the region, which stays mapped while
        // vCPUs run.
        Some(r) => unsafe {
            let p = (r.host as u64 + (gpa - r.gpa)) as *const u8;
            std::ptr::copy_nonoverlapping(p, buf.as_mut_ptr(), buf.len());
        },
        None => {
            for (i, b) in buf.iter_mut().enumerate() {
                env.vcpu().mmio_read(gpa + i as u64, std::slice::from_mut(b));
            }
        }
    }
}

/// A found block as it may be entered now; `None` if it is not what memory holds.
fn confirmed(env: &Env, found: Found) -> Option<Found> {
    if !found.provisional {
        return Some(found);
    }
    env.vcpu().tbs.confirm(found, |gpa, code| {
        let mut now = [0; PAGE_SIZE as usize];
        let now = &mut now[..code.len()];
        read_code(env, gpa, now);
        now == code
    })
}

fn translate(env: &mut Env, engine: &mut Engine, key: TbKey, phys: u64) -> Result<Found, NoCode> {
    loop {
        if let Some(f) = translate_once(env, engine, key, phys)? {
            return Ok(f);
        }
    }
}

/// One attempt; `None` if the code was written meanwhile.
fn translate_once(
    env: &mut Env,
    engine: &mut Engine,
    key: TbKey,
    phys: u64,
) -> Result<Option<Found>, NoCode> {
    let mut block = std::mem::take(&mut engine.block);
    let mut pages = std::mem::take(&mut engine.pages);
    let r = translate_into(env, engine, key, phys, &mut block, &mut pages);
    engine.block = block;
    engine.pages = pages;
    r
}

fn translate_into(
    env: &mut Env,
    engine: &mut Engine,
    key: TbKey,
    phys: u64,
    block: &mut Block,
    pages: &mut Vec<Page>,
) -> Result<Option<Found>, NoCode> {
    pages.clear();
    let first = linear(env, key.rip) & !PAGE_MASK;
    let mut front = std::mem::take(&mut engine.front);
    let end = {
        let one = Mode::from_bits_retain(key.mode).contains(Mode::ONE_INSN);
        let count = env.vcpu().pace.is_some();
        let limits = Limits { max_insns: if one { 1 } else { MAX_INSNS }, count };
        let mut walk = |env: &mut Env, addr: u64| code_page(env, engine, addr).map(|p| p.0);
        let mut fetch = Fetch { env, pages, walk: &mut walk };
        let guest = translate::TbKey {
            rip: key.rip,
            cs_base: key.cs_base,
            mode: Mode::from_bits_retain(key.mode),
        };
        front.translate(&mut fetch, guest, limits, block)
    };
    engine.front = front;
    let end = end.map_err(NoCode::Fault)?;
    // Only pages that bytes were taken from count; a fetch may have looked further.
    let mut ranges: Vec<Range> = Vec::with_capacity(end.ranges().len() + end.peeked().len());
    physical_ranges(end.ranges(), pages, &mut ranges);
    let page2 = pages
        .iter()
        .filter(|p| p.vpage != first)
        .find(|p| ranges.iter().any(|r| r.gpa & !PAGE_MASK == p.ppage))
        .map(|p| (p.vpage, p.ppage));
    for vpage in [Some(first), page2.map(|p| p.0)].into_iter().flatten() {
        let (_, id) = code_page(env, engine, vpage).map_err(NoCode::Fault)?;
        block.pages.push(CodePage { slot: code_map_slot(vpage) as u32, id });
    }
    // The word behind the map is the mode.
    block.pages.push(CodePage {
        slot: crate::env::CODE_MAP_LEN as u32,
        id: key.mode & !Mode::ONE_INSN.bits(),
    });
    let vpage_of = |p| pages.iter().find(|x| x.ppage == p).map_or(0, |x| x.vpage);
    log::translated(env, key, vpage_of, &ranges, block);
    physical_ranges(end.peeked(), pages, &mut ranges);
    let tbs = &env.vcpu().tbs;
    engine.passes.run(block, &env.vcpu().target);
    if !tbs.backend.skips_dead_code() || log::wants_optimised() {
        engine.passes.tidy(block, &env.vcpu().target);
        log::optimised(block, &env.vcpu().target);
    }
    let tag = tbs.reserve();
    let compiled = match engine.compiler.compile(block, tag) {
        Ok(c) => c,
        Err(CompileError::ArenaFull) => return Err(NoCode::Full),
        Err(e) => {
            // A block is bounded in instructions; if it still does not fit, go by single ones.
            ::log::error!("block at {:#x}: {e}", key.rip);
            return Err(NoCode::Fault(Exception::UD));
        }
    };
    log::compiled(tbs, &compiled);
    let seen = pages.iter().map(|p| (p.ppage, p.watched));
    let code = provisional_code(env, pages, &ranges);
    let new = NewTb { key, phys, tag, page2, ranges, code, insns: end.insns, compiled };
    Ok(tbs.insert(new, block, seen))
}

/// The bytes of `ranges`, if some writer of their pages may not have been watched when they were
/// read.
fn provisional_code(env: &Env, pages: &[Page], ranges: &[Range]) -> Option<Box<[u8]>> {
    pages.iter().find(|p| p.bytes.is_some())?;
    let mut code = Vec::new();
    for r in ranges {
        let at = (r.gpa & PAGE_MASK) as usize;
        let page = pages.iter().find(|p| p.ppage == r.gpa & !PAGE_MASK);
        let start = code.len();
        code.resize(start + r.len as usize, 0);
        match page.and_then(|p| p.bytes.as_ref()) {
            Some(bytes) => code[start..].copy_from_slice(&bytes[at..at + r.len as usize]),
            // Nobody has written there since, or the block will not be entered.
            None => read_code(env, r.gpa, &mut code[start..]),
        }
    }
    Some(code.into())
}

/// Adds to `to` where the pieces `code` lie in physical memory, of those pages that are in `pages`.
fn physical_ranges(code: &[CodeRange], pages: &[Page], to: &mut Vec<Range>) {
    for r in code {
        let (mut at, mut left) = (r.linear, r.len);
        while left > 0 {
            let n = left.min((PAGE_MASK + 1 - (at & PAGE_MASK)) as u32);
            if let Some(p) = pages.iter().find(|p| p.vpage == at & !PAGE_MASK) {
                to.push(Range { gpa: p.ppage | at & PAGE_MASK, len: n });
            }
            at += u64::from(n);
            left -= n;
        }
    }
}

/// Jump-cache miss in generated code: the checked entry of the block at `pc`, entered into the jump
/// cache, or 0 to go back to the loop. Exit `from`, if it is one, may lead straight there from now on.
pub fn lookup_from_code(env: &mut Env, pc: u64, from: ExitRef) -> u64 {
    env.vcpu().counters.jump_cache_misses.hit();
    if env.vcpu().leaves_always() || env.vcpu().single.get() {
        return 0;
    }
    let vcpu: *const Vcpu = env.vcpu();
    // SAFETY: the vCPU outlives the call (it owns the thread we are on); going through a raw pointer
    // only separates its lifetime from that of the `env` borrow.
    let Ok(mut engine) = (unsafe { &*vcpu }).engine.try_borrow_mut() else { return 0 };
    match find(env, &mut engine, pc, false) {
        Ok(f) if f.provisional => 0,
        Ok(f) => {
            env.enter_jump_cache(pc, f.checked.0);
            if from != ExitRef::NONE {
                env.vcpu().tbs.bind(from, f);
            }
            f.checked.0
        }
        Err(_) => 0,
    }
}

impl Env {
    /// Makes generated code find `code` at `pc` without coming back, if `pc` tells which code that is.
    /// An entry of the same pc in a segment without a base is refused for its mode.
    pub(super) fn enter_jump_cache(&mut self, pc: u64, code: u64) {
        if mode_of(self).contains(Mode::CS_BASED) {
            return;
        }
        self.core.jmp_cache[crate::env::jmp_slot(pc)] = crate::env::JmpEntry { pc, code };
    }
}
