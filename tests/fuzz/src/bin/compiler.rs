//! The target `compiler` under libFuzzer: `cargo xtask fuzz compiler`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cnsmo_fuzz::compiler::run(bytes));
