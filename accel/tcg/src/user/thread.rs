//! One thread of a program.

use super::Process;
use crate::counters::Counters;
use crate::exec::{Doorbell, Runner, Vcpu, VcpuOptions};
use crate::x86::bits::rflags;
use crate::x86::exception::Exception;
use crate::x86::interrupt;
use crate::x86::mode::MMU_USER;
use crate::x86::xsave;
use crate::x86::{Cpu, Env};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use tandem_accel::bus::IoBus;
use tandem_accel::vcpu::{StopReason, VcpuControl, VcpuEvents, VcpuExit, VcpuRunner, VcpuSpec};
use tandem_accel::x86::X86State;
use tandem_accel::{Error, Result};

/// Why a thread came back.
#[derive(Debug)]
pub enum Event {
    /// SYSCALL: RIP is behind it, RCX and R11 are as it leaves them.
    Syscall,
    /// An exception; RIP is the instruction to return to.
    Exception(Exception),
    /// INT n, INT3, INTO or INT1 with its vector; RIP is behind it.
    Interrupt(u8),
    /// Its [`Bell`] was rung.
    Rung,
    /// The translator cannot go on.
    Broken(Error),
}

/// Makes a thread come back soon. May be used in a signal handler.
#[derive(Clone, Copy, Debug)]
pub struct Bell {
    exit_request: NonNull<AtomicU32>,
    rung: NonNull<AtomicBool>,
}

// SAFETY: both point to atomics, which any thread may use; for how long is said at `Thread::bell`.
unsafe impl Send for Bell {}
// SAFETY: as above.
unsafe impl Sync for Bell {}

impl Bell {
    /// Rings.
    pub fn ring(self) {
        // SAFETY: `Thread::bell` says how long the thread lives.
        unsafe {
            self.rung.as_ref().store(true, Ordering::Release);
            self.exit_request.as_ref().store(1, Ordering::Release);
        }
    }
}

struct NoEvents;

impl VcpuEvents for NoEvents {
    fn stopped(&self, _: u32, _: StopReason) {}
}

/// A thread of a program, on the host thread that runs it.
pub struct Thread {
    process: Arc<Process>,
    runner: Runner,
    bell: Arc<Doorbell>,
}

impl Thread {
    /// A thread that starts with this state.
    ///
    /// # Errors
    /// There is no memory for its state, or the state is an impossible one.
    pub fn new(process: &Arc<Process>, state: &X86State) -> Result<Thread> {
        let index = process.next_index();
        let spec = VcpuSpec {
            index,
            apic_id: index,
            cpuid: process.cpuid.clone(),
            tsc_hz: crate::accel::TSC_HZ,
            bus: Arc::new(IoBus::default()),
            intc: None,
            state: Box::new(state.clone()),
            events: Arc::new(NoEvents),
        };
        let bell = Doorbell::new(index, VcpuControl::new(), &process.clock);
        let options = VcpuOptions {
            one_insn: process.options.one_insn_per_tb,
            nochain: process.options.log.needs_every_block(),
            space: Some(process.space.clone()),
            ..VcpuOptions::default()
        };
        let vcpu = Box::new(Vcpu::new(
            &spec,
            process.clock.clone(),
            process.shared.clone(),
            process.tbs.clone(),
            process.target.clone(),
            bell.clone(),
            Arc::new(Counters::default()),
            options,
        ));
        let mem = process
            .tbs
            .backend
            .alloc_env()
            .map_err(|e| Error::new("cannot allocate the state of a thread").caused_by(e))?;
        let runner = Runner::new(mem, vcpu, state)?;
        process.shared.add(bell.clone());
        Ok(Thread { process: process.clone(), runner, bell })
    }

    /// What it shares with the others.
    pub fn process(&self) -> &Arc<Process> {
        &self.process
    }

    /// How to make it come back. The thread must outlive every use.
    pub fn bell(&mut self) -> Bell {
        Bell {
            rung: NonNull::from(&self.bell.kicked),
            exit_request: NonNull::from(&self.runner.env().core.exit_request),
        }
    }

    /// Forks by `f`, which returns 0 in the child; only this thread goes on there. The child keeps the
    /// translations.
    ///
    /// # Errors
    /// There is no memory for the child's code.
    pub fn fork(&mut self, f: impl FnOnce() -> i64) -> Result<i64> {
        let process = self.process.clone();
        let r = process.shared.exclusive(&self.bell, || {
            let copy = process.tbs.copy()?;
            let pid = f();
            if pid == 0 {
                copy.adopt()?;
            }
            Ok(pid)
        });
        let pid = r.map_err(|e: std::io::Error| {
            Error::new("there is no memory for a child's code").caused_by(e)
        })?;
        if pid == 0 {
            process.shared.retain(&self.bell);
        }
        Ok(pid)
    }

    /// Its registers.
    pub fn cpu(&mut self) -> &mut Cpu {
        &mut self.runner.env().cpu
    }

    /// RFLAGS.
    pub fn flags(&mut self) -> u64 {
        self.runner.env().eflags()
    }

    /// All of its state.
    ///
    /// # Errors
    /// None.
    pub fn state(&mut self) -> Result<X86State> {
        self.runner.state()
    }

    /// Sets all of its state.
    ///
    /// # Errors
    /// The state is an impossible one.
    pub fn set_state(&mut self, state: &X86State) -> Result<()> {
        self.runner.set_state(state)
    }

    /// Sets RFLAGS.
    pub fn set_flags(&mut self, flags: u64) {
        self.runner.env().set_eflags(flags, rflags::ALL);
    }

    /// Writes x87 and vector state as XSAVE does for the components `mask`.
    ///
    /// # Errors
    /// #PF, or #GP for an address that is not a multiple of 64.
    pub fn save_vectors(&mut self, addr: u64, mask: u64) -> std::result::Result<(), Exception> {
        let env = self.runner.env();
        env.x87_sync();
        env.write_bytes(addr.wrapping_add(512), &[0; 64], MMU_USER)?;
        xsave::xsave(env, addr, mask, xsave::Save::Plain, true)
    }

    /// Reads it back as XRSTOR does, or FXRSTOR.
    ///
    /// # Errors
    /// As [`Thread::save_vectors`]; #GP for what cannot be loaded.
    pub fn load_vectors(
        &mut self,
        addr: u64,
        mask: u64,
        extended: bool,
    ) -> std::result::Result<(), Exception> {
        let env = self.runner.env();
        env.x87_sync();
        match extended {
            true => xsave::xrstor(env, addr, mask, false, true),
            false => xsave::fxrstor(env, addr, true),
        }?;
        env.update_mode();
        Ok(())
    }

    /// The guest's memory as its helpers reach it.
    pub fn env(&mut self) -> &mut Env {
        self.runner.env()
    }

    /// Runs until something needs its process.
    pub fn run(&mut self) -> Event {
        loop {
            let exit = self.runner.run();
            if let Some(event) = self.runner.env().vcpu().event.take() {
                return match event {
                    UserEvent::Syscall => Event::Syscall,
                    UserEvent::Raised(interrupt::Event::Exception(e)) => Event::Exception(e),
                    UserEvent::Raised(interrupt::Event::Software { vector, next_rip, .. }) => {
                        self.cpu().rip = next_rip;
                        Event::Interrupt(vector)
                    }
                    UserEvent::Raised(_) => continue,
                };
            }
            match exit {
                VcpuExit::Kicked => return Event::Rung,
                VcpuExit::Stop(StopReason::AccelError(e)) => return Event::Broken(e),
                VcpuExit::Stop(r) => return Event::Broken(Error::new(format!("{r:?}"))),
                VcpuExit::Halted | VcpuExit::TurnOver => {}
            }
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.process.shared.remove(&self.bell);
    }
}

impl Env {
    /// The program's process has to look at `event` before anything else is executed.
    pub(crate) fn user_event(&mut self, event: UserEvent) {
        self.vcpu().event.set(Some(event));
        self.core.request_exit();
    }
}

/// What has happened that a machine would deliver through its tables.
#[derive(Clone, Copy, Debug)]
pub(crate) enum UserEvent {
    /// SYSCALL has been executed.
    Syscall,
    /// What would be delivered.
    Raised(interrupt::Event),
}
