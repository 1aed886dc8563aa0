//! The first stack of a program: arguments, environment and auxiliary vector (System V ABI for AMD64,
//! §3.4.1; getauxval(3)).

use super::elf::Loaded;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

/// Entries of the auxiliary vector (Linux `uapi/linux/auxvec.h`).
mod at {
    pub const NULL: u64 = 0;
    pub const PHDR: u64 = 3;
    pub const PHENT: u64 = 4;
    pub const PHNUM: u64 = 5;
    pub const PAGESZ: u64 = 6;
    pub const BASE: u64 = 7;
    pub const FLAGS: u64 = 8;
    pub const ENTRY: u64 = 9;
    pub const UID: u64 = 11;
    pub const EUID: u64 = 12;
    pub const GID: u64 = 13;
    pub const EGID: u64 = 14;
    pub const PLATFORM: u64 = 15;
    pub const HWCAP: u64 = 16;
    pub const CLKTCK: u64 = 17;
    pub const SECURE: u64 = 23;
    pub const RANDOM: u64 = 25;
    pub const HWCAP2: u64 = 26;
    pub const EXECFN: u64 = 31;
    pub const MINSIGSTKSZ: u64 = 51;
}

/// What a program is started with.
pub struct Start<'a> {
    /// Its arguments, the first being its name.
    pub args: &'a [OsString],
    /// `NAME=value`.
    pub env: &'a [OsString],
    /// The name that it was found by.
    pub name: &'a OsString,
    /// The program.
    pub program: Loaded,
    /// Its interpreter.
    pub interpreter: Option<Loaded>,
    /// CPUID leaf 1, EDX.
    pub hwcap: u32,
    /// AT_HWCAP2 of the kernel: FSGSBASE in bit 1.
    pub hwcap2: u32,
    /// Bytes that a signal needs on the stack.
    pub signal_frame: u64,
}

/// A stack's content, and the stack pointer; the bytes end at the top of the stack.
pub struct Image {
    /// From the stack pointer upwards.
    pub bytes: Vec<u8>,
    /// Stack pointer, a multiple of 16.
    pub sp: u64,
    /// The auxiliary vector, as /proc/PID/auxv shows it.
    pub auxv: Vec<u8>,
}

/// Writes the stack that ends at `top`.
pub fn image(start: &Start<'_>, top: u64, random: [u8; 16]) -> Image {
    // Strings, from the top down; kept reversed.
    let mut down: Vec<u8> = Vec::new();
    let mut push = |bytes: &[u8]| {
        down.push(0);
        down.extend(bytes.iter().rev());
        top - down.len() as u64
    };
    let name = push(start.name.as_bytes());
    let env: Vec<u64> = start.env.iter().rev().map(|s| push(s.as_bytes())).collect();
    let args: Vec<u64> = start.args.iter().rev().map(|s| push(s.as_bytes())).collect();
    let platform = push(b"x86_64");
    let random_at = push(&random);
    let uid = |f: unsafe extern "C" fn() -> u32| {
        // SAFETY: getuid and its kin cannot fail.
        u64::from(unsafe { f() })
    };
    let auxv = [
        (at::PHDR, start.program.phdr),
        (at::PHENT, 56),
        (at::PHNUM, start.program.phnum.into()),
        (at::PAGESZ, 4096),
        (at::BASE, start.interpreter.map_or(0, |i| i.bias)),
        (at::FLAGS, 0),
        (at::ENTRY, start.program.entry),
        (at::UID, uid(libc::getuid)),
        (at::EUID, uid(libc::geteuid)),
        (at::GID, uid(libc::getgid)),
        (at::EGID, uid(libc::getegid)),
        (at::PLATFORM, platform),
        (at::HWCAP, start.hwcap.into()),
        (at::CLKTCK, 100),
        (at::SECURE, 0),
        (at::RANDOM, random_at),
        (at::HWCAP2, start.hwcap2.into()),
        (at::EXECFN, name),
        (at::MINSIGSTKSZ, start.signal_frame),
        (at::NULL, 0),
    ];
    let mut words = vec![start.args.len() as u64];
    words.extend(args.iter().rev().chain([&0]));
    words.extend(env.iter().rev().chain([&0]));
    let vector = words.len();
    words.extend(auxv.iter().flat_map(|(k, v)| [k, v]));
    let below = (top - down.len() as u64 - 8 * words.len() as u64) & !15;
    let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let auxv = bytes[8 * vector..].to_vec();
    bytes.resize((top - below) as usize - down.len(), 0);
    bytes.extend(down.iter().rev());
    Image { bytes, sp: below, auxv }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_finds_its_arguments() {
        let program = Loaded { bias: 0, entry: 0x1234, phdr: 0x40, phnum: 3, end: 0 };
        let args = ["ls".into(), "-l".into()];
        let env = ["A=1".into(), "LANG=C".into()];
        let name = "/bin/ls".into();
        let start = Start {
            args: &args,
            env: &env,
            name: &name,
            program,
            interpreter: None,
            hwcap: 1,
            hwcap2: 2,
            signal_frame: 4096,
        };
        let top = 0x7000_0000;
        let i = image(&start, top, [7; 16]);
        assert_eq!((i.sp % 16, i.sp + i.bytes.len() as u64), (0, top));
        let word = |n: usize| u64::from_le_bytes(i.bytes[8 * n..8 * n + 8].try_into().unwrap());
        let text = |p: u64| {
            let rest = &i.bytes[(p - i.sp) as usize..];
            String::from_utf8_lossy(&rest[..rest.iter().position(|b| *b == 0).unwrap()])
                .into_owned()
        };
        assert_eq!((word(0), word(3), word(6)), (2, 0, 0));
        assert_eq!([text(word(1)), text(word(2))], ["ls", "-l"]);
        assert_eq!([text(word(4)), text(word(5))], ["A=1", "LANG=C"]);
        let aux = |k: u64| (7..).step_by(2).find(|&n| word(n) == k).map(|n| word(n + 1)).unwrap();
        assert_eq!(
            (aux(9), aux(5), text(aux(31)), text(aux(15))),
            (0x1234, 3, "/bin/ls".into(), "x86_64".into())
        );
        assert_eq!(i.bytes[(aux(25) - i.sp) as usize..][..16], [7; 16]);
        assert_eq!(i.auxv.len() % 16, 0);
    }
}
