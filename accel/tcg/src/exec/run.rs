//! The execution loop of one vCPU.

use super::find::{self, NoCode};
use super::{Vcpu, leave};
use crate::log;
use crate::softmmu::{PAGE_MASK, PAGE_SIZE};
use crate::tb::{LOCK_RETRY, SMC_RETRY, WRAP_RETRY};
use crate::user::{NO_OBJECT, REFUSED};
use crate::x86::bits::cr4;
use crate::x86::debug;
use crate::x86::exception::{Exception, vector};
use crate::x86::interrupt::{self, Outcome, Poll};
use crate::x86::mode::Mode;
use crate::x86::paging::Access;
use crate::x86::{Env, stack_fault, state};
use std::sync::atomic::Ordering;
use tandem_accel::vcpu::{StopReason, VcpuExit, VcpuRunner};
use tandem_accel::x86::X86State;
use tandem_accel::{Error, Result};
use tandem_jit::code::{EnvMem, ExitRef};
use tandem_jit::target::{
    LEAVE_CHAIN, LEAVE_FAULT, LEAVE_ILLEGAL, LEAVE_LOOKUP, LEAVE_PAGE, LEAVE_REQUEST, LEAVE_TRAP,
    TRAP_ACCESS, TRAP_BUS, TRAP_MAPPED, TRAP_NO_ADDRESS, TRAP_PRESENT, TRAP_WRITE,
};

/// Runs one vCPU; lives on its thread.
pub struct Runner {
    mem: EnvMem,
    vcpu: Box<Vcpu>,
    /// Fewer instructions may be executed than the next block has.
    last_few: bool,
    /// Accesses that were refused and tried again although nothing is in their way.
    retries: u32,
}

/// After so many, what is in the way is not known here.
const MOST_RETRIES: u32 = 1000;

impl Runner {
    /// A vCPU in the given state.
    pub fn new(mem: EnvMem, vcpu: Box<Vcpu>, initial: &X86State) -> Result<Runner> {
        let mut r = Runner { mem, vcpu, last_few: false, retries: 0 };
        let vcpu: *mut Vcpu = &mut *r.vcpu;
        let env = r.env();
        env.core.vcpu = vcpu.cast();
        env.tlb_init();
        env.vcpu().bell.connect(&env.core);
        state::load(env, initial)?;
        env.core.mode = Mode::of(&env.cpu).bits();
        Ok(r)
    }

    /// All state of the vCPU.
    pub fn env(&mut self) -> &mut Env {
        // SAFETY: the memory holds an `Env` (zeroed memory is a valid one: plain integers and
        // arrays), owned by self, and generated code is not running while Rust code of the loop is.
        unsafe { &mut *self.mem.as_ptr().cast::<Env>() }
    }

    /// Delivers an exception; a triple fault stops the vCPU.
    fn deliver(&mut self, e: Exception) -> Option<VcpuExit> {
        let env = self.env();
        log::exception(env, &e);
        env.vcpu().counters.exceptions.hit();
        match env.between_blocks(|env| interrupt::deliver_exception(env, e)) {
            Outcome::Delivered => None,
            Outcome::TripleFault => Some(VcpuExit::Stop(StopReason::TripleFault)),
        }
    }

    /// Runs the single instruction at RIP in a block of its own, after a write to code stopped it.
    fn restart(&mut self) -> Option<VcpuExit> {
        self.vcpu.counters.exit_restart.hit();
        self.env().core.restarting = 1;
        let exit = self.step(None, true).err();
        self.env().core.restarting = 0;
        exit
    }

    /// The host has refused an access to the program's own memory: because code was translated from
    /// there, or because the program may not.
    fn refused(&mut self, addr: u64, what: u32) -> Option<VcpuExit> {
        let space = self.vcpu.space.clone()?;
        let page = addr & !PAGE_MASK;
        let write = what & TRAP_WRITE != 0;
        if write && space.is_protected(page) {
            space.hold(page);
            self.vcpu.tbs.forget(page, PAGE_SIZE);
            let exit = self.restart();
            space.release(page);
            // What was translated while it could be written is not watched.
            self.vcpu.tbs.forget(page, PAGE_SIZE);
            return exit;
        }
        let access = if write { Access::Write } else { Access::Read };
        let allowed = space.check(addr, access).is_ok();
        if allowed && what & (TRAP_BUS | TRAP_NO_ADDRESS) == 0 && self.retries < MOST_RETRIES {
            // Another thread has opened or mapped the page since.
            self.retries += 1;
            return None;
        }
        let bit = |on: bool, bit: u32| if on { bit } else { 0 };
        let e = match what & TRAP_NO_ADDRESS {
            0 => Exception::page_fault(
                addr,
                4 | bit(what & TRAP_PRESENT != 0, 1)
                    | bit(write, 2)
                    | bit(what & TRAP_BUS != 0, NO_OBJECT)
                    | bit(what & TRAP_MAPPED != 0, REFUSED),
            ),
            _ => Exception::gp(0),
        };
        self.retries = 0;
        self.deliver(e)
    }

    /// Runs the single instruction at RIP while all other vCPUs are outside of generated code: it is
    /// one that must be atomic, and the host cannot make it so.
    fn alone(&mut self) -> Option<VcpuExit> {
        let shared = self.vcpu.shared.clone();
        let bell = self.vcpu.bell.clone();
        shared.exclusive(&bell, || {
            let core = &mut self.env().core;
            // Those who had a section before us have asked us to leave, and would be obeyed.
            let asked = core.exit_request.swap(0, Ordering::AcqRel);
            core.alone = 1;
            let exit = self.restart();
            let core = &mut self.env().core;
            core.alone = 0;
            core.exit_request.fetch_or(asked, Ordering::AcqRel);
            exit
        })
    }

    /// One round: find the block at RIP (linking `from` to it), run, handle why it left. Returns the
    /// exit to link to the next block. `Err` ends the run.
    fn step(
        &mut self,
        from: Option<ExitRef>,
        one: bool,
    ) -> std::result::Result<Option<ExitRef>, VcpuExit> {
        let (mem, vcpu): (*mut Env, *const Vcpu) = (self.mem.as_ptr().cast(), &*self.vcpu);
        // SAFETY: both are owned by self and outlive this function; `env` is the only reference to
        // the Env in here, given up before generated code runs.
        let (env, vcpu) = unsafe { (&mut *mem, &*vcpu) };
        let rip = env.cpu.rip;
        // Held from before the look-up, so that no flush takes the found code away.
        let alone = env.core.alone != 0;
        let running = (!alone).then(|| vcpu.shared.running(&vcpu.bell));
        vcpu.counters.loops.hit();
        env.notice_flush();
        let found = {
            let mut engine = vcpu.engine.borrow_mut();
            find::find(env, &mut engine, rip, one || vcpu.one_insn)
        };
        let found = match found {
            Ok(f) => f,
            Err(NoCode::Fault(e)) => {
                // A breakpoint at an instruction comes before what fetching it raises.
                let breakpoint = debug::breakpoint_at_rip(env);
                return self.deliver(breakpoint.unwrap_or(e)).map_or(Ok(None), Err);
            }
            Err(NoCode::Full) => {
                drop(running);
                let flush = || vcpu.shared.flush_in_section(|| vcpu.tbs.flush());
                if alone {
                    flush()
                } else {
                    vcpu.shared.exclusive(&vcpu.bell, flush)
                }
                return Ok(None);
            }
        };
        if let Some(from) = from.filter(|_| !one && !vcpu.leaves_always()) {
            vcpu.tbs.link(from, found);
        }
        if !one && !vcpu.leaves_always() && !found.provisional {
            // The entry for this pc may be of another mode, which would come back here each time.
            env.enter_jump_cache(rip, found.checked.0);
        }
        vcpu.single.set(one);
        log::enter(env, &found);
        // SAFETY: `mem` was made by this back end; the code came from its compiler and cannot be
        // reset while we hold the running guard.
        let code = unsafe { vcpu.tbs.backend.run(mem.cast(), found.checked) };
        drop(running);
        self.left(code)
    }

    fn left(&mut self, code: u32) -> std::result::Result<Option<ExitRef>, VcpuExit> {
        let counters = self.vcpu.counters.clone();
        let env = self.env();
        match code {
            LEAVE_CHAIN => {
                counters.exit_chain.hit();
                return Ok(Some(ExitRef(env.core.exit_ref)));
            }
            LEAVE_LOOKUP => counters.exit_lookup.hit(),
            LEAVE_PAGE => counters.exit_page.hit(),
            LEAVE_REQUEST => counters.exit_request.hit(),
            leave::LOOP | leave::HALT => counters.exit_insn.hit(),
            leave::SPENT => {
                counters.exit_request.hit();
                self.last_few = true;
            }
            leave::YIELD => {
                counters.exit_insn.hit();
                return Err(VcpuExit::TurnOver);
            }
            leave::STEP => {
                let e = debug::after_step(&mut env.cpu);
                return self.deliver(e).map_or(Ok(None), Err);
            }
            leave::X87 => env.take_care_of_x87(),
            leave::DEBUG => return Err(VcpuExit::Stop(StopReason::Debug)),
            LEAVE_FAULT => {
                counters.exit_fault.hit();
                env.core.fault = 0;
                env.core.bounce = 0;
                let e = stack_fault::refine(env, env.cpu.exception);
                let exit = match e.vector {
                    SMC_RETRY => self.restart(),
                    LOCK_RETRY => self.alone(),
                    WRAP_RETRY => {
                        self.env().core.wraps = 1;
                        let exit = self.restart();
                        self.env().core.wraps = 0;
                        exit
                    }
                    _ => self.deliver(e),
                };
                return exit.map_or(Ok(None), Err);
            }
            LEAVE_TRAP if env.core.fault & 0xff == TRAP_ACCESS => {
                let what = std::mem::take(&mut env.core.fault);
                env.core.bounce = 0;
                let addr = env.core.fault_addr;
                return self.refused(addr, what).map_or(Ok(None), Err);
            }
            LEAVE_TRAP => {
                let e = match env.core.fault {
                    0 => Exception::plain(vector::DE),
                    _ if env.cpu.cr4 & cr4::OSXMMEXCPT == 0 => Exception::UD,
                    _ => Exception::plain(vector::XM),
                };
                env.core.fault = 0;
                env.core.bounce = 0;
                return self.deliver(e).map_or(Ok(None), Err);
            }
            LEAVE_ILLEGAL => return self.deliver(Exception::UD).map_or(Ok(None), Err),
            raise if raise & !0xff == leave::RAISE => {
                env.core.bounce = 0;
                let e = Exception::found_inline(raise as u8);
                return self.deliver(e).map_or(Ok(None), Err);
            }
            _ => {
                return Err(VcpuExit::Stop(StopReason::AccelError(Error::new(format!(
                    "generated code left with the unknown code {code:#x} at rip {:#x}",
                    env.cpu.rip
                )))));
            }
        }
        Ok(None)
    }
}

// SAFETY: a Runner owns its Env memory and its Vcpu; the raw pointers between them move with it. It
// is built on one thread and then used on one other.
unsafe impl Send for Runner {}

impl Drop for Runner {
    fn drop(&mut self) {
        self.vcpu.bell.disconnect();
        log::ended(&self.vcpu);
    }
}

impl Env {
    /// Runs system code that belongs to no instruction of a block: what it writes over code need not
    /// restart anything.
    pub(crate) fn between_blocks<R>(&mut self, f: impl FnOnce(&mut Env) -> R) -> R {
        let before = std::mem::replace(&mut self.core.restarting, 1);
        let r = f(self);
        self.core.restarting = before;
        r
    }

    /// Clears the jump cache if all code has been dropped since the last look.
    fn notice_flush(&mut self) {
        let n = self.vcpu().shared.flushes();
        if self.core.flushes_seen != n {
            self.core.flushes_seen = n;
            self.core.clear_jump_cache();
        }
    }
}

impl VcpuRunner for Runner {
    fn run(&mut self) -> VcpuExit {
        let bell = self.vcpu.bell.clone();
        bell.wake_up();
        self.env().process_mail();
        let exit = self.run_awake();
        bell.fall_asleep();
        exit
    }

    fn state(&mut self) -> Result<X86State> {
        let env = self.env();
        env.x87_sync();
        Ok(state::save(env))
    }

    fn set_state(&mut self, s: &X86State) -> Result<()> {
        let env = self.env();
        state::load(env, s)?;
        env.vcpu().bell.take_unhalt();
        env.tlb_flush_all();
        env.core.mode = Mode::of(&env.cpu).bits();
        Ok(())
    }
}

impl Runner {
    /// Asks what may be executed, where that is counted; `false`: nothing now.
    fn grant(&mut self) -> bool {
        let Some(pace) = self.vcpu.pace.clone() else { return true };
        let bell = self.vcpu.bell.clone();
        pace.grant(&self.env().core.insns_left, &bell)
    }

    fn run_awake(&mut self) -> VcpuExit {
        self.env().follow_memory_map();
        self.last_few = false;
        self.vcpu.bell.heard();
        if !self.grant() {
            return VcpuExit::Kicked;
        }
        let mut from = None;
        loop {
            let env = self.env();
            if env.core.exit_request.swap(0, Ordering::AcqRel) != 0 {
                env.process_mail();
                env.follow_memory_map();
                env.vcpu().bell.heard();
                from = None;
                if env.vcpu().bell.kicked.swap(false, Ordering::AcqRel) {
                    // Let the vCPU loop see its commands; the interrupt, if that is why, is taken
                    // on the next run.
                    return VcpuExit::Kicked;
                }
                // A timer may be due earlier than when the last grant was made.
                if !self.grant() {
                    return VcpuExit::Kicked;
                }
            }
            let few = std::mem::take(&mut self.last_few);
            let env = self.env();
            if few && env.core.insns_left.load(Ordering::Relaxed) <= 0 {
                return VcpuExit::Kicked;
            }
            let one = match env.between_blocks(interrupt::poll) {
                Poll::Run => few,
                Poll::RunOne => true,
                Poll::Idle => return VcpuExit::Halted,
                Poll::TripleFault => return VcpuExit::Stop(StopReason::TripleFault),
            };
            match self.step(from.take(), one) {
                Ok(next) => from = next,
                Err(exit) => return exit,
            }
            if self.vcpu.space.is_some() && self.vcpu.has_event() {
                return VcpuExit::Kicked;
            }
        }
    }
}
