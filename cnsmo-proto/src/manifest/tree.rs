//! A YAML document as a tree that knows the line of each value and keeps duplicate keys, so that errors can name the
//! place in the operator's words.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{DuplicateKeyPolicy, Spanned};

use super::Problem;
use crate::model::Invalid;

/// Values in one file, aliases expanded: room for a policy with [`crate::model::RULES_MAX`] rules, and a bound on memory.
const NODES_MAX: usize = 4_000_000;
/// Values that aliases may add: enough to share address lists between rules, too few for an alias bomb.
const ALIASED_MAX: usize = 200_000;
/// Levels of nesting. A manifest needs 6.
const DEPTH_MAX: usize = 24;
/// Documents in one file.
const DOCUMENTS_MAX: usize = 10_000;

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    pub(super) value: Value,
    pub(super) line: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Integer(i64),
    /// Also integers that do not fit.
    Float(f64),
    Text(String),
    List(Vec<Node>),
    /// In order, duplicates kept.
    Map(Vec<(String, Node)>),
}

/// The documents of a YAML stream; JSON is YAML. Ends after a syntax error, behind which nothing can be trusted.
pub(super) fn documents(text: &str) -> Vec<Result<Node, Problem>> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_nodes: NODES_MAX,
            max_events: 4 * NODES_MAX,
            max_depth: DEPTH_MAX,
            max_documents: DOCUMENTS_MAX,
        },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: ALIASED_MAX },
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        strict_booleans: true,
        reject_unsupported_tags: true,
        with_snippet: false,
    };
    // The message of the library says line and column.
    let problem = |error: serde_saphyr::Error| Problem::new(0, Invalid::new(error.to_string()));
    serde_saphyr::read_with_options(&mut text.as_bytes(), options)
        .map(|node| node.map_err(problem))
        .collect()
}

impl Node {
    pub(super) fn get(&self, key: &str) -> Option<&Self> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|(k, _)| k == key).map(|(_, node)| node),
            _ => None,
        }
    }

    /// The text at a path of keys.
    pub(super) fn text_of(&self, keys: &[&str]) -> Option<&str> {
        let node = keys.iter().try_fold(self, |node, key| node.get(key))?;
        match &node.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The line of the value at `path`, for example `rules[2].ports[0]`, or of the nearest one around it.
    pub(super) fn line_at(&self, path: &str) -> u64 {
        let mut node = self;
        for step in path.split(['.', '[']).filter(|step| !step.is_empty()) {
            let inner = match (&node.value, step.strip_suffix(']')) {
                (Value::List(items), Some(n)) => n.parse().ok().and_then(|n: usize| items.get(n)),
                _ => node.get(step),
            };
            let Some(inner) = inner else { break };
            node = inner;
        }
        node.line
    }

    /// What it is, for "expected a list, found ...".
    pub(super) fn describe(&self) -> String {
        const SHOWN_MAX: usize = 40;
        match &self.value {
            Value::Null => "nothing".to_owned(),
            Value::Bool(value) => format!("the boolean {value}"),
            Value::Integer(value) => format!("the number {value}"),
            Value::Float(value) => format!("the number {value}"),
            Value::Text(text) if text.chars().count() > SHOWN_MAX => {
                format!("the text `{}...`", text.chars().take(SHOWN_MAX).collect::<String>())
            }
            Value::Text(text) => format!("the text `{text}`"),
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "a mapping".to_owned(),
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Self { value: spanned.value, line: spanned.referenced.line() })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Value::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Integer(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(i64::try_from(value).map_or(Value::Float(value as f64), Value::Integer))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Value, E> {
        Ok(i64::try_from(value).map_or(Value::Float(value as f64), Value::Integer))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Value, E> {
        Ok(i64::try_from(value).map_or(Value::Float(value as f64), Value::Integer))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Value::Map(entries))
    }
}
