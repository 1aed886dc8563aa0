//! A ring of bytes that grows by doubling.

/// Bytes that a ring starts with.
const FIRST: usize = 16 << 10;

/// Bytes in order; those at the front leave.
#[derive(Default)]
pub struct Ring {
    buf: Box<[u8]>,
    head: usize,
    len: usize,
}

impl Ring {
    /// Bytes in it.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Bytes that it has room for as it is.
    pub fn capacity(&self) -> usize {
        self.buf.len()
    }
    /// Whether no room is left.
    pub fn is_full(&self) -> bool {
        self.len == self.buf.len()
    }

    /// Doubles its room.
    pub fn grow(&mut self) {
        let mut buf = vec![0; (self.buf.len() * 2).max(FIRST)].into_boxed_slice();
        let (a, b) = self.slices(0, self.len);
        buf[..a.len()].copy_from_slice(a);
        buf[a.len()..a.len() + b.len()].copy_from_slice(b);
        (self.buf, self.head) = (buf, 0);
    }

    /// `len` bytes from byte `from`, clipped to what there is, in two parts.
    pub fn slices(&self, from: usize, len: usize) -> (&[u8], &[u8]) {
        let from = from.min(self.len);
        let len = len.min(self.len - from);
        if len == 0 {
            return (&[], &[]);
        }
        let start = (self.head + from) % self.buf.len();
        let first = len.min(self.buf.len() - start);
        (&self.buf[start..start + first], &self.buf[..len - first])
    }

    /// The next free bytes that lie together.
    pub fn spare(&mut self) -> &mut [u8] {
        if self.is_full() {
            return &mut [];
        }
        let start = (self.head + self.len) % self.buf.len();
        let end = if start < self.head { self.head } else { self.buf.len() };
        &mut self.buf[start..end]
    }

    /// The first `n` spare bytes have been filled.
    pub fn commit(&mut self, n: usize) {
        self.len = (self.len + n).min(self.buf.len());
    }

    /// Drops the first `n` bytes.
    pub fn consume(&mut self, n: usize) {
        let n = n.min(self.len);
        self.len -= n;
        self.head = if self.len == 0 { 0 } else { (self.head + n) % self.buf.len() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_leave_in_the_order_they_came() {
        let mut r = Ring::default();
        let (mut next_in, mut next_out) = (0u64, 0u64);
        for round in 0..3000usize {
            if r.is_full() && round % 7 == 0 && r.capacity() < 100_000 {
                r.grow();
            }
            let spare = r.spare();
            let n = spare.len().min(round * 37 % 5000);
            for b in &mut spare[..n] {
                *b = (next_in % 251) as u8;
                next_in += 1;
            }
            r.commit(n);
            let out = (round * 91 % 4000).min(r.len());
            let (a, b) = r.slices(0, out);
            assert_eq!(a.len() + b.len(), out);
            for x in a.iter().chain(b) {
                assert_eq!(u64::from(*x), next_out % 251);
                next_out += 1;
            }
            let (a, b) = r.slices(out, 10);
            assert!(a.iter().chain(b).next().is_none_or(|x| u64::from(*x) == next_out % 251));
            r.consume(out);
        }
        assert!(next_out > 1 << 20);
    }
}
