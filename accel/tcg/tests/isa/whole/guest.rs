//! The machine under test: a whole translated processor, engine and all, with the program's address
//! space behind page tables, under a kernel that is nothing but an IDT whose handlers halt.

use super::layout::{
    CODE, CODE_LEN, CS16, DATA, DATA_LEN, DS16, Memory, READ_ONLY_LEN, USER_CS, USER_DS, USER32_CS,
    selectors,
};
use super::state::{FLAGS, Outcome, State, Trap, has_error};
use crate::processor::{CODE_TYPE, DATA_TYPE, Processor, RAM, descriptor};
use tandem_accel::vcpu::{VcpuExit, VcpuRunner};
use tandem_accel::x86::{
    ATTR_DB, ATTR_G, ATTR_L, ATTR_P, ATTR_UNUSABLE, Segment, TableReg, X86State, seg,
};
use tandem_tcg::BackendKind;
use tandem_tcg::x86::bits::{cr0, cr4, rflags};
use tandem_tcg::x86::exception::vector;
use tandem_tcg::x86::features::Features;
use tandem_tcg::x86::{flags, x87};

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
/// Where the kernel sees physical memory.
const KERNEL: u64 = 0xffff_8000_0000_0000;
const KERNEL_CS: u16 = 0x10;
const TSS_SELECTOR: u16 = 0x40;
const LDT_SELECTOR: u16 = 0x50;

const USER: u32 = 3 << 5;

/// A translated processor.
pub struct Guest {
    cpu: Processor,
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
    cpu: &'a Processor,
    next: u64,
}

impl Tables<'_> {
    /// Maps a 4 KiB page with these bits in its entry.
    fn map(&mut self, addr: u64, gpa: u64, bits: u64) {
        let mut table = TABLES;
        for level in [39, 30, 21] {
            let at = table + (addr >> level & 0x1ff) * 8;
            if self.cpu.read64(at) == 0 {
                self.next += 0x1000;
                // Present, writable, user.
                self.cpu.write64(at, self.next | 7);
            }
            table = self.cpu.read64(at) & !0xfff;
        }
        self.cpu.write64(table + (addr >> 12 & 0x1ff) * 8, gpa | bits);
    }
}

fn fill_memory(cpu: &Processor) {
    let mut t = Tables { cpu, next: TABLES };
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
        cpu.write64(GDT + u64::from(s & !7), descriptor(0, 0xf_ffff, segment(s).attr));
    }
    cpu.write64(GDT + u64::from(KERNEL_CS), descriptor(0, 0xf_ffff, CODE_TYPE | ATTR_L | ATTR_G));
    for s in [CS16, DS16] {
        let d = segment(s);
        cpu.write64(LDT + u64::from(s & !7), descriptor(d.base, d.limit, d.attr));
    }
    let tss = KERNEL + TSS;
    cpu.write64(GDT + u64::from(TSS_SELECTOR), descriptor(tss, 0xfff, ATTR_P | 0xb));
    cpu.write64(GDT + u64::from(TSS_SELECTOR) + 8, tss >> 32);
    // RSP0, and no I/O permission map.
    cpu.write64(TSS + 4, KERNEL + STACK);
    cpu.write64(TSS + 0x60, 0xffff << 48);
    for v in 0..256u64 {
        let to = KERNEL + HANDLERS + v;
        // Linux lets programs raise #BP, #OF and its system call.
        let dpl = if matches!(v, 3 | 4 | 0x80) { 3 } else { 0 };
        let gate = to & 0xffff
            | u64::from(KERNEL_CS) << 16
            | (0x8e | dpl << 5) << 40
            | (to >> 16 & 0xffff) << 48;
        cpu.write64(IDT + 16 * v, gate);
        cpu.write64(IDT + 16 * v + 8, to >> 32);
        cpu.write(HANDLERS + v, &[super::layout::END]);
    }
}

fn kernel_state(features: &Features) -> X86State {
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
        let mut cpu = Processor::new(backend, 32);
        fill_memory(&cpu);
        let state = kernel_state(&cpu.features);
        cpu.runner.set_state(&state).expect("a possible state");
        Guest { cpu }
    }

    /// Runs the program in `memory` from `state` in code of size `bits`; afterwards `memory.data` is
    /// what it left.
    pub fn run(&mut self, state: &State, memory: &mut Memory, bits: u32) -> Outcome {
        self.cpu.write(DATA_AT, &memory.data);
        self.cpu.write(DATA_AT + DATA_LEN as u64, &memory.read_only);
        assert_eq!(memory.read_only.len(), READ_ONLY_LEN);
        self.cpu.write(CODE_AT, &memory.code);
        self.cpu.written(CODE_AT, CODE_LEN as u64);
        self.put(state, bits);
        match self.cpu.runner.run() {
            VcpuExit::Halted => {}
            VcpuExit::Kicked => panic!("nobody kicks"),
            VcpuExit::TurnOver => panic!("nobody shares its thread"),
            VcpuExit::Stop(why) => panic!("the processor stopped: {why:?}"),
        }
        self.cpu.read(DATA_AT, &mut memory.data);
        self.get(bits)
    }

    fn put(&mut self, s: &State, bits: u32) {
        let env = self.cpu.runner.env();
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
        let env = self.cpu.runner.env();
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
        let word = |n: u64| self.cpu.read64(at + 8 * n);
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
