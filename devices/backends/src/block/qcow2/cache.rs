//! A cache of tables, each one cluster of the file: L2 tables or refcount blocks.
//!
//! Always: a changed table stays until it is written back; what is written back is only what was
//! changed, rounded to [`GRAIN`].

use super::super::error::Result;
use super::super::file::HostFile;
use std::collections::HashMap;
use std::ops::Range;

/// Unit of writing back.
const GRAIN: usize = 4096;

/// A table.
#[derive(Debug)]
pub struct Table {
    /// Its bytes, as in the file.
    pub bytes: Box<[u8]>,
    dirty: Range<usize>,
    used: u64,
}

impl Table {
    /// Entry `index` of 64 bits; 0 beyond the end.
    pub fn entry(&self, index: usize) -> u64 {
        let at = index * 8;
        let bytes = self.bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u64::from_be_bytes)
    }
    /// Sets entry `index` of 64 bits.
    pub fn set_entry(&mut self, index: usize, value: u64) {
        if let Some(b) = self.bytes.get_mut(index * 8..index * 8 + 8) {
            b.copy_from_slice(&value.to_be_bytes());
            self.touch(index * 8..index * 8 + 8);
        }
    }
    /// Notes a change.
    pub fn touch(&mut self, range: Range<usize>) {
        self.dirty = if self.dirty.is_empty() {
            range
        } else {
            self.dirty.start.min(range.start)..self.dirty.end.max(range.end)
        };
    }
}

/// Tables by their offset in the file.
#[derive(Debug)]
pub struct Cache {
    tables: HashMap<u64, Table>,
    size: usize,
    capacity: usize,
    clock: u64,
}

impl Cache {
    /// An empty cache of tables of `size` bytes that holds about `bytes` of them.
    pub fn new(size: usize, bytes: usize) -> Cache {
        Cache { tables: HashMap::new(), size, capacity: (bytes / size).max(8), clock: 0 }
    }

    /// Whether the table at `offset` is in memory.
    pub fn has(&self, offset: u64) -> bool {
        self.tables.contains_key(&offset)
    }

    /// The table at `offset`, read if need be.
    pub fn get(&mut self, file: &HostFile, offset: u64) -> Result<&mut Table> {
        self.clock += 1;
        if !self.tables.contains_key(&offset) {
            self.make_room();
            let mut bytes = vec![0; self.size].into_boxed_slice();
            file.read_bytes(offset, &mut bytes)?;
            self.tables.insert(offset, Table { bytes, dirty: 0..0, used: 0 });
        }
        let table = self.tables.get_mut(&offset).expect("just there");
        table.used = self.clock;
        Ok(table)
    }

    /// A new table at `offset` with these bytes, all of them to be written.
    pub fn insert(&mut self, offset: u64, bytes: Box<[u8]>) -> &mut Table {
        self.make_room();
        self.clock += 1;
        let dirty = 0..bytes.len();
        self.tables.insert(offset, Table { bytes, dirty, used: self.clock });
        self.tables.get_mut(&offset).expect("just there")
    }

    fn make_room(&mut self) {
        if self.tables.len() < self.capacity {
            return;
        }
        let clean = self.tables.iter().filter(|(_, t)| t.dirty.is_empty());
        if let Some(offset) = clean.min_by_key(|(_, t)| t.used).map(|(o, _)| *o) {
            self.tables.remove(&offset);
        }
    }

    /// Forgets the table at `offset`, changes included.
    pub fn remove(&mut self, offset: u64) {
        self.tables.remove(&offset);
    }

    /// Whether anything is to be written back.
    pub fn is_dirty(&self) -> bool {
        self.tables.values().any(|t| !t.dirty.is_empty())
    }

    /// Whether so much is to be written back that it should be done soon.
    pub fn is_full(&self) -> bool {
        self.tables.len() >= self.capacity
            && self.tables.values().filter(|t| !t.dirty.is_empty()).count() > self.capacity / 2
    }

    /// Writes back what was changed.
    pub fn write_back(&mut self, file: &HostFile) -> Result<()> {
        let mut dirty: Vec<_> =
            self.tables.iter_mut().filter(|(_, t)| !t.dirty.is_empty()).collect();
        dirty.sort_by_key(|(o, _)| **o);
        for (offset, table) in dirty {
            let from = table.dirty.start / GRAIN * GRAIN;
            let to = table.dirty.end.next_multiple_of(GRAIN).min(table.bytes.len());
            file.write_bytes(offset + from as u64, &table.bytes[from..to])?;
            table.dirty = 0..0;
        }
        Ok(())
    }
}
