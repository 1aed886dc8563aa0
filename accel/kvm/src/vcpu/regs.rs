//! General, segment, control and table registers ⇄ `kvm_regs` and `kvm_sregs`.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use tandem_accel::x86::{
    ATTR_DB, ATTR_G, ATTR_L, ATTR_P, ATTR_S, ATTR_UNUSABLE, Segment, TableReg, X86State, seg,
};

/// Segment attribute: available to software.
const ATTR_AVL: u32 = 1 << 12;

fn bit(attr: u32, mask: u32) -> u8 {
    u8::from(attr & mask != 0)
}

fn to_kvm(s: &Segment) -> kvm_segment {
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attr & 0xf) as u8,
        present: bit(s.attr, ATTR_P),
        dpl: s.dpl(),
        db: bit(s.attr, ATTR_DB),
        s: bit(s.attr, ATTR_S),
        l: bit(s.attr, ATTR_L),
        // VMX refuses a limit that needs page granularity without it (SDM vol. 3 §27.3.1.2).
        g: bit(s.attr, ATTR_G) | u8::from(s.limit > 0xf_ffff),
        avl: bit(s.attr, ATTR_AVL),
        unusable: bit(s.attr, ATTR_UNUSABLE),
        padding: 0,
    }
}

fn from_kvm(k: &kvm_segment) -> Segment {
    let flag = |v: u8, mask: u32| if v != 0 { mask } else { 0 };
    Segment {
        selector: k.selector,
        base: k.base,
        limit: k.limit,
        attr: u32::from(k.type_ & 0xf)
            | flag(k.s, ATTR_S)
            | u32::from(k.dpl & 3) << 5
            | flag(k.present, ATTR_P)
            | flag(k.avl, ATTR_AVL)
            | flag(k.l, ATTR_L)
            | flag(k.db, ATTR_DB)
            | flag(k.g, ATTR_G)
            | flag(k.unusable, ATTR_UNUSABLE),
    }
}

fn table_to_kvm(t: TableReg) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, ..Default::default() }
}

fn table_from_kvm(t: &kvm_dtable) -> TableReg {
    TableReg { base: t.base, limit: t.limit }
}

pub(super) fn regs_to_kvm(s: &X86State) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = s.gpr;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: s.rip,
        rflags: s.rflags | 2,
    }
}

pub(super) fn regs_from_kvm(r: &kvm_regs, s: &mut X86State) {
    s.gpr = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15,
    ];
    s.rip = r.rip;
    s.rflags = r.rflags;
}

/// PDPTRs are not carried: the kernel loads them from guest memory at CR3, which must hold its
/// contents by then.
pub(super) fn sregs_to_kvm(s: &X86State) -> kvm_sregs {
    let seg = |i: usize| to_kvm(&s.seg[i]);
    kvm_sregs {
        cs: seg(seg::CS),
        ds: seg(seg::DS),
        es: seg(seg::ES),
        fs: seg(seg::FS),
        gs: seg(seg::GS),
        ss: seg(seg::SS),
        tr: seg(seg::TR),
        ldt: seg(seg::LDTR),
        gdt: table_to_kvm(s.gdtr),
        idt: table_to_kvm(s.idtr),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        // Pending interrupts travel in kvm_vcpu_events.
        interrupt_bitmap: [0; 4],
    }
}

pub(super) fn sregs_from_kvm(k: &kvm_sregs, s: &mut X86State) {
    for (i, from) in [
        (seg::CS, &k.cs),
        (seg::DS, &k.ds),
        (seg::ES, &k.es),
        (seg::FS, &k.fs),
        (seg::GS, &k.gs),
        (seg::SS, &k.ss),
        (seg::TR, &k.tr),
        (seg::LDTR, &k.ldt),
    ] {
        s.seg[i] = from_kvm(from);
    }
    s.gdtr = table_from_kvm(&k.gdt);
    s.idtr = table_from_kvm(&k.idt);
    s.cr0 = k.cr0;
    s.cr2 = k.cr2;
    s.cr3 = k.cr3;
    s.cr4 = k.cr4;
    s.cr8 = k.cr8;
    s.efer = k.efer;
    s.apic_base = k.apic_base;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_survive_the_kernels_form() {
        let mut s = X86State::default();
        for (i, g) in s.gpr.iter_mut().enumerate() {
            *g = 0x100 + i as u64;
        }
        for (i, g) in s.seg.iter_mut().enumerate() {
            let attr = ATTR_P | ATTR_S | 3 << 5 | i as u32 | ATTR_AVL | ATTR_L | ATTR_DB;
            *g = Segment { selector: i as u16 * 8, base: 0x1000 * i as u64, limit: 0xffff, attr };
        }
        s.seg[seg::LDTR].attr = ATTR_UNUSABLE;
        (s.cr2, s.cr3, s.cr4, s.efer) = (1, 2, 3, 4);
        let mut back = X86State::default();
        regs_from_kvm(&regs_to_kvm(&s), &mut back);
        sregs_from_kvm(&sregs_to_kvm(&s), &mut back);
        assert_eq!(back, s);
    }

    #[test]
    fn a_large_limit_gets_its_granularity() {
        assert_eq!(to_kvm(&Segment::flat(8, ATTR_P | ATTR_S | 0xb)).g, 1);
    }
}
