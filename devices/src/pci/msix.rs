//! MSI-X (PCI 3.0 §6.8.2): a table of messages and their pending bits, in one BAR.

use super::capability::Capability;
use std::sync::{Arc, Mutex};
use tandem_accel::bus::BusDevice;
use tandem_accel::irq::{MsiMessage, MsiSink};

/// Bytes of a table entry: address, data, vector control.
const ENTRY: usize = 16;
/// The most vectors a function can have.
pub const MAX_VECTORS: u16 = 2048;
/// Control: MSI-X enable.
const ENABLE: u16 = 1 << 15;
/// Control: function mask.
const FUNCTION_MASK: u16 = 1 << 14;

struct State {
    /// The table as software reads and writes it.
    table: Vec<u8>,
    /// Pending bits.
    pba: Vec<u8>,
    enabled: bool,
    function_masked: bool,
    bus_master: bool,
}

/// The MSI-X vectors of a function. It is also the device behind the BAR that holds the table (at
/// 0) and the pending bits (at [`Msix::pba_offset`]).
pub struct Msix {
    sink: Arc<dyn MsiSink>,
    vectors: u16,
    bar: u8,
    state: Mutex<State>,
}

fn masked_table(vectors: u16) -> Vec<u8> {
    let mut t = vec![0; usize::from(vectors) * ENTRY];
    t.chunks_exact_mut(ENTRY).for_each(|e| e[12] = 1);
    t
}

impl Msix {
    /// `vectors` (1–2048, clamped) vectors, all masked, with the table in BAR `bar` (0–5).
    pub fn new(sink: Arc<dyn MsiSink>, vectors: u16, bar: u8) -> Arc<Msix> {
        let vectors = vectors.clamp(1, MAX_VECTORS);
        Arc::new(Msix {
            sink,
            vectors,
            bar: bar.min(5),
            state: Mutex::new(State {
                table: masked_table(vectors),
                pba: vec![0; usize::from(vectors).div_ceil(64) * 8],
                enabled: false,
                function_masked: false,
                bus_master: false,
            }),
        })
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.vectors
    }
    /// Which BAR holds table and pending bits.
    pub fn bar(&self) -> u8 {
        self.bar
    }
    /// Offset of the pending bits in the BAR.
    pub fn pba_offset(&self) -> u32 {
        (u32::from(self.vectors) * ENTRY as u32).next_multiple_of(0x800)
    }
    /// Length of the BAR, a power of two and at least a page.
    pub fn bar_len(&self) -> u64 {
        let pba = u64::from(self.vectors).div_ceil(64) * 8;
        (u64::from(self.pba_offset()) + pba).next_power_of_two().max(0x1000)
    }

    /// Whether software has turned MSI-X on; INTx is not used then.
    pub fn enabled(&self) -> bool {
        self.state.lock().unwrap().enabled
    }

    /// Sends vector `n`, or remembers it while masked. Nothing happens for a vector that is not
    /// there, or while MSI-X is off.
    pub fn notify(&self, n: u16) {
        let msg = {
            let mut s = self.state.lock().unwrap();
            if n >= self.vectors || !s.enabled {
                return;
            }
            if s.masked(n) {
                s.set_pending(n, true);
                return;
            }
            s.message(n)
        };
        if let Some(m) = msg {
            self.sink.send(m);
        }
    }

    /// Sends what became deliverable among `range`.
    fn flush(&self, range: std::ops::Range<u16>) {
        let due: Vec<_> = {
            let mut s = self.state.lock().unwrap();
            if !s.enabled {
                return;
            }
            range
                .filter_map(|n| {
                    let due = s.is_pending(n) && !s.masked(n);
                    due.then(|| {
                        s.set_pending(n, false);
                        s.message(n)
                    })
                })
                .flatten()
                .collect()
        };
        due.into_iter().for_each(|m| self.sink.send(m));
    }

    pub(crate) fn set_control(&self, control: u16) {
        {
            let mut s = self.state.lock().unwrap();
            s.enabled = control & ENABLE != 0;
            s.function_masked = control & FUNCTION_MASK != 0;
        }
        self.flush(0..self.vectors);
    }

    pub(crate) fn set_bus_master(&self, on: bool) {
        self.state.lock().unwrap().bus_master = on;
    }

    /// Masks all vectors and forgets pending ones.
    pub(super) fn reset(&self) {
        let mut s = self.state.lock().unwrap();
        s.table = masked_table(self.vectors);
        s.pba.fill(0);
        s.enabled = false;
        s.function_masked = false;
    }
}

impl State {
    fn entry(&self, n: u16) -> &[u8] {
        let at = usize::from(n) * ENTRY;
        self.table.get(at..at + ENTRY).unwrap_or(&[0; ENTRY])
    }
    fn masked(&self, n: u16) -> bool {
        self.function_masked || self.entry(n)[12] & 1 != 0
    }
    fn is_pending(&self, n: u16) -> bool {
        self.pba.get(usize::from(n / 8)).is_some_and(|b| b & 1 << (n % 8) != 0)
    }
    fn set_pending(&mut self, n: u16, on: bool) {
        if let Some(b) = self.pba.get_mut(usize::from(n / 8)) {
            *b = if on { *b | 1 << (n % 8) } else { *b & !(1 << (n % 8)) };
        }
    }
    fn message(&self, n: u16) -> Option<MsiMessage> {
        let e = self.entry(n);
        let word = |i: usize| u32::from_le_bytes([e[i], e[i + 1], e[i + 2], e[i + 3]]);
        let addr = u64::from(word(0) & !3) | u64::from(word(4)) << 32;
        self.bus_master.then_some(MsiMessage { addr, data: word(8) })
    }
}

impl BusDevice for Msix {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let s = self.state.lock().unwrap();
        let pba = u64::from(self.pba_offset());
        for (at, b) in (offset..).zip(data) {
            let (bytes, at) = if at < pba { (&s.table, at) } else { (&s.pba, at - pba) };
            *b = usize::try_from(at).ok().and_then(|i| bytes.get(i)).copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let len = usize::from(self.vectors) * ENTRY;
        let Ok(start) = usize::try_from(offset) else { return };
        if data.is_empty() || start >= len {
            return;
        }
        let end = start.saturating_add(data.len()).min(len);
        self.state.lock().unwrap().table[start..end].copy_from_slice(&data[..end - start]);
        self.flush((start / ENTRY) as u16..(end.div_ceil(ENTRY)) as u16);
    }
}

impl Capability for Msix {
    fn id(&self) -> u8 {
        0x11
    }
    fn body(&self) -> Vec<u8> {
        let mut b = (self.vectors - 1).to_le_bytes().to_vec();
        b.extend(u32::from(self.bar).to_le_bytes());
        b.extend((self.pba_offset() | u32::from(self.bar)).to_le_bytes());
        b
    }
    fn writable(&self) -> Vec<u8> {
        let mut w = (ENABLE | FUNCTION_MASK).to_le_bytes().to_vec();
        w.extend([0; 8]);
        w
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::testing::Recorder;

    #[test]
    fn masked_vectors_wait_in_the_pending_bits() {
        let sink = Recorder::new();
        let m = Msix::new(sink.clone(), 3, 1);
        m.set_bus_master(true);
        m.notify(1);
        m.set_control(ENABLE | FUNCTION_MASK);
        m.write(16, &0xfee0_1000u64.to_le_bytes());
        m.write(24, &0x41u64.to_le_bytes());
        m.notify(1);
        m.notify(2);
        m.notify(9);
        assert!(sink.messages().is_empty());
        let mut pba = [0; 8];
        m.read(m.pba_offset().into(), &mut pba);
        assert_eq!(pba[0], 0b110);
        m.set_control(ENABLE);
        assert_eq!(sink.messages(), [MsiMessage { addr: 0xfee0_1000, data: 0x41 }]);
        m.write(32 + 12, &[0; 4]);
        assert_eq!(sink.messages().len(), 2);
        m.write(48, &[0; 8]);
        m.write(u64::MAX, &[0; 8]);
    }

    #[test]
    fn without_bus_mastering_no_message_leaves() {
        let sink = Recorder::new();
        let m = Msix::new(sink.clone(), 1, 0);
        m.set_control(ENABLE);
        m.write(12, &[0; 4]);
        m.notify(0);
        assert!(sink.messages().is_empty());
    }

    #[test]
    fn layout_fits_its_bar() {
        let sink = Recorder::new();
        let m = Msix::new(sink.clone(), 9999, 0);
        assert_eq!(m.vectors(), MAX_VECTORS);
        assert_eq!((m.pba_offset(), m.bar_len()), (0x8000, 0x1_0000));
        let m = Msix::new(sink, 4, 0);
        assert_eq!((m.pba_offset(), m.bar_len()), (0x800, 0x1000));
    }
}
