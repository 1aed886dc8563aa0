//! Snapshots: where each deferred global is when a point that can fault does fault.
//!
//! A block's snapshots are words: one with the number of snapshots, two per snapshot (host offset
//! and first entry; guest pc), then the entries. What always holds when a snapshot is read: pinned
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

/// Snapshots of the block being compiled.
#[derive(Default)]
pub(crate) struct Snapshots {
    /// Host offset, first entry, guest pc.
    heads: Vec<(u32, u32, u64)>,
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
        self.heads.push((u32::MAX, self.entries.len() as u32, pc));
        SnapId(self.heads.len() as u32 - 1)
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
        self.heads[id.0 as usize].0 = host;
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
        let n = self.heads.len() + self.also.len();
        let base = 1 + 2 * n as u32;
        self.words.clear();
        self.words.push(n as u64);
        for i in 0..self.heads.len() {
            self.head(i, self.heads[i].0, base);
        }
        for i in 0..self.also.len() {
            let (id, host) = self.also[i];
            self.head(id.0 as usize, host, base);
        }
        self.words.extend_from_slice(&self.entries);
        &self.words
    }
    /// Appends the head of snapshot `i` for host offset `host`.
    fn head(&mut self, i: usize, host: u32, base: u32) {
        let (_, first, pc) = self.heads[i];
        let end = self.heads.get(i + 1).map_or(self.entries.len() as u32, |h| h.1);
        let n = (end - first).min(u16::MAX as u32);
        // 20 bits of host offset, 28 of entry index, 16 of entry count.
        let host = (host & 0xf_ffff) as u64;
        self.words.push(host | ((base + first) as u64) << 20 | (n as u64) << 48);
        self.words.push(pc);
    }
}

/// Finds the snapshot of host offset `host` in a block's table; calls `each` for every deferred
/// global and returns the guest pc.
pub(crate) fn find(words: &[u64], host: u32, mut each: impl FnMut(u8, SnapLoc)) -> Option<u64> {
    let n = *words.first()? as usize;
    let head = words.get(1..1 + 2 * n)?.chunks_exact(2).find(|h| h[0] & 0xf_ffff == host as u64)?;
    let first = (head[0] >> 20 & 0xfff_ffff) as usize;
    let count = (head[0] >> 48) as usize;
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
    Some(head[1])
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
}
