//! A bare processor with a little memory, for tests: state in, system code, state out.

use super::{Env, cpuid, state};
use crate::accel::MapFollower;
use crate::accel::host_target;
use crate::exec::{Doorbell, Shared, Vcpu, VcpuOptions};
use crate::tb::TbCache;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tandem_accel::bus::IoBus;
use tandem_accel::clock::Clock;
use tandem_accel::irq::{CpuEvent, CpuIntc, Kick};
use tandem_accel::memory::{GuestMap, Region, RegionKind};
use tandem_accel::vcpu::{StopReason, VcpuControl, VcpuEvents, VcpuSpec};
use tandem_accel::x86::cpuid::{CpuidTable, Regs};
use tandem_accel::x86::{
    ATTR_DB, ATTR_G, ATTR_L, ATTR_P, ATTR_S, Segment, TableReg, X86State, seg,
};
use tandem_jit::code::{Backend, EnvMem};
use tandem_jit::interp::InterpBackend;

/// Bytes of RAM at 0.
pub const RAM: u64 = 4 << 20;
pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x3000;
/// Page tables: PML4 or page directory, PDPT, page directory, one page table.
pub const PT: u64 = 0x2_0000;

/// Selectors of the GDT.
pub mod sel {
    pub const CODE0: u16 = 0x08;
    pub const DATA0: u16 = 0x10;
    pub const CODE3: u16 = 0x18 | 3;
    pub const DATA3: u16 = 0x20 | 3;
    pub const LONG0: u16 = 0x28;
    pub const LONG3: u16 = 0x30 | 3;
    pub const TSS: u16 = 0x38;
    /// Free for tests from here.
    pub const FREE: u16 = 0x48;
}

pub const CODE: u32 = ATTR_P | ATTR_S | 0xb;
pub const DATA: u32 = ATTR_P | ATTR_S | 0x3;
pub const BIG: u32 = ATTR_G | ATTR_DB;
pub const LONG: u32 = ATTR_G | ATTR_L;

/// Attribute bits of a privilege level.
pub fn dpl(n: u32) -> u32 {
    n << 5
}

/// Encodes a descriptor; `limit` is the 20-bit field.
pub fn descriptor(base: u64, limit: u32, attr: u32) -> u64 {
    u64::from(limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | u64::from(attr & 0xf0ff) << 40
        | u64::from(limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56
}

/// Encodes a gate of this type and DPL, present.
pub fn gate(selector: u16, offset: u32, ty: u32, dpl: u32, low: u32) -> u64 {
    u64::from(offset & 0xffff)
        | u64::from(selector) << 16
        | u64::from(low) << 32
        | u64::from(ty | dpl << 5 | 0x80) << 40
        | u64::from(offset >> 16) << 48
}

/// An interrupt controller made of what a test puts in.
#[derive(Default)]
pub struct FakeIntc {
    pub irq: Mutex<Option<u8>>,
    pub events: Mutex<Vec<CpuEvent>>,
    pub base: AtomicU64,
    pub tpr: AtomicU64,
}

impl CpuIntc for FakeIntc {
    fn attach(&self, _: Arc<dyn Kick>) {}
    fn pending(&self) -> bool {
        self.irq.lock().unwrap().is_some()
    }
    fn acknowledge(&self) -> Option<u8> {
        self.irq.lock().unwrap().take()
    }
    fn take_event(&self) -> Option<CpuEvent> {
        self.events.lock().unwrap().pop()
    }
    fn cr8(&self) -> u8 {
        self.tpr.load(Ordering::Relaxed) as u8
    }
    fn set_cr8(&self, v: u8) {
        self.tpr.store(v.into(), Ordering::Relaxed);
    }
    fn apic_base(&self) -> u64 {
        self.base.load(Ordering::Relaxed)
    }
    fn set_apic_base(&self, v: u64) -> bool {
        self.base.store(v, Ordering::Relaxed);
        true
    }
    fn read_msr(&self, msr: u32) -> Option<u64> {
        (msr == 0x802).then_some(7)
    }
    fn write_msr(&self, msr: u32, _: u64) -> bool {
        msr == 0x6e0
    }
    fn set_tsc_offset(&self, _: u64) {}
    fn read_mmio(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write_mmio(&self, _: u64, _: &[u8]) {}
    fn reset(&self) {}
}

struct NoEvents;
impl VcpuEvents for NoEvents {
    fn stopped(&self, _: u32, _: StopReason) {}
}

/// The processor and its surroundings.
pub struct Bench {
    mem: EnvMem,
    _vcpu: Box<Vcpu>,
    ram: Region,
    pub map: Arc<GuestMap>,
    pub intc: Arc<FakeIntc>,
    pub bus: Arc<IoBus>,
    pub clock: Arc<Clock>,
}

/// All that translation gives, with KVM's leaves.
fn cpuid_table() -> CpuidTable {
    let mut t = cpuid::supported();
    t.set(0x4000_0000, Regs { eax: 0x4000_0010, ebx: 0x4b4d_564b, ecx: 0x564b_4d56, edx: 0x4d });
    t
}

impl Bench {
    /// After RESET, with tables in memory that nothing uses yet.
    pub fn new() -> Bench {
        let map = GuestMap::new();
        let ram = map.add("ram", RegionKind::Ram, 0, RAM).unwrap();
        let shared = Arc::new(Shared::default());
        let target = Arc::new(host_target());
        let backend: Arc<dyn Backend> = InterpBackend::new(target.clone());
        let tbs = TbCache::new(backend.clone(), None, shared.clone());
        map.subscribe(Arc::new(MapFollower { shared: shared.clone(), tbs: tbs.clone() }));
        let intc = Arc::new(FakeIntc::default());
        intc.base.store(0xfee0_0900, Ordering::Relaxed);
        let (bus, clock) = (Arc::new(IoBus::default()), Clock::new());
        let spec = VcpuSpec {
            index: 0,
            apic_id: 0,
            cpuid: Arc::new(cpuid_table()),
            tsc_hz: 1_000_000_000,
            bus: bus.clone(),
            intc: Some(intc.clone()),
            state: Box::default(),
            events: Arc::new(NoEvents),
        };
        let bell = Doorbell::new(spec.apic_id, VcpuControl::new(), &clock);
        shared.add(bell.clone());
        let mut vcpu = Box::new(Vcpu::new(
            &spec,
            clock.clone(),
            shared,
            tbs,
            target,
            bell,
            Arc::default(),
            VcpuOptions::default(),
        ));
        let mem = backend.alloc_env().unwrap();
        let p: *mut Vcpu = &mut *vcpu;
        let mut b = Bench { mem, _vcpu: vcpu, ram, map, intc, bus, clock };
        let env = b.env();
        env.core.vcpu = p.cast();
        env.tlb_init();
        state::load(env, &X86State::default()).unwrap();
        b.tables();
        b
    }

    pub fn env(&mut self) -> &mut Env {
        // SAFETY: zeroed memory is a valid Env; `self` owns it and is borrowed for as long.
        unsafe { &mut *self.mem.as_ptr().cast::<Env>() }
    }

    pub fn poke(&self, gpa: u64, data: &[u8]) {
        assert!(self.ram.load(gpa, data));
    }
    pub fn poke64(&self, gpa: u64, v: u64) {
        self.poke(gpa, &v.to_le_bytes());
    }
    pub fn poke32(&self, gpa: u64, v: u32) {
        self.poke(gpa, &v.to_le_bytes());
    }
    pub fn poke16(&self, gpa: u64, v: u16) {
        self.poke(gpa, &v.to_le_bytes());
    }
    pub fn peek64(&mut self, gpa: u64) -> u64 {
        u64::from(self.peek32(gpa)) | u64::from(self.peek32(gpa + 4)) << 32
    }
    pub fn peek32(&mut self, gpa: u64) -> u32 {
        let word = self.env().phys_read_u32(gpa);
        if gpa & 3 == 0 {
            return word;
        }
        let next = self.env().phys_read_u32((gpa & !3) + 4);
        ((u64::from(next) << 32 | u64::from(word)) >> (8 * (gpa & 3))) as u32
    }
    pub fn peek16(&mut self, gpa: u64) -> u16 {
        self.peek32(gpa) as u16
    }

    /// Writes the GDT entry of `selector`.
    pub fn gdt(&self, selector: u16, raw: u64) {
        self.poke64(GDT + u64::from(selector & !7), raw);
    }

    /// Writes an 8-byte gate of the IDT.
    pub fn idt(&self, vector: u8, raw: u64) {
        self.poke64(IDT + 8 * u64::from(vector), raw);
    }

    /// Writes a 16-byte gate of the IDT.
    pub fn idt64(&self, vector: u8, raw: u64, high: u64) {
        self.poke64(IDT + 16 * u64::from(vector), raw);
        self.poke64(IDT + 16 * u64::from(vector) + 8, high);
    }

    fn tables(&self) {
        for (s, attr) in [
            (sel::CODE0, CODE | BIG),
            (sel::DATA0, DATA | BIG),
            (sel::CODE3, CODE | BIG | dpl(3)),
            (sel::DATA3, DATA | BIG | dpl(3)),
            (sel::LONG0, CODE | LONG),
            (sel::LONG3, CODE | LONG | dpl(3)),
        ] {
            self.gdt(s, descriptor(0, 0xf_ffff, attr));
        }
        self.gdt(sel::TSS, descriptor(TSS, 0x2fff, ATTR_P | 0xb));
        // Identity map of 4 MiB by 2 MiB pages: present, writable, user.
        self.poke64(PT, (PT + 0x1000) | 7);
        self.poke64(PT + 0x1000, (PT + 0x2000) | 7);
        self.poke64(PT + 0x2000, 0x87);
        self.poke64(PT + 0x2008, 0x20_0087);
    }

    /// Loads a state made from the one after RESET.
    pub fn load(&mut self, f: impl FnOnce(&mut X86State)) {
        let mut s = X86State {
            gdtr: TableReg { base: GDT, limit: 0xfff },
            idtr: TableReg { base: IDT, limit: 0xfff },
            rip: 0x7000,
            ..X86State::default()
        };
        s.gpr[4] = 0x8000;
        f(&mut s);
        state::load(self.env(), &s).unwrap();
    }

    /// Protected mode, 32-bit flat, at this privilege level, no paging.
    pub fn protected(&mut self, cpl: u8) {
        self.load(|s| protected_state(s, cpl));
    }

    /// 64-bit mode at this privilege level.
    pub fn long(&mut self, cpl: u8) {
        self.load(|s| {
            protected_state(s, cpl);
            s.cr0 |= 1 << 31;
            s.cr4 |= 1 << 5;
            s.cr3 = PT;
            s.efer = 0xd01;
            let code = if cpl == 0 { sel::LONG0 } else { sel::LONG3 };
            s.seg[seg::CS] = Segment::flat(code, CODE | LONG | dpl(cpl.into()));
        });
    }

    /// Virtual-8086 mode with this IOPL.
    pub fn vm86(&mut self, iopl: u64) {
        self.load(|s| {
            protected_state(s, 3);
            s.rflags |= 1 << 17 | iopl << 12;
            for i in 0..6 {
                s.seg[i] = Segment { selector: 0, base: 0, limit: 0xffff, attr: 0xf3 };
            }
        });
    }
}

fn protected_state(s: &mut X86State, cpl: u8) {
    s.cr0 = 0x11;
    let (code, data) = if cpl == 0 { (sel::CODE0, sel::DATA0) } else { (sel::CODE3, sel::DATA3) };
    let d = dpl(cpl.into());
    for i in 0..6 {
        s.seg[i] = Segment::flat(data, DATA | BIG | d);
    }
    s.seg[seg::CS] = Segment::flat(code, CODE | BIG | d);
    s.seg[seg::TR] = Segment { selector: sel::TSS, base: TSS, limit: 0x2fff, attr: ATTR_P | 0xb };
}
