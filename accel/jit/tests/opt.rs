//! What the passes make of small blocks, as text. (That they keep the meaning is `random.rs`'s
//! question.)

mod harness;

use harness::target;
use tandem_jit::ir::{Verifier, parse};
use tandem_jit::opt::Passes;

fn check(before: &str, after: &str) {
    let target = target();
    let mut block = parse(before, &target).unwrap_or_else(|e| panic!("{e}"));
    Verifier::default().check(&block, &target).unwrap_or_else(|e| panic!("{e}"));
    let mut passes = Passes::default();
    passes.run(&mut block, &target);
    Verifier::default().check(&block, &target).unwrap_or_else(|e| panic!("{e}"));
    passes.tidy(&mut block, &target);
    Verifier::default().check(&block, &target).unwrap_or_else(|e| panic!("{e}"));
    let got: Vec<String> =
        block.listing(Some(&target)).to_string().lines().skip(1).map(str::to_string).collect();
    let want: Vec<String> =
        after.lines().map(|l| l.trim().to_string()).filter(|l| !l.is_empty()).collect();
    assert_eq!(got, want);
}

#[test]
fn unread_flags_and_values_go() {
    check(
        "v0 = get %rax
         v1 = get %rbx
         v2, f3 = add.w32 v0, v1
         v4 = flagsimg f3
         v5 = setcc.e f3
         put %rax, v2
         exit leave 0x1",
        "v0 = get %rax
         v1 = get %rbx
         v2 = add.w32 v0, v1
         put %rax, v2
         exit leave 0x1",
    );
}

#[test]
fn a_put_that_nothing_sees_goes() {
    // The first is overwritten unseen; the second is seen at the load's fault.
    check(
        "v0 = get %rax
         put %cc, v0
         v1 = const 0x1
         put %cc, v1
         v2 = ld [v0]
         put %cc, v2
         exit leave 0x1",
        "v0 = get %rax
         v1 = const 0x1
         put %cc, v1
         v2 = ld [v0]
         put %cc, v2
         exit leave 0x1",
    );
}

#[test]
fn flags_survive_a_detour_through_a_global() {
    check(
        "v0 = get %rax
         v1 = get %rbx
         f2 = sub v0, v1
         v3 = flagsimg f2
         put %cc, v3
         v4 = get %cc
         f5 = imgflags v4
         brcc.b f5, goto 0x10
         v6 = const 0x0
         put %cc, v6
         exit leave 0x1",
        "v0 = get %rax
         v1 = get %rbx
         f2 = sub v0, v1
         v3 = flagsimg f2
         put %cc, v3
         brcc.b f2, goto 0x10
         v6 = const 0x0
         put %cc, v6
         exit leave 0x1",
    );
}

#[test]
fn a_flag_put_into_an_image_is_read_back() {
    check(
        "v0 = get %rax
         v1 = get %rbx
         f2 = sub v0, v1
         v3 = setcc.b f2
         v4 = const 0xb
         v5 = shl.w32 v3, v4
         f6 = imgflags v5
         v7 = setcc.o f6
         v8 = setcc.no f6
         put %rax, v7
         put %rbx, v8
         exit leave 0x1",
        "v0 = get %rax
         v1 = get %rbx
         f2 = sub v0, v1
         v3 = setcc.b f2
         v4 = const 0xb
         v5 = shl.w32 v3, v4
         f6 = imgflags v5
         v8 = setcc.no f6
         put %rax, v3
         put %rbx, v8
         exit leave 0x1",
    );
}

#[test]
fn a_carry_put_into_an_image_is_read_back() {
    check(
        "v0 = get %rax
         v1 = get %rbx
         f2 = sub v0, v1
         v3 = setcc.b f2
         f4 = imgflags v3
         v5 = setcc.b f4
         v6 = setcc.ae f4
         put %rax, v5
         put %rbx, v6
         exit leave 0x1",
        "v0 = get %rax
         v1 = get %rbx
         f2 = sub v0, v1
         v3 = setcc.b f2
         f4 = imgflags v3
         v6 = setcc.ae f4
         put %rax, v3
         put %rbx, v6
         exit leave 0x1",
    );
}

#[test]
fn setcc_and_movzx_are_one() {
    // setl al; movzx eax, al; then bl is inserted, of which more than a byte is read.
    check(
        "v0 = get %rax
         v1 = get %rbx
         f2 = sub v0, v1
         v3 = setcc.l f2
         v4 = deposit.w8 v0, v3 @0
         put %rax, v4
         v5 = zext.w8 v4
         put %rax, v5
         v6 = deposit.w8 v0, v1 @0
         v7 = zext.w8 v6
         put %rcx, v6
         put %rdx, v7
         exit leave 0x1",
        "v0 = get %rax
         v1 = get %rbx
         f2 = sub v0, v1
         v3 = setcc.l f2
         put %rax, v3
         v6 = deposit.w8 v0, v1 @0
         v7 = zext.w8 v6
         put %rcx, v6
         put %rdx, v7
         exit leave 0x1",
    );
}

#[test]
fn extensions_of_clean_values_go() {
    check(
        "v0 = get %rax
         v1 = ld.w8 [v0]
         v2 = zext.w32 v1
         put %rbx, v2
         v3 = add.w32 v0, v2
         v4 = zext.w32 v3
         put %rcx, v4
         v5 = ld.w16 [v0]
         v6 = sext.w16 v5
         put %rdx, v6
         v7 = zext.w8 v0
         v8 = and.w8 v7, v1
         v9 = deposit.w8 v0, v8 @0
         put %rax, v9
         exit leave 0x1",
        "v0 = get %rax
         v1 = ld.w8 [v0]
         put %rbx, v1
         v3 = add.w32 v0, v1
         put %rcx, v3
         v5 = ld.w16.sx64 [v0]
         put %rdx, v5
         v8 = and.w8 v0, v1
         v9 = deposit.w8 v0, v8 @0
         put %rax, v9
         exit leave 0x1",
    );
}

#[test]
fn addresses_fold() {
    check(
        "v0 = get %rax
         v1 = const 0x8
         v2 = sub v0, v1
         v3 = get %rcx
         v4 = ld [v2 + v3<<2 + 0x10]
         v5 = lea [v0 + v3<<3 + 0x4]
         st.w32 [v5 + 0x4], v4
         exit leave 0x1",
        "v0 = get %rax
         v3 = get %rcx
         v4 = ld [v0 + v3<<2 + 0x8]
         st.w32 [v0 + v3<<3 + 0x8], v4
         exit leave 0x1",
    );
}

#[test]
fn a_known_condition_decides() {
    check(
        "v0 = get %rax
         v1, f2 = xor.w32 v0, v0
         v3 = flagsimg f2
         put %cc, v3
         put %rax, v1
         brcc.ne f2, goto 0x10
         brcc.e f2, goto 0x20
         v4 = ld [v0]
         put %rbx, v4
         exit leave 0x1",
        "v1 = const 0x0
         v3 = const 0x44
         put %cc, v3
         put %rax, v1
         exit #1 goto 0x20",
    );
}

#[test]
fn constants_fold_and_shifts_drop_old_flags() {
    check(
        "v0 = get %rax
         v1 = const 0x10
         v2 = const 0x3
         v3 = shl.w8 v1, v2
         v4 = zext.w8 v3
         f5 = sub v0, v1
         v6, f7 = shr v0, v2, _, f5
         v8 = setcc.b f7
         put %rbx, v4
         put %rcx, v8
         put %rdx, v6
         exit leave 0x1",
        "v0 = get %rax
         v2 = const 0x3
         v3 = const 0x80
         v6, f7 = shr v0, v2
         v8 = setcc.b f7
         put %rbx, v3
         put %rcx, v8
         put %rdx, v6
         exit leave 0x1",
    );
}
