//! The agent of one VM.

pub mod compile;
pub mod datapath;
pub mod effective;
