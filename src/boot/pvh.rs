//! ELF kernels by the PVH boot protocol (Xen documentation, misc/pvh): 32-bit protected mode, EBX =
//! hvm_start_info. Linux's uncompressed `vmlinux` is one.

use super::elf::Elf;
use super::layout::{self, START_INFO, Strings};
use super::{Board, Image, Result, does_not_fit, entry, place_high};
use crate::config::Fault;
use crate::machine::memmap::{MemoryMap, ONE_MIB};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use tandem_accel::memory::GuestRam;
use tandem_accel::x86::X86State;
use vm_memory::ByteValued;

/// Version of hvm_start_info that carries a memory map.
const VERSION: u32 = 1;

/// Where everything goes.
#[derive(Debug)]
pub struct Plan {
    kernel: Image,
    elf: Elf,
    entry: u32,
    initrd: Option<(Image, u64)>,
    cmdline: String,
}

impl Plan {
    /// Checks the kernel and places its RAM disk.
    pub fn new(
        kernel: Image,
        initrd: Option<Image>,
        cmdline: &str,
        map: &MemoryMap,
    ) -> Result<Plan, Fault> {
        let elf = Elf::read(&kernel.file, &format!("kernel '{}'", kernel.name))?;
        let Some(entry) = elf.pvh_entry else {
            return Err(Fault::new(
                format!("ELF file '{}' has neither a PVH nor a multiboot entry point", kernel.name),
                "use a kernel built with CONFIG_PVH, or its bzImage",
            ));
        };
        check_fits(&kernel, &elf, map)?;
        let initrd = match initrd {
            None => None,
            Some(image) => match place_high(image.len, elf.end(), map.low_end) {
                Some(at) => Some((image, at)),
                None => return Err(does_not_fit("initrd", &image, map.low_end - elf.end())),
            },
        };
        Ok(Plan { kernel, elf, entry, initrd, cmdline: cmdline.into() })
    }

    /// Loads everything.
    pub fn load(&self, ram: &GuestRam, board: &Board) -> Result<X86State> {
        self.elf.load(&self.kernel.file, &self.kernel.name, ram)?;
        let mut strings = Strings::new(ram);
        let mut info = hvm_start_info {
            magic: XEN_HVM_START_MAGIC_VALUE,
            version: VERSION,
            cmdline_paddr: strings.string("the kernel command line", &self.cmdline)?,
            rsdp_paddr: board.rsdp,
            memmap_entries: board.e820.len() as u32,
            ..hvm_start_info::default()
        };
        let mut map = Vec::new();
        for e in &board.e820 {
            let (addr, size, type_) = (e.start, e.len, e.kind as u32);
            let entry = hvm_memmap_table_entry { addr, size, type_, reserved: 0 };
            map.extend_from_slice(entry.as_slice());
        }
        info.memmap_paddr = strings.bytes("the memory map", &map)?;
        if let Some((image, at)) = &self.initrd {
            image.load(ram, *at)?;
            let module =
                hvm_modlist_entry { paddr: *at, size: image.len, cmdline_paddr: 0, reserved: 0 };
            info.nr_modules = 1;
            info.modlist_paddr = strings.bytes("the module list", module.as_slice())?;
        }
        layout::write(ram, "hvm_start_info", START_INFO, info.as_slice())?;
        entry::protected_mode(ram, self.entry, 0, START_INFO as u32)
    }
}

/// Whether all segments lie in RAM that boot structures leave alone.
pub(super) fn check_fits(kernel: &Image, elf: &Elf, map: &MemoryMap) -> Result<(), Fault> {
    if elf.end() > map.low_end {
        return Err(Fault::new(
            format!(
                "kernel '{}' occupies memory up to {} MiB",
                kernel.name,
                elf.end().div_ceil(1 << 20)
            ),
            format!("give the guest at least -m {}", elf.end().div_ceil(1 << 20) + 8),
        ));
    }
    if let Some(s) = elf.segments.iter().find(|s| s.paddr < ONE_MIB) {
        return Err(Fault::new(
            format!("kernel '{}' wants to be loaded at {:#x}", kernel.name, s.paddr),
            "link it at 1 MiB or above; what lies below belongs to the boot protocol",
        ));
    }
    Ok(())
}
