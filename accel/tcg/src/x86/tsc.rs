//! The time-stamp counter and KVM's paravirtual clock, both derived from the virtual clock.
//!
//! TSC = guest time in nanoseconds × frequency / 10⁹ + offset, exactly, so that a local APIC that
//! computes deadlines from guest time agrees with what the guest reads.
//!
//! The paravirtual clock (Linux `Documentation/virt/kvm/x86/msr.rst`) is one linear function of the
//! TSC for the whole life of the machine: time 0 is TSC = offset. The guest's structure is
//! written when the guest asks for it and when the offset changes.

use super::Env;
use tandem_accel::clock::NANOS_PER_SEC;

/// `ns` nanoseconds in TSC ticks of `hz`, without offset.
pub fn ticks(ns: u64, hz: u64) -> u64 {
    let (s, rest) = (ns / NANOS_PER_SEC, ns % NANOS_PER_SEC);
    let fraction = match rest.checked_mul(hz) {
        Some(p) => p / NANOS_PER_SEC,
        None => (u128::from(rest) * u128::from(hz) / u128::from(NANOS_PER_SEC)) as u64,
    };
    s.wrapping_mul(hz).wrapping_add(fraction)
}

/// What RDTSC reads now.
pub fn read(env: &Env) -> u64 {
    let v = env.vcpu();
    ticks(v.clock.now(), v.tsc_hz).wrapping_add(env.cpu.tsc_offset)
}

/// Changes the offset; the local APIC and the paravirtual clock learn of it.
pub fn set_offset(env: &mut Env, offset: u64) {
    env.cpu.tsc_offset = offset;
    if let Some(i) = &env.vcpu().intc {
        i.set_tsc_offset(offset);
    }
    write_system_time(env);
}

/// WRMSR to the TSC: IA32_TSC_ADJUST moves along (SDM vol. 3 §18.17.3).
pub fn write(env: &mut Env, v: u64) {
    let delta = v.wrapping_sub(read(env));
    env.cpu.msrs.tsc_adjust = env.cpu.msrs.tsc_adjust.wrapping_add(delta);
    set_offset(env, env.cpu.tsc_offset.wrapping_add(delta));
}

/// WRMSR to IA32_TSC_ADJUST.
pub fn write_adjust(env: &mut Env, v: u64) {
    let delta = v.wrapping_sub(env.cpu.msrs.tsc_adjust);
    env.cpu.msrs.tsc_adjust = v;
    set_offset(env, env.cpu.tsc_offset.wrapping_add(delta));
}

/// (multiplier, shift) with nanoseconds = (ticks << shift) × multiplier >> 32, as precise as 32
/// bits allow.
fn scale(hz: u64) -> (u32, i8) {
    // ns per tick = 10⁹ / hz; normalise multiplier × 2^shift so that bit 31 is set.
    let hz = u128::from(hz.max(1));
    let mut shift = 0i8;
    let mut m = (u128::from(NANOS_PER_SEC) << 32) / hz;
    while m > u128::from(u32::MAX) && shift < 31 {
        shift += 1;
        m = (u128::from(NANOS_PER_SEC) << (32 - shift)) / hz;
    }
    while m < 1 << 31 && shift > -31 {
        shift -= 1;
        m = (u128::from(NANOS_PER_SEC) << (32 - i32::from(shift))) / hz;
    }
    (m.min(u128::from(u32::MAX)) as u32, shift)
}

/// Bit in KVM's feature word: the clock is the same on all vCPUs.
const FEATURE_STABLE: u32 = 1 << 24;
/// Flag in the structure: as above.
const FLAG_STABLE: u8 = 1;

/// Writes `pvclock_vcpu_time_info` where MSR_KVM_SYSTEM_TIME says, if it is enabled.
pub fn write_system_time(env: &mut Env) {
    let msr = env.cpu.msrs.kvm_system_time;
    if msr & 1 == 0 {
        return;
    }
    let gpa = msr & !3;
    let (mul, shift) = scale(env.vcpu().tsc_hz);
    let flags = if env.cpu.feat.kvm & FEATURE_STABLE != 0 { FLAG_STABLE } else { 0 };
    // An odd version while the rest changes, an even one after.
    let old = env.phys_read_u32(gpa);
    let old = if old == u32::MAX { 0 } else { old };
    let odd = old.wrapping_add(1) | 1;
    let mut s = [0u8; 32];
    s[0..4].copy_from_slice(&odd.to_le_bytes());
    s[8..16].copy_from_slice(&env.cpu.tsc_offset.to_le_bytes());
    // Bytes 16–23, system_time: guest time is 0 at TSC = offset.
    s[24..28].copy_from_slice(&mul.to_le_bytes());
    s[28] = shift as u8;
    s[29] = flags;
    env.phys_write(gpa, &s);
    env.phys_write(gpa, &odd.wrapping_add(1).to_le_bytes());
}

/// Writes `pvclock_wall_clock` at `gpa`: the wall-clock time at which guest time was 0.
pub fn write_wall_clock(env: &mut Env, gpa: u64) {
    let boot = env.vcpu().clock.epoch();
    let old = env.phys_read_u32(gpa);
    let odd = if old == u32::MAX { 1 } else { old.wrapping_add(1) | 1 };
    let mut s = [0u8; 12];
    s[0..4].copy_from_slice(&odd.to_le_bytes());
    s[4..8].copy_from_slice(&((boot / NANOS_PER_SEC) as u32).to_le_bytes());
    s[8..12].copy_from_slice(&((boot % NANOS_PER_SEC) as u32).to_le_bytes());
    env.phys_write(gpa, &s);
    env.phys_write(gpa, &odd.wrapping_add(1).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_exact() {
        assert_eq!(ticks(1_500_000_000, 2_000_000_001), 3_000_000_001);
        assert_eq!(ticks(u64::MAX, 1_000_000_000), u64::MAX);
        for ns in [1, 999_999_999, 123_456_789_012_345, 1 << 60] {
            let hz = 2_596_131_234;
            let want = u128::from(ns) * u128::from(hz) / u128::from(NANOS_PER_SEC);
            assert_eq!(ticks(ns, hz), want as u64);
        }
    }

    #[test]
    fn paravirtual_clock_follows_guest_time() {
        for hz in [1_000_000, 999_999_999, 1_000_000_000, 2_596_131_234, 6_000_000_000u64] {
            let (mul, shift) = scale(hz);
            assert!(mul >= 1 << 31);
            // One hour of guest time, computed as the guest does.
            let ns = 3600 * NANOS_PER_SEC;
            let t = u128::from(ticks(ns, hz));
            let t = if shift < 0 { t >> -shift } else { t << shift };
            let got = ((t * u128::from(mul)) >> 32) as u64;
            assert!(got.abs_diff(ns) < 10_000, "{hz}: {got} for {ns}");
        }
    }
}
