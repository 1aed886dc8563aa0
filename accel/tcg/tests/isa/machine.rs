//! The unit under test: front end, optionally the passes, and a back end, on a bare `Env`.

use super::memory::{CODE, DATA, DATA_LEN, is_data, is_readable};
use super::native::Regs;
use std::sync::Arc;
use tandem_jit::code::{Backend, EnvMem};
use tandem_jit::interp::InterpBackend;
use tandem_jit::ir::{Block, PTR_ALIGNED, PTR_WRITE, Verifier};
use tandem_jit::opt::Passes;
use tandem_jit::target::{
    AccessInfo, LEAVE_CHAIN, LEAVE_FAULT, LEAVE_LOOKUP, LEAVE_TRAP, MemModel, Runtime, Target,
};
use tandem_tcg::accel::host_vectors;
use tandem_tcg::env::Core;
use tandem_tcg::exec::leave;
use tandem_tcg::softmmu::{PAGE_SIZE, Slow, slow};
use tandem_tcg::x86::bits::rflags;
use tandem_tcg::x86::cpu::{self, global};
use tandem_tcg::x86::exception::Exception;
use tandem_tcg::x86::helpers;
use tandem_tcg::x86::mode::Mode;
use tandem_tcg::x86::translate::{CodeFetch, FrontEnd, Limits, TbKey};
use tandem_tcg::x86::x87::image::needs_care;
use tandem_tcg::x86::{Env, flags};

/// How a run ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// At the end of the code.
    Done,
    /// With an exception, RIP at the instruction that raised it.
    Fault(Exception),
    /// With #DE from a division.
    Divide,
    /// With a leave code of its own.
    Left(u32),
}

/// What a run left behind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// Registers and RFLAGS.
    pub regs: Regs,
    /// Instruction pointer.
    pub rip: u64,
    /// How it ended.
    pub end: End,
}

/// A back end with its memory.
pub struct Machine {
    backend: Arc<dyn Backend>,
    target: Arc<Target>,
    mem: EnvMem,
    passes: Option<Passes>,
    verifier: Verifier,
    block: Block,
    front: FrontEnd,
}

fn fault(env: &mut Env, addr: u64, write: bool) {
    helpers::raise(env, Exception::page_fault(addr, if write { 6 } else { 4 }));
}

extern "C" fn load(env: *mut Env, addr: u64, info: u32) -> u64 {
    let len = AccessInfo(info).size();
    if !is_readable(addr, len.into()) {
        // SAFETY: generated code's own Env.
        fault(unsafe { &mut *env }, addr, false);
        return 0;
    }
    let mut v = [0; 8];
    // SAFETY: data is mapped.
    unsafe { std::ptr::copy(addr as *const u8, v.as_mut_ptr(), len as usize) };
    u64::from_le_bytes(v)
}

extern "C" fn store(env: *mut Env, addr: u64, info: u32, value: u64) {
    let len = AccessInfo(info).size();
    if !is_data(addr, len.into()) {
        // SAFETY: generated code's own Env.
        return fault(unsafe { &mut *env }, addr, true);
    }
    // SAFETY: data is mapped.
    unsafe { std::ptr::copy(value.to_le_bytes().as_ptr(), addr as *mut u8, len as usize) };
}

extern "C" fn ptr(env: *mut Env, addr: u64, info: u32) -> u64 {
    let info = AccessInfo(info);
    if info.access() & PTR_ALIGNED != 0 && !addr.is_multiple_of(u64::from(info.size())) {
        // SAFETY: generated code's own Env.
        return helpers::raise(unsafe { &mut *env }, Exception::gp(0));
    }
    if !is_data(addr, info.size().into()) {
        // SAFETY: generated code's own Env.
        fault(unsafe { &mut *env }, addr, info.access() & PTR_WRITE != 0);
        return 0;
    }
    addr
}

extern "C" fn ptr_end(_: *mut Env) {}

extern "C" fn x87_image(env: *mut Env) {
    // SAFETY: generated code's own Env.
    unsafe { &mut *env }.make_x87_image();
}

extern "C" fn lookup(_: *mut Env, _: u64, _: u64) -> u64 {
    0
}

/// Code size in `mode`: 16, 32 or 64.
pub fn code_bits(mode: Mode) -> u32 {
    TbKey { rip: 0, cs_base: 0, mode }.code_bits()
}

/// The compiler's description of the translator, with flat memory behind it.
pub fn target() -> Target {
    Target {
        globals: cpu::globals(),
        pc_global: global::RIP.0,
        helpers: helpers::table(),
        env: Core::layout(size_of::<Env>()),
        mem: MemModel::Softmmu { page_bits: 12, tables: Env::tlb_layouts() },
        vec: host_vectors(),
        runtime: Runtime {
            load: load as *const () as usize,
            store: store as *const () as usize,
            ptr: ptr as *const () as usize,
            ptr_end: ptr_end as *const () as usize,
            lookup: lookup as *const () as usize,
            refused: lookup as *const () as usize,
            x87_image: x87_image as *const () as usize,
        },
    }
}

/// Code bytes in a slice at an address.
pub struct Bytes<'a> {
    /// The bytes.
    pub code: &'a [u8],
    /// Where they start.
    pub at: u64,
}

impl CodeFetch for Bytes<'_> {
    fn fetch(&mut self, linear: u64, buf: &mut [u8]) -> Result<usize, Exception> {
        let from = linear.wrapping_sub(self.at) as usize;
        let bytes = self.code.get(from..).filter(|b| !b.is_empty());
        let Some(bytes) = bytes else { return Err(Exception::page_fault(linear, 0x14)) };
        let room = (PAGE_SIZE - linear % PAGE_SIZE) as usize;
        let n = bytes.len().min(buf.len()).min(room);
        buf[..n].copy_from_slice(&bytes[..n]);
        Ok(n)
    }
}

impl Machine {
    /// The interpreter, with or without the passes before it.
    pub fn interp(passes: bool) -> Machine {
        let target = Arc::new(target());
        Machine::new(InterpBackend::new(target.clone()), target, passes)
    }

    /// The x86-64 back end, with or without the passes before it.
    #[cfg(target_arch = "x86_64")]
    pub fn jit(passes: bool) -> Machine {
        let target = Arc::new(target());
        let backend = tandem_jit::x86_64::X64Backend::new(target.clone(), 16 << 20);
        Machine::new(backend.expect("a code arena"), target, passes)
    }

    fn new(backend: Arc<dyn Backend>, target: Arc<Target>, passes: bool) -> Machine {
        let mem = backend.alloc_env().expect("memory for an Env");
        let mut m = Machine {
            backend,
            target,
            mem,
            passes: passes.then(Passes::default),
            verifier: Verifier::default(),
            block: Block::default(),
            front: FrontEnd::default(),
        };
        m.env().tlb_init();
        for i in 0..DATA_LEN as u64 / PAGE_SIZE {
            let page = DATA + i * PAGE_SIZE;
            let entry = Slow { page, phys: page | slow::READ | slow::WRITE, addend: 0 };
            for tlb in &mut m.env().tlb {
                tlb.fill(entry);
            }
        }
        m
    }

    /// The processor.
    pub fn env(&mut self) -> &mut Env {
        // SAFETY: zeroed memory of the right size and alignment is an Env; generated code is not
        // running.
        unsafe { &mut *self.mem.as_ptr().cast::<Env>() }
    }

    /// Runs `code` at `at` in mode `mode` until it comes to its end or something else happens.
    pub fn run(&mut self, code: &[u8], at: u64, mode: Mode, regs: &Regs) -> Outcome {
        // 16-bit code has segments of its own.
        let small = code_bits(mode) == 16;
        let (cs_base, data_base) = if small { (CODE, DATA) } else { (0, 0) };
        let start = at - cs_base;
        let end = start + code.len() as u64;
        let env = self.env();
        env.cpu.gpr = regs.gpr;
        env.cpu.rip = start;
        env.cpu.seg_base = [data_base; 6];
        env.cpu.seg_base[1] = cs_base;
        env.cpu.eflags = rflags::ONE | rflags::IF;
        env.cpu.cr0 = 1;
        for s in &mut env.cpu.seg {
            // A present, writable data segment of 4 GiB for CPL 3.
            s.attr = 0xf3;
            s.limit = if small { DATA_LEN as u32 - 1 } else { u32::MAX };
        }
        env.set_eflags(regs.flags, rflags::ARITH | rflags::DF);
        let mut mode = mode;
        mode.set(Mode::X87_CARE, needs_care(&env.cpu));
        env.core.mode = mode.bits();
        self.backend.reset();
        let mut compiler = self.backend.compiler();
        for _ in 0..10_000 {
            let rip = self.env().cpu.rip;
            if rip == end {
                return self.outcome(End::Done);
            }
            let key = TbKey { rip, cs_base, mode };
            let mut bytes = Bytes { code, at };
            let made = self.front.translate(&mut bytes, key, Limits::default(), &mut self.block);
            if let Err(e) = made {
                return self.outcome(End::Fault(e));
            }
            self.check("the front end");
            if let Some(passes) = &mut self.passes {
                passes.run(&mut self.block, &self.target);
                self.check("the passes");
            }
            let compiled = compiler.compile(&self.block, 1).expect("compiles");
            // SAFETY: the Env is this back end's own and the code was just compiled by it.
            let code = unsafe { self.backend.run(self.mem.as_ptr(), compiled.checked) };
            match code {
                LEAVE_CHAIN | LEAVE_LOOKUP => {}
                LEAVE_FAULT => {
                    let env = self.env();
                    env.core.fault = 0;
                    let e = env.cpu.exception;
                    return self.outcome(End::Fault(e));
                }
                LEAVE_TRAP => {
                    self.env().core.fault = 0;
                    return self.outcome(End::Divide);
                }
                leave::X87 => {
                    self.env().take_care_of_x87();
                    mode |= Mode::X87_CARE;
                    self.env().core.mode = mode.bits();
                }
                other => return self.outcome(End::Left(other)),
            }
        }
        panic!("no end in sight at rip {:#x}", self.env().cpu.rip);
    }

    fn check(&mut self, who: &str) {
        if let Err(e) = self.verifier.check(&self.block, &self.target) {
            panic!("{who} made a malformed block: {e}\n{}", self.listing());
        }
    }

    /// The last block as text.
    pub fn listing(&self) -> String {
        self.block.listing(Some(&self.target)).to_string()
    }

    fn outcome(&mut self, end: End) -> Outcome {
        let env = self.env();
        env.x87_sync();
        let flags = flags::compute(&env.cpu.cc) | env.eflags() & rflags::DF;
        Outcome { regs: Regs { gpr: env.cpu.gpr, flags }, rip: env.cpu.rip, end }
    }
}
