//! Why a request is refused, and the gRPC status that says so.

use cnsmo_service::channel::LEADER_HEADER;
use tonic::{Status, metadata::MetadataValue};

use crate::store::StoreError;

/// Why a request is refused. The text is for the caller and names resource, field and remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request breaks a rule of the API whatever the state is.
    #[error("{0}")]
    Invalid(String),
    /// The resource does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The resource exists already.
    #[error("{0}")]
    Exists(String),
    /// The caller may not do this.
    #[error("{0}")]
    Denied(String),
    /// A limit of the core is reached.
    #[error("{0}")]
    Exhausted(String),
    /// The revision is not there yet.
    #[error("{0}")]
    OutOfRange(String),
    /// The store failed; nothing was committed.
    #[error("nothing was committed")]
    Store(#[from] StoreError),
    /// Another core leads, at this address; none: nobody does at this moment.
    #[error("{}", not_leader(.0.as_deref()))]
    NotLeader(Option<String>),
    /// The core is stopping.
    #[error("the core is shutting down")]
    Stopped,
    /// A fault of the core itself; details are in its log.
    #[error("the core failed: see its log")]
    Internal,
}

fn not_leader(leader: Option<&str>) -> String {
    match leader {
        Some(leader) => format!("this core does not lead: ask the one at {leader}"),
        None => "no core leads at this moment: try again".to_owned(),
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match error {
            Error::Invalid(_) => Self::invalid_argument(text),
            Error::NotFound(_) => Self::not_found(text),
            Error::Exists(_) => Self::already_exists(text),
            Error::Denied(_) => Self::permission_denied(text),
            Error::Exhausted(_) => Self::resource_exhausted(text),
            Error::OutOfRange(_) => Self::out_of_range(text),
            Error::NotLeader(leader) => {
                let mut status = Self::unavailable(text);
                let leader = leader.unwrap_or_default().parse();
                // An address that is no header is in the text.
                let leader = leader.unwrap_or_else(|_| MetadataValue::from_static(""));
                status.metadata_mut().insert(LEADER_HEADER, leader);
                status
            }
            Error::Stopped => Self::unavailable(text),
            Error::Internal => Self::internal(text),
            Error::Store(cause @ (StoreError::Full | StoreError::Busy)) => {
                Self::resource_exhausted(format!("{text}: {cause}"))
            }
            // Anything else may show paths; the log has it.
            Error::Store(cause) => {
                tracing::error!(error = &cause as &dyn std::error::Error, "store failed");
                Self::unavailable(format!("{text}: the state file could not be read or written"))
            }
        }
    }
}
