//! Linux bzImage by its 64-bit boot protocol (kernel documentation, arch/x86/boot.rst).
//!
//! The protected-mode part is loaded at its preferred address, the RAM disk as high as the kernel
//! allows, and the processor starts in long mode at the 64-bit entry point with RSI = boot_params.

use super::layout::{self, BOOT_PARAMS, Strings};
use super::{Board, Image, Result, does_not_fit, entry, place_high};
use crate::config::Fault;
use crate::machine::memmap::MemoryMap;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, KernelLoader};
use tandem_accel::Error;
use tandem_accel::memory::GuestRam;
use tandem_accel::x86::X86State;
use vm_memory::{ByteValued, GuestAddress};

/// Where the setup header starts.
const HEADER: usize = 0x1f1;
/// Offset of the 64-bit entry point from where the kernel is loaded.
const ENTRY_64: u64 = 0x200;
/// `type_of_loader` of a loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
const XLF_KERNEL_64: u16 = 1 << 0;
/// Protocol 2.12 introduced the 64-bit entry point (Linux 3.8).
const MIN_VERSION: u16 = 0x20c;

/// Whether the bytes at the start of a file hold a setup header ("HdrS" at 202h).
pub fn is_bzimage(head: &[u8]) -> bool {
    head.get(0x202..0x206) == Some(b"HdrS")
}

/// Where everything goes.
#[derive(Debug)]
pub struct Plan {
    kernel: Image,
    load_at: u64,
    initrd: Option<(Image, u64)>,
    cmdline: String,
}

impl Plan {
    /// Checks the kernel and places it and its RAM disk.
    pub fn new(
        kernel: Image,
        initrd: Option<Image>,
        cmdline: &str,
        map: &MemoryMap,
    ) -> Result<Plan, Fault> {
        let head = kernel.head(HEADER + size_of::<setup_header>());
        let not =
            |why: &str, remedy: &str| Fault::new(format!("kernel '{}' {why}", kernel.name), remedy);
        let mut h = setup_header::default();
        if !is_bzimage(&head) || head.len() < HEADER + size_of::<setup_header>() {
            return Err(not("is not a bzImage", "give a Linux bzImage (vmlinuz)"));
        }
        h.as_mut_slice().copy_from_slice(&head[HEADER..]);
        if { h.version } < MIN_VERSION || h.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(not(
                "has no 64-bit entry point",
                "use a 64-bit kernel, Linux 3.8 or later",
            ));
        }
        let setup_sects = u64::from(if h.setup_sects == 0 { 4 } else { h.setup_sects });
        let payload = kernel.len.checked_sub((setup_sects + 1) * 512);
        if payload.is_none_or(|n| n < ENTRY_64) || u64::from(h.syssize) * 16 > payload.unwrap_or(0)
        {
            return Err(not("is cut short", "fetch or build it again"));
        }
        let max = { h.cmdline_size } as usize;
        if cmdline.len() > max {
            return Err(not(
                &format!("takes at most {max} bytes of command line, not {}", cmdline.len()),
                "shorten --append",
            ));
        }
        // The kernel unpacks itself at its preferred address (CONFIG_PHYSICAL_START), wherever it
        // is loaded below that, and needs init_size bytes there.
        let load_at = h.pref_address;
        let end = load_at.saturating_add(h.init_size.into());
        if end > map.low_end {
            return Err(not(
                &format!("needs {} MiB to unpack itself", end.div_ceil(1 << 20)),
                &format!("give the guest more memory, at least -m {}", end.div_ceil(1 << 20) + 8),
            ));
        }
        let initrd = match initrd {
            None => None,
            Some(image) => {
                let top = map.low_end.min(u64::from(h.initrd_addr_max) + 1);
                match place_high(image.len, end, top) {
                    Some(at) => Some((image, at)),
                    None => return Err(does_not_fit("initrd", &image, top - end)),
                }
            }
        };
        Ok(Plan { kernel, load_at, initrd, cmdline: cmdline.into() })
    }

    /// Loads everything.
    pub fn load(&self, ram: &GuestRam, board: &Board) -> Result<X86State> {
        let mut file = self.kernel.file.try_clone().map_err(|e| self.error().caused_by(e))?;
        let loaded = BzImage::load(ram, Some(GuestAddress(self.load_at)), &mut file, None)
            .map_err(|e| self.error().caused_by(e))?;
        let mut params = boot_params {
            hdr: loaded.setup_header.ok_or_else(|| self.error())?,
            acpi_rsdp_addr: board.rsdp,
            e820_entries: board.e820.len() as u8,
            ..boot_params::default()
        };
        for (slot, e) in params.e820_table.iter_mut().zip(&board.e820) {
            *slot = boot_e820_entry { addr: e.start, size: e.len, r#type: e.kind as u32 };
        }
        params.hdr.type_of_loader = LOADER_UNDEFINED;
        let cmdline = Strings::new(ram).string("the kernel command line", &self.cmdline)?;
        params.hdr.cmd_line_ptr = cmdline as u32;
        if let Some((image, at)) = &self.initrd {
            image.load(ram, *at)?;
            params.hdr.ramdisk_image = *at as u32;
            params.hdr.ramdisk_size = image.len as u32;
        }
        layout::write(ram, "boot_params", BOOT_PARAMS, params.as_slice())?;
        entry::long_mode(ram, self.load_at + ENTRY_64, BOOT_PARAMS)
    }

    fn error(&self) -> Error {
        Error::new(format!("cannot load kernel '{}'", self.kernel.name))
            .remedy("check that the file has not changed since the machine started")
    }
}
