//! One machine, assembled and governed.
//!
//! Build order, each step needing only what stands before it:
//!
//! ```text
//!   memory ─► accelerator ─► interrupt chips ─► devices ─► ACPI ─► boot ─► vCPUs ─► main loop
//! ```
//!
//! Run state, changed by the main loop's thread alone (a guest or a user only asks, through the
//! [`inbox::Inbox`]):
//!
//! ```text
//!   built ── run ──► running ── guest's reset ──► vCPUs paused, chips reset, boot loaded anew ─┐
//!                     ▲  │                                                                     │
//!                     └──┼─────────────────────────────────────────────────────────────────────┘
//!                        └─ power-off, reset under no_reboot, debug exit, triple fault,
//!                           accelerator error, quit, signal ──► vCPUs stopped, output drained: end
//! ```

mod cpu;
pub mod drives;
mod inbox;
mod main_loop;
pub mod memmap;
mod ports;
mod q35;

use crate::boot;
use crate::cli::exit::Exit;
use crate::config::{Fault, Serial, VmConfig};
use crate::terminal::{self, RawMode};
use crate::{log, signals};
use cpu::Processors;
use inbox::{Event, Inbox};
use main_loop::MainLoop;
use memmap::MemoryMap;
use q35::Q35;
use std::sync::Arc;
use std::time::Duration;
use tandem_accel::memory::{GuestMap, RegionKind};
use tandem_accel::vcpu::{StopReason, VcpuHandle, VcpuSpec};
use tandem_accel::{AccelOps, Error};
use tandem_backends::chardev::Chardev;
use tandem_devices::power::PowerRequest;
use vmm_sys_util::eventfd::EventFd;

/// How long the way out waits for whoever reads a serial port's output.
const DRAIN: Duration = Duration::from_secs(1);

/// Why a machine could not be built or run.
#[derive(Debug)]
pub enum Failure {
    /// The configuration asks for what cannot be had.
    Usage(Vec<Fault>),
    /// The accelerator failed.
    Accelerator(Error),
    /// The host refused something else.
    Host(Error),
}

impl Failure {
    /// Tells the user; returns the exit status to end with.
    pub fn report(&self) -> Exit {
        match self {
            Failure::Usage(faults) => {
                faults.iter().for_each(|f| log::error(f));
                Exit::Usage
            }
            Failure::Accelerator(e) => {
                log::error(e);
                Exit::Accelerator
            }
            Failure::Host(e) => {
                log::error(e);
                Exit::Host
            }
        }
    }
}

/// How a machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// With this status.
    Exit(Exit),
    /// By this signal.
    Signal(libc::c_int),
}

/// A machine, ready to run.
pub struct Machine {
    accel: Arc<dyn AccelOps>,
    memory: Arc<GuestMap>,
    board: Q35,
    plan: boot::Plan,
    boot_board: boot::Board,
    processors: Processors,
    vcpus: Vec<VcpuHandle>,
    chardevs: Vec<Arc<Chardev>>,
    inbox: Arc<Inbox>,
    main_loop: MainLoop,
    no_reboot: bool,
    wants_terminal: bool,
}

impl Machine {
    /// Builds the machine that a validated configuration describes.
    pub fn build(config: &VmConfig, accel: Arc<dyn AccelOps>) -> Result<Machine, Failure> {
        let map = MemoryMap::new(config.memory);
        let plan = boot::Plan::new(&config.boot, &map).map_err(Failure::Usage)?;
        let processors = Processors::new(config, &*accel)?;
        let memory = GuestMap::new();
        for (name, at, len) in map.ram() {
            memory.add(name, RegionKind::Ram, at, len).map_err(Failure::Host)?;
        }
        accel.attach_memory(&memory).map_err(Failure::Accelerator)?;

        let inbox = Inbox::new()
            .map_err(|e| Failure::Host(Error::new("cannot make an event queue").caused_by(e)))?;
        let chardevs = config
            .serials
            .iter()
            .map(ports::open)
            .collect::<Result<Vec<_>, _>>()
            .map_err(Failure::Host)?;
        let board = Q35::build(config, &memory, &*accel, &processors, &chardevs, &inbox)?;
        let mut serial_ports = Vec::new();
        let mut wants_terminal = false;
        for (i, (chardev, serial)) in chardevs.iter().zip(board.serials()).enumerate() {
            let keys = config.serials[i] == Serial::Stdio && terminal::is_terminal();
            wants_terminal |= keys;
            if let Some(name) = chardev.pty_name() {
                log::note(&format!("COM{} is at {}", i + 1, name.display()));
            }
            let port = ports::SerialPort::new(chardev.clone(), serial.clone(), keys, inbox.clone())
                .map_err(Failure::Host)?;
            serial_ports.push(port);
        }
        let main_loop = MainLoop::new(&accel.clock(), &inbox, serial_ports, signal_bell()?)
            .map_err(Failure::Host)?;

        let boot_board = boot::Board { e820: map.e820(), rsdp: board.rsdp() };
        let mut machine = Machine {
            accel,
            memory,
            board,
            plan,
            boot_board,
            processors,
            vcpus: Vec::new(),
            chardevs,
            inbox,
            main_loop,
            no_reboot: config.no_reboot,
            wants_terminal,
        };
        machine.create_vcpus()?;
        Ok(machine)
    }

    fn create_vcpus(&mut self) -> Result<(), Failure> {
        let first = self.load()?;
        for (i, apic_id) in self.processors.apic_ids.iter().enumerate() {
            let spec = VcpuSpec {
                index: i as u32,
                apic_id: *apic_id,
                cpuid: self.processors.cpuid[i].clone(),
                tsc_hz: self.processors.tsc_hz,
                bus: self.board.bus().clone(),
                intc: self.board.cpu_intc(i),
                state: Box::new(self.processors.initial_state(i, &first)),
                events: self.inbox.clone(),
            };
            let vcpu = self.accel.create_vcpu_thread(spec).map_err(Failure::Accelerator)?;
            self.vcpus.push(vcpu);
        }
        Ok(())
    }

    /// Puts firmware tables and the kernel into memory.
    fn load(&self) -> Result<tandem_accel::x86::X86State, Failure> {
        let ram = self.memory.ram();
        self.board.start_firmware(&ram).map_err(Failure::Host)?;
        self.plan.load(&ram, &self.boot_board).map_err(Failure::Host)
    }

    /// Runs the machine until it ends.
    pub fn run(mut self) -> Result<Ending, Failure> {
        let raw = match self.wants_terminal {
            true => Some(RawMode::enter().map_err(|e| {
                Failure::Host(Error::new("cannot put the terminal into raw mode").caused_by(e))
            })?),
            false => None,
        };
        self.accel.clock().resume();
        self.vcpus.iter().for_each(VcpuHandle::resume);
        let ending = self.govern();
        self.accel.clock().pause();
        // Dropping a handle stops its vCPU and joins its thread.
        self.vcpus.clear();
        self.chardevs.iter().for_each(|c| c.drain(DRAIN));
        drop(raw);
        ending
    }

    fn govern(&mut self) -> Result<Ending, Failure> {
        loop {
            self.main_loop.turn().map_err(Failure::Host)?;
            if let Some(signal) = signals::asked_to_end() {
                return Ok(Ending::Signal(signal));
            }
            while let Some(event) = self.inbox.take() {
                if let Some(exit) = self.decide(event)? {
                    return Ok(Ending::Exit(exit));
                }
            }
        }
    }

    /// Acts on one event; returns how the machine ends, if it does.
    fn decide(&mut self, event: Event) -> Result<Option<Exit>, Failure> {
        match event {
            Event::Quit | Event::Power(PowerRequest::Off) => Ok(Some(Exit::Done)),
            Event::Power(PowerRequest::DebugExit(status)) => Ok(Some(Exit::Debug(status as u8))),
            Event::Power(PowerRequest::Reset(cause)) => {
                if self.no_reboot {
                    return Ok(Some(Exit::Done));
                }
                ::log::info!("the guest resets the machine ({cause:?})");
                self.reset()?;
                Ok(None)
            }
            Event::Power(PowerRequest::Refused(state)) => {
                ::log::warn!("the guest wants to sleep in {state}, which this machine has not");
                Ok(None)
            }
            Event::Stopped(index, StopReason::TripleFault) => {
                terminal::restore();
                log::error(&self.triple_fault(index));
                Ok(Some(Exit::TripleFault))
            }
            Event::Stopped(_, StopReason::AccelError(e)) => Err(Failure::Accelerator(e)),
            Event::Stopped(index, StopReason::Debug) => {
                ::log::warn!("vCPU {index} stopped at a breakpoint that nobody set; it goes on");
                if let Some(v) = self.vcpus.get(index as usize) {
                    v.resume();
                }
                Ok(None)
            }
        }
    }

    fn triple_fault(&self, index: u32) -> String {
        let state = self.vcpus.get(index as usize).and_then(|v| v.state().ok());
        let at = state.map_or(String::new(), |s| {
            format!(
                " at CS:RIP {:04x}:{:x} (CR0 {:x}, CR2 {:x}, CR3 {:x}, CR4 {:x}, EFER {:x})",
                s.seg[tandem_accel::x86::seg::CS].selector,
                s.rip,
                s.cr0,
                s.cr2,
                s.cr3,
                s.cr4,
                s.efer
            )
        });
        format!(
            "the guest's processor {index} triple-faulted{at}; -d int on tcg shows what led to it"
        )
    }

    /// RESET of the whole machine, in place.
    fn reset(&mut self) -> Result<(), Failure> {
        self.vcpus.iter().for_each(VcpuHandle::pause);
        self.vcpus.iter().for_each(VcpuHandle::wait_not_running);
        // What was asked before the vCPUs stopped concerns a machine that is no more.
        let events: Vec<Event> = std::iter::from_fn(|| self.inbox.take()).collect();
        for event in events {
            if !matches!(event, Event::Power(_) | Event::Stopped(_, StopReason::TripleFault)) {
                self.inbox.post(event);
            }
        }
        self.board.reset();
        self.accel.reset().map_err(Failure::Accelerator)?;
        let first = self.load()?;
        for (i, vcpu) in self.vcpus.iter().enumerate() {
            let state = self.processors.initial_state(i, &first);
            vcpu.set_state(state).map_err(Failure::Accelerator)?;
        }
        self.vcpus.iter().for_each(VcpuHandle::resume);
        Ok(())
    }
}

/// The eventfd that the signal handlers ring. It lives as long as the process, as handlers may run
/// until its end.
fn signal_bell() -> Result<&'static EventFd, Failure> {
    let bell = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(|e| Failure::Host(Error::new("cannot listen to signals").caused_by(e)))?;
    let bell: &'static EventFd = Box::leak(Box::new(bell));
    signals::listen(bell);
    Ok(bell)
}
