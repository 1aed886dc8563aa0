//! A table of conversations: found by key, by the token of their descriptor, and by having
//! something to do.

use std::collections::HashMap;
use std::hash::Hash;

/// Kinds of tokens, in their highest byte.
pub const TCP: u64 = 1;
/// Datagrams.
pub const UDP: u64 = 2;
/// Echo requests.
pub const ICMP: u64 = 3;
/// Listening sockets.
pub const LISTENER: u64 = 4;
/// Forwarded datagrams.
pub const UDP_FORWARD: u64 = 5;

/// The kind of a token.
pub fn kind(token: u64) -> u64 {
    token >> 56
}

struct Slot<K, F> {
    entry: Option<(K, F)>,
    generation: u32,
    active: bool,
}

/// A table of conversations.
pub struct Flows<K, F> {
    slots: Vec<Slot<K, F>>,
    free: Vec<u32>,
    by_key: HashMap<K, u32>,
    active: Vec<u32>,
}

impl<K, F> Default for Flows<K, F> {
    fn default() -> Flows<K, F> {
        Flows { slots: Vec::new(), free: Vec::new(), by_key: HashMap::new(), active: Vec::new() }
    }
}

impl<K: Copy + Eq + Hash, F> Flows<K, F> {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Adds one; returns its index.
    pub fn insert(&mut self, key: K, flow: F) -> u32 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { entry: None, generation: 0, active: false });
            (self.slots.len() - 1) as u32
        });
        let slot = &mut self.slots[index as usize];
        slot.entry = Some((key, flow));
        slot.generation = slot.generation.wrapping_add(1) & 0xff_ffff;
        self.by_key.insert(key, index);
        index
    }

    /// Takes one out.
    pub fn remove(&mut self, index: u32) {
        let Some(slot) = self.slots.get_mut(index as usize) else { return };
        if let Some((key, _)) = slot.entry.take() {
            self.by_key.remove(&key);
            self.free.push(index);
        }
    }

    /// The index of `key`.
    pub fn find(&self, key: &K) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    /// Number `index`.
    pub fn get(&self, index: u32) -> Option<&F> {
        self.slots.get(index as usize)?.entry.as_ref().map(|(_, f)| f)
    }

    /// Number `index`.
    pub fn get_mut(&mut self, index: u32) -> Option<&mut F> {
        self.slots.get_mut(index as usize)?.entry.as_mut().map(|(_, f)| f)
    }

    /// The token for a descriptor of number `index`. A later conversation with that index has
    /// another.
    pub fn token(&self, kind: u64, index: u32) -> u64 {
        let generation = self.slots.get(index as usize).map_or(0, |s| s.generation);
        kind << 56 | u64::from(generation) << 32 | u64::from(index)
    }

    /// The index that a token belongs to, if that conversation still is.
    pub fn by_token(&self, token: u64) -> Option<u32> {
        let index = token as u32;
        let slot = self.slots.get(index as usize)?;
        let same = u64::from(slot.generation) == token >> 32 & 0xff_ffff;
        (same && slot.entry.is_some()).then_some(index)
    }

    /// Notes that number `index` has something to do.
    pub fn activate(&mut self, index: u32) {
        if let Some(slot) = self.slots.get_mut(index as usize)
            && !std::mem::replace(&mut slot.active, true)
        {
            self.active.push(index);
        }
    }

    /// Those that have something to do, which they are not noted for any more.
    pub fn take_active(&mut self) -> Vec<u32> {
        let active = std::mem::take(&mut self.active);
        for i in &active {
            if let Some(slot) = self.slots.get_mut(*i as usize) {
                slot.active = false;
            }
        }
        active
    }

    /// Whether any has something to do.
    pub fn any_active(&self) -> bool {
        !self.active.is_empty()
    }

    /// All indices.
    pub fn indices(&self) -> Vec<u32> {
        let slots = self.slots.iter().zip(0..);
        slots.filter(|(s, _)| s.entry.is_some()).map(|(_, i)| i).collect()
    }
}
