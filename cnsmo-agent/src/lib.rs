//! The agent of one VM.

pub mod balance;
pub mod compile;
pub mod config;
pub mod datapath;
pub mod desired;
pub mod effective;
pub mod enforcer;
pub mod explain;
pub mod flows;
pub mod health;
pub mod ledger;
pub mod live;
pub mod locate;
pub mod node;
pub mod parts;
pub mod plan;
pub mod report;
pub mod runtime;
pub mod session;
pub mod socket;
pub mod tunnel;
pub mod workload;
