//! The caches that every built model tells of: one small server core's, so that guests on different
//! hosts see the same.

use super::super::cpuid::{CpuidTable, Regs};
use super::Topology;

struct Cache {
    level: u32,
    /// 1 data, 2 instruction, 3 unified.
    kind: u32,
    ways: u32,
    sets: u32,
    /// Shared by a whole socket, not only by a core's threads.
    socket: bool,
}

const LINE: u32 = 64;

const CACHES: [Cache; 4] = [
    Cache { level: 1, kind: 1, ways: 8, sets: 64, socket: false },
    Cache { level: 1, kind: 2, ways: 8, sets: 64, socket: false },
    Cache { level: 2, kind: 3, ways: 8, sets: 1024, socket: false },
    Cache { level: 3, kind: 3, ways: 16, sets: 16384, socket: true },
];

impl Cache {
    fn kib(&self) -> u32 {
        self.ways * self.sets * LINE / 1024
    }
    /// The answer of leaf 4 (Intel) and of leaf 8000_001Dh (AMD), but for the Intel core count.
    fn regs(&self, topo: &Topology) -> Regs {
        let ids = 1 << if self.socket { topo.socket_shift() } else { topo.thread_bits() };
        let self_initialising = 1 << 8;
        Regs {
            eax: self.kind | self.level << 5 | self_initialising | (ids - 1) << 14,
            ebx: (LINE - 1) | (self.ways - 1) << 22,
            ecx: self.sets - 1,
            edx: 0,
        }
    }
}

/// Intel: leaf 2 says "see leaf 4" (descriptor FFh), leaf 4 describes the caches.
pub(super) fn intel(t: &mut CpuidTable, topo: &Topology) {
    t.set(2, Regs { eax: 0x00ff_0001, ..Regs::default() });
    let cores = (1 << (topo.socket_shift() - topo.thread_bits())) - 1;
    for (i, c) in CACHES.iter().enumerate() {
        let mut r = c.regs(topo);
        r.eax |= cores << 26;
        t.set_sub(4, i as u32, r);
    }
    t.set_sub(4, CACHES.len() as u32, Regs::default());
    let l2 = &CACHES[2];
    t.set(0x8000_0006, Regs { ecx: l2.kib() << 16 | 6 << 12 | LINE, ..Regs::default() });
}

/// AMD: leaves 8000_0005h, 8000_0006h and, with TOPOEXT, 8000_001Dh.
pub(super) fn amd(t: &mut CpuidTable, topo: &Topology, topoext: bool) {
    let l1 = |c: &Cache| c.kib() << 24 | c.ways << 16 | 1 << 8 | LINE;
    // TLBs: fully associative (FFh), 64 entries for 4 KiB and 64 for large pages.
    let tlb = 0xff40_ff40;
    t.set(0x8000_0005, Regs { eax: tlb, ebx: tlb, ecx: l1(&CACHES[0]), edx: l1(&CACHES[1]) });
    // Associativity codes of 8000_0006h (APM vol. 3 table E-4): 6 = 8 ways, 8 = 16 ways; L2 TLB
    // 4 = 4 ways, 512 entries.
    let l2 = CACHES[2].kib() << 16 | 6 << 12 | 1 << 8 | LINE;
    let l3 = (CACHES[3].kib() / 512) << 18 | 8 << 12 | 1 << 8 | LINE;
    t.set(0x8000_0006, Regs { eax: 0x4200_4200, ebx: 0x4200_4200, ecx: l2, edx: l3 });
    if topoext {
        for (i, c) in CACHES.iter().enumerate() {
            t.set_sub(0x8000_001d, i as u32, c.regs(topo));
        }
        t.set_sub(0x8000_001d, CACHES.len() as u32, Regs::default());
    }
}
