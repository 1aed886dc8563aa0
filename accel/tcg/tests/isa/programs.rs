//! Small programs with control flow, the stack and strings: `programs.txt`, on random registers.

use super::every_form::USER;
use super::forms;
use super::machine::{End, Machine};
use super::memory::{Arena, DATA_LEN, data, set_data};
use super::native::{self, START};
use super::rng::Rng;
use iced_x86::Decoder;

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect()
}

/// Programs after which some flags are undefined do not compare flags.
fn defined_flags(code: &[u8]) -> u64 {
    let defined = Decoder::with_ip(64, code, START, 0).iter().all(|i| i.rflags_undefined() == 0);
    if defined { 0xcd5 } else { 0x400 }
}

fn run(mut m: Machine) {
    let guard = Arena::lock();
    let mut rng = Rng::new(5);
    for line in include_str!("programs.txt").lines().filter(|l| !l.starts_with('#')) {
        let mut fields = line.splitn(3, ' ');
        let (name, hex) = (fields.next().unwrap(), fields.next().unwrap());
        let code = bytes(hex);
        let mask = defined_flags(&code);
        for _ in 0..20 {
            let mut regs = forms::registers(&mut rng);
            regs.gpr[12] = 3;
            let memory: Vec<u8> = (0..DATA_LEN).map(|_| rng.bits() as u8).collect();
            set_data(&memory);
            let expect = native::run(&code, &regs, 64);
            let expect_data = data();
            set_data(&memory);
            let got = m.run(&code, START, USER, &regs);
            let got_data = data();
            let at = (0..DATA_LEN).find(|&i| got_data[i] != expect_data[i]);
            let flags = (got.regs.flags ^ expect.flags) & mask;
            assert!(
                got.end == End::Done && got.regs.gpr == expect.gpr && flags == 0 && at.is_none(),
                "{name}\nregisters {regs:x?}\nexpected  {expect:x?}\ngot       {got:x?}\n\
                 different flags {flags:#x}; first different data byte {at:x?}\n{}",
                m.listing()
            );
        }
    }
    drop(guard);
}

#[test]
fn interpreter() {
    run(Machine::interp(false));
}

#[test]
fn jit() {
    run(Machine::jit(false));
}

#[test]
fn jit_after_passes() {
    run(Machine::jit(true));
}
