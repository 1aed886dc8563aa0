//! What a vCPU owns besides its `Env`: the outside world as helpers reach it.

use super::find::Engine;
use super::shared::{Doorbell, Shared};
use crate::softmmu::PAGE_MASK;
use crate::softmmu::phys::{self, Ram};
use crate::tb::TbCache;
use crate::x86::Env;
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use tandem_accel::bus::IoBus;
use tandem_accel::clock::Clock;
use tandem_accel::irq::CpuIntc;
use tandem_accel::vcpu::VcpuSpec;
use tandem_accel::x86::cpuid::CpuidTable;
use tandem_jit::target::Target;

/// No page has this address.
const NO_PAGE: u64 = u64::MAX;

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
    /// RAM and ROM, sorted by address.
    pub ram: Arc<[Ram]>,
    /// What all vCPUs share.
    pub shared: Arc<Shared>,
    /// The machine's translation blocks.
    pub tbs: Arc<TbCache>,
    /// What code is compiled for.
    pub target: Arc<Target>,
    /// How other threads get this vCPU's attention.
    pub bell: Arc<Doorbell>,
    /// One guest instruction per block.
    pub one_insn: bool,
    /// Come back to the loop after every block.
    pub nochain: bool,
    /// Guest physical page of the local APIC's registers, or [`NO_PAGE`].
    apic_page: Cell<u64>,
    /// Translation state.
    pub(super) engine: RefCell<Engine>,
}

impl Vcpu {
    /// The outside world of the vCPU that `spec` describes.
    pub fn new(
        spec: &VcpuSpec,
        clock: Arc<Clock>,
        ram: Arc<[Ram]>,
        shared: Arc<Shared>,
        tbs: Arc<TbCache>,
        target: Arc<Target>,
        bell: Arc<Doorbell>,
        one_insn: bool,
        nochain: bool,
    ) -> Vcpu {
        Vcpu {
            index: spec.index,
            apic_id: spec.apic_id,
            cpuid: spec.cpuid.clone(),
            tsc_hz: spec.tsc_hz,
            bus: spec.bus.clone(),
            intc: spec.intc.clone(),
            clock,
            ram,
            shared,
            apic_page: Cell::new(NO_PAGE),
            engine: Engine::new(tbs.backend.compiler()),
            tbs,
            target,
            bell,
            one_insn,
            nochain: nochain || one_insn,
        }
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
    /// Marks written guest physical bytes in the dirty log, without telling the code watch.
    pub fn mark_dirty(&self, gpa: u64, len: usize) {
        if let Some(r) = phys::find(&self.ram, gpa) {
            r.bits.mark_quiet((gpa - r.gpa) as usize, len);
        }
    }
}

impl Env {
    /// Handles the notes other threads (or this one) have left for this vCPU.
    pub(crate) fn process_mail(&mut self) {
        for note in self.vcpu().bell.take_mail() {
            for t in &mut self.tlb {
                t.watch_phys(note.ppage, note.on);
            }
        }
    }
}
