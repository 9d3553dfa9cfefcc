//! What needs nothing but a kernel: the verifier, the agreement of the three judges, hooks. Also run inside emulated
//! VMs with other kernels.

mod agree;
mod hooks;
mod log;
mod verifier;
mod wireguard;
