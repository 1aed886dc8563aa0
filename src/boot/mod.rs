//! Direct boot: kernel, RAM disk and command line to guest memory and a processor's first state.
//!
//! ```text
//!   config::Boot ── Plan::new: headers read, everything placed, all faults at once
//!        │            (nothing is written; validation calls it too)
//!        └─ Plan::load(guest RAM, board) ── structures of the protocol ──► X86State of the BSP
//! ```
//!
//! A plan keeps its files open and loads as often as asked: each reset of the machine loads anew.
//! Guest memory that a protocol leaves undefined is not touched.

mod bzimage;
mod elf;
mod entry;
mod flat;
pub mod fw_cfg;
mod layout;
mod multiboot;
mod pvh;

use crate::config::{Boot, Fault, KernelFormat};
use crate::machine::memmap::{E820Entry, MemoryMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use tandem_accel::memory::GuestRam;
use tandem_accel::x86::X86State;

/// What the parts of a boot return.
type Result<T, E = tandem_accel::Error> = std::result::Result<T, E>;

/// What a protocol tells the guest about its machine.
pub struct Board {
    /// The memory map.
    pub e820: Vec<E820Entry>,
    /// Address of the ACPI root pointer.
    pub rsdp: u64,
}

/// An opened file that will be loaded.
#[derive(Debug)]
struct Image {
    file: File,
    name: String,
    len: u64,
}

impl Image {
    /// Opens a regular file; `what` names its role and `flag` where it was given.
    fn open(path: &Path, what: &str) -> Result<Image, Fault> {
        let name = path.display().to_string();
        let fault = |why: String, remedy: &str| {
            Fault::new(format!("{what} '{name}' cannot be read: {why}"), remedy)
        };
        let file = File::open(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => fault("no such file".into(), "check the path"),
            std::io::ErrorKind::PermissionDenied => {
                fault("permission denied".into(), "make it readable for this user")
            }
            _ => fault(e.to_string(), "check the path"),
        })?;
        let meta = file.metadata().map_err(|e| fault(e.to_string(), "check the path"))?;
        if !meta.is_file() {
            return Err(fault("not a regular file".into(), "give the path of a file"));
        }
        Ok(Image { file, len: meta.len(), name })
    }

    /// The first bytes; fewer if the file is shorter.
    fn head(&self, n: usize) -> Vec<u8> {
        let mut bytes = vec![0; n];
        let mut got = 0;
        while let Ok(k @ 1..) = self.file.read_at(&mut bytes[got..], got as u64) {
            got += k;
        }
        bytes.truncate(got);
        bytes
    }

    /// Copies the whole file to guest memory.
    fn load(&self, ram: &GuestRam, at: u64) -> Result<()> {
        elf::load_piece(&self.file, &self.name, ram, 0, self.len, at, self.len)
    }
}

#[derive(Debug)]
enum Protocol {
    Bzimage(bzimage::Plan),
    Pvh(pvh::Plan),
    Multiboot(multiboot::Plan),
    Flat(flat::Plan),
}

/// A checked boot, ready to be loaded.
#[derive(Debug)]
pub struct Plan {
    protocol: Protocol,
}

impl Plan {
    /// Reads the headers of what `boot` names and decides where everything goes in memory of this
    /// map; returns every fault.
    pub fn new(boot: &Boot, map: &MemoryMap) -> Result<Plan, Vec<Fault>> {
        let mut faults = Vec::new();
        let mut keep = |r: Result<Image, Fault>| r.map_err(|f| faults.push(f)).ok();
        let initrd = boot.initrd.as_ref().map(|p| keep(Image::open(p, "initrd")));
        let modules: Vec<_> = boot
            .modules
            .iter()
            .map(|m| (keep(Image::open(&m.path, "module")), m.args.as_str()))
            .collect();
        let kernel = match &boot.kernel {
            Some(p) => keep(Image::open(p, "kernel")),
            None => {
                faults.push(Fault::new(
                    "there is nothing to boot",
                    "name a disk with --drive file=PATH, or a kernel with --kernel FILE (bzImage, \
                     PVH vmlinux or multiboot)",
                ));
                None
            }
        };
        let Some(kernel) = kernel else { return Err(faults) };
        let format = match recognise(&kernel, boot.format) {
            Ok(f) => f,
            Err(f) => {
                faults.push(f);
                return Err(faults);
            }
        };
        if !boot.modules.is_empty() && format != KernelFormat::Multiboot {
            faults.push(Fault::new(
                format!("kernel '{}' takes no modules", kernel.name),
                "modules are for multiboot kernels; use --initrd for a Linux RAM disk",
            ));
        }
        if !faults.is_empty() {
            return Err(faults);
        }
        let initrd = initrd.flatten();
        let protocol = match format {
            KernelFormat::Auto | KernelFormat::Bzimage => {
                bzimage::Plan::new(kernel, initrd, &boot.append, map).map(Protocol::Bzimage)
            }
            KernelFormat::Pvh => {
                pvh::Plan::new(kernel, initrd, &boot.append, map).map(Protocol::Pvh)
            }
            KernelFormat::Multiboot => {
                let mut list: Vec<(Image, &str)> = Vec::new();
                list.extend(initrd.map(|i| (i, "")));
                list.extend(modules.into_iter().filter_map(|(i, args)| Some((i?, args))));
                multiboot::Plan::new(kernel, list, &boot.append, map).map(Protocol::Multiboot)
            }
            KernelFormat::Flat => flat::Plan::new(kernel, initrd).map(Protocol::Flat),
        };
        protocol.map(|protocol| Plan { protocol }).map_err(|f| vec![f])
    }

    /// Puts everything into guest memory; returns the state in which the bootstrap processor
    /// starts.
    pub fn load(&self, ram: &GuestRam, board: &Board) -> Result<X86State> {
        layout::bios_data_area(ram)?;
        match &self.protocol {
            Protocol::Bzimage(p) => p.load(ram, board),
            Protocol::Pvh(p) => p.load(ram, board),
            Protocol::Multiboot(p) => p.load(ram, board),
            Protocol::Flat(p) => p.load(ram),
        }
    }
}

/// The format of a kernel: as asked, or by its contents.
fn recognise(kernel: &Image, asked: KernelFormat) -> Result<KernelFormat, Fault> {
    if asked != KernelFormat::Auto {
        return Ok(asked);
    }
    let head = kernel.head(multiboot::SEARCH);
    if multiboot::find_header(&head).is_some() {
        return Ok(KernelFormat::Multiboot);
    }
    if elf::is_elf(&head) {
        return Ok(KernelFormat::Pvh);
    }
    if bzimage::is_bzimage(&head) {
        return Ok(KernelFormat::Bzimage);
    }
    Err(Fault::new(
        format!("'{}' is not a kernel (no bzImage, ELF or multiboot header)", kernel.name),
        "give a kernel image, or say --kernel-format flat to run raw real-mode code",
    ))
}

/// The highest page-aligned place for `len` bytes in `[low, high)`.
fn place_high(len: u64, low: u64, high: u64) -> Option<u64> {
    let at = high.checked_sub(len)? & !0xfff;
    (at >= low.next_multiple_of(0x1000)).then_some(at)
}

/// The fault of an image that finds no room.
fn does_not_fit(what: &str, image: &Image, room: u64) -> Fault {
    let missing = image.len.saturating_sub(room).div_ceil(1 << 20).max(1);
    Fault::new(
        format!(
            "{what} '{}' ({} MiB) does not fit into guest memory beside the kernel",
            image.name,
            image.len.div_ceil(1 << 20)
        ),
        format!("give the guest at least {missing} MiB more with -m"),
    )
}

#[cfg(test)]
mod tests;
