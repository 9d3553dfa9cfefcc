//! Canonical JSON of a message, and back.
//!
//! Fields that have their default value are left out. What is read may also have the names of the `.proto` files, enums by
//! number, 64-bit integers as numbers, and fields that are not known, which are ignored.

use std::fmt;

use bytes::{BufMut as _, Bytes, BytesMut};
use prost_reflect::{
    DeserializeOptions, DynamicMessage, Kind, MessageDescriptor, SerializeOptions,
};
use serde::{
    Deserializer,
    de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_path_to_error::Track;
use tonic::Status;

const READ: DeserializeOptions = DeserializeOptions::new().deny_unknown_fields(false);
const WRITE: SerializeOptions = SerializeOptions::new();

/// Reads one JSON object.
///
/// # Errors
/// INVALID_ARGUMENT with the path of the field.
pub(super) fn read(text: &[u8], of: &MessageDescriptor) -> Result<DynamicMessage, Status> {
    located(text, EnumNames(&Kind::Message(of.clone())))?;
    located(text, Message(of))
}

/// Appends the JSON of an encoded message.
///
/// # Errors
/// INTERNAL: the bytes are no such message, or one without JSON, for example with a time after the year 9999.
pub(super) fn write(
    message: Bytes,
    of: &MessageDescriptor,
    to: &mut BytesMut,
) -> Result<(), Status> {
    let message = DynamicMessage::decode(of.clone(), message)
        .map_err(|error| Status::internal(format!("the answer is no {}: {error}", of.name())))?;
    let mut json = serde_json::Serializer::new(to.writer());
    message
        .serialize_with_options(&mut json, &WRITE)
        .map_err(|error| Status::internal(format!("the answer has no JSON: {error}")))
}

fn located<'t, S: DeserializeSeed<'t>>(text: &'t [u8], seed: S) -> Result<S::Value, Status> {
    let mut json = serde_json::Deserializer::from_slice(text);
    let mut track = Track::new();
    let read = seed
        .deserialize(serde_path_to_error::Deserializer::new(&mut json, &mut track))
        .and_then(|value| json.end().map(|()| value));
    read.map_err(|error| {
        let error = serde_path_to_error::Error::new(track.path(), error);
        Status::invalid_argument(error.to_string())
    })
}

struct Message<'a>(&'a MessageDescriptor);

impl<'de> DeserializeSeed<'de> for Message<'_> {
    type Value = DynamicMessage;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<DynamicMessage, D::Error> {
        DynamicMessage::deserialize_with_options(self.0.clone(), json, &READ)
    }
}

/// Walks a value, or a list or map of them, and refuses names that an enum does not have: [`DynamicMessage`], which is to
/// ignore unknown fields, would ignore these too. All other faults are left to it.
#[derive(Clone, Copy)]
struct EnumNames<'a>(&'a Kind);

impl<'de> DeserializeSeed<'de> for EnumNames<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        match self.0 {
            Kind::Message(of) if !of.full_name().starts_with("google.protobuf.") => {
                json.deserialize_any(self)
            }
            Kind::Enum(_) => json.deserialize_any(self),
            _ => json.deserialize_ignored_any(IgnoredAny).map(|_| ()),
        }
    }
}

impl<'de> Visitor<'de> for EnumNames<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Kind::Message(of) = self.0 else {
            return IgnoredAny.visit_map(map).map(|_| ());
        };
        while let Some(key) = map.next_key::<String>()? {
            let field = if of.is_map_entry() {
                Some(of.map_entry_value_field())
            } else {
                of.get_field_by_json_name(&key).or_else(|| of.get_field_by_name(&key))
            };
            match field {
                Some(field) => map.next_value_seed(EnumNames(&field.kind()))?,
                None => map.next_value::<IgnoredAny>().map(|_| ())?,
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(self)?.is_some() {}
        Ok(())
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<(), E> {
        match self.0 {
            Kind::Enum(of) if of.get_value_by_name(name).is_none() => {
                let names: Vec<_> = of.values().map(|value| value.name().to_owned()).collect();
                Err(E::custom(format!("{name:?} is none of {}", names.join(", "))))
            }
            _ => Ok(()),
        }
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }
}
