//! ACPI tables (ACPI 6.4) as pure functions from a board description to bytes.
//!
//! [`board::Board`] says what the machine has; [`layout`] gives the whole set as one image for a
//! machine that starts without firmware, to be copied to guest memory, and [`for_firmware`] as files
//! with the script by which firmware places them. Always: equal boards give equal bytes, and every
//! address in the tables lies in the image or on the board.

pub mod board;
mod description;
mod devices;
mod numa;
mod routing;
mod system;

pub use board::Board;
pub use description::dsdt;
pub use numa::{slit, srat};
pub use system::{facs, fadt, hpet, madt, mcfg, rsdp, rsdt, xsdt};

use crate::firmware::loader::{Script, Zone};

/// Where [`layout`] goes on a PC: the root pointer is found there by scanning (ACPI 6.4 §5.2.5.1).
pub const BIOS_AREA: u64 = 0xe_0000;
/// Length of [`BIOS_AREA`].
pub const BIOS_AREA_LEN: u64 = 0x2_0000;

/// The tables in one piece.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Image {
    /// Address of the first byte.
    pub base: u64,
    /// Address of the root pointer (RSDP), for boot protocols that hand it over.
    pub rsdp: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// The tables need more room than there is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the ACPI tables need {need:#x} bytes but there is room for {room:#x}; use fewer vCPUs")]
pub struct TooLarge {
    /// Bytes needed.
    pub need: u64,
    /// Bytes there.
    pub room: u64,
}

/// All tables but the root pointer in one piece, linked as if it started at `base`.
struct Linked {
    bytes: Vec<u8>,
    rsdt: u64,
    xsdt: u64,
    /// Fields that hold addresses of tables: offset, bytes.
    pointers: Vec<(usize, u8)>,
    /// Tables that have such fields and a checksum: offset, length.
    sums: Vec<(usize, usize)>,
}

fn link(board: &Board, base: u64) -> Linked {
    let mut bytes = Vec::new();
    let mut put = |table: &[u8]| {
        // The FACS must be aligned to 64 bytes; the others do not mind.
        let at = bytes.len().next_multiple_of(64);
        bytes.resize(at, 0);
        bytes.extend_from_slice(table);
        at
    };
    let address = |at: usize| base + at as u64;
    let facs_at = put(&facs());
    let dsdt_at = put(&dsdt(board));
    let fixed = fadt(board, address(facs_at), address(dsdt_at));
    let fadt_at = put(&fixed);
    let mut tables = vec![fadt_at, put(&madt(board))];
    tables.extend(mcfg(board).map(|t| put(&t)));
    tables.extend(hpet(board).map(|t| put(&t)));
    tables.extend(srat(board).map(|t| put(&t)));
    tables.extend(slit(board).map(|t| put(&t)));
    let list: Vec<u64> = tables.iter().map(|t| address(*t)).collect();
    let (short, long) = (rsdt(&list), xsdt(&list));
    let (rsdt_at, xsdt_at) = (put(&short), put(&long));
    // FIRMWARE_CTRL, DSDT and X_DSDT of the FADT, then the entries of both lists.
    let mut pointers = vec![(fadt_at + 36, 4), (fadt_at + 40, 4), (fadt_at + 140, 8)];
    pointers.extend((0..list.len()).map(|i| (rsdt_at + 36 + 4 * i, 4)));
    pointers.extend((0..list.len()).map(|i| (xsdt_at + 36 + 8 * i, 8)));
    let sums = vec![(fadt_at, fixed.len()), (rsdt_at, short.len()), (xsdt_at, long.len())];
    Linked { bytes, rsdt: address(rsdt_at), xsdt: address(xsdt_at), pointers, sums }
}

/// File with the tables.
pub const TABLES_FILE: &str = "etc/acpi/tables";
/// File with the root pointer.
pub const RSDP_FILE: &str = "etc/acpi/rsdp";
/// File with the script that places both.
pub const SCRIPT_FILE: &str = "etc/table-loader";
/// Offset of the checksum in a table.
const CHECKSUM: usize = 9;

/// The tables as firmware wants them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Files {
    /// [`TABLES_FILE`].
    pub tables: Vec<u8>,
    /// [`RSDP_FILE`].
    pub rsdp: Vec<u8>,
    /// [`SCRIPT_FILE`].
    pub script: Vec<u8>,
}

/// The tables for firmware to place: addresses of tables are offsets into the file, and checksums
/// that cover them are zero.
pub fn for_firmware(board: &Board) -> Files {
    let Linked { mut bytes, rsdt, xsdt, pointers, sums } = link(board, 0);
    let mut root = rsdp(rsdt, xsdt);
    let mut script = Script::default();
    script.allocate(RSDP_FILE, 16, Zone::BiosArea);
    script.allocate(TABLES_FILE, 64, Zone::High);
    for (at, size) in pointers {
        script.add_pointer(TABLES_FILE, TABLES_FILE, at as u32, size);
    }
    for (at, len) in sums {
        bytes[at + CHECKSUM] = 0;
        script.add_checksum(TABLES_FILE, (at + CHECKSUM) as u32, at as u32, len as u32);
    }
    // RSDT and XSDT addresses, then the checksum of revision 1 and the extended one.
    script.add_pointer(RSDP_FILE, TABLES_FILE, 16, 4);
    script.add_pointer(RSDP_FILE, TABLES_FILE, 24, 8);
    for (at, len) in [(8, 20), (32, root.len() as u32)] {
        root[at as usize] = 0;
        script.add_checksum(RSDP_FILE, at, 0, len);
    }
    Files { tables: bytes, rsdp: root, script: script.bytes() }
}

/// Lays the tables out from `base` (a multiple of 64 below 4 GiB), in at most `room` bytes.
pub fn layout(board: &Board, base: u64, room: u64) -> Result<Image, TooLarge> {
    const ROOT: u64 = 64;
    let linked = link(board, base + ROOT);
    let mut bytes = rsdp(linked.rsdt, linked.xsdt);
    bytes.resize(ROOT as usize, 0);
    bytes.extend(linked.bytes);
    let need = bytes.len() as u64;
    if need > room {
        return Err(TooLarge { need, room });
    }
    Ok(Image { base, rsdp: base, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn board(cpus: u32) -> Board {
        let mut b = Board::q35((0..cpus).collect());
        b.hpet = Some(0xfed0_0000);
        b
    }

    fn u32_at(b: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(b[at..at + 4].try_into().unwrap())
    }

    fn sum(b: &[u8]) -> u8 {
        b.iter().fold(0, |a, x| a.wrapping_add(*x))
    }

    /// The tables that the RSDT names, and those that the XSDT names.
    fn tables(i: &Image) -> (Vec<&[u8]>, Vec<&[u8]>) {
        let at = |addr: u64| {
            let t = &i.bytes[(addr - i.base) as usize..];
            &t[..u32_at(t, 4) as usize]
        };
        let root = &i.bytes[..36];
        let rsdt = at(u32_at(root, 16).into());
        let xsdt = at(u64::from_le_bytes(root[24..32].try_into().unwrap()));
        let by32 = rsdt[36..].chunks(4).map(|c| at(u32_at(c, 0).into())).collect();
        let by64 =
            xsdt[36..].chunks(8).map(|c| at(u64::from_le_bytes(c.try_into().unwrap()))).collect();
        (by32, by64)
    }

    #[test]
    fn every_table_is_linked_and_sums_to_zero() {
        let i = layout(&board(2), BIOS_AREA, BIOS_AREA_LEN).unwrap();
        assert_eq!((&i.bytes[..8], i.bytes[15]), (&b"RSD PTR "[..], 2));
        assert_eq!((sum(&i.bytes[..20]), sum(&i.bytes[..36])), (0, 0));
        let (by32, by64) = tables(&i);
        assert_eq!(by32, by64);
        let names: Vec<_> = by64.iter().map(|t| &t[..4]).collect();
        assert_eq!(names, [b"FACP", b"APIC", b"MCFG", b"HPET"]);
        assert!(by64.iter().all(|t| sum(t) == 0));
        let fadt = by64[0];
        let facs = &i.bytes[u32_at(fadt, 36) as usize - i.base as usize..];
        assert_eq!((&facs[..4], u32_at(fadt, 36) % 64), (&b"FACS"[..], 0));
        let dsdt = &i.bytes[u32_at(fadt, 40) as usize - i.base as usize..];
        assert_eq!((&dsdt[..4], sum(&dsdt[..u32_at(dsdt, 4) as usize])), (&b"DSDT"[..], 0));
    }

    /// What firmware does with the files: the image it makes is the one that starts without it.
    #[test]
    fn the_script_gives_the_same_tables() {
        let f = for_firmware(&board(3));
        let (rsdp_at, tables_at) = (0xf_5000u64, 0x7ff_0000u64);
        let (mut rsdp, mut tables) = (f.rsdp.clone(), f.tables.clone());
        let is_rsdp = |c: &[u8]| c.starts_with(RSDP_FILE.as_bytes());
        for c in f.script.chunks(128) {
            let at = |i: usize| u32_at(c, i) as usize;
            let file = if is_rsdp(&c[4..]) { &mut rsdp } else { &mut tables };
            match at(0) {
                1 => {}
                2 => {
                    let base = if is_rsdp(&c[60..]) { rsdp_at } else { tables_at };
                    let (field, size) = (at(116), c[120] as usize);
                    let mut v = [0; 8];
                    v[..size].copy_from_slice(&file[field..field + size]);
                    let v = u64::from_le_bytes(v) + base;
                    file[field..field + size].copy_from_slice(&v.to_le_bytes()[..size]);
                }
                3 => {
                    let (field, start, len) = (at(60), at(64), at(68));
                    assert_eq!(file[field], 0);
                    file[field] = sum(&file[start..start + len]).wrapping_neg();
                }
                other => panic!("command {other}"),
            }
        }
        let direct = layout(&board(3), tables_at - 64, 0x10_0000).unwrap();
        assert_eq!(tables, direct.bytes[64..]);
        assert_eq!(rsdp, direct.bytes[..36]);
    }

    #[test]
    fn large_apic_ids_are_x2apics() {
        let t = madt(&Board::q35(vec![0, 254, 255, 300]));
        let mut kinds = Vec::new();
        let mut at = 44;
        while at < t.len() {
            kinds.push(t[at]);
            at += usize::from(t[at + 1]);
        }
        assert_eq!(at, t.len());
        assert_eq!(kinds[..4], [0, 0, 9, 9]);
        assert_eq!(kinds.iter().filter(|k| **k == 2).count(), 5);
    }

    #[test]
    fn many_processors_fit_and_too_many_are_refused() {
        assert!(layout(&board(512), BIOS_AREA, BIOS_AREA_LEN).is_ok());
        let e = layout(&board(64), BIOS_AREA, 0x1000).unwrap_err();
        assert!(e.need > e.room);
    }

    /// Runs the reference disassembler over the tables and compiles the result again.
    #[test]
    fn iasl_accepts_the_tables() {
        if Command::new("iasl").arg("-v").output().is_err() {
            eprintln!("skipped: iasl is not installed (Debian package acpica-tools)");
            return;
        }
        let dir = std::env::temp_dir().join(format!("tandem-acpi-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let b = board(300);
        let files = [
            ("dsdt", dsdt(&b)),
            ("facp", fadt(&b, 0xe0040, 0xe0080)),
            ("facs", facs()),
            ("apic", madt(&b)),
            ("mcfg", mcfg(&b).unwrap()),
            ("hpet", hpet(&b).unwrap()),
            ("rsdt", rsdt(&[0xe0040])),
            ("xsdt", xsdt(&[0xe0040])),
        ];
        for (name, bytes) in files {
            let aml = dir.join(format!("{name}.aml"));
            std::fs::write(&aml, bytes).unwrap();
            for args in [
                vec![format!("{name}.aml")],
                vec!["-vw".into(), "3115".into(), format!("{name}.dsl")],
            ] {
                let mode = if args.len() == 1 { vec!["-d"] } else { vec!["-we", "-p", "again"] };
                let out =
                    Command::new("iasl").current_dir(&dir).args(mode).args(&args).output().unwrap();
                let text = String::from_utf8_lossy(&out.stdout).into_owned()
                    + &String::from_utf8_lossy(&out.stderr);
                let bad = text.lines().any(|l| {
                    ["Error ", "ACPI Error", "Warning ", "Invalid", "checksum"]
                        .iter()
                        .any(|w| l.contains(w))
                });
                assert!(out.status.success() && !bad, "iasl {args:?}:\n{text}");
            }
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
