//! CPUID as data: a table of leaves.

use std::collections::BTreeMap;

/// EAX, EBX, ECX, EDX of one leaf.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[allow(missing_docs)]
pub struct Regs {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// What CPUID answers: (leaf, subleaf) → registers. A leaf whose answer does not depend on the
/// subleaf is stored under subleaf 0 and marked in `indexed` as absent.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CpuidTable {
    leaves: BTreeMap<(u32, u32), Regs>,
    /// Leaves whose answer depends on ECX.
    indexed: std::collections::BTreeSet<u32>,
}

impl CpuidTable {
    /// Sets a leaf that ignores ECX.
    pub fn set(&mut self, leaf: u32, regs: Regs) {
        self.leaves.insert((leaf, 0), regs);
    }
    /// Sets a subleaf of a leaf that depends on ECX.
    pub fn set_sub(&mut self, leaf: u32, sub: u32, regs: Regs) {
        self.indexed.insert(leaf);
        self.leaves.insert((leaf, sub), regs);
    }
    /// Whether the leaf depends on ECX.
    pub fn is_indexed(&self, leaf: u32) -> bool {
        self.indexed.contains(&leaf)
    }
    /// The stored registers of exactly this leaf and subleaf.
    pub fn get(&self, leaf: u32, sub: u32) -> Option<Regs> {
        let sub = if self.is_indexed(leaf) { sub } else { 0 };
        self.leaves.get(&(leaf, sub)).copied()
    }
    /// Mutable access to a stored leaf.
    pub fn get_mut(&mut self, leaf: u32, sub: u32) -> Option<&mut Regs> {
        let sub = if self.is_indexed(leaf) { sub } else { 0 };
        self.leaves.get_mut(&(leaf, sub))
    }
    /// All entries in order: leaf, subleaf, whether indexed, registers.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32, bool, Regs)> + '_ {
        self.leaves.iter().map(|(&(l, s), &r)| (l, s, self.is_indexed(l), r))
    }
    /// What the CPUID instruction returns (SDM vol. 2, CPUID): a basic leaf above the maximum, and
    /// an unknown extended leaf, answer as the highest basic leaf does on Intel; on AMD zero. We
    /// answer zero for both, as hypervisors do for AMD models.
    pub fn query(&self, leaf: u32, sub: u32) -> Regs {
        self.get(leaf, sub).unwrap_or_default()
    }
}
