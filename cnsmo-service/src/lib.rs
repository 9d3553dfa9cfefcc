//! What every service of CNSMO stands on.

pub mod backoff;
pub mod bus;
pub mod channel;
pub mod durable;
pub mod identity;
pub mod lifecycle;
pub mod supervise;
pub mod token;
