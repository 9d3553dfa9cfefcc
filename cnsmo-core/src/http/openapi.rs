//! The description of the API that `GET /openapi.json` gives: OpenAPI 3.1, made from the descriptors. Comments of the
//! `.proto` files are the descriptions.

use std::collections::BTreeSet;

use prost_reflect::{
    DescriptorPool, EnumDescriptor, FieldDescriptor, FileDescriptor, Kind, MessageDescriptor,
    MethodDescriptor, ServiceDescriptor,
};
use serde_json::{Map, Value, json};

use super::{DESCRIPTION_PAGE, HEALTH_PAGE, path, request::Content, status};

/// The description of all services of `pool`.
pub(super) fn describe(pool: &DescriptorPool) -> Value {
    let mut schemas = Schemas::default();
    let mut paths = Map::new();
    let mut tags = Vec::new();
    for service in pool.services() {
        tags.push(described(json!({ "name": service.full_name() }), &comment_of_service(&service)));
        for method in service.methods() {
            paths.insert(path(&method), json!({ "post": operation(&method, &mut schemas) }));
        }
    }
    paths.insert(HEALTH_PAGE.into(), json!({ "get": page("health", "Whether the core serves.") }));
    paths.insert(DESCRIPTION_PAGE.into(), json!({ "get": page("description", "This document.") }));
    schemas.named.insert("Error".into(), error());
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "CNSMO",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Requests and answers are the canonical JSON of protobuf messages: fields with their default \
                value are left out, 64-bit integers are strings, bytes are base64. Streams are a message per line; one that \
                fails ends with the line {\"error\": Error}.",
        },
        "tags": tags,
        "paths": paths,
        "components": {
            "schemas": schemas.named,
            "securitySchemes": { "certificate": { "type": "mutualTLS" } },
        },
        "security": [{ "certificate": [] }, {}],
    })
}

fn operation(method: &MethodDescriptor, schemas: &mut Schemas) -> Value {
    let request = Content::of(method).types()[0];
    let answer =
        if method.is_server_streaming() { "application/jsonl" } else { "application/json" };
    let operation = json!({
        "operationId": method.full_name(),
        "tags": [method.parent_service().full_name()],
        "requestBody": { "required": true, "content": content(request, &schemas.message(&method.input())) },
        "responses": {
            "200": { "description": method.output().name(), "content": content(answer, &schemas.message(&method.output())) },
            "default": refusal(),
        },
    });
    described(operation, &comment(&method.parent_file(), method.path()))
}

fn page(id: &str, description: &str) -> Value {
    json!({
        "operationId": id,
        "description": description,
        "responses": {
            "200": { "description": description, "content": content("application/json", &json!({ "type": "object" })) },
            "default": refusal(),
        },
    })
}

fn refusal() -> Value {
    let schema = json!({ "$ref": "#/components/schemas/Error" });
    json!({ "description": "Refused or failed.", "content": content("application/json", &schema) })
}

fn content(media_type: &str, schema: &Value) -> Value {
    json!({ media_type: { "schema": schema } })
}

fn error() -> Value {
    let names: Vec<_> = status::error_names().collect();
    json!({
        "type": "object",
        "required": ["code", "message"],
        "properties": {
            "code": { "type": "string", "enum": names },
            "message": { "type": "string" },
        },
    })
}

/// Schemas by the full name of the message or enum, each described where it is first needed.
#[derive(Default)]
struct Schemas {
    named: Map<String, Value>,
    begun: BTreeSet<String>,
}

impl Schemas {
    fn message(&mut self, of: &MessageDescriptor) -> Value {
        if let Some(known) = well_known(of.full_name()) {
            return known;
        }
        if self.begun.insert(of.full_name().into()) {
            let fields: Map<_, _> = of
                .fields()
                .map(|field| {
                    let schema = self.field(&field);
                    (field.json_name().into(), described(schema, &comment_of_field(&field)))
                })
                .collect();
            let schema = json!({ "type": "object", "properties": fields });
            let text = [comment(&of.parent_file(), of.path()), unions(of)].concat();
            self.named.insert(of.full_name().into(), described(schema, &text));
        }
        reference(of.full_name())
    }

    fn enumeration(&mut self, of: &EnumDescriptor) -> Value {
        if self.begun.insert(of.full_name().into()) {
            let names: Vec<_> = of.values().map(|value| value.name().to_owned()).collect();
            let mut text = comment(&of.parent_file(), of.path());
            for value in of.values() {
                let about = comment(&value.parent_enum().parent_file(), value.path());
                if !about.is_empty() {
                    text.push(format!("{}: {}", value.name(), about.join(" ")));
                }
            }
            let schema = json!({ "type": "string", "enum": names });
            self.named.insert(of.full_name().into(), described(schema, &text));
        }
        reference(of.full_name())
    }

    fn field(&mut self, field: &FieldDescriptor) -> Value {
        let kind = field.kind();
        if field.is_map() {
            let Kind::Message(entry) = kind else { return Value::Bool(true) };
            let values = self.kind(&entry.map_entry_value_field().kind());
            return json!({ "type": "object", "additionalProperties": values });
        }
        let schema = self.kind(&kind);
        if field.is_list() { json!({ "type": "array", "items": schema }) } else { schema }
    }

    fn kind(&mut self, kind: &Kind) -> Value {
        match kind {
            Kind::Bool => json!({ "type": "boolean" }),
            Kind::String => json!({ "type": "string" }),
            Kind::Bytes => json!({ "type": "string", "contentEncoding": "base64" }),
            Kind::Float => json!({ "type": "number", "format": "float" }),
            Kind::Double => json!({ "type": "number", "format": "double" }),
            Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => {
                json!({ "type": "integer", "format": "int32" })
            }
            Kind::Uint32 | Kind::Fixed32 => {
                json!({ "type": "integer", "minimum": 0, "maximum": u32::MAX })
            }
            Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => {
                json!({ "type": "string", "format": "int64" })
            }
            Kind::Uint64 | Kind::Fixed64 => json!({ "type": "string", "pattern": "^[0-9]+$" }),
            Kind::Message(of) => self.message(of),
            Kind::Enum(of) => self.enumeration(of),
        }
    }
}

/// Messages whose JSON is no object of their fields.
fn well_known(name: &str) -> Option<Value> {
    Some(match name {
        "google.protobuf.Timestamp" => json!({ "type": "string", "format": "date-time" }),
        "google.protobuf.Duration" => {
            json!({ "type": "string", "pattern": r"^-?[0-9]+(\.[0-9]{1,9})?s$" })
        }
        // Any JSON.
        _ if name.starts_with("google.protobuf.") => Value::Bool(true),
        _ => return None,
    })
}

fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

fn unions(of: &MessageDescriptor) -> Vec<String> {
    of.oneofs()
        .filter(|union| union.fields().len() > 1)
        .map(|union| {
            let fields: Vec<_> = union.fields().map(|field| field.json_name().to_owned()).collect();
            format!("At most one of {}.", fields.join(", "))
        })
        .collect()
}

fn comment_of_service(service: &ServiceDescriptor) -> Vec<String> {
    comment(&service.parent_file(), service.path())
}

fn comment_of_field(field: &FieldDescriptor) -> Vec<String> {
    comment(&field.parent_message().parent_file(), field.path())
}

/// What stands above or behind the definition at a path of the file, as paragraphs.
fn comment(file: &FileDescriptor, path: &[i32]) -> Vec<String> {
    let source = file.file_descriptor_proto().source_code_info.as_ref();
    let at = source.and_then(|source| source.location.iter().find(|at| at.path == path));
    let texts = at.into_iter().flat_map(|at| [at.leading_comments(), at.trailing_comments()]);
    texts.map(joined).filter(|text| !text.is_empty()).collect()
}

/// Lines of a comment are broken anywhere.
fn joined(comment: &str) -> String {
    comment.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn described(mut schema: Value, text: &[String]) -> Value {
    if let (Value::Object(schema), false) = (&mut schema, text.is_empty()) {
        schema.insert("description".into(), text.join("\n\n").into());
    }
    schema
}
