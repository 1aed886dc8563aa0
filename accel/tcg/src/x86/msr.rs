//! Model-specific registers (SDM vol. 4; APM vol. 2 appendix A; Linux
//! `Documentation/virt/kvm/x86/msr.rst`).
//!
//! An MSR that this processor does not have raises #GP(0), as on hardware. Registers of AMD's
//! exist on AMD models only, and the other way round.

use super::bits::{cr0, cr4, efer};
use super::exception::Exception;
use super::features::Features;
use super::{Cpu, Env, tsc};
use tandem_accel::x86::{gpr, seg};

/// Banks of machine-check registers.
pub const MC_BANKS: usize = 10;
/// Variable MTRRs.
pub const MTRR_PAIRS: usize = 8;
/// PAT after RESET (SDM vol. 3 §12.12.4).
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// Number of AMD configuration registers that only hold their value.
const AMD_HELD: usize = 7;

/// Indices.
#[allow(missing_docs)]
pub mod index {
    pub const TSC: u32 = 0x10;
    pub const PLATFORM_ID: u32 = 0x17;
    pub const APIC_BASE: u32 = 0x1b;
    pub const FEAT_CTL: u32 = 0x3a;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const BIOS_UPDT_TRIG: u32 = 0x79;
    pub const BIOS_SIGN_ID: u32 = 0x8b;
    pub const MTRRCAP: u32 = 0xfe;
    pub const FLUSH_CMD: u32 = 0x10b;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17a;
    pub const MCG_CTL: u32 = 0x17b;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const LAST_INT_TO: u32 = 0x1de;
    pub const MTRR_PHYS: u32 = 0x200;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub const MC_CTL: u32 = 0x400;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const X2APIC: u32 = 0x800;
    pub const XSS: u32 = 0xda0;
    pub const KVM_WALL_CLOCK_OLD: u32 = 0x11;
    pub const KVM_SYSTEM_TIME_OLD: u32 = 0x12;
    pub const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
    pub const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const FMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
    pub const AMD_EVNTSEL0: u32 = 0xc001_0000;
    pub const AMD_PERFCTR3: u32 = 0xc001_0007;
    pub const AMD_HWCR: u32 = 0xc001_0015;
    pub const AMD_PATCH_LOADER: u32 = 0xc001_0020;
    pub const AMD_DE_CFG: u32 = 0xc001_1029;
}
use index::*;

/// Fixed-range MTRRs (SDM vol. 3 table 12-9).
const MTRR_FIXED: [u32; 11] =
    [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];

/// AMD registers that hold what is written: SYSCFG, NB_CFG, LS_CFG, IC_CFG, DC_CFG, BU_CFG2,
/// EX_CFG.
const AMD_STORED: [u32; AMD_HELD] =
    [0xc001_0010, 0xc001_001f, 0xc001_1020, 0xc001_1021, 0xc001_1022, 0xc001_102a, 0xc001_102c];

/// AMD registers that read as zero and ignore writes: IORRs, top of memory, interrupt pending
/// message, MMIO configuration base, SMM, VM_CR and VM_HSAVE_PA, OSVW, performance counters.
fn amd_zero(msr: u32) -> bool {
    matches!(
        msr,
        AMD_EVNTSEL0..=AMD_PERFCTR3
            | 0xc001_0016..=0xc001_001a
            | 0xc001_001d
            | 0xc001_0055
            | 0xc001_0058
            | 0xc001_0112..=0xc001_0114
            | 0xc001_0117
            | 0xc001_0140..=0xc001_0141
            | 0xc001_0200..=0xc001_020b
    )
}

/// LFENCE is dispatch serialising.
const DE_CFG_LFENCE: u64 = 1 << 1;
/// HWCR: the TSC counts at the P0 frequency.
const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;
/// HWCR: machine-check status registers can be written.
const HWCR_MC_STATUS_WR_EN: u64 = 1 << 18;

/// Registers that only hold their value, and those that system-call instructions use.
#[derive(Clone, Copy, Default, Debug)]
#[repr(C)]
pub struct Msrs {
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub fmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// IA32_SPEC_CTRL.
    pub spec_ctrl: u64,
    /// IA32_MTRR_DEF_TYPE.
    pub mtrr_def_type: u64,
    /// Fixed-range MTRRs in index order.
    pub mtrr_fixed: [u64; 11],
    /// Variable-range MTRRs: base, mask.
    pub mtrr_var: [[u64; 2]; MTRR_PAIRS],
    /// IA32_MCG_STATUS.
    pub mcg_status: u64,
    /// IA32_MCG_CTL.
    pub mcg_ctl: u64,
    /// IA32_MCi_CTL, STATUS, ADDR, MISC.
    pub mc: [[u64; 4]; MC_BANKS],
    /// MSR_KVM_SYSTEM_TIME.
    pub kvm_system_time: u64,
    /// MSR_KVM_WALL_CLOCK.
    pub kvm_wall_clock: u64,
    /// AMD's HWCR.
    pub hwcr: u64,
    /// AMD's DE_CFG.
    pub de_cfg: u64,
    /// Other AMD configuration registers.
    pub amd: [u64; AMD_HELD],
}

impl Msrs {
    /// Values after RESET.
    pub fn reset() -> Msrs {
        Msrs {
            pat: PAT_RESET,
            // Fast strings; BTS and PEBS unavailable.
            misc_enable: 1 | 1 << 11 | 1 << 12,
            mc: [[u64::MAX, 0, 0, 0]; MC_BANKS],
            mcg_ctl: u64::MAX,
            hwcr: HWCR_TSC_FREQ_SEL,
            de_cfg: DE_CFG_LFENCE,
            ..Msrs::default()
        }
    }
}

const GP: Exception = Exception::gp(0);

fn memory_type_ok(t: u64) -> bool {
    matches!(t & 0xff, 0 | 1 | 4 | 5 | 6)
}

fn require(ok: bool) -> Result<(), Exception> {
    if ok { Ok(()) } else { Err(GP) }
}

fn has_spec_ctrl(f: &Features) -> bool {
    // IBRS/IBPB, STIBP, SSBD; AMD's IBRS, STIBP, SSBD.
    f.edx7 & (1 << 26 | 1 << 27 | 1 << 31) != 0 || f.ext8_ebx & (1 << 14 | 1 << 15 | 1 << 24) != 0
}

fn has_pred_cmd(f: &Features) -> bool {
    f.edx7 & 1 << 26 != 0 || f.ext8_ebx & 1 << 12 != 0
}

/// KVM's clock registers and the feature bits that give them.
fn kvm_clock(f: &Features, msr: u32) -> bool {
    match msr {
        KVM_WALL_CLOCK_OLD | KVM_SYSTEM_TIME_OLD => f.kvm & 1 != 0,
        KVM_WALL_CLOCK | KVM_SYSTEM_TIME => f.kvm & 1 << 3 != 0,
        _ => false,
    }
}

/// The machine-check register `msr` names: bank, and which of its four.
fn mc_register(f: &Features, msr: u32) -> Option<(usize, usize)> {
    let at = msr.checked_sub(MC_CTL)? as usize;
    (f.edx1 & 1 << 14 != 0 && at < 4 * MC_BANKS).then_some((at / 4, at % 4))
}

/// The variable MTRR register `msr` names: pair, and 0 for base, 1 for mask.
fn mtrr_variable(msr: u32) -> Option<(usize, usize)> {
    let at = msr.checked_sub(MTRR_PHYS)? as usize;
    (at < 2 * MTRR_PAIRS).then_some((at / 2, at % 2))
}

fn mtrr_fixed(msr: u32) -> Option<usize> {
    MTRR_FIXED.iter().position(|&m| m == msr)
}

fn amd_stored(msr: u32) -> Option<usize> {
    AMD_STORED.iter().position(|&m| m == msr)
}

/// Reads an MSR.
///
/// # Errors
/// #GP(0) if it does not exist.
pub fn read(env: &Env, msr: u32) -> Result<u64, Exception> {
    let cpu = &env.cpu;
    let (m, f) = (&cpu.msrs, &cpu.feat);
    let intc = env.vcpu().intc.as_ref();
    Ok(match msr {
        TSC => tsc::read(env),
        APIC_BASE => {
            require(f.apic())?;
            intc.map_or(0, |i| i.apic_base())
        }
        TSC_ADJUST => {
            require(f.tsc_adjust())?;
            m.tsc_adjust
        }
        SPEC_CTRL => {
            require(has_spec_ctrl(f))?;
            m.spec_ctrl
        }
        SYSENTER_CS => m.sysenter_cs,
        SYSENTER_ESP => m.sysenter_esp,
        SYSENTER_EIP => m.sysenter_eip,
        PAT => m.pat,
        // Branch records exist and are empty.
        DEBUGCTL..=LAST_INT_TO => 0,
        TSC_DEADLINE => {
            require(f.tsc_deadline())?;
            intc.and_then(|i| i.read_msr(msr)).ok_or(GP)?
        }
        X2APIC..=0x8ff => {
            require(f.x2apic())?;
            intc.and_then(|i| i.read_msr(msr)).ok_or(GP)?
        }
        XSS => {
            require(f.xsave & 8 != 0)?;
            0
        }
        EFER => {
            require(f.efer != 0)?;
            cpu.efer
        }
        STAR => m.star,
        LSTAR => m.lstar,
        CSTAR => m.cstar,
        FMASK => m.fmask,
        FS_BASE => cpu.seg_base[seg::FS],
        GS_BASE => cpu.seg_base[seg::GS],
        KERNEL_GS_BASE => m.kernel_gs_base,
        TSC_AUX => {
            require(f.tsc_aux())?;
            m.tsc_aux
        }
        _ if kvm_clock(f, msr) => match msr {
            KVM_WALL_CLOCK | KVM_WALL_CLOCK_OLD => m.kvm_wall_clock,
            _ => m.kvm_system_time,
        },
        _ => return read_platform(cpu, msr),
    })
}

/// MTRRs, machine check, and what vendors have of their own.
fn read_platform(cpu: &Cpu, msr: u32) -> Result<u64, Exception> {
    let (m, f) = (&cpu.msrs, &cpu.feat);
    if let Some((bank, reg)) = mc_register(f, msr) {
        return Ok(m.mc[bank][reg]);
    }
    if f.edx1 & 1 << 12 != 0 {
        match msr {
            // Variable pairs, fixed ranges, write-combining.
            MTRRCAP => return Ok(MTRR_PAIRS as u64 | 1 << 8 | 1 << 10),
            MTRR_DEF_TYPE => return Ok(m.mtrr_def_type),
            _ => {}
        }
        if let Some((pair, reg)) = mtrr_variable(msr) {
            return Ok(m.mtrr_var[pair][reg]);
        }
        if let Some(i) = mtrr_fixed(msr) {
            return Ok(m.mtrr_fixed[i]);
        }
    }
    match msr {
        // P5_MC_ADDR, P5_MC_TYPE.
        0 | 1 => Ok(0),
        MCG_CAP => Ok(MC_BANKS as u64 | 1 << 8),
        MCG_STATUS => Ok(m.mcg_status),
        MCG_CTL => Ok(m.mcg_ctl),
        BIOS_SIGN_ID if f.amd => Ok(0x0100_0065),
        BIOS_SIGN_ID => Ok(1 << 32),
        // Intel's, but hypervisors have always had it.
        MISC_ENABLE => Ok(m.misc_enable),
        _ if f.amd => match msr {
            AMD_HWCR => Ok(m.hwcr),
            AMD_DE_CFG => Ok(m.de_cfg),
            _ if amd_zero(msr) => Ok(0),
            _ => amd_stored(msr).map(|i| m.amd[i]).ok_or(GP),
        },
        PLATFORM_ID => Ok(0),
        // Locked, and nothing of it enabled.
        FEAT_CTL => Ok(1),
        _ => Err(GP),
    }
}

/// Writes an MSR.
///
/// # Errors
/// #GP(0) if it does not exist or does not take the value.
pub fn write(env: &mut Env, msr: u32, v: u64) -> Result<(), Exception> {
    let canonical = env.canonical(v);
    let f = env.cpu.feat;
    let m = &mut env.cpu.msrs;
    match msr {
        TSC => tsc::write(env, v),
        APIC_BASE => write_apic_base(env, v)?,
        TSC_ADJUST => {
            require(f.tsc_adjust())?;
            tsc::write_adjust(env, v);
        }
        SPEC_CTRL => {
            require(has_spec_ctrl(&f) && v & !0b1000_0111 == 0)?;
            m.spec_ctrl = v;
        }
        PRED_CMD => require(has_pred_cmd(&f) && v & !1 == 0)?,
        FLUSH_CMD => require(f.edx7 & 1 << 28 != 0 && v & !1 == 0)?,
        SYSENTER_CS => m.sysenter_cs = v & 0xffff_ffff,
        SYSENTER_ESP | SYSENTER_EIP | LSTAR | CSTAR | FS_BASE | GS_BASE | KERNEL_GS_BASE => {
            require(canonical)?;
            write_address(&mut env.cpu, msr, v);
        }
        PAT => {
            require((0..8).all(|i| matches!(v >> (8 * i) & 0xff, 0 | 1 | 4..=7)))?;
            m.pat = v;
        }
        // Neither branch records nor branch stepping can be turned on.
        DEBUGCTL => require(v == 0)?,
        TSC_DEADLINE => {
            let i = env.vcpu().intc.as_ref();
            require(f.tsc_deadline() && i.is_some_and(|i| i.write_msr(msr, v)))?;
        }
        X2APIC..=0x8ff => {
            let i = env.vcpu().intc.as_ref();
            require(f.x2apic() && i.is_some_and(|i| i.write_msr(msr, v)))?;
            env.interrupts_may_come();
        }
        XSS => require(f.xsave & 8 != 0 && v == 0)?,
        EFER => write_efer(env, v)?,
        STAR => m.star = v,
        FMASK => {
            require(v >> 32 == 0)?;
            m.fmask = v;
        }
        TSC_AUX => {
            require(f.tsc_aux() && v >> 32 == 0)?;
            m.tsc_aux = v;
        }
        _ if kvm_clock(&f, msr) => match msr {
            KVM_WALL_CLOCK | KVM_WALL_CLOCK_OLD => {
                m.kvm_wall_clock = v;
                tsc::write_wall_clock(env, v & !3);
            }
            _ => {
                m.kvm_system_time = v;
                tsc::write_system_time(env);
            }
        },
        _ => return write_platform(&mut env.cpu, msr, v),
    }
    Ok(())
}

fn write_address(cpu: &mut Cpu, msr: u32, v: u64) {
    let m = &mut cpu.msrs;
    match msr {
        SYSENTER_ESP => m.sysenter_esp = v,
        SYSENTER_EIP => m.sysenter_eip = v,
        LSTAR => m.lstar = v,
        CSTAR => m.cstar = v,
        KERNEL_GS_BASE => m.kernel_gs_base = v,
        _ => {
            let i = if msr == FS_BASE { seg::FS } else { seg::GS };
            cpu.seg_base[i] = v;
            cpu.seg[i].base = v;
        }
    }
}

fn write_apic_base(env: &mut Env, v: u64) -> Result<(), Exception> {
    let f = env.cpu.feat;
    let extended = v & 1 << 10 != 0;
    let reserved = v & (0x2ff | f.phys_reserved | 0xfff << 52) != 0;
    require(f.apic() && !reserved && (!extended || f.x2apic()))?;
    require(env.vcpu().intc.as_ref().is_some_and(|i| i.set_apic_base(v)))?;
    env.vcpu().locate_apic();
    // The register page may have moved.
    env.flush_everything();
    Ok(())
}

fn write_efer(env: &mut Env, v: u64) -> Result<(), Exception> {
    let cpu = &mut env.cpu;
    require(cpu.feat.efer != 0 && v & !(cpu.feat.efer | efer::LMA) == 0)?;
    let changed = cpu.efer ^ v;
    require(changed & efer::LME == 0 || cpu.cr0 & cr0::PG == 0)?;
    // LMA follows LME and CR0.PG alone.
    cpu.efer = v & !efer::LMA | cpu.efer & efer::LMA;
    if changed & efer::NXE != 0 && cpu.cr4 & cr4::PAE != 0 {
        env.flush_everything();
    }
    env.update_mode();
    Ok(())
}

/// MTRRs, machine check, and what vendors have of their own.
fn write_platform(cpu: &mut Cpu, msr: u32, v: u64) -> Result<(), Exception> {
    let f = cpu.feat;
    let m = &mut cpu.msrs;
    if let Some((bank, reg)) = mc_register(&f, msr) {
        let status = f.amd && m.hwcr & HWCR_MC_STATUS_WR_EN != 0;
        require(match reg {
            // All or nothing; Linux leaves out bit 0 or 10 on some processors.
            0 => v == 0 || v | 1 | 1 << 10 == u64::MAX,
            1 => v == 0 || status,
            _ => true,
        })?;
        m.mc[bank][reg] = v;
        return Ok(());
    }
    if f.edx1 & 1 << 12 != 0 {
        let high = f.phys_reserved | 0xfff << 52;
        if msr == MTRR_DEF_TYPE {
            require(v & !0xcff == 0 && memory_type_ok(v))?;
            m.mtrr_def_type = v;
            return Ok(());
        }
        if let Some((pair, reg)) = mtrr_variable(msr) {
            let ok = if reg == 0 {
                v & (0xf00 | high) == 0 && memory_type_ok(v)
            } else {
                v & (0x7ff | high) == 0
            };
            require(ok)?;
            m.mtrr_var[pair][reg] = v;
            return Ok(());
        }
        if let Some(i) = mtrr_fixed(msr) {
            require((0..8).all(|k| memory_type_ok(v >> (8 * k))))?;
            m.mtrr_fixed[i] = v;
            return Ok(());
        }
    }
    match msr {
        0 | 1 => {}
        MCG_STATUS => m.mcg_status = v & 7,
        MCG_CTL => m.mcg_ctl = v,
        // A microcode update is accepted and changes nothing.
        BIOS_UPDT_TRIG if !f.amd => {}
        BIOS_SIGN_ID => {}
        // BTS and PEBS unavailable are read-only; fast strings and limits can be changed.
        MISC_ENABLE => m.misc_enable = v | 1 << 11 | 1 << 12,
        _ if f.amd => match msr {
            AMD_HWCR => m.hwcr = v | HWCR_TSC_FREQ_SEL,
            AMD_DE_CFG => m.de_cfg = v | DE_CFG_LFENCE,
            AMD_PATCH_LOADER => {}
            _ if amd_zero(msr) => {}
            _ => m.amd[amd_stored(msr).ok_or(GP)?] = v,
        },
        _ => return Err(GP),
    }
    Ok(())
}

/// RDMSR: ECX names the register, EDX:EAX takes it.
pub fn rdmsr(env: &mut Env) -> Result<(), Exception> {
    super::cr::privileged(&env.cpu)?;
    let v = read(env, env.cpu.gpr[gpr::RCX] as u32)?;
    env.cpu.gpr[gpr::RAX] = v & 0xffff_ffff;
    env.cpu.gpr[gpr::RDX] = v >> 32;
    Ok(())
}

/// WRMSR.
pub fn wrmsr(env: &mut Env) -> Result<(), Exception> {
    super::cr::privileged(&env.cpu)?;
    let g = &env.cpu.gpr;
    let v = g[gpr::RAX] & 0xffff_ffff | g[gpr::RDX] << 32;
    write(env, g[gpr::RCX] as u32, v)
}

/// Registers that belong to a saved state besides those that it has fields for, in the order in
/// which they are written back.
pub fn saved(f: &Features) -> Vec<u32> {
    let mut list = vec![
        SYSENTER_CS,
        SYSENTER_ESP,
        SYSENTER_EIP,
        PAT,
        STAR,
        LSTAR,
        CSTAR,
        FMASK,
        KERNEL_GS_BASE,
        MCG_STATUS,
        MCG_CTL,
        MISC_ENABLE,
    ];
    let mut add = |on: bool, msrs: &[u32]| {
        if on {
            list.extend_from_slice(msrs);
        }
    };
    add(f.tsc_aux(), &[TSC_AUX]);
    add(has_spec_ctrl(f), &[SPEC_CTRL]);
    if f.edx1 & 1 << 12 != 0 {
        add(true, &MTRR_FIXED);
        let pairs: Vec<u32> = (0..2 * MTRR_PAIRS as u32).map(|i| MTRR_PHYS + i).collect();
        add(true, &pairs);
        add(true, &[MTRR_DEF_TYPE]);
    }
    if f.edx1 & 1 << 14 != 0 {
        let banks: Vec<u32> = (0..4 * MC_BANKS as u32).map(|i| MC_CTL + i).collect();
        add(true, &banks);
    }
    add(f.amd, &[AMD_HWCR, AMD_DE_CFG]);
    add(f.amd, &AMD_STORED);
    add(f.kvm & 1 << 3 != 0, &[KVM_WALL_CLOCK, KVM_SYSTEM_TIME]);
    list.sort_unstable();
    list
}

/// Restores one register of a saved state, without the checks that WRMSR makes and without its
/// effects on memory. Unknown ones are left alone; `false` says so.
pub fn restore(env: &mut Env, msr: u32, v: u64) -> bool {
    let m = &mut env.cpu.msrs;
    match msr {
        TSC => {
            let delta = v.wrapping_sub(tsc::read(env));
            env.cpu.tsc_offset = env.cpu.tsc_offset.wrapping_add(delta);
        }
        TSC_ADJUST => m.tsc_adjust = v,
        KVM_WALL_CLOCK | KVM_WALL_CLOCK_OLD => m.kvm_wall_clock = v,
        KVM_SYSTEM_TIME | KVM_SYSTEM_TIME_OLD => m.kvm_system_time = v,
        _ => {
            if let Some((bank, reg)) = mc_register(&env.cpu.feat, msr) {
                m.mc[bank][reg] = v;
                return true;
            }
            // Base registers of FS and GS are in the segments.
            let known = !matches!(msr, FS_BASE | GS_BASE | EFER | APIC_BASE | TSC_DEADLINE)
                && !(X2APIC..=0x8ff).contains(&msr);
            return known && write(env, msr, v).is_ok();
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::super::testing::Bench;
    use super::*;
    use std::sync::atomic::Ordering;

    const NO: Result<(), Exception> = Err(GP);

    #[test]
    fn unknown_registers_fault() {
        let mut b = Bench::new();
        b.long(0);
        for msr in [0x2, 0x1a, 0x33, 0x3a, 0xce, 0x11, 0x4b56_4d03, 0xc000_0105, 0xffff_ffff] {
            let there = (0x11..=0x12).contains(&msr);
            assert_eq!(read(b.env(), msr).is_ok(), there, "{msr:#x}");
        }
        b.env().cpu.gpr[gpr::RCX] = u64::from(index::STAR) | 1 << 40;
        b.env().cpu.gpr[gpr::RDX] = 0x23_0010;
        wrmsr(b.env()).unwrap();
        rdmsr(b.env()).unwrap();
        assert_eq!(b.env().cpu.msrs.star, 0x23_0010_0000_0000);
        b.long(3);
        assert_eq!(rdmsr(b.env()), NO);
    }

    #[test]
    fn addresses_must_be_canonical() {
        let mut b = Bench::new();
        b.long(0);
        for msr in [LSTAR, CSTAR, FS_BASE, GS_BASE, KERNEL_GS_BASE, SYSENTER_ESP, SYSENTER_EIP] {
            assert_eq!(write(b.env(), msr, 1 << 47), NO, "{msr:#x}");
            write(b.env(), msr, 0xffff_8000_0000_0000).unwrap();
            assert_eq!(read(b.env(), msr), Ok(0xffff_8000_0000_0000));
        }
        assert_eq!(b.env().cpu.seg_base[seg::FS], 0xffff_8000_0000_0000);
    }

    // SDM vol. 3 §2.2.1.
    #[test]
    fn efer() {
        let mut b = Bench::new();
        b.long(0);
        let env = b.env();
        assert_eq!(read(env, EFER), Ok(0xd01));
        assert_eq!(write(env, EFER, 0xc01), NO);
        assert_eq!(write(env, EFER, 0xd01 | 1 << 12), NO);
        // LMA cannot be written.
        write(env, EFER, 0x901).unwrap();
        assert_eq!(read(env, EFER), Ok(0xd01));
        write(env, EFER, 0x500).unwrap();
        assert_eq!(read(env, EFER), Ok(0x500));
    }

    #[test]
    fn memory_types_are_checked() {
        let mut b = Bench::new();
        b.long(0);
        let env = b.env();
        assert_eq!(read(env, PAT), Ok(PAT_RESET));
        assert_eq!(write(env, PAT, 2), NO);
        write(env, PAT, 0x0407_0506_0007_0106).unwrap();
        assert_eq!(write(env, MTRR_DEF_TYPE, 2), NO);
        assert_eq!(write(env, MTRR_DEF_TYPE, 0x106), NO);
        write(env, MTRR_DEF_TYPE, 0xc06).unwrap();
        assert_eq!(write(env, 0x250, 0x0606_0606_0606_0602), NO);
        write(env, 0x26f, 0x0606_0606_0606_0606).unwrap();
        assert_eq!(write(env, 0x201, 1 << 50), NO);
        write(env, 0x20f, 0xffff_8000_0800).unwrap();
        assert_eq!(read(env, 0x20f), Ok(0xffff_8000_0800));
        assert_eq!(write(env, 0x210, 0), NO);
        assert_eq!(write(env, MTRRCAP, 0), NO);
    }

    #[test]
    fn amd_registers() {
        let mut b = Bench::new();
        b.long(0);
        let env = b.env();
        // The TSC counts at P0 and LFENCE serialises, whatever is written.
        write(env, AMD_HWCR, 0).unwrap();
        assert_eq!(read(env, AMD_HWCR), Ok(1 << 24));
        assert_eq!(read(env, AMD_DE_CFG), Ok(2));
        write(env, 0xc001_1020, 5).unwrap();
        assert_eq!(read(env, 0xc001_1020), Ok(5));
        for msr in [0xc001_0010, 0xc001_0055, 0xc001_0140, 0xc001_0000] {
            assert_eq!(read(env, msr), Ok(0), "{msr:#x}");
        }
    }

    #[test]
    fn local_apic_registers() {
        let mut b = Bench::new();
        b.long(0);
        assert_eq!(read(b.env(), 0x802), Ok(7));
        assert_eq!(read(b.env(), 0x803), Err(GP));
        write(b.env(), TSC_DEADLINE, 5).unwrap();
        assert_eq!(write(b.env(), APIC_BASE, 0xfee0_0901), NO);
        write(b.env(), APIC_BASE, 0xfee0_0d00).unwrap();
        assert_eq!(b.intc.base.load(Ordering::Relaxed), 0xfee0_0d00);
    }

    // SDM vol. 3 §18.17.3.
    #[test]
    fn tsc_and_its_adjustment_move_together() {
        let mut b = Bench::new();
        b.long(0);
        b.clock.set(1000);
        let env = b.env();
        assert_eq!(read(env, TSC), Ok(1000));
        write(env, TSC, 5000).unwrap();
        assert_eq!((read(env, TSC), read(env, TSC_ADJUST)), (Ok(5000), Ok(4000)));
        write(env, TSC_ADJUST, 1).unwrap();
        assert_eq!(read(env, TSC), Ok(1001));
    }

    #[test]
    fn paravirtual_clock_is_written_to_memory() {
        let mut b = Bench::new();
        b.long(0);
        b.clock.set(1000);
        write(b.env(), KVM_SYSTEM_TIME, 0x6001).unwrap();
        assert_eq!(b.peek32(0x6000), 2);
        assert_eq!((b.peek64(0x6008), b.peek64(0x6010)), (0, 0));
        // 1 GHz: mul 2^31, shift 1; the stable flag.
        assert_eq!((b.peek32(0x6018), b.peek32(0x601c)), (1 << 31, 0x0101));
        write(b.env(), TSC, 500).unwrap();
        assert_eq!((b.peek32(0x6000), b.peek64(0x6008)), (4, 500u64.wrapping_sub(1000)));
        write(b.env(), KVM_WALL_CLOCK, 0x6100).unwrap();
        assert_eq!(b.peek32(0x6100), 2);
        assert!(b.peek32(0x6104) > 1_600_000_000);
    }
}
