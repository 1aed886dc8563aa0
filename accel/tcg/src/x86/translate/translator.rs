//! The state of one translation, and the ways an instruction ends.

use super::TbKey;
use super::cc::FlagState;
use super::dead::Peek;
use crate::env::Core;
use crate::exec::leave;
pub use crate::exec::leave::RAISE as LEAVE_RAISE;
use crate::x86::Env;
use crate::x86::cpu::global;
use crate::x86::helpers;
use crate::x86::mode::Mode;
use iced_x86::Instruction;
use std::mem::offset_of;
use tandem_jit::ir::{Block, Cond, Exit, ExitHint, ExitKind, Op, Val, Width};

/// Where the count of instructions is in `Env`.
const INSNS_LEFT: u32 = (offset_of!(Env, core) + offset_of!(Core, insns_left)) as u32;

/// One translation in progress.
pub struct Translator<'a> {
    /// The block.
    pub b: &'a mut Block,
    /// The CPU mode, constant for the block.
    pub mode: Mode,
    /// RIP of the instruction being translated.
    pub rip: u64,
    /// RIP of the instruction after it, wrapped to the code size.
    pub next: u64,
    /// Bytes of the instruction being translated.
    len: usize,
    key: TbKey,
    ended: bool,
    counts: bool,
    pub(super) cc: FlagState,
    pub(super) peek: Peek<'a>,
    /// The processor's x87 fields are known to be up to date.
    pub(super) x87_synced: bool,
}

impl<'a> Translator<'a> {
    pub(super) fn new(
        b: &'a mut Block,
        key: TbKey,
        peek: Peek<'a>,
        counts: bool,
    ) -> Translator<'a> {
        Translator {
            b,
            mode: key.mode,
            rip: key.rip,
            next: key.rip,
            len: 0,
            key,
            ended: false,
            counts,
            cc: FlagState::default(),
            peek,
            x87_synced: false,
        }
    }

    /// What the x87 unit remembers of the instruction being translated.
    pub(super) fn x87_opcode(&mut self) -> u16 {
        self.peek.x87_opcode(self.rip, self.len)
    }

    /// At the start of the block: takes its instructions off those that may be executed, or leaves if
    /// they are too many. The answer is for [`Translator::set_count`].
    pub(super) fn count_insns(&mut self) -> usize {
        let at = self.b.insts.len();
        let n = self.b.iconst(0);
        let left = self.b.ldenv(Width::W64, INSNS_LEFT);
        let (rest, fl) = self.b.alu(Op::Sub, Width::W64, [left, n, Val::NONE, Val::NONE]);
        let kind = ExitKind::Leave { code: leave::SPENT, pc: Some(self.key.rip) };
        self.b.brcc(Cond::L, fl, Exit::new(kind, ExitHint::Jump));
        self.b.stenv(Width::W64, INSNS_LEFT, rest);
        at
    }

    /// Says how many instructions the block has.
    pub(super) fn set_count(&mut self, at: usize, insns: u32) {
        self.b.insts[at].imm = insns.into();
    }

    /// Begins the translation of `insn`, whose flags nobody sees if `dead`.
    pub(super) fn start(&mut self, insn: &Instruction, dead: bool) {
        self.cc.dead = dead;
        self.rip = insn.ip();
        self.len = insn.len();
        self.next = self.wrap(insn.next_ip());
        self.b.insn_start(self.rip, insn.len() as u8);
        if self.mode.contains(Mode::BREAKPOINTS) {
            let addr = self.b.iconst(self.key.linear(self.rip));
            self.b.call_void(helpers::INSN_BREAKPOINT, &[addr]);
        }
    }

    /// Ends the block after the last instruction, if that has not done so.
    pub(super) fn finish(&mut self) {
        if !self.ended {
            self.goto(self.next);
        }
    }

    /// Whether the block has its terminator.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// Whether instructions are counted.
    pub(super) fn counts(&self) -> bool {
        self.counts
    }

    /// In 64-bit code.
    pub fn code64(&self) -> bool {
        self.mode.contains(Mode::CODE64)
    }

    /// Current privilege level.
    pub fn cpl(&self) -> u8 {
        self.mode.cpl()
    }

    /// In protected mode proper: neither real nor virtual-8086 mode.
    pub fn protected(&self) -> bool {
        self.mode.contains(Mode::PE) && !self.mode.contains(Mode::VM86)
    }

    /// An instruction pointer wrapped to what the code size can hold.
    pub fn wrap(&self, rip: u64) -> u64 {
        self.key.wrap(rip)
    }

    /// How blocks end where #DB may follow an instruction: with TF always, with watched data if
    /// the instruction has hit some (the loop looks).
    fn debug_leave(&self) -> Option<u32> {
        if self.mode.contains(Mode::TF) {
            Some(leave::STEP)
        } else {
            self.mode.contains(Mode::WATCH).then_some(leave::LOOP)
        }
    }

    /// As [`Translator::jump_rip`], for instructions whose helper delivers the single-step trap
    /// itself, or that have none.
    pub fn jump_rip_unstepped(&mut self) {
        if self.debug_leave().is_some() {
            return self.leave(leave::LOOP, None);
        }
        self.jump_rip();
    }

    /// The exit to `rip` in the same mode.
    pub(super) fn exit_to(&mut self, rip: u64, hint: ExitHint) -> Exit {
        let idle = self.cc.idle();
        if let Some(code) = self.debug_leave() {
            let kind = ExitKind::Leave { code, pc: Some(rip) };
            return Exit { dead: idle, ..Exit::new(kind, hint) };
        }
        let page = |rip| self.key.linear(rip) & super::PAGE;
        let same_page = page(rip) == page(self.key.rip);
        let dead = if self.cc.is_pending() { self.peek.dead_at(rip) } else { 0 };
        Exit { kind: ExitKind::Goto { pc: rip, same_page }, hint, dead: dead | idle }
    }

    /// Ends the block with a jump to `rip`.
    pub fn goto(&mut self, rip: u64) {
        let exit = self.exit_to(rip, ExitHint::Jump);
        self.b.exit(exit, Val::NONE);
        self.ended = true;
    }

    /// Ends the block with a call of the code at `rip`, which will return to the next instruction.
    pub fn goto_call(&mut self, rip: u64) {
        let exit = self.exit_to(rip, ExitHint::Call { ret: self.next });
        self.b.exit(exit, Val::NONE);
        self.ended = true;
    }

    /// Ends the block with an indirect jump.
    pub fn jump(&mut self, rip: Val, hint: ExitHint) {
        // A block for one instruction must not run on into others.
        let alone = self.mode.contains(Mode::ONE_INSN).then_some(leave::LOOP);
        if let Some(code) = self.debug_leave().or(alone) {
            self.b.call_void(helpers::SET_RIP, &[rip]);
            return self.leave(code, None);
        }
        let dead = self.cc.idle();
        self.b.exit(Exit { dead, ..Exit::new(ExitKind::Indirect, hint) }, rip);
        self.ended = true;
    }

    /// Ends the block with an indirect jump to where a helper has put RIP; the mode may have changed.
    pub fn jump_rip(&mut self) {
        if let Some(code) = self.debug_leave() {
            return self.leave(code, None);
        }
        let rip = self.b.get(global::RIP);
        self.jump(rip, ExitHint::Far);
    }

    /// Ends the block: back to the execution loop, which goes on at the next instruction.
    pub fn leave_next(&mut self, code: u32) {
        let code = if self.mode.contains(Mode::TF) { leave::STEP } else { code };
        self.leave(code, Some(self.next));
    }

    /// Ends the block: back to the execution loop, which goes on at `pc`, or where a helper has put
    /// RIP.
    pub fn leave(&mut self, code: u32, pc: Option<u64>) {
        let kind = ExitKind::Leave { code, pc };
        let dead = self.cc.idle();
        self.b.exit(Exit { dead, ..Exit::new(kind, ExitHint::Jump) }, Val::NONE);
        self.ended = true;
    }

    /// The instruction raises exception `vector`, always. Ends the block.
    pub fn raise(&mut self, vector: u8, error: Option<u32>) {
        let v = self.b.iconst(vector.into());
        let e = self.b.iconst(error.map_or(0, |e| 1 << 32 | e as u64));
        self.b.call_void(helpers::RAISE_EXCEPTION, &[v, e]);
        self.leave(leave::LOOP, Some(self.rip));
    }

    /// The instruction raises #UD.
    pub fn ud(&mut self) {
        self.raise(crate::x86::exception::vector::UD, None);
    }

    /// The instruction raises #GP(0).
    pub fn gp0(&mut self) {
        self.raise(crate::x86::exception::vector::GP, Some(0));
    }

    /// The instruction raises #NM.
    pub fn nm(&mut self) {
        self.raise(crate::x86::exception::vector::NM, None);
    }
}
