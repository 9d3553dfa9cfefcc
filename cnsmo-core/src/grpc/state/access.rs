//! Which keys a caller may read and write.

use tonic::{Status, codegen::http::Extensions, transport::server::UdsConnectInfo};

use crate::error::Error;

/// The core's own keys: read by others, written by itself.
const RESERVED: &str = "cnsmo/";
/// Of them those that nobody reads here: hashes of tokens, and what proves identities.
const SECRET: [&str; 2] = ["cnsmo/tokens/", "cnsmo/identities/"];

/// A caller, as far as keys and leases are concerned.
#[derive(Clone, Debug)]
pub(super) struct Access {
    identity: &'static str,
}

impl Access {
    /// Of the caller of a request.
    pub(super) fn of(extensions: &Extensions) -> Result<Self, Status> {
        match extensions.get::<UdsConnectInfo>() {
            Some(_) => Ok(Self { identity: "admin" }),
            None => Err(Status::permission_denied("only operators on this machine")),
        }
    }

    /// Name of the caller.
    pub(super) fn identity(&self) -> &str {
        self.identity
    }

    /// Whose leases the caller may renew and end; none: everybody's.
    pub(super) fn owner(&self) -> Option<&str> {
        None
    }

    /// Whether the caller may see a key.
    pub(super) fn reads(&self, key: &str) -> bool {
        !SECRET.iter().any(|secret| key.starts_with(secret))
    }

    /// Whether the caller may change a key.
    fn writes(&self, key: &str) -> bool {
        !key.starts_with(RESERVED)
    }

    /// Refuses a key that the caller may not see.
    pub(super) fn read(&self, field: impl std::fmt::Display, key: &str) -> Result<(), Error> {
        if self.reads(key) {
            return Ok(());
        }
        Err(Error::Denied(format!("{field}: {} may not read {key}", self.identity())))
    }

    /// Refuses a key that the caller may not change.
    pub(super) fn write(&self, field: impl std::fmt::Display, key: &str) -> Result<(), Error> {
        if key.starts_with(RESERVED) {
            return Err(Error::Denied(format!("{field}: {RESERVED} belongs to the core")));
        }
        if self.writes(key) {
            return Ok(());
        }
        Err(Error::Denied(format!("{field}: {} may not write {key}", self.identity())))
    }

    /// Refuses a prefix below which there is a key that the caller may not change.
    pub(super) fn write_all(
        &self,
        field: impl std::fmt::Display,
        prefix: &str,
    ) -> Result<(), Error> {
        if RESERVED.starts_with(prefix) {
            return Err(Error::Denied(format!(
                "{field}: {prefix} includes {RESERVED}, which belongs to the core"
            )));
        }
        self.write(field, prefix)
    }
}
