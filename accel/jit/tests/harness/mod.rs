//! A small machine to run IR on: an `Env` layout, guest memory behind a software TLB, helpers and
//! the runtime's slow paths. Every back end runs the same blocks on it.
//!
//! Guest memory: [`RAM`] is ordinary memory of which the page at [`READ_ONLY`] cannot be written;
//! the page at [`MMIO`] answers loads with a function of the address and records stores; everything
//! else faults.

#![allow(dead_code)]

pub mod random;

use std::collections::HashMap;
use std::mem::offset_of;
use std::sync::Arc;
use tandem_jit::code::{Backend, CodePtr, Compiled, EnvMem};
use tandem_jit::interp::InterpBackend;
use tandem_jit::ir::{Block, PTR_ALIGNED, PTR_WRITE};
use tandem_jit::target::*;

pub const PAGE: u64 = 4096;
pub const RAM: std::ops::Range<u64> = 0x1_0000..0x2_0000;
pub const READ_ONLY: u64 = 0x1_8000;
pub const MMIO: u64 = 0x3_0000;
const TLB: usize = 16;
const JMP_BITS: u8 = 4;
const CODE_MAP: usize = 16;

/// Names of the globals: 16 pinned, then memory.
pub const GLOBALS: [&str; 22] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15", "pc", "cc", "cc2", "m0", "m1", "m2",
];
pub const PC: usize = 16;

#[repr(C, align(64))]
pub struct Env {
    pub vec: [[u8; 64]; 32],
    pub opmask: [u64; 8],
    pub globals: [u64; 22],
    pub mxcsr: u32,
    pub host_mxcsr: u32,
    pub exit_request: u32,
    pub fault: u32,
    pub vec_live: u8,
    pub x87_live: u8,
    pub x87_saved: u8,
    pub bounce: u8,
    /// x87 state as FNSAVE stores it.
    pub x87_image: [u8; 108],
    pub host_sp: u64,
    pub host_pc: u64,
    pub exit_ref: u64,
    /// A plain state field for LdEnv and StEnv.
    pub scratch: [u64; 4],
    pub fault_addr: u64,
    pub code_map: [u32; CODE_MAP],
    tlb_mask: u64,
    tlb_pext: u64,
    tag_r: [u64; TLB],
    tag_w: [u64; TLB],
    addend: [u64; TLB],
    jmp_cache: [[u64; 2]; 1 << JMP_BITS],
    bounce_buf: Line,
    bounce_addr: u64,
    bounce_size: u64,
    bounce_write: u64,
    world: *mut World,
}

/// 64 bytes, aligned as vector instructions want it.
#[repr(C, align(64))]
struct Line([u8; 64]);

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// Guest memory; pages are pages of the host.
pub struct Ram(Vec<Page>);

impl std::ops::Deref for Ram {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: as in `deref_mut`.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * 4096) }
    }
}

impl std::ops::DerefMut for Ram {
    fn deref_mut(&mut self) -> &mut [u8] {
        let len = self.0.len() * 4096;
        // SAFETY: pages are plain bytes, one after the other.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), len) }
    }
}

/// What is behind the `Env`: memory, the devices' log, blocks by pc.
pub struct World {
    pub ram: Ram,
    pub mmio_log: Vec<(u64, u8)>,
    pub blocks: HashMap<u64, CodePtr>,
    /// Refills per run; a tiny limit on TLB contents is kept by the table size itself.
    pub fills: u32,
}

pub fn layout() -> EnvLayout {
    let off = |n: usize| n as u32;
    EnvLayout {
        size: size_of::<Env>() as u32,
        exit_request: off(offset_of!(Env, exit_request)),
        fault: off(offset_of!(Env, fault)),
        vec_live: off(offset_of!(Env, vec_live)),
        x87_live: off(offset_of!(Env, x87_live)),
        x87_saved: off(offset_of!(Env, x87_saved)),
        x87_image: off(offset_of!(Env, x87_image)),
        bounce: off(offset_of!(Env, bounce)),
        mxcsr: off(offset_of!(Env, mxcsr)),
        host_mxcsr: off(offset_of!(Env, host_mxcsr)),
        fault_addr: off(offset_of!(Env, fault_addr)),
        host_sp: off(offset_of!(Env, host_sp)),
        host_pc: off(offset_of!(Env, host_pc)),
        exit_ref: off(offset_of!(Env, exit_ref)),
        vec: off(offset_of!(Env, vec)),
        opmask: off(offset_of!(Env, opmask)),
        code_map: off(offset_of!(Env, code_map)),
        code_map_len: CODE_MAP as u32,
        jmp_cache: off(offset_of!(Env, jmp_cache)),
        jmp_cache_bits: JMP_BITS,
    }
}

/// Offset of scratch field `i` in the `Env`, for LdEnv and StEnv.
pub fn scratch(i: usize) -> u32 {
    (offset_of!(Env, scratch) + 8 * i) as u32
}

/// How much vector state this host has.
pub fn host_vec() -> VecState {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            return VecState::Zmm;
        }
        if is_x86_feature_detected!("avx") {
            return VecState::Ymm;
        }
    }
    VecState::Xmm
}

pub fn target() -> Arc<Target> {
    let globals = GLOBALS.iter().enumerate().map(|(i, name)| GlobalDesc {
        name,
        offset: (offset_of!(Env, globals) + 8 * i) as u32,
        class: if i < PC { GlobalClass::Pinned(i as u8) } else { GlobalClass::Memory },
        x86_hint: (i < PC).then_some(i as u8),
    });
    let helper = |name, addr, effects| HelperDesc { name, addr, effects };
    let pure = HelperEffects::default();
    Arc::new(Target {
        globals: globals.collect(),
        pc_global: PC as u8,
        helpers: vec![
            helper("mix", mix as *const () as usize, pure),
            helper(
                "rotate_regs",
                rotate_regs as *const () as usize,
                HelperEffects { reads_globals: true, writes_globals: true, ..pure },
            ),
            helper(
                "sum_regs",
                sum_regs as *const () as usize,
                HelperEffects { reads_globals: true, ..pure },
            ),
            helper(
                "fault_if",
                fault_if as *const () as usize,
                HelperEffects { may_fault: true, ..pure },
            ),
            helper(
                "invert_vec",
                invert_vec as *const () as usize,
                HelperEffects { vector: true, ..pure },
            ),
            helper(
                "fault_or_write",
                fault_or_write as *const () as usize,
                HelperEffects {
                    reads_globals: true,
                    writes_globals: true,
                    may_fault: true,
                    ..pure
                },
            ),
        ],
        env: layout(),
        mem: MemModel::Softmmu {
            page_bits: 12,
            tables: vec![TlbLayout {
                mask_off: offset_of!(Env, tlb_mask) as u32,
                pext_mask_off: offset_of!(Env, tlb_pext) as u32,
                tag_r: offset_of!(Env, tag_r) as u32,
                tag_w: offset_of!(Env, tag_w) as u32,
                addend: offset_of!(Env, addend) as u32,
            }],
        },
        vec: host_vec(),
        runtime: Runtime {
            load: rt_load as *const () as usize,
            store: rt_store as *const () as usize,
            ptr: rt_ptr as *const () as usize,
            ptr_end: rt_ptr_end as *const () as usize,
            lookup: rt_lookup as *const () as usize,
            refused: rt_refused as *const () as usize,
            x87_image: rt_x87_image as *const () as usize,
        },
    })
}

/// Every back end that this host has.
pub fn backends(target: &Arc<Target>) -> Vec<Arc<dyn Backend>> {
    vec![
        InterpBackend::new(target.clone()),
        #[cfg(target_arch = "x86_64")]
        tandem_jit::x86_64::X64Backend::new(target.clone(), 4 << 20).expect("code memory"),
    ]
}

/// One vCPU: an `Env` and its world.
pub struct Machine {
    pub backend: Arc<dyn Backend>,
    env: EnvMem,
    world: Box<World>,
    next_tag: u64,
}

impl Machine {
    pub fn new(backend: Arc<dyn Backend>) -> Machine {
        let env = backend.alloc_env().expect("memory for the Env");
        let world = World {
            ram: Ram(vec![Page([0; 4096]); (RAM.end - RAM.start) as usize / 4096]),
            mmio_log: Vec::new(),
            blocks: HashMap::new(),
            fills: 0,
        };
        let mut m = Machine { backend, env, world: Box::new(world), next_tag: 1 };
        let world: *mut World = &mut *m.world;
        let env = m.env();
        env.world = world;
        env.mxcsr = 0x1f80;
        env.tlb_mask = TLB as u64 - 1;
        env.tlb_pext = (TLB as u64 - 1) << 12;
        m.flush_tlb();
        m
    }

    pub fn env(&mut self) -> &mut Env {
        // SAFETY: alloc_env gives zeroed, page-aligned memory of the layout's size; nothing else
        // refers to it while the machine is borrowed.
        unsafe { &mut *self.env.as_ptr().cast::<Env>() }
    }

    pub fn world(&mut self) -> &mut World {
        &mut self.world
    }

    pub fn flush_tlb(&mut self) {
        let env = self.env();
        env.tag_r = [u64::MAX; TLB];
        env.tag_w = [u64::MAX; TLB];
    }

    /// Compiles `block` and makes it known to lookups.
    pub fn add(&mut self, block: &Block) -> Compiled {
        let tag = self.next_tag;
        self.next_tag += 1;
        let compiled = self
            .backend
            .compiler()
            .compile(block, tag)
            .unwrap_or_else(|e| panic!("{e} in\n{}", block.listing(None)));
        self.world.blocks.insert(block.pc, compiled.checked);
        compiled
    }

    /// Puts the page of `addr` into the TLB.
    pub fn warm(&mut self, addr: u64) {
        self.env().fill(addr);
    }

    pub fn run(&mut self, code: CodePtr) -> u32 {
        // SAFETY: the Env is this machine's own and `code` was compiled by its back end.
        unsafe { self.backend.run(self.env.as_ptr(), code) }
    }
}

/// The byte that the device answers for `addr`.
pub fn mmio_byte(addr: u64) -> u8 {
    (addr.wrapping_mul(0x9e37_79b9) >> 8) as u8
}

impl Env {
    fn world(&mut self) -> &mut World {
        // SAFETY: set by Machine::new to a Box that lives as long as the Env; only the slow paths,
        // one at a time, look at it while code runs.
        unsafe { &mut *self.world }
    }

    /// Checks one byte of an access; `false` after raising a fault.
    fn check(&mut self, addr: u64, write: bool) -> bool {
        let page = addr & !(PAGE - 1);
        let ok = page == MMIO || (RAM.contains(&addr) && !(write && page == READ_ONLY));
        if !ok {
            self.fault = 1;
            self.fault_addr = addr;
        }
        ok
    }

    fn fill(&mut self, addr: u64) {
        if !RAM.contains(&addr) {
            return;
        }
        let page = addr & !(PAGE - 1);
        let i = (page >> 12) as usize % TLB;
        let ram = self.world().ram.as_mut_ptr() as u64;
        self.world().fills += 1;
        self.tag_r[i] = page;
        self.tag_w[i] = if page == READ_ONLY { u64::MAX } else { page };
        self.addend[i] = ram.wrapping_sub(RAM.start);
    }

    fn read(&mut self, addr: u64) -> u8 {
        if addr & !(PAGE - 1) == MMIO {
            return mmio_byte(addr);
        }
        self.world().ram[(addr - RAM.start) as usize]
    }

    fn write(&mut self, addr: u64, v: u8) {
        if addr & !(PAGE - 1) == MMIO {
            self.world().mmio_log.push((addr, v));
        } else {
            self.world().ram[(addr - RAM.start) as usize] = v;
        }
    }

    /// Whether all bytes may be accessed; raises a fault for the first that may not.
    fn check_all(&mut self, addr: u64, size: u32, write: bool) -> bool {
        (0..u64::from(size)).all(|i| self.check(addr.wrapping_add(i), write))
    }
}

extern "C" fn rt_load(env: &mut Env, addr: u64, info: u32) -> u64 {
    let size = AccessInfo(info).size();
    if !env.check_all(addr, size, false) {
        return 0xdead_dead_dead_dead;
    }
    env.fill(addr);
    (0..u64::from(size)).fold(0, |v, i| v | u64::from(env.read(addr + i)) << (8 * i))
}

extern "C" fn rt_store(env: &mut Env, addr: u64, info: u32, value: u64) {
    let size = AccessInfo(info).size();
    if !env.check_all(addr, size, true) {
        return;
    }
    env.fill(addr);
    for i in 0..u64::from(size) {
        env.write(addr + i, (value >> (8 * i)) as u8);
    }
}

extern "C" fn rt_ptr(env: &mut Env, addr: u64, info: u32) -> u64 {
    let info = AccessInfo(info);
    let write = info.access() & PTR_WRITE != 0;
    if info.access() & PTR_ALIGNED != 0 && addr & (u64::from(info.size()) - 1) != 0 {
        env.fault = 4;
        env.fault_addr = addr;
        return 0;
    }
    if !env.check_all(addr, info.size(), write) {
        return 0;
    }
    let last = addr + u64::from(info.size()) - 1;
    if RAM.contains(&addr) && addr >> 12 == last >> 12 {
        env.fill(addr);
        return env.world().ram.as_mut_ptr() as u64 + (addr - RAM.start);
    }
    for i in 0..info.size() as usize {
        env.bounce_buf.0[i] = env.read(addr + i as u64);
    }
    if write {
        env.bounce = 1;
        env.bounce_addr = addr;
        env.bounce_size = info.size().into();
    }
    env.bounce_buf.0.as_mut_ptr() as u64
}

extern "C" fn rt_ptr_end(env: &mut Env) {
    env.bounce = 0;
    for i in 0..env.bounce_size {
        let v = env.bounce_buf.0[i as usize];
        env.write(env.bounce_addr + i, v);
    }
}

extern "C" fn rt_lookup(env: &mut Env, pc: u64, _exit: u64) -> u64 {
    let Some(&CodePtr(code)) = env.world().blocks.get(&pc) else { return 0 };
    let i = (pc ^ pc >> JMP_BITS) as usize & ((1 << JMP_BITS) - 1);
    env.jmp_cache[i] = [pc, code];
    code
}

/// The unit as FNINIT leaves it.
extern "C" fn rt_x87_image(env: &mut Env) {
    env.x87_image = [0; 108];
    env.x87_image[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
    env.x87_image[8..10].fill(0xff);
}

extern "C" fn rt_refused(_env: &mut Env, _pc: u64, _exit: u64) -> u64 {
    0
}

/// A pure function of four arguments.
pub fn mix_of(a: u64, b: u64, c: u64, d: u64) -> u64 {
    a.wrapping_mul(3) ^ b.rotate_left(7) ^ c.wrapping_mul(0x1_0001) ^ d.rotate_right(9)
}

extern "C" fn mix(_env: &mut Env, a: u64, b: u64, c: u64, d: u64) -> u64 {
    mix_of(a, b, c, d)
}

extern "C" fn rotate_regs(env: &mut Env, a: u64) -> u64 {
    env.globals[..PC].rotate_left(1);
    env.globals[19] = env.globals[19].wrapping_add(a);
    env.globals[0]
}

extern "C" fn sum_regs(env: &mut Env) -> u64 {
    env.globals
        .iter()
        .enumerate()
        .fold(0, |s: u64, (i, g)| s.wrapping_mul(31).wrapping_add(if i == PC { 0 } else { *g }))
}

extern "C" fn fault_if(env: &mut Env, a: u64) -> u64 {
    if a & 1 != 0 {
        env.fault = 2;
    }
    a ^ 0xff
}

extern "C" fn invert_vec(env: &mut Env, a: u64) -> u64 {
    let reg = (a % 16) as usize;
    for b in &mut env.vec[reg][..16] {
        *b = !*b;
    }
    env.vec[reg][0].into()
}

extern "C" fn fault_or_write(env: &mut Env, a: u64) -> u64 {
    if a & 1 != 0 {
        env.fault = 3;
    } else {
        env.globals[3] = env.globals[3].wrapping_add(a);
        env.globals[20] ^= a;
    }
    env.globals[3]
}
