//! Boot of made-up images into a small memory.

use super::*;
use crate::config::{Module, Size};
use crate::machine::memmap::ONE_MIB;
use std::path::PathBuf;
use std::sync::Arc;
use tandem_accel::memory::{GuestMap, RegionKind};
use tandem_accel::x86::{gpr, seg};
use vm_memory::{Bytes, GuestAddress};

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Dir {
        let dir = std::env::temp_dir().join(format!("tandem-boot-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Dir(dir)
    }
    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let p = self.0.join(name);
        std::fs::write(&p, bytes).unwrap();
        p
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn memory(map: &MemoryMap) -> Arc<GuestRam> {
    let guest = GuestMap::new();
    for (name, at, len) in map.ram(false) {
        guest.add(name, RegionKind::Ram, at, len).unwrap();
    }
    guest.ram()
}

fn board(map: &MemoryMap) -> Board {
    Board { e820: map.e820(), rsdp: 0xf_0000 }
}

fn u32_in(ram: &GuestRam, at: u64) -> u32 {
    ram.read_obj(GuestAddress(at)).unwrap()
}

fn string_in(ram: &GuestRam, at: u32) -> String {
    let mut b = [0u8; 256];
    ram.read_slice(&mut b, GuestAddress(at.into())).unwrap();
    String::from_utf8(b.split(|c| *c == 0).next().unwrap().to_vec()).unwrap()
}

fn plan_error(boot: &Boot, mib: u64) -> String {
    let faults = Plan::new(boot, &MemoryMap::new(Size::mib(mib))).unwrap_err();
    faults.iter().map(|f| f.to_string()).collect::<Vec<_>>().join("\n")
}

/// A bzImage of which only the header and a payload pattern are there.
fn bzimage(init_size: u32) -> Vec<u8> {
    let mut b = vec![0u8; 512 * 2 + 0x1000];
    let mut put = |at: usize, v: &[u8]| b[at..at + v.len()].copy_from_slice(v);
    put(0x1f1, &[1]);
    put(0x1f4, &(0x1000u32 / 16).to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &64u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &init_size.to_le_bytes());
    b[1024..].fill(0xcc);
    b
}

#[test]
fn bzimage_is_entered_in_long_mode_with_its_parameters() {
    let dir = Dir::new("bz");
    let boot = Boot {
        kernel: Some(dir.file("k", &bzimage(0x40_0000))),
        initrd: Some(dir.file("i", &[7; 5000])),
        append: "console=ttyS0".into(),
        ..Boot::default()
    };
    let map = MemoryMap::new(Size::mib(32));
    let ram = memory(&map);
    let s = Plan::new(&boot, &map).unwrap().load(&ram, &board(&map)).unwrap();
    assert_eq!(s.rip, 0x100_0200);
    assert_eq!(s.seg[seg::CS].selector, 0x10);
    assert!(s.efer & 1 << 10 != 0 && s.cr0 >> 31 == 1);
    let params = s.gpr[gpr::RSI];
    assert_eq!(string_in(&ram, u32_in(&ram, params + 0x228)), "console=ttyS0");
    let initrd = u32_in(&ram, params + 0x218);
    assert_eq!(u32_in(&ram, params + 0x21c), 5000);
    assert_eq!(u64::from(initrd), (32 << 20) - 0x2000);
    assert_eq!(u32_in(&ram, initrd.into()), 0x0707_0707);
    assert_eq!(u32_in(&ram, params + 0x70), 0xf_0000);
    let entries: u8 = ram.read_obj(GuestAddress(params + 0x1e8)).unwrap();
    assert_eq!(usize::from(entries), map.e820().len());
    assert_eq!(u32_in(&ram, 0x100_0200), 0xcccc_cccc);
}

#[test]
fn bzimage_faults_name_the_remedy() {
    let dir = Dir::new("bzbad");
    let mut boot = Boot { kernel: Some(dir.file("k", &bzimage(0x100_0000))), ..Boot::default() };
    assert!(plan_error(&boot, 16).contains("at least -m 40"), "{}", plan_error(&boot, 16));
    boot.initrd = Some(dir.file("i", &vec![0; 2 << 20]));
    assert!(plan_error(&boot, 33).contains("1 MiB more with -m"), "{}", plan_error(&boot, 33));
    boot.append = "x".repeat(65);
    assert!(plan_error(&boot, 64).contains("at most 64 bytes"));
    let whole = bzimage(0x100_0000);
    boot.kernel = Some(dir.file("short", &whole[..1500]));
    assert!(plan_error(&boot, 64).contains("cut short"));
    boot.kernel = Some(dir.file("stub", &whole[..0x206]));
    assert!(plan_error(&boot, 64).contains("not a bzImage"));
}

fn multiboot_header(flags: u32) -> Vec<u8> {
    let magic = 0x1bad_b002u32;
    let sum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    [magic, flags, sum].iter().flat_map(|v| v.to_le_bytes()).collect()
}

#[test]
fn multiboot_passes_command_line_modules_and_memory() {
    let dir = Dir::new("mb");
    let kernel = elf::tests::elf32(0x40_0000, 0x40_000c, &multiboot_header(3));
    let boot = Boot {
        kernel: Some(dir.file("k", &kernel)),
        append: "a b".into(),
        modules: vec![Module { path: dir.file("m", &[9; 100]), args: "arg".into() }],
        ..Boot::default()
    };
    let map = MemoryMap::new(Size::mib(16));
    let ram = memory(&map);
    let plan = Plan::new(&boot, &map).unwrap();
    for _ in 0..2 {
        ram.write_obj(!0u32, GuestAddress(0x40_0010)).unwrap();
        let s = plan.load(&ram, &board(&map)).unwrap();
        assert_eq!((s.rip, s.gpr[gpr::RAX], s.cr0 & 1), (0x40_000c, 0x2bad_b002, 1));
        assert_eq!(u32_in(&ram, 0x40_0010), 0, "bss is zero on every load");
        let info = s.gpr[gpr::RBX];
        assert!(string_in(&ram, u32_in(&ram, info + 16)).ends_with("/k a b"));
        assert_eq!(u32_in(&ram, info + 20), 1);
        let module = u64::from(u32_in(&ram, info + 24));
        assert_eq!(u32_in(&ram, module) % 4096, 0);
        assert_eq!(u32_in(&ram, module + 4) - u32_in(&ram, module), 100);
        assert!(string_in(&ram, u32_in(&ram, module + 8)).ends_with("/m arg"));
        assert_eq!(u32_in(&ram, info + 44) % 24, 0);
        assert_eq!(u32_in(&ram, info + 8), (16 << 10) - 1024);
    }
}

#[test]
fn multiboot_raw_addresses_are_followed_or_refused() {
    let dir = Dir::new("mbraw");
    let image = |load: u32, load_end: u32, bss_end: u32| {
        let mut b = multiboot_header(1 << 16);
        for v in [load, load, load_end, bss_end, load.wrapping_add(32)] {
            b.extend_from_slice(&v.to_le_bytes());
        }
        b.extend_from_slice(&[0x90; 32]);
        b
    };
    let map = MemoryMap::new(Size::mib(8));
    let ram = memory(&map);
    let mut boot = Boot { kernel: Some(dir.file("k", &image(0x10_0000, 0, 0))), ..Boot::default() };
    let s = Plan::new(&boot, &map).unwrap().load(&ram, &board(&map)).unwrap();
    assert_eq!(s.rip, ONE_MIB + 32);
    assert_eq!(u32_in(&ram, ONE_MIB + 32), 0x9090_9090);
    for bad in [
        image(0x1000, 0, 0),
        image(0x10_0000, 0x20_0000, 0),
        image(0x10_0000, 0, 0x10_0001),
        image(0xffff_fff0, 0, 0),
    ] {
        boot.kernel = Some(dir.file("k", &bad));
        assert!(Plan::new(&boot, &map).is_err());
    }
}

#[test]
fn pvh_passes_start_info() {
    let dir = Dir::new("pvh");
    let mut kernel = elf::tests::elf32(0x10_0000, 0x10_0000, &[0x90; 64]);
    // A second program header for the note, which sits after the code.
    let note_at = kernel.len() as u32 + 32;
    kernel[44] = 2;
    let mut ph = vec![];
    for v in [4u32, note_at, 0, 0, 20, 20, 4, 4] {
        ph.extend_from_slice(&v.to_le_bytes());
    }
    kernel.splice(84..84, ph);
    kernel[56..60].copy_from_slice(&116u32.to_le_bytes());
    for v in [4u32, 4, 18] {
        kernel.extend_from_slice(&v.to_le_bytes());
    }
    kernel.extend_from_slice(b"Xen\0");
    kernel.extend_from_slice(&0x10_0010u32.to_le_bytes());
    let boot = Boot {
        kernel: Some(dir.file("k", &kernel)),
        initrd: Some(dir.file("i", &[5; 10])),
        append: "hello".into(),
        ..Boot::default()
    };
    let map = MemoryMap::new(Size::mib(8));
    let ram = memory(&map);
    let s = Plan::new(&boot, &map).unwrap().load(&ram, &board(&map)).unwrap();
    assert_eq!(s.rip, 0x10_0010);
    let info = s.gpr[gpr::RBX];
    assert_eq!(u32_in(&ram, info), 0x336e_c578);
    assert_eq!(u32_in(&ram, info + 12), 1);
    assert_eq!(string_in(&ram, u32_in(&ram, info + 24)), "hello");
    let module = u64::from(u32_in(&ram, info + 16));
    assert_eq!(u32_in(&ram, module + 8), 10);
    assert_eq!(u32_in(&ram, u64::from(u32_in(&ram, module))), 0x0505_0505);
}

#[test]
fn flat_images_start_in_real_mode() {
    let dir = Dir::new("flat");
    let mut boot = Boot { kernel: Some(dir.file("k", b"\xf4\xf4")), ..Boot::default() };
    assert!(plan_error(&boot, 8).contains("--kernel-format flat"));
    boot.format = KernelFormat::Flat;
    let map = MemoryMap::new(Size::mib(8));
    let ram = memory(&map);
    let s = Plan::new(&boot, &map).unwrap().load(&ram, &board(&map)).unwrap();
    assert_eq!((s.rip, s.seg[seg::CS].base, s.cr0 & 1), (0x7c00, 0, 0));
    boot.kernel = Some(dir.file("k", &vec![0; 500_000]));
    assert!(plan_error(&boot, 8).contains("flat images hold"));
}
