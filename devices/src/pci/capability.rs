//! Capabilities of a function, as typed contents of its capability list.

/// One entry of the capability list.
pub trait Capability {
    /// Capability ID (PCI Code and ID Assignment §2).
    fn id(&self) -> u8;
    /// The bytes after ID and next pointer.
    fn body(&self) -> Vec<u8>;
    /// Mask of the bits of [`Capability::body`] that software may write; same length.
    fn writable(&self) -> Vec<u8>;
}

/// Vendor-specific (ID 9): the body holds its own length byte first.
pub struct Vendor {
    /// Bytes after the header.
    pub body: Vec<u8>,
    /// Writable bits of them.
    pub writable: Vec<u8>,
}

impl Capability for Vendor {
    fn id(&self) -> u8 {
        0x09
    }
    fn body(&self) -> Vec<u8> {
        self.body.clone()
    }
    fn writable(&self) -> Vec<u8> {
        let mut w = self.writable.clone();
        w.resize(self.body.len(), 0);
        w
    }
}

/// Power management 1.2 (ID 1) with states D0 and D3hot and no PME.
pub struct PowerManagement;

impl Capability for PowerManagement {
    fn id(&self) -> u8 {
        0x01
    }
    fn body(&self) -> Vec<u8> {
        // PMC: version 3. PMCSR: No_Soft_Reset, so that going to D3hot and back keeps the state.
        vec![0x03, 0x00, 0x08, 0x00, 0x00, 0x00]
    }
    fn writable(&self) -> Vec<u8> {
        vec![0, 0, 0x03, 0, 0, 0]
    }
}

/// What a function is on PCI Express (PCIe 5.0 §7.5.3.2, Device/Port Type).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExpressType {
    /// Behind a port.
    Endpoint = 0,
    /// A root port.
    RootPort = 4,
    /// Directly on the root bus.
    RootComplexEndpoint = 9,
}

/// PCI Express (ID 10h), version 2.
pub struct Express {
    /// Kind of function.
    pub kind: ExpressType,
}

impl Capability for Express {
    fn id(&self) -> u8 {
        0x10
    }
    fn body(&self) -> Vec<u8> {
        let mut b = vec![0; 0x3a];
        b[0] = 2 | (self.kind as u8) << 4;
        // Device capabilities: role-based error reporting, 128-byte payload; device control: none.
        b[2..6].copy_from_slice(&(1u32 << 15).to_le_bytes());
        if self.kind != ExpressType::RootComplexEndpoint {
            // Link capabilities and status: 2.5 GT/s, one lane, so that tools show a sane link.
            b[0x0a..0x0e].copy_from_slice(&0x11u32.to_le_bytes());
            b[0x10..0x12].copy_from_slice(&0x11u16.to_le_bytes());
        }
        b
    }
    fn writable(&self) -> Vec<u8> {
        let mut w = vec![0; 0x3a];
        // Device control: error reporting enables, payload and read request size, tags, snoop.
        w[6..8].copy_from_slice(&0x7fffu16.to_le_bytes());
        w
    }
}
