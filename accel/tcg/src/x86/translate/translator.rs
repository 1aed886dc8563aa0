//! The state of one translation, and the ways an instruction ends.

use super::TbKey;
use super::cc::FlagState;
use super::dead::Peek;
use crate::exec::leave;
pub use crate::exec::leave::RAISE as LEAVE_RAISE;
use crate::x86::cpu::global;
use crate::x86::helpers;
use crate::x86::mode::Mode;
use iced_x86::Instruction;
use tandem_jit::ir::{Block, Exit, ExitHint, ExitKind, Val};

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
    key: TbKey,
    ended: bool,
    pub(super) cc: FlagState,
    pub(super) peek: Peek<'a>,
}

impl<'a> Translator<'a> {
    pub(super) fn new(b: &'a mut Block, key: TbKey, peek: Peek<'a>) -> Translator<'a> {
        Translator {
            b,
            mode: key.mode,
            rip: key.rip,
            next: key.rip,
            key,
            ended: false,
            cc: FlagState::default(),
            peek,
        }
    }

    /// Begins the translation of `insn`, whose flags nobody sees if `dead`.
    pub(super) fn start(&mut self, insn: &Instruction, dead: bool) {
        self.cc.dead = dead;
        self.rip = insn.ip();
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
        if let Some(code) = self.debug_leave() {
            return Exit::new(ExitKind::Leave { code, pc: Some(rip) }, hint);
        }
        let page = |rip| self.key.linear(rip) & super::PAGE;
        let same_page = page(rip) == page(self.key.rip);
        let dead = if self.cc.is_pending() { self.peek.dead_at(rip) } else { 0 };
        Exit { kind: ExitKind::Goto { pc: rip, same_page }, hint, dead }
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
        if let Some(code) = self.debug_leave() {
            self.b.call_void(helpers::SET_RIP, &[rip]);
            return self.leave(code, None);
        }
        self.b.exit(Exit::new(ExitKind::Indirect, hint), rip);
        self.ended = true;
    }

    /// Ends the block with an indirect jump to where a helper has put RIP; the mode may have changed.
    pub fn jump_rip(&mut self) {
        if let Some(code) = self.debug_leave() {
            return self.leave(code, None);
        }
        let rip = self.b.get(global::RIP);
        self.jump(rip, ExitHint::Jump);
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
        self.b.exit(Exit::new(kind, ExitHint::Jump), Val::NONE);
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
