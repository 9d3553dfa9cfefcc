//! What clients were built from must not change under them: each message, enum and RPC of `api.lock` is still there, with the
//! same numbers, names and types. Adding is fine; `cargo xtask tidy --bless` records it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, helpers included")]

use std::{collections::BTreeSet, env, fs, path::Path};

use prost::Message as _;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto,
    FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};

#[test]
fn released_messages_do_not_change() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("api.lock");
    let now = lines(cnsmo_proto::DESCRIPTORS);
    if env::var_os("CNSMO_BLESS").is_some() {
        let text: String = now.iter().map(|line| format!("{line}\n")).collect();
        fs::write(&path, text).unwrap();
    }
    let text = fs::read_to_string(&path).unwrap();
    let broken: Vec<_> = text.lines().filter(|line| !now.contains(*line)).collect();
    assert!(
        broken.is_empty(),
        "clients rely on what is not there any more:\n{}\nkeep it, or, before a release, accept the break with \
         `cargo xtask tidy --bless`",
        broken.join("\n")
    );
}

#[test]
fn a_change_of_number_name_or_type_is_a_break_and_an_addition_is_none() {
    let lines_of = |fields: &[(&str, i32, Type, Label)]| {
        let field = |(name, number, kind, label): &(&str, i32, Type, Label)| FieldDescriptorProto {
            name: Some((*name).to_owned()),
            number: Some(*number),
            r#type: Some((*kind).into()),
            label: Some((*label).into()),
            ..FieldDescriptorProto::default()
        };
        let message = DescriptorProto {
            name: Some("M".to_owned()),
            field: fields.iter().map(field).collect(),
            ..DescriptorProto::default()
        };
        let package = Some("cnsmo.t".to_owned());
        let file =
            FileDescriptorProto { package, message_type: vec![message], ..Default::default() };
        lines(&FileDescriptorSet { file: vec![file] }.encode_to_vec())
    };
    let a = ("a", 1, Type::String, Label::Optional);
    let before = lines_of(&[a]);
    assert_eq!(before.iter().collect::<Vec<_>>(), ["field cnsmo.t.M 1 a: string"]);
    assert!(lines_of(&[a, ("b", 2, Type::Int64, Label::Optional)]).is_superset(&before));
    for changed in [
        ("a", 2, Type::String, Label::Optional),
        ("b", 1, Type::String, Label::Optional),
        ("a", 1, Type::Bytes, Label::Optional),
        ("a", 1, Type::String, Label::Repeated),
    ] {
        assert!(!lines_of(&[changed]).is_superset(&before), "{changed:?}");
    }
    assert!(!lines_of(&[]).is_superset(&before));
}

/// A line for each thing that a client may rely on.
fn lines(descriptors: &[u8]) -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    for file in FileDescriptorSet::decode(descriptors).unwrap().file {
        let package = file.package().to_owned();
        if !package.starts_with("cnsmo.") {
            continue;
        }
        for message in &file.message_type {
            of_message(&package, message, &mut lines);
        }
        for enumeration in &file.enum_type {
            of_enum(&package, enumeration, &mut lines);
        }
        for service in &file.service {
            for method in &service.method {
                let stream = |is: bool| if is { "stream " } else { "" };
                lines.insert(format!(
                    "rpc {package}.{}/{} ({}{}) returns ({}{})",
                    service.name(),
                    method.name(),
                    stream(method.client_streaming()),
                    method.input_type(),
                    stream(method.server_streaming()),
                    method.output_type(),
                ));
            }
        }
    }
    lines
}

fn of_message(scope: &str, message: &DescriptorProto, lines: &mut BTreeSet<String>) {
    let name = format!("{scope}.{}", message.name());
    for field in &message.field {
        let kind = match field.r#type() {
            Type::Message | Type::Enum => field.type_name().to_owned(),
            scalar => scalar.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
        };
        let label = if field.label() == Label::Repeated { "repeated " } else { "" };
        let one_of = match field.oneof_index.and_then(|at| message.oneof_decl.get(at as usize)) {
            Some(one_of) => format!(" of {}", one_of.name()),
            None => String::new(),
        };
        let (number, field) = (field.number(), field.name());
        lines.insert(format!("field {name} {number} {field}: {label}{kind}{one_of}"));
    }
    for nested in &message.nested_type {
        of_message(&name, nested, lines);
    }
    for enumeration in &message.enum_type {
        of_enum(&name, enumeration, lines);
    }
}

fn of_enum(scope: &str, enumeration: &EnumDescriptorProto, lines: &mut BTreeSet<String>) {
    for value in &enumeration.value {
        let (name, value, number) = (enumeration.name(), value.name(), value.number());
        lines.insert(format!("enum {scope}.{name} {number} {value}"));
    }
}
