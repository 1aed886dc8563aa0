//! Each processor mode does port and memory-mapped I/O.

use crate::machine::*;
use crate::need_kvm;
use iced_x86::code_asm::*;

fn w(at: u64, v: &[u8]) -> Seen {
    Seen::Write(at, v.to_vec())
}

#[test]
fn real_mode_port_io_of_all_widths_and_strings() {
    need_kvm!();
    let m = Machine::new(vec![real_mode()]);
    let code = assemble(16, |a| {
        a.mov(al, 0x12)?;
        a.out(0xe0, al)?;
        a.mov(ax, 0x3456)?;
        a.out(0xe2, ax)?;
        a.mov(eax, 0x789a_bcde_u32)?;
        a.out(0xe4, eax)?;
        a.mov(si, 0x600)?;
        a.mov(cx, 5)?;
        a.mov(dx, 0xe9)?;
        a.cld()?;
        a.rep().outsb()?;
        a.mov(di, 0x700)?;
        a.mov(cx, 3)?;
        a.rep().insw()?;
        a.in_(al, 0xe1)?;
        a.out(0xf4, al)?;
        a.hlt()
    });
    m.write(CODE, &code);
    m.write(0x600, b"hello");
    assert_eq!(m.finish(), 0x50);
    let mut want =
        vec![w(0xe0, &[0x12]), w(0xe2, &[0x56, 0x34]), w(0xe4, &[0xde, 0xbc, 0x9a, 0x78])];
    want.extend(b"hello".iter().map(|b| w(0xe9, &[*b])));
    want.extend([
        Seen::Read(0xe9, 2),
        Seen::Read(0xe9, 2),
        Seen::Read(0xe9, 2),
        Seen::Read(0xe1, 1),
    ]);
    assert_eq!(m.seen(), want);
    assert_eq!(m.read(0x700, 6), [0x50, 0x51, 0x50, 0x51, 0x50, 0x51]);
}

#[test]
fn a_write_to_rom_reaches_the_bus_and_not_the_rom() {
    need_kvm!();
    let m = Machine::new(vec![real_mode()]);
    let rom = m.map.find(0xf_0000).unwrap();
    assert!(rom.load(0x10, &[0x77]));
    m.write(
        CODE,
        &assemble(16, |a| {
            a.mov(ax, 0xf000)?;
            a.mov(ds, ax)?;
            a.mov(byte_ptr(0x10), 0x55)?;
            a.mov(al, byte_ptr(0x10))?;
            a.out(0xf4, al)?;
            a.hlt()
        }),
    );
    assert_eq!(m.finish(), 0x77);
    assert_eq!(m.seen(), [w(0xf_0010, &[0x55])]);
}

#[test]
fn protected_mode_mmio() {
    need_kvm!();
    let m = Machine::new(vec![protected_mode()]);
    m.write(
        CODE,
        &assemble(32, |a| {
            a.mov(ebx, MMIO as u32)?;
            a.mov(byte_ptr(ebx + 1), 0x11)?;
            a.mov(word_ptr(ebx + 2), 0x2222)?;
            a.mov(dword_ptr(ebx + 4), 0x3333_3333)?;
            a.mov(eax, dword_ptr(ebx + 8))?;
            a.mov(dword_ptr(0x900), eax)?;
            a.movzx(ecx, byte_ptr(ebx + 12))?;
            a.mov(al, cl)?;
            a.out(0xf4, al)?;
            a.hlt()
        }),
    );
    assert_eq!(m.finish(), 0x50);
    assert_eq!(
        m.seen(),
        [
            w(MMIO + 1, &[0x11]),
            w(MMIO + 2, &[0x22; 2]),
            w(MMIO + 4, &[0x33; 4]),
            Seen::Read(MMIO + 8, 4),
            Seen::Read(MMIO + 12, 1),
        ]
    );
    assert_eq!(m.read(0x900, 4), [0x50, 0x51, 0x52, 0x53]);
}

#[test]
fn long_mode_arithmetic_and_mmio() {
    need_kvm!();
    let m = Machine::new(vec![long_mode()]);
    long_mode_tables(&m);
    m.write(
        CODE,
        &assemble(64, |a| {
            let mut again = a.create_label();
            a.xor(eax, eax)?;
            a.mov(rcx, 1000u64)?;
            a.set_label(&mut again)?;
            a.add(rax, rcx)?;
            a.dec(rcx)?;
            a.jnz(again)?;
            a.mov(rbx, MMIO)?;
            a.mov(qword_ptr(rbx), rax)?;
            a.mov(r9, qword_ptr(rbx + 8))?;
            a.mov(qword_ptr(0x900), r9)?;
            a.out(0xf4, al)?;
            a.hlt()
        }),
    );
    assert_eq!(m.finish(), (500_500u32 & 0xff) as u8);
    assert_eq!(m.seen(), [w(MMIO, &500_500u64.to_le_bytes()), Seen::Read(MMIO + 8, 8)]);
    assert_eq!(m.read(0x900, 8), [0x50, 0x51, 0x52, 0x53, 0x54, 0x55, 0x56, 0x57]);
}

#[test]
fn cpuid_is_the_models() {
    need_kvm!();
    // In ring 3, code of a KVM without hardware sees the host's CPUID; ring 0 is asked here.
    let m = Machine::new(vec![protected_mode()]);
    m.write(
        CODE,
        &assemble(32, |a| {
            a.mov(eax, 0x4000_0000)?;
            a.cpuid()?;
            a.mov(dword_ptr(0x900), ebx)?;
            a.mov(dword_ptr(0x904), ecx)?;
            a.mov(dword_ptr(0x908), edx)?;
            a.out(0xf4, al)?;
            a.hlt()
        }),
    );
    m.finish();
    assert_eq!(m.read(0x900, 12), b"KVMKVMKVM\0\0\0");
}
