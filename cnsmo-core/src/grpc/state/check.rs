//! What a request may say. Errors name the field.

use std::{
    fmt::{self, Display},
    time::Duration,
};

use cnsmo_proto::pb::state::{self as pb, TxnRequest, WatchRequest, compare, op};

use super::access::Access;
use crate::{
    error::Error,
    store::{Compare, Fence, LeaseId, Op, Revision, Target, Txn},
};

/// Bytes of a key.
const KEY_BYTES_MAX: usize = 512;
/// Bytes of a value.
const VALUE_BYTES_MAX: usize = 1 << 20;
/// Bytes of a content type.
const CONTENT_TYPE_BYTES_MAX: usize = 128;
/// Bytes of a request's id.
const REQUEST_ID_BYTES_MAX: usize = 64;
/// Comparisons of a transaction, and operations in each of its lists.
const TXN_LIST_MAX: usize = 128;
/// Reads in each list of a transaction: the answer may hold as many values.
const TXN_GETS_MAX: usize = 32;
/// Bytes of keys, values and content types in a transaction.
pub(super) const TXN_BYTES_MAX: usize = 2 << 20;
/// Silence after which a watcher is sent a bookmark, if it does not say.
const BOOKMARK_DEFAULT: Duration = Duration::from_secs(10);
const BOOKMARK_MIN: Duration = Duration::from_millis(100);
const BOOKMARK_MAX: Duration = Duration::from_secs(3_600);

/// What a watcher wants.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) prefix: String,
    /// None: first the keys as they are.
    pub(super) start: Option<Revision>,
    /// Of the start; 0: not known.
    pub(super) epoch: u64,
    pub(super) prev_kv: bool,
    pub(super) bookmark: Duration,
}

pub(super) fn key(field: impl Display, key: &str) -> Result<(), Error> {
    if key.is_empty() {
        return Err(Error::Invalid(format!("{field}: missing")));
    }
    prefix(field, key)
}

/// As a key, but may be empty.
pub(super) fn prefix(field: impl Display, prefix: &str) -> Result<(), Error> {
    text(field, prefix, KEY_BYTES_MAX)
}

pub(super) fn lease(field: impl Display, id: i64) -> Result<LeaseId, Error> {
    if id > 0 { Ok(id) } else { Err(Error::Invalid(format!("{field}: {id} is no lease"))) }
}

/// None: absent or zero.
pub(super) fn duration(
    field: &str,
    duration: Option<prost_types::Duration>,
    min: Duration,
    max: Duration,
) -> Result<Option<Duration>, Error> {
    let duration = duration.unwrap_or_default();
    match Duration::try_from(duration) {
        Ok(Duration::ZERO) => Ok(None),
        Ok(duration) if (min..=max).contains(&duration) => Ok(Some(duration)),
        _ => Err(Error::Invalid(format!("{field}: is not within {min:?} and {max:?}"))),
    }
}

pub(super) fn watch(request: WatchRequest) -> Result<Watch, Error> {
    let WatchRequest { prefix, start_revision, prev_kv, bookmark_interval, epoch } = request;
    self::prefix("prefix", &prefix)?;
    let bookmark = duration("bookmark_interval", bookmark_interval, BOOKMARK_MIN, BOOKMARK_MAX)?;
    let bookmark = bookmark.unwrap_or(BOOKMARK_DEFAULT);
    let start = (start_revision != 0).then_some(start_revision);
    Ok(Watch { prefix, start, epoch, prev_kv, bookmark })
}

pub(super) fn txn(request: TxnRequest, access: &Access) -> Result<Txn, Error> {
    let TxnRequest { compare, success, failure, request_id, fence } = request;
    let mut bytes = 0;
    let compares = list("compare", compare, |at, c| self::compare(at, c, access, &mut bytes))?;
    let success = ops("success", success, access, &mut bytes)?;
    let failure = ops("failure", failure, access, &mut bytes)?;
    if bytes > TXN_BYTES_MAX {
        return Err(Error::Invalid(format!(
            "the transaction has {bytes} bytes of keys and values; {TXN_BYTES_MAX} is the most"
        )));
    }
    text("request_id", &request_id, REQUEST_ID_BYTES_MAX)?;
    let by = access.identity().to_owned();
    // What one caller chose shall not be answered with what was another's.
    let request_id = (!request_id.is_empty()).then(|| format!("{by}/{request_id}"));
    let fence = fence
        .map(|fence| {
            let lease = lease("fence.lease_id", fence.lease_id)?;
            Ok::<_, Error>(Fence { lease, token: fence.fencing_token })
        })
        .transpose()?;
    Ok(Txn { compares, success, failure, fence, request_id, by })
}

/// Place of an element, for messages.
#[derive(Clone, Copy)]
struct At {
    list: &'static str,
    index: usize,
}

impl At {
    fn field(self, name: &'static str) -> impl Display + Copy {
        Field { at: self, name }
    }
}

impl Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.list, self.index)
    }
}

#[derive(Clone, Copy)]
struct Field {
    at: At,
    name: &'static str,
}

impl Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.at, self.name)
    }
}

fn list<T, U>(
    list: &'static str,
    elements: Vec<T>,
    mut check: impl FnMut(At, T) -> Result<U, Error>,
) -> Result<Vec<U>, Error> {
    if elements.len() > TXN_LIST_MAX {
        let count = elements.len();
        return Err(Error::Invalid(format!(
            "{list}: has {count} elements; {TXN_LIST_MAX} is the most"
        )));
    }
    let elements = elements.into_iter().enumerate();
    elements.map(|(index, element)| check(At { list, index }, element)).collect()
}

fn compare(
    at: At,
    compare: pb::Compare,
    access: &Access,
    bytes: &mut usize,
) -> Result<Compare, Error> {
    let pb::Compare { key, target } = compare;
    self::key(at.field("key"), &key)?;
    // Comparing is a way of reading.
    access.read(at.field("key"), &key)?;
    *bytes += key.len();
    let not_negative = |name, number: i64| {
        if number < 0 {
            return Err(Error::Invalid(format!("{}: is negative", at.field(name))));
        }
        Ok(number)
    };
    let target = match target {
        Some(compare::Target::ModRevision(revision)) => {
            Target::ModRevision(not_negative("mod_revision", revision)?)
        }
        Some(compare::Target::Version(version)) => {
            Target::Version(not_negative("version", version)?)
        }
        Some(compare::Target::LeaseId(lease)) => Target::Lease(not_negative("lease_id", lease)?),
        Some(compare::Target::Value(value)) => {
            *bytes += value.len();
            Target::Value(value)
        }
        None => {
            let message = "missing: mod_revision, version, lease_id or value";
            return Err(Error::Invalid(format!("{at}: {message}")));
        }
    };
    Ok(Compare { key, target })
}

fn ops(
    name: &'static str,
    ops: Vec<pb::Op>,
    access: &Access,
    bytes: &mut usize,
) -> Result<Vec<Op>, Error> {
    let ops = list(name, ops, |at, op| self::op(at, op, access, bytes))?;
    let gets = ops.iter().filter(|op| matches!(op, Op::Get { .. })).count();
    if gets > TXN_GETS_MAX {
        return Err(Error::Invalid(format!("{name}: has {gets} gets; {TXN_GETS_MAX} is the most")));
    }
    Ok(ops)
}

fn op(at: At, op: pb::Op, access: &Access, bytes: &mut usize) -> Result<Op, Error> {
    let op = match op.op {
        Some(op::Op::Put(put)) => self::put(at, put, access, bytes)?,
        Some(op::Op::Delete(key)) => {
            self::key(at.field("delete"), &key)?;
            access.write(at.field("delete"), &key)?;
            *bytes += key.len();
            Op::Delete { key }
        }
        Some(op::Op::DeletePrefix(prefix)) => {
            self::key(at.field("delete_prefix"), &prefix)?;
            access.write_all(at.field("delete_prefix"), &prefix)?;
            *bytes += prefix.len();
            Op::DeletePrefix { prefix }
        }
        Some(op::Op::Get(key)) => {
            self::key(at.field("get"), &key)?;
            access.read(at.field("get"), &key)?;
            *bytes += key.len();
            Op::Get { key }
        }
        None => {
            let message = "missing: put, delete, delete_prefix or get";
            return Err(Error::Invalid(format!("{at}: {message}")));
        }
    };
    Ok(op)
}

fn put(at: At, put: pb::Put, access: &Access, bytes: &mut usize) -> Result<Op, Error> {
    let pb::Put { key, value, content_type, lease_id } = put;
    self::key(at.field("put.key"), &key)?;
    access.write(at.field("put.key"), &key)?;
    if value.len() > VALUE_BYTES_MAX {
        let (field, bytes) = (at.field("put.value"), value.len());
        return Err(Error::Invalid(format!(
            "{field}: has {bytes} bytes; {VALUE_BYTES_MAX} is the most"
        )));
    }
    text(at.field("put.content_type"), &content_type, CONTENT_TYPE_BYTES_MAX)?;
    *bytes += key.len() + value.len() + content_type.len();
    let lease = if lease_id == 0 { 0 } else { self::lease(at.field("put.lease_id"), lease_id)? };
    Ok(Op::Put { key, value, content_type, lease })
}

fn text(field: impl Display, text: &str, bytes_max: usize) -> Result<(), Error> {
    if text.len() > bytes_max {
        let bytes = text.len();
        return Err(Error::Invalid(format!("{field}: has {bytes} bytes; {bytes_max} is the most")));
    }
    if text.chars().any(char::is_control) {
        return Err(Error::Invalid(format!("{field}: has a control character")));
    }
    Ok(())
}
