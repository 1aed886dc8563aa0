//! ACPI power management registers as an ICH9 lays them out in 128 ports from PMBASE (ACPI 6.4
//! §4.8; ICH9 data sheet §13.8.3), and the APM ports B2h/B3h that switch ACPI mode.
//!
//! The system control interrupt is a level: it is high while an enabled status bit is set and ACPI
//! mode is on. There is no system management mode, so that a write to the SMI command port acts
//! here at once.

use crate::power::{PowerRequest, PowerSink, SleepState};
use crate::state::{RestoreError, Stateful};
use crate::timer::pm_timer::PmTimerWidth;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use tandem_accel::bus::BusDevice;
use tandem_accel::clock::{Clock, Timer};
use tandem_accel::irq::IrqLine;

/// Where PMBASE is after firmware, and where a directly booted kernel finds it.
pub const PM_BASE: u16 = 0x600;
/// Number of ports.
pub const PM_SIZE: u64 = 128;
/// Length of the GPE0 block: 8 bytes of status, 8 of enable.
pub const GPE0_LEN: u8 = 16;
/// The interrupt of ACPI.
pub const SCI_IRQ: u32 = 9;
/// First of the two APM ports; it is the SMI command port.
pub const APM_PORT: u16 = 0xb2;
/// Value for the SMI command port that turns ACPI mode on.
pub const ACPI_ENABLE: u8 = 2;
/// Value for the SMI command port that turns ACPI mode off.
pub const ACPI_DISABLE: u8 = 3;
/// SLP_TYP of S5.
pub const SLP_TYP_S5: u8 = 0;
/// SLP_TYP of S3, which is refused.
pub const SLP_TYP_S3: u8 = 1;
/// SLP_TYP of S4, which is refused.
pub const SLP_TYP_S4: u8 = 2;

const TMR: u16 = 1;
const GBL: u16 = 1 << 5;
const PWRBTN: u16 = 1 << 8;
const SLPBTN: u16 = 1 << 9;
const RTC: u16 = 1 << 10;
const WAK: u16 = 1 << 15;
const ENABLES: u16 = TMR | GBL | PWRBTN | SLPBTN | RTC;
const SCI_EN: u16 = 1;
const SLP_EN: u16 = 1 << 13;
const CNT_WRITABLE: u16 = SCI_EN | 1 << 1 | 7 << 10;
/// SMI_EN as firmware finds it where there is no system management mode: APMC_EN already set and
/// nothing writable, which says that somebody else has set it up.
const SMI_EN: u32 = 1 << 5;

/// The register blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Reg {
    Pm1Status,
    Pm1Enable,
    Pm1Control,
    Timer,
    Gpe0Status,
    Gpe0Enable,
    SmiEnable,
    /// Anything else: reads 0.
    Other,
}

/// First offset, length, register.
const REGS: [(u64, u64, Reg); 7] = [
    (0x00, 2, Reg::Pm1Status),
    (0x02, 2, Reg::Pm1Enable),
    (0x04, 2, Reg::Pm1Control),
    (0x08, 4, Reg::Timer),
    (0x20, 8, Reg::Gpe0Status),
    (0x28, 8, Reg::Gpe0Enable),
    (0x30, 4, Reg::SmiEnable),
];

fn decode(offset: u64) -> (u64, u64, Reg) {
    let hit = REGS.iter().find(|(start, len, _)| (*start..start + len).contains(&offset));
    hit.copied().unwrap_or((offset, 1, Reg::Other))
}

/// State of the ACPI registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct AcpiPmState {
    /// PM1 status.
    pub pm1_status: u16,
    /// PM1 enable.
    pub pm1_enable: u16,
    /// PM1 control.
    pub pm1_control: u16,
    /// GPE0 status.
    pub gpe0_status: u64,
    /// GPE0 enable.
    pub gpe0_enable: u64,
    /// Changes of the timer's top bit up to which TMR_STS is worked out.
    pub seen_changes: u64,
    /// APM control (the last SMI command).
    pub apm_control: u8,
    /// APM status, a scratch register.
    pub apm_status: u8,
}

impl AcpiPmState {
    fn sci(&self) -> bool {
        self.pm1_control & SCI_EN != 0
            && (self.pm1_status & self.pm1_enable & ENABLES != 0
                || self.gpe0_status & self.gpe0_enable != 0)
    }
}

/// The ACPI registers.
pub struct AcpiPm {
    state: Mutex<AcpiPmState>,
    /// ACPI mode after RESET.
    starts_enabled: bool,
    width: PmTimerWidth,
    clock: Arc<Clock>,
    sci: IrqLine,
    power: Arc<dyn PowerSink>,
    timer: Timer,
}

impl AcpiPm {
    /// ACPI registers with the system control interrupt on `sci`. `acpi_mode`: ACPI mode is on from
    /// the start, as for a kernel that boots without firmware and finds no SMI command port in its
    /// FADT.
    pub fn new(
        clock: &Arc<Clock>,
        sci: IrqLine,
        power: Arc<dyn PowerSink>,
        width: PmTimerWidth,
        acpi_mode: bool,
    ) -> Arc<AcpiPm> {
        Arc::new_cyclic(|me: &Weak<AcpiPm>| {
            let me = me.clone();
            let timer = clock.timer(move || {
                if let Some(p) = me.upgrade() {
                    let mut s = p.lock();
                    p.update(&mut s);
                }
            });
            let state = Mutex::new(Self::initial(acpi_mode));
            AcpiPm {
                state,
                starts_enabled: acpi_mode,
                width,
                clock: clock.clone(),
                sci,
                power,
                timer,
            }
        })
    }

    fn initial(acpi_mode: bool) -> AcpiPmState {
        AcpiPmState { pm1_control: u16::from(acpi_mode), ..AcpiPmState::default() }
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        let mut s = self.lock();
        s.pm1_status |= PWRBTN;
        self.update(&mut s);
    }

    /// Sets status bit `n` (0–63) of the GPE0 block.
    pub fn raise_gpe(&self, n: u8) {
        let mut s = self.lock();
        s.gpe0_status |= 1u64.checked_shl(n.into()).unwrap_or(0);
        self.update(&mut s);
    }

    /// RESET.
    pub fn reset(&self) {
        let mut s = self.lock();
        *s = Self::initial(self.starts_enabled);
        s.seen_changes = self.width.changes(self.clock.now());
        self.update(&mut s);
    }

    /// The APM ports as a device.
    pub fn apm(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(ApmPorts(self.clone()))
    }

    fn lock(&self) -> MutexGuard<'_, AcpiPmState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn catch_up(&self, s: &mut AcpiPmState) {
        let changes = self.width.changes(self.clock.now());
        if changes != s.seen_changes {
            s.seen_changes = changes;
            s.pm1_status |= TMR;
        }
    }

    fn update(&self, s: &mut AcpiPmState) {
        self.catch_up(s);
        self.sci.set(s.sci());
        if s.pm1_enable & TMR != 0 && s.pm1_status & TMR == 0 {
            self.timer.arm(self.width.time_of_change(s.seen_changes + 1));
        } else {
            self.timer.disarm();
        }
    }

    fn read_reg(&self, s: &AcpiPmState, reg: Reg) -> u64 {
        match reg {
            Reg::Pm1Status => s.pm1_status.into(),
            Reg::Pm1Enable => s.pm1_enable.into(),
            Reg::Pm1Control => s.pm1_control.into(),
            Reg::Timer => self.width.value(self.clock.now()).into(),
            Reg::Gpe0Status => s.gpe0_status,
            Reg::Gpe0Enable => s.gpe0_enable,
            Reg::SmiEnable => SMI_EN.into(),
            Reg::Other => 0,
        }
    }

    /// Writes the bits of `mask`.
    fn write_reg(&self, s: &mut AcpiPmState, reg: Reg, v: u64, mask: u64) {
        let merged = |old: u64| old & !mask | v & mask;
        match reg {
            // Write one to clear.
            Reg::Pm1Status => s.pm1_status &= !((v & mask) as u16),
            Reg::Gpe0Status => s.gpe0_status &= !(v & mask),
            Reg::Pm1Enable => s.pm1_enable = merged(s.pm1_enable.into()) as u16 & ENABLES,
            Reg::Gpe0Enable => s.gpe0_enable = merged(s.gpe0_enable),
            Reg::Pm1Control => {
                let new = merged(s.pm1_control.into()) as u16;
                // SCI_EN belongs to the firmware, that is the SMI command port.
                let sci_en = s.pm1_control & SCI_EN;
                s.pm1_control = new & CNT_WRITABLE & !SCI_EN | sci_en;
                if new & SLP_EN != 0 {
                    self.sleep(s, (new >> 10 & 7) as u8);
                }
            }
            Reg::Timer | Reg::SmiEnable | Reg::Other => {}
        }
    }

    fn sleep(&self, s: &mut AcpiPmState, slp_typ: u8) {
        let refused = match slp_typ {
            SLP_TYP_S5 => return self.power.request(PowerRequest::Off),
            SLP_TYP_S3 => SleepState::S3,
            SLP_TYP_S4 => SleepState::S4,
            t => SleepState::Unknown(t),
        };
        // The guest waits for the wake-up, so it gets one.
        s.pm1_status |= WAK;
        self.power.request(PowerRequest::Refused(refused));
    }

    fn smi_command(&self, v: u8) {
        let mut s = self.lock();
        s.apm_control = v;
        match v {
            ACPI_ENABLE => s.pm1_control |= SCI_EN,
            ACPI_DISABLE => s.pm1_control &= !SCI_EN,
            _ => log::debug!("SMI command {v:#x} means nothing here"),
        }
        self.update(&mut s);
    }
}

impl BusDevice for AcpiPm {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut s = self.lock();
        self.catch_up(&mut s);
        // One look at the timer per access, so that its bytes belong together.
        let mut cached: Option<(Reg, u64)> = None;
        for (i, b) in data.iter_mut().enumerate() {
            let at = offset + i as u64;
            let (start, _, reg) = decode(at);
            let v = match cached {
                Some((r, v)) if r == reg => v,
                _ => self.read_reg(&s, reg),
            };
            cached = Some((reg, v));
            *b = (v >> (8 * (at - start))) as u8;
        }
        self.update(&mut s);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut s = self.lock();
        self.catch_up(&mut s);
        let mut i = 0;
        while i < data.len() {
            let at = offset + i as u64;
            let (start, len, reg) = decode(at);
            let (mut v, mut mask) = (0, 0);
            while i < data.len() && offset + (i as u64) < start + len {
                let shift = 8 * (offset + i as u64 - start);
                v |= u64::from(data[i]) << shift;
                mask |= 0xff << shift;
                i += 1;
            }
            self.write_reg(&mut s, reg, v, mask);
        }
        self.update(&mut s);
    }
}

/// Ports B2h (SMI command) and B3h (scratch).
struct ApmPorts(Arc<AcpiPm>);

impl BusDevice for ApmPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let s = self.0.lock();
        for (i, b) in data.iter_mut().enumerate() {
            let first = (offset + i as u64) & 1 == 0;
            *b = if first { s.apm_control } else { s.apm_status };
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        // The status byte first: a word written to B2h passes it to the handler.
        for (i, &v) in data.iter().enumerate().rev() {
            if (offset + i as u64) & 1 == 0 {
                self.0.smi_command(v);
            } else {
                self.0.lock().apm_status = v;
            }
        }
    }
}

impl Stateful for AcpiPm {
    type State = AcpiPmState;
    const KIND: &'static str = "acpi-pm";
    const VERSION: u32 = 1;

    fn state(&self) -> AcpiPmState {
        *self.lock()
    }

    fn restore(&self, new: &AcpiPmState) -> Result<(), RestoreError> {
        let mut s = self.lock();
        *s = *new;
        self.sci.import_level(s.sci());
        self.update(&mut s);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::testing::Recorder;
    use crate::testing::{Levels, run_at};

    fn rig(acpi_mode: bool) -> (Arc<Clock>, Arc<AcpiPm>, Arc<Levels>, Arc<Recorder>) {
        let clock = Clock::new();
        let irq = Arc::new(Levels::default());
        let power = Arc::new(Recorder::default());
        let line = IrqLine::new(irq.clone(), SCI_IRQ);
        let pm = AcpiPm::new(&clock, line, power.clone(), PmTimerWidth::Bits24, acpi_mode);
        (clock, pm, irq, power)
    }
    fn r16(p: &AcpiPm, r: u64) -> u16 {
        let mut b = [0; 2];
        p.read(r, &mut b);
        u16::from_le_bytes(b)
    }
    fn w16(p: &AcpiPm, r: u64, v: u16) {
        p.write(r, &v.to_le_bytes());
    }

    #[test]
    fn acpi_mode_by_smi_command() {
        let (_, p, _, _) = rig(false);
        assert_eq!(r16(&p, 4), 0);
        w16(&p, 4, 1);
        assert_eq!(r16(&p, 4), 0, "the OS cannot set it itself");
        p.apm().write(0, &[ACPI_ENABLE, 0x77]);
        assert_eq!(r16(&p, 4), 1);
        let mut b = [0; 2];
        p.apm().read(0, &mut b);
        assert_eq!(b, [2, 0x77]);
        p.apm().write(0, &[ACPI_DISABLE]);
        assert_eq!(r16(&p, 4), 0);
        assert_eq!(r16(&rig(true).1, 4), 1);
    }

    #[test]
    fn power_button_is_a_level_sci() {
        let (_, p, irq, _) = rig(true);
        p.press_power_button();
        assert!(!irq.level(9));
        p.write(0, &[0, 0, 0x20, 0x01]);
        assert!(irq.level(9));
        assert_eq!(r16(&p, 0), 0x100);
        w16(&p, 0, 0x100);
        assert!(!irq.level(9));
        p.write(0x28, &[2]);
        p.raise_gpe(1);
        assert!(irq.level(9));
        p.write(0x20, &[2]);
        assert!(!irq.level(9));
    }

    #[test]
    fn sleep_states() {
        let (_, p, _, power) = rig(true);
        w16(&p, 4, 1 << 10 | SLP_EN);
        assert_eq!(r16(&p, 0) & WAK, WAK, "a refused sleep wakes at once");
        w16(&p, 4, SLP_EN);
        assert_eq!(
            *power.0.lock().unwrap(),
            [PowerRequest::Refused(SleepState::S3), PowerRequest::Off]
        );
        assert_eq!(r16(&p, 4) & SLP_EN, 0);
    }

    #[test]
    fn timer_overflow() {
        let (clock, p, irq, _) = rig(true);
        w16(&p, 2, 1);
        let half = PmTimerWidth::Bits24.time_of_change(1);
        run_at(&clock, half - 500_000_000);
        assert!(!irq.level(9));
        run_at(&clock, half);
        assert!(irq.level(9));
        let mut b = [0; 4];
        p.read(8, &mut b);
        assert_eq!(u32::from_le_bytes(b), 1 << 23);
        w16(&p, 0, 1);
        assert!(!irq.level(9));
        assert_eq!(clock.next_deadline(), Some(PmTimerWidth::Bits24.time_of_change(2)));
        let s = p.state();
        let (c2, q, _, _) = rig(true);
        c2.set(half);
        q.restore(&s).unwrap();
        assert_eq!(q.state(), s);
    }
}
