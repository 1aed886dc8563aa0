//! A thread of the program: runs it, serves its system calls, and brings it its signals.

use super::frame::{self, AltStack, Trap};
use super::program::Program;
use super::signals::{self, Action, Actions, DEFAULT, IGNORE, Inbox, SigInfo};
use super::{strace, syscall, vsyscall};
use std::collections::VecDeque;
use std::sync::Arc;
use tandem_accel::x86::gpr;
use tandem_tcg::user::{Event, NO_OBJECT, REFUSED, Thread};
use tandem_tcg::x86::exception::{Exception, vector};

/// How a thread has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// exit(2) of this thread.
    Thread(i32),
}

/// A thread of the program, on its own host thread.
pub struct Guest {
    /// What it shares with the other threads.
    pub program: Arc<Program>,
    /// Its processor.
    pub thread: Thread,
    /// What is done about signals; shared by threads, not by processes.
    pub actions: Arc<Actions>,
    /// What it blocks.
    pub mask: u64,
    /// What it blocks while a system call waits, and until the signal that ended it has its frame.
    pub waiting_mask: Option<u64>,
    /// Where its handlers may run.
    pub alt: AltStack,
    /// Cleared, and waited for by others, when the thread ends.
    pub clear_tid: u64,
    /// In a process that shares its parent's memory until it executes another program.
    pub borrowed: bool,
    inbox: Box<Inbox>,
    /// Signals that came although the program blocks them.
    deferred: VecDeque<SigInfo>,
    /// The system call that a signal has ended: its number, to begin again if the handler says so.
    pub interrupted: Option<u64>,
}

impl Guest {
    /// A thread that starts with its processor's state. Signals are as `mask` says.
    pub fn new(
        program: &Arc<Program>,
        mut thread: Thread,
        actions: Arc<Actions>,
        mask: u64,
    ) -> Guest {
        let inbox = Inbox::new(thread.bell(), thread.process());
        Guest {
            program: program.clone(),
            thread,
            actions,
            mask,
            waiting_mask: None,
            alt: AltStack::default(),
            clear_tid: 0,
            borrowed: false,
            inbox,
            deferred: VecDeque::new(),
            interrupted: None,
        }
    }

    /// Whether a signal waits, for calls that are not to begin then.
    pub fn waits(&self) -> &std::sync::atomic::AtomicBool {
        &self.inbox.waiting
    }

    /// Makes this host thread the program's thread again, after another has borrowed it.
    pub fn enter(&self) {
        Inbox::enter(&*self.inbox);
    }

    /// Runs until the thread ends.
    pub fn run(&mut self) -> End {
        let before = Inbox::enter(&*self.inbox);
        signals::block(self.mask);
        let end = loop {
            match self.thread.run() {
                Event::Syscall => {
                    if let Some(end) = self.serve() {
                        break end;
                    }
                }
                Event::Exception(e) => self.fault(e),
                Event::Interrupt(v) => self.interrupt(v),
                Event::Rung => {}
                Event::Broken(e) => {
                    crate::log::error(&format!("{}: {}", self.program.name(), e));
                    signals::die(libc::SIGABRT);
                }
            }
            self.deliver();
        };
        signals::block(u64::MAX);
        Inbox::enter(before);
        end
    }

    /// The system call that the program asks for.
    fn serve(&mut self) -> Option<End> {
        let cpu = self.thread.cpu();
        let nr = cpu.gpr[gpr::RAX];
        let args = [gpr::RDI, gpr::RSI, gpr::RDX, 10, 8, 9].map(|r| cpu.gpr[r]);
        let traced = self.program.strace.then(|| strace::Line::begin(nr, args));
        let answer = syscall::serve(self, nr, args);
        if let Some(line) = traced {
            line.end(&answer);
        }
        match answer {
            syscall::Answer::Value(v) => self.thread.cpu().gpr[gpr::RAX] = v as u64,
            syscall::Answer::Interrupted { begun } => self.was_interrupted(nr, begun),
            syscall::Answer::None => {}
            syscall::Answer::End(end) => return Some(end),
        }
        None
    }

    /// A signal has ended the call, or kept it from beginning.
    fn was_interrupted(&mut self, nr: u64, begun: bool) {
        let cpu = self.thread.cpu();
        if begun {
            cpu.gpr[gpr::RAX] = -i64::from(libc::EINTR) as u64;
            self.interrupted = Some(nr);
        } else {
            // The signal came first, and then the call: SYSCALL, two bytes long, once more.
            cpu.rip = cpu.rip.wrapping_sub(2);
        }
    }

    /// An exception of the program's own.
    fn fault(&mut self, e: Exception) {
        if vsyscall::serve(self, &e) {
            return;
        }
        let rip = self.thread.cpu().rip;
        let mapped = e.error.unwrap_or(0) & REFUSED != 0;
        let no_object = e.error.unwrap_or(0) & NO_OBJECT != 0;
        let (signal, code, addr) = match e.vector {
            vector::DE => (libc::SIGFPE, code::FPE_INTDIV, rip),
            vector::DB => (libc::SIGTRAP, code::TRAP_TRACE, rip),
            vector::UD => (libc::SIGILL, code::ILL_ILLOPN, rip),
            vector::PF if no_object => (libc::SIGBUS, code::BUS_ADRERR, e.addr.unwrap_or(0)),
            vector::PF if mapped => (libc::SIGSEGV, code::SEGV_ACCERR, e.addr.unwrap_or(0)),
            vector::PF => (libc::SIGSEGV, code::SEGV_MAPERR, e.addr.unwrap_or(0)),
            vector::MF | vector::XM => (libc::SIGFPE, self.fp_code(e.vector), rip),
            vector::AC => (libc::SIGBUS, code::BUS_ADRALN, 0),
            vector::SS => (libc::SIGBUS, code::KERNEL, 0),
            _ => (libc::SIGSEGV, code::KERNEL, 0),
        };
        let trap = Trap {
            vector: e.vector.into(),
            error: (e.error.unwrap_or(0) & !(NO_OBJECT | REFUSED)).into(),
            address: if e.vector == vector::PF { e.addr.unwrap_or(0) } else { 0 },
        };
        self.force(SigInfo::fault(signal, code, addr), trap);
    }

    /// INT n and its kin.
    fn interrupt(&mut self, v: u8) {
        let rip = self.thread.cpu().rip;
        let signal = match v {
            vector::DB => SigInfo::fault(libc::SIGTRAP, code::TRAP_BRKPT, rip),
            vector::BP => SigInfo::fault(libc::SIGTRAP, code::KERNEL, 0),
            // INT n of what a program may not raise is #GP at the instruction (two bytes).
            _ => {
                self.thread.cpu().rip = rip.wrapping_sub(2);
                let trap = Trap { vector: 13, error: u64::from(v) << 3 | 2, address: 0 };
                return self.force(SigInfo::fault(libc::SIGSEGV, code::KERNEL, 0), trap);
            }
        };
        self.force(signal, Trap { vector: v.into(), ..Trap::default() });
    }

    /// `si_code` of the floating-point exception that is pending.
    fn fp_code(&mut self, v: u8) -> i32 {
        let raised = match v {
            vector::MF => {
                let cpu = self.thread.cpu();
                u32::from(cpu.fsw & !cpu.fcw)
            }
            _ => {
                let mxcsr = self.thread.env().core.mxcsr;
                mxcsr & !(mxcsr >> 7)
            }
        };
        [
            (1, code::FPE_FLTINV),
            (4, code::FPE_FLTDIV),
            (8, code::FPE_FLTOVF),
            (16 | 2, code::FPE_FLTUND),
            (32, code::FPE_FLTRES),
        ]
        .into_iter()
        .find(|(bits, _)| raised & bits != 0)
        .map_or(0, |(_, code)| code)
    }

    /// A signal that cannot wait: if it is blocked or ignored, it ends the process.
    fn force(&mut self, info: SigInfo, trap: Trap) {
        let signal = info.signal();
        let action = self.actions.get(signal);
        if action.handler == DEFAULT
            || action.handler == IGNORE
            || self.mask & signals::bit(signal) != 0
        {
            self.crash(signal, trap);
        }
        self.enter_handler(&action, &info, trap);
    }

    /// Ends the process because of a fault of its own.
    fn crash(&mut self, signal: i32, trap: Trap) -> ! {
        let rip = self.thread.cpu().rip;
        let at = match trap.vector {
            14 => format!(", accessing {:#x}", trap.address),
            _ => String::new(),
        };
        let what = format!(
            "{}: the program was ended by {} at {rip:#x}{at}",
            self.program.name(),
            signals::name(signal)
        );
        crate::log::error(&what);
        signals::die(signal)
    }

    /// Brings the program the signals that have come and that it does not block.
    pub fn deliver(&mut self) {
        let blocked = self.waiting_mask.take().unwrap_or(self.mask);
        let mut came = false;
        if let Some(info) = self.inbox.take() {
            came = true;
            self.deferred.push_back(info);
        }
        let ready = |i: &SigInfo| blocked & signals::bit(i.signal()) == 0;
        while let Some(at) = self.deferred.iter().position(ready) {
            let Some(info) = self.deferred.remove(at) else { break };
            let signal = info.signal();
            let action = self.actions.get(signal);
            match action.handler {
                IGNORE => {}
                DEFAULT if signals::ends(signal) => signals::die(signal),
                DEFAULT => {}
                _ => {
                    self.begin_again_if(action.flags & libc::SA_RESTART as u64 != 0);
                    self.enter_handler(&action, &info, Trap::default());
                    break;
                }
            }
        }
        // Without a handler, the call goes on.
        self.begin_again_if(true);
        if came {
            signals::block(self.mask);
        }
    }

    /// Has a call begin again that a signal has ended, if `wanted` and if it is one that does.
    fn begin_again_if(&mut self, wanted: bool) {
        if let Some(nr) = self.interrupted.take().filter(|nr| wanted && syscall::restarts(*nr)) {
            let cpu = self.thread.cpu();
            cpu.rip = cpu.rip.wrapping_sub(2);
            cpu.gpr[gpr::RAX] = nr;
        }
    }

    fn enter_handler(&mut self, action: &Action, info: &SigInfo, trap: Trap) {
        let signal = info.signal();
        let pushed = frame::push(&mut self.thread, action, info, trap, self.mask, self.alt);
        if let Err(e) = pushed {
            let address = e.addr.unwrap_or(0);
            self.crash(libc::SIGSEGV, Trap { vector: 14, error: 0, address });
        }
        if self.alt.flags & frame::SS_AUTODISARM != 0 {
            self.alt = AltStack::default();
        }
        self.mask |= action.mask;
        if action.flags & libc::SA_NODEFER as u64 == 0 {
            self.mask |= signals::bit(signal);
        }
        self.mask &= !signals::SURE;
        if action.flags & libc::SA_RESETHAND as u64 != 0 {
            self.actions.set(signal, Action::default());
        }
        signals::block(self.mask);
    }

    /// rt_sigreturn(2).
    pub fn return_from_handler(&mut self) {
        match frame::pop(&mut self.thread) {
            Ok(r) => {
                self.mask = r.mask & !signals::SURE;
                self.alt = AltStack { flags: r.stack.flags & frame::SS_AUTODISARM, ..r.stack };
                signals::block(self.mask);
            }
            Err(e) => {
                let address = e.addr.unwrap_or(0);
                self.crash(libc::SIGSEGV, Trap { vector: 14, error: 0, address });
            }
        }
    }
}

/// `si_code` values (Linux `uapi/asm-generic/siginfo.h`).
mod code {
    pub const KERNEL: i32 = 0x80;
    pub const ILL_ILLOPN: i32 = 2;
    pub const FPE_INTDIV: i32 = 1;
    pub const FPE_FLTDIV: i32 = 3;
    pub const FPE_FLTOVF: i32 = 4;
    pub const FPE_FLTUND: i32 = 5;
    pub const FPE_FLTRES: i32 = 6;
    pub const FPE_FLTINV: i32 = 7;
    pub const SEGV_MAPERR: i32 = 1;
    pub const SEGV_ACCERR: i32 = 2;
    pub const BUS_ADRALN: i32 = 1;
    pub const BUS_ADRERR: i32 = 2;
    pub const TRAP_BRKPT: i32 = 1;
    pub const TRAP_TRACE: i32 = 2;
}
