//! The page walker: linear to physical addresses by the guest's page tables (SDM vol. 3 chapter 4).
//!
//! This is the path of every TLB miss. What always holds:
//!
//! * A walk that faults changes nothing. Accessed and dirty bits are set after all checks have
//!   passed, each by compare-exchange on the entry that was read; if an entry has changed meanwhile
//!   the walk starts anew.
//! * A translation for reading a clean page is not `writable`: the first write walks again and sets
//!   the dirty bit.
//! * Large pages are given in 4 KiB pieces. Which large pages may have pieces in a TLB is noted in
//!   [`LargePages`], so that INVLPG can drop all of them.

use super::Env;
use super::bits::{cr0, cr4, efer};
use super::exception::Exception;
use super::mode::{MMU_KERNEL_SMAP, MMU_USER};

/// Kind of an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write (or read and write).
    Write,
    /// Instruction fetch.
    Fetch,
}

/// What a walk found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// Guest physical address of the 4 KiB page.
    pub phys: u64,
    /// Data writes are allowed at this MMU index and the dirty bit is set.
    pub writable: bool,
    /// Data reads are allowed at this MMU index.
    pub readable: bool,
    /// Survives a CR3 write.
    pub global: bool,
    /// log2 of the size of the guest's page.
    pub page_size_log2: u8,
}

/// Bits of a paging-structure entry.
mod pte {
    pub const P: u64 = 1;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
    pub const ADDR: u64 = 0x000f_ffff_ffff_f000;
}

/// Bits of a page fault's error code (SDM vol. 3 §4.7).
mod pf {
    pub const P: u32 = 1;
    pub const WR: u32 = 1 << 1;
    pub const US: u32 = 1 << 2;
    pub const RSVD: u32 = 1 << 3;
    pub const ID: u32 = 1 << 4;
    pub const PK: u32 = 1 << 5;
}

/// Virtual addresses at which large pages have been translated since all TLBs were last emptied:
/// two hashed bit sets, in units of 2 MiB and of 1 GiB.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct LargePages {
    mib2: [u64; 16],
    gib1: [u64; 4],
}

impl LargePages {
    fn slot2(addr: u64) -> (usize, u64) {
        let n = (addr >> 21) ^ (addr >> 31);
        ((n >> 6 & 15) as usize, 1 << (n & 63))
    }
    fn slot1(addr: u64) -> (usize, u64) {
        let n = (addr >> 30) ^ (addr >> 38);
        ((n >> 6 & 3) as usize, 1 << (n & 63))
    }
    fn note(&mut self, addr: u64, log2: u8) {
        match log2 {
            0..=12 => {}
            21 => {
                let (i, m) = Self::slot2(addr);
                self.mib2[i] |= m;
            }
            // 4 MiB pages of 32-bit paging have two 2 MiB halves.
            22 => {
                for half in [addr & !(1 << 21), addr | 1 << 21] {
                    let (i, m) = Self::slot2(half);
                    self.mib2[i] |= m;
                }
            }
            _ => {
                let (i, m) = Self::slot1(addr);
                self.gib1[i] |= m;
            }
        }
    }
    /// Whether the page of `addr` may be a large one.
    fn may_hold(&self, addr: u64) -> bool {
        let ((i2, m2), (i1, m1)) = (Self::slot2(addr), Self::slot1(addr));
        self.mib2[i2] & m2 != 0 || self.gib1[i1] & m1 != 0
    }
}

/// The access that a walk is for.
#[derive(Clone, Copy)]
struct Walk {
    addr: u64,
    access: Access,
    user: bool,
    smap: bool,
}

/// Rights gathered on the way down.
#[derive(Clone, Copy)]
struct Rights {
    user: bool,
    write: bool,
    nx: bool,
    /// Protection key, in modes that have them.
    pkey: Option<u8>,
}

/// Whether a linear address is canonical when `bits` address bits are implemented.
pub fn canonical_in(addr: u64, bits: u32) -> bool {
    let shift = 64 - bits.clamp(1, 64);
    ((addr << shift) as i64 >> shift) as u64 == addr
}

/// Translates `addr` for an access through MMU index `mmu_idx`.
///
/// # Errors
/// #PF with the error code of SDM vol. 3 §4.7; #GP(0), with the address, for one that is not canonical
/// in long mode ([`super::stack_fault`] may make #SS of it).
pub fn walk(
    env: &mut Env,
    addr: u64,
    access: Access,
    mmu_idx: u8,
) -> Result<Translation, Exception> {
    let cpu = &env.cpu;
    let lma = cpu.efer & efer::LMA != 0;
    let addr = if lma { addr } else { addr & 0xffff_ffff };
    if cpu.cr0 & cr0::PG == 0 {
        return Ok(Translation {
            phys: addr & !0xfff,
            writable: true,
            readable: true,
            global: false,
            page_size_log2: 12,
        });
    }
    let w = Walk { addr, access, user: mmu_idx == MMU_USER, smap: mmu_idx == MMU_KERNEL_SMAP };
    let t = if cpu.cr4 & cr4::PAE == 0 {
        walk32(env, w)?
    } else {
        let (table, level) = if lma {
            let levels = if cpu.cr4 & cr4::LA57 != 0 { 5 } else { 4 };
            if !canonical_in(addr, 12 + 9 * levels) {
                return Err(Exception { addr: Some(addr), ..Exception::gp(0) });
            }
            (cpu.cr3 & pte::ADDR & !cpu.feat.phys_reserved, levels)
        } else {
            if !cpu.pdpte_valid {
                // State was loaded from outside: what the tables hold now is all there is to know.
                let table = read_pdptes(env, env.cpu.cr3);
                env.cpu.pdpte = table;
                env.cpu.pdpte_valid = true;
            }
            let e = env.cpu.pdpte[(addr >> 30 & 3) as usize];
            if e & pte::P == 0 {
                return Err(fault(env, w, 0));
            }
            (e & pte::ADDR & !env.cpu.feat.phys_reserved, 2)
        };
        loop {
            if let Some(t) = walk64(env, w, table, level)? {
                break t;
            }
        }
    };
    env.cpu.large_pages.note(addr, t.page_size_log2);
    Ok(t)
}

/// The #PF of this access, with these error code bits besides those that describe the access.
fn fault(env: &Env, w: Walk, bits: u32) -> Exception {
    let cpu = &env.cpu;
    let mut code = bits;
    if w.user {
        code |= pf::US;
    }
    match w.access {
        Access::Write => code |= pf::WR,
        Access::Fetch => {
            let nxe = cpu.efer & efer::NXE != 0 && cpu.cr4 & cr4::PAE != 0;
            if nxe || cpu.cr4 & cr4::SMEP != 0 {
                code |= pf::ID;
            }
        }
        Access::Read => {}
    }
    Exception::page_fault(w.addr, code)
}

/// Checks the access against the rights (SDM vol. 3 §4.6); gives (readable, writable).
fn check(env: &mut Env, w: Walk, r: Rights) -> Result<(bool, bool), Exception> {
    let cpu = &mut env.cpu;
    let wp = cpu.cr0 & cr0::WP != 0;
    let (mut readable, mut writable, exec);
    if w.user {
        readable = r.user;
        writable = r.user && r.write;
        exec = r.user && !r.nx;
    } else {
        readable = !(r.user && w.smap);
        writable = readable && (r.write || !wp);
        exec = !(r.nx || (r.user && cpu.cr4 & cr4::SMEP != 0));
    }
    let mut key_denies = 0;
    if let Some(key) = r.pkey.filter(|_| r.user && cpu.cr4 & cr4::PKE != 0) {
        cpu.pkeys_seen |= 1 << key;
        let bits = cpu.pkru >> (2 * key) & 3;
        let no_access = bits & 1 != 0;
        let no_write = no_access || (bits & 2 != 0 && (w.user || wp));
        readable &= !no_access;
        writable &= !no_write;
        let denied = match w.access {
            Access::Read => no_access,
            Access::Write => no_write,
            Access::Fetch => false,
        };
        key_denies = if denied { pf::PK } else { 0 };
    }
    let ok = match w.access {
        Access::Read => readable,
        Access::Write => writable,
        Access::Fetch => exec,
    };
    if ok { Ok((readable, writable)) } else { Err(fault(env, w, pf::P | key_denies)) }
}

/// PAE, 4-level and 5-level paging from `table` at `level` down. `None`: an entry changed under the
/// walk.
fn walk64(env: &mut Env, w: Walk, table: u64, top: u32) -> Result<Option<Translation>, Exception> {
    let cpu = &env.cpu;
    let lma = cpu.efer & efer::LMA != 0;
    let nxe = cpu.efer & efer::NXE != 0;
    let gbpages = cpu.feat.gbpages();
    let mut reserved = cpu.feat.phys_reserved;
    if !nxe {
        reserved |= pte::NX;
    }
    if !lma {
        // Bits 62:52 (SDM vol. 3 table 4-9 ff.).
        reserved |= 0x7ff << 52;
    }
    let mut table = table;
    let mut level = top;
    let mut rights = Rights { user: true, write: true, nx: false, pkey: None };
    let mut trail = [(0u64, 0u64); 5];
    let mut n = 0;
    let (shift, leaf) = loop {
        let shift = 12 + 9 * (level - 1);
        let at = table | (w.addr >> shift & 0x1ff) << 3;
        let e = env.phys_read_u64(at);
        if e & pte::P == 0 {
            return Err(fault(env, w, 0));
        }
        let ps = e & pte::PS != 0;
        let leaf = level == 1 || (ps && level <= 3);
        let mut bad = e & reserved;
        if ps && (level >= 4 || (level == 3 && !gbpages)) {
            bad |= pte::PS;
        }
        if leaf && level > 1 {
            bad |= e & ((1 << shift) - (1 << 13));
        }
        if bad != 0 {
            return Err(fault(env, w, pf::P | pf::RSVD));
        }
        rights.user &= e & pte::U != 0;
        rights.write &= e & pte::W != 0;
        rights.nx |= e & pte::NX != 0;
        if let Some(t) = trail.get_mut(n) {
            *t = (at, e);
            n += 1;
        }
        if leaf {
            if lma {
                rights.pkey = Some((e >> 59 & 0xf) as u8);
            }
            break (shift, e);
        }
        table = e & pte::ADDR;
        level -= 1;
    };
    let (readable, may_write) = check(env, w, rights)?;
    let mut dirty = leaf & pte::D != 0;
    for (i, &(at, e)) in trail[..n].iter().enumerate() {
        let mut want = e | pte::A;
        if i + 1 == n && w.access == Access::Write {
            want |= pte::D;
            dirty = true;
        }
        if want != e && !env.phys_cas_u64(at, e, want) {
            return Ok(None);
        }
    }
    let low = (1u64 << shift) - 1;
    Ok(Some(Translation {
        phys: ((leaf & pte::ADDR & !low) | (w.addr & low)) & !0xfff,
        writable: may_write && dirty,
        readable,
        global: leaf & pte::G != 0 && env.cpu.cr4 & cr4::PGE != 0,
        page_size_log2: shift as u8,
    }))
}

/// 32-bit paging (SDM vol. 3 §4.3).
fn walk32(env: &mut Env, w: Walk) -> Result<Translation, Exception> {
    loop {
        let cpu = &env.cpu;
        let (pse, feat) = (cpu.cr4 & cr4::PSE != 0, cpu.feat);
        let pge = cpu.cr4 & cr4::PGE != 0;
        let pde_at = (cpu.cr3 & 0xffff_f000) | (w.addr >> 22 & 0x3ff) << 2;
        let pde = env.phys_read_u32(pde_at);
        let pde64 = u64::from(pde);
        if pde64 & pte::P == 0 {
            return Err(fault(env, w, 0));
        }
        let mut rights =
            Rights { user: pde64 & pte::U != 0, write: pde64 & pte::W != 0, nx: false, pkey: None };
        let large = pse && pde64 & pte::PS != 0;
        let (leaf_at, leaf) = if large {
            // Bits above the PSE-36 address bits (from bit 13) up to bit 21 are reserved.
            let high = if feat.pse36() { feat.phys_bits.min(40).saturating_sub(32) } else { 0 };
            if pde64 & ((1 << 22) - (1 << (13 + high))) != 0 {
                return Err(fault(env, w, pf::P | pf::RSVD));
            }
            (pde_at, pde)
        } else {
            let at = (pde64 & 0xffff_f000) | (w.addr >> 12 & 0x3ff) << 2;
            let e = env.phys_read_u32(at);
            if u64::from(e) & pte::P == 0 {
                return Err(fault(env, w, 0));
            }
            rights.user &= u64::from(e) & pte::U != 0;
            rights.write &= u64::from(e) & pte::W != 0;
            (at, e)
        };
        let (readable, may_write) = check(env, w, rights)?;
        let mut want = leaf | pte::A as u32;
        if w.access == Access::Write {
            want |= pte::D as u32;
        }
        let pde_want = pde | pte::A as u32;
        if !large && pde_want != pde && !env.phys_cas_u32(pde_at, pde, pde_want) {
            continue;
        }
        if want != leaf && !env.phys_cas_u32(leaf_at, leaf, want) {
            continue;
        }
        let leaf = u64::from(leaf);
        let phys = if large {
            (leaf & 0xffc0_0000) | (leaf >> 13 & 0xff) << 32 | (w.addr & 0x003f_f000)
        } else {
            leaf & 0xffff_f000
        };
        return Ok(Translation {
            phys,
            writable: may_write && u64::from(want) & pte::D != 0,
            readable,
            global: leaf & pte::G != 0 && pge,
            page_size_log2: if large { 22 } else { 12 },
        });
    }
}

fn read_pdptes(env: &Env, cr3: u64) -> [u64; 4] {
    let base = cr3 & 0xffff_ffe0;
    std::array::from_fn(|i| env.phys_read_u64(base + 8 * i as u64))
}

/// Reads the four PDPTEs of PAE paging as loading CR3 does (SDM vol. 3 §4.4.1).
///
/// # Errors
/// #GP(0) if a present entry has a reserved bit set.
pub fn load_pdptes(env: &Env, cr3: u64) -> Result<[u64; 4], Exception> {
    let table = read_pdptes(env, cr3);
    let reserved = 0x1e6 | env.cpu.feat.phys_reserved | 0xfff << 52;
    if table.iter().any(|e| e & pte::P != 0 && e & reserved != 0) {
        return Err(Exception::gp(0));
    }
    Ok(table)
}

impl Env {
    /// Whether a linear address is canonical in the current mode (SDM vol. 1 §3.3.7.1).
    pub fn canonical(&self, addr: u64) -> bool {
        canonical_in(addr, if self.cpu.cr4 & cr4::LA57 != 0 { 57 } else { 48 })
    }

    /// INVLPG: forgets the translation of `addr`, all of it if the page is large.
    pub fn invalidate_page(&mut self, addr: u64) {
        if self.cpu.large_pages.may_hold(addr) {
            self.flush_everything();
        } else {
            self.tlb_flush_page(addr);
        }
    }

    /// Forgets all translations, global ones too.
    pub fn flush_everything(&mut self) {
        self.cpu.large_pages = LargePages::default();
        self.cpu.pkeys_seen = 0;
        self.tlb_flush_all();
    }
}

#[cfg(test)]
mod tests {
    use super::super::bits::cr0;
    use super::super::mode::MMU_KERNEL;
    use super::super::testing::{Bench, PT};
    use super::*;
    use tandem_accel::x86::seg;

    const P: u64 = 1;
    const W: u64 = 2;
    const U: u64 = 4;
    const NX: u64 = 1 << 63;
    const TABLE: u64 = PT + 0x3000;
    /// First linear address that the page table covers.
    const AT: u64 = 0x20_0000;

    /// Long mode with a page table for the second 2 MiB.
    fn long(entry: u64) -> Bench {
        let mut b = Bench::new();
        b.poke64(PT + 0x2008, TABLE | P | W | U);
        b.poke64(TABLE, entry);
        b.long(0);
        b
    }
    fn code(r: Result<Translation, Exception>) -> u32 {
        let e = r.unwrap_err();
        assert_eq!(e.vector, 14);
        e.error.unwrap()
    }

    #[test]
    fn no_paging_wraps_at_4_gib() {
        let mut b = Bench::new();
        b.protected(0);
        let t = walk(b.env(), 0x1_0000_5123, Access::Write, MMU_KERNEL).unwrap();
        assert_eq!((t.phys, t.writable), (0x5000, true));
    }

    // SDM vol. 3 §4.8: accessed on any use, dirty on a write to the page only.
    #[test]
    fn accessed_and_dirty_bits() {
        let mut b = long(0x5000 | P | W);
        let t = walk(b.env(), AT + 0x123, Access::Read, MMU_KERNEL).unwrap();
        assert_eq!((t.phys, t.readable, t.writable), (0x5000, true, false));
        assert_eq!(b.peek64(TABLE), 0x5000 | P | W | 0x20);
        assert_eq!(b.peek64(PT) & 0x60, 0x20);
        let t = walk(b.env(), AT, Access::Write, MMU_KERNEL).unwrap();
        assert!(t.writable);
        assert_eq!(b.peek64(TABLE) & 0x60, 0x60);
        assert_eq!(b.peek64(PT + 0x2008) & 0x60, 0x20);
    }

    // SDM vol. 3 §4.7.
    #[test]
    fn error_codes() {
        let mut b = long(0);
        let e = walk(b.env(), AT + 8, Access::Write, MMU_USER).unwrap_err();
        assert_eq!((e.addr, e.error), (Some(AT + 8), Some(6)));
        // Read-only for user; supervisor-only; and a faulting walk sets nothing.
        let mut b = long(0x5000 | P | U);
        assert_eq!(code(walk(b.env(), AT, Access::Write, MMU_USER)), 7);
        assert_eq!(b.peek64(TABLE), 0x5000 | P | U);
        let mut b = long(0x5000 | P | W);
        assert_eq!(code(walk(b.env(), AT, Access::Read, MMU_USER)), 5);
        // Reserved: physical address bit 50 with 48 implemented.
        let mut b = long(1 << 50 | 0x5000 | P);
        assert_eq!(code(walk(b.env(), AT, Access::Read, MMU_KERNEL)), 9);
        // NX is reserved without EFER.NXE, and then I/D is not reported.
        let mut b = long(0x5000 | P | NX);
        assert_eq!(code(walk(b.env(), AT, Access::Fetch, MMU_KERNEL)), 0x11);
        b.env().cpu.efer &= !efer::NXE;
        assert_eq!(code(walk(b.env(), AT, Access::Fetch, MMU_KERNEL)), 9);
    }

    #[test]
    fn write_protection_follows_cr0_wp() {
        let mut b = long(0x5000 | P);
        b.env().cpu.cr0 &= !cr0::WP;
        assert!(walk(b.env(), AT, Access::Write, MMU_KERNEL).unwrap().writable);
        b.env().cpu.cr0 |= cr0::WP;
        assert_eq!(code(walk(b.env(), AT, Access::Write, MMU_KERNEL)), 3);
    }

    // SDM vol. 3 §4.6.1.
    #[test]
    fn smep_smap_and_protection_keys() {
        let mut b = long(0x5000 | P | W | U | 3 << 59);
        let env = b.env();
        env.cpu.cr4 |= cr4::SMEP | cr4::SMAP;
        assert_eq!(code(walk(env, AT, Access::Fetch, MMU_KERNEL)), 0x11);
        assert_eq!(code(walk(env, AT, Access::Read, MMU_KERNEL_SMAP)), 1);
        assert!(walk(env, AT, Access::Read, MMU_KERNEL).is_ok());
        env.cpu.cr4 |= cr4::PKE;
        env.cpu.pkru = 1 << 6;
        assert_eq!(code(walk(env, AT, Access::Read, MMU_USER)), 0x25);
        assert!(walk(env, AT, Access::Fetch, MMU_USER).is_ok());
        // Write-disable binds the supervisor only with CR0.WP.
        env.cpu.pkru = 2 << 6;
        assert!(walk(env, AT, Access::Write, MMU_KERNEL).is_ok());
        env.cpu.cr0 |= cr0::WP;
        assert_eq!(code(walk(env, AT, Access::Write, MMU_KERNEL)), 0x23);
        assert_eq!(env.cpu.pkeys_seen, 1 << 3);
    }

    #[test]
    fn canonical_addresses_only() {
        let mut b = long(0);
        let e = walk(b.env(), 1 << 47, Access::Read, MMU_KERNEL).unwrap_err();
        assert_eq!((e.vector, e.error), (13, Some(0)));
        assert!(canonical_in(0xffff_8000_0000_0000, 48));
        assert!(canonical_in(1 << 47, 57));
        assert!(!canonical_in(1 << 56, 57));
    }

    #[test]
    fn large_pages_come_in_pieces_and_invlpg_drops_all() {
        let mut b = Bench::new();
        b.long(0);
        let t = walk(b.env(), 0x12_3456, Access::Read, MMU_KERNEL).unwrap();
        assert_eq!((t.phys, t.page_size_log2), (0x12_3000, 21));
        assert!(b.env().cpu.large_pages.may_hold(0x1f_ffff));
        // Address bits below the page size are reserved.
        b.poke64(PT + 0x2008, 0x20_2087);
        assert_eq!(code(walk(b.env(), AT, Access::Read, MMU_KERNEL)), 9);
        // 1 GiB page.
        b.poke64(PT + 0x1008, 0xc000_0087);
        let t = walk(b.env(), 0x4012_3456, Access::Read, MMU_KERNEL).unwrap();
        assert_eq!((t.phys, t.page_size_log2), (0xc012_3000, 30));
        b.env().invalidate_page(0x7fff_f000);
        assert!(!b.env().cpu.large_pages.may_hold(0x1f_ffff));
        // PS in a PML4 entry is reserved.
        b.poke64(PT + 8, 0x87);
        assert_eq!(code(walk(b.env(), 1 << 39, Access::Read, MMU_KERNEL)), 9);
    }

    // SDM vol. 3 §4.4.
    #[test]
    fn pae_paging_uses_the_loaded_pdptes() {
        let mut b = Bench::new();
        b.poke64(PT, (PT + 0x2000) | 1);
        b.protected(0);
        let env = b.env();
        env.cpu.cr4 |= cr4::PAE;
        env.cpu.cr0 |= cr0::PG;
        env.cpu.cr3 = PT;
        let t = walk(env, 0x20_5000, Access::Write, MMU_USER).unwrap();
        assert_eq!((t.phys, t.page_size_log2), (0x20_5000, 21));
        // The entry in memory does not count any more.
        b.poke64(PT, 0);
        assert!(walk(b.env(), 0x20_5000, Access::Read, MMU_USER).is_ok());
        assert_eq!(code(walk(b.env(), 0x4000_0000, Access::Read, MMU_USER)), 4);
        b.poke64(PT, 0x1e7);
        assert!(load_pdptes(b.env(), PT).is_err());
    }

    // SDM vol. 3 §4.3.
    #[test]
    fn paging_32_bit_with_pse36() {
        let mut b = Bench::new();
        b.poke32(PT, (PT + 0x1000) as u32 | 7);
        b.poke32(PT + 0x1000 + 4 * 5, 0x9007);
        b.poke32(PT + 4, 0x0040_2087); // PSE-36 bit 32 set
        b.poke32(PT + 8, 0x0020_0087); // bit 21 reserved
        b.protected(0);
        let env = b.env();
        env.cpu.cr0 |= cr0::PG;
        env.cpu.cr3 = PT;
        env.cpu.cr4 |= cr4::PSE;
        let t = walk(env, 0x5678, Access::Write, MMU_USER).unwrap();
        assert_eq!((t.phys, t.writable), (0x9000, true));
        let t = walk(env, 0x40_1234, Access::Read, MMU_USER).unwrap();
        assert_eq!((t.phys, t.page_size_log2), (0x1_0040_1000, 22));
        assert_eq!(code(walk(env, 0x80_0000, Access::Read, MMU_USER)), 0xd);
        assert_eq!(b.peek32(PT + 0x1000 + 4 * 5), 0x9067);
    }

    #[test]
    fn five_levels() {
        let mut b = Bench::new();
        b.poke64(PT + 0x4000, PT | 7);
        b.long(0);
        let env = b.env();
        env.cpu.cr4 |= cr4::LA57;
        env.cpu.cr3 = PT + 0x4000;
        assert_eq!(walk(env, 0x1234, Access::Read, MMU_KERNEL).unwrap().phys, 0x1000);
        assert_eq!(env.cpu.seg[seg::CS].selector, 0x28);
    }
}
