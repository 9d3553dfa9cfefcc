//! The agent of one VM.

pub mod balance;
pub mod compile;
pub mod config;
pub mod datapath;
pub mod effective;
pub mod enforcer;
pub mod ledger;
pub mod locate;
pub mod node;
pub mod policy_set;
pub mod report;
pub mod runtime;
pub mod session;
pub mod tunnel;
