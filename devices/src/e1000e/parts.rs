//! The EEPROM and the PHY.

use tandem_backends::net::MacAddr;

/// Words of the EEPROM.
const WORDS: usize = 64;
/// What all words add up to (datasheet §6.1.2.3).
const SUM: u16 = 0xbaba;

/// The EEPROM of a card with this address.
pub fn eeprom(mac: MacAddr) -> [u16; WORDS] {
    let mut words = [0; WORDS];
    for (w, b) in words.iter_mut().zip(mac.0.chunks_exact(2)) {
        *w = u16::from_le_bytes([b[0], b[1]]);
    }
    // Initialization control 1, subsystem, its vendor, device (§6.1.1).
    (words[0x0a], words[0x0b], words[0x0c], words[0x0d]) = (0x026b, 0, 0x8086, 0x10d3);
    let sum = words.iter().fold(0u16, |s, w| s.wrapping_add(*w));
    words[WORDS - 1] = SUM.wrapping_sub(sum);
    words
}

/// MDIC: which register, of which PHY; read; done; there is none.
const OP_WRITE: u32 = 1;
const READY: u32 = 1 << 28;
const ERROR: u32 = 1 << 30;
/// The address of the only PHY.
const PHY: u32 = 1;

/// Control: reset, restart of the negotiation; both are done at once.
const CONTROL_AT_ONCE: u16 = 1 << 15 | 1 << 9;

/// Registers of the PHY, as after a negotiation of 1000 Mbit/s (datasheet §10.2.2, IEEE 802.3 §22.2).
pub fn phy() -> [u16; 32] {
    let mut r = [0; 32];
    // Control: negotiation on, full duplex, 1000 Mbit/s. Status: done, link up.
    (r[0], r[1]) = (0x1140, 0x796d);
    // An 82574's identity.
    (r[2], r[3]) = (0x0141, 0x0cb1);
    // What each side can do.
    (r[4], r[5], r[6], r[9], r[10]) = (0x0de1, 0xcde1, 0x000f, 0x0e00, 0x3c00);
    (r[15], r[16], r[17]) = (0x3000, 0x0078, 0xac00);
    r
}

/// Executes what is written to MDIC; returns what it reads as then, and whether the link is
/// negotiated anew.
pub fn mdic(phy: &mut [u16; 32], value: u32) -> (u32, bool) {
    let (at, which, op) = (value >> 16 & 31, value >> 21 & 31, value >> 26 & 3);
    let register = &mut phy[at as usize];
    if which != PHY {
        return (value | READY | ERROR, false);
    }
    if op != OP_WRITE {
        return (value & !0xffff | u32::from(*register) | READY, false);
    }
    let mut anew = false;
    match at {
        // Status, identity, and what the other side says.
        1..=3 | 5 | 6 | 10 | 15 | 17 => {}
        0 => {
            anew = value as u16 & CONTROL_AT_ONCE != 0;
            *register = value as u16 & !CONTROL_AT_ONCE;
        }
        _ => *register = value as u16,
    }
    (value | READY, anew)
}
