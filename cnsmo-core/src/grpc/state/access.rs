//! Which keys a caller may read and write, and whose leases it may renew and end.

use std::fmt::Display;

use tonic::{Request, Status};

use crate::{
    error::Error,
    identity::{Role, caller::Caller},
};

/// A caller, as far as keys and leases are concerned.
#[derive(Clone, Debug)]
pub(super) struct Access {
    caller: Caller,
}

impl Access {
    /// Of the caller of a request.
    pub(super) fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        Ok(Self { caller: Caller::of(request)?.clone() })
    }

    /// Name of the caller.
    pub(super) fn identity(&self) -> &str {
        &self.caller.identity
    }

    /// Whose leases the caller may renew and end; none: everybody's.
    pub(super) fn owner(&self) -> Option<&str> {
        match self.caller.role {
            Role::Admin | Role::Core => None,
            _ => Some(self.identity()),
        }
    }

    /// Whether the caller may see a key.
    pub(super) fn reads(&self, key: &str) -> bool {
        self.caller.may_read_key(key)
    }

    /// Refuses a key that the caller may not see.
    pub(super) fn read(&self, field: impl Display, key: &str) -> Result<(), Error> {
        self.allow(self.reads(key), field, "read", key)
    }

    /// Refuses a prefix with keys that are not for the caller. The core's secrets among them are only left out: who may see
    /// everything else may ask for everything.
    pub(super) fn read_all(&self, field: impl Display, prefix: &str) -> Result<(), Error> {
        self.allow(self.caller.may_read_prefix(prefix), field, "read all of", prefix)
    }

    /// Refuses a key that the caller may not change.
    pub(super) fn write(&self, field: impl Display, key: &str) -> Result<(), Error> {
        self.allow(self.caller.may_write_key(key), field, "write", key)
    }

    /// Refuses a prefix below which there can be a key that the caller may not change.
    pub(super) fn write_all(&self, field: impl Display, prefix: &str) -> Result<(), Error> {
        self.allow(self.caller.may_write_prefix(prefix), field, "write all of", prefix)
    }

    fn allow(&self, may: bool, field: impl Display, what: &str, key: &str) -> Result<(), Error> {
        if may {
            return Ok(());
        }
        let identity = self.identity();
        Err(Error::Denied(format!("{field}: {identity} may not {what} `{key}`")))
    }
}
