//! ACPI tables (ACPI 6.4) as pure functions from a board description to bytes.
//!
//! [`board::Board`] says what the machine has; [`layout`] gives the whole set as one image for a
//! machine that starts without firmware, to be copied to guest memory. Always: equal boards give
//! equal bytes, and every address in the tables lies in the image or on the board.

pub mod board;
mod description;
mod devices;
mod routing;
mod system;

pub use board::Board;
pub use description::dsdt;
pub use system::{facs, fadt, hpet, madt, mcfg, rsdp, rsdt, xsdt};

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

/// Lays the tables out from `base` (a multiple of 64 below 4 GiB), in at most `room` bytes.
pub fn layout(board: &Board, base: u64, room: u64) -> Result<Image, TooLarge> {
    let mut bytes = vec![0; 64];
    let mut put = |table: &[u8]| {
        // The FACS must be aligned to 64 bytes; the others do not mind.
        let at = bytes.len().next_multiple_of(64);
        bytes.resize(at, 0);
        bytes.extend_from_slice(table);
        base + at as u64
    };
    let facs_at = put(&facs());
    let dsdt_at = put(&dsdt(board));
    let mut tables = vec![put(&fadt(board, facs_at, dsdt_at)), put(&madt(board))];
    tables.extend(mcfg(board).map(|t| put(&t)));
    tables.extend(hpet(board).map(|t| put(&t)));
    let rsdt_at = put(&rsdt(&tables));
    let xsdt_at = put(&xsdt(&tables));
    let root = rsdp(rsdt_at, xsdt_at);
    bytes[..root.len()].copy_from_slice(&root);
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
