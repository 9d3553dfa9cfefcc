use std::collections::HashMap;

use proptest::prelude::*;
use prost::Message as _;
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MapKey, ReflectMessage as _, Value};

use super::*;

/// Choices that a test case makes; shrinks to few and simple ones.
struct Tape<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Tape<'_> {
    /// Zeros behind the end.
    fn next(&mut self) -> u8 {
        let byte = self.bytes.get(self.at).copied().unwrap_or(0);
        self.at += 1;
        byte
    }

    fn number(&mut self) -> u64 {
        match self.next() % 5 {
            0 => 0,
            1 => 1,
            2 => u64::MAX,
            3 => 1 << 63,
            _ => u64::from_le_bytes(std::array::from_fn(|_| self.next())),
        }
    }

    fn text(&mut self) -> String {
        let alphabet = ['a', '"', '\\', '\n', '\0', 'ä', '日', '😀', '\u{2028}', '/'];
        (0..self.next() % 4).map(|_| alphabet[usize::from(self.next()) % alphabet.len()]).collect()
    }

    fn message(&mut self, of: &MessageDescriptor, depth: usize) -> DynamicMessage {
        let mut message = DynamicMessage::new(of.clone());
        let sign = if self.next().is_multiple_of(2) { 1 } else { -1 };
        match of.full_name() {
            "google.protobuf.Duration" => {
                let seconds = (self.number() % 315_576_000_000).cast_signed();
                let nanos = i32::try_from(self.number() % 1_000_000_000).unwrap();
                message.set_field_by_name("seconds", Value::I64(sign * seconds));
                message
                    .set_field_by_name("nanos", Value::I32(i32::try_from(sign).unwrap() * nanos));
            }
            "google.protobuf.Timestamp" => {
                let seconds = (self.number() % 62_135_596_800).cast_signed();
                let nanos = i32::try_from(self.number() % 1_000_000_000).unwrap();
                message.set_field_by_name("seconds", Value::I64(sign * seconds));
                message.set_field_by_name("nanos", Value::I32(nanos));
            }
            _ if depth == 0 => {}
            _ => {
                for field in of.fields() {
                    if !self.next().is_multiple_of(4) {
                        let value = self.field(&field, depth - 1);
                        message.set_field(&field, value);
                    }
                }
            }
        }
        message
    }

    fn field(&mut self, field: &FieldDescriptor, depth: usize) -> Value {
        let kind = field.kind();
        if field.is_list() {
            return Value::List((0..self.next() % 3).map(|_| self.value(&kind, depth)).collect());
        }
        if !field.is_map() {
            return self.value(&kind, depth);
        }
        let entry = kind.as_message().unwrap();
        let (keys, values) = (entry.map_entry_key_field(), entry.map_entry_value_field());
        assert_eq!(keys.kind(), Kind::String, "the tape knows no other keys");
        let map: HashMap<_, _> = (0..self.next() % 3)
            .map(|_| (MapKey::String(self.text()), self.value(&values.kind(), depth)))
            .collect();
        Value::Map(map)
    }

    #[expect(clippy::cast_possible_truncation, reason = "any bits will do")]
    fn value(&mut self, kind: &Kind, depth: usize) -> Value {
        match kind {
            Kind::Bool => Value::Bool(self.next() % 2 == 1),
            Kind::String => Value::String(self.text()),
            Kind::Bytes => Value::Bytes((0..self.next() % 5).map(|_| self.next()).collect()),
            Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Value::I32(self.number() as i32),
            Kind::Uint32 | Kind::Fixed32 => Value::U32(self.number() as u32),
            Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Value::I64(self.number().cast_signed()),
            Kind::Uint64 | Kind::Fixed64 => Value::U64(self.number()),
            Kind::Float => Value::F32(f32::from(self.next()) / 8.0),
            Kind::Double => Value::F64(f64::from(self.next()) / 8.0),
            // Numbers without a name too.
            Kind::Enum(_) => Value::EnumNumber(i32::from(self.next() % 8)),
            Kind::Message(of) => Value::Message(self.message(of, depth)),
        }
    }
}

fn text(message: &DynamicMessage) -> Vec<u8> {
    let mut text = bytes::BytesMut::new();
    json::write(message.encode_to_vec().into(), &message.descriptor(), &mut text).unwrap();
    text.to_vec()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn json_and_protobuf_say_the_same(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        for method in Api::new().unwrap().methods.values() {
            for of in [method.input(), method.output()] {
                let message = Tape { bytes: &bytes, at: 0 }.message(&of, 6);
                let text = text(&message);
                let read = json::read(&text, &of)
                    .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&text)));
                let [sent, received] = [message, read]
                    .map(|message| DynamicMessage::decode(of.clone(), &*message.encode_to_vec()));
                prop_assert_eq!(sent.unwrap(), received.unwrap(), "{}", String::from_utf8_lossy(&text));
            }
        }
    }

    /// What is accepted has one meaning.
    #[test]
    fn arbitrary_text_ends_in_no_panic(text in r#"(\{|\}|\[|\]|"resources"|"kind"|"KIND_NODE"|"networkPolicy"|:|,|1|1e400|-1|"\\ud800"|null|true){0,24}"#) {
        for method in Api::new().unwrap().methods.values() {
            if let Ok(message) = json::read(text.as_bytes(), &method.input()) {
                let again = json::read(&self::text(&message), &method.input()).unwrap();
                prop_assert_eq!(message.encode_to_vec(), again.encode_to_vec());
            }
        }
    }
}

#[track_caller]
fn refusal(rpc: &str, text: &str) -> String {
    let api = Api::new().unwrap();
    let status = json::read(text.as_bytes(), &api.methods[rpc].input()).unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    status.message().to_owned()
}

#[test]
fn refusals_name_the_field() {
    let apply = "/cnsmo.resource.v1.ResourceService/Apply";
    let rules = |rule: &str| {
        format!(
            r#"{{"resources": [{{}}, {{"firewallPolicy": {{"spec": {{"rules": [{rule}]}}}}}}]}}"#
        )
    };
    let at = "resources[1].firewallPolicy.spec.rules[0]";
    for (text, expected) in [
        (
            rules(r#"{"action": "ACTION_MAYBE"}"#),
            format!(r#"{at}.action: "ACTION_MAYBE" is none of ACTION_UNSPECIFIED, "#),
        ),
        (rules(r#"{"protocol": "six"}"#), format!("{at}.protocol: invalid digit found in string")),
        (
            rules(r#"{"protocol": 4294967296}"#),
            format!("{at}.protocol: out of range integral type"),
        ),
        (
            rules(r#"{"name": 1}"#),
            format!("{at}.name: invalid type: integer `1`, expected a string"),
        ),
        (rules("[]"), format!("{at}: invalid type: sequence, expected a map")),
        (r#"{"dryRun": 1}"#.into(), "dryRun: invalid type: integer `1`, expected a boolean".into()),
        ("[]".into(), "invalid type: sequence, expected a map".into()),
        (String::new(), "EOF while parsing a value at line 1 column 0".into()),
        ("{} {}".into(), "trailing characters at line 1 column 4".into()),
        ("{\"mode\": \"\u{1}\"}".into(), "mode: control character".into()),
    ] {
        let refusal = refusal(apply, &text);
        assert!(refusal.starts_with(&expected), "{text}: {refusal}");
    }
    let wait = "/cnsmo.resource.v1.ResourceService/WaitApplied";
    assert!(refusal(wait, r#"{"timeout": "soon"}"#).starts_with("timeout: "));
}

#[test]
fn what_is_not_known_is_ignored_and_both_names_are_taken() {
    let api = Api::new().unwrap();
    let of = api.methods["/cnsmo.resource.v1.ResourceService/Apply"].input();
    let read = |text: &str| json::read(text.as_bytes(), &of).unwrap();
    let expected = read(r#"{"dryRun": true, "mode": "MODE_CREATE"}"#);
    assert_ne!(expected, read("{}"));
    for same in [
        r#"{"dry_run": true, "mode": 1}"#,
        r#"{"dryRun": true, "mode": "MODE_CREATE", "colour": {"mode": "MODE_NONE", "a": [1e999, null]}}"#,
        r#"{"dryRun": true, "mode": "MODE_CREATE", "resources": null}"#,
    ] {
        assert_eq!(read(same), expected, "{same}");
    }
}

/// A stream's last line says `error` where other lines have the fields of the message.
#[test]
fn no_message_of_a_stream_has_a_field_error() {
    for (path, method) in Api::new().unwrap().methods {
        let streams = method.is_server_streaming();
        assert!(!streams || method.output().get_field_by_json_name("error").is_none(), "{path}");
    }
}

#[test]
fn the_description_has_every_rpc_and_every_schema_it_names() {
    let api = Api::new().unwrap();
    let openapi: serde_json::Value = serde_json::from_slice(&api.openapi).unwrap();
    for path in api.methods.keys() {
        assert!(openapi["paths"][path]["post"]["responses"]["200"].is_object(), "{path}");
    }
    let schemas = &openapi["components"]["schemas"];
    let text = String::from_utf8_lossy(&api.openapi);
    let mut references = 0;
    for reference in text.split(r##""$ref":"#/components/schemas/"##).skip(1) {
        let (name, _) = reference.split_once('"').unwrap();
        assert!(schemas[name].is_object(), "{name}");
        references += 1;
    }
    assert!(references > api.methods.len());
    let apply = &schemas["cnsmo.resource.v1.ApplyRequest"]["properties"];
    assert_eq!(
        apply["dryRun"]["description"],
        "Validate and say what would change; commit nothing."
    );
    assert_eq!(
        schemas["cnsmo.resource.v1.ApplyResponse"]["properties"]["revision"]["type"],
        "string"
    );
}
