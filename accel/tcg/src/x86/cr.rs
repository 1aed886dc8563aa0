//! Control registers, XCR0, PKRU and TLB control (SDM vol. 3 §2.5–2.7, §4.10, vol. 2 MOV CR).
//!
//! Our TLBs hold the translations of one PCID at a time. What PCID promises is that stale
//! translations are never used, not that fresh ones survive; so a CR3 write to another address
//! space empties the local translations, whatever bit 63 says.

use super::bits::{cr0, cr4, efer};
use super::exception::Exception;
use super::{Cpu, Env, paging};
use tandem_accel::x86::{ATTR_L, gpr, seg};

const GP: Exception = Exception::gp(0);

/// Fails with #GP(0) above CPL 0.
pub fn privileged(cpu: &Cpu) -> Result<(), Exception> {
    if cpu.cpl() == 0 { Ok(()) } else { Err(GP) }
}

/// MOV from CR `n`.
///
/// # Errors
/// #GP(0) above CPL 0; #UD for a register that does not exist.
pub fn read(env: &Env, n: u64) -> Result<u64, Exception> {
    privileged(&env.cpu)?;
    let cpu = &env.cpu;
    match n {
        0 => Ok(cpu.cr0),
        2 => Ok(cpu.cr2),
        3 => Ok(cpu.cr3),
        4 => Ok(cpu.cr4),
        8 => Ok(cr8(env).into()),
        _ => Err(Exception::UD),
    }
}

/// MOV to CR `n`.
///
/// # Errors
/// As [`read`], and #GP(0) for a value that the register does not take.
pub fn write(env: &mut Env, n: u64, v: u64) -> Result<(), Exception> {
    privileged(&env.cpu)?;
    match n {
        0 => set_cr0(env, v),
        2 => {
            env.cpu.cr2 = v;
            Ok(())
        }
        3 => set_cr3(env, v),
        4 => set_cr4(env, v),
        8 => set_cr8(env, v),
        _ => Err(Exception::UD),
    }
}

/// CR8: the task priority class.
pub fn cr8(env: &Env) -> u8 {
    match &env.vcpu().intc {
        Some(i) => i.cr8(),
        None => env.cpu.cr8,
    }
}

fn set_cr8(env: &mut Env, v: u64) -> Result<(), Exception> {
    if v > 15 {
        return Err(GP);
    }
    env.cpu.cr8 = v as u8;
    if let Some(i) = &env.vcpu().intc {
        i.set_cr8(v as u8);
    }
    env.interrupts_may_come();
    Ok(())
}

/// Reads the PDPTEs that `cr3` points to, if PAE paging outside IA-32e mode is or becomes active.
fn reload_pdptes(env: &mut Env, cr3: u64) -> Result<(), Exception> {
    env.cpu.pdpte = paging::load_pdptes(env, cr3)?;
    env.cpu.pdpte_valid = true;
    Ok(())
}

fn set_cr0(env: &mut Env, v: u64) -> Result<(), Exception> {
    if v >> 32 != 0 {
        return Err(GP);
    }
    let new = v & cr0::ALL | cr0::ET;
    if (new & cr0::PG != 0 && new & cr0::PE == 0) || (new & cr0::NW != 0 && new & cr0::CD == 0) {
        return Err(GP);
    }
    let cpu = &env.cpu;
    let changed = cpu.cr0 ^ new;
    let long_next = new & cr0::PG != 0 && cpu.efer & efer::LME != 0;
    if changed & cr0::PG != 0 {
        if new & cr0::PG != 0 {
            if long_next && (cpu.cr4 & cr4::PAE == 0 || cpu.seg[seg::CS].attr & ATTR_L != 0) {
                return Err(GP);
            }
        } else if cpu.code64() || cpu.cr4 & cr4::PCIDE != 0 {
            return Err(GP);
        }
    }
    let pae = new & cr0::PG != 0 && cpu.cr4 & cr4::PAE != 0 && !long_next;
    if pae && changed & (cr0::PG | cr0::CD | cr0::NW) != 0 {
        reload_pdptes(env, env.cpu.cr3)?;
    }
    let cpu = &mut env.cpu;
    cpu.cr0 = new;
    if long_next {
        cpu.efer |= efer::LMA;
    } else {
        cpu.efer &= !efer::LMA;
    }
    if changed & (cr0::PG | cr0::WP) != 0 {
        env.flush_everything();
    }
    env.update_mode();
    Ok(())
}

fn set_cr3(env: &mut Env, v: u64) -> Result<(), Exception> {
    let cpu = &env.cpu;
    let pcide = cpu.cr4 & cr4::PCIDE != 0;
    let mut v = v;
    let mut keep = false;
    if pcide {
        keep = v >> 63 != 0;
        v &= !(1 << 63);
    }
    if cpu.long_mode() {
        if v & (cpu.feat.phys_reserved | 0xfff << 52) != 0 {
            return Err(GP);
        }
    } else {
        v &= 0xffff_ffff;
        if cpu.cr0 & cr0::PG != 0 && cpu.cr4 & cr4::PAE != 0 {
            reload_pdptes(env, v)?;
        }
    }
    if !(keep && env.cpu.cr3 == v) {
        env.cpu.cr3 = v;
        env.tlb_flush_local();
    }
    Ok(())
}

fn set_cr4(env: &mut Env, v: u64) -> Result<(), Exception> {
    let cpu = &env.cpu;
    if v & !cpu.feat.cr4 != 0 {
        return Err(GP);
    }
    let changed = cpu.cr4 ^ v;
    let lma = cpu.long_mode();
    if lma && (v & cr4::PAE == 0 || changed & cr4::LA57 != 0) {
        return Err(GP);
    }
    if changed & v & cr4::PCIDE != 0 && (!lma || cpu.cr3 & 0xfff != 0) {
        return Err(GP);
    }
    let paging = cr4::PGE | cr4::PSE | cr4::PAE | cr4::SMEP;
    if cpu.cr0 & cr0::PG != 0 && v & cr4::PAE != 0 && !lma && changed & paging != 0 {
        reload_pdptes(env, env.cpu.cr3)?;
    }
    env.cpu.cr4 = v;
    let flushing = paging | cr4::SMAP | cr4::PKE | cr4::LA57 | cr4::PCIDE;
    if changed & flushing != 0 {
        env.flush_everything();
    }
    env.update_mode();
    Ok(())
}

/// LMSW: sets PE, MP, EM, TS; cannot clear PE.
pub fn lmsw(env: &mut Env, v: u64) -> Result<(), Exception> {
    privileged(&env.cpu)?;
    let old = env.cpu.cr0;
    set_cr0(env, old & !(cr0::MP | cr0::EM | cr0::TS) | v & 0xf)
}

/// CLTS.
pub fn clts(env: &mut Env) -> Result<(), Exception> {
    privileged(&env.cpu)?;
    env.cpu.cr0 &= !cr0::TS;
    env.update_mode();
    Ok(())
}

/// INVLPG.
pub fn invlpg(env: &mut Env, addr: u64) -> Result<(), Exception> {
    privileged(&env.cpu)?;
    // A non-canonical address is no error and invalidates nothing (SDM vol. 2).
    if !env.cpu.long_mode() || env.canonical(addr) {
        env.invalidate_page(env.cpu.linear(addr));
    }
    Ok(())
}

/// INVPCID of `kind` with the descriptor at linear address `at` (SDM vol. 2).
pub fn invpcid(env: &mut Env, kind: u64, at: u64) -> Result<(), Exception> {
    privileged(&env.cpu)?;
    let mmu = env.cpu.mmu_at(0);
    let pcid = env.read_u64(at, mmu)?;
    let addr = env.read_u64(env.cpu.linear(at.wrapping_add(8)), mmu)?;
    if pcid >> 12 != 0 {
        return Err(GP);
    }
    let bad_pcid = pcid != 0 && env.cpu.cr4 & cr4::PCIDE == 0;
    let current = pcid == env.cpu.cr3 & 0xfff || env.cpu.cr4 & cr4::PCIDE == 0;
    match kind {
        0 => {
            if bad_pcid || !env.canonical(addr) {
                return Err(GP);
            }
            if current {
                env.invalidate_page(addr);
            }
        }
        1 => {
            if bad_pcid {
                return Err(GP);
            }
            if current {
                env.tlb_flush_local();
            }
        }
        2 => env.flush_everything(),
        3 => env.tlb_flush_local(),
        _ => return Err(GP),
    }
    Ok(())
}

/// XGETBV: XCR0, or with ECX = 1 the part of it in use.
pub fn xgetbv(env: &Env) -> Result<u64, Exception> {
    let cpu = &env.cpu;
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    match cpu.gpr[gpr::RCX] as u32 {
        0 => Ok(cpu.xcr0),
        // XINUSE may say "in use" of a component in its initial state (SDM vol. 1 §13.6).
        1 if cpu.feat.xsave & 4 != 0 => Ok(cpu.xcr0),
        _ => Err(GP),
    }
}

/// Whether a value of XCR0 is allowed (SDM vol. 1 §13.3).
pub fn xcr0_valid(cpu: &Cpu, v: u64) -> bool {
    let avx512 = v & 0xe0;
    v & 1 != 0
        && v & !cpu.feat.xcr0 == 0
        && (v & 4 == 0 || v & 2 != 0)
        && (avx512 == 0 || (avx512 == 0xe0 && v & 6 == 6))
}

/// XSETBV: EDX:EAX to XCR0.
pub fn xsetbv(env: &mut Env) -> Result<(), Exception> {
    if env.cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    privileged(&env.cpu)?;
    let g = &env.cpu.gpr;
    let v = g[gpr::RAX] & 0xffff_ffff | g[gpr::RDX] << 32;
    if g[gpr::RCX] as u32 != 0 || !xcr0_valid(&env.cpu, v) {
        return Err(GP);
    }
    env.cpu.xcr0 = v;
    env.update_mode();
    Ok(())
}

/// RDPKRU: ECX must be 0.
pub fn rdpkru(env: &Env) -> Result<u64, Exception> {
    if env.cpu.cr4 & cr4::PKE == 0 {
        return Err(Exception::UD);
    }
    if env.cpu.gpr[gpr::RCX] as u32 != 0 { Err(GP) } else { Ok(env.cpu.pkru.into()) }
}

/// WRPKRU: ECX and EDX must be 0.
pub fn wrpkru(env: &mut Env) -> Result<(), Exception> {
    if env.cpu.cr4 & cr4::PKE == 0 {
        return Err(Exception::UD);
    }
    let g = &env.cpu.gpr;
    if g[gpr::RCX] as u32 != 0 || g[gpr::RDX] as u32 != 0 {
        return Err(GP);
    }
    let v = g[gpr::RAX] as u32;
    set_pkru(env, v);
    Ok(())
}

/// Writes PKRU; translations of keys whose rights change are forgotten.
pub fn set_pkru(env: &mut Env, v: u32) {
    let changed = env.cpu.pkru ^ v;
    env.cpu.pkru = v;
    let stale = (0..16).any(|k| changed >> (2 * k) & 3 != 0 && env.cpu.pkeys_seen >> k & 1 != 0);
    if stale {
        env.flush_everything();
    }
}

#[cfg(test)]
mod tests {
    use super::super::mode::Mode;
    use super::super::testing::{Bench, PT};
    use super::*;
    use std::sync::atomic::Ordering;

    const NO: Result<(), Exception> = Err(GP);

    // SDM vol. 3 §10.8.5: the order in which an OS enters IA-32e mode.
    #[test]
    fn entering_and_leaving_long_mode() {
        let mut b = Bench::new();
        b.protected(0);
        let env = b.env();
        write(env, 3, PT).unwrap();
        env.cpu.efer |= efer::LME;
        // Paging without PAE.
        assert_eq!(write(env, 0, 0x8000_0011), NO);
        write(env, 4, cr4::PAE).unwrap();
        write(env, 0, 0x8000_0011).unwrap();
        assert!(env.cpu.long_mode() && env.core.mode & Mode::LMA.bits() != 0);
        assert_eq!(write(env, 4, 0), NO);
        write(env, 0, 0x11).unwrap();
        assert!(!env.cpu.long_mode());
        b.long(0);
        assert_eq!(write(b.env(), 0, 0x11), NO);
    }

    // SDM vol. 2, MOV to control registers.
    #[test]
    fn invalid_values_are_refused() {
        let mut b = Bench::new();
        b.protected(0);
        let env = b.env();
        for v in [0x8000_0000, 0x2000_0001, 1 << 32] {
            assert_eq!(write(env, 0, v), NO, "{v:#x}");
        }
        assert_eq!(write(env, 4, 1 << 13), NO);
        assert_eq!(write(env, 4, cr4::PCIDE), NO);
        assert_eq!(write(env, 8, 16), NO);
        assert_eq!(write(env, 5, 0), Err(Exception::UD));
        write(env, 0, 1 << 6 | 1).unwrap();
        assert_eq!(read(env, 0), Ok(0x11));
        b.long(0);
        assert_eq!(write(b.env(), 3, 1 << 52), NO);
        assert_eq!(write(b.env(), 3, 1 << 48), NO);
        b.long(3);
        assert_eq!(read(b.env(), 0), Err(GP));
        assert_eq!(write(b.env(), 2, 0), NO);
    }

    #[test]
    fn pae_loads_pdptes() {
        let mut b = Bench::new();
        b.poke64(PT, 1 << 1 | 1);
        b.protected(0);
        let env = b.env();
        env.cpu.cr4 = cr4::PAE;
        env.cpu.cr3 = PT;
        assert_eq!(write(env, 0, 0x8000_0011), NO);
        b.poke64(PT, 0x5001);
        write(b.env(), 0, 0x8000_0011).unwrap();
        assert_eq!(b.env().cpu.pdpte[0], 0x5001);
        b.poke64(PT, 0x6001);
        write(b.env(), 3, PT).unwrap();
        assert_eq!(b.env().cpu.pdpte[0], 0x6001);
    }

    #[test]
    fn pcid_and_stale_translations() {
        let mut b = Bench::new();
        b.long(0);
        let env = b.env();
        write(env, 4, cr4::PAE | cr4::PCIDE | cr4::PGE).unwrap();
        assert_eq!(env.read_u8(0x5000, 1), Ok(0));
        b.poke64(PT + 0x2000, 0);
        // The same space, kept; another space, flushed.
        write(b.env(), 3, 1 << 63 | PT).unwrap();
        assert!(b.env().read_u8(0x5000, 1).is_ok());
        write(b.env(), 3, 1 << 63 | PT | 1).unwrap();
        assert_eq!(b.env().cpu.cr3, PT | 1);
        assert!(b.env().read_u8(0x5000, 1).is_err());
        assert_eq!(write(b.env(), 0, 0x11), NO);
    }

    // SDM vol. 2, INVPCID.
    #[test]
    fn invpcid_checks_its_descriptor() {
        let mut b = Bench::new();
        b.poke64(0x6000, 1);
        b.poke64(0x6008, 0x5000);
        b.long(0);
        assert_eq!(invpcid(b.env(), 0, 0x6000), NO);
        b.poke64(0x6000, 0);
        b.env().read_u8(0x5000, 1).unwrap();
        b.poke64(PT + 0x2000, 0x87 & !1);
        assert!(b.env().read_u8(0x5000, 1).is_ok());
        assert_eq!(invpcid(b.env(), 0, 0x6000), Ok(()));
        assert!(b.env().read_u8(0x5000, 1).is_err());
        b.poke64(PT + 0x2000, 0x87);
        assert_eq!(invpcid(b.env(), 4, 0x6000), NO);
        b.poke64(0x6008, 1 << 47);
        assert_eq!(invpcid(b.env(), 0, 0x6000), NO);
        assert_eq!(invpcid(b.env(), 2, 0x6000), Ok(()));
    }

    #[test]
    fn lmsw_cannot_leave_protected_mode() {
        let mut b = Bench::new();
        b.protected(0);
        lmsw(b.env(), 0xe).unwrap();
        assert_eq!(b.env().cpu.cr0, 0x1f);
        clts(b.env()).unwrap();
        lmsw(b.env(), 0).unwrap();
        assert_eq!(b.env().cpu.cr0, 0x11);
    }

    // SDM vol. 1 §13.3.
    #[test]
    fn xcr0_and_pkru() {
        let mut b = Bench::new();
        b.protected(0);
        let env = b.env();
        assert_eq!(xsetbv(env), Err(Exception::UD));
        env.cpu.cr4 |= cr4::OSXSAVE;
        env.cpu.gpr[gpr::RAX] = 5;
        assert_eq!(xsetbv(env), NO);
        env.cpu.gpr[gpr::RAX] = 3;
        xsetbv(env).unwrap();
        assert_eq!(xgetbv(env), Ok(3));
        env.cpu.gpr[gpr::RCX] = 2;
        assert_eq!(xgetbv(env), Err(GP));
        assert_eq!(wrpkru(env), Err(Exception::UD));
        env.cpu.cr4 |= cr4::PKE;
        assert_eq!(wrpkru(env), NO);
        env.cpu.gpr[gpr::RCX] = 0;
        wrpkru(env).unwrap();
        assert_eq!(rdpkru(env), Ok(3));
    }

    #[test]
    fn cr8_is_the_local_apics() {
        let mut b = Bench::new();
        b.long(0);
        write(b.env(), 8, 9).unwrap();
        assert_eq!(b.intc.tpr.load(Ordering::Relaxed), 9);
        assert_eq!(read(b.env(), 8), Ok(9));
    }
}
