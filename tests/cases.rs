//! One module per subject.

mod adoption;
mod attach;
mod balancer;
mod firewall;
mod kernel;
mod lab;
mod overlay;
mod swap;
