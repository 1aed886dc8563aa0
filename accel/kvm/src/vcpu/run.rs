//! KVM_RUN and its exits.

use super::{Vcpu, report};
use kvm_bindings::{KVM_EXIT_IO_IN, KVM_SYSTEM_EVENT_RESET};
use kvm_ioctls::VcpuExit as Exit;
use std::sync::atomic::Ordering;
use tandem_accel::vcpu::{StopReason, VcpuExit, VcpuRunner};
use tandem_accel::x86::X86State;
use tandem_accel::{Error, Result};

/// What an exit asks for once the kernel's data has been let go.
enum Next {
    Again,
    PortIo,
    Return(VcpuExit),
    Fail(String),
    InternalError,
}

impl VcpuRunner for Vcpu {
    fn run(&mut self) -> VcpuExit {
        if let Err(e) = self.catch_up() {
            return stop(e);
        }
        loop {
            match self.enter() {
                Next::Again => {}
                Next::PortIo => {
                    if let Err(e) = self.port_io() {
                        return stop(e);
                    }
                }
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
            Ok(Exit::IoIn(..) | Exit::IoOut(..)) => Next::PortIo,
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
    fn port_io(&mut self) -> Result<()> {
        let len = self.vm.caps.run_len;
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit was KVM_EXIT_IO, for which the kernel fills this member of the union.
        let io = unsafe { run.__bindgen_anon_1.io };
        let (size, offset) = (usize::from(io.size), io.data_offset as usize);
        let total = size * io.count as usize;
        if size == 0 || offset.checked_add(total).is_none_or(|end| end > len) {
            return Err(Error::new(format!(
                "vCPU {}: KVM described a port access of {} x {size} bytes outside its buffer",
                self.index, io.count
            )));
        }
        let base: *mut u8 = std::ptr::from_mut(run).cast();
        // SAFETY: the kernel maps `len` bytes at kvm_run; the range was checked to lie inside; it
        // does not touch them while the vCPU is out of KVM_RUN, and nothing else refers to them
        // (`run` is not used again).
        let data = unsafe { std::slice::from_raw_parts_mut(base.add(offset), total) };
        let input = u32::from(io.direction) == KVM_EXIT_IO_IN;
        for element in data.chunks_exact_mut(size) {
            if input {
                self.bus.pio_read(io.port, element);
            } else {
                self.bus.pio_write(io.port, element);
            }
        }
        Ok(())
    }
}
