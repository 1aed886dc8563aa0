//! Debug registers and the #DB exceptions they cause (SDM vol. 3 §18.2, §18.3).

use super::bits::{cr4, dr6, dr7, rflags};
use super::cr::privileged;
use super::exception::{Exception, vector};
use super::{Cpu, Env};

/// What a breakpoint waits for: the R/W field of DR7.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Execution of an instruction.
    Execute,
    /// Data written.
    Write,
    /// Port I/O.
    Io,
    /// Data read or written.
    Access,
}

impl Cpu {
    /// What breakpoint `i` waits for.
    fn kind(&self, i: usize) -> Kind {
        match self.dr7 >> (16 + 4 * i) & 3 {
            0 => Kind::Execute,
            1 => Kind::Write,
            // Undefined without CR4.DE.
            2 => Kind::Io,
            _ => Kind::Access,
        }
    }

    /// Numbers of the enabled breakpoints of this kind.
    pub fn breakpoints(&self, kind: Kind) -> impl Iterator<Item = usize> + '_ {
        (0..4).filter(move |&i| self.dr7 >> (2 * i) & 3 != 0 && self.kind(i) == kind)
    }

    /// Whether data or ports are watched.
    pub fn watches(&self) -> bool {
        let io = self.cr4 & cr4::DE != 0 && self.breakpoints(Kind::Io).next().is_some();
        io || (0..4).any(|i| self.watched(i).is_some())
    }

    /// First and last address of the data that breakpoint `i` watches, if it does.
    fn watched(&self, i: usize) -> Option<(u64, u64)> {
        let on = self.dr7 >> (2 * i) & 3 != 0 && matches!(self.kind(i), Kind::Write | Kind::Access);
        on.then(|| self.range(i))
    }

    fn range(&self, i: usize) -> (u64, u64) {
        let mask = match self.dr7 >> (18 + 4 * i) & 3 {
            0 => 0,
            1 => 1,
            2 => 7,
            _ => 3,
        };
        (self.dr[i] & !mask, self.dr[i] | mask)
    }

    /// Whether a watched byte lies in the page at `page`.
    pub fn watches_page(&self, page: u64) -> bool {
        self.dr7 & 0xff != 0
            && (0..4).any(|i| self.watched(i).is_some_and(|(first, _)| first & !0xfff == page))
    }

    /// Notes which breakpoints an access of `len` bytes at `addr` hits.
    pub fn note_access(&mut self, addr: u64, len: u64, write: bool) {
        let end = addr.wrapping_add(len.max(1) - 1);
        for i in 0..4 {
            let wanted = write || self.kind(i) == Kind::Access;
            if wanted && self.watched(i).is_some_and(|(first, last)| addr <= last && first <= end) {
                self.pending_debug |= 1 << i;
            }
        }
    }

    /// Notes which breakpoints an access of `len` ports at `port` hits.
    pub fn note_io(&mut self, port: u16, len: u8) {
        if self.cr4 & cr4::DE == 0 {
            return;
        }
        let (addr, end) = (u64::from(port), u64::from(port) + u64::from(len.max(1)) - 1);
        for i in 0..4 {
            let (first, last) = self.range(i);
            let on = self.dr7 >> (2 * i) & 3 != 0 && self.kind(i) == Kind::Io;
            if on && addr <= last && first <= end {
                self.pending_debug |= 1 << i;
            }
        }
    }

    /// The #DB of the data breakpoints that the last instruction hit.
    pub fn take_pending_debug(&mut self) -> Option<Exception> {
        match std::mem::take(&mut self.pending_debug) {
            0 => None,
            bits => Some(debug(bits)),
        }
    }
}

fn debug(bits: u64) -> Exception {
    Exception { dr6: bits, ..Exception::plain(vector::DB) }
}

/// Checks a MOV of DR `n` and gives the register it really means.
fn select(cpu: &Cpu, n: u64) -> Result<u64, Exception> {
    let n = match n {
        4 | 5 if cpu.cr4 & cr4::DE != 0 => return Err(Exception::UD),
        4 | 5 => n + 2,
        0..=7 => n,
        _ => return Err(Exception::UD),
    };
    privileged(cpu)?;
    if cpu.dr7 & dr7::GD != 0 { Err(debug(dr6::BD)) } else { Ok(n) }
}

/// MOV from DR `n`.
///
/// # Errors
/// #UD for DR4 and DR5 with CR4.DE, #GP(0) above CPL 0, #DB with DR7.GD.
pub fn read(env: &Env, n: u64) -> Result<u64, Exception> {
    let cpu = &env.cpu;
    Ok(match select(cpu, n)? {
        6 => cpu.dr6 & dr6::ALL | dr6::FIXED,
        7 => cpu.dr7 | dr7::FIXED,
        n => cpu.dr[(n & 3) as usize],
    })
}

/// MOV to DR `n`.
///
/// # Errors
/// As [`read`], and #GP(0) if the upper half of DR6 or DR7 is not zero.
pub fn write(env: &mut Env, n: u64, v: u64) -> Result<(), Exception> {
    let n = select(&env.cpu, n)?;
    if n >= 6 && v >> 32 != 0 {
        return Err(Exception::gp(0));
    }
    let cpu = &mut env.cpu;
    let watched = cpu.watches();
    match n {
        6 => cpu.dr6 = v & dr6::ALL,
        7 => cpu.dr7 = v & dr7::ALL | dr7::FIXED,
        n => cpu.dr[(n & 3) as usize] = v,
    }
    cpu.after_ss = false;
    if n != 6 && (watched || cpu.watches()) {
        // Pages that hold watched data are marked in the TLBs.
        env.flush_everything();
    }
    env.update_mode();
    Ok(())
}

/// The trap after an instruction that ran with TF set, with the data breakpoints it hit.
pub fn after_step(cpu: &mut Cpu) -> Exception {
    debug(dr6::BS | std::mem::take(&mut cpu.pending_debug))
}

/// Instruction breakpoints at linear address `addr`, before the instruction there: `None` if none
/// matches. RFLAGS.RF holds them back for one instruction, all its repetitions included.
pub fn instruction_breakpoint(cpu: &mut Cpu, addr: u64) -> Option<Exception> {
    let after_ss = std::mem::take(&mut cpu.after_ss);
    if cpu.eflags & rflags::RF != 0 || after_ss || cpu.mid_rep {
        cpu.eflags &= !rflags::RF;
        return None;
    }
    let mut hit = 0;
    let mut enabled = false;
    for i in 0..4 {
        if cpu.dr[i] == addr && cpu.kind(i) == Kind::Execute {
            hit |= 1 << i;
            enabled |= cpu.dr7 >> (2 * i) & 3 != 0;
        }
    }
    enabled.then(|| debug(hit))
}

/// The same for the instruction at RIP, wherever it is (SDM vol. 3 table 6-2: before a fault that
/// fetching it raises).
pub fn breakpoint_at_rip(env: &mut Env) -> Option<Exception> {
    let cpu = &mut env.cpu;
    let base = if cpu.code64() { 0 } else { cpu.seg_base[tandem_accel::x86::seg::CS] };
    let linear = base.wrapping_add(cpu.rip);
    let linear = if cpu.code64() { linear } else { linear & u64::from(u32::MAX) };
    cpu.breakpoints(Kind::Execute).next()?;
    instruction_breakpoint(cpu, linear)
}

#[cfg(test)]
mod tests {
    use super::super::testing::Bench;
    use super::*;

    #[test]
    fn reserved_bits_and_aliases() {
        let mut b = Bench::new();
        b.protected(0);
        let env = b.env();
        write(env, 7, 0xffff_ffff & !dr7::GD).unwrap();
        assert_eq!(read(env, 7), Ok(0xffff_07ff));
        write(env, 4, 0xffff_ffff).unwrap();
        assert_eq!(read(env, 6), Ok(0xffff_eff0 | 0xf));
        assert_eq!(write(env, 6, 1 << 32), Err(Exception::gp(0)));
        env.cpu.cr4 |= cr4::DE;
        assert_eq!(read(env, 5), Err(Exception::UD));
        b.protected(3);
        assert_eq!(read(b.env(), 0), Err(Exception::gp(0)));
    }

    // SDM vol. 3 §18.2.4.
    #[test]
    fn general_detect() {
        let mut b = Bench::new();
        b.protected(0);
        write(b.env(), 7, dr7::GD).unwrap();
        let e = read(b.env(), 0).unwrap_err();
        assert_eq!((e.vector, e.dr6), (vector::DB, dr6::BD));
    }

    // SDM vol. 3 §18.2.5, §18.3.1.2.
    #[test]
    fn watched_data() {
        let mut b = Bench::new();
        b.protected(0);
        let env = b.env();
        env.read_u8(0x5000, 1).unwrap();
        write(env, 1, 0x5006).unwrap();
        // DR1: write, 2 bytes.
        write(env, 7, 1 << 2 | 1 << 20 | 1 << 22).unwrap();
        env.read_u64(0x5000, 1).unwrap();
        env.write_u16(0x5004, 1, 1).unwrap();
        env.write_u8(0x5008, 1, 1).unwrap();
        assert_eq!(env.cpu.take_pending_debug(), None);
        env.write_u8(0x5007, 1, 1).unwrap();
        assert_eq!(env.cpu.take_pending_debug().unwrap().dr6, 2);
        // Read or write, 4 bytes; an access that ends inside.
        write(env, 7, 2 << 2 | 3 << 20 | 3 << 22).unwrap();
        env.read_u16(0x5003, 1).unwrap();
        assert_eq!(after_step(&mut env.cpu).dr6, 2 | dr6::BS);
        // Pages without watched data are not touched by it.
        assert!(env.host_page(0x6000, super::super::paging::Access::Write, 1).unwrap().is_some());
        assert!(env.host_page(0x5000, super::super::paging::Access::Read, 1).unwrap().is_none());
        write(env, 7, 0).unwrap();
        assert!(env.host_page(0x5000, super::super::paging::Access::Read, 1).unwrap().is_some());
    }

    #[test]
    fn watched_ports() {
        let mut b = Bench::new();
        b.protected(0);
        let env = b.env();
        write(env, 0, 0x71).unwrap();
        write(env, 7, 1 | 2 << 16).unwrap();
        env.cpu.note_io(0x70, 2);
        assert_eq!(env.cpu.take_pending_debug(), None);
        env.cpu.cr4 |= cr4::DE;
        env.cpu.note_io(0x70, 2);
        assert_eq!(env.cpu.take_pending_debug().unwrap().dr6, 1);
    }

    #[test]
    fn instruction_breakpoints() {
        let mut b = Bench::new();
        b.protected(0);
        let env = b.env();
        write(env, 0, 0x7000).unwrap();
        write(env, 2, 0x7000).unwrap();
        write(env, 1, 0x7000).unwrap();
        // DR0 enabled for execution, DR1 watches writes, DR2 matches but is off.
        write(env, 7, 0x0010_0005 & !4 | 4).unwrap();
        let e = instruction_breakpoint(&mut env.cpu, 0x7000).unwrap();
        assert_eq!(e.dr6, 0b101);
        env.cpu.eflags |= rflags::RF;
        assert_eq!(instruction_breakpoint(&mut env.cpu, 0x7000), None);
        assert_eq!(env.cpu.eflags & rflags::RF, 0);
        assert_eq!(instruction_breakpoint(&mut env.cpu, 0x7001), None);
    }
}
