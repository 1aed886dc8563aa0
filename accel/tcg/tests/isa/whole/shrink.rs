//! Makes a program that shows a difference as small as it gets, and writes it down.

use super::compare::{Lab, Verdict};
use super::layout::DATA_LEN;
use super::program::{Program, decode};
use super::state::State;
use crate::every_form::text;
use std::fmt::Write;

/// Whether `p` shows a difference.
fn differs(lab: &mut Lab, p: &Program) -> bool {
    matches!(lab.judge(p), Verdict::Different(_))
}

/// Takes `q` for `p` if it shows a difference too.
fn attempt(lab: &mut Lab, p: &mut Program, q: Program) -> bool {
    let better = differs(lab, &q);
    if better {
        *p = q;
    }
    better
}

/// A smaller program that shows a difference.
pub fn shrink(lab: &mut Lab, mut p: Program) -> Program {
    loop {
        let before = p.items.len();
        let mut i = p.items.len();
        while i > 0 {
            i -= 1;
            let q = p.without(i);
            attempt(lab, &mut p, q);
        }
        if p.items.len() == before {
            break;
        }
    }
    shrink_state(lab, &mut p);
    shrink_memory(lab, &mut p);
    let plain = Program { offset: 0x200, ..p.clone() };
    attempt(lab, &mut p, plain);
    p
}

/// A change that makes a state smaller.
type Change = Box<dyn Fn(&mut State)>;

fn shrink_state(lab: &mut Lab, p: &mut Program) {
    let plain = State::default();
    let mut tries: Vec<Change> = Vec::new();
    for i in 0..16 {
        tries.push(Box::new(move |s| s.gpr[i] = 0));
        tries.push(Box::new(move |s| s.gpr[i] &= 0xffff_ffff));
        tries.push(Box::new(move |s| s.gpr[i] &= !0xff));
    }
    for i in 0..32 {
        tries.push(Box::new(move |s| s.zmm[i] = [0; 64]));
        for n in 0..8 {
            tries.push(Box::new(move |s| s.zmm[i][8 * n..8 * n + 8].fill(0)));
        }
    }
    for i in 0..8 {
        tries.push(Box::new(move |s| s.k[i] = 0));
        tries.push(Box::new(move |s| s.st[i] = [0; 10]));
    }
    for bit in 0..22 {
        tries.push(Box::new(move |s| s.flags &= !(1 << bit)));
    }
    tries.push(Box::new(move |s| s.mxcsr = 0x1f80));
    tries.push(Box::new(move |s| s.mxcsr &= !0x3f));
    tries.push(Box::new(move |s| s.cw = 0x37f));
    tries.push(Box::new(move |s| s.sw = 0));
    tries.push(Box::new(move |s| s.sw &= 0x3800));
    tries.push(Box::new(move |s| s.tags = 0));
    tries.push(Box::new(move |s| s.fs_gs = plain.fs_gs));
    for t in tries {
        let mut q = p.clone();
        t(&mut q.state);
        if q.state != p.state {
            attempt(lab, p, q);
        }
    }
}

fn shrink_memory(lab: &mut Lab, p: &mut Program) {
    let mut size = DATA_LEN;
    while size >= 8 {
        for at in (0..DATA_LEN).step_by(size) {
            if p.memory.data[at..at + size].iter().any(|b| *b != 0) {
                let mut q = p.clone();
                q.memory.data[at..at + size].fill(0);
                attempt(lab, p, q);
            }
        }
        size /= 4;
    }
    let mut q = p.clone();
    q.memory.read_only.fill(0);
    attempt(lab, p, q);
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

/// The program as a line of `cases.txt`.
pub fn line(p: &Program) -> String {
    let Some(code) = p.encode() else { return "(no encoding)".to_string() };
    let mut s = format!("NAME {} {} at={:x}", p.bits, hex(&code.bytes), p.offset);
    s += &p.state.words();
    for (name, bytes) in [("data", &p.memory.data), ("ro", &p.memory.read_only)] {
        let mut at = 0;
        while at < bytes.len() {
            if bytes[at..].iter().take(8).all(|b| *b == 0) {
                at += 8;
                continue;
            }
            let mut end = at;
            while end < bytes.len() && bytes[end..].iter().take(8).any(|b| *b != 0) {
                end += 8;
            }
            let _ = write!(s, " {name}+{at:x}={}", hex(&bytes[at..end.min(bytes.len())]));
            at = end;
        }
    }
    s += " #";
    for i in decode(&code.bytes, p.bits, p.start()) {
        let _ = write!(s, " {};", text(&i));
    }
    s
}
