//! Prints what code becomes: `ISA_SHOW=4801c8 cargo test --test isa show -- --ignored --nocapture`.

use super::every_form::{USER, text};
use super::machine::{self, Bytes};
use super::native::START;
use iced_x86::Decoder;
use tandem_jit::code::Backend;
use tandem_jit::ir::Block;
use tandem_jit::opt::Passes;
use tandem_tcg::x86::translate::{FrontEnd, Limits, TbKey};

#[test]
#[ignore = "a look"]
fn show() {
    let hex = std::env::var("ISA_SHOW").expect("ISA_SHOW holds code in hexadecimal");
    let code: Vec<u8> = (0..hex.len() / 2)
        .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).expect("hexadecimal"))
        .collect();
    let target = std::sync::Arc::new(machine::target());
    let backend = tandem_jit::x86_64::X64Backend::new(target.clone(), 1 << 20).expect("an arena");
    let mut block = Block::default();
    let key = TbKey { rip: START, cs_base: 0, mode: USER };
    FrontEnd::default()
        .translate(&mut Bytes { code: &code, at: START }, key, Limits::default(), &mut block)
        .expect("bytes are there");
    eprintln!("{}", block.listing(Some(&target)));
    Passes::default().run(&mut block, &target);
    eprintln!("after passes:\n{}", block.listing(Some(&target)));
    let compiled = backend.compiler().compile(&block, 1).expect("compiles");
    let bytes = backend.code_bytes(compiled.range.clone());
    for i in Decoder::with_ip(64, &bytes, compiled.range.start, 0).iter() {
        eprintln!("{:#x} {}", i.ip() - compiled.range.start, text(&i));
    }
}
