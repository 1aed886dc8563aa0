//! Lines, messages, timers and start-up IPIs through the kernel's chips.

use crate::machine::*;
use crate::need_kvm;
use iced_x86::code_asm::*;
use tandem_accel::irq::MsiMessage;
use tandem_accel::x86::{MpState, X86State};
use tandem_accel::{AccelOps, IrqChip};

/// Real-mode code that sets the PIC up with vectors 0x20–0x2f, unmasks `mask`, says "ready" and
/// halts until `[0x500]` is set by the handler at 0x9000.
fn waiting_guest(m: &Machine, vector: u64, mask: u32) {
    m.write(vector * 4, &[0x00, 0x90, 0, 0]);
    m.write(
        CODE,
        &assemble(16, |a| {
            let mut wait = a.create_label();
            for (port, v) in [
                (0x20, 0x11),
                (0x21, 0x20),
                (0x21, 4),
                (0x21, 1),
                (0x21, mask),
                (0xa0, 0x11),
                (0xa1, 0x28),
                (0xa1, 2),
                (0xa1, 1),
                (0xa1, 0xff),
            ] {
                a.mov(al, v)?;
                a.out(port, al)?;
            }
            a.mov(al, 0xaa)?;
            a.out(0xf4, al)?;
            a.set_label(&mut wait)?;
            a.sti()?;
            a.hlt()?;
            a.cmp(byte_ptr(0x500), 1)?;
            a.jb(wait)?;
            a.mov(al, 0x55)?;
            a.out(0xf4, al)?;
            a.cli()?;
            a.hlt()
        }),
    );
    m.write(
        0x9000,
        &assemble_at(0x9000, 16, |a| {
            a.inc(byte_ptr(0x500))?;
            a.mov(al, 0x20)?;
            a.out(0x20, al)?;
            a.iret()
        }),
    );
}

#[test]
fn a_line_wakes_a_halted_vcpu_through_the_pic() {
    need_kvm!();
    let m = Machine::new(vec![real_mode()]);
    waiting_guest(&m, 0x24, 0xef);
    assert_eq!(m.finish(), 0xaa);
    std::thread::sleep(std::time::Duration::from_millis(20));
    let IrqChip::InKernel { lines, .. } = m.accel.irqchip() else { panic!() };
    lines.set_level(99, true);
    lines.set_level(4, true);
    assert_eq!(m.wait_done(), 0x55);
    lines.set_level(4, false);
    assert_eq!(m.read(0x500, 1), [1]);
}

#[test]
fn the_kernels_pit_ticks_on_line_0() {
    need_kvm!();
    let m = Machine::new(vec![real_mode()]);
    waiting_guest(&m, 0x20, 0xfe);
    // Prepend: channel 0, mode 2, count 0x1000.
    let code = m.read(CODE, 0x200);
    let pit = assemble(16, |a| {
        for (port, v) in [(0x43, 0x34), (0x40, 0), (0x40, 0x10)] {
            a.mov(al, v)?;
            a.out(port, al)?;
        }
        Ok(())
    });
    m.write(CODE, &pit);
    m.write(CODE + pit.len() as u64, &code);
    assert_eq!(m.finish(), 0xaa);
    assert_eq!(m.wait_done(), 0x55);
}

#[test]
fn a_message_arrives_at_the_local_apic() {
    need_kvm!();
    // In 64-bit mode, because KVM's emulator has no IRET for 32-bit protected mode.
    let mut s = long_mode();
    (s.idtr.base, s.idtr.limit) = (0x2_0000, 0xfff);
    (s.gdtr.base, s.gdtr.limit) = (0x6000, 0x17);
    let m = Machine::new(vec![s]);
    long_mode_tables(&m);
    m.write(0x2_0000 + 16 * 0x41, &0x0000_8e00_0008_9000u64.to_le_bytes());
    m.write(0x6008, &0x00af_9b00_0000_ffff_u64.to_le_bytes());
    m.write(0x6010, &0x00cf_9300_0000_ffff_u64.to_le_bytes());
    m.write(
        CODE,
        &assemble(64, |a| {
            let mut wait = a.create_label();
            // Spurious vector register: enable the APIC.
            a.mov(ebx, 0xfee0_00f0_u32)?;
            a.mov(dword_ptr(rbx), 0x1ff)?;
            a.mov(al, 0xaa)?;
            a.out(0xf4, al)?;
            a.set_label(&mut wait)?;
            a.sti()?;
            a.hlt()?;
            a.jmp(wait)
        }),
    );
    m.write(
        0x9000,
        &assemble_at(0x9000, 64, |a| {
            a.mov(al, 0x41)?;
            a.out(0xf4, al)?;
            a.mov(ebx, 0xfee0_00b0_u32)?;
            a.mov(dword_ptr(rbx), 0)?;
            a.iretq()
        }),
    );
    assert_eq!(m.finish(), 0xaa);
    let IrqChip::InKernel { msi, .. } = m.accel.irqchip() else { panic!() };
    for _ in 0..3 {
        msi.send(MsiMessage { addr: 0xfee0_0000, data: 0x41 });
        assert_eq!(m.wait_done(), 0x41);
    }
    msi.send(MsiMessage { addr: 0xfee0_0000, data: 0x0 });
}

#[test]
fn init_and_start_up_ipis_start_a_second_vcpu() {
    need_kvm!();
    let mut ap = X86State { mp: MpState::WaitForSipi, ..X86State::default() };
    // Not the bootstrap processor.
    ap.apic_base &= !0x100;
    let m = Machine::new(vec![protected_mode(), ap]);
    m.write(
        CODE,
        &assemble(32, |a| {
            let mut wait = a.create_label();
            a.mov(ebx, 0xfee0_0000_u32)?;
            a.mov(dword_ptr(ebx + 0xf0), 0x1ff)?;
            for low in [0x4500, 0x460a] {
                a.mov(dword_ptr(ebx + 0x310), 1 << 24)?;
                a.mov(dword_ptr(ebx + 0x300), low)?;
            }
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(byte_ptr(0x500), 0)?;
            a.je(wait)?;
            a.mov(al, byte_ptr(0x500))?;
            a.out(0xf4, al)?;
            a.hlt()
        }),
    );
    // The second vCPU starts in real mode at 0a00:0000.
    m.write(
        0xa000,
        &assemble_at(0, 16, |a| {
            a.xor(ax, ax)?;
            a.mov(ds, ax)?;
            a.mov(byte_ptr(0x500), 0x33)?;
            a.cli()?;
            a.hlt()
        }),
    );
    assert_eq!(m.vcpus[1].state().unwrap().mp, MpState::WaitForSipi);
    assert_eq!(m.finish(), 0x33);
    m.pause();
    let s = m.vcpus[1].state().unwrap();
    assert_eq!(s.seg[1].base, 0xa000);
}
