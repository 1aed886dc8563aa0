//! Order of loads and stores (SDM vol. 3 §9.2.3): each test's vCPUs walk through many places at
//! their own pace; the forbidden outcome must be at none of them.

use crate::machine::{Machine, SPACE, on_each, program};
use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, dword_ptr, eax, ebx, ecx, r8, r9};

/// Places; each is four words on cache lines of their own.
const N: u64 = 20_000;
const X: i32 = 0;
const Y: i32 = 64;
const OUT: i32 = 128;
const STRIDE: i32 = 256;

type Step = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Walks through the places with R8 at the present one.
fn walk(a: &mut CodeAssembler, step: Step) -> Result<(), IcedError> {
    a.mov(r8, SPACE)?;
    a.mov(r9, N)?;
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    step(a)?;
    a.add(r8, STRIDE)?;
    a.dec(r9)?;
    a.jnz(again)
}

/// Runs one program per step; `allowed` judges the four words at OUT of each place.
fn litmus(steps: &[Step], allowed: fn([u32; 4]) -> bool) {
    let n = steps.len() as u32;
    let programs: Vec<_> = (0..).zip(steps).map(|(i, s)| program(i, n, |a| walk(a, *s))).collect();
    let check = |m: &Machine| {
        for i in 0..N {
            let at = SPACE + i * STRIDE as u64 + OUT as u64;
            let out = [0, 4, 8, 12].map(|o| m.u32(at + o));
            assert!(allowed(out), "place {i}: {out:?}");
        }
    };
    on_each(&programs, |_| (), check);
}

#[test]
fn store_buffering_with_a_fence() {
    litmus(
        &[
            |a| {
                a.mov(dword_ptr(r8 + X), 1)?;
                a.mfence()?;
                a.mov(eax, dword_ptr(r8 + Y))?;
                a.mov(dword_ptr(r8 + OUT), eax)
            },
            |a| {
                a.mov(dword_ptr(r8 + Y), 1)?;
                a.mfence()?;
                a.mov(eax, dword_ptr(r8 + X))?;
                a.mov(dword_ptr(r8 + OUT + 4), eax)
            },
        ],
        |o| (o[0], o[1]) != (0, 0),
    );
}

#[test]
fn store_buffering_with_xchg() {
    litmus(
        &[
            |a| {
                a.mov(eax, 1)?;
                a.xchg(dword_ptr(r8 + X), eax)?;
                a.mov(ebx, dword_ptr(r8 + Y))?;
                a.mov(dword_ptr(r8 + OUT), ebx)
            },
            |a| {
                a.mov(eax, 1)?;
                a.xchg(dword_ptr(r8 + Y), eax)?;
                a.mov(ebx, dword_ptr(r8 + X))?;
                a.mov(dword_ptr(r8 + OUT + 4), ebx)
            },
        ],
        |o| (o[0], o[1]) != (0, 0),
    );
}

#[test]
fn message_passing() {
    litmus(
        &[
            |a| {
                a.mov(dword_ptr(r8 + X), 1)?;
                a.mov(dword_ptr(r8 + Y), 1)
            },
            |a| {
                a.mov(eax, dword_ptr(r8 + Y))?;
                a.mov(ebx, dword_ptr(r8 + X))?;
                a.mov(dword_ptr(r8 + OUT), eax)?;
                a.mov(dword_ptr(r8 + OUT + 4), ebx)
            },
        ],
        |o| (o[0], o[1]) != (1, 0),
    );
}

#[test]
fn loads_are_not_reordered_with_later_stores() {
    litmus(
        &[
            |a| {
                a.mov(eax, dword_ptr(r8 + X))?;
                a.mov(dword_ptr(r8 + Y), 1)?;
                a.mov(dword_ptr(r8 + OUT), eax)
            },
            |a| {
                a.mov(eax, dword_ptr(r8 + Y))?;
                a.mov(dword_ptr(r8 + X), 1)?;
                a.mov(dword_ptr(r8 + OUT + 4), eax)
            },
        ],
        |o| (o[0], o[1]) != (1, 1),
    );
}

#[test]
fn independent_readers_agree_on_the_order_of_independent_writers() {
    litmus(
        &[
            |a| a.mov(dword_ptr(r8 + X), 1),
            |a| a.mov(dword_ptr(r8 + Y), 1),
            |a| {
                a.mov(eax, dword_ptr(r8 + X))?;
                a.mov(ebx, dword_ptr(r8 + Y))?;
                a.mov(dword_ptr(r8 + OUT), eax)?;
                a.mov(dword_ptr(r8 + OUT + 4), ebx)
            },
            |a| {
                a.mov(ecx, dword_ptr(r8 + Y))?;
                a.mov(ebx, dword_ptr(r8 + X))?;
                a.mov(dword_ptr(r8 + OUT + 8), ecx)?;
                a.mov(dword_ptr(r8 + OUT + 12), ebx)
            },
        ],
        |o| o != [1, 0, 1, 0],
    );
}
