//! The target `policy` under libFuzzer: `cargo xtask fuzz policy`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cnsmo_fuzz::policy::run(bytes));
