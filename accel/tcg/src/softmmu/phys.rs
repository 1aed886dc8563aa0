//! Guest physical memory as the translator reaches it: a flat list of RAM and ROM, everything else
//! is I/O.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use tandem_accel::memory::{PageBits, Region, RegionKind};

/// One directly accessible piece of guest physical memory.
#[derive(Clone, Debug)]
pub struct Ram {
    /// First guest physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Host address of the first byte. The memory stays mapped while the machine lives.
    pub host: usize,
    /// Guest writes go to the bus.
    pub rom: bool,
    /// Dirty and watch bits.
    pub bits: PageBits,
}

/// The current list; follows the machine's memory map.
#[derive(Default)]
pub struct PhysMap {
    list: RwLock<Arc<[Ram]>>,
    generation: AtomicU64,
}

impl PhysMap {
    /// The list as it is now, with the generation to notice changes by.
    pub fn snapshot(&self) -> (Arc<[Ram]>, u64) {
        let list = self.list.read().unwrap();
        (list.clone(), self.generation())
    }
    /// Increases with every change.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }
    /// What lies behind the addresses has changed.
    pub fn changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }
    fn change(&self, f: impl FnOnce(&mut Vec<Ram>)) {
        let mut list = self.list.write().unwrap();
        let mut v = list.to_vec();
        f(&mut v);
        v.sort_by_key(|r| r.gpa);
        *list = v.into();
        self.generation.fetch_add(1, Ordering::AcqRel);
    }
}

impl PhysMap {
    /// A region appeared.
    pub fn add(&self, r: &Region) {
        self.change(|v| {
            v.push(Ram {
                gpa: r.gpa,
                len: r.len(),
                host: r.host_addr() as usize,
                rom: r.kind == RegionKind::Rom,
                bits: r.bits().clone(),
            })
        });
    }
    /// A region has gone.
    pub fn remove(&self, r: &Region) {
        self.change(|v| v.retain(|x| x.gpa != r.gpa));
    }
}

/// The region at `gpa` in a list sorted by address.
#[inline]
pub fn find(list: &[Ram], gpa: u64) -> Option<&Ram> {
    // A handful of regions: a PC has low RAM, ROMs, RAM below and above 4 GiB. A walk in order is
    // shorter than a search, and goes the same way nearly every time.
    list.iter().find(|r| gpa.wrapping_sub(r.gpa) < r.len)
}
