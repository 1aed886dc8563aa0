//! A machine for tests: RAM at 0, a device that records ports 0xe0–0xff, one that records MMIO at
//! 0xff00_0000, and an ear for stops.

use iced_x86::code_asm::CodeAssembler;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tandem_accel::AccelOps;
use tandem_accel::bus::{BusDevice, IoBus};
use tandem_accel::memory::{GuestMap, RegionKind};
use tandem_accel::vcpu::{StopReason, VcpuEvents, VcpuHandle, VcpuSpec};
use tandem_accel::x86::model::{KVM_SIGNATURE, ModelSpec, Platform, Topology, build};
use tandem_accel::x86::{ATTR_DB, ATTR_G, ATTR_L, ATTR_P, ATTR_S, Segment, X86State, seg};
use tandem_kvm::KvmAccel;
use vm_memory::{Bytes, GuestAddress};

/// First port of the recorder.
pub const PORT: u16 = 0xe0;
/// Writing here ends a test's wait.
pub const DONE: u16 = 0xf4;
/// Where the MMIO recorder is.
pub const MMIO: u64 = 0xff00_0000;
/// Where code goes.
pub const CODE: u64 = 0x8000;
/// How long a guest may take; KVM without hardware is slow.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// An access that the recorder saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    Write(u64, Vec<u8>),
    Read(u64, usize),
}

struct Recorder {
    base: u64,
    log: Arc<Mutex<Vec<Seen>>>,
    done: Mutex<Sender<u8>>,
}

impl BusDevice for Recorder {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.log.lock().unwrap().push(Seen::Read(self.base + offset, data.len()));
        for (i, b) in data.iter_mut().enumerate() {
            *b = 0x50 + i as u8;
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        let at = self.base + offset;
        if at == u64::from(DONE) {
            let _ = self.done.lock().unwrap().send(data[0]);
            return;
        }
        self.log.lock().unwrap().push(Seen::Write(at, data.to_vec()));
    }
}

struct Ear(Mutex<Sender<(u32, StopReason)>>);
impl VcpuEvents for Ear {
    fn stopped(&self, index: u32, reason: StopReason) {
        let _ = self.0.lock().unwrap().send((index, reason));
    }
}

pub struct Machine {
    pub vcpus: Vec<VcpuHandle>,
    pub accel: Arc<KvmAccel>,
    pub map: Arc<GuestMap>,
    pub log: Arc<Mutex<Vec<Seen>>>,
    pub done: Receiver<u8>,
    pub stops: Receiver<(u32, StopReason)>,
}

/// Whether KVM works; if not, says why.
pub fn kvm_works() -> bool {
    match tandem_kvm::probe() {
        Ok(_) => true,
        Err(d) => {
            println!("skipped: {d}");
            false
        }
    }
}

/// Ends a test with success where KVM does not work.
#[macro_export]
macro_rules! need_kvm {
    () => {
        if !$crate::machine::kvm_works() {
            return;
        }
    };
}

impl Machine {
    /// A machine with 4 MiB of RAM, ROM at 0xf_0000, recorders, and one vCPU per state.
    pub fn new(states: Vec<X86State>) -> Machine {
        let (tx, done) = channel();
        let log = Arc::new(Mutex::new(Vec::new()));
        let bus = IoBus::default();
        for (space, base, len) in [
            (&bus.pio, PORT.into(), 0x20),
            (&bus.mmio, MMIO, 0x1000),
            (&bus.mmio, 0xf_0000, 0x1_0000),
        ] {
            let dev = Recorder { base, log: log.clone(), done: Mutex::new(tx.clone()) };
            space.insert("recorder", base, len, Arc::new(dev)).unwrap();
        }
        Machine::with_bus(KvmAccel::new().unwrap(), Arc::new(bus), states, log, done)
    }

    /// The same with other devices.
    pub fn with_bus(
        accel: Arc<KvmAccel>,
        bus: Arc<IoBus>,
        states: Vec<X86State>,
        log: Arc<Mutex<Vec<Seen>>>,
        done: Receiver<u8>,
    ) -> Machine {
        let map = GuestMap::new();
        map.add("ram", RegionKind::Ram, 0, 0xf_0000).unwrap();
        map.add("rom", RegionKind::Rom, 0xf_0000, 0x1_0000).unwrap();
        map.add("high", RegionKind::Ram, 0x10_0000, 0x30_0000).unwrap();
        accel.attach_memory(&map).unwrap();
        let topology = Topology::cores(states.len() as u32).unwrap();
        let table = build(
            &ModelSpec::parse("max").unwrap(),
            &Platform {
                accel: "KVM",
                supported: &accel.supported_cpuid().unwrap(),
                topology,
                tsc_hz: accel.tsc_hz(),
                hypervisor: Some(KVM_SIGNATURE),
            },
        )
        .unwrap();
        let (tx, stops) = channel();
        let events = Arc::new(Ear(Mutex::new(tx)));
        let vcpus = states
            .into_iter()
            .enumerate()
            .map(|(i, state)| {
                let apic_id = topology.apic_id(i as u32);
                accel
                    .create_vcpu_thread(VcpuSpec {
                        index: i as u32,
                        apic_id,
                        cpuid: Arc::new(table.for_apic_id(apic_id)),
                        tsc_hz: accel.tsc_hz(),
                        bus: bus.clone(),
                        intc: None,
                        state: Box::new(state),
                        events: events.clone(),
                    })
                    .unwrap()
            })
            .collect();
        Machine { vcpus, accel, map, log, done, stops }
    }

    pub fn write(&self, gpa: u64, data: &[u8]) {
        self.map.ram().write_slice(data, GuestAddress(gpa)).unwrap();
    }

    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut v = vec![0; len];
        self.map.ram().read_slice(&mut v, GuestAddress(gpa)).unwrap();
        v
    }

    /// Starts clock and vCPUs.
    pub fn resume(&self) {
        self.accel.clock().resume();
        for v in &self.vcpus {
            v.resume();
        }
    }

    pub fn pause(&self) {
        for v in &self.vcpus {
            v.pause();
        }
        for v in &self.vcpus {
            v.wait_not_running();
        }
        self.accel.clock().pause();
    }

    /// Runs until the guest writes to [`DONE`], and returns the byte.
    pub fn finish(&self) -> u8 {
        self.resume();
        self.wait_done()
    }

    pub fn wait_done(&self) -> u8 {
        match self.done.recv_timeout(PATIENCE) {
            Ok(b) => b,
            Err(_) => match self.stops.try_recv() {
                Ok((i, reason)) => panic!("vCPU {i} stopped: {reason:?}"),
                Err(_) => {
                    panic!("the guest did not finish; it is at {:#x?}", self.vcpus[0].state())
                }
            },
        }
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.log.lock().unwrap().clone()
    }
}

/// Assembles 16-, 32- or 64-bit code for [`CODE`].
pub fn assemble(
    bits: u32,
    f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> Vec<u8> {
    assemble_at(CODE, bits, f)
}

/// Assembles code for another address.
pub fn assemble_at(
    at: u64,
    bits: u32,
    f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    f(&mut a).unwrap();
    a.assemble(at).unwrap()
}

/// Real mode at [`CODE`], all segments at 0.
pub fn real_mode() -> X86State {
    let mut s = X86State { rip: CODE, ..X86State::default() };
    s.gpr[4] = 0x7000;
    s.seg[seg::CS] = Segment { selector: 0, base: 0, ..s.seg[seg::CS] };
    s
}

/// Flat 32-bit protected mode at [`CODE`].
pub fn protected_mode() -> X86State {
    let mut s = real_mode();
    let data = Segment::flat(0x10, ATTR_P | ATTR_S | 3 | ATTR_DB | ATTR_G);
    for i in [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS] {
        s.seg[i] = data;
    }
    s.seg[seg::CS] = Segment::flat(8, ATTR_P | ATTR_S | 0xb | ATTR_DB | ATTR_G);
    s.cr0 = 0x11;
    s
}

/// 64-bit mode at [`CODE`]; [`long_mode_tables`] must be written.
pub fn long_mode() -> X86State {
    let mut s = protected_mode();
    s.seg[seg::CS] = Segment::flat(8, ATTR_P | ATTR_S | 0xb | ATTR_L | ATTR_G);
    s.cr0 = 0x8000_0011;
    s.cr3 = 0x1000;
    s.cr4 = 0x20;
    s.efer = 0x500;
    s
}

/// Page tables at 0x1000–0x5fff that map the first and the last GiB below 4 GiB one to one.
pub fn long_mode_tables(m: &Machine) {
    let flags = 7u64;
    m.write(0x1000, &(0x2000 | flags).to_le_bytes());
    m.write(0x2000, &(0x3000 | flags).to_le_bytes());
    m.write(0x2000 + 3 * 8, &(0x4000 | flags).to_le_bytes());
    for i in 0..512u64 {
        let large = 0x80 | flags;
        m.write(0x3000 + 8 * i, &((i << 21) | large).to_le_bytes());
        m.write(0x4000 + 8 * i, &((3 << 30 | i << 21) | large).to_le_bytes());
    }
}
