//! The oracle: runs whole programs on the host processor, up to the exception that ends them.
//!
//! The program's address space ([`super::layout`]) is mapped in this process. A trampoline loads all
//! registers (XRSTOR, then IRETQ for RIP, RFLAGS, RSP and the segments) and the signal that the
//! kernel makes of the final exception carries all of them back. A system-call filter forbids
//! system calls from the program's code.

use super::layout::{CODE, CODE_LEN, CS16, DATA, DATA_LEN, DS16, Memory, READ_ONLY_LEN, selectors};
use super::state::{FLAGS, Outcome, State, Trap, has_error};
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tandem_tcg::x86::exception::vector;

/// Bytes of an XSAVE area with everything up to AVX-512.
const AREA: usize = 4096;
/// XSTATE_BV in an XSAVE area.
const HEADER: usize = 512;
const X87: u64 = 1;
const AVX: u64 = 4;
const OPMASK: u64 = 1 << 5;
const ZMM_HIGH: u64 = 1 << 6;
const ZMM_16_31: u64 = 1 << 7;

/// What trampoline and signal handler share. Field offsets are known to [`trampoline`].
#[repr(C, align(64))]
struct Context {
    area: [u8; AREA],
    gpr: [u64; 16],
    /// RIP, CS, RFLAGS, RSP, SS for IRETQ.
    frame: [u64; 5],
    fs_gs: [u64; 2],
    data_selector: u64,
    xcr0: u64,
    host_sp: u64,
    host_fs: u64,
    host_mxcsr: u64,
    /// What the handler found.
    out_gpr: [u64; 16],
    out_rip: u64,
    out_flags: u64,
    trap: u64,
    error: u64,
    cr2: u64,
    /// The handler got here.
    seen: u64,
    /// Where the trampoline goes on.
    back: u64,
    /// Size of the extended area in the signal frame.
    xsave_size: u64,
}

/// Address of the [`Context`] while a program runs, for the signal handler.
static mut CONTEXT: *mut Context = std::ptr::null_mut();
static RUNNING: AtomicBool = AtomicBool::new(false);
/// Handlers by signal from before there were ours.
static PREVIOUS: [AtomicUsize; 32] = [const { AtomicUsize::new(0) }; 32];

/// The host processor.
pub struct Host {
    context: *mut Context,
    entry: *const u8,
    /// Writable view of the code.
    code: *mut u8,
    read_only: *mut u8,
    /// Offsets of XSAVE components 2, 5, 6, 7.
    offsets: [usize; 8],
    xcr0: u64,
}

fn map(addr: u64, len: usize, prot: i32, flags: i32, fd: i32) -> *mut u8 {
    // SAFETY: a new mapping; a fixed one replaces nothing.
    let p = unsafe { libc::mmap(addr as *mut libc::c_void, len, prot, flags, fd, 0) };
    assert!(
        p != libc::MAP_FAILED && (addr == 0 || p as u64 == addr),
        "no room at {addr:#x}: {}",
        std::io::Error::last_os_error()
    );
    p.cast()
}

/// Maps `len` bytes at `addr` with protection `prot`; returns another, writable view of them.
fn two_views(addr: u64, len: usize, prot: i32) -> *mut u8 {
    // SAFETY: a name and no flags.
    let fd = unsafe { libc::memfd_create(c"isa".as_ptr(), 0) };
    assert!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
    // SAFETY: a descriptor of our own.
    assert_eq!(unsafe { libc::ftruncate(fd, len as i64) }, 0);
    let fixed = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
    map(addr, len, prot, fixed, fd);
    let both = libc::PROT_READ | libc::PROT_WRITE;
    let view = map(0, len, both, libc::MAP_SHARED | libc::MAP_POPULATE, fd);
    // SAFETY: the mappings keep the memory.
    unsafe { libc::close(fd) };
    view
}

/// Linux's `struct user_desc`.
#[repr(C)]
struct UserDesc {
    entry: u32,
    base: u32,
    limit: u32,
    flags: u32,
}

fn make_segments() {
    // Bits: 1–2 contents (2 = code), 6 available to software.
    let code = UserDesc {
        entry: u32::from(CS16 >> 3),
        base: CODE as u32,
        limit: 0xffff,
        flags: 2 << 1 | 1 << 6,
    };
    let data = UserDesc {
        entry: u32::from(DS16 >> 3),
        base: DATA as u32,
        limit: DATA_LEN as u32 - 1,
        flags: 1 << 6,
    };
    for d in [code, data] {
        // SAFETY: modify_ldt reads the descriptor, whose size is given.
        let r = unsafe { libc::syscall(libc::SYS_modify_ldt, 1, &d, size_of::<UserDesc>()) };
        assert_eq!(r, 0, "modify_ldt: {}", std::io::Error::last_os_error());
    }
}

/// [`vendor`] of AMD's processors, which translated ones follow where the architecture leaves a choice.
pub const AMD: &str = "AuthenticAMD";

/// The host processor's vendor (CPUID leaf 0).
pub fn vendor() -> String {
    let id = __cpuid(0);
    let bytes = [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes);
    String::from_utf8_lossy(bytes.as_flattened()).into_owned()
}

/// System calls from the program's code raise SIGSYS.
fn forbid_system_calls() {
    const LD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const GE: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
    const EQ: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RET: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let op = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    // Offsets in `struct seccomp_data`: instruction pointer at 8, low half first.
    let filter = [
        op(LD, 12, 0, 0),
        op(EQ, 0, 0, 4),
        op(LD, 8, 0, 0),
        op(GE, CODE as u32, 0, 2),
        op(GE, CODE as u32 + CODE_LEN as u32 + 1, 1, 0),
        op(RET, libc::SECCOMP_RET_TRAP, 0, 0),
        op(RET, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program is a valid filter and is copied by the kernel.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let r = libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program);
        assert_eq!(r, 0, "seccomp: {}", std::io::Error::last_os_error());
    }
}

/// `op reg, [context + at]` with the context's address in RAX.
fn rax_based(c: &mut Vec<u8>, opcode: u8, reg: u8, at: usize) {
    c.extend([0x48 | (reg >> 3) << 2, opcode, 0x80 | (reg & 7) << 3]);
    c.extend((at as u32).to_le_bytes());
}

/// The code that enters a program, and where the signal handler goes back to.
fn trampoline(context: u64) -> (Vec<u8>, usize) {
    use std::mem::offset_of;
    let load_rax = |c: &mut Vec<u8>| {
        c.extend([0x48, 0xb8]);
        c.extend(context.to_le_bytes());
    };
    // push rbx, rbp, r12..r15
    let mut c = vec![0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57];
    load_rax(&mut c);
    rax_based(&mut c, 0x89, 4, offset_of!(Context, host_sp));
    // rdfsbase rcx
    c.extend([0xf3, 0x48, 0x0f, 0xae, 0xc1]);
    rax_based(&mut c, 0x89, 1, offset_of!(Context, host_fs));
    // stmxcsr [host_mxcsr]
    c.extend([0x0f, 0xae, 0x98]);
    c.extend((offset_of!(Context, host_mxcsr) as u32).to_le_bytes());
    // mov ecx, selector; mov ds, ecx; mov es, ecx
    rax_based(&mut c, 0x8b, 1, offset_of!(Context, data_selector));
    c.extend([0x8e, 0xd9, 0x8e, 0xc1]);
    rax_based(&mut c, 0x8b, 1, offset_of!(Context, fs_gs));
    c.extend([0xf3, 0x48, 0x0f, 0xae, 0xd1]); // wrfsbase rcx
    rax_based(&mut c, 0x8b, 1, offset_of!(Context, fs_gs) + 8);
    c.extend([0xf3, 0x48, 0x0f, 0xae, 0xd9]); // wrgsbase rcx
    // mov rbx, rax; mov eax, xcr0; xor edx, edx; xrstor64 [rbx]; mov rax, rbx
    rax_based(&mut c, 0x8b, 1, offset_of!(Context, xcr0));
    c.extend([0x48, 0x89, 0xc3, 0x89, 0xc8, 0x31, 0xd2, 0x48, 0x0f, 0xae, 0x2b, 0x48, 0x89, 0xd8]);
    for i in (0..5).rev() {
        // push [frame + i]
        c.extend([0xff, 0xb0]);
        c.extend((offset_of!(Context, frame) as u32 + 8 * i).to_le_bytes());
    }
    for r in (1..16).filter(|r| *r != 4).chain([0]) {
        rax_based(&mut c, 0x8b, r, offset_of!(Context, gpr) + 8 * usize::from(r));
    }
    c.extend([0x48, 0xcf]); // iretq
    let back = c.len();
    // push 0x202; popfq: the kernel leaves NT and ID as the program had them.
    c.extend([0x68, 0x02, 0x02, 0, 0, 0x9d]);
    load_rax(&mut c);
    rax_based(&mut c, 0x8b, 1, offset_of!(Context, host_fs));
    c.extend([0xf3, 0x48, 0x0f, 0xae, 0xd1]); // wrfsbase rcx
    // xor ecx, ecx; mov ds, ecx; mov es, ecx; wrgsbase rcx
    c.extend([0x31, 0xc9, 0x8e, 0xd9, 0x8e, 0xc1, 0xf3, 0x48, 0x0f, 0xae, 0xd9]);
    c.extend([0xdb, 0xe3]); // fninit
    c.extend([0x0f, 0xae, 0x90]); // ldmxcsr [host_mxcsr]
    c.extend((offset_of!(Context, host_mxcsr) as u32).to_le_bytes());
    c.extend([0xc5, 0xf8, 0x77]); // vzeroupper
    c.extend([0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);
    (c, back)
}

/// Linux's gregs in encoding order.
const GREGS: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

extern "C" fn on_signal(sig: libc::c_int, info: *mut libc::siginfo_t, uc: *mut libc::c_void) {
    // SAFETY: clears AC, which the program may have set, before anything that it would trap.
    unsafe {
        std::arch::asm!("pushfq", "and dword ptr [rsp], 0xfffbffff", "popfq");
    }
    if !RUNNING.load(Ordering::Relaxed) {
        if sig == libc::SIGVTALRM {
            // Its program has just ended.
            return;
        }
        // Not a program's: whose it was before.
        let old = PREVIOUS[sig as usize].load(Ordering::Relaxed);
        if old == libc::SIG_DFL || old == libc::SIG_IGN {
            // SAFETY: restores the default, under which the signal comes again.
            unsafe { libc::signal(sig, libc::SIG_DFL) };
            return;
        }
        // SAFETY: a handler that was in force; one with a single argument ignores the others.
        let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
            unsafe { std::mem::transmute(old) };
        return handler(sig, info, uc);
    }
    // SAFETY: `uc` is this signal's context; a program was running, so CONTEXT is set and used by
    // nobody else. FS belongs to the program: nothing here touches thread-local storage.
    unsafe {
        let c = &mut *CONTEXT;
        let m = &mut (*uc.cast::<libc::ucontext_t>()).uc_mcontext;
        let g = &mut m.gregs;
        for (to, from) in c.out_gpr.iter_mut().zip(GREGS) {
            *to = g[from as usize] as u64;
        }
        c.out_rip = g[libc::REG_RIP as usize] as u64;
        c.out_flags = g[libc::REG_EFL as usize] as u64;
        c.trap = if sig == libc::SIGSYS || sig == libc::SIGVTALRM {
            0xff
        } else {
            g[libc::REG_TRAPNO as usize] as u64
        };
        c.error = g[libc::REG_ERR as usize] as u64;
        c.cr2 = g[libc::REG_CR2 as usize] as u64;
        let from = m.fpregs.cast::<u8>();
        std::ptr::copy_nonoverlapping(from, c.area.as_mut_ptr(), c.xsave_size as usize);
        c.seen = 1;
        g[libc::REG_RIP as usize] = c.back as i64;
        g[libc::REG_RSP as usize] = c.host_sp as i64;
        g[libc::REG_EFL as usize] = 0x202;
        // CS, GS, FS, SS: 64-bit user code and its stack.
        g[libc::REG_CSGSFS as usize] = 0x33 | 0x2b << 48;
    }
    RUNNING.store(false, Ordering::Relaxed);
}

/// Microseconds of processor time that a program may take.
const LONGEST: i64 = 100_000;

/// Makes SIGVTALRM come after this many microseconds of processor time, or not at all.
fn set_timer(microseconds: i64) {
    let none = libc::timeval { tv_sec: 0, tv_usec: 0 };
    let t = libc::itimerval {
        it_interval: none,
        it_value: libc::timeval { tv_usec: microseconds, ..none },
    };
    // SAFETY: `t` is what the call wants.
    unsafe { libc::setitimer(libc::ITIMER_VIRTUAL, &t, std::ptr::null_mut()) };
}

fn take_signals() {
    let stack = map(
        0,
        1 << 17,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
        -1,
    );
    // SAFETY: a stack of our own that is never freed, and a handler that keeps to what signal
    // handlers may do.
    unsafe {
        let s = libc::stack_t { ss_sp: stack.cast(), ss_flags: 0, ss_size: 1 << 17 };
        assert_eq!(libc::sigaltstack(&s, std::ptr::null_mut()), 0);
        let mut a: libc::sigaction = std::mem::zeroed();
        a.sa_sigaction = on_signal as *const () as usize;
        a.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for sig in [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGFPE,
            libc::SIGILL,
            libc::SIGTRAP,
            libc::SIGSYS,
            libc::SIGVTALRM,
        ] {
            let mut old: libc::sigaction = std::mem::zeroed();
            assert_eq!(libc::sigaction(sig, &a, &mut old), 0);
            PREVIOUS[sig as usize].store(old.sa_sigaction, Ordering::Relaxed);
        }
    }
}

impl Host {
    /// Sets the address space up. Once in a process, on the thread that will run programs.
    pub fn new() -> Host {
        let code = two_views(CODE, CODE_LEN, libc::PROT_READ | libc::PROT_EXEC);
        let both = libc::PROT_READ | libc::PROT_WRITE;
        let fixed = libc::MAP_PRIVATE
            | libc::MAP_ANONYMOUS
            | libc::MAP_FIXED_NOREPLACE
            | libc::MAP_POPULATE;
        map(DATA, DATA_LEN, both, fixed, -1);
        let read_only = two_views(DATA + DATA_LEN as u64, READ_ONLY_LEN, libc::PROT_READ);
        make_segments();
        let anon = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        let context: *mut Context = map(0, size_of::<Context>(), both, anon, -1).cast();
        let (bytes, back) = trampoline(context as u64);
        let entry = map(0, 4096, both | libc::PROT_EXEC, anon, -1);
        // SAFETY: XGETBV is there on every host with AVX; CPUID leaf 0xd describes what it says.
        let xcr0 = unsafe { _xgetbv(0) } & 0xe7;
        let offsets = std::array::from_fn(|i| {
            if i < 2 || xcr0 >> i & 1 == 0 { 0 } else { __cpuid_count(0xd, i as u32).ebx as usize }
        });
        // SAFETY: both mappings are new and large enough.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), entry, bytes.len());
            (*context).back = entry as u64 + back as u64;
            (*context).xcr0 = xcr0;
            let end = |i: usize| offsets[i] + __cpuid_count(0xd, i as u32).eax as usize;
            let size = (2..8).filter(|&i| offsets[i] != 0).map(end).max().unwrap_or(576);
            assert!(size <= AREA);
            (*context).xsave_size = size as u64;
            CONTEXT = context;
        }
        take_signals();
        forbid_system_calls();
        Host { context, entry, code, read_only, offsets, xcr0 }
    }

    /// Runs the program in `memory` from `state` in code of size `bits`; afterwards `memory.data` is
    /// what it left. `None` if it tried a system call, or does not end.
    pub fn run(&mut self, state: &State, memory: &mut Memory, bits: u32) -> Option<Outcome> {
        // SAFETY: the mappings are ours and have these lengths; the context is in use by nobody
        // else; the trampoline keeps what the ABI wants kept, and the program ends in the handler,
        // which goes back to the trampoline.
        unsafe {
            std::ptr::copy_nonoverlapping(memory.code.as_ptr(), self.code, CODE_LEN);
            std::ptr::copy_nonoverlapping(memory.read_only.as_ptr(), self.read_only, READ_ONLY_LEN);
            std::ptr::copy_nonoverlapping(memory.data.as_ptr(), DATA as *mut u8, DATA_LEN);
            let c = &mut *self.context;
            self.put(c, state, bits);
            set_timer(LONGEST);
            RUNNING.store(true, Ordering::Relaxed);
            let f: extern "C" fn() = std::mem::transmute(self.entry);
            f();
            set_timer(0);
            std::ptr::copy_nonoverlapping(DATA as *const u8, memory.data.as_mut_ptr(), DATA_LEN);
        }
        // SAFETY: as above.
        let c = unsafe { &mut *self.context };
        assert_eq!(c.seen, 1, "the program came back without a signal");
        (c.trap != 0xff).then(|| self.get(c, state, bits))
    }

    fn put(&self, c: &mut Context, s: &State, bits: u32) {
        c.gpr = s.gpr;
        let (code, data) = selectors(bits);
        c.frame = [s.rip, code.into(), s.flags & FLAGS | 0x202, s.gpr[4], data.into()];
        c.fs_gs = s.fs_gs;
        c.data_selector = if bits == 64 { 0 } else { data.into() };
        c.seen = 0;
        let a = &mut c.area;
        a[..HEADER + 64].fill(0);
        a[0..2].copy_from_slice(&s.cw.to_le_bytes());
        a[2..4].copy_from_slice(&s.sw.to_le_bytes());
        a[4] = s.tags;
        a[24..28].copy_from_slice(&s.mxcsr.to_le_bytes());
        for (i, st) in s.st.iter().enumerate() {
            a[32 + 16 * i..][..10].copy_from_slice(st);
        }
        a[HEADER..HEADER + 8].copy_from_slice(&self.xcr0.to_le_bytes());
        let has = |bit: u64| self.xcr0 & bit != 0;
        for (i, z) in s.zmm.iter().enumerate() {
            if i < 16 {
                a[160 + 16 * i..][..16].copy_from_slice(&z[..16]);
                if has(AVX) {
                    a[self.offsets[2] + 16 * i..][..16].copy_from_slice(&z[16..32]);
                }
                if has(ZMM_HIGH) {
                    a[self.offsets[6] + 32 * i..][..32].copy_from_slice(&z[32..]);
                }
            } else if has(ZMM_16_31) {
                a[self.offsets[7] + 64 * (i - 16)..][..64].copy_from_slice(z);
            }
        }
        if has(OPMASK) {
            for (i, k) in s.k.iter().enumerate() {
                a[self.offsets[5] + 8 * i..][..8].copy_from_slice(&k.to_le_bytes());
            }
        }
    }

    fn get(&self, c: &Context, before: &State, bits: u32) -> Outcome {
        let mut s = State { fs_gs: before.fs_gs, ..State::default() };
        s.gpr = c.out_gpr;
        s.rip = c.out_rip;
        s.flags = c.out_flags & FLAGS;
        if bits < 64 {
            // The upper halves mean nothing after 32-bit code, nor does that of a 16-bit stack
            // pointer.
            s.gpr[8..].fill(0);
            s.gpr.iter_mut().for_each(|v| *v &= u64::from(u32::MAX));
            if bits == 16 {
                s.gpr[4] &= 0xffff;
            }
        }
        let a = &c.area;
        let mut word = [0; 8];
        word.copy_from_slice(&a[HEADER..HEADER + 8]);
        let here = u64::from_le_bytes(word) | X87 | 2;
        s.cw = u16::from_le_bytes([a[0], a[1]]);
        s.sw = u16::from_le_bytes([a[2], a[3]]);
        s.tags = a[4];
        s.mxcsr = u32::from_le_bytes([a[24], a[25], a[26], a[27]]);
        for (i, st) in s.st.iter_mut().enumerate() {
            st.copy_from_slice(&a[32 + 16 * i..][..10]);
        }
        let has = |bit: u64| self.xcr0 & here & bit != 0;
        for (i, z) in s.zmm.iter_mut().enumerate() {
            if i < 16 {
                z[..16].copy_from_slice(&a[160 + 16 * i..][..16]);
                if has(AVX) {
                    z[16..32].copy_from_slice(&a[self.offsets[2] + 16 * i..][..16]);
                }
                if has(ZMM_HIGH) {
                    z[32..].copy_from_slice(&a[self.offsets[6] + 32 * i..][..32]);
                }
            } else if has(ZMM_16_31) {
                z.copy_from_slice(&a[self.offsets[7] + 64 * (i - 16)..][..64]);
            }
        }
        if has(OPMASK) {
            for (i, k) in s.k.iter_mut().enumerate() {
                let mut v = [0; 8];
                v.copy_from_slice(&a[self.offsets[5] + 8 * i..][..8]);
                *k = u64::from_le_bytes(v);
            }
        }
        let v = c.trap as u8;
        let error = if has_error(v) { c.error as u32 } else { 0 };
        let addr = if v == vector::PF { c.cr2 } else { 0 };
        Outcome { state: s, trap: Trap { vector: v, error, addr } }
    }
}
