//! A bare machine for system code: tables, a few pages of every kind, and handlers that halt.

use crate::processor::{CODE_TYPE, DATA_TYPE, PAGE, Processor, RAM, descriptor};
use tandem_accel::vcpu::{StopReason, VcpuExit, VcpuRunner};
use tandem_accel::x86::{ATTR_DB, ATTR_G, ATTR_L, ATTR_P, Segment, TableReg, X86State, seg};
use tandem_tcg::BackendKind;
use tandem_tcg::x86::bits::{cr0, cr4, rflags};

const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
/// Where the HLTs are, one per vector.
const HANDLERS: u64 = 0x4000;
/// Top of the stack that exceptions of rings above 0 change to.
const STACK0: u64 = 0x8000;
/// Where the stack pointer of ring 0 starts.
const RING0_SP: u64 = 0x7800;
/// Where that of other rings and of real mode starts, in a page for everybody.
const USER_SP: u64 = 0x9f00;
const TABLES: u64 = 0x1_0000;
/// Code: two pages, behind which nothing is mapped where there is paging.
pub const CODE: u64 = 0x4_0000;
const HLT: u8 = 0xf4;

/// Pages behind the code, with the bits of their entries: see `cases.txt`.
const PAGES: [(u64, u64); 8] = [
    (0x5_0000, 7 | NX),
    (0x5_1000, 5 | NX),
    (0x5_2000, 3 | NX),
    (0x5_3000, 1 | NX),
    (0x5_4000, 7 | NX | 1 << 59),
    (0x5_5000, 7 | 1 << 51),
    (0x5_6000, 0),
    (0x5_7000, 7),
];
const NX: u64 = 1 << 63;

const TSS_TYPE: u32 = ATTR_P | 0xb;

/// What code runs in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Setting {
    /// Real mode.
    Real,
    /// Virtual-8086 mode with IOPL 3, without paging.
    V86,
    /// 32-bit protected mode without paging, in this ring.
    Protected(u8),
    /// 64-bit mode in this ring.
    Long(u8),
    /// 32-bit compatibility mode in this ring.
    Compatibility(u8),
}

impl Setting {
    /// The setting of this name.
    pub fn parse(name: &str) -> Option<Setting> {
        let ring = name.chars().next_back().and_then(|c| c.to_digit(10)).map_or(0, |d| d as u8);
        Some(match name.trim_end_matches(|c: char| c.is_ascii_digit()) {
            "real" => Setting::Real,
            "v" if name == "v86" => Setting::V86,
            "prot" => Setting::Protected(ring),
            "long" => Setting::Long(ring),
            "compat" => Setting::Compatibility(ring),
            _ => return None,
        })
    }

    fn ring(self) -> u8 {
        match self {
            Setting::Real => 0,
            Setting::V86 => 3,
            Setting::Protected(r) | Setting::Long(r) | Setting::Compatibility(r) => r,
        }
    }

    fn is_long(self) -> bool {
        matches!(self, Setting::Long(_) | Setting::Compatibility(_))
    }

    /// Bytes of an entry on the stack that exceptions push.
    fn word(self) -> u64 {
        match self {
            Setting::Real => 2,
            Setting::V86 | Setting::Protected(_) => 4,
            _ => 8,
        }
    }
}

/// Where the code came to a halt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// At its own HLT; RIP behind it, from the code's start.
    Halted(u64),
    /// In the handler of this vector, with this error code; RIP that the handler returns to, from the
    /// code's start.
    Vector(u8, Option<u64>, u64),
    /// It shut down.
    TripleFault,
}

/// The machine.
pub struct Machine {
    cpu: Processor,
}

fn dpl(ring: u8) -> u32 {
    u32::from(ring) << 5
}

/// Selector and attributes of code in this setting.
fn code_segment(s: Setting) -> (u16, u32) {
    let r = s.ring();
    let (selector, size) = match s {
        Setting::Long(_) => (0x28, ATTR_L),
        _ => (0x08, ATTR_DB),
    };
    (selector + u16::from(r > 0) * 0x10 + u16::from(r), CODE_TYPE | ATTR_G | size | dpl(r))
}

/// The same of data.
fn data_segment(s: Setting) -> (u16, u32) {
    let r = s.ring();
    (0x10 + u16::from(r > 0) * 0x10 + u16::from(r), DATA_TYPE | ATTR_G | ATTR_DB | dpl(r))
}

impl Machine {
    /// A machine whose processor is translated by this back end.
    pub fn new(backend: BackendKind) -> Machine {
        Machine { cpu: Processor::new(backend, 16) }
    }

    /// Writes memory.
    pub fn poke(&self, at: u64, bytes: &[u8]) {
        self.cpu.write(at, bytes);
    }

    fn poke64(&self, at: u64, v: u64) {
        self.cpu.write64(at, v);
    }

    /// Reads `len` bytes, at most 8, of memory.
    pub fn peek(&self, at: u64, len: u64) -> u64 {
        let mut b = [0; 8];
        self.cpu.read(at, &mut b[..len as usize]);
        u64::from_le_bytes(b)
    }

    /// Lays the machine out for code in this setting, and gives the state to start from.
    pub fn set_up(&mut self, s: Setting, code: &[u8]) -> X86State {
        self.poke(0, &vec![0; RAM as usize]);
        self.poke(CODE, &vec![HLT; 2 * PAGE as usize]);
        self.poke(CODE, code);
        self.poke(0x5_7000, &vec![HLT; PAGE as usize]);
        self.tables(s);
        self.cpu.written(0, RAM);
        self.start(s)
    }

    fn tables(&self, s: Setting) {
        for ring in [0, 3] {
            for s in [Setting::Protected(ring), Setting::Long(ring)] {
                let (selector, attr) = code_segment(s);
                self.poke64(GDT + u64::from(selector & !7), descriptor(0, 0xf_ffff, attr));
            }
            let (selector, attr) = data_segment(Setting::Protected(ring));
            self.poke64(GDT + u64::from(selector & !7), descriptor(0, 0xf_ffff, attr));
        }
        self.poke64(GDT + 0x48, descriptor(TSS, 0x67, TSS_TYPE));
        // Stack pointer of ring 0, with SS0 where the format has it; no I/O permission map.
        self.poke64(TSS + 4, if s.is_long() { STACK0 } else { 0x10 << 32 | STACK0 });
        self.poke(TSS + 0x66, &[0xff, 0xff]);
        for v in 0..256u64 {
            self.poke(HANDLERS + v, &[HLT]);
            let to = HANDLERS + v;
            // Programs may raise #BP, #OF and vectors from 80h.
            let kind = if v == 3 || v == 4 || v >= 0x80 { 0xee } else { 0x8e };
            match s {
                Setting::Real => {
                    self.poke(4 * v, &((HANDLERS >> 4 << 16 | v) as u32).to_le_bytes())
                }
                _ if s.is_long() => self.poke64(IDT + 16 * v, to | 0x28 << 16 | kind << 40),
                _ => self.poke64(IDT + 8 * v, to | 8 << 16 | kind << 40),
            }
        }
        self.poke64(TABLES, (TABLES + PAGE) | 7);
        self.poke64(TABLES + PAGE, (TABLES + 2 * PAGE) | 7);
        self.poke64(TABLES + 2 * PAGE, (TABLES + 3 * PAGE) | 7);
        let map =
            |page: u64, bits: u64| self.poke64(TABLES + 3 * PAGE + page / PAGE * 8, page | bits);
        for page in (0..0x2_0000).step_by(PAGE as usize) {
            map(page, 3);
        }
        map(USER_SP & !0xfff, 7);
        let user = if s.ring() == 3 { 4 } else { 0 };
        map(CODE, 3 | user);
        map(CODE + PAGE, 3 | user);
        for (page, bits) in PAGES {
            map(page, bits);
        }
    }

    fn start(&self, s: Setting) -> X86State {
        let mut x = X86State {
            gdtr: TableReg { base: GDT, limit: 0x7f },
            idtr: TableReg { base: IDT, limit: 0xfff },
            cr0: cr0::PE | cr0::MP | cr0::NE | cr0::ET | cr0::WP | cr0::AM,
            cr4: cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE,
            xcr0: self.cpu.features.xcr0,
            rip: CODE,
            ..X86State::default()
        };
        (x.fpu.fcw, x.fpu.ftw) = (0x37f, 0);
        x.gpr[4] = if s.ring() == 0 && s != Setting::Real { RING0_SP } else { USER_SP };
        let (data, attr) = data_segment(s);
        for i in 0..6 {
            x.seg[i] = Segment::flat(data, attr);
        }
        let (code, attr) = code_segment(s);
        x.seg[seg::CS] = Segment::flat(code, attr);
        x.seg[seg::TR] = Segment { selector: 0x48, base: TSS, limit: 0x67, attr: TSS_TYPE };
        if s.is_long() {
            x.cr0 |= cr0::PG;
            x.cr4 |= cr4::PAE;
            x.cr3 = TABLES;
            x.efer = 0xd01;
        }
        if matches!(s, Setting::Real | Setting::V86) {
            let real = s == Setting::Real;
            let attr = if real { DATA_TYPE } else { 0xf3 };
            for i in 0..6 {
                x.seg[i] = Segment { selector: 0, base: 0, limit: 0xffff, attr };
            }
            let attr = if real { CODE_TYPE } else { 0xf3 };
            let selector = (CODE >> 4) as u16;
            x.seg[seg::CS] = Segment { selector, base: CODE, limit: 0xffff, attr };
            x.rip = 0;
            if real {
                x.cr0 &= !cr0::PE;
                x.idtr = TableReg { base: 0, limit: 0x3ff };
            } else {
                x.rflags |= rflags::VM | rflags::IOPL;
            }
        }
        x
    }

    /// Runs from `start`; how it ended, and the processor's state then.
    pub fn run(&mut self, s: Setting, start: &X86State) -> (End, X86State) {
        self.cpu.runner.set_state(start).expect("a possible state");
        let exit = self.cpu.runner.run();
        let x = self.cpu.runner.state().expect("a state");
        let end = match exit {
            VcpuExit::Halted => self.end(s, &x),
            VcpuExit::Stop(StopReason::TripleFault) => End::TripleFault,
            VcpuExit::Stop(why) => panic!("the processor stopped: {why:?}"),
            VcpuExit::Kicked | VcpuExit::TurnOver => panic!("nobody kicks"),
        };
        (end, x)
    }

    fn end(&self, s: Setting, x: &X86State) -> End {
        let at = x.seg[seg::CS].base + x.rip;
        let v = at.wrapping_sub(HANDLERS + 1);
        if v > 255 {
            return End::Halted(at.wrapping_sub(CODE));
        }
        let (v, word) = (v as u8, s.word());
        let sp = if s == Setting::Real { x.gpr[4] & 0xffff } else { x.gpr[4] };
        let has_error = s != Setting::Real && matches!(v, 8 | 10..=14 | 17);
        let ip = self.peek(sp + if has_error { word } else { 0 }, word);
        let base = if matches!(s, Setting::Real | Setting::V86) { 0 } else { CODE };
        let error = has_error.then(|| self.peek(sp, word));
        End::Vector(v, error, ip.wrapping_sub(base))
    }
}
