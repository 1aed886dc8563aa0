//! Guest memory as memslots.

use crate::error::failed;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use std::sync::{Arc, Mutex};
use tandem_accel::memory::{MemoryListener, PAGE_BITS, Region, RegionKind};
use tandem_accel::{Error, Result};

/// A slot and the memory behind it, which must live as long as the slot does.
struct Slot {
    id: u32,
    region: Region,
    logging: bool,
}

#[derive(Default)]
struct Table {
    slots: Vec<Slot>,
    /// The first failure that nobody has asked about yet.
    failure: Option<Error>,
}

/// The memslots of a VM. They follow the guest memory map.
pub(crate) struct Memslots {
    vm: Arc<VmFd>,
    /// Number of slots that the kernel has.
    limit: u32,
    table: Mutex<Table>,
}

impl Memslots {
    pub fn new(vm: Arc<VmFd>, limit: u32) -> Memslots {
        Memslots { vm, limit, table: Mutex::default() }
    }

    /// The first failure since the last call, if any.
    pub fn take_failure(&self) -> Result<()> {
        self.table.lock().unwrap().failure.take().map_or(Ok(()), Err)
    }

    fn set(&self, slot: &Slot, present: bool) -> Result<()> {
        let r = &slot.region;
        let mut flags = 0;
        if r.kind == RegionKind::Rom {
            flags |= KVM_MEM_READONLY;
        }
        if slot.logging {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        let kernel = kvm_userspace_memory_region {
            slot: slot.id,
            flags,
            guest_phys_addr: r.gpa,
            memory_size: if present { r.len() } else { 0 },
            userspace_addr: r.host_addr() as u64,
        };
        // SAFETY: the host range is the region's own mapping, which the table's copy of the region
        // keeps mapped until the slot is deleted; nobody holds references into guest memory.
        unsafe { self.vm.set_user_memory_region(kernel) }.map_err(|e| {
            let verb = if present { "map" } else { "unmap" };
            failed(
                &format!("{verb} guest memory {} ({:#x} bytes at {:#x})", r.name, r.len(), r.gpa),
                "KVM_SET_USER_MEMORY_REGION",
                e,
            )
        })
    }

    fn add(&self, t: &mut Table, region: &Region) -> Result<()> {
        let id =
            (0..self.limit).find(|id| t.slots.iter().all(|s| s.id != *id)).ok_or_else(|| {
                Error::new(format!(
                    "cannot map guest memory {}: all {} memory slots of KVM are in use",
                    region.name, self.limit
                ))
            })?;
        let slot = Slot { id, region: region.clone(), logging: false };
        self.set(&slot, true)?;
        t.slots.push(slot);
        Ok(())
    }

    /// Turns the kernel's dirty log on for the regions whose [`PageBits`] log, and off for others.
    ///
    /// [`PageBits`]: tandem_accel::memory::PageBits
    pub fn follow_logging(&self) -> Result<()> {
        let mut t = self.table.lock().unwrap();
        for slot in &mut t.slots {
            let want = slot.region.kind == RegionKind::Ram && slot.region.bits().logging();
            if want != slot.logging {
                slot.logging = want;
                self.set(slot, true)?;
            }
        }
        Ok(())
    }

    /// Moves what vCPUs have written since the last call from the kernel's log into the regions'
    /// page bits.
    pub fn collect_dirty(&self) -> Result<()> {
        let t = self.table.lock().unwrap();
        for slot in t.slots.iter().filter(|s| s.logging) {
            let len = usize::try_from(slot.region.len()).unwrap_or(usize::MAX);
            let words = self.vm.get_dirty_log(slot.id, len).map_err(|e| {
                failed(
                    &format!("read the dirty log of {}", slot.region.name),
                    "KVM_GET_DIRTY_LOG",
                    e,
                )
            })?;
            let page = 1usize << PAGE_BITS;
            for (i, word) in words.into_iter().enumerate() {
                let mut left = word;
                while left != 0 {
                    let n = i * 64 + left.trailing_zeros() as usize;
                    slot.region.bits().mark_quiet(n * page, page);
                    left &= left - 1;
                }
            }
        }
        Ok(())
    }
}

impl MemoryListener for Memslots {
    fn added(&self, region: &Region) {
        let mut t = self.table.lock().unwrap();
        if let Err(e) = self.add(&mut t, region) {
            log::error!("{e}");
            t.failure.get_or_insert(e);
        }
    }

    fn removed(&self, region: &Region) {
        let mut t = self.table.lock().unwrap();
        let Some(i) = t.slots.iter().position(|s| s.region.gpa == region.gpa) else { return };
        match self.set(&t.slots[i], false) {
            // Only now may the memory go: the kernel has let go of it.
            Ok(()) => drop(t.slots.swap_remove(i)),
            Err(e) => {
                log::error!("{e}");
                t.failure.get_or_insert(e);
            }
        }
    }
}
