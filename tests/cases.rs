//! One module per subject.

mod adoption;
mod attach;
mod balancer;
mod bus;
mod firewall;
mod kernel;
mod lab;
mod overlay;
mod swap;
