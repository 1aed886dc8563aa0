//! A kernel for firmware to start: the parts of a bzImage, RAM disk and command line as items of the
//! firmware configuration device.

use super::{Image, bzimage};
use crate::config::{Boot, Fault};
use std::os::unix::fs::FileExt;
use tandem_devices::firmware::fw_cfg::{Items, key};

/// Where the parts go if firmware has no wish of its own (Linux boot protocol §1.2).
const SETUP_ADDR: u32 = 0x1_0000;
const CMDLINE_ADDR: u32 = 0x2_0000;
const KERNEL_ADDR: u32 = 0x10_0000;

fn all(image: &Image) -> Result<Vec<u8>, Fault> {
    let mut bytes = vec![0; image.len as usize];
    image.file.read_exact_at(&mut bytes, 0).map_err(|e| {
        Fault::new(format!("'{}' cannot be read: {e}", image.name), "check the file")
    })?;
    Ok(bytes)
}

/// Adds what `boot` names to `items`; nothing if it names no kernel.
pub fn offer(boot: &Boot, items: &mut Items) -> Result<(), Fault> {
    let Some(path) = &boot.kernel else { return Ok(()) };
    let kernel = Image::open(path, "kernel")?;
    if !bzimage::is_bzimage(&kernel.head(0x1000)) {
        let what = format!("firmware cannot start '{}', which is no bzImage", kernel.name);
        return Err(Fault::new(what, "give a bzImage, or start it without firmware"));
    }
    let mut setup = all(&kernel)?;
    // Sectors of the set-up part besides the first; 0 means 4.
    let sectors = match setup[0x1f1] {
        0 => 4,
        n => usize::from(n),
    };
    let payload = setup.split_off(((sectors + 1) * 512).min(setup.len()));
    let mut cmdline = boot.append.clone().into_bytes();
    cmdline.push(0);
    let initrd = match &boot.initrd {
        Some(p) => all(&Image::open(p, "initrd")?)?,
        None => Vec::new(),
    };
    let mut number = |key, v: usize| items.item(key, (v as u32).to_le_bytes());
    number(key::SETUP_ADDR, SETUP_ADDR as usize);
    number(key::SETUP_SIZE, setup.len());
    number(key::KERNEL_ADDR, KERNEL_ADDR as usize);
    number(key::KERNEL_SIZE, payload.len());
    number(key::CMDLINE_ADDR, CMDLINE_ADDR as usize);
    number(key::CMDLINE_SIZE, cmdline.len());
    number(key::INITRD_SIZE, initrd.len());
    items.item(key::SETUP_DATA, setup);
    items.item(key::KERNEL_DATA, payload);
    items.item(key::CMDLINE_DATA, cmdline);
    items.item(key::INITRD_DATA, initrd);
    Ok(())
}
