//! A whole translated processor, engine and all, on 1 MiB of RAM with nothing else around it.

use std::sync::Arc;
use tandem_accel::AccelOps;
use tandem_accel::bus::IoBus;
use tandem_accel::clock::Clock;
use tandem_accel::memory::{GuestMap, Region, RegionKind, WriteWatch};
use tandem_accel::vcpu::{StopReason, VcpuEvents, VcpuSpec};
use tandem_accel::x86::{ATTR_P, ATTR_S};
use tandem_tcg::exec::{Doorbell, Runner};
use tandem_tcg::x86::features::Features;
use tandem_tcg::{BackendKind, TcgAccel, TcgOptions};

/// Bytes of RAM, from address 0.
pub const RAM: u64 = 0x10_0000;
pub const PAGE: u64 = 0x1000;

/// Attributes of code that can be read, accessed.
pub const CODE_TYPE: u32 = ATTR_P | ATTR_S | 0xb;
/// Of data that can be written, accessed.
pub const DATA_TYPE: u32 = ATTR_P | ATTR_S | 0x3;

/// Encodes a descriptor; `limit` is the 20-bit field.
pub fn descriptor(base: u64, limit: u32, attr: u32) -> u64 {
    u64::from(limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | u64::from(attr & 0xf0ff) << 40
        | u64::from(limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56
}

struct Silent;
impl VcpuEvents for Silent {
    fn stopped(&self, _: u32, _: StopReason) {}
}

pub struct Processor {
    pub runner: Runner,
    pub accel: Arc<TcgAccel>,
    pub bell: Arc<Doorbell>,
    pub features: Features,
    ram: Region,
    _map: Arc<GuestMap>,
}

impl Processor {
    /// A processor on this back end, with as many MiB for its code.
    pub fn new(backend: BackendKind, code_mib: usize) -> Processor {
        let map = GuestMap::new();
        let ram = map.add("ram", RegionKind::Ram, 0, RAM).expect("memory");
        let options = TcgOptions { backend, code_bytes: code_mib << 20, ..TcgOptions::default() };
        let accel = TcgAccel::new(options, Clock::new()).expect("an accelerator");
        accel.attach_memory(&map).expect("attaches");
        let cpuid = accel.supported_cpuid().expect("CPUID");
        let features = Features::of(&cpuid);
        let spec = VcpuSpec {
            index: 0,
            apic_id: 0,
            cpuid: Arc::new(cpuid),
            tsc_hz: 1_000_000_000,
            bus: Arc::new(IoBus::default()),
            intc: None,
            state: Box::default(),
            events: Arc::new(Silent),
        };
        let (runner, bell) = accel.runner(&spec).expect("a vCPU");
        Processor { runner, accel, bell, features, ram, _map: map }
    }

    /// Writes memory behind the processor's back; of code, [`Processor::written`] must tell.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        assert!(self.ram.load(at, bytes), "no memory at {at:#x}");
    }

    pub fn write64(&self, at: u64, v: u64) {
        self.write(at, &v.to_le_bytes());
    }

    /// Reads memory.
    pub fn read(&self, at: u64, bytes: &mut [u8]) {
        assert!(self.ram.read(at, bytes), "no memory at {at:#x}");
    }

    pub fn read64(&self, at: u64) -> u64 {
        let mut b = [0; 8];
        self.read(at, &mut b);
        u64::from_le_bytes(b)
    }

    /// Tells the processor that the pages of these `len` bytes have been written.
    pub fn written(&self, at: u64, len: u64) {
        for page in (at..at + len).step_by(PAGE as usize) {
            self.accel.tbs().written(page, PAGE as usize);
        }
    }
}
