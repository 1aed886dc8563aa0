//! Interrupt lines, messages and sinks.
//!
//! A device holds an [`IrqLine`] or sends an [`MsiMessage`]; it never knows who delivers it. The
//! sink is an in-kernel chip (KVM_IRQ_LINE, KVM_SIGNAL_MSI) or the machine's own PIC, IOAPIC and
//! LAPICs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Takes the level of interrupt inputs, named by GSI (global system interrupt, ACPI 6.4 §5.2.13).
pub trait IrqSink: Send + Sync {
    /// Input `gsi` now has this level. Setting the level it already has is harmless. An unknown GSI
    /// is ignored.
    fn set_level(&self, gsi: u32, high: bool);
}

/// Takes message-signalled interrupts.
pub trait MsiSink: Send + Sync {
    /// Delivers one message.
    fn send(&self, msg: MsiMessage);
}

/// A message-signalled interrupt (SDM vol. 3 §11.11): a write of `data` to `addr`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MsiMessage {
    /// Message address.
    pub addr: u64,
    /// Message data.
    pub data: u32,
}

/// A wire to one input of a sink, with a memory of its own level. Several wires may share the
/// input: the input is high while any of them is.
pub struct IrqLine {
    input: Arc<IrqInput>,
    level: AtomicBool,
}

/// An input of a sink that wires are joined to (wired-OR).
///
/// Lock order: a wire's input before the sink's own locks.
pub struct IrqInput {
    sink: Arc<dyn IrqSink>,
    gsi: u32,
    /// Number of wires that are high. Held while the sink is told, so that it hears of levels in
    /// the order in which they came to be.
    high: Mutex<u32>,
}

impl IrqInput {
    /// Input `gsi` of `sink`. Make one per input, and wires from it.
    pub fn new(sink: Arc<dyn IrqSink>, gsi: u32) -> Arc<IrqInput> {
        Arc::new(IrqInput { sink, gsi, high: Mutex::new(0) })
    }
    /// A new wire, low.
    pub fn line(self: &Arc<Self>) -> IrqLine {
        IrqLine { input: self.clone(), level: AtomicBool::new(false) }
    }
}

impl IrqLine {
    /// A wire of its own to input `gsi` of `sink`.
    pub fn new(sink: Arc<dyn IrqSink>, gsi: u32) -> IrqLine {
        IrqInput::new(sink, gsi).line()
    }
    /// A wire that leads nowhere.
    pub fn unconnected() -> IrqLine {
        struct Nowhere;
        impl IrqSink for Nowhere {
            fn set_level(&self, _: u32, _: bool) {}
        }
        IrqLine::new(Arc::new(Nowhere), 0)
    }
    /// Sets the level of this wire; tells the sink if the input changes.
    pub fn set(&self, high: bool) {
        if self.level() == high {
            return;
        }
        let i = &self.input;
        let mut count = i.high.lock().unwrap();
        let before = *count;
        self.change(&mut count, high);
        if (before == 0) != (*count == 0) {
            i.sink.set_level(i.gsi, high);
        }
    }
    /// Raises the wire.
    pub fn assert(&self) {
        self.set(true);
    }
    /// Lowers the wire.
    pub fn deassert(&self) {
        self.set(false);
    }
    /// An edge: high, then low.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
    /// The level of this wire.
    pub fn level(&self) -> bool {
        self.level.load(Ordering::Acquire)
    }
    /// Sets the remembered level without telling the sink, which restores its own state.
    pub fn import_level(&self, high: bool) {
        self.change(&mut self.input.high.lock().unwrap(), high);
    }
    /// Sets the remembered level and keeps the input's count, whose lock the caller holds.
    fn change(&self, count: &mut u32, high: bool) {
        if self.level.swap(high, Ordering::AcqRel) != high {
            *count = if high { *count + 1 } else { *count - 1 };
        }
    }
}

/// Wakes a vCPU: it leaves guest code (or its halt) soon and looks at its [`CpuIntc`] again.
/// Callable from any thread, never blocks.
pub trait Kick: Send + Sync {
    /// Wakes the vCPU.
    fn kick(&self);
}

/// An event other than a maskable interrupt that a local APIC delivers to its processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CpuEvent {
    /// Non-maskable interrupt.
    Nmi,
    /// INIT: reset to the wait-for-SIPI state (the bootstrap processor starts anew).
    Init,
    /// Start-up IPI with this vector; the processor starts at `vector << 12`.
    Sipi(u8),
}

/// A local APIC (with the PIC behind its LINT0) as its processor sees it. Used when the interrupt
/// chips are the machine's ([`crate::IrqChip::Userspace`]). Called on the vCPU's thread.
pub trait CpuIntc: Send + Sync {
    /// Tells the chip how to wake its processor. Called once, before the vCPU runs.
    fn attach(&self, kick: Arc<dyn Kick>);
    /// Whether a maskable interrupt is deliverable now (RFLAGS.IF apart).
    fn pending(&self) -> bool;
    /// Acknowledges the deliverable interrupt of highest priority and returns its vector.
    fn acknowledge(&self) -> Option<u8>;
    /// Takes a pending event.
    fn take_event(&self) -> Option<CpuEvent>;
    /// CR8 (task priority class, 0–15).
    fn cr8(&self) -> u8;
    /// Writes CR8; values above 15 never arrive here.
    fn set_cr8(&self, v: u8);
    /// IA32_APIC_BASE (MSR 1Bh).
    fn apic_base(&self) -> u64;
    /// Writes IA32_APIC_BASE; `false`: the value is invalid (#GP), nothing changed.
    fn set_apic_base(&self, v: u64) -> bool;
    /// Reads an APIC MSR: x2APIC 800h–8FFh, or IA32_TSC_DEADLINE 6E0h. `None`: #GP.
    fn read_msr(&self, msr: u32) -> Option<u64>;
    /// Writes an APIC MSR; `false`: #GP.
    fn write_msr(&self, msr: u32, v: u64) -> bool;
    /// Tells the chip how the guest's TSC runs, for the TSC-deadline timer: TSC = guest time in
    /// nanoseconds × `tsc_hz` / 10⁹ + `offset` (wrapping). Called after each write of IA32_TSC or
    /// IA32_TSC_ADJUST; the offset is 0 until then.
    fn set_tsc_offset(&self, offset: u64);
    /// Reads the 4 KiB register page at byte `offset` (the access hit the APIC base page).
    fn read_mmio(&self, offset: u64, data: &mut [u8]);
    /// Writes the register page.
    fn write_mmio(&self, offset: u64, data: &[u8]);
    /// Resets the chip as RESET does.
    fn reset(&self);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u32, bool)>>);
    impl IrqSink for Recorder {
        fn set_level(&self, gsi: u32, high: bool) {
            self.0.lock().unwrap().push((gsi, high));
        }
    }

    #[test]
    fn shared_input_is_high_while_any_wire_is() {
        let r = Arc::new(Recorder::default());
        let input = IrqInput::new(r.clone(), 9);
        let (a, b) = (input.line(), input.line());
        a.assert();
        b.assert();
        b.assert();
        a.deassert();
        b.deassert();
        assert_eq!(*r.0.lock().unwrap(), [(9, true), (9, false)]);
    }

    #[test]
    fn wires_that_race_leave_the_right_level() {
        let r = Arc::new(Recorder::default());
        let input = IrqInput::new(r.clone(), 3);
        let (a, b) = (input.line(), input.line());
        std::thread::scope(|s| {
            for line in [&a, &b, &a] {
                s.spawn(move || (0..1000).for_each(|_| line.pulse()));
            }
        });
        let seen = r.0.lock().unwrap();
        assert!(seen.chunks(2).all(|c| c == [(3, true), (3, false)]));
    }

    #[test]
    fn imported_level_makes_no_edge() {
        let r = Arc::new(Recorder::default());
        let l = IrqLine::new(r.clone(), 4);
        l.import_level(true);
        assert!(l.level());
        l.deassert();
        assert_eq!(*r.0.lock().unwrap(), [(4, false)]);
    }
}
