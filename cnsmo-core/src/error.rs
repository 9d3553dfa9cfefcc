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
    /// The state is not one in which this can be done.
    #[error("{0}")]
    Precondition(String),
    /// A limit of the core is reached.
    #[error("{0}")]
    Exhausted(String),
    /// The revision is not there yet, or not any more.
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
            Error::Precondition(_) => Self::failed_precondition(text),
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
            Error::Store(cause) => of_store(&text, &cause),
        }
    }
}

fn of_store(text: &str, cause: &StoreError) -> Status {
    match cause {
        StoreError::Full
        | StoreError::Busy
        | StoreError::TooMany { .. }
        | StoreError::LeaseFull(_) => Status::resource_exhausted(format!("{text}: {cause}")),
        StoreError::Invalid(_) => Status::invalid_argument(cause.to_string()),
        StoreError::Fenced => Status::failed_precondition(format!("{text}: {cause}")),
        StoreError::LeaseGone(_) => Status::not_found(format!("{text}: {cause}")),
        StoreError::Compacted { .. } | StoreError::Ahead { .. } => {
            Status::out_of_range(cause.to_string())
        }
        StoreError::Closed => Status::unavailable(Error::Stopped.to_string()),
        StoreError::Unknown(_) => {
            tracing::error!(error = cause as &dyn std::error::Error, "store failed");
            Status::unknown(cause.to_string())
        }
        // These may show paths; the log has them.
        StoreError::Open { .. }
        | StoreError::Damaged { .. }
        | StoreError::NotEmpty { .. }
        | StoreError::InUse { .. }
        | StoreError::Database(_) => {
            tracing::error!(error = cause as &dyn std::error::Error, "store failed");
            Status::unavailable(format!("{text}: the state could not be read or written"))
        }
    }
}
