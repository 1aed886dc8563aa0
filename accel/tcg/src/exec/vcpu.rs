//! What a vCPU owns besides its `Env`: the outside world as helpers reach it.

use super::find::Engine;
use super::pace::Pace;
use super::shared::{Doorbell, Shared};
use crate::counters::Counters;
use crate::softmmu::PAGE_MASK;
use crate::softmmu::phys::{self, Ram};
use crate::tb::TbCache;
use crate::user::{Space, UserEvent};
use crate::x86::Env;
use std::cell::{Cell, Ref, RefCell};
use std::sync::Arc;
use tandem_accel::bus::IoBus;
use tandem_accel::clock::Clock;
use tandem_accel::irq::CpuIntc;
use tandem_accel::vcpu::VcpuSpec;
use tandem_accel::x86::cpuid::CpuidTable;
use tandem_jit::target::Target;

/// No page has this address.
const NO_PAGE: u64 = u64::MAX;

/// How a vCPU is to be run.
#[derive(Clone, Default)]
pub struct VcpuOptions {
    /// What counts its instructions, if something does.
    pub pace: Option<Arc<Pace>>,
    /// Random numbers come from this seed instead of the host.
    pub seed: Option<u64>,
    /// One guest instruction per block.
    pub one_insn: bool,
    /// Come back to the loop after every block.
    pub nochain: bool,
    /// The memory of the program that it runs instead of a machine.
    pub space: Option<Arc<Space>>,
}

/// Reached from helpers through [`crate::x86::Env::vcpu`].
pub struct Vcpu {
    /// Index.
    pub index: u32,
    /// Local APIC ID.
    pub apic_id: u32,
    /// What CPUID answers.
    pub cpuid: Arc<CpuidTable>,
    /// TSC frequency in Hz.
    pub tsc_hz: u64,
    /// Port and memory-mapped I/O.
    pub bus: Arc<IoBus>,
    /// The local APIC.
    pub intc: Option<Arc<dyn CpuIntc>>,
    /// Virtual clock.
    pub clock: Arc<Clock>,
    /// RAM and ROM, sorted by address, and the generation of the map that they are.
    ram: RefCell<(Arc<[Ram]>, u64)>,
    /// What all vCPUs share.
    pub shared: Arc<Shared>,
    /// The machine's translation blocks.
    pub tbs: Arc<TbCache>,
    /// What code is compiled for.
    pub target: Arc<Target>,
    /// How other threads get this vCPU's attention.
    pub bell: Arc<Doorbell>,
    /// What it counts.
    pub counters: Arc<Counters>,
    /// What counts its instructions, if something does.
    pub pace: Option<Arc<Pace>>,
    /// State of the generator that stands in for the host's random numbers.
    random: Option<Cell<u64>>,
    /// One guest instruction per block.
    pub one_insn: bool,
    /// Come back to the loop after every block.
    pub nochain: bool,
    /// The block that runs is for one instruction: code must not go on with others.
    pub(super) single: Cell<bool>,
    /// Guest physical page of the local APIC's registers, or [`NO_PAGE`].
    apic_page: Cell<u64>,
    /// Translation state.
    pub(super) engine: RefCell<Engine>,
    /// The memory of the program that it runs instead of a machine.
    pub space: Option<Arc<Space>>,
    /// What the program's process has to look at.
    pub(crate) event: Cell<Option<UserEvent>>,
}

impl Vcpu {
    /// The outside world of the vCPU that `spec` describes.
    pub fn new(
        spec: &VcpuSpec,
        clock: Arc<Clock>,
        shared: Arc<Shared>,
        tbs: Arc<TbCache>,
        target: Arc<Target>,
        bell: Arc<Doorbell>,
        counters: Arc<Counters>,
        options: VcpuOptions,
    ) -> Vcpu {
        Vcpu {
            index: spec.index,
            apic_id: spec.apic_id,
            cpuid: spec.cpuid.clone(),
            tsc_hz: spec.tsc_hz,
            bus: spec.bus.clone(),
            intc: spec.intc.clone(),
            clock,
            ram: RefCell::new(shared.phys.snapshot()),
            shared,
            single: Cell::new(false),
            apic_page: Cell::new(NO_PAGE),
            engine: Engine::new(tbs.backend.compiler(), &spec.cpuid),
            tbs,
            target,
            bell,
            counters,
            pace: options.pace,
            random: options.seed.map(|s| Cell::new(s ^ u64::from(spec.index) << 32)),
            one_insn: options.one_insn,
            nochain: options.nochain || options.one_insn,
            space: options.space,
            event: Cell::new(None),
        }
    }
    /// A random number: the host's, or the next of a fixed sequence in a machine whose runs are to
    /// be alike.
    pub fn random(&self) -> u64 {
        let Some(state) = &self.random else {
            let mut v = 0u64;
            // SAFETY: the buffer is `v`, 8 bytes. Requests this small are not cut short.
            unsafe { libc::getrandom((&raw mut v).cast(), size_of::<u64>(), 0) };
            return v;
        };
        // SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
        let s = state.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        state.set(s);
        let z = (s ^ s >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    /// Whether the program's process has something to look at.
    pub(super) fn has_event(&self) -> bool {
        let event = self.event.take();
        self.event.set(event);
        event.is_some()
    }
    /// Whether every block must come back to the loop.
    pub fn leaves_always(&self) -> bool {
        self.nochain
    }
    /// Whether `gpa` is in this vCPU's local APIC page (and the page is in xAPIC mode).
    pub fn is_apic_page(&self, gpa: u64) -> bool {
        gpa & !PAGE_MASK == self.apic_page.get()
    }
    /// Learns where the local APIC's page is; to be called whenever IA32_APIC_BASE may have changed.
    pub fn locate_apic(&self) {
        let base = self.intc.as_ref().map_or(0, |i| i.apic_base());
        // Bit 11 enables the APIC, bit 10 selects x2APIC (no MMIO).
        let mapped = base & 0xc00 == 0x800;
        self.apic_page.set(if mapped { base & 0x000f_ffff_ffff_f000 } else { NO_PAGE });
    }
    /// RAM and ROM, sorted by address.
    pub fn ram(&self) -> Ref<'_, [Ram]> {
        Ref::map(self.ram.borrow(), |r| &*r.0)
    }
    /// A load from guest physical memory that is not RAM.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        match &self.intc {
            Some(i) if self.is_apic_page(gpa) => i.read_mmio(gpa & PAGE_MASK, data),
            _ => self.bus.mmio_read(gpa, data),
        }
    }
    /// A store to guest physical memory that is not RAM.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) {
        match &self.intc {
            Some(i) if self.is_apic_page(gpa) => i.write_mmio(gpa & PAGE_MASK, data),
            _ => self.bus.mmio_write(gpa, data),
        }
    }
    /// A read of a port.
    pub fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.bus.pio_read(port, data);
    }
    /// A write of a port.
    pub fn pio_write(&self, port: u16, data: &[u8]) {
        self.bus.pio_write(port, data);
    }
    /// Marks written guest physical bytes in the dirty log, without telling the code watch.
    pub fn mark_dirty(&self, gpa: u64, len: usize) {
        if let Some(r) = phys::find(&self.ram(), gpa) {
            r.bits.mark_quiet((gpa - r.gpa) as usize, len);
        }
    }
}

impl Env {
    /// Follows the memory map if it has changed. Called after each write of a device, which may
    /// change it (shadowing, flash, a BAR), so that the writer's next access sees it.
    pub(crate) fn follow_memory_map(&mut self) {
        let vcpu = self.vcpu();
        if vcpu.shared.phys.generation() == vcpu.ram.borrow().1 {
            return;
        }
        vcpu.ram.replace(vcpu.shared.phys.snapshot());
        self.tlb_flush_all();
    }

    /// Follows the notes that other threads (or this one) have left for this vCPU.
    pub(crate) fn process_mail(&mut self) {
        let bell = self.vcpu().bell.clone();
        bell.read_mail(|mail| {
            if mail.overflow {
                return self.tlb_flush_all();
            }
            for note in &mail.notes {
                // A page that holds no code any more may be in the dirty log.
                let logging = |r: &Ram| r.bits.logging();
                let on = note.on || phys::find(&self.vcpu().ram(), note.ppage).is_some_and(logging);
                for t in &mut self.tlb {
                    t.watch_phys(note.ppage, on);
                }
            }
        });
    }
}
