//! Configuration space of one function: 4 KiB of registers with write masks (PCI Local Bus 3.0 §6,
//! PCI Express Base 5.0 §7.5).
//!
//! Always: reads and writes outside the space are harmless, and bytes change only where the mask
//! allows.

use super::capability::Capability;

/// Size of the extended configuration space in bytes.
pub const CONFIG_SIZE: usize = 4096;
/// Size of the part that configuration mechanism #1 reaches.
pub const CONVENTIONAL_SIZE: usize = 256;

/// Registers of the common header.
pub mod reg {
    /// Vendor ID, 16 bits.
    pub const VENDOR: u16 = 0x00;
    /// Device ID, 16 bits.
    pub const DEVICE: u16 = 0x02;
    /// Command, 16 bits.
    pub const COMMAND: u16 = 0x04;
    /// Status, 16 bits.
    pub const STATUS: u16 = 0x06;
    /// Revision, then 24 bits of class code.
    pub const REVISION: u16 = 0x08;
    /// Header type; bit 7: several functions.
    pub const HEADER_TYPE: u16 = 0x0e;
    /// First base address register.
    pub const BAR0: u16 = 0x10;
    /// Type 1: secondary bus number (primary before, subordinate after it).
    pub const SECONDARY_BUS: u16 = 0x19;
    /// Type 0: subsystem vendor.
    pub const SUBSYSTEM_VENDOR: u16 = 0x2c;
    /// Type 0: subsystem.
    pub const SUBSYSTEM: u16 = 0x2e;
    /// Type 0: expansion ROM; bit 0 turns it on.
    pub const ROM: u16 = 0x30;
    /// Pointer to the first capability.
    pub const CAPABILITIES: u16 = 0x34;
    /// Interrupt line, written by firmware for operating systems.
    pub const INTERRUPT_LINE: u16 = 0x3c;
    /// Interrupt pin: 0 none, 1–4 INTA–INTD.
    pub const INTERRUPT_PIN: u16 = 0x3d;
    /// Type 1: bridge control.
    pub const BRIDGE_CONTROL: u16 = 0x3e;
}

/// Bits of the command register.
pub mod command {
    /// Respond to I/O accesses.
    pub const IO: u16 = 1 << 0;
    /// Respond to memory accesses.
    pub const MEMORY: u16 = 1 << 1;
    /// May issue memory writes, thus messages.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// Do not drive INTx.
    pub const INTX_DISABLE: u16 = 1 << 10;
    /// What software may set: the above, parity error response, SERR#.
    pub const WRITABLE: u16 = IO | MEMORY | BUS_MASTER | INTX_DISABLE | 1 << 6 | 1 << 8;
}

/// Bits of the status register.
pub mod status {
    /// An INTx is pending.
    pub const INTERRUPT: u16 = 1 << 3;
    /// There is a capability list.
    pub const CAPABILITIES: u16 = 1 << 4;
    /// Error bits, cleared by writing ones.
    pub const ERRORS: u16 = 0xf900;
}

/// There is no room for another capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the PCI capability list is full")]
pub struct CapabilitiesFull;

/// Registers with write masks and reset values.
pub struct ConfigSpace {
    bytes: Box<[u8; CONFIG_SIZE]>,
    /// Bits that software may change.
    writable: Box<[u8; CONFIG_SIZE]>,
    /// Bits that writing a one clears.
    clears: Box<[u8; CONFIG_SIZE]>,
    /// Values that reset restores.
    reset: Box<[u8; CONFIG_SIZE]>,
    /// Offset of the last capability's header, or of [`reg::CAPABILITIES`] less one.
    last_cap: u16,
    /// First byte free for a capability.
    free: u16,
}

impl Default for ConfigSpace {
    fn default() -> Self {
        ConfigSpace {
            bytes: Box::new([0; CONFIG_SIZE]),
            writable: Box::new([0; CONFIG_SIZE]),
            clears: Box::new([0; CONFIG_SIZE]),
            reset: Box::new([0; CONFIG_SIZE]),
            last_cap: reg::CAPABILITIES - 1,
            free: 0x40,
        }
    }
}

impl ConfigSpace {
    fn range(reg: u16, len: usize) -> Option<std::ops::Range<usize>> {
        let start = usize::from(reg);
        let end = start.checked_add(len)?;
        (end <= CONFIG_SIZE).then_some(start..end)
    }

    /// Sets bytes and their reset value, whatever the mask says. Ignored if they do not fit.
    pub fn preset(&mut self, reg: u16, value: &[u8]) {
        if let Some(r) = Self::range(reg, value.len()) {
            self.bytes[r.clone()].copy_from_slice(value);
            self.reset[r].copy_from_slice(value);
        }
    }

    /// Sets the present bytes, whatever the mask says: for read-only registers that the device
    /// changes.
    pub fn poke(&mut self, reg: u16, value: &[u8]) {
        if let Some(r) = Self::range(reg, value.len()) {
            self.bytes[r].copy_from_slice(value);
        }
    }

    /// Lets software write the bits that are set in `mask`.
    pub fn allow(&mut self, reg: u16, mask: &[u8]) {
        if let Some(r) = Self::range(reg, mask.len()) {
            self.writable[r].copy_from_slice(mask);
        }
    }

    /// Lets software clear the bits that are set in `mask` by writing ones.
    pub fn allow_clear(&mut self, reg: u16, mask: &[u8]) {
        if let Some(r) = Self::range(reg, mask.len()) {
            self.clears[r].copy_from_slice(mask);
        }
    }

    /// A byte; 0 outside the space.
    pub fn u8(&self, reg: u16) -> u8 {
        self.bytes.get(usize::from(reg)).copied().unwrap_or(0)
    }
    /// A little-endian word.
    pub fn u16(&self, reg: u16) -> u16 {
        u16::from_le_bytes([self.u8(reg), self.u8(reg.saturating_add(1))])
    }
    /// A little-endian double word.
    pub fn u32(&self, reg: u16) -> u32 {
        u32::from(self.u16(reg)) | u32::from(self.u16(reg.saturating_add(2))) << 16
    }
    /// A little-endian quad word.
    pub fn u64(&self, reg: u16) -> u64 {
        u64::from(self.u32(reg)) | u64::from(self.u32(reg.saturating_add(4))) << 32
    }

    /// Reads as software does; ones outside the space.
    pub fn read(&self, reg: u16, data: &mut [u8]) {
        match Self::range(reg, data.len()) {
            Some(r) => data.copy_from_slice(&self.bytes[r]),
            None => data.fill(0xff),
        }
    }

    /// Writes as software does. Returns whether a bit changed.
    pub fn write(&mut self, reg: u16, data: &[u8]) -> bool {
        let Some(r) = Self::range(reg, data.len()) else { return false };
        let mut changed = false;
        for (i, new) in r.zip(data) {
            let old = self.bytes[i];
            let mask = self.writable[i];
            let v = (old & !mask | new & mask) & !(new & self.clears[i]);
            self.bytes[i] = v;
            changed |= v != old;
        }
        changed
    }

    /// Restores the reset values.
    pub fn reset(&mut self) {
        self.bytes.copy_from_slice(&self.reset[..]);
    }

    /// Appends a capability to the list and returns its offset.
    pub fn add_capability(&mut self, cap: &dyn Capability) -> Result<u16, CapabilitiesFull> {
        let (body, mask) = (cap.body(), cap.writable());
        let at = self.free;
        let end = usize::from(at) + 2 + body.len();
        if end > CONVENTIONAL_SIZE {
            return Err(CapabilitiesFull);
        }
        self.preset(self.last_cap + 1, &[at as u8]);
        self.preset(at, &[cap.id(), 0]);
        self.preset(at + 2, &body);
        self.allow(at + 2, &mask);
        self.last_cap = at;
        self.free = end.next_multiple_of(4) as u16;
        let status = self.u16(reg::STATUS) | status::CAPABILITIES;
        self.preset(reg::STATUS, &status.to_le_bytes());
        Ok(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::capability::Vendor;

    #[test]
    fn masks_govern_writes() {
        let mut c = ConfigSpace::default();
        c.preset(0x40, &[0xf0, 0xff]);
        c.allow(0x40, &[0x0f]);
        c.allow_clear(0x41, &[0x81]);
        assert!(c.write(0x40, &[0xff, 0x01]));
        assert_eq!(c.u16(0x40), 0xfeff);
        assert!(!c.write(0x44, &[0xff]));
        assert!(!c.write(0xfff, &[0, 0]));
        let mut d = [0; 2];
        c.read(0xfff, &mut d);
        assert_eq!(d, [0xff; 2]);
        c.reset();
        assert_eq!(c.u16(0x40), 0xfff0);
    }

    #[test]
    fn capabilities_form_a_list_until_full() {
        let mut c = ConfigSpace::default();
        let a = c.add_capability(&Vendor { body: vec![3; 5], writable: vec![0; 5] }).unwrap();
        let b = c.add_capability(&Vendor { body: vec![4; 2], writable: vec![0xff; 2] }).unwrap();
        assert_eq!((a, b), (0x40, 0x48));
        assert_eq!((c.u8(0x34), c.u8(0x41), c.u8(0x49)), (0x40, 0x48, 0));
        assert_eq!(c.u16(reg::STATUS), status::CAPABILITIES);
        let big = Vendor { body: vec![0; 0xb4], writable: vec![0; 0xb4] };
        assert_eq!(c.add_capability(&big), Err(CapabilitiesFull));
    }
}
