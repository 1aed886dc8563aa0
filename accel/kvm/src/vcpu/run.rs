//! KVM_RUN and its exits.

use super::{Vcpu, report};
use kvm_bindings::KVM_SYSTEM_EVENT_RESET;
use kvm_ioctls::VcpuExit as Exit;
use std::sync::atomic::Ordering;
use tandem_accel::vcpu::{StopReason, VcpuExit, VcpuRunner};
use tandem_accel::x86::X86State;
use tandem_accel::{Error, Result};

/// What an exit asks for once the kernel's data has been let go.
enum Next {
    Again,
    PortIo(PortIo),
    Return(VcpuExit),
    Fail(String),
    InternalError,
}

/// A port access: all its elements, in the kernel's buffer.
enum PortIo {
    In(u16, *mut [u8]),
    Out(u16, *const [u8]),
}

impl VcpuRunner for Vcpu {
    fn run(&mut self) -> VcpuExit {
        if let Err(e) = self.catch_up() {
            return stop(e);
        }
        loop {
            match self.enter() {
                Next::Again => {}
                Next::PortIo(io) => self.port_io(&io),
                Next::Return(exit) => return exit,
                Next::Fail(what) => return stop(report::failure(self, &what, &[])),
                Next::InternalError => return stop(report::internal_error(self)),
            }
        }
    }

    fn state(&mut self) -> Result<X86State> {
        self.read_state()
    }

    fn set_state(&mut self, state: &X86State) -> Result<()> {
        self.write_state(state, &self.reset_msrs)
    }
}

fn stop(e: Error) -> VcpuExit {
    VcpuExit::Stop(StopReason::AccelError(e))
}

impl Vcpu {
    /// Takes part in what has happened to the VM since the last run.
    fn catch_up(&mut self) -> Result<()> {
        let resets = self.vm.resets.load(Ordering::Acquire);
        if resets != self.resets {
            // After the registers: the APIC base says in which mode the APIC takes its state.
            self.fd
                .set_lapic(&self.reset_lapic)
                .map_err(|e| self.failed("reset the local APIC", "KVM_SET_LAPIC", e))?;
            self.resets = resets;
        }
        let resumes = self.vm.resumes.load(Ordering::Acquire);
        if resumes != self.resumes {
            if self.vm.caps.kvmclock_ctrl {
                // Tells the guest's watchdogs. EINVAL: it does not use kvmclock.
                let _ = self.fd.kvmclock_ctrl();
            }
            self.resumes = resumes;
        }
        Ok(())
    }

    /// One KVM_RUN, with the exits that need nothing but the bus.
    fn enter(&mut self) -> Next {
        match self.fd.run() {
            Ok(Exit::IoIn(port, data)) => Next::PortIo(PortIo::In(port, data)),
            Ok(Exit::IoOut(port, data)) => Next::PortIo(PortIo::Out(port, data)),
            Ok(Exit::MmioRead(gpa, data)) => {
                self.bus.mmio_read(gpa, data);
                Next::Again
            }
            Ok(Exit::MmioWrite(gpa, data)) => {
                self.bus.mmio_write(gpa, data);
                Next::Again
            }
            Ok(Exit::Hlt) => Next::Return(VcpuExit::Halted),
            Ok(Exit::Shutdown) => Next::Return(VcpuExit::Stop(StopReason::TripleFault)),
            Ok(Exit::Debug(_)) => Next::Return(VcpuExit::Stop(StopReason::Debug)),
            // An asynchronous exit; what it was for has been done by the kernel.
            Ok(Exit::Intr | Exit::IrqWindowOpen | Exit::IoapicEoi(_)) => Next::Again,
            Ok(Exit::InternalError) => Next::InternalError,
            Ok(Exit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => {
                Next::Return(VcpuExit::Stop(StopReason::TripleFault))
            }
            Ok(Exit::SystemEvent(kind, _)) => {
                Next::Fail(format!("KVM reports system event {kind}, which nothing asked for"))
            }
            Ok(Exit::FailEntry(reason, cpu)) => Next::Fail(format!(
                "the processor refused to enter the guest: hardware reason {reason:#x} on host CPU \
                 {cpu}"
            )),
            Ok(Exit::MemoryFault { gpa, size, .. }) => {
                Next::Fail(format!("KVM cannot reach guest memory ({size:#x} bytes at {gpa:#x})"))
            }
            Ok(other) => {
                Next::Fail(format!("KVM_RUN returned an exit nobody asked for ({other:?})"))
            }
            Err(e) => match e.errno() {
                libc::EINTR => {
                    self.kicker.clear();
                    Next::Return(VcpuExit::Kicked)
                }
                // A vCPU that waited for INIT has got it.
                libc::EAGAIN => Next::Again,
                _ => Next::Fail(format!("KVM_RUN failed: {e}")),
            },
        }
    }

    /// IN, OUT and their string forms, of which the kernel may hand over several elements at once.
    fn port_io(&mut self, io: &PortIo) {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit was KVM_EXIT_IO, for which the kernel fills this member of the union.
        let size = usize::from(unsafe { run.__bindgen_anon_1.io.size }).max(1);
        // The buffer lies behind kvm_run. It stays mapped as long as the vCPU, and the kernel does not
        // touch it until the next KVM_RUN.
        match *io {
            PortIo::In(port, data) => {
                // SAFETY: the buffer of the last exit (see above); the reference that described it is
                // gone, and it does not overlap what `run` referred to.
                let data = unsafe { &mut *data };
                data.chunks_mut(size).for_each(|element| self.bus.pio_read(port, element));
            }
            PortIo::Out(port, data) => {
                // SAFETY: as above, for reading.
                let data = unsafe { &*data };
                data.chunks(size).for_each(|element| self.bus.pio_write(port, element));
            }
        }
    }
}
