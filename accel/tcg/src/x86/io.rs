//! Port I/O and its permission (SDM vol. 1 chapter 19).

use super::Env;
use super::exception::Exception;
use super::seg::ty;
use tandem_accel::x86::{ATTR_S, seg};

/// Whether code above IOPL, or in V86 mode, may access `size` ports from `port`: the bits of all of
/// them in the TSS's I/O permission map are clear.
///
/// # Errors
/// #GP(0) if not; #PF from reading the TSS.
pub fn check(env: &mut Env, port: u16, size: u8) -> Result<(), Exception> {
    let cpu = &env.cpu;
    let iopl = (cpu.eflags >> 12 & 3) as u8;
    if cpu.real_mode() || (!cpu.vm86() && cpu.cpl() <= iopl) {
        return Ok(());
    }
    let tr = cpu.seg[seg::TR];
    let mmu = cpu.system_mmu();
    let is_tss = tr.attr & ATTR_S == 0 && matches!(tr.attr & 0xf, ty::TSS | ty::TSS_BUSY);
    if !is_tss || tr.limit < 103 {
        return Err(Exception::gp(0));
    }
    let map = env.read_u16(env.cpu.linear(tr.base.wrapping_add(102)), mmu)?;
    let at = u32::from(map) + u32::from(port / 8);
    // The processor always reads two bytes.
    if at + 1 > tr.limit {
        return Err(Exception::gp(0));
    }
    let bits = env.read_u16(env.cpu.linear(tr.base.wrapping_add(at.into())), mmu)?;
    let mask = ((1u16 << size.min(4)) - 1) << (port % 8);
    if bits & mask != 0 { Err(Exception::gp(0)) } else { Ok(()) }
}

/// IN of `size` (1, 2, 4) bytes.
pub fn read(env: &Env, port: u16, size: u8) -> u64 {
    let mut data = [0; 4];
    let n = usize::from(size.clamp(1, 4));
    env.vcpu().pio_read(port, &mut data[..n]);
    u32::from_le_bytes(data).into()
}

/// OUT of `size` (1, 2, 4) bytes.
pub fn write(env: &mut Env, port: u16, size: u8, v: u64) {
    let n = usize::from(size.clamp(1, 4));
    env.vcpu().pio_write(port, &v.to_le_bytes()[..n]);
    env.follow_memory_map();
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, TSS};
    use super::*;
    use crate::x86::mode::MMU_KERNEL_SMAP;
    use std::sync::Arc;
    use tandem_accel::bus::BusDevice;
    use tandem_accel::memory::{GuestMap, Region, RegionKind};

    // SDM vol. 1 §19.5.2.
    #[test]
    fn permission_map() {
        let mut b = Bench::new();
        b.poke16(TSS + 102, 0x68);
        b.poke16(TSS + 0x68 + 4, 0x0180);
        b.protected(3);
        let env = b.env();
        assert!(check(env, 0x26, 1).is_ok());
        assert!(check(env, 0x27, 1).is_err());
        assert!(check(env, 0x26, 2).is_err());
        assert!(check(env, 0x28, 1).is_err());
        assert!(check(env, 0x29, 4).is_ok());
        // The second byte must lie inside the limit.
        env.cpu.seg[seg::TR].limit = 0x68 + 4;
        assert!(check(env, 0x20, 1).is_err());
        assert!(check(env, 0x18, 1).is_ok());
        env.cpu.eflags |= 3 << 12;
        assert!(check(env, 0xffff, 4).is_ok());
        b.vm86(3);
        assert!(check(b.env(), 0x27, 1).is_err());
    }

    /// Swaps two pieces of memory at an address, as shadowing and flash do.
    struct Switch(Arc<GuestMap>, [Region; 2]);
    impl BusDevice for Switch {
        fn read(&self, _: u64, _: &mut [u8]) {}
        fn write(&self, _: u64, data: &[u8]) {
            self.0.remove(self.1[0].gpa);
            if let Some(r) = self.1.get(usize::from(data[0])) {
                self.0.insert(r).unwrap();
            }
        }
    }

    #[test]
    fn a_device_that_changes_the_memory_map_is_followed_at_once() {
        let mut b = Bench::new();
        let at = 0x4000_0000;
        let piece = |byte: u8, kind| {
            let r = Region::new("piece", kind, at, 0x1000).unwrap();
            assert!(r.load(0, &[byte; 0x1000]));
            r
        };
        let pieces = [piece(1, RegionKind::Rom), piece(2, RegionKind::Ram)];
        let switch = Arc::new(Switch(b.map.clone(), pieces));
        b.bus.pio.insert("switch", 0x70, 1, switch.clone()).unwrap();
        b.bus.mmio.insert("switch", at, 0x1000, switch).unwrap();
        b.protected(0);
        let env = b.env();
        for (what, byte) in [(0, 1), (1, 2), (2, 0), (1, 2), (0, 1)] {
            write(env, 0x70, 1, what);
            assert_eq!(env.read_u8(at, MMU_KERNEL_SMAP).unwrap(), byte, "{what}");
        }
        // A store to ROM reaches the device, which puts RAM there.
        env.write_u8(at + 4, 1, MMU_KERNEL_SMAP).unwrap();
        assert_eq!(env.read_u8(at + 4, MMU_KERNEL_SMAP).unwrap(), 2);
        env.write_u8(at + 4, 9, MMU_KERNEL_SMAP).unwrap();
        assert_eq!(env.read_u8(at + 4, MMU_KERNEL_SMAP).unwrap(), 9);
    }

    #[test]
    fn nobody_answers_all_ones() {
        let mut b = Bench::new();
        assert_eq!(read(b.env(), 0x80, 2), 0xffff);
        write(b.env(), 0xffff, 4, 1);
        assert!(b.bus.pio.ranges().is_empty());
    }
}
