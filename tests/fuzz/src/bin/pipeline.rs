//! The target `pipeline` under libFuzzer: `cargo xtask fuzz pipeline`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cnsmo_fuzz::pipeline::run(bytes));
