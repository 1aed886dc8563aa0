//! Snapshots: where each deferred global is when a point that can fault does fault.
//!
//! A block's snapshots are words: one with the number of snapshots, one with a guest pc near theirs,
//! one per snapshot (two if a guest pc is far away), then the entries. Neighbours that say the same
//! share their entries: most instructions that can fault defer nothing. What always holds when a snapshot is read: pinned
//! globals are in their `Env` slots and scratch registers in the frame's save area, so a location
//! is a constant or a memory word, never a live register.

/// Where a deferred global's value is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SnapLoc {
    /// Known.
    Const(u64),
    /// 8 bytes at this offset from the `Env` pointer (negative: in the frame below).
    Word(i32),
    /// As `Word`, but a flags register image of which the arithmetic flags are the value.
    Flags(i32),
}

const CONST: u64 = 0;
const CONST_NEXT: u64 = 1;
const WORD: u64 = 2;
const FLAGS: u64 = 3;

/// What a trap handler adds to the address of the instruction that trapped (see
/// [`Snapshots::set_trap`]). Instructions that trap have at least two bytes.
pub(crate) const TRAP_BIAS: u32 = 1;

/// Arithmetic flags of a flags image.
pub(crate) const FLAGS_MASK: u64 = 0x8d5;

/// A snapshot but for its entries.
#[derive(Clone, Copy, Debug)]
struct Head {
    /// Host offset.
    host: u32,
    /// First entry word and number of entry words.
    first: u32,
    count: u32,
    /// Guest pc.
    pc: u64,
}

/// Layout of a snapshot's word: host offset, first entry word, number of entry words, distance of
/// the guest pc from the block's. A block has at most 128 KiB of code and 255 globals.
const HOST_BITS: u32 = 18;
const FIRST_BITS: u32 = 20;
const COUNT_BITS: u32 = 10;
const NEAR_BITS: u32 = 16;
const _: () = assert!(HOST_BITS + FIRST_BITS + COUNT_BITS + NEAR_BITS == 64);
/// In the first word: each snapshot's word is followed by its guest pc.
const FAR: u64 = 1 << 32;

/// Snapshots of the block being compiled.
#[derive(Default)]
pub(crate) struct Snapshots {
    heads: Vec<Head>,
    /// Further host offsets.
    also: Vec<(SnapId, u32)>,
    entries: Vec<u64>,
    words: Vec<u64>,
}

/// Names a snapshot of the block being compiled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SnapId(u32);

impl Snapshots {
    /// Starts a new block.
    pub(crate) fn clear(&mut self) {
        self.heads.clear();
        self.also.clear();
        self.entries.clear();
    }
    /// Starts a snapshot at guest `pc`.
    pub(crate) fn begin(&mut self, pc: u64) -> SnapId {
        self.seal();
        let first = self.entries.len() as u32;
        self.heads.push(Head { host: u32::MAX, first, count: 0, pc });
        SnapId(self.heads.len() as u32 - 1)
    }
    /// The snapshot begun last has all its entries.
    fn seal(&mut self) {
        let Some((last, before)) = self.heads.split_last_mut() else { return };
        last.count = self.entries.len() as u32 - last.first;
        let Some(before) = before.last() else { return };
        let (old, new) = self.entries.split_at(last.first as usize);
        if old
            .get(before.first as usize..)
            .is_some_and(|o| o.get(..before.count as usize) == Some(new))
        {
            last.first = before.first;
            self.entries.truncate(old.len());
        }
    }
    /// Adds an entry to the snapshot begun last.
    pub(crate) fn push(&mut self, global: u8, loc: SnapLoc) {
        let word = |kind: u64, data: u64| global as u64 | kind << 8 | data << 16;
        match loc {
            SnapLoc::Const(v) if ((v as i64) << 16 >> 16) as u64 == v => {
                self.entries.push(word(CONST, v));
            }
            SnapLoc::Const(v) => {
                self.entries.push(word(CONST_NEXT, 0));
                self.entries.push(v);
            }
            SnapLoc::Word(off) => self.entries.push(word(WORD, off as u32 as u64)),
            SnapLoc::Flags(off) => self.entries.push(word(FLAGS, off as u32 as u64)),
        }
    }
    /// Says at which offset in the block's code the snapshot is looked up.
    pub(crate) fn set_host(&mut self, id: SnapId, host: u32) {
        self.heads[id.0 as usize].host = host;
    }
    /// Says that the instruction which starts at this offset may trap. Its snapshot is looked up one
    /// byte into it: at its start may be the return address of a call before it, which has one too.
    pub(crate) fn set_trap(&mut self, id: SnapId, start: u32) {
        self.set_host(id, start + TRAP_BIAS);
    }
    /// Another instruction that may trap, with the same snapshot.
    pub(crate) fn also_trap(&mut self, id: SnapId, start: u32) {
        self.also(id, start + TRAP_BIAS);
    }
    /// Another offset at which the same snapshot is looked up.
    pub(crate) fn also(&mut self, id: SnapId, host: u32) {
        self.also.push((id, host));
    }
    /// The block's table.
    pub(crate) fn finish(&mut self) -> &[u64] {
        self.seal();
        let n = self.heads.len() + self.also.len();
        let near = self.heads.first().map_or(0, |h| h.pc);
        let far = self.heads.iter().any(|h| distance(h.pc, near).is_none());
        let base = 2 + n * if far { 2 } else { 1 };
        self.words.clear();
        self.words.extend([n as u64 | if far { FAR } else { 0 }, near]);
        let further =
            self.also.iter().map(|&(id, host)| Head { host, ..self.heads[id.0 as usize] });
        for h in self.heads.iter().copied().chain(further) {
            let fields = [
                (h.host.into(), HOST_BITS),
                (h.first as u64 + base as u64, FIRST_BITS),
                (h.count.into(), COUNT_BITS),
                (distance(h.pc, near).unwrap_or(0) as u64, NEAR_BITS),
            ];
            let word =
                fields.iter().rev().fold(0, |w, &(v, bits)| w << bits | v & ((1 << bits) - 1));
            self.words.push(word);
            if far {
                self.words.push(h.pc);
            }
        }
        self.words.extend_from_slice(&self.entries);
        &self.words
    }
}

/// How far `pc` is from `near`, if that fits a snapshot's word.
fn distance(pc: u64, near: u64) -> Option<i16> {
    i16::try_from(pc.wrapping_sub(near) as i64).ok()
}

/// Finds the snapshot of host offset `host` in a block's table; calls `each` for every deferred
/// global and returns the guest pc.
pub(crate) fn find(words: &[u64], host: u32, mut each: impl FnMut(u8, SnapLoc)) -> Option<u64> {
    let (&[n, near], _) = words.split_first_chunk()?;
    let step = if n & FAR != 0 { 2 } else { 1 };
    let heads = words.get(2..2 + step * n as u32 as usize)?;
    let mut field = 0;
    let head = heads.chunks_exact(step).find(|h| {
        field = h[0];
        field & ((1 << HOST_BITS) - 1) == u64::from(host)
    })?;
    let mut next = |bits: u32| {
        let v = field & ((1 << bits) - 1);
        field >>= bits;
        v as usize
    };
    next(HOST_BITS);
    let (first, count) = (next(FIRST_BITS), next(COUNT_BITS));
    let pc = head.get(1).copied().unwrap_or(near.wrapping_add(next(NEAR_BITS) as i16 as u64));
    let mut entries = words.get(first..first + count)?.iter().copied();
    while let Some(e) = entries.next() {
        let data = e as i64 >> 16;
        let loc = match e >> 8 & 0xff {
            CONST => SnapLoc::Const(data as u64),
            CONST_NEXT => SnapLoc::Const(entries.next()?),
            WORD => SnapLoc::Word(data as i32),
            _ => SnapLoc::Flags(data as i32),
        };
        each(e as u8, loc);
    }
    Some(pc)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let mut s = Snapshots::default();
        let a = s.begin(0x1000);
        s.push(3, SnapLoc::Const(u64::MAX));
        s.push(4, SnapLoc::Const(0x1234_5678_9abc_def0));
        s.push(5, SnapLoc::Word(-8));
        let b = s.begin(0xffff_ffff_8000_0000);
        s.push(200, SnapLoc::Flags(0x12345));
        s.set_host(b, 40);
        s.set_host(a, 77);
        s.also(a, 99);
        let words = s.finish().to_vec();
        let get = |host| {
            let mut v = Vec::new();
            let pc = find(&words, host, |g, l| v.push((g, l)));
            (pc, v)
        };
        assert_eq!(get(99), get(77));
        assert_eq!(
            get(77),
            (
                Some(0x1000),
                vec![
                    (3, SnapLoc::Const(u64::MAX)),
                    (4, SnapLoc::Const(0x1234_5678_9abc_def0)),
                    (5, SnapLoc::Word(-8))
                ]
            )
        );
        assert_eq!(get(40), (Some(0xffff_ffff_8000_0000), vec![(200, SnapLoc::Flags(0x12345))]));
        assert_eq!(get(41).0, None);
    }

    #[test]
    fn neighbours_share_their_entries() {
        let mut s = Snapshots::default();
        let same = |s: &mut Snapshots, pc, host| {
            let id = s.begin(pc);
            s.push(1, SnapLoc::Word(16));
            s.push(2, SnapLoc::Const(u64::MAX / 2));
            s.set_host(id, host);
        };
        same(&mut s, 0x1000, 10);
        same(&mut s, 0xff8, 20);
        let other = s.begin(0x1004);
        s.push(1, SnapLoc::Word(16));
        s.set_host(other, 30);
        let none = s.begin(0x1008);
        s.set_host(none, 40);
        let words = s.finish();
        // Two for the block, four heads, three words of the first two's entries, one of the third's.
        assert_eq!(words.len(), 2 + 4 + 3 + 1);
        let get = |host| {
            let mut v = Vec::new();
            (find(words, host, |g, l| v.push((g, l))), v)
        };
        let both = vec![(1, SnapLoc::Word(16)), (2, SnapLoc::Const(u64::MAX / 2))];
        assert_eq!(get(10), (Some(0x1000), both.clone()));
        assert_eq!(get(20), (Some(0xff8), both));
        assert_eq!(get(30), (Some(0x1004), vec![(1, SnapLoc::Word(16))]));
        assert_eq!(get(40), (Some(0x1008), vec![]));
    }
}
