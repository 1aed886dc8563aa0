//! Reading and writing architectural state.

use crate::machine::*;
use crate::need_kvm;
use iced_x86::code_asm::*;
use tandem_accel::AccelOps;
use tandem_accel::x86::{ATTR_P, ATTR_UNUSABLE, MpState, Segment, X86State, seg};

/// The parts of state that must survive being written and read.
fn comparable(mut s: X86State) -> X86State {
    // The kernel's own: the list depends on the kernel, and the TSC counts.
    s.msrs.clear();
    for g in &mut s.seg {
        if g.attr & ATTR_UNUSABLE != 0 || g.attr & ATTR_P == 0 {
            *g = Segment { attr: ATTR_UNUSABLE, ..Segment::default() };
        }
    }
    s
}

#[test]
fn what_is_written_is_read() {
    need_kvm!();
    for (name, state) in [
        ("reset", X86State::default()),
        ("real", real_mode()),
        ("protected", protected_mode()),
        ("long", long_mode()),
    ] {
        let m = Machine::new(vec![X86State::default()]);
        long_mode_tables(&m);
        let mut s = state;
        for (i, g) in s.gpr.iter_mut().enumerate() {
            *g = 0x1111_1111_1111_1111 * i as u64;
        }
        s.rflags = 0x46;
        s.dr[1] = 0x1234;
        s.fpu.fcw = 0x27f;
        s.fpu.st[2] = [1, 2, 3, 4, 5, 6, 7, 0x80, 0xff, 0x3f];
        for (i, z) in s.fpu.zmm.iter_mut().take(16).enumerate() {
            z[..16].fill(i as u8 + 1);
        }
        m.vcpus[0].set_state(s.clone()).unwrap();
        let got = m.vcpus[0].state().unwrap();
        assert_eq!(comparable(got), comparable(s), "{name}");
    }
}

#[test]
fn msrs_are_carried_and_reset_when_not_listed() {
    need_kvm!();
    const SYSENTER_ESP: u32 = 0x175;
    const LSTAR: u32 = 0xc000_0082;
    let m = Machine::new(vec![real_mode()]);
    let value = |m: &Machine, index| {
        let s = m.vcpus[0].state().unwrap();
        s.msrs.iter().find(|e| e.0 == index).map(|e| e.1)
    };
    let mut s = m.vcpus[0].state().unwrap();
    assert!(s.msrs.is_sorted_by_key(|e| e.0));
    for e in &mut s.msrs {
        if e.0 == SYSENTER_ESP || e.0 == LSTAR {
            e.1 = 0xffff_8000_0000_1000;
        }
    }
    m.vcpus[0].set_state(s).unwrap();
    assert_eq!(value(&m, LSTAR), Some(0xffff_8000_0000_1000));
    assert_eq!(value(&m, SYSENTER_ESP), Some(0xffff_8000_0000_1000));
    m.vcpus[0].set_state(real_mode()).unwrap();
    assert_eq!(value(&m, LSTAR), Some(0));
}

#[test]
fn writes_of_a_vcpu_reach_the_dirty_log() {
    need_kvm!();
    let m = Machine::new(vec![real_mode()]);
    m.write(
        CODE,
        &assemble(16, |a| {
            a.mov(byte_ptr(0x500), 1)?;
            a.mov(word_ptr(0x5fff), 1)?;
            a.out(0xf4, al)?;
            a.cli()?;
            a.hlt()
        }),
    );
    let ram = m.map.find(0).unwrap();
    ram.bits().set_logging(true);
    m.accel.follow_logging().unwrap();
    m.finish();
    m.pause();
    m.accel.collect_dirty().unwrap();
    let first = ram.bits().take_dirty()[0];
    // Pages 0, 5 and 6; a device's write is logged by itself.
    assert_eq!(first & 0xff, 1 | 1 << 5 | 1 << 6, "{first:#x}");
    m.write(0x3000, &[1]);
    m.accel.collect_dirty().unwrap();
    assert_eq!(ram.bits().take_dirty()[0], 1 << 3);
    ram.bits().set_logging(false);
    m.accel.follow_logging().unwrap();
}

#[test]
fn registers_after_a_run_are_the_guests() {
    need_kvm!();
    let m = Machine::new(vec![long_mode()]);
    long_mode_tables(&m);
    m.write(
        CODE,
        &assemble(64, |a| {
            a.mov(r15, 0xfeed_face_cafe_beef_u64)?;
            a.mov(rsi, r15)?;
            a.shl(rsi, 4)?;
            a.out(0xf4, al)?;
            a.cli()?;
            a.hlt()
        }),
    );
    m.finish();
    std::thread::sleep(std::time::Duration::from_millis(20));
    m.pause();
    let s = m.vcpus[0].state().unwrap();
    assert_eq!(s.gpr[15], 0xfeed_face_cafe_beef);
    assert_eq!(s.gpr[6], 0xeedf_acec_afeb_eef0);
    assert_eq!(s.mp, MpState::Halted);
    assert_eq!(s.efer & 0x500, 0x500);
}

#[test]
fn ring_3_code_runs_and_traps_back() {
    need_kvm!();
    let mut s = long_mode();
    // Selectors: 8 code 0, 0x10 data 0, 0x1b data 3, 0x23 code 3, 0x28 TSS.
    (s.gdtr.base, s.gdtr.limit) = (0x6000, 0x37);
    (s.idtr.base, s.idtr.limit) = (0x2_0000, 0xfff);
    let tss = ATTR_P | 0xb;
    s.seg[seg::TR] = Segment { selector: 0x28, base: 0x6800, limit: 0x67, attr: tss };
    let m = Machine::new(vec![s]);
    long_mode_tables(&m);
    for (i, d) in [
        0u64,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x0000_8b00_6800_0067,
        0,
    ]
    .into_iter()
    .enumerate()
    {
        m.write(0x6000 + 8 * i as u64, &d.to_le_bytes());
    }
    // RSP0, and an invalid-opcode gate to 0x9000.
    m.write(0x6804, &0x7800u64.to_le_bytes());
    m.write(0x2_0000 + 16 * 6, &0x0000_8e00_0008_9000u64.to_le_bytes());
    m.write(
        CODE,
        &assemble(64, |a| {
            for v in [0x1b, 0x1_f000, 2, 0x23, 0xa000] {
                a.push(v)?;
            }
            a.iretq()
        }),
    );
    m.write(
        0x9000,
        &assemble_at(0x9000, 64, |a| {
            a.mov(rbx, rax)?;
            a.mov(al, byte_ptr(rsp + 8))?;
            a.out(0xf4, al)?;
            a.cli()?;
            a.hlt()
        }),
    );
    m.write(
        0xa000,
        &assemble_at(0xa000, 64, |a| {
            let mut again = a.create_label();
            a.mov(ecx, 1_000_000)?;
            a.xor(eax, eax)?;
            a.set_label(&mut again)?;
            a.add(rax, rcx)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            a.ud2()
        }),
    );
    assert_eq!(m.finish(), 0x23, "the saved CS of ring 3");
    m.pause();
    assert_eq!(m.vcpus[0].state().unwrap().gpr[3], 500_000_500_000);
    assert_eq!(m.accel.name(), "kvm");
}
