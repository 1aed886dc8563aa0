//! The machine under test: a whole translated processor, engine and all, with the program's address
//! space behind page tables, under a kernel that is nothing but an IDT whose handlers halt.

use super::layout::{
    CODE, CODE_LEN, CS16, DATA, DATA_LEN, DS16, Memory, READ_ONLY_LEN, USER_CS, USER_DS, USER32_CS,
    selectors,
};
use super::state::{FLAGS, Outcome, State, Trap, has_error};
use std::sync::Arc;
use tandem_accel::AccelOps;
use tandem_accel::bus::IoBus;
use tandem_accel::clock::Clock;
use tandem_accel::memory::{GuestMap, Region, RegionKind, WriteWatch};
use tandem_accel::vcpu::{StopReason, VcpuEvents, VcpuExit, VcpuRunner, VcpuSpec};
use tandem_accel::x86::{
    ATTR_DB, ATTR_G, ATTR_L, ATTR_P, ATTR_S, ATTR_UNUSABLE, Segment, TableReg, X86State, seg,
};
use tandem_tcg::exec::Runner;
use tandem_tcg::x86::bits::{cr0, cr4, rflags};
use tandem_tcg::x86::exception::vector;
use tandem_tcg::x86::{flags, x87};
use tandem_tcg::{BackendKind, TcgAccel, TcgOptions};

// Guest physical addresses.
const GDT: u64 = 0x1000;
const LDT: u64 = 0x1800;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const STACK: u64 = 0x8000;
const HANDLERS: u64 = 0x9000;
const TABLES: u64 = 0x1_0000;
const DATA_AT: u64 = 0x4_0000;
const CODE_AT: u64 = 0x4_8000;
const RAM: u64 = 0x10_0000;
/// Where the kernel sees physical memory.
const KERNEL: u64 = 0xffff_8000_0000_0000;
const KERNEL_CS: u16 = 0x10;
const TSS_SELECTOR: u16 = 0x40;
const LDT_SELECTOR: u16 = 0x50;

const CODE_TYPE: u32 = ATTR_P | ATTR_S | 0xb;
const DATA_TYPE: u32 = ATTR_P | ATTR_S | 0x3;
const USER: u32 = 3 << 5;

struct Silent;
impl VcpuEvents for Silent {
    fn stopped(&self, _: u32, _: StopReason) {}
}

/// A translated processor.
pub struct Guest {
    runner: Runner,
    accel: Arc<TcgAccel>,
    ram: Region,
    _map: Arc<GuestMap>,
}

/// Encodes a descriptor; `limit` is the 20-bit field.
fn descriptor(base: u64, limit: u32, attr: u32) -> u64 {
    u64::from(limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | u64::from(attr & 0xf0ff) << 40
        | u64::from(limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56
}

/// The segment that `selector` names.
fn segment(selector: u16) -> Segment {
    let flat = |attr| Segment::flat(selector, attr | ATTR_G);
    match selector {
        USER_CS => flat(CODE_TYPE | ATTR_L | USER),
        USER32_CS => flat(CODE_TYPE | ATTR_DB | USER),
        USER_DS => flat(DATA_TYPE | ATTR_DB | USER),
        CS16 => Segment { selector, base: CODE, limit: 0xffff, attr: CODE_TYPE | USER },
        DS16 => {
            Segment { selector, base: DATA, limit: DATA_LEN as u32 - 1, attr: DATA_TYPE | USER }
        }
        _ => Segment { selector, base: 0, limit: 0, attr: ATTR_UNUSABLE },
    }
}

struct Tables<'a> {
    ram: &'a Region,
    next: u64,
}

impl Tables<'_> {
    fn poke(&self, gpa: u64, v: u64) {
        assert!(self.ram.load(gpa, &v.to_le_bytes()));
    }
    fn peek(&self, gpa: u64) -> u64 {
        // SAFETY: inside RAM; nothing runs.
        unsafe { self.ram.host_addr().add(gpa as usize).cast::<u64>().read() }
    }
    /// Maps a 4 KiB page with these bits in its entry.
    fn map(&mut self, addr: u64, gpa: u64, bits: u64) {
        let mut table = TABLES;
        for level in [39, 30, 21] {
            let at = table + (addr >> level & 0x1ff) * 8;
            if self.peek(at) == 0 {
                self.next += 0x1000;
                // Present, writable, user.
                self.poke(at, self.next | 7);
            }
            table = self.peek(at) & !0xfff;
        }
        self.poke(table + (addr >> 12 & 0x1ff) * 8, gpa | bits);
    }
}

fn fill_memory(ram: &Region) {
    let mut t = Tables { ram, next: TABLES };
    const NX: u64 = 1 << 63;
    for page in (0..RAM).step_by(0x1000) {
        t.map(KERNEL + page, page, 3);
    }
    for page in (0..DATA_LEN as u64).step_by(0x1000) {
        t.map(DATA + page, DATA_AT + page, 7 | NX);
    }
    let behind = DATA_LEN as u64;
    t.map(DATA + behind, DATA_AT + behind, 5 | NX);
    for page in (0..CODE_LEN as u64).step_by(0x1000) {
        t.map(CODE + page, CODE_AT + page, 5);
    }
    for s in [USER_CS, USER32_CS, USER_DS] {
        t.poke(GDT + u64::from(s & !7), descriptor(0, 0xf_ffff, segment(s).attr));
    }
    t.poke(GDT + u64::from(KERNEL_CS), descriptor(0, 0xf_ffff, CODE_TYPE | ATTR_L | ATTR_G));
    for s in [CS16, DS16] {
        let d = segment(s);
        t.poke(LDT + u64::from(s & !7), descriptor(d.base, d.limit, d.attr));
    }
    let tss = KERNEL + TSS;
    t.poke(GDT + u64::from(TSS_SELECTOR), descriptor(tss, 0xfff, ATTR_P | 0xb));
    t.poke(GDT + u64::from(TSS_SELECTOR) + 8, tss >> 32);
    // RSP0, and no I/O permission map.
    t.poke(TSS + 4, KERNEL + STACK);
    t.poke(TSS + 0x60, 0xffff << 48);
    for v in 0..256u64 {
        let to = KERNEL + HANDLERS + v;
        // Linux lets programs raise #BP, #OF and its system call.
        let dpl = if matches!(v, 3 | 4 | 0x80) { 3 } else { 0 };
        let gate = to & 0xffff
            | u64::from(KERNEL_CS) << 16
            | (0x8e | dpl << 5) << 40
            | (to >> 16 & 0xffff) << 48;
        t.poke(IDT + 16 * v, gate);
        t.poke(IDT + 16 * v + 8, to >> 32);
        assert!(ram.load(HANDLERS + v, &[super::layout::END]));
    }
}

fn kernel_state(features: &tandem_tcg::x86::features::Features) -> X86State {
    let mut s = X86State {
        gdtr: TableReg { base: KERNEL + GDT, limit: 0xfff },
        idtr: TableReg { base: KERNEL + IDT, limit: 0xfff },
        cr0: cr0::PE | cr0::MP | cr0::NE | cr0::WP | cr0::AM | cr0::PG | 0x10,
        cr3: TABLES,
        cr4: cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE | cr4::UMIP,
        efer: 0xd01,
        xcr0: features.xcr0,
        ..X86State::default()
    };
    s.seg[seg::TR] =
        Segment { selector: TSS_SELECTOR, base: KERNEL + TSS, limit: 0xfff, attr: ATTR_P | 0xb };
    s.seg[seg::LDTR] =
        Segment { selector: LDT_SELECTOR, base: KERNEL + LDT, limit: 0x7ff, attr: ATTR_P | 2 };
    s
}

impl Guest {
    /// A processor on this back end.
    pub fn new(backend: BackendKind) -> Guest {
        let map = GuestMap::new();
        let ram = map.add("ram", RegionKind::Ram, 0, RAM).expect("memory");
        fill_memory(&ram);
        let options = TcgOptions { backend, code_bytes: 32 << 20, ..TcgOptions::default() };
        let accel = TcgAccel::new(options, Clock::new()).expect("an accelerator");
        accel.attach_memory(&map).expect("attaches");
        let cpuid = accel.supported_cpuid().expect("CPUID");
        let features = tandem_tcg::x86::features::Features::of(&cpuid);
        let spec = VcpuSpec {
            index: 0,
            apic_id: 0,
            cpuid: Arc::new(cpuid),
            tsc_hz: 1_000_000_000,
            bus: Arc::new(IoBus::default()),
            intc: None,
            state: Box::new(kernel_state(&features)),
            events: Arc::new(Silent),
        };
        let (runner, _) = accel.runner(&spec).expect("a vCPU");
        Guest { runner, accel, ram, _map: map }
    }

    fn copy_in(&self, gpa: u64, bytes: &[u8]) {
        // SAFETY: inside RAM, and the processor does not run.
        unsafe {
            let to = self.ram.host_addr().add(gpa as usize);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    fn copy_out(&self, gpa: u64, bytes: &mut [u8]) {
        // SAFETY: as above.
        unsafe {
            let from = self.ram.host_addr().add(gpa as usize);
            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len());
        }
    }

    /// Runs the program in `memory` from `state` in code of size `bits`; afterwards `memory.data` is
    /// what it left.
    pub fn run(&mut self, state: &State, memory: &mut Memory, bits: u32) -> Outcome {
        self.copy_in(DATA_AT, &memory.data);
        self.copy_in(DATA_AT + DATA_LEN as u64, &memory.read_only);
        assert_eq!(memory.read_only.len(), READ_ONLY_LEN);
        self.copy_in(CODE_AT, &memory.code);
        for page in (0..CODE_LEN).step_by(0x1000) {
            self.accel.tbs().written(CODE_AT + page as u64, 0x1000);
        }
        self.put(state, bits);
        match self.runner.run() {
            VcpuExit::Halted => {}
            VcpuExit::Kicked => panic!("nobody kicks"),
            VcpuExit::TurnOver => panic!("nobody shares its thread"),
            VcpuExit::Stop(why) => panic!("the processor stopped: {why:?}"),
        }
        self.copy_out(DATA_AT, &mut memory.data);
        self.get(bits)
    }

    fn put(&mut self, s: &State, bits: u32) {
        let env = self.runner.env();
        env.x87_sync();
        let cpu = &mut env.cpu;
        cpu.gpr = s.gpr;
        cpu.rip = s.rip;
        cpu.halted = false;
        let (code, data) = selectors(bits);
        let other = if bits == 64 { 0 } else { data };
        for i in 0..6 {
            cpu.set_seg(i, segment(other));
        }
        cpu.set_seg(seg::CS, segment(code));
        cpu.set_seg(seg::SS, segment(data));
        for i in [seg::FS, seg::GS] {
            cpu.set_seg(i, segment(0));
            cpu.seg_base[i] = s.fs_gs[i - seg::FS];
        }
        cpu.fcw = s.cw;
        x87::set_status(cpu, s.sw);
        cpu.ftag_empty = !s.tags;
        (cpu.fop, cpu.fip, cpu.fdp) = (0, 0, 0);
        (cpu.fcs, cpu.fds) = (0, 0);
        for (i, st) in s.st.iter().enumerate() {
            let p = x87::physical(cpu, i);
            cpu.fpr[p] = [0; 16];
            cpu.fpr[p][..10].copy_from_slice(st);
        }
        env.core.vec = s.zmm;
        env.core.opmask = s.k;
        env.core.mxcsr = s.mxcsr;
        env.core.vec_live = 0;
        env.set_eflags(s.flags & FLAGS | rflags::ONE | rflags::IF, rflags::ALL);
        env.update_mode();
    }

    fn get(&mut self, bits: u32) -> Outcome {
        let env = self.runner.env();
        env.x87_sync();
        let cpu = &env.cpu;
        let v = cpu.rip.wrapping_sub(KERNEL + HANDLERS + 1);
        assert!(v < 256, "halted at {:#x}", cpu.rip);
        let v = v as u8;
        let mut s = State { gpr: cpu.gpr, ..State::default() };
        let at = cpu.gpr[4].wrapping_sub(KERNEL);
        assert!(at < RAM, "a stack at {:#x}", cpu.gpr[4]);
        s.fs_gs = [cpu.seg_base[seg::FS], cpu.seg_base[seg::GS]];
        s.cw = cpu.fcw;
        s.sw = x87::status(cpu);
        s.tags = !cpu.ftag_empty;
        for (i, st) in s.st.iter_mut().enumerate() {
            st.copy_from_slice(&cpu.fpr[x87::physical(cpu, i)][..10]);
        }
        // Pending flags are in the frame.
        debug_assert_eq!(flags::compute(&cpu.cc) & !rflags::ARITH, 0);
        s.zmm = env.core.vec;
        s.k = env.core.opmask;
        s.mxcsr = env.core.mxcsr;
        let addr = if v == vector::PF { cpu.cr2 } else { 0 };
        let word = |n: u64| {
            let mut b = [0; 8];
            self.copy_out(at + 8 * n, &mut b);
            u64::from_le_bytes(b)
        };
        let (error, frame) = if has_error(v) { (word(0), 1) } else { (0, 0) };
        s.rip = word(frame);
        s.flags = word(frame + 2) & FLAGS;
        s.gpr[4] = word(frame + 3);
        if bits < 64 {
            s.gpr[8..].fill(0);
            s.gpr.iter_mut().for_each(|v| *v &= u64::from(u32::MAX));
            if bits == 16 {
                s.gpr[4] &= 0xffff;
            }
        }
        Outcome { state: s, trap: Trap { vector: v, error: error as u32, addr } }
    }
}
