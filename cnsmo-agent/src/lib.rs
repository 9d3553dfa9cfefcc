//! The agent of one VM.

pub mod datapath;
pub mod effective;
