//! One TLB check for several accesses: which accesses of a block go off one base value and lie close
//! together, so that the first of them can look their common page up for all.
//!
//! The first member of a group (its leader) probes the TLB for the whole span that the group covers
//! and leaves the addend in a value of its own, which the allocator keeps like any other. A later
//! member only tests that value: 0 stands for "not shared", and the member then probes for itself,
//! out of line. A host mapping is never at the guest's own address, so that no addend is 0 (and if
//! one were, only time would be lost).
//!
//! Close together are accesses off the same base and index values, constants added to these apart, and
//! accesses at constant addresses.
//! If members must be aligned, the leader checks that for all of them: it misses unless the span's
//! first byte is aligned as they should be, and they are where that makes them so.
//!
//! What always holds: whatever might change a mapping ends a group (helper calls) or zeroes the
//! values of all groups that are open (slow paths, which may reach devices). A group checks the
//! write tag only if one of its members before the first side exit stores, so that reads of a
//! read-only page do not become slow for a store that is never reached.

use super::alloc::{NOMEM, regs};
use super::asm::*;
use super::generate::Gen;
use crate::ir::{Block, Inst, Op, PTR_ALIGNED, PTR_WRITE, SIZE_80, Val, Width, access_bytes};

/// Most bytes that a group covers: the wider, the more often it straddles two pages.
const MAX_SPAN: i64 = 256;
/// Groups that are extended at the same time.
const MAX_OPEN: usize = 6;
/// The operations that matter here.
const OF_INTEREST: u128 = {
    let ops = [
        Op::Const,
        Op::Add,
        Op::Sub,
        Op::Inc,
        Op::Dec,
        Op::Lea,
        Op::Ld,
        Op::St,
        Op::NativeMem,
        Op::Call,
        Op::BrCc,
    ];
    let (mut set, mut i) = (0, 0);
    while i < ops.len() {
        set |= 1 << ops[i] as u32;
        i += 1;
    }
    set
};
const _: () = assert!(Op::ALL.len() <= 128);
/// No group.
const NO_GROUP: u16 = u16::MAX;

/// What the addresses of a group have in common: base, index and its factor; nothing where they are
/// constants.
type Key = (Val, Val, u8);

/// What of an access matters here.
#[derive(Clone, Copy, Debug)]
struct Place {
    key: Key,
    /// Displacement of the first byte; the address itself if it is constant.
    low: i64,
    size: i64,
    /// It faults unless its address is a multiple of this power of two.
    align: i64,
    write: bool,
}

/// Accesses that share one check.
#[derive(Clone, Copy, Debug)]
struct Group {
    key: Key,
    /// Displacement of the first byte; where an access to `anchor` is aligned to `align`, so is one
    /// there.
    low: i64,
    /// Displacement just behind the last byte.
    high: i64,
    /// Greatest alignment that a member asks for, and that member's displacement.
    align: i64,
    anchor: i64,
    /// Some member stores.
    write: bool,
    /// A side exit lies behind the leader.
    past_exit: bool,
    members: u16,
}

impl Group {
    /// The group with an access more, if that may join.
    fn with(&self, p: &Place) -> Option<Group> {
        // Behind a side exit no more is asked for than before it.
        let more = p.write && !self.write || p.align > self.align;
        if self.key != p.key || more && self.past_exit {
            return None;
        }
        // Alignments are powers of two.
        if (p.low - self.anchor) & (self.align.min(p.align) - 1) != 0 {
            return None;
        }
        let mut g = *self;
        if p.align > g.align {
            (g.align, g.anchor) = (p.align, p.low);
        }
        g.low = g.low.min(p.low);
        g.low -= (g.low - g.anchor) & (g.align - 1);
        g.high = g.high.max(p.low + p.size);
        g.write |= p.write;
        g.members += 1;
        (g.high - g.low <= MAX_SPAN).then_some(g)
    }
}

/// The groups of a block; reused between blocks.
#[derive(Default)]
pub(super) struct Sharing {
    groups: Vec<Group>,
    /// By instruction: its group.
    member: Vec<u16>,
    /// Groups that may still grow.
    open: Vec<u16>,
    /// By value: what it is a constant distance from (nothing, for a constant), and the distance.
    roots: Vec<(Val, i64)>,
    /// Values defined by the block: group `g`'s addend is value `first + g`.
    first: u16,
    /// Values of groups whose leader has been emitted.
    live: Vec<u16>,
    /// Frame words to be zeroed by cold pieces.
    words: Vec<i32>,
}

/// How an access takes part in a group.
#[derive(Clone, Copy, Debug)]
pub(super) enum Role {
    /// It checks for itself only.
    Alone,
    /// It checks the bytes from `delta` relative to its own address, `len` of them, aligned to
    /// `align`, and defines value `addend`.
    Leader { addend: u16, delta: i64, len: u32, align: u32, write: bool },
    /// It uses value `addend`.
    Member { addend: u16 },
}

/// The places of all open groups' values at some point.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places {
    regs: u16,
    first: u32,
    count: u32,
}

impl Places {
    pub(super) fn is_empty(&self) -> bool {
        self.regs == 0 && self.count == 0
    }
    /// But for register `r`.
    pub(super) fn without(self, r: Reg) -> Places {
        Places { regs: self.regs & !(1 << r), ..self }
    }
}

impl Sharing {
    /// Finds the groups of `block`, in which so many accesses are.
    pub(super) fn plan(&mut self, block: &Block, accesses: usize) {
        self.groups.clear();
        self.open.clear();
        self.live.clear();
        self.words.clear();
        self.first = block.nvals;
        self.member.clear();
        if accesses < 2 {
            return;
        }
        self.member.resize(block.insts.len(), NO_GROUP);
        self.roots.clear();
        self.roots.extend((0..block.nvals).map(|v| (Val(v), 0)));
        for (i, inst) in block.insts.iter().enumerate() {
            if OF_INTEREST >> inst.op as u32 & 1 == 0 {
                continue;
            }
            match inst.op {
                Op::Const => self.roots[inst.dst.index()] = (Val::NONE, inst.imm as i64),
                Op::Add | Op::Sub | Op::Inc | Op::Dec | Op::Lea if inst.w == Width::W64 => {
                    self.sum(inst);
                }
                Op::Ld | Op::St | Op::NativeMem => self.access(i, inst),
                Op::Call => self.open.clear(),
                Op::BrCc => {
                    for &g in &self.open {
                        self.groups[g as usize].past_exit = true;
                    }
                }
                _ => {}
            }
        }
    }

    /// Notes the result of an addition of a constant.
    fn sum(&mut self, inst: &Inst) {
        let [a, b, ..] = inst.ins;
        let constant =
            |v: Val| self.roots.get(v.index()).and_then(|&(of, c)| (!of.is_some()).then_some(c));
        let add = match inst.op {
            Op::Inc => Some(1),
            Op::Dec => Some(-1),
            Op::Add => constant(b),
            Op::Sub => constant(b).map(i64::wrapping_neg),
            _ => (!b.is_some()).then_some(inst.imm as i64),
        };
        if let (Some(add), Some(&(of, at))) = (add, self.roots.get(a.index()))
            && let Some(to) = self.roots.get_mut(inst.dst.index())
        {
            *to = (of, at.wrapping_add(add));
        }
    }

    /// What an access touches, if it can be in a group.
    fn place(&self, inst: &Inst) -> Option<Place> {
        let [base, index, ..] = inst.ins;
        if !base.is_some() {
            return None;
        }
        let mut low = inst.disp();
        // A span's first byte must be in reach of a displacement, too.
        if low.abs() > 1 << 30 {
            return None;
        }
        let (of, distance) = self.roots[base.index()];
        low = low.checked_add(distance)?;
        let mut key = (of, index, 0);
        if index.is_some() {
            let scale = inst.aux & 3;
            let (of, distance) = self.roots[index.index()];
            low = low.checked_add(distance.checked_mul(1 << scale)?)?;
            key = (key.0, of, if of.is_some() { scale } else { 0 });
        }
        // Far from where sums could overflow, as canonical addresses are anyway.
        if low.unsigned_abs() > 1 << 60 {
            return None;
        }
        let (size, access) = match inst.op {
            Op::NativeMem => (access_bytes((inst.aux >> 2).min(SIZE_80)), inst.cond),
            Op::St => (inst.w.bytes(), PTR_WRITE),
            _ => (inst.w.bytes(), 0),
        };
        let size = i64::from(size);
        let align = if access & PTR_ALIGNED != 0 { size } else { 1 };
        Some(Place { key, low, size, align, write: access & PTR_WRITE != 0 })
    }

    /// Adds an access to an open group or opens one for it.
    fn access(&mut self, i: usize, inst: &Inst) {
        let Some(p) = self.place(inst) else { return };
        for &g in &self.open {
            if let Some(joined) = self.groups[g as usize].with(&p) {
                self.groups[g as usize] = joined;
                self.member[i] = g;
                return;
            }
        }
        if self.open.len() == MAX_OPEN {
            self.open.remove(0);
        }
        let g = self.groups.len() as u16;
        self.groups.push(Group {
            key: p.key,
            low: p.low,
            high: p.low + p.size,
            align: p.align,
            anchor: p.low,
            write: p.write,
            past_exit: false,
            members: 1,
        });
        self.open.push(g);
        self.member[i] = g;
    }

    /// Uses of each group's value behind its definition, in the order of the values.
    pub(super) fn uses(&self) -> impl ExactSizeIterator<Item = u16> + '_ {
        self.groups.iter().map(|g| g.members - 1)
    }
}

impl Gen {
    /// The part that instruction `inst`, number `self.at`, has in a group.
    pub(super) fn role(&self, inst: &Inst) -> Role {
        let s = &self.sharing;
        let g = s.member.get(self.at).copied().unwrap_or(NO_GROUP);
        let Some(group) = s.groups.get(g as usize).filter(|g| g.members > 1) else {
            return Role::Alone;
        };
        let addend = s.first + g;
        let v = &self.vals[addend as usize];
        if v.reg != NOREG || v.mem != NOMEM {
            return Role::Member { addend };
        }
        let Some(own) = s.place(inst) else { return Role::Alone };
        Role::Leader {
            addend,
            delta: group.low - own.low,
            len: (group.high - group.low) as u32,
            align: group.align as u32,
            write: group.write,
        }
    }

    /// The leader has been emitted: its group's addend is in `r`.
    pub(super) fn define_addend(&mut self, role: Role, r: Reg) {
        if let Role::Leader { addend, .. } = role {
            self.holds(r, addend);
            self.sharing.live.push(addend);
        }
    }

    /// Where the addends are that a slow path called from here must zero.
    pub(super) fn addend_places(&mut self) -> Places {
        let first = self.sharing.words.len();
        let mut regs_used = 0;
        let mut k = 0;
        while let Some(&v) = self.sharing.live.get(k) {
            if self.vals[v as usize].uses == 0 {
                self.sharing.live.swap_remove(k);
                continue;
            }
            regs_used |= self.holders(v) & !(1 << RSP);
            let mem = self.vals[v as usize].mem;
            if mem != NOMEM {
                self.sharing.words.push(mem);
            }
            k += 1;
        }
        let count = (self.sharing.words.len() - first) as u32;
        Places { regs: regs_used, first: first as u32, count }
    }

    /// Zeroes the addends at `places`. Changes EFLAGS.
    pub(super) fn zero_addends(&mut self, places: Places) {
        for r in regs(places.regs) {
            self.a.alu_r(Alu::Xor, W32, r, Rm::R(r));
        }
        for k in places.first..places.first + places.count {
            let word = self.sharing.words[k as usize];
            self.a.store_i(W64, super::frame::frame(word), 0);
        }
    }
}
