//! A machine for tests: RAM at 0, mapped one to one in 64-bit mode, and vCPUs that each run a
//! program and say when they are done.

use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, al, dword_ptr, dx, eax, r15};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tandem_accel::AccelOps;
use tandem_accel::bus::{BusDevice, IoBus};
use tandem_accel::clock::Clock;
use tandem_accel::memory::{GuestMap, RegionKind};
use tandem_accel::vcpu::{StopReason, VcpuEvents, VcpuHandle, VcpuSpec};
use tandem_accel::x86::model::{ModelSpec, Platform, Topology, build};
use tandem_accel::x86::{ATTR_DB, ATTR_G, ATTR_L, ATTR_P, ATTR_S, Segment, X86State, gpr, seg};
use tandem_tcg::{TcgAccel, TcgOptions};
use vm_memory::{Bytes, GuestAddress};

/// Port at which a vCPU says that it is done.
const DONE: u16 = 0xf4;
/// RAM in bytes.
pub const RAM: u64 = 64 << 20;
/// Where the program of vCPU n is: 64 KiB each.
const PROGRAMS: u64 = 0x10_0000;
/// Words for the programs' use.
pub const SHARED: u64 = 0x8_0000;
/// Where tests may put data and code.
pub const SPACE: u64 = 0x40_0000;
/// How long a guest may take. Two vCPUs that wait for each other thousands of times need as many turns
/// of a host core that they share with others.
const PATIENCE: Duration = Duration::from_secs(900);

struct Done(Mutex<Sender<u8>>);
impl BusDevice for Done {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, _: u64, data: &[u8]) {
        let _ = self.0.lock().unwrap().send(data[0]);
    }
}

struct Ear(Mutex<Sender<u8>>);
impl VcpuEvents for Ear {
    fn stopped(&self, index: u32, reason: StopReason) {
        println!("vCPU {index} stopped: {reason:?}");
        let _ = self.0.lock().unwrap().send(u8::MAX);
    }
}

/// A machine.
pub struct Machine {
    pub vcpus: Vec<VcpuHandle>,
    pub clock: Arc<Clock>,
    map: Arc<GuestMap>,
    done: Receiver<u8>,
}

/// The state in which a program starts.
fn start(at: u64, index: u64) -> X86State {
    let data = Segment::flat(0x10, ATTR_P | ATTR_S | 3 | ATTR_DB | ATTR_G);
    let mut s = X86State { rip: at, ..X86State::default() };
    for i in [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS] {
        s.seg[i] = data;
    }
    s.seg[seg::CS] = Segment::flat(8, ATTR_P | ATTR_S | 0xb | ATTR_L | ATTR_G);
    (s.cr0, s.cr3, s.cr4, s.efer) = (0x8000_0013, 0x1000, 0x620, 0x500);
    s.gpr[gpr::RSP] = 0x2_0000 + index * 0x1000;
    s
}

impl Machine {
    /// A paused machine with a vCPU for each program.
    pub fn new(programs: &[Vec<u8>], options: TcgOptions) -> Machine {
        let map = GuestMap::new();
        map.add("ram", RegionKind::Ram, 0, RAM).unwrap();
        let clock = Clock::new();
        let accel = TcgAccel::new(options, clock.clone()).unwrap();
        accel.attach_memory(&map).unwrap();
        let topology = Topology::cores(programs.len() as u32).unwrap();
        let platform = Platform {
            accel: "TCG",
            supported: &accel.supported_cpuid().unwrap(),
            topology,
            tsc_hz: accel.tsc_hz(),
            hypervisor: None,
        };
        let table = build(&ModelSpec::parse("max").unwrap(), &platform).unwrap();
        let (tx, done) = channel();
        let bus = IoBus::default();
        bus.pio.insert("done", DONE.into(), 1, Arc::new(Done(Mutex::new(tx.clone())))).unwrap();
        let bus = Arc::new(bus);
        let events = Arc::new(Ear(Mutex::new(tx)));
        let ram = map.ram();
        for i in 0..programs.len() as u64 {
            let at = PROGRAMS + (i << 16);
            ram.write_slice(&programs[i as usize], GuestAddress(at)).unwrap();
        }
        let vcpus = (0..programs.len() as u32)
            .map(|index| {
                let apic_id = topology.apic_id(index);
                let spec = VcpuSpec {
                    index,
                    apic_id,
                    cpuid: Arc::new(table.for_apic_id(apic_id)),
                    tsc_hz: accel.tsc_hz(),
                    bus: bus.clone(),
                    intc: None,
                    state: Box::new(start(PROGRAMS + (u64::from(index) << 16), index.into())),
                    events: events.clone(),
                };
                accel.create_vcpu_thread(spec).unwrap()
            })
            .collect();
        let m = Machine { vcpus, clock, map, done };
        m.write(0x1000, &0x2007u64.to_le_bytes());
        m.write(0x2000, &0x3007u64.to_le_bytes());
        for i in 0..RAM >> 21 {
            m.write(0x3000 + 8 * i, &(i << 21 | 0x87).to_le_bytes());
        }
        m
    }

    pub fn write(&self, gpa: u64, data: &[u8]) {
        self.map.ram().write_slice(data, GuestAddress(gpa)).unwrap();
    }
    pub fn u64(&self, gpa: u64) -> u64 {
        self.map.ram().read_obj(GuestAddress(gpa)).unwrap()
    }
    pub fn u32(&self, gpa: u64) -> u32 {
        self.map.ram().read_obj(GuestAddress(gpa)).unwrap()
    }

    /// Lets all vCPUs run.
    pub fn resume(&self) {
        self.clock.resume();
        self.vcpus.iter().for_each(VcpuHandle::resume);
    }

    /// Waits until all vCPUs are done.
    pub fn wait(&self) {
        for _ in &self.vcpus {
            match self.done.recv_timeout(PATIENCE) {
                Ok(0) => {}
                Ok(code) => panic!("a vCPU says {code}"),
                Err(_) => {
                    let at: Vec<_> = self.vcpus.iter().map(|v| v.state().unwrap().rip).collect();
                    panic!("no end; the vCPUs are at {at:#x?}");
                }
            }
        }
    }

    /// Runs to the end.
    pub fn run(&self) {
        self.resume();
        self.wait();
    }
}

/// Assembles the program of vCPU `index`; it starts when all `of` vCPUs run, and says that it is
/// done at the end.
pub fn program(
    index: u64,
    of: u32,
    f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    fn build(
        a: &mut CodeAssembler,
        of: u32,
        f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Result<(), IcedError> {
        // Meet: the first word of the shared page counts.
        a.mov(r15, SHARED)?;
        a.lock().inc(dword_ptr(r15))?;
        let mut meet = a.create_label();
        a.set_label(&mut meet)?;
        a.pause()?;
        a.cmp(dword_ptr(r15), of as i32)?;
        a.jb(meet)?;
        f(a)?;
        done(a, 0)
    }
    let mut a = CodeAssembler::new(64).unwrap();
    build(&mut a, of, f).unwrap();
    let code = a.assemble(PROGRAMS + (index << 16)).unwrap();
    assert!(code.len() < 1 << 16);
    code
}

/// Says `code` (0: done, else something is wrong) and stops.
pub fn done(a: &mut CodeAssembler, code: u32) -> Result<(), IcedError> {
    a.mov(eax, code)?;
    a.mov(dx, u32::from(DONE))?;
    a.out(dx, al)?;
    let mut stop = a.create_label();
    a.set_label(&mut stop)?;
    a.hlt()?;
    a.jmp(stop)
}

/// Runs programs, one per vCPU, on each back end.
pub fn on_each(programs: &[Vec<u8>], prepare: impl Fn(&Machine), check: impl Fn(&Machine)) {
    use tandem_tcg::BackendKind;
    for backend in [BackendKind::Jit, BackendKind::Interp] {
        let m = Machine::new(programs, TcgOptions { backend, ..TcgOptions::default() });
        prepare(&m);
        m.run();
        check(&m);
    }
}
