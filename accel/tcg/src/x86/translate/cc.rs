//! Flags during a translation: where in the block each flag is at hand as an IR flags value, and
//! the deferred writes that describe the architectural flags (see [`crate::x86::flags`]).

use super::Translator;
use crate::x86::bits::rflags::{ARITH, CF, OF};
use crate::x86::cpu::global;
use crate::x86::flags::{self, CcKind};
use crate::x86::helpers;
use tandem_jit::ir::{Cond, Global, Op, Val, Width};

/// What is known of the flags at a point of the translation.
#[derive(Clone, Copy, Debug)]
pub(super) struct FlagState {
    /// Flags value whose CF is the architectural one.
    cf: Val,
    /// The same for OF.
    of: Val,
    /// The same for ZF, SF, PF and AF.
    rest: Val,
    /// The operation word, if known.
    op: Option<u64>,
    /// While it is not: the last patch of it, `keep` and `word` of [`Translator::patch_op`].
    patch: Option<(u64, u64)>,
    /// The description in `Env` is current: no write of it is pending.
    in_env: bool,
    /// Nobody can see the flags that the current instruction sets.
    pub(super) dead: bool,
}

impl Default for FlagState {
    fn default() -> FlagState {
        FlagState {
            cf: Val::NONE,
            of: Val::NONE,
            rest: Val::NONE,
            op: None,
            patch: None,
            in_env: true,
            dead: false,
        }
    }
}

impl FlagState {
    /// A description may wait to be stored.
    pub(super) fn is_pending(&self) -> bool {
        !self.in_env
    }

    /// The globals that say nothing about the flags, as a set.
    pub(super) fn idle(&self) -> u64 {
        let Some(op) = self.op else { return 0 };
        let w = flags::words(op);
        let words = [
            (global::CC_DST, w.dst),
            (global::CC_SRC, w.src),
            (global::CC_SRC2, w.src2),
            (global::CC_INC, w.inc),
            (global::CC_OVER, w.over),
            (global::CC_OVER_OF, w.over_of),
        ];
        words.iter().filter(|w| !w.1).fold(0, |set, w| set | 1 << w.0.0)
    }

    fn provide(&mut self, fl: Val, which: u64) {
        if which & CF != 0 {
            self.cf = fl;
        }
        if which & OF != 0 {
            self.of = fl;
        }
        if which & ARITH & !(CF | OF) != 0 {
            self.rest = fl;
        }
    }
}

/// Operands of a description; those that the kind does not use are none.
#[derive(Clone, Copy)]
pub struct CcOperands {
    /// Result.
    pub dst: Val,
    /// Source operand.
    pub src: Val,
    /// Third value.
    pub src2: Val,
}

/// The bits of the operation word that say where CF and OF are overridden.
const OVER: u64 = flags::OP_OVER_CF | flags::OP_OVER_OF;
/// Both are, each in a word of its own.
const APART: u64 = flags::OVER_CF | flags::OVER_OF_ALONE;

impl Translator<'_> {
    /// Nobody can see the flags that the current instruction sets: all are overwritten before
    /// anything reads them, faults or leaves. Instructions that set them need not describe them.
    pub fn flags_dead(&self) -> bool {
        self.cc.dead
    }

    /// All six flags have been set by `kind` at width `w`; `fl` is the IR flags value, or none.
    pub fn set_flags(&mut self, kind: CcKind, w: Width, o: CcOperands, fl: Val) {
        self.cc.provide(fl, ARITH);
        if self.cc.dead {
            return;
        }
        self.put_op(flags::op(kind, w));
        for (g, v) in [(global::CC_DST, o.dst), (global::CC_SRC, o.src), (global::CC_SRC2, o.src2)]
        {
            if v.is_some() {
                self.b.put(g, v);
            }
        }
    }

    /// All six flags have been set as AND, OR and XOR do.
    pub fn set_flags_logic(&mut self, w: Width, dst: Val, fl: Val) {
        self.set_flags(CcKind::Logic, w, CcOperands { dst, src: Val::NONE, src2: Val::NONE }, fl);
    }

    /// All six flags are those of the image `image`; its other bits do not matter.
    pub fn set_flags_image(&mut self, image: Val) {
        let fl = self.image_flags(image);
        let o = CcOperands { dst: Val::NONE, src: image, src2: Val::NONE };
        self.set_flags(CcKind::Eflags, Width::W8, o, fl);
    }

    /// As [`Translator::set_flags`], but the flags stay as they were if the comparison `same` says
    /// "equal". `fl` is right in both cases, or none.
    pub fn set_flags_unless(&mut self, same: Val, kind: CcKind, w: Width, o: CcOperands, fl: Val) {
        self.cc.provide(fl, ARITH);
        if self.cc.dead {
            return;
        }
        let op = self.b.iconst(flags::op(kind, w));
        self.put_unless(same, global::CC_OP, op);
        for (g, v) in [(global::CC_DST, o.dst), (global::CC_SRC, o.src), (global::CC_SRC2, o.src2)]
        {
            if v.is_some() {
                self.put_unless(same, g, v);
            }
        }
        (self.cc.op, self.cc.patch) = (None, None);
    }

    /// A helper has changed the flags in `Env`.
    pub fn flags_unknown(&mut self) {
        self.cc = FlagState { dead: self.cc.dead, ..FlagState::default() };
    }

    /// An INC or DEC (`word` is [`flags::inc`] or [`flags::dec`]) gave `dst`; `fl` has all flags but
    /// CF.
    pub fn set_flags_inc(&mut self, word: u64, dst: Val, fl: Val) {
        self.cc.provide(fl, ARITH & !CF);
        if self.cc.dead {
            return;
        }
        self.patch_op(!(flags::OP_INC | flags::OP_OVER_OF), word);
        self.b.put(global::CC_INC, dst);
    }

    /// CF has been set to the value `cf`, 0 or 1, and OF has become undefined. `fl` has the CF.
    pub fn set_carry(&mut self, cf: Val, fl: Val) {
        self.cc.provide(fl, CF);
        self.cc.provide(Val::NONE, OF);
        if self.cc.dead {
            return;
        }
        self.patch_op(!(flags::OP_OVER_CF | flags::OP_OVER_OF), flags::OVER_CF);
        self.b.put(global::CC_OVER, cf);
    }

    /// CF and OF have been set by a rotation (`word` is [`flags::rol`] or [`flags::ror`]) that gave
    /// `dst`; `fl` has these two.
    pub fn set_flags_rotate(&mut self, word: u64, dst: Val, fl: Val) {
        self.cc.provide(fl, CF | OF);
        if self.cc.dead {
            return;
        }
        self.patch_op(!(flags::OP_OVER_CF | flags::OP_OVER_OF), word);
        self.b.put(global::CC_OVER, dst);
    }

    /// As [`Translator::set_flags_rotate`], but the flags stay as they were if `same` says "equal".
    /// `fl` is right in both cases, or none.
    pub fn set_flags_rotate_unless(&mut self, same: Val, word: u64, dst: Val, fl: Val) {
        self.cc.provide(fl, CF | OF);
        if self.cc.dead {
            return;
        }
        let old = self.b.get(global::CC_OP);
        let new = self.patched(!(flags::OP_OVER_CF | flags::OP_OVER_OF), word);
        let op = self.b.selcc(Width::W64, Cond::E, same, old, new);
        self.b.put(global::CC_OP, op);
        self.put_unless(same, global::CC_OVER, dst);
        (self.cc.op, self.cc.patch) = (None, None);
    }

    /// The flags `changed` (CF, OF or both) have become those of `fl`; the others stay.
    pub fn override_flags(&mut self, fl: Val, changed: u64) {
        if self.cc.dead {
            return self.cc.provide(fl, changed);
        }
        if changed == CF | OF {
            self.patch_op(!OVER, flags::OVER_CF | flags::OVER_OF);
            let image = self.b.un(Op::FlagsImg, Width::W64, fl);
            self.b.put(global::CC_OVER, image);
            return self.cc.provide(fl, changed);
        }
        match self.cc.op {
            Some(op) if changed == OF => {
                self.put_op(op & !flags::OP_OVER_OF | flags::OVER_OF_ALONE);
            }
            // An OF that is found in `over` would be in the way.
            Some(op) if matches!(op & flags::OP_OVER_OF, 0 | flags::OVER_OF_ALONE) => {
                self.put_op(op & !flags::OP_OVER_CF | flags::OVER_CF);
            }
            None if self.cc.patch == Some((!OVER, APART)) => {}
            _ => {
                let rest = (CF | OF) & !changed;
                let other = self.flags(rest);
                self.patch_op(!OVER, APART);
                self.put_over(other, rest);
            }
        }
        self.put_over(fl, changed);
        self.cc.in_env = false;
        self.cc.provide(fl, changed);
    }

    /// Puts `which` of CF and OF into the word that it has to itself.
    fn put_over(&mut self, fl: Val, which: u64) {
        let (cond, word) =
            if which == CF { (Cond::B, global::CC_OVER) } else { (Cond::O, global::CC_OVER_OF) };
        let flag = self.b.setcc(cond, fl);
        self.b.put(word, flag);
    }

    /// `fl` has the flags `which` right, which have been described otherwise.
    pub fn override_known(&mut self, fl: Val, which: u64) {
        self.cc.provide(fl, which);
    }

    fn put_unless(&mut self, same: Val, g: Global, v: Val) {
        let old = self.b.get(g);
        let v = self.b.selcc(Width::W64, Cond::E, same, old, v);
        self.b.put(g, v);
        self.cc.in_env = false;
    }

    fn put_op(&mut self, word: u64) {
        let v = self.b.iconst(word);
        self.b.put(global::CC_OP, v);
        (self.cc.op, self.cc.patch) = (Some(word), None);
        self.cc.in_env = false;
    }

    fn patch_op(&mut self, keep: u64, word: u64) {
        match self.cc.op {
            Some(old) => self.put_op(old & keep | word),
            // The same again changes nothing: chains of ADCX and ADOX.
            None if self.cc.patch == Some((keep, word)) => self.cc.in_env = false,
            None => {
                self.cc.patch = Some((keep, word));
                let new = self.patched(keep, word);
                self.b.put(global::CC_OP, new);
                self.cc.in_env = false;
            }
        }
    }

    /// The operation word with `word` in place of all but the bits `keep`.
    fn patched(&mut self, keep: u64, word: u64) -> Val {
        let old = self.b.get(global::CC_OP);
        let mask = self.b.iconst(keep & u64::from(u32::MAX));
        let kept = self.b.bin(Op::And, Width::W32, old, mask);
        let word = self.b.iconst(word);
        self.b.bin(Op::Or, Width::W32, kept, word)
    }

    /// A flags value in which the flags `reads` are the architectural ones, if that costs nothing;
    /// else none. Always one if the current instruction's flags are dead.
    pub fn known_flags(&mut self, reads: u64) -> Val {
        let s = self.cc;
        if s.dead {
            return Val::NONE;
        }
        let mut found = Val::NONE;
        for (mask, v) in [(CF, s.cf), (OF, s.of), (ARITH & !(CF | OF), s.rest)] {
            if reads & mask != 0 {
                if !v.is_some() || found.is_some() && found != v {
                    return Val::NONE;
                }
                found = v;
            }
        }
        found
    }

    /// An IR flags value in which the flags `reads` are the architectural ones.
    pub fn flags(&mut self, reads: u64) -> Val {
        let s = self.cc;
        let mut found = Val::NONE;
        let mut same = true;
        for (mask, v) in [(CF, s.cf), (OF, s.of), (ARITH & !(CF | OF), s.rest)] {
            if reads & mask != 0 {
                if !v.is_some() {
                    return self.computed_flags();
                }
                same &= found == v || !found.is_some();
                found = v;
            }
        }
        if !found.is_some() {
            return self.computed_flags();
        }
        if same {
            return found;
        }
        // Different flags are in different values: put the image together.
        let image = self.flags_image();
        let fl = self.image_flags(image);
        self.cc.provide(fl, ARITH);
        fl
    }

    /// The image of all six flags.
    pub fn flags_image(&mut self) -> Val {
        let s = self.cc;
        if !s.cf.is_some() || !s.of.is_some() || !s.rest.is_some() {
            let fl = self.computed_flags();
            return self.b.un(Op::FlagsImg, Width::W64, fl);
        }
        if s.cf == s.of && s.of == s.rest {
            return self.b.un(Op::FlagsImg, Width::W64, s.cf);
        }
        let mut image = Val::NONE;
        for (mask, fl) in [(CF, s.cf), (OF, s.of), (ARITH & !(CF | OF), s.rest)] {
            let img = self.b.un(Op::FlagsImg, Width::W64, fl);
            let mask = self.b.iconst(mask);
            let part = self.b.bin(Op::And, Width::W32, img, mask);
            image =
                if image.is_some() { self.b.bin(Op::Or, Width::W32, image, part) } else { part };
        }
        image
    }

    /// Has a helper work out the flags from their description.
    fn computed_flags(&mut self) -> Val {
        let helper =
            if self.cc.in_env { helpers::COMPUTE_FLAGS } else { helpers::COMPUTE_FLAGS_SYNC };
        let image = self.b.call(helper, &[]);
        let fl = self.image_flags(image);
        self.cc.provide(fl, ARITH);
        fl
    }

    /// The flags value with this image.
    pub fn image_flags(&mut self, image: Val) -> Val {
        self.b.flags_of(Op::ImgFlags, Width::W64, [image, Val::NONE, Val::NONE, Val::NONE])
    }
}
