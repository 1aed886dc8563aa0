//! Assembles the guest (see `src/lib.rs` for what it does). One file per part:
//!
//! `layout` addresses and tables · `code` what all modes share · `real`, `protected`, `long`, `user`
//! the stages · `traps` the interrupt handlers

mod code;
mod layout;
mod long;
mod protected;
mod real;
mod traps;
mod user;

use layout::{Data, Image};
use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=asm");
    let image = build().expect("the guest does not assemble");
    let out = std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
    std::fs::write(Path::new(&out).join("guest.bin"), image).expect("cannot write the guest");
}

fn build() -> Result<Vec<u8>, iced_x86::IcedError> {
    let mut data = Data::new();
    let mut image = Image::new();
    let user = user::assemble()?;
    let traps = traps::assemble(&mut data)?;
    let long = long::assemble(&mut data, &user, &traps)?;
    let protected = protected::assemble(&mut data)?;
    let real = real::assemble(&mut data)?;
    let entry = real::multiboot_entry(layout::SIZE)?;
    image.put(layout::START, &real::first_bytes(entry.len()));
    image.put(layout::MULTIBOOT_ENTRY, &entry);
    image.put(layout::REAL, &real);
    image.put(layout::PROTECTED, &protected);
    image.put(layout::LONG, &long.bytes);
    image.put(layout::TRAPS, &traps.bytes);
    image.put(layout::USER, &user.bytes);
    image.put(layout::DATA, &data.bytes());
    image.put(layout::GDT, &layout::gdt());
    image.put(layout::TSS, &layout::tss());
    image.put(layout::IDT, &layout::idt(&traps));
    image.put(layout::PML4, &layout::page_tables());
    Ok(image.bytes)
}
