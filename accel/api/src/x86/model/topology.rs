//! How logical processors, cores and sockets are numbered, and what CPUID tells about it.

use super::super::cpuid::{CpuidTable, Regs};
use crate::{Error, Result};

/// Sockets × cores × threads. APIC IDs are built from bit fields (SDM vol. 3 §9.9.1), so that they
/// have gaps if a count is not a power of two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Topology {
    sockets: u32,
    cores: u32,
    threads: u32,
}

fn bits_for(n: u32) -> u32 {
    n.next_power_of_two().trailing_zeros()
}

impl Topology {
    /// `sockets` packages of `cores` cores of `threads` hardware threads.
    ///
    /// # Errors
    /// If a count is 0 or APIC IDs would reach 255, xAPIC's broadcast ID.
    pub fn new(sockets: u32, cores: u32, threads: u32) -> Result<Topology> {
        if [sockets, cores, threads].contains(&0) {
            return Err(Error::new("a CPU topology needs at least one socket, core and thread"));
        }
        let t = Topology { sockets, cores, threads };
        let fits = [sockets, cores, threads].iter().all(|&n| n <= 255)
            && t.apic_id(sockets * cores * threads - 1) < 255;
        if !fits {
            return Err(Error::new(format!(
                "{sockets} sockets of {cores} cores of {threads} threads do not fit 8-bit APIC IDs"
            ))
            .remedy("use fewer vCPUs, at most 255"));
        }
        Ok(t)
    }
    /// One socket of `vcpus` single-threaded cores.
    ///
    /// # Errors
    /// As [`Topology::new`].
    pub fn cores(vcpus: u32) -> Result<Topology> {
        Topology::new(1, vcpus, 1)
    }
    /// Number of logical processors.
    pub fn count(&self) -> u32 {
        self.sockets * self.cores * self.threads
    }
    /// Logical processors per socket.
    pub(super) fn per_socket(&self) -> u32 {
        self.cores * self.threads
    }
    /// Threads per core.
    pub(super) fn threads(&self) -> u32 {
        self.threads
    }
    /// Width of the thread field of an APIC ID.
    pub(super) fn thread_bits(&self) -> u32 {
        bits_for(self.threads)
    }
    /// Width of the core and thread fields together.
    pub(super) fn socket_shift(&self) -> u32 {
        bits_for(self.threads) + bits_for(self.cores)
    }
    /// APIC ID of vCPU `index`; threads count fastest, sockets slowest.
    pub fn apic_id(&self, index: u32) -> u32 {
        let thread = index % self.threads;
        let core = index / self.threads % self.cores;
        let socket = index / self.per_socket();
        socket << self.socket_shift() | core << self.thread_bits() | thread
    }

    /// The extended topology enumeration of `leaf` (Bh or 1Fh, SDM vol. 2A), for APIC ID 0.
    pub(super) fn extended(&self, t: &mut CpuidTable, leaf: u32) {
        const SMT: u32 = 1 << 8;
        const CORE: u32 = 2 << 8;
        let level = |eax, ebx, ecx| Regs { eax, ebx, ecx, edx: 0 };
        t.set_sub(leaf, 0, level(self.thread_bits(), self.threads, SMT));
        t.set_sub(leaf, 1, level(self.socket_shift(), self.per_socket(), 1 | CORE));
        t.set_sub(leaf, 2, level(0, 0, 2));
    }
}

impl CpuidTable {
    /// The table of the vCPU with this APIC ID: a copy of a built table whose per-processor fields
    /// (initial APIC ID in leaves 1, Bh, 1Fh; compute unit and node in 8000_001Eh) are filled in.
    pub fn for_apic_id(&self, apic_id: u32) -> CpuidTable {
        let mut t = self.clone();
        if let Some(r) = t.get_mut(1, 0) {
            r.ebx = r.ebx & 0x00ff_ffff | (apic_id & 0xff) << 24;
        }
        for leaf in [0xb, 0x1f] {
            for sub in 0..3 {
                if let Some(r) = t.get_mut(leaf, sub) {
                    r.edx = apic_id;
                }
            }
        }
        let shift = |sub| self.query(0xb, sub).eax & 0x1f;
        let (thread_bits, socket_shift) = (shift(0), shift(1));
        if let Some(r) = t.get_mut(0x8000_001e, 0) {
            let core = (apic_id & ((1 << socket_shift) - 1)) >> thread_bits;
            r.eax = apic_id;
            r.ebx = r.ebx & !0xff | core & 0xff;
            r.ecx = r.ecx & !0xff | (apic_id >> socket_shift) & 0xff;
        }
        t
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apic_ids_are_bit_fields() {
        let t = Topology::new(2, 3, 2).unwrap();
        let ids: Vec<_> = (0..t.count()).map(|i| t.apic_id(i)).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
    }

    #[test]
    fn too_many_or_none_is_refused() {
        assert!(Topology::new(1, 0, 1).is_err());
        assert!(Topology::cores(255).is_ok());
        assert!(Topology::cores(256).is_err());
        assert!(Topology::new(3, 65, 1).is_err());
        assert!(Topology::new(u32::MAX, u32::MAX, 2).is_err());
    }
}
