//! What a vCPU owns besides its `Env`: the outside world as helpers reach it.

use crate::softmmu::PAGE_MASK;
use crate::softmmu::phys::{self, PhysMap, Ram};
use crate::tb::TbCache;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tandem_accel::bus::IoBus;
use tandem_accel::clock::Clock;
use tandem_accel::irq::CpuIntc;
use tandem_accel::x86::cpuid::CpuidTable;

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
    /// Where `ram` came from.
    pub phys: Arc<PhysMap>,
    /// The machine's translation blocks.
    pub tbs: Arc<TbCache>,
    /// Set by a kick; taken by the execution loop.
    pub kicked: Arc<AtomicBool>,
}

impl Vcpu {
    /// Whether `gpa` is in this vCPU's local APIC page (and the page is in xAPIC mode).
    pub fn is_apic_page(&self, gpa: u64) -> bool {
        self.intc.as_ref().is_some_and(|i| {
            let base = i.apic_base();
            // Bit 11 enables the APIC, bit 10 selects x2APIC (no MMIO).
            base & 0xc00 == 0x800 && (base ^ gpa) & 0x000f_ffff_ffff_f000 == 0
        })
    }
    /// Marks written guest physical bytes in the dirty log, without telling the code watch.
    pub fn mark_dirty(&self, gpa: u64, len: usize) {
        if let Some(r) = phys::find(&self.ram, gpa) {
            r.bits.mark_quiet((gpa - r.gpa) as usize, len);
        }
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
}
