//! What every service of CNSMO stands on.

pub mod actor;
pub mod announce;
pub mod audit;
pub mod backoff;
pub mod bus;
pub mod channel;
pub mod durable;
pub mod host;
pub mod identity;
pub mod lifecycle;
pub mod needs;
pub mod supervise;
pub mod token;
