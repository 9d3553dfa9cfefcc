//! The entry points. Each reads the bounds of its packet once, asks the pipeline, and turns the verdict into an action
//! of its hook.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]
#![cfg_attr(
    target_arch = "bpf",
    expect(unreachable_pub, reason = "the loader finds programs and maps by symbol, not by path")
)]

#[cfg(target_arch = "bpf")]
mod bench;
#[cfg(target_arch = "bpf")]
mod explain;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod probe;
#[cfg(target_arch = "bpf")]
mod programs;
#[cfg(target_arch = "bpf")]
mod report;
#[cfg(target_arch = "bpf")]
mod skb;

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Unreachable: `cargo xtask tidy` refuses an object with a panic in it.
    loop {}
}

/// The helpers used are for programs under the GPL only; this file and its modules are GPL-2.0-only as a program.
#[cfg(target_arch = "bpf")]
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Empty: lets host tools check the package.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
