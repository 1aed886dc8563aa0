//! What the x86-64 back end makes of typical guest code, checked by disassembly.

#![cfg(target_arch = "x86_64")]

mod harness;

use harness::{Machine, target};
use iced_x86::{Decoder, DecoderOptions, Formatter, NasmFormatter};
use std::sync::Arc;
use tandem_jit::code::{Backend, Compiled};
use tandem_jit::ir::{Block, Verifier, parse};
use tandem_jit::x86_64::X64Backend;

/// Host instructions of a block from the linked entry on, up to the first piece of data (an unlinked
/// exit's pc and reference lie behind its call) that does not look like an instruction.
fn listing(backend: &dyn Backend, c: &Compiled, from: u64) -> Vec<String> {
    let bytes = backend.code_bytes(from..c.range.end);
    let mut out = Vec::new();
    let mut f = NasmFormatter::new();
    for insn in Decoder::with_ip(64, &bytes, from, DecoderOptions::NONE).iter() {
        if insn.is_invalid() {
            break;
        }
        let mut s = String::new();
        f.format(&insn, &mut s);
        out.push(s);
    }
    out
}

fn compile(text: &str) -> Vec<String> {
    let target = target();
    let mut block: Block = parse(text, &target).unwrap_or_else(|e| panic!("{e}"));
    block.pc = 0x1000;
    Verifier::default().check(&block, &target).unwrap_or_else(|e| panic!("{e}"));
    let backend: Arc<dyn Backend> = X64Backend::new(target.clone(), 1 << 20).expect("code memory");
    let mut m = Machine::new(backend.clone());
    let c = m.add(&block);
    listing(&*backend, &c, c.linked.0)
}

/// `mov rax,[rdi]; add rsi,rax; add rdi,8; cmp rdi,rdx; jne`.
const SUM_LOOP: &str = "insn 0x1000 3
             v0 = get %rdi
             v1 = ld [v0]
             put %rax, v1
             insn 0x1003 3
             v2 = get %rsi
             v3 = get %rax
             v4, f5 = add v2, v3
             put %rsi, v4
             insn 0x1006 4
             v6 = get %rdi
             v7 = const 8
             v8, f9 = add v6, v7
             put %rdi, v8
             insn 0x100a 3
             v10 = get %rdi
             v11 = get %rdx
             v12, f13 = sub v10, v11
             put %cc, v12
             put %cc2, v11
             insn 0x100d 2
             brcc.ne f13, goto 0x1000 near
             exit goto 0x100f near";

/// `push rbx` (stack pointer in RBP); `add al,cl`; `mov [rdi+rsi*4+16],esi`; `shr edx,5`.
const MIXED: &str = "insn 0x1000 1
             v0 = get %rbx
             v1 = get %rbp
             v2 = lea [v1 - 0x8]
             st [v2], v0
             put %rbp, v2
             insn 0x1001 2
             v3 = get %rax
             v4 = get %rcx
             v5, f6 = add.w8 v3, v4
             v7 = deposit.w8 v3, v5 @0
             put %rax, v7
             put %cc, v5
             insn 0x1003 4
             v8 = get %rsi
             v9 = get %rdi
             v10 = zext.w32 v8
             st.w32 [v9 + v8<<2 + 0x10], v10
             insn 0x1007 3
             v11 = get %rdx
             v12 = const 5
             v13 = shr.w32 v11, v12
             put %rdx, v13
             exit goto 0x1100 near";

fn has(code: &[String], wanted: &[&str]) {
    let mut rest = code.iter();
    for w in wanted {
        assert!(rest.any(|l| l == w), "no {w:?} (in this order) in\n{}", code.join("\n"));
    }
}

#[test]
fn guest_instructions_work_in_their_own_registers() {
    let code = compile(SUM_LOOP);
    has(&code, &["mov rax,[rdi+r11]", "add rsi,rax", "add rdi,8"]);
    // One probe, one request check, what the guest does, and the deferred stores of the exit.
    let end = code.iter().position(|l| l.starts_with("jmp")).expect("an end");
    assert!(end <= 18, "{end} instructions:\n{}", code.join("\n"));
    has(&compile(MIXED), &["mov [r11+r14],rbx", "add al,cl", "shr edx,5"]);
}

#[test]
fn accesses_off_one_base_share_a_tlb_check() {
    let block = |last: &str| {
        format!(
            "insn 0x1000 1
             v0 = get %rbp
             v1 = get %rbx
             st [v0 - 0x8], v1
             insn 0x1001 1
             v2 = get %rsi
             st [v0 - 0x10], v2
             insn 0x1002 4
             v3 = ld.w32 [{last}]
             put %rdx, v3
             exit goto 0x1100 near"
        )
    };
    let checks = |code: &[String]| code.iter().filter(|l| l.starts_with("cmp r")).count();
    let main = |text: &str| {
        let code = compile(text);
        let end = code.iter().position(|l| l.starts_with("jmp")).expect("an end");
        code[..end].to_vec()
    };
    let near = main(&block("v0 + 0x10"));
    assert_eq!(checks(&near), 1, "{}", near.join("\n"));
    assert_eq!(near.iter().filter(|l| l.starts_with("test r")).count(), 2);
    let far = main(&block("v0 + 0x1000"));
    assert_eq!(checks(&far), 2, "{}", far.join("\n"));
}

/// A pointer that moves on between the accesses, by any kind of addition.
#[test]
fn accesses_a_constant_apart_share_a_tlb_check() {
    let checks = |step: &str| {
        let code = compile(&format!(
            "insn 0x1000 1
             v0 = get %rbp
             v1 = get %rbx
             v2 = const 0x8
             v3 = ld [v0 + v1<<1]
             put %rsi, v3
             {step}
             put %rbp, v4
             v5 = ld [v4 + v1<<1]
             put %rdi, v5
             exit goto 0x1100 near"
        ));
        let end = code.iter().position(|l| l.starts_with("jmp")).expect("an end");
        code[..end].iter().filter(|l| l.starts_with("cmp r")).count()
    };
    for step in ["v4 = add v0, v2", "v4 = sub v0, v2", "v4 = lea [v0 + 0x10]", "v4 = inc v0"] {
        assert_eq!(checks(step), 1, "{step}");
    }
    for step in ["v4 = add v0, v1", "v4 = add.w32 v0, v2", "v4 = lea [v0 + 0x1000]"] {
        assert_eq!(checks(step), 2, "{step}");
    }
}

#[test]
fn products_without_flags_bind_no_register_but_one() {
    let code = |factor: &str| {
        compile(&format!(
            "insn 0x1000 5
             v0 = get %rsi
             v1 = get %{factor}
             v2, v3 = mulu2 v0, v1
             put %rdi, v2
             put %rbx, v3
             exit goto 0x1100 near"
        ))
    };
    has(&code("rdx"), &["mulx rbx,rdi,rsi"]);
    has(&code("rcx"), &["mul rcx"]);
}

/// Pass-through instructions share as well, alignment included; so do accesses with the same index
/// and accesses at constant addresses.
#[test]
fn vector_accesses_share_a_tlb_check() {
    let block = |second: &str| {
        format!(
            "insn 0x1000 4
             v0 = get %rbp
             v1 = get %rbx
             v2 = const 0x12340
             v3 = const 0x12358
             nativemem.ra legacy.00.0f.28.w0.l0 reg=v1 rm=mem +vector [v0 + v1<<2] size 16
             insn 0x1004 4
             {second}
             exit goto 0x1100 near"
        )
    };
    let checks = |second: &str| {
        let code = compile(&block(second));
        let end = code.iter().position(|l| l.starts_with("jmp")).expect("an end");
        code[..end].iter().filter(|l| l.starts_with("cmp r")).count()
    };
    let native = "legacy.00.0f.28.w0.l0 reg=v2 rm=mem +vector";
    assert_eq!(checks(&format!("nativemem.ra {native} [v0 + v1<<2 + 0x20] size 16")), 1);
    assert_eq!(checks("st [v0 + v1<<2 + 0x20], v1"), 1);
    // Aligned where the first one is not, another factor, no index.
    assert_eq!(checks(&format!("nativemem.ra {native} [v0 + v1<<2 + 0x28] size 16")), 2);
    assert_eq!(checks("st [v0 + v1<<3 + 0x20], v1"), 2);
    assert_eq!(checks("st [v0 + 0x20], v1"), 2);
    assert_eq!(checks("v8 = ld [v2]\nv9 = ld [v3]\nput %rax, v8\nput %rcx, v9"), 2);
}

/// RAX and RCX are overwritten in the end: until then they hold what three registers cannot.
#[test]
fn registers_about_to_be_overwritten_serve_meanwhile() {
    let code = compile(
        "insn 0x1000 1
         v0 = get %rsi
         v1 = get %rdi
         v2 = mul v0, v1
         v3 = add v0, v1
         v4 = sub v0, v1
         v5 = xor v0, v1
         v6 = mul v2, v3
         v7 = mul v4, v5
         v10 = add v6, v7
         v11 = sub v6, v7
         put %rax, v10
         put %rcx, v11
         exit goto 0x1100 near",
    );
    let end = code.iter().position(|l| l.starts_with("jmp")).expect("an end");
    let spills = code[..end].iter().filter(|l| l.starts_with("mov [rsp")).count();
    assert_eq!(spills, 0, "{}", code.join("\n"));
}

#[test]
fn flags_stay_in_the_flags_register() {
    let code = compile(
        "insn 0x1000 3
         v0 = get %rax
         v1 = get %rbx
         f2 = sub v0, v1
         v3 = get %rcx
         v4 = get %rdx
         v5 = selcc.b f2, v3, v4
         put %rdx, v5
         brcc.a f2, goto 0x2000 near
         exit goto 0x1003 near",
    );
    let at = code.iter().position(|l| l == "cmp rax,rbx").expect("a comparison");
    assert_eq!(code[at + 1], "cmovb rdx,rcx");
    let branch = &code[at + 2..];
    assert!(
        branch
            .iter()
            .find(|l| !l.contains("nop") && !l.contains("xchg ax"))
            .is_some_and(|l| l.starts_with("ja ")),
        "{}",
        code.join("\n")
    );
}

/// Flags that were saved as an image are not saved a second time.
#[test]
fn an_image_of_the_flags_serves_conditions() {
    let code = compile(
        "insn 0x1000 3
         v0 = get %rax
         v1 = get %rbx
         f2 = sub v0, v1
         v3 = flagsimg f2
         put %m0, v3
         brcc.b f2, goto 0x2000 near
         v4 = setcc.l f2
         put %rcx, v4
         exit goto 0x1003 near",
    );
    let end = code.iter().position(|l| l.starts_with("jmp")).expect("an end");
    let saved = code[..end].iter().filter(|l| l.starts_with("pushf")).count();
    assert_eq!(saved, 1, "{}", code.join("\n"));
}

/// Prints the code; run by hand: `cargo test --test code -- --ignored --nocapture`.
#[test]
#[ignore = "prints code"]
fn show() {
    for text in [SUM_LOOP, MIXED] {
        println!("{text}");
        for line in compile(text) {
            println!("    {line}");
        }
    }
}
