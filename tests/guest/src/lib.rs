//! The small guest: a bare-metal program that visits every processor mode and the devices a system
//! cannot do without, says on COM1 how each stage went, and exits through isa-debug-exit. `tandem
//! doctor` and the tests run it on every accelerator and expect the same verdict.
//!
//! ```text
//!   flat image, entered at 0:7c00 ──────────────────────────────────────────┐
//!   multiboot 1, loaded at 1 MiB ─► copies itself to 7c00h, leaves PE ──► real mode
//!                                                                           │ LGDT, CR0.PE
//!                                       protected mode (segments with a base)
//!                                                                           │ PAE, EFER.LME, CR0.PG
//!     long mode: exceptions, port I/O, MMIO, APIC timer
//!       └─ ring 3: SSE2, x87, SYSCALL, an interrupt and a fault ─► serial interrupt ─► verdict
//! ```
//!
//! It is assembled at build time by `asm/`, in Rust, so that building needs no assembler. It avoids
//! what a KVM without hardware cannot emulate: INT n, INT3, IRET in 32-bit protected mode, SYSRET,
//! XSAVE, CLAC. It needs 2 MiB of RAM and [`DEVICES`].

/// The image. As a kernel file it is recognised as multiboot 1; entered as a flat image at 7c00h in
/// real mode it does the same.
pub static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.bin"));

/// The devices it needs, as `--device` arguments.
pub const DEVICES: [&str; 2] = ["isa-debug-exit,iobase=0xf4", "pc-testdev"];

/// What it writes to isa-debug-exit when all went well.
pub const PASS: u8 = 0x10;

/// The exit status that follows from [`PASS`].
pub const PASS_STATUS: i32 = (PASS as i32) << 1 | 1;

/// The stages in order, as it names them.
pub const STAGES: [&str; 8] = [
    "real mode",
    "protected mode",
    "long mode",
    "port I/O",
    "MMIO",
    "APIC timer",
    "ring 3",
    "serial interrupt",
];

/// Judges a run by the exit status of the machine and what the guest said on COM1.
///
/// # Errors
/// Which stage failed, in one clause.
pub fn judge(status: Option<i32>, serial: &str) -> Result<(), String> {
    for stage in STAGES {
        let line = serial.lines().map(str::trim_end).find_map(|l| l.strip_prefix(stage));
        match line.map(|l| l.trim_start_matches(':').trim()) {
            Some("ok") => {}
            Some(said) if !said.is_empty() => return Err(format!("{stage}: {said}")),
            _ => return Err(format!("the guest did not finish its stage \"{stage}\"")),
        }
    }
    match status {
        Some(PASS_STATUS) => Ok(()),
        Some(s) => Err(format!("the guest passed all stages, but the machine's status is {s}")),
        None => Err("the guest passed all stages, but the machine did not end".to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(except: &str, word: &str) -> String {
        STAGES
            .iter()
            .map(|s| format!("{s}: {}\r\n", if *s == except { word } else { "ok" }))
            .collect()
    }

    #[test]
    fn verdicts() {
        assert_eq!(judge(Some(33), &all("", "")), Ok(()));
        assert!(judge(Some(0), &all("", "")).unwrap_err().contains("status is 0"));
        assert!(judge(None, "").unwrap_err().contains("real mode"));
        let e = judge(Some(35), &all("ring 3", "failed at check 05")).unwrap_err();
        assert_eq!(e, "ring 3: failed at check 05");
    }

    #[test]
    fn the_image_is_flat_and_multiboot() {
        assert!(IMAGE.len() < 64 << 10);
        let word = |at: usize| u32::from_le_bytes(IMAGE[at..at + 4].try_into().unwrap());
        let header = (0..64).step_by(4).find(|&at| word(at) == 0x1bad_b002).expect("no header");
        let sum = word(header).wrapping_add(word(header + 4)).wrapping_add(word(header + 8));
        assert_eq!(sum, 0);
        assert_eq!(word(header + 12) - word(header + 16), header as u32);
        let names = STAGES.iter().map(|s| s.as_bytes());
        for name in names {
            assert!(IMAGE.windows(name.len()).any(|w| w == name));
        }
    }
}
