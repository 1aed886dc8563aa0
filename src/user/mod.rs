//! User mode: one Linux program by translation, its system calls on the host.
//!
//! ```text
//!   elf, script ─► stack ─► thread: run ─► system call  ─► syscall ─► host
//!                             ▲            fault, signal ─► frame: the program's handler
//!                             └──────────────────────────────┘
//! ```
//! What always holds:
//!
//! * The program's addresses are the host's; what is mapped where is known to the translator
//!   ([`memory`]).
//! * A crash of the program ends this process by the same signal, with one line that says where.

mod elf;
mod frame;
mod host;
mod memory;
mod program;
mod script;
mod signals;
mod stack;
mod strace;
mod syscall;
mod thread;
mod vsyscall;

use crate::cli::exit::Exit;
use crate::cli::user::UserArgs;
use crate::log;
use elf::{Elf, Loaded};
use memory::Memory;
use program::Program;
use signals::Actions;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tandem_accel::x86::model::{ModelSpec, Platform, Topology, build};
use tandem_accel::x86::{
    ATTR_DB, ATTR_G, ATTR_L, ATTR_P, ATTR_S, FpuState, Segment, X86State, gpr, seg,
};
use tandem_tcg::user::{Process, Prot, Thread};
use thread::{End, Guest};

/// Size of the first stack, unless the limit of the process says otherwise.
const STACK: u64 = 8 << 20;
/// Largest one that is made at once.
const MOST_STACK: u64 = 64 << 20;

/// Runs the program; its exit status is ours.
pub fn run(args: &UserArgs) -> Exit {
    match start(args) {
        Ok(mut guest) => match guest.run() {
            // The first thread ends by itself only through exit(2), which has ended the process.
            End::Thread(status) => Exit::Of(status as u8),
        },
        Err(what) => {
            log::error(&what);
            Exit::Usage
        }
    }
}

/// What is to run, with its arguments: for a script, the program that reads it.
fn resolve(args: &UserArgs) -> Result<(PathBuf, Elf, Vec<OsString>), String> {
    let mut path = search(&args.program);
    let mut words: Vec<OsString> = vec![args.argv0.clone().unwrap_or(args.program.clone())];
    words.extend(args.args.iter().cloned());
    // An interpreter may be a script itself.
    for _ in 0..4 {
        match Elf::open(&path) {
            Ok(elf) => return Ok((path, elf, words)),
            Err(e) => {
                let Some((program, argument)) = script::interpreter(&path) else {
                    return Err(format!("cannot run '{}': {e}", path.display()));
                };
                let mut new = vec![program.clone().into_os_string()];
                new.extend(argument);
                new.push(path.into_os_string());
                new.extend(words.into_iter().skip(1));
                (path, words) = (program, new);
            }
        }
    }
    Err(format!("cannot run '{}': scripts that name scripts go too deep", path.display()))
}

/// A name without a slash is looked for as a shell does.
fn search(program: &OsString) -> PathBuf {
    let name = Path::new(program);
    if program.to_string_lossy().contains('/') {
        return name.into();
    }
    let path = std::env::var_os("PATH").unwrap_or("/usr/bin:/bin".into());
    let found = std::env::split_paths(&path).map(|d| d.join(name)).find(|p| p.is_file());
    found.unwrap_or(name.into())
}

fn start(args: &UserArgs) -> Result<Guest, String> {
    let (path, elf, words) = resolve(args)?;
    let said = |what: &str, e: &dyn std::fmt::Display| format!("{what} '{}': {e}", path.display());
    let table = {
        let faults = |e: Vec<tandem_accel::Error>| {
            e.iter().map(|e| e.to_string()).collect::<Vec<_>>().join("; ")
        };
        let spec = ModelSpec::parse(&args.cpu).map_err(faults)?;
        let supported = Process::supported_cpuid();
        let topology = Topology::new(1, 1, 1).map_err(|e| e.to_string())?;
        let platform = Platform {
            accel: "TCG",
            supported: &supported,
            topology,
            tsc_hz: 1_000_000_000,
            hypervisor: None,
        };
        build(&spec, &platform).map_err(faults)?
    };
    let hwcap = table.query(1, 0).edx;
    let xcr0 = u64::from(table.query(13, 0).eax) & !0x200;
    // Before the translator, whose handlers pass on what is not theirs.
    let actions = Arc::new(Actions::inherited());
    let process = Process::new(args.options()?, table).map_err(|e| e.to_string())?;
    let program = elf.load(&process, true).map_err(|e| said("cannot load", &e))?;
    let interpreter = match &elf.interpreter {
        Some(name) => {
            let file = args.sysroot(name);
            let load = Elf::open(&file).and_then(|e| e.load(&process, false));
            Some(load.map_err(|e| {
                format!("cannot load the program interpreter '{}': {e}", file.display())
            })?)
        }
        None => None,
    };
    let (sp, auxv) =
        first_stack(&process, &elf, &path, &words, args, (program, interpreter, hwcap))?;
    let memory = Memory::new(program.end);
    let exe = std::fs::canonicalize(&path).unwrap_or(path);
    let shared = Arc::new(Program {
        process: process.clone(),
        memory,
        exe,
        args: words,
        auxv,
        options: args.passed_on(),
        strace: args.strace,
    });
    let state = first_state(interpreter.unwrap_or(program).entry, sp, xcr0);
    let thread = Thread::new(&process, &state).map_err(|e| e.to_string())?;
    let mask = signals::block(u64::MAX);
    Ok(Guest::new(&shared, thread, actions, mask))
}

/// Makes and fills the stack; returns its pointer and the auxiliary vector.
fn first_stack(
    process: &Process,
    elf: &Elf,
    path: &Path,
    words: &[OsString],
    args: &UserArgs,
    (program, interpreter, hwcap): (Loaded, Option<Loaded>, u32),
) -> Result<(u64, Vec<u8>), String> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid place for the answer.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_STACK, &mut limit) } == 0;
    let size = if known && limit.rlim_cur != libc::RLIM_INFINITY { limit.rlim_cur } else { STACK };
    let size = size.clamp(STACK / 8, MOST_STACK).next_multiple_of(4096);
    let mut prot = Prot::READ | Prot::WRITE;
    prot.set(Prot::EXEC, elf.exec_stack);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_STACK;
    // SAFETY: a fresh mapping.
    let at =
        unsafe { libc::mmap(std::ptr::null_mut(), size as usize, prot.host_bits(), flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(format!("cannot make a stack: {}", std::io::Error::last_os_error()));
    }
    let (start, top) = (at as u64, at as u64 + size);
    process.mapped(start, size, Some(prot));
    let mut random = [0u8; 16];
    // SAFETY: the buffer is `random`; requests this small are not cut short.
    unsafe { libc::getrandom(random.as_mut_ptr().cast(), random.len(), 0) };
    let env = args.environment();
    let name = path.as_os_str().to_os_string();
    let image = stack::image(
        &stack::Start {
            args: words,
            env: &env,
            name: &name,
            program,
            interpreter,
            hwcap,
            hwcap2: 2,
            signal_frame: 4096,
        },
        top,
        random,
    );
    if image.bytes.len() as u64 > size / 2 {
        return Err("the arguments and the environment do not fit on the stack".into());
    }
    // SAFETY: the image ends at the top of the stack just made, and is smaller than it.
    unsafe {
        let to = image.sp as *mut u8;
        std::ptr::copy_nonoverlapping(image.bytes.as_ptr(), to, image.bytes.len());
    }
    Ok((image.sp, image.auxv))
}

/// A processor in 64-bit mode, ring 3, as a kernel starts a program.
fn first_state(rip: u64, sp: u64, xcr0: u64) -> X86State {
    let mut s = X86State::default();
    let ring3 = ATTR_P | ATTR_S | ATTR_G | 3 << 5;
    s.seg = [Segment { selector: 0, ..Segment::flat(0, ring3 | ATTR_DB | 3) }; 8];
    s.seg[seg::CS] = Segment::flat(0x33, ring3 | ATTR_L | 0xb);
    s.seg[seg::SS] = Segment::flat(0x2b, ring3 | ATTR_DB | 3);
    s.seg[seg::LDTR] = Segment { limit: 0, ..Segment::flat(0, ATTR_P | 2) };
    s.seg[seg::TR] = Segment::flat(0x40, ATTR_P | 0xb);
    (s.rip, s.gpr, s.gpr[gpr::RSP], s.rflags) = (rip, [0; 16], sp, 0x202);
    // PE, MP, ET, NE, WP, PG.
    s.cr0 = 0x8001_0033;
    // PAE, OSFXSR, OSXMMEXCPT, and what programs see of the others: FSGSBASE, OSXSAVE.
    s.cr4 = 1 << 5 | 1 << 9 | 1 << 10 | 1 << 16 | 1 << 18;
    // SCE, LME, LMA, NXE.
    s.efer = 0xd01;
    s.xcr0 = xcr0 | 3;
    s.fpu = FpuState { fcw: 0x37f, ftw: 0, ..FpuState::default() };
    s
}
