//! Register decode of the local APIC: one table for the memory-mapped page (offset / 16) and the
//! x2APIC MSRs (MSR - 800h), SDM vol. 3 tables 11-1 and 11-6.

use super::lapic_state::{LapicState, SVR_ENABLE, highest, set_bit};

/// Local vector table.
pub(super) mod lvt {
    /// Number of entries.
    pub const COUNT: usize = 6;
    pub const TIMER: usize = 0;
    pub const LINT0: usize = 3;
    pub const LINT1: usize = 4;
    pub const ERROR: usize = 5;
    /// Delivery mode field.
    pub const MODE: u32 = 7 << 8;
    pub const EXT_INT: u32 = 7 << 8;
    pub const NMI: u32 = 4 << 8;
    pub const FIXED: u32 = 0;
    pub const REMOTE_IRR: u32 = 1 << 14;
    pub const LEVEL: u32 = 1 << 15;
    pub const MASKED: u32 = 1 << 16;

    /// Writable bits by entry.
    pub const VALID: [u32; COUNT] = [
        0xff | MASKED | 3 << 17,
        0xff | MODE | MASKED,
        0xff | MODE | MASKED,
        0xff | MODE | 1 << 13 | LEVEL | MASKED,
        0xff | MODE | 1 << 13 | LEVEL | MASKED,
        0xff | MASKED,
    ];
    /// Bits that are read-only rather than reserved: delivery status, remote IRR.
    pub const READ_ONLY: u32 = 1 << 12 | REMOTE_IRR;

    /// Modes of the timer.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub enum TimerMode {
        OneShot,
        Periodic,
        TscDeadline,
    }
    impl TimerMode {
        pub fn of(entry: u32) -> TimerMode {
            match entry >> 17 & 3 {
                1 => TimerMode::Periodic,
                2 => TimerMode::TscDeadline,
                _ => TimerMode::OneShot,
            }
        }
    }
}

/// Error status bits.
pub(super) mod esr {
    pub const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// Writable bits of the SVR. EOI-broadcast suppression is not offered.
pub(super) const SVR_VALID: u32 = 0x3ff;
/// Writable bits of the divide configuration.
pub(super) const DIVIDE_VALID: u32 = 0b1011;
/// Writable bits of the low half of the ICR.
const ICR_VALID: u32 = 0x000c_cfff;
/// Integrated APIC, version 14h, highest LVT entry 5.
const VERSION: u32 = 0x14 | (lvt::COUNT as u32 - 1) << 16;

/// A register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Reg {
    Id,
    Version,
    Tpr,
    /// Arbitration priority, xAPIC only.
    Apr,
    Ppr,
    Eoi,
    Ldr,
    /// Destination format, xAPIC only.
    Dfr,
    Svr,
    Isr(u8),
    Tmr(u8),
    Irr(u8),
    Esr,
    Icr,
    /// High half of the ICR, xAPIC only.
    IcrHigh,
    Lvt(u8),
    InitialCount,
    CurrentCount,
    Divide,
    /// Self IPI, x2APIC only.
    SelfIpi,
}

impl Reg {
    /// The register at this index.
    pub fn decode(index: u16) -> Option<Reg> {
        Some(match index {
            0x02 => Reg::Id,
            0x03 => Reg::Version,
            0x08 => Reg::Tpr,
            0x09 => Reg::Apr,
            0x0a => Reg::Ppr,
            0x0b => Reg::Eoi,
            0x0d => Reg::Ldr,
            0x0e => Reg::Dfr,
            0x0f => Reg::Svr,
            0x10..=0x17 => Reg::Isr(index as u8 & 7),
            0x18..=0x1f => Reg::Tmr(index as u8 & 7),
            0x20..=0x27 => Reg::Irr(index as u8 & 7),
            0x28 => Reg::Esr,
            0x30 => Reg::Icr,
            0x31 => Reg::IcrHigh,
            0x32..=0x37 => Reg::Lvt(index as u8 - 0x32),
            0x38 => Reg::InitialCount,
            0x39 => Reg::CurrentCount,
            0x3e => Reg::Divide,
            0x3f => Reg::SelfIpi,
            _ => return None,
        })
    }

    /// Whether the register exists in this mode.
    pub fn exists(self, x2apic: bool) -> bool {
        match self {
            Reg::Apr | Reg::Dfr | Reg::IcrHigh => !x2apic,
            Reg::SelfIpi => x2apic,
            _ => true,
        }
    }

    fn is_read_only(self) -> bool {
        matches!(
            self,
            Reg::Id
                | Reg::Version
                | Reg::Apr
                | Reg::Ppr
                | Reg::Isr(_)
                | Reg::Tmr(_)
                | Reg::Irr(_)
                | Reg::CurrentCount
        )
    }
}

/// What a write asks for besides the register's change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Effect {
    None,
    /// A level-triggered interrupt ended: tell the I/O APIC.
    Eoi(u8),
    /// Send what is in the ICR.
    Ipi,
    /// Send this vector to this APIC.
    SelfIpi(u8),
    /// The timer's expiry changed.
    Timer,
}

/// Reads a register at guest time `now`; `None`: it is write-only.
pub(super) fn read(s: &LapicState, reg: Reg, now: u64) -> Option<u32> {
    Some(match reg {
        Reg::Id if s.is_x2apic() => s.id,
        Reg::Id => s.id << 24,
        Reg::Version => VERSION,
        Reg::Tpr => s.tpr,
        Reg::Apr | Reg::Ppr => s.ppr(),
        Reg::Ldr if s.is_x2apic() => s.x2apic_ldr(),
        Reg::Ldr => s.ldr,
        Reg::Dfr => s.dfr,
        Reg::Svr => s.svr,
        Reg::Isr(n) => s.isr[usize::from(n & 7)],
        Reg::Tmr(n) => s.tmr[usize::from(n & 7)],
        Reg::Irr(n) => s.irr[usize::from(n & 7)],
        Reg::Esr => s.esr,
        Reg::Icr => s.icr as u32,
        Reg::IcrHigh => (s.icr >> 32) as u32,
        Reg::Lvt(n) => s.lvt.get(usize::from(n)).copied()?,
        Reg::InitialCount => s.initial_count,
        Reg::CurrentCount => s.current_count(now),
        Reg::Divide => s.divide,
        Reg::Eoi | Reg::SelfIpi => return None,
    })
}

/// Whether an x2APIC MSR takes this value (SDM vol. 3 §11.12.1.3: reserved bits give #GP).
pub(super) fn is_valid_msr_value(reg: Reg, v: u64) -> bool {
    let valid: u64 = match reg {
        _ if reg.is_read_only() || reg == Reg::Ldr => return false,
        Reg::Icr => 0xffff_ffff_0000_0000 | u64::from(ICR_VALID | 1 << 12),
        Reg::Eoi | Reg::Esr => 0,
        Reg::Tpr | Reg::SelfIpi => 0xff,
        Reg::Svr => SVR_VALID.into(),
        Reg::Lvt(n) => {
            let n = usize::from(n);
            u64::from(lvt::VALID.get(n).copied().unwrap_or(0) | lvt::READ_ONLY)
        }
        Reg::Divide => DIVIDE_VALID.into(),
        _ => u32::MAX.into(),
    };
    v & !valid == 0
}

/// Writes a register at guest time `now`. In x2APIC mode `v` may have 64 bits (ICR).
pub(super) fn write(s: &mut LapicState, reg: Reg, v: u64, now: u64) -> Effect {
    let w = v as u32;
    match reg {
        Reg::Tpr => s.tpr = w & 0xff,
        Reg::Eoi => return end_of_interrupt(s),
        Reg::Ldr => s.ldr = w & 0xff00_0000,
        Reg::Dfr => s.dfr = w | 0x0fff_ffff,
        Reg::Svr => {
            s.svr = w & SVR_VALID;
            if w & SVR_ENABLE == 0 {
                s.lvt.iter_mut().for_each(|l| *l |= lvt::MASKED);
            }
        }
        // A write latches the errors since the last one.
        Reg::Esr => s.esr = std::mem::take(&mut s.errors),
        Reg::Icr => {
            let high = if s.is_x2apic() { v >> 32 } else { s.icr >> 32 };
            s.icr = high << 32 | u64::from(w & ICR_VALID);
            return Effect::Ipi;
        }
        Reg::IcrHigh => s.icr = s.icr & 0xffff_ffff | u64::from(w & 0xff00_0000) << 32,
        Reg::Lvt(n) => return write_lvt(s, usize::from(n), w),
        Reg::InitialCount => {
            if s.timer_mode() == lvt::TimerMode::TscDeadline {
                return Effect::None;
            }
            s.initial_count = w;
            let span = u64::from(w) * s.count_ns();
            s.timer_next = (w != 0).then_some(now.saturating_add(span));
            return Effect::Timer;
        }
        Reg::Divide => {
            let left = s.current_count(now);
            s.divide = w & DIVIDE_VALID;
            if s.timer_next.is_some() && s.timer_mode() != lvt::TimerMode::TscDeadline {
                s.timer_next = Some(now.saturating_add(u64::from(left) * s.count_ns()));
                return Effect::Timer;
            }
        }
        Reg::SelfIpi => return Effect::SelfIpi(w as u8),
        Reg::Id
        | Reg::Version
        | Reg::Apr
        | Reg::Ppr
        | Reg::Isr(_)
        | Reg::Tmr(_)
        | Reg::Irr(_)
        | Reg::CurrentCount => {}
    }
    Effect::None
}

fn write_lvt(s: &mut LapicState, n: usize, v: u32) -> Effect {
    let Some(valid) = lvt::VALID.get(n) else { return Effect::None };
    let before = s.timer_mode();
    let mut new = v & valid | s.lvt[n] & lvt::READ_ONLY;
    if new & lvt::LEVEL == 0 {
        new &= !lvt::REMOTE_IRR;
    }
    if s.svr & SVR_ENABLE == 0 {
        new |= lvt::MASKED;
    }
    s.lvt[n] = new;
    let after = s.timer_mode();
    let deadline = lvt::TimerMode::TscDeadline;
    // Entering or leaving TSC-deadline mode disarms (SDM vol. 3 §11.5.4.1).
    if before != after && (before == deadline || after == deadline) {
        s.initial_count = 0;
        s.tsc_deadline = 0;
        s.timer_next = None;
        return Effect::Timer;
    }
    Effect::None
}

fn end_of_interrupt(s: &mut LapicState) -> Effect {
    let Some(v) = highest(&s.isr) else { return Effect::None };
    set_bit(&mut s.isr, v, false);
    for l in &mut s.lvt[lvt::LINT0..=lvt::LINT1] {
        if *l as u8 == v {
            *l &= !lvt::REMOTE_IRR;
        }
    }
    if super::lapic_state::bit(&s.tmr, v) { Effect::Eoi(v) } else { Effect::None }
}
