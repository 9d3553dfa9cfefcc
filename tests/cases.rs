//! One module per subject.

mod adoption;
mod attach;
mod balancer;
mod bus;
mod confirm;
mod firewall;
mod kernel;
mod lab;
mod overlay;
mod programs;
mod s01_apply;
mod s02_idle;
mod s04_actors;
mod s05_protocols;
mod s06_spawn;
mod s07_retry;
mod s09_recovery;
mod s10_stateless;
mod s12_python;
mod s14_announce;
mod s15_balanced;
mod s15_deployments;
mod s15_failing;
mod s16_agents;
mod s17_services;
mod swap;
