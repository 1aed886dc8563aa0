//! The registers of a local APIC as plain data, and what follows from them alone.

use super::lapic_regs::{self as regs, lvt};
use serde::{Deserialize, Serialize};

/// IA32_APIC_BASE: this is the bootstrap processor.
pub(super) const BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
pub(super) const BASE_EXTD: u64 = 1 << 10;
/// IA32_APIC_BASE: enabled.
pub(super) const BASE_EN: u64 = 1 << 11;
/// Where the registers are after RESET.
const DEFAULT_BASE: u64 = 0xfee0_0000;
/// SVR: software enable.
pub(super) const SVR_ENABLE: u32 = 1 << 8;
/// Length of a timer tick in nanoseconds before division (a 1 GHz bus).
pub(super) const TICK_NS: u64 = 1;

/// State of a local APIC (SDM vol. 3 §11.4).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LapicState {
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// x2APIC ID; its low 8 bits are the xAPIC ID.
    pub id: u32,
    /// Task priority register.
    pub tpr: u32,
    /// Logical destination register (xAPIC; the x2APIC's follows from the ID).
    pub ldr: u32,
    /// Destination format register.
    pub dfr: u32,
    /// Spurious interrupt vector register.
    pub svr: u32,
    /// In-service register.
    pub isr: [u32; 8],
    /// Trigger mode register.
    pub tmr: [u32; 8],
    /// Interrupt request register.
    pub irr: [u32; 8],
    /// Error status register as last latched.
    pub esr: u32,
    /// Errors since then.
    pub errors: u32,
    /// Interrupt command register (destination in bits 56–63, or 32–63 in x2APIC mode).
    pub icr: u64,
    /// Local vector table: timer, thermal, performance, LINT0, LINT1, error.
    pub lvt: [u32; lvt::COUNT],
    /// Initial count register.
    pub initial_count: u32,
    /// Divide configuration register.
    pub divide: u32,
    /// IA32_TSC_DEADLINE; 0: none.
    pub tsc_deadline: u64,
    /// TSC at guest time 0.
    pub tsc_offset: u64,
    /// Guest time (ns) at which the timer expires next.
    pub timer_next: Option<u64>,
    /// Level of LINT0 (the PIC's output).
    pub lint0: bool,
    /// The PIC's interrupt was requested by message (delivery mode ExtINT).
    pub ext_int: bool,
    /// An NMI waits to be taken.
    pub nmi: bool,
    /// An INIT waits to be taken.
    pub init: bool,
    /// A start-up IPI waits to be taken.
    pub sipi: Option<u8>,
}

impl LapicState {
    /// The state after RESET. LINT0 of the bootstrap processor passes the PIC through, as firmware
    /// would have set it: kernels that are booted directly rely on it.
    pub fn new(id: u32, bsp: bool) -> LapicState {
        let mut s = LapicState {
            apic_base: DEFAULT_BASE | BASE_EN | if bsp { BASE_BSP } else { 0 },
            id,
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [lvt::MASKED; lvt::COUNT],
            initial_count: 0,
            divide: 0,
            tsc_deadline: 0,
            tsc_offset: 0,
            timer_next: None,
            lint0: false,
            ext_int: false,
            nmi: false,
            init: false,
            sipi: None,
        };
        if bsp {
            s.lvt[lvt::LINT0] = lvt::EXT_INT;
        }
        s
    }

    /// What INIT leaves (SDM vol. 3 §11.4.7.3): registers as after RESET, but for IA32_APIC_BASE,
    /// the TSC and what comes from outside.
    pub(super) fn init(&mut self) {
        let old = self.clone();
        *self = LapicState {
            apic_base: old.apic_base,
            tsc_offset: old.tsc_offset,
            lint0: old.lint0,
            nmi: old.nmi,
            init: old.init,
            sipi: old.sipi,
            ..LapicState::new(old.id, old.apic_base & BASE_BSP != 0)
        };
    }

    /// IA32_APIC_BASE.EN.
    pub fn is_enabled(&self) -> bool {
        self.apic_base & BASE_EN != 0
    }

    /// x2APIC mode.
    pub fn is_x2apic(&self) -> bool {
        self.apic_base & BASE_EXTD != 0
    }

    /// Enabled by hardware and by software.
    pub(super) fn is_live(&self) -> bool {
        self.is_enabled() && self.svr & SVR_ENABLE != 0
    }

    /// Processor priority register (SDM vol. 3 §11.8.3.1).
    pub(super) fn ppr(&self) -> u32 {
        let serving = highest(&self.isr).map_or(0, |v| u32::from(v) & 0xf0);
        if self.tpr & 0xf0 >= serving { self.tpr } else { serving }
    }

    /// The requested interrupt that may be delivered now.
    pub(super) fn deliverable(&self) -> Option<u8> {
        if !self.is_live() {
            return None;
        }
        highest(&self.irr).filter(|v| u32::from(*v) & 0xf0 > self.ppr() & 0xf0)
    }

    /// Whether the PIC's output reaches the processor.
    pub(super) fn accepts_pic(&self) -> bool {
        let l = self.lvt[lvt::LINT0];
        !self.is_enabled()
            || self.ext_int
            || (l & lvt::MASKED == 0 && l & lvt::MODE == lvt::EXT_INT)
    }

    /// Logical ID in x2APIC mode (SDM vol. 3 §11.12.10.2).
    pub(super) fn x2apic_ldr(&self) -> u32 {
        (self.id >> 4) << 16 | 1 << (self.id & 0xf)
    }

    /// Nanoseconds per count of the timer.
    pub(super) fn count_ns(&self) -> u64 {
        let code = (self.divide >> 1 & 4) | (self.divide & 3);
        TICK_NS << ((code + 1) & 7)
    }

    /// Current count register at guest time `now`.
    pub(super) fn current_count(&self, now: u64) -> u32 {
        if self.timer_mode() == lvt::TimerMode::TscDeadline {
            return 0;
        }
        let left = self.timer_next.map_or(0, |t| t.saturating_sub(now).div_ceil(self.count_ns()));
        left.min(self.initial_count.into()) as u32
    }

    pub(super) fn timer_mode(&self) -> lvt::TimerMode {
        lvt::TimerMode::of(self.lvt[lvt::TIMER])
    }

    /// The registers as the first 1 KiB of the register page at guest time `now`, which is the form
    /// of KVM's `kvm_lapic_state`. What the page does not hold (IA32_APIC_BASE, IA32_TSC_DEADLINE,
    /// pending events) travels separately.
    pub fn to_page(&self, now: u64) -> [u8; 1024] {
        let mut page = [0; 1024];
        for index in 0..0x40u16 {
            let value = match regs::Reg::decode(index) {
                Some(regs::Reg::Esr) => Some(self.esr),
                Some(r) => regs::read(self, r, now),
                None => None,
            };
            if let Some(v) = value {
                let at = usize::from(index) * 16;
                page[at..at + 4].copy_from_slice(&v.to_le_bytes());
            }
        }
        page
    }

    /// The inverse of [`LapicState::to_page`]: takes the registers from a page as it was at guest
    /// time `now`. `self` gives IA32_APIC_BASE, the deadline and the rest.
    pub fn with_page(&self, page: &[u8; 1024], now: u64) -> LapicState {
        let word = |index: usize| {
            let at = index * 16;
            u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]])
        };
        let mut s = self.clone();
        s.tpr = word(0x08) & 0xff;
        s.ldr = word(0x0d) & 0xff00_0000;
        s.dfr = word(0x0e) | 0x0fff_ffff;
        s.svr = word(0x0f) & regs::SVR_VALID;
        for i in 0..8 {
            s.isr[i] = word(0x10 + i);
            s.tmr[i] = word(0x18 + i);
            s.irr[i] = word(0x20 + i);
        }
        s.esr = word(0x28);
        s.icr = u64::from(word(0x30)) | u64::from(word(0x31)) << 32;
        for i in 0..lvt::COUNT {
            s.lvt[i] = word(0x32 + i);
        }
        s.initial_count = word(0x38);
        s.divide = word(0x3e) & regs::DIVIDE_VALID;
        if s.timer_mode() != lvt::TimerMode::TscDeadline {
            let left = u64::from(word(0x39)) * s.count_ns();
            s.timer_next = (left != 0).then_some(now.saturating_add(left));
        }
        s
    }
}

/// The highest vector in a 256-bit register.
pub(super) fn highest(bits: &[u32; 8]) -> Option<u8> {
    let i = bits.iter().rposition(|w| *w != 0)?;
    Some((i as u32 * 32 + 31 - bits[i].leading_zeros()) as u8)
}

/// Sets or clears a vector's bit.
pub(super) fn set_bit(bits: &mut [u32; 8], vector: u8, on: bool) {
    let (word, bit) = (&mut bits[usize::from(vector) / 32], 1 << (vector % 32));
    if on {
        *word |= bit;
    } else {
        *word &= !bit;
    }
}

/// A vector's bit.
pub(super) fn bit(bits: &[u32; 8], vector: u8) -> bool {
    bits[usize::from(vector) / 32] & 1 << (vector % 32) != 0
}
