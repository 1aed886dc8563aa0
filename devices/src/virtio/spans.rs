//! The buffers of a chain of descriptors.

pub use crate::spans::Spans;

use super::queue::Chain;

impl Spans {
    /// The buffers of `chain`: what the device may read, and what it may write. `None` if they are
    /// mixed (Virtio 1.3 §2.7.4.2), or the chain ends in nowhere.
    pub fn of(chain: Chain<'_>) -> Option<(Spans, Spans)> {
        let (mut readable, mut writable) = (Spans::default(), Spans::default());
        let mut writes = false;
        for d in chain {
            if d.is_write_only() {
                writes = true;
                writable.push(d.addr(), d.len());
            } else if !writes {
                readable.push(d.addr(), d.len());
            } else {
                return None;
            }
        }
        Some((readable, writable))
    }
}
