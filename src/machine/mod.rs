//! One machine, assembled and governed.
//!
//! Build order, each step needing only what stands before it:
//!
//! ```text
//!   memory ─► accelerator ─► interrupt chips ─► devices ─► ACPI ─► boot ─► vCPUs ─► main loop
//! ```
//!
//! The run state ([`run_state`]) is changed by the main loop's thread alone: a guest, a user or a
//! program only asks, through the [`inbox::Inbox`]. The machine ends by power-off, reset under
//! no_reboot, triple fault (unless no_shutdown keeps it for inspection), debug exit, accelerator
//! error, quit or a signal: then vCPUs are stopped and output is drained.

mod backbone;
pub mod block_jobs;
pub mod block_nodes;
mod board;
mod cpu;
pub mod drives;
mod dump;
pub mod exports;
mod firmware;
mod hotplug;
pub mod inbox;
pub mod jobs;
mod main_loop;
pub mod media;
pub mod memmap;
pub mod microvm;
mod misfortune;
pub mod networks;
mod nodes;
pub mod objects;
mod peripherals;
mod ports;
mod q35;
pub mod run_state;
mod snapshots;

use crate::boot;
use crate::cli::exit::Exit;
use crate::commands::events;
use crate::commands::run_state::ShutdownCause;
use crate::config::{self, Fault, Object, Serial, VmConfig};
use crate::monitor::Hub;
use crate::terminal::{self, RawMode};
use crate::{log, qapi, signals};
use board::Board;
use cpu::Processors;
use inbox::{Event, Inbox};
use main_loop::MainLoop;
use memmap::MemoryMap;
use microvm::Microvm;
use q35::Q35;
use run_state::RunState;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tandem_accel::bus::IoBus;
use tandem_accel::memory::{GuestMap, RegionKind};
use tandem_accel::vcpu::{StopReason, VcpuHandle, VcpuSpec};
use tandem_accel::{AccelOps, Error};
use tandem_backends::block::drive::{Drive, Op};
use tandem_backends::chardev::Chardev;
use tandem_devices::display::Adapter;
use tandem_devices::pci::Bus;
use tandem_devices::power::{News, PowerRequest};
use tandem_devices::virtio::balloon::VirtioBalloon;
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

impl From<Failure> for qapi::Error {
    fn from(f: Failure) -> qapi::Error {
        match f {
            Failure::Usage(all) => qapi::faults(all),
            Failure::Accelerator(e) | Failure::Host(e) => e.into(),
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

/// What a guest sees of a machine, and how it starts.
struct Guest {
    board: Box<dyn Board>,
    /// The kernel and what it is told, if no firmware starts the machine.
    kernel: Option<(boot::Plan, boot::Board)>,
    processors: Processors,
}

impl Guest {
    /// Puts firmware tables and the kernel into memory, if no firmware does; returns the state in
    /// which the first processor starts.
    fn load(&self, memory: &GuestMap) -> Result<tandem_accel::x86::X86State, Failure> {
        let Some((plan, board)) = &self.kernel else { return Ok(self.processors.after_reset()) };
        let ram = memory.ram();
        self.board.start_firmware(&ram).map_err(Failure::Host)?;
        let state = plan.load(&ram, board).map_err(Failure::Host)?;
        Ok(self.processors.after_firmware(state))
    }
}

/// A machine, ready to run.
pub struct Machine {
    config: VmConfig,
    state: RunState,
    hub: Arc<Hub>,
    accel: Arc<dyn AccelOps>,
    memory: Arc<GuestMap>,
    /// What the guest sees; absent for the machine type without anything in it.
    guest: Option<Guest>,
    vcpus: Vec<VcpuHandle>,
    /// The host's ids of their threads.
    vcpu_threads: Vec<i32>,
    chardevs: Vec<Arc<Chardev>>,
    /// Those of devices.
    named: BTreeMap<String, Arc<Chardev>>,
    inbox: Arc<Inbox>,
    /// Events taken from the inbox and not yet decided about.
    batch: VecDeque<Event>,
    main_loop: MainLoop,
    wants_terminal: bool,
    /// The last dump of memory.
    dump: Option<dump::Dump>,
    /// Long work on disks.
    jobs: jobs::Jobs,
    /// Disks that network clients use.
    exports: exports::Exports,
    /// Names of block nodes that were made up.
    made_up: u64,
}

impl Machine {
    /// Builds the machine that a validated configuration describes. Work for it comes in through
    /// `inbox`; what happens to it is told to `hub`.
    pub fn build(
        config: &VmConfig,
        accel: Arc<dyn AccelOps>,
        inbox: &Arc<Inbox>,
        hub: &Arc<Hub>,
    ) -> Result<Machine, Failure> {
        let memory = GuestMap::new();
        inbox.serve(accel.clone());
        let main_loop = MainLoop::new(&accel.clock(), inbox, signal_bell()?);
        let main_loop = main_loop.map_err(Failure::Host)?;
        let mut machine = Machine {
            config: config.clone(),
            state: RunState::Prelaunch,
            hub: hub.clone(),
            accel,
            memory,
            guest: None,
            vcpus: Vec::new(),
            vcpu_threads: Vec::new(),
            chardevs: Vec::new(),
            named: BTreeMap::new(),
            inbox: inbox.clone(),
            batch: VecDeque::new(),
            main_loop,
            wants_terminal: false,
            dump: None,
            jobs: jobs::Jobs::default(),
            exports: exports::Exports::default(),
            made_up: 0,
        };
        if !config.is_none() {
            machine.furnish()?;
        }
        machine.create_vcpus()?;
        Ok(machine)
    }

    /// Builds what the guest sees.
    fn furnish(&mut self) -> Result<(), Failure> {
        let (config, accel, inbox) = (&self.config, &*self.accel, &self.inbox);
        let map = MemoryMap::new(config.memory);
        let mut start = config.boot.clone();
        if config.machine == microvm::NAME {
            start.append += &microvm::command_line(config);
        }
        let firmware = config.starts_with_firmware();
        let plan = match firmware {
            true => None,
            false => Some(boot::Plan::new(&start, &map).map_err(Failure::Usage)?),
        };
        let processors = Processors::new(config, accel)?;
        for (name, at, len) in map.ram(firmware) {
            self.memory.add(name, RegionKind::Ram, at, len).map_err(Failure::Host)?;
        }
        accel.attach_memory(&self.memory).map_err(Failure::Accelerator)?;
        let ends: Vec<_> = (0..config.serials.len()).filter_map(|i| config.serial(i)).collect();
        self.chardevs = ends
            .iter()
            .map(|(_, s)| ports::open(s))
            .collect::<Result<Vec<_>, _>>()
            .map_err(Failure::Host)?;
        for c in config.free_chardevs() {
            let chardev = ports::open(&c.to).map_err(Failure::Host)?;
            if let Some(pty) = chardev.pty_name() {
                log::note(&format!("character device '{}' is at {}", c.id, pty.display()));
            }
            self.named.insert(c.id.clone(), chardev);
        }
        let (memory, chardevs) = (&self.memory, (&self.chardevs[..], &self.named));
        let board: Box<dyn Board> = if config.machine == microvm::NAME {
            Box::new(Microvm::build(config, memory, accel, &processors, chardevs, inbox)?)
        } else {
            Box::new(Q35::build(config, memory, accel, &processors, chardevs, inbox)?)
        };
        self.named.values().for_each(|c| self.main_loop.add(ports::NamedPort(c.clone())));
        for (i, (chardev, serial)) in self.chardevs.iter().zip(board.serials()).enumerate() {
            let keys = *ends[i].1 == Serial::Stdio && terminal::is_terminal();
            self.wants_terminal |= keys;
            if let Some(pty) = chardev.pty_name() {
                log::note(&format!("COM{} is at {}", i + 1, pty.display()));
            }
            let port = ports::SerialPort::new(chardev.clone(), serial.clone(), keys, inbox.clone())
                .map_err(Failure::Host)?;
            self.main_loop.add(port);
        }
        let kernel =
            plan.zip(board.rsdp()).map(|(p, rsdp)| (p, boot::Board { e820: map.e820(), rsdp }));
        self.guest = Some(Guest { board, kernel, processors });
        Ok(())
    }

    fn create_vcpus(&mut self) -> Result<(), Failure> {
        let Some(guest) = &self.guest else { return Ok(()) };
        let first = guest.load(&self.memory)?;
        for (i, apic_id) in guest.processors.apic_ids.iter().enumerate() {
            let spec = VcpuSpec {
                index: i as u32,
                apic_id: *apic_id,
                cpuid: guest.processors.cpuid[i].clone(),
                tsc_hz: guest.processors.tsc_hz,
                bus: guest.board.bus().clone(),
                intc: guest.board.cpu_intc(i),
                state: Box::new(guest.processors.initial_state(i, &first)),
                events: self.inbox.clone(),
            };
            let vcpu = self.accel.create_vcpu_thread(spec).map_err(Failure::Accelerator)?;
            // SAFETY: no memory is passed.
            let thread = vcpu.with_runner(|_| unsafe { libc::gettid() });
            self.vcpu_threads.push(thread.map_err(Failure::Accelerator)?);
            self.vcpus.push(vcpu);
        }
        Ok(())
    }

    /// Runs the machine until it ends.
    pub fn run(mut self) -> Result<Ending, Failure> {
        let raw = match self.wants_terminal {
            true => Some(RawMode::enter().map_err(|e| {
                Failure::Host(Error::new("cannot put the terminal into raw mode").caused_by(e))
            })?),
            false => None,
        };
        if !self.config.paused {
            self.start();
        }
        let ending = self.govern();
        self.accel.clock().pause();
        if let Some(n) = self.accel.executed() {
            log::note(&format!("the guest has executed {n} instructions"));
        }
        // Dropping a handle stops its vCPU and joins its thread.
        self.vcpus.clear();
        self.chardevs.iter().chain(self.named.values()).for_each(|c| c.drain(DRAIN));
        drop(raw);
        self.jobs.end();
        self.exports.end();
        self.settle_drives();
        ending
    }

    /// Ends what devices still do, and makes durable what the guest has written: a power-off is no
    /// crash, also of a guest that did not flush. vCPUs are gone.
    fn settle_drives(&self) {
        let Some(guest) = &self.guest else { return };
        guest.board.reset();
        for drive in guest.board.peripherals().context().backends.drives.values() {
            if let Err(e) = drive.execute(&Op::Flush) {
                let path = drive.image().path().display().to_string();
                log::error(&format!("'{path}' was not flushed: {}", e.chain()));
            }
        }
    }

    fn govern(&mut self) -> Result<Ending, Failure> {
        loop {
            self.main_loop.turn().map_err(Failure::Host)?;
            if let Some(signal) = signals::asked_to_end() {
                self.tell_shutdown(ShutdownCause::HostSignal);
                return Ok(Ending::Signal(signal));
            }
            self.batch.extend(self.inbox.take());
            while let Some(event) = self.batch.pop_front() {
                if let Some(exit) = self.decide(event)? {
                    return Ok(Ending::Exit(exit));
                }
            }
        }
    }

    /// Acts on one event; returns how the machine ends, if it does.
    fn decide(&mut self, event: Event) -> Result<Option<Exit>, Failure> {
        match event {
            Event::Job(job) => {
                job(self);
                Ok(None)
            }
            Event::Quit(cause) => {
                self.tell_shutdown(cause);
                Ok(Some(Exit::Done))
            }
            Event::News(News::TrayMoved { drive, id, open }) => {
                self.hub.emit(events::DeviceTrayMoved { device: drive, id, tray_open: open });
                Ok(None)
            }
            Event::Power(PowerRequest::Off) => {
                Ok(self.shut_down(ShutdownCause::GuestShutdown, Exit::Done))
            }
            Event::Power(PowerRequest::DebugExit(status)) => Ok(Some(Exit::Debug(status as u8))),
            Event::Power(PowerRequest::Reset(_)) if self.config.no_reboot => {
                Ok(self.shut_down(ShutdownCause::GuestReset, Exit::Done))
            }
            Event::Power(PowerRequest::Reset(cause)) => {
                ::log::info!("the guest resets the machine ({cause:?})");
                self.reset(ShutdownCause::GuestReset)?;
                Ok(None)
            }
            Event::Power(PowerRequest::Panicked(what)) => Ok(self.panicked(what)),
            Event::Power(PowerRequest::Watchdog) => self.watchdog_expired(),
            Event::Power(PowerRequest::Refused(state)) => {
                ::log::warn!("the guest wants to sleep in {state}, which this machine has not");
                Ok(None)
            }
            Event::Stopped(index, StopReason::TripleFault) => {
                terminal::restore();
                log::error(&self.triple_fault(index));
                Ok(self.shut_down(ShutdownCause::GuestPanic, Exit::TripleFault))
            }
            Event::Stopped(_, StopReason::AccelError(e)) if self.config.no_shutdown => {
                log::error(&e);
                self.stop(RunState::InternalError);
                Ok(None)
            }
            Event::Stopped(_, StopReason::AccelError(e)) => {
                self.tell_shutdown(ShutdownCause::HostError);
                Err(Failure::Accelerator(e))
            }
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

    /// What it was made from.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// What runs it.
    pub fn accel(&self) -> &Arc<dyn AccelOps> {
        &self.accel
    }

    /// Its processors, and the host's ids of their threads.
    pub fn vcpus(&self) -> impl Iterator<Item = (&VcpuHandle, i32)> {
        self.vcpus.iter().zip(self.vcpu_threads.iter().copied())
    }

    /// Guest memory.
    pub fn memory(&self) -> &Arc<GuestMap> {
        &self.memory
    }

    /// Character devices of the serial ports, by name.
    pub fn serial_chardevs(&self) -> impl Iterator<Item = (String, &Arc<Chardev>)> {
        let name = |i| self.config.serial(i).map(|(n, _)| n).unwrap_or_default();
        self.chardevs.iter().enumerate().map(move |(i, c)| (name(i), c))
    }

    /// Character devices of devices, by name.
    pub fn named_chardevs(&self) -> &BTreeMap<String, Arc<Chardev>> {
        &self.named
    }

    /// The balloon, if the machine has one.
    pub fn balloon(&self) -> Option<Arc<VirtioBalloon>> {
        self.guest.as_ref()?.board.peripherals().context().directory.find(None)
    }

    /// The display called `id`, or the first one.
    pub fn display(&self, id: Option<&str>) -> Option<Arc<Adapter>> {
        self.guest.as_ref()?.board.peripherals().context().directory.find(id)
    }

    /// Both I/O spaces.
    pub fn io_bus(&self) -> Option<&Arc<IoBus>> {
        self.guest.as_ref().map(|g| g.board.bus())
    }

    /// The PCI root bus.
    pub fn pci(&self) -> Option<&Arc<Bus>> {
        self.guest.as_ref()?.board.pci()
    }

    /// Drives by name.
    pub fn drives(&self) -> BTreeMap<String, Arc<Drive>> {
        let guest = self.guest.as_ref();
        guest.map(|g| g.board.peripherals().context().backends.drives.clone()).unwrap_or_default()
    }

    /// Adds an object for devices.
    pub fn add_object(&mut self, o: Object) -> qapi::Result<()> {
        if self.config.objects.iter().any(|p| p.id == o.id) {
            return Err(qapi::Error::new(format!("an object '{}' is there already", o.id)));
        }
        self.config.objects.push(o);
        Ok(())
    }

    /// Removes an object.
    pub fn remove_object(&mut self, id: &str) -> qapi::Result<()> {
        let uses = |d: &config::Device| d.props.iter().any(|(k, v)| k == "rng" && v == id);
        if let Some(d) = self.config.devices.iter().find(|d| uses(d)) {
            return Err(qapi::Error::new(format!("object '{id}' is in use by a {}", d.driver)));
        }
        match self.config.objects.iter().position(|o| o.id == id) {
            Some(i) => {
                self.config.objects.remove(i);
                Ok(())
            }
            None => Err(qapi::Error::new(format!("object '{id}' not found"))),
        }
    }

    /// Its inbox.
    pub fn inbox(&self) -> &Arc<Inbox> {
        &self.inbox
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
