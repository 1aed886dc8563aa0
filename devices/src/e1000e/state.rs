//! The registers, and what reading and writing them does.

use super::parts::{mdic, phy};
use super::reg::{self, cause};
use super::tx::Transmit;
use serde::{Deserialize, Serialize};
use tandem_backends::net::MacAddr;

/// Words of the registers.
const WORDS: usize = (reg::LEN / 4) as usize;
/// EERD: start, done.
const EERD_START: u32 = 1;
const EERD_DONE: u32 = 2;

/// Registers and what is on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    words: Vec<u32>,
    phy: [u16; 32],
    /// A frame that is being put together.
    pub transmit: Transmit,
    /// Causes that are yet to be raised.
    pub pending: u32,
    /// Causes for which a message was sent and that are still there.
    told: u32,
}

/// What a write asks of others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// There may be frames to be sent, or room for some.
    pub network: bool,
}

impl State {
    /// As after power-on, with this address.
    pub fn new(mac: MacAddr) -> State {
        let mut s = State {
            words: vec![0; WORDS],
            phy: phy(),
            transmit: Transmit::default(),
            pending: 0,
            told: 0,
        };
        s.set(reg::CTRL, 0x0014_0201);
        s.set(reg::EECD, reg::EECD_PRESENT);
        s.set(reg::EEMNGCTL, reg::EEMNGCTL_DONE);
        s.set(reg::VET, 0x8100);
        s.set(reg::RXCSUM, reg::RXCSUM_IP | reg::RXCSUM_TCP);
        s.set(reg::PSRCTL, 0x0004_0402);
        let [a, b, c, d, e, f] = mac.0;
        s.set(reg::RA, u32::from_le_bytes([a, b, c, d]));
        s.set(reg::RA + 4, u32::from(u16::from_le_bytes([e, f])) | reg::RAH_VALID);
        s
    }

    /// Whether it fits, for what comes from outside.
    pub fn sound(&self) -> bool {
        self.words.len() == WORDS
    }

    /// The word at `at`, as it is; 0 beyond the end.
    pub fn get(&self, at: u64) -> u32 {
        usize::try_from(at / 4).ok().and_then(|i| self.words.get(i)).copied().unwrap_or(0)
    }

    /// Sets the word at `at`.
    pub fn set(&mut self, at: u64, value: u32) {
        if let Some(w) = usize::try_from(at / 4).ok().and_then(|i| self.words.get_mut(i)) {
            *w = value;
        }
    }

    /// Counts a packet of `len` bytes.
    pub fn count(&mut self, packets: u64, octets: u64, len: usize) {
        let n = self.get(packets).saturating_add(1);
        self.set(packets, n);
        let all = u64::from(self.get(octets)) | u64::from(self.get(octets + 4)) << 32;
        let all = all.saturating_add(len as u64);
        self.set(octets, all as u32);
        self.set(octets + 4, (all >> 32) as u32);
    }

    /// Raises what is pending.
    pub fn raise(&mut self) {
        let mut new = std::mem::take(&mut self.pending);
        if new & cause::OTHERS != 0 {
            new |= cause::OTHER;
        }
        self.set(reg::ICR, self.get(reg::ICR) | new);
    }

    /// Causes that are there and not masked.
    pub fn unmasked(&self) -> u32 {
        self.get(reg::ICR) & self.get(reg::IMS) & !cause::ASSERTED
    }

    /// The vectors whose messages are due. Causes that a message clears by itself are cleared.
    pub fn due(&mut self) -> [Option<u16>; 5] {
        const KINDS: [(u32, u32); 5] = [
            (cause::RXQ0, 0),
            (cause::RXQ1, 4),
            (cause::TXQ0, 8),
            (cause::TXQ1, 12),
            (cause::OTHER, 16),
        ];
        let mut vectors = [None; 5];
        let shown = self.unmasked();
        self.told &= shown;
        let ivar = self.get(reg::IVAR);
        for (slot, (bit, shift)) in vectors.iter_mut().zip(KINDS) {
            let entry = ivar >> shift;
            if shown & !self.told & bit == 0 || entry & 8 == 0 {
                continue;
            }
            *slot = Some((entry & 7) as u16);
            self.told |= bit;
            if self.get(reg::EIAC) & bit != 0 {
                self.set(reg::ICR, self.get(reg::ICR) & !bit);
                self.told &= !bit;
                if self.get(reg::CTRL_EXT) & reg::CTRL_EXT_EIAME != 0 {
                    self.set(reg::IMS, self.get(reg::IMS) & !bit);
                }
            }
        }
        vectors
    }

    /// What software reads at `at`, a multiple of 4.
    pub fn read(&mut self, at: u64) -> u32 {
        let value = self.get(at);
        match at {
            reg::STATUS => {
                let master = self.get(reg::CTRL) & reg::CTRL_MASTER_DISABLE == 0;
                reg::STATUS_LINK | if master { reg::STATUS_MASTER } else { 0 }
            }
            reg::ICR => {
                let asserted = self.unmasked() != 0;
                let shown = value & !cause::ASSERTED;
                if asserted || self.get(reg::IMS) == 0 {
                    self.set(reg::ICR, 0);
                }
                if asserted && self.get(reg::CTRL_EXT) & reg::CTRL_EXT_IAME != 0 {
                    self.set(reg::IMS, self.get(reg::IMS) & !self.get(reg::IAM));
                }
                shown | if asserted { cause::ASSERTED } else { 0 }
            }
            _ if reg::STATISTICS.contains(&at) => {
                self.set(at, 0);
                value
            }
            reg::IMC | reg::ICS => 0,
            _ => value,
        }
    }

    /// Writes the word at `at`, a multiple of 4. `eeprom` are the EEPROM's words; `mac` is the
    /// address that a reset brings back.
    pub fn write(&mut self, at: u64, value: u32, eeprom: &[u16], mac: MacAddr) -> Asked {
        match at {
            reg::CTRL => {
                if value & reg::CTRL_RESET != 0 {
                    // The PHY is what it was.
                    let phy = self.phy;
                    *self = State { phy, ..State::new(mac) };
                    return Asked::default();
                }
                let linked = !self.get(at) & value & reg::CTRL_LINK != 0;
                if value & reg::CTRL_PHY_RESET != 0 {
                    self.phy = phy();
                }
                self.set(at, value & !reg::CTRL_PHY_RESET);
                self.pending |= if linked { cause::LSC } else { 0 };
            }
            reg::EECD => {
                let granted = value & reg::EECD_REQUEST != 0;
                let grant = if granted { reg::EECD_GRANT } else { 0 };
                self.set(at, value & 0x7f | grant | reg::EECD_PRESENT);
            }
            reg::EERD if value & EERD_START != 0 => {
                let word = eeprom.get((value >> 2 & 0x3fff) as usize).copied().unwrap_or(0);
                self.set(at, value & 0xfffc | EERD_DONE | u32::from(word) << 16);
            }
            reg::MDIC => {
                let (now, anew) = mdic(&mut self.phy, value);
                self.set(at, now);
                self.pending |= if anew { cause::LSC } else { 0 };
            }
            reg::ICR => self.set(at, self.get(at) & !value),
            reg::ICS => self.set(reg::ICR, self.get(reg::ICR) | value & !cause::ASSERTED),
            reg::IMS => self.set(at, self.get(at) | value),
            reg::IMC => self.set(reg::IMS, self.get(reg::IMS) & !value),
            reg::STATUS | reg::EEMNGCTL => {}
            _ if reg::STATISTICS.contains(&at) => {}
            reg::RDT | reg::TDT | reg::RDH | reg::TDH => {
                self.set(at, value & 0xffff);
                return Asked { network: true };
            }
            reg::RCTL | reg::TCTL => {
                self.set(at, value);
                return Asked { network: true };
            }
            _ => self.set(at, value),
        }
        Asked::default()
    }
}
