//! What every service of CNSMO stands on.

pub mod token;
